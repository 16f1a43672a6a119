"""Edges as nodes are: which there are, what cutting some of them means, and what it would cost to cut each.

    message_e  <-  W_e ( b_s + m_e (x_s - b_s) )           before AbsTopK acts on the target (model/edges.py)
    cut: m_e = 0

Gao et al. 2025 (arXiv 2511.13653) prune nodes and count the weights between those that are left; to prune the weights
themselves they name as future work. Identity wires along the residual stream have no gates: without a copy of the
stream per read the norm would be undefined. The channels that are unembedded are ends of no weight within a block, so
each has the gate of a node.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_interp.interventions.ablation import Masks, Values, holding_hooks, partial
from sparse_interp.interventions.answers import answer_logits, frozen
from sparse_interp.interventions.selection import AT_ONCE, Selection
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import FINAL_READ, FINAL_RESID, NodeValues, Place, V, Wire, group_size, wires
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import kl_divergence

EdgeMasks = Mapping[Matrix, Bool[Tensor, "source target"]]
"""For some weight matrices, which of their entries; rows and columns are those of `Wire.weight`."""


def by_row(cfg: AnyShape, wire: Wire, of_nodes: Tensor) -> Tensor:
    """Something of every source node, [... node], for every row of a wire's matrix: v has one per query head."""
    n_heads = group_size(cfg) if wire.source is V else 1
    if n_heads == 1:
        return of_nodes
    return of_nodes.unflatten(-1, (-1, cfg.d_head)).repeat_interleave(n_heads, -2).flatten(-2)


def edges_among(model: HookedModel, kept: Masks) -> dict[Matrix, Bool[Tensor, "source target"]]:
    """The non-zero weights between kept nodes; matrices without one are left out."""
    found = {}
    for layer, block in enumerate(model.layers):
        for wire in wires(model.cfg):
            sources, targets = (kept[Place(layer, site.name)] for site in (wire.source, wire.target))
            joined = by_row(model.cfg, wire, sources)[:, None] & targets
            if bool(joined.any()):
                mask = joined & (wire.weight(block).detach() != 0).cpu()
                if bool(mask.any()):
                    found[Matrix(layer, wire.weight_name)] = mask
    return found


def row_values(model: HookedModel, values: Values) -> dict[Matrix, Float[Tensor, "*batch_pos source"]]:
    """What values of nodes are row by row, for every weight matrix."""
    return {
        Matrix(layer, wire.weight_name): by_row(model.cfg, wire, values[Place(layer, wire.source.name)])
        for layer in range(model.cfg.n_layers)
        for wire in wires(model.cfg)
    }


def cut_gates(model: HookedModel, cut: EdgeMasks, values: Values) -> dict[Matrix, EdgeGate]:
    """Gates under which `cut` edges carry the values of their sources, and all others what they ever do."""
    rows, like = row_values(model, values), model.embed.W_E
    return {
        matrix: EdgeGate((~mask).to(like), rows[matrix].to(like)) for matrix, mask in cut.items() if bool(mask.any())
    }


@contextmanager
def cutting(model: AnyModel, cut: EdgeMasks, values: Values) -> Iterator[AnyModel]:
    """Inside the block `cut` edges carry the values of their sources, `weight * value`, and not what these compute.

    Raises:
        CircuitError: for values of another model.
    """
    if not cut:  # values need not be known where nothing carries them
        yield model
        return
    ours = hooked(model)
    if isinstance(values, NodeValues):
        values.check(ours.cfg, {wire.source.name for wire in wires(ours.cfg)})
    with ours.gated_edges(cut_gates(ours, cut, values)):
        yield model


