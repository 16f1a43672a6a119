"""Which objective and which scheme find the circuit that is there, and find none where there is none.

    python benchmarks/faithful_pruning.py [--share quick|full] [--plan | --collect] [--jobs 1]
                                          [--model quote ...] [--task ...] [--twin real ...] [--setting agreement ...]
                                          [--cells out/faithful_pruning] [--out benchmarks/results]

A *cell* is one search: a model, a task, a twin of it, a setting, a seed. Models are hand-built and planted ones, whose
circuit is known, and the bundled ones, on the tasks that they solve. Twins (faithfulness/controls.py): `real`;
`nonsense`, labels and answers re-paired by an irrelevant remark; `reinitialised`, the network's weights drawn anew.
What a search finds is measured on pairs of the test and the shifted split, which no search has seen, and on bundled
models audited (`si.audit`, level quick).

Every cell is a file of its own in `--cells`, which appears whole or not at all, so that a study that was interrupted
goes on, and several processes (`--jobs`, or this command started again) share one: each takes the next cell that is
neither there nor being made. A cell made with other settings than those below is made anew. Cells come in the order
of what they add; the share `quick` is the first of them, `full` are all. `--plan` says how many there are and how long
the rest will take, by the processor time of those that are done; `--collect` writes the tables, which every run does
in the end:

    gap        nodes of the nonsense circuit / nodes of the real one, at one bound on what the search was told to reach;
               infinite where the search finds a circuit for the task and none for its twin
    by setting over all tasks: recovery of known circuits, the gap, and how circuits do where they were not searched
    wins       of the settings that find every known circuit exactly, those whose gap is at least 5 on the largest share
               of solved tasks; of these the one whose circuits the worst partial ablation leaves nearest to their
               model, on the tasks that it shares with plain agreement

`--out` gets `faithful_pruning.csv` (a row per cell) and `faithful_pruning.json` (both tables, and what made them).
"""

import argparse
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

import sparse_interp as si
from sparse_interp.circuit.find import kept_by, sized
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.controls import nonsense_twin, reinitialised, teacher_of
from sparse_interp.faithfulness.draft import WORDS
from sparse_interp.faithfulness.ground_truth import ground_truth, ground_truths, nearest_key, recovery
from sparse_interp.faithfulness.inside import agreement_inside
from sparse_interp.faithfulness.partial import partial_ablation
from sparse_interp.faithfulness.planted_cases import planted_cases
from sparse_interp.faithfulness.scores import prompt_scores
from sparse_interp.faithfulness.thresholds import FOUR, MINIMAL
from sparse_interp.interventions.answers import Teacher
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.pruning import GateSearch, learn_gates
from sparse_interp.interventions.selection import Selection, split_pairs
from sparse_interp.model.dense import HookedModel, hooked
from sparse_interp.model.sites import Node, NodeValues, n_nodes
from sparse_interp.model.zoo import means_of
from sparse_interp.results import write_whole
from sparse_interp.tasks.task import TaskBatch

RESULTS = Path(__file__).parent / "results"

PAPER, DEFAULT = "task loss", "agreement"

SETTINGS = {
    PAPER: {"objective": "task_loss", "schemes": ("full",), "frozen_norms": False},
    DEFAULT: {"objective": "agreement", "schemes": ("full",), "frozen_norms": False},
}
for _objective in (PAPER, DEFAULT):
    _base = SETTINGS[_objective]
    SETTINGS |= {
        f"{_objective}, norms frozen": _base | {"frozen_norms": True},
        f"{_objective}, stochastic": _base | {"schemes": ("stochastic",)},
        f"{_objective}, adversarial": _base | {"schemes": ("adversarial",)},
        f"{_objective}, full + stochastic": _base | {"schemes": ("full", "stochastic")},
        f"{_objective}, full + adversarial": _base | {"schemes": ("full", "adversarial")},
    }
SETTINGS |= {
    "task loss, sized by agreement": SETTINGS[PAPER] | {"target": "agreement"},
    "agreement, full + stochastic, norms frozen": SETTINGS["agreement, full + stochastic"] | {"frozen_norms": True},
    "agreement, full + adversarial, norms frozen": SETTINGS["agreement, full + adversarial"] | {"frozen_norms": True},
    "logit difference": SETTINGS[DEFAULT] | {"objective": "logit_difference"},
}
"""What differs between searches; everything else is as PruneConfig has it."""

MAIN = (PAPER, DEFAULT, "agreement, norms frozen", "agreement, full + stochastic", "agreement, full + adversarial")
"""Settings that are tried on everything."""

