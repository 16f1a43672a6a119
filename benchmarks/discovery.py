"""Circuits of every task that the bundled models solve, of nodes and of edges, on the sparse model and its dense twin.

    python benchmarks/discovery.py [--model stdlib-small ...] [--task single_double_quote ...] [--seed 0]
                                   [--found out/discovery] [--out benchmarks/results] [--page docs/discovery.md]

A task counts as solved where at least 90 % of its held-out prompts are right. Node search and edge search follow the
same rule (agreement with the model, and its task loss, on the selection pairs); what they find is scored on the test
and the shifted split, which neither looks at. Whatever is in `--found` is not searched for again, so a run that was
interrupted goes on. Seconds are of processor time. A run over everything writes its tables to the page too.
"""

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.scores import score_circuit
from sparse_interp.results import write_whole

MODELS = ("stdlib-small", "stdlib-small-dense")
SOLVED = 0.9
N_PAIRS = 256
ENOUGH_TASKS = 6
KINDS = ("nodes", "edges")
SPLITS = ("test", "shifted")
SCORED = ("loss, model", "loss, circuit", "right, model", "right, circuit", "KL")
PAGE = """# What the bundled models do, and by which circuits

Written by the command below, which measures everything on it.

    {command}

A task counts as solved where at least {share} % of the held-out prompts are right; intervals are of 95 %, over
templates. A circuit is searched for on training prompts until it agrees with its model on selection prompts (KL at
most 0.2 nats, task losses within 0.03); what stands here was measured afterwards on prompts of two other splits: `test`
has other names, `shifted` other and longer templates too. Losses are those of the choice between the two answers, in
nats; KL is KL(model || circuit) over the vocabulary. Nodes outside a circuit are held at their means over text; seconds
are of processor time. With --found-only, searches that were not run to their end say "not run". An agreement like this
is no proof that the circuit is how the model does it: audit it."""


