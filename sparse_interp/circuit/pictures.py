"""A circuit as a figure and as a bare page: what can be drawn without asking the model anything.

Columns follow the forward pass from left to right, one per site and layer. A residual channel is a rail: it keeps its
height through all columns, so that whoever writes it and whoever reads it stand on one line. Neurons and the q, k and v
of a head stand near what they are joined to. The page of `circuit/describe.py` shows the same columns with what each
node does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from sparse_interp.model.sites import SITES
from sparse_interp.results import INK, Axes, graph, write_whole
from sparse_interp.viewer.content import CircuitPage, PageEdge, PageNode
from sparse_interp.viewer.page import inline_html, render_page

ROW_INCHES, COLUMN_INCHES = 0.27, 0.8
"""Room for one node with its name above it, and for one column."""

COLUMN_SHARE = {"q": 0.8, "k": 0.8, "v": 0.8, "token": 1.5}
"""Widths of columns that are not 1."""

KINDS = {"attn_read": "read", "mlp_read": "read", "final_read": "read", "attn_write": "write", "mlp_write": "write",
         "q": "q, k, v", "k": "q, k, v", "v": "q, k, v", "neuron": "neuron"}  # fmt: skip
"""What shares a colour."""

DRAWN_AS = {"final_resid": "final_read"}
"""Sites without a column of their own: the last stream stands where it is read, one norm later."""

COLUMN_TITLES = {"attn_read": "read", "attn_write": "write", "mlp_read": "read", "mlp_write": "write",
                 "final_read": "final\nread"}  # fmt: skip

WEIGHT, PAIR_VALUE = "weight", "pair_value"
"""What the number of a wire is: its weight, or the number that a released circuit states for its two ends."""

N_ATTENTION_WIRES = 60
"""Beyond so many, a figure leaves the wires of q and k out and says so."""

N_ROUNDS = 12
"""Rounds in which rails and the nodes between them move towards what they are joined to."""


N_DRAWN = 150
"""Nodes that a figure has room for."""


class DrawnPage(CircuitPage):
    """A circuit page that draws itself in a notebook."""

    def __repr__(self) -> str:
        return f"circuit page: {self.title}, {len(self.nodes)} nodes; circuit.to_html(path, page) writes it"

    def _repr_html_(self) -> str:
        return inline_html(render_page(self))


class CircuitPictures:
    """Drawing, for a circuit with these parts."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    model_name: str
    model_sha256: str
    task_name: str | None

    def plot(self, ax: Axes | None = None, tokens: pd.DataFrame | None = None) -> Axes:
        """Draw the circuit: blue wires for positive weights, vermilion for negative ones, larger nodes for needed ones.

        Wires whose weights are not known are drawn by the number that was published in their place. Of a circuit of
        more than `N_DRAWN` nodes those that are needed most are drawn, and the title says so.

        Args:
            ax: where to draw; None makes a figure that is large enough.
            tokens: wires to and from tokens as `token_wires` returns them; None draws none.
        """
        value, edges = _drawn_values(self.edges)
        nodes, edges, tokens = _most_needed(self.nodes, edges, tokens)
        placed, height, width = layout(nodes, edges, tokens)
        parts = [edges] if tokens is None or tokens.empty else [edges, tokens]
        wires = pd.concat(parts, ignore_index=True)[["source", "target", "kind", "weight"]]
        attention = wires.kind == "attention"
        left_out = f", {attention.sum()} attention wires not drawn" if attention.sum() > N_ATTENTION_WIRES else ""
        wires = wires[~attention] if left_out else wires
        wires = wires.assign(weight=wires.weight.where(~wires.kind.isin(["residual", "attention"])))
        wires = wires.sort_values("weight", key=np.abs, na_position="first", kind="stable")
        own_figure = ax is None
        ax = graph(placed.points, wires, ax=ax)
        for point in placed.points[placed.points.kind == "token"].itertuples():  # named on the side that has no wires
            side, align = (-0.15, "right") if point.column[0] < 0 else (0.15, "left")
            name = point.name.replace("$", r"\$")
            ax.text(point.x + side, point.y, name, ha=align, va="center", fontsize=8, color=INK)
        for column in placed.columns:
            ax.text(column.x, -1.1, column.title, ha="center", va="bottom", fontsize=7, color=INK)
        for layer, left, right in placed.layers:
            ax.plot([left, right], [-2.9, -2.9], color=INK, linewidth=0.8)
            ax.text((left + right) / 2, -3.1, f"layer {layer}", ha="center", va="bottom", fontsize=9, color=INK)
        ax.set(xlim=(-0.5, width + 0.5), ylim=(height + 0.6, -4.4))  # rows count downwards
        if ax.get_legend() is not None:
            ax.get_legend().remove()  # the columns say it
        if own_figure:
            ax.figure.set_size_inches(max(7.0, COLUMN_INCHES * (width + 1)), max(4.0, ROW_INCHES * (height + 5)))
            drawn = f"the {len(nodes)} most needed of " if len(nodes) < len(self.nodes) else ""
            by = "" if value == WEIGHT else f", wires by {value}"
            title = f"{self.task_name or 'circuit'} in {self.model_name}: {drawn}{len(self.nodes)} nodes{left_out}{by}"
            ax.set_title(title, color=INK, fontsize=10)
        return ax

    def to_html(self, path: Path | str, page: CircuitPage | None = None) -> Path:
        """Write the circuit page, one self-contained file.

        Without `page` it shows nodes, wires and importances; the page of circuit/showing.py adds all else.
        """
        path = Path(path)
        write_whole(path, render_page(self.bare_page() if page is None else page))
        return path

    def bare_page(self) -> DrawnPage:
        """The page that needs no model: nodes and wires."""
        layers = [int(layer) for layer, site in zip(self.nodes.layer, self.nodes.site, strict=True)
                  if not site.startswith("final")]  # fmt: skip
        n_edges = int((self.edges.kind == "weight").sum())
        value, edges = _drawn_values(self.edges)
        return DrawnPage(
            nodes=page_nodes(self.nodes),
            edges=page_edges(edges),
            edge_value=value,
            title=self.task_name or "Circuit",
            model=self.model_name,
            task=self.task_name or "",
            n_layers=max(layers, default=0) + 1,
            summary={"nodes": f"{len(self.nodes):,}", "edges": f"{n_edges:,}"},
            model_sha256=self.model_sha256,
        )

    def _repr_html_(self) -> str:
        return self.bare_page()._repr_html_()


