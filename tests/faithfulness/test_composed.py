"""Two models in one: answers that need both, or either."""

import pytest
import torch

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.composed import NO, YES, copied, joined
from sparse_interp.faithfulness.ground_truth import (
    HARMFUL,
    HARMLESS,
    effects_alone,
    ground_truth,
    key_effects,
    logits_of,
    nodes_outside,
)
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.tasks.task import is_argmax, kl_divergence


@pytest.fixture(scope="module")
def twice():
    return copied(ground_truth("quote"), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["joint", "twice"])
def truth(request):
    return request.getfixturevalue(request.param)


def test_a_composed_model_is_always_right_and_says_what_it_is(truth, generator):
    assert truth.task.name == truth.name in ("distractor and two_copies", "quote x 2")
    for split in truth.task.splits:
        batch = truth.task.batch(50, split, generator=generator).both_sides()
        assert is_argmax(logits_of(truth.model, batch), batch).min() == 1


def test_its_keys_are_keys_and_nodes_matter_alone_but_for_those_that_something_makes_good_for(truth, generator):
    means = mean_activations(truth.model, truth.blocks(48, generator=generator), batch_size=128)
    batch = truth.task.batch(8, "test", generator=generator).both_sides()
    for key in truth.keys:
        kl = key_effects(truth, key, batch, means)
        assert kl.whole < HARMLESS and min(kl.without.values()) > HARMFUL
    alone = effects_alone(truth, batch, means)
    in_keys = frozenset.union(*(key.nodes for key in truth.keys))
    assert {node for node, nats in alone.items() if nats > HARMFUL} == in_keys - truth.repaired
    assert max(nats for node, nats in alone.items() if node not in in_keys) < HARMLESS


def test_joined_models_agree_only_where_both_do(joint, generator):
    frame = joint.task.batch(40, generator=generator).both_sides().to_frame(joint.task.tokenizer)
    plural, come = frame.clean.str.contains("these"), frame.clean.str.contains(" come ")
    assert set(frame.answer.str.strip()) == {YES, NO}
    assert ((plural & come) == (frame.answer.str.strip() == YES)).all()
    assert len(joint.keys) == 2  # one through either copy of the second part


def test_of_two_copies_each_is_enough_and_neither_is_none(twice, generator):
    truth = twice
    first, second = truth.keys
    assert first.nodes & second.nodes and len(first.nodes - second.nodes) == len(second.nodes - first.nodes) > 5
    means = mean_activations(truth.model, truth.blocks(32, generator=generator))
    batch = truth.task.batch(16, generator=generator)
    reference = logits_of(truth.model, batch)
    outside = nodes_outside(truth, first)
    for held, agrees in ((outside, True), (sorted(first.nodes - second.nodes), True), (truth.repaired, False)):
        with ablate(truth.model, held, means):
            kl = kl_divergence(reference, logits_of(truth.model, batch), batch).mean()
        assert kl < HARMLESS if agrees else kl > HARMFUL


def test_of_three_copies_each_is_enough_and_none_is_not(generator):
    truth = copied(ground_truth("bracket_depth"), 3, generator=generator)
    assert len(truth.keys) == 3 and len(set(truth.channels)) == len(truth.channels)
    means = mean_activations(truth.model, truth.blocks(16, generator=generator))
    batch = truth.task.batch(8, "test", generator=generator)
    reference, every = logits_of(truth.model, batch), frozenset.intersection(*(key.nodes for key in truth.keys))
    two = frozenset.union(*(key.nodes for key in truth.keys[:2])) - every
    for held, agrees in ((two, True), (truth.keys[2].nodes - every, True), (truth.repaired, False)):
        with ablate(truth.model, held, means):
            kl = kl_divergence(reference, logits_of(truth.model, batch), batch).mean()
        assert kl < HARMLESS if agrees else kl > HARMFUL
    with pytest.raises(TaskError, match="n=1 copies"):
        copied(ground_truth("bracket_depth"), 1, generator=generator)


def test_models_that_cannot_be_composed_are_refused_with_the_reason(generator):
    with pytest.raises(TaskError, match="two_hop cannot stand beside another model.*no norm"):
        copied(ground_truth("two_hop"), generator=generator)
    with pytest.raises(TaskError, match="backup tells its answers apart by 2 channels"):
        copied(ground_truth("backup"), generator=generator)
    with pytest.raises(TaskError, match="is right on .* of train: a part does not do its own"):
        joined(ground_truth("bracket_depth"), ground_truth("quote"), generator=generator)