PLANTED = planted_cases()
"""Models whose circuit is known, hidden in larger ones: those of the default board."""

TWINS = ("real", "nonsense", "reinitialised")
BUNDLED = ("stdlib-small", "stdlib-small-dense")
SPOKEN = (f"{WORDS['train'][0]} ", f"{WORDS['train'][1]} ")
"""Remarks to hand-built models, which know no others: words that no answer depends on."""

SPLITS = ("test", "shifted")
AUDITED = {f"audit_{about.replace(' ', '_')}": about for about in FOUR}
"""Columns of the four things that a verdict rests on."""

N_PAIRS, N_FEWER = 128, 64
"""Pairs on which a circuit is measured; and of them those on which rankings and adversaries are."""

KL_BOUNDS, LOSS_BOUNDS = (0.1, 0.2, 0.5, 1.0), (0.15,)
"""Bounds, nats, at which sizes are compared whatever the search was told to reach."""

FINER = 1.25
"""Ratio between the sizes at which a ranking is measured."""

ENOUGH = 5
"""The hypothesis: nonsense needs at least so many times the nodes of the real circuit."""


# -- the cells --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One search."""

    model: str
    task: str
    twin: str
    setting: str
    seed: int

    @property
    def kind(self) -> str:
        """What is known of the model's circuits: everything (`hand-built`, `planted`) or nothing (`bundled`)."""
        return "bundled" if self.model in BUNDLED else "planted" if self.model in PLANTED else "hand-built"

    @property
    def config(self) -> si.PruneConfig:
        """How it is searched for."""
        return si.PruneConfig(**SETTINGS[self.setting])

    def path(self, folder: Path) -> Path:
        """Where what was found is kept."""
        parts = (self.model, self.task, self.twin, self.setting)
        return folder.joinpath(*(part.replace(", ", "-").replace(" + ", "+").replace(" ", "_") for part in parts)) / (
            f"seed{self.seed}.json"
        )


@cache
def solved(model: str) -> tuple[str, ...]:
    """Tasks that a bundled model solves and has circuits of (benchmarks/discovery.py), the quickest search first."""
    rows = pd.DataFrame(json.loads((RESULTS / "discovery.json").read_text())["rows"])
    here = rows[(rows.model == model) & (rows.pruned == "nodes") & rows.nodes.notna()]
    return tuple(here.sort_values("seconds").task)


def quick_cells() -> Iterator[Cell]:
    """The first share: the paper's objective and ours on every solved task and its nonsense, and on hand-built models
    and theirs; then every setting on hand-built models."""
    sparse, truths = BUNDLED[0], list(ground_truths())
    for task in solved(sparse):
        yield from (Cell(sparse, task, twin, setting, 0) for twin in TWINS[:2] for setting in MAIN[:2])
    for setting in MAIN[:2]:
        yield from (Cell(name, name, twin, setting, 0) for twin in TWINS[:2] for name in truths)
    yield from (Cell(name, name, "real", setting, 0) for setting in others(MAIN[:2]) for name in truths)


def full_cells() -> Iterator[Cell]:
    """All of them, the quick ones first."""
    yield from quick_cells()
    (sparse, dense), truths = BUNDLED, list(ground_truths())
    yield from (Cell(name, name, "real", setting, 0) for setting in MAIN for name in PLANTED)
    for setting in MAIN[2:]:
        yield from (Cell(sparse, task, twin, setting, 0) for task in solved(sparse) for twin in TWINS[:2])
        yield from (Cell(name, name, "nonsense", setting, 0) for name in truths)
    for setting in MAIN:
        yield from (Cell(name, name, "reinitialised", setting, 0) for name in truths)
        yield from (Cell(name, name, "real", setting, seed) for name in truths for seed in (1, 2))
    for setting in MAIN[:2]:
        yield from (Cell(dense, task, twin, setting, 0) for task in solved(dense) for twin in TWINS[:2])
        yield from (Cell(sparse, task, "reinitialised", setting, 0) for task in solved(sparse))
        yield from (Cell(sparse, task, twin, setting, 1) for task in solved(sparse) for twin in TWINS[:2])
    for setting in others(MAIN):
        yield from (Cell(name, name, "real", setting, 0) for name in PLANTED)
        yield from (Cell(sparse, task, "real", setting, 0) for task in solved(sparse))
    for setting in MAIN[2:]:
        yield from (Cell(dense, task, twin, setting, 0) for task in solved(dense) for twin in TWINS[:2])
        yield from (Cell(sparse, task, "reinitialised", setting, 0) for task in solved(sparse))
    for setting in others(MAIN):
        yield from (Cell(sparse, task, "nonsense", setting, 0) for task in solved(sparse))


