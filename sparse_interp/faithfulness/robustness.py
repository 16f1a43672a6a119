"""Robustness: whether a circuit's scores hang on how they were measured.

    baselines    what nodes outside hold: the circuit's own, zero, means over the prompts, per position too, what they
                 hold on the pair's other prompt, what they hold on another prompt drawn from all of them
    positions    where they hold it: at all, at the answer's alone, at all before it
    metrics      KL(model || circuit), gap in task loss and in accuracy, equal argmax, logit difference restored

Ablation is full and the circuit is what is kept; edges that it lacks carry its own baseline whatever the others hold. A
circuit may be faithful by one choice and not by another, and often is (Miller et al. 2024, arXiv:2407.08734): a score
without its choices says little, so every row has all of them, and the spread is told with the scores.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.controls import empty_circuit
from sparse_interp.faithfulness.scores import (
    CONSTANT,
    PromptScores,
    groups_of,
    mean_of,
    of_means,
    prompt_scores,
    some_pairs,
)
from sparse_interp.interventions.ablation import Ablation, Masks, Running
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.interventions.baselines import Baseline, Counterfactual, position_means, task_means
from sparse_interp.interventions.edges import cutting
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import FINAL_READ, NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch

POSITIONS = ("all", "answer", "before the answer")
"""Where nodes outside are held."""

METRICS = {
    "KL(model || circuit)": "nats",
    "task loss gap": "nats",
    "accuracy gap": "share",
    "argmax agreement": "share",
    "logit difference restored": "share",
}
"""What is measured, with its unit."""


@dataclass(frozen=True, eq=False)
class RobustnessGrid(Table):
    """One row per baseline, positions and metric.

    `value` in `unit`, with its interval `low` to `high` over templates (95 %), means over prompts;
    `own` marks what the circuit runs with: its own baseline, at all positions. The share of the logit difference that
    is restored is not a number where model and empty circuit prefer the answer alike.
    """

    columns: ClassVar[tuple[str, ...]] = ("baseline", "positions", "metric", "value", "low", "high", "unit", "own")

    n_prompts: int
    """Prompts that every value is a mean over, both sides of pairs."""

    @property
    def spread(self) -> Table:
        """One row per metric: the circuit's `own` way of measuring, and `lowest` and `highest` of all."""
        rows = []
        for metric, found in self.frame.groupby("metric", sort=False):
            rows.append((metric, found.value[found.own].iloc[0], found.value.min(), found.value.max(), METRICS[metric]))
        return Table(pd.DataFrame(rows, columns=["metric", "own", "lowest", "highest", "unit"]))

    def highest(self, metric: str) -> Interval:
        """The highest value of a metric, with its interval: of a divergence the worst."""
        rows = self.frame[(self.frame.metric == metric) & self.frame.value.notna()]
        if rows.empty:
            return Interval(nan, nan, nan)
        row = rows.loc[rows.value.idxmax()]
        return Interval(float(row.value), float(row.low), float(row.high))

    def plot(self, ax: Axes | None = None) -> Axes:
        """KL(model || circuit) by baseline and positions."""
        rows = self.frame[self.frame.metric == "KL(model || circuit)"]
        bars = rows.assign(label=rows.baseline + ", " + rows.positions).rename(columns={"value": "kl_nats"})
        return bars_with_intervals(bars, label="label", value="kl_nats", low="low", high="high", by="positions", ax=ax)


@torch.no_grad()
def robustness_grid(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    n_pairs: int = 32,
    generator: torch.Generator,
    progress: bool = True,
) -> RobustnessGrid:
    """Measure a circuit by every baseline, at all positions, at some, by every metric.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit.
        pairs: prompts with their twins.
        n_pairs: how many of them are measured on, from all templates alike; both prompts of each.
        generator: draws pairs, whose values a prompt takes, and resamples.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to other weights, or keeps nodes at positions of prompts of another length.
    """
    circuit.check_lengths(pairs)
    circuit.check_model(model)
    model = hooked(model)
    pairs = some_pairs(pairs, n_pairs, generator=generator)
    grid = _Grid(model, circuit, pairs.both_sides(), generator)
    rows = []
    ways = [(ablation, where) for ablation in grid.ablations(pairs) for where in POSITIONS]
    for i, (ablation, where) in enumerate(tqdm(ways, disable=not progress, desc="robustness", unit="way")):
        for metric, found in grid.measured(ablation, where).items():
            rows.append((ablation.baseline.kind, where, metric, *found, METRICS[metric], i == 0))
    return RobustnessGrid(pd.DataFrame(rows, columns=list(RobustnessGrid.columns)), len(grid.batch))


