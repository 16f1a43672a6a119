"""The table that an audit fills: rows, the verdict that they amount to, and the file that both are kept in."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import isnan, nan
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.thresholds import FOUR, GAP, Thresholds
from sparse_interp.results import Axes, Table, bars_with_intervals, write_whole
from sparse_interp.viewer.content import PageAudit, PageAuditRow, PageCurve, PageQuestion

FORMAT_VERSION = 2

DECIDING, INFORMING = "test", "shifted"
"""The split that the verdict rests on, and the one that is measured beside it."""

NOT_RUN, NOT_FOUND = "not run", "not found"

RANDOM, SIZE, SIZES = "random circuits", "size at the same agreement", "sizes"

FAITHFUL, INCOMPLETE = "faithful on what was tested", "incomplete"

NUMBERS = {"value": float, "low": float, "high": float, "n_prompts": "Int64", "n_templates": "Int64", "decides": bool}


@dataclass(frozen=True, eq=False)
class AuditTable(Table):
    """Everything that was measured of a circuit, beside its controls, and what that amounts to.

    One row per measurement: `about` (one of the verdict's four things, or what else is tested), `measure`, `condition`
    (model, circuit, circuit removed, a control, or a difference of two), `split`, `value` with its 95 % interval `low`
    to `high`, `unit`, `n_prompts`, `n_templates` (what the interval drew); the method: `baseline` and `scheme` of the
    ablation, `metric`, `positions` where nodes are kept, `direction` (what is kept: the circuit, or all but it; or
    which way something is exchanged); `decides` (whether the verdict rests on it), `passed` (True, False, or None where
    there is no bound or nothing was run) and `note` (the bound, how it was missed, or why not run).
    """

    columns: ClassVar[tuple[str, ...]] = (
        "about",
        "measure",
        "condition",
        "split",
        "value",
        "low",
        "high",
        "unit",
        "n_prompts",
        "n_templates",
        "baseline",
        "scheme",
        "metric",
        "positions",
        "direction",
        "decides",
        "passed",
        "note",
    )

    thresholds: Thresholds = field(default_factory=Thresholds)
    """The bounds that `passed` refers to."""

    origin: Mapping[str, Any] = field(default_factory=dict)
    """Names and hashes of model, task and circuit, settings, seed, level, seconds and versions."""

    details: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """What rows summarise, by test: one row per random circuit, per search, per node, per head, per scheme."""

    @property
    def controls(self) -> pd.DataFrame:
        """One row per random circuit and split: its accuracy, loss and KL, and what it shares with the circuit."""
        return self.details.get(RANDOM, pd.DataFrame())

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
        inform = self.frame[~self.frame.decides & (self.frame.passed == False)]  # noqa: E712 - None is neither
        said = [f"on the {row.split} split, {row.note}" if row.split == INFORMING else row.note
                for row in inform.itertuples()]  # fmt: skip
        return f"{FAITHFUL}; beside that: {'; '.join(said)}" if said else FAITHFUL

    @property
    def four(self) -> Table:
        """The verdict taken apart: for each of its four things whether it is kept, and why not."""
        rows = []
        for about in FOUR:
            frame = self.frame[(self.frame.about == about) & self.frame.decides]
            failed = [row.note for row in frame.itertuples() if row.passed is False]
            absent = [f"{row.measure}: {row.note}" for row in frame.itertuples() if row.passed is None]
            kept = False if failed else None if absent or not len(frame) else True
            rows.append((about, kept, "; ".join(failed or absent)))
        return Table(pd.DataFrame(rows, columns=["about", "passed", "why"]).astype({"passed": object}))

    @property
    def headline(self) -> str:
        """The gap between the circuit and its controls, in one sentence."""
        rows = self.frame[(self.frame.about == GAP) & (self.frame.split != INFORMING)]
        said, absent = [], []
        for row in rows.itertuples():
            if isnan(row.value):
                absent.append(row.condition.split(" / ")[0])
            elif row.measure == SIZE:
                more = "more than " * row.note.startswith(NOT_FOUND)
                said.append(f"{row.condition.split(' / ')[0]}: {more}{row.value:.2g} times the {row.unit}")
            elif row.condition == f"circuit - {RANDOM}":
                said.append(f"{RANDOM} of its size: less accurate by {row.value:.3f}")
        said += [f"{NOT_RUN}: {', '.join(absent)}"] if absent else []
        return f"{GAP}: {'; '.join(said)}"

    def is_of(self, circuit: Circuit) -> bool:
        """Whether this is the audit of `circuit`: of its nodes, in its model; a circuit found anew needs its own."""
        known = (self.origin.get("nodes_sha256"), self.origin.get("model_sha256"))
        return known == (nodes_sha256(circuit), circuit.model_sha256)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy of every condition on both splits; the dashed line is chance."""
        rows = self.frame[(self.frame.measure == "accuracy") & self.frame.value.notna()]
        bars = rows.assign(label=rows.condition + ", " + rows.split).rename(columns={"value": "accuracy"})
        ax = bars_with_intervals(
            bars, label="label", value="accuracy", low="low", high="high", by="split", reference=0.5, ax=ax
        )
        ax.set_title(self.verdict.split(":")[0].split(";")[0])
        return ax

    def on_page(self) -> PageAudit:
        """The audit as a circuit page shows it: verdict, its four things, every row, and circuits of every size."""
        rows = [
            PageAuditRow(
                measure=f"{row['measure']} ({row['unit']})" if row["unit"] else row["measure"],
                **{key: row[key] for key in ("condition", "value", "low", "high", "split", "passed", "note")},
                about=row["about"],
                decides=row["decides"],
                n=row["n_prompts"],
            )
            for row in _plain(self.frame)
        ]
        sizes = self.details.get(SIZES, pd.DataFrame())
        curves = [] if sizes.empty else [
            PageCurve(title="Circuits of every size", x="nodes", y="share of the model's logit difference",
                      points=list(zip(sizes.n_nodes.tolist(), sizes.faithfulness.tolist(), strict=True)), log_x=True)
        ]  # fmt: skip
        return PageAudit(
            verdict=self.verdict,
            passed=self.passed,
            level=self.origin.get("level", ""),
            rows=rows,
            headline=self.headline,
            questions=[PageQuestion(**row) for row in self.four.frame.to_dict("records")],
            curves=curves,
        )

    # -- its file -----------------------------------------------------------------------------------------------------

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
            "headline": self.headline,
            "origin": dict(self.origin),
            "thresholds": asdict(self.thresholds),
            "rows": _plain(self.frame),
            "details": {name: _plain(frame) for name, frame in self.details.items()},
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
                raise CircuitError(
                    f"{path} has audit format {found}, and this library reads {FORMAT_VERSION}. Run the audit again."
                )
            details = {name: pd.DataFrame(rows) for name, rows in content["details"].items()}
            return cls(frame_of(content["rows"]), Thresholds(**content["thresholds"]), content["origin"], details)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CircuitError):
                raise
            raise CircuitError(
                f"{path} cannot be read as an audit ({type(error).__name__}: {error}); "
                "expected a file that AuditTable.to_json wrote. Run the audit again."
            ) from error


