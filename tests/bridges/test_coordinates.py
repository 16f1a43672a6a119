"""In these coordinates a map's loss is equally steep in every direction, and a step is that of the plain weights."""

import torch
from torch import nn

from sparse_interp.bridges.coordinates import Coordinates


def test_a_small_gradient_step_is_the_newton_step_of_the_squared_error(generator):
    scales = torch.tensor([30.0, 1.0, 0.3, 0.1, 0.1], dtype=torch.float64)
    read = torch.randn(500, 5, generator=generator, dtype=torch.float64) * scales + 7.0
    wanted = read @ torch.randn(5, 3, generator=generator, dtype=torch.float64) - 2.0
    weight, bias = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64)), nn.Parameter(torch.zeros(3).double())
    coordinates = Coordinates.of(read, wanted)
    for _ in range(40):
        weight.grad = bias.grad = None
        ((read @ weight + bias - wanted).square().sum(1).mean() / 2).backward()
        coordinates.turn_gradient_(weight, bias)
        before = weight.detach().clone(), bias.detach().clone()
        with torch.no_grad():
            for p in (weight, bias):
                p.sub_(0.9 * p.grad / coordinates.size**2)
        coordinates.turn_step_(weight, bias, before)
    error = (read @ weight + bias - wanted).square().mean() / wanted.var()
    assert error < 1e-6  # plain gradient descent needs some 10^5 steps for directions that vary so differently