class _Grid:
    """A circuit and the prompts on which it is measured."""

    def __init__(self, model: HookedModel, circuit: Circuit, batch: TaskBatch, generator: torch.Generator):
        self.model, self.circuit, self.batch, self.generator = model, circuit, batch, generator
        self.groups, self.cut = groups_of(batch), circuit.cut_edges(model)
        self.empty = empty_circuit(model, circuit).kept
        with evaluating(model):
            self.reference = all_answer_logits(model, batch)
        self.own = prompt_scores(self.reference, self.reference, batch)

    def ablations(self, pairs: TaskBatch) -> Iterator[Ablation]:
        """Every baseline, the circuit's own first."""
        own = self.circuit.baseline
        zero = NodeValues({place: torch.zeros_like(values) for place, values in own.values.items()}, "zero")
        others: list[Baseline] = [zero, task_means(self.model, pairs), position_means(self.model, pairs)]
        yield from map(Ablation.full, [own, *others, Counterfactual()])
        yield Ablation.resample(self.batch, generator=self.generator)

    def measured(self, ablation: Ablation, where: str) -> dict[str, Interval]:
        """Every metric of the circuit, ablated in one way."""

        def within(model: AnyModel) -> AbstractContextManager[AnyModel]:
            return cutting(model, self.cut, self.circuit.baseline)

        kept = self.scores(ablation, self.circuit.kept, where, within)
        nothing = self.scores(ablation, self.empty, where)
        per_prompt = (kept.kl, kept.task_loss - self.own.task_loss, kept.correct - self.own.correct, kept.agrees)
        found = [mean_of(values, self.groups, self.generator) for values in per_prompt]
        return dict(zip(METRICS, [*found, self.restored(kept, nothing)], strict=True))

    def restored(self, kept: PromptScores, nothing: PromptScores) -> Interval:
        """Share of the mean logit difference between nothing and model that the circuit has."""
        runs = [run.logit_difference.double() for run in (kept, self.own, nothing)]
        if abs(runs[1].mean() - runs[2].mean()) < CONSTANT:
            return Interval(nan, nan, nan)

        def share(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
            circuit, model, empty = means.unbind(1)
            return (circuit - empty) / (model - empty)

        return of_means(torch.stack(runs, 1), share, self.groups, self.generator)

    def scores(self, ablation: Ablation, kept: Masks, where: str, within: Running | None = None) -> PromptScores:
        """Scores of a run in which nodes outside `kept` are held at some positions."""
        given = {} if within is None else {"within": within}
        if where == "all":
            logits = ablation.answer_logits(self.model, kept, self.batch, **given)[0]
            return prompt_scores(logits, self.reference, self.batch)
        found: AnswerLogits = torch.empty_like(self.reference)
        for length in self.batch.lengths.unique().tolist():
            rows = (self.batch.lengths == length).nonzero().flatten()
            at = held_at(kept, length, where)
            found[rows.to(found.device)] = ablation.answer_logits(self.model, at, self.batch.rows(rows), **given)[0]
        return prompt_scores(found, self.reference, self.batch)


def held_at(kept: Masks, length: int, where: str) -> Masks:
    """What prompts of a length keep if nothing is held but at the answer's position, or before it."""
    found = {}
    for place, mask in kept.items():
        n_rows = 1 if place.site == FINAL_READ.name else length  # the last read is made where the answer is
        here = torch.zeros(n_rows, dtype=torch.bool)
        here[-1] = True
        held = here if where == "answer" else ~here
        found[place] = mask.expand(n_rows, -1) | ~held[:, None]
    return found
