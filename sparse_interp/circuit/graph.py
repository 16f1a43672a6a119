"""Circuit: nodes, the weights between them, and the values that everything else is held at.

    with circuit.running(model):  logits = model(tokens)      every node outside the circuit holds its baseline

Edges are read off the weights, never fitted: a non-zero entry of W_Q, W_K, W_V, W_O, W_in or W_out between two kept
nodes. Those are what `n_edges` counts. Identity wires along the residual stream and the wires by which q and k act on
the write through the attention pattern are drawn and not counted; entries of W_E and W_U are listed and counted apart.

A circuit of nodes has all of its edges. One whose edges were pruned (`edges_pruned`) has those that it lists: any other
weight between two of its nodes carries the baseline of its source, before AbsTopK acts on the target.

Circuits of one model form sets (`&`, `|`, `-`, `diff`). How a circuit is kept in a file is in `circuit/files.py`, how
it is drawn in `circuit/pictures.py`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ForwardRef

import pandas as pd
import torch

from sparse_interp.circuit.compact import CircuitCompaction
from sparse_interp.circuit.comparison import EDGE_KEY, CircuitComparison, weights_of
from sparse_interp.circuit.exports import CircuitExports
from sparse_interp.circuit.files import EDGE_TYPES, CircuitFiles
from sparse_interp.circuit.pictures import CircuitPictures
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import FwdHooks, Masks, holding_hooks
from sparse_interp.interventions.edges import EdgeMasks, cutting, edges_among
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.config import AnyShape, Shape
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.edges import Matrix
from sparse_interp.model.sites import (
    NODE_SITES,
    SITES,
    WIRES,
    Node,
    NodeAt,
    NodeValues,
    Place,
    check_nodes,
    heads_of,
    masks,
    masks_at,
    places,
    rows_of,
    wires,
)
from sparse_interp.tasks.task import TaskBatch

if TYPE_CHECKING:
    from networkx import DiGraph as DiGraph
else:
    DiGraph = ForwardRef("networkx.DiGraph")  # named, not imported: 0.1 s that only those who want a graph should pay

NODE_COLUMNS = ("layer", "site", "channel", "head", "baseline", "tau", "importance_nats")
EDGE_COLUMNS = ("source", "target", "kind", "weight_name", "weight")
SCORE_COLUMNS = ("measure", "value", "unit", "ablation", "metric", "split", "n_prompts")

_READS, _WRITES = ("attn_read", "mlp_read", "final_resid", "final_read"), ("attn_write", "mlp_write")


@dataclass(frozen=True, eq=False)
class Circuit(CircuitFiles, CircuitExports, CircuitPictures, CircuitCompaction, CircuitComparison):
    """A set of nodes of one model, for one task, with what everything outside it is held at."""

    nodes: pd.DataFrame
    """One row per node: `layer`, `site`, `channel`, `head` (q, k, v), `baseline`, `tau`, `importance_nats`; and if
    nodes are kept at some positions only `positions`, numbers with a space between."""

    edges: pd.DataFrame
    """One row per wire: `source` and `target` (as `L0.neuron.12`), `kind`, `weight_name`, `weight`; and after edges
    were pruned `importance_nats`, what cutting this one costs."""

    baseline: NodeValues
    """What every node is held at while it is outside the circuit."""

    cfg: Shape
    """Shape of the model that the circuit belongs to."""

    model_name: str
    """What that model is called."""

    model_sha256: str
    """Hash of its weights; empty for a circuit that was written down without them."""

    sites: tuple[str, ...] = NODE_SITES
    """Where nodes outside the circuit are held; every other site keeps what is computed there."""

    n_pos: int | None = None
    """Length of the prompts, tokens, if it says at which positions nodes are kept; None keeps them at all."""

    edges_pruned: bool = False
    """Whether a weight between two nodes that is not among `edges` is cut; otherwise all of them act, listed or not."""

    task_name: str | None = None
    """Task that the circuit was found for."""

    task_sha256: str | None = None
    """Hash of that task's templates."""

    tokenizer_sha256: str | None = None
    """Hash of the tokenizer that the task's prompts were written with."""

    tau: NodeValues | None = None
    """Where the search left every node's gate, inside the circuit and out; +inf at nodes without one."""

    prune: PruneConfig | None = None
    """How the circuit was searched for; None if it was put together by hand."""

    seed: int | None = None
    """Seed of the search."""

    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORE_COLUMNS)))
    """What was measured, with the ablation, metric, split and number of prompts of each number."""

    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The search, step by step."""

    @classmethod
    def of_nodes(
        cls,
        model: AnyModel,
        nodes: Iterable[Node] | Iterable[NodeAt],
        baseline: NodeValues,
        *,
        sites: tuple[str, ...] | None = None,
        tau: NodeValues | None = None,
        importance: Mapping[Node, float] | Mapping[NodeAt, float] | None = None,
        n_pos: int | None = None,
        edges: EdgeMasks | None = None,
        prune: PruneConfig | None = None,
        **origin: Any,
    ) -> "Circuit":
        """The circuit of `nodes` in `model`, edges read off its weights.

        `sites` are those where everything else is held; None takes those of the search `prune`, or all of a model's.
        With `edges` all other weights between its nodes are cut. Nodes at positions come with the length `n_pos` of
        their prompts; the importance of a node is then the largest that it has at a position.

        Raises:
            CircuitError: for a node that the model does not have, or a baseline of another model.
        """
        model = hooked(model)
        spots, order = set(nodes), _order(model.cfg)
        nodes = spots if n_pos is None else {spot.node for spot in spots}
        check_nodes(nodes, model.cfg)
        if n_pos is not None and importance is not None:
            importance = {spot.node: value for spot, value in sorted(importance.items(), key=lambda item: item[1])}
        kept = sorted(nodes, key=lambda node: (order[Place(node.layer, node.site)], node.channel))
        if sites is None:
            sites = NODE_SITES if prune is None else prune.sites
        baseline.check(model.cfg, sites)
        rows = []
        for node in kept:
            head = node.channel // model.cfg.d_head if node.site in ("q", "k", "v") else None
            known = None if tau is None else tau.of(node)
            needed = None if importance is None else importance.get(node)
            rows.append((*node, head, baseline.of(node), known, needed))
        frame = pd.DataFrame(rows, columns=list(NODE_COLUMNS)).astype(
            {"head": "Int64", "baseline": float, "tau": float, "importance_nats": float}
        )
        if n_pos is not None:
            masks_at(spots, model.cfg, n_pos)  # refuses positions that the prompts do not have
            frame["positions"] = _positions(spots, kept)
        return cls(
            n_pos=n_pos,
            nodes=frame,
            edges=edges_between(model, kept, edges),
            baseline=baseline,
            cfg=Shape.of(model.cfg),
            model_name=model.cfg.model_name,
            model_sha256=weights_sha256(model),
            sites=sites,
            edges_pruned=edges is not None,
            tau=tau,
            prune=prune,
            **origin,
        )

    # -- what it is -------------------------------------------------------------------------------------------------

    @cached_property
    def node_set(self) -> frozenset[Node]:
        """The nodes, as a set."""
        columns = self.nodes[["layer", "site", "channel"]]
        return frozenset(Node(int(layer), str(site), int(c)) for layer, site, c in columns.itertuples(index=False))

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """Number of non-zero within-block weights between kept nodes."""
        return int((self.edges.kind == "weight").sum())

    def edge_masks(self, model: AnyModel) -> EdgeMasks:
        """For every weight matrix of `model`, which of its entries are edges of this circuit."""
        among = edges_among(hooked(model), masks(self.node_set, self.cfg, self.sites))
        return self._listed(among) if self.edges_pruned else among

    def cut_edges(self, model: AnyModel) -> EdgeMasks:
        """For every weight matrix of `model`, which entries between two nodes are cut: none in a circuit of nodes."""
        if not self.edges_pruned:
            return {}
        among = edges_among(hooked(model), masks(self.node_set, self.cfg, self.sites))
        listed = self._listed(among)
        return {matrix: mask & ~listed[matrix] for matrix, mask in among.items()}

    def _listed(self, among: EdgeMasks) -> EdgeMasks:
        """The entries of matrices that are in the table of edges."""
        rows = self.entries.groupby(["layer", "name"])
        found = {}
        for matrix, mask in among.items():
            found[matrix] = torch.zeros_like(mask)
            if matrix in rows.groups:
                here = rows.get_group(matrix)
                found[matrix][torch.tensor(here.row.to_numpy()), torch.tensor(here.column.to_numpy())] = True
                found[matrix] &= mask
        return found

    @cached_property
    def entries(self) -> pd.DataFrame:
        """Where the edges stand in the weights: `layer`, `name` of the matrix, `row`, `column`."""
        weights = self.edges[self.edges.kind == "weight"]
        ends = {end: weights[end].str.extract(r"^L(\d+)\.\w+\.(\d+)$").astype("int64") for end in ("source", "target")}
        name = weights.weight_name.str.extract(r"^([\w.]+?)(?:\[(\d+)\])?$")  # with a head where queries are grouped
        channel = ends["source"][1]
        in_head = name[1].astype(float) * self.cfg.d_head + channel % self.cfg.d_head
        row = in_head.where(name[1].notna(), channel).astype("int64")
        return pd.DataFrame({"layer": ends["source"][0], "name": name[0], "row": row, "column": ends["target"][1]})

    # -- running it -------------------------------------------------------------------------------------------------

    @cached_property
    def spots(self) -> frozenset[NodeAt]:
        """The nodes at the positions where they are kept; empty if they are kept at all positions."""
        if self.n_pos is None:
            return frozenset()
        rows = self.nodes[["layer", "site", "channel", "positions"]].itertuples(index=False)
        return frozenset(NodeAt(int(r[0]), str(r[1]), int(r[2]), int(pos)) for r in rows for pos in str(r[3]).split())

    @property
    def members(self) -> frozenset[Node] | frozenset[NodeAt]:
        """The nodes, each at its positions if the circuit says positions."""
        return self.node_set if self.n_pos is None else self.spots

    @property
    def outside(self) -> list[Node] | list[NodeAt]:
        """The nodes that hold the baseline, each at those positions if the circuit says positions; in forward order."""
        held = {place: ~mask for place, mask in self.inside.items() if place.site in self.sites}
        if self.n_pos is None:
            return [Node(*place, channel) for place, mask in held.items() for (channel,) in mask.nonzero().tolist()]
        return [
            NodeAt(*place, channel, self.n_pos - len(mask) + row)  # the last read has one row, of the last position
            for place, mask in held.items()
            for row, channel in mask.nonzero().tolist()
        ]

    @property
    def inside(self) -> Masks:
        """For every place, which channels are in the circuit, position by position if it says positions."""
        if self.n_pos is not None:
            return masks_at(self.spots, self.cfg, self.n_pos, self.sites)
        return masks(self.node_set, self.cfg, self.sites)

    @property
    def kept(self) -> Masks:
        """For every place, which channels are computed: those of the circuit, and outside `sites` all."""
        return {p: m if p.site in self.sites else torch.ones_like(m) for p, m in self.inside.items()}

    def hooks(self, model: AnyModel) -> FwdHooks:
        """Plain forward hooks under which `model` runs as this circuit, for any TransformerLens call.

        Raises:
            CircuitError: if the model has another shape or other weights, or edges between the nodes are cut.
        """
        self.check_model(model)
        if self.edges_pruned:
            raise CircuitError(
                "edges are cut before AbsTopK acts on what they lead to, where no hook point is: make the call inside "
                "`with circuit.running(model):`."
            )
        return holding_hooks(self.kept, self.baseline)

    @contextmanager
    def running(self, model: AnyModel) -> Iterator[AnyModel]:
        """Inside the block `model` runs as this circuit: nodes outside hold, and cut edges carry, the baseline."""
        with self.cutting(model), hooked(model).hooks(fwd_hooks=holding_hooks(self.kept, self.baseline)):
            yield model

    @contextmanager
    def cutting(self, model: AnyModel) -> Iterator[AnyModel]:
        """Inside the block edges between its nodes that it lacks carry the baseline; nodes outside are left alone."""
        self.check_model(model)
        with cutting(model, self.cut_edges(model), self.baseline):
            yield model

    @contextmanager
    def removed(self, model: AnyModel) -> Iterator[AnyModel]:
        """Inside the block `model` runs without this circuit, and all else is computed.

        Its nodes hold their baseline. If its edges were pruned they carry it instead, and nodes keep what other edges
        bring; so do the channels of the last read.
        """
        self.check_model(model)
        if self.edges_pruned:
            with cutting(model, self.edge_masks(model), self.baseline):
                yield model
            return
        outside = {place: ~mask for place, mask in self.inside.items()}
        with hooked(model).hooks(fwd_hooks=holding_hooks(outside, self.baseline)):
            yield model

    def check_all_positions(self, what: str) -> None:
        """Raise CircuitError if nodes are kept at some positions only, which `what` has no words for."""
        if self.n_pos is not None:
            raise CircuitError(
                f"{what} is for nodes at all positions, and this circuit keeps nodes at positions of prompts of "
                f"{self.n_pos} tokens; "
                "Circuit.of_nodes(model, circuit.node_set, circuit.baseline) keeps them everywhere."
            )

    def check_lengths(self, prompts: TaskBatch) -> None:
        """Raise CircuitError if nodes are kept at positions, and not of prompts as long as these."""
        if self.n_pos is None or not bool((others := prompts.lengths != self.n_pos).any()):
            return
        found = ", ".join(map(str, prompts.lengths[others].unique().tolist()))
        raise CircuitError(
            f"this circuit keeps nodes at positions of prompts of {self.n_pos} tokens, and {int(others.sum())} of "
            f"{len(prompts)} here have {found}; give pairs of that length."
        )

    def check_model(self, model: AnyModel) -> None:
        """Raise CircuitError unless `model` has the shape and the weights that this circuit was found in."""
        if not self.model_sha256:
            raise CircuitError(
                "this circuit was written down without its model, so nothing says what everything else is held at; "
                "circuit.transplanted(model, baseline) puts it into one."
            )
        model = hooked(model)
        self.baseline.check(model.cfg, self.sites)
        sha256 = weights_sha256(model)
        if sha256 != self.model_sha256:
            raise CircuitError(
                f"this circuit was found in {self.model_name!r} with weights {self.model_sha256[:12]}, and the model "
                f"at hand ({model.cfg.model_name!r}) has weights {sha256[:12]}. Load the model it belongs to; for "
                "another snapshot of the same shape, use circuit.transplanted(model)."
            )

    def transplanted(self, model: AnyModel, baseline: NodeValues | None = None) -> "Circuit":
        """The same nodes in another model of the same shape, edges and hash read anew.

        Of pruned edges those stay that are weights of that model too; its other weights between the nodes are cut.
        """
        edges = self.edge_masks(model) if self.edges_pruned else None
        origin = {"sites": self.sites, "edges": edges, "n_pos": self.n_pos}
        moved = Circuit.of_nodes(model, self.members, baseline or self.baseline, **origin)
        return replace(moved, task_name=self.task_name, task_sha256=self.task_sha256, prune=self.prune)

    # -- set algebra ------------------------------------------------------------------------------------------------

    def _combined(self, other: "Circuit", members: frozenset, weights: pd.DataFrame, edges_pruned: bool) -> "Circuit":
        if self.n_pos != other.n_pos:
            ends = (f"positions of prompts of {n} tokens" if n else "all positions" for n in (self.n_pos, other.n_pos))
            raise CircuitError(
                f"circuits do not combine where one keeps nodes at {next(ends)} and the other at {next(ends)}; "
                "Circuit.of_nodes(model, circuit.node_set, circuit.baseline) keeps them everywhere."
            )
        if self.model_sha256 != other.model_sha256:
            raise CircuitError(
                f"circuits of different models do not combine: {self.model_name} ({self.model_sha256[:12]}) and "
                f"{other.model_name} ({other.model_sha256[:12]})."
            )
        nodes = members if self.n_pos is None else {spot.node for spot in members}
        wanted = {str(node) for node in nodes}
        both_nodes = pd.concat([self.nodes, other.nodes]).drop_duplicates(["layer", "site", "channel"])
        in_order = [(_order(self.cfg)[Place(*row[:2])], row[2]) for row in _places_of(both_nodes)]
        both_nodes = both_nodes.iloc[sorted(range(len(in_order)), key=in_order.__getitem__)]
        names = [str(Node(*row)) for row in _places_of(both_nodes)]
        weights = weights[weights.source.isin(wanted) & weights.target.isin(wanted)]
        frame = both_nodes[[name in wanted for name in names]].reset_index(drop=True)
        if self.n_pos is not None:
            frame["positions"] = _positions(members, [Node(*row) for row in _places_of(frame)])
        return replace(
            self,
            nodes=frame,
            edges=with_wires(weights, nodes, self.cfg),
            edges_pruned=edges_pruned,
            scores=self.scores.iloc[:0],
            history=self.history.iloc[:0],
        )

    def __and__(self, other: "Circuit") -> "Circuit":
        """Nodes in both, with the edges between them; where edges were pruned, those that are in both.

        Circuits that keep nodes at positions combine position by position, here and below.
        """
        pruned, weights = self.edges_pruned or other.edges_pruned, weights_of(self, other)
        weights = weights[weights.duplicated(EDGE_KEY)] if pruned else weights.drop_duplicates(EDGE_KEY)
        return self._combined(other, self.members & other.members, weights, pruned)

    def __or__(self, other: "Circuit") -> "Circuit":
        """Nodes of either, with the edges that either knows.

        A weight from a node that only one has to a node that only the other has is in neither; where there can be one,
        a warning says so, and `(a | b).transplanted(model)` reads all edges off the weights. Where edges were pruned it
        is cut, as every other weight that neither has.
        """
        pruned = self.edges_pruned or other.edges_pruned
        if not pruned and _may_be_joined(self.node_set - other.node_set, other.node_set - self.node_set):
            warnings.warn(
                "edges between nodes of one circuit and nodes of the other are not known without the model; "
                "(a | b).transplanted(model) reads them off its weights.",
                stacklevel=2,
            )
        weights = weights_of(self, other).drop_duplicates(EDGE_KEY)
        return self._combined(other, self.members | other.members, weights, pruned)

    def __sub__(self, other: "Circuit") -> "Circuit":
        """Nodes of this one that the other lacks, with the edges between them."""
        return self._combined(other, self.members - other.members, weights_of(self), self.edges_pruned)

    def to_networkx(self) -> DiGraph:
        """Nodes with their columns, edges with theirs, as a directed graph.

        Of several weights between two nodes, as gated MLPs and grouped queries have them, it has the largest.
        """
        from networkx import DiGraph  # see above

        graph = DiGraph(model=self.model_name, task=self.task_name or "")
        for row in self.nodes.to_dict("records"):
            node = Node(row["layer"], row["site"], row["channel"])
            graph.add_node(str(node), **{str(k): v for k, v in row.items() if not pd.isna(v)})
        for row in self.edges.sort_values("weight", key=abs, kind="stable").to_dict("records"):
            if row["source"] in graph and row["target"] in graph:
                graph.add_edge(row["source"], row["target"], **{k: row[k] for k in ("kind", "weight_name", "weight")})
        return graph

    def __repr__(self) -> str:
        return (
            f"Circuit of {self.model_name} for {self.task_name or 'no task'}: {self.n_nodes} nodes, "
            f"{self.n_edges} edges, others held at {self.baseline.kind}"
        )


def _order(cfg: AnyShape) -> dict[Place, int]:
    return {place: i for i, place in enumerate(places(cfg, SITES))}


def _places_of(nodes: pd.DataFrame) -> list[tuple[int, str, int]]:
    """Layer, site and channel of each row."""
    columns = nodes[["layer", "site", "channel"]]
    return [(int(layer), str(site), int(c)) for layer, site, c in columns.itertuples(index=False)]


def _positions(spots: Iterable[NodeAt], nodes: Iterable[Node]) -> list[str]:
    """Of each node the positions that it is kept at, as the table of nodes has them."""
    at: dict[Node, list[str]] = {}
    for spot in sorted(spots):
        at.setdefault(spot.node, []).append(str(spot.pos))
    return [" ".join(at[node]) for node in nodes]


def _may_be_joined(first: Iterable[Node], second: Iterable[Node]) -> bool:
    """Whether some node of `first` and some node of `second` stand at the two ends of a kind of weight."""
    ends = {(wire.source.name, wire.target.name) for wire in WIRES}
    sites = {(a.site, b.site) for a in first for b in second}
    return any((a, b) in ends or (b, a) in ends for a, b in sites)


def edges_between(model: HookedModel, nodes: Iterable[Node], edges: EdgeMasks | None = None) -> pd.DataFrame:
    """Every wire between two of `nodes`: weights (only `edges`, if given), residual identities, and q/k to write."""
    nodes = list(nodes)
    weights = pd.DataFrame(_weight_edges(model, _channels(nodes), edges), columns=list(EDGE_COLUMNS))
    return with_wires(weights, nodes, model.cfg)


def with_wires(weights: pd.DataFrame, nodes: Iterable[Node], cfg: AnyShape) -> pd.DataFrame:
    """The weights between `nodes`, and behind them the wires that need no weight of their own to be known."""
    channels = _channels(nodes)
    rows = [*_residual_wires(cfg, channels), *_attention_wires(cfg, channels, weights)]
    wires = pd.DataFrame(rows, columns=list(EDGE_COLUMNS))
    return pd.concat([part.astype(EDGE_TYPES) for part in (weights, wires)], ignore_index=True)


def _channels(nodes: Iterable[Node]) -> dict[Place, list[int]]:
    channels: dict[Place, list[int]] = {}
    for node in sorted(nodes, key=lambda n: n.channel):
        channels.setdefault(Place(node.layer, node.site), []).append(node.channel)
    return channels


def _weight_edges(model: HookedModel, channels: dict[Place, list[int]], edges: EdgeMasks | None) -> Iterator[tuple]:
    for layer, block in enumerate(model.layers):
        for wire in wires(model.cfg):
            sources = channels.get(Place(layer, wire.source.name), [])
            targets = channels.get(Place(layer, wire.target.name), [])
            if not sources or not targets:
                continue
            rows = [(row, name, channel) for channel in sources for row, name in rows_of(model.cfg, wire, channel)]
            part = wire.weight(block).detach()[[row for row, _, _ in rows]][:, targets].cpu()
            there = part != 0
            if edges is not None:
                mask = edges.get(Matrix(layer, wire.weight_name))
                there &= mask is not None and mask[[row for row, _, _ in rows]][:, targets]
            for i, j in there.nonzero().tolist():
                _, name, channel = rows[i]
                source, target = Node(layer, wire.source.name, channel), Node(layer, wire.target.name, targets[j])
                yield str(source), str(target), "weight", name, float(part[i, j])


def _residual_wires(cfg: AnyShape, channels: dict[Place, list[int]]) -> Iterator[tuple]:
    """From each write to every later read of the same channel."""
    order = _order(cfg)
    for written, from_channels in channels.items():
        for read, to_channels in channels.items():
            if written.site in _WRITES and read.site in _READS and order[written] < order[read]:
                for channel in sorted(set(from_channels) & set(to_channels)):
                    yield str(Node(*written, channel)), str(Node(*read, channel)), "residual", "", 1.0


def _attention_wires(cfg: AnyShape, channels: dict[Place, list[int]], weights: pd.DataFrame) -> Iterator[tuple]:
    """From each q and k to the writes that its head's kept v nodes reach: the pattern carries it there."""
    reached: dict[tuple[str, int], set[int]] = {}
    for row in weights[weights.weight_name.str.startswith("attn.W_O")].itertuples():
        layer, _, channel = row.source.split(".")
        _, _, head = row.weight_name.rstrip("]").partition("[")  # named where queries are grouped
        write = int(row.target.rpartition(".")[2])
        reached.setdefault((layer, int(head) if head else int(channel) // cfg.d_head), set()).add(write)
    for place in (Place(layer, site) for layer in range(cfg.n_layers) for site in ("q", "k")):
        for node in (Node(*place, channel) for channel in channels.get(place, [])):
            steered = [reached.get((f"L{node.layer}", head), set()) for head in heads_of(cfg, node)]
            for write in sorted(set().union(*steered)):
                yield str(node), str(Node(node.layer, "attn_write", write)), "attention", "", 0.0


def token_edges(
    model: HookedModel, nodes: Iterable[Node], inputs: Iterable[int], outputs: Iterable[int]
) -> pd.DataFrame:
    """Entries of W_E from `inputs` to read channels, and of W_U from kept final reads to `outputs`.

    `source` or `target` is a token, written `token.ID`. Listed and counted apart from `n_edges`.
    """
    nodes = list(nodes)
    rows = []
    embedding, unembedding = model.embed.W_E.detach().cpu(), model.unembed.W_U.detach().cpu()
    for node in nodes:
        if node.site in _READS and node.channel < model.cfg.d_model:
            for token in inputs:
                if weight := float(embedding[token, node.channel]):
                    rows.append((f"token.{token}", str(node), "embedding", "embed.W_E", weight))
        if node.site in ("final_resid", "final_read"):
            for token in outputs:
                if weight := float(unembedding[node.channel, token]):
                    rows.append((str(node), f"token.{token}", "unembedding", "unembed.W_U", weight))
    return pd.DataFrame(rows, columns=list(EDGE_COLUMNS)).astype({"weight": float})
