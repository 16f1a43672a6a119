"""Named runs, their controls, and runs as JSON."""

import json
from dataclasses import replace

import pytest

from sparse_interp.errors import ConfigError
from sparse_interp.training.recipes import RECIPES, RunConfig, recipe, replace_model


def test_a_control_differs_from_its_recipe_in_the_density_alone():
    run, control = recipe("stdlib-small"), recipe("stdlib-small-control")
    named = replace(control, name=run.name, model=replace_model(control.model, model_name=run.model.model_name))
    assert named.differences(run) == ["model.density: 1.0, not 0.05"]


def test_the_dense_twin_is_dense_in_weights_and_activations():
    twin = recipe("stdlib-small-dense")
    assert twin.model.density == 1.0 and twin.model.afrac is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_comes_back_from_its_json(name):
    run = recipe(name)
    assert RunConfig.from_json(run.to_json()).differences(run) == []
    assert recipe(name).name == name


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(ConfigError, match="no recipe is called 'stdlib-smal'; the nearest are stdlib-small"):
        recipe("stdlib-smal")


def test_an_unknown_field_offers_the_nearest():
    data = json.loads(recipe("tiny").to_json())
    with pytest.raises(ConfigError, match="unknown field 'batchsize' in a run config. Did you mean 'batch_size'?"):
        RunConfig.from_json(json.dumps({**data, "batchsize": 3}))
    with pytest.raises(ConfigError, match="is not JSON"):
        RunConfig.from_json("{")
    with pytest.raises(ConfigError, match="incomplete"):
        RunConfig.from_json('{"name": "x"}')


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_tokens": 100}, "n_tokens=100 is less than one step, which reads batch_size * n_ctx = 32 * 64 = 2048"),
        ({"lr": 0.0}, "lr=0.0, and it must be above 0"),
        ({"batch_size": 0}, "batch_size=0, and a run needs at least 1"),
        ({"precision": "fp8"}, "choose 'bf16' or 'fp32'"),
        ({"density_schedule": "cosine"}, "choose 'exponential' or 'linear'"),
        ({"density_begin_frac": 0.6}, "density falls from 0.6 to 0.5"),
        ({"betas": (0.9, 1.0)}, "two rates in [0, 1)"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError) as refused:
        replace(recipe("tiny"), **changes)
    assert words in str(refused.value)


def test_differences_name_the_field_and_both_values():
    run = recipe("tiny")
    other = replace(run, seed=3, model=replace_model(run.model, d_mlp=64))
    assert run.differences(other) == ["seed: 0, not 3", "model.d_mlp: 128, not 64"]
