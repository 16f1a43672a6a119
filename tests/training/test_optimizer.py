"""The gradient's size, the learning rate's path, and what decays."""

from itertools import pairwise

import pytest
import torch

from sparse_interp.model.config import ModelConfig
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.training.optimizer import lr_schedule, make_optimizer, normalise_gradients_


def model(**changes) -> HookedSparseTransformer:
    shape = {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 8, "d_vocab": 20, "seed": 0}
    return HookedSparseTransformer(ModelConfig(**{**shape, **changes}))


def gradients(learner: HookedSparseTransformer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    for p in learner.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator) * 3e-4
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def rms(tensors) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).pow(2).mean().sqrt())


def test_gradients_are_divided_by_one_root_mean_square_over_all_of_them(generator):
    learner = model()
    before = gradients(learner, generator)
    size = normalise_gradients_(learner)
    assert size == pytest.approx(rms(before.values()), rel=1e-5)
    after = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    assert rms(after.values()) == pytest.approx(1, rel=1e-5)
    assert all(torch.allclose(after[name] * size, before[name]) for name in before)


def test_a_learnable_bigram_table_has_a_size_of_its_own(generator):
    learner = model(bigram_learnable=True)
    before = gradients(learner, generator)
    learner.bigram_table.grad.mul_(1000)
    size = normalise_gradients_(learner)
    assert size == pytest.approx(rms(g for name, g in before.items() if name != "bigram_table"), rel=1e-5)
    assert rms([learner.bigram_table.grad]) == pytest.approx(1, rel=1e-5)


def test_gradients_that_are_all_zero_stay_zero():
    learner = model()
    for p in learner.parameters():
        p.grad = torch.zeros_like(p)
    assert normalise_gradients_(learner) == 0
    assert all(not p.grad.any() for p in learner.parameters())


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing():
    rates = [lr_schedule(step, n_steps=100, warmup_frac=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1) and rates[10] == pytest.approx(1)
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] == pytest.approx(1 / 90)


def test_matrices_decay_and_biases_gains_and_sinks_do_not():
    learner = model()
    groups = make_optimizer(learner, lr=0.1, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in learner.named_parameters():
        assert decay_of[id(p)] == (0.1 if name.split(".")[-1].startswith("W_") else 0.0), name
