"""Re-pruned controls: the search that found a circuit, run again where it should find nothing as small.

    nonsense twin             the same model, where a remark decides what is to be agreed with      (controls.py)
    re-initialised network    random weights where the model has weights, the trained model as teacher

    size at the same agreement    nodes (edges) that the control needs to keep the same stopping rule / the circuit's
    at equal size                 KL(teacher || control) - KL(model || circuit), as many nodes as the circuit has

Everything else is the circuit's own: settings, seed, and what nodes outside are held at, but that in a network of
random weights those are its own means over the task's prompts. A control that is not found with all nodes has no size;
the ratio is then that of all nodes, and a lower bound. Equal size is the first nodes of the ranking, or of what was
found by importance, whichever agrees more; both are scored on prompts that no search has seen.

A finished search is kept in a file under the hash of all that decides it, so that an audit that was interrupted, or is
made again, goes on from there.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_interp.circuit.find import kept_by, sized
from sparse_interp.circuit.find_edges import find_edges
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.controls import nonsense_twin, reinitialised, teacher_of
from sparse_interp.faithfulness.rivals import rivals
from sparse_interp.faithfulness.scores import groups_of, mean_of
from sparse_interp.interventions.answers import Teacher
from sparse_interp.interventions.baselines import task_means
from sparse_interp.interventions.edges import edges_among
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import GateSearch, learn_gates
from sparse_interp.interventions.selection import Selection, split_pairs
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.sites import Node, NodeAt, NodeValues, masks, places, width
from sparse_interp.results import Interval, write_whole
from sparse_interp.tasks.task import Task, answer_loss, kl_divergence
from sparse_interp.tokenizer import tokenizer_hash

FORMAT_VERSION = 1

NONSENSE, RANDOM_NETWORK = "nonsense twin", "re-initialised network"

CONTROLS = (NONSENSE, RANDOM_NETWORK)

MEANS_OF = 256
"""Pairs of the training split over which a random network's means are taken."""


