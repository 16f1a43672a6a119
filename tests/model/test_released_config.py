"""A published configuration is taken at its word, with what it leaves out said, and what cannot be done refused."""

import json
import math

import pytest
import yaml

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.released_config import RECIPE, circuit_sparsity_config, sparse_pretrain_config

YOLO = {
    "block_size": 1024, "vocab_size": 2048, "n_layer": 8, "n_head": 128, "d_head": 16, "d_model": 2048, "dropout": 0.0,
    "bias": True, "ln_bias": True, "rms_norm": True, "residual_activation_type": "identity", "activation_type": "gelu",
    "afrac": 0.25, "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q",
    "afrac_approx": False, "enable_sparse_kernels": False, "ignore_dw_grad": False, "debug_nans": False,
    "tied_unembed": False, "bigram_table_rank": None, "tokenizer_name": "tinypython_2k", "pfrac": 0.0625,
    "expansion_factor": 8, "expansion_factor_mlp": 8, "debug_exact_topk": True, "grad_checkpointing": True,
    "sparse_matmul_impl": "cuda", "d_mlp": 8192, "enable_bigram_table": True, "learnable_bigram_table": True,
    "d_pos_emb": 32, "flash": True, "sink": True, "rtopk": False, "n_embd": None,
}  # fmt: skip
"""The keys that the largest released model was published with."""

SECOND = {
    "model_config": {"n_layer": 2, "d_model": 128, "n_ctx": 512, "d_head": 16, "d_mlp": None, "vocab_size": 4096},
    "sparsity_config": {"enable_weight_sparsity": False, "target_l0_fraction": 1.0},
    "training_config": {"total_tokens": 7, "tokenizer_name": "SimpleStories/SimpleStories-1.25M"},
}


@pytest.fixture
def first(tmp_path):
    """`first(said)`: what is made of a `beeg_config.json`."""

    def translated(said):
        (tmp_path / "beeg_config.json").write_text(json.dumps(said))
        return circuit_sparsity_config(tmp_path / "beeg_config.json")

    return translated


@pytest.fixture
def second(tmp_path):
    """`second(said, recipe)`: what is made of the `config.json` of sparse_pretrain, and of a recipe beside it."""

    def translated(said, recipe=None):
        (tmp_path / "config.json").write_text(json.dumps(said))
        if recipe is not None:
            (tmp_path / RECIPE).write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        return sparse_pretrain_config(tmp_path / "config.json")

    return translated


def test_the_largest_released_model_has_the_shape_that_its_configuration_says(first):
    cfg = first(YOLO).cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model, cfg.d_mlp, cfg.d_vocab) == (
        8,
        128,
        16,
        2048,
        8192,
        2048,
    )
    assert (cfg.n_ctx, cfg.positions, cfg.d_pos_emb, cfg.norm, cfg.act_fn) == (1024, "concat", 32, "rms", "gelu")
    assert cfg.sink and cfg.bigram and cfg.bigram_learnable and cfg.bias and not cfg.tie_unembed
    assert cfg.afrac == 0.25 and set(cfg.afrac_sites) == {
        *("attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write")
    }
    assert cfg.eps == pytest.approx(1.1920929e-07) and cfg.density == 0.0625 / 64
    entries = sum(math.prod(shape) for shape in cfg.weight_shapes().values())
    assert entries == 419_122_688 + cfg.d_vocab  # as published, and the bias of the logits, which is a buffer there


def test_a_configuration_that_says_nothing_takes_the_published_defaults_and_says_which(first):
    found = first({"n_head": 4, "d_model": 24})
    cfg = found.cfg
    assert (cfg.n_layers, cfg.d_mlp, cfg.d_head, cfg.n_ctx, cfg.d_vocab) == (12, 96, 6, 1024, 50304)
    assert cfg.norm == "layer" and cfg.norm_bias and cfg.tie_unembed and not cfg.sink and not cfg.bigram
    assert cfg.afrac is None and set(cfg.afrac_sites) == {"attn_read", "attn_write", "mlp_read", "mlp_write"}
    assert "n_layer" in found.assumed and "True is what the published code takes" in found.assumed["tied_unembed"]
    assert "n_head" not in found.assumed and cfg.density == 1


