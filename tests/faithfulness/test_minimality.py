"""A key does without nothing in it, useless parts are named, and every effect is what a plain run would measure."""

from itertools import combinations

import pandas as pd
import pytest
import torch
from known_models import hand_built, means_of

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes, edges_among, ground_truth
from sparse_interp.faithfulness.minimality import LEAST_EFFECT_NATS, holm, minimality, n_draws, p_values
from sparse_interp.faithfulness.planted import PlantConfig, planted
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.edges import edges_among as edge_masks_among
from sparse_interp.model.edges import Matrix
from sparse_interp.model.sites import WIRES, Node, NodeAt, masks


@pytest.fixture(autouse=True)
def few_extras(monkeypatch):
    """Thirty are enough where nearly all of them do nothing, and take a third of the time."""
    monkeypatch.setattr("sparse_interp.faithfulness.minimality.N_EXTRAS", 30)


def with_edges(truth, means, edges, nodes=None):
    """The key's nodes, or others, with some of the weights between them and no others."""
    nodes = truth.nodes if nodes is None else nodes
    found = {
        m: torch.zeros_like(mask) for m, mask in edge_masks_among(truth.model, masks(nodes, truth.model.cfg)).items()
    }
    for source, target in edges:
        (wire,) = (w for w in WIRES if (w.source.name, w.target.name) == (source.site, target.site))
        found[Matrix(source.layer, wire.weight_name)][source.channel, target.channel] = True
    return Circuit.of_nodes(truth.model, nodes, means, edges=found)


def drawn_outside(truth, n, generator):
    outside = [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]
    return [outside[i] for i in torch.randperm(len(outside), generator=generator)[:n].tolist()]


def measured(truth, circuit, generator, n_pairs=8):
    pairs = truth.task.batch(24, "test", generator=generator)
    return minimality(truth.model, circuit, pairs, n_pairs=n_pairs, generator=generator, progress=False)


# -- ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bracket_depth", "backup"])
def test_a_key_has_no_useless_node_and_twenty_that_are_added_are_named(name, generator):
    truth, means = hand_built(name)
    found = measured(truth, Circuit.of_nodes(truth.model, truth.nodes, means), generator)
    assert found.not_told() == [] and found.not_told_frac().mean == 0 and found.frame.effect_nats.min() > 0.05
    useless = drawn_outside(truth, 20, generator)
    found = measured(truth, Circuit.of_nodes(truth.model, [*truth.nodes, *useless], means), generator)
    assert set(found.not_told()) == set(map(str, useless))
    assert found.not_told_frac().mean == pytest.approx(20 / (20 + len(truth.nodes)))
    assert "20 of" in found.summary and str(found.not_told()[0]) in found.summary


def test_useless_nodes_in_a_noisy_host_are_named_and_those_of_the_hidden_key_are_not(generator):
    config = PlantConfig(n_layers=3, d_model=40, n_heads=5, d_mlp=24, noise=0.02)
    truth = planted(ground_truth("attention_copy"), config, generator=generator)
    useless = drawn_outside(truth, 20, generator)
    circuit = Circuit.of_nodes(truth.model, [*truth.nodes, *useless], means_of(truth))
    found = measured(truth, circuit, generator)
    assert found.extras.frame.effect_nats.abs().max() > LEAST_EFFECT_NATS  # there is noise to be told from
    assert set(found.not_told()) == set(map(str, useless))


def test_edges_that_nothing_follows_from_are_named_among_those_of_the_key(generator):
    truth, means = hand_built("distractor")
    idle = edges_among(truth.model, truth.nodes) - truth.edges
    found = measured(truth, with_edges(truth, means, [*truth.edges, *idle]), generator)
    assert len(idle) == 3 and found.kinds == ("node", "edge")
    assert set(found.not_told("edge")) == {f"{source} -> {target}" for source, target in idle}
    found = measured(truth, with_edges(truth, means, truth.edges), generator)
    assert found.not_told("edge") == found.not_told("node") == []
    names = set(found.extras.frame[found.extras.frame.kind == "edge"].name)
    assert names >= {f"{source} -> {target}" for source, target in idle}, "cut edges are the extras that come first"


def test_what_two_copies_both_bring_is_not_needed_of_either(generator):
    truth, means = hand_built("two_copies")
    both = truth.nodes | truth.alternatives[0].nodes
    found = measured(truth, Circuit.of_nodes(truth.model, both, means), generator)
    assert set(found.not_told()) == {str(node) for node in both - (truth.nodes & truth.alternatives[0].nodes)}


# -- effects ----------------------------------------------------------------------------------------------------------


