"""The forward pass: equal to an independent one, observable without being changed, and exact where it says so."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformer_lens import TransformerLensKeyValueCache

from sparse_interp.errors import ConfigError, TokenizerError
from sparse_interp.model.aliases import position_axis
from sparse_interp.model.sites import stream_hook
from sparse_interp.model.transformer import HookedSparseTransformer

SITES = ("attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write", "resid_mid", "resid_post")


def random_changes(seed: int) -> dict:
    """A configuration drawn from everything that a config can say."""
    draw = np.random.default_rng(seed)
    positions = draw.choice(["add", "concat", "none"])
    return {
        "seed": seed,
        "n_layers": int(draw.integers(1, 3)),
        "n_heads": int(draw.integers(1, 4)),
        "d_head": int(draw.integers(1, 6)),
        "d_mlp": int(draw.integers(5, 24)),
        "afrac": draw.choice([None, 0.0, 0.05, 0.25, 0.5, 0.9, 1.0]),
        "afrac_sites": tuple(site for site in SITES if draw.random() < 0.6),
        "positions": str(positions),
        "d_pos_emb": int(draw.integers(1, 5)) if positions == "concat" else None,
        "norm": str(draw.choice(["rms", "layer", "none"])),
        "norm_bias": bool(draw.integers(2)),
        "sink": bool(draw.integers(2)),
        "tie_unembed": bool(draw.integers(2)),
        "bigram": bool(draw.integers(2)),
        "residual_act": str(draw.choice(["identity", "relu"])),
        "act_fn": str(draw.choice(["gelu", "relu"])),
        "attention_dir": str(draw.choice(["causal", "bidirectional"])),
    }


def arrays(model) -> dict:
    return {name: p.double().numpy() for name, p in model.state_dict().items()}


def assert_agrees(model, reference, tokens, mask=None, atol=1e-9):
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    given = None if mask is None else mask.numpy()
    expected, seen = reference.forward(model.cfg.to_dict(), arrays(model), tokens.numpy(), given)
    np.testing.assert_allclose(logits.double(), expected, atol=atol)
    for name, value in seen.items():
        np.testing.assert_allclose(cache[name].double(), value, atol=atol, err_msg=name)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_configuration_computes_what_the_rules_say(seed, make_model, numpy_reference, tokens):
    model = make_model(dtype=torch.float64, **random_changes(seed))
    assert_agrees(model, numpy_reference, tokens)


def test_every_kind_of_model_computes_what_the_rules_say(any_model, numpy_reference, tokens):
    assert_agrees(any_model, numpy_reference, tokens, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["add", "concat", "none"])
def test_padding_is_masked_as_the_rules_say(side, positions, make_model, numpy_reference, tokens):
    model = make_model(dtype=torch.float64, positions=positions, d_pos_emb=3 if positions == "concat" else None)
    mask = torch.ones_like(tokens)
    for row, n_padding in enumerate((0, 2, 5)):
        mask[row, slice(n_padding) if side == "left" else slice(7 - n_padding, 7)] = 0
    assert_agrees(model, numpy_reference, tokens, mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_a_padded_batch_equals_its_rows_one_by_one(side, direction, make_model, tokens):
    model = make_model(dtype=torch.float64, attention_dir=direction)
    lengths = (7, 5, 2)
    where = [slice(7 - n, None) if side == "left" else slice(n) for n in lengths]
    padded, mask = torch.full_like(tokens, 49), torch.zeros_like(tokens)
    for row, (n, at) in enumerate(zip(lengths, where, strict=True)):
        padded[row, at], mask[row, at] = tokens[row, :n], 1
    logits = model(padded, attention_mask=mask)
    losses = model(padded, attention_mask=mask, return_type="loss", loss_per_token=True)
    alone = []
    for row, (n, at) in enumerate(zip(lengths, where, strict=True)):
        one = tokens[row : row + 1, :n]
        torch.testing.assert_close(logits[row, at], model(one)[0])
        alone.append(model(one, return_type="loss", loss_per_token=True)[0])
        torch.testing.assert_close(losses[row][losses[row] != 0], alone[-1])
    mean = model(padded, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(mean, torch.cat(alone).mean())


def test_a_mask_of_ones_is_no_mask(plain_model, tokens):
    assert torch.equal(plain_model(tokens, attention_mask=torch.ones_like(tokens)), plain_model(tokens))
    plain_model.train()
    with torch.no_grad():
        masked = plain_model(tokens, attention_mask=torch.ones_like(tokens), return_type="loss")
        assert torch.equal(masked, plain_model(tokens, return_type="loss"))


# -- looking changes nothing ------------------------------------------------------------------------------------------


def test_looking_at_every_hook_point_changes_no_bit(any_model, tokens):
    plain = any_model(tokens)
    with any_model.hooks(fwd_hooks=[(lambda name: True, lambda tensor, hook: tensor)]):
        assert torch.equal(any_model(tokens), plain)
    assert torch.equal(any_model.run_with_cache(tokens)[0], plain)
    assert torch.equal(any_model(tokens), plain)


def switch_all(model):
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_in(True)
    model.set_use_hook_mlp_in(True)


def test_every_hooked_tensor_has_memory_of_its_own(any_model, tokens):
    switch_all(any_model)
    owner = {}
    kept = []  # so that no memory is freed and used again

    def note(tensor, hook):
        kept.append(tensor)
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        for other, (a, b) in owner.items():
            assert end <= a or b <= start, f"{hook.name} shares memory with {other}"
        assert tensor.numel() == 0 or tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        owner[hook.name] = (start, end)

    with torch.no_grad(), any_model.hooks(fwd_hooks=[(lambda name: True, note)]):
        any_model(tokens)
    assert len(owner) >= 2 * 17


def test_editing_a_tensor_in_place_changes_only_what_comes_after(make_model, tokens):
    model, tokens = make_model(n_layers=1), tokens[:1]
    switch_all(model)
    with torch.no_grad():
        _, before = model.run_with_cache(tokens)
        order = list(before)
        for i, name in enumerate(order):
            if name.endswith("hook_sink"):
                continue  # read-only: the sink writes nothing

            def double_in_place(tensor, hook):
                tensor.mul_(2)

            cache, hooks, _ = model.get_caching_hooks()
            model.run_with_hooks(tokens, fwd_hooks=[(name, double_in_place), *hooks])
            for earlier in order[:i]:
                assert torch.equal(cache[earlier], before[earlier]), f"editing {name} reached back to {earlier}"


def test_inference_mode_computes_edits_and_caches_the_same(any_model, tokens):
    """TransformerLens' setters edit in place where no gradient is recorded."""
    halve = [("blocks.0.mlp.hook_post", lambda tensor, hook: tensor * 0.5)]
    expected, logits = any_model.run_with_hooks(tokens, fwd_hooks=halve), any_model(tokens)
    halve_in_place = [("blocks.0.mlp.hook_post", lambda tensor, hook: tensor.mul_(0.5))]
    with torch.inference_mode():
        assert torch.equal(any_model.run_with_hooks(tokens, fwd_hooks=halve_in_place), expected)
        assert torch.equal(any_model.run_with_cache(tokens)[0], logits)
    any_model(tokens, return_type="loss").backward()  # and leaves nothing behind that a gradient could not pass


