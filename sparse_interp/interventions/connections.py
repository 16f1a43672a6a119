"""What is left of a circuit when edges are taken away: an edge needs both its ends, and a node needs edges.

A read, a v node and a neuron need an edge that leaves them, and all but reads one that enters; a write needs a later
read of its channel. A q or a k needs a write that its head steers, which counts as entering there: by an edge from a v
node, or with a sink by any weight, since even a constant is written more or less as the sink takes less or more. The
stream needs nothing, and feeds all reads. A node that lacks what it needs is outside the circuit, at its baseline.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from sparse_interp.interventions.ablation import Masks
from sparse_interp.interventions.edges import EdgeUnits, by_row
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.edges import Matrix
from sparse_interp.model.sites import (
    ATTN_READ,
    ATTN_WRITE,
    MLP_READ,
    MLP_WRITE,
    K,
    Place,
    Q,
    Site,
    V,
    Wire,
    group_size,
    wires,
)
from sparse_interp.model.transformer import HookedSparseTransformer

Chosen = Bool[Tensor, " unit"]


class Connections:
    """Which of the chosen edges and which nodes are connected.

    Args:
        model: the model.
        kept: the nodes that there are with every edge.
        units: the edges that may be chosen, and the channels of the end.
        sites: where nodes are held once they are outside; nodes of other sites are always there.
    """

    def __init__(self, model: HookedModel, kept: Masks, units: EdgeUnits, sites: Collection[str]):
        self.model, self.kept, self.units, self.sites = model, kept, units, sites
        self.sink = isinstance(model, HookedSparseTransformer) and model.cfg.sink

    def of(self, chosen: Chosen) -> tuple[Chosen, Masks]:
        """The chosen units that are connected, and the nodes that they join."""
        return self._left(chosen, lambda *at: self._is_fed(*at) & self._is_read(*at))

    def felt(self, chosen: Chosen) -> Masks:
        """The nodes that vary where the chosen edges do.

        They are those of `of`, and beside them nodes that only lack a reader: whether these are held changes nothing.
        A write has a reader in every norm, so it counts only where it is in `of`.
        """
        (_, kept), (_, fed) = self.of(chosen), self._left(chosen, self._is_fed)
        return {p: mask if p.site in (ATTN_WRITE.name, MLP_WRITE.name) else fed[p] for p, mask in kept.items()}

    def _left(self, chosen: Chosen, has_role: Callable) -> tuple[Chosen, Masks]:
        edges, end = self.units.masks(chosen)
        kept = dict(self.kept)
        if len(self.units.channels):
            kept[self.units.end] = end
        n_before = -1
        while n_before != (n_now := sum(int(mask.sum()) for mask in (*kept.values(), *edges.values()))):
            n_before = n_now
            for place in kept:
                if place.site in self.sites and place != self.units.end:
                    kept[place] = kept[place] & has_role(place, edges, kept)
            for matrix, mask in edges.items():
                wire = next(w for w in wires(self.model.cfg) if w.weight_name == matrix.name)
                sources, targets = (kept[Place(matrix.layer, site.name)] for site in (wire.source, wire.target))
                edges[matrix] = mask & by_row(self.model.cfg, wire, sources)[:, None] & targets
        parts = [edges[matrix][entries] for matrix, entries in self.units.entries.items()]
        return torch.cat([*parts, kept[self.units.end][self.units.channels]]), kept

    def _is_fed(self, place: Place, edges: Mapping[Matrix, Tensor], kept: Masks) -> Bool[Tensor, " node"]:
        """Which nodes of a place have what has to enter them, as far as there are gates on it."""
        cfg, layer = self.model.cfg, place.layer
        entering = [wire for wire in wires(cfg) if wire.target.name == place.site]
        if not entering or not self._gated(*(wire.source for wire in entering)):
            return torch.ones_like(kept[place])
        entered = [self._ends(layer, wire, edges, 0) for wire in entering]
        if place.site == ATTN_WRITE.name:
            entered.append(self._steered(layer, edges, kept))
        return _any(entered, kept[place])

    def _is_read(self, place: Place, edges: Mapping[Matrix, Tensor], kept: Masks) -> Bool[Tensor, " node"]:
        """Which nodes of a place have what has to leave them, as far as there are gates on it."""
        cfg, layer, needed = self.model.cfg, place.layer, torch.ones_like(kept[place])
        leaving = [wire for wire in wires(cfg) if wire.source.name == place.site]
        if leaving and self._gated(*(wire.target for wire in leaving)):
            needed = needed & _any([self._ends(layer, wire, edges, 1) for wire in leaving], needed)
        if place.site in (Q.name, K.name) and self._gated(V, ATTN_WRITE):
            steers = (self._steering(layer, edges) & kept[Place(layer, ATTN_WRITE.name)]).any(1)
            rows = steers[:, None].expand(-1, cfg.d_head).flatten()
            needed = needed & (rows if place.site == Q.name else _over_heads(cfg, rows))
        if place.site in (ATTN_WRITE.name, MLP_WRITE.name):
            needed = needed & self._read_later(place, kept)
        return needed

    def _gated(self, *sites: Site) -> bool:
        return all(site.name in self.sites for site in sites)

    def _ends(self, layer: int, wire: Wire, edges: Mapping[Matrix, Tensor], axis: int) -> Tensor | None:
        """Which targets (axis 0) or sources (axis 1) of a wire have an edge."""
        mask = edges.get(Matrix(layer, wire.weight_name))
        if mask is None:
            return None
        there = mask.any(axis)
        return _over_heads(self.model.cfg, there) if axis == 1 and wire.source is V else there

    def _steering(self, layer: int, edges: Mapping[Matrix, Tensor]) -> Bool[Tensor, "head d_model"]:
        """Which writes the pattern of each head changes."""
        cfg = self.model.cfg
        wire = next(wire for wire in wires(cfg) if wire.target is ATTN_WRITE)
        there = edges.get(Matrix(layer, wire.weight_name))
        if self.sink:
            there = wire.weight(self.model.layers[layer]).detach().cpu() != 0
        if there is None:
            return torch.zeros(cfg.n_heads, cfg.d_model, dtype=torch.bool)
        return there.unflatten(0, (cfg.n_heads, cfg.d_head)).any(1)

    def _steered(self, layer: int, edges: Mapping[Matrix, Tensor], kept: Masks) -> Bool[Tensor, " node"]:
        """Which writes change with a q or a k that is there."""
        cfg = self.model.cfg
        q, k = (kept[Place(layer, site.name)] for site in (Q, K))
        wire = next(wire for wire in wires(cfg) if wire.source is V)
        there = (q | by_row(cfg, wire, k)).unflatten(0, (cfg.n_heads, cfg.d_head)).any(1)
        return self._steering(layer, edges)[there].any(0)

    def _read_later(self, place: Place, kept: Masks) -> Bool[Tensor, " node"]:
        """Which channels of a write are read by anybody after it."""
        cfg = self.model.cfg
        after = [
            Place(layer, site.name) for layer in range(place.layer + 1, cfg.n_layers) for site in (ATTN_READ, MLP_READ)
        ]
        after += [Place(place.layer, MLP_READ.name)] * (place.site == ATTN_WRITE.name)
        return torch.stack([kept[read][: cfg.d_model] for read in (*after, self.units.end)]).any(0)


def _any(parts: list[Tensor | None], like: Tensor) -> Tensor:
    there = [part for part in parts if part is not None]
    return torch.stack(there).any(0) if there else torch.zeros_like(like)


def _over_heads(cfg: AnyShape, rows: Bool[Tensor, " row"]) -> Bool[Tensor, " node"]:
    """For nodes that several query heads share, whether any of their rows has it."""
    return rows.unflatten(0, (-1, group_size(cfg), cfg.d_head)).any(1).flatten()
