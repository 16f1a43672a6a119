"""Where a logit comes from, exactly: under AbsTopK, with a gain that is not folded, and with a bigram table.

    logit[a] - logit[b]  =  sum_c (x_c / s) · d  +  beta · u  +  b_U[a] - b_U[b]  +  B[t, a] - B[t, b]

    u = W_U[:, a] - W_U[:, b],  d = w u        w and beta are the final norm's gain and bias, s its scale
    x_c                                        what component c wrote to the stream (centred, under LayerNorm)
    B[t]                                       the row that the bigram table adds after the current token t

TransformerLens' direct logit attribution is the sum over c alone; it knows neither beta, b_U nor B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.axes import Tokens
from sparse_interp.errors import ConfigError, TokenizerError
from sparse_interp.model.cache import SparseActivationCache
from sparse_interp.model.sites import BIGRAM_HOOK
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Axes, Table, bars_with_intervals

PARTS = ("layers", "heads", "neurons")
"""How finely the stream is taken apart: half blocks; heads and whole MLPs; heads and neurons."""

BIGRAM = "bigram"
"""The component that is the bigram table."""

_NEEDED = ("hook_embed", "hook_pos_embed", "hook_z", "hook_post", "hook_attn_out", "hook_mlp_out", BIGRAM_HOOK)
"""Last parts of the names of the hook points that are read, besides the final norm's scale."""


@dataclass(frozen=True, eq=False)
class AttributionTable(Table):
    """One row per prompt and component: `prompt`, `component`, `logits` (what it adds) and `share` (of the sum).

    Components are named as in TransformerLens (`embed`, `pos_embed`, `0_attn_out`, `L0H1`, `L0N12`, `bias`), and after
    them come `ln_final.b` and `b_U` where the model has them, and `bigram`. The rows of a prompt add up to its logit
    difference exactly.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "component", "logits", "share")

    @property
    def totals(self) -> pd.Series:
        """The logit difference of every prompt, logits."""
        return self.frame.groupby("prompt").logits.sum()

    @property
    def bigram(self) -> str:
        """What the bigram table contributes, in one sentence."""
        rows = self.frame[self.frame.component == BIGRAM]
        if rows.empty:
            return "no bigram table"
        return f"bigram table: {rows.logits.mean():.3f} of {self.totals.mean():.3f} logits, mean of {len(rows)} prompts"

    def __str__(self) -> str:
        return f"{self.bigram}\n{super().__str__()}"

    def _repr_html_(self) -> str:
        return f"<p>{self.bigram}</p>{super()._repr_html_()}"

    def plot(self, ax: Axes | None = None, *, n: int = 20) -> Axes:
        """A bar for each of the `n` components that contribute most, means over prompts."""
        means = self.frame.groupby("component", sort=False).logits.mean()
        means = means[means.abs().sort_values(ascending=False).index][:n]
        frame = pd.DataFrame({"component": means.index, "logits": means.to_numpy(), "low": torch.nan})
        return bars_with_intervals(
            frame, label="component", value="logits", low="low", high="low", reference=0.0, ax=ax
        )


@torch.no_grad()
def direct_logit_attribution(
    model: HookedSparseTransformer,
    prompts: str | Sequence[str] | Tokens | Int[Tensor, " pos"] | SparseActivationCache,
    answer: Any,
    foil: Any = None,
    *,
    pos: int | Int[Tensor, " batch"] | None = None,
    parts: str = "layers",
) -> AttributionTable:
    """What each component adds to `logit[answer] - logit[foil]`, or to `logit[answer]` without a foil.

    Args:
        model: the model; it runs once, in eval mode, unless `prompts` is a cache.
        prompts: text, a list of texts, tokens, or a cache that a run of this model filled.
        answer: a token for all prompts or one for each: ids or texts of one token.
        foil: the same for the token to compare with.
        pos: position whose logits are attributed, for all prompts or for each; None is the last token of each prompt.
        parts: `layers`, `heads` or `neurons`.

    Raises:
        ConfigError: if the stream is no sum (`residual_act="relu"`, AbsTopK on the stream), or the cache lacks a hook.
        TokenizerError: for tokens or positions that the prompts do not have.
    """
    if parts not in PARTS:
        raise ConfigError(f"parts={parts!r}; choose one of {', '.join(PARTS)}.")
    if isinstance(prompts, SparseActivationCache):
        cache, mask = prompts, None
    else:
        tokens, mask = model.input_to_tokens(prompts)
        with evaluating(model):
            _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=_needed(model))
    cache = _with_batch(model, cache)
    n_prompts, n_pos = cache["hook_embed"].shape[:2]
    rows, at = torch.arange(n_prompts), _positions(pos, mask, n_prompts, n_pos)
    ids = [_token_ids(model, given, n_prompts) for given in (answer, foil)[: 1 if foil is None else 2]]
    read, constants = _final_read(model, ids, cache, rows, at)
    frames = []
    for row in range(n_prompts):
        here = {name: cache.cache_dict[name][row : row + 1, at[row]].unsqueeze(1) for name in _needed(model)}
        components, labels = _stream_parts(SparseActivationCache(here, model), parts, read[row])
        logits = torch.cat([components.flatten(), torch.stack([value[row] for value in constants.values()])])
        frames.append(pd.DataFrame({"prompt": row, "component": [*labels, *constants], "logits": logits.tolist()}))
    frame = pd.concat(frames, ignore_index=True)
    return AttributionTable(frame.assign(share=frame.logits / frame.groupby("prompt").logits.transform("sum")))


def _needed(model: HookedSparseTransformer) -> list[str]:
    """Names of the hook points that hold what is written to the stream, the final norm's scale, and the bigram row."""
    scale = [] if model.cfg.norm == "none" else ["ln_final.hook_scale"]
    return [name for name in model.hook_dict if name.rpartition(".")[2] in _NEEDED] + scale


