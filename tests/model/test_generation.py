"""Continuing texts: the same tokens with and without a cache of keys and values, and refusals before work begins."""

from unittest.mock import patch

import pytest
import torch

from sparse_interp.errors import ConfigError, TokenizerError

QUIET = {"stop_at_eos": False, "verbose": False}


@pytest.fixture
def model(make_model, tokenizer):
    return make_model(tokenizer, d_vocab=2048)


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_greedy_generation_takes_the_largest_logit_each_time(plain_model, tokens):
    out = plain_model.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(out[:, :7], tokens)
    for n in range(7, 11):
        assert torch.equal(out[:, n], plain_model(out[:, :n])[:, -1].argmax(-1))


def test_text_comes_back_as_text_with_its_prompt(model):
    text = model.generate("def f", max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert isinstance(text, str) and text.startswith("def f")
    both = model.generate(["def f", "x"], max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert both[0] == text and both[1].startswith("x")
    ids = model.generate("x", max_new_tokens=3, return_type="tokens", do_sample=False, stop_at_eos=False, verbose=False)
    assert ids.shape == (1, 5)


def test_a_generator_makes_sampling_repeatable_and_moves_on(plain_model, tokens):
    def draw(generator):
        return plain_model.generate(tokens, max_new_tokens=5, stop_at_eos=False, verbose=False, generator=generator)

    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    first, second = draw(generator), draw(generator)
    assert torch.equal(draw(torch.Generator().manual_seed(4)), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_that_met_its_end_is_filled_up_and_the_run_stops_when_all_have(plain_model, tokens):
    greedy = plain_model.generate(tokens, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    end = int(greedy[0, 8])
    out = plain_model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=end, verbose=False)
    for row, free in zip(out, greedy, strict=True):
        met = (free[7:] == end).nonzero()[:, 0]
        stop = 7 + int(met[0]) + 1 if len(met) else 13
        assert torch.equal(row[:stop], free[: len(row)][:stop])
        assert (row[stop:] == end).all()
    alone = plain_model.generate(tokens[:1], max_new_tokens=6, do_sample=False, eos_token_id=[end], verbose=False)
    assert alone.shape[1] <= 9


def test_generation_beyond_the_context_is_refused_before_it_begins(plain_model, tokens):
    fits = plain_model.generate(tokens, max_new_tokens=10, stop_at_eos=False, verbose=False)
    assert fits.shape == (3, 17)  # the last token is never read
    with pytest.raises(TokenizerError, match="a prompt of 7 tokens and 11 new ones.*n_ctx=16: ask for at most 10"):
        plain_model.generate(tokens, max_new_tokens=11, stop_at_eos=False, verbose=False)
    with pytest.raises(TokenizerError, match="stop_at_eos needs a tokenizer or eos_token_id="):
        plain_model.generate(tokens, max_new_tokens=1, verbose=False)
    with pytest.raises(ConfigError, match="return_type='text'; choose 'input', 'str', 'tokens' or 'embeds'"):
        plain_model.generate(tokens, return_type="text", verbose=False)


def test_generation_leaves_the_training_mode_as_it_was(plain_model, tokens):
    plain_model.train()
    plain_model.generate(tokens, max_new_tokens=1, stop_at_eos=False, verbose=False)
    assert plain_model.training


# -- with keys and values kept ----------------------------------------------------------------------------------------


def logits_of_each_step(model, *args, **kwargs):
    """What `generate` returns, and the last logits of every step."""
    seen = []
    note = ("unembed.hook_out", lambda logits, hook: seen.append(logits[:, -1].clone()))
    with model.hooks(fwd_hooks=[note]):
        out = model.generate(*args, **kwargs, do_sample=False, **QUIET)
    return out, torch.stack(seen)


def test_keeping_keys_and_values_changes_no_token_and_no_logit(any_model, tokens):
    kept, logits = logits_of_each_step(any_model, tokens, max_new_tokens=9)
    whole, expected = logits_of_each_step(any_model, tokens, max_new_tokens=9, use_past_kv_cache=False)
    assert kept.shape == (3, 16) and torch.equal(kept, whole)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_texts_of_different_lengths_continue_as_each_would_alone(model):
    texts = ["def f", "x", "if a == 1:"]
    together = model.generate(texts, max_new_tokens=5, do_sample=False, **QUIET)
    assert together == [model.generate(text, max_new_tokens=5, do_sample=False, **QUIET) for text in texts]
    again, expected = logits_of_each_step(model, texts, max_new_tokens=5, use_past_kv_cache=False)
    _, logits = logits_of_each_step(model, texts, max_new_tokens=5)
    assert again == together
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_drawing_is_the_same_with_and_without_kept_keys(make_model, tokens):
    model = make_model(dtype=torch.float64)
    draw = {"top_k": 20, "temperature": 0.7, "freq_penalty": 0.2, **QUIET}
    first = model.generate(tokens, generator=torch.Generator().manual_seed(5), **draw)
    kept = model.generate(tokens, generator=torch.Generator().manual_seed(5), use_past_kv_cache=False, **draw)
    assert torch.equal(first, kept)


def test_a_step_reads_the_new_token_alone(plain_model, tokens):
    lengths = []
    note = ("hook_embed", lambda resid, hook: lengths.append(resid.shape[1]))
    with plain_model.hooks(fwd_hooks=[note]):
        plain_model.generate(tokens, max_new_tokens=3, **QUIET)
        plain_model.generate(tokens, max_new_tokens=3, use_past_kv_cache=False, **QUIET)
    assert lengths == [7, 1, 1, 7, 8, 9]


def test_an_intervention_acts_on_every_token_that_is_read(plain_model, tokens):
    """Nodes held at a value: the same text whether it is read at once or token by token."""
    hold = ("blocks.0.mlp.out.hook_in", lambda neurons, hook: neurons * 0 + 0.5)
    with plain_model.hooks(fwd_hooks=[hold]):
        kept = plain_model.generate(tokens, max_new_tokens=6, do_sample=False, **QUIET)
        whole = plain_model.generate(tokens, max_new_tokens=6, do_sample=False, use_past_kv_cache=False, **QUIET)
    assert torch.equal(kept, whole)
    assert not torch.equal(kept, plain_model.generate(tokens, max_new_tokens=6, do_sample=False, **QUIET))


def test_bidirectional_attention_keeps_nothing_and_is_read_anew(make_model, tokens):
    model = make_model(attention_dir="bidirectional")
    out = model.generate(tokens, max_new_tokens=2, do_sample=False, **QUIET)
    assert torch.equal(out[:, 8], model(out[:, :8])[:, -1].argmax(-1))


# -- token vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "concat", "d_pos_emb": 3}, {"afrac": None}], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "anew"])
def test_a_text_given_as_its_token_vectors_continues_as_the_text(keep, changes, make_model, tokens):
    model = make_model(bigram=False, **changes)
    expected, logits = logits_of_each_step(model, tokens, max_new_tokens=5)
    vectors = model.embed(tokens)
    out, seen = logits_of_each_step(model, vectors, max_new_tokens=5, use_past_kv_cache=keep)
    torch.testing.assert_close(seen, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, model.embed(expected))
    new = model.generate(vectors, max_new_tokens=5, return_type="tokens", do_sample=False, **QUIET)
    assert torch.equal(new, expected[:, 7:])
    as_vectors = model.generate(tokens, max_new_tokens=5, return_type="embeds", do_sample=False, **QUIET)
    assert torch.equal(as_vectors, out)


def test_new_tokens_of_a_text_given_as_vectors_come_as_text_when_asked(make_model, tokenizer):
    model = make_model(tokenizer, d_vocab=2048, bigram=False)
    whole = model.generate("def f", max_new_tokens=3, do_sample=False, **QUIET)
    vectors = model.embed(model.to_tokens("def f"))
    assert "def f" + model.generate(vectors, max_new_tokens=3, return_type="str", do_sample=False, **QUIET) == whole


def test_vectors_are_refused_where_logits_depend_on_the_token_itself(make_model, tokens):
    with pytest.raises(ConfigError, match="this model's bigram table adds to the logits by token"):
        make_model().generate(torch.zeros(1, 3, 12), verbose=False)
    with pytest.raises(ConfigError, match=r"token vectors are \[batch pos d_model=12\]; got \[1, 3, 11\]"):
        make_model(bigram=False).generate(torch.zeros(1, 3, 11), verbose=False)


# -- ids --------------------------------------------------------------------------------------------------------------


def test_ids_without_a_batch_get_one(plain_model, tokens):
    out = plain_model.generate(tokens[0], max_new_tokens=2, do_sample=False, **QUIET)
    assert torch.equal(out, plain_model.generate(tokens[:1], max_new_tokens=2, do_sample=False, **QUIET))


def test_ids_padded_on_the_left_are_masked_when_that_side_is_said(model):
    texts = ["def f(x):", "x"]
    ids = model.to_tokens(texts, padding_side="left")
    said = model.generate(ids, max_new_tokens=4, padding_side="left", do_sample=False, **QUIET)
    assert torch.equal(said, model.generate(texts, max_new_tokens=4, return_type="tokens", do_sample=False, **QUIET))


def test_nothing_runs_before_the_arguments_are_checked(plain_model, tokens):
    with patch.object(type(plain_model), "forward", side_effect=AssertionError("ran")):
        for arguments in ({"max_new_tokens": 11}, {"return_type": "words"}, {"stop_at_eos": True}):
            with pytest.raises((ConfigError, TokenizerError)):
                plain_model.generate(tokens, **(QUIET | arguments))
    assert torch.equal(plain_model.generate(tokens, max_new_tokens=0, **QUIET), tokens)
