"""Two circuits side by side: of two seeds, two tasks, two models of one shape, or two snapshots of a training run.

    Jaccard = |A & B| / |A | B|          of nodes, and of edges: weights, told apart by their two ends and their matrix

An edge of both may weigh something else in either model: `weight_change_frac` is the sum of |w_other - w| over the sum
of |w|, over the edges that both have. It is 0 between circuits of one model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from sparse_interp.errors import CircuitError
from sparse_interp.model.config import Shape
from sparse_interp.model.sites import SITES, Node, Place, places, width
from sparse_interp.results import Table

EDGE_KEY = ["source", "target", "weight_name"]
"""What tells two weights apart."""


@dataclass(frozen=True, eq=False)
class CircuitDiff(Table):
    """Which nodes two circuits share: one row per node of either."""

    columns: ClassVar[tuple[str, ...]] = ("layer", "site", "channel", "where")
    """`where` is `both`, `first` or `second`."""


@dataclass(frozen=True, eq=False)
class EdgeDiff(Table):
    """Which weights two circuits share as edges: one row per edge of either."""

    columns: ClassVar[tuple[str, ...]] = ("source", "target", "weight_name", "weight", "weight_other", "where")
    """`weight` is that of the first circuit's model, `weight_other` of the second's; `where` as in CircuitDiff."""


@dataclass(frozen=True, eq=False)
class OverlapTable(Table):
    """How much two circuits share: a row for all nodes, one per site, one for all edges, one per matrix."""

    columns: ClassVar[tuple[str, ...]] = ("what", "n_first", "n_second", "n_both", "jaccard", "weight_change_frac")
    """`jaccard` is missing where neither has any, `weight_change_frac` where no edge is shared."""


class CircuitComparison:
    """Comparing a circuit with these parts to another one."""

    edges: pd.DataFrame
    cfg: Shape
    node_set: frozenset[Node]

    def diff(self, other: "CircuitComparison") -> CircuitDiff:
        """Node by node, whether both circuits have it, only this (`first`) or only the other (`second`).

        Raises:
            CircuitError: if the circuits belong to models of different shapes.
        """
        order = self._order_with(other)
        rows = []
        for node in sorted(self.node_set | other.node_set, key=lambda n: (order[Place(n.layer, n.site)], n.channel)):
            here, there = node in self.node_set, node in other.node_set
            rows.append((*node, "both" if here and there else "first" if here else "second"))
        return CircuitDiff(pd.DataFrame(rows, columns=list(CircuitDiff.columns)))

    def diff_edges(self, other: "CircuitComparison") -> EdgeDiff:
        """Weight by weight, whether both circuits have it as an edge, only this (`first`) or only the other (`second`).

        Raises:
            CircuitError: if the circuits belong to models of different shapes.
        """
        self._order_with(other)
        first, second = (weights_of(circuit)[[*EDGE_KEY, "weight"]] for circuit in (self, other))
        rows = first.merge(second, on=EDGE_KEY, how="outer", suffixes=("", "_other"), indicator="where")
        rows["where"] = rows["where"].astype(str).replace({"left_only": "first", "right_only": "second"})
        return EdgeDiff(rows.drop(columns="where").assign(where=rows["where"])[list(EdgeDiff.columns)])

    def overlap(self, other: "CircuitComparison") -> OverlapTable:
        """How many nodes and edges there are in each circuit and in both, site by site and matrix by matrix.

        Raises:
            CircuitError: if the circuits belong to models of different shapes.
        """
        nodes, edges = self.diff(other).frame, self.diff_edges(other).frame
        matrix = edges.weight_name.map(lambda name: name.partition("[")[0])  # heads that share a v have a part of W_O
        rows = [_shared("nodes", nodes), *(_shared(site, nodes[nodes.site == site]) for site in SITES)]
        rows += [_shared("edges", edges), *(_shared(name, edges[matrix == name]) for name in sorted(set(matrix)))]
        frame = pd.DataFrame(rows, columns=list(OverlapTable.columns))
        return OverlapTable(frame[frame.what.isin(["nodes", "edges"]) | frame.jaccard.notna()].reset_index(drop=True))

    def _order_with(self, other: "CircuitComparison") -> Mapping[Place, int]:
        """The order of places, once both circuits are known to have the same."""
        mine, others = ({p: width(c.cfg, p.site) for p in places(c.cfg, SITES)} for c in (self, other))
        for place in [*mine, *others]:
            if mine.get(place) != others.get(place):
                here, there = (f"{n} channels" if n else "no such site" for n in (mine.get(place), others.get(place)))
                raise CircuitError(
                    f"circuits of models of different shapes have no nodes in common: layer {place.layer} has {here} "
                    f"at {place.site} in one and {there} in the other."
                )
        return {place: i for i, place in enumerate(mine)}


def weights_of(*circuits: CircuitComparison) -> pd.DataFrame:
    """The weights that circuits list, one circuit after the other."""
    return pd.concat([c.edges[c.edges.kind == "weight"] for c in circuits], ignore_index=True)


def _shared(what: str, rows: pd.DataFrame) -> tuple:
    """A row of the overlap from the rows of a diff."""
    counts = rows["where"].value_counts()
    both, total = int(counts.get("both", 0)), len(rows)
    changed = None
    if "weight" in rows and both:
        shared = rows[rows["where"] == "both"]
        changed = (shared.weight_other - shared.weight).abs().sum() / shared.weight.abs().sum()
    ours, others = both + int(counts.get("first", 0)), both + int(counts.get("second", 0))
    return what, ours, others, both, both / total if total else None, changed
