"""The published figures: which there are, the tables that each is drawn from, and the command that makes those.

    results folder (JSON, CSV) and bundled models  ->  figures.py  ->  NAME.svg, .pdf, .png, .csv and .md of each figure

The same tables give the same bytes. A figure whose tables are not there, or are broken, is left out, with the reason
and the command. `make_tables` runs those commands, each with one seed, in a folder of its own, where they go on if they
are stopped; they are scripts of the repository's folder `benchmarks`, which the installed package does not contain.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from sparse_interp import figures
from sparse_interp.errors import CheckpointError, ConfigError, SparseInterpError
from sparse_interp.faithfulness.board import BoardTable
from sparse_interp.figures import MODEL_WORDS, Drawn
from sparse_interp.model import zoo
from sparse_interp.model.statistics import activation_statistics, degrees, weight_sizes
from sparse_interp.model.transformer import load
from sparse_interp.results import UNDATED, published_style, save_figure, write_whole

RESULTS = Path("benchmarks/results")

SEED = 0
"""Of every command, and of the intervals that are drawn here."""

N_BLOCKS = 64
"""Blocks of held-out text on which activations are counted."""

# -- the tables -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A command that makes tables."""

    command: tuple[str, ...]
    """As a reader types it, in the root of the repository."""

    writes: tuple[str, ...]
    """Files that it puts into the results folder."""

    apart: tuple[str, ...]
    """What is added to keep everything that it makes in the folder `{work}`."""

    needs: tuple[str, ...] = ()
    """Steps that come before it."""


def script(name: str, *given: str) -> tuple[str, ...]:
    """A script of the folder `benchmarks`."""
    return ("python", f"benchmarks/{name}.py", *given)


IN_WORK = ("--out", "{work}/results")

GATHERED = ("--cells", "{work}/faithful_pruning", "--audits", "{work}/audits", *IN_WORK)

STEPS = {
    "density_and_size": Step(
        script("density_and_size", "--seed", str(SEED)),
        ("density_and_size.json",),
        ("--runs", "{work}/density_and_size", *IN_WORK),
    ),
    "discovery": Step(
        script("discovery", "--seed", str(SEED)),
        ("discovery.json",),
        ("--found", "{work}/discovery", "--page", "{work}/discovery.md", *IN_WORK),
    ),
    "faithful_pruning": Step(
        script(*["faithful_pruning", "--share", "full", "--kind", "bundled", "--setting"], "task loss", "agreement"),
        ("faithful_pruning.csv",),
        ("--cells", "{work}/faithful_pruning", *IN_WORK),
    ),
    "audits": Step(
        script("audits", "--seed", str(SEED)),
        ("audits.csv",),
        ("--found", "{work}/discovery", "--audits", "{work}/audits", "--page", "{work}/audits.md", *IN_WORK),
        ("discovery",),
    ),
    "groundtruth": Step(("sparse-interp", "groundtruth"), (), ("--out", "{work}/groundtruth")),
    "size_curves": Step(script("figure_tables"), ("size_curves.csv",), GATHERED, ("faithful_pruning",)),
    "necessity_and_sufficiency": Step(
        script("figure_tables"), ("necessity_and_sufficiency.csv",), GATHERED, ("audits",)
    ),
    "board": Step(
        script("figure_tables", "--board", "out/groundtruth/board.csv"),
        ("groundtruth.csv",),
        ("--board", "{work}/groundtruth/board.csv", *GATHERED),
        ("groundtruth",),
    ),
    "bridges_rotated": Step(script("bridges_rotated", "--seed", str(SEED)), ("bridges_rotated.json",), IN_WORK),
    "bridges": Step(
        script("bridges"),
        ("bridges.csv", "bridges_steering.csv", "bridges.json"),
        ("--found", "{work}/discovery", "--work", "{work}/bridges", *IN_WORK),
        ("discovery",),
    ),
}
"""In an order in which they can be run."""