def others(settings: Sequence[str]) -> list[str]:
    """All settings but these."""
    return [name for name in SETTINGS if name not in settings]


SHARES = {"quick": quick_cells, "full": full_cells}


def record_of(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What is kept of a cell, if it was searched with the settings that hold now; measurements may be missing."""
    path = cell.path(folder)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["config"] == as_json(cell.config) else None


def missing(cell: Cell, record: dict[str, Any] | None) -> list[str]:
    """What is still to be measured: everything that applies, before the search."""
    if record is not None and not record["found"]:
        return []
    return [name for name, measure in MEASURES.items() if measure.applies(cell) and name not in (record or {})]


def is_done(cell: Cell, record: dict[str, Any] | None) -> bool:
    """Whether nothing is left to do."""
    return record is not None and not missing(cell, record)


def as_json(config: si.PruneConfig) -> dict[str, Any]:
    """A configuration as a file has it."""
    return json.loads(json.dumps(asdict(config)))


# -- what is searched -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network, prompts, what its nodes are held at, and what circuits of it are asked to agree with."""

    model: HookedModel
    task: si.Task
    baseline: NodeValues
    teacher: Teacher | None
    truth: GroundTruth | None


@cache
def known(name: str) -> GroundTruth:
    """A hand-built model, or one that is planted in a larger one."""
    return PLANTED[name]() if name in PLANTED else ground_truth(name)


def subject_of(cell: Cell) -> Subject:
    """The real task in its model, or the twin of it."""
    if cell.kind == "bundled":
        truth, model = None, hooked(si.load(cell.model))
        task, baseline = si.task(cell.task, model.tokenizer), means_of(model)
    else:
        truth = known(cell.model)
        model, task, baseline = truth.model, truth.task, means_over_prompts(truth.model, truth.task)
    if cell.twin == "nonsense":
        twin = nonsense_twin(model, task, remarks=None if truth is None else SPOKEN)
        return Subject(model, twin.task, baseline, twin.teacher, None)
    if cell.twin == "reinitialised":
        other = reinitialised(model, generator=torch.Generator().manual_seed(cell.seed))
        return Subject(other, task, means_over_prompts(other, task), teacher_of(model), None)
    return Subject(model, task, baseline, None, truth)


def means_over_prompts(model: HookedModel, task: si.Task) -> NodeValues:
    """Means of a network's nodes over training prompts."""
    batch = task.batch(128, split="train", generator=torch.Generator().manual_seed(0))
    return mean_activations(model, batch.both_sides().clean)


# -- one cell ---------------------------------------------------------------------------------------------------------


def made(cell: Cell, record: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Search, unless `record` has the circuit, and measure what has not been measured of it; the record after each."""
    began, subject = time.process_time(), subject_of(cell)
    spent = 0.0 if record is None else record["seconds"]
    if record is None:
        record = searched(cell, subject) | {"seconds": time.process_time() - began}
        yield record
    if not record["found"]:
        return
    nodes = [Node(int(layer), site, int(channel)) for layer, site, channel in record["circuit"]]
    circuit = Circuit.of_nodes(subject.model, nodes, subject.baseline, prune=cell.config)
    for name in missing(cell, record):
        measured = MEASURES[name].of(subject, circuit, cell.seed)
        record = record | {name: measured, "seconds": spent + time.process_time() - began}
        yield record


def searched(cell: Cell, subject: Subject) -> dict[str, Any]:
    """What the search finds; where nothing meets the stopping rule the record says so."""
    began, config, model = time.process_time(), cell.config, subject.model
    generator = torch.Generator().manual_seed(cell.seed)
    train, select = split_pairs(subject.task, config, generator)
    how = {"teacher": subject.teacher}
    search = learn_gates(model, train, config, subject.baseline, generator=generator, **how)
    selection = Selection(model, select, subject.baseline, frozen_norms=config.frozen_norms, **how)
    found: dict[str, Any] = {"nodes": None, "edges": None, "note": "", "circuit": []}
    try:
        circuit = sized(model, subject.task, search, selection, subject.baseline, config, seed=cell.seed)
        found |= {"nodes": circuit.n_nodes, "edges": circuit.n_edges, "circuit": sorted(circuit.node_set)}
    except si.CircuitError as error:
        found["note"] = str(error)
    return {
        "config": as_json(config),
        **cell._asdict(),
        "kind": cell.kind,
        "found": found["nodes"] is not None,
        **found,
        "all_nodes": n_nodes(model.cfg),
        "open_gates": search.n_open,
        "search_seconds": time.process_time() - began,
        "ranking": along_the_ranking(subject, search, config, cell.seed),
    }


def pairs_of(subject: Subject, split: str, seed: int, n: int = N_PAIRS) -> TaskBatch:
    """Pairs that no search has seen."""
    return subject.task.batch(n, split=split, generator=torch.Generator().manual_seed(seed + 1))


def held_out(subject: Subject, circuit: Circuit, seed: int) -> dict[str, float]:
    """A circuit beside what it was asked to agree with, on splits that no search has seen."""
    found: dict[str, float] = {}
    for split in SPLITS:
        pairs = pairs_of(subject, split, seed)
        selection = Selection(subject.model, pairs, subject.baseline, teacher=subject.teacher)
        logits, reference = selection.logits(circuit.kept), selection.reference
        own, its = (prompt_scores(run, reference, selection.batch) for run in (reference, logits))
        found |= {
            f"{split}_loss_model_nats": own.task_loss.mean().item(),
            f"{split}_loss_circuit_nats": its.task_loss.mean().item(),
            f"{split}_accuracy_model": own.correct.mean().item(),
            f"{split}_accuracy_circuit": its.correct.mean().item(),
            f"{split}_kl_nats": its.kl.mean().item(),
            f"{split}_argmax_agreement": its.agrees.mean().item(),
        }
    return found


def against_key(subject: Subject, circuit: Circuit, seed: int) -> dict[str, float]:
    """How much of the known circuit was found, and how much else."""
    assert subject.truth is not None
    key = nearest_key(subject.truth, circuit.node_set)
    return {f"key_{name}": value for name, value in recovery(circuit.node_set, key.nodes)._asdict().items()}


def partly_ablated(subject: Subject, circuit: Circuit, seed: int) -> dict[str, float]:
    """Circuit against model where part of everything else is left: nothing, random shares, the shares that hurt."""
    pairs, generator = pairs_of(subject, "test", seed, N_FEWER), torch.Generator().manual_seed(seed + 2)
    table = partial_ablation(subject.model, circuit, pairs, generator=generator)
    found = {}
    for name in ("full", "expected", "worst"):
        outcome = getattr(table, name)
        found |= {
            f"{name}_kl_nats": outcome.kl.mean,
            f"{name}_loss_gap_nats": outcome.loss_gap.mean,
            f"{name}_accuracy": outcome.accuracy.mean,
        }
    return found


def inside(subject: Subject, circuit: Circuit, seed: int) -> dict[str, float]:
    """Whether the circuit's nodes hold, and its heads look, as they do in the model."""
    pairs, generator = pairs_of(subject, "test", seed, N_FEWER), torch.Generator().manual_seed(seed + 3)
    table = agreement_inside(subject.model, circuit, pairs, generator=generator)
    return {"activations_error": table.activations.mean, "patterns_distance": table.patterns.mean}


def audited(subject: Subject, circuit: Circuit, seed: int) -> dict[str, Any]:
    """Which of the four things that a verdict rests on the circuit keeps, as far as the quick audit asks."""
    generator = torch.Generator().manual_seed(seed + 4)
    table = si.audit(subject.model, circuit, subject.task, generator=generator, progress=False)
    kept = table.four.frame.set_index("about").passed
    idle = table.frame[(table.frame.about == MINIMAL) & table.frame.decides].value
    return {name: kept[about] for name, about in AUDITED.items()} | {"audit_idle_share": float(idle.max())}


class Measure(NamedTuple):
    """Something to be measured of a circuit, and of which cells."""

    of: Callable[[Subject, Circuit, int], dict[str, Any]]
    applies: Callable[[Cell], bool]


MEASURES = {
    "held out": Measure(held_out, lambda cell: True),
    "key": Measure(against_key, lambda cell: cell.twin == "real" and cell.kind != "bundled"),
    "inside": Measure(inside, lambda cell: cell.twin == "real"),
    "partial": Measure(partly_ablated, lambda cell: cell.twin == "real"),
    "audit": Measure(
        audited, lambda cell: (cell.kind, cell.twin, cell.seed) == ("bundled", "real", 0) and cell.setting in MAIN
    ),
}
"""Under these names in a cell's file; what is added here is measured of circuits that are there, without a search."""


def along_the_ranking(subject: Subject, search: GateSearch, config: si.PruneConfig, seed: int) -> dict[str, Any]:
    """How well prefixes of a ranking agree on held-out pairs, and the smallest that keep each bound.

    Norms are as they come, however the search had them: what is compared is circuits as they run.
    """
    pairs = pairs_of(subject, "test", seed, N_FEWER)
    selection = Selection(subject.model, pairs, subject.baseline, teacher=subject.teacher)
    sizes = sizes_along(len(search.order))
    fits = [selection.fit(kept_by(search.order[:n], subject.model, config)) for n in sizes]
    curve = {"nodes": sizes, "kl_nats": [fit.kl for fit in fits], "loss_nats": [fit.loss for fit in fits]}
    found: dict[str, Any] = {"curve": curve, "best_kl_nats": min(curve["kl_nats"]), "empty_kl_nats": fits[0].kl}
    found["asked_loss_nats"] = selection.model_loss  # of what was to be agreed with
    for name, bounds in (("kl", KL_BOUNDS), ("loss", LOSS_BOUNDS)):
        for bound in bounds:
            found[f"nodes_at_{name}_{bound:g}"] = smallest(sizes, curve[f"{name}_nats"], bound)
    return found


def sizes_along(n: int) -> list[int]:
    """0, 1, 2, ... and from there sizes `FINER` apart up to `n`."""
    sizes = [0]
    while sizes[-1] < n:
        sizes.append(min(n, max(sizes[-1] + 1, round(sizes[-1] * FINER))))
    return sizes


def smallest(sizes: Sequence[int], values: Sequence[float], bound: float) -> int | None:
    """The first size whose value is at most `bound`; None if there is none."""
    return next((size for size, value in zip(sizes, values, strict=True) if value <= bound), None)


# -- many cells -------------------------------------------------------------------------------------------------------


def work(cells: Sequence[Cell], folder: Path, say: bool = True) -> None:
    """Make those of `cells` that are not there, in their order; what another process is making is left to it."""
    torch.set_num_threads(1)
    for cell in cells:
        path = cell.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".making"))
        try:
            with lock.acquire(timeout=0):
                record = record_of(cell, folder)
                if is_done(cell, record):
                    continue
                for kept in made(cell, record):
                    record = kept
                    write_whole(path, json.dumps(record) + "\n")
        except Timeout:
            continue
        if say:
            found = f"{record['nodes']} nodes" if record["found"] else "none found"
            print(f"{', '.join(map(str, cell))}: {found}, {record['seconds']:.0f} s", flush=True)


