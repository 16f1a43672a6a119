"""GroundTruth: a model, the task that it does, and the circuit by which it does it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparse_interp.axes import Tokens
from sparse_interp.model.sites import Node
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task

Edge = tuple[Node, Node]
"""A non-zero weight within a block, by its source and its target."""


class Key(NamedTuple):
    """A circuit that somebody who looks for one has to find."""

    nodes: frozenset[Node]
    """Nodes that vary over the prompts and that the answer depends on."""

    edges: frozenset[Edge]
    """Weights between two of them that it depends on."""


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
    """Of the weights between two nodes of the key, those that the answer depends on."""

    why: str
    """How the model arrives at its answer, in words."""

    channels: tuple[str, ...]
    """What the channels of the stream carry, and behind them those of concatenated positions."""

    alternatives: tuple[Key, ...] = ()
    """Other circuits that do the same and from which nothing can be left out either."""

    repaired: frozenset[Node] = frozenset()
    """Nodes of keys that the model does without as long as what is outside of the key may make good for them."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """All that counts as found: the key, then its alternatives."""
        return (Key(self.nodes, self.edges), *self.alternatives)

    def blocks(self, n: int = 128, *, generator: torch.Generator) -> Tokens:
        """Both prompts of `n` training pairs: the text over which means of this model are taken.

        A model that attends both ways would see padding; of its prompts only the longest are there.
        """
        batch = self.task.batch(n, split="train", generator=generator)
        if self.model.cfg.attention_dir == "bidirectional":
            batch = batch.rows((batch.lengths == batch.lengths.max()).nonzero().flatten())
        return batch.both_sides().clean
