"""Coordinates in which a step of a linear map counts alike for every direction of the stream that it reads.

    x W + b  =  (x - mean) W + b',    W = size A D,    b' = size c,    A = (cov x + FLOOR * mean variance)^-1/2
    gradients for D and c, of d_out / 2 times a loss:    d_out / 2 size A (G_W - mean g_b^T)  and  d_out / 2 size g_b

A stream varies a thousand times more in some directions than in others. A step of Adam is about as large in every
weight, however small the gradient, so in the weights as they are it moves what is read along the large directions by
more than the small ones can win, and begun at the least squares it leaves them for good. In D and c the NMSE of the
stream is as steep in every direction, and d_out / 2 times its gradient is how far they are from where it is least: the
size of a gradient means something, which AdamW's eps can be set against.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

FLOOR = 1e-3
"""Share of the mean variance that every direction is taken to have at least: what hardly varies is not blown up."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """D and c of one map."""

    mean: Float[Tensor, " d_in"]
    """Of the stream that is read."""

    axes: Float[Tensor, "d_in d_in"]
    """A: symmetric, and makes what is read vary by 1 in every direction."""

    size: Float[Tensor, ""]
    """Root mean variance of the channels that are wanted."""

    @classmethod
    def of(cls, read: Float[Tensor, "*batch d_in"], wanted: Float[Tensor, "*batch d_out"]) -> "Coordinates":
        """Those of a map from one stream to another."""
        x, y = read.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        variances, directions = torch.linalg.eigh((x - x.mean(0)).mT @ (x - x.mean(0)) / len(x))
        least = FLOOR * variances.clamp(min=0).mean().clamp_min(1e-24)
        axes = directions / (variances.clamp(min=0) + least).sqrt() @ directions.mT
        size = y.var(0, correction=0).mean().sqrt().clamp_min(1e-12)
        return cls(*(tensor.to(read.dtype) for tensor in (x.mean(0), axes, size)))

    @torch.no_grad()
    def turn_gradient_(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        """Make the gradients of a map's weight and bias those of D and c, of d_out / 2 times the loss, in place."""
        if weight.grad is not None and bias.grad is not None:
            share = len(bias) / 2 * self.size
            weight.grad.copy_(share * (self.axes @ (weight.grad - torch.outer(self.mean, bias.grad))))
            bias.grad.mul_(share)

    @torch.no_grad()
    def turn_step_(self, weight: nn.Parameter, bias: nn.Parameter, before: tuple[Tensor, Tensor]) -> None:
        """Make what an optimizer has added to `before`, a step of D and c, the step of weight and bias, in place."""
        step = self.size * (self.axes @ (weight - before[0]))
        bias.copy_(before[1] + self.size * (bias - before[1]) - self.mean @ step)
        weight.copy_(before[0] + step)