def run(cells: Sequence[Cell], folder: Path, jobs: int) -> None:
    """Make cells in `jobs` processes, of which this is one."""
    others = [multiprocessing.get_context("spawn").Process(target=work, args=(cells, folder)) for _ in range(jobs - 1)]
    for process in others:
        process.start()
    work(cells, folder)
    for process in others:
        process.join()


def plan(cells: Sequence[Cell], folder: Path) -> pd.DataFrame:
    """By kind and twin: how many cells there are, how many are done, and processor seconds that the rest will take.

    A cell is taken to cost the median of those done of its kind and setting, or else of its kind; of a kind of which
    none is done nothing is known.
    """
    done = {cell: record for cell in cells if is_done(cell, record := record_of(cell, folder))}
    spent: dict[tuple[str, ...], list[float]] = {}
    for cell, record in done.items():
        for key in ((cell.kind, cell.setting), (cell.kind,)):
            spent.setdefault(key, []).append(record["seconds"])
    rows = []
    for cell in cells:
        known_costs = spent.get((cell.kind, cell.setting)) or spent.get((cell.kind,)) or [math.nan]
        left = 0.0 if cell in done else float(np.median(known_costs))
        rows.append({"kind": cell.kind, "twin": cell.twin, "cells": 1, "done": int(cell in done), "seconds_left": left})
    table = (
        pd.DataFrame(rows)
        .groupby(["kind", "twin"], sort=False)
        .agg({"cells": "sum", "done": "sum", "seconds_left": lambda left: left.sum(skipna=False)})
    )
    return table.reset_index()


