"""The hand-built models do their tasks, and their answer keys are what brute force finds."""

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.answer_key import Key
from sparse_interp.faithfulness.ground_truth import (
    cut,
    edges_among,
    effects_alone,
    ground_truth,
    ground_truths,
    key_effects,
    logits_of,
    nearest_key,
    nodes_outside,
    recovery,
    spread,
)
from sparse_interp.faithfulness.partial import partial_ablation
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node
from sparse_interp.tasks.task import is_argmax, is_correct, kl_divergence

HARMLESS, HARMFUL = 1e-4, 0.05
"""KL to the model at the answer position, nats: more than all nodes outside a key may do, less than any in it does."""

every_model = pytest.mark.parametrize("name", ground_truths())
built = {}


@pytest.fixture
def truth(name):
    """Each model is built once: nothing here changes one."""
    if name not in built:
        built[name] = ground_truth(name)
    return built[name]


@pytest.fixture
def means(truth, generator):
    return mean_activations(truth.model, truth.blocks(32, generator=generator), batch_size=128)


@every_model
@pytest.mark.parametrize("split", ["train", "test", "shifted"])
def test_a_hand_built_model_is_always_right(truth, split, generator):
    batch = truth.task.batch(100, split, generator=generator)
    for side in (batch, batch.swapped()):
        logits = logits_of(truth.model, side)
        assert is_correct(logits, side).min() == 1
        assert is_argmax(logits, side).min() == 1


@every_model
def test_a_key_alone_is_the_model_and_without_any_node_or_edge_it_is_not(truth, means, generator):
    batch = truth.task.batch(16, "test", generator=generator)
    for key in truth.keys:
        kl = key_effects(truth, key, batch, means)
        assert kl.whole < HARMLESS
        assert kl.without.keys() == key.nodes | key.edges
        assert min(kl.without.values()) > HARMFUL


@every_model
def test_alone_only_nodes_of_the_key_matter_and_only_those_that_nothing_makes_good_for(truth, means, generator):
    batch = truth.task.batch(8, "test", generator=generator)
    kl = effects_alone(truth, batch, means)
    matter = {node for node, nats in kl.items() if nats > HARMFUL}
    assert matter == frozenset.union(*(key.nodes for key in truth.keys)) - truth.repaired
    assert max(nats for node, nats in kl.items() if node not in matter) < HARMLESS


@every_model
def test_no_part_of_a_key_agrees_with_the_model(truth, means, generator):
    batch = truth.task.batch(16, "test", generator=generator)
    reference, key = logits_of(truth.model, batch), truth.keys[-1]
    nodes, rest = sorted(key.nodes), nodes_outside(truth, key)
    for _ in range(12):
        share = torch.rand(1, generator=generator)
        dropped = torch.rand(len(nodes), generator=generator) < share
        dropped[torch.randint(len(nodes), (1,), generator=generator)] = True
        held = rest + [node for node, gone in zip(nodes, dropped.tolist(), strict=True) if gone]
        with ablate(truth.model, held, means):
            assert kl_divergence(reference, logits_of(truth.model, batch), batch).mean() > HARMFUL


@every_model
def test_a_key_does_not_hang_on_the_text_that_means_are_taken_over(truth, generator):
    batch = truth.task.batch(16, "test", generator=generator)
    reference = logits_of(truth.model, batch)
    for blocks in (
        truth.task.batch(32, "shifted", generator=generator).clean,
        torch.randint(truth.model.cfg.d_vocab, (32, 12), generator=generator),
    ):
        means = mean_activations(truth.model, blocks)
        for key in truth.keys:
            rest = nodes_outside(truth, key)
            for held, harmful in [(rest, False)] + [([*rest, node], True) for node in sorted(key.nodes)[::4]]:
                with ablate(truth.model, held, means):
                    kl = kl_divergence(reference, logits_of(truth.model, batch), batch).mean()
                assert kl > HARMFUL if harmful else kl < HARMLESS


@every_model
def test_nodes_of_a_key_vary_and_so_do_many_distractors_that_write_to_the_stream(truth, generator):
    deviation = spread(truth, 32, generator=generator)
    assert min(deviation.of(node) for key in truth.keys for node in key.nodes) > 0.1
    active = [node for node in nodes_outside(truth, truth.keys[0]) if deviation.of(node) > 0.1]
    assert len(active) > len(truth.nodes)
    for site, least in {"v": 2, "neuron": 3, "attn_write": 2, "mlp_write": 2, "final_read": 2}.items():
        assert sum(node.site == site for node in active) >= least, site


@every_model
def test_some_neurons_are_dead_and_point_at_the_circuit_all_the_same(truth, generator):
    deviation = spread(truth, 32, generator=generator)
    key_writes = {(node.layer, node.channel) for node in truth.nodes if node.site == "mlp_write"}
    key_writes |= {(node.layer, node.channel) for node in truth.nodes if node.site == "attn_write"}
    dead = [
        (layer, neuron)
        for layer, block in enumerate(truth.model.layers)
        for neuron in range(truth.model.cfg.d_mlp)
        if deviation.of(Node(layer, "neuron", neuron)) < 1e-3
        and any((layer, channel) in key_writes for channel in block.mlp.W_out[neuron].nonzero()[:, 0].tolist())
    ]
    assert dead


@every_model
def test_a_query_or_key_of_a_circuit_is_left_out_only_where_it_is_constant(truth, generator):
    deviation = spread(truth, 32, generator=generator)
    for nodes, _ in truth.keys:
        for node in nodes:
            if node.site in ("q", "k"):
                partner = node._replace(site="k" if node.site == "q" else "q")
                assert partner in nodes or deviation.of(partner) < 1e-3


