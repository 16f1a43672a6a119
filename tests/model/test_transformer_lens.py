"""What TransformerLens' tools and notebooks ask of a model."""

import copy
from importlib.metadata import version

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.training.sparsity import project_


def test_caching_patching_and_decomposing_agree_to_one_in_a_hundred_thousand(tl_script, capsys):
    assert tl_script.main() == 0
    assert f"transformer-lens {version('transformer-lens')}" in capsys.readouterr().out


# -- hook points that cannot fire -------------------------------------------------------------------------------------

SWITCHED = {
    "blocks.0.attn.hook_result": "use_attn_result",
    "blocks.0.attn.hook_q_input": "use_split_qkv_input",
    "blocks.0.attn.hook_attn_in": "use_attn_in",
    "blocks.0.hook_mlp_in": "use_hook_mlp_in",
}


@pytest.mark.parametrize(("name", "switch"), SWITCHED.items())
def test_a_hook_behind_a_flag_is_refused_until_the_flag_is_on(name, switch, plain_model, tokens):
    hook = lambda tensor, hook: tensor * 0
    message = f"a hook on {name} would never fire: {switch} is off, and model.set_{switch}"
    for attempt in (
        lambda: plain_model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]),
        lambda: plain_model.run_with_cache(tokens, names_filter=name),
        lambda: plain_model.run_with_cache(tokens, names_filter=["hook_embed", name]),
        lambda: plain_model.add_hook(name, hook),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt()
    assert name not in plain_model.run_with_cache(tokens)[1]
    getattr(plain_model, f"set_{switch}")(True)
    assert not torch.equal(plain_model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]), plain_model(tokens))
    assert name in plain_model.run_with_cache(tokens)[1]


def test_a_plain_cache_holds_every_point_that_can_fire(any_model, tokens):
    _, cache = any_model.run_with_cache(tokens)
    assert set(cache) == {name for name in any_model.hook_dict if any_model.why_silent(name) is None}


def test_hooks_of_a_mechanism_that_the_model_lacks_are_refused(make_model, tokens):
    hook = ("blocks.0.attn.hook_sink", lambda tensor, hook: None)
    with pytest.raises(ConfigError, match="the model was built with sink=False"):
        make_model(sink=False).run_with_hooks(tokens, fwd_hooks=[hook])
    with pytest.raises(ConfigError, match="the model was built with norm='none'"):
        make_model(norm="none").run_with_cache(tokens, names_filter="ln_final.hook_scale")


def test_an_unknown_hook_name_is_a_key_error_with_the_nearest_name(plain_model, tokens):
    message = "blocks.0.atn.hook_q is no hook point of this model. Did you mean blocks.0.attn.hook_q?"
    with pytest.raises(KeyError, match=message):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.atn.hook_q", lambda t, hook: t)])
    with pytest.raises(KeyError):
        plain_model.run_with_cache(tokens, names_filter="hook_embd")


def test_a_hook_on_a_module_that_is_no_hook_point_is_a_type_error(plain_model, tokens):
    with pytest.raises(TypeError):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn", lambda t, hook: t)])


def test_hooks_are_gone_after_a_run_even_one_that_failed(plain_model, tokens):
    def fail(tensor, hook):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        plain_model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", fail)])
    plain_model(tokens)


# -- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_takes_a_name_a_list_or_a_function(plain_model, tokens):
    for names in ("hook_embed", ["hook_embed"], lambda name: name == "hook_embed"):
        assert list(plain_model.run_with_cache(tokens, names_filter=names)[1]) == ["hook_embed"]
    assert type(plain_model.run_with_cache(tokens, return_cache_object=False)[1]) is dict


