"""The gap between a circuit and controls that were searched for as it was: rows, for an audit of level full."""

from pathlib import Path

import pandas as pd
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import SparseInterpError
from sparse_interp.faithfulness.audit_table import DECIDING, NOT_FOUND, SIZE, not_run
from sparse_interp.faithfulness.repruned import (
    CONTROLS,
    Control,
    Found,
    HeldOut,
    found_again,
    gap_between,
    held_out,
    searched,
    size_of,
)
from sparse_interp.faithfulness.rivals import edges_of, jaccard
from sparse_interp.faithfulness.rows import QUICK, count
from sparse_interp.faithfulness.scores import mean_of
from sparse_interp.faithfulness.sheet import ANSWER_OR_FOIL, VOCABULARY, Sheet
from sparse_interp.faithfulness.thresholds import GAP
from sparse_interp.interventions.ablation import Ablation
from sparse_interp.interventions.answers import AnswerLogits
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.results import Interval
from sparse_interp.tasks.task import Task, kl_divergence

RIVALS = "rivals from other seeds"


def add_searches(
    sheet: Sheet,
    task: Task,
    level: str,
    *,
    n_prompts: int,
    config: PruneConfig | None,
    n_rivals: int,
    folder: Path | str | None,
    progress: bool,
) -> None:
    """The rows of every search for a control, run or not."""
    circuit = sheet.circuit
    config = circuit.prune if config is None else config
    names = [*CONTROLS, RIVALS]
    why = ""
    if level == QUICK:
        why = f"the same search again; a {level} audit prunes nothing"
    elif config is None:
        why = "the circuit does not say how it was searched for; pass config, the PruneConfig that found it"
    if why:
        for name in names:
            decides = level != QUICK and name != RIVALS
            sheet.rows.append(not_run(GAP, SIZE, f"{name} / circuit", sheet.split, why, decides=decides))
        return
    assert config is not None
    seed = sheet.generator.initial_seed() if circuit.seed is None else circuit.seed
    folder = None if folder is None else Path(folder)
    records = []
    for name in CONTROLS:
        try:
            control = Control.of(name, sheet.model, circuit, task, config, seed)
            found = searched(control, folder, progress=progress)
            records.append(_add_control(sheet, control, found, n_prompts))
        except SparseInterpError as error:
            sheet.rows.append(not_run(GAP, SIZE, f"{name} / circuit", sheet.split, str(error), decides=True))
    sheet.details["searches for controls"] = pd.DataFrame(records)
    _add_rivals(sheet, task, config, n_rivals, seed, folder, progress)


