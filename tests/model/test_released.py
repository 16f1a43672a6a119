"""Published models compute here what they compute where they come from, or are refused with what stands against it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_interp.model.released import hook_of, sinusoid_table
from sparse_interp.model.transformer import load

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "openai"
GOLDEN = sorted(path.parent for path in FIXTURES.glob("*variants/**/beeg_config.json"))
here = pytest.mark.skipif(not GOLDEN, reason=f"the golden numbers are not in {FIXTURES}")

LOGITS, ACTIVATIONS = 3e-5, 5e-5
"""What float32 may differ by from the reference."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Conversions go to a folder of the test's own."""
    monkeypatch.setenv("SPARSE_INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors_of(weights):
    return {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}


def write(folder, config, weights, form="model.safetensors"):
    """A folder as one finds it published: in the store's form, or on the hub in one file or in two."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(weights)
    if form.startswith("hub"):
        config = config | {"model_type": "circuitgpt", "architectures": ["CircuitGPTForCausalLM"], "auto_map": {}}
        tensors = {f"circuit_model.{name}": tensor for name, tensor in tensors.items()}
    (folder / ("config.json" if form.startswith("hub") else "beeg_config.json")).write_text(json.dumps(config))
    if form == "hub, in parts":
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        place = {name: names[i % 2] for i, name in enumerate(tensors)}
        for file in names:
            save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    elif form == "final_model.pt":
        with (folder / form).open("wb") as file:
            torch.save(tensors, file)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def agree(model, run, tokens, cut=()):
    """Logits and every hook of the released code are the reference's; what AbsTopK makes zero is zero."""
    logits, seen = model.run_with_cache(torch.from_numpy(tokens))
    scale = max(1.0, np.abs(run.logits).max() / 10)
    assert np.abs(logits.detach().numpy() - run.logits).max() < LOGITS * scale
    for name, expected in run.hooks.items():
        found = seen[hook_of(name, model.cfg.n_layers)].flatten(2).detach().numpy()
        assert np.abs(found - expected).max() < ACTIVATIONS * max(1.0, np.abs(expected).max() / 10), name
        if name in cut:
            assert np.array_equal(found == 0, expected == 0), name


# -- the golden numbers -----------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_a_golden_model_gives_its_golden_numbers(folder, released_numpy):
    model, golden = load(folder), load_file(folder / "io.safetensors")
    logits, seen = model.run_with_cache(golden["tokens"])
    assert (logits - golden["logits"]).abs().max() < LOGITS
    assert (model(golden["tokens_full"]) - golden["logits_full"]).abs().max() < LOGITS
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), golden["targets"].flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)
    cut = released_numpy.cut_hooks(json.loads((folder / "beeg_config.json").read_text()))
    for name in [name.removeprefix("act.") for name in golden if name.startswith("act.")]:
        found, expected = seen[hook_of(name, model.cfg.n_layers)].flatten(2), golden[f"act.{name}"]
        assert (found - expected).abs().max() < ACTIVATIONS, name
        assert name not in cut or torch.equal(found == 0, expected == 0), name


@here
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_ablating_channels_of_a_golden_model_gives_its_golden_logits(folder):
    model, golden = load(folder), load_file(folder / "io.safetensors")

    def holding(channels, values):
        def hook(activation, hook):
            flat = activation.flatten(2).clone()
            flat[:, :, channels] = values[channels]
            return flat.view_as(activation)

        return hook

    names = [key[len("ablate.") : -len(".channels")] for key in golden if key.endswith(".channels")]
    held = {name: holding(golden[f"ablate.{name}.channels"], golden[f"ablate.{name}.values"]) for name in names}
    hooks = [(hook_of(name, model.cfg.n_layers), hook) for name, hook in held.items()]
    ablated = model.run_with_hooks(golden["tokens"], fwd_hooks=hooks)
    assert (ablated - golden["ablated_logits"]).abs().max() < LOGITS
    assert (ablated - golden["logits"]).abs().max() > 0.1


@here
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_the_reference_of_these_tests_gives_the_golden_numbers_too(folder, released_numpy):
    golden, archive = load_file(folder / "io.safetensors"), folder / "final_model.pt"
    weights = torch.load(archive, weights_only=True) if archive.exists() else load_file(folder / "model.safetensors")
    config = json.loads((folder / "beeg_config.json").read_text())
    run = released_numpy.Run(config, weights, golden["tokens"].numpy())
    assert np.abs(run.logits - golden["logits"].numpy()).max() < 1.5e-5
    for name, found in run.hooks.items():
        assert np.abs(found - golden[f"act.{name}"].numpy()).max() < 1.5e-5, name


@here
def test_the_table_of_sinusoids_is_the_golden_one():
    extras = FIXTURES / "released_form_variants" / "extras"
    golden, kept = load_file(extras / "extras.safetensors"), json.loads((extras / "extras.json").read_text())
    for n_ctx, width in kept["sinusoid"]:
        expected = golden[f"sinusoid.{n_ctx}.{width}"]
        assert (sinusoid_table(n_ctx, width)[: len(expected)] - expected).abs().max() < 1e-5


# -- models of the same kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_a_random_model_of_the_released_kind_agrees_with_the_rules(seed, released_numpy, tmp_path):
    config, weights, tokens, run = released_numpy.random_release(seed)
    if seed % 5 == 0:
        weights.pop("final_logits_bias")
        run = released_numpy.Run(config, weights, tokens)
    form = ("model.safetensors", "final_model.pt", "hub", "hub, in parts")[seed % 4]
    model = load(write(tmp_path / "model", config, weights, form), fold_ln_final=seed % 3 > 0)
    cut = [] if config.get("residual_activation_type") == "relu" else released_numpy.cut_hooks(config)
    agree(model, run, tokens, cut)
    assert model.load_report.form == ("circuitgpt" if form.startswith("hub") else "circuit_sparsity")
    assert not model.training and model.cfg.device == "cpu" and model.cfg.default_prepend_bos is False


@pytest.mark.parametrize("seed", range(24))
def test_a_random_model_of_the_second_family_agrees_with_its_rules(seed, released_numpy, tmp_path):
    config, weights, tokens, run = released_numpy.random_second(seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = ("pytorch_model.bin", "sparse_model.bin", "model.safetensors")[seed % 3]
    (save_file if name.endswith("safetensors") else torch.save)(tensors_of(weights), tmp_path / name)
    model = load(tmp_path)
    agree(model, run, tokens)
    assert model.load_report.form == "sparse_pretrain" and model.cfg.afrac_min == 1
    assert model.cfg.tokenizer_name == "SimpleStories/SimpleStories-1.25M"