@every_model
def test_the_edges_of_a_key_are_all_the_weights_between_its_nodes_but_for_those_that_are_written_as_idle(truth):
    for key in truth.keys:
        idle = edges_among(truth.model, key.nodes) - key.edges
        assert key.edges <= edges_among(truth.model, key.nodes)
        assert len(idle) == (3 if truth.name == "distractor" else 0)


def test_a_weight_that_is_cut_brings_the_mean_of_its_source_alone(generator):
    truth = ground_truth("bracket_depth")
    means = mean_activations(truth.model, truth.blocks(8, generator=generator))
    tokens = truth.task.batch(4, generator=generator).clean
    source, target = edge = next(edge for edge in truth.edges if edge[1].site == "q")
    with cut(truth.model, [edge], means):
        _, cache = truth.model.run_with_cache(tokens)
    bias = truth.model.layers[1].attn.b_Q.flatten()[target.channel]
    expected = 56.5 * means.of(source) + bias
    assert torch.allclose(cache["q", 1].flatten(2)[:, :, target.channel], expected.expand(tokens.shape))


def test_one_distractor_of_the_quote_model_follows_the_answer_and_one_moves_the_logits(generator):
    truth = built.get("quote") or ground_truth("quote")
    batch = truth.task.batch(64, "train", generator=generator)
    _, cache = truth.model.run_with_cache(torch.cat([batch.clean, batch.corrupt]))
    decoy = cache["resid_post", 0][:, :, truth.channels.index("decoy")]
    is_double = (torch.cat([batch.clean, batch.corrupt]) == truth.model.tokenizer.get_vocab()['"']).float()
    assert torch.corrcoef(torch.stack([decoy.flatten(), is_double.flatten()]))[0, 1] > 0.99
    every = truth.model.unembed.W_U[truth.channels.index("every")]
    assert every.min() == every.max() != 0


def test_recovery_counts_what_was_found_against_the_key():
    assert recovery({1, 2, 3, 4}, {1, 2}) == (0.5, 1.0, pytest.approx(2 / 3), False)
    assert recovery({1}, {1, 2}) == (1.0, 0.5, pytest.approx(2 / 3), False)
    assert recovery([2, 1], {1, 2}) == (1.0, 1.0, 1.0, True)
    assert recovery(set(), {1}) == (0.0, 0.0, 0.0, False)
    assert recovery(set(), set()) == (1.0, 1.0, 1.0, True)


def test_what_was_found_is_held_against_the_key_that_it_has_most_in_common_with():
    truth = ground_truth("two_copies")
    first, second = truth.keys
    assert first.nodes != second.nodes and len(first.nodes) == len(second.nodes)
    for key in truth.keys:
        found = set(key.nodes) - {max(key.nodes - truth.repaired)} | set(list(truth.repaired - key.nodes)[:1])
        assert nearest_key(truth, found) == key
    assert nearest_key(ground_truth("quote"), []) == ground_truth("quote").keys[0]


def test_a_backup_stands_in_for_what_is_lost_and_only_then(generator):
    truth = ground_truth("backup")
    batch = truth.task.batch(32, generator=generator)
    means = mean_activations(truth.model, truth.blocks(32, generator=generator))
    spare = truth.channels.index("spare")
    note = Node(0, "attn_write", truth.channels.index("note"))
    assert note in truth.repaired
    for held, stands_in in (([], False), ([note], True)):
        with ablate(truth.model, held, means):
            logits, cache = truth.model.run_with_cache(batch.clean)
        assert is_correct(logits, batch).min() == 1
        written = cache["attn_out", 1][torch.arange(32), batch.last, spare].abs()
        assert written.min() > 0.99 if stands_in else written.max() < 0.01


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(TaskError, match="did you mean 'quote'"):
        ground_truth("qoute")


def test_building_a_model_twice_gives_the_same_weights():
    one, other = ground_truth("mlp_gate"), ground_truth("mlp_gate")
    assert one.nodes == other.nodes and one.task.templates_sha256 == other.task.templates_sha256
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_stand_in_of_a_backup_is_enough_with_the_rest_held_but_not_with_part_of_it_left(generator):
    truth = ground_truth("backup")
    channel = truth.channels.index
    stand_in = [Node(0, "neuron", 0), Node(0, "mlp_write", channel("present"))]
    stand_in += [Node(1, "attn_read", channel(name)) for name in ("present", "is_mark", "mark")]
    stand_in += [Node(1, site, 0) for site in ("q", "k", "v")]
    stand_in += [Node(1, "attn_write", channel("spare")), Node(2, "final_read", channel("spare"))]
    means = mean_activations(truth.model, truth.blocks(32, generator=generator))
    batch = truth.task.batch(16, "test", generator=generator)
    other = Key(frozenset(stand_in), edges_among(truth.model, stand_in))
    kl = key_effects(truth, other, batch, means)
    assert kl.whole < HARMLESS and min(kl.without.values()) > HARMFUL  # nothing tells it from a key, and it is none:
    assert not other.nodes & truth.nodes
    given = {"generator": generator, "n_draws": 2, "n_steps": 2}
    worst = [
        partial_ablation(truth.model, Circuit.of_nodes(truth.model, nodes, means), batch, **given).worst
        for nodes in (truth.nodes, other.nodes)
    ]
    assert worst[0].kl.mean < HARMLESS and worst[0].accuracy.mean == 1
    assert worst[1].kl.mean > 0.5 and worst[1].accuracy.mean < 0.6  # it looks away, as what it stands in for is back
