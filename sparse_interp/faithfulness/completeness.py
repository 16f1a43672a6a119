"""Completeness: what stands in for a circuit once it is gone.

    rest            the model without the circuit: its nodes at their baseline, or its edges, where these were pruned
    alone           KL(model || model with a candidate held)           what an outside node does while the circuit works
    once removed    KL(rest || rest with the candidate held)           what it does when the circuit is gone
    growth          once removed - alone

A node that grows is a backup: it comes in when what it stands in for is missing, so that the model may do without a
circuit that it nevertheless uses, and a circuit that leaves it out is not all of the mechanism. No label is asked for.
Conditional co-ablation: CoAx 2026 (arXiv:2607.01940), as reported by others; self-repair: McGrath et al. 2023
(arXiv:2307.15771). One candidate is held at a time, so of two backups that are equal and each enough, neither grows.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.scores import groups_of, mean_of, some_pairs
from sparse_interp.interventions.ablation import Masks, less
from sparse_interp.interventions.selection import Selection
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import Node, NodeAt, check_nodes
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch

GROWS_NATS = 0.01
"""Growth from which on a node is a backup, if the whole interval is above 0."""


@dataclass(frozen=True, eq=False)
class CompletenessTable(Table):
    """One row per candidate, the one that grows most first; means over prompts.

    `name`, `layer`; `alone_nats`, `removed_nats` (effects with the circuit there, and once it is removed);
    `growth_nats` with its interval `low` to `high` over templates (95 %); `backup`, whether it grows.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "name",
        "layer",
        "alone_nats",
        "removed_nats",
        "growth_nats",
        "low",
        "high",
        "backup",
    )

    n_prompts: int
    """Prompts that every effect is a mean over, both sides of pairs."""

    @property
    def backups(self) -> list[str]:
        """The nodes that grow, by name, those that grow most first."""
        return self.frame[self.frame.backup].name.tolist()

    @property
    def largest(self) -> Interval:
        """The largest growth of any candidate, nats."""
        row = self.frame.iloc[0]
        return Interval(float(row.growth_nats), float(row.low), float(row.high))

    def plot(self, ax: Axes | None = None) -> Axes:
        """The growth of the candidates that grow most."""
        return bars_with_intervals(
            self.frame.head(30), label="name", value="growth_nats", low="low", high="high", reference=0.0, ax=ax
        )


@torch.no_grad()
def completeness(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    candidates: Iterable[Node] | None = None,
    n_pairs: int = 8,
    generator: torch.Generator,
    progress: bool = True,
) -> CompletenessTable:
    """Hold every candidate, with the circuit there and once it is removed, and name those whose effect grows.

    Two runs for each candidate, from its layer on. Where the circuit keeps nodes at positions, a candidate is held at
    all positions at which the circuit has it not.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit.
        pairs: prompts with their twins.
        candidates: nodes outside; None takes all of the circuit's sites.
        n_pairs: how many of the pairs are measured on, from all templates alike; both prompts of each.
        generator: draws pairs and resamples.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to other weights, or keeps nodes at positions of prompts of another length;
            or a candidate is one that it keeps (at every position) or none of the model's.
    """
    circuit.check_lengths(pairs)
    circuit.check_model(model)
    model = hooked(model)
    held = _candidates(circuit, candidates)
    pairs = some_pairs(pairs, n_pairs, generator=generator)
    every: Masks = {place: torch.ones_like(mask) for place, mask in circuit.inside.items()}
    rest = every if circuit.edges_pruned else {place: ~mask for place, mask in circuit.inside.items()}
    whole = Selection(model, pairs, circuit.baseline, per_position=circuit.n_pos is not None)
    with tqdm(total=2 * len(held), disable=not progress, desc="backups", unit="run") as bar:
        alone = _effects(whole, pairs, every, held, bar)
        with circuit.removed(model) if circuit.edges_pruned else nullcontext():
            removed = _effects(whole, pairs, rest, held, bar)
    groups = [groups_of(whole.batch)[row] for row in whole.measured(1).tolist()]
    rows = []
    for node, before, after in zip(held, alone, removed, strict=True):
        growth = mean_of(after - before, groups, generator)
        grows = growth.mean >= GROWS_NATS and not growth.low <= 0
        rows.append((str(node), node.layer, float(before.mean()), float(after.mean()), *growth, grows))
    frame = pd.DataFrame(rows, columns=list(CompletenessTable.columns)).astype({"backup": bool})
    frame = frame.sort_values("growth_nats", ascending=False, kind="stable", ignore_index=True)
    return CompletenessTable(frame, len(whole.batch))


Held = Mapping[Node, Sequence[Node] | Sequence[NodeAt]]
"""Candidates by layer, and what of each is held: the node, or the node at positions."""


def _candidates(circuit: Circuit, candidates: Iterable[Node] | None) -> Held:
    """The candidates; all nodes outside if none are named."""
    outside: dict[Node, list[Node] | list[NodeAt]] = {}
    for member in circuit.outside:
        outside.setdefault(Node(*member[:3]), []).append(member)
    named = list(outside) if candidates is None else list(candidates)
    check_nodes(named, circuit.cfg)
    own = [node for node in named if node not in outside]
    if own or not named:
        what = f"{own[0]} is kept by the circuit" if own else "there is no candidate"
        raise CircuitError(f"{what}: a backup is looked for among nodes outside, of which there must be some.")
    return {node: outside[node] for node in sorted(named, key=lambda node: node.layer)}


def _effects(
    selection: Selection, pairs: TaskBatch, kept: Masks, held: Held, bar: tqdm
) -> list[Float[Tensor, " prompt"]]:
    """KL(run || run with a candidate held), for each of them, prompt by prompt; the run is that which keeps `kept`."""
    own, per_position = selection.logits(kept), selection.n_pos is not None
    selection = Selection(selection.model, pairs, selection.baseline, per_position=per_position, teacher=lambda _: own)
    without: dict[int, list[Masks]] = {}
    for node, members in held.items():
        without.setdefault(node.layer, []).append(less(kept, members))
    found = selection.divergences(kept, without)
    next(found)
    effects = []
    for kl in found:
        effects.append(kl.double().cpu())
        bar.update()
    return effects
