"""Text in and out of a model: the text methods of a TransformerLens model.

    text  ->  [bos] + pieces  ->  ids, padded on one side where texts differ in length, with a mask that says where

Lengths come from the tokenisation itself and never from looking for the padding's id, which is also that of the bos
and eos tokens. The characters `<|endoftext|>` inside a text become that one special token, as in TransformerLens; for
text of unknown origin, where they are text like any other, use `sparse_interp.tokenizer.encode_documents`.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_interp.axes import Tokens
from sparse_interp.errors import TokenizerError
from sparse_interp.model.config import ModelConfig

Mask = Int[Tensor, "batch pos"]


class TextMethods:
    """The text methods of a TransformerLens model, for a class with `cfg`, `embed` and a forward pass."""

    cfg: ModelConfig
    tokenizer: Any
    embed: Any
    training: bool

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Give the model its tokenizer, or take it away with None.

        Of eos, pad and bos, those that are missing take the value of another.

        Raises:
            TokenizerError: if it has more ids than the model, or none of the three special tokens.
        """
        if tokenizer is not None:
            if len(tokenizer) > self.cfg.d_vocab:
                raise TokenizerError(
                    f"the tokenizer has {len(tokenizer)} ids and the model d_vocab={self.cfg.d_vocab}: "
                    "give the tokenizer that the model was trained with."
                )
            tokenizer = _with_special_tokens(tokenizer)
        self.tokenizer = tokenizer

    # -- text to ids --------------------------------------------------------------------------------------------------

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tokens:
        """Token ids [batch pos] of a text or of several, padded to one length.

        Args:
            input: a text, or a list of texts.
            prepend_bos: whether to begin with the bos token; None takes `cfg.default_prepend_bos`.
            padding_side: `left` or `right`; None takes the tokenizer's.
            move_to_device: whether the ids go to the model's device.
            truncate: whether to cut texts at `cfg.n_ctx` tokens.

        Left padding needs its mask too: give the texts themselves to the model, or say `padding_side="left"` there
        as well, or see `to_tokens_and_mask`.
        """
        return self.to_tokens_and_mask(input, prepend_bos, padding_side, move_to_device, truncate)[0]

    def to_tokens_and_mask(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> tuple[Tokens, Mask]:
        """`to_tokens`, and the attention mask: 1 for tokens, 0 for padding."""
        tokenizer = self._need_tokenizer()
        texts = [input] if isinstance(input, str) else list(input)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TokenizerError(f"expected a text or a list of texts; got {input!r:.80}.")
        side = padding_side or tokenizer.padding_side
        if side not in ("left", "right"):
            raise TokenizerError(f"padding_side={side!r}; choose 'left' or 'right'.")
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        first = [tokenizer.bos_token_id] if bos else []
        rows = [first + tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        longest = max(map(len, rows))
        tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(len(row))
            tokens[i, where] = torch.tensor(row, dtype=torch.long)
            mask[i, where] = 1
        device = self.embed.W_E.device if move_to_device else "cpu"
        return tokens.to(device), mask.to(device)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            TokenizerError: if it is none, or several.
        """
        ids = self.to_tokens(string, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            pieces = self.to_str_tokens(torch.tensor(ids, dtype=torch.long)) if ids else []
            raise TokenizerError(f"{string!r} is {len(ids)} tokens, {pieces}, and one was expected.")
        return ids[0]

    # -- ids to text --------------------------------------------------------------------------------------------------

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids: one text for an id or [pos], a list for [batch pos]."""
        tokenizer = self._need_tokenizer()
        ids = torch.as_tensor(tokens)
        if ids.ndim > 2:
            raise TokenizerError(f"token ids have shape [pos] or [batch pos]; got {list(ids.shape)}.")
        rows = ids.tolist() if ids.ndim == 2 else [ids.reshape(-1).tolist()]
        texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
        return texts if ids.ndim == 2 else texts[0]

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Each token as a text of its own.

        `input` is a text, ids [pos] or [1 pos] as a tensor, an array or a list; or a list of texts or of such ids,
        which gives a list of lists. A token that is part of a character shows as the replacement character.
        """
        tokenizer = self._need_tokenizer()
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side)
        elif isinstance(input, list) and not all(isinstance(token, int) for token in input):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]  # pyright: ignore
        ids = torch.as_tensor(input)
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim > 1:
            raise TokenizerError(f"to_str_tokens takes one sequence, [pos] or [1 pos]; got shape {list(ids.shape)}.")
        return [tokenizer.decode([t], clean_up_tokenization_spaces=False) for t in ids.reshape(-1).tolist()]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return self.to_str_tokens([int_token])[0]  # pyright: ignore[reportReturnType]

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in a text or in ids [pos] or [1 pos]; `mode` picks the `first` or `last`.

        Raises:
            TokenizerError: if it does not occur.
        """
        if mode not in ("first", "last"):
            raise TokenizerError(f"mode={mode!r}; choose 'first' or 'last'.")
        tokens = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else input
        if tokens.ndim == 2 and len(tokens) != 1:
            raise TokenizerError(f"a position is asked of one sequence; got a batch of {len(tokens)}.")
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        places = (tokens.reshape(-1) == wanted).nonzero()[:, 0].tolist()
        if not places:
            raise TokenizerError(f"token {single_token!r} does not occur among the {tokens.numel()} tokens.")
        return places[0 if mode == "first" else -1]

    # -- what a forward pass takes ------------------------------------------------------------------------------------

    def input_to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        n_past: int = 0,
    ) -> tuple[Tokens, Mask | None]:
        """Token ids [batch pos] and their mask, checked, from whatever `forward` was given.

        The mask is None where nothing is padding. Texts of different lengths bring their own; of ids that come without
        one, leading padding is masked where `padding_side`, or else the tokenizer's, is `left`, as in TransformerLens.
        `n_past` tokens were read before.

        Raises:
            TokenizerError: for ids outside the vocabulary, too many tokens, or a mask that does not fit.
        """
        if isinstance(input, str) or (isinstance(input, list | tuple) and input and isinstance(input[0], str)):
            tokens, mask = self.to_tokens_and_mask(input, prepend_bos, padding_side, truncate=False)
            attention_mask = mask if attention_mask is None else attention_mask
        else:
            tokens = torch.as_tensor(input)
            if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
                raise TokenizerError(
                    f"token ids are integers; got {tokens.dtype}. A residual stream is taken with start_at_layer=."
                )
            tokens = tokens.long().to(self.embed.W_E.device)
        tokens = self._checked_tokens(tokens[None] if tokens.ndim == 1 else tokens, n_past)
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        if attention_mask is None and self.tokenizer is not None and side == "left":
            attention_mask = self._mask_of_leading_padding(tokens, prepend_bos)
        return tokens, self._checked_mask(attention_mask, tokens.shape, n_past)

    def _mask_of_leading_padding(self, tokens: Tokens, prepend_bos: bool | None) -> Mask:
        """0 at leading padding; where bos looks like padding and texts begin with it, the last of these is a bos."""
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        leading = (tokens == self.tokenizer.pad_token_id).long().cumprod(-1).sum(-1, keepdim=True)
        first = leading - int(bos and self.tokenizer.bos_token_id == self.tokenizer.pad_token_id)
        return (torch.arange(tokens.shape[1], device=tokens.device) >= first).long()

    def _checked_tokens(self, tokens: Tensor, n_past: int) -> Tokens:
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise TokenizerError(
                f"token ids have shape [pos] or [batch pos] and at least one token; got shape {list(tokens.shape)}."
            )
        self._check_length(tokens.shape[1], n_past)
        if tokens.device.type == "cpu" or not self.training:  # elsewhere the check would wait for the device
            bad = (tokens < 0) | (tokens >= self.cfg.d_vocab)
            if bool(bad.any()):
                row, pos = bad.nonzero()[0].tolist()
                raise TokenizerError(
                    f"token id {int(tokens[row, pos])} at [{row}, {pos}] is outside the vocabulary of "
                    f"d_vocab={self.cfg.d_vocab}: was the text tokenised by another model's tokenizer?"
                )
        return tokens

    def _check_length(self, n: int, n_past: int) -> None:
        n_ctx = self.cfg.n_ctx
        if n_past and n_past + n > n_ctx:
            raise TokenizerError(
                f"{n} tokens after the {n_past} in past_kv_cache, and the model takes at most n_ctx={n_ctx}: begin "
                "again with a shorter text and a new cache."
            )
        if n > n_ctx:
            raise TokenizerError(
                f"{n} tokens, and the model takes at most n_ctx={n_ctx}: shorten the text, keep the beginning with "
                f"to_tokens(..., truncate=True), or keep the end with tokens[:, -{n_ctx}:]."
            )

    def _checked_mask(self, mask: Tensor | None, shape: Sequence[int], n_past: int = 0) -> Mask | None:
        if mask is None:
            return None
        mask = mask[None] if mask.ndim == 1 else mask
        if tuple(mask.shape) != tuple(shape):
            raise TokenizerError(f"attention_mask has shape {list(mask.shape)}, and the tokens {list(shape)}.")
        mask = mask.to(self.embed.W_E.device)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise TokenizerError("attention_mask holds 1 for tokens and 0 for padding, and nothing else.")
        if not n_past and not bool((mask == 1).any(-1).all()):
            row = int((mask == 1).any(-1).int().argmin())
            raise TokenizerError(f"row {row} of attention_mask has no token; drop that row from the batch.")
        return None if bool((mask == 1).all()) else mask.long()

    # -- its tokenizer ------------------------------------------------------------------------------------------------

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TokenizerError("the model has no tokenizer: give it one with model.set_tokenizer(...), or pass ids.")
        return self.tokenizer


def _with_special_tokens(tokenizer: Any) -> Any:
    """The tokenizer with eos, pad and bos all set; a copy, if one was missing."""
    names = ("eos_token", "pad_token", "bos_token")
    known = [getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None]
    if not known:
        raise TokenizerError(
            "the tokenizer has neither an eos, a pad nor a bos token, and at least one is needed: set "
            "tokenizer.eos_token to a piece that ends texts."
        )
    if len(known) < len(names):
        tokenizer = copy.deepcopy(tokenizer)
        for name in names:
            if getattr(tokenizer, name) is None:
                setattr(tokenizer, name, known[0])
    return tokenizer


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside the block the model is in eval mode, where it computes the same whether or not anyone listens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
