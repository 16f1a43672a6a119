"""A twin computes what its model computes, at every hook point, and lets nobody process its weights."""

import re
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import pytest
import torch

from sparse_interp.errors import ConfigError, WrongToolWarning
from sparse_interp.model import surface

if int(version("transformer-lens").split(".")[0]) < 4:
    pytest.skip("a TransformerBridge twin needs TransformerLens 4", allow_module_level=True)

FLAGS = (
    ("use_attn_result",),
    ("use_split_qkv_input",),
    ("use_attn_in",),
    ("use_hook_mlp_in",),
    ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"),
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def plain_twin(plain_model) -> Any:
    return plain_model.to_transformer_bridge()


@pytest.fixture(scope="module")
def bundled() -> Any:
    import sparse_interp as si

    return si.load("stdlib-small")


@pytest.fixture(scope="module")
def bundled_twin(bundled) -> Any:
    return bundled.to_transformer_bridge()


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference; two infinities of one sign are equal."""
    return float(torch.where(a == b, 0.0, a - b).abs().max())


def switch(model: Any, flags: tuple[str, ...], on: bool) -> None:
    for flag in flags:
        getattr(model, f"set_{flag}")(on)


# -- the same function -------------------------------------------------------------------------------------------------


def test_every_hook_point_of_every_kind_of_model_sees_the_same(any_model, tokens):
    if any_model.cfg.positions == "concat" or any_model.layers[0].why_no_sum:
        with pytest.raises(ConfigError, match="no TransformerBridge twin"):
            any_model.to_transformer_bridge()
        return
    logits, cache = any_model.run_with_cache(tokens)
    twins, twin_cache = any_model.to_transformer_bridge().run_with_cache(tokens)
    assert farthest(logits, twins) < 1e-5
    for name, seen in cache.items():
        assert twin_cache[name].shape == seen.shape and farthest(twin_cache[name], seen) < 1e-5, name


def test_an_edit_at_any_hook_point_does_the_same_in_place_or_not(plain_model, plain_twin, tokens, generator):
    whole, cache = plain_model.run_with_cache(tokens)
    reached = 0
    for name, seen in cache.items():
        noise = 0.3 * torch.randn(seen.shape, generator=generator)
        edits = [lambda x, hook, noise=noise: x + noise, lambda x, hook, noise=noise: x.add_(noise)]
        edited = plain_model.run_with_hooks(tokens, fwd_hooks=[(name, edits[0])])
        for edit in edits:
            assert farthest(plain_twin.run_with_hooks(tokens, fwd_hooks=[(name, edit)]), edited) < 1e-5, name
        reached += farthest(edited, whole) > 1e-3
    assert reached == len(cache) - 2  # all but `hook_sink`, of each layer, which is read-only


@pytest.mark.parametrize("name", ["blocks.1.ln1.hook_in", "blocks.1.ln2.hook_in"])
def test_an_edit_of_what_a_norm_reads_leaves_the_stream_alone_in_place_too(plain_twin, tokens, name):
    edits = (lambda x, hook: x + 1, lambda x, hook: x.add_(1))
    one, other = (plain_twin.run_with_hooks(tokens, fwd_hooks=[(name, edit)]) for edit in edits)
    assert torch.equal(one, other) and farthest(one, plain_twin(tokens)) > 1e-3


@pytest.mark.parametrize("flags", FLAGS, ids="+".join)
def test_switches_change_nothing_and_what_they_show_is_the_same(plain_model, plain_twin, tokens, generator, flags):
    whole = plain_twin(tokens)
    switch(plain_model, flags, True)
    switch(plain_twin, flags, True)
    logits, cache = plain_twin.run_with_cache(tokens)
    _, expected = plain_model.run_with_cache(tokens)
    assert farthest(logits, whole) < 1e-5
    shown = [name for name in expected if name.endswith(("result", "_input", "hook_attn_in", "hook_mlp_in"))]
    assert shown
    for name in (*shown, "blocks.1.attn.hook_in"):
        assert farthest(cache[name], expected[name]) < 1e-5, name
        noise = 0.3 * torch.randn(expected[name].shape, generator=generator)
        hook = (name, lambda x, hook, noise=noise: x + noise)
        edited = [model.run_with_hooks(tokens, fwd_hooks=[hook]) for model in (plain_model, plain_twin)]
        assert farthest(*edited) < 1e-5 < farthest(edited[0], whole), name
    switch(plain_twin, flags, False)
    assert torch.equal(plain_twin(tokens), whole)


def test_text_is_read_padded_and_continued_alike(bundled, bundled_twin):
    texts = ["def add(a, b):\n    return a", "x = 1"]
    assert bundled_twin.to_str_tokens(texts[0]) == bundled.to_str_tokens(texts[0])
    assert float(bundled_twin(texts[0], return_type="loss")) == pytest.approx(
        float(bundled(texts[0], return_type="loss")), abs=1e-5
    )
    for side in ("left", "right"):
        tokens, mask = bundled.to_tokens_and_mask(texts, padding_side=side)
        for given in ({"input": texts, "padding_side": side}, {"input": tokens, "attention_mask": mask}):
            assert farthest(bundled_twin(**given) * mask[..., None], bundled(**given) * mask[..., None]) < 1e-5
    greedy = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    assert bundled_twin.generate(texts[0], **greedy) == bundled.generate(texts[0], **greedy)


@pytest.mark.parametrize(
    "name", ["W_E", "W_pos", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O", "W_in", "W_out", "W_U", "b_U"]
)
def test_weights_have_their_names_and_shapes(plain_model, plain_twin, name):
    assert torch.equal(getattr(plain_twin, name), getattr(plain_model, name))


def test_the_weights_are_copies(plain_model, plain_twin, tokens):
    whole = plain_model(tokens)
    for p in plain_twin.parameters():
        p.zero_()
    assert torch.equal(plain_model(tokens), whole)


def test_a_run_stops_at_a_layer_and_starts_at_one_if_it_needs_no_tokens(make_model, tokens):
    model = make_model(bigram=False)
    twin = model.to_transformer_bridge()
    resid = twin(tokens, stop_at_layer=1)
    assert farthest(resid, model(tokens, stop_at_layer=1)) < 1e-5
    assert farthest(twin(resid, start_at_layer=1), model(tokens)) < 1e-5
    with pytest.raises(ConfigError, match="bigram table need the tokens"):
        make_model().to_transformer_bridge()(resid, start_at_layer=1)


# -- what the twin is for ----------------------------------------------------------------------------------------------


def test_a_jacobian_lens_is_the_mean_jacobian_of_the_model(make_model, bundled):
    from transformer_lens.tools.analysis import JacobianLens  # which 3.9 does not have

    model = make_model(d_vocab=2048, tokenizer=bundled.tokenizer)
    text = "return [x for x in y]"
    with torch.enable_grad():
        lens = JacobianLens.fit(
            model.to_transformer_bridge(), [text], corpus="one line", skip_first_positions=1, show_progress=False
        )
        tokens = model.to_tokens(text)
        resid = model(tokens, stop_at_layer=1)[0]

        def final(x: torch.Tensor) -> torch.Tensor:
            return model(x[None], start_at_layer=1, stop_at_layer=2, tokens=tokens)[0]

        jacobian = torch.autograd.functional.jacobian(final, resid)
    valid = slice(1, tokens.shape[1] - 1)
    expected = jacobian[valid, :, valid].sum(0).mean(1)
    assert expected.shape == (12, 12) and farthest(lens.jacobians[0], expected) < 1e-5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_weight_processing_is_refused_and_names_alone_are_not(plain_model, plain_twin, tokens):
    for ask in (plain_twin.enable_compatibility_mode, plain_twin.process_weights):
        with pytest.raises(ConfigError, match=re.escape("enable_compatibility_mode(no_processing=True)")):
            ask()
    plain_twin.enable_compatibility_mode(no_processing=True)
    assert farthest(plain_twin(tokens), plain_model(tokens)) < 1e-5


def test_what_a_cache_would_take_apart_without_abs_topk_is_refused(make_model, tokens):
    twin = make_model().to_transformer_bridge()
    _, cache = twin.run_with_cache(tokens)
    for take_apart in (
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(-1),
        cache.get_full_resid_decomposition,
        cache.apply_slice_to_batch_dim([0, 1]).compute_head_results,
        lambda: cache.stack_neuron_results(-1, apply_ln=True, project_output_onto=torch.ones(12)),
    ):
        with pytest.raises(ConfigError, match="before AbsTopK"):
            take_apart()
    twin.set_use_attn_result(True)
    model = make_model()
    _, expected = model.run_with_cache(tokens)
    _, cache = twin.run_with_cache(tokens)
    assert farthest(cache.stack_head_results()[: 2 * 3], expected.stack_head_results()[: 2 * 3]) < 1e-5


def test_a_dense_model_is_taken_apart_by_its_twin(make_model, tokens):
    model = make_model(afrac=None)
    _, cache = model.to_transformer_bridge().run_with_cache(tokens)
    neurons = cache.stack_neuron_results(-1, incl_remainder=True)
    assert farthest(neurons.sum(0), cache["resid_post", 1]) < 1e-4


def test_direct_path_patching_of_transformer_lens_comes_with_a_warning_where_something_is_cut(make_model, tokens):
    from transformer_lens.patching import get_act_patch_direct_path  # which 3.9 does not have

    for afrac in (0.4, None):
        twin = make_model(afrac=afrac).to_transformer_bridge()
        corrupt = tokens.flip(0)
        caches = [twin.run_with_cache(prompts)[1] for prompts in (tokens, corrupt)]
        with pytest.warns(WrongToolWarning, match="patch_direct_paths") if afrac else nullcontext():
            get_act_patch_direct_path(
                twin, corrupt, *caches, lambda logits: logits[:, -1, 3].mean(), 0, 0, verbose=False
            )


def test_logits_read_off_the_stream_come_with_a_warning_and_with_the_gain(make_model, tokens):
    model = make_model()
    model.ln_final.w += 0.5
    twin = model.to_transformer_bridge()
    logits, cache = twin.run_with_cache(tokens)
    with pytest.warns(WrongToolWarning, match="hook_bigram"):
        direct = cache.logit_attrs(cache.decompose_resid(), 7).sum(0)
    assert farthest(direct + model.b_U[7] + cache["hook_bigram"][..., 7], logits[..., 7]) < 1e-5
    with pytest.warns(WrongToolWarning, match="hook_bigram"):
        twin.adapter.apply_output_logits_transform(logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "concat", "d_pos_emb": 3}, "positions='concat'"),
        ({"residual_act": "relu"}, "residual_act='relu'"),
        ({"afrac_sites": ("q", "resid_post")}, "AbsTopK at resid_post"),
    ],
)
def test_what_a_bridge_cannot_express_is_named(make_model, changes, words):
    with pytest.raises(ConfigError, match=words):
        make_model(**changes).to_transformer_bridge()


def test_an_older_transformer_lens_is_told_what_is_needed(plain_model, monkeypatch):
    monkeypatch.setattr(surface, "version", lambda name: "3.9.0")
    with pytest.raises(ConfigError, match="needs TransformerLens 4 or newer; this is 3.9.0"):
        plain_model.to_transformer_bridge()


def test_too_many_tokens_and_masks_of_another_shape_are_refused(plain_twin, tokens):
    with pytest.raises(ConfigError, match="21 tokens, and the model takes at most n_ctx=16"):
        plain_twin(tokens.repeat(1, 3))
    with pytest.raises(ConfigError, match=re.escape("[batch pos], 1 for tokens; got [3, 1, 7, 7]")):
        plain_twin(tokens, attention_mask=torch.ones(3, 1, 7, 7))
