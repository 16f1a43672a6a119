"""Attribution of logits: the rows add up to the model's own logit difference, whatever the model is made of."""

import pandas as pd
import pytest
import torch

from sparse_interp.errors import ConfigError, TokenizerError, WrongToolWarning
from sparse_interp.model.logits import AttributionTable, direct_logit_attribution, induction_loss

ANSWER, FOIL = torch.tensor([5, 0, 49]), torch.tensor([9, 1, 3])


def close(a, b):
    torch.testing.assert_close(
        torch.tensor(list(a), dtype=torch.float32) if isinstance(a, pd.Series) else a, b, atol=1e-5, rtol=1e-5
    )


def difference(logits, pos=-1):
    here = logits[torch.arange(3), pos]
    return here[torch.arange(3), ANSWER] - here[torch.arange(3), FOIL]


def component(table, name):
    return torch.tensor(table.frame[table.frame.component == name].logits.to_numpy(), dtype=torch.float32)


# -- everything adds up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["layers", "heads", "neurons"])
def test_components_add_up_to_the_models_logit_difference(any_additive_model, tokens, parts):
    table = direct_logit_attribution(any_additive_model, tokens, ANSWER, FOIL, parts=parts)
    close(table.totals, difference(any_additive_model(tokens)))
    assert not table.frame.duplicated(["prompt", "component"]).any()


@pytest.mark.parametrize("parts", ["layers", "heads", "neurons"])
def test_without_a_foil_they_add_up_to_the_logit_at_any_position(plain_model, tokens, parts):
    pos = torch.tensor([0, 3, -2])
    table = direct_logit_attribution(plain_model, tokens, ANSWER, pos=pos, parts=parts)
    close(table.totals, plain_model(tokens)[torch.arange(3), pos, ANSWER])


def test_heads_and_neurons_add_up_to_their_half_block(plain_model, tokens):
    whole = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL)
    heads = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL, parts="heads")
    fine = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL, parts="neurons")
    close(sum(component(heads, f"L1H{h}") for h in range(3)), component(whole, "1_attn_out"))
    close(component(heads, "1_mlp_out"), component(whole, "1_mlp_out"))
    mlps = sum(component(fine, f"L{layer}N{n}") for layer in (0, 1) for n in range(20)) + component(fine, "bias")
    close(mlps, component(whole, "0_mlp_out") + component(whole, "1_mlp_out"))


def test_the_bigram_table_has_a_row_of_its_own_and_is_announced(plain_model, tokens):
    table = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL)
    last = plain_model.bigram_table[tokens[:, -1]]
    added = last[torch.arange(3), ANSWER] - last[torch.arange(3), FOIL]
    close(component(table, "bigram"), added)
    share = table.frame[table.frame.component == "bigram"].share
    close(share, added / difference(plain_model(tokens)))
    sentence = f"bigram table: {added.mean():.3f} of {difference(plain_model(tokens)).mean():.3f} logits"
    assert str(table).startswith(sentence) and sentence in table._repr_html_()


def test_a_model_without_a_table_says_so(make_model, tokens):
    table = direct_logit_attribution(make_model(bigram=False, norm="layer"), tokens, ANSWER, FOIL)
    assert list(table.frame.component[-2:]) == ["ln_final.b", "b_U"] and str(table).startswith("no bigram table")


def test_a_folded_gain_moves_nothing(make_model, tokens):
    model, folded = make_model(), make_model()
    with torch.no_grad():
        folded.unembed.W_U *= folded.ln_final.w[:, None]
        folded.ln_final.w.fill_(1)
    close(folded(tokens), model(tokens))
    assert not torch.equal(folded.W_U, model.W_U)
    a, b = (direct_logit_attribution(m, tokens, ANSWER, FOIL, parts="heads") for m in (model, folded))
    assert a.frame.logits.to_list() == pytest.approx(b.frame.logits.to_list(), abs=1e-5)


