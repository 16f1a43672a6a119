"""Second names: what TransformerLens calls a hook point elsewhere is the same tensor here, wherever a name is taken."""

from importlib.metadata import version

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.model.aliases import first_name, position_axis, second_names

NAMES = second_names(n_layers=2)
ALWAYS = {name: first for name, first in NAMES.items() if not first.endswith("_input") and "attn_in" not in first}
SWITCHED = {name: first for name, first in NAMES.items() if name not in ALWAYS}


@pytest.fixture(params=["sparse", "dense"])
def model(request, make_model):
    """Everything cut, or nothing."""
    return make_model() if request.param == "sparse" else make_model(afrac=None, sink=False, bigram=False)


def switch_heads(model):
    model.set_use_split_qkv_input(True)
    model.set_use_attn_in(True)


# -- the names --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(version("transformer-lens") < "4", reason="the bridge names hooks like this since 4.0")
def test_a_second_name_is_the_same_tensor_on_the_bridge(generator):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    shape = {"d_model": 12, "n_layers": 2, "n_ctx": 16, "d_vocab": 50, "n_heads": 3, "d_head": 4, "d_mlp": 20}
    cfg = TransformerBridgeConfig(**shape, act_fn="gelu", normalization_type="RMS", device="cpu")
    bridge = TransformerBridge.boot_native(cfg).eval()
    with torch.no_grad():
        for weight in bridge.parameters():  # gains too: before and after a gain of 1 there is the same tensor
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    _, cache = bridge.run_with_cache(torch.arange(7)[None])
    for name, first in ALWAYS.items():
        assert torch.equal(cache[name], cache[first]), name
    for name, first in SWITCHED.items():
        assert bridge.hook_dict[name] is bridge.hook_dict[first], name


def test_a_second_name_is_no_first_name(any_model):
    assert not NAMES.keys() & any_model.mod_dict.keys()
    assert NAMES.values() - any_model.hook_dict.keys() <= {"hook_pos_embed"}  # there when positions are added


def test_a_name_that_is_no_second_name_is_its_own_and_a_gradient_goes_by_the_same_names():
    assert first_name("blocks.12.hook_out") == "blocks.12.hook_resid_post"
    assert first_name("blocks.12.mlp.out.hook_in_grad") == "blocks.12.mlp.hook_post_grad"
    for own in ("hook_embed", "blocks.0.attn.hook_q", "blocks.0", "hook_out", "nonsense"):
        assert first_name(own) == own


def test_concatenated_positions_do_not_pass_for_a_write_to_the_stream(make_model, tokens):
    model = make_model(positions="concat", d_pos_emb=3)
    with pytest.raises(KeyError, match="pos_embed.hook_out is no hook point of this model"):
        model.run_with_cache(tokens, names_filter="pos_embed.hook_out")
    _, cache = model.run_with_cache(tokens)
    assert "pos_embed.hook_out" not in cache and "hook_pos_embed" not in cache and "hook_pos_cat" in cache


# -- wherever a name is taken -----------------------------------------------------------------------------------------


def test_every_second_name_is_a_key_of_a_cache(model, tokens):
    switch_heads(model)
    _, cache = model.run_with_cache(tokens)
    for name, first in NAMES.items():
        assert name in cache and cache[name] is cache[first], name
    assert not NAMES.keys() & set(cache)  # and is not listed twice
    assert cache["q_input", 1] is cache["blocks.1.attn.hook_q_input"] is cache["q_input", -1]
    assert ("attn_in", 0) in cache and cache["attn_in", 0] is cache["blocks.0.attn.hook_attn_in"]


def test_a_hook_on_a_second_name_acts_on_the_first(model, tokens):
    switch_heads(model)
    names = []

    def halve(tensor, hook):
        names.append(hook.name)
        return tensor * 0.5

    for name, first in NAMES.items():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(first, lambda tensor, hook: tensor * 0.5)])
        assert not torch.equal(expected, model(tokens)), first
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, halve)]), expected), name
        with model.hooks(fwd_hooks=[(name, halve)]):
            assert torch.equal(model(tokens), expected), name
        model.add_hook(name, halve)
        assert torch.equal(model(tokens), expected), name
        model.reset_hooks()
        model.add_perma_hook(name, halve)
        assert torch.equal(model(tokens), expected), name
        model.reset_hooks(including_permanent=True)
    assert names == [first for first in NAMES.values() for _ in range(4)]


