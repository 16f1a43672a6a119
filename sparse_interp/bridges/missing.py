"""Which features of a sparse model a dense one does not have, as far as text can tell.

A channel of the sparse stream is a feature that the dense model has, if its stream says linearly what no other channel
of the sparse stream says:

    own      =  variance of the channel that the other channels of its stream do not predict
    error    =  squared error of predicting the channel from the dense stream, on held-out text
    found    if  error < own / 2,      missing if not

Where the others predict nearly all of a channel (own below `OWN` of its variance), or it is constant, the dense stream
says it whether or not it has the feature: that cannot be told there. What a missing feature leads to is missing too, or
is another thing, in all that is behind it. So sites are gone through in order, and behind a site the sparse model is
run without what has been found missing: its stream is 0 in those channels at every site, and a dense model that lacks
them and nothing else does the same. What is not found in that run may still only be what a channel leads to of which it
cannot be told: the run is made again without each of those, and without all of them, and what is found in any of these
is left open, too. So is what goes missing with others in a stretch of several halves of blocks.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.bridges.bridge import RIDGES, fitted
from sparse_interp.bridges.bridge_config import SitePair
from sparse_interp.bridges.stretches import streams
from sparse_interp.model.dense import FwdHooks, HookedModel
from sparse_interp.model.sites import stream_hook
from sparse_interp.model.transformer import HookedSparseTransformer

OWN = 0.01
"""Share of a channel's variance that no other channel may say, for it to be told whether the dense model has it."""

STILL = 1e-9
"""Variance below which a channel is constant, as a share of what channels vary by, and size at which it holds nothing.
"""

MOST_TRIED = 16
"""Channels left open that are taken out one by one; more of them are taken out together only."""

BLOCKS_AT_ONCE = 16


class Missing(NamedTuple):
    """What is not found in a dense model."""

    missing: dict[int, float]
    """Channels that it lacks, and the share of what is their own that its stream says."""

    undecided: tuple[int, ...]
    """Channels of which it cannot be told, on this text at these sites."""


@torch.no_grad()
def missing_features(
    sparse: HookedSparseTransformer,
    dense: HookedModel,
    pairs: Sequence[SitePair],
    blocks: Tokens,
    *,
    fit_blocks: Int[Tensor, "fit_block fit_pos"],
) -> Missing:
    """Channels of the sparse stream that the dense stream does not say at the tied sites, and those left open.

    Args:
        sparse: whose channels are meant.
        dense: in whose stream they are looked for.
        pairs: tied sites, in the order of the forward pass.
        blocks: held-out text.
        fit_blocks: other text, on which channels are predicted.
    """
    look = _Look(sparse, dense, tuple(pairs), fit_blocks, blocks)
    missing: dict[int, float] = {}
    found: set[int] = set()
    alive: set[int] = set()  # channels that held something at a site before
    before = 0
    for pair in pairs:
        here = look.at(pair, missing)
        lost = here.lost - missing.keys()
        found |= here.found
        unsure = sorted(alive - found - missing.keys())
        for tried in [[channel] for channel in unsure if len(unsure) <= MOST_TRIED] + [unsure] * bool(unsure and lost):
            lost &= look.at(pair, [*missing, *tried]).lost
        if len(lost) == 1 or pair.sparse - before <= 1:
            missing |= {channel: here.share[channel] for channel in sorted(lost)}
        alive, before = alive | here.alive, pair.sparse
    every = set(range(sparse.cfg.d_model))
    return Missing(dict(sorted(missing.items())), tuple(sorted(every - found - missing.keys())))


class _Here(NamedTuple):
    """What is found at one site."""

    share: list[float]
    """By channel: the share of what is its own that the dense stream says."""

    found: set[int]
    """Channels of which it says more than half."""

    lost: set[int]
    """Channels of which it says less."""

    alive: set[int]
    """Channels that hold something."""


class _Look:
    """The dense stream on text, and the sparse one without some channels."""

    def __init__(
        self,
        sparse: HookedSparseTransformer,
        dense: HookedModel,
        pairs: tuple[SitePair, ...],
        fit_blocks: Int[Tensor, "fit_block fit_pos"],
        blocks: Tokens,
    ):
        self.sparse, self.texts = sparse, (fit_blocks, blocks)
        self.theirs = [held(dense, text, [pair.dense for pair in pairs]) for text in self.texts]

    def at(self, pair: SitePair, without: Collection[int]) -> _Here:
        """What is found at a pair of sites if the sparse model is run without some channels."""
        ours = [held(self.sparse, text, [pair.sparse], without=without)[pair.sparse] for text in self.texts]
        share, open_here, alive = _said(*map(flattened, ours), *(flattened(side[pair.dense]) for side in self.theirs))
        decided = alive - open_here
        lost = {channel for channel in decided if share[channel] < 0.5}
        return _Here(share.tolist(), decided - lost, lost, alive)


def _said(
    fit: Float[Tensor, "fit_token d_sparse"],
    stream: Float[Tensor, "token d_sparse"],
    fit_dense: Float[Tensor, "fit_token d_dense"],
    dense: Float[Tensor, "token d_dense"],
) -> tuple[Float[Tensor, " d_sparse"], set[int], set[int]]:
    """The share of what is each channel's own that a dense stream says; what has nothing of its own; what holds any."""
    spread = (fit - fit.mean(0)).square().mean(0)
    covariance = (fit - fit.mean(0)).mT @ (fit - fit.mean(0)) / max(1, len(fit) - fit.shape[1])
    ridge = RIDGES[0] * spread.mean().clamp_min(1e-300) * torch.eye(len(covariance)).to(covariance)
    own = 1 / torch.linalg.inv(covariance + ridge).diagonal()  # what a regression on all the others leaves
    weight, bias = fitted(fit_dense, fit)
    said = 1 - (dense @ weight + bias - stream).square().mean(0) / own
    still = STILL * spread.mean()
    return said, _where((own <= OWN * spread) | (spread <= still)), _where(stream.square().mean(0) > still)


def _where(which: Tensor) -> set[int]:
    return set(which.nonzero()[:, 0].tolist())


def flattened(stream: Float[Tensor, "block pos width"]) -> Float[Tensor, "token width"]:
    """A stream as rows of float64."""
    return stream.flatten(0, 1).double()


def held(
    model: HookedModel, blocks: Tokens, sites: Sequence[int], *, without: Collection[int] = ()
) -> dict[int, Float[Tensor, "block pos width"]]:
    """The stream of a model on text at some sites; of `without`, all of its stream is 0 in those channels."""
    gone = sorted(without)
    every = range(2 * model.cfg.n_layers + 1)
    hooks: FwdHooks = [(stream_hook(site), partial(_emptied, gone)) for site in every] if gone else []
    with model.hooks(fwd_hooks=hooks):
        parts = [streams(model, part, sites) for part in blocks.split(BLOCKS_AT_ONCE)]
    return {site: torch.cat([part[site] for part in parts]) for site in dict.fromkeys(sites)}


def _emptied(gone: list[int], resid: Tensor, hook: HookPoint) -> Tensor:
    emptied = resid.clone()
    emptied[..., gone] = 0
    return emptied
