"""The cache: every decomposition adds up to the stream that it takes apart, whatever AbsTopK cut away."""

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.model.cache import SparseActivationCache

NOT_A_SUM = ({"residual_act": "relu"}, {"afrac_sites": ("resid_mid",)}, {"afrac_sites": ("v", "resid_post")})


@pytest.fixture
def cache(any_additive_model, tokens):
    return any_additive_model.run_with_cache(tokens)[1]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def stream(cache, layer, mlp_input=False):
    if mlp_input:
        return cache["resid_mid", layer]
    return cache["resid_pre", layer] if layer < 2 else cache["resid_post", 1]


# -- everything adds up -----------------------------------------------------------------------------------------------


def test_half_blocks_and_embeddings_add_up_to_the_stream(cache):
    for layer in (0, 1, 2):
        close(cache.decompose_resid(layer).sum(0), stream(cache, layer))
    close(cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1])


def test_heads_add_up_to_the_attention_write(cache):
    heads, labels = cache.stack_head_results(2, return_labels=True)
    assert labels == cache.model.all_head_labels
    close(heads[:3].sum(0), cache["attn_out", 0])
    close(heads[3:].sum(0), cache["attn_out", 1])
    close(cache.stack_head_results(2, incl_remainder=True).sum(0), cache["resid_post", 1])


def test_heads_are_what_the_hook_sees_when_its_flag_is_on(any_model, tokens):
    """Computed afterwards from z, or recorded."""
    _, without = any_model.run_with_cache(tokens)
    without.compute_head_results()
    any_model.set_use_attn_result(True)
    _, recorded = any_model.run_with_cache(tokens)
    for layer in (0, 1):
        close(without["result", layer], recorded["result", layer])


def test_neurons_and_their_bias_add_up_to_the_mlp_write(cache):
    for layer in (0, 1):
        bias = cache.model.blocks[layer].mlp.b_out
        kept = cache._kept(layer, "mlp_out")
        bias = bias if kept is None else bias * kept
        close(cache.get_neuron_results(layer).sum(-2) + bias, cache["mlp_out", layer])
    close(cache.stack_neuron_results(2, incl_remainder=True).sum(0), cache["resid_post", 1])


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_adds_up_to_the_stream(cache, expand_neurons):
    for layer, mlp_input in ((0, False), (0, True), (1, False), (1, True), (2, False)):
        rows, labels = cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons, return_labels=True)
        assert len(rows) == len(labels) == len(set(labels)) and labels[-1] == "bias"
        close(rows.sum(0), stream(cache, layer, mlp_input))


@pytest.mark.filterwarnings("ignore:this model adds a row of its bigram table")
def test_a_normalised_and_projected_decomposition_adds_up_to_what_is_read(cache, generator):
    onto = torch.randn(12, 2, generator=generator)
    norms = {
        (2, False): cache.model.ln_final,
        (1, True): cache.model.blocks[1].ln2,
        (1, False): cache.model.blocks[1].ln1,
    }
    for (layer, mlp_input), norm in norms.items():
        x = stream(cache, layer, mlp_input)
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        read = x if norm.kind == "none" else x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        rows = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True)
        close(rows.sum(0), read)
        both = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True, project_output_onto=onto)
        close(both.sum(0), read @ onto)
        one = cache.get_full_resid_decomposition(layer, mlp_input, project_output_onto=onto[:, 0])
        close(one.sum(0), x @ onto[:, 0] if norm.kind != "layer" else stream(cache, layer, mlp_input) @ onto[:, 0])


@pytest.mark.filterwarnings("ignore:this model adds a row of its bigram table")
def test_neurons_projected_are_neurons_times_the_direction(cache, generator):
    onto = torch.randn(12, 2, generator=generator)
    whole = cache.get_neuron_results(1)
    close(cache.get_neuron_results(1, project_output_onto=onto), whole @ onto)
    close(cache.get_neuron_results(1, project_output_onto=onto[:, 0]), whole @ onto[:, 0])
    close(cache.get_neuron_results(1, neuron_slice=[2, 5], pos_slice=-1), whole[:, -1, [2, 5]])
    scaled = cache.stack_neuron_results(2, apply_ln=True, project_output_onto=onto)
    close(scaled, cache.stack_neuron_results(2, apply_ln=True) @ onto)


