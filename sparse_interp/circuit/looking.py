"""Where heads look on a task's prompts: recorded runs, what a key is to its query, and what tells how much it is paid.

mass[role]      attention from a query to all keys in that role, mean over queries; what is missing from 1 is the sink's
explained       share of the variance of attention among the keys of a query (the query's own mean taken out) that
                goes with the key's token, its distance, or its role: epsilon squared, as in `circuit/drives.py`
even_frac       exp(entropy of the attention that is paid to keys) / number of keys: 1 is an average over all of them
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Pattern, Tokens
from sparse_interp.circuit.drives import explained
from sparse_interp.model.dense import FwdHooks, HookedModel
from sparse_interp.model.sites import FINAL_SCALE_HOOK, PATTERN_HOOK, Place, flat
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch

ANSWER, EVERY = "answer", "every"
"""Queries: the answer position alone, or every position but the first, which sees only itself."""

ROLES = ("itself", "changed", "previous", "same token", "after same token", "first", "other")
"""What a key is to its query; the first that fits. `changed`: the prompts of the pair differ there (asked of the answer
position alone); `after same token`: one position after an earlier occurrence of the query's token."""

SITES_SEEN = ("attn_read", "q", "k", "v", "attn_write")

Keys = Bool[Tensor, "batch query key"]


class Recorded(NamedTuple):
    """What a run over a batch of prompts left, on the CPU."""

    nodes: dict[Place, Float[Tensor, "batch pos width"]]
    """Reads, q, k, v and writes of attention in the layers asked for."""

    patterns: dict[int, Pattern]
    """Attention by layer."""

    scale: Float[Tensor, " batch"]
    """Denominator of the final norm at the answer position; ones without a norm."""


@torch.no_grad()
def record(model: HookedModel, batch: TaskBatch, layers: Iterable[int], size: int = 32) -> Recorded:
    """Run the clean prompts of `batch` and keep what attention does in `layers`, in eval mode."""
    layers, device = sorted(set(layers)), model.embed.W_E.device
    places = [Place(layer, site) for layer in layers for site in SITES_SEEN]
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(activation: Tensor, hook: HookPoint) -> None:
            kept.setdefault(name, []).append(activation.detach().float().cpu())

        return hook

    names = [*(place.hook for place in places), *(PATTERN_HOOK.format(layer=layer) for layer in layers)]
    names += [FINAL_SCALE_HOOK] * (model.cfg.norm != "none")
    hooks: FwdHooks = [(name, keep(name)) for name in names]
    with evaluating(model), model.hooks(fwd_hooks=hooks):
        for start in range(0, len(batch), size):
            part = batch.rows(slice(start, start + size))
            model(part.clean.to(device), attention_mask=part.attention_mask.to(device), return_type=None)
    whole = {name: torch.cat(parts) for name, parts in kept.items()}
    scale = torch.ones(len(batch))
    if FINAL_SCALE_HOOK in whole:
        scale = whole[FINAL_SCALE_HOOK][torch.arange(len(batch)), batch.last.cpu(), 0]
    return Recorded(
        {place: flat(whole[place.hook]) for place in places},
        {layer: whole[PATTERN_HOOK.format(layer=layer)] for layer in layers},
        scale,
    )


class Looks(NamedTuple):
    """Which keys which queries see, and what they are to them."""

    seen: Keys
    """False at keys that are masked, at padding, and in the rows of queries that were not asked for."""

    role: Int[Tensor, "batch query key"]
    """Index into `ROLES`."""

    token: Int[Tensor, "batch query key"]
    """Id of the key's token."""

    distance: Int[Tensor, "batch query key"]
    """Query less key, in positions."""

    @property
    def n_queries(self) -> int:
        """Queries asked for."""
        return int(self.seen.any(2).sum())


def looks(batch: TaskBatch, query: str, attention_dir: str) -> Looks:
    """The keys that the queries `answer` or `every` of the clean prompts see."""
    tokens, lengths = batch.clean.cpu(), batch.lengths.cpu()
    n_rows, n = tokens.shape
    pos = torch.arange(n)
    real = pos < lengths[:, None]
    asked = pos == (lengths - 1)[:, None] if query == ANSWER else real & (pos > 0)
    seen = asked[:, :, None] & real[:, None, :]
    distance = pos[:, None] - pos
    if attention_dir == "causal":
        seen = seen & (distance >= 0)
    role = torch.full((n_rows, n, n), ROLES.index("other"))
    for i, fits in reversed(list(enumerate(_fitting(tokens, batch.corrupt.cpu(), distance, query)))):
        role = torch.where(fits.expand_as(role), i, role)
    return Looks(seen, role, tokens[:, None, :].expand_as(role), distance.expand_as(role))


def _fitting(tokens: Tokens, corrupt: Tokens, distance: Int[Tensor, "query key"], query: str) -> list[Tensor]:
    """For each role but the last, where it fits."""
    same = tokens[:, :, None] == tokens[:, None, :]
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1] & (distance[:, :-1] > 0)
    changed = (tokens != corrupt)[:, None, :] & (query == ANSWER)
    return [distance == 0, changed, distance == 1, same, after, (torch.arange(tokens.shape[1]) == 0)[None, :]]


Weights = Float[Tensor, "batch query key"]
"""The attention of one head."""


def masses(attention: Weights, where: Looks) -> list[float]:
    """Attention that a query pays to all keys in each role, mean over queries."""
    paid = attention.double()[where.seen]
    total = torch.zeros(len(ROLES), dtype=torch.float64).index_add_(0, where.role[where.seen], paid)
    return (total / max(1, where.n_queries)).tolist()


def even(where: Looks) -> Weights:
    """The attention of a head that averages over all keys that it sees."""
    return where.seen / where.seen.sum(2, keepdim=True).clamp(min=1)


def even_frac(attention: Weights, where: Looks) -> float:
    """How many keys a query attends to, of those that it sees, mean over queries."""
    return float(evenness(attention, where.seen)[where.seen.any(2)].mean())


def evenness(attention: Float[Tensor, "*any query key"], seen: Bool[Tensor, "*#any query key"]) -> Tensor:
    """How many keys each query attends to, of those that it sees: 1 is an average over all of them."""
    weights = (attention.double() * seen).clamp(min=0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return entropy.exp() / seen.sum(-1).clamp(min=1)


def explained_by(attention: Weights, groups: Int[Tensor, "batch query key"], where: Looks) -> float:
    """Share of the variance of attention among the keys of a query that goes with `groups` of keys."""
    attention = attention.double() * where.seen
    centred = attention - attention.sum(2, keepdim=True) / where.seen.sum(2, keepdim=True).clamp(min=1)
    values = centred[where.seen]
    if float(values.abs().max()) < EVEN:
        return math.nan
    ids, codes = groups[where.seen].unique(return_inverse=True)
    seen = torch.bincount(codes, minlength=len(ids)).double()
    sums = torch.zeros(len(ids), 1, dtype=torch.float64).index_add_(0, codes, values[:, None])
    return float(explained(seen, sums, values.pow(2).sum()[None]))


EVEN = 1e-4
"""Differences in attention within a query below which a head looks everywhere alike."""