# -- what came of it --------------------------------------------------------------------------------------------------


def collected(cells: Iterable[Cell], folder: Path) -> pd.DataFrame:
    """A row for every cell that was searched; lists stay in its file."""
    rows = []
    for cell in cells:
        if (record := record_of(cell, folder)) is not None:
            parts = [record, record["ranking"], *(record.get(name, {}) for name in MEASURES)]
            rows.append({k: v for part in parts for k, v in part.items() if not isinstance(v, list | dict)})
    return pd.DataFrame(rows)


GAP_KEYS = ["kind", "model", "task", "setting", "seed"]


def gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per model, task, setting and seed whose nonsense was searched too: nodes of both, and their ratio.

    `gap` is under the search's own stopping rule, `gap_at_kl_x` for prefixes of both rankings that keep KL below x. It
    is infinite where only the real task has a circuit, and missing where that has none.
    """
    sizes = ["nodes", *(f"nodes_at_kl_{bound:g}" for bound in KL_BOUNDS)]
    real, other = (frame[frame.twin == twin].set_index(GAP_KEYS) for twin in ("real", "nonsense"))
    both = real.index.intersection(other.index)
    found = pd.DataFrame(index=both)
    found["nodes_real"], found["nodes_nonsense"] = real.nodes.reindex(both), other.nodes.reindex(both)
    found["best_kl_real"], found["best_kl_nonsense"] = real.best_kl_nats[both], other.best_kl_nats[both]
    for size in sizes:
        ratio = other[size].astype(float).reindex(both).fillna(math.inf) / real[size].astype(float).reindex(both)
        found[size.replace("nodes", "gap", 1)] = ratio
    return found.reset_index()


MEASURED = (
    "edges",
    *("test_kl_nats", "shifted_kl_nats", "test_loss_circuit_nats", "test_loss_model_nats", "test_argmax_agreement"),
    *("expected_kl_nats", "worst_kl_nats", "worst_loss_gap_nats", "activations_error", "patterns_distance"),
    *("key_f1", "key_exact", "audit_idle_share", *AUDITED),
)
"""Columns that `by_setting` sums up; a table in which no search found a circuit has none of them."""


def by_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and kind of model: how it recovers keys, how real circuits do, and the gap to nonsense.

    Means over cells of the real task, medians of sizes and gaps; `tasks` counts cells, `found` those with a circuit,
    `audits` those that were audited and `audit_*` how many of these keep that bound.
    """
    gap, rows = gaps(frame), []
    frame = frame.reindex(columns=frame.columns.union(MEASURED, sort=False))  # all missing where nothing was found
    for (kind, setting), cells in frame[frame.twin == "real"].groupby(["kind", "setting"], sort=False):
        here = gap[(gap.kind == kind) & (gap.setting == setting)].gap.dropna()
        loss_gap = cells.test_loss_circuit_nats - cells.test_loss_model_nats
        row = {
            "kind": kind,
            "setting": setting,
            "tasks": len(cells),
            "found": int(cells.found.sum()),
            "nodes": cells.nodes.median(),
            "edges": cells.edges.median(),
            "test_kl_nats": cells.test_kl_nats.mean(),
            "shifted_kl_nats": cells.shifted_kl_nats.mean(),
            "loss_gap_nats": loss_gap.mean(),
            "better": int((loss_gap < 0).sum()),
            "argmax_agreement": cells.test_argmax_agreement.mean(),
            "activations_error": cells.activations_error.mean(),
            "patterns_distance": cells.patterns_distance.mean(),
            "expected_kl_nats": cells.expected_kl_nats.mean(),
            "worst_kl_nats": cells.worst_kl_nats.mean(),
            "worst_loss_gap_nats": cells.worst_loss_gap_nats.mean(),
            "seconds": cells.search_seconds.median(),
            "twins": len(here),
            "nonsense_found": int(np.isfinite(here).sum()),
            "gap": here.median(),
            "gap_enough": int((here >= ENOUGH).sum()),
        }
        audits = cells[cells.audit_idle_share.notna()]
        row |= {"audits": len(audits), "audit_idle_share": audits.audit_idle_share.mean()}
        row |= {name: int((audits[name] == True).sum()) for name in AUDITED}  # noqa: E712 - None is neither
        row |= {"key_f1": math.nan, "key_exact": math.nan}
        if kind != "bundled":
            exact = cells.key_exact.fillna(False).astype(bool)
            row |= {"key_f1": cells.key_f1.fillna(0).mean(), "key_exact": float(exact.sum())}
        rows.append(row)
    return pd.DataFrame(rows)


