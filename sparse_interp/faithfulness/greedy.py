"""Greedy removal of weights, as ACDC does it between components (faithfulness/components.py).

    for tau, from the smallest:   for every edge, from the output backwards:
        cut it;  leave it cut if  KL(model || what is left)  grows by less than tau                       mean ablation

A cut weight carries the mean of its source, and a channel of the last read that is cut holds its mean. Edges between
what leads nowhere any more go without being tried. Each tau begins where the last one ended, so that a larger one keeps
fewer and the first one does most of the work; and since an edge is tried before any that is nearer to the input, runs
begin at its own layer. Conmy et al. 2023 (arXiv:2304.14997), whose edges are those between heads and MLPs.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor

from sparse_interp.axes import Resid
from sparse_interp.interventions.ablation import partial
from sparse_interp.interventions.answers import all_answer_logits, answer_logits, stream_at
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edges import row_values
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import NodeValues, Place
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch, kl_divergence

Chosen = Bool[Tensor, " unit"]

WITHIN_A_BLOCK = ("mlp.W_out", "mlp.W_gate", "mlp.W_in", "attn.W_O", "attn.W_V", "attn.W_K", "attn.W_Q")
"""The matrices of a block, the nearest to the output first."""


@torch.no_grad()
def greedy_edges(
    connections: Connections, batch: TaskBatch, means: NodeValues, taus: Collection[float]
) -> dict[float, Chosen]:
    """For each of `taus`, nats, the units of `connections` that stay: edges, and channels of the last read.

    Args:
        connections: the units that there are, and which of them lead anywhere.
        batch: prompts on which cuts are measured; all of them run at once.
        means: what cut edges carry.
        taus: thresholds.
    """
    model, found = connections.model, {}
    with evaluating(model):
        removal = _Removal(connections, batch, means)
        with removal.acting():
            for tau in sorted(taus):
                removal.sweep(tau)
                found[tau] = removal.chosen.clone()
    return found


class _Removal:
    """The state of a removal: which units are left, and hooks and gates that feel it at once."""

    def __init__(self, connections: Connections, batch: TaskBatch, means: NodeValues):
        self.model, self.connections, self.units, self.batch = connections.model, connections, connections.units, batch
        like = self.model.embed.W_E
        self.means, self.rows = means.to(like), row_values(self.model, means.to(like))
        self.reference = all_answer_logits(self.model, batch, len(batch))
        self.chosen = torch.ones(len(self.units), dtype=torch.bool)
        self.shares = {matrix: like.new_ones(self.units.shapes[matrix]) for matrix in self.units.entries}
        self.end = like.new_ones(self.units.width)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside the block the model runs with what is left."""
        gates = {matrix: EdgeGate(share, self.rows[matrix]) for matrix, share in self.shares.items()}
        held = (self.units.end.hook, partial(self.end, self.means[self.units.end]))
        with self.model.hooks(fwd_hooks=[held]), self.model.gated_edges(gates):
            yield

    def sweep(self, tau: float) -> None:
        """Try every unit that is left, once."""
        n_layers = self.model.cfg.n_layers
        streams: list[Resid | None] = [
            stream_at(self.model, self.batch, layer) if layer else None for layer in range(n_layers + 1)
        ]
        now = self._cost(streams[-1], n_layers)
        starts = dict(zip(self.units.sizes, _starts(list(self.units.sizes.values())), strict=True))
        for group in self._backwards():
            layer = group.layer if isinstance(group, Matrix) else n_layers
            leads = self.connections.of(self.chosen)[0]
            for i in reversed(range(self.units.sizes[group])):
                unit = starts[group] + i
                if not self.chosen[unit]:
                    continue
                self._set(group, i, 0.0)
                after = now if not leads[unit] else self._cost(streams[layer], layer)
                if after - now < tau:
                    self.chosen[unit], now = False, after
                else:
                    self._set(group, i, 1.0)

    def _backwards(self) -> list[Matrix | Place]:
        """Groups of units, the nearest to the output first."""
        matrices = sorted(self.units.entries, key=lambda m: (-m.layer, WITHIN_A_BLOCK.index(m.name)))
        return [self.units.end, *matrices]

    def _set(self, group: Matrix | Place, i: int, share: float) -> None:
        if isinstance(group, Matrix):
            row, column = (int(index[i]) for index in self.units.entries[group])
            self.shares[group][row, column] = share
        else:
            self.end[int(self.units.channels[i])] = share

    def _cost(self, stream: Resid | None, layer: int) -> float:
        logits = answer_logits(self.model, self.batch, stream, layer)
        return float(kl_divergence(self.reference.double(), logits.double(), self.batch).mean())


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
