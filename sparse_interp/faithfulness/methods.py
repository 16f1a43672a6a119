"""Ways to find a circuit, side by side: each gives every node and every edge a score, and chooses some of them.

    find_circuit          our search for nodes                            edges: all between them
    find_edges            our search for edges, in the whole model        nodes: those that they connect
    rivals                find_circuit from several seeds                 score: share of the circuits that have it
    gradient              |attribution| of nodes                          edges: the lesser of their two ends
    integrated_gradient   the same, mean over runs between the prompts
    eap, eap_ig           edge attribution patching, of runs between      nodes: the largest of their edges
    patching              |exact effect| of one node or edge of the twin
    ablation              what one node or edge at its mean costs
    acdc                  largest tau at which greedy removal leaves it   nodes: largest tau at which they are connected
    subnetwork_probing    P(open) of hard-concrete gates of nodes         edges: the lesser of their two ends

The first three and the last three know what a key is about, means in place of nodes; the five in between are of prompts
and their twins, as published, and a node that holds the same in both is nothing to them. A way that only ranks chooses
the smallest prefix of its ranking that keeps the stopping rule of our own searches, on the same prompts.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_interp.circuit.find import find_circuit, kept_by
from sparse_interp.circuit.find_edges import EdgeSizing, EdgeStart, search_edges
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.answer_key import Edge, GroundTruth, Key
from sparse_interp.faithfulness.greedy import greedy_edges
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.faithfulness.ground_truth import edges_among as edges_between
from sparse_interp.faithfulness.rivals import rivals
from sparse_interp.interventions.ablation import Masks, less
from sparse_interp.interventions.answers import answer_logits, at_answers, stream_at
from sparse_interp.interventions.attribution import attribute_edges, attribute_nodes
from sparse_interp.interventions.baselines import Counterfactual, mean_activations, values_on
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edges import EdgeUnits, row_values
from sparse_interp.interventions.probing import probe_nodes
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.selection import Selection, smallest_prefix, split_pairs
from sparse_interp.interventions.sweeps import patch_nodes
from sparse_interp.model.edges import RowCuts
from sparse_interp.model.sites import Node, NodeValues, masks, wires
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import TaskBatch, logit_difference

Chosen = Bool[Tensor, " unit"]

PRUNING = PruneConfig(n_train=60, n_selection=36, n_steps=150, batch_size=16)
"""How our searches go about models of the board, and when every way's circuit is large enough: the defaults, but for
fewer pairs and steps, since these models are small and so are their vocabularies."""

N_MEANS = 64
"""Training pairs over which means are taken."""

N_SEEDS = 8
"""Searches of `rivals`."""

TAUS = (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)
"""Thresholds of greedy removal, nats."""

GREEDY_EVERY, ONE_BY_ONE_EVERY = 3, 9
"""One in so many selection prompts measures a cut, in greedy removal and where edges are patched one by one; odd, so
that both sides of pairs are among them."""

EDGES_TOGETHER = 32
"""Edges that are patched in one pass, each in a row of prompts of its own."""

PRICES = (1e-3, 3e-3, 1e-2)
"""Prices of an open gate that subnetwork probing tries, nats; the smallest circuit wins."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a way to find circuits makes of a model."""

    nodes: Mapping[Node, float]
    """A score for every node of the model, the more the more needed."""

    edges: Mapping[Edge, float]
    """A score for every non-zero within-block weight."""

    chosen: Key
    """The circuit that it settles for."""

    others: tuple[Key, ...] = field(default=())
    """Further circuits that it found."""


Method = Callable[..., Ranked]
"""(ground truth, *, generator) -> what it finds."""


