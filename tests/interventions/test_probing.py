"""Hard-concrete gates: their law, what they learn, and that a bridge learns what our model does."""

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.probing import hard_concrete, open_probability, probe_nodes


def test_gates_are_shut_for_sure_as_often_as_their_parameter_says(generator):
    a = torch.tensor([-3.0, -1.0, 0.0, 2.0]).double()
    u = torch.rand(200_000, generator=generator).double()
    drawn = torch.stack([hard_concrete(x.expand(len(u)), u) for x in a])
    assert drawn.min() == 0 and drawn.max() == 1
    assert torch.allclose((drawn > 0).double().mean(1), open_probability(a), atol=5e-3)
    assert hard_concrete(torch.zeros(1), torch.tensor([0.5])).item() == pytest.approx(0.5)


def probed(model, truth, price, n_steps):
    generator = torch.Generator().manual_seed(0)
    means = mean_activations(model, truth.blocks(16, generator=generator))
    pairs = truth.task.batch(24, generator=generator)
    return probe_nodes(model, pairs, means, price=price, n_steps=n_steps, generator=generator)


def test_a_price_shuts_what_is_not_needed_and_nothing_else():
    truth = ground_truth("attention_copy")
    gates = probed(truth.model, truth, 3e-3, 120)
    inside = [gates.of(node) for node in truth.nodes]
    outside = [gates.of(node) for node in all_nodes(truth.model.cfg) if node not in truth.nodes]
    assert min(inside) > 0.9 and max(outside) < 0.5
    free = probed(truth.model, truth, 0.0, 5)
    assert min(free.of(node) for node in all_nodes(truth.model.cfg)) > 0.85
    assert all(p.requires_grad and p.grad is None for p in truth.model.parameters() if p.ndim)


def test_a_bridge_learns_the_gates_of_our_model_with_the_same_weights(truth, dense_truth):
    ours, bridge = (probed(model, truth, 0.01, 4) for model in dense_truth)
    for place, values in ours.values.items():
        assert torch.allclose(bridge[place].cpu(), values, atol=1e-3), place
    assert any(bool((values - 0.9).abs().max() > 1e-3) for values in ours.values.values())


def test_no_steps_and_a_negative_price_are_refused(truth):
    with pytest.raises(ConfigError, match="n_steps=0, price=0.1: expected at least 1 step"):
        probed(truth.model, truth, 0.1, 0)
    with pytest.raises(ConfigError, match="a price of at least 0"):
        probed(truth.model, truth, -0.1, 1)
