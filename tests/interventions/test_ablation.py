"""What an ablation means, in sentences."""

import pytest
import torch

from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node, flat, masks, places

NODES = (Node(0, "neuron", 1), Node(1, "v", 2))


@pytest.fixture
def means(plain_model, tokens):
    return mean_activations(plain_model, tokens, batch_size=1)


def test_means_are_those_of_all_positions_at_once(plain_model, tokens, means):
    _, cache = plain_model.run_with_cache(tokens)
    for place in places(plain_model.cfg):
        torch.testing.assert_close(means[place], flat(cache[place.hook]).mean((0, 1)))


def test_ablating_nothing_changes_nothing(plain_model, tokens, means):
    before = plain_model(tokens)
    with ablate(plain_model, (), means):
        assert torch.equal(plain_model(tokens), before)


def test_an_ablated_node_holds_its_mean_everywhere_and_others_of_its_place_are_as_before(plain_model, tokens, means):
    _, before = plain_model.run_with_cache(tokens)
    with ablate(plain_model, NODES[:1], means):
        _, cache = plain_model.run_with_cache(tokens)
    found, hook = cache["blocks.0.mlp.hook_post"], "blocks.0.mlp.hook_post"
    assert torch.equal(found[..., 1], torch.full_like(found[..., 1], means.of(NODES[0])))
    others = [c for c in range(found.shape[-1]) if c != 1]
    assert torch.equal(found[..., others], before[hook][..., others])


def test_the_model_is_restored_even_when_the_block_raises_and_ablations_nest(plain_model, tokens, means):
    before = plain_model(tokens)
    with pytest.raises(RuntimeError), ablate(plain_model, NODES, means):
        raise RuntimeError
    assert torch.equal(plain_model(tokens), before)
    with ablate(plain_model, NODES, means):
        together = plain_model(tokens)
    with ablate(plain_model, NODES[:1], means), ablate(plain_model, NODES[1:], means):
        assert torch.equal(plain_model(tokens), together)
    assert not torch.equal(together, before)


def test_a_node_that_the_model_lacks_is_refused(plain_model, means):
    with pytest.raises(CircuitError, match="exists in layers"), ablate(plain_model, [Node(9, "q", 0)], means):
        pass
    assert sum(int(m.sum()) for m in masks(NODES, plain_model.cfg).values()) == len(NODES)
