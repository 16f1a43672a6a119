"""Two circuits side by side."""

import math

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.model.sites import Node


def test_the_overlap_counts_nodes_site_by_site_and_edges_matrix_by_matrix(plain_model):
    zero = zero_values(plain_model)
    reads, neurons = [Node(0, "mlp_read", c) for c in (0, 1)], [Node(0, "neuron", c) for c in (2, 3, 4)]
    a = Circuit.of_nodes(plain_model, [*reads, *neurons[:2]], zero)
    b = Circuit.of_nodes(plain_model, [*reads, *neurons[1:], Node(1, "q", 0)], zero)
    rows = {row[0]: row[1:] for row in a.overlap(b).frame.itertuples(index=False)}
    counts = {what: row[:4] for what, row in rows.items()}
    assert counts == {
        "nodes": (4, 5, 3, 3 / 6),
        "q": (0, 1, 0, 0.0),
        "mlp_read": (2, 2, 2, 1.0),
        "neuron": (2, 2, 1, 1 / 3),
        "edges": (4, 4, 2, 2 / 6),
        "mlp.W_in": (4, 4, 2, 2 / 6),
    }
    assert rows["edges"][4] == rows["mlp.W_in"][4] == 0 and math.isnan(rows["nodes"][4])


def test_between_snapshots_the_overlap_says_how_far_shared_weights_moved(make_model, some_nodes):
    before, after = make_model(), make_model()
    with torch.no_grad():
        after.layers[0].mlp.W_out.mul_(1.5)
        after.layers[1].attn.W_Q[0, :, 0] = 0
    a, b = (Circuit.of_nodes(model, some_nodes(before), zero_values(model)) for model in (before, after))
    frame = a.overlap(b).frame.set_index("what")
    of_layer_0 = a.edges[(a.edges.weight_name == "mlp.W_out") & a.edges.source.str.startswith("L0.")].weight.abs().sum()
    of_both = a.edges[a.edges.weight_name == "mlp.W_out"].weight.abs().sum()
    assert frame.weight_change_frac["mlp.W_out"] == pytest.approx(0.5 * of_layer_0 / of_both)
    assert frame.weight_change_frac["mlp.W_in"] == 0
    gone = frame.n_first["attn.W_Q"] - frame.n_second["attn.W_Q"]
    edges = a.diff_edges(b).frame
    assert 0 < gone == (edges["where"] == "first").sum() and frame.n_both["edges"] == b.n_edges
    assert set(edges[edges["where"] == "first"].target) == {"L1.q.0"}


def test_two_empty_circuits_have_nothing_to_compare(plain_model):
    empty = Circuit.of_nodes(plain_model, [], zero_values(plain_model))
    frame = empty.overlap(empty).frame
    assert list(frame.what) == ["nodes", "edges"] and frame.jaccard.isna().all() and (frame.n_both == 0).all()


def test_circuits_of_models_of_different_shapes_are_not_compared(make_model):
    small, wide, deep = make_model(), make_model(d_mlp=24), make_model(n_layers=3)
    circuits = [Circuit.of_nodes(model, [Node(0, "neuron", 1)], zero_values(model)) for model in (small, wide, deep)]
    with pytest.raises(CircuitError, match="layer 0 has 20 channels at neuron in one and 24 channels in the other"):
        circuits[0].diff(circuits[1])
    for first, second in ((0, 2), (2, 0)):
        with pytest.raises(CircuitError, match="different shapes"):
            circuits[first].overlap(circuits[second])
        with pytest.raises(CircuitError, match="different shapes"):
            circuits[first].diff_edges(circuits[second])