def beside_default(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per other setting and kind of model, over the real tasks that both it and DEFAULT have a circuit of.

    Ratios are geometric means, this setting / default; divergences are means of either.
    """
    frame = frame.reindex(columns=frame.columns.union(MEASURED, sort=False))
    found = frame[(frame.twin == "real") & frame.found].set_index(["kind", "model", "task", "seed"])
    ours = found[found.setting == DEFAULT]
    rows = []
    for (setting, kind), theirs in found[found.setting != DEFAULT].groupby(["setting", "kind"], sort=False):
        both = theirs.index.intersection(ours.index)
        if not len(both):
            continue
        row = {"kind": kind, "setting": setting, "tasks": len(both)}
        for name in ("nodes", "edges", "search_seconds"):
            ratio = theirs[name][both].astype(float) / ours[name][both].astype(float)
            row[f"{name}_ratio"] = math.exp(np.log(ratio[ratio > 0]).mean())
        for name in ("test_kl_nats", "expected_kl_nats", "worst_kl_nats", "activations_error", "patterns_distance"):
            row |= {name: theirs[name][both].mean(), f"{name}_default": ours[name][both].mean()}
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["kind", "setting"])


# -- what it says -----------------------------------------------------------------------------------------------------


def said(settings: pd.DataFrame, gap: pd.DataFrame, beside: pd.DataFrame) -> list[str]:
    """The tables in sentences; every number is theirs."""
    sentences = []
    for kind in settings.kind.drop_duplicates():
        here = settings[settings.kind == kind]
        for setting in (PAPER, DEFAULT):
            cases = gap[(gap.kind == kind) & (gap.setting == setting)]
            ratios, looser = cases.gap.dropna(), cases[f"gap_at_kl_{KL_BOUNDS[-1]:g}"].dropna()
            sentences += [_said_of_gap(kind, setting, ratios)] if len(ratios) else []
            sentences += [_said_of_looser(kind, setting, looser)] if np.isfinite(looser).any() else []
        if kind != "bundled":
            sentences.append(_said_of_keys(kind, here))
            continue
        sentences += [_said_of_losses(kind, row) for row in here[here.setting.isin(MAIN[:2])].itertuples()]
        compared = beside[(beside.kind == kind) & beside.setting.isin(MAIN)]
        sentences += [_said_beside(kind, row) for row in compared.itertuples()]
    return [*sentences, chosen(settings, beside)]


def chosen(settings: pd.DataFrame, beside: pd.DataFrame) -> str:
    """The setting that wins by the rule at the head of this file, and of how many."""
    bundled = settings[(settings.kind == "bundled") & (settings.twins > 0)].set_index("setting")
    known = settings[settings.kind != "bundled"]
    lost = set(known[known.key_exact < known.tasks].setting)
    tried = [name for name in bundled.index if name in set(known.setting)]
    rows = beside[beside.kind == "bundled"].set_index("setting")
    worse = {name: rows.worst_kl_nats[name] - rows.worst_kl_nats_default[name] for name in tried if name in rows.index}
    worse[DEFAULT] = 0.0
    share = bundled.gap_enough / bundled.twins
    left = [name for name in tried if name not in lost and name in worse]
    left = [name for name in left if share[name] == max(share[other] for other in left)]
    if not tried:
        return "No setting was tried on known circuits, solved tasks and nonsense yet, so none wins."
    if not left:
        return f"None of {len(tried)} settings finds every known circuit, so none wins."
    best = min(left, key=lambda name: worse[name])
    return f"Of {len(tried)} settings that were tried on known circuits, solved tasks and nonsense, {best} wins."


def _said_of_gap(kind: str, setting: str, ratios: pd.Series) -> str:
    n, finite = len(ratios), ratios[np.isfinite(ratios)]
    sizes = f", of {finite.min():.3g} to {finite.max():.3g} times the nodes of the real ones" if len(finite) else ""
    return (
        f"Searched for {setting}, nonsense has a circuit in {len(finite)} of {n} {kind} cases{sizes}; that it takes at "
        f"least {ENOUGH} times the nodes or has none holds in {int((ratios >= ENOUGH).sum())} of {n}."
    )


def _said_of_looser(kind: str, setting: str, ratios: pd.Series) -> str:
    """The same where agreement need only be coarse; every ratio of two circuits that are there."""
    finite = ratios[np.isfinite(ratios)]
    return (
        f"Were KL {KL_BOUNDS[-1]:g} nats enough, rankings searched for {setting} would have nonsense in {len(finite)} "
        f"of {len(ratios)} {kind} cases, in {finite.min():.3g} to {finite.max():.3g} times the nodes."
    )


def _said_of_keys(kind: str, settings: pd.DataFrame) -> str:
    """Which settings find every known circuit exactly, and which do not."""
    whole = settings[settings.key_exact == settings.tasks]
    parts = settings.drop(whole.index)
    missed = "; ".join(f"{row.setting}: {row.key_exact:.0f} of {row.tasks}" for row in parts.itertuples())
    found = "; ".join(f"{row.setting} ({row.tasks})" for row in whole.itertuples()) or "none"
    return f"Settings that find every known {kind} circuit exactly, of so many: {found}. Others: {missed or 'none'}."


def _said_of_losses(kind: str, row: Any) -> str:
    return (
        f"On held-out prompts circuits searched for {row.setting} have a task loss {row.loss_gap_nats:+.3g} nats from "
        f"their models', mean of {row.found} {kind} searches; {row.better} of them are better than their model."
    )


def _said_beside(kind: str, row: Any) -> str:
    return (
        f"On the same {row.tasks} {kind} tasks, {row.setting} has {row.nodes_ratio:.3g} times the nodes of "
        f"{DEFAULT} and takes {row.search_seconds_ratio:.3g} times as long; the worst partial ablation leaves its "
        f"circuits {row.worst_kl_nats:.3g} nats from their model, those of {DEFAULT} {row.worst_kl_nats_default:.3g}."
    )


def shown(table: pd.DataFrame) -> str:
    """Rows as text, four digits."""
    return table.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def as_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for a JSON file, which has no infinity: it is written as the text `inf`, what is missing as null."""
    rounded = table.map(lambda value: float(f"{value:.4g}") if isinstance(value, float) else value).astype(object)
    return rounded.where(table.notna(), None).replace(math.inf, "inf").to_dict("records")


def write(cells: Sequence[Cell], folder: Path, out: Path, command: str) -> None:
    """The tables, in files and in print."""
    frame = collected(cells, folder)
    if frame.empty:
        raise SystemExit(f"{folder} holds none of these {len(cells)} cells; make some first.")
    settings, gap, beside = by_setting(frame), gaps(frame), beside_default(frame)
    record = {
        "command": command,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cells": len(cells),
        "done": len(frame),
        "enough": ENOUGH,
        "said": said(settings, gap, beside),
        "gaps": as_rows(gap),
        "by setting": as_rows(settings),
        "beside default": as_rows(beside),
    }
    write_whole(out / "faithful_pruning.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_whole(out / "faithful_pruning.csv", frame.to_csv(index=False, float_format="%.4g"))
    print(f"{len(frame)} of {len(cells)} cells\n\n{shown(settings)}\n\n{shown(beside)}\n\n{shown(gap)}\n")
    print(*record["said"], sep="\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--share", choices=SHARES, default="quick")
    arguments.add_argument("--plan", action="store_true", help="say how many cells there are and what is left; no more")
    arguments.add_argument("--collect", action="store_true", help="search for nothing; write tables of what there is")
    arguments.add_argument("--jobs", type=int, default=1, help="processes, each of one thread")
    arguments.add_argument("--kind", nargs="+", choices=("hand-built", "planted", "bundled"))
    arguments.add_argument("--model", nargs="+")
    arguments.add_argument("--task", nargs="+")
    arguments.add_argument("--twin", nargs="+", choices=TWINS)
    arguments.add_argument("--setting", nargs="+", choices=SETTINGS)
    arguments.add_argument("--cells", type=Path, default=Path("out/faithful_pruning"))
    arguments.add_argument("--out", type=Path, default=RESULTS)
    given = arguments.parse_args()
    every = list(SHARES[given.share]())
    chosen = [cell for cell in every if all(getattr(given, name) is None or getattr(cell, name) in getattr(given, name)
                                            for name in ("kind", "model", "task", "twin", "setting"))]  # fmt: skip
    if given.plan:
        table = plan(chosen, given.cells)
        hours, done = table.seconds_left.sum(skipna=False) / 3600 / given.jobs, f"{table.done.sum()} of {len(chosen)}"
        print(f"{shown(table)}\n\n{done} cells are done; the rest take {hours:.1f} h in {given.jobs} process(es) that "
              "have a core each (nan: none of a kind is done, so nobody knows)")  # fmt: skip
        return
    if not given.collect:
        run(chosen, given.cells, given.jobs)
    write(every, given.cells, given.out, f"python benchmarks/faithful_pruning.py --share {given.share}")


if __name__ == "__main__":
    main()
