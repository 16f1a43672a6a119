"""audit: what a circuit is worth, in one call, one table and one verdict.

    verdict  =  every row that decides keeps its bound          -> faithful on what was tested
                one of them does not                            -> fails: and why
                one of them was not run                         -> incomplete

Rows that decide are those of the test split: loss and accuracy beside the model's own, agreement with the model over
the whole vocabulary, necessity, and the gap to random circuits of equal size. The shifted split (other forms, other
words) and everything else inform, and a shifted row that misses its bound is named in the verdict. The train split,
on which the circuit was found, is never drawn.

A circuit that does *better* than its model is a wrong circuit: pruning for the task alone gave one with task loss 0.01
inside a model of task loss 1.13. So the losses are compared both ways (after Drori 2026, on Gao et al. 2025,
arXiv:2511.13653). Bounds stand in `Thresholds` and nowhere else.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.controls import has_room, overlap, random_circuits
from sparse_interp.faithfulness.scores import CircuitScores, PromptScores, mean_of, score_circuit, score_control
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals, write_whole
from sparse_interp.tasks.task import Task, TaskBatch
from sparse_interp.tokenizer import tokenizer_hash

FORMAT_VERSION = 1

LEVELS = ("quick",)
"""How much an audit does. `quick` prunes nothing anew."""

DECIDING, INFORMING = "test", "shifted"
"""The split that the verdict rests on, and the one that is measured beside it."""

NOT_RUN = "not run"

KL = "KL(model || circuit)"
"""Measure of divergence; the condition says which run stands in for the circuit."""

FAITHFUL, INCOMPLETE = "faithful on what was tested", "incomplete"


class Judged(NamedTuple):
    """Whether a row keeps its bound, and the sentence that says which bound, or how it was missed."""

    passed: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The bounds that a circuit has to keep: all of them, in this one place."""

    loss_gap_nats: float = 0.05
    """How far the circuit's task loss may be from the model's, either way."""

    better_share: float = 0.5
    """A good model has little loss to beat: its circuit may be better by at most this share of the model's loss, where
    that is less than `loss_gap_nats`. Better is a failure only if the whole interval of the gap is below 0."""

    better_floor_nats: float = 0.01
    """Being better by no more than this is never a failure, however small the model's loss."""

    accuracy_gap_frac: float = 0.01
    """How far the circuit's accuracy may be from the model's; above it, only if the whole interval is above 0."""

    max_kl_nats: float = 0.25
    """Largest mean KL(model || circuit) over the vocabulary at the answer position."""

    removed_accuracy_frac: float = 0.6
    """Largest accuracy of the model without the circuit (chance is 0.5); its loss has to rise beyond the interval."""

    random_accuracy_frac: float = 0.55
    """Largest mean accuracy of random circuits of equal size (chance is 0.5)."""

    def loss(self, gap: Interval, circuit: float, model: float) -> Judged:
        """Whether the circuit's task loss is the model's; `gap` is their difference, prompt by prompt."""
        may_be_better = min(self.loss_gap_nats, max(self.better_floor_nats, self.better_share * model))
        found = f"task loss {circuit:.3f} against the model's {model:.3f} nats, {_gap(gap)}"
        if not gap.mean <= self.loss_gap_nats:  # so written, what is not a number fails
            return Judged(False, f"worse than its model: {found}, bound {self.loss_gap_nats:g}")
        if gap.mean < -may_be_better and not gap.high >= 0:
            return Judged(False, f"better than its model: {found}, bound {-may_be_better:.3g}")
        return Judged(True, f"bound: {-may_be_better:.3g} (beyond the interval) to {self.loss_gap_nats:g}")

    def accuracy(self, gap: Interval, circuit: float, model: float) -> Judged:
        """Whether the circuit is right as often as the model."""
        bound = self.accuracy_gap_frac + 1e-9  # shares are counted in float32
        found = f"accuracy {circuit:.3f} against the model's {model:.3f}, {_gap(gap)}"
        if not gap.mean >= -bound:
            return Judged(False, f"less accurate than its model: {found}, bound {-self.accuracy_gap_frac:g}")
        if gap.mean > bound and not gap.low <= 0:
            return Judged(False, f"more accurate than its model: {found}, bound {self.accuracy_gap_frac:g}")
        return Judged(True, f"bound: {-self.accuracy_gap_frac:g} to {self.accuracy_gap_frac:g} (beyond the interval)")

    def kl(self, kl: Interval) -> Judged:
        """Whether the circuit's distribution over the vocabulary is the model's."""
        if kl.mean <= self.max_kl_nats:
            return Judged(True, f"bound: at most {self.max_kl_nats:g}")
        return Judged(False, f"disagrees with its model: KL {kl.mean:.3f} nats, bound {self.max_kl_nats:g}")

    def removed_accuracy(self, accuracy: Interval) -> Judged:
        """Whether the model without the circuit is down to chance."""
        if accuracy.mean <= self.removed_accuracy_frac:
            return Judged(True, f"bound: at most {self.removed_accuracy_frac:g}")
        return Judged(
            False,
            f"not needed: without the circuit the model's accuracy is still {accuracy.mean:.3f}, "
            f"bound {self.removed_accuracy_frac:g}",
        )

    def removed_loss(self, gap: Interval) -> Judged:
        """Whether removing the circuit costs the model anything."""
        if gap.mean > 0 and not gap.low <= 0:
            return Judged(True, "bound: above 0, beyond the interval")
        return Judged(False, f"not needed: without the circuit the model loses nothing on the task, {_gap(gap)}")

    def random_accuracy(self, accuracy: Interval, largest: float) -> Judged:
        """Whether random circuits of the same size are at chance."""
        if accuracy.mean <= self.random_accuracy_frac:
            return Judged(True, f"bound: at most {self.random_accuracy_frac:g}; the largest is {largest:.3f}")
        return Judged(
            False,
            f"any circuit of this size does the task: random ones reach accuracy {accuracy.mean:.3f}, "
            f"bound {self.random_accuracy_frac:g}",
        )

    def control_gap(self, gap: Interval) -> Judged:
        """Whether the circuit does more than random circuits do."""
        if gap.mean > 0 and not gap.low <= 0:
            return Judged(True, "bound: above 0, beyond the interval")
        return Judged(False, f"no better than random circuits of its size: accuracy {_gap(gap)}")