def test_an_edit_at_a_hook_point_acts_as_the_value_it_leaves(plain_model, tokens):
    """In place, or returned: the same run."""
    name = "blocks.0.mlp.hook_post"
    with torch.no_grad():
        returned = plain_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t * 0.5)])
        in_place = plain_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t.mul_(0.5))])
        assert torch.equal(returned, in_place)
        assert not torch.equal(returned, plain_model(tokens))


def test_all_flags_on_computes_the_same(any_model, tokens):
    plain = any_model(tokens)
    switch_all(any_model)
    torch.testing.assert_close(any_model(tokens), plain, atol=1e-5, rtol=1e-5)
    any_model.set_use_split_qkv_input(False)
    any_model.set_use_attn_in(True)
    torch.testing.assert_close(any_model(tokens), plain, atol=1e-5, rtol=1e-5)


def test_an_edit_of_the_read_reaches_heads_that_have_forked(plain_model, tokens):
    zero = ("blocks.1.attn.hook_in", lambda t, hook: t * 0)
    plain = plain_model.run_with_hooks(tokens, fwd_hooks=[zero])
    plain_model.set_use_split_qkv_input(True)
    torch.testing.assert_close(plain_model.run_with_hooks(tokens, fwd_hooks=[zero]), plain)


def test_training_computes_the_same_function_as_evaluation(any_model, tokens):
    with torch.no_grad():
        expected = any_model(tokens), any_model(tokens, return_type="loss")
        any_model.train()
        torch.testing.assert_close(any_model(tokens), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(any_model(tokens, return_type="loss"), expected[1], atol=1e-5, rtol=1e-5)


def test_training_has_the_gradients_of_evaluation(any_model, tokens):
    def gradients():
        any_model.zero_grad()
        any_model(tokens, return_type="loss").backward()
        return {name: p.grad.clone() for name, p in any_model.named_parameters() if p.grad is not None}

    expected = gradients()
    any_model.train()
    fused = gradients()
    assert expected.keys() == fused.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_train_and_evaluate(dtype, make_model, tokens):
    model = make_model(dtype=dtype)
    assert model(tokens).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    model.train()
    model(tokens, return_type="loss").backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_return_types_are_logits_loss_both_or_nothing(plain_model, tokens):
    logits, loss = plain_model(tokens), plain_model(tokens, return_type="loss")
    assert logits.shape == (3, 7, 50)
    both = plain_model(tokens, return_type="both")
    assert torch.equal(both.logits, logits) and torch.equal(both.loss, loss)
    assert plain_model(tokens, return_type=None) is None
    per_token = plain_model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (3, 6)
    torch.testing.assert_close(per_token.mean(), loss)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ConfigError, match="return_type='logit'; choose 'logits', 'loss', 'both' or None"):
        plain_model(tokens, return_type="logit")


