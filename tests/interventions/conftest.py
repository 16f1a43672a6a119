"""Pairs of prompts, and a model of each kind."""

import pytest
import torch

KINDS = ("sparse", "dense", "bridge")


@pytest.fixture
def pairs():
    """Three pairs of 7, 4 and 5 tokens that differ in their second token alone, padded with token 0."""
    from sparse_interp.tasks.task import TaskBatch

    drawn = torch.Generator().manual_seed(5)
    clean, other = torch.randint(1, 50, (2, 3, 7), generator=drawn)
    corrupt = torch.where(torch.arange(7) == 1, other, clean)
    lengths = torch.tensor([7, 4, 5])
    clean, corrupt = (tokens.masked_fill(torch.arange(7) >= lengths[:, None], 0) for tokens in (clean, corrupt))
    answer, foil = torch.tensor([3, 4, 5]), torch.tensor([13, 14, 15])
    return TaskBatch(clean, corrupt, answer, foil, lengths, torch.zeros(3, dtype=torch.long))


@pytest.fixture
def alone(pairs):
    """Each of the pairs as a batch of its own, without padding."""
    from dataclasses import replace

    rows = [(pairs.rows(slice(i, i + 1)), int(pairs.lengths[i])) for i in range(len(pairs))]
    return [replace(row, clean=row.clean[:, :n], corrupt=row.corrupt[:, :n]) for row, n in rows]


built = {}


@pytest.fixture(params=KINDS)
def any_kind(request, make_model, make_bridge):
    """A sparse model, a dense one of ours, a dense one of TransformerLens; made once, since nothing changes them."""
    if request.param not in built:
        makers = {"bridge": lambda: make_bridge()[0], "sparse": make_model, "dense": lambda: make_model(afrac=None)}
        built[request.param] = makers[request.param]()
    return built[request.param]