def test_slices_of_positions_and_caches_without_a_batch_add_up_too(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens[:1], remove_batch_dim=True)
    close(cache.get_full_resid_decomposition(2).sum(0), cache["resid_post", 1])
    close(cache.stack_head_results(2, incl_remainder=True).sum(0), cache["resid_post", 1])
    _, cache = plain_model.run_with_cache(tokens)
    for at in (-1, (2, 5), [0, 3]):
        expected = cache["resid_post", 1][:, slice(*at) if isinstance(at, tuple) else at]
        close(cache.get_full_resid_decomposition(2, pos_slice=at).sum(0), expected)
        close(cache.decompose_resid(2, pos_slice=at).sum(0), expected)


def test_a_decomposition_holds_in_a_run_with_padding(plain_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    _, cache = plain_model.run_with_cache(tokens, attention_mask=mask)
    close(cache.get_full_resid_decomposition(2).sum(0), cache["resid_post", 1])


@pytest.mark.filterwarnings("ignore:this model adds a row of its bigram table")
def test_stacks_of_heads_and_neurons_are_read_as_the_norm_reads_them(cache, generator):
    """With and without the path that multiplies by directions before it makes the large tensor."""
    onto = torch.randn(12, 2, generator=generator)
    norms = {1: cache.model.blocks[1].ln1, 2: cache.model.ln_final}
    for layer, norm in norms.items():
        x = stream(cache, layer)
        x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        read = x if norm.kind == "none" else x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        heads = cache.stack_head_results(layer, incl_remainder=True, apply_ln=True)
        close(heads.sum(0), read)
        close(heads[:3].sum(0), cache.apply_ln_to_stack(cache["attn_out", 0][None], layer)[0])
        for at in (None, -1, [1, 4]):
            neurons = cache.stack_neuron_results(layer, apply_ln=True, incl_remainder=True, pos_slice=at)
            fused = cache.stack_neuron_results(
                layer, apply_ln=True, incl_remainder=True, pos_slice=at, project_output_onto=onto
            )
            close(neurons.sum(0), read if at is None else read[:, at])
            close(fused, neurons @ onto)
            few = cache.stack_neuron_results(layer, pos_slice=at, neuron_slice=(2, 7), project_output_onto=onto[:, 0])
            close(few[:5], cache.stack_neuron_results(layer, pos_slice=at)[2:7] @ onto[:, 0])


def test_a_cache_of_some_positions_is_taken_apart_like_the_whole(any_additive_model, tokens):
    _, whole = any_additive_model.run_with_cache(tokens)
    for at, kept in ((-1, [6]), ([1, 4], [1, 4])):
        _, some = any_additive_model.run_with_cache(tokens, pos_slice=at)
        close(some.get_full_resid_decomposition(2), whole.get_full_resid_decomposition(2, pos_slice=kept))
        close(some.get_full_resid_decomposition(2).sum(0), some["resid_post", 1])


# -- logits -----------------------------------------------------------------------------------------------------------


def test_components_of_a_logit_difference_add_up_to_it(make_model, tokens):
    """The final gain is in the direction, so nothing needs folding; b_U stands outside the stream."""
    for norm in ("rms", "layer", "none"):
        model = make_model(norm=norm, bigram=False, initializer_range=0.1)
        logits, cache = model.run_with_cache(tokens)
        rows = cache.get_full_resid_decomposition(2)
        got = cache.logit_attrs(rows, tokens=torch.tensor(5), incorrect_tokens=torch.tensor(9)).sum(0)
        w = model.ln_final
        constant = 0.0 if norm != "layer" else (w.b @ (model.W_U[:, 5] - model.W_U[:, 9]))
        close(got + constant + model.b_U[5] - model.b_U[9], logits[..., 5] - logits[..., 9])


def test_each_prompt_may_have_a_target_of_its_own(make_model, generator):
    """At all of its positions; also where there are as many positions as prompts."""
    model = make_model(bigram=False)
    for n_pos in (7, 3):
        tokens = torch.randint(50, (3, n_pos), generator=generator)
        _, cache = model.run_with_cache(tokens)
        rows, targets, others = cache.decompose_resid(), torch.tensor([5, 9, 2]), torch.tensor([1, 1, 8])
        for other in (None, others):
            got = cache.logit_attrs(rows, targets, other)
            for i in range(3):
                alone = cache.logit_attrs(rows, int(targets[i]), None if other is None else int(other[i]))
                close(got[:, i], alone[:, i])
            last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), targets, other, pos_slice=-1)
            close(last, got[:, :, -1])
            some = cache.logit_attrs(
                rows, targets[[0, 2]], None if other is None else other[[0, 2]], batch_slice=[0, 2]
            )
            close(some, got[:, [0, 2]])
        everywhere = cache.logit_attrs(rows, tokens)
        close(everywhere[:, 1, 2], cache.logit_attrs(rows, int(tokens[1, 2]))[:, 1, 2])
    _, one = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    alone = one.logit_attrs(one.decompose_resid(), 5, has_batch_dim=False)
    close(alone, cache.logit_attrs(rows, torch.tensor([5, 5, 5]))[:, 0])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", NOT_A_SUM, ids=str)