def test_both_is_a_named_pair_also_per_token(plain_model, tokens):
    both = plain_model(tokens, return_type="both", loss_per_token=True)
    assert both._fields == ("logits", "loss") and both.loss.shape == (3, 6)
    logits, loss = both
    assert torch.equal(plain_model.loss_fn(logits, tokens, per_token=True), loss)
    torch.testing.assert_close(plain_model.loss_fn(logits, tokens), loss.mean())
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    masked = plain_model(tokens, attention_mask=mask, return_type="both")
    assert torch.equal(plain_model.loss_fn(masked.logits, tokens, mask), masked.loss)


def test_a_loss_of_one_token_is_refused(plain_model):
    with pytest.raises(TokenizerError, match="needs at least 2 tokens; got 1"):
        plain_model(torch.tensor([[3]]), return_type="loss")


def test_tokens_without_a_batch_get_one(plain_model, tokens):
    assert torch.equal(plain_model(tokens[0]), plain_model(tokens[:1]))


def test_stopping_and_starting_again_equals_one_run(any_model, tokens):
    logits, cache = any_model.run_with_cache(tokens)
    for layer in (0, 1, 2):
        resid = any_model(tokens, stop_at_layer=layer)
        if "resid_pre" not in any_model.cfg.afrac_sites:  # else the next block cuts what the last one left
            assert torch.equal(resid, cache["resid_pre", layer] if layer < 2 else cache["resid_post", 1])
        assert torch.equal(any_model(resid, start_at_layer=layer, tokens=tokens), logits)
    assert torch.equal(any_model(tokens, stop_at_layer=-1), cache["resid_post", 0])
    middle = any_model(cache["resid_pre", 0], start_at_layer=0, stop_at_layer=1, tokens=tokens)
    assert torch.equal(middle, cache["resid_post", 0])


def test_a_run_that_stops_early_caches_what_it_met(plain_model, tokens):
    resid, cache = plain_model.run_with_cache(tokens, stop_at_layer=1)
    assert torch.equal(resid, cache["resid_post", 0])
    assert not any(name.startswith("blocks.1") for name in cache)


def test_starting_in_the_middle_needs_a_stream_and_the_tokens_behind_it(make_model, tokens):
    model = make_model()
    resid = model(tokens, stop_at_layer=1)
    with pytest.raises(ConfigError, match="pass tokens="):
        model(resid, start_at_layer=1)
    with pytest.raises(ConfigError, match=r"a residual stream \[batch pos d_model=12\]; got Tensor of shape \[3, 7\]"):
        model(tokens, start_at_layer=1)
    with pytest.raises(ConfigError, match=r"tokens \[3, 6\] do not fit a stream \[3, 7, 12\]"):
        model(resid, start_at_layer=1, tokens=tokens[:, 1:])
    with pytest.raises(ConfigError, match="start_at_layer=5, and the model has 2 layers"):
        model(resid, start_at_layer=5, tokens=tokens)
    model = make_model(bigram=False)
    assert torch.equal(model(model(tokens, stop_at_layer=1), start_at_layer=1), model(tokens))
    with pytest.raises(ConfigError, match="a loss from `start_at_layer` needs the tokens"):
        model(resid, start_at_layer=1, return_type="loss")


