"""The command line: one command per function of the library, under the same name.

A command loads what it needs, calls the function, and says what came of it. Results go to standard output (as JSON with
`--json`), progress and remarks to standard error. Exit code 0: done; 1: failed or stopped; 2: the input was refused.

To add a command, write a function below `@app.command()`: its parameters become arguments and options, its docstring
the help. Errors of the library need no handling here: `main` prints their message and chooses the exit code.
"""

import ctypes
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Argument, Option

from sparse_interp.errors import CheckpointError, SparseInterpError
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import bundled_tokenizer, weights_sha256
from sparse_interp.training import recipes
from sparse_interp.training.loop import MODEL, StepRecord, claim_folder, stored_run
from sparse_interp.training.loop import train as train_model
from sparse_interp.training.recipes import RunConfig, replace_model
from sparse_interp.training.text import TrainingText, folder_text, python_text, source_of

DONE, FAILED, REFUSED = 0, 1, 2
TEXT = "text"

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command in `arguments` (else in sys.argv) and exit with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    command = typer.main.get_command(app)
    try:
        with _remarks():
            command.main(args=[a for a in given if a != "--debug"], prog_name="sparse-interp")
    except KeyboardInterrupt:
        sys.exit(FAILED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, SparseInterpError):
            print(f"sparse-interp: {error}", file=sys.stderr)
        else:
            what = f"{type(error).__name__}: {error}"
            print(f"sparse-interp: unexpected {what}; --debug shows where it came from.", file=sys.stderr)
        refused = isinstance(error, SparseInterpError) and isinstance(error, ValueError)
        sys.exit(REFUSED if refused else FAILED)


@app.callback()
def _every_command(
    debug: Annotated[bool, Option("--debug", help="On an error, print the traceback; accepted anywhere.")] = False,
) -> None:
    """Train weight-sparse transformers, find the circuits in them, and measure what those circuits are worth."""


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the bundled models: shape, non-zero parameters, loss on held-out text."""
    table = zoo.models()
    print(table.frame.to_json(orient="records", indent=1) if as_json else table)


@app.command()
def train(
    recipe: Annotated[str, Argument(help=f"One of {', '.join(recipes.RECIPES)}.")],
    out: Annotated[Path, Option(help="Folder of the run: checkpoint, metrics, text, and the finished model.")],
    resume: Annotated[bool, Option("--resume", help="Continue the run in the folder, bit for bit.")] = False,
    tokens: Annotated[int | None, Option(help="Tokens to train on, instead of the recipe's number.")] = None,
    density: Annotated[float | None, Option(help="Share of weights that stay non-zero, in (0, 1].")] = None,
    seed: Annotated[int | None, Option(help="Seed of the initial weights and of the order of the text.")] = None,
    threads: Annotated[int | None, Option(min=1, help="CPU threads; the same number gives the same bits.")] = None,
    device: Annotated[str, Option(help="Where to train: cpu or cuda.")] = "cpu",
    text: Annotated[Path | None, Option(help="Train on the UTF-8 files below this folder, up to 1 MB each.")] = None,
    pattern: Annotated[str, Option(help="With --text: which files, by name.")] = "*",
    as_json: AsJson = False,
) -> None:
    """Train the model of a RECIPE, on the Python sources of this machine or on the files of a folder.

    Ctrl-C stops after the current step and keeps a checkpoint of it. Options given when a run began need not be
    repeated with --resume.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    run = _requested_run(recipe, out, resume, tokens, density, seed)
    _use_device(run, device)
    claim_folder(out, run, resume=resume)
    if run.model.tokenizer_name is None:
        raise CheckpointError(f"the recipe {run.name!r} names no tokenizer, and text cannot be read without one.")
    tokenizer = bundled_tokenizer(run.model.tokenizer_name)
    reading = _reading(out, text, pattern, tokenizer, run)
    command = _command_line(recipe, out, run, text, pattern)
    record, stopped = None, False
    with _stop_signals() as asked:
        for record in train_model(run, reading, out, resume=resume, tokenizer=tokenizer, command=command):
            if asked and record.step < run.n_steps:
                stopped = True
                break
    if stopped:
        assert record is not None
        print(f"stopped after step {record.step} of {run.n_steps}; --resume continues it.", file=sys.stderr)
        raise typer.Exit(FAILED)
    _say_trained(out, run, record, as_json)