@dataclass(frozen=True, eq=False)
class Control:
    """Where a search is run again, and with what."""

    name: str
    model: HookedModel
    task: Task
    teacher: Teacher
    baseline: NodeValues
    config: PruneConfig
    seed: int
    edges: bool
    """Whether edges are pruned, from the whole model on, and not nodes."""

    size: int
    """Nodes (edges) of the circuit that this is a control of."""

    @classmethod
    def of(
        cls, name: str, model: HookedModel, circuit: Circuit, task: Task, config: PruneConfig, seed: int
    ) -> "Control":
        """The control called `name` of a circuit.

        Raises:
            TaskError: if the task has no nonsense twin in this tokenizer, or too few pairs.
        """
        same = {"config": config, "seed": seed, "edges": circuit.edges_pruned, "size": size_of(circuit)}
        if name == NONSENSE:
            twin = nonsense_twin(model, task)
            twin.task.check_fits(model.cfg.n_ctx, [split for split in ("train", "test") if split in task.splits])
            return cls(name, model, twin.task, twin.teacher, circuit.baseline, **same)
        made = reinitialised(model, generator=torch.Generator().manual_seed(seed))
        n = min(MEANS_OF, task.n_pairs("train") or MEANS_OF)
        means = task_means(made, task.batch(n, "train", generator=torch.Generator().manual_seed(seed)))
        return cls(name, made, task, teacher_of(model), means, **same)

    @property
    def digest(self) -> str:
        """Hash of everything that decides what is found."""
        held = hashlib.sha256(self.baseline.kind.encode())
        for place in sorted(self.baseline.values):
            held.update(f"{place}".encode() + self.baseline[place].detach().cpu().double().numpy().tobytes())
        told = {
            "format_version": FORMAT_VERSION,
            "control": self.name,
            "model": weights_sha256(self.model),
            "task": self.task.templates_sha256,
            "tokenizer": tokenizer_hash(self.task.tokenizer),
            "baseline": held.hexdigest(),
            "config": asdict(self.config),
            **{name: getattr(self, name) for name in ("seed", "edges", "size")},
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Found(NamedTuple):
    """What a search for a control came to."""

    size: int | None
    """Nodes (edges) that it needs to keep the stopping rule; None if all of them do not."""

    n_all: int
    """All that there are."""

    kl_of_all: float
    """KL(teacher || all of them) on the selection pairs, nats: the model itself."""

    at_size: list[list]
    """Of nodes as many as the circuit has, or fewer that suffice; empty where edges were searched for."""

    seconds: float
    """What the search took."""


def size_of(circuit: Circuit) -> int:
    """What a circuit's size is counted in: its edges if these were pruned, else its nodes."""
    return circuit.n_edges if circuit.edges_pruned else circuit.n_nodes


def searched(control: Control, folder: Path | None, *, progress: bool = False) -> Found:
    """Search for a control, or read what an earlier search for the very same left in `folder`.

    Raises:
        TaskError: if the task has too few pairs.
        CircuitError: if a file in the folder is damaged.
    """
    path = None if folder is None else folder / f"{control.name.replace(' ', '-')}-{control.digest[:16]}.json"
    if path is not None and path.exists():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["digest"] == control.digest:
                return Found(**record["found"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CircuitError(f"{path} is damaged ({error}); remove it, and the search is made again.") from error
    began = time.monotonic()
    found = _edges(control, progress) if control.edges else _nodes(control, progress)
    found = found._replace(seconds=time.monotonic() - began)
    if path is not None:
        write_whole(path, json.dumps({"digest": control.digest, "found": found._asdict()}) + "\n")
    return found


def _nodes(control: Control, progress: bool) -> Found:
    model, config, generator = control.model, control.config, torch.Generator().manual_seed(control.seed)
    train, select = split_pairs(control.task, config, generator)
    given = {"teacher": control.teacher, "generator": generator, "progress": progress}
    search = learn_gates(model, train, config, control.baseline, **given)
    how = {"frozen_norms": config.frozen_norms, "per_position": config.per_position, "teacher": control.teacher}
    selection = Selection(model, select, control.baseline, **how)
    whole = selection.fit(kept_by(search.order, model, config, selection.n_pos)).kl
    try:
        circuit = sized(model, control.task, search, selection, control.baseline, config, seed=control.seed)
    except CircuitError:
        circuit = None
    chosen = min(
        _of_size(control.size, search, circuit),
        key=lambda nodes: selection.fit(kept_by(nodes, model, config, selection.n_pos)).kl,
    )
    size = None if circuit is None else circuit.n_nodes
    return Found(size, len(search.order), whole, [list(node) for node in chosen], 0.0)


def _of_size(n: int, search: GateSearch, circuit: Circuit | None) -> list[Sequence[Node | NodeAt]]:
    """Choices of at most `n` nodes: the first of the ranking, and those of what was found that cost most."""
    found: list[Sequence[Node | NodeAt]] = [search.order[:n]]
    if circuit is not None and circuit.n_pos is None:
        rows = circuit.nodes.sort_values("importance_nats", ascending=False, kind="stable").head(n)
        found.append([Node(int(row.layer), str(row.site), int(row.channel)) for row in rows.itertuples()])
    return found


def _edges(control: Control, progress: bool) -> Found:
    generator = torch.Generator().manual_seed(control.seed)
    given = {"baseline": control.baseline, "teacher": control.teacher, "generator": generator, "progress": progress}
    select = split_pairs(control.task, control.config, generator.clone_state())[1]
    model = control.model
    selection = Selection(model, select, control.baseline, teacher=control.teacher)
    everything = [Node(*place, c) for place in places(model.cfg) for c in range(width(model.cfg, place.site))]
    whole = selection.fit(kept_by(everything, model, control.config)).kl
    n_all = sum(
        int(mask.sum()) for mask in edges_among(model, masks(everything, model.cfg, control.config.sites)).values()
    )
    try:
        size = find_edges(model, None, control.task, control.config, **given).n_edges
    except CircuitError:
        size = None
    return Found(size, n_all, whole, [], 0.0)


def found_again(
    model: HookedModel,
    circuit: Circuit,
    task: Task,
    config: PruneConfig,
    seeds: range,
    folder: Path | None,
    *,
    n_pairs: int,
    progress: bool = False,
) -> list[Circuit]:
    """The circuits that the same search finds from other seeds; of nodes together, of edges one after the other.

    Raises:
        CircuitError: if a seed finds none, or a file in the folder is damaged.
        TaskError: if the task has too few pairs.
    """
    same = {"name": "rivals", "model": model, "task": task, "teacher": teacher_of(model), "baseline": circuit.baseline}
    more = {"config": config, "seed": seeds.start, "edges": circuit.edges_pruned, "size": 0}
    place = None if folder is None else folder / f"rivals-{Control(**same, **more).digest[:16]}"
    given = {"baseline": circuit.baseline, "progress": progress}
    if not circuit.edges_pruned:
        first = torch.Generator().manual_seed(seeds.start)
        how = {"n_seeds": len(seeds), "n_pairs": n_pairs, "folder": place, "generator": first}
        return list(rivals(model, task, config, **how, **given).circuits)
    found = []
    for seed in seeds:
        path = None if place is None else place / f"seed-{seed}.json"
        if path is not None and path.exists():
            found.append(Circuit.load(path, model, task))
            continue
        found.append(find_edges(model, None, task, config, generator=torch.Generator().manual_seed(seed), **given))
        if path is not None:
            found[-1].save(path)
    return found


class HeldOut(NamedTuple):
    """A control of the circuit's own size on prompts that no search has seen."""

    kl: Interval
    """KL(teacher || control), nats."""

    task_loss: Interval
    """Task loss by the control's own labels, nats."""

    on: tuple[int, int]
    """Prompts, and templates (or pairs) that they came from."""


def held_out(control: Control, found: Found, n_pairs: int, split: str, *, generator: torch.Generator) -> HeldOut:
    """Score what was found of the circuit's size on `n_pairs` pairs of a split."""
    pairs = control.task.batch(n_pairs, split, generator=generator)
    per_position = control.config.per_position
    selection = Selection(control.model, pairs, control.baseline, per_position=per_position, teacher=control.teacher)
    kind: Any = NodeAt if per_position else Node
    nodes = [kind(*node) for node in found.at_size]
    logits = selection.logits(kept_by(nodes, control.model, control.config, selection.n_pos))
    batch, groups = selection.batch, groups_of(selection.batch)
    kl = kl_divergence(selection.reference.double(), logits.double(), batch).cpu()
    losses = answer_loss(logits, batch).cpu()
    intervals = (mean_of(values, groups, generator) for values in (kl, losses))
    return HeldOut(*intervals, (len(batch), len(set(groups))))


def gap_between(control: Interval, circuit: Interval) -> Interval:
    """The difference of two means that were measured on different prompts, with bounds that hold for both."""
    low = control.low - circuit.high
    high = control.high - circuit.low
    return (
        Interval(control.mean - circuit.mean, low, high)
        if low == low
        else Interval(control.mean - circuit.mean, nan, nan)
    )
