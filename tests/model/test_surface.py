"""What TransformerLens reads of a model: attributes, config fields, hook points and switches, each with its shape.

The tables are those of a `HookedRootModule` that TransformerLens takes as a model. They hold for a sparse model
(everything cut, sink, biases, bigram table), a dense one (biases alone) and one with concatenated positions.
"""

import inspect

import pytest
import torch
from torch import nn
from transformer_lens import FactoredMatrix, HookedRootModule
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import ConfigError
from sparse_interp.model.cache import SparseActivationCache
from sparse_interp.model.layers import Block

MODELS = {
    "sparse": {},
    "dense": {"afrac": None, "sink": False, "bigram": False},
    "concatenated": {"positions": "concat", "d_pos_emb": 3},
}


@pytest.fixture(params=MODELS)
def model(request, make_model, tokenizer):
    return make_model(tokenizer, d_vocab=2048, **MODELS[request.param])


@pytest.fixture
def prompt(model):
    """[2 5]"""
    return torch.tensor([[2047, 5, 6, 7, 8], [2047, 9, 10, 11, 12]])


def switch_all(model):
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_in(True)
    model.set_use_hook_mlp_in(True)


# -- the base class and the forward pass ------------------------------------------------------------------------------


def test_a_model_is_a_root_module_whose_hook_points_know_their_names(model):
    assert isinstance(model, HookedRootModule)
    points = {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}
    assert points == model.hook_dict
    assert all(point.name == name for name, point in points.items())


def test_forward_takes_what_transformer_lens_passes(model):
    wanted = {
        "input": inspect.Parameter.empty, "return_type": "logits", "loss_per_token": False, "prepend_bos": None,
        "padding_side": None, "start_at_layer": None, "tokens": None, "attention_mask": None, "stop_at_layer": None,
        "past_kv_cache": None,
    }  # fmt: skip
    got = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()}
    assert got == wanted and list(got) == list(wanted)


METHODS = {
    "to_tokens": "input prepend_bos padding_side move_to_device truncate",
    "to_string": "tokens",
    "to_str_tokens": "input prepend_bos padding_side",
    "to_single_token": "string",
    "to_single_str_token": "int_token",
    "get_token_position": "single_token input mode prepend_bos padding_side",
    "loss_fn": "logits tokens attention_mask per_token",
    "accumulated_bias": "layer mlp_input include_mlp_biases",
    "tokens_to_residual_directions": "tokens",
    "generate": "input max_new_tokens stop_at_eos eos_token_id do_sample top_k top_p temperature freq_penalty "
    "use_past_kv_cache prepend_bos padding_side return_type verbose generator",
    "get_caching_hooks": "names_filter incl_bwd device remove_batch_dim cache pos_slice",
}


@pytest.mark.parametrize(("method", "arguments"), METHODS.items())
def test_methods_take_their_arguments_in_the_order_of_transformer_lens(method, arguments, plain_model):
    assert list(inspect.signature(getattr(plain_model, method)).parameters) == arguments.split()


def test_a_model_has_what_the_protocols_of_transformer_lens_ask_for(model):
    protocol = pytest.importorskip("transformer_lens.model_protocol", reason="protocols came with 4.0")
    assert isinstance(model, protocol.TransformerLensModel)
    assert isinstance(model, protocol.TrainableTransformerLensModel)
    for name in ("blocks", "ln_final", "accumulated_bias", "to_single_token", "tokens_to_residual_directions"):
        assert hasattr(model, name), (
            name
        )  # what TransformerLensModelWithWeights adds; a submodule is no attribute to it


def test_run_with_hooks_calls_forward_and_run_with_cache_the_module(model, prompt):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model.run_with_hooks(prompt, fwd_hooks=[])
    assert not calls
    model.run_with_cache(prompt)
    assert calls == [1]
    handle.remove()


def test_a_run_with_a_cache_takes_text_lists_ids_and_ids_without_a_batch(model):
    ids = model.to_tokens("def f")
    for given in ("def f", ["def f"], ids, ids[0]):
        logits, cache = model.run_with_cache(given)
        assert torch.equal(logits, model(ids)) and isinstance(cache, SparseActivationCache)
        assert cache["resid_post", 1].shape == (1, ids.shape[1], 12)
        _, alone = model.run_with_cache(given, remove_batch_dim=True)
        assert torch.equal(alone["resid_post", 1], cache["resid_post", 1][0])
        assert alone["pattern", 0].shape == (3, ids.shape[1], ids.shape[1])