def _with_batch(model: HookedSparseTransformer, cache: SparseActivationCache) -> SparseActivationCache:
    if cache.model is not model:
        raise ConfigError("the cache was filled by another model; run this one with run_with_cache.")
    missing = [name for name in _needed(model) if name not in cache.cache_dict]
    if missing:
        raise ConfigError(f"the cache lacks {', '.join(missing[:3])} ...: fill it without names_filter.")
    if cache.has_batch_dim:
        return cache
    return SparseActivationCache({name: x.unsqueeze(0) for name, x in cache.items()}, model)


def _positions(pos: Any, mask: Tensor | None, n_prompts: int, n_pos: int) -> Int[Tensor, " batch"]:
    if pos is None:
        if mask is None:
            return torch.full((n_prompts,), n_pos - 1)
        return (mask.cpu() * torch.arange(n_pos)).argmax(-1)
    at = torch.as_tensor(pos).cpu().expand(n_prompts)
    if bool(((at < -n_pos) | (at >= n_pos)).any()):
        raise TokenizerError(f"pos={pos} is not among the {n_pos} positions of the prompts.")
    return at % n_pos


def _token_ids(model: HookedSparseTransformer, given: Any, n_prompts: int) -> Int[Tensor, " batch"]:
    """One id per prompt from an id, a text, or one of these per prompt."""
    if isinstance(given, str | int):
        given = [given]
    if not isinstance(given, Tensor):
        given = torch.tensor([model.to_single_token(one) if isinstance(one, str) else int(one) for one in given])
    ids = given.flatten()
    if len(ids) not in (1, n_prompts):
        raise TokenizerError(f"{len(ids)} tokens for {n_prompts} prompts: give one for all, or one for each.")
    if bool(((ids < 0) | (ids >= model.cfg.d_vocab)).any()):
        raise TokenizerError(f"token ids are 0 to {model.cfg.d_vocab - 1}; got {ids.tolist()}.")
    return ids.to(model.embed.W_E.device).expand(n_prompts)


