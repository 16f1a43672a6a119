"""Exact patching of every node against one run per node with a hook, and how well estimates rank what it finds.

    python benchmarks/patching_sweep.py [--prompts 16] [--every 100] [--threads 1] [--out benchmarks/results]

On every task that the bundled sparse model, or its dense twin, gets right in at least 90 % of the benchmark's prompts:
the sweep over all nodes, and between two halves of one-at-a-time runs of every hundredth node (`run_with_hooks` on the
whole batch, as anybody would). Both are held against each other node by node; the time of all nodes one at a time is
that of those that were run, times the number of nodes over theirs. Times are processor time, so that a busy machine
stretches neither; ratios are medians over tasks. Estimates: the gradient, and gradients integrated over inputs and over
nodes; Spearman's correlation with the exact effects over all nodes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from abs_topk import machine

import sparse_interp as si
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.model.sites import flat, places
from sparse_interp.tasks.task import TaskBatch, is_correct

MODELS = ("stdlib-small", "stdlib-small-dense")
ENOUGH = 0.9
ESTIMATES = {"gradient": 1, "integrated inputs": 5, "integrated nodes": 3}
"""Methods, and the steps that each takes."""


@torch.no_grad()
def one_at_a_time(model: si.HookedSparseTransformer, batch: TaskBatch, nodes: list[si.Node]) -> list[float]:
    """The mean logit difference with each of `nodes` patched from the clean run, a run of the batch for each."""
    mask, names = batch.attention_mask, {place.hook for place in places(model.cfg)}
    _, clean = model.run_with_cache(batch.clean, attention_mask=mask, names_filter=lambda name: name in names)
    hook_of = {(place.layer, place.site): place.hook for place in places(model.cfg)}
    found = []
    for node in nodes:
        name = hook_of[node.layer, node.site]

        def patch(activation: torch.Tensor, hook: object, name: str = name, node: si.Node = node) -> torch.Tensor:
            patched = flat(activation).clone()
            patched[..., node.channel] = flat(clean[name])[..., node.channel]
            return patched.view_as(activation)

        logits = model.run_with_hooks(batch.corrupt, attention_mask=mask, fwd_hooks=[(name, patch)])
        found.append(float(si.logit_difference(logits, batch).mean()))
    return found


def timed(work: object, *arguments: object, **options: object) -> tuple[object, float]:
    """What it gives, and the seconds of processor time that it takes."""
    began = time.process_time()
    result = work(*arguments, **options)
    return result, time.process_time() - began


def measure(model: si.HookedSparseTransformer, batch: TaskBatch, every: int) -> dict[str, object]:
    """One task: the sweep between two halves of runs one at a time, and the estimates."""
    order = si.patch_nodes(model, batch.rows(slice(0, 1)), progress=False).frame  # compiles what needs it, too
    nodes = [
        si.Node(*row) for row in order[["layer", "site", "channel"]].iloc[every // 2 :: every].itertuples(index=False)
    ]
    half = len(nodes) // 2
    first, first_s = timed(one_at_a_time, model, batch, nodes[:half])
    exact, sweep_s = timed(si.patch_nodes, model, batch, progress=False)
    second, second_s = timed(one_at_a_time, model, batch, nodes[half:])
    swept = exact.frame.metric.iloc[every // 2 :: every].to_list()
    errors = [abs(a - b) for a, b in zip(swept, [*first, *second], strict=True)]
    naive_s = (first_s + second_s) * len(order) / len(nodes)
    row = {
        "n_nodes": len(order),
        "n_nodes_one_at_a_time": len(nodes),
        "sweep_s": sweep_s,
        "one_at_a_time_s": naive_s,
        "ratio": naive_s / sweep_s,
        "largest_difference": max(errors),
        "largest_effect": float(exact.frame.effect.abs().max()),
        "n_nodes_without_effect": int((exact.frame.effect == 0).sum()),
        "estimates": {},
    }
    for method, steps in ESTIMATES.items():
        table, estimate_s = timed(si.attribute_nodes, model, batch, method=method, steps=steps, progress=False)
        ranks = exact.rank_correlation(table).frame
        row["estimates"][method] = {
            "steps": steps,
            "seconds": estimate_s,
            "spearman": dict(zip(ranks.site, ranks.spearman.round(4), strict=True)),
            "spearman_of_moved": float(ranks.spearman_moved.iloc[-1].round(4)),
        }
    return row


def solved(model: si.HookedSparseTransformer, n_prompts: int) -> dict[str, TaskBatch]:
    """The benchmark's prompts of every task that the model solves on them."""
    found = {}
    for name in si.tasks().frame.task.unique():
        try:
            batch = si.task(name, model.tokenizer).batch(
                n_prompts, split="test", generator=torch.Generator().manual_seed(0)
            )
        except si.TaskError:
            continue
        if batch.clean.shape[1] > model.cfg.n_ctx:
            continue
        with torch.no_grad():
            sides = [is_correct(answer_logits(model, side), side).mean() for side in (batch, batch.swapped())]
        if sum(sides) / 2 >= ENOUGH:
            found[name] = batch
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prompts", type=int, default=16)
    options.add_argument("--every", type=int, default=100)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, object] = {"machine": machine(), "prompts": given.prompts, "every": given.every, "models": {}}
    for name in MODELS:
        model, rows = si.load(name), {}
        for task, batch in solved(model, given.prompts).items():
            rows[task] = row = measure(model, batch, given.every)
            ranks = ", ".join(f"{method} {e['spearman']['all']:.3f}" for method, e in row["estimates"].items())
            print(
                f"{name} {task}: {row['sweep_s']:.1f} s, one at a time {row['one_at_a_time_s']:.0f} s, "
                f"{row['ratio']:.0f}x, off by {row['largest_difference']:.1e}; ranks: {ranks}",
                flush=True,
            )
        ratio = statistics.median(row["ratio"] for row in rows.values())
        ranks = {
            method: statistics.median(row["estimates"][method]["spearman"]["all"] for row in rows.values())
            for method in ESTIMATES
        }
        print(f"{name}: median {ratio:.0f}x over {len(rows)} tasks; median rank correlations {ranks}", flush=True)
        result["models"][name] = {"ratio": ratio, "spearman": ranks, "tasks": rows}
        given.out.mkdir(parents=True, exist_ok=True)
        partial = given.out / "patching_sweep.json.partial"
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(given.out / "patching_sweep.json")


if __name__ == "__main__":
    main()
