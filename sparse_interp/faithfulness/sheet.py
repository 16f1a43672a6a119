"""The rows of an audit in the making: what was measured on one split, with the method that it was measured by.

model              as it is
circuit            kept, and everything outside it ablated
circuit removed    ablated, and everything outside it kept
all at baseline    nothing kept
random circuits    kept, as many nodes in every place as the circuit has
"""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.audit_table import DECIDING, RANDOM, not_run
from sparse_interp.faithfulness.controls import overlap
from sparse_interp.faithfulness.scores import CircuitScores, PromptScores, mean_of, score_circuit, score_control
from sparse_interp.faithfulness.scrubbing import Hypothesis
from sparse_interp.faithfulness.thresholds import AGREEMENT, GAP, Judged, Thresholds
from sparse_interp.model.dense import HookedModel
from sparse_interp.results import Interval
from sparse_interp.tasks.task import TaskBatch

KL = "KL(model || circuit)"
"""Measure of divergence; the condition says which run stands in for the circuit."""

ANSWER_OR_FOIL = "answer against foil"
ABOVE_FOIL = "answer above foil (a tie is wrong)"
VOCABULARY = "vocabulary at the answer position"

SUFFICIENCY, NECESSITY = "sufficiency", "necessity"

KEPT = "all but the circuit ablated"

DIRECTIONS = {
    "model": "none",
    "circuit removed": "circuit ablated",
    "circuit removed - model": "circuit ablated",
    "all at baseline": "everything ablated",
    RANDOM: "all but the control ablated",
}
"""What is ablated in each condition; in all others it is `KEPT`."""


