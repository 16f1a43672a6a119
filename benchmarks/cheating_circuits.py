"""Does the worst case under partial ablation tell true circuits from cheating ones? On models whose circuit is known.

    python benchmarks/cheating_circuits.py [--case quote ...] [--board default] [--seed 0] [--found-only]
                                           [--found out/cheating] [--out benchmarks/results]

    true        every key, and what the default search finds if a key is in it
    cheating    what else a search brings: told to do the task well (the paper's objective), or to agree with the model,
                if it ends without a key; on shuffled labels; on nonsense; on labels that have nothing to do with it;
                and with one node of every key held from the start, so that no key is left to be found

Models are the hand-built ones, the planted cases of a board, and those planted beside two heads that cancel each other,
either of which, with the other held, stands in for one of the key. A twin that a model does as it is (a remark may be a
word that it goes by) is nothing to cheat on, and is left out. Each circuit is measured on test pairs of the task
that it is one of: task loss, and KL(model || circuit), with nothing outside left, with random shares of it, and at the
worst. Labels that a model does not know leave a search with nothing to find: a search that ends above a task loss of
0.15 nats may end below one of LADDER, and the AUROC is given with those and without. AUROC: P(worst case of a cheating
circuit > that of a true one), with 95 % intervals over models.

Whatever is in `--found` (a file per case and search) is not measured again, so a run that was interrupted goes on.
Seconds are of processor time.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.circuit.find import find_circuit, sized
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.ground_truth import ground_truths
from sparse_interp.faithfulness.partial import Outcome, partial_ablation
from sparse_interp.faithfulness.planted_cases import planted_cases
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import learn_gates
from sparse_interp.interventions.selection import Selection, split_pairs
from sparse_interp.model.sites import NodeValues
from sparse_interp.results import write_whole
from sparse_interp.tasks.controls import nonsense, relabelled, remarks_for, shuffled
from sparse_interp.tasks.task import answer_loss
from sparse_interp.tasks.templates import TemplateFile

AGREEMENT = PruneConfig(n_train=60, n_selection=36, n_steps=40, batch_size=16)
"""The default search, but for fewer pairs and steps: the models are small, and so are their vocabularies."""

TASK_LOSS = replace(AGREEMENT, objective="task_loss")
"""The paper's objective and stopping rule."""

LADDER = (0.15, 0.3, 0.5, 0.65)
"""Task losses, nats, of which a circuit has to reach the first that it can; log 2 is that of a coin."""

N_PAIRS = 16
N_MEANS = 64

MEASURES = ("worst loss", "worst KL", "expected loss", "expected KL", "full loss", "full KL")


# -- circuits -------------------------------------------------------------------------------------------------------


def unrelated_labels(task: si.Task) -> tuple[str, str]:
    """Two words of the prompts that no answer is."""
    source = task.source
    assert isinstance(source, TemplateFile)
    first, second, *_ = source.fillers["test"]["word"]
    return f" {first}", f" {second}"


TWINS: dict[str, Callable[[si.Task], si.Task]] = {
    "task loss": lambda task: task,
    "without a needed node": lambda task: task,
    "shuffled labels": lambda task: shuffled(task),
    "nonsense": lambda task: nonsense(task, remarks_for(task)),
    "unrelated labels": lambda task: relabelled(task, unrelated_labels(task)),
}
"""What circuits are searched for by task loss."""

SEARCHES = ("key", "agreement", *TWINS)


def circuits(
    truth: GroundTruth, search: str, task: si.Task, means: NodeValues, generator: torch.Generator
) -> Iterator[tuple[Circuit, float | None]]:
    """What a search finds, or the keys, with the task loss that it reached for; nothing where nothing is found."""
    model = truth.model
    if search == "key":
        yield from ((Circuit.of_nodes(model, key.nodes, means, prune=AGREEMENT), None) for key in truth.keys)
    elif search == "agreement":
        yield find_circuit(model, task, AGREEMENT, baseline=means, generator=generator, progress=False), None
    else:
        kept = [sorted(key.nodes) for key in truth.keys] if search == "without a needed node" else []
        held = [nodes[int(torch.randint(len(nodes), (), generator=generator))] for nodes in kept]
        with ablate(model, held, means) if held else nullcontext():
            yield from by_task_loss(truth, task, means, generator)


