"""Which features of a sparse model a dense one does not have, as far as text can tell.

A channel of the sparse stream is a feature that the dense model has, if its stream says linearly some of what no other
channel of the sparse stream says:

    own      =  squared error of predicting the channel from the other channels of its stream, on held-out text
    beside   =  the same, from these and the dense stream together
    said     =  1 - beside / own                                    between twins 1 if it has the feature, and else 0
    missing  if  said < half of what is said of the median channel at that site, or < LEAST

Between models trained apart a dense stream says a little of everything. `said` of the median channel tells how much,
and the mark is half of it, so that missing is what stands back behind the rest; how far, its own share says.

Where the others predict nearly all of a channel (own below `OWN` of its variance), or it is constant, the dense stream
says it whether or not it has the feature: that cannot be told there. What a missing feature leads to is missing too, or
is another thing, in all that is behind it. So sites are gone through in order, and behind a site the sparse model is
run without what has been found missing: its stream is 0 in those channels at every site, and a dense model that lacks
them and nothing else does the same. What is not found in that run may still only be what a channel leads to of which it
cannot be told: the run is made again without each of those, and without all of them, and what is found in any of these
is left open, too. So is what goes missing with others in a stretch of several halves of blocks. And where the dense
model lacks a channel that is left open, the two streams differ by what it leads to, which says a part of other channels
that are missing: found is then only what is said whole.
"""

from collections.abc import Collection, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.bridges.bridge import RIDGES
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

LEAST = 0.05
"""Share of what is a channel's own that a dense stream has to say of it, however little it says of others."""

WHOLE = 0.9
"""As much of what is said of the median channel has to be said of one that is found while others are left open."""

MOST_TRIED = 16
"""Channels left open that are taken out one by one; more of them are taken out together only."""

BLOCKS_AT_ONCE = 16


class Missing(NamedTuple):
    """What is not found in a dense model."""

    missing: dict[int, float]
    """Channels that it lacks, and the share of what is their own that its stream says."""

    undecided: tuple[int, ...]
    """Channels of which it cannot be told, on this text at these sites."""

    said: dict[SitePair, float]
    """By pair of sites: the share of what is its own that the dense stream says of the median channel."""


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
    before, said = 0, {}
    for pair in pairs:
        here = look.at(pair, missing)
        said[pair] = here.typical
        lost = here.lost - missing.keys()
        unsure = sorted(alive - found - here.found - missing.keys())
        found |= {channel for channel in here.found if not unsure or here.share[channel] > WHOLE * here.typical}
        for tried in [[channel] for channel in unsure if len(unsure) <= MOST_TRIED] + [unsure] * bool(unsure and lost):
            lost &= look.at(pair, [*missing, *tried]).lost
        if len(lost) == 1 or pair.sparse - before <= 1:
            missing |= {channel: here.share[channel] for channel in sorted(lost)}
        alive, before = alive | here.alive, pair.sparse
    every = set(range(sparse.cfg.d_model))
    return Missing(dict(sorted(missing.items())), tuple(sorted(every - found - missing.keys())), said)


class _Here(NamedTuple):
    """What is found at one site."""

    share: list[float]
    """By channel: the share of what is its own that the dense stream says."""

    typical: float
    """The same of the median channel; 0 where it can be told of none."""

    found: set[int]
    """Channels of which it says more than half as much, and more than `LEAST`."""

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
        typical = median([float(share[channel]) for channel in decided]) if decided else 0.0
        lost = {channel for channel in decided if share[channel] < max(LEAST, typical / 2)}
        return _Here(share.tolist(), typical, decided - lost, lost, alive)


def _said(
    fit: Float[Tensor, "fit_token d_sparse"],
    stream: Float[Tensor, "token d_sparse"],
    fit_dense: Float[Tensor, "fit_token d_dense"],
    dense: Float[Tensor, "token d_dense"],
) -> tuple[Float[Tensor, " d_sparse"], set[int], set[int]]:
    """The share of what is each channel's own that a dense stream says; what has nothing of its own; what holds any."""
    spread = (fit - fit.mean(0)).square().mean(0)
    still = STILL * spread.mean()
    own, alone = _left(fit, stream)
    _, beside = _left(torch.cat([fit, fit_dense], 1), torch.cat([stream, dense], 1))
    said = 1 - beside[: len(alone)] / alone.clamp_min(1e-300)
    return said, _where((own <= OWN * spread) | (spread <= still)), _where(stream.square().mean(0) > still)


def _left(
    fit: Float[Tensor, "fit_token width"], tokens: Float[Tensor, "token width"]
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """What a regression of each channel on all the others leaves of it, mean squares: in its own text, and in another.

    All at once: with P the inverse of the covariance, what is left of channel c of a token z is (z - mean) P_c / P_cc.
    """
    mean, size = fit.mean(0), (fit - fit.mean(0)).square().mean(0).sqrt()
    size = size.clamp_min(1e-12 * float(size.max().clamp_min(1e-300)))
    scaled = (fit - mean) / size
    covariance = scaled.mT @ scaled / max(1, len(fit) - fit.shape[1])
    precision = torch.linalg.inv(covariance + RIDGES[0] * torch.eye(len(covariance)).to(covariance))
    left = ((tokens - mean) / size) @ precision / precision.diagonal() * size
    return size.square() / precision.diagonal(), left.square().mean(0)


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