@pytest.mark.parametrize("fold_ln_final", [False, True])
def test_the_bundled_model_comes_apart_exactly_however_it_was_loaded(fold_ln_final):
    """By our table with its bigram row, and by TransformerLens' rows plus what they leave out, which they announce."""
    from sparse_interp.model.transformer import HookedSparseTransformer

    model = HookedSparseTransformer.from_pretrained("stdlib-small", fold_ln_final=fold_ln_final)
    assert torch.equal(model.ln_final.w, torch.ones_like(model.ln_final.w)) == fold_ln_final
    tokens = model.to_tokens(["def f(self, x):", "import numpy as"])[:, :4]
    logits, cache = model.run_with_cache(tokens)
    answer, foil = model.to_single_token(" x"), model.to_single_token(")")
    expected = (logits[:, -1, answer] - logits[:, -1, foil]).detach()
    table = direct_logit_attribution(model, tokens, answer, foil, parts="heads")
    close(table.totals, expected)
    rows = cache.stack_head_results(-1, incl_remainder=True)
    with pytest.warns(WrongToolWarning):
        theirs = cache.logit_attrs(rows, answer, foil).sum(0)[:, -1]
    left_out = component(table, "bigram") + component(table, "b_U")
    close(theirs + left_out, expected)
    assert left_out.abs().max() > 0.1


def test_edits_made_by_hooks_are_attributed_as_they_ran(plain_model, tokens):
    half = lambda added, hook: added / 2
    with plain_model.hooks(fwd_hooks=[("hook_bigram", half), ("blocks.1.hook_mlp_out", half)]):
        table = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL)
        close(table.totals, difference(plain_model(tokens)))


def test_the_model_is_attributed_in_eval_mode_and_left_as_it_was(plain_model, tokens):
    expected = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL)
    plain_model.train()
    assert direct_logit_attribution(plain_model, tokens, ANSWER, FOIL) == expected
    assert plain_model.training


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_cache_serves_as_well_as_tokens(plain_model, tokens):
    expected = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL)
    _, cache = plain_model.run_with_cache(tokens)
    assert direct_logit_attribution(plain_model, cache, ANSWER, FOIL) == expected
    _, cache = plain_model.run_with_cache(tokens[:1], remove_batch_dim=True)
    alone = direct_logit_attribution(plain_model, cache, 5, 9)
    close(alone.totals, torch.tensor([expected.totals[0]], dtype=torch.float32))


def test_texts_of_unequal_lengths_are_attributed_at_their_own_ends(make_model, tokenizer):
    model = make_model(tokenizer, d_vocab=2048, n_ctx=32)
    texts = ["def f(x):", "import numpy as np"]
    table = direct_logit_attribution(model, texts, "(", ")")
    for row, text in enumerate(texts):
        here = model(text)[0, -1].detach()
        expected = here[model.to_single_token("(")] - here[model.to_single_token(")")]
        assert table.totals[row] == pytest.approx(float(expected), abs=1e-5)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"residual_act": "relu"}, {"afrac_sites": ("resid_post",)}], ids=str)
@pytest.mark.parametrize("parts", ["layers", "heads", "neurons"])
def test_a_stream_that_is_no_sum_is_refused(make_model, tokens, change, parts):
    with pytest.raises(ConfigError, match="is not the sum of what was written to it"):
        direct_logit_attribution(make_model(**change), tokens, 5, parts=parts)


def test_what_does_not_fit_is_refused_by_name(plain_model, make_model, tokens):
    _, some = plain_model.run_with_cache(tokens, names_filter=["hook_embed", "hook_bigram"])
    _, others = make_model().run_with_cache(tokens)
    for given, arguments, error, message in (
        (some, {}, ConfigError, "the cache lacks blocks.0.attn.hook_z, .* fill it without names_filter"),
        (others, {}, ConfigError, "the cache was filled by another model"),
        (tokens, {"parts": "atoms"}, ConfigError, "parts='atoms'; choose one of layers, heads, neurons"),
        (tokens, {"pos": 7}, TokenizerError, "pos=7 is not among the 7 positions"),
        (tokens, {"foil": [1, 2]}, TokenizerError, "2 tokens for 3 prompts"),
        (tokens, {"foil": 50}, TokenizerError, r"token ids are 0 to 49; got \[50\]"),
    ):
        with pytest.raises(error, match=message):
            direct_logit_attribution(plain_model, given, 5, **arguments)