def test_names_are_chosen_by_none_a_name_a_list_or_a_function_and_by_nothing_else(model, prompt):
    for chosen in (None, "hook_embed", ["hook_embed"], lambda name: name == "hook_embed"):
        assert "hook_embed" in model.run_with_cache(prompt, names_filter=chosen)[1]
    with pytest.raises(ConfigError, match="names_filter takes a name, a list of names or a function"):
        model.run_with_cache(prompt, names_filter=("hook_embed",))
    assert len(model.run_with_cache(prompt, names_filter=lambda name: False)[1]) == 0
    plain = model.run_with_cache(prompt, names_filter="hook_embed", return_cache_object=False)[1]
    assert type(plain) is dict and list(plain) == ["hook_embed"]


def test_hooks_on_the_way_back_see_the_gradient(model, prompt):
    seen = {}
    hooks = [
        (name, lambda grad, hook: seen.update({hook.name: grad.clone()}))
        for name in ("hook_embed", "ln_final.hook_normalized")
    ]
    with model.hooks(bwd_hooks=hooks):
        model(prompt, return_type="loss").backward()
    _, cache = model.run_with_cache(prompt, return_type="loss", incl_bwd=True)
    assert len(seen) == 2
    for name, grad in seen.items():
        assert torch.equal(grad, cache[f"{name}_grad"]) and grad.any()


def test_every_module_with_weights_of_its_own_can_draw_them_anew(any_model):
    for name, module in any_model.named_modules():
        if list(module.parameters(recurse=False)):
            assert callable(getattr(module, "reset_parameters", None)), name


# -- attributes -------------------------------------------------------------------------------------------------------

BLOCK_WEIGHTS = {
    "attn": {"W_Q": (3, 12, 5), "W_K": (3, 12, 5), "W_V": (3, 12, 5), "W_O": (3, 5, 12), "b_Q": (3, 5), "b_K": (3, 5),
             "b_V": (3, 5), "b_O": (12,)},
    "mlp": {"W_in": (12, 20), "b_in": (20,), "W_out": (20, 12), "b_out": (12,)},
    "ln1": {"w": (12,)},
    "ln2": {"w": (12,)},
}  # fmt: skip


def test_weights_have_transformer_lens_names_and_shapes(model):
    names = set(model.tl_parameters())
    for layer, block in enumerate(model.blocks):
        for part, weights in BLOCK_WEIGHTS.items():
            for name, shape in weights.items():
                weight = getattr(getattr(block, part), name)
                assert weight.shape == shape and f"blocks.{layer}.{part}.{name}" in names
                assert model.tl_parameters()[f"blocks.{layer}.{part}.{name}"] is weight
    for part, weights in BLOCK_WEIGHTS.items():
        for name, shape in weights.items() if part in ("attn", "mlp") else ():
            stacked = getattr(model, name)
            assert stacked.shape == (2, *shape), name
            assert torch.equal(stacked[1], getattr(getattr(model.blocks[1], part), name))
    ends = {"embed.W_E": (2048, 12), "unembed.W_U": (12, 2048), "unembed.b_U": (2048,), "ln_final.w": (12,)}
    for name, shape in ends.items():
        part, _, weight = name.partition(".")
        assert getattr(getattr(model, part), weight).shape == shape and name in names
    for name in ("W_E", "W_U", "b_U"):
        assert getattr(model, name).shape == next(shape for end, shape in ends.items() if end.endswith(name))
    assert model.W_pos.shape == ((16, 3) if model.cfg.positions == "concat" else (16, 12))
    assert "pos_embed.W_pos" in names


def test_rows_of_concatenated_positions_stand_beside_those_of_the_stream(make_model):
    model = make_model(positions="concat", d_pos_emb=3)
    for name in ("W_Q_pos", "W_K_pos", "W_V_pos"):
        assert getattr(model, name).shape == (2, 3, 3, 5)
        assert torch.equal(getattr(model, name)[1], getattr(model.blocks[1].attn, name))
    assert model.W_in_pos.shape == (2, 3, 20)
    assert torch.equal(model.W_in_pos[0], model.blocks[0].mlp.W_in_pos)
    without = make_model()
    for name in ("W_Q_pos", "W_K_pos", "W_V_pos", "W_in_pos"):
        assert not hasattr(without, name)
    assert not hasattr(make_model(positions="none"), "W_pos")


