"""Many masks trained at once on one model, against the same masks one after the other.

    python benchmarks/many_masks.py [--repeats 7] [--threads 1] [--device cpu] [--out benchmarks/results]

Two models: the bundled sparse one, where a step is arithmetic, and a hand-built one of 100 nodes, where it is mostly
overhead. For S = 1, 4, 8 and 16 masks, each with its own seed and learning rate, a step of all of them together and S
steps one by one take turns, so a busy machine slows both alike; figures are medians, ratios medians of the ratios
within a repeat. The largest difference between their gradients is that of a first step. Gates are hard, so whole runs
are compared by what comes out: how many gates are open in the end, and how far the circuit of these is from the model
on prompts held out. On a GPU (`--device cuda`) every figure waits for the device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from abs_topk import machine

import sparse_interp as si
from sparse_interp.circuit.find import kept_by
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.answers import all_answer_logits, frozen
from sparse_interp.interventions.gates import NodeGates
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import _Search, _step, learn_many
from sparse_interp.interventions.selection import Selection
from sparse_interp.model.text import evaluating
from sparse_interp.model.zoo import means_of

SIZES = (1, 4, 8, 16)
STEP = PruneConfig(n_steps=1000, batch_size=32)
SHORT = PruneConfig(n_steps=60, batch_size=16, lr=0.1, k_coef=5e-3, price_rate=0.05)


def subjects(device: str) -> dict[str, tuple]:
    """Model, task and baseline of each."""
    sparse = si.load("stdlib-small").to(device)
    truth = ground_truth("quote")
    hand = truth.model.to(device)
    blocks = truth.blocks(64, generator=torch.Generator().manual_seed(0))
    return {
        "stdlib-small": (sparse, si.task("single_double_quote", sparse.tokenizer), means_of(sparse)),
        "hand-built": (hand, truth.task, si.mean_activations(hand, blocks)),
    }


def seeded(seeds: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def unlike(config: PruneConfig, n: int) -> list[PruneConfig]:
    """Settings that differ between masks, as in a search over them."""
    return [replace(config, lr=config.lr * (1 + i / n)) for i in range(n)]


def stepping(model, pairs, gates: NodeGates) -> Callable[[], None]:
    """A function that takes one step with all masks of `gates`."""
    batch = pairs.both_sides().to(model.embed.W_E.device)
    searches = [_Search(gates, i, pairs.lengths) for i in range(len(gates.taus))]
    with evaluating(model):
        reference = all_answer_logits(model, batch)

    def step() -> None:
        with evaluating(model), frozen(model):
            _step(model, gates, searches, batch, reference, 0)
        if batch.clean.is_cuda:
            torch.cuda.synchronize()

    return step


def timed(side: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    side()
    return 1e3 * (time.perf_counter() - began)


def steps_row(name: str, model, task, means, n: int, repeats: int) -> dict[str, object]:
    """A step of `n` masks together, and of each alone."""
    pairs = task.batch(128, generator=torch.Generator().manual_seed(0))
    configs = unlike(STEP, n)
    many = NodeGates(model, means, configs, seeded(range(n)))
    each = [NodeGates(model, means, [c], [g]) for c, g in zip(configs, seeded(range(n)), strict=True)]
    together, singles = stepping(model, pairs, many), [stepping(model, pairs, one) for one in each]
    together(), [single() for single in singles]
    apart = zip(many.gains, each, strict=True)  # after a first step the gain is its gradient
    largest = max(float((gain - one.gains[0]).abs().max()) for gain, one in apart)
    times = [(timed(together), timed(lambda: [single() for single in singles])) for _ in range(repeats)]
    return {
        "model": name,
        "n_masks": n,
        "largest_gradient_difference": largest,
        "together_ms": statistics.median(t for t, _ in times),
        "one_by_one_ms": statistics.median(t for _, t in times),
        "ratio": statistics.median(alone / t for t, alone in times),
    }


def runs_row(name: str, model, task, means, n: int) -> dict[str, object]:
    """What whole short runs come to: open gates, and KL(model || circuit of these) on prompts held out."""
    pairs = task.batch(192, generator=torch.Generator().manual_seed(0))
    train, held_out = pairs.rows(slice(0, 128)), pairs.rows(slice(128, None))
    selection = Selection(model, held_out, means)
    row: dict[str, object] = {"model": name, "n_runs": n, "config": {"n_steps": SHORT.n_steps, "lr": SHORT.lr}}
    for side, size in (("together", n), ("one_by_one", 1)):
        found = []
        for first in range(0, n, size):
            seeds = range(first, first + size)
            found += learn_many(model, train, [SHORT] * size, means, generators=seeded(seeds))
        sizes = [search.n_open for search in found]
        kls = [selection.fit(kept_by(search.order[: search.n_open], model, SHORT)).kl for search in found]
        row |= {f"{side}_open_nodes": sizes, f"{side}_kl_nats": [round(kl, 4) for kl in kls]}
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--runs", type=int, default=8)
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows, runs = [], []
    print(f"{'model':>14} {'masks':>6} {'together ms':>12} {'one by one ms':>14} {'ratio':>7} {'gradients apart':>16}")
    for name, subject in subjects(given.device).items():
        for n in SIZES:
            row = steps_row(name, *subject, n, given.repeats)
            rows.append(row)
            print(
                f"{name:>14} {n:6} {row['together_ms']:12.1f} {row['one_by_one_ms']:14.1f} {row['ratio']:6.2f}x "
                f"{row['largest_gradient_difference']:16.1e}",
                flush=True,
            )
    for name, subject in subjects(given.device).items():
        row = runs_row(name, *subject, given.runs)
        runs.append(row)
        for side in ("together", "one_by_one"):
            sizes, kls = row[f"{side}_open_nodes"], row[f"{side}_kl_nats"]
            print(f"{name:>14} {side:>11}: open {sorted(sizes)}, KL {sorted(kls)}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    result = {"machine": machine() | {"device": device}, "repeats": given.repeats, "steps": rows, "runs": runs}
    partial = given.out / "many_masks.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(given.out / "many_masks.json")


if __name__ == "__main__":
    main()
