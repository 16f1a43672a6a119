"""The distribution of a node's activations on text: a histogram, and contexts from its top, its middle and its bottom.

    highest, lowest   from the blocks with the largest positive, or the largest negative, activation, one of each
    ... are lower     tokens whose activation has that share of all activations below it

Many activations are exactly 0, so ranks have ties; tied tokens are taken in an order that spreads over the whole text
(multiples of the golden ratio), not from its beginning. The first token of a block is left out: all blocks begin alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.axes import Tokens
from sparse_interp.circuit.drives import Text
from sparse_interp.results import Table

HIGHEST, LOWEST = "highest", "lowest"

BETWEEN = {"90 % are lower": 0.9, "half are lower": 0.5, "10 % are lower": 0.1}
"""Parts between the ends, by the share of activations below them."""

N_AT_ENDS, N_BETWEEN = 4, 2
"""Contexts from either end, and from each part between."""

N_BEFORE, N_AFTER = 12, 5
"""Tokens shown on either side of the one that a context is for."""

N_BINS = 25
"""Bins of a histogram."""

MAX_VALUES = 20_000_000
"""Activations that are held at once to be ranked; of more text, the blocks that come first are."""

GOLDEN = 0.6180339887498949


@dataclass(frozen=True, eq=False)
class SpectrumTable(Table):
    """Contexts of every node, part by part from the top of its distribution: `pieces` and `activations` are the window
    and `at_piece` counts to the token that it is shown for, which holds `value`."""

    columns: ClassVar[tuple[str, ...]] = (
        "node", "part", "value", "block", "pos", "pieces", "activations", "at_piece")  # fmt: skip


@dataclass(frozen=True, eq=False)
class HistogramTable(Table):
    """How many tokens hold what: for each `node`, `counts` of bins of equal width from `low` to `high`."""

    columns: ClassVar[tuple[str, ...]] = ("node", "low", "high", "counts")


class Spectrum:
    """Activations of some nodes on the first blocks of a text, as they come in, to be ranked once all are there."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, values: Float[Tensor, "rows pos node"]) -> None:
        """Take in the activations of some more blocks, as long as there is room."""
        if not self._parts or sum(part.numel() for part in self._parts) + values.numel() <= MAX_VALUES:
            self._parts.append(values)

    def tables(self, names: Sequence[str], tokens: Tokens, text: Text) -> tuple[SpectrumTable, HistogramTable]:
        """Contexts and histograms of the nodes, which are called `names`; `tokens` is the text."""
        values = torch.cat(self._parts)
        contexts, histograms, spread = [], [], _spread_over(values[:, 1:, 0].numel())
        for i, name in enumerate(names):
            own = values[..., i]
            histograms.append((name, *_histogram(own[:, 1:])))
            for part, row, pos in _chosen(own, spread):
                start = max(0, pos - N_BEFORE)
                window = slice(start, pos + N_AFTER + 1)
                pieces = [text(token) for token in tokens[row, window].tolist()]
                held = own[row, window].tolist()
                contexts.append((name, part, held[pos - start], row, pos, pieces, held, pos - start))
        return (
            SpectrumTable(pd.DataFrame(contexts, columns=list(SpectrumTable.columns))),
            HistogramTable(pd.DataFrame(histograms, columns=list(HistogramTable.columns))),
        )


def _histogram(values: Float[Tensor, "rows pos"]) -> tuple[float, float, list[int]]:
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, N_BINS, low, high).tolist() if high > low else [values.numel()]
    return low, high, [int(count) for count in counts]


def _spread_over(n: int) -> Int[Tensor, " n"]:
    """The numbers below `n` in an order of which every beginning is spread evenly over them."""
    return (torch.arange(n, dtype=torch.float64) * GOLDEN).frac().argsort()


def _chosen(values: Float[Tensor, "rows pos"], spread: Int[Tensor, " token"]) -> Iterator[tuple[str, int, int]]:
    """Part, row and position of the tokens that a node's contexts are shown for; ends at 0 are no ends."""
    later = values[:, 1:]
    flat = later.flatten()
    order = spread[flat[spread].argsort(stable=True)]
    yield from _extreme(later, HIGHEST, 1)
    for part, share in BETWEEN.items():
        first = min(int(share * len(flat)), max(0, len(flat) - N_BETWEEN))
        for at in order[first : first + N_BETWEEN].tolist():
            yield part, at // later.shape[1], at % later.shape[1] + 1
    yield from _extreme(later, LOWEST, -1)


def _extreme(values: Float[Tensor, "rows pos"], part: str, sign: int) -> Iterator[tuple[str, int, int]]:
    """The rows with the most extreme activation of one sign, the most extreme first."""
    best = (sign * values).max(1)
    for row in best.values.argsort(descending=True, stable=True)[:N_AT_ENDS].tolist():
        if best.values[row] > 0:
            yield part, row, int(best.indices[row]) + 1
