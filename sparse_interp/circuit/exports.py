"""A circuit in the formats of other tools: GraphML, node-link JSON, Graphviz text, and the graphs of EAP-IG and MIB.

The first three say what `circuit.nodes` and `circuit.edges` say: a node per channel, an edge per wire. EAP-IG's graphs
(Hanna et al. 2024, arXiv 2403.17806), which the circuit track of MIB (Mueller et al. 2025, arXiv 2504.13151) reads, are
coarser: their nodes are `input`, heads `a0.h3`, MLPs `m0` and `logits`. Here

    a head or MLP is in the graph        if one of its v or neurons has an edge to a channel of its write
    its `neurons`                        are those channels of the stream
    writer -> reader is in the graph     if both are, and some channel that the one writes is read by the other: of a
                                         head through the edges into its q, k or v; the logits read every last read
    its `score`                          is the number of such channels

`input` writes every channel, and stands for concatenated positions too.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sparse_interp.circuit.pictures import KINDS, node_id
from sparse_interp.errors import CircuitError
from sparse_interp.model.config import Shape
from sparse_interp.model.sites import BLOCK_SITES, FINAL_READ, FINAL_RESID, Node, heads_of
from sparse_interp.results import BLUE, FAINT, GREEN, ORANGE, PINK, SKY, VERMILION, write_whole

COLOURS = {"read": SKY, "write": ORANGE, "q, k, v": PINK, "neuron": GREEN}
LINES = {"weight": "solid", "residual": "dashed", "attention": "dotted"}
WIDEST = 3.0
"""Points of the line of the largest weight."""


class CircuitExports:
    """Writing a circuit with these parts for other tools."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    cfg: Shape
    sites: tuple[str, ...]
    model_name: str
    task_name: str | None
    to_networkx: Callable[[], Any]

    def to_graphml(self, path: Path | str) -> Path:
        """Write the graph of `to_networkx` as GraphML, for Gephi, yEd, Cytoscape or igraph."""
        from networkx import generate_graphml  # 0.1 s that only those who want a graph should pay

        return _written(path, "\n".join(generate_graphml(self.to_networkx(), named_key_ids=True)) + "\n")

    def to_node_link(self, path: Path | str) -> Path:
        """Write the graph of `to_networkx` as the JSON that `networkx.node_link_graph(..., edges="edges")` and D3 read.

        JSON has no word for what is not finite: such attributes, as the gate of a node that has none, are left out.
        """
        from networkx import node_link_data  # see above

        data = node_link_data(self.to_networkx(), edges="edges")
        for part in ("nodes", "edges"):
            data[part] = [{k: v for k, v in item.items() if _can_be_said(v)} for item in data[part]]
        return _written(path, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def to_dot(self) -> str:
        """The circuit as Graphviz text: layers as clusters, blue for positive weights and vermilion for negative ones.

        `dot -Tsvg` draws it, and so does `graphviz.Source(circuit.to_dot())`; neither is needed to write it.
        """
        title = f"{self.task_name or 'circuit'} in {self.model_name}"
        lines = [
            f"digraph {_quoted(title)} {{",
            "  rankdir=LR;",
            "  node [shape=box, style=filled, fontname=Helvetica];",
        ]
        for layer, nodes in self.nodes.groupby("layer"):
            label = f"layer {layer}" if layer < self.cfg.n_layers else "logits"
            lines += [f"  subgraph cluster_{layer} {{", f"    label={_quoted(label)};"]
            lines += [f"    {_dot_node(row)};" for row in nodes.to_dict("records")] + ["  }"]
        weights = self.edges.weight[self.edges.kind == "weight"].abs()
        largest = float(weights.max()) if weights.notna().any() else 1.0
        lines += [f"  {_dot_edge(row, largest or 1.0)};" for row in self.edges.to_dict("records")]
        return "\n".join([*lines, "}"]) + "\n"

    def to_mib(self, path: Path | str) -> Path:
        """Write the circuit as JSON that EAP-IG's `Graph.from_json`, and so MIB's evaluation, reads.

        Channels are put together to heads and MLPs as the module says; every possible edge is listed.

        Raises:
            CircuitError: for a circuit that keeps a site whole: which heads and MLPs it is made of is then not said.
        """
        names = [site.name for site in BLOCK_SITES]
        whole = [name for name in names if name not in self.sites]
        if not {FINAL_READ.name, FINAL_RESID.name} & set(self.sites):
            whole.append(FINAL_READ.name)
        if whole:
            raise CircuitError(
                f"this circuit holds nothing at {', '.join(whole)}, so its edges there are not known and it cannot be "
                "put together to heads and MLPs; find one with all sites, or export its nodes with to_graphml."
            )
        return _written(path, json.dumps(_components(self.nodes, self.edges, self.cfg)) + "\n")


def _written(path: Path | str, text: str) -> Path:
    path = Path(path)
    write_whole(path, text)
    return path


def _can_be_said(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


# -- Graphviz text ----------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    """A string of the DOT language."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _dot_node(row: Mapping) -> str:
    head = "" if pd.isna(row["head"]) else f" of head {row['head']}"
    label = f"{row['site']} {row['channel']}{head}"
    colour = COLOURS.get(KINDS.get(row["site"], "read"), FAINT)
    return f"{_quoted(node_id(row))} [label={_quoted(label)}, fillcolor={_quoted(colour)}]"


def _dot_edge(row: Mapping, largest: float) -> str:
    name, weight = row["weight_name"], row["weight"]
    style = [f"style={LINES.get(row['kind'], 'solid')}"]
    if row["kind"] != "weight":
        style.append(f"color={_quoted(FAINT)}")
    elif not pd.isna(weight):
        style.append(f"color={_quoted(BLUE if weight >= 0 else VERMILION)}")
        style.append(f"penwidth={max(0.3, WIDEST * abs(weight) / largest):.2f}")
        style.append(f"tooltip={_quoted(f'{name} {weight:.4g}')}")
    return f"{_quoted(row['source'])} -> {_quoted(row['target'])} [{', '.join(style)}]"


# -- heads and MLPs ---------------------------------------------------------------------------------------------------


def _components(nodes: pd.DataFrame, edges: pd.DataFrame, cfg: Shape) -> dict[str, Any]:
    """The graph of EAP-IG, as its JSON says it."""
    writes, reads = _writes_and_reads(nodes, edges, cfg)
    everything = set(range(cfg.d_read))
    writes["input"] = everything
    found: dict[str, Any] = {"cfg": {"n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "parallel_attn_mlp": False,
                                     "d_model": cfg.d_model}}  # fmt: skip
    found["nodes"] = {"input": {"in_graph": True, "neurons": [True] * cfg.d_model}}
    for layer in range(cfg.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(cfg.n_heads)]
        rows = [_row(writes.get(name, set()), cfg.d_model) for name in heads]
        for name in heads:  # its reader sets all heads of a layer at once, so each names the channels of all
            found["nodes"][name] = {"in_graph": bool(writes.get(name)), "neurons": rows}
        name = f"m{layer}"
        row = _row(writes.get(name, set()), cfg.d_model)
        found["nodes"][name] = {"in_graph": bool(writes.get(name)), "neurons": row}
    found["nodes"]["logits"] = {"in_graph": True}
    found["edges"] = {}
    for source, target, name in _possible_edges(cfg):
        shared = writes.get(source, set()) & reads.get(name, set())
        present = bool(shared) and (target == "logits" or bool(writes.get(target)))
        found["edges"][f"{source}->{name}"] = {"score": float(len(shared)) if present else 0.0, "in_graph": present}
    return found


def _row(channels: set[int], d_model: int) -> list[bool]:
    return [channel in channels for channel in range(d_model)]


def _writes_and_reads(
    nodes: pd.DataFrame, edges: pd.DataFrame, cfg: Shape
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Which channels of the stream every head and MLP writes, and which each reads: of heads as `a0.h3<q>`."""
    writes: dict[str, set[int]] = {}
    reads: dict[str, set[int]] = {}
    for row in edges[edges.kind == "weight"].to_dict("records"):
        (layer, site, channel), (_, into, target) = _node(row["source"]), _node(row["target"])
        if site == "attn_read":
            for head in heads_of(cfg, Node(layer, into, target)):
                reads.setdefault(f"a{layer}.h{head}<{into}>", set()).add(channel)
        elif site == "mlp_read":
            reads.setdefault(f"m{layer}", set()).add(channel)
        elif site == "v":
            _, _, stated = row["weight_name"].rstrip("]").partition("[")  # named where queries are grouped
            head = int(stated) if stated else channel // cfg.d_head
            writes.setdefault(f"a{layer}.h{head}", set()).add(target)
        else:
            writes.setdefault(f"m{layer}", set()).add(target)
    last = nodes[nodes.site.isin([FINAL_READ.name, FINAL_RESID.name])]
    reads["logits"] = set(last.channel.astype(int))
    return writes, reads


def _node(name: str) -> Node:
    """The node that an edge calls `L0.neuron.12`."""
    layer, site, channel = name.split(".")
    return Node(int(layer[1:]), site, int(channel))


def _possible_edges(cfg: Shape) -> Iterator[tuple[str, str, str]]:
    """Source, target, and how an edge to it is called, for every edge that there can be, in EAP-IG's order."""
    stream = ["input"]
    for layer in range(cfg.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(cfg.n_heads)]
        for source in stream:
            for head in heads:
                for letter in "qkv":
                    yield source, head, f"{head}<{letter}>"
        stream += heads
        for source in stream:
            yield source, f"m{layer}", f"m{layer}"
        stream.append(f"m{layer}")
    for source in stream:
        yield source, "logits", "logits"