def _most_needed(
    nodes: pd.DataFrame, edges: pd.DataFrame, tokens: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """The nodes that a figure has room for, and the wires among them and the tokens."""
    if len(nodes) <= N_DRAWN or nodes.importance_nats.isna().all():
        return nodes, edges, tokens
    nodes = nodes.nlargest(N_DRAWN, "importance_nats").sort_index()
    names = {node_id(row) for row in nodes.to_dict("records")}

    def among(wires: pd.DataFrame) -> pd.DataFrame:
        ends = [wires[end].isin(names) | wires[end].str.match(r"(in|out)\.") for end in ("source", "target")]
        return wires[ends[0] & ends[1]].reset_index(drop=True)

    return nodes.reset_index(drop=True), among(edges), None if tokens is None else among(tokens)


def _drawn_values(edges: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What the number of a wire is, and the wires with it as `weight`: `pair_value` where no weight is known."""
    weights = edges.weight[edges.kind == "weight"]
    if weights.notna().any() or weights.empty or PAIR_VALUE not in edges:
        return WEIGHT, edges
    return PAIR_VALUE.replace("_", " "), edges.assign(
        weight=edges[PAIR_VALUE].where(edges.kind == "weight", edges.weight)
    )


def page_nodes(nodes: pd.DataFrame) -> list[PageNode]:
    """The rows of a circuit's nodes as a page knows them."""
    return [
        PageNode(
            id=node_id(row),
            layer=_drawn_at(row)[0],
            site=_drawn_at(row)[1],
            channel=int(row["channel"]),
            head=None if pd.isna(row["head"]) else int(row["head"]),
            importance=None if pd.isna(row["importance_nats"]) else max(0.0, float(row["importance_nats"])),
            baseline=None if pd.isna(row["baseline"]) else float(row["baseline"]),
        )
        for row in nodes.to_dict("records")
    ]


def _drawn_at(row: Mapping) -> tuple[int, str]:
    """Layer and site of the column in which a node is drawn."""
    layer, site = int(row["layer"]), row["site"]
    return (layer + 1, DRAWN_AS[site]) if site in DRAWN_AS else (layer, site)


def page_edges(edges: pd.DataFrame) -> list[PageEdge]:
    """The rows of a circuit's edges as a page knows them; wires without a weight of their own weigh 1."""
    return [
        PageEdge(
            source=row["source"],
            target=row["target"],
            weight=1 if row["kind"] in ("residual", "attention") else float(row["weight"]),
            kind=row["kind"],
        )
        for row in edges.to_dict("records")
    ]


def node_id(row: Mapping) -> str:
    """`L0.neuron.12`, as edges name a node."""
    return f"L{row['layer']}.{row['site']}.{row['channel']}"


def shown(piece: str) -> str:
    """A token's text with nothing invisible in it: spaces as ␣, line breaks and the like escaped."""
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


# -- where things stand -----------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One site of one layer, or the tokens at an end."""

    x: float
    title: str


class Placed(NamedTuple):
    """Everything with its place; x and y count columns and rows."""

    points: pd.DataFrame
    columns: list[Column]
    layers: list[tuple[int, float, float]]


def layout(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: pd.DataFrame | None) -> tuple[Placed, float, float]:
    """Where each node and token stands, and how many rows and columns that takes."""
    points = _points(nodes, tokens)
    wires = edges if tokens is None or tokens.empty else pd.concat([edges, tokens])
    keys = sorted(set(points.column))
    columns, layers, x = [], {}, 0.0
    for key in keys:
        site = key[2]
        width = COLUMN_SHARE.get(site, 1.0)
        x += width / 2
        points.loc[[c == key for c in points.column], "x"] = x
        columns.append(Column(x, COLUMN_TITLES.get(site, site)))
        if site not in ("token", "final_read"):
            left, _ = layers.setdefault(key[0], (x - width / 2 + 0.1, x))
            layers[key[0]] = (left, x + width / 2 - 0.1)
        x += width / 2
    n_rows = _set_heights(points, wires)
    points["label"] = points["name"].where(points["kind"] != "token", "")
    return Placed(points, columns, [(layer, *span) for layer, span in layers.items()]), n_rows, x


def _points(nodes: pd.DataFrame, tokens: pd.DataFrame | None) -> pd.DataFrame:
    """One row per node or token: its column (layer, rank of site, site), rail, head, name and size."""
    rank = {site: i for i, site in enumerate(SITES)}
    largest = float(np.nanmax(nodes.importance_nats.to_numpy(float), initial=0.0)) or 1.0
    rows = {}
    for row in nodes.to_dict("records"):
        layer, site = _drawn_at(row)
        on_rail = site.endswith(("_read", "_write"))
        needed = 0.25 if pd.isna(row["importance_nats"]) else min(1.0, max(0.0, row["importance_nats"] / largest))
        head = -1 if pd.isna(row["head"]) else int(row["head"])
        name = str(row["channel"]) if head < 0 else f"h{head}·{row['channel']}"
        column = (layer, rank[site], site)
        rows[node_id(row)] = (column, row["channel"] if on_rail else None, head, name, KINDS[site], 22 + 90 * needed)
    if tokens is not None:
        last = (1 + max((column[0] for column, *_ in rows.values()), default=0), 0, "token")
        for row in tokens.to_dict("records"):
            if row["kind"] == "embedding":
                rows[row["source"]] = ((-1, 0, "token"), None, -1, shown(row["piece"]), "token", 40)
            else:
                rows[row["target"]] = (last, None, -1, shown(row["piece"]), "token", 40)
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["column", "rail", "head", "name", "kind", "size"])
    frame["rail"] = frame.rail.astype("Int64")
    return frame.astype({"size": float}).assign(x=0.0, y=0.0)


def _set_heights(points: pd.DataFrame, wires: pd.DataFrame) -> float:
    """Set `y` of every point, in rows from the top; returns the number of rows."""
    near: dict[str, list[tuple[str, float]]] = {name: [] for name in points.index}
    for row in wires[wires.kind != "residual"].to_dict("records"):
        pull = abs(float(row["weight"])) + 1e-6
        near[row["source"]].append((row["target"], pull))
        near[row["target"]].append((row["source"], pull))
    rails = {int(rail): list(part.index) for rail, part in points.dropna(subset="rail").groupby("rail")}
    free = [name for name in points.index if pd.isna(points.rail[name])]
    in_columns = [list(part.index) for _, part in points.loc[free].groupby("column")]
    n_rows = float(max([len(rails), 6, *(len(c) + 0.6 * points["head"][c].nunique() for c in in_columns)]))
    order, y = sorted(rails), {}

    def settle() -> None:
        for i, rail in enumerate(order):
            y.update(dict.fromkeys(rails[rail], (i + 0.5) * n_rows / len(order)))

    settle()
    for _ in range(N_ROUNDS):
        y.update({name: pulled([name], near, y, n_rows / 2) for name in free})
        wanted = {rail: pulled(names, near, y, y[names[0]]) for rail, names in rails.items()}
        order.sort(key=lambda rail: (wanted[rail], rail))
        settle()
    for names in in_columns:
        heads = {h: np.mean([y[name] for name in part]) for h, part in points["head"][names].groupby(points["head"])
                 for part in [part.index]}  # fmt: skip
        names.sort(key=lambda name: (heads[points["head"][name]], points["head"][name], y[name], name))
        y.update(zip(names, spread([y[name] for name in names], n_rows), strict=True))
    points["y"] = [y[name] for name in points.index]
    return n_rows


def pulled(
    names: Sequence[str], near: Mapping[str, list[tuple[str, float]]], y: Mapping[str, float], fallback: float
) -> float:
    """Mean height of what `names` are joined to, by |weight|."""
    ends = [(y[other], pull) for name in names for other, pull in near[name] if other in y]
    total = sum(pull for _, pull in ends)
    return sum(height * pull for height, pull in ends) / total if total else fallback


def spread(wanted: Sequence[float], n_rows: float) -> list[float]:
    """Heights in [0, n_rows], in the given order and a row apart at least: nearest to `wanted` by least squares."""
    pools: list[list[float]] = []  # of wanted - rank: a pool moves as one
    for rank, height in enumerate(wanted):
        pools.append([height - rank])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    shifts = [float(np.mean(pool)) for pool in pools for _ in pool]
    highest = n_rows - len(wanted) + 0.5
    return [min(max(shift, 0.5), max(highest, 0.5)) + rank for rank, shift in enumerate(shifts)]
