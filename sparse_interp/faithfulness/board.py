"""The ground-truth board: every way of finding circuits on every model whose circuit is known.

    cell   =  case x method x seed         one small JSON file, written when the cell is finished and never run again
    case   =  hand-built model | planted one | Tracr program in a host | edges between components of two Tracr programs

The same command goes on after an interruption; a cell whose file is damaged, or whose method is told to search
otherwise by now, is run again. A search that finds no circuit is a result: its cell says so, and counts as not
recovered. `rivals` runs where a model has several keys, which are what it is for.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import lru_cache, partial
from math import nan
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness import methods, recover
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.components import ComponentTruth
from sparse_interp.faithfulness.ground_truth import ground_truths
from sparse_interp.faithfulness.methods import METHODS
from sparse_interp.faithfulness.planted_cases import planted_cases
from sparse_interp.faithfulness.recover import Scores, method_called
from sparse_interp.faithfulness.tracr import COMPONENT_TASKS, tracr_cases, tracr_components
from sparse_interp.results import Axes, Table, bars_with_intervals, bootstrap_interval, write_whole

SEEDS = {"default": 1, "full": 3}
"""Seeds of every cell, board by board."""

FORMAT_VERSION = 1

SEVERAL_KEYS = "rivals"
"""The method that runs only where there are several keys."""

COMPONENTS = "components"
"""The kind of case that has edges between components."""

BETWEEN_COMPONENTS = "acdc"
"""The method that was written for them, and runs there alone."""


class Case(NamedTuple):
    """A model whose circuit is known."""

    kind: str
    """`hand-built`, `planted`, `tracr`, or `components`: the published comparison, greedy removal as ACDC has it."""

    build: Callable[[], GroundTruth | ComponentTruth]
    """Makes it: the same whenever it is called."""


class Cell(NamedTuple):
    """One search."""

    board: str
    case: str
    method: str
    seed: int

    @property
    def file_name(self) -> str:
        """What its file is called."""
        return f"{self.case}--{self.method}--{self.seed}.json"


def board_cases(board: str = "default") -> dict[str, Case]:
    """The models of a board, `default` or `full`, by name.

    Raises:
        ConfigError: for another board.
    """
    if board not in SEEDS:
        raise ConfigError(f"board={board!r}; expected {' or '.join(map(repr, SEEDS))}.")
    cases = {name: Case("hand-built", build) for name, build in ground_truths().items()}
    cases |= {name: Case("planted", build) for name, build in planted_cases(board).items()}
    cases |= {name: Case("tracr", build) for name, build in tracr_cases(board).items()}
    return cases | {f"acdc-{name}": Case(COMPONENTS, partial(tracr_components, name)) for name in COMPONENT_TASKS}


@dataclass(frozen=True, eq=False)
class BoardTable(Table):
    """One row per cell: how much of a known circuit a method found.

    `case`, its `kind` and `n_keys`, `method`, `seed`; the scores (`Scores` in faithfulness/recover.py); `seconds` of
    processor time; `note`, empty unless no circuit was found or the cell does not apply.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "case",
        "kind",
        "n_keys",
        "method",
        "seed",
        *(field.name for field in fields(Scores)),
        "seconds",
        "note",
    )

    @property
    def run(self) -> pd.DataFrame:
        """The rows that are results, whether or not a circuit was found."""
        return self.frame[self.frame.note != NOT_RUN]

    def summary(self, *by: str) -> Table:
        """Means by method, or by whatever columns are named: ROC-AUC, F1, exact recovery with its 95 % interval over
        cases, share of keys found where there are several, and processor time."""
        rows = []
        for names, part in self.run.groupby(list(by or ("method",)), sort=False):
            several = part.keys_frac[part.n_keys > 1]
            row = dict(zip(by or ("method",), names, strict=True)) | {"n_cells": len(part)}
            row |= {name: part[name].mean() for name in ("node_auc", "edge_auc", "node_f1", "edge_f1")}
            for what in ("nodes_exact", "edges_exact"):
                row |= dict(zip((what, f"{what}_low", f"{what}_high"), _share(part, what), strict=True))
            rows.append(row | {"keys_frac": several.mean() if len(several) else nan, "seconds": part.seconds.sum()})
        return Table(pd.DataFrame(rows))

    def plot(self, ax: Axes | None = None, *, value: str = "edges_exact") -> Axes:
        """A bar for each method: `value`, with an interval where it is a share of exact recoveries."""
        frame = self.summary().frame
        bounds = {side: f"{value}_{side}" for side in ("low", "high")}
        frame = frame.assign(**{name: nan for name in bounds.values() if name not in frame})
        return bars_with_intervals(frame, label="method", value=value, **bounds, ax=ax)


NOT_RUN = "not run: the model has one key"


def _share(part: pd.DataFrame, what: str) -> tuple[float, float, float]:
    values = torch.tensor(part[what].astype(float).to_numpy())
    if part.case.nunique() < 2:
        return values.mean().item(), nan, nan
    return bootstrap_interval(values, part.case.to_list(), generator=torch.Generator().manual_seed(0))


# -- running it -----------------------------------------------------------------------------------------------------