def mean_kl(truth, circuit, pairs):
    """KL(model || circuit), prompt by prompt, each without padding, in float64."""
    batch, total = pairs.both_sides(), 0.0
    for i in range(len(batch)):
        prompt = batch.clean[i : i + 1, : int(batch.lengths[i])]
        with torch.no_grad():
            p = truth.model(prompt)[0, -1].double().log_softmax(-1)
            with circuit.running(truth.model):
                q = truth.model(prompt)[0, -1].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum()) / len(batch)
    return total


def test_effects_are_those_of_whole_runs_prompt_by_prompt(generator):
    """Of nodes and edges of a circuit with noise between its parts, and of the extras that it is compared with."""
    truth, means = hand_built("quote")
    pairs = truth.task.batch(3, "test", generator=generator)
    nodes = sorted({*truth.nodes, *drawn_outside(truth, 40, generator)})
    edges = sorted(edges_among(truth.model, nodes))
    lost = (Node(0, "mlp_read", truth.channels.index("single")), Node(0, "neuron", 2))  # a part of the answer
    left = [edge for i, edge in enumerate(edges) if edge != lost and (i % 3 or edge in truth.edges)]
    circuit = with_edges(truth, means, left, nodes)
    found = minimality(truth.model, circuit, pairs, n_pairs=3, generator=generator, progress=False)
    whole = mean_kl(truth, circuit, pairs)

    def node_out(node):
        kept = [other for other in nodes if other != node]
        return with_edges(truth, means, [edge for edge in left if node not in edge], kept)

    expected = {
        str(node): mean_kl(truth, node_out(node), pairs) - whole for node in [*nodes[::20], *sorted(truth.nodes)[::5]]
    }
    for edge in [*left[::12], *sorted(truth.edges)[::4]]:
        without = with_edges(truth, means, [other for other in left if other != edge], nodes)
        expected[f"{edge[0]} -> {edge[1]}"] = mean_kl(truth, without, pairs) - whole
    rows = found.frame.set_index("name").effect_nats
    assert rows[list(expected)].tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    assert max(expected.values()) > 0.05 and min(expected.values()) < 0.01
    extras = found.extras.frame[found.extras.frame.kind == "edge"].set_index("name").effect_nats
    assert lost in truth.edges and extras[f"{lost[0]} -> {lost[1]}"] > 0.01
    for edge in [lost, *(edge for edge in edges if edge not in left)][:2]:
        within = with_edges(truth, means, [*left, edge], nodes)
        assert extras[f"{edge[0]} -> {edge[1]}"] == pytest.approx(whole - mean_kl(truth, within, pairs), abs=1e-5)
    extra = found.extras.frame[found.extras.frame.kind == "node"].sort_values("effect_nats", key=abs).name.iloc[-1]
    layer, site, channel = extra.split(".")
    node = Node(int(layer[1:]), site, int(channel))
    beside = [edge for edge in edges_among(truth.model, {*nodes, node}) if node in edge]
    within = with_edges(truth, means, [*left, *beside], [*nodes, node])
    assert found.extras.frame.set_index("name").effect_nats[extra] == pytest.approx(
        whole - mean_kl(truth, within, pairs), abs=1e-5
    )


def test_nodes_at_positions_are_knocked_out_where_they_are_kept(generator):
    truth, means = hand_built("quote")
    pairs = truth.task.batch(64, "test", generator=generator)
    length = int(pairs.lengths.mode().values)
    pairs = pairs.rows((pairs.lengths == length).nonzero().flatten())
    spots = [NodeAt(*node, pos) for node in truth.nodes for pos in range(length)]
    found = minimality(
        truth.model,
        Circuit.of_nodes(truth.model, spots, means, n_pos=length),
        pairs,
        n_pairs=8,
        generator=generator,
        progress=False,
    )
    needed = found.frame[found.frame.told].name
    assert "L2.final_read.8" in set(needed), "read where the answer is"
    assert f"L1.attn_write.8@{length - 1}" in set(needed) and "L1.attn_write.8@0" in found.not_told()


def test_a_bridge_gives_what_our_model_gives(dense_truth, truth, generator):
    tables = []
    for model in dense_truth:
        seed = torch.Generator().manual_seed(0)
        means = mean_activations(model, truth.blocks(16, generator=seed))
        circuit = Circuit.of_nodes(model, sorted(truth.nodes)[1:], means, edges=None)
        pairs = truth.task.batch(6, "test", generator=seed)
        tables.append(minimality(model, circuit, pairs, n_pairs=4, generator=seed, progress=False).frame)
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-4)


# -- the test ---------------------------------------------------------------------------------------------------------


