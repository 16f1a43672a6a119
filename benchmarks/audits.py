"""What the circuits of benchmarks/discovery.py are worth: an audit of each, its verdict, and what it took.

    python benchmarks/audits.py [--level quick full] [--model stdlib-small ...] [--task single_double_quote ...]
                                [--pruned nodes edges] [--plan | --collect] [--seed 0] [--found out/discovery]
                                [--audits out/audits] [--out benchmarks/results] [--page docs/audits.md]

Each audit is a file, named after the circuit, the level and the settings that it was made with; one that is there is
not made again, and the searches of a level `full` are kept one by one, so a run that was interrupted goes on. --plan
says what is left to do, --collect makes nothing and writes what there is. A run over everything, and --collect, write
`audits.json`, `audits.csv` (a row for everything that a verdict rests on) and the last section of the page.

Seconds are of processor time, on one thread: of the audit, all of its runs together, beside those of the search that
found the circuit, which discovery.py keeps with it.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.faithfulness.audit_table import AuditTable
from sparse_interp.faithfulness.thresholds import FOUR, Thresholds
from sparse_interp.results import write_whole

MODELS = ("stdlib-small", "stdlib-small-dense")
KINDS = ("nodes", "edges")
LEVELS = ("quick", "full")
SETTINGS = {"n_prompts": 512, "n_random": 10, "n_rivals": 2}
BAR = r"\|"
"""A bar that begins no cell."""

HEADING = "## Every circuit of the bundled models"
SECTION = """
Written by the command below, from the circuits of [discovery.md](discovery.md).

    {command}

Each cell has what was measured; what misses its bound is **bold**. A verdict `incomplete` lacks a row that it needs.
`times` is the audit's processor time as a multiple of that of the search which found the circuit, one thread each.
"""


class Job(NamedTuple):
    """One audit."""

    level: str
    model: str
    task: str
    pruned: str
    seed: int
    circuit: Path

    @property
    def settings(self) -> dict:
        """Everything beside model and task that decides the table."""
        known = {"level": self.level, "seed": self.seed, "thresholds": asdict(Thresholds()), **SETTINGS}
        return known | {"circuit": sha256(self.circuit.read_bytes()).hexdigest()}

    def path(self, folder: Path) -> Path:
        """Where its table is kept."""
        digest = sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return folder / self.model / self.task / f"{self.pruned}-{self.level}-{digest[:16]}.json"

    @property
    def searched(self) -> float:
        """Processor seconds of the search that found the circuit."""
        return json.loads(self.circuit.with_name("seconds.json").read_text())


def jobs(levels: list[str], models: list[str], tasks: list[str] | None, kinds: list[str], seed: int, found: Path):
    """Every audit that is asked for, the quick ones first, of the circuits that have been found."""
    for level in levels:
        for model in models:
            for circuit in sorted((found / model).glob("*/*/circuit.json")):
                task, kind = circuit.parts[-3:-1]
                if kind in kinds and (tasks is None or task in tasks):
                    yield Job(level, model, task, kind, seed, circuit)


def made(job: Job, folder: Path) -> AuditTable:
    """The audit, made and put into its file if it is not there; an interrupted one goes on, and its seconds do too."""
    path = job.path(folder)
    spent = path.with_suffix(".spent")
    if not path.exists():
        model = si.load(job.model)
        circuit, task = si.Circuit.load(job.circuit), si.task(job.task, model.tokenizer)
        before = json.loads(spent.read_text()) if spent.exists() else 0.0
        began = time.process_time()
        try:
            how = {"folder": path.with_suffix(""), "generator": torch.Generator().manual_seed(job.seed)}
            table = si.audit(model, circuit, task, level=job.level, **SETTINGS, **how)
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(spent, json.dumps(before + time.process_time() - began))
        table.to_json(path)
    return AuditTable.from_json(path)


def record_of(job: Job, folder: Path) -> dict:
    """An audit as a record: what was audited, what came of it, what it took, and what the verdict rests on."""
    table = made(job, folder)
    seconds = json.loads(job.path(folder).with_suffix(".spent").read_text())
    named = {name: getattr(job, name) for name in ("level", "model", "task", "pruned")}
    four = dict(zip(table.four.frame.about, table.four.frame.passed, strict=True))
    took = {"seconds": round(seconds, 1), "searched": round(job.searched, 1), "times": round(seconds / job.searched, 2)}
    sizes = {"nodes": table.origin["n_nodes"], "edges": table.origin["n_edges"]}
    rows = table.frame[table.frame.decides]
    names = ["about", "measure", "condition", "value", "low", "high", "unit", "n_prompts", "passed", "note"]
    deciding = json.loads(rows[names].to_json(orient="records"))
    return (
        named | sizes | {"verdict": table.verdict, "four": four} | took | {"headline": table.headline, "rows": deciding}
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def long(records: list[dict]) -> pd.DataFrame:
    """One row for each row that decides."""
    names = ("level", "model", "task", "pruned", "nodes", "edges")
    after = ("verdict", "seconds", "times")
    rows = [
        {**{name: record[name] for name in names}, **row, **{name: record[name] for name in after}}
        for record in records
        for row in record["rows"]
    ]
    return pd.DataFrame(rows)


def wide(records: list[dict]) -> pd.DataFrame:
    """One row per audit: what it says, what it took, and every value that decides."""
    rows = []
    for record in records:
        word = {True: "faithful", False: "fails", None: "incomplete"}[_of_four(record["four"])]
        row = {"model": record["model"], "task": record["task"], "pruned": record["pruned"], "nodes": record["nodes"]}
        row["verdict"] = word + _lacking(record["four"])
        row |= {titled(cell): said(cell) for cell in record["rows"]}
        rows.append(row | {"seconds": f"{record['seconds']:.0f}", "times": f"{record['times']:.1f}"})
    frame = pd.DataFrame(rows).fillna("")
    ends = [name for name in ("seconds", "times") if name in frame]
    return frame[[name for name in frame if name not in ends] + ends]


def _of_four(four: dict) -> bool | None:
    kept = list(four.values())
    return False if False in kept else None if None in kept else True


def _lacking(four: dict) -> str:
    missed = [about for about in FOUR if four[about] is False]
    return f": {', '.join(missed)}" if missed else ""


def titled(row: dict) -> str:
    """A column's title: what is measured, and the bound that it has to keep."""
    what = {
        "nodes that are not told from random extra ones": "idle nodes",
        "edges that are not told from random extra ones": "idle edges",
        "size at the same agreement": "size",
    }.get(row["measure"], row["measure"])
    of = row["condition"].removesuffix(" / circuit").removesuffix(" - circuit")
    return what if of in ("circuit", "circuit - model") else f"{what}, {of}"


