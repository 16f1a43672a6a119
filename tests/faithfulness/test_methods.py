"""Every way of finding circuits rates every node and edge, and finds an easy circuit as far as it can."""

import pytest
import torch

from sparse_interp.faithfulness import methods
from sparse_interp.faithfulness.ground_truth import all_nodes, edges_among, ground_truth
from sparse_interp.faithfulness.methods import METHODS
from sparse_interp.faithfulness.recover import recover

TWINS = ("gradient", "integrated_gradient", "eap", "eap_ig", "patching")
"""Ways to which a node that holds the same in both prompts of a pair is nothing."""


@pytest.fixture(scope="module")
def copy():
    return ground_truth("attention_copy")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(methods, "N_SEEDS", 2)
    monkeypatch.setattr(methods, "PRICES", (3e-3,))


@pytest.mark.parametrize("method", METHODS)
def test_each_way_rates_everything_and_finds_an_easy_circuit(copy, method):
    found = recover(copy, method, generator=torch.Generator().manual_seed(0))
    nodes = all_nodes(copy.model.cfg)
    assert list(found.ranked.nodes) == nodes
    assert found.ranked.edges.keys() == edges_among(copy.model, set(nodes))
    if method not in TWINS:
        assert found.scores.node_auc == found.scores.edge_auc == 1
    still = {node for node in copy.nodes if str(node) in ("L0.attn_read.1", "L0.k.0")}  # where a name stands
    assert len(still) == 2
    if method in TWINS:  # twins differ in who is named, and not in where
        assert all(found.ranked.nodes[node] < 1e-4 for node in still if method not in ("eap", "eap_ig"))
        assert 0.85 < found.scores.node_auc < 0.96 and 0.8 < found.scores.edge_auc < 0.9
    if method not in ("gradient", "integrated_gradient", "patching", "subnetwork_probing"):
        assert found.scores.nodes_exact and found.scores.edges_exact


def test_what_is_chosen_keeps_the_stopping_rule_and_one_less_of_the_ranking_does_not(copy):
    bench = methods._Bench(copy, torch.Generator().manual_seed(0))
    scores = {node: float(node in copy.nodes) + 0.5 * (node == min(copy.nodes)) for node in bench.nodes}
    assert bench.smallest_nodes(scores) == copy.nodes
    worst = {node: -score for node, score in scores.items()}
    assert bench.smallest_nodes(worst) >= copy.nodes


def test_edges_take_the_lesser_end_and_nodes_the_best_edge(copy):
    bench = methods._Bench(copy, torch.Generator().manual_seed(0))
    numbers = {node: float(i) for i, node in enumerate(bench.nodes)}
    of_nodes = bench.of_nodes(numbers, copy.nodes)
    assert all(of_nodes.edges[a, b] == min(numbers[a], numbers[b]) for a, b in bench.edges)
    assert copy.edges <= of_nodes.chosen.edges
    of_edges = bench.of_edges(of_nodes.edges, numbers)
    for node in bench.nodes:
        around = [score for edge, score in of_edges.edges.items() if node in edge]
        assert of_edges.nodes[node] == (numbers[node] if node in bench.ends else max(around, default=-torch.inf))
