"""GroundTruth: a model, the task that it does, and the circuit by which it does it."""

from dataclasses import dataclass

import torch

from sparse_interp.axes import Tokens
from sparse_interp.model.sites import Node
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task

Edge = tuple[Node, Node]
"""A non-zero weight within a block, by its source and its target."""


@dataclass(frozen=True)
class GroundTruth:
    """A model, a task that it does, and the circuit by which it does it."""

    name: str
    """What `ground_truth` calls it."""

    model: HookedSparseTransformer
    """Weights written by hand; in eval mode."""

    task: Task
    """Prompts that the model answers, with splits train, test and shifted."""

    nodes: frozenset[Node]
    """The key: nodes that vary over the prompts and that the answer depends on."""

    edges: frozenset[Edge]
    """All non-zero weights between two nodes of the key."""

    why: str
    """How the model arrives at its answer, in words."""

    channels: tuple[str, ...]
    """What the channels of the stream carry, and behind them those of concatenated positions."""

    def blocks(self, n: int = 128, *, generator: torch.Generator) -> Tokens:
        """Both prompts of `n` training pairs: the text over which means of this model are taken."""
        batch = self.task.batch(n, split="train", generator=generator)
        return torch.cat([batch.clean, batch.corrupt])
