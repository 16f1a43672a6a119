"""The operations that cost time, each one function: a plain reference, and a fast version that tests hold to it.

    abs_topk(x, k)              keep the k entries of largest magnitude, sign kept
    sink_attention(q, k, v, s)  softmax attention with exp(s) added to the denominator, without materialising it
    keep_largest_mask(w, ...)   which entries of a weight matrix survive a projection

Fast CPU versions need numba (the extra `fast`). Without it the references run, and a warning says so once.
"""

import math
import warnings
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_interp.errors import ConfigError

Seen = Bool[Tensor, "#batch #head query key"]


@cache
def _cpu_kernels() -> ModuleType | None:
    try:
        from sparse_interp.model import cpu_kernels
    except ImportError:
        warnings.warn(
            "numba is not installed, so AbsTopK and the sparsity projection run through torch.topk, "
            "10 to 30 times slower on a CPU. `pip install sparse_interp[fast]` brings it.",
            stacklevel=3,
        )
        return None
    return cpu_kernels


def _fast(x: Tensor) -> ModuleType | None:
    """The CPU kernels, if they take `x`."""
    if x.device.type != "cpu" or x.numel() == 0:
        return None
    kernels = _cpu_kernels()
    return kernels if kernels is not None and kernels.handles(x) else None


def abs_topk_reference(x: Float[Tensor, "*batch width"], k: int) -> Float[Tensor, "*batch width"]:
    """`abs_topk` in three lines of torch, gradient by autograd; runs on any device."""
    kept = x.abs().topk(k, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


class _AbsTopK(torch.autograd.Function):
    """Keeps the output for the backward: a kept entry is one that is not zero."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> Tensor:
        kernels = _cpu_kernels()
        assert kernels is not None
        kept = kernels.abs_topk_forward(x, k)
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: an op that autograd can see through
            return torch.where(kept != 0, grad, torch.zeros_like(grad)), None
        kernels = _cpu_kernels()
        assert kernels is not None
        return kernels.abs_topk_backward(grad, kept), None


def abs_topk(x: Float[Tensor, "*batch width"], k: int) -> Float[Tensor, "*batch width"]:
    """Zero all but the `k` entries of largest magnitude along the last axis; the rest keep value and gradient.

    `k = 0` gives zeros, `k = width` gives `x` (Gao et al. 2025, activation sparsity; the released code does the same).
    The kept set is that of `torch.topk` whenever magnitudes are distinct. Where the k-th magnitude is shared, `k`
    entries are still kept: on a CPU with numba those of lowest channel, elsewhere those that `torch.topk` happens to
    choose. An entry that is exactly zero gets no gradient unless `k = width`.

    Raises:
        ConfigError: if `k` is not in [0, width].
    """
    size = x.shape[-1]
    if not 0 <= k <= size:
        raise ConfigError(f"abs_topk keeps between 0 and {size} of {size} entries; got k={k}.")
    if k == size:
        return x.clone()
    if k == 0:
        return x * 0
    if _fast(x) is None:
        return abs_topk_reference(x, k)
    return _AbsTopK.apply(x, k)  # pyright: ignore[reportReturnType]


def sink_attention_reference(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    sink: Float[Tensor, " head"] | None,
    seen: Seen | None = None,
) -> Float[Tensor, "batch head query d_head"]:
    """`sink_attention` with every score in memory."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = causal_mask(q.shape[2], k.shape[2], q.device) if seen is None else seen
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    if sink is not None:
        total = torch.logaddexp(total, sink[:, None, None].to(total.dtype))
    return (scores - total).exp() @ v


class _TakeRows(torch.autograd.Function):
    """torch sums the gradient of rows that are taken twice one row at a time; this in one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        kernels = _fast(grad) if grad.dtype in (torch.float32, torch.float64) else None
        if kernels is None or torch.is_grad_enabled():  # second derivatives: an op that autograd can see through
            return grad.new_zeros(ctx.n_rows, grad.shape[1]).index_add(0, index, grad), None
        return kernels.sum_rows(grad, index, ctx.n_rows), None


def take_rows(x: Float[Tensor, "row width"], index: Int[Tensor, " taken"]) -> Float[Tensor, "taken width"]:
    """`x[index]`, some rows perhaps several times."""
    return _TakeRows.apply(x, index)  # pyright: ignore[reportReturnType]


def causal_mask(n_query: int, n_key: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Which key each query may see, when the last query stands at the last key."""
    query = torch.arange(n_key - n_query, n_key, device=device)
    return query[:, None] >= torch.arange(n_key, device=device)


class _SinkAttention(torch.autograd.Function):
    """Fused causal attention, then the sink's share taken out through the log-sum-exp.

    With Z the scores' log-sum-exp and Z' = log(e^Z + e^s), probabilities with the sink are p' = e^(score - Z'), so
    out' = out * e^(Z - Z'). The fused backward recomputes p from the log-sum-exp that it is given and takes the
    row sums from (out, grad): given Z' and out' it returns the exact gradients of q, k and v. The sink's value is
    zero, so its own score has gradient -e^(s - Z') <grad, out'>.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        total = torch.logaddexp(lse, sink[:, None])
        out = out * (lse - total).exp().unsqueeze(-1)
        ctx.save_for_backward(q, k, v, out, total, sink)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, total, sink = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, total, 0.0, True
        )
        row = (grad * out).sum(-1)
        return dq, dk, dv, -((sink[:, None] - total).exp() * row).sum((0, 2))


def sink_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    sink: Float[Tensor, " head"] | None,
    seen: Seen | None = None,
) -> Float[Tensor, "batch head query d_head"]:
    """Attention whose rows may sum to less than 1: the sink takes the rest and writes nothing.

        out = sum_j e^(q.k_j / sqrt(d_head)) v_j / (e^sink + sum_j e^(q.k_j / sqrt(d_head)))

    `seen` says which keys a query sees; None is causal. The sink is one logit per head, not scaled by 1/sqrt(d_head)
    (released code, `sink_logit`). On a GPU, or with `seen`, torch's fused attention takes it as one more key, whose
    value is zero.
    """
    if sink is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    if q.device.type == "cpu" and seen is None:
        return _SinkAttention.apply(q, k, v, sink)  # pyright: ignore[reportReturnType]
    batch, head, n, d_head = q.shape
    one, zero = q.new_ones(batch, head, n, 1), k.new_zeros(batch, head, n, 1)
    bias = (sink * math.sqrt(d_head + 1))[None, :, None, None].expand(batch, head, 1, 1).to(k.dtype)
    q = torch.cat([q * math.sqrt((d_head + 1) / d_head), one], -1)
    keys = torch.cat([torch.cat([k.new_zeros(batch, head, 1, d_head), bias], -1), torch.cat([k, zero], -1)], 2)
    values = torch.cat([v.new_zeros(batch, head, 1, d_head), v], 2)
    seen = causal_mask(n, n, q.device) if seen is None else seen
    mask = torch.cat([torch.ones_like(seen[..., :1]), seen], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def keep_largest_mask_reference(weight: Float[Tensor, "row column"], k: int, floor: int) -> Bool[Tensor, "row column"]:
    """`keep_largest_mask` by sorting."""
    size = weight.abs()
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    if floor > 0:
        chosen.scatter_(1, size.topk(min(floor, size.shape[1]), 1).indices, True)
        chosen.scatter_(0, size.topk(min(floor, size.shape[0]), 0).indices, True)
    ranked = size.masked_fill(chosen, torch.inf).flatten().topk(k).indices
    return torch.zeros_like(chosen).flatten().scatter_(0, ranked, True).view_as(chosen)


def keep_largest_mask(weight: Float[Tensor, "row column"], k: int, floor: int) -> Bool[Tensor, "row column"]:
    """Which `k` entries a projection keeps: the `floor` largest of every row and column, then the largest of the rest.

    Raises:
        ConfigError: if `k` is not in [1, rows * columns], or the floors alone could need more than `k`.
    """
    rows, columns = weight.shape
    if not 1 <= k <= rows * columns:
        raise ConfigError(f"a {rows} x {columns} matrix keeps between 1 and {rows * columns} entries; got k={k}.")
    if floor * (rows + columns) > k:
        raise ConfigError(
            f"floor={floor} for each of {rows} rows and {columns} columns can need {floor * (rows + columns)} "
            f"entries, and k={k} are kept; a floor of at most {k // (rows + columns)} fits."
        )
    if _fast(weight) is None:
        return keep_largest_mask_reference(weight, k, floor)
    kernels = _cpu_kernels()
    assert kernels is not None
    return kernels.keep_largest_mask(weight, k, floor)


def next_token_loss_reference(
    logits: Float[Tensor, "batch pos d_vocab"],
    bias: Float[Tensor, " d_vocab"],
    table: Float[Tensor, "d_vocab d_vocab"] | None,
    tokens: Int[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """`next_token_loss` as written."""
    logits = logits.float() + bias
    if table is not None:
        logits = logits + torch.nn.functional.embedding(tokens, table)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class _NextTokenLoss(torch.autograd.Function):
    """One buffer of logits, turned in place into its own gradient; no gradient for the table."""

    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor, table: Tensor | None, tokens: Tensor) -> Tensor:
        # `+` and not `.float()`: in-place work below must not reach the caller's logits when they are float32 already
        scores = logits.detach() + bias
        if table is not None:
            scores += table.index_select(0, tokens.flatten()).view_as(scores)
        total = scores.logsumexp(-1, keepdim=True)
        target = tokens[:, 1:, None]
        n = target.numel()
        loss = (total[:, :-1] - scores[:, :-1].gather(-1, target)).sum() / n
        scores.sub_(total).exp_()
        scores[:, :-1].scatter_add_(-1, target, scores.new_full((1, 1, 1), -1.0).expand_as(target))
        scores[:, -1] = 0
        ctx.save_for_backward(scores.mul_(1 / n))
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (scores,) = ctx.saved_tensors
        scores = scores * grad
        return scores.to(ctx.dtype), scores.sum((0, 1)), None, None


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    bias: Float[Tensor, " d_vocab"],
    table: Float[Tensor, "d_vocab d_vocab"] | None,
    tokens: Int[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy, nats, of `logits + bias + table[token]`, in float32 throughout.

    The fast version holds one float32 buffer of logits where autograd would hold five. A learnable table takes the
    reference, since it needs a gradient of its own.
    """
    if table is not None and table.requires_grad:
        return next_token_loss_reference(logits, bias, table, tokens)
    return _NextTokenLoss.apply(logits, bias, table, tokens)  # pyright: ignore[reportReturnType]