def said(row: dict) -> str:
    """A value, bold where it misses its bound."""
    if row["passed"] is None:
        return "not run"
    number = ("more than " if row["note"].startswith("not found") else "") + f"{row['value']:.3g}"
    return number if row["passed"] else f"**{number}**"


def bounds() -> str:
    """The bounds in words, as they stand in the library."""
    b = Thresholds()
    return (
        f"Bounds: KL at most {b.max_kl_nats:g} nats; task loss gap from -{b.loss_gap_nats:g} (less where the model has "
        f"little loss) to {b.loss_gap_nats:g}; worst KL at most {b.worst_kl_nats:g}, worst task loss gap at most "
        f"{b.worst_loss_gap_nats:g}; random circuits' accuracy at most {b.random_accuracy_frac:g}, and below the "
        f"circuit's beyond the interval; size of a control above {b.size_ratio:g} times the circuit's, and its gap at "
        f"equal size above 0 beyond the interval; idle nodes and edges at most {b.idle_frac:g} of them."
    )


def markdown(table: pd.DataFrame) -> str:
    """A table of text."""
    rows = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows)


def section(records: list[dict], command: str) -> str:
    """The last section of the page."""
    parts = [HEADING, SECTION.format(command=command).strip(), bounds()]
    for level in LEVELS:
        of_level = [record for record in records if record["level"] == level]
        if of_level:
            times = pd.Series([record["times"] for record in of_level])
            kept = sum(_of_four(record["four"]) is True for record in of_level)
            what = (
                f"{kept} of {len(of_level)} keep every bound; an audit takes {times.median():.1f} times the search (at"
            )
            parts.append(f"### Level {level}\n\n{what} most {times.max():.1f}).\n\n{markdown(wide(of_level))}")
    return "\n\n".join(parts) + "\n"


def written(records: list[dict], command: str, out: Path, page: Path) -> None:
    """Put all that there is into its files."""
    record = {
        "command": command,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "settings": SETTINGS,
        "audits": records,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "audits.json", json.dumps(record, indent=1) + "\n")
    write_whole(out / "audits.csv", long(records).to_csv(index=False))
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    write_whole(page, text.partition(HEADING)[0].rstrip() + "\n\n" + section(records, command))


def plan(todo: list[Job], folder: Path) -> Iterator[str]:
    """What is there and what is not, in words."""
    for job in todo:
        there = "there" if job.path(folder).exists() else "to do"
        yield f"{there}  {job.level:5}  {job.model:18}  {job.task:22}  {job.pruned:5}  found in {job.searched:.0f} s"
    left = [job for job in todo if not job.path(folder).exists()]
    searches = sum(job.searched for job in left if job.level == "full")
    yield f"{len(left)} of {len(todo)} to do; the searches for the circuits of the full ones took {searches:.0f} s"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--level", nargs="+", default=["quick"], choices=LEVELS)
    arguments.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    arguments.add_argument("--task", nargs="+", help="only these of the tasks that have circuits")
    arguments.add_argument("--pruned", nargs="+", default=list(KINDS), choices=KINDS)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--plan", action="store_true", help="say what is left to do, and do nothing")
    arguments.add_argument("--collect", action="store_true", help="make no audit; write what there is")
    arguments.add_argument("--found", type=Path, default=Path("out/discovery"))
    arguments.add_argument("--audits", type=Path, default=Path("out/audits"))
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "audits.md")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    levels = list(LEVELS) if given.collect else given.level
    todo = list(jobs(levels, given.model, given.task, given.pruned, given.seed, given.found))
    if given.plan:
        print("\n".join(plan(todo, given.audits)))
        return
    if given.collect:
        todo = [job for job in todo if job.path(given.audits).exists()]
    records = []
    for job in todo:
        records.append(record_of(job, given.audits))
        print(wide(records[-1:]).to_string(index=False), flush=True)
    whole = given.task is None and set(given.model) == set(MODELS) and set(given.pruned) == set(KINDS)
    if records and (whole or given.collect):
        command = f"python benchmarks/audits.py --level {' '.join(levels)} --seed {given.seed}"
        written(records, command, given.out, given.page)


if __name__ == "__main__":
    main()
