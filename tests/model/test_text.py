"""Text in and out: ids that come back as the text, padding that is known and not guessed, and input that is refused."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparse_interp.errors import TokenizerError

BOS = 2047


@pytest.fixture
def model(make_model, tokenizer):
    return make_model(tokenizer, d_vocab=2048)


def words(*specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of four words."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<begin>": 3}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict.fromkeys(specials, "<end>"))


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(make_model, tokenizer):
    with pytest.raises(TokenizerError, match="the tokenizer has 2048 ids and the model d_vocab=50"):
        make_model(tokenizer)


@pytest.mark.parametrize("given", ["eos_token", "pad_token", "bos_token"])
def test_missing_special_tokens_take_the_value_of_another(make_model, given):
    own = words(given)
    model = make_model(own)
    assert {model.tokenizer.eos_token_id, model.tokenizer.pad_token_id, model.tokenizer.bos_token_id} == {2}
    assert sum(t is not None for t in (own.eos_token, own.pad_token, own.bos_token)) == 1  # the caller's is as it was


def test_a_tokenizer_without_any_special_token_is_refused(make_model):
    with pytest.raises(TokenizerError, match="neither an eos, a pad nor a bos token"):
        make_model(words())


def test_a_tokenizer_that_begins_texts_itself_is_not_doubled_and_can_be_silenced(make_model):
    own = words("eos_token", "pad_token")
    own.bos_token = "<begin>"
    own.backend_tokenizer.post_processor = TemplateProcessing("<begin> $A", special_tokens=[("<begin>", 3)])
    own.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    assert own("a b")["input_ids"] == [3, 0, 1]
    model = make_model(own)
    assert model.to_tokens("a b").tolist() == [[3, 0, 1]]
    assert model.to_tokens("a b", prepend_bos=False).tolist() == [[0, 1]]
    assert model.to_str_tokens("a b") == ["<begin>", "a", "b"]


def test_a_model_without_a_tokenizer_takes_ids_and_says_why_it_takes_no_text(plain_model):
    assert plain_model(torch.tensor([1, 2])).shape == (1, 2, 50)
    for call in (plain_model, plain_model.to_tokens, plain_model.to_str_tokens):
        with pytest.raises(TokenizerError, match="the model has no tokenizer"):
            call("x")


# -- text to ids and back ---------------------------------------------------------------------------------------------


def test_text_begins_with_bos_unless_told_otherwise(model):
    assert model.to_tokens("x = 1")[0, 0] == BOS
    assert torch.equal(model.to_tokens("x = 1", prepend_bos=False), model.to_tokens("x = 1")[:, 1:])
    model.cfg.default_prepend_bos = False
    assert model.to_tokens("x = 1")[0, 0] != BOS


def test_any_text_comes_back(model):
    for text in ("def f(x):\n    return 'é'", "", "  \t", "<|endoftext|>"):
        assert model.to_string(model.to_tokens(text, prepend_bos=False)[0]) == text
    assert model.to_string(model.to_tokens(["a", "b"], prepend_bos=False)) == ["a", "b"]
    assert model.to_string(5) == model.to_string(torch.tensor(5)) == model.to_string([5])


def test_the_marker_of_the_special_token_in_a_text_becomes_that_token(model):
    assert model.to_tokens("<|endoftext|>", prepend_bos=False).tolist() == [[BOS]]


def test_texts_of_different_lengths_are_padded_on_either_side_with_a_mask_that_knows(model):
    texts = ["x = 1", "x", "<|endoftext|>x<|endoftext|>"]  # the last holds the padding's own id
    for side in ("left", "right"):
        tokens, mask = model.to_tokens_and_mask(texts, padding_side=side)
        for row, text in enumerate(texts):
            assert torch.equal(tokens[row, mask[row].bool()], model.to_tokens(text)[0])
            assert int(mask[row, 0 if side == "right" else -1]) == 1
    with pytest.raises(TokenizerError, match="padding_side='top'; choose 'left' or 'right'"):
        model.to_tokens(texts, padding_side="top")


def test_to_tokens_truncates_and_the_model_refuses(model):
    text = "x " * 40
    assert model.to_tokens(text).shape == (1, 16)
    n = model.to_tokens(text, truncate=False).shape[1]
    with pytest.raises(TokenizerError, match=rf"{n} tokens, and the model takes at most n_ctx=16.*tokens\[:, -16:\]"):
        model(text)


def test_each_token_is_a_text_of_its_own(model):
    pieces = model.to_str_tokens("def f(x):")
    assert pieces[0] == "<|endoftext|>" and "".join(pieces[1:]) == "def f(x):"
    ids = model.to_tokens("def f(x):")
    for same in (ids, ids[0], ids.numpy(), ids[0].numpy(), ids[0].tolist()):
        assert model.to_str_tokens(same) == pieces
    assert model.to_str_tokens(["def f(x):", "x"]) == [pieces, model.to_str_tokens("x")]
    assert model.to_str_tokens(np.array(5)) == [model.to_single_str_token(5)]
    with pytest.raises(TokenizerError, match=r"one sequence.*got shape \[2, 3\]"):
        model.to_str_tokens(torch.zeros(2, 3, dtype=torch.long))


def test_a_single_token_is_an_id_and_anything_else_is_refused(model):
    assert model.to_single_str_token(model.to_single_token("def")) == "def"
    with pytest.raises(TokenizerError, match="'def f' is 2 tokens"):
        model.to_single_token("def f")
    with pytest.raises(TokenizerError, match="'' is 0 tokens"):
        model.to_single_token("")


def test_a_token_is_found_at_its_first_or_last_position(model):
    text = "x = x"
    assert model.get_token_position("x", text) == 1
    ids = model.to_tokens(text)
    last = model.get_token_position(" x", ids, mode="last")
    assert model.get_token_position(" x", ids[0], mode="last") == last == ids.shape[1] - 1
    assert model.get_token_position(BOS, text) == 0
    with pytest.raises(TokenizerError, match="token 'def' does not occur"):
        model.get_token_position("def", text)
    with pytest.raises(TokenizerError, match="choose 'first' or 'last'"):
        model.get_token_position("x", text, mode="middle")


# -- what a forward pass takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_list_of_texts_runs_as_its_texts_one_by_one(side, model):
    texts = ["def f(x):", "x", "y = 'a'"]
    logits = model(texts, padding_side=side)
    _, mask = model.to_tokens_and_mask(texts, padding_side=side)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, mask[row].bool()], model(text)[0], atol=1e-5, rtol=1e-5)
    losses = [model(t, return_type="loss", loss_per_token=True)[0] for t in texts]
    torch.testing.assert_close(model(texts, return_type="loss", padding_side=side), torch.cat(losses).mean())


def test_a_text_runs_as_its_ids_with_or_without_bos(model):
    for bos in (True, False, None):
        assert torch.equal(model("x = 1", prepend_bos=bos), model(model.to_tokens("x = 1", prepend_bos=bos)))
    assert model("x = 1", prepend_bos=False).shape[1] == model("x = 1").shape[1] - 1


@pytest.mark.parametrize("bos", [True, False])
def test_ids_padded_on_the_left_are_masked_where_that_side_is_said(bos, model, monkeypatch):
    """By the argument, or by the tokenizer; else ids are what they are, as in TransformerLens."""
    texts = ["def f(x):", "x", "y = 'a'"]
    expected = model(texts, prepend_bos=bos, padding_side="left")
    tokens, mask = model.to_tokens_and_mask(texts, prepend_bos=bos, padding_side="left")
    got = model(tokens, prepend_bos=bos, padding_side="left")
    assert torch.equal(got[mask.bool()], expected[mask.bool()])
    assert not torch.allclose(model(tokens, prepend_bos=bos)[mask.bool()], expected[mask.bool()], atol=1e-3)
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    assert torch.equal(model(tokens, prepend_bos=bos), got)
    assert torch.equal(model(texts, prepend_bos=bos), expected)
    losses = [
        model(text, prepend_bos=bos, return_type="loss", loss_per_token=True)[0] for text in texts if text != "x" or bos
    ]
    torch.testing.assert_close(model(tokens, prepend_bos=bos, return_type="loss"), torch.cat(losses).mean())


def test_a_row_of_nothing_but_padding_is_refused(model):
    tokens = torch.tensor([[BOS, BOS], [BOS, 5]])
    with pytest.raises(TokenizerError, match="row 0 of attention_mask has no token"):
        model(tokens, prepend_bos=False, padding_side="left")
    assert model(tokens, prepend_bos=True, padding_side="left").isfinite().all()  # there it is a text of bos alone


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.tensor([[1, 50]]), r"token id 50 at \[0, 1\] is outside the vocabulary of d_vocab=50"),
        (torch.tensor([[-1]]), r"token id -1 at \[0, 0\]"),
        (torch.zeros(1, 17, dtype=torch.long), "17 tokens, and the model takes at most n_ctx=16"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"got shape \[1, 2, 3\]"),
        (torch.zeros(1, 3), "token ids are integers; got torch.float32"),
    ],
)
def test_input_that_no_model_can_read_is_refused(input, message, plain_model):
    with pytest.raises(TokenizerError, match=message):
        plain_model(input)


def test_ids_may_be_lists_or_arrays_or_short_integers(plain_model, tokens):
    expected = plain_model(tokens)
    for same in (tokens.tolist(), tokens.numpy(), tokens.int(), tokens.to(torch.uint8)):
        assert torch.equal(plain_model(same), expected)


def test_a_mask_that_does_not_fit_is_refused(plain_model, tokens):
    for mask, message in (
        (torch.ones(3, 6, dtype=torch.long), r"attention_mask has shape \[3, 6\], and the tokens \[3, 7\]"),
        (torch.full_like(tokens, 2), "holds 1 for tokens and 0 for padding"),
        (torch.zeros_like(tokens), "row 0 of attention_mask has no token"),
    ):
        with pytest.raises(TokenizerError, match=message):
            plain_model(tokens, attention_mask=mask)


def test_a_mask_may_be_boolean(plain_model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    assert torch.equal(plain_model(tokens, attention_mask=mask.bool()), plain_model(tokens, attention_mask=mask))
