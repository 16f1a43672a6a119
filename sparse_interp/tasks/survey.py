"""Which behaviours a model has: every task's prompts, put to one model.

    for each task and split:  answer loss, accuracy, logit difference     mean over prompts, both sides of every pair
                              each with its bootstrap interval            templates are resampled, not prompts

Look here before looking for circuits: there is no circuit for what a model does not do. A task that the model's
tokenizer cannot write, or whose prompts do not fit its context, has a row that says so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from sparse_interp.errors import TaskError, TokenizerError
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Axes, Table, bars_with_intervals, bootstrap_interval
from sparse_interp.tasks.library import load_task, task_names, template_file
from sparse_interp.tasks.pairs import SPLITS
from sparse_interp.tasks.task import (
    Metric,
    Task,
    TaskBatch,
    answer_loss,
    is_argmax,
    is_correct,
    logit_difference,
)

MEASURES: dict[str, Metric] = {"loss_nats": answer_loss, "accuracy": is_correct, "logit_diff": logit_difference}
"""Column -> what it is the mean of; `accuracy` counts an answer whose logit is above its foil's (chance 0.5)."""

PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class TaskScores(Table):
    """One row per task and split; a `_low` and a `_high` column beside each measure, chance is 0.5 and ln 2 nats.

    `argmax_frac` is the share of prompts whose answer has the largest logit of all, `whole_frac` the share whose answer
    and foil are single tokens (the others are told apart by the first token in which they differ), `bigram_frac` the
    share whose last token already differs from the twin's, so that a bigram table can tell them apart, `n_templates`
    how many forms the prompts have. `note` says why a task could not be measured.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "task",
        "split",
        "n_prompts",
        "n_templates",
        "whole_frac",
        "bigram_frac",
        *(f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")),
        "argmax_frac",
        "note",
    )

    def __str__(self) -> str:
        shown = self.frame[["task", "split", "n_prompts", "n_templates", "whole_frac", "bigram_frac"]].round(2)
        for measure in MEASURES:
            bounds = self.frame[[measure, f"{measure}_low", f"{measure}_high"]].itertuples(index=False)
            shown[measure] = ["" if pd.isna(row[0]) else "{:.3g} [{:.3g}, {:.3g}]".format(*row) for row in bounds]
        return shown.assign(note=self.frame.note).to_string(index=False, na_rep="")

    def solved(self, accuracy: float = 0.9, split: str = "test") -> list[str]:
        """The tasks of which the model gets at least this share right on `split`."""
        rows = self.frame[self.frame.split == split]
        return rows.task[rows.accuracy >= accuracy].tolist()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy per task and split with its interval; the dashed line is chance."""
        shown = self.frame[self.frame.n_prompts > 0].assign(label=lambda rows: rows.task + ", " + rows.split)
        bounds = {"low": "accuracy_low", "high": "accuracy_high"}
        return bars_with_intervals(shown, label="label", value="accuracy", by="split", reference=0.5, ax=ax, **bounds)


def score_tasks(
    model: nn.Module,
    tasks: Iterable[str | Task] | None = None,
    *,
    splits: Sequence[str] = SPLITS,
    n_prompts: int = 128,
    generator: torch.Generator,
    progress: bool = False,
) -> TaskScores:
    """Put `n_prompts` prompts per task and split to `model`: one of ours, or any TransformerLens model.

    `tasks` are names or tasks of your own; all bundled ones unless told otherwise. What is measured are the prompts of
    `n_prompts` / 2 pairs, both sides.

    Raises:
        TokenizerError: if a task is named, and the model has no tokenizer to write it with.
        TaskError: for an unknown name, an unknown split, or fewer than 2 prompts.
    """
    if n_prompts < 2 or not set(splits) <= set(SPLITS):
        raise TaskError(f"n_prompts={n_prompts}, splits={splits}; expected at least 2 prompts of {', '.join(SPLITS)}.")
    chosen = task_names() if tasks is None else list(tasks)
    for entry in chosen:
        if isinstance(entry, str):
            template_file(entry)  # an unknown name is refused before any work
    if getattr(model, "tokenizer", None) is None and any(isinstance(entry, str) for entry in chosen):
        raise TokenizerError("This model has no tokenizer, and prompts cannot be written without; give it its own.")
    rows = []
    with tqdm(total=len(chosen), disable=not progress, desc="tasks", unit="task") as bar:
        for entry in chosen:
            rows += _rows(model, entry, splits, n_prompts, generator)
            bar.update()
    return TaskScores(pd.DataFrame(rows, columns=list(TaskScores.columns)))


