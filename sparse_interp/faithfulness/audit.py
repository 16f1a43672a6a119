"""audit: what a circuit is worth, in one call, one table and one verdict.

    verdict  =  every row that decides keeps its bound          -> faithful on what was tested
                one of them does not                            -> fails: and why
                one of them was not run                         -> incomplete

Rows that decide are those of the test split that are about four things: agreement with the model (the whole vocabulary,
and the task loss both ways), the worst case under partial ablation, the gap to controls, and minimality. The shifted
split (other forms, other words) and everything else inform; one of them that misses a bound is named in the verdict.
The train split, on which the circuit was found, is drawn by nobody but the searches for controls.

A circuit that does *better* than its model is a wrong circuit: pruning for the task alone gave one with task loss 0.01
inside a model of task loss 1.13. So the losses are compared both ways (after Drori 2026, on Gao et al. 2025,
arXiv:2511.13653). Bounds stand in faithfulness/thresholds.py and nowhere else.

    quick    what a model can be asked as it is
    full     and the searches of faithfulness/repruned.py: about four times what finding the circuit took
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.audit_table import (
    DECIDING,
    INFORMING,
    AuditTable,
    frame_of,
    nodes_sha256,
    not_run,
)
from sparse_interp.faithfulness.controls import has_room, random_circuits
from sparse_interp.faithfulness.gap import add_searches
from sparse_interp.faithfulness.rows import LEVELS, add_tests
from sparse_interp.faithfulness.scrubbing import Hypothesis
from sparse_interp.faithfulness.sheet import Sheet
from sparse_interp.faithfulness.thresholds import FOUR, GAP, Thresholds
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.tasks.task import Task, TaskBatch
from sparse_interp.tokenizer import tokenizer_hash


def audit(
    model: AnyModel,
    circuit: Circuit,
    task: Task,
    *,
    level: str = "quick",
    n_prompts: int = 512,
    n_random: int = 10,
    hypothesis: Hypothesis | None = None,
    config: PruneConfig | None = None,
    n_rivals: int = 2,
    folder: Path | str | None = None,
    thresholds: Thresholds | None = None,
    allow_mismatch: bool = False,
    generator: torch.Generator,
    progress: bool = True,
) -> AuditTable:
    """Measure `circuit` beside `model`, on prompts that it was not found on, and say what it is worth.

    Args:
        model: the model that the circuit was found in, in any mode: ours, or a dense one of TransformerLens.
        circuit: the circuit.
        task: the task that it was found for; its splits `test` and `shifted` are drawn from, `train` by searches alone.
        level: "quick" prunes nothing anew; "full" searches for controls as the circuit was searched for.
        n_prompts: prompts per split, both sides of half as many pairs (fewer if a list of pairs has fewer).
        n_random: random circuits on the test split; a third of them also on the shifted split.
        hypothesis: what nodes of the circuit are said to mean, for causal scrubbing: {node: function of the prompt}.
        config: how to search for controls, where the circuit does not say how it was found; None takes its own.
        n_rivals: searches from other seeds.
        folder: where searches for controls are kept as they end, and looked for first; None keeps none.
        thresholds: bounds; None takes the documented ones.
        allow_mismatch: audit a circuit of other weights or of another task all the same.
        generator: draws prompts, random circuits and resamples: the same state gives the same table.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if circuit, model and task do not belong together.
        ConfigError: for an unknown level, or counts that make no audit.
        TaskError: if the task's prompts are longer than the model's context.
    """
    _check_settings(level, n_prompts, n_random, n_rivals)
    began, model = time.monotonic(), hooked(model)
    circuit = _belonging(model, circuit, task, allow_mismatch)
    splits = [split for split in (DECIDING, INFORMING) if split in task.splits]
    task.check_fits(model.cfg.n_ctx, splits)
    origin = _origin(model, circuit, task, generator.initial_seed(), level)
    pairs = {split: task.batch(_n_pairs(task, split, n_prompts), split, generator=generator) for split in splits}
    drawn = random_circuits(model, circuit, n_random if has_room(circuit) else 0, generator=generator)
    rows, details, bounds = [], {}, thresholds or Thresholds()
    unfit = {split: why for split in (DECIDING, INFORMING) if (why := _unfit(circuit, split, pairs.get(split)))}
    n_runs = sum(4 + len(_share(drawn, split)) for split in pairs.keys() - unfit.keys())
    with tqdm(total=n_runs, disable=not progress, desc="audit", unit="run") as bar:
        for split in (DECIDING, INFORMING):
            if split in unfit:
                decides = split == DECIDING
                rows.append(not_run(GAP, "every measure", "circuit", split, unfit[split], decides=decides))
                continue
            sheet = Sheet(model, circuit, split, pairs[split], bounds, generator, hypothesis)
            bar.update(4)
            sheet.add_circuit()
            sheet.add_random(_share(drawn, split), n_random, bar)
            if split == DECIDING:
                add_tests(sheet, level, lambda about: bar.set_postfix_str(about))
                settings = {"config": config, "n_rivals": n_rivals, "folder": folder, "progress": progress}
                add_searches(sheet, task, level, n_prompts=n_prompts, **settings)
            rows += sheet.rows
            details = _joined(details, sheet.details)
    origin["seconds"] = time.monotonic() - began
    return AuditTable(frame_of(_in_order(rows)), bounds, origin, details)


def _check_settings(level: str, n_prompts: int, n_random: int, n_rivals: int) -> None:
    if level not in LEVELS:
        raise ConfigError(f"level={level!r}; expected {' or '.join(map(repr, LEVELS))}.")
    if n_prompts < 2 or n_random < 0 or n_rivals < 0:
        raise ConfigError(
            f"n_prompts={n_prompts}, n_random={n_random}, n_rivals={n_rivals}; an audit needs n_prompts >= 2 and "
            "n_random, n_rivals >= 0."
        )


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gap to controls first, then the rest of what decides, then what informs; the test split before the other."""
    order = {about: number for number, about in enumerate(dict.fromkeys((GAP, *FOUR)))}
    splits = {DECIDING: 0, INFORMING: 1}
    return sorted(rows, key=lambda row: (splits.get(row["split"], 2), order.get(row["about"], len(order))))