def test_circuits_of_heads_are_products_of_their_weights(model):
    for product, left, right in ((model.QK, model.W_Q, model.W_K.mT), (model.OV, model.W_V, model.W_O)):
        assert isinstance(product, FactoredMatrix) and product.shape == (2, 3, 12, 12)
        torch.testing.assert_close(product.AB, left @ right)
    if model.cfg.positions == "add":
        assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))


def test_parts_are_what_tools_expect(model):
    assert isinstance(model.blocks, nn.ModuleList) and Block.hook_out_is_single_residual_stream is True
    for shape in ((2, 5, 12), (1, 7, 12)):
        assert model.ln_final(torch.ones(shape)).shape == shape
        assert model.unembed(torch.ones(shape)).shape == (*shape[:2], 2048)
    assert isinstance(model.ln_final.hook_scale, HookPoint)
    assert [layer for layer, block in model.blocks_with("attn") if block is model.blocks[layer]] == [0, 1]
    assert model.all_head_labels == [f"L{layer}H{head}" for layer in range(2) for head in range(3)]
    assert model.tokens_to_residual_directions("def").shape == (12,)
    assert model.accumulated_bias(1, mlp_input=True, include_mlp_biases=True).shape == (12,)
    six = sum(w.numel() for name, w in model.named_parameters() if ".W_" in name and name.startswith("blocks"))
    assert model.cfg.n_params == six
    assert model.n_params_total == sum(p.numel() for p in model.parameters())


# -- the config -------------------------------------------------------------------------------------------------------


def test_the_config_has_every_field_that_tools_read(model):
    wanted = {
        "n_layers": 2, "n_heads": 3, "d_head": 5, "d_model": 12, "d_mlp": 20, "d_vocab": 2048, "d_vocab_out": 2048,
        "n_ctx": 16, "device": "cpu", "dtype": torch.float32, "normalization_type": "RMS", "attn_only": False,
        "n_key_value_heads": None, "default_prepend_bos": True, "use_attn_result": False, "use_split_qkv_input": False,
        "use_hook_mlp_in": False, "use_attn_in": False, "parallel_attn_mlp": False, "model_name": "custom",
        "original_architecture": "HookedSparseTransformer", "attention_dir": "causal", "final_rms": False,
        "init_mode": "gpt2", "seed": 0, "tokenizer_name": None, "tokenizer_prepends_bos": False, "uses_rms_norm": True,
        "positional_embedding_type": "concat" if model.cfg.positions == "concat" else "standard",
    }  # fmt: skip
    assert {name: getattr(model.cfg, name) for name in wanted} == wanted


# -- hook points and their switches -----------------------------------------------------------------------------------

STREAM, HEADS, PER_HEAD, SQUARE, NEURONS, SCALE = (
    (2, 5, 12),
    (2, 5, 3, 5),
    (2, 5, 3, 12),
    (2, 3, 5, 5),
    (2, 5, 20),
    (2, 5, 1),
)

OF_BLOCK = {
    "hook_resid_pre": STREAM, "hook_resid_mid": STREAM, "hook_resid_post": STREAM, "hook_attn_out": STREAM,
    "hook_mlp_out": STREAM, "hook_mlp_in": STREAM, "ln1.hook_scale": SCALE, "ln1.hook_normalized": STREAM,
    "ln2.hook_scale": SCALE, "ln2.hook_normalized": STREAM, "attn.hook_q": HEADS, "attn.hook_k": HEADS,
    "attn.hook_v": HEADS, "attn.hook_z": HEADS, "attn.hook_attn_scores": SQUARE, "attn.hook_pattern": SQUARE,
    "attn.hook_result": PER_HEAD, "attn.hook_attn_in": PER_HEAD, "attn.hook_q_input": PER_HEAD,
    "attn.hook_k_input": PER_HEAD, "attn.hook_v_input": PER_HEAD, "mlp.hook_pre": NEURONS, "mlp.hook_post": NEURONS,
}  # fmt: skip
OF_MODEL = {
    "hook_embed": STREAM, "ln_final.hook_scale": SCALE, "ln_final.hook_normalized": STREAM, "unembed.hook_in": STREAM,
    "unembed.hook_out": (2, 5, 2048),
}  # fmt: skip
READ = {"attn.hook_in", "mlp.hook_in"}
SWITCHES = {"use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"}


