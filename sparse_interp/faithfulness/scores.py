"""Scores: what a circuit does, prompt by prompt, beside the model that it belongs to.

    sufficiency    the circuit alone, everything outside it ablated: at its baseline, unless told otherwise
    necessity      the model without the circuit, its nodes at their baseline
    agreement      KL(model || circuit) over the vocabulary, equal argmax, correlation of logit differences
    loss gap       task loss of circuit - task loss of model, prompt by prompt        (below 0: better than its model)
    faithfulness   (m(circuit) - m(nothing)) / (m(model) - m(nothing)),   m = mean logit difference of answer and foil

Every number is of one prompt at its answer position, and every pair is asked from both sides, so that a constant
preference for one answer is worth exactly chance. Whoever averages draws whole templates for the interval (results.py
says why); tasks with a single template draw pairs. Normalised faithfulness: Wang et al. 2022 (arXiv:2211.00593) and
Marks et al. 2024 (arXiv:2403.19647), whose empty circuit is `nothing`: every node that a search could take out is out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from math import nan

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.axes import PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.controls import empty_circuit
from sparse_interp.interventions.ablation import Ablation, Masks
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.interventions.edges import cutting
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.text import evaluating
from sparse_interp.results import Interval, bootstrap_interval
from sparse_interp.tasks.task import TaskBatch, answer_loss, is_argmax, is_correct, kl_divergence, logit_difference

CONSTANT = 1e-4
"""Standard deviation of logit differences, in logits, below which they count as one number that nothing follows."""


@dataclass(frozen=True)
class PromptScores:
    """One number per prompt for each thing measured, of one run: the model, or the model under hooks."""

    task_loss: PerPrompt
    """Cross-entropy of the choice between answer and foil, nats."""

    correct: PerPrompt
    """1 where the answer has the larger logit of the two."""

    argmax: PerPrompt
    """1 where the answer has the largest logit of the whole vocabulary."""

    logit_difference: PerPrompt
    """logit[answer] - logit[foil]."""

    kl: PerPrompt
    """KL(model || this run) over the vocabulary, nats; 0 for the model itself."""

    agrees: PerPrompt
    """1 where this run and the model have the same argmax, right or wrong."""

    def frame(self) -> pd.DataFrame:
        """One row per prompt, one column per measurement."""
        return pd.DataFrame({field.name: getattr(self, field.name).tolist() for field in fields(self)})


@dataclass(frozen=True)
class CircuitScores:
    """The model, its circuit, what is left without the circuit, and nothing at all, on the same prompts."""

    batch: TaskBatch
    """The prompts: first one side of every pair, then the other."""

    reference: AnswerLogits
    """The model's own logits."""

    model: PromptScores
    """The model as it is."""

    circuit: PromptScores
    """The circuit alone: everything outside it ablated; means over the draws of a stochastic ablation."""

    removed: PromptScores
    """The model without the circuit: the circuit's nodes at their baseline."""

    nothing: PromptScores
    """The empty circuit: every node that a search could take out at its baseline."""

    ablation: str
    """How everything outside the circuit was ablated. `removed` and `nothing` are ablated to the same baseline, fully:
    part of what a behaviour needs may be enough for it."""

    @property
    def groups(self) -> list[int]:
        """What an interval draws."""
        return groups_of(self.batch)

    def interval(self, values: PerPrompt, generator: torch.Generator) -> Interval:
        """Mean of one number per prompt, with its interval."""
        return mean_of(values, self.groups, generator)

    def loss_gap(self, generator: torch.Generator) -> Interval:
        """Task loss of the circuit less that of the model, nats; an interval below 0 means better than its model."""
        return self.interval(self.circuit.task_loss - self.model.task_loss, generator)

    def accuracy_gap(self, generator: torch.Generator) -> Interval:
        """Accuracy of the circuit less that of the model."""
        return self.interval(self.circuit.correct - self.model.correct, generator)

    def correlation(self, generator: torch.Generator) -> Interval:
        """Pearson correlation, across prompts, of the logit differences of circuit and model.

        Not a number where one of the two is constant. Logit differences are signed towards the answer, so agreement
        on which answer is right adds nothing to it; what counts is that both are surer of the same prompts.
        """
        both = torch.stack([self.circuit.logit_difference, self.model.logit_difference], 1).double()
        if bool((both.std(0, correction=0) < CONSTANT).any()):
            return Interval(nan, nan, nan)
        x, y = (both - both.mean(0)).unbind(1)
        return of_means(torch.stack([x, y, x * x, y * y, x * y], 1), pearson, self.groups, generator)

    def faithfulness(self, generator: torch.Generator) -> Interval:
        """Share of the model's mean logit difference, over that of nothing, that the circuit restores; 1 is all of it.

        Not a number where the model prefers the answer no more than nothing does.
        """
        runs = (self.circuit, self.model, self.nothing)
        columns = torch.stack([run.logit_difference for run in runs], 1).double()
        if abs(columns[:, 1].mean() - columns[:, 2].mean()) < CONSTANT:
            return Interval(nan, nan, nan)

        def share(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
            circuit, model, nothing = means.unbind(1)
            return (circuit - nothing) / (model - nothing)

        return of_means(columns, share, self.groups, generator)


def score_circuit(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    ablation: Ablation | None = None,
    *,
    generator: torch.Generator | None = None,
) -> CircuitScores:
    """Run model, circuit, model without circuit, and nothing, on both sides of `pairs`.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit.
        pairs: prompts with their twins.
        ablation: what everything outside the circuit is ablated to, and how much of it is left; None holds it at the
            circuit's own baseline. Edges that the circuit lacks carry its own baseline in any case.
        generator: draws shares, where the ablation has any.

    Raises:
        CircuitError: if the circuit belongs to other weights, or the ablation needs a generator and has none.
    """
    circuit.check_model(model)
    model, batch = hooked(model), pairs.both_sides()
    ablation = Ablation.full(circuit.baseline) if ablation is None else ablation
    full = Ablation.full(ablation.baseline)
    with evaluating(model):
        reference = all_answer_logits(model, batch)
    cut = circuit.cut_edges(model)

    def within(model: AnyModel) -> AbstractContextManager[AnyModel]:
        return cutting(model, cut, circuit.baseline)

    drawn = ablation.answer_logits(model, circuit.kept, batch, generator=generator, within=within)
    return CircuitScores(
        batch,
        reference,
        model=prompt_scores(reference, reference, batch),
        circuit=_averaged([prompt_scores(logits, reference, batch) for logits in drawn]),
        removed=_without(circuit, full, model, batch, reference),
        nothing=_under(full, model, empty_circuit(model, circuit).kept, batch, reference),
        ablation=ablation.name,
    )


def score_control(model: AnyModel, control: Circuit, batch: TaskBatch, reference: AnswerLogits) -> PromptScores:
    """Scores of a circuit that was made from `model` a moment ago, whose weights need no second look."""
    return _under(Ablation.full(control.baseline), hooked(model), control.kept, batch, reference)


def _without(
    circuit: Circuit, ablation: Ablation, model: HookedModel, batch: TaskBatch, reference: AnswerLogits
) -> PromptScores:
    """The model without the circuit: without its edges, if these were chosen, else without its nodes."""
    if circuit.edges_pruned:
        with evaluating(model), circuit.removed(model):
            return prompt_scores(all_answer_logits(model, batch), reference, batch)
    outside = {place: ~mask for place, mask in circuit.inside.items()}
    return _under(ablation, model, outside, batch, reference)


def _under(
    ablation: Ablation, model: HookedModel, kept: Masks, batch: TaskBatch, reference: AnswerLogits
) -> PromptScores:
    return prompt_scores(ablation.answer_logits(model, kept, batch)[0], reference, batch)


def _averaged(draws: list[PromptScores]) -> PromptScores:
    """Prompt by prompt the means over several runs."""
    names = [field.name for field in fields(PromptScores)]
    return PromptScores(**{name: torch.stack([getattr(draw, name) for draw in draws]).mean(0) for name in names})


def prompt_scores(logits: AnswerLogits, reference: AnswerLogits, batch: TaskBatch) -> PromptScores:
    """Every score of logits at the answer position, beside the model's own logits `reference`; on the CPU."""
    return PromptScores(
        task_loss=answer_loss(logits, batch).cpu(),
        correct=is_correct(logits, batch).cpu(),
        argmax=is_argmax(logits, batch).cpu(),
        logit_difference=logit_difference(logits, batch).cpu(),
        kl=kl_divergence(reference.double(), logits.double(), batch).float().cpu(),  # float32 sums may end below 0
        agrees=(logits.argmax(-1) == reference.argmax(-1)).float().cpu(),
    )


def some_pairs(pairs: TaskBatch, n: int, *, generator: torch.Generator) -> TaskBatch:
    """At most `n` of the pairs, drawn at random and as evenly from the templates as these allow."""
    drawn = torch.randperm(len(pairs), generator=generator, device=generator.device).cpu()
    templates = pd.Series(pairs.template[drawn.to(pairs.template.device)].tolist())
    turn = torch.tensor(templates.groupby(templates).cumcount().to_numpy())
    return pairs.rows(drawn[turn.argsort(stable=True)[:n]].sort().values.to(pairs.clean.device))


def groups_of(batch: TaskBatch) -> list[int]:
    """What an interval draws: the template of each prompt of both sides, or its pair where there is one template."""
    templates = batch.template.tolist()
    return templates if len(set(templates)) > 1 else 2 * list(range(len(batch) // 2))


def mean_of(values: PerPrompt, groups: list[int], generator: torch.Generator) -> Interval:
    """Mean with its bootstrap interval; of a single group there is a mean and no interval."""
    if len(set(groups)) < 2:
        return Interval(values.double().mean().item(), nan, nan)
    return bootstrap_interval(values, groups, generator=generator)


def pearson(means: Float[Tensor, "draw 5"]) -> Float[Tensor, " draw"]:
    """Correlation of x and y from the means of x, y, x x, y y and x y."""
    x, y, xx, yy, xy = means.unbind(1)
    return (xy - x * y) / ((xx - x * x) * (yy - y * y)).sqrt()


def of_means(
    columns: Float[Tensor, "prompt column"],
    statistic: Callable[[Float[Tensor, "draw column"]], Float[Tensor, " draw"]],
    groups: list[int],
    generator: torch.Generator,
    n: int = 1000,
) -> Interval:
    """A function of the means of several columns, with its 95 % interval over resampled groups."""
    value = statistic(columns.mean(0, keepdim=True)).item()
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        return Interval(value, nan, nan)
    codes = torch.tensor([names[group] for group in groups])
    totals = torch.zeros(len(names), columns.shape[1], dtype=columns.dtype).index_add(0, codes, columns)
    sizes = torch.bincount(codes).to(columns)
    drawn = torch.randint(len(names), (n, len(names)), generator=generator, device=generator.device).cpu()
    draws = statistic(totals[drawn].sum(1) / sizes[drawn].sum(1, keepdim=True))
    draws = draws[draws.isfinite()]  # a draw of templates that are all alike may leave nothing to divide by
    if not len(draws):
        return Interval(value, nan, nan)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(value, low, high)