def test_the_batch_is_removed_from_a_batch_of_one_only(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert cache["resid_post", -1].shape == (7, 12)
    with pytest.raises(ConfigError, match="remove_batch_dim takes a batch of one; got 3"):
        plain_model.run_with_cache(tokens, remove_batch_dim=True)


def test_gradients_are_cached_on_the_way_back(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert cache["blocks.0.mlp.hook_post_grad"].shape == (3, 7, 20)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_stacked_under_their_transformer_lens_names(plain_model):
    shapes = {
        "W_E": (50, 12), "W_pos": (16, 12), "W_U": (12, 50), "b_U": (50,), "W_E_pos": (66, 12),
        "W_Q": (2, 3, 12, 5), "W_K": (2, 3, 12, 5), "W_V": (2, 3, 12, 5), "W_O": (2, 3, 5, 12),
        "W_in": (2, 12, 20), "W_out": (2, 20, 12), "b_Q": (2, 3, 5), "b_O": (2, 12), "b_in": (2, 20), "b_out": (2, 12),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert getattr(plain_model, name).shape == shape, name
    assert torch.equal(plain_model.W_O[1], plain_model.blocks[1].attn.W_O)
    torch.testing.assert_close(plain_model.OV.AB, plain_model.W_V @ plain_model.W_O)
    torch.testing.assert_close(plain_model.QK.AB, plain_model.W_Q @ plain_model.W_K.mT)


def test_vectors_of_positions_that_are_not_added_are_not_stacked_with_the_tokens(make_model):
    with pytest.raises(ConfigError, match="positions='concat' adds none"):
        _ = make_model(positions="concat", d_pos_emb=3).W_E_pos


def test_labels_and_blocks_are_listed_by_layer(plain_model):
    assert plain_model.all_head_labels == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert [layer for layer, _ in plain_model.blocks_with("attn")] == [0, 1]
    assert plain_model.blocks_with("mamba") == []


def test_a_tied_unembedding_is_among_the_named_weights(make_model):
    model = make_model(tie_unembed=True)
    weights = model.tl_parameters()
    assert torch.equal(weights["unembed.W_U"], model.W_E.T)
    assert {"blocks.0.attn.W_V", "blocks.1.ln2.w", "embed.W_E"} <= weights.keys()
    assert model.n_params_total == sum(p.numel() for p in model.parameters())


def test_the_direction_of_a_token_is_what_its_logit_reads(plain_model, tokens):
    w = plain_model.ln_final.w
    one = plain_model.tokens_to_residual_directions(5)
    assert torch.equal(one, plain_model.W_U[:, 5] * w)
    assert torch.equal(plain_model.tokens_to_residual_directions(torch.tensor([[5]])), one)
    assert plain_model.tokens_to_residual_directions(tokens).shape == (3, 7, 12)
    _, cache = plain_model.run_with_cache(tokens)
    got = cache["ln_final.hook_normalized"] @ one + plain_model.b_U[5]
    bare = plain_model.unembed(plain_model.ln_final(cache["resid_post", 1]))
    torch.testing.assert_close(got, bare[..., 5])


def test_biases_accumulate_up_to_a_layer(plain_model):
    b_O, b_out = plain_model.b_O, plain_model.b_out
    assert not plain_model.accumulated_bias(0).any()
    torch.testing.assert_close(plain_model.accumulated_bias(1), b_O[0] + b_out[0])
    torch.testing.assert_close(plain_model.accumulated_bias(1, mlp_input=True), b_O[0] + b_out[0] + b_O[1])
    torch.testing.assert_close(plain_model.accumulated_bias(2, include_mlp_biases=False), b_O.sum(0))
    with pytest.raises(ConfigError, match=r"layer=2 is not in \[0, 1\]"):
        plain_model.accumulated_bias(2, mlp_input=True)


# -- the random-init control ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_unembed": True}, {"positions": "concat", "d_pos_emb": 3}], ids=str)
def test_a_reinitialised_sparse_model_keeps_its_zeros_and_nothing_else(changes, make_model, tokens):
    interchange = pytest.importorskip("transformer_lens.tools.analysis.interchange")
    model = make_model(bigram_learnable=True, **changes)
    project_(model, 0.3)
    before = copy.deepcopy(model.state_dict())
    fresh = interchange.reinitialized(model, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    for name, new in fresh.state_dict().items():
        if ".W_" in name:
            assert torch.equal(new == 0, before[name] == 0), name
            assert not torch.equal(new, before[name]), name
    assert not torch.equal(fresh(tokens), model(tokens))
    again = interchange.reinitialized(model, seed=0)
    assert torch.equal(again(tokens), fresh(tokens))


def test_a_new_model_has_no_zero_weight(make_model):
    model = make_model()
    assert all((p != 0).all() for name, p in model.named_parameters() if ".W_" in name)


# -- tools ------------------------------------------------------------------------------------------------------------


def test_every_tool_of_the_patching_module_runs(plain_model, tokens):
    from transformer_lens import patching

    _, cache = plain_model.run_with_cache(tokens)
    metric = lambda logits: logits[:, -1, 3].mean()
    for sweep in (
        patching.get_act_patch_attn_out,
        patching.get_act_patch_mlp_out,
        patching.get_act_patch_attn_head_out_all_pos,
        patching.get_act_patch_attn_head_pattern_all_pos,
    ):
        effects = sweep(plain_model, tokens.flip(0), cache, metric)
        assert effects.isfinite().all()


def test_svd_interpreter_reads_a_tied_sparse_model(make_model):
    from transformer_lens import SVDInterpreter

    model = make_model(tie_unembed=True)
    assert SVDInterpreter(model).get_singular_vectors("OV", num_vectors=2, layer_index=0, head_index=0).shape[-1] == 2


def test_logit_lens_ends_at_the_logits(make_model, tokens):
    lens = pytest.importorskip("transformer_lens.tools.analysis.logit_lens")
    model = make_model(bigram=False)
    _, cache = model.run_with_cache(tokens)
    assert lens is not None and cache.accumulated_resid(apply_ln=True).isfinite().all()
    last = cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U
    torch.testing.assert_close(last, model(tokens), atol=1e-5, rtol=1e-5)