class Sheet:
    """The rows of one split.

    Args:
        model: the model.
        circuit: the circuit.
        split: what the prompts are of.
        pairs: the prompts, both sides of which are used.
        thresholds: the bounds.
        generator: draws intervals, and whatever tests draw.
        hypothesis: what nodes are said to mean, if anything.
    """

    def __init__(
        self,
        model: HookedModel,
        circuit: Circuit,
        split: str,
        pairs: TaskBatch,
        thresholds: Thresholds,
        generator: torch.Generator,
        hypothesis: Hypothesis | None = None,
    ):
        self.model, self.circuit, self.split, self.pairs = model, circuit, split, pairs
        self.bounds, self.generator, self.hypothesis = thresholds, generator, hypothesis
        self.scores: CircuitScores = score_circuit(model, circuit, pairs)
        self.rows: list[dict[str, Any]] = []
        self.details: dict[str, pd.DataFrame] = {}

    def add(
        self,
        about: str,
        measure: str,
        condition: str,
        found: Interval,
        unit: str,
        metric: str,
        judged: Judged | None = None,
        *,
        scheme: str = "full",
        baseline: str | None = None,
        direction: str | None = None,
        on: tuple[int, int | None] | None = None,
        note: str = "",
    ) -> None:
        """One row; a number that does not exist says so.

        `on` is how many prompts were measured, and how many templates (or pairs) they came from; None is all of the
        split's. What is ablated, and to what, is as the condition says unless told otherwise.
        """
        said = (f"{judged.note}; {note}" if note else judged.note) if judged else note
        if not said and isnan(found.mean):
            said = "not defined: one side does not vary over these prompts"
        elif not said and isnan(found.low):
            said = "no interval: there is one group to draw from"
        untouched = condition == "model"
        held = "none" if untouched else self.circuit.baseline.kind if baseline is None else baseline
        n_prompts, n_templates = (len(self.scores.batch), len(set(self.scores.groups))) if on is None else on
        self.rows.append(
            {
                "about": about,
                "measure": measure,
                "condition": condition,
                "split": self.split,
                "value": found.mean,
                "low": found.low,
                "high": found.high,
                "unit": unit,
                "n_prompts": n_prompts,
                "n_templates": n_templates,
                "baseline": held,
                "scheme": "none" if untouched else scheme,
                "metric": metric,
                "positions": "all" if self.circuit.n_pos is None else "of its own",
                "direction": DIRECTIONS.get(condition, KEPT) if direction is None else direction,
                "decides": judged is not None and judged.decides and self.split == DECIDING,
                "passed": judged.passed if judged else None,
                "note": said,
            }
        )

    def interval(self, values: torch.Tensor) -> Interval:
        """Mean and interval of one number per prompt."""
        return self.scores.interval(values, self.generator)

    # -- the circuit beside its model ---------------------------------------------------------------------------------

    def add_circuit(self) -> None:
        """Sufficiency, agreement, necessity."""
        scores = self.scores
        runs = {
            "model": scores.model,
            "circuit": scores.circuit,
            "circuit removed": scores.removed,
            "all at baseline": scores.nothing,
        }
        self.add_losses(runs)
        self.add_accuracies(runs)
        for name, run in runs.items():
            self.add(of(name), "answer is the argmax", name, self.interval(run.argmax), "share", VOCABULARY)
        for name, run in runs.items():
            found = self.interval(run.logit_difference)
            self.add(of(name), "logit difference", name, found, "logits", ANSWER_OR_FOIL)
        restored = scores.faithfulness(self.generator)
        metric = "mean logit difference between nothing and model"
        self.add(SUFFICIENCY, "faithfulness", "circuit", restored, "share", metric)
        self.add_agreement(runs)

    def add_losses(self, runs: Mapping[str, PromptScores]) -> None:
        """The task loss of every run, beside the model's own."""
        found = {name: self.interval(run.task_loss) for name, run in runs.items()}
        for name, loss in found.items():
            self.add(of(name), "task loss", name, loss, "nats", ANSWER_OR_FOIL)
        gap = self.scores.loss_gap(self.generator)
        judged = self.bounds.loss(gap, found["circuit"].mean, found["model"].mean)
        self.add(AGREEMENT, "task loss gap", "circuit - model", gap, "nats", ANSWER_OR_FOIL, judged)
        lost = self.interval(self.scores.removed.task_loss - self.scores.model.task_loss)
        judged = self.bounds.removed_loss(lost)
        self.add(NECESSITY, "task loss gap", "circuit removed - model", lost, "nats", ANSWER_OR_FOIL, judged)

    def add_accuracies(self, runs: Mapping[str, PromptScores]) -> None:
        """How often every run is right."""
        found = {name: self.interval(run.correct) for name, run in runs.items()}
        for name, accuracy in found.items():
            judged = self.bounds.removed_accuracy(accuracy) if name == "circuit removed" else None
            self.add(of(name), "accuracy", name, accuracy, "share", ABOVE_FOIL, judged)
        gap = self.scores.accuracy_gap(self.generator)
        judged = self.bounds.accuracy(gap, found["circuit"].mean, found["model"].mean)
        self.add(SUFFICIENCY, "accuracy gap", "circuit - model", gap, "share", ABOVE_FOIL, judged)

    def add_agreement(self, runs: Mapping[str, PromptScores]) -> None:
        """How far each run is from the model's own answers.

        The circuit has to keep the bound on the divergence. The argmax informs only: where two tokens are nearly
        equally likely, the smallest divergence exchanges them.
        """
        for name in list(runs)[1:]:
            kl, same = self.interval(runs[name].kl), self.interval(runs[name].agrees)
            mine = name == "circuit"
            about = AGREEMENT if mine else of(name)
            self.add(about, KL, name, kl, "nats", VOCABULARY, self.bounds.kl(kl) if mine else None)
            self.add(about, "argmax agreement with model", name, same, "share", VOCABULARY)
        found = self.scores.correlation(self.generator)
        self.add(AGREEMENT, "correlation of logit differences", "circuit", found, "Pearson r", "across prompts")

    # -- random circuits ----------------------------------------------------------------------------------------------

    def add_random(self, drawn: Sequence[Circuit], n_wanted: int, bar: tqdm) -> None:
        """Random circuits of equal size."""
        if not drawn:
            self.rows.append(self._no_random(n_wanted))
            return
        scores, records, correct = self.scores, [], []
        for number, control in enumerate(drawn):
            run = score_control(self.model, control, scores.batch, scores.reference)
            correct.append(run.correct)
            records.append(
                {
                    "split": self.split,
                    "draw": number,
                    "accuracy": run.correct.mean().item(),
                    "task_loss_nats": run.task_loss.mean().item(),
                    "kl_nats": run.kl.mean().item(),
                    "overlap_frac": overlap(control, self.circuit),
                }
            )
            bar.update()
        over = {
            name: mean_of(torch.tensor([record[name] for record in records]), list(range(len(records))), self.generator)
            for name in ("accuracy", "task_loss_nats", "kl_nats")
        }
        judged = self.bounds.random_accuracy(over["accuracy"], max(record["accuracy"] for record in records))
        gap = self.interval(scores.circuit.correct - torch.stack(correct).mean(0))
        other = self.bounds.control_gap(gap)
        self.add(GAP, "accuracy gap", f"circuit - {RANDOM}", gap, "share", ABOVE_FOIL, other)
        self.add(GAP, "accuracy", RANDOM, over["accuracy"], "share", f"{ABOVE_FOIL}; interval over draws", judged)
        loss, kl = over["task_loss_nats"], over["kl_nats"]
        self.add(GAP, "task loss", RANDOM, loss, "nats", f"{ANSWER_OR_FOIL}; interval over draws")
        self.add(GAP, KL, RANDOM, kl, "nats", f"{VOCABULARY}; interval over draws")
        self.details[RANDOM] = pd.DataFrame(records)

    def _no_random(self, n_wanted: int) -> dict[str, Any]:
        """Why there are no random circuits: none were asked for, or none could differ."""
        if n_wanted:
            why = "every place is kept whole or not at all, so that no other circuit has this size"
        else:
            why = "n_random=0"
        missed = not n_wanted and self.split == DECIDING
        return not_run(GAP, "accuracy", RANDOM, self.split, why, decides=missed)


def of(condition: str) -> str:
    """What the runs of a condition are about."""
    return NECESSITY if condition in ("circuit removed", "all at baseline") else SUFFICIENCY