# -- TransformerLens' own attribution ---------------------------------------------------------------------------------


def test_whatever_reads_logits_off_the_stream_of_a_bigram_model_warns(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    for read in (
        lambda: cache.logit_attrs(cache.decompose_resid(), tokens=5),
        lambda: cache.accumulated_resid(apply_ln=True),
        lambda: cache.decompose_resid(apply_ln=True),
        lambda: cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=plain_model.W_U[:, 5]),
        lambda: cache.stack_neuron_results(2, apply_ln=True, project_output_onto=plain_model.W_U[:, 5]),
    ):
        with pytest.warns(WrongToolWarning, match="sparse_interp.direct_logit_attribution.* has it as a row"):
            read()


def test_reading_the_middle_of_a_stream_or_a_table_of_zeros_warns_of_nothing(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    cache.accumulated_resid(1, apply_ln=True)
    cache.accumulated_resid()
    plain_model.bigram_table.zero_()
    cache.logit_attrs(cache.decompose_resid(), tokens=5)


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_largest_components(plain_model, tokens):
    table = direct_logit_attribution(plain_model, tokens, ANSWER, FOIL, parts="heads")
    ax = table.plot(n=4)
    means = table.frame.groupby("component").logits.mean().abs().nlargest(4)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(means.index)
    assert isinstance(table, AttributionTable)


# -- induction --------------------------------------------------------------------------------------------------------


def test_induction_loss_is_transformer_lens_own_where_that_can_run(make_model):
    from transformer_lens.evals import induction_loss as theirs

    model = make_model(d_vocab=20_000, d_model=4, bigram=False)
    torch.manual_seed(3)
    expected = theirs(model, batch_size=2, subseq_len=8, prepend_bos=False, device="cpu")
    drawn = torch.Generator().manual_seed(3)
    ours = induction_loss(
        model, n_prompts=2, length=8, prepend_bos=False, ids=torch.arange(100, 20_000), generator=drawn
    )
    torch.testing.assert_close(ours, expected.clone())


def test_induction_loss_tells_a_model_that_copies_from_one_that_does_not(make_model, generator):
    def copy(tokens, loss_per_token, **kwargs):
        """The forward pass of a perfect induction head; what it has not seen it takes for equally likely."""
        half = tokens.shape[1] // 2
        likely = torch.zeros(*tokens.shape, 50)
        likely[:, half:-1].scatter_(2, tokens[:, half + 1 :, None], 20.0)
        return model.loss_fn(likely, tokens, per_token=loss_per_token)

    model = make_model(initializer_range=0.001, bigram=False)
    with torch.no_grad():
        model.unembed.b_U.zero_()
    chance = torch.log(torch.tensor(50.0))
    plain = induction_loss(model, n_prompts=8, prepend_bos=False, generator=generator)
    assert plain == pytest.approx(float(chance), abs=0.05)
    model.forward = copy
    assert induction_loss(model, n_prompts=8, prepend_bos=False, generator=generator) < 1e-3


def test_induction_loss_begins_with_bos_and_repeats_no_special_token(make_model, tokenizer, generator):
    model = make_model(tokenizer, d_vocab=2048, n_ctx=40)
    seen = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: None)]):
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        induction_loss(model, generator=generator)
    (tokens,) = seen
    assert tokens.shape == (4, 40) and (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(tokens[:, 1:20], tokens[:, 21:])
    assert not torch.isin(tokens[:, 1:], torch.tensor(tokenizer.all_special_ids)).any()


def test_induction_that_cannot_be_measured_is_refused(make_model, generator):
    model = make_model()
    with pytest.raises(ConfigError, match="length=9: a half has 3 to 8 tokens"):
        induction_loss(model, length=9, generator=generator)
    with pytest.raises(TokenizerError, match="no bos token: pass prepend_bos=False"):
        induction_loss(model, prepend_bos=True, generator=generator)