class _Bench:
    """What all ways share: the means, the prompts, and a measure of what is chosen."""

    def __init__(self, truth: GroundTruth, generator: torch.Generator):
        self.truth, self.model, self.generator = truth, truth.model, generator
        blocks = truth.blocks(N_MEANS, generator=generator)
        self.means = mean_activations(self.model, blocks, batch_size=128)
        self.train, self.pairs = split_pairs(truth.task, PRUNING, generator)
        self.nodes = all_nodes(self.model.cfg)

    @cached_property
    def selection(self) -> Selection:
        """The prompts on which candidates are measured."""
        return Selection(self.model, self.pairs, self.means)

    @cached_property
    def sizing(self) -> EdgeSizing:
        """What finds the smallest prefix of a ranking of edges."""
        start = EdgeStart.of(self.model, None, PRUNING, self.means)
        connections = Connections(self.model, start.kept, start.units, start.sites)
        return EdgeSizing(self.model, start, connections, self.selection, PRUNING, progress=False)

    def some(self, every: int) -> TaskBatch:
        """One in `every` of the prompts."""
        return self.selection.batch.rows(slice(None, None, every))

    @property
    def units(self) -> EdgeUnits:
        """The edges, and the channels of the last read."""
        return self.sizing.units

    @cached_property
    def edges(self) -> list[Edge]:
        """The edges in the order of the units, which end with the channels of the last read."""
        return edges_of(self.model, self.units)

    @property
    def ends(self) -> list[Node]:
        """The channels of the last read, in the order of the units."""
        return [Node(*self.units.end, channel) for channel in self.units.channels.tolist()]

    def effects_alone(self) -> dict[Node, float]:
        """KL(model || model with one node held at its mean), nats, for every node."""
        kept: Masks = {place: torch.ones_like(mask) for place, mask in masks((), self.model.cfg).items()}
        without: dict[int, list[Masks]] = {}
        for node in self.nodes:
            without.setdefault(node.layer, []).append(less(kept, [node]))
        return dict(zip(self.nodes, self.selection.knock_outs(kept, without, 1), strict=True))

    def smallest_nodes(self, scores: Mapping[Node, float]) -> frozenset[Node]:
        """The smallest prefix of a ranking of nodes that keeps the stopping rule."""
        order = sorted(self.nodes, key=lambda node: -scores[node])

        def good(n: int) -> bool:
            return self.selection.fit(kept_by(order[:n], self.model, PRUNING)).enough(PRUNING)

        return frozenset(order[: smallest_prefix(len(order), good, 1)])

    def smallest_edges(self, of_units: Float[Tensor, " unit"]) -> Key:
        """The smallest prefix of a ranking of units that keeps it, as far as it is connected."""
        return self.key(self.sizing.first(of_units.argsort(descending=True, stable=True), 1))

    def key(self, chosen: Chosen) -> Key:
        """The chosen units that are connected, and the nodes that they join."""
        chosen, kept = self.sizing.connections.of(chosen)
        edges = [edge for edge, there in zip(self.edges, chosen.tolist(), strict=False) if there]
        return Key(frozenset(self.sizing.start.nodes_of(kept)), frozenset(edges))

    def by_edge(self, of_units: Float[Tensor, " unit"]) -> dict[Edge, float]:
        """Numbers of units, edge by edge."""
        return dict(zip(self.edges, of_units.tolist(), strict=False))

    def of_nodes(self, scores: Mapping[Node, float], nodes: Collection[Node] | None = None) -> Ranked:
        """What follows from scores of nodes: an edge is worth as much as the lesser of its ends."""
        chosen = self.smallest_nodes(scores) if nodes is None else frozenset(nodes)
        edges = {edge: min(scores[edge[0]], scores[edge[1]]) for edge in edges_between(self.model, self.nodes)}
        return Ranked(scores, edges, Key(chosen, frozenset(edge for edge in edges if chosen.issuperset(edge))))

    def of_units(self, scores: Float[Tensor, " unit"], chosen: Key | None = None) -> Ranked:
        """What follows from scores of edges and last channels: a node is worth as much as the best of its edges."""
        scores, nodes = scores.double(), dict.fromkeys(self.nodes, -torch.inf)
        for edge, score in self.by_edge(scores).items():
            for node in edge:
                nodes[node] = max(nodes[node], score)
        nodes.update(zip(self.ends, scores[len(self.edges) :].tolist(), strict=True))
        chosen = self.smallest_edges(scores) if chosen is None else chosen
        return Ranked(nodes, self.by_edge(scores), chosen)

    def of_edges(self, edges: Mapping[Edge, float], ends: Mapping[Node, float]) -> Ranked:
        """The same from scores by name."""
        scores = [edges[edge] for edge in self.edges] + [ends[node] for node in self.ends]
        return self.of_units(torch.tensor(scores, dtype=torch.float64))


def edges_of(model: HookedSparseTransformer, units: EdgeUnits) -> list[Edge]:
    """The edges among `units` by their ends, in order."""
    sites, found = {wire.weight_name: (wire.source.name, wire.target.name) for wire in wires(model.cfg)}, []
    for matrix, (rows, columns) in units.entries.items():
        source, target = sites[matrix.name]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            found.append((Node(matrix.layer, source, row), Node(matrix.layer, target, column)))
    return found


