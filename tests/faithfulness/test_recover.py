"""How much of a known circuit was found: areas against their definition, and keys of which one is enough."""

from dataclasses import replace
from itertools import product
from math import isnan

import pytest
import torch

from sparse_interp.errors import ConfigError, TaskError
from sparse_interp.faithfulness.answer_key import Key
from sparse_interp.faithfulness.ground_truth import all_nodes, edges_among, ground_truth
from sparse_interp.faithfulness.methods import Ranked
from sparse_interp.faithfulness.recover import recover, roc_auc, score
from sparse_interp.model.sites import Node


def by_definition(scores, key, neither=()):
    inside = [scores[item] for item in key]
    outside = [value for item, value in scores.items() if item not in key and item not in neither]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(inside, outside)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_area_is_the_share_of_pairs_in_order_with_ties_as_half(generator, levels):
    for _ in range(5):
        values = torch.randint(levels, (40,), generator=generator).tolist()
        scores = {i: float(value) for i, value in enumerate(values)}
        key, neither = set(range(7)), {8, 9, 30}
        assert roc_auc(scores, key) == pytest.approx(by_definition(scores, key), abs=1e-12)
        assert roc_auc(scores, key, neither) == pytest.approx(by_definition(scores, key, neither), abs=1e-12)
    assert roc_auc({0: 1.0, 1: 0.0}, {0}) == 1 and roc_auc({0: 0.0, 1: 1.0}, {0}) == 0
    assert isnan(roc_auc({0: 1.0}, {0})) and isnan(roc_auc({0: 1.0}, {1}))
    assert roc_auc({0: float("-inf"), 1: 2.0, 2: float("-inf")}, {1}) == 1


@pytest.fixture(scope="module")
def copies():
    return ground_truth("two_copies")


def ranked(truth, liked, chosen, others=()):
    nodes = {node: float(node in liked.nodes) for node in all_nodes(truth.model.cfg)}
    edges = {edge: float(edge in liked.edges) for edge in edges_among(truth.model, set(nodes))}
    return Ranked(nodes, edges, chosen, tuple(others))


def test_of_two_copies_either_is_exact_and_both_are_the_set(copies):
    first, second = copies.keys
    for key in copies.keys:
        found = score(copies, ranked(copies, key, key))
        assert (found.node_auc, found.edge_auc, found.node_f1, found.edge_f1) == (1, 1, 1, 1)
        assert found.nodes_exact and found.edges_exact and found.keys_frac == 0.5
    assert score(copies, ranked(copies, first, first, [second, first])).keys_frac == 1
    both = Key(first.nodes | second.nodes, first.edges | second.edges)
    found = score(copies, ranked(copies, both, both))
    assert (found.node_auc, found.edge_auc) == (1, 1)  # of the other copy nothing is wrong to find
    assert not found.nodes_exact and not found.edges_exact and found.keys_frac == 0
    assert found.node_f1 == pytest.approx(2 * len(first.nodes) / (len(first.nodes) + len(both.nodes)))


def test_one_node_too_many_or_too_few_is_not_exact(copies):
    key = copies.keys[0]
    stranger = next(node for node in all_nodes(copies.model.cfg) if all(node not in key.nodes for key in copies.keys))
    for nodes in (key.nodes | {stranger}, key.nodes - {min(key.nodes)}):
        found = score(copies, ranked(copies, key, replace_nodes(key, nodes)))
        assert not found.nodes_exact and found.edges_exact and 0.8 < found.node_f1 < 1


def replace_nodes(key, nodes):
    return key._replace(nodes=frozenset(nodes))


def test_a_model_by_name_is_searched_and_measured():
    found = recover("attention_copy", "eap", generator=torch.Generator().manual_seed(0))
    assert found.name == "attention_copy" and found.scores.nodes_exact and found.seconds > 0
    assert isinstance(next(iter(found.ranked.nodes)), Node) and "node_auc 0.9" in str(found)


def test_unknown_names_are_refused_before_anything_runs(generator):
    with pytest.raises(ConfigError, match="No method is called 'eap_gi'; did you mean 'eap_ig'\\? Known: find_circuit"):
        recover("quote", "eap_gi", generator=generator)
    with pytest.raises(TaskError, match="No hand-built model is called 'quot'; did you mean 'quote'"):
        recover("quot", generator=generator)


def test_scores_do_not_depend_on_the_order_of_keys(copies):
    swapped = replace(copies, nodes=copies.keys[1].nodes, edges=copies.keys[1].edges, alternatives=(copies.keys[0],))
    one = ranked(copies, copies.keys[0], copies.keys[0])
    assert score(copies, one) == score(swapped, one)