def _final_read(
    model: HookedSparseTransformer, ids: list[Tensor], cache: SparseActivationCache, rows: Tensor, at: Tensor
) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, " batch"]]]:
    """What the logit difference reads of the stream, d / s; and what it gets from elsewhere, by component."""

    def difference(values: Tensor) -> Tensor:
        """Of what the two tokens have; float32 at least."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values[0] - values[1] if len(values) == 2 else values[0]

    norm = model.ln_final
    unembedded = difference(torch.stack([model.W_U.T[token] for token in ids]))
    constants = {"b_U": difference(torch.stack([model.b_U[token] for token in ids]))}
    read = unembedded if norm.kind == "none" else unembedded * norm.w
    if norm.kind == "layer":
        read = read - read.mean(-1, keepdim=True)  # (x - mean x) · d = x · (d - mean d)
        if norm.b is not None:
            constants = {"ln_final.b": unembedded @ norm.b.to(unembedded.dtype)} | constants
    if norm.kind != "none":
        read = read / cache["ln_final.hook_scale"][rows, at]
    if model.cfg.bigram:
        added = cache[BIGRAM_HOOK][rows, at]
        constants[BIGRAM] = difference(torch.stack([added[rows, token] for token in ids]))
    return read, constants


def _stream_parts(
    cache: SparseActivationCache, parts: str, read: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, "component 1 1"], list[str]]:
    """Products of `read` with what was written to the stream of one prompt at one position, and their names."""
    if parts == "layers":
        written, labels = cache.decompose_resid(return_labels=True)
        return written.to(read.dtype) @ read, labels
    onto = read.to(cache["hook_embed"].dtype)
    products, labels = cache.get_full_resid_decomposition(
        expand_neurons=parts == "neurons", project_output_onto=onto, return_labels=True
    )
    n = len(labels) if parts == "neurons" else len(labels) - 1  # a whole MLP holds its bias, so there is no row for it
    return products[:n].to(read.dtype), labels[:n]


@torch.no_grad()
def induction_loss(
    model: HookedSparseTransformer,
    *,
    n_prompts: int = 4,
    length: int | None = None,
    prepend_bos: bool | None = None,
    ids: Int[Tensor, " choice"] | None = None,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Mean next-token loss, in nats, on the second half of random tokens that are repeated once.

    A model without induction has about the logarithm of the number of ids. Tokens and positions are chosen as in
    TransformerLens' `evals.induction_loss`, which draws ids up to 19,999 whatever the vocabulary.

    Args:
        model: the model; it runs once, in eval mode.
        n_prompts: sequences.
        length: tokens of a half; None is half of `cfg.n_ctx`, at most 384.
        prepend_bos: whether the first token is replaced by the bos token; None takes `cfg.default_prepend_bos`.
        ids: token ids to draw from; None is all but the tokenizer's special ones.
        generator: what the tokens are drawn from.

    Raises:
        ConfigError: for halves shorter than 3 tokens or longer than half of the context.
        TokenizerError: if a bos token is asked for and the model has no tokenizer.
    """
    length = min(model.cfg.n_ctx // 2, 384) if length is None else length
    if not 3 <= length <= model.cfg.n_ctx // 2:
        raise ConfigError(f"length={length}: a half has 3 to {model.cfg.n_ctx // 2} tokens in this model.")
    if ids is None:
        special = [] if model.tokenizer is None else model.tokenizer.all_special_ids
        known = torch.ones(model.cfg.d_vocab if model.tokenizer is None else len(model.tokenizer), dtype=torch.bool)
        known[special] = False
        ids = known.nonzero().squeeze(1)
    half = ids[torch.randint(len(ids), (n_prompts, length), generator=generator, device=generator.device).cpu()]
    tokens = half.repeat(1, 2)
    if model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos:
        if model.tokenizer is None:
            raise TokenizerError("the model has no tokenizer, so no bos token: pass prepend_bos=False.")
        tokens[:, 0] = model.tokenizer.bos_token_id
    with evaluating(model):
        losses = model(tokens.to(model.embed.W_E.device), return_type="loss", loss_per_token=True)
    return losses[:, length + 1 :].mean()