def _joined(details: dict[str, pd.DataFrame], more: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    found = dict(details)
    for name, frame in more.items():
        found[name] = pd.concat([found[name], frame], ignore_index=True) if name in found else frame
    return found


def _belonging(model: HookedModel, circuit: Circuit, task: Task, allow_mismatch: bool) -> Circuit:
    """The circuit, if it belongs to model and task; if told to allow it, the same nodes in this model."""
    if circuit.model_sha256 != weights_sha256(model):
        if not allow_mismatch:
            circuit.check_model(model)
        circuit = circuit.transplanted(model)
    known = {"templates": (circuit.task_sha256, lambda: task.templates_sha256)}
    known["tokenizer"] = (circuit.tokenizer_sha256, lambda: tokenizer_hash(task.tokenizer))
    for what, (expected, found) in known.items():
        if expected is not None and expected != found() and not allow_mismatch:
            raise CircuitError(
                f"this circuit was found for task {circuit.task_name!r} with {what} {expected[:12]}, and task "
                f"{task.name!r} has {what} {found()[:12]}. Audit it on the task that it was found for, or say "
                "allow_mismatch=True to measure it on this one all the same."
            )
    return circuit


def _n_pairs(task: Task, split: str, n_prompts: int) -> int:
    """Half of `n_prompts`, or all pairs there are, where they are listed and fewer."""
    n, n_listed = (n_prompts + 1) // 2, task.n_pairs(split)
    return n if n_listed is None else min(n, n_listed)


def _unfit(circuit: Circuit, split: str, pairs: TaskBatch | None) -> str:
    """Why nothing can be measured on a split; nothing where all can."""
    if pairs is None:
        return f"the task has no {split} split"
    try:
        circuit.check_lengths(pairs)
    except CircuitError as error:
        return str(error)
    return ""


def _share(drawn: Sequence[Circuit], split: str) -> Sequence[Circuit]:
    """The random circuits that a split is measured with: all where they decide, else the first third."""
    return drawn if split == DECIDING else drawn[: max(1, len(drawn) // 3)]


def _origin(model: HookedModel, circuit: Circuit, task: Task, seed: int, level: str) -> dict[str, Any]:
    """What was audited, and with what."""
    try:
        library = version("sparse_interp")
    except PackageNotFoundError:
        library = "unknown"
    return {
        "model_name": model.cfg.model_name,
        "model_sha256": circuit.model_sha256,
        "task_name": task.name,
        "task_sha256": task.templates_sha256,
        "circuit_task_name": circuit.task_name,
        "circuit_task_sha256": circuit.task_sha256,
        "tokenizer_sha256": circuit.tokenizer_sha256,
        "nodes_sha256": nodes_sha256(circuit),
        "n_nodes": circuit.n_nodes,
        "n_edges": circuit.n_edges,
        "baseline": circuit.baseline.kind,
        "prune": None if circuit.prune is None else asdict(circuit.prune),
        "circuit_seed": circuit.seed,
        "seed": seed,
        "level": level,
        "versions": {"sparse_interp": library, "torch": torch.__version__, "python": platform.python_version()},
    }
