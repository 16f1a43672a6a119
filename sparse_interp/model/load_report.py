"""What came out of a model's files: read, ignored, taken for granted, folded, and how many parameters are not zero.

Counted is every number that the files store, by the tensor that it became here, before anything is folded; masks and
other bookkeeping are not, nor biases that a model without biases has as zeros, nor a tied unembedding a second time.
A weight-sparse model is sparse in its matrices alone, so these are counted apart: norms, biases, sinks, positions and
the bigram table stay dense.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd
from torch import Tensor

from sparse_interp.results import Table

GROUPS = ("sparse matrices", "bigram table", "dense rest")
"""What a tensor counts as: a matrix that training keeps sparse, the table over pairs of tokens, or neither."""


@dataclass(frozen=True, eq=False)
class LoadReport(Table):
    """One row per tensor: its shape, and how many of its entries are not zero. `str()` says the rest in words."""

    columns: ClassVar[tuple[str, ...]] = ("tensor", "group", "shape", "n_entries", "n_nonzero", "share_nonzero")

    model: str = ""
    """What the model is called."""

    form: str = ""
    """Which form its files have: `sparse_interp`, `circuit_sparsity`, `circuitgpt` or `sparse_pretrain`."""

    read: Mapping[str, str] = field(default_factory=dict)
    """What came from which file."""

    assumed: Mapping[str, str] = field(default_factory=dict)
    """What the files do not say, and what was taken instead."""

    ignored: Mapping[str, str] = field(default_factory=dict)
    """What the files say and nothing here depends on, and why."""

    folded: Mapping[str, str] = field(default_factory=dict)
    """What was changed after reading, without changing the function."""

    @property
    def n_entries(self) -> int:
        """Numbers that the files store."""
        return int(self.frame["n_entries"].sum())

    @property
    def n_nonzero(self) -> int:
        """Those of them that are not zero."""
        return int(self.frame["n_nonzero"].sum())

    def __str__(self) -> str:
        sections = {"read": self.read, "assumed": self.assumed, "ignored": self.ignored, "folded": self.folded}
        lines = [f"{self.model}: a model in the form of {self.form}"]
        for title, remarks in sections.items():
            lines += [f"{title if i == 0 else '':9}{key}: {why}" for i, (key, why) in enumerate(remarks.items())]
        lines.append(f"{'non-zero':9}{_share(self.frame)} of all stored parameters, of which")
        groups = self.frame.groupby("group", sort=False)
        lines += [
            f"{'':9}{_share(groups.get_group(group))} in the {group}" for group in GROUPS if group in groups.groups
        ]
        return "\n".join([*lines, "", super().__str__()])


def rows_of(tensors: Mapping[str, Tensor]) -> pd.DataFrame:
    """The rows of a report on these tensors."""
    rows = []
    for name, tensor in tensors.items():
        n, nonzero = tensor.numel(), int(tensor.count_nonzero())
        shape = " x ".join(map(str, tensor.shape))
        rows.append((name, _group(name), shape, n, nonzero, nonzero / n))
    return pd.DataFrame(rows, columns=list(LoadReport.columns))


def _group(name: str) -> str:
    if name == "bigram_table":
        return "bigram table"
    last = name.rpartition(".")[2]
    return "sparse matrices" if last.startswith("W_") and last != "W_pos" else "dense rest"


def _share(frame: pd.DataFrame) -> str:
    nonzero, entries = int(frame["n_nonzero"].sum()), int(frame["n_entries"].sum())
    return f"{nonzero:,} of {entries:,} ({nonzero / max(entries, 1):.2%})"
