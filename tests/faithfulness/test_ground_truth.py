"""The hand-built models do their tasks, and their answer keys are what brute force finds."""

import pytest
import torch

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.ground_truth import (
    effects,
    ground_truth,
    ground_truths,
    logits_of,
    outside,
    recovery,
    spread,
)
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import WIRES, Node
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
def test_holding_everything_outside_the_key_changes_nothing_and_holding_any_node_of_it_does(truth, means, generator):
    batch = truth.task.batch(16, "test", generator=generator)
    kl = effects(truth, batch, means)
    assert kl.outside < HARMLESS
    assert {node for node, nats in kl.alone.items() if nats > HARMFUL} == truth.nodes
    assert max(kl.alone[node] for node in outside(truth)) < HARMLESS


@every_model
def test_no_part_of_a_key_agrees_with_the_model(truth, means, generator):
    batch = truth.task.batch(16, "test", generator=generator)
    reference, key = logits_of(truth.model, batch), sorted(truth.nodes)
    for _ in range(12):
        share = torch.rand(1, generator=generator)
        dropped = torch.rand(len(key), generator=generator) < share
        dropped[torch.randint(len(key), (1,), generator=generator)] = True
        held = outside(truth) + [node for node, gone in zip(key, dropped.tolist(), strict=True) if gone]
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
        with ablate(truth.model, outside(truth), means):
            assert kl_divergence(reference, logits_of(truth.model, batch), batch).mean() < HARMLESS
        for node in sorted(truth.nodes)[::4]:
            with ablate(truth.model, [node], means):
                assert kl_divergence(reference, logits_of(truth.model, batch), batch).mean() > HARMFUL


@every_model
def test_nodes_of_a_key_vary_and_so_do_many_distractors_that_write_to_the_stream(truth, generator):
    deviation = spread(truth, 32, generator=generator)
    assert min(deviation.of(node) for node in truth.nodes) > 0.1
    active = [node for node in outside(truth) if deviation.of(node) > 0.1]
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
def test_the_queries_of_a_key_are_left_out_where_they_are_constant(truth, generator):
    deviation = spread(truth, 32, generator=generator)
    for layer in range(truth.model.cfg.n_layers):
        for channel in range(truth.model.cfg.n_heads * truth.model.cfg.d_head):
            query, key = Node(layer, "q", channel), Node(layer, "k", channel)
            if key in truth.nodes and query not in truth.nodes:
                assert deviation.of(query) < 1e-3
            if query in truth.nodes:
                assert key in truth.nodes


@every_model
def test_the_edges_of_a_key_are_all_the_weights_between_its_nodes(truth):
    found = set()
    for layer, block in enumerate(truth.model.layers):
        for wire in WIRES:
            for source, target in wire.weight(block).nonzero().tolist():
                edge = (Node(layer, wire.source.name, source), Node(layer, wire.target.name, target))
                if truth.nodes.issuperset(edge):
                    found.add(edge)
    assert truth.edges == found


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


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(TaskError, match="did you mean 'quote'"):
        ground_truth("qoute")


def test_building_a_model_twice_gives_the_same_weights():
    one, other = ground_truth("mlp_gate"), ground_truth("mlp_gate")
    assert one.nodes == other.nodes and one.task.templates_sha256 == other.task.templates_sha256
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