def _add_control(sheet: Sheet, control: Control, found: Found, n_prompts: int) -> dict:
    """Rows of one control; returns what was found as a record."""
    n, unit = control.size, "edges" if control.edges else "nodes"
    size = found.n_all if found.size is None else found.size
    ratio = size / max(1, n)
    judged = sheet.bounds.size(ratio, control.name)
    if found.size is None:
        said = f"{NOT_FOUND} with all {found.n_all:,} {unit}, which are {found.kl_of_all:.3f} nats away"
        judged = judged._replace(passed=True, note=f"{said}: more than so many times {n:,}")
        note = ""
    else:
        note = f"{size:,} {unit} against {n:,}"
    held = f"{control.baseline.kind}"
    given = {"baseline": held, "direction": "all but the control ablated"}
    metric = f"stopping rule {control.config.rule} on selection prompts"
    on = (2 * control.config.n_selection, None)
    sheet.add(GAP, SIZE, f"{control.name} / circuit", count(ratio), unit, metric, judged, note=note, on=on, **given)
    record = {"control": control.name, "unit": unit, "circuit": n, "found": found.size, "all": found.n_all}
    record |= {"kl_of_all_nats": found.kl_of_all, "seconds": found.seconds, "seed": control.seed}
    if control.edges:
        why = "a search for edges keeps no ranking to take as many of"
        sheet.rows.append(not_run(GAP, "at equal size", control.name, sheet.split, why))
        return record
    scored = held_out(control, found, max(1, n_prompts // 2), DECIDING, generator=sheet.generator)
    _add_at_size(sheet, control, scored, given)
    return record | {"kl_at_size_nats": scored.kl.mean, "task_loss_at_size_nats": scored.task_loss.mean}


def _add_at_size(sheet: Sheet, control: Control, scored: HeldOut, given: dict) -> None:
    """Agreement (for circuits that were asked for the task's loss: that) of a control as large as the circuit."""
    scores = sheet.scores.circuit
    by_loss = control.config.rule == "task_loss"
    mine = sheet.interval(scores.task_loss if by_loss else scores.kl)
    theirs = scored.task_loss if by_loss else scored.kl
    what = "task loss at equal size" if by_loss else "KL(teacher || control) at equal size"
    metric = ANSWER_OR_FOIL if by_loss else VOCABULARY
    sheet.add(GAP, what, control.name, theirs, "nats", metric, on=scored.on, **given)
    gap = gap_between(theirs, mine)
    judged = sheet.bounds.size_gap(gap, control.name)
    sheet.add(GAP, f"{what}, gap", f"{control.name} - circuit", gap, "nats", metric, judged, on=scored.on, **given)


def _add_rivals(
    sheet: Sheet, task: Task, config: PruneConfig, n_rivals: int, seed: int, folder: Path | None, progress: bool
) -> None:
    """What other seeds find: how large, and how much of it is the same. Several circuits that do as well are usual."""
    circuit = sheet.circuit
    named = (GAP, SIZE, f"{RIVALS} / circuit", sheet.split)
    if n_rivals == 0:
        sheet.rows.append(not_run(*named, "n_rivals=0"))
        return
    seeds, n_pairs = range(seed + 1, seed + 1 + n_rivals), len(sheet.pairs)
    given = {"n_pairs": n_pairs, "progress": progress}
    try:
        others = found_again(sheet.model, circuit, task, config, seeds, folder, **given)
    except SparseInterpError as error:
        sheet.rows.append(not_run(*named, str(error)))
        return
    own = _answers(sheet, circuit)
    records = [_compared(sheet, own, other) for other in others]
    sheet.details["rivals"] = frame = pd.DataFrame(records)
    draws = list(range(len(frame)))
    unit, over = "edges" if circuit.edges_pruned else "nodes", f"interval over {n_rivals} seeds"

    def mean(column: str) -> Interval:
        return mean_of(torch.tensor(frame[column].to_list()), draws, sheet.generator)

    metric = f"stopping rule {config.rule} on selection prompts; {over}"
    sheet.add(*named[:3], mean("size_ratio"), unit, metric)
    for part in ("node", "edge"):
        overlap = mean(f"{part}_jaccard")
        sheet.add(GAP, f"{part}s in common", f"circuit, {RIVALS}", overlap, "share", f"Jaccard index; {over}")
    apart = "largest of KL(circuit || rival) and KL(rival || circuit)"
    sheet.add(GAP, apart, f"circuit, {RIVALS}", mean("kl_nats"), "nats", f"{VOCABULARY}; {over}")


def _answers(sheet: Sheet, circuit: Circuit) -> AnswerLogits:
    """What a circuit answers to the sheet's prompts."""
    ablation = Ablation.full(circuit.baseline)
    return ablation.answer_logits(sheet.model, circuit.kept, sheet.scores.batch, within=circuit.cutting)[0].double()


def _compared(sheet: Sheet, own: AnswerLogits, other: Circuit) -> dict:
    """How a circuit of another seed compares with the one that is audited, whose answers are `own`."""
    circuit, theirs = sheet.circuit, _answers(sheet, other)
    both = ((own, theirs), (theirs, own))
    apart = [kl_divergence(p, q, sheet.scores.batch).mean().item() for p, q in both]
    return {
        "seed": other.seed,
        "n_nodes": other.n_nodes,
        "n_edges": other.n_edges,
        "size_ratio": size_of(other) / max(1, size_of(circuit)),
        "node_jaccard": jaccard(circuit.node_set, other.node_set),
        "edge_jaccard": jaccard(edges_of(circuit), edges_of(other)),
        "kl_nats": max(apart),
    }
