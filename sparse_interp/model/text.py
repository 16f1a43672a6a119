"""Text in and out of a model."""

from typing import Any

import torch
from torch import Tensor

from sparse_interp.errors import TokenizerError


class TextMethods:
    """The text methods of a TransformerLens model."""

    def set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def input_to_tokens(self, input: Any, prepend_bos, padding_side, attention_mask) -> tuple[Tensor, Tensor | None]:
        if input.ndim == 1:
            input = input[None]
        if input.shape[1] > self.cfg.n_ctx:
            raise TokenizerError(f"{input.shape[1]} tokens, and the model takes at most n_ctx={self.cfg.n_ctx}.")
        return input, attention_mask

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any):
        return super().to(*args, **kwargs)