def test_a_stream_that_is_no_sum_has_no_decomposition(make_model, tokens, change):
    _, cache = make_model(**change).run_with_cache(tokens)
    for decompose in (
        cache.decompose_resid,
        cache.get_full_resid_decomposition,
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(1),
    ):
        with pytest.raises(ConfigError, match="this model's residual stream is not the sum of what was written to it"):
            decompose()
    assert cache.accumulated_resid().shape == (3, 3, 7, 12)


def test_a_cache_without_the_embedding_does_not_leave_it_out_silently(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens, names_filter=lambda name: name.endswith("_out"))
    with pytest.raises(ConfigError, match="hook_embed and hook_pos_embed is not in the cache"):
        cache.decompose_resid()
    assert len(cache.decompose_resid(incl_embeds=False)) == 4


def test_what_a_cache_lacks_is_a_key_error_that_says_why(make_model, tokens):
    _, cache = make_model(sink=False).run_with_cache(tokens, names_filter=["hook_embed", "blocks.0.hook_mlp_out"])
    for key, why in (
        ("blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out is not in the cache: it was not asked for"),
        (("resid_post", -1), "blocks.1.hook_resid_post is not in the cache: it was not asked for"),
        (("result", 0), "hook_result is not in the cache: use_attn_result is off"),
        (("sink", 0, "attn"), "hook_sink is not in the cache: the model was built with sink=False"),
        ("blocks.0.hook_nonsense", "the model has no such hook point"),
        ("hook_embed_grad", "it was not asked for"),
    ):
        assert key not in cache
        with pytest.raises(KeyError, match=why):
            cache[key]
    assert "hook_embed" in cache and ("mlp_out", 0) in cache and "embed" in cache and 3 not in cache


# -- attention and slices ---------------------------------------------------------------------------------------------


def test_attention_with_the_sink_as_last_key_sums_to_one(any_model, tokens):
    _, cache = any_model.run_with_cache(tokens)
    for layer in (0, -1):
        pattern = cache.pattern_with_sink(layer)
        assert pattern.shape == (3, 3, 7, 8)
        assert torch.equal(pattern[..., :-1], cache["pattern", layer])
        close(pattern.sum(-1), torch.ones(3, 3, 7))
        assert bool((pattern[..., -1] > 0).all()) == any_model.cfg.sink


def test_some_prompts_of_a_cache_are_such_a_cache_again(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    for at in ([0, 2], 1):
        some = cache.apply_slice_to_batch_dim(at)
        assert isinstance(some, SparseActivationCache)
        close(some.get_full_resid_decomposition(2).sum(0), cache["resid_post", 1][at])


def test_a_cache_without_its_batch_or_elsewhere_is_such_a_cache_still(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens[:1])
    rows = cache.get_full_resid_decomposition(2)
    assert cache.to("cpu") is cache and len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.values())
    alone = cache.remove_batch_dim()
    assert isinstance(alone, SparseActivationCache) and alone.pattern_with_sink(0).shape == (3, 7, 8)
    close(alone.get_full_resid_decomposition(2), rows[:, 0])
    close(alone.stack_activation("resid_post")[1], alone["resid_post", 1])
    with pytest.raises(AssertionError):
        plain_model.run_with_cache(tokens)[1].remove_batch_dim()


def test_the_sink_of_a_cache_that_has_none_is_not_guessed(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_pattern")
    with pytest.raises(KeyError, match="blocks.0.attn.hook_sink is not in the cache: it was not asked for"):
        cache.pattern_with_sink(0)