def test_keys_without_effect_are_named_with_their_reason(first):
    ignored = first(YOLO | {"from_the_future": [1, 2]}).ignored
    assert set(ignored) == {
        *("dropout", "afrac_approx", "enable_sparse_kernels", "ignore_dw_grad", "debug_nans", "bigram_table_rank"),
        *("pfrac", "expansion_factor", "expansion_factor_mlp", "debug_exact_topk", "grad_checkpointing"),
        *("sparse_matmul_impl", "flash", "rtopk", "n_embd", "from_the_future"),
    }
    assert "[1, 2]" in ignored["from_the_future"] and "unknown" in ignored["from_the_future"]
    assert "training only" in ignored["dropout"] and "is off" in ignored["rtopk"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("afrac_approx", True),
        ("rtopk", True),
        ("bigram_table_rank", 16),
        ("use_tied_aux_matrix", True),
        ("scale_invariance", True),
        ("mup", True),
        ("unembed_rank", 8),
        ("enable_fp8_linear", True),
    ],
)
def test_a_key_that_would_make_it_another_function_is_refused_by_name_and_harmless_when_off(first, key, value):
    with pytest.raises(ConfigError, match=rf"{key} is {value}, and .* not published"):
        first(YOLO | {key: value})
    assert key in first(YOLO | {key: None}).ignored and key in first(YOLO | {key: False}).ignored


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": "8"}, "n_layer is '8', and should be a whole number"),
        ({"n_layer": True}, "n_layer is True, and should be a whole number"),
        ({"sink": 1}, "sink is 1, and should be true or false"),
        ({"afrac": "0.25"}, "afrac is '0.25', and should be a number or null"),
        ({"afrac": 1.5}, "afrac=1.5 is not a share"),
        ({"afrac_loctypes": ["attn_in"]}, "afrac_loctypes is \\['attn_in'\\], and should be a text"),
        ({"activation_type": "swish"}, "activation_type is 'swish'; known are gelu, relu"),
        ({"residual_activation_type": "gelu"}, "residual_activation_type is 'gelu'; known are identity, relu"),
        ({"d_pos_emb": 0}, "d_pos_emb is 0, with which the published code fails too"),
        ({"d_head": None, "n_head": 3}, "d_model=2048 does not split into n_head=3 heads"),
        ({"d_head": None, "n_head": 0}, "does not split into n_head=0 heads"),
        ({"n_mlp": 12}, "d_mlp is 8192 and n_mlp, its old name, 12"),
        ({"vocab_size": 0}, "d_vocab=0"),
    ],
    ids=str,
)
def test_a_value_that_describes_no_model_is_refused_by_name(first, changes, words):
    with pytest.raises(ConfigError, match=words):
        first(YOLO | changes)


def test_the_old_name_of_the_hidden_width_is_understood(first):
    old = {key: value for key, value in YOLO.items() if key != "d_mlp"}
    assert first(old | {"n_mlp": 100}).cfg.d_mlp == first(YOLO | {"d_mlp": None, "n_mlp": 100}).cfg.d_mlp == 100
    assert first(YOLO | {"n_mlp": None}).cfg.d_mlp == first(YOLO | {"n_mlp": 8192}).cfg.d_mlp == 8192


def test_a_place_after_a_space_or_misspelled_is_none_as_in_the_published_code(first):
    found = first(YOLO | {"afrac_loctypes": "attn_in, mlp_in,mlp_neurons,attn_v"})
    assert found.cfg.afrac_sites == ("attn_read", "v")
    assert {key for key in found.ignored if "loctypes" in key} == {
        "afrac_loctypes: ' mlp_in'",
        "afrac_loctypes: 'mlp_neurons'",
    }
    assert first(YOLO | {"afrac_loctypes": ""}).cfg.afrac_sites == ()


def test_the_sink_is_never_left_out_whatever_the_file_says_of_flash_attention(first):
    assert first(YOLO | {"flash": False}).cfg.sink


@pytest.mark.parametrize("damage", ["", "[]", '"text"', "{", '{"a": ' * 100_000, "\x00\xff", "1" * 5000])
def test_what_is_no_configuration_is_refused(first, tmp_path, damage):
    (tmp_path / "beeg_config.json").write_text(damage, encoding="latin-1")
    with pytest.raises(CheckpointError, match="beeg_config.json"):
        circuit_sparsity_config(tmp_path / "beeg_config.json")


# -- the second family ------------------------------------------------------------------------------------------------


def test_the_second_family_has_other_names_other_defaults_and_one_entry_kept_at_least(second):
    found = second(SECOND)
    cfg = found.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_mlp, cfg.n_ctx, cfg.positions) == (2, 8, 512, 512, "none")
    assert cfg.sink and cfg.bigram and cfg.norm == "rms" and (cfg.afrac, cfg.afrac_min) == (0.25, 1)
    assert len(cfg.afrac_sites) == 8 and "activation_sparsity_locations" in found.assumed
    assert "training only" in found.ignored["target_l0_fraction"] and "training_config" in found.ignored


def test_the_recipe_says_where_activations_are_cut_and_the_configuration_has_the_last_word(second):
    places = "attn_in,resid_pre,resid_mid"
    recipe = {"sparse_model": {"use_flash_attention": True}, "sparsity": {"activation_sparsity_locations": places}}
    found = second(SECOND, recipe)
    assert set(found.cfg.afrac_sites) == {"attn_read", "resid_pre", "resid_mid"}
    assert found.read[RECIPE] == "use_flash_attention, activation_sparsity_locations"
    sparsity = SECOND["sparsity_config"] | {"activation_sparsity_locations": "mlp_neuron"}
    assert second(SECOND | {"sparsity_config": sparsity}, recipe).cfg.afrac_sites == ("neuron",)


@pytest.mark.parametrize("recipe", ["a: [", "- 1", "model: 3", "!!python/object/apply:os.system ['true']"])
def test_a_damaged_recipe_is_refused_and_runs_nothing(second, recipe):
    with pytest.raises(CheckpointError, match=f"{RECIPE} cannot be read"):
        second(SECOND, recipe)


@pytest.mark.parametrize("part", ["model_config", "sparsity_config"])
def test_a_configuration_that_lacks_a_half_is_refused(second, part):
    with pytest.raises(CheckpointError, match=f"has no {part}, without which"):
        second({**SECOND, part: None})


def test_slow_attention_of_the_second_family_has_no_sink(second):
    model = SECOND["model_config"] | {"use_flash_attention": False}
    found = second(SECOND | {"model_config": model})
    assert not found.cfg.sink and "leaves sinks out" in found.ignored["use_attention_sinks"]


def test_a_vocabulary_that_was_never_set_is_refused(second):
    with pytest.raises(ConfigError, match="vocab_size is None"):
        second(SECOND | {"model_config": SECOND["model_config"] | {"vocab_size": None}})
