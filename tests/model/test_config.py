"""The config: what describes no model is refused with a reason, and what does survives JSON."""

import json

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.model.config import ModelConfig

SHAPE = {"d_model": 16, "d_head": 4, "n_layers": 2, "n_ctx": 8, "d_vocab": 20}


def test_left_out_fields_are_derived():
    cfg = ModelConfig(**SHAPE)
    assert (cfg.n_heads, cfg.d_mlp, cfg.d_vocab_out, cfg.device, cfg.d_read) == (4, 64, 20, "cpu", 16)
    assert (cfg.normalization_type, cfg.positional_embedding_type) == ("RMS", "standard")
    assert cfg.eps == torch.finfo(torch.float32).eps
    assert ModelConfig(**SHAPE, norm="layer").eps == 1e-5


def test_heads_need_not_fill_the_stream():
    cfg = ModelConfig(**SHAPE, n_heads=3)
    assert cfg.n_heads * cfg.d_head != cfg.d_model


def test_parameters_are_counted_over_the_six_matrices_of_a_block():
    assert ModelConfig(**SHAPE).n_params == 2 * (4 * 16 * 16 + 2 * 16 * 64)
    concat = ModelConfig(**SHAPE, positions="concat", d_pos_emb=2)
    assert concat.n_params == 2 * (3 * 18 * 16 + 16 * 16 + 18 * 64 + 64 * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density=0.0 is not a share"),
        ({"density": 1.5}, "at most 1"),
        ({"afrac": -0.1}, r"afrac=-0.1 is not a share in \[0, 1\]"),
        ({"afrac_sites": ("attn_in",)}, "afrac_sites names 'attn_in', which is no site; choose from attn_read"),
        ({"positions": "rotary"}, "positions='rotary'; choose one of 'add', 'concat', 'none'"),
        ({"positions": "concat"}, "Set both, or neither"),
        ({"d_pos_emb": 4}, "Set both, or neither"),
        ({"positions": "concat", "d_pos_emb": 0}, "at least 1 channel"),
        ({"act_fn": "silu"}, "choose one of 'gelu', 'relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"residual_act": "gelu"}, "residual_act='gelu'"),
        ({"attention_dir": "both"}, "attention_dir='both'"),
        ({"n_layers": 0}, "n_layers=0, and a model needs at least 1"),
        ({"d_head": 5}, "the nearest widths that do are 15 and 20"),
        ({"gated_mlp": True}, "gated_mlp=True is not supported"),
        ({"n_key_value_heads": 2}, "n_key_value_heads=2 is not supported"),
    ],
)
def test_what_describes_no_model_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SHAPE | change)


def test_json_keeps_what_the_model_is_and_drops_how_it_is_used():
    cfg = ModelConfig(**SHAPE, afrac=0.25, positions="concat", d_pos_emb=3, dtype=torch.bfloat16, use_attn_result=True)
    text = cfg.to_json()
    again = ModelConfig.from_json(text)
    assert again.to_json() == text
    assert (again.dtype, again.afrac, again.d_pos_emb, again.use_attn_result) == (torch.bfloat16, 0.25, 3, False)
    assert "device" not in json.loads(text)


def test_a_dict_of_every_field_makes_the_same_config():
    cfg = ModelConfig(**SHAPE, sink=False)
    assert ModelConfig.from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()


def test_an_unknown_key_names_the_nearest_field():
    with pytest.raises(ConfigError, match="unknown field 'desity' in a model config. Did you mean 'density'?"):
        ModelConfig.from_dict(SHAPE | {"desity": 0.1})


@pytest.mark.parametrize("text", ["{", "[1]", '{"d_model": 4}', '{"d_model": 8, "dtype": "float33"}'])
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(ConfigError):
        ModelConfig.from_json(text)


def test_a_value_of_the_wrong_kind_is_refused():
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(SHAPE | {"n_layers": "two"})


def test_its_text_shows_what_was_chosen():
    assert repr(ModelConfig(**SHAPE, afrac=0.25)).startswith("ModelConfig(d_model=16")
    assert "afrac=0.25" in repr(ModelConfig(**SHAPE, afrac=0.25)) and "sink" not in repr(ModelConfig(**SHAPE))


def test_the_shapes_of_the_weights_are_those_of_the_model(any_model):
    assert any_model.cfg.weight_shapes() == {name: tuple(t.shape) for name, t in any_model.state_dict().items()}