def _rows(
    model: Any, entry: str | Task, splits: Sequence[str], n_prompts: int, generator: torch.Generator
) -> list[dict[str, Any]]:
    """One task's rows; what cannot be measured has a row with the reason."""
    name = entry if isinstance(entry, str) else entry.name
    try:
        task = load_task(entry, model.tokenizer) if isinstance(entry, str) else entry
    except TaskError as error:
        return [_unmeasured(name, split, error) for split in splits]
    rows = []
    for split in splits:
        if split not in task.splits:
            continue
        try:
            task.check_fits(model.cfg.n_ctx, [split])
            rows.append(_row(model, task, split, n_prompts, generator))
        except TaskError as error:
            rows.append(_unmeasured(name, split, error))
    return rows


def _unmeasured(name: str, split: str, error: TaskError) -> dict[str, Any]:
    return {"task": name, "split": split, "n_prompts": 0, "n_templates": 0, "note": str(error)}


def _row(model: Any, task: Task, split: str, n_prompts: int, generator: torch.Generator) -> dict[str, Any]:
    n_listed = task.n_pairs(split)
    n_pairs = max(1, n_prompts // 2) if n_listed is None else min(max(1, n_prompts // 2), n_listed)
    rows = task.encoded(n_pairs, split, generator=generator)
    pairs = task.collated(rows)
    sides = [pairs, pairs.swapped()]
    logits = [answer_logits(model, side) for side in sides]
    templates = [number for side in sides for number in side.template.tolist()]
    row: dict[str, Any] = {
        "task": task.name,
        "split": split,
        "n_prompts": len(templates),
        "n_templates": len(set(templates)),
        "whole_frac": sum(pair.is_whole for pair in rows) / len(rows),
        "bigram_frac": sum(pair.clean[-1] != pair.corrupt[-1] for pair in rows) / len(rows),
        "argmax_frac": torch.cat([is_argmax(*both) for both in zip(logits, sides, strict=True)]).mean().item(),
        "note": "",
    }
    groups = templates if row["n_templates"] > 1 else None
    for measure, metric in MEASURES.items():
        values = torch.cat([metric(*both) for both in zip(logits, sides, strict=True)])
        interval = bootstrap_interval(values, groups, generator=generator)
        row |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
    if groups is None:
        row["note"] = "all prompts are of one template, so prompts were resampled"
    return row


def answer_logits(model: Any, batch: TaskBatch) -> Float[Tensor, "batch d_vocab"]:
    """The model's logits after each clean prompt; prompts of one length run together, so that nothing is padded."""
    found: dict[int, Float[Tensor, " d_vocab"]] = {}
    with torch.no_grad(), evaluating(model):
        for length in batch.lengths.unique().tolist():
            rows = torch.nonzero(batch.lengths == length).flatten()
            for part in rows.split(PROMPTS_AT_ONCE):
                logits = _last_logits(model, batch.clean[part, :length])
                found |= dict(zip(part.tolist(), logits.float().cpu(), strict=True))
    return torch.stack([found[row] for row in range(len(batch))])


def _last_logits(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the last position; one of our models unembeds nothing else."""
    tokens = tokens.to(next(model.parameters()).device)
    if not isinstance(model, HookedSparseTransformer):
        return model(tokens)[:, -1]
    resid = model(tokens, stop_at_layer=model.cfg.n_layers)
    return model(resid[:, -1:], tokens=tokens[:, -1:], start_at_layer=model.cfg.n_layers)[:, -1]