def test_p_values_are_the_share_of_draws_that_do_as_much(generator):
    """Two extras, two groups of 1 and 3 prompts: one extra, and each group never, once or twice."""
    extras = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 4.0, 1.0]])
    draws = [4.0, 1.0, 1.0, 0.0, 0.0, 2.25, 2.25, 3.0]  # equally likely: the first extra's, then the second's
    effects = torch.tensor([[0.5], [1.0], [2.0], [2.5], [3.5], [4.5]]).expand(-1, 4)
    found = p_values(effects, extras, [7, 2, 2, 2], 40_000, generator=generator)
    expected = [sum(draw >= float(effect) for draw in draws) / 8 for effect in effects[:, 0]]
    assert found.tolist() == pytest.approx(expected, abs=0.01) and float(found[-1]) == pytest.approx(1 / 40_001)


def test_an_extra_is_one_thing_in_all_templates(generator):
    """One extra in ten does something, in each of ten templates alike: so a tenth of the draws do."""
    extras = torch.zeros(100, 10).index_fill(0, torch.arange(10), 1.0)
    found = p_values(torch.tensor([[0.9], [1.1]]).expand(-1, 10), extras, range(10), 40_000, generator=generator)
    assert found.tolist() == pytest.approx([0.1, 1 / 40_001], abs=0.01)


def test_parts_that_are_random_extras_are_told_from_them_as_often_as_the_level_says(generator):
    """Nodes that do unlike much, in every template nearly the same: one in twenty before the correction."""
    below, told, groups = [], 0, [template for template in range(10) for _ in range(4)]
    for _ in range(50):
        does = torch.empty(150, 1).exponential_(generator=generator) ** 2 * 1e-3
        effects = (does * (1 + 0.3 * torch.randn(150, 10, generator=generator))).repeat_interleave(4, 1).double()
        p = p_values(effects[:50], effects[50:], groups, 4000, generator=generator)
        below.append(float((p < 0.05).double().mean()))
        told += int((holm(p) < 0.05).any())
    assert sum(below) / 50 == pytest.approx(0.05, abs=0.02)
    assert told <= 20, "of 50 parts that are extras some one is told in most circuits"


def test_extras_that_do_nothing_are_no_smaller_than_rounding(generator):
    effects = torch.tensor([[LEAST_EFFECT_NATS / 2], [LEAST_EFFECT_NATS * 2]]).expand(-1, 4)
    found = p_values(effects, torch.zeros(10, 4), [0, 0, 1, 1], 100, generator=generator)
    assert found.tolist() == pytest.approx([1, 1 / 101])


def test_holm_is_the_closed_test_of_bonferroni(generator):
    """A part is rejected when every set of parts that it is in is: of each the smallest p-value, times their number."""
    for n in (1, 2, 6):
        p = torch.rand(n, generator=generator, dtype=torch.float64) ** 3
        sets = [set(some) for size in range(1, n + 1) for some in combinations(range(n), size)]
        expected = [max(min(1.0, len(s) * min(float(p[j]) for j in s)) for s in sets if i in s) for i in range(n)]
        assert holm(p).tolist() == pytest.approx(expected)


def test_there_are_draws_enough_for_the_correction():
    for n_parts in (1, 200, 3000):
        assert n_draws(n_parts) >= 4000 and n_parts / (1 + n_draws(n_parts)) < 0.05 / 2 + 1e-9


# -- the call ---------------------------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_table_and_it_draws_itself(generator):
    truth, means = hand_built("quote")
    circuit = Circuit.of_nodes(truth.model, truth.nodes, means)
    pairs = truth.task.batch(6, "test", generator=generator)
    tables = [
        minimality(truth.model, circuit, pairs, n_pairs=3, generator=torch.Generator().manual_seed(4), progress=False)
        for _ in range(2)
    ]
    assert tables[0] == tables[1] and tables[0].extras == tables[1].extras
    assert tables[0].n_prompts == 6 and len(tables[0].plot().lines) == 2


def test_a_circuit_that_leaves_nothing_outside_is_refused(generator):
    truth, means = hand_built("quote")
    pairs = truth.task.batch(4, "test", generator=generator)
    everything = all_nodes(truth.model.cfg)
    for nodes, words in ((everything[:-3], "3 extra nodes"), ([], "no nodes")):
        with pytest.raises(CircuitError, match=words):
            circuit = Circuit.of_nodes(truth.model, nodes, means)
            minimality(truth.model, circuit, pairs, generator=generator, progress=False)
    with pytest.raises(ConfigError, match="n_pairs=1"):
        circuit = Circuit.of_nodes(truth.model, truth.nodes, means)
        minimality(truth.model, circuit, pairs, n_pairs=1, generator=generator)
    other = ground_truth("quote")
    other.model.unembed.W_U.data *= 2
    with pytest.raises(CircuitError, match="weights"):
        minimality(other.model, circuit, pairs, generator=generator)