def _gap(gap: Interval) -> str:
    interval = f" [{gap.low:+.3f}, {gap.high:+.3f}]" if isfinite(gap.low) else ""
    return f"difference {gap.mean:+.3f}{interval}"


LATER = (
    ("worst case under partial ablation", "circuit", "stochastic and adversarial ablation of the outside"),
    ("agreement inside", "circuit", "activations and attention patterns of kept nodes"),
    ("interchange", "circuit", "kept nodes exchanged between prompts, and between circuit and model"),
    ("minimality", "circuit", "each node's knock-out against that of random extra nodes"),
    ("completeness", "circuit removed", "nodes whose effect grows once the circuit is gone"),
    ("pruning for nonsense", "nonsense twin of the task", "the same search on re-paired prompts"),
    ("pruning a random network", "re-initialised model", "the same search on untrained weights"),
    ("rival circuits", "other seeds", "the same search, started differently"),
)
"""(measure, condition, what it is) of every test that a quick audit leaves out. No row is missing without a word."""


@dataclass(frozen=True, eq=False)
class AuditTable(Table):
    """Everything that was measured of a circuit, beside its controls, and what that amounts to.

    One row per measurement: `measure`, `condition` (model, circuit, circuit removed, random circuits, all at baseline,
    or a difference of two), `split`, `value` with its 95 % interval `low` to `high`, `unit`, `n_prompts`, `n_templates`
    (what the interval drew), `ablation`, `metric`, `decides` (whether the verdict rests on it), `passed` (True, False,
    or None where there is no bound or nothing was run) and `note` (the bound, how it was missed, or why not run).
    """

    columns: ClassVar[tuple[str, ...]] = (
        "measure",
        "condition",
        "split",
        "value",
        "low",
        "high",
        "unit",
        "n_prompts",
        "n_templates",
        "ablation",
        "metric",
        "decides",
        "passed",
        "note",
    )

    thresholds: Thresholds = field(default_factory=Thresholds)
    """The bounds that `passed` refers to."""

    origin: Mapping[str, Any] = field(default_factory=dict)
    """Names and hashes of model, task and circuit, seed, level and versions."""

    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per random circuit and split: its accuracy, loss and KL, and the share of the circuit that it has too."""

    def failing(self, *, decides: bool) -> list[str]:
        """What missed its bound, in words, among the rows that decide or those that inform."""
        rows = self.frame[self.frame.decides == decides].itertuples()
        return [row.note for row in rows if row.passed is False]

    @property
    def missing(self) -> list[str]:
        """Rows that the verdict needs and that were not run, with the reason."""
        rows = self.frame[self.frame.decides].itertuples()
        return [f"{row.measure} ({row.condition}): {row.note}" for row in rows if row.passed is None]

    @property
    def passed(self) -> bool | None:
        """True for faithful, False for a failure, None for an audit that is incomplete."""
        return False if self.failing(decides=True) else None if self.missing else True

    @property
    def reasons(self) -> list[str]:
        """Why the circuit fails, or what is missing; empty for one that passed."""
        return self.failing(decides=True) or self.missing

    @property
    def verdict(self) -> str:
        """One sentence: faithful on what was tested, fails and why, or incomplete."""
        if self.passed is None:
            return INCOMPLETE
        if not self.passed:
            return f"fails: {'; '.join(self.reasons)}"
        beside = self.failing(decides=False)
        return f"{FAITHFUL}; not on the {INFORMING} split: {'; '.join(beside)}" if beside else FAITHFUL

    def is_of(self, circuit: Circuit) -> bool:
        """Whether this is the audit of `circuit`: of its nodes, in its model; a circuit found anew needs its own."""
        known = (self.origin.get("nodes_sha256"), self.origin.get("model_sha256"))
        return known == (_nodes_sha256(circuit), circuit.model_sha256)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy of every condition on both splits; the dashed line is chance."""
        rows = self.frame[(self.frame.measure == "accuracy") & self.frame.value.notna()]
        bars = rows.assign(label=rows.condition + ", " + rows.split).rename(columns={"value": "accuracy"})
        ax = bars_with_intervals(
            bars, label="label", value="accuracy", low="low", high="high", by="split", reference=0.5, ax=ax
        )
        ax.set_title(self.verdict.split(":")[0].split(";")[0])
        return ax

    def page_rows(self) -> list[dict[str, Any]]:
        """The rows as the fields of a circuit page's audit rows; numbers that do not exist are None."""
        return [
            {
                "measure": f"{row['measure']} ({row['unit']})" if row["unit"] else row["measure"],
                **{key: row[key] for key in ("condition", "value", "low", "high", "split", "passed", "note")},
                "n": row["n_prompts"],
            }
            for row in _plain(self.frame)
        ]

    def save(self, path: Path | str) -> Path:
        """Write the rows as CSV, or everything as JSON, by the ending of `path`."""
        return self.to_json(path) if Path(path).suffix == ".json" else super().save(path)

    def to_json(self, path: Path | str) -> Path:
        """Write scores, controls, bounds, verdict, hashes, seed and versions as one JSON file."""
        path = Path(path)
        content = {
            "format_version": FORMAT_VERSION,
            "verdict": self.verdict,
            "passed": self.passed,
            "reasons": self.reasons,
            "origin": dict(self.origin),
            "thresholds": asdict(self.thresholds),
            "rows": _plain(self.frame),
            "random_circuits": _plain(self.controls),
        }
        write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def from_json(cls, path: Path | str) -> "AuditTable":
        """Read what `to_json` wrote.

        Raises:
            CircuitError: if the file is no audit, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise CircuitError(f"{path} has audit format {found}, and this library reads {FORMAT_VERSION}.")
            frame, controls = _frame(content["rows"]), pd.DataFrame(content["random_circuits"])
            return cls(frame, Thresholds(**content["thresholds"]), content["origin"], controls)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CircuitError):
                raise
            raise CircuitError(
                f"{path} cannot be read as an audit ({type(error).__name__}: {error}); "
                "expected a file that AuditTable.to_json wrote. Run the audit again."
            ) from error


def audit(
    model: AnyModel,
    circuit: Circuit,
    task: Task,
    *,
    level: str = "quick",
    n_prompts: int = 512,
    n_random: int = 10,
    thresholds: Thresholds | None = None,
    allow_mismatch: bool = False,
    generator: torch.Generator,
    progress: bool = True,
) -> AuditTable:
    """Measure `circuit` beside `model`, on prompts that it was not found on, and say what it is worth.

    Args:
        model: the model that the circuit was found in, in any mode: ours, or a dense one of TransformerLens.
        circuit: the circuit.
        task: the task that it was found for; its splits `test` and `shifted` are drawn from, never `train`.
        level: "quick" prunes nothing anew.
        n_prompts: prompts per split, both sides of half as many pairs (fewer if a list of pairs has fewer).
        n_random: random circuits on the test split; a third of them also on the shifted split.
        thresholds: bounds; None takes the documented ones.
        allow_mismatch: audit a circuit of other weights or of another task all the same.
        generator: draws prompts, random circuits and resamples: the same state gives the same table.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if circuit, model and task do not belong together.
        ConfigError: for an unknown level, or counts that make no audit.
        TaskError: if the task's prompts are longer than the model's context.
    """
    if level not in LEVELS:
        raise ConfigError(f"level={level!r}; expected {' or '.join(map(repr, LEVELS))}.")
    if n_prompts < 2 or n_random < 0:
        raise ConfigError(f"n_prompts={n_prompts}, n_random={n_random}; an audit needs n_prompts >= 2, n_random >= 0.")
    model = hooked(model)
    circuit = _belonging(model, circuit, task, allow_mismatch)
    splits = [split for split in (DECIDING, INFORMING) if split in task.splits]
    task.check_fits(model.cfg.n_ctx, splits)
    origin = _origin(model, circuit, task, generator.initial_seed(), level)
    pairs = {split: task.batch(_n_pairs(task, split, n_prompts), split, generator=generator) for split in splits}
    drawn = random_circuits(model, circuit, n_random if has_room(circuit) else 0, generator=generator)
    rows, controls = [], []
    n_runs = sum(4 + len(_share(drawn, split)) for split in splits)
    with tqdm(total=n_runs, disable=not progress, desc="audit", unit="run") as bar:
        for split in (DECIDING, INFORMING):
            if split not in pairs:
                rows.append(_not_run("every measure", "circuit", split, f"the task has no {split} split"))
                continue
            sheet = _Sheet(model, circuit, split, pairs[split], thresholds or Thresholds(), generator)
            bar.update(4)
            sheet.add_circuit()
            controls += sheet.add_controls(_share(drawn, split), n_random, bar)
            rows += sheet.rows
    rows += [_not_run(measure, on, "", what, level) for measure, on, what in LATER]
    return AuditTable(_frame(rows), thresholds or Thresholds(), origin, pd.DataFrame(controls))


def _belonging(model: HookedModel, circuit: Circuit, task: Task, allow_mismatch: bool) -> Circuit:
    """The circuit, if it belongs to model and task; if told to allow it, the same nodes in this model."""
    if circuit.model_sha256 != weights_sha256(model):
        if not allow_mismatch:
            circuit.check_model(model)
        circuit = circuit.transplanted(model)
    known = {"templates": (circuit.task_sha256, lambda: task.templates_sha256)}
    known["tokenizer"] = (circuit.tokenizer_sha256, lambda: tokenizer_hash(task.tokenizer))
    for what, (expected, found) in known.items():
        if expected is not None and expected != found() and not allow_mismatch:
            raise CircuitError(
                f"this circuit was found for task {circuit.task_name!r} with {what} {expected[:12]}, and task "
                f"{task.name!r} has {what} {found()[:12]}. Audit it on the task that it was found for, or say "
                "allow_mismatch=True to measure it on this one all the same."
            )
    return circuit


def _n_pairs(task: Task, split: str, n_prompts: int) -> int:
    """Half of `n_prompts`, or all pairs there are, where they are listed and fewer."""
    n, n_listed = (n_prompts + 1) // 2, task.n_pairs(split)
    return n if n_listed is None else min(n, n_listed)


def _share(drawn: Sequence[Circuit], split: str) -> Sequence[Circuit]:
    """The random circuits that a split is measured with: all where they decide, else the first third."""
    return drawn if split == DECIDING else drawn[: max(1, len(drawn) // 3)]


class _Sheet:
    """The rows of one split, in the making."""

    def __init__(
        self,
        model: HookedModel,
        circuit: Circuit,
        split: str,
        pairs: TaskBatch,
        thresholds: Thresholds,
        generator: torch.Generator,
    ):
        self.model, self.circuit, self.split = model, circuit, split
        self.thresholds, self.generator = thresholds, generator
        self.scores: CircuitScores = score_circuit(model, circuit, pairs)
        self.rows: list[dict[str, Any]] = []

    def add(self, measure: str, condition: str, found: Interval, unit: str, metric: str, judged: Judged | None = None):
        """One row; a number that does not exist says so."""
        note = judged.note if judged else ""
        if not note and isnan(found.mean):
            note = "not defined: one side does not vary over these prompts"
        elif not note and isnan(found.low):
            note = "no interval: there is one group to draw from"
        held = self.circuit.baseline.kind
        self.rows.append(
            {
                "measure": measure,
                "condition": condition,
                "split": self.split,
                "value": found.mean,
                "low": found.low,
                "high": found.high,
                "unit": unit,
                "n_prompts": len(self.scores.batch),
                "n_templates": len(set(self.scores.groups)),
                "ablation": "none" if condition == "model" else f"full, {held}",
                "metric": metric,
                "decides": judged is not None and self.split == DECIDING,
                "passed": judged.passed if judged else None,
                "note": note,
            }
        )

    def interval(self, values: torch.Tensor) -> Interval:
        """Mean and interval of one number per prompt."""
        return self.scores.interval(values, self.generator)

    def add_circuit(self) -> None:
        """Sufficiency, agreement, necessity."""
        scores, bounds, draw = self.scores, self.thresholds, self.generator
        runs = {
            "model": scores.model,
            "circuit": scores.circuit,
            "circuit removed": scores.removed,
            "all at baseline": scores.nothing,
        }
        of = {name: self.interval(run.task_loss) for name, run in runs.items()}
        for name, found in of.items():
            self.add("task loss", name, found, "nats", ANSWER_OR_FOIL)
        gap = scores.loss_gap(draw)
        judged = bounds.loss(gap, of["circuit"].mean, of["model"].mean)
        self.add("task loss gap", "circuit - model", gap, "nats", ANSWER_OR_FOIL, judged)
        lost = self.interval(scores.removed.task_loss - scores.model.task_loss)
        judged = bounds.removed_loss(lost)
        self.add("task loss gap", "circuit removed - model", lost, "nats", ANSWER_OR_FOIL, judged)
        of = {name: self.interval(run.correct) for name, run in runs.items()}
        for name, found in of.items():
            judged = bounds.removed_accuracy(found) if name == "circuit removed" else None
            self.add("accuracy", name, found, "share", ABOVE_FOIL, judged)
        gap = scores.accuracy_gap(draw)
        judged = bounds.accuracy(gap, of["circuit"].mean, of["model"].mean)
        self.add("accuracy gap", "circuit - model", gap, "share", ABOVE_FOIL, judged)
        for name, run in runs.items():
            self.add("answer is the argmax", name, self.interval(run.argmax), "share", VOCABULARY)
        for name, run in runs.items():
            self.add("logit difference", name, self.interval(run.logit_difference), "logits", ANSWER_OR_FOIL)
        restored = scores.faithfulness(draw)
        self.add("faithfulness", "circuit", restored, "share", "mean logit difference between nothing and model")
        self.add_agreement(runs)

    def add_agreement(self, runs: Mapping[str, PromptScores]) -> None:
        """How far each run is from the model's own answers.

        The circuit has to keep the bound on the divergence. The argmax informs only: where two tokens are nearly
        equally likely, the smallest divergence exchanges them.
        """
        bounds = self.thresholds
        for name in list(runs)[1:]:
            kl, same = self.interval(runs[name].kl), self.interval(runs[name].agrees)
            mine = name == "circuit"
            self.add(KL, name, kl, "nats", VOCABULARY, bounds.kl(kl) if mine else None)
            self.add("argmax agreement with model", name, same, "share", VOCABULARY)
        found = self.scores.correlation(self.generator)
        self.add("correlation of logit differences", "circuit", found, "Pearson r", "across prompts")

    def add_controls(self, drawn: Sequence[Circuit], n_wanted: int, bar: tqdm) -> list[dict[str, Any]]:
        """Random circuits of equal size; returns one record per draw."""
        if not drawn:
            self.rows.append(self.no_controls(n_wanted))
            return []
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
        bounds, name = self.thresholds, "random circuits"
        judged = bounds.random_accuracy(over["accuracy"], max(record["accuracy"] for record in records))
        self.add("accuracy", name, over["accuracy"], "share", f"{ABOVE_FOIL}; interval over draws", judged)
        gap = self.interval(scores.circuit.correct - torch.stack(correct).mean(0))
        self.add("accuracy gap", f"circuit - {name}", gap, "share", ABOVE_FOIL, bounds.control_gap(gap))
        self.add("task loss", name, over["task_loss_nats"], "nats", f"{ANSWER_OR_FOIL}; interval over draws")
        self.add(KL, name, over["kl_nats"], "nats", f"{VOCABULARY}; interval over draws")
        return records

    def no_controls(self, n_wanted: int) -> dict[str, Any]:
        """Why there are no random circuits: none were asked for, or none could differ."""
        if n_wanted:
            why = "every place is kept whole or not at all, so that no other circuit has this size"
        else:
            why = "n_random=0"
        missed = not n_wanted and self.split == DECIDING
        return _not_run("accuracy", "random circuits", self.split, why) | {"decides": missed}


ANSWER_OR_FOIL = "answer against foil"
ABOVE_FOIL = "answer above foil (a tie is wrong)"
VOCABULARY = "vocabulary at the answer position"


def _not_run(measure: str, condition: str, split: str, why: str, level: str = "") -> dict[str, Any]:
    """A row that stands for something that was not measured, at this level of audit or at all."""
    row: dict[str, Any] = dict.fromkeys(AuditTable.columns, "")
    none = {"value": nan, "low": nan, "high": nan, "n_prompts": None, "n_templates": None, "passed": None}
    named = {
        "measure": measure,
        "condition": condition,
        "split": split,
        "note": f"{NOT_RUN}{level and f' by a {level} audit'}: {why}",
    }
    return row | none | named | {"decides": split == DECIDING}


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with the types that AuditTable promises."""
    frame = pd.DataFrame(list(rows), columns=list(AuditTable.columns))
    passed = pd.Series([None if row is None else bool(row) for row in frame.passed], dtype=object, index=frame.index)
    numbers = dict.fromkeys(("value", "low", "high"), float)
    return frame.astype({**numbers, "n_prompts": "Int64", "n_templates": "Int64", "decides": bool}).assign(
        passed=passed
    )


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: what does not exist is None."""
    return [
        {key: None if pd.isna(value) else value for key, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]


def _nodes_sha256(circuit: Circuit) -> str:
    return hashlib.sha256(" ".join(sorted(map(str, circuit.node_set))).encode()).hexdigest()


def _origin(model: HookedModel, circuit: Circuit, task: Task, seed: int, level: str) -> dict[str, Any]:
    """What was audited, and with what."""
    try:
        library = version("sparse_interp")
    except PackageNotFoundError:
        library = "unknown"
    return {
        "model_name": model.cfg.model_name,
        "model_sha256": circuit.model_sha256,
        "task_name": task.name,
        "task_sha256": task.templates_sha256,
        "circuit_task_name": circuit.task_name,
        "circuit_task_sha256": circuit.task_sha256,
        "tokenizer_sha256": circuit.tokenizer_sha256,
        "nodes_sha256": _nodes_sha256(circuit),
        "n_nodes": circuit.n_nodes,
        "n_edges": circuit.n_edges,
        "baseline": circuit.baseline.kind,
        "prune": None if circuit.prune is None else asdict(circuit.prune),
        "circuit_seed": circuit.seed,
        "seed": seed,
        "level": level,
        "versions": {"sparse_interp": library, "torch": torch.__version__, "python": platform.python_version()},
    }
