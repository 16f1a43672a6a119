"""What is left when edges are taken away, against the rules written out node by node."""

import pytest
import torch

from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edges import EdgeUnits, edges_among
from sparse_interp.model.sites import NODE_SITES, Node, masks, wires

HALVES = {"attn_write": 1, "mlp_write": 2, "attn_read": 0, "mlp_read": 1, "final_read": 0}
"""Half blocks of its layer that a write has behind it, or that a read comes after."""


def left(model, edges, ends, weights):
    """(edges, nodes) that stay, by taking away what lacks something until nothing does."""
    cfg, sink = model.cfg, model.cfg.sink
    nodes = {node for node in all_nodes(cfg) if node.site != "final_read"} | set(ends)

    def head(node):
        return node.channel // cfg.d_head

    def steers(node, write):
        carried = weights if sink else edges
        return any(
            s.site == "v" and (s.layer, t) == (node.layer, write) and head(s) == head(node) for s, t, _ in carried
        )

    def stays(node):
        entered, leaves = any(t == node for _, t, _ in edges), any(s == node for s, _, _ in edges)
        if node.site in ("attn_read", "mlp_read"):
            return leaves
        if node.site in ("v", "neuron"):
            return entered and leaves
        if node.site in ("q", "k"):
            return entered and any(w.site == "attn_write" and steers(node, w) for w in nodes)
        if node.site in ("attn_write", "mlp_write"):
            if node.site == "attn_write":
                entered = entered or any(n.site in ("q", "k") and steers(n, node) for n in nodes)
            behind = 2 * node.layer + HALVES[node.site]
            read = any(
                n.site in ("attn_read", "mlp_read", "final_read")
                and n.channel == node.channel
                and 2 * n.layer + HALVES[n.site] >= behind
                for n in nodes
            )
            return entered and read
        return True

    while True:
        fewer = {node for node in nodes if stays(node)}
        kept = {edge for edge in edges if edge[0] in fewer and edge[1] in fewer}
        if fewer == nodes and kept == edges:
            return edges, nodes
        nodes, edges = fewer, kept


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_what_stays_has_everything_that_it_needs_and_nothing_else_goes(make_model, sink, share, generator):
    model = make_model(d_model=6, n_heads=2, d_head=2, d_mlp=5, n_layers=2, sink=sink)
    everything = masks(all_nodes(model.cfg), model.cfg)
    units = EdgeUnits.of(model, everything, edges_among(model, everything), NODE_SITES)
    sites = {wire.weight_name: (wire.source.name, wire.target.name) for wire in wires(model.cfg)}
    named = []
    for matrix, (rows, columns) in units.entries.items():
        source, target = sites[matrix.name]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            named.append((Node(matrix.layer, source, row), Node(matrix.layer, target, column), matrix.name))
    chosen = torch.rand(len(units), generator=generator) < share
    edges = {edge for edge, there in zip(named, chosen.tolist(), strict=False) if there}
    ends = [Node(*units.end, c) for c, there in enumerate(chosen[len(named) :].tolist()) if there]
    edges, nodes = left(model, edges, ends, named)
    found, kept = Connections(model, everything, units, NODE_SITES).of(chosen)
    assert {edge for edge, there in zip(named, found.tolist(), strict=False) if there} == edges
    assert kept.keys() == everything.keys()
    assert {Node(*place, c) for place, mask in kept.items() for c in mask.nonzero().flatten().tolist()} == nodes
    assert 0 < len(edges) < int(chosen[: len(named)].sum())