NONE_TO_CHEAT_ON = ("shuffled labels", "nonsense", "unrelated labels")
"""Searches on labels that a model should not know."""


@torch.no_grad()
def check_unknown(truth: GroundTruth, task: si.Task, generator: torch.Generator) -> None:
    """Raise TaskError if the model as it is has a task loss that a cheating circuit would be looked for with."""
    batch = task.batch(N_PAIRS, "test", generator=generator).both_sides()
    loss = answer_loss(all_answer_logits(truth.model, batch), batch).mean().item()
    if loss <= LADDER[-1]:
        raise si.TaskError(f"the model as it is has a task loss of {loss:.2f} nats on this twin of the task")


def by_task_loss(
    truth: GroundTruth, task: si.Task, means: NodeValues, generator: torch.Generator
) -> Iterator[tuple[Circuit, float]]:
    """The smallest circuit that reaches the first task loss of the ladder that any reaches."""
    train, select = split_pairs(task, TASK_LOSS, generator)
    search = learn_gates(truth.model, train, TASK_LOSS, means, generator=generator)
    selection, seed = Selection(truth.model, select, means), generator.initial_seed()
    for target in LADDER:
        config = replace(TASK_LOSS, target_task_loss=target)
        try:
            yield sized(truth.model, task, search, selection, means, config, seed=seed), target
        except si.CircuitError:
            continue
        return


def cell(name: str, truth: GroundTruth, search: str, seed: int) -> list[dict]:
    """A row for each circuit of one search in one model; a row without a circuit where there is none."""
    generator = torch.Generator().manual_seed(seed)
    means = mean_activations(truth.model, truth.blocks(N_MEANS, generator=generator), batch_size=128)
    row = {"case": name, "search": search, "key_nodes": len(truth.nodes)}
    began = time.process_time()
    try:
        task = TWINS[search](truth.task) if search in TWINS else truth.task
        if search in NONE_TO_CHEAT_ON:
            check_unknown(truth, task, torch.Generator().manual_seed(seed + 1))
        found = list(circuits(truth, search, task, means, generator))
    except (si.TaskError, si.CircuitError) as error:
        return [row | {"found": False, "why": str(error), "seconds": time.process_time() - began}]
    row["seconds"] = time.process_time() - began
    if not found:
        return [row | {"found": False, "why": f"no circuit has a task loss of {LADDER[-1]} nats or less"}]
    rows = []
    for circuit, target in found:
        on_its_task = search in ("key", "agreement", "task loss")
        true = on_its_task and any(key.nodes <= circuit.node_set for key in truth.keys)
        pairs = task.batch(N_PAIRS, "test", generator=torch.Generator().manual_seed(seed + 1))
        table = partial_ablation(truth.model, circuit, pairs, generator=generator)
        measured = {"found": True, "true": true, "target": target, "n_nodes": circuit.n_nodes}
        for which in ("full", "expected", "worst"):
            outcome: Outcome = getattr(table, which)
            measured |= {f"{which} loss": outcome.task_loss.mean, f"{which} KL": outcome.kl.mean}
        rows.append(row | measured)
    return rows


# -- what they show -------------------------------------------------------------------------------------------------


def auroc(frame: pd.DataFrame, measure: str) -> float:
    """P(a cheating circuit has more of it than a true one), of equal ones half."""
    return float(_aurocs(frame, measure, torch.ones(1, frame.case.nunique(), dtype=torch.float64)))


