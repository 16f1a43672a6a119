"""Baselines are the means and values that a loop over single prompts, without padding, would take."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Ablation
from sparse_interp.interventions.baselines import (
    Counterfactual,
    Resample,
    mean_activations,
    position_means,
    task_means,
    values_on,
    zero_values,
)
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import SITES, flat, places


def held(model, prompt):
    """What nodes hold on one prompt [1 pos]: place -> [pos width], recorded by hooks written here."""
    model, seen = hooked(model), {}
    keep = lambda activation, hook, place: seen.update({place: flat(activation)[0].double()})
    hooks = [(place.hook, partial(keep, place=place)) for place in places(model.cfg, SITES)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(prompt)
    return seen


def test_means_are_those_of_all_positions_at_once(plain_model, tokens):
    means = mean_activations(plain_model, tokens, batch_size=1)
    _, cache = plain_model.run_with_cache(tokens)
    for place in places(plain_model.cfg):
        torch.testing.assert_close(means[place], flat(cache[place.hook]).mean((0, 1)))


def test_means_over_a_task_are_those_of_every_real_token_of_both_prompts(any_kind, pairs, alone):
    means = task_means(any_kind, pairs)
    runs = [held(any_kind, side) for pair in alone for side in (pair.clean, pair.corrupt)]
    for place in places(hooked(any_kind).cfg):
        expected = torch.cat([run[place] for run in runs]).mean(0)
        torch.testing.assert_close(means[place].double(), expected, atol=1e-6, rtol=1e-5)


def test_means_per_position_are_those_of_the_prompts_that_reach_it_and_later_ones_the_mean_over_all(
    any_kind, pairs, alone
):
    means = position_means(any_kind, pairs)
    runs = [held(any_kind, side) for pair in alone for side in (pair.clean, pair.corrupt)]
    longer = torch.ones(2, 9, dtype=torch.long)
    values = means.on(any_kind, replace(pairs.rows(slice(2)), clean=longer, corrupt=longer))
    for place in places(hooked(any_kind).cfg):
        there = [torch.stack([run[place][pos] for run in runs if len(run[place]) > pos]).mean(0) for pos in range(7)]
        expected = torch.stack([*there, *[torch.cat([run[place] for run in runs]).mean(0)] * 2])
        torch.testing.assert_close(values[place][0].double(), expected, atol=1e-6, rtol=1e-5)
    assert "per position" in means.kind


def test_counterfactual_values_are_the_twins(any_kind, pairs, alone):
    values = Counterfactual().on(any_kind, pairs)
    for row, pair in enumerate(alone):
        run, n = held(any_kind, pair.corrupt), pair.corrupt.shape[1]
        for place, of_prompts in values.items():
            torch.testing.assert_close(of_prompts[row, :n].double(), run[place], atol=1e-5, rtol=1e-5)


def test_where_a_source_ends_its_last_value_stands_for_the_rest(plain_model, pairs, alone):
    values = values_on(plain_model, pairs, 9)
    for row, pair in enumerate(alone):
        for place, expected in held(plain_model, pair.clean).items():
            rest = values[place][row, len(expected) :].double()
            torch.testing.assert_close(rest, expected[-1].expand_as(rest), atol=1e-5, rtol=1e-5)


def test_a_prompt_meets_the_same_other_prompt_in_every_batch_and_never_itself(plain_model, pairs):
    order = torch.tensor([2, 0, 1])
    met = set()
    for seed in range(20):
        baseline = Resample(pairs, seed)
        prompts = [tuple(prompt[:n].tolist()) for prompt, n in zip(pairs.clean, pairs.lengths.tolist(), strict=True)]
        drawn = [baseline._drawn(prompt, [(1, 2), prompt, (3,)]) for prompt in prompts]
        assert 1 not in drawn
        met |= set(drawn)
    assert met == {0, 2}
    together, moved = baseline.on(plain_model, pairs), baseline.on(plain_model, pairs.rows(order))
    for place in together:
        torch.testing.assert_close(together[place][order], moved[place])
    with pytest.raises(CircuitError, match="resampling needs a prompt other than .*pool of 1 has none"):
        Resample(pairs.rows(slice(1)), 0).on(plain_model, pairs)


def test_resampled_values_are_those_of_a_prompt_of_the_pool(plain_model, pairs, alone):
    values = Resample(pairs, 4).on(plain_model, pairs)
    runs = [held(plain_model, pair.clean) for pair in alone]
    place = places(plain_model.cfg)[6]
    for row, n in enumerate(pairs.lengths.tolist()):
        shared = [min(n, len(run[place])) for run in runs]
        same = [
            torch.allclose(values[place][row, :k].double(), run[place][:k], atol=1e-5)
            for run, k in zip(runs, shared, strict=True)
        ]
        assert sum(same) == 1 and not same[row]


def test_a_seed_of_resampling_comes_from_the_generator(pairs):
    seeds = {Ablation.resample(pairs, generator=torch.Generator().manual_seed(s)).baseline.seed for s in (0, 0, 1)}
    assert len(seeds) == 2


def test_means_of_another_model_are_refused(plain_model, make_model, pairs):
    with pytest.raises(CircuitError, match="belong to another model"):
        position_means(make_model(d_mlp=16), pairs).on(plain_model, pairs)
    with pytest.raises(CircuitError, match="there are none"):
        task_means(plain_model, pairs.rows(slice(0)))
    with pytest.raises(CircuitError, match="at least one block"):
        mean_activations(plain_model, torch.zeros(0, 4, dtype=torch.long))
    assert zero_values(plain_model).kind == "zero"