def test_a_padded_run_can_be_resumed_with_its_mask(plain_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    resid = plain_model(tokens, attention_mask=mask, stop_at_layer=1)
    resumed = plain_model(resid, start_at_layer=1, tokens=tokens, attention_mask=mask)
    assert torch.equal(resumed, plain_model(tokens, attention_mask=mask))


# -- one text in several runs -----------------------------------------------------------------------------------------


def new_cache(model, batch):
    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)


def test_a_text_read_in_parts_is_the_text_read_at_once(any_model, tokens):
    if any_model.cfg.attention_dir == "bidirectional":
        pytest.skip("refused, see below")
    whole, seen = any_model.run_with_cache(tokens)
    past = new_cache(any_model, 3)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        logits = any_model(tokens[:, part], past_kv_cache=past)
        torch.testing.assert_close(logits, whole[:, part], atol=1e-5, rtol=1e-5)
    for layer in (0, 1):
        for name, kept in (("k", past[layer].past_keys), ("v", past[layer].past_values)):
            assert kept.shape == (3, 7, 3, 5)
            torch.testing.assert_close(kept, seen[name, layer], atol=1e-5, rtol=1e-5)
            assert torch.equal(kept != 0, seen[name, layer] != 0)  # what AbsTopK left


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["add", "concat", "none"])
def test_padding_in_any_part_of_a_text_is_as_if_it_were_not_there(side, positions, make_model, tokens):
    model = make_model(dtype=torch.float64, positions=positions, d_pos_emb=3 if positions == "concat" else None)
    past, read = new_cache(model, 3), [[], [], []]
    for lengths in ((4, 2, 1), (2, 3, 0), (1, 1, 1)):
        n = max(lengths)
        part, mask = torch.full((3, n), 49), torch.zeros(3, n, dtype=torch.long)
        where = [slice(n - length, n) if side == "left" else slice(length) for length in lengths]
        for row, (length, at) in enumerate(zip(lengths, where, strict=True)):
            new = tokens[row, len(read[row]) : len(read[row]) + length]
            part[row, at], mask[row, at] = new, 1
            read[row] += new.tolist()
        logits = model(part, attention_mask=mask, past_kv_cache=past)
        for row, (length, at) in enumerate(zip(lengths, where, strict=True)):
            torch.testing.assert_close(logits[row, at], model(torch.tensor(read[row]))[0, -length or 99 :])
    assert past.previous_attention_mask.shape == (3, 8)


def test_with_a_past_hooks_see_the_new_tokens_and_attention_all(make_model, tokens):
    for changes in ({}, {"afrac": None, "sink": False, "bigram": False}, {"positions": "concat", "d_pos_emb": 3}):
        model = make_model(**changes)
        switch_all(model)
        _, whole = model.run_with_cache(tokens)
        past = new_cache(model, 3)
        model(tokens[:, :5], past_kv_cache=past)
        _, cache = model.run_with_cache(tokens[:, 5:], past_kv_cache=past)
        assert set(cache) == set(whole)
        for name, activation in cache.items():
            expected = whole[name].narrow(position_axis(name), 5, 2)
            torch.testing.assert_close(activation, expected, atol=1e-5, rtol=1e-5, msg=name)
        assert cache["pattern", 1].shape == (3, 3, 2, 7) and cache.pattern_with_sink(1).shape == (3, 3, 2, 8)
        stream = cache.get_full_resid_decomposition(2).sum(0)
        torch.testing.assert_close(stream, cache["resid_post", 1], atol=1e-5, rtol=1e-5)


def test_a_frozen_past_serves_many_continuations(plain_model, tokens):
    past = new_cache(plain_model, 3)
    plain_model(tokens[:, :4], past_kv_cache=past)
    past.freeze()
    for continuation in (tokens[:, 4:], tokens[:, 4:].flip(0)):
        logits = plain_model(continuation, past_kv_cache=past)
        at_once = plain_model(torch.cat([tokens[:, :4], continuation], 1))
        torch.testing.assert_close(logits, at_once[:, 4:], atol=1e-5, rtol=1e-5)
    assert past[0].past_keys.shape[1] == past.previous_attention_mask.shape[1] == 4
    past.unfreeze()
    plain_model(tokens[:, 4:], past_kv_cache=past)
    assert past[1].past_values.shape[1] == 7


