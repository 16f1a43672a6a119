"""Hand-built models with their means, each built once per run: nothing changes one."""

from functools import cache

import torch

from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import NodeValues


@cache
def hand_built(name: str) -> tuple[GroundTruth, NodeValues]:
    """The hand-built model called `name`, and the means of its nodes over its own prompts."""
    truth = ground_truth(name)
    return truth, means_of(truth)


def means_of(truth: GroundTruth) -> NodeValues:
    """Means over both prompts of 32 training pairs."""
    blocks = truth.blocks(32, generator=torch.Generator().manual_seed(0))
    return mean_activations(truth.model, blocks, batch_size=64)
