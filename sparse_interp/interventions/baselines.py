"""Baselines: what a node holds while it is ablated.

    zero                 0
    mean over text       its mean over all positions of blocks of text (Gao et al. 2025, arXiv:2511.13653)
    mean over a task     its mean over the real positions of a task's prompts, both of every pair
    mean per position    the same, position by position from the start; later than any seen, the mean over the task
    counterfactual       what it holds on the prompt's own twin, at the same position
    resample             what it holds on another prompt, drawn from a pool, at the same position

The first three are constants, `NodeValues`; so are learned ones (interventions/optimal.py). The others
depend on the prompts and make their values when they are told which: `.on(model, batch)`. Values of other prompts are
those of the model without hooks, so that one ablation inside another takes the values that it would take alone. Padding
takes part in no mean; where a prompt ends before the one that takes its values, the value at its last token stands for
the rest.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError
from sparse_interp.interventions.answers import at_answers
from sparse_interp.model.dense import AnyModel, DenseModel, FwdHooks, HookedModel, hooked, nobody_listening
from sparse_interp.model.sites import NODE_SITES, SITES, NodeValues, Place, flat, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch

BATCH_SIZE = 64
"""Prompts per forward pass where means are taken."""


@runtime_checkable
class PromptBaseline(Protocol):
    """A baseline whose values depend on the prompts."""

    @property
    def kind(self) -> str:
        """What the values are, for tables and files."""

    def on(self, model: AnyModel, batch: TaskBatch) -> Mapping[Place, Float[Tensor, "#batch pos width"]]:
        """The values for a run on `batch.clean`, for every place of the model and every position, padding included."""


Baseline = NodeValues | PromptBaseline


# -- constants --------------------------------------------------------------------------------------------------------


def zero_values(model: AnyModel) -> NodeValues:
    """Zero for every node."""
    cfg, dtype = hooked(model).cfg, hooked(model).embed.W_E.dtype
    zeros = {place: torch.zeros(width(cfg, place.site), dtype=dtype) for place in places(cfg)}
    return NodeValues(zeros, "zero")


@torch.no_grad()
def mean_activations(
    model: AnyModel,
    blocks: Int[Tensor, "block pos"],
    *,
    sites: Collection[str] = NODE_SITES,
    batch_size: int = 16,
    progress: bool = False,
) -> NodeValues:
    """The mean of every node at `sites` over all positions of `blocks`, in eval mode.

    Raises:
        CircuitError: if there are no blocks.
    """
    model = hooked(model)
    if len(blocks) == 0:
        raise CircuitError("means need at least one block of tokens, and there are none.")
    sums = dict.fromkeys(places(model.cfg, sites), 0.0)
    for batch in tqdm(blocks.split(batch_size), disable=not progress, desc="means", unit="batch"):
        for place, found in _run(model, batch, sites, lambda held: held.double().sum((0, 1)).cpu()).items():
            sums[place] = sums[place] + found
    return NodeValues(_means(model, sums, blocks.numel()), f"mean over {blocks.numel()} tokens of text")


def task_means(model: AnyModel, pairs: TaskBatch) -> NodeValues:
    """The mean of every node over the real positions of both prompts of every pair, in eval mode.

    Raises:
        CircuitError: if there are no pairs.
    """
    sums, counts = _position_sums(model, pairs)
    total = {place: at_positions.sum(0) for place, at_positions in sums.items()}
    return NodeValues(_means(hooked(model), total, int(counts.sum())), f"mean over {2 * len(pairs)} prompts")


# -- values of prompts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PositionMeans:
    """Means for every position from the start of a prompt; `position_means` makes them."""

    means: Mapping[Place, Float[Tensor, "row width"]]
    """One row per position that was seen, and a last one that stands for all later ones: the mean over all."""

    kind: str
    """What they are means of."""

    def on(self, model: AnyModel, batch: TaskBatch) -> dict[Place, Float[Tensor, "1 pos width"]]:
        """The means at the positions of `batch.clean`.

        Raises:
            CircuitError: if they are means of another model.
        """
        like = hooked(model).embed.W_E
        last = NodeValues({place: rows[-1] for place, rows in self.means.items()}, self.kind)
        last.check(hooked(model).cfg)
        pos = torch.arange(batch.clean.shape[1])
        return {place: rows[pos.clamp(max=len(rows) - 1)][None].to(like) for place, rows in self.means.items()}


def position_means(model: AnyModel, pairs: TaskBatch) -> PositionMeans:
    """The mean of every node at every position, over those prompts of `pairs`, both of each, that reach it.

    Raises:
        CircuitError: if there are no pairs.
    """
    sums, counts = _position_sums(model, pairs)
    n = counts[counts > 0]
    each = {place: total[: len(n)] / n[:, None] for place, total in sums.items()}
    rows = {place: torch.cat([means, sums[place].sum(0, keepdim=True) / n.sum()]) for place, means in each.items()}
    like = hooked(model).embed.W_E.dtype
    kind = f"mean per position over {2 * len(pairs)} prompts"
    return PositionMeans({place: means.to(like) for place, means in rows.items()}, kind)


@dataclass(frozen=True)
class Counterfactual:
    """What each node holds on the prompt's own twin: `batch.corrupt` for a run on `batch.clean`."""

    kind: str = "counterfactual"
    """What the values are."""

    def on(self, model: AnyModel, batch: TaskBatch) -> dict[Place, Float[Tensor, "batch pos width"]]:
        """The values of the twins."""
        with _untouched(model):
            return values_on(model, batch.swapped(), batch.clean.shape[1])


