"""Continuing a text, one token at a time.

    logits of the last token  ->  a new token, drawn or the largest  ->  the text is one token longer

With a cache of keys and values (as they are after AbsTopK) a step reads the new token alone; without one, the whole
text again. Both give the same logits up to rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.utilities import sample_logits

from sparse_interp.axes import Resid, Tokens
from sparse_interp.errors import ConfigError, TokenizerError
from sparse_interp.model.text import Mask, TextMethods, evaluating


class Generation(TextMethods):
    """`generate`, as TransformerLens has it, for a model that reads text."""

    add_positions: Any

    @torch.no_grad()
    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "input",
        verbose: bool = True,
        generator: torch.Generator | None = None,
    ) -> str | list[str] | Tokens | Resid:
        """Continue a text, several texts, token ids, or a text given as its token vectors.

        Texts come back as texts with their prompts, special tokens left out; ids come back as ids, a row that has
        finished filled up with its eos token; vectors come back as vectors. Texts of different lengths are padded on
        the left.

        Args:
            input: a text, a list of texts, ids [pos] or [batch pos], or token vectors [batch pos d_model], to which
                positions are still to be added.
            max_new_tokens: tokens to add at most. The prompt and all but the last of them must fit into `cfg.n_ctx`;
                nothing is cropped.
            stop_at_eos: whether a row ends at the eos token.
            eos_token_id: that token, or several; None takes the tokenizer's.
            do_sample: whether to draw, or to take the largest logit.
            top_k, top_p, temperature, freq_penalty: as `transformer_lens.utilities.sample_logits` takes them.
            use_past_kv_cache: whether to keep keys and values instead of reading the whole text at every step. Hooks
                then see the prompt first and one token at a time after it. Bidirectional attention keeps none.
            prepend_bos: for text; None takes `cfg.default_prepend_bos`.
            padding_side: for ids, the side whose padding is masked if it is `left`; None takes the tokenizer's.
            return_type: `input` (what came in), `str`, `tokens` or `embeds`; vectors that came in have no ids, so
                `str` and `tokens` are then the new ones alone.
            verbose: whether to show a progress bar.
            generator: a CPU generator to draw from; None draws from torch's global one.

        Raises:
            TokenizerError: if the text would outgrow the context, or no eos token is known.
            ConfigError: for an unknown `return_type`, or vectors where the model has a bigram table.
        """
        if return_type not in ("input", "str", "tokens", "embeds"):
            raise ConfigError(f"return_type={return_type!r}; choose 'input', 'str', 'tokens' or 'embeds'.")
        kind, tokens, mask, vectors = self._prompt(input, prepend_bos, padding_side)
        self._check_room(mask.shape[1], max_new_tokens)
        stops = self._stop_tokens(eos_token_id) if stop_at_eos else []
        draw = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "freq_penalty": freq_penalty}
        keep = use_past_kv_cache and self.cfg.attention_dir == "causal"
        cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, len(tokens)) if keep else None
        with evaluating(self), _drawing_from(generator):
            finished = torch.zeros(len(tokens), dtype=torch.bool)
            unread = vectors if kind == "embeds" else tokens
            for _ in tqdm(range(max_new_tokens), disable=not verbose, desc="generate"):
                logits = self._last_logits(unread, mask[:, -unread.shape[1] :], cache)
                new = sample_logits(logits, tokens=tokens.cpu(), **draw) if do_sample else logits.argmax(-1)
                new = torch.where(finished, torch.tensor(stops[0] if stops else 0), new)
                finished |= torch.isin(new, torch.tensor(stops, dtype=torch.long))
                column = new[:, None].to(tokens.device)
                tokens, mask = torch.cat([tokens, column], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                vectors = torch.cat([vectors, self.embed(column)], 1)
                if bool(finished.all()):
                    break
                unread = column if cache is not None else vectors if kind == "embeds" else tokens
        return_type = kind if return_type == "input" else return_type
        if return_type != "str":
            return tokens if return_type == "tokens" else vectors
        texts = self._decoded(tokens, mask[:, -tokens.shape[1] :])
        return texts if isinstance(input, list | tuple) or len(texts) > 1 else texts[0]

    def _prompt(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None
    ) -> tuple[str, Int[Tensor, "batch pos_of_ids"], Mask, Resid]:
        """What kind of prompt it is; its ids (none for vectors), its mask and its token vectors."""
        if isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 3:
            if self.cfg.bigram:
                raise ConfigError(
                    "token vectors do not say which tokens they are, and this model's bigram table adds to the logits "
                    "by token: give generate the ids or the text."
                )
            if input.shape[2] != self.cfg.d_model:
                raise ConfigError(f"token vectors are [batch pos d_model={self.cfg.d_model}]; got {list(input.shape)}.")
            vectors = input.to(self.embed.W_E)
            tokens = torch.zeros(len(vectors), 0, dtype=torch.long, device=vectors.device)
            return "embeds", tokens, torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device), vectors
        is_text = isinstance(input, str) or (isinstance(input, list | tuple) and input and isinstance(input[0], str))
        tokens, mask = self.input_to_tokens(input, prepend_bos, "left" if is_text else padding_side)
        mask = torch.ones_like(tokens) if mask is None else mask
        return "str" if is_text else "tokens", tokens, mask, self.embed(tokens)

    def _check_room(self, n_prompt: int, n_new: int) -> None:
        n_ctx = self.cfg.n_ctx
        if n_prompt + n_new - 1 > n_ctx:
            raise TokenizerError(
                f"a prompt of {n_prompt} tokens and {n_new} new ones do not fit into n_ctx={n_ctx}: "
                f"ask for at most {n_ctx - n_prompt + 1}, or shorten the prompt."
            )

    def _last_logits(
        self, unread: Tensor, mask: Mask, cache: TransformerLensKeyValueCache | None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the last of some ids, or of some token vectors, on the CPU."""
        if unread.is_floating_point():
            positions = torch.arange(unread.shape[1], device=unread.device).repeat(len(unread), 1)
            stream = self.add_positions(unread, positions)
            logits = self(stream, start_at_layer=0, past_kv_cache=cache)  # pyright: ignore[reportCallIssue]
        else:
            logits = self(unread, attention_mask=mask, past_kv_cache=cache)  # pyright: ignore[reportCallIssue]
        return logits[:, -1].cpu()

    def _stop_tokens(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            if self.tokenizer is None:
                raise TokenizerError("stop_at_eos needs a tokenizer or eos_token_id=; else pass stop_at_eos=False.")
            return [self.tokenizer.eos_token_id]
        return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)

    def _decoded(self, tokens: Tokens, mask: Mask) -> list[str]:
        tokenizer = self._need_tokenizer()
        rows = [row[real.bool()].tolist() for row, real in zip(tokens, mask, strict=True)]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """torch's global CPU generator stands in for `generator`, and is put back as it was."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.get_rng_state())