def _say_trained(out: Path, run: RunConfig, record: StepRecord | None, as_json: bool) -> None:
    """The result of a finished run, also if it had finished before."""
    card = json.loads((out / MODEL / "card.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "model": str(out / MODEL),
        "n_steps": run.n_steps,
        "n_tokens": card["n_tokens"],
        "validation_loss_nats": card["validation"]["loss_nats"],
        "bigram_loss_nats": card["validation"]["bigram_loss_nats"],
        "n_nonzero": card["parameters"]["n_nonzero"],
        "weights_sha256": weights_sha256(zoo.load(out / MODEL)),
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    if record is None:
        print(f"{out}: the run had finished.", file=sys.stderr)
    beside = "" if result["bigram_loss_nats"] is None else f" (bigram table alone: {result['bigram_loss_nats']:.3f})"
    print(f"{result['model']}: {result['n_tokens']:,} tokens, {result['validation_loss_nats']:.3f} nats{beside}")


def _requested_run(
    recipe: str, out: Path, resume: bool, tokens: int | None, density: float | None, seed: int | None
) -> RunConfig:
    """The recipe, or with `resume` the run in `out`, changed as the options ask."""
    run = recipes.recipe(recipe)
    if resume:
        run = stored_run(out)
        if run.name != recipe:
            raise CheckpointError(f"{out} holds a run of {run.name!r}, not of {recipe!r}; name the recipe that it is.")
    if tokens is not None:
        run = replace(run, n_tokens=tokens)
    if density is not None:
        run = replace(run, model=replace_model(run.model, density=density))
    if seed is not None:
        run = replace(run, seed=seed, model=replace_model(run.model, seed=seed))
    return run


def _use_device(run: RunConfig, device: str) -> None:
    """Put the model where the user asked, if that is there."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}; choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda, and torch finds no GPU here; leave the option out.")
    run.model.device = device


def _reading(out: Path, text: Path | None, pattern: str, tokenizer: Any, run: RunConfig) -> TrainingText:
    """What the run reads: what it began with, else what the options name."""
    cache = out / TEXT
    began_with = source_of(cache)
    if text is None and began_with.get("kind") == "folder":
        text, pattern = Path(began_with["folder"]), began_with["pattern"]
    if text is not None:
        return folder_text(text, tokenizer, run, cache, pattern=pattern)
    return python_text(tokenizer, run, cache)


def _command_line(recipe: str, out: Path, run: RunConfig, text: Path | None, pattern: str) -> str:
    """The line that makes this model again, for its card."""
    given, own = run, recipes.recipe(recipe)
    line = f"sparse-interp train {recipe} --out {out.name}"
    line += f" --tokens {given.n_tokens}" * (given.n_tokens != own.n_tokens)
    line += f" --density {given.model.density}" * (given.model.density != own.model.density)
    line += f" --seed {given.seed}" * (given.seed != own.seed)
    line += f" --threads {torch.get_num_threads()}"
    return line if text is None else f"{line} --text {text.name} --pattern '{pattern}'"


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for reuse, on Linux with glibc.

    By default it gives blocks of more than 32 MB back to the kernel at once and gets them again, page by page, at the
    next step; a training step allocates several such (its logits alone are batch * n_ctx * d_vocab * 4 bytes). Kept, a
    copy of 64 MB takes 3 ms instead of 28.
    """
    if sys.platform != "linux":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    with suppress(OSError, AttributeError):  # another C library: nothing to tune
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Inside the block the first Ctrl-C or SIGTERM is only noted, in the list; the second one interrupts."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _remarks() -> Iterator[None]:
    """Warnings as one line each, without the line of code that they came from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


if __name__ == "__main__":
    main()
