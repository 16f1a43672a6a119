"""find_edges: the weights that a behaviour needs, from a circuit of nodes or from the whole model.

    1  one gate per non-zero weight between the nodes, and one per channel that is unembedded     on training pairs
    2  the smallest prefix of the ranking that meets the stopping rule                             on selection pairs
    3  estimate in one gradient what each edge that is left costs; drop the least needed while the rule holds; repeat
    4  the same with each edge cut on its own, which is exact

What counts is always what is connected (interventions/connections.py says what that takes), in training too.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.circuit.find import fit_rows
from sparse_interp.circuit.graph import SCORE_COLUMNS, Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, less
from sparse_interp.interventions.answers import Teacher
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edge_gates import EdgeSearch, learn_edge_gates
from sparse_interp.interventions.edges import (
    EdgeUnits,
    cut_estimates,
    cutting,
    edges_among,
    row_values,
)
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.selection import Candidate, EdgeCut, Fit, Selection, smallest_prefix, split_pairs
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.edges import Matrix
from sparse_interp.model.sites import (
    Node,
    NodeValues,
    Place,
    masks,
)
from sparse_interp.model.zoo import means_of
from sparse_interp.tasks.task import Task
from sparse_interp.tokenizer import tokenizer_hash

Chosen = Bool[Tensor, " unit"]

MAX_ESTIMATED_PASSES = 3
"""Rounds of dropping by estimates that come before exact cuts, at most."""

NO_EFFECT_NATS = 1e-6
"""An edge whose cut changes the divergence by less changes nothing."""

CUT_EVERY = 9
"""One in so many selection prompts measures what a cut costs; odd, so that both sides of pairs are among them."""


def find_edges(
    model: AnyModel,
    circuit: Circuit | None,
    task: Task,
    config: PruneConfig | None = None,
    *,
    baseline: NodeValues | None = None,
    teacher: Teacher | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Circuit:
    """The fewest edges that the search finds to agree with `model` on `task`, each of which matters.

    Args:
        model: the model, in any mode: ours, or a dense one of TransformerLens.
        circuit: where the search begins: its nodes, its edges and its baseline. None begins with all nodes. A circuit
            that only just meets the stopping rule leaves little to drop: find its nodes under a stricter one.
        task: prompts in the model's own tokens.
        config: how to search; None takes the circuit's own, or the defaults. A gate is that of an edge here.
        baseline: what cut edges carry and nodes outside hold, where no circuit says it; None takes the means over text
            that are kept beside a bundled model.
        teacher: answers that the circuit is to agree with, in place of the model's own; None takes the model's own.
        generator: draws prompts and starting gates.
        progress: whether to show progress bars.

    Raises:
        CircuitError: if no circuit meets the stopping rule, not even with all edges; if the circuit is of another
            model, or has no edge.
        CheckpointError: if no baseline is given and none is kept for these weights.
        TaskError: if the task has too few pairs, or prompts longer than the model's context.
    """
    how = {"baseline": baseline, "teacher": teacher, "generator": generator, "progress": progress}
    return search_edges(model, circuit, task, config, **how)[0]


def search_edges(
    model: AnyModel,
    circuit: Circuit | None,
    task: Task,
    config: PruneConfig | None = None,
    *,
    baseline: NodeValues | None = None,
    teacher: Teacher | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> tuple[Circuit, EdgeUnits, EdgeSearch]:
    """`find_edges`, with everything that had a gate and how the gates ranked it."""
    model = hooked(model)
    if circuit is not None:
        circuit.check_all_positions("find_edges")
    config = config or (None if circuit is None else circuit.prune) or PruneConfig()
    task.check_fits(model.cfg.n_ctx)
    start = EdgeStart.of(model, circuit, config, baseline)
    seed = generator.initial_seed()
    train, select = split_pairs(task, config, generator)
    connections = Connections(model, start.kept, start.units, start.sites)
    how = {"teacher": teacher, "generator": generator, "progress": progress}
    search = learn_edge_gates(model, train, config, start.baseline, connections, **how)
    selection = Selection(model, select, start.baseline, frozen_norms=config.frozen_norms, teacher=teacher)
    sizing = EdgeSizing(model, start, connections, selection, config, progress)
    chosen, cost = sizing.needed(sizing.first(search.order, search.n_open))
    nodes = start.nodes_of(sizing.connections.of(chosen)[1])
    found = Circuit.of_nodes(
        model,
        nodes,
        start.baseline,
        sites=start.sites,
        importance=sizing.importance_of(nodes, chosen),
        edges=start.units.masks(chosen)[0],
        task_name=task.name,
        task_sha256=task.templates_sha256,
        tokenizer_sha256=tokenizer_hash(task.tokenizer),
        prune=config,
        seed=seed,
        scores=_scores(sizing.fit(chosen), selection),
        history=search.history.frame,
    )
    return replace(found, edges=_with_importance(found, start.units, cost)), start.units, search


@dataclass(frozen=True)
class EdgeStart:
    """Where a search begins."""

    kept: Masks
    """What is not outside from the start; all of the sites where nothing is held."""

    nodes: frozenset[Node] | None
    """The nodes of the circuit; None for all."""

    units: EdgeUnits
    sites: tuple[str, ...]
    baseline: NodeValues

    @classmethod
    def of(
        cls, model: HookedModel, circuit: Circuit | None, config: PruneConfig, baseline: NodeValues | None
    ) -> "EdgeStart":
        """The circuit, or all nodes at the sites that the configuration names."""
        if circuit is not None:
            circuit.check_model(model)
            units = EdgeUnits.of(model, circuit.kept, circuit.edge_masks(model), circuit.sites)
            return cls(circuit.kept, circuit.node_set, units, circuit.sites, circuit.baseline)
        baseline = means_of(model) if baseline is None else baseline
        baseline.check(model.cfg)
        kept = {place: torch.ones_like(mask) for place, mask in masks((), model.cfg).items()}
        droppable = {place: mask & (place.site in config.sites) for place, mask in kept.items()}
        units = EdgeUnits.of(model, kept, edges_among(model, droppable), config.sites)
        return cls(kept, None, units, config.sites, baseline)

    def nodes_of(self, kept: Masks) -> list[Node]:
        """The nodes that are left where `kept` is."""
        there = {place: mask for place, mask in kept.items() if place.site in self.sites}
        return [Node(*place, channel) for place, mask in there.items() for channel in mask.nonzero().flatten().tolist()]


class EdgeSizing:
    """Candidates, each a choice of units, on the selection pairs."""

    def __init__(
        self,
        model: HookedModel,
        start: EdgeStart,
        connections: Connections,
        selection: Selection,
        config: PruneConfig,
        progress: bool,
    ):
        self.model, self.start, self.connections = model, start, connections
        self.selection, self.config, self.progress = selection, config, progress
        self.units = start.units
        self.everything, _ = self.units.masks(torch.ones(len(self.units), dtype=torch.bool))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _cut(self, chosen: Chosen) -> AbstractContextManager[AnyModel]:
        """A block in which edges that were not chosen are cut."""
        edges, _ = self.units.masks(chosen)
        cut = {matrix: mask & ~edges[matrix] for matrix, mask in self.everything.items()}
        return cutting(self.model, cut, self.start.baseline)

    def fit(self, chosen: Chosen) -> Fit:
        """How what is connected of the chosen units does."""
        chosen, kept = self.connections.of(chosen)
        with self._cut(chosen):
            return self.selection.fit(kept)

    def first(self, order: Tensor, n_open: int) -> Chosen:
        """The smallest prefix of a ranking that meets the rule."""
        try:
            n = smallest_prefix(len(order), lambda n: self.fit(self._of(order[:n])).enough(self.config), n_open)
        except CircuitError as error:
            fit = self.fit(self._of(order))
            raise CircuitError(
                f"no choice of edges meets the stopping rule: with all {len(order)} of them KL(model || circuit) is "
                f"{fit.kl:.3g} nats and the task loss {fit.loss:.3g} (the model's: {fit.model_loss:.3g}) on "
                f"{len(self.selection.batch)} selection prompts. Begin with the whole model (circuit=None) or with a "
                "circuit found under a stricter bound, or raise n_selection: few pairs differ from draw to draw."
            ) from error
        return self.connections.of(self._of(order[:n]))[0]

    def _of(self, units: Tensor) -> Chosen:
        return torch.zeros(len(self.units), dtype=torch.bool).index_fill(0, units, True)

    def needed(self, chosen: Chosen) -> tuple[Chosen, Float[Tensor, " unit"]]:
        """What is left when units that cost least have gone, as many as the rule allows, and what those left cost.

        Costs are measured twice at most; edges that turn out idle in the end are dropped, and change the others' by
        nothing that counts. What the rule cannot do without stays, whatever it costs on the prompts that cuts are
        measured on.
        """
        for _ in range(MAX_ESTIMATED_PASSES):
            cost = cut_estimates(self.selection, self.connections.of(chosen)[1], self.units, chosen)
            before, chosen = chosen, self._less_cheap(chosen, cost)
            if torch.equal(before, chosen):
                break
        cost = self.costs(chosen, "cuts 1")
        fewer = self._less_idle(self._less_cheap(chosen, cost), cost)
        if not torch.equal(fewer, chosen):
            cost = self.costs(fewer, "cuts 2")
            fewer = self._less_idle(fewer, cost)
        return fewer, cost.masked_fill(~fewer, torch.nan)

    def _less_cheap(self, chosen: Chosen, cost: Float[Tensor, " unit"]) -> Chosen:
        """The same less what costs least, as much of it as the rule allows."""
        members = chosen.nonzero().flatten()
        return self.first(members[cost[members].argsort(descending=True, stable=True)], len(members))

    def _less_idle(self, chosen: Chosen, cost: Float[Tensor, " unit"]) -> Chosen:
        """The same less units that change nothing, all together or one by one, as far as the rule allows."""
        idle = (chosen & (cost.abs() <= NO_EFFECT_NATS)).nonzero().flatten()
        for units in (idle, *idle[:, None]):
            without = self.connections.of(chosen & ~self._of(units))[0]
            if not torch.equal(without, chosen) and self.fit(without).enough(self.config):
                chosen = without
        return chosen

    @torch.no_grad()
    def costs(self, chosen: Chosen, title: str) -> Float[Tensor, " unit"]:
        """By how much the mean KL(model || circuit) grows when a unit is cut too, nats; nan for those not chosen."""
        kept = self.connections.of(chosen)[1]
        by_layer: dict[int, list[tuple[int, Matrix | Place, int]]] = {}
        groups = [(group, i) for group, n in self.units.sizes.items() for i in range(n)]
        for unit in chosen.nonzero().flatten().tolist():
            group, i = groups[unit]
            by_layer.setdefault(group.layer, []).append((unit, group, i))
        without = {layer: self._each(members, kept) for layer, members in sorted(by_layer.items())}
        units = [unit for layer in sorted(by_layer) for unit, _, _ in by_layer[layer]]
        found = torch.full((len(self.units),), torch.nan)
        with self._cut(chosen):
            costs = self.selection.knock_outs(kept, without, CUT_EVERY)
            for unit, cost in zip(
                units, tqdm(costs, total=len(units), disable=not self.progress, desc=title), strict=True
            ):
                found[unit] = cost
        return found

    def _each(self, members: list[tuple[int, Matrix | Place, int]], kept: Masks) -> list[Candidate]:
        """What is cut for each of `members`: an edge, or a channel of the end."""
        rows, like = row_values(self.model, self.start.baseline), self.model.embed.W_E
        rows = {matrix: values.to(like) for matrix, values in rows.items()}
        found: list[Candidate] = []
        for _, group, i in members:
            if isinstance(group, Place):
                found.append(less(kept, [Node(*group, int(self.units.channels[i]))]))
            else:
                row, column = (int(index[i]) for index in self.units.entries[group])
                found.append(EdgeCut(group, self.units.shapes[group], row, column, rows[group]))
        return found

    @torch.no_grad()
    def importance_of(self, nodes: list[Node], chosen: Chosen) -> dict[Node, float]:
        """By how much the divergence grows when a node is held at its baseline, nats."""
        kept = self.connections.of(chosen)[1]
        in_order = sorted(nodes, key=lambda node: (node.layer, node.site))  # those of a place run together
        without: dict[int, list[Masks]] = {}
        for node in in_order:
            without.setdefault(node.layer, []).append(less(kept, [node]))
        with self._cut(chosen):
            costs = self.selection.knock_outs(kept, without, CUT_EVERY)
            bar = tqdm(costs, total=len(nodes), disable=not self.progress, desc="importance of nodes", unit="node")
            return dict(zip(in_order, bar, strict=True))


def _scores(fit: Fit, selection: Selection) -> pd.DataFrame:
    """Both losses side by side and the divergence, on the selection pairs."""
    measured = (selection.ablation + ", edges cut", "selection", len(selection.batch))
    table = [(*row[:3], measured[0], row[3], *measured[1:]) for row in fit_rows(fit)]
    return pd.DataFrame(table, columns=list(SCORE_COLUMNS))


def _with_importance(circuit: Circuit, units: EdgeUnits, cost: Float[Tensor, " unit"]) -> pd.DataFrame:
    """A circuit's edges with what cutting each of them costs; wires have none."""
    parts = dict(zip(units.sizes, cost.split(list(units.sizes.values())), strict=True))
    spread = {matrix: units.spread(matrix, parts[matrix], torch.nan) for matrix in units.entries}
    at = circuit.entries
    known = [float(spread[Matrix(*row[:2])][row[2:]]) for row in at.itertuples(index=False)]
    return circuit.edges.assign(importance_nats=pd.Series(known, index=at.index, dtype=float))
