"""Partial ablation: a circuit that is all a behaviour needs does not care how much of everything else is left.

    x_node  <-  b + r (x_node - b)      for every node outside the circuit, r in [0, 1] the same for all prompts

    full           r = 0: as the circuit was found
    stochastic     r drawn from U[0, 1] for each node, several times                               -> what to expect
    adversarial    r by projected ascent, once on KL(model || circuit) and once on the task loss   -> the worst case

To hold everything outside at its baseline at once lets errors cancel, and a search finds the sets that do. A circuit of
that kind comes apart as soon as some of the outside is left (after the stochastic masks of Bushnaq et al. 2025,
arXiv:2506.20790; projected ascent: Madry et al. 2018, arXiv:1706.06083). An adversary has one scheme for all prompts,
so that it cannot make use of noise; it starts from the worst of the very draws that are reported, the full ablation,
and everything left up to the reads of one layer; it keeps its best iterate; the worst case is the worst of all that was
tried, so that it is never milder than any of them. x is the intervened run's own value.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch

from sparse_interp.axes import PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.scores import PromptScores, groups_of, mean_of, prompt_scores
from sparse_interp.interventions.ablation import Ablation
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.interventions.edges import cutting
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, answer_loss


class Outcome(NamedTuple):
    """What a circuit does under one kind of ablation: means over prompts, intervals over templates."""

    kl: Interval
    """KL(model || circuit) over the vocabulary at the answer position, nats."""

    task_loss: Interval
    """Cross-entropy of the choice between answer and foil, nats."""

    loss_gap: Interval
    """The same less the model's own, nats."""

    accuracy: Interval
    """Share of prompts where the answer is above the foil."""

    agreement: Interval
    """Share of prompts where circuit and model have the same argmax."""


@dataclass(frozen=True, eq=False)
class PartialTable(Table):
    """One row per scheme: the full ablation, every draw, each adversary.

    `scheme`, `draw` (its number, of draws alone), `raises` (what an adversary raises: KL or task loss), means over
    prompts `kl_nats`, `task_loss_nats`, `accuracy`, `agreement`, `n_prompts`, and `ablation`: scheme and baseline in
    words.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "scheme",
        "draw",
        "raises",
        "kl_nats",
        "task_loss_nats",
        "accuracy",
        "agreement",
        "n_prompts",
        "ablation",
    )

    full: Outcome
    """With nothing outside left."""

    expected: Outcome
    """Where a random share of everything outside is left: means over the draws."""

    worst: Outcome
    """Of all schemes that were tried, `kl` and `agreement` under the one with the largest KL, and `task_loss`,
    `loss_gap` and `accuracy` under the one with the largest task loss."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """KL(model || circuit) with nothing left, with random shares left, and at the worst."""
        rows = [(name, *getattr(self, name).kl) for name in ("full", "expected", "worst")]
        frame = pd.DataFrame(rows, columns=["ablation", "kl_nats", "low", "high"])
        return bars_with_intervals(frame, label="ablation", value="kl_nats", low="low", high="high", ax=ax)


def partial_ablation(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    n_draws: int = 8,
    n_steps: int = 20,
    step_size: float = 0.1,
    generator: torch.Generator,
) -> PartialTable:
    """Run `circuit` with part of everything outside it left: none, random shares, and the shares that do most harm.

    Edges that a pruned circuit lacks are cut throughout.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit.
        pairs: prompts with their twins; both sides are used, all of them in every step of an adversary (`some_pairs`
            takes a few of each template).
        n_draws: random schemes, from the worst of which an adversary starts.
        n_steps: its steps, of `step_size` each; n_steps * step_size should be 1 or more to reach every scheme.
        step_size: how far a step moves a share.
        generator: draws shares and intervals.

    Raises:
        CircuitError: if the circuit belongs to other weights.
        ConfigError: for fewer than one draw or step.
    """
    if n_draws < 1 or n_steps < 1:
        raise ConfigError(f"n_draws={n_draws}, n_steps={n_steps}: partial ablation needs at least one of each.")
    circuit.check_model(model)
    model, batch = hooked(model), pairs.both_sides()
    with evaluating(model):
        reference = all_answer_logits(model, batch)
    cut, state = circuit.cut_edges(model), generator.get_state()

    def within(model: AnyModel) -> AbstractContextManager[AnyModel]:
        return cutting(model, cut, circuit.baseline)

    tried: list[tuple[dict, PromptScores]] = []
    for raises, ablation in _ablations(circuit.baseline, n_draws, n_steps, step_size):
        generator.set_state(state)  # adversaries start from the draws that the table has
        drawn = ablation.answer_logits(model, circuit.kept, batch, generator=generator, within=within)
        for draw, logits in enumerate(drawn):
            named = {"scheme": ablation.scheme, "draw": draw if ablation.scheme == "stochastic" else None}
            named |= {"raises": raises, "ablation": ablation.name}
            tried.append((named, prompt_scores(logits, reference, batch)))
    own = prompt_scores(reference, reference, batch).task_loss
    return _table(tried, own, groups_of(batch), generator)


def _ablations(baseline: NodeValues, n_draws: int, n_steps: int, step_size: float) -> list[tuple[str, Ablation]]:
    """Every ablation, beside what it raises."""
    steps = {"n_draws": n_draws, "n_steps": n_steps, "step_size": step_size}
    return [
        ("", Ablation.full(baseline)),
        ("", Ablation.stochastic(baseline, n_draws=n_draws)),
        ("KL", Ablation.adversarial(baseline, **steps)),
        ("task loss", Ablation.adversarial(baseline, **steps, loss=_task_loss)),
    ]


def _task_loss(reference: AnswerLogits, logits: AnswerLogits, batch: TaskBatch) -> PerPrompt:
    return answer_loss(logits, batch)


def _table(
    tried: list[tuple[dict, PromptScores]], own: PerPrompt, groups: list[int], generator: torch.Generator
) -> PartialTable:
    """Rows and outcomes; `own` is the model's own task loss."""
    frame = pd.DataFrame([{**named, **_means(run)} for named, run in tried], columns=list(PartialTable.columns))
    runs = [run for _, run in tried]
    drawn = [run for named, run in tried if named["scheme"] == "stochastic"]

    def outcome(of_kl: list[PromptScores], of_loss: list[PromptScores]) -> Outcome:
        def mean(runs: list[PromptScores], name: str, less: PerPrompt | float = 0.0) -> Interval:
            values = torch.stack([getattr(run, name) for run in runs]).mean(0)
            return mean_of(values - less, groups, generator)

        losses = mean(of_loss, "task_loss"), mean(of_loss, "task_loss", own), mean(of_loss, "correct")
        return Outcome(mean(of_kl, "kl"), *losses, mean(of_kl, "agrees"))

    worst = [max(runs, key=lambda run: float(getattr(run, name).mean())) for name in ("kl", "task_loss")]
    return PartialTable(
        frame.astype({"draw": "Int64"}),
        full=outcome(runs[:1], runs[:1]),
        expected=outcome(drawn, drawn),
        worst=outcome(worst[:1], worst[1:]),
    )


def _means(run: PromptScores) -> dict[str, float | int]:
    return {
        "kl_nats": run.kl.mean().item(),
        "task_loss_nats": run.task_loss.mean().item(),
        "accuracy": run.correct.mean().item(),
        "agreement": run.agrees.mean().item(),
        "n_prompts": len(run.kl),
    }
