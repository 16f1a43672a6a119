"""A released circuit as two tables of text, read without its model: how others have written one down.

    node,importance                    0.mlp.act_in:180,0.71             the circuit's loss with that node held as well
    source,target,pair_importance      0.mlp.act_in:180,0.mlp.post_act:2790,0.69

A node is `loc:channel` in the payload's words (circuit/payload.py), and both numbers are the payload's own: the loss is
a sum over the two sides of a pair, and the pair's number is no weight. Such a circuit can be drawn, compared and
counted. It cannot run: it lacks the weights and the means, and `circuit.transplanted(model, baseline)` gives it both.
"""

import math
import re
from pathlib import Path

import pandas as pd

from sparse_interp.circuit.graph import EDGE_COLUMNS, NODE_COLUMNS, Circuit, with_wires
from sparse_interp.circuit.pictures import PAIR_VALUE
from sparse_interp.circuit.released import RELEASED_SITES, SIDES, STORED_LOSS, loc_of, place_of
from sparse_interp.errors import CircuitError
from sparse_interp.model.config import AnyShape, Shape
from sparse_interp.model.sites import WIRES, Node, NodeValues, Place, check_nodes
from sparse_interp.results import Table

NODES, EDGES = ("node", "importance"), ("source", "target", "pair_importance")
"""Columns of the two tables."""

_NODE = re.compile(r"(\d+\.[a-z_.]+|final_resid):(\d+)")
_WEIGHTS = {(wire.source.name, wire.target.name): wire.weight_name for wire in WIRES}


def read_tables(
    nodes: Path | str,
    edges: Path | str,
    cfg: AnyShape,
    *,
    task_name: str | None = None,
    interv_loss: float | None = None,
) -> Circuit:
    """The circuit that two tables describe, rows in their order.

    Args:
        nodes: CSV file with the columns `node` and `importance`.
        edges: CSV file with the columns `source`, `target` and `pair_importance`.
        cfg: shape of the model that the circuit is of.
        task_name: what the circuit was found for.
        interv_loss: the circuit's own loss as the payload states it, both sides added. Importances are what a node
            costs beyond it; without it they are unknown.

    Raises:
        CircuitError: if a file is missing or no such table, or names a node or an edge that the model does not have.
    """
    listed, joined = _table(Path(nodes), NODES), _table(Path(edges), EDGES)
    found = [_node(name, cfg, nodes) for name in listed.node]
    ends = [(_node(row.source, cfg, edges), _node(row.target, cfg, edges)) for row in joined.itertuples()]
    known = set(found)
    if len(known) < len(found) or len(set(ends)) < len(ends):
        raise CircuitError(f"{nodes if len(known) < len(found) else edges} lists a row twice.")
    for source, target in ends:
        if not {source, target} <= known:
            raise CircuitError(f"{edges} joins {source} and {target}, and {nodes} does not list both.")
        if source.layer != target.layer or (source.site, target.site) not in _WEIGHTS:
            raise CircuitError(f"{edges} joins {source} and {target}, which no weight does.")
    own = float("nan") if interv_loss is None else interv_loss
    rows = [
        (*node, node.channel // cfg.d_head if node.site in ("q", "k", "v") else None, math.nan, math.nan,
         (loss - own) / SIDES, loss)
        for node, loss in zip(found, listed.importance, strict=True)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*NODE_COLUMNS, STORED_LOSS])
    weights = [
        (str(source), str(target), "weight", _WEIGHTS[source.site, target.site], math.nan, value)
        for (source, target), value in zip(ends, joined.pair_importance, strict=True)
    ]
    return Circuit(
        nodes=frame.astype({"head": "Int64"}),
        edges=with_wires(pd.DataFrame(weights, columns=[*EDGE_COLUMNS, PAIR_VALUE]), found, cfg),
        baseline=NodeValues({}, "values that the tables do not hold"),
        cfg=Shape.of(cfg),
        model_name=cfg.model_name,
        model_sha256="",
        sites=RELEASED_SITES,
        task_name=task_name,
    )


def write_tables(circuit: Circuit, folder: Path | str) -> tuple[Path, Path]:
    """Write `nodes.csv` and `edges.csv` as `read_tables` reads them; what it read comes out again byte for byte.

    Raises:
        CircuitError: if the circuit is not a released one, and has no stored numbers to write.
    """
    if STORED_LOSS not in circuit.nodes or PAIR_VALUE not in circuit.edges:
        raise CircuitError(
            f"the circuit has no {STORED_LOSS} and {PAIR_VALUE} as released ones have; circuit.save_tables writes it "
            "with what it has."
        )
    named = {str(node): f"{loc_of(Place(node.layer, node.site))}:{node.channel}" for node in circuit.node_set}
    rows = circuit.nodes[["layer", "site", "channel"]].itertuples(index=False)
    nodes = pd.DataFrame({"node": [named[str(Node(*row))] for row in rows], "importance": circuit.nodes[STORED_LOSS]})
    weights = circuit.edges[circuit.edges.kind == "weight"]
    edges = pd.DataFrame(
        {
            "source": weights.source.map(named),
            "target": weights.target.map(named),
            "pair_importance": weights[PAIR_VALUE],
        }
    )
    folder = Path(folder)
    return Table(nodes).save(folder / "nodes.csv"), Table(edges).save(folder / "edges.csv")


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str)  # and each number by `float`, so that none loses a digit
    except (OSError, ValueError) as error:
        raise CircuitError(f"{path} cannot be read as a table ({error}); expected {', '.join(columns)}.") from error
    if tuple(table.columns) != columns:
        found = ", ".join(map(str, table.columns))
        raise CircuitError(f"{path} has the columns {found}; expected {', '.join(columns)}.")
    *_, number = columns
    try:
        values = [float(text) for text in table[number]]
    except ValueError as error:
        raise CircuitError(f"{path}: {error}; {number} is a column of numbers.") from error
    if not all(map(math.isfinite, values)):
        raise CircuitError(f"{path} has rows in which {number} is no number.")
    return table.assign(**{number: pd.Series(values, dtype=float)})


def _node(name: object, cfg: AnyShape, path: Path | str) -> Node:
    """The node that a table calls `name`."""
    match = _NODE.fullmatch(str(name))
    try:
        if match is None:
            raise CircuitError(f"{name!r} is no node; expected one such as '0.mlp.act_in:180'.")
        node = Node(*place_of(match[1], cfg.n_layers), int(match[2]))
        check_nodes([node], cfg)
    except CircuitError as error:
        raise CircuitError(f"{path}: {error}") from error
    return node