@dataclass(frozen=True)
class EdgeUnits:
    """What an edge search may drop, in a fixed order: edges, matrix by matrix, and behind them channels of the end."""

    entries: Mapping[Matrix, tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]]
    """For every matrix with edges, their rows and their columns."""

    end: Place
    """Where the last nodes are: `final_read`, or `final_resid`."""

    channels: Int[Tensor, " channel"]
    """Which of them may be dropped."""

    shapes: Mapping[Matrix, tuple[int, int]]
    """Sizes of the matrices."""

    width: int
    """Number of channels of `end`."""

    @classmethod
    def of(cls, model: HookedModel, kept: Masks, edges: EdgeMasks, sites: Collection[str]) -> "EdgeUnits":
        """All `edges`, and the channels that `kept` has at the end if that is among `sites`."""
        last = model.cfg.n_layers
        end = Place(last - 1, FINAL_RESID.name) if FINAL_RESID.name in sites else Place(last, FINAL_READ.name)
        entries = {matrix: mask.nonzero(as_tuple=True) for matrix, mask in edges.items()}
        shapes = {matrix: (mask.shape[0], mask.shape[1]) for matrix, mask in edges.items()}
        droppable = kept[end] & (end.site in sites)
        return cls(entries, end, droppable.nonzero().flatten(), shapes, len(droppable))

    @property
    def sizes(self) -> dict[Matrix | Place, int]:
        """How many there are of each, in order."""
        found: dict[Matrix | Place, int] = {matrix: len(rows) for matrix, (rows, _) in self.entries.items()}
        return found | {self.end: len(self.channels)}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def spread(self, group: Matrix | Place, of_units: Float[Tensor, " unit"], rest: float) -> Tensor:
        """Numbers of a group's units where they belong in its matrix or its channels, and `rest` elsewhere."""
        if isinstance(group, Matrix):
            return of_units.new_full(self.shapes[group], rest).index_put(self.entries[group], of_units)
        return of_units.new_full((self.width,), rest).index_put((self.channels,), of_units)

    def masks(self, chosen: Bool[Tensor, " unit"]) -> tuple[dict[Matrix, Tensor], Bool[Tensor, " width"]]:
        """The chosen edges, and the chosen channels of the end."""
        parts = dict(zip(self.sizes, chosen.split(list(self.sizes.values())), strict=True))
        spread = {group: self.spread(group, part.float(), 0.0).bool() for group, part in parts.items()}
        return {matrix: spread[matrix] for matrix in self.entries}, spread[self.end]


@contextmanager
def gating(
    model: HookedModel,
    kept: Masks,
    units: EdgeUnits,
    values: Values,
    left: Mapping[Matrix | Place, Float[Tensor, " unit"]],
) -> Iterator[None]:
    """Inside the block of every unit `left` is left, in [0, 1], and nodes outside `kept` hold their values."""
    end, rows = units.end, row_values(model, values)
    droppable = bool(len(units.channels))
    hooks = holding_hooks({place: mask for place, mask in kept.items() if place != end or not droppable}, values)
    if droppable:
        hooks.append((end.hook, partial(units.spread(end, left[end], 0.0), values[end])))
    gates = {matrix: EdgeGate(units.spread(matrix, left[matrix], 1.0), rows[matrix]) for matrix in units.entries}
    with model.hooks(fwd_hooks=hooks), model.gated_edges(gates):
        yield


def cut_estimates(
    selection: Selection, kept: Masks, units: EdgeUnits, chosen: Bool[Tensor, " unit"]
) -> Float[Tensor, " unit"]:
    """By how much the mean KL(model || circuit) would grow, to first order, if a chosen unit were cut too, nats.

    One gradient for all units, at the circuit of the chosen ones. Where circuit and model agree it vanishes.
    """
    model, batch = selection.model, selection.batch
    parts = chosen.to(model.embed.W_E).split(list(units.sizes.values()))
    left = {group: part.clone().requires_grad_() for group, part in zip(units.sizes, parts, strict=True)}
    total = [torch.zeros_like(part) for part in left.values()]
    with evaluating(model), frozen(model):
        for rows in batch.lengths.argsort(stable=True).cpu().split(AT_ONCE):
            here = batch.rows(rows)
            with gating(model, kept, units, selection.baseline, left):
                logits = answer_logits(model, here)
            kl = kl_divergence(selection.reference[rows], logits, here).sum() / len(batch)
            grads = torch.autograd.grad(kl, list(left.values()), allow_unused=True, materialize_grads=True)
            total = [so_far + grad for so_far, grad in zip(total, grads, strict=True)]
    return -torch.cat(total).cpu()