def test_every_hook_point_sees_the_shape_that_tools_expect(model, prompt):
    switch_all(model)
    _, cache = model.run_with_cache(prompt)
    cfg = model.cfg
    expected = dict(OF_MODEL)
    for layer in (0, 1):
        expected |= {f"blocks.{layer}.{name}": shape for name, shape in OF_BLOCK.items()}
        expected |= {f"blocks.{layer}.{name}": (2, 5, cfg.d_read) for name in READ}
        if cfg.sink:
            expected[f"blocks.{layer}.attn.hook_sink"] = (2, 3, 5)
            expected[f"blocks.{layer}.attn.hook_sink_logits"] = (2, 3, 5, 1)
        for norm in ("ln1_pos", "ln2_pos") if cfg.positions == "concat" else ():
            expected |= {
                f"blocks.{layer}.{norm}.hook_scale": SCALE,
                f"blocks.{layer}.{norm}.hook_normalized": (2, 5, 3),
            }
    expected |= {"hook_pos_cat": (2, 5, 3)} if cfg.positions == "concat" else {"hook_pos_embed": STREAM}
    expected |= {"hook_bigram": (2, 5, 2048)} if cfg.bigram else {}
    assert {name: tuple(activation.shape) for name, activation in cache.items()} == expected


def test_a_norm_that_heads_share_is_seen_once_whatever_forks(model, prompt):
    """Else its scale would have an axis of heads, and stacks of components could not be divided by it."""
    fired = []
    with model.hooks(fwd_hooks=[("blocks.0.ln1.hook_scale", lambda scale, hook: fired.append(scale))]):
        plain = model(prompt)
        switch_all(model)
        torch.testing.assert_close(model(prompt), plain, atol=1e-5, rtol=1e-5)
    assert len(fired) == 2 and fired[0].shape == fired[1].shape == SCALE


@pytest.mark.parametrize("switch", sorted(SWITCHES))
def test_a_switch_changes_no_logit_and_may_be_set_twice(switch, model, prompt):
    plain = model.double()(prompt)
    before = set(model.run_with_cache(prompt)[1])
    for _ in range(2):
        getattr(model, f"set_{switch}")(True)
        assert getattr(model.cfg, switch) and model.blocks[1].cfg is model.cfg
    torch.testing.assert_close(model(prompt), plain, atol=1e-12, rtol=1e-12)
    assert len(set(model.run_with_cache(prompt)[1]) - before) == (6 if switch == "use_split_qkv_input" else 2)
    for _ in range(2):
        getattr(model, f"set_{switch}")(False)
    assert torch.equal(model(prompt), plain)


def test_all_switches_on_change_no_logit(model, prompt):
    for precision, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        plain = model.to(precision)(prompt)
        switch_all(model)
        torch.testing.assert_close(model(prompt), plain, atol=bound, rtol=bound)
        for switch in SWITCHES:
            getattr(model, f"set_{switch}")(False)


def test_what_heads_write_adds_up_to_what_attention_writes(model, prompt):
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(prompt)
    for layer in (0, 1):
        torch.testing.assert_close(cache["result", layer].sum(2), cache["attn_out", layer], atol=1e-5, rtol=1e-5)


def test_a_function_that_chooses_silent_points_alone_is_refused_and_among_others_is_not(model, prompt):
    hook = lambda tensor, hook: tensor
    alone = lambda name: name.endswith("hook_result")
    for attempt in (
        lambda: model.run_with_hooks(prompt, fwd_hooks=[(alone, hook)]),
        lambda: model.run_with_cache(prompt, names_filter=alone),
        lambda: model.add_hook(alone, hook),
        lambda: model.add_caching_hooks(alone),
    ):
        with pytest.raises(ConfigError, match="blocks.0.attn.hook_result would never fire: use_attn_result is off"):
            attempt()
    among = lambda name: name.endswith(("hook_result", "hook_z"))
    assert torch.equal(model.run_with_hooks(prompt, fwd_hooks=[(among, hook)]), model(prompt))
    assert list(model.run_with_cache(prompt, names_filter=among)[1]) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