# -- our own --------------------------------------------------------------------------------------------------------

KEPT = 2.0
"""What is in a circuit scores at least this, and gates end below it."""


def _searched(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    how = {"baseline": bench.means, "generator": generator, "progress": False}
    circuit = find_circuit(truth.model, truth.task, PRUNING, **how)
    assert circuit.tau is not None
    scores = {node: circuit.tau.of(node) for node in bench.nodes}
    costs = zip(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None),
                circuit.nodes.importance_nats, strict=True)  # fmt: skip
    scores.update({Node(*map(_plain, node)): KEPT + max(0.0, cost) for node, cost in costs})
    return bench.of_nodes(scores, circuit.node_set)


def _plain(value: object) -> str | int:
    return value if isinstance(value, str) else int(value)  # pyright: ignore[reportArgumentType]


def _searched_edges(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    how = {"baseline": bench.means, "generator": generator, "progress": False}
    circuit, units, search = search_edges(truth.model, None, truth.task, PRUNING, **how)
    chosen = _key_of(circuit)
    scores = torch.empty(len(units), dtype=torch.float64)
    scores[search.order] = torch.linspace(1, 0, len(units), dtype=torch.float64)
    cost = dict(zip(_edges_named(circuit), circuit.edges.importance_nats[circuit.edges.kind == "weight"], strict=True))
    kept = [cost.get(edge, torch.nan) for edge in edges_of(truth.model, units)]
    kept += [0.0 if node in chosen.nodes else torch.nan for node in bench.ends]
    known = torch.tensor(kept, dtype=torch.float64)
    found = bench.of_units(torch.where(known.isnan(), scores, KEPT + known.clamp(min=0)), chosen)
    steered = {node: max(KEPT, found.nodes[node]) for node in chosen.nodes}  # a write may be there without an edge
    return replace(found, nodes={**found.nodes, **steered})


def _edges_named(circuit: Circuit) -> list[Edge]:
    weights = circuit.edges[circuit.edges.kind == "weight"]
    return [(_node(a), _node(b)) for a, b in zip(weights.source, weights.target, strict=True)]


def _node(name: str) -> Node:
    layer, site, channel = name.split(".")
    return Node(int(layer[1:]), site, int(channel))


def _key_of(circuit: Circuit) -> Key:
    return Key(circuit.node_set, frozenset(_edges_named(circuit)))


def _seeds(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    how = {"baseline": bench.means, "generator": generator, "progress": False}
    found = rivals(truth.model, truth.task, PRUNING, n_seeds=N_SEEDS, at_once=N_SEEDS, n_pairs=16, **how)
    keys = [_key_of(circuit) for circuit in found.circuits]
    share = {node: sum(node in key.nodes for key in keys) / len(keys) for node in bench.nodes}
    first = min(keys, key=lambda key: len(key.nodes))
    ranked = bench.of_nodes(share, first.nodes)
    return replace(ranked, others=tuple(keys))


# -- of prompts and their twins -------------------------------------------------------------------------------------


def _attributed(method: str, bench: _Bench) -> dict[Node, float]:
    table = attribute_nodes(bench.model, bench.selection.batch, method=method, progress=False)
    return _by_node(table.frame)


def _by_node(frame) -> dict[Node, float]:
    rows = frame[["layer", "site", "channel", "effect"]].itertuples(index=False, name=None)
    return {Node(int(layer), site, int(channel)): abs(effect) for layer, site, channel, effect in rows}


def _gradient(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    return bench.of_nodes(_attributed("gradient", bench))


def _integrated(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    return bench.of_nodes(_attributed("integrated inputs", bench))


def _edges_attributed(truth: GroundTruth, method: str, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    table = attribute_edges(bench.model, bench.selection.batch, method=method).frame
    ends = [(_node(a), _node(b)) for a, b in zip(table.source, table.target, strict=True)]
    return bench.of_edges(dict(zip(ends, table.effect.abs(), strict=True)), _attributed(method, bench))


def _eap(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    return _edges_attributed(truth, "gradient", generator)


def _eap_ig(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    return _edges_attributed(truth, "integrated inputs", generator)


def _patched(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    nodes = _by_node(patch_nodes(bench.model, bench.selection.batch, progress=False).frame)
    ends = torch.tensor([nodes[node] for node in bench.ends], dtype=torch.float64)
    scores = torch.cat([_patched_edges(bench).abs(), ends])
    found = bench.of_units(scores)
    return replace(found, nodes=nodes, chosen=Key(bench.smallest_nodes(nodes), found.chosen.edges))


@torch.no_grad()
def _patched_edges(bench: _Bench) -> Float[Tensor, " edge"]:
    """The change of the logit difference when one edge carries what its source holds on the twin, mean over prompts."""
    model, batch = bench.model, bench.some(ONE_BY_ONE_EVERY)
    twins, own = Counterfactual().on(model, batch), values_on(model, batch, batch.clean.shape[1])
    rows = row_values(model, at_answers(twins, batch))
    changed = row_values(model, {place: (twins[place] - own[place]).abs().amax((0, 1)) for place in own})
    found = torch.zeros(len(bench.edges), dtype=torch.float64)
    with evaluating(model):
        before, start = logit_difference(answer_logits(model, batch), batch), 0
        for matrix, (sources, targets) in bench.units.entries.items():
            stream = stream_at(model, batch, matrix.layer) if matrix.layer else None
            told = changed[matrix][sources].nonzero()[:, 0]
            for some in told.split(EDGES_TOGETHER) if len(told) else ():
                n, each = len(some), torch.arange(len(batch)).repeat(len(some))
                cuts = RowCuts(*(ends[some].repeat_interleave(len(batch)) for ends in (sources, targets)),
                               rows[matrix][each])  # fmt: skip
                with model.cutting_rows(matrix, cuts):
                    here = None if stream is None else stream[each]
                    logits = answer_logits(model, batch.rows(each), here, matrix.layer)
                effects = logit_difference(logits, batch.rows(each)).view(n, -1) - before
                found[start + some] = effects.double().mean(1)
            start += len(sources)
    return found


# -- of means -------------------------------------------------------------------------------------------------------


def _ablated(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    nodes = bench.effects_alone()
    everything = torch.ones(len(bench.units), dtype=torch.bool)
    found = bench.of_units(bench.sizing.costs(everything, "cuts"))
    return replace(found, nodes=nodes, chosen=Key(bench.smallest_nodes(nodes), found.chosen.edges))


def _acdc(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    left = greedy_edges(bench.sizing.connections, bench.some(GREEDY_EVERY), bench.means, TAUS)
    scores, nodes = torch.zeros(len(bench.units), dtype=torch.float64), dict.fromkeys(bench.nodes, 0.0)
    good = bench.key(left[min(TAUS)])
    for tau, chosen in left.items():
        key = bench.key(chosen)
        scores[chosen] = tau
        nodes.update(dict.fromkeys(key.nodes, tau))
        if bench.sizing.fit(chosen).enough(PRUNING):
            good = key
    return Ranked(nodes, bench.by_edge(scores), good)


def _probed(truth: GroundTruth, *, generator: torch.Generator) -> Ranked:
    bench = _Bench(truth, generator)
    found = []
    for price in PRICES:
        gates: NodeValues = probe_nodes(truth.model, bench.train, bench.means, price=price, generator=generator)
        found.append(bench.of_nodes({node: gates.of(node) for node in bench.nodes}))
    return min(found, key=lambda ranked: len(ranked.chosen.nodes))


METHODS: dict[str, Method] = {
    "find_circuit": _searched,
    "find_edges": _searched_edges,
    "rivals": _seeds,
    "gradient": _gradient,
    "integrated_gradient": _integrated,
    "eap": _eap,
    "eap_ig": _eap_ig,
    "patching": _patched,
    "ablation": _ablated,
    "acdc": _acdc,
    "subnetwork_probing": _probed,
}
"""By name, in the order of the table above."""

SEARCHES = ("find_circuit", "find_edges", "rivals")
"""Our own, which search as PRUNING says; of it the others know prompts and stopping rule alone."""


def told(method: str) -> tuple[Any, ...]:
    """Everything that says how a way of finding circuits goes about it on the board."""
    own = {
        "rivals": (N_SEEDS,),
        "patching": (ONE_BY_ONE_EVERY,),
        "acdc": (TAUS, GREEDY_EVERY),
        "subnetwork_probing": (PRICES,),
    }
    shared = ("n_train", "n_selection", "rule", "max_kl", "max_loss_gap", "max_ld_error", "target_task_loss", "sites")
    pruning = PRUNING if method in SEARCHES else tuple(getattr(PRUNING, name) for name in shared)
    return N_MEANS, pruning, *own.get(method, ())