def interval(frame: pd.DataFrame, measure: str, n: int = 1000) -> tuple[float, float]:
    """95 % interval of the AUROC over models drawn again."""
    n_cases, generator = frame.case.nunique(), torch.Generator().manual_seed(0)
    drawn = torch.randint(n_cases, (n, n_cases), generator=generator)
    found = _aurocs(frame, measure, torch.nn.functional.one_hot(drawn, n_cases).sum(1).double())
    low, high = found[found.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _aurocs(frame: pd.DataFrame, measure: str, weights: torch.Tensor) -> torch.Tensor:
    """The AUROC with the circuits of every case weighted, `weights` [draw case] in order of first appearance."""
    values, of_case = torch.tensor(frame[measure].to_numpy()), torch.tensor(pd.factorize(frame.case)[0])
    true = torch.tensor(frame.true.to_numpy(dtype=bool))
    apart = values[~true, None] - values[true]
    more = (apart.sign() + 1) / 2
    cheating, others = weights[:, of_case[~true]], weights[:, of_case[true]]
    return torch.einsum("dc,ct,dt->d", cheating, more, others) / (cheating.sum(1) * others.sum(1))


def roc(frame: pd.DataFrame, measure: str) -> list[tuple[float, float, float]]:
    """(threshold, share of true circuits above it, share of cheating ones above it), from the strictest."""
    true, cheating = frame[frame.true][measure], frame[~frame.true][measure]
    return [
        (float(at), float((true >= at).mean()), float((cheating >= at).mean()))
        for at in sorted(set(frame[measure]), reverse=True)
    ]


def separations(found: pd.DataFrame) -> list[dict]:
    """The AUROC of every measure, over several sets of cheating circuits."""
    cheating = ~found.true
    sets = {
        "all": cheating,
        "task loss at most 0.15 as found": cheating & (found["full loss"] <= LADDER[0]),
        "KL at most 0.2 as found": cheating & (found["full KL"] <= AGREEMENT.max_kl),
    }
    sets |= {f"by {search}": cheating & (found.search == search) for search in SEARCHES[1:]}
    rows = []
    for name, members in sets.items():
        part = found[found.true | members]
        if not members.any() or not found.true.any():
            continue
        for measure in MEASURES:
            low, high = interval(part, measure)
            row = {"cheating": name, "n_true": int(part.true.sum()), "n_cheating": int(members.sum())}
            row |= {"measure": measure, "auroc": auroc(part, measure), "low": low, "high": high}
            rows.append(row | {"roc": roc(part, measure)})
    return rows


def report(rows: list[dict]) -> None:
    """Print what was found, and how well each measure tells it."""
    frame = pd.DataFrame(rows)
    counts = frame.groupby("search", sort=False).found.agg(["sum", "size"])
    print(counts.rename(columns={"sum": "circuits", "size": "searches"}).to_string())
    found = frame[frame.found].astype({"true": bool})
    print(found.drop(columns=["why", "found", "seconds"], errors="ignore").round(3).to_string(index=False))
    separated = pd.DataFrame(separations(found))
    print(separated.drop(columns="roc").round(3).to_string(index=False))
    for measure in MEASURES[:2]:
        points = separated[(separated.cheating == "all") & (separated.measure == measure)].roc.iloc[0]
        print(f"\nROC of {measure}: threshold (nats), true circuits above it, cheating circuits above it")
        print(pd.DataFrame(points).round(3).to_string(index=False, header=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", help="hand-built models and planted cases; all if none is named")
    parser.add_argument("--board", default="default", help="which planted cases: default or full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found-only", action="store_true", help="measure nothing more, report what there is")
    parser.add_argument("--found", type=Path, default=Path("out/cheating"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    trapped = {name: build for name, build in planted_cases("full").items() if name.endswith("opposed")}
    builds = {**ground_truths(), **trapped, **planted_cases(args.board)}
    rows = []
    for name in args.case or builds:
        truth = None
        for search in SEARCHES:
            path = args.found / name / f"{search.replace(' ', '_')}-{args.seed}.json"
            if not path.exists():
                if args.found_only:
                    continue
                truth = truth or builds[name]()
                write_whole(path, json.dumps(cell(name, truth, search, args.seed), indent=1))
                print(f"{name}, {search}", flush=True)
            rows += json.loads(path.read_text())
    report(rows)
    frame = pd.DataFrame(rows)
    result = {
        "command": "benchmarks/cheating_circuits.py",
        "board": args.board,
        "seed": args.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cases": frame.case.unique().tolist(),
        "circuits": rows,
        "separations": separations(frame[frame.found].astype({"true": bool})),
    }
    write_whole(args.out / "cheating_circuits.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