def run_board(
    folder: Path | str,
    board: str = "default",
    *,
    chosen_methods: Sequence[str] = (),
    chosen_cases: Sequence[str] = (),
    n_seeds: int | None = None,
    n_processes: int = 1,
    progress: bool = True,
) -> BoardTable:
    """Run the cells that `folder` does not hold yet, and give the table of all.

    Args:
        folder: where each cell is kept, and looked for first.
        board: `default`, or `full`, which takes hours.
        chosen_methods: some of `METHODS`; none are all.
        chosen_cases: some of the board's cases; none are all.
        n_seeds: seeds of each cell; None takes the board's own number.
        n_processes: cells that run at once, each on one thread.
        progress: whether to show a progress bar over cells.

    Raises:
        ConfigError: for an unknown board, method or case, or a number below 1, before anything runs.
    """
    cells = board_cells(board, chosen_methods, chosen_cases, n_seeds)
    if n_processes < 1:
        raise ConfigError(f"n_processes={n_processes}; at least 1 process has to run.")
    folder = Path(folder)
    records = {cell: kept(folder, cell) for cell in cells}
    todo = [cell for cell, record in records.items() if record is None]
    with tqdm(total=len(cells), initial=len(cells) - len(todo), disable=not progress, desc="board", unit="cell") as bar:
        for cell, record in _finished(todo, n_processes):
            write_whole(folder / cell.file_name, json.dumps(record | {"sha256": _sum(record)}, indent=1) + "\n")
            records[cell] = record
            bar.set_postfix_str(f"{cell.case}, {cell.method}")
            bar.update()
    return BoardTable(pd.DataFrame([_row(record) for record in records.values() if record is not None]))


def board_cells(
    board: str, chosen_methods: Sequence[str] = (), chosen_cases: Sequence[str] = (), n_seeds: int | None = None
) -> list[Cell]:
    """The cells of a board, case by case.

    Raises:
        ConfigError: for an unknown board, method or case, or fewer than one seed.
    """
    cases, n_seeds = board_cases(board), SEEDS.get(board) if n_seeds is None else n_seeds
    for name in chosen_methods:
        method_called(name)
    for name in chosen_cases:
        if name not in cases:
            near = get_close_matches(name, cases, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigError(f"the {board} board has no case {name!r}; {hint}It has {len(cases)}: {', '.join(cases)}.")
    if n_seeds is None or n_seeds < 1:
        raise ConfigError(f"n_seeds={n_seeds}; a cell needs at least 1.")
    return [
        Cell(board, case, method, seed)
        for case in (chosen_cases or cases)
        for method in (chosen_methods or METHODS)
        if cases[case].kind != COMPONENTS or method == BETWEEN_COMPONENTS
        for seed in range(n_seeds)
    ]


def _finished(cells: Sequence[Cell], n_processes: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every cell with its record, as they come."""
    if n_processes == 1:
        yield from ((cell, measure(cell)) for cell in cells)
        return
    workers = ProcessPoolExecutor(n_processes, get_context("spawn"), _on_one_thread)
    try:
        waiting = {workers.submit(measure, cell): cell for cell in cells}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        workers.shutdown(cancel_futures=True)


def _on_one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _built(board: str, case: str) -> GroundTruth | ComponentTruth:
    return board_cases(board)[case].build()


def measure(cell: Cell) -> dict[str, Any]:
    """Run one cell: its record, as its file holds it."""
    truth = _built(cell.board, cell.case)
    record = cell._asdict() | {
        "format_version": FORMAT_VERSION,
        "settings": settings(cell.method),
        "kind": board_cases(cell.board)[cell.case].kind,
        "n_keys": 1 if isinstance(truth, ComponentTruth) else len(truth.keys),
        "scores": None,
        "seconds": nan,
        "note": "",
    }
    if isinstance(truth, ComponentTruth):
        scores, seconds = recover.recover_components(truth)
        return record | {"scores": asdict(scores), "seconds": seconds}
    if cell.method == SEVERAL_KEYS and len(truth.keys) == 1:
        return record | {"note": NOT_RUN}
    try:
        found = recover.recover(truth, cell.method, generator=torch.Generator().manual_seed(cell.seed))
    except CircuitError as error:
        return record | {"note": f"no circuit: {error}"}
    return record | {"scores": asdict(found.scores), "seconds": found.seconds}


def settings(method: str) -> str:
    """A hash of everything that says how a method searches; its cells of other settings are run again."""
    between = recover.COMPONENT_TAUS if method == BETWEEN_COMPONENTS else ()
    return hashlib.sha256(repr((methods.told(method), between)).encode()).hexdigest()[:16]


def kept(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The record of a finished cell; None if there is none, or it is damaged, or of other settings."""
    try:
        record = json.loads((folder / cell.file_name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.pop("sha256", None) != _sum(record):
        return None
    same = {"format_version": FORMAT_VERSION, "settings": settings(cell.method)} | cell._asdict()
    return record if all(record.get(name) == value for name, value in same.items() if name != "board") else None


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """A cell as a row of the table; where no circuit was found none of it was."""
    nothing = {field.name: False if field.type is bool else nan for field in fields(Scores)}
    nothing |= {"node_f1": 0.0, "edge_f1": 0.0, "keys_frac": 0.0, "n_nodes": 0, "n_edges": 0}
    known = {name: record[name] for name in ("case", "kind", "n_keys", "method", "seed", "seconds", "note")}
    return {name: (known | (record["scores"] or nothing))[name] for name in BoardTable.columns}
