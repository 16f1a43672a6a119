"""What edges carry: all of their source, or its baseline, or a share of either.

    message_e  =  W_e ( b_s + g_e (x_s - b_s) )           what edge e = (s, t) brings to t; g_e = 1 is the model itself
    input_t    =  sum over e into t of message_e  + bias  before AbsTopK, activation and whatever else acts on t

A v node's messages pass through the attention pattern, its baseline too, so that where a sink takes a share of the
attention a cut edge brings less than W_e b_s. Gates nest like `with` blocks: what one lets through, the next may gate.

A model has the method `gated_edges(gates)`, a block inside which `gates` hold. It is no forward hook: hook points lie
behind AbsTopK, where what edges brought is no longer apart, and later hooks at the source must still be felt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Matrix(NamedTuple):
    """One within-block weight matrix of a model."""

    layer: int
    name: str
    """As wires call it: `mlp.W_out`, say."""


class EdgeGate(NamedTuple):
    """How much the entries of one matrix carry of their sources, and what they carry instead."""

    share: Float[Tensor, "source target"]
    """g: 1 carries the source, 0 its baseline. Rows and columns are those of `Wire.weight`."""

    baseline: Float[Tensor, "*batch_pos source"]
    """b, one number for each row, or one for each prompt, position and row."""


class RowCuts(NamedTuple):
    """In every row of a run one entry of a matrix is cut, beside what gates let through. A row is a prompt, or all that
    is packed together."""

    sources: Int[Tensor, " row"]
    targets: Int[Tensor, " row"]
    baseline: Float[Tensor, "*row_pos source"]
    """What a cut entry carries: a number for each source, or where nothing is packed one for each row and position."""

    def less(
        self,
        out: Float[Tensor, "_row n target"],
        change: Float[Tensor, "_row n source"],
        weight: Float[Tensor, "source target"],
    ) -> Float[Tensor, "row n target"]:
        """What comes out of the matrix less what its cut entries would have brought; `change` is source - baseline."""
        rows = torch.arange(len(self.sources), device=out.device)
        out, change = (x.expand(len(rows), *x.shape[1:]) for x in (out, change))
        brought = change[rows, :, self.sources] * weight[self.sources, self.targets][:, None]
        at = rows[:, None], torch.arange(out.shape[1], device=out.device), self.targets[:, None]
        return out.index_put(at, out[at] - brought)


Held = list[tuple[Float[Tensor, "*batch_pos source"], Float[Tensor, "source target"]]]
"""Baselines, and the part of a matrix that carries each."""


G = TypeVar("G", EdgeGate, RowCuts)


def carried(weight: Float[Tensor, "source target"], gates: Sequence[EdgeGate]) -> tuple[Tensor, Held]:
    """The part of a matrix that carries its sources, and the parts that carry baselines, under gates from out to in."""
    held: Held = []
    for gate in reversed(gates):  # an inner gate has the last word, and leaves its share to those outside it
        held.append((gate.baseline, weight * (1 - gate.share)))
        weight = weight * gate.share
    return weight, held


@contextmanager
def placed(gates: Mapping[Matrix, G], at: Callable[[Matrix], list[G]]) -> Iterator[None]:
    """Inside the block each gate stands last in the list of its matrix, and afterwards in none."""
    lists = [(at(matrix), gate) for matrix, gate in gates.items()]
    for gates_there, gate in lists:
        gates_there.append(gate)
    try:
        yield
    finally:
        for gates_there, gate in lists:
            gates_there[:] = [other for other in gates_there if other is not gate]
