"""Steering curves: how probable a token becomes as a dense model is pushed along a feature of a sparse one.

    probability(value)  =  mean over held-out prompts of  P(target)  with  x + value * direction  at a tied site

beside pushes of the same norm: along the difference of the means of the dense stream between prompts that continue with
the target and prompts that do not, taken from other prompts, and along random directions, of which the best twentieth
sets the mark. `loss change` is what the push costs on text that has nothing to do with it (Gao et al. 2025, arXiv
2511.13653, steer a dense model by the channels of a quote and of `return True`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from sparse_interp.axes import PerPrompt, Tokens
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.steering import feature_direction, first_behind
from sparse_interp.bridges.stretches import streams
from sparse_interp.errors import BridgeError
from sparse_interp.faithfulness.scores import mean_of
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.interventions.steering import push
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, lines
from sparse_interp.tasks.task import TaskBatch

FEATURE, MEANS, RANDOM_95, RANDOM_MEAN = "feature", "difference of means", "random, 95th percentile", "random, mean"
AHEAD = "feature less difference of means"


@dataclass(frozen=True, eq=False)
class SteeringTable(Table):
    """One row per value and direction.

    `node`, `direction` (the feature, the difference of means, of random directions the mean and the 95th percentile),
    `value`, `norm` (of what is added), `probability` (of the target) and `change` (from the untouched model) with the
    bounds `low` and `high`; `loss_change_frac` (next-token loss on unrelated text, share of the untouched model's). A
    row more says by how much the feature changes the probability more than the difference of means, with bounds.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "node",
        "direction",
        "value",
        "norm",
        "probability",
        "change",
        "low",
        "high",
        "loss_change_frac",
    )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Probability of the target by value, a line per direction."""
        return lines(self.frame[self.frame.direction != AHEAD], x="value", y="probability", by="direction", ax=ax)


@torch.no_grad()
def steering_curve(
    bridge: Bridge,
    sparse: AnyModel,
    dense: AnyModel,
    node: Node,
    values: Sequence[float],
    batch: TaskBatch,
    *,
    target: int,
    fit: TaskBatch,
    blocks: Tokens,
    n_random: int = 100,
    at_end: bool = True,
    generator: torch.Generator,
    progress: bool = True,
) -> SteeringTable:
    """Push a dense model along a feature by several values, and along what it is compared with by the same norms.

    Args:
        bridge: ties the two models.
        sparse: where the node is.
        dense: the model that is steered, ours or TransformerLens'.
        node: any node that has a direction.
        values: how much of the feature is added, of either sign.
        batch: held-out prompts, the clean ones.
        target: id of the token whose probability is asked about.
        fit: other prompts, both sides of each, for the difference of means; some continue with the target.
        blocks: unrelated text.
        n_random: random directions.
        at_end: whether the push is at each prompt's last position alone; else at all. On text it is at all positions.
        generator: draws random directions and intervals.
        progress: whether to show a progress bar.

    Raises:
        BridgeError: if the node has no direction, the bridge does not fit, or no prompt of `fit` has the target.
    """
    bridge.check(sparse, dense)
    model, pair = hooked(dense), first_behind(bridge, node)
    feature = feature_direction(bridge, sparse, node)[pair]
    gaussian = torch.randn(n_random, len(feature), generator=generator, device=generator.device).to(feature)
    random = gaussian / gaussian.norm(dim=1, keepdim=True)
    with evaluating(model):
        means = _towards(model, pair.dense, fit, target)
        run = _Pushed(model, pair.dense, batch.to(feature.device), target, blocks, at_end)
        rows = []
        with tqdm(total=len(values) * (n_random + 2), disable=not progress, desc="pushes", unit="run") as bar:
            for value in values:
                norm = abs(value) * float(feature.norm())
                found = {}
                for name, by in ((FEATURE, value * feature), (MEANS, norm * means)):
                    found[name] = run.probabilities(by)
                    about = float(found[name].mean()), *run.change(found[name] - run.each, generator)
                    rows.append((str(node), name, value, norm, *about, run.loss_change(by)))
                    bar.update()
                ahead = run.change(found[FEATURE] - found[MEANS], generator)
                rows.append((str(node), AHEAD, value, norm, nan, *ahead, nan))
                each = []
                for direction in random:
                    each.append(float(run.probabilities(norm * direction).mean()))
                    bar.update()
                drawn = torch.tensor(each, dtype=torch.float64)
                for name, p in ((RANDOM_95, float(drawn.quantile(0.95))), (RANDOM_MEAN, float(drawn.mean()))):
                    rows.append((str(node), name, value, norm, p, p - run.base, nan, nan, nan))
    return SteeringTable(pd.DataFrame(rows, columns=list(SteeringTable.columns)))


def _towards(model: HookedModel, site: int, fit: TaskBatch, target: int) -> Float[Tensor, " d_dense"]:
    """Unit vector from the mean stream of prompts that continue otherwise to that of those that have the target."""
    with_target, without = [], []
    for side in (fit, fit.swapped()):
        seen = None if model.cfg.attention_dir == "causal" else side.attention_mask
        ends = streams(model, side.clean, [site], seen)[site][torch.arange(len(side)), side.last]
        with_target.append(ends[side.answer == target])
        without.append(ends[side.answer != target])
    if not sum(map(len, with_target)) or not sum(map(len, without)):
        raise BridgeError(
            f"of the {2 * len(fit)} prompts of `fit` {sum(map(len, with_target))} continue with token {target}; a "
            "difference of means needs some that do and some that do not."
        )
    difference = torch.cat(with_target).mean(0) - torch.cat(without).mean(0)
    return difference / difference.norm().clamp_min(1e-12)


class _Pushed:
    """A dense model on prompts and on text, pushed at one site."""

    def __init__(self, model: HookedModel, site: int, batch: TaskBatch, target: int, blocks: Tokens, at_end: bool):
        self.model, self.site, self.batch, self.target, self.blocks = model, site, batch, target, blocks
        self.positions = batch.last if at_end else None
        nothing = torch.zeros(model.cfg.d_model)
        self.each, self.losses = self.probabilities(nothing), self._losses(nothing)
        self.base = float(self.each.mean())
        groups = batch.template.tolist()
        self.groups = groups if len(set(groups)) > 1 else list(range(len(batch)))

    def change(self, each: PerPrompt, generator: torch.Generator) -> Interval:
        """Mean over prompts of a change, with its bounds."""
        return mean_of(each, self.groups, generator)

    def loss_change(self, by: Float[Tensor, " d_dense"]) -> float:
        """By what share the loss on text rises."""
        return float(self._losses(by).mean() / self.losses.mean()) - 1

    def probabilities(self, by: Float[Tensor, " d_dense"]) -> PerPrompt:
        """P(target) of each prompt."""
        with push(self.model, self.site, by, positions=self.positions):
            logits = answer_logits(self.model, self.batch)
        return logits.double().softmax(-1)[:, self.target].cpu()

    def _losses(self, by: Float[Tensor, " d_dense"]) -> Tensor:
        found = []
        with push(self.model, self.site, by):
            for part in self.blocks.split(16):
                predicted = self.model(part)[:, :-1].mT
                found.append(cross_entropy(predicted, part[:, 1:], reduction="none").mean(1))
        return torch.cat(found)