def test_a_loss_after_a_past_is_that_of_the_new_tokens(plain_model, tokens):
    per_token = plain_model(tokens, return_type="loss", loss_per_token=True)
    mask = torch.ones_like(tokens)
    for n_masked in (0, 1):
        past = new_cache(plain_model, 3)
        plain_model(tokens[:, :4], past_kv_cache=past)
        mask[0, 7 - n_masked :] = 0
        both = plain_model(tokens[:, 4:], return_type="both", attention_mask=mask[:, 4:], past_kv_cache=past)
        kept = per_token[:, 4:][(mask[:, 5:]).bool()]
        torch.testing.assert_close(both.loss, kept.mean(), atol=1e-5, rtol=1e-5)


def test_a_stream_with_its_past_resumes_in_the_middle(plain_model, tokens):
    expected, cache = plain_model.run_with_cache(tokens)
    past = new_cache(plain_model, 3)
    plain_model(tokens[:, :4], past_kv_cache=past)
    stream = cache["resid_pre", 0][:, 4:]
    logits = plain_model(stream, start_at_layer=0, tokens=tokens[:, 4:], past_kv_cache=past)
    torch.testing.assert_close(logits, expected[:, 4:], atol=1e-5, rtol=1e-5)


def test_training_reads_a_past_as_evaluation_does(plain_model, tokens):
    expected = plain_model(tokens)
    plain_model.train()
    past = new_cache(plain_model, 3)
    plain_model(tokens[:, :4], past_kv_cache=past)
    torch.testing.assert_close(plain_model(tokens[:, 4:], past_kv_cache=past), expected[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_past_is_kept_in_the_precision_of_the_model(dtype, make_model, tokens):
    model = make_model(dtype=dtype)
    past = new_cache(model, 3)
    model(tokens[:, :4], past_kv_cache=past)
    assert past[0].past_keys.dtype == dtype
    assert model(tokens[:, 4:], past_kv_cache=past).isfinite().all()


def test_a_past_that_does_not_fit_is_refused(make_model, tokens):
    model = make_model()
    first, then = tokens[:, :4], tokens[:, 4:]

    def refused(past, message, model=model, tokens=then, error=ConfigError):
        with pytest.raises(error, match=message):
            model(tokens, past_kv_cache=past)

    refused(new_cache(model, 1), r"keys \[1, 0, 3, 5\] in layer 0, and this run needs \[3, 0, 3, 5\]")
    refused(new_cache(make_model(n_heads=2), 3), r"keys \[3, 0, 2, 5\]")
    refused(new_cache(make_model(n_layers=1), 3), "past_kv_cache has 1 layers, and the model 2")
    bidirectional = make_model(attention_dir="bidirectional")
    refused(new_cache(bidirectional, 3), "nothing of it can be kept", model=bidirectional)

    half = new_cache(model, 3)
    model(first, stop_at_layer=1, past_kv_cache=half)
    assert model(then, stop_at_layer=1, past_kv_cache=half).shape == (3, 3, 12)  # the same layers again: fine
    refused(half, r"keys \[3, 0, 3, 5\] in layer 1, and this run needs \[3, 7, 3, 5\].*left this layer out")

    def fail(tensor, hook):
        raise RuntimeError("stop")

    failed = new_cache(model, 3)
    with pytest.raises(RuntimeError, match="stop"):
        model.run_with_hooks(first, fwd_hooks=[("blocks.1.hook_resid_pre", fail)], past_kv_cache=failed)
    refused(failed, "a run that failed")

    full = new_cache(model, 3)
    for part in (tokens, tokens):
        model(part, past_kv_cache=full)
    message = r"3 tokens after the 14 in past_kv_cache, and the model takes at most n_ctx=16"
    refused(full, message, error=TokenizerError)
    with pytest.raises(TokenizerError, match=message):
        model(torch.zeros(3, 3, 12), start_at_layer=0, tokens=then, past_kv_cache=full)
    assert model(tokens[:, :2], past_kv_cache=full).shape == (3, 2, 50)  # a refusal leaves the cache as it was


# -- the model as an object -------------------------------------------------------------------------------------------


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone(make_model):
    state = torch.get_rng_state()
    same, other = make_model(seed=3), make_model(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(make_model(seed=3).W_E, same.W_E)
    assert not torch.equal(other.W_E, same.W_E)


def test_the_config_follows_moves_and_casts(plain_model):
    assert (plain_model.cfg.device, plain_model.cfg.dtype) == ("cpu", torch.float32)
    assert plain_model.double().cfg.dtype == torch.float64
    assert plain_model.to(torch.bfloat16, print_details=False).cfg.dtype == torch.bfloat16
    assert plain_model.to("meta").cfg.device == "meta"


def test_two_models_of_one_config_do_not_share_it(make_model):
    from sparse_interp.model.config import ModelConfig

    cfg = ModelConfig(d_model=8, d_head=4, n_layers=1, d_vocab=9, n_ctx=4)
    model = HookedSparseTransformer(cfg)
    model.set_use_attn_result(True)
    model.double()
    assert (cfg.use_attn_result, cfg.dtype) == (False, torch.float32)
    assert model.blocks[0].attn.cfg.use_attn_result


def test_copies_and_pickles_compute_the_same(any_model, tokens):
    expected = any_model(tokens)
    assert torch.equal(copy.deepcopy(any_model)(tokens), expected)
    assert torch.equal(pickle.loads(pickle.dumps(any_model))(tokens), expected)


def test_a_copy_has_switches_hooks_and_weights_of_its_own(plain_model, tokens):
    expected = plain_model(tokens)
    for other in (copy.deepcopy(plain_model), pickle.loads(pickle.dumps(plain_model))):
        other.set_use_attn_result(True)
        name = "blocks.0.attn.hook_result"
        other.add_hook(name, lambda heads, hook: heads * 0)
        assert name in other.run_with_cache(tokens)[1] and not torch.equal(other(tokens), expected)
        other.reset_hooks()
        torch.testing.assert_close(other(tokens), expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            other.embed.W_E.zero_()
    assert name not in plain_model.run_with_cache(tokens)[1] and torch.equal(plain_model(tokens), expected)


def test_a_state_makes_another_model_the_same(make_model, tokens):
    model, other = make_model(), make_model(seed=5)
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"embed.W_E": model.W_E})


def test_the_state_has_parameters_and_the_table_and_nothing_else(any_model):
    names = {name for name, _ in any_model.named_parameters()}
    assert set(any_model.state_dict()) - names <= {"bigram_table"}
    assert "unembed.W_U" in names or any_model.cfg.tie_unembed


# -- from one residual site to another --------------------------------------------------------------------------------


def test_a_run_between_residual_sites_holds_what_a_whole_run_holds_there(any_model, tokens):
    seen = {}
    names = [stream_hook(site) for site in range(5)]
    with torch.no_grad():
        logits = any_model.run_with_hooks(
            tokens, fwd_hooks=[(n, lambda x, hook: seen.update({hook.name: x})) for n in names]
        )
        streams = [any_model.between(tokens, leave=site) for site in range(5)]
        for site, stream in enumerate(streams):
            assert torch.equal(stream, seen[names[site]])
            assert torch.equal(any_model.between(tokens, enter=(site, stream)), logits)
            for stop in range(site, 5):
                assert torch.equal(any_model.between(tokens, enter=(site, stream), leave=stop), streams[stop])
        assert torch.equal(any_model.between(tokens), logits)


def test_a_run_between_sites_of_a_padded_batch_is_that_of_each_prompt(plain_model, tokens):
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), tokens], 1)
    mask = (torch.arange(9) >= 2).long().expand(3, -1)
    with torch.no_grad():
        stream = plain_model.between(padded, leave=1, attention_mask=mask)
        torch.testing.assert_close(stream[:, 2:], plain_model.between(tokens, leave=1))
        logits = plain_model.between(padded, enter=(1, stream), attention_mask=mask)
        torch.testing.assert_close(logits[:, 2:], plain_model(tokens))


def test_a_run_from_the_middle_of_a_block_does_not_run_its_attention(plain_model, tokens):
    met = []
    hooks = [(f"blocks.{layer}.attn.hook_v", lambda v, hook: met.append(hook.name)) for layer in range(2)]
    with plain_model.hooks(fwd_hooks=hooks):
        plain_model.between(tokens, enter=(1, torch.zeros(3, 7, 12)))
    assert met == ["blocks.1.attn.hook_v"]


def test_residual_sites_that_are_not_there_or_lie_behind_are_refused(plain_model, tokens):
    with pytest.raises(ConfigError, match="site 0 to 5: a model of 2 layers has sites 0 to 4"):
        plain_model.between(tokens, leave=5)
    with pytest.raises(ConfigError, match="site 3 to 2"):
        plain_model.between(tokens, enter=(3, torch.zeros(3, 7, 12)), leave=2)
    with pytest.raises(ConfigError, match="d_model=12"):
        plain_model.between(tokens, enter=(3, torch.zeros(3, 7, 10)))