@dataclass(frozen=True, eq=False)
class Resample:
    """What each node holds on another prompt of a pool, in all places the same one.

    Which one depends on the seed and on the prompt's own tokens, so that a prompt meets the same other one in whatever
    batch it runs. A prompt never meets itself.
    """

    pool: TaskBatch
    """Prompts to draw from: the clean ones."""

    seed: int
    """Decides who meets whom; `Ablation.resample` takes it from a generator."""

    kind: str = "resample"
    """What the values are."""

    def on(self, model: AnyModel, batch: TaskBatch) -> dict[Place, Float[Tensor, "batch pos width"]]:
        """The values on the prompts that are drawn.

        Raises:
            CircuitError: if a prompt finds nobody but itself in the pool.
        """
        pool = [_real(self.pool, row) for row in range(len(self.pool))]
        others = torch.tensor([self._drawn(_real(batch, row), pool) for row in range(len(batch))])
        with _untouched(model):
            return values_on(model, self.pool.rows(others.to(self.pool.clean.device)), batch.clean.shape[1])

    def _drawn(self, prompt: tuple[int, ...], pool: list[tuple[int, ...]]) -> int:
        digest = hashlib.sha256(repr((self.seed, prompt)).encode()).digest()
        first = int.from_bytes(digest[:8], "big")
        for step in range(len(pool)):
            row = (first + step) % len(pool)
            if pool[row] != prompt:
                return row
        raise CircuitError(f"resampling needs a prompt other than {list(prompt)}; the pool of {len(pool)} has none.")


def held_at_answers(model: HookedModel, baseline: Baseline, batch: TaskBatch) -> NodeValues | dict[Place, Tensor]:
    """What nodes outside hold on these prompts, as runs that unembed the answer position alone take it."""
    return baseline if isinstance(baseline, NodeValues) else at_answers(baseline.on(model, batch), batch)


@torch.no_grad()
def values_on(model: AnyModel, batch: TaskBatch, n_pos: int) -> dict[Place, Float[Tensor, "batch pos width"]]:
    """What every node holds on `batch.clean` at the first `n_pos` positions, in eval mode, hooks included.

    Positions after a prompt's end repeat its last token's value.
    """
    model = hooked(model)
    device = model.embed.W_E.device
    rows, last = torch.arange(len(batch), device=device)[:, None], batch.last.to(device)[:, None]
    pos = torch.arange(n_pos, device=device).minimum(last)
    tokens = batch.clean[:, : int(batch.lengths.max())]
    mask = batch.attention_mask[:, : tokens.shape[1]]
    return _run(model, tokens, SITES, lambda held: held[rows, pos], mask)


def _untouched(model: AnyModel) -> AbstractContextManager[None]:
    """A block inside which no hook of anybody's is on the model."""
    model = hooked(model)
    return nobody_listening(model.tl if isinstance(model, DenseModel) else model)


# -- runs -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    sites: Iterable[str],
    keep: Callable[[Float[Tensor, "batch pos width"]], Tensor],
    mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[Place, Tensor]:
    """What `keep` makes of every place of a run in eval mode."""
    kept: dict[Place, Tensor] = {}
    device = model.embed.W_E.device
    if mask is None or model.cfg.attention_dir == "causal":  # padding on the right is then never seen
        given = {}
    else:
        given = {"attention_mask": mask.to(device)}
    hooks: FwdHooks = [(place.hook, partial(_keep, kept, place, keep)) for place in places(model.cfg, list(sites))]
    with evaluating(model), model.hooks(fwd_hooks=hooks):
        model(tokens.to(device), return_type=None, **given)
    return kept


def _keep(
    kept: dict[Place, Tensor], place: Place, keep: Callable[[Tensor], Tensor], activation: Tensor, hook: HookPoint
) -> None:
    kept[place] = keep(flat(activation))


def _position_sums(
    model: AnyModel, pairs: TaskBatch
) -> tuple[dict[Place, Float[Tensor, "pos width"]], Float[Tensor, " pos"]]:
    """Sums over both prompts of every pair at every position that is not padding, and how many were added up."""
    model = hooked(model)
    if len(pairs) == 0:
        raise CircuitError("means over a task need at least one pair of prompts, and there are none.")
    sums: dict[Place, Tensor] = {}
    for rows in torch.arange(len(pairs)).split(BATCH_SIZE):
        batch = pairs.rows(rows.to(pairs.clean.device))
        real = batch.attention_mask.to(model.embed.W_E.device)
        for side in (batch.clean, batch.corrupt):
            found = _run(
                model, side, SITES, lambda held, real=real: (held.double() * real[..., None]).sum(0).cpu(), real
            )
            sums = {place: sums[place] + more if place in sums else more for place, more in found.items()}
    return sums, 2 * pairs.attention_mask.sum(0).double().cpu()


def _means(model: HookedModel, sums: Mapping[Place, Tensor | float], n: int) -> dict[Place, Float[Tensor, " width"]]:
    dtype = model.embed.W_E.dtype
    return {place: (total / n).to(dtype) for place, total in sums.items() if isinstance(total, Tensor)}


def _real(batch: TaskBatch, row: int) -> tuple[int, ...]:
    """The tokens of one prompt, without padding."""
    return tuple(batch.clean[row, : int(batch.lengths[row])].tolist())
