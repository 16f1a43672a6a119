"""Models with known circuits, by name, and what is measured of a key and against it.

    key  =  the nodes that vary over the task's prompts and that the answer depends on
    every node outside the key held at its mean, all together   ->  the model's own distribution at the answer
    any one node of the key held at its mean                    ->  another distribution

A key is a claim that needs no trust: `effects` measures both sentences by holding nodes at their means one by one and
all together, and the tests do so for every model here.

Compiled models with known algorithms: Lindner et al. 2023 (arXiv:2301.05062); ours are smaller and keep distractors,
after Gao et al. 2025 (arXiv:2511.13653), whose quote circuit `quote` follows.
"""

from collections.abc import Callable, Collection, Hashable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.hand_built import attention_copy, induction, mlp_gate, quote
from sparse_interp.interventions.ablation import ablate, evaluating, mean_activations
from sparse_interp.model.config import AnyShape
from sparse_interp.model.sites import Node, NodeValues, places, width
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import TaskBatch, kl_divergence

# -- by name --------------------------------------------------------------------------------------------------------


def ground_truths() -> dict[str, Callable[[], GroundTruth]]:
    """The hand-built models: name -> a function that builds it anew."""
    return {build.__name__: build for build in (quote, mlp_gate, attention_copy, induction)}


def ground_truth(name: str) -> GroundTruth:
    """The hand-built model called `name`.

    Raises:
        TaskError: for an unknown name.
    """
    known = ground_truths()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TaskError(f"No hand-built model is called {name!r}; {hint}Known: {', '.join(known)}.")
    return known[name]()


# -- what a search found, against the key ---------------------------------------------------------------------------


class Recovery(NamedTuple):
    """How much of a key was found, and how much else."""

    precision: float
    """Share of what was found that is in the key."""

    recall: float
    """Share of the key that was found."""

    f1: float
    """Harmonic mean of the two."""

    exact: bool
    """Whether the two sets are equal."""


def recovery(found: Collection[Hashable], key: Collection[Hashable]) -> Recovery:
    """Compare nodes with `GroundTruth.nodes`, or edges with `GroundTruth.edges`; of two empty sets all is 1."""
    found, key = set(found), set(key)
    hits = len(found & key)
    precision = hits / len(found) if found else float(not key)
    recall = hits / len(key) if key else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Recovery(precision, recall, f1, found == key)


class Effects(NamedTuple):
    """KL(model || model with nodes held at their means) at the answer position, mean over prompts, nats."""

    alone: dict[Node, float]
    """Each node of the model held on its own."""

    outside: float
    """Every node outside the key held at once, and the key free."""


def effects(truth: GroundTruth, batch: TaskBatch, means: NodeValues) -> Effects:
    """Measure what a key claims, on the prompts `batch`, by holding nodes at `means`: no gradients, no search."""
    reference = logits_of(truth.model, batch)

    def kl(nodes: Collection[Node]) -> float:
        with ablate(truth.model, nodes, means):
            return kl_divergence(reference, logits_of(truth.model, batch), batch).mean().item()

    return Effects({node: kl([node]) for node in all_nodes(truth.model.cfg)}, kl(outside(truth)))


def spread(truth: GroundTruth, n: int = 128, *, generator: torch.Generator) -> NodeValues:
    """Standard deviation of every node over positions and prompts; 0 where a node is constant or dead."""
    blocks = truth.blocks(n, generator=generator)
    means = mean_activations(truth.model, blocks)
    found = {}
    with torch.no_grad(), evaluating(truth.model):
        _, cache = truth.model.run_with_cache(blocks, return_type=None)
    for place in places(truth.model.cfg):
        values = cache[place.hook].flatten(2)
        found[place] = (values - means[place]).pow(2).mean((0, 1)).sqrt()
    return NodeValues(found, f"standard deviation over {blocks.numel()} tokens")


def all_nodes(cfg: AnyShape) -> list[Node]:
    """Every node of a model, in the order of its forward pass."""
    return [Node(place.layer, place.site, c) for place in places(cfg) for c in range(width(cfg, place.site))]


def outside(truth: GroundTruth) -> list[Node]:
    """Every node that is not in the key."""
    return [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]


@torch.no_grad()
def logits_of(model: HookedSparseTransformer, batch: TaskBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position of the clean prompts; padding is masked, so that attention both ways is safe."""
    with evaluating(model):
        return model(batch.clean, attention_mask=batch.attention_mask)
