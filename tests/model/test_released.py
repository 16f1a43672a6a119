"""Published models compute here what they compute where they come from, or are refused with what stands against it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.released import HOOKS, hook_of, read_released, released_form, sinusoid_table
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


def exactly_agree(model, run, tokens):
    """In float64 only the order of additions differs."""
    logits = model(torch.from_numpy(tokens)).detach().numpy()
    assert np.abs(logits - run.logits).max() < 1e-10 * max(1.0, np.abs(run.logits).max())


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
    folder = write(tmp_path / "model", config, weights, form)
    model = load(folder, fold_ln_final=seed % 3 > 0)
    cut = [] if config.get("residual_activation_type") == "relu" else released_numpy.cut_hooks(config)
    agree(model, run, tokens, cut)
    exactly_agree(load(folder, dtype="float64"), run, tokens)
    assert model.load_report.form == ("circuitgpt" if form.startswith("hub") else "circuit_sparsity")
    assert not model.training and model.cfg.device == "cpu" and model.cfg.default_prepend_bos is False


@pytest.mark.parametrize("seed", range(100, 116))
def test_holding_channels_of_a_random_model_agrees_with_the_rules(seed, released_numpy, tmp_path):
    config, weights, tokens, run = released_numpy.random_release(seed)
    model = load(write(tmp_path / "model", config, weights))
    rng = np.random.default_rng(seed)
    while True:
        name = rng.choice(list(run.hooks))
        size = run.hooks[name].shape[-1]
        channels, value = rng.choice(size, max(1, size // 2), replace=False), rng.normal()
        held = released_numpy.Run(config, weights, tokens, held={name: (channels, value)})
        if held.gap > 3e-4:
            break

    def hold(activation, hook):
        flat = activation.flatten(2).clone()
        flat[:, :, channels] = value
        return flat.view_as(activation)

    hook = hook_of(name, model.cfg.n_layers)
    logits = model.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=[(hook, hold)]).detach().numpy()
    assert np.abs(logits - held.logits).max() < LOGITS * max(1.0, np.abs(held.logits).max() / 10), name


@pytest.mark.parametrize("seed", range(24))
def test_a_random_model_of_the_second_family_agrees_with_its_rules(seed, released_numpy, tmp_path):
    config, weights, tokens, run = released_numpy.random_second(seed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = ("pytorch_model.bin", "sparse_model.bin", "model.safetensors")[seed % 3]
    (save_file if name.endswith("safetensors") else torch.save)(tensors_of(weights), tmp_path / name)
    model = load(tmp_path)
    agree(model, run, tokens)
    exactly_agree(load(tmp_path, dtype="float64"), run, tokens)
    assert model.load_report.form == "sparse_pretrain" and model.cfg.afrac_min == 1
    assert model.cfg.tokenizer_name == "SimpleStories/SimpleStories-1.25M"


# -- names, shapes and what is allowed --------------------------------------------------------------------------------


@pytest.fixture
def release(released_numpy):
    """`release(**changes)`: configuration and weights of a small released model, changed or not."""

    def make(**changes):
        config = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "d_head": 3, "d_model": 6, "d_mlp": 9}
        config |= {"rms_norm": True, "tied_unembed": False, "sink": True, "enable_bigram_table": True} | changes
        return config, released_numpy.random_weights(config, np.random.default_rng(0))

    return make


@pytest.mark.parametrize("form", ["model.safetensors", "final_model.pt", "hub"])
def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named(release, tmp_path, form):
    config, weights = release()
    del weights["transformer.h.1.mlp.c_fc.bias"]
    weights["surplus"] = weights["final_logits_bias"]
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"][:5]
    with pytest.raises(CheckpointError) as refused:
        load(write(tmp_path / "model", config, weights, form))
    said = str(refused.value)
    assert "missing transformer.h.1.mlp.c_fc.bias; unexpected surplus" in said
    assert "transformer.ln_f.weight has shape [5] and not [6]" in said


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"enable_bigram_table": False}, "unexpected bigram_table"),
        ({"sink": False}, "unexpected transformer.h.0.attn.attn_imp.sink_logit"),
        ({"bias": False}, "unexpected transformer.h.0.attn.c_attn.bias"),
        ({"rms_norm": False}, "missing transformer.h.0.ln_1.bias"),
        ({"d_pos_emb": 3}, "missing transformer.h.0.ln_p1.weight"),
        ({"tied_unembed": True}, "differ"),
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(release, tmp_path, changes, key):
    config, weights = release()
    with pytest.raises(CheckpointError, match=key):
        load(write(tmp_path / "model", config | changes, weights))


def test_an_old_file_without_a_bias_of_the_logits_has_a_zero_one(release, tmp_path):
    config, weights = release()
    del weights["final_logits_bias"]
    model = load(write(tmp_path / "model", config, weights))
    assert not model.b_U.any() and "it is zero" in model.load_report.assumed["final_logits_bias"]
    assert "unembed.b_U" not in set(model.load_report.frame["tensor"])


@pytest.mark.parametrize("kept", ["transformer.wte.weight", "lm_head.weight", "both"])
def test_a_tied_matrix_may_be_stored_under_either_name_or_both(release, tmp_path, kept):
    config, weights = release(tied_unembed=True)
    stored = {
        n: w for n, w in weights.items() if kept == "both" or n == kept or ("wte" not in n and "lm_head" not in n)
    }
    whole = load(write(tmp_path / "whole", config, weights), fold_ln_final=False)
    model = load(write(tmp_path / "model", config, stored), fold_ln_final=False)
    assert weights_sha256(model) == weights_sha256(whole) and model.cfg.tie_unembed
    assert any("tied" in why for why in model.load_report.assumed.values()) == (kept != "both")
    assert model.load_report.n_entries == sum(w.size for name, w in weights.items() if name != "lm_head.weight")


def test_stored_attention_masks_are_left_out_and_named(release, tmp_path):
    config, weights = release(flash=False)
    model = load(write(tmp_path / "model", config, weights))
    assert "no weight" in model.load_report.ignored["transformer.h.1.attn.bias"]


def test_a_table_of_positions_that_is_not_stored_is_the_one_it_began_with(release, released_numpy, tmp_path):
    config, weights = release(d_pos_emb=5, sinusoidal_cat_pos_emb=True)
    del weights["transformer.wpe.weight"]
    model = load(write(tmp_path / "model", config, weights))
    assert np.abs(model.W_pos.detach().numpy() - released_numpy.sinusoids(8, 5)).max() < 1e-6
    with pytest.raises(CheckpointError, match=r"missing transformer\.wpe\.weight"):
        load(write(tmp_path / "other", config | {"sinusoidal_cat_pos_emb": False}, weights))


def test_more_layers_than_the_file_has_tensors_are_refused_at_once(release, tmp_path):
    config, weights = release()
    with pytest.raises(CheckpointError, match="too few for the 1000000000000 layers"):
        load(write(tmp_path / "model", config | {"n_layer": 10**12}, weights))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_weights_of_any_one_precision_are_read_and_of_two_are_refused(release, tmp_path, dtype):
    config, weights = release()
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(weights).items()}
    folder = write(tmp_path / "model", config, weights)
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).cfg.dtype == getattr(torch, dtype)
    assert load(folder, dtype="float32").cfg.dtype == torch.float32
    tensors["lm_head.weight"] = tensors["lm_head.weight"].int()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as I32"):
        load(folder)


def test_entries_that_are_not_finite_are_counted_and_refused(release, tmp_path):
    config, weights = release()
    weights["bigram_table"][3, :2] = np.nan, np.inf
    with pytest.raises(CheckpointError, match="2 of the 121 entries of bigram_table are NaN or infinite"):
        load(write(tmp_path / "model", config, weights))


def test_a_folder_without_weights_says_which_files_could_hold_them(release, tmp_path):
    config, weights = release()
    folder = write(tmp_path / "model", config, weights)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* nor final_model\.pt"):
        load(folder)


def test_of_two_files_with_weights_one_is_read_and_the_other_named(release, tmp_path):
    config, weights = release()
    write(tmp_path, config, weights)
    write(tmp_path, config, {"other": weights["lm_head.weight"]}, "final_model.pt")
    report = load(tmp_path).load_report
    assert "tensors" in report.read["model.safetensors"] and "not read" in report.ignored["final_model.pt"]


def test_another_folder_is_of_no_published_form(tmp_path):
    assert released_form(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert released_form(tmp_path) is None
    with pytest.raises(CheckpointError, match="no model in a published form: circuit_sparsity, circuitgpt"):
        read_released(tmp_path)


def test_the_gain_of_the_last_norm_is_folded_unless_told_otherwise(release, tmp_path):
    config, weights = release(rms_norm=False)
    folder, gain = write(tmp_path, config, weights), torch.from_numpy(weights["transformer.ln_f.weight"])
    folded, whole = load(folder), load(folder, fold_ln_final=False)
    assert torch.equal(folded.ln_final.w, torch.ones(6)) and not folded.ln_final.b.any()
    assert torch.equal(whole.ln_final.w, gain) and whole.ln_final.b.any()
    assert torch.equal(folded.W_U, gain[:, None] * whole.W_U)
    assert "b_U" in folded.load_report.folded["ln_final"] and not whole.load_report.folded


# -- what is left behind, and what is never run -----------------------------------------------------------------------


def test_an_archive_is_converted_once_in_the_cache_and_its_folder_left_alone(release, tmp_path, cache):
    config, weights = release()
    folder = write(tmp_path / "model", config, weights, "final_model.pt")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    first, second = load(folder), load(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (kept,) = (cache / "converted").iterdir()
    assert str(kept) in first.load_report.read["final_model.pt"] == second.load_report.read["final_model.pt"]
    assert weights_sha256(first) == weights_sha256(second)


def test_a_checkpoint_that_was_replaced_is_read_anew(release, tmp_path):
    config, weights = release()
    folder = write(tmp_path / "model", config, weights, "final_model.pt")
    before = load(folder)
    weights["final_logits_bias"][2] += 1
    write(folder, config, weights, "final_model.pt")
    assert (load(folder).b_U - before.b_U)[2].item() == pytest.approx(1)


@pytest.mark.parametrize("changes", [{}, {"n_head": 1, "d_head": 1, "d_model": 1, "d_mlp": 1, "d_pos_emb": 1}], ids=str)
def test_no_weight_lies_in_the_file_that_it_came_from(release, tmp_path, changes):
    folder = write(tmp_path / "model", *release(**changes))
    model = load(folder)
    before = weights_sha256(model)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert weights_sha256(model) == before


def test_code_beside_the_weights_is_never_run(release, tmp_path):
    config, weights = release()
    write(tmp_path, config, weights, "hub")
    for name in ("modeling_circuitgpt.py", "config.py", "gpt.py"):
        (tmp_path / name).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    said = json.loads((tmp_path / "config.json").read_text())
    said["auto_map"] = {"AutoModelForCausalLM": "modeling_circuitgpt.CircuitGPTForCausalLM", "AutoConfig": "config.C"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert load(tmp_path).load_report.form == "circuitgpt" and not (tmp_path / "ran").exists()


def test_a_tokenizer_is_found_beside_the_weights_and_where_the_store_has_it(release, tokenizer_files, tmp_path, cache):
    config, weights = release(vocab_size=400)
    folder = write(tmp_path / "store" / "models" / "m", config, weights)
    assert load(folder).tokenizer is None
    assert "tinypython_2k can be given" in load(folder).load_report.assumed["tokenizer"]
    tokenizer_files(tmp_path / "store" / "tinypython", 400)
    model = load(folder)
    assert len(model.tokenizer) == 400 and "400 ids" in model.load_report.read["tokenizer"]
    assert Path(model.tokenizer.name_or_path).parent == cache / "converted"
    tokenizer_files(folder, 500)
    assert (
        load(folder).tokenizer is None
        and "500 ids, and the model only 400" in load(folder).load_report.ignored["tokenizer"]
    )


@pytest.mark.parametrize("form", ["model.safetensors", "sparse_pretrain"])
def test_a_released_model_is_saved_as_ours_and_comes_back_as_it_was(release, released_numpy, tmp_path, form):
    if form == "sparse_pretrain":
        config, weights, *_ = released_numpy.random_second(3)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors_of(weights), tmp_path / "model.safetensors")
        model = load(tmp_path)
    else:
        model = load(write(tmp_path, *release(tied_unembed=True, d_pos_emb=2, pfrac=0.5, afrac=0.3)))
    back = load(model.save(tmp_path / "ours"))
    assert weights_sha256(back) == weights_sha256(model) and back.cfg == model.cfg
    assert back.load_report.form == "sparse_interp" and not back.load_report.folded


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_a_hook_that_the_released_code_lacks_is_refused_with_those_that_it_has():
    assert hook_of("final_resid", 3) == "blocks.2.hook_resid_post"
    for name in ("0.attn.out", "3.attn.act_in", "-1.attn.act_in", "attn.act_in"):
        with pytest.raises(ConfigError, match=r"is no hook of a released model of 3 layers; .*0\.attn\.act_in"):
            hook_of(name, 3)


def test_every_hook_of_the_released_code_is_a_hook_of_the_model(release, tmp_path):
    model = load(write(tmp_path / "model", *release()))
    assert {place.format(layer=1) for place in HOOKS.values()} <= model.hook_dict.keys()