def not_run(about: str, measure: str, condition: str, split: str, why: str, *, decides: bool = False) -> dict[str, Any]:
    """A row that stands for something that was not measured."""
    row: dict[str, Any] = dict.fromkeys(AuditTable.columns, "")
    none = {"value": nan, "low": nan, "high": nan, "n_prompts": None, "n_templates": None, "passed": None}
    named = {"about": about, "measure": measure, "condition": condition, "split": split, "decides": decides}
    return row | none | named | {"note": f"{NOT_RUN}: {why}"}


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with the types that AuditTable promises."""
    frame = pd.DataFrame(list(rows), columns=list(AuditTable.columns))
    passed = pd.Series([None if row is None else bool(row) for row in frame.passed], dtype=object, index=frame.index)
    return frame.astype(NUMBERS).assign(passed=passed)


def nodes_sha256(circuit: Circuit) -> str:
    """Hash of the names of a circuit's nodes, and of its edges if they were pruned."""
    parts = sorted(map(str, circuit.node_set))
    if circuit.edges_pruned:
        weights = circuit.edges[circuit.edges.kind == "weight"]
        parts += sorted(weights.source + " " + weights.target)
    return sha256(" ".join(parts).encode()).hexdigest()


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: what does not exist is None."""
    return [
        {key: None if pd.isna(value) else value for key, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]
