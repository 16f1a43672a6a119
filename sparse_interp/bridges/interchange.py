"""Interchanges: does a change of some channels of the sparse stream change what both models say alike?

At a pair of tied sites, with y and x the streams of a batch, y~ the sparse one of another of its blocks, and S some
channels, drawn anew for every block:

    change = (y~ - y)_S              sparse model run on from y + change, the dense one from x + change W_decode

    loss   = sum w Var_p(d - s) / sum w Var_p(s),               w = 1 / |S|

where s and d are the changes of the two models' logits at every token, and p is what the dense model says there. 0 is
exact; 1 is what a bridge has that carries nothing. To second order the variance is twice KL(p exp s || p exp d), each
made to sum to 1.

Text alone says what streams are, and nothing of what one channel does while the others stay: of channels that come
together least squares share out what only one of them may do. A change of some and not of others tells them apart. It
is an interchange intervention (Geiger et al. 2022, arXiv 2112.00826, who train a network to answer it as a causal model
does). The change is the sparse model's own on both sides, and not that of encoded streams: how well the dense model
knows what a channel holds is a matter of the encoder, and what a unit of it does one of the decoder. |S| is log-uniform
from 1 to a quarter of all channels, and w makes large sets count for no more than small ones.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_interp.axes import Logits

LARGEST = 0.25
"""Share of the channels in the largest sets."""

STILL = 1e-8
"""Mean of w Var_p(sparse change), nats squared, below which a batch says nothing."""


class Interchange(NamedTuple):
    """What is exchanged in each block of a batch."""

    channels: Bool[Tensor, "block 1 channel"]
    """Which channels."""

    donor: Int[Tensor, " block"]
    """The block whose stream they are taken from, token by token."""

    @classmethod
    def draw(cls, n_blocks: int, n_channels: int, *, generator: torch.Generator) -> "Interchange":
        """Channels for every block, and another block for each; a block that is alone is left as it is."""
        most = max(1, int(LARGEST * n_channels))
        size = (torch.rand(n_blocks, generator=generator) * math.log(most + 1)).exp().long().clamp(1, most)
        order = torch.rand(n_blocks, n_channels, generator=generator).argsort(-1).argsort(-1)
        by = int(torch.randint(1, n_blocks, (), generator=generator)) if n_blocks > 1 else 0
        return cls((order < size[:, None])[:, None], (torch.arange(n_blocks) + by) % n_blocks)

    def change(self, stream: Float[Tensor, "block pos channel"]) -> Float[Tensor, "block pos channel"]:
        """By how much a stream changes."""
        there = self.channels.to(stream.device)
        return torch.where(there, stream[self.donor.to(stream.device)] - stream, 0.0)

    def not_carried(self, sparse_change: Logits, dense_change: Logits, probs: Logits) -> Float[Tensor, ""]:
        """The share of the sparse model's change that the dense model's is not; 0 where that does not change at all.

        Args:
            sparse_change: of the sparse model's logits, without gradient.
            dense_change: of the dense model's.
            probs: p.
        """
        weight = 1 / self.channels.sum(-1).to(probs)
        error, spread = (
            (weight * _variance(probs, change.to(probs))).mean()
            for change in (dense_change - sparse_change, sparse_change)
        )
        return error / spread if float(spread) > STILL else 0 * error


def _variance(probs: Logits, change: Logits) -> Float[Tensor, "block pos"]:
    """Var_p of a change at every token: what is the same for all of the vocabulary changes nothing."""
    centred = change - (probs * change).sum(-1, keepdim=True)
    return (probs * centred.square()).sum(-1)