def solved_tasks(name: str, seed: int, folder: Path) -> list[str]:
    """The tasks of which the model gets nine tenths of the held-out prompts right."""
    kept = folder / name / "tasks.csv"
    if not kept.exists():
        scores = si.score_tasks(si.load(name), generator=torch.Generator().manual_seed(seed), progress=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        scores.save(kept)
    frame = pd.read_csv(kept)
    return frame[(frame.split == "test") & (frame.accuracy >= SOLVED)].task.tolist()


def found(path: Path, search) -> Circuit:
    """The circuit in `path`; searched for and put there if it is not."""
    if not path.exists():
        began = time.process_time()
        circuit = search()
        seconds = time.process_time() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        circuit.save(path)
        write_whole(path.with_name("seconds.json"), json.dumps(seconds))
    return Circuit.load(path)


def measured(model, circuit: Circuit, task: si.Task, seed: int) -> dict:
    """Loss, accuracy and divergence on the splits that no search has seen."""
    row = {"nodes": circuit.n_nodes, "edges": circuit.n_edges}
    for split in SPLITS:
        pairs = task.batch(N_PAIRS, split=split, generator=torch.Generator().manual_seed(seed + 1))
        scores = score_circuit(model, circuit, pairs)
        row |= {
            f"{split} loss, model": scores.model.task_loss.mean().item(),
            f"{split} loss, circuit": scores.circuit.task_loss.mean().item(),
            f"{split} right, model": scores.model.correct.mean().item(),
            f"{split} right, circuit": scores.circuit.correct.mean().item(),
            f"{split} KL": scores.circuit.kl.mean().item(),
        }
    return row


def rows_of(name: str, task_name: str, kinds: list[str], seed: int, folder: Path, found_only: bool) -> list[dict]:
    """One row for the circuit of each kind; a search that finds none says why."""
    model = si.load(name)
    task, place = si.task(task_name, model.tokenizer), folder / name / task_name
    rows = []
    searches = {
        "nodes": lambda: si.find_circuit(model, task, generator=torch.Generator().manual_seed(seed)),
        "edges": lambda: si.find_edges(model, None, task, generator=torch.Generator().manual_seed(seed)),
    }
    for kind in kinds:
        row = {"model": name, "task": task_name, "pruned": kind}
        if found_only and not (place / kind / "circuit.json").exists():
            rows.append(row | {"note": "not searched for"})
            continue
        try:
            circuit = found(place / kind / "circuit.json", searches[kind])
        except si.CircuitError as error:
            rows.append(row | {"note": str(error)})
            continue
        seconds = json.loads((place / kind / "seconds.json").read_text())
        rows.append(row | measured(model, circuit, task, seed) | {"seconds": round(seconds)})
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    return rows


def geometric_means(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Edges of both models and their ratio, over the tasks of which both have a circuit; None if these are few."""
    tables = {}
    for kind, rows in frame.dropna(subset=["edges"]).groupby("pruned"):
        both = rows.pivot(index="task", columns="model", values="edges").reindex(columns=list(MODELS)).dropna()
        if len(both) >= ENOUGH_TASKS:
            means = np.exp(np.log(both).mean())
            tables[kind] = {**means, "tasks": len(both), "dense / sparse": means[MODELS[1]] / means[MODELS[0]]}
    return pd.DataFrame(tables).T if tables else None


def page(scores: dict[str, pd.DataFrame], frame: pd.DataFrame, means: pd.DataFrame | None, command: str) -> str:
    """The tables as they stand in the documentation."""
    parts = [PAGE.format(command=command, share=round(100 * SOLVED))]
    for name, table in scores.items():
        shown = pd.DataFrame({"task": table.task, "split": table.split, "prompts": table.n_prompts})
        for column, digits in (("accuracy", 2), ("loss_nats", 2), ("logit_diff", 1)):
            bounds = table[[column, f"{column}_low", f"{column}_high"]].itertuples(index=False)
            shown[column] = [f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for mean, low, high in bounds]
        parts.append(f"## What {name} does\n\n{markdown(shown)}")
    for split in SPLITS:
        columns = [f"{split} {of}" for of in SCORED]
        shown = frame[["model", "task", "pruned", "nodes", "edges", *columns]].copy()
        shown[columns] = shown[columns].map("{:.3f}".format)
        parts.append(f"## Circuits, on the {split} split\n\n{markdown(shown)}")
    wide = frame.pivot(index=["model", "task"], columns="pruned", values=["nodes", "edges", "seconds"])
    wide.columns = [f"{value}, {kind} pruned" for value, kind in wide.columns]
    wide["edges left, share"] = (wide["edges, edges pruned"] / wide["edges, nodes pruned"]).map("{:.2f}".format)
    parts.append(f"## Pruning edges instead of nodes\n\n{markdown(wide.reset_index())}")
    said = f"Fewer than {ENOUGH_TASKS} tasks have circuits of both models."
    if means is not None:
        said = markdown(means.round(1).reset_index(names="pruned"))
    parts.append(f"## Sparse against dense: geometric means of edges\n\n{said}")
    return "\n\n".join(parts) + "\n"


def markdown(table: pd.DataFrame) -> str:
    """A table of text; whole numbers have no point."""
    shown = table.astype(object).where(table.notna(), "not run").replace("nan", "not run")
    rows = [[f"{cell:.0f}" if isinstance(cell, float) and cell == round(cell) else str(cell) for cell in row]
            for row in shown.itertuples(index=False)]  # fmt: skip
    head = [list(map(str, table.columns)), ["---"] * len(table.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--task", nargs="+", help="only these of the solved tasks")
    arguments.add_argument("--pruned", nargs="+", default=list(KINDS), choices=KINDS)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--found-only", action="store_true", help="search for nothing more; score what there is")
    arguments.add_argument("--found", type=Path, default=Path("out/discovery"))
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "discovery.md")
    given = arguments.parse_args()
    rows = []
    for name in given.model:
        for task in solved_tasks(name, given.seed, given.found):
            if given.task is None or task in given.task:
                rows += rows_of(name, task, given.pruned, given.seed, given.found, given.found_only)
    frame = pd.DataFrame(rows)
    means = geometric_means(frame)
    print(frame.to_string(index=False))
    print(f"fewer than {ENOUGH_TASKS} tasks are solved by both" if means is None else means.to_string())
    if given.task is None and set(given.model) == set(MODELS) and set(given.pruned) == set(KINDS):
        command = f"python benchmarks/discovery.py --seed {given.seed}" + " --found-only" * given.found_only
        scores = {name: pd.read_csv(given.found / name / "tasks.csv") for name in MODELS}
        record = {
            "command": command,
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "rows": json.loads(frame.to_json(orient="records")),
            "geometric means": None if means is None else json.loads(means.to_json(orient="index")),
        }
        write_whole(given.out / "discovery.json", json.dumps(record, indent=1) + "\n")
        write_whole(given.page, page(scores, frame, means, command))


if __name__ == "__main__":
    main()