def test_a_names_filter_takes_second_names(model, tokens):
    _, whole = model.run_with_cache(tokens)
    for name, first in ALWAYS.items():
        for names_filter in (name, ["hook_embed", name]):
            _, cache = model.run_with_cache(tokens, names_filter=names_filter)
            assert torch.equal(cache[name], whole[first]) and torch.equal(cache[first], whole[first]), name
        plain, hooks, _ = model.get_caching_hooks([name])
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert plain.keys() == {name, first} and plain[name] is plain[first]
    asked = []
    model.run_with_cache(tokens, names_filter=lambda name: bool(asked.append(name)))
    assert not NAMES.keys() & set(asked)  # a function is asked about first names


def test_gradients_are_cached_under_second_names_too(model, tokens):
    names = ["blocks.0.mlp.out.hook_in", "blocks.1.hook_out"]
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=names)
    assert torch.equal(cache["blocks.0.mlp.out.hook_in_grad"], cache["blocks.0.mlp.hook_post_grad"])
    seen = {}
    backward = [("blocks.1.hook_out", lambda grad, hook: seen.update({hook.name: grad}))]
    with model.hooks(bwd_hooks=backward):
        model(tokens, return_type="loss").backward()
    assert torch.equal(seen["blocks.1.hook_resid_post"], cache["blocks.1.hook_out_grad"])


@pytest.mark.parametrize(("name", "first"), SWITCHED.items())
def test_a_point_behind_a_flag_is_refused_by_its_second_name_on_every_path(name, first, plain_model, tokens):
    hook = lambda tensor, hook: tensor
    alone = lambda n: n == first
    for attempt in (
        lambda: plain_model.run_with_hooks(tokens, fwd_hooks=[(name, hook)]),
        lambda: plain_model.run_with_hooks(tokens, fwd_hooks=[(alone, hook)]),
        lambda: plain_model.run_with_hooks(tokens, bwd_hooks=[(name, hook)], reset_hooks_end=False),
        lambda: plain_model.hooks(fwd_hooks=[(name, hook)]).__enter__(),
        lambda: plain_model.run_with_cache(tokens, names_filter=name),
        lambda: plain_model.run_with_cache(tokens, names_filter=["hook_embed", name]),
        lambda: plain_model.run_with_cache(tokens, names_filter=alone),
        lambda: plain_model.get_caching_hooks(name),
        lambda: plain_model.add_caching_hooks(name),
        lambda: plain_model.add_caching_hooks(alone),
        lambda: plain_model.add_hook(name, hook),
        lambda: plain_model.add_hook(alone, hook),
        lambda: plain_model.add_perma_hook(name, hook),
    ):
        with pytest.raises(ConfigError, match=f"{first},? would never fire: use_"):
            attempt()
    _, cache = plain_model.run_with_cache(tokens)
    assert name not in cache
    with pytest.raises(KeyError, match=f"{first} is not in the cache: use_.* is off, and model.set_use_"):
        cache[name]


def test_hooks_for_caching_stay_until_they_are_reset(plain_model, tokens):
    _, whole = plain_model.run_with_cache(tokens)
    cache = plain_model.add_caching_hooks(["blocks.0.hook_out", "hook_embed"], incl_bwd=True)
    plain_model(tokens, return_type="loss").backward()
    assert torch.equal(cache["blocks.0.hook_out"], whole["resid_post", 0])
    assert {"hook_embed", "hook_embed_grad", "blocks.0.hook_out_grad"} <= cache.keys()
    plain_model.reset_hooks()
    cache.clear()
    plain_model(tokens)
    assert not cache


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "concat", "d_pos_emb": 3}], ids=str)
def test_some_positions_of_every_activation_are_those_of_the_whole(changes, make_model, tokens):
    """TransformerLens' own caching would take positions for heads at the sink and at the heads' inputs."""
    model = make_model(**changes)
    switch_heads(model)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    _, whole = model.run_with_cache(tokens)
    for at, expected in ((2, [2]), ((1, 4), [1, 2, 3]), ([0, 6], [0, 6]), (-1, [6])):
        _, some = model.run_with_cache(tokens, pos_slice=at)
        _, alone = model.run_with_cache(tokens[:1], pos_slice=at, remove_batch_dim=True)
        assert set(some) == set(whole) == set(model.hook_dict)
        for name, activation in whole.items():
            axis = position_axis(name)
            assert activation.shape[axis] == 7, name
            part = activation.index_select(axis, torch.tensor(expected))
            assert torch.equal(some[name], part), name
            torch.testing.assert_close(alone[name], part[0], atol=1e-5, rtol=1e-5)
