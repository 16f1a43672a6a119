"""The parts of a block: what each keeps, what each normalises, and what attention leaves for the sink."""

import pytest
import torch

from sparse_interp.model.layers import Cut, Norm, heard, redraw_
from sparse_interp.model.sites import flat, places, width


@pytest.mark.parametrize(("afrac", "size", "k"), [(0.29, 100, 28), (0.57, 100, 56), (0.25, 3, 0), (1.0, 7, 7)])
def test_a_cut_keeps_the_floor_of_its_share_with_the_artefacts_of_floats(make_model, afrac, size, k):
    """As the released code counts: int(0.29 * 100) is 28."""
    assert Cut(make_model(afrac=afrac).cfg, "q", size).k == k


def test_a_cut_at_a_site_that_is_not_named_keeps_all(make_model):
    assert Cut(make_model(afrac_sites=("v",)).cfg, "q", 10).k is None
    assert Cut(make_model(afrac=None).cfg, "q", 10).k is None


def test_every_site_holds_as_many_channels_as_the_config_says(make_model, tokens):
    for changes in ({}, {"positions": "concat", "d_pos_emb": 3}):
        model = make_model(**changes)
        _, cache = model.run_with_cache(tokens)
        for place in places(model.cfg)[:-1]:
            kept = (flat(cache[place.hook]) != 0).sum(-1)
            assert (kept == int(0.4 * width(model.cfg, place.site))).all(), place


def test_heads_compete_for_one_budget(plain_model, tokens):
    """The cut of q is over all heads jointly, so heads differ in how many channels they keep."""
    _, cache = plain_model.run_with_cache(tokens)
    assert len((cache["q", 0] != 0).sum(-1).unique()) > 1


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_those_of_torch(make_model, kind, generator):
    model = make_model(norm=kind)
    norm, x = model.ln_final, torch.randn(2, 3, 12, generator=generator)
    functional = torch.nn.functional
    expected = (
        functional.rms_norm(x, (12,), norm.w)
        if kind == "rms"
        else functional.layer_norm(x, (12,), norm.w, norm.b, eps=1e-5)
    )
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.unhooked(x), expected)
    torch.testing.assert_close(norm.train()(x), expected)


def test_a_tiny_input_is_normalised_with_the_epsilon_of_float32(make_model):
    norm = Norm(make_model().cfg, 12)
    x = torch.full((1, 1, 12), 1e-4)
    torch.testing.assert_close(norm(x), x / (1e-8 + 1.1920929e-07) ** 0.5)


def test_no_norm_hands_on_the_input_in_memory_of_its_own(make_model):
    norm, x = make_model(norm="none").ln_final, torch.ones(1, 1, 12)
    assert torch.equal(norm(x), x) and norm(x).data_ptr() != x.data_ptr()


def test_a_row_of_the_pattern_and_its_sink_sum_to_one(any_model, tokens):
    _, cache = any_model.run_with_cache(tokens)
    total = cache["pattern", 0].sum(-1)
    if any_model.cfg.sink:
        total = total + cache["blocks.0.attn.hook_sink"]
        logits = cache["blocks.0.attn.hook_sink_logits"]
        assert torch.equal(logits, any_model.blocks[0].attn.sink[None, :, None, None].expand_as(logits))
    torch.testing.assert_close(total, torch.ones_like(total))


def test_no_query_sees_ahead_unless_attention_is_bidirectional(make_model, tokens):
    ahead = torch.ones(7, 7).triu(1).bool()
    _, cache = make_model().run_with_cache(tokens)
    assert (cache["pattern", 1][..., ahead] == 0).all()
    _, cache = make_model(attention_dir="bidirectional").run_with_cache(tokens)
    assert (cache["pattern", 1][..., ahead] > 0).all()


def test_editing_the_sink_logit_moves_attention(plain_model, tokens):
    name = "blocks.0.attn.hook_sink_logits"
    whole, _, _ = plain_model.get_caching_hooks("blocks.0.attn.hook_pattern")
    cache, hooks, _ = plain_model.get_caching_hooks("blocks.0.attn.hook_pattern")
    plain_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda s, hook: s + 1e4), *hooks])
    assert not whole and not cache["blocks.0.attn.hook_pattern"].any()


def test_heads_that_fork_twice_hear_the_first_fork_in_the_second(plain_model, tokens):
    plain_model.set_use_attn_in(True)
    double = ("blocks.1.attn.hook_attn_in", lambda heads, hook: heads * torch.tensor([2.0, 1.0, 1.0])[:, None] + 0.1)
    edited = plain_model.run_with_hooks(tokens, fwd_hooks=[double])
    plain_model.set_use_split_qkv_input(True)
    cache, hooks, _ = plain_model.get_caching_hooks(lambda name: name.startswith("blocks.1.attn"))
    torch.testing.assert_close(plain_model.run_with_hooks(tokens, fwd_hooks=[double, *hooks]), edited)
    for letter in "qkv":
        assert torch.equal(cache[f"blocks.1.attn.hook_{letter}_input"], cache["blocks.1.attn.hook_attn_in"])


def test_a_hook_is_heard_and_then_no_longer(plain_model):
    point = plain_model.hook_embed
    assert not heard(point)
    with plain_model.hooks(fwd_hooks=[("hook_embed", lambda t, hook: None)]):
        assert heard(point)
    assert not heard(point)


def test_redrawing_leaves_zeros_and_draws_the_rest():
    weight = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    redraw_(weight, 0.1)
    assert (weight != 0).tolist() == [[False, True], [True, False]] and weight.abs().max() < 1


def test_writes_to_the_stream_begin_smaller_with_depth():
    from sparse_interp.model.config import ModelConfig
    from sparse_interp.model.transformer import HookedSparseTransformer

    cfg = ModelConfig(d_model=64, d_head=16, n_layers=8, d_vocab=5, n_ctx=4, seed=0)
    block = HookedSparseTransformer(cfg).layers[0]
    for weight, std in (
        (block.mlp.W_in, 0.02),
        (block.mlp.W_out, 0.005),
        (block.attn.W_Q, 0.02),
        (block.attn.W_O, 0.005),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_a_model_without_biases_has_none_to_train(make_model, tokens):
    from sparse_interp.model.config import ModelConfig
    from sparse_interp.model.transformer import HookedSparseTransformer

    model = HookedSparseTransformer(ModelConfig(d_model=8, d_head=4, n_layers=1, d_vocab=50, n_ctx=8, bias=False))
    model(tokens, return_type="loss").backward()
    biases = {name: p for name, p in model.named_parameters() if ".b_" in name and name != "unembed.b_U"}
    assert len(biases) == 6 and all(p.grad is None and not p.any() for p in biases.values())