def read(results: Path, file: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of a table, and what else its file says.

    Raises:
        CheckpointError: if there is none, naming the command that makes it.
        ConfigError: if it is no table.
    """
    path = results / file
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; `{making(file)}` makes it.")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path), {}
        record = json.loads(path.read_text(encoding="utf-8"))
        return pd.DataFrame(record.pop("rows", [])), record
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no table ({error}); `{making(file)}` makes it anew.") from error


def making(file: str) -> str:
    """The command that makes a file."""
    return next(shlex.join(step.command) for step in STEPS.values() if file in step.writes)


def seed_of(said: dict[str, Any]) -> int:
    """The seed that a table says it was made with, by itself or in its command.

    Raises:
        ConfigError: if it does not.
    """
    found = said.get("seed")
    if found is None and (there := re.search(r"--seed (\d+)", said.get("command", ""))):
        found = int(there[1])
    if found is None:
        raise ConfigError("a table says nothing of its seed, by `seed` or in its `command`, and its caption has to.")
    return found


# -- the figures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A published figure."""

    files: tuple[str, ...]
    """Tables that it is drawn from; none if it is drawn from the bundled models alone."""

    draw: Callable[[Path], Drawn]
    """Draws it from the tables of a results folder."""

    @property
    def steps(self) -> list[str]:
        """Commands that its tables take, in order."""
        wanted = {name for name, step in STEPS.items() if set(self.files) & set(step.writes)}
        for name in reversed(STEPS):
            wanted |= set(STEPS[name].needs) if name in wanted else set()
        return [name for name in STEPS if name in wanted]

    @property
    def commands(self) -> list[str]:
        """What a reader types to make its tables."""
        return [shlex.join(STEPS[name].command) for name in self.steps]


def _density_and_size(results: Path) -> Drawn:
    return figures.density_and_size(read(results, "density_and_size.json")[0])


def _circuit_size(results: Path) -> Drawn:
    curves, (_, dense) = read(results, "size_curves.csv")[0], MODEL_WORDS
    return figures.circuit_size(curves[curves.model != dense] if "model" in curves else curves)  # a line per task


def _frontier(results: Path) -> Drawn:
    circuits, said = read(results, "discovery.json")
    cards = [json.loads((zoo.model_folder(name) / "card.json").read_text(encoding="utf-8")) for name in MODEL_WORDS]
    models = pd.DataFrame([{"model": card["name"], **card["validation"]} for card in cards])
    return figures.frontier(circuits, models, torch.Generator().manual_seed(SEED), seed_of(said))


def _necessity_and_sufficiency(results: Path) -> Drawn:
    return figures.necessity_and_sufficiency(read(results, "necessity_and_sufficiency.csv")[0])


def _audit_gap(results: Path) -> Drawn:
    return figures.audit_gap(*(read(results, name)[0] for name in ("faithful_pruning.csv", "audits.csv")))


def _recovery_board(results: Path) -> Drawn:
    frame = read(results, "groundtruth.csv")[0]
    return figures.recovery_board(
        BoardTable(frame.assign(note=frame.note.astype(object).fillna("")) if "note" in frame else frame)
    )


def _rotated_bridges(results: Path) -> Drawn:
    rows, said = read(results, "bridges_rotated.json")
    return figures.rotated_bridges(rows, seed_of(said))


def _bridges(results: Path) -> Drawn:
    return figures.bridges(read(results, "bridges.csv")[0], _about_bridges(results))


def _steering(results: Path) -> Drawn:
    return figures.steering(read(results, "bridges_steering.csv")[0], _about_bridges(results))


def _about_bridges(results: Path) -> dict[str, Any]:
    """What bridges.json says of how many there are of everything, and the seed."""
    said = read(results, "bridges.json")[1]
    missing = [name for name in ("blocks", "nodes", "pairs_per_task", "random_directions") if name not in said]
    if missing:
        raise ConfigError(f"bridges.json does not say {', '.join(missing)}; `{making('bridges.json')}` makes it anew.")
    return said | {"seed": seed_of(said)}


def _activations(results: Path) -> Drawn:
    parts = []
    for name in MODEL_WORDS:
        blocks = zoo.validation_blocks(name)[:N_BLOCKS]
        table = activation_statistics(load(name), blocks)
        parts.append(table.frame.assign(model=name, n_blocks=len(blocks), n_ctx=blocks.shape[1]))
    return figures.activations(pd.concat(parts))


def _weights(results: Path) -> Drawn:
    models = {name: load(name) for name in MODEL_WORDS}
    sizes = pd.concat([weight_sizes(model).frame.assign(model=name) for name, model in models.items()])
    return figures.weights(
        sizes, pd.concat([degrees(model).frame.assign(model=name) for name, model in models.items()])
    )


FIGURES = {
    "density_and_size": Figure(("density_and_size.json",), _density_and_size),
    "circuit_size": Figure(("size_curves.csv",), _circuit_size),
    "frontier": Figure(("discovery.json",), _frontier),
    "necessity_and_sufficiency": Figure(("necessity_and_sufficiency.csv",), _necessity_and_sufficiency),
    "audit_gap": Figure(("faithful_pruning.csv", "audits.csv"), _audit_gap),
    "recovery_board": Figure(("groundtruth.csv",), _recovery_board),
    "rotated_bridges": Figure(("bridges_rotated.json",), _rotated_bridges),
    "bridges": Figure(("bridges.csv", "bridges.json"), _bridges),
    "steering": Figure(("bridges_steering.csv", "bridges.json"), _steering),
    "activations": Figure((), _activations),
    "weights": Figure((), _weights),
}
"""Every published figure, by name."""

ENDINGS = (*UNDATED, ".csv", ".md")


class Outcome(NamedTuple):
    """What came of a figure."""

    name: str
    caption: str | None
    """None if it was left out."""

    reason: str = ""
    """Why it was left out."""


def draw_figures(names: Sequence[str], results: Path, out: Path) -> Iterator[Outcome]:
    """Draw figures into `out`, one by one: vectors, pixels, numbers and caption under the figure's name.

    Raises:
        ConfigError: for an unknown name, before anything is drawn.
    """
    for name in chosen(names):
        try:
            with published_style():
                drawn = FIGURES[name].draw(results)
                save_figure(drawn.ax, *(out / f"{name}{ending}" for ending in UNDATED))
        except SparseInterpError as error:
            yield Outcome(name, None, str(error))
            continue
        write_whole(out / f"{name}.csv", drawn.frame.to_csv(index=False))
        write_whole(out / f"{name}.md", f"{drawn.caption}\n\n{origin(name)}\n")
        yield Outcome(name, drawn.caption)


def origin(name: str) -> str:
    """Where a figure comes from, in a sentence."""
    made = ", ".join(f"`{command}`" for command in FIGURES[name].commands)
    tables = f"its tables are made by {made}" if made else "from nothing but the bundled models"
    return f"`sparse-interp figures --only {name}` draws it{'; ' if made else ', '}{tables}."


def chosen(names: Sequence[str]) -> list[str]:
    """Names of figures, all if none are given.

    Raises:
        ConfigError: for one that there is not, with the nearest.
    """
    for name in names:
        if name not in FIGURES:
            near = get_close_matches(name, FIGURES, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"no figure is called {name!r}; {hint}There are {', '.join(FIGURES)}.")
    return list(dict.fromkeys(names)) or list(FIGURES)


PAGE = """# Gallery

Every published figure, drawn by `make figures` from the tables in `benchmarks/results` and from the bundled models.
The same tables give the same bytes. Beside each `out/figures/NAME.png` lie the figure as SVG and PDF, its numbers as
CSV and its caption. `sparse-interp figures --from-scratch` makes the tables anew, which takes hours, and says how many.
"""


def write_page(outcomes: Sequence[Outcome], out: Path, page: Path) -> None:
    """A page of figures with captions, their pixels copied from `out` to `figures` beside it, in 64 colours."""
    from PIL import Image

    parts = [PAGE]
    for outcome in outcomes:
        title = outcome.name.replace("_", " ").capitalize()
        picture = page.parent / "figures" / f"{outcome.name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(out / picture.name) as pixels:
            pixels.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
        drawn = f"![{title}](figures/{picture.name})"
        parts.append(f"## {title}\n\n{drawn}\n\n{outcome.caption}\n\n{origin(outcome.name)}\n")
    write_whole(page, "\n".join(parts))


# -- from scratch -----------------------------------------------------------------------------------------------------


def steps_of(names: Sequence[str]) -> list[str]:
    """Every step that the tables of these figures take, in order."""
    wanted = {step for name in chosen(names) for step in FIGURES[name].steps}
    return [step for step in STEPS if step in wanted]


def last_time(step: str, results: Path) -> float | None:
    """Processor seconds that a step took when its tables were made, as far as they say."""
    known = STEPS["board" if step == "groundtruth" else step].writes[0]
    if "benchmarks/figure_tables.py" in STEPS[step].command or not (results / known).is_file():
        return None
    frame = read(results, known)[0]
    once = [name for name in ("level", "model", "task", "pruned") if name in frame] if step == "audits" else list(frame)
    column = next((name for name in ("seconds", "seconds_train") if name in frame), None)
    rows = frame.drop_duplicates(once) if step == "audits" else frame
    return None if column is None else float(pd.to_numeric(rows[column], errors="coerce").sum())


def make_tables(steps: Sequence[str], benchmarks: Path, work: Path) -> Iterator[str]:
    """Run steps in `work`, naming each before it begins; their tables are in `work / "results"`.

    Raises:
        ConfigError: if `benchmarks` is not the repository's folder of that name, before anything runs.
        SparseInterpError: if a command fails.
    """
    for step in steps:
        _, place, *_ = STEPS[step].command
        if place.endswith(".py") and not (benchmarks / Path(place).name).is_file():
            raise ConfigError(
                f"{benchmarks} has no {Path(place).name}: tables are made by scripts of the repository's folder "
                "benchmarks, which the installed package does not contain. Run this in a checkout."
            )
    for step in steps:
        yield step
        ran = subprocess.run(command_apart(step, benchmarks, work), check=False)
        if ran.returncode:
            raise SparseInterpError(
                f"{step} ended with code {ran.returncode}; what it had made is kept in {work}, and the same command "
                "goes on from there."
            )


def command_apart(step: str, benchmarks: Path, work: Path) -> list[str]:
    """The command of a step, to be run here and to write into `work`; what is given twice counts as given last."""
    program, place, *given = STEPS[step].command
    called = ["-c", "from sparse_interp.cli import main; main()", place]
    if program == "python":
        called = [str(benchmarks / Path(place).name)]
    return [sys.executable, *called, *given, *(part.format(work=work) for part in STEPS[step].apart)]
