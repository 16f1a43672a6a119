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
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from typer import Argument, Option

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import ENCODERS, BridgeConfig
from sparse_interp.bridges.evaluation import evaluate as evaluate_bridge
from sparse_interp.bridges.training import BRIDGE, PAIR_LOSSES, bridge_steps, stored_config
from sparse_interp.circuit.describe import Description, describe, token_wires
from sparse_interp.circuit.drives import token_text
from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.find_edges import find_edges
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.knock_outs import knock_outs
from sparse_interp.circuit.payload import read_means, read_payload
from sparse_interp.circuit.readings import read_heads
from sparse_interp.circuit.released import (
    FORMS,
    ReplayTable,
    answers_of_classes,
    likely_answers,
    released_circuit,
    replay,
)
from sparse_interp.circuit.released_page import released_page
from sparse_interp.circuit.search import search_circuits
from sparse_interp.circuit.showing import page
from sparse_interp.errors import CheckpointError, CircuitError, ConfigError, SparseInterpError, TokenizerError
from sparse_interp.faithfulness.adversarial import AdversarialTable, adversarial_inputs
from sparse_interp.faithfulness.audit import audit as audit_circuit
from sparse_interp.faithfulness.audit_table import AuditTable
from sparse_interp.faithfulness.board import board_cells, run_board
from sparse_interp.faithfulness.rivals import rivals as find_rivals
from sparse_interp.faithfulness.rows import LEVELS
from sparse_interp.figures import recovery_board
from sparse_interp.gallery import (
    FIGURES,
    RESULTS,
    STEPS,
    draw_figures,
    last_time,
    make_tables,
    steps_of,
    write_page,
)
from sparse_interp.gallery import chosen as chosen_figures
from sparse_interp.interventions.attribution import METHODS, attribute_nodes
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.node_effects import PatchingTable
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.interventions.sweeps import BUDGET_BYTES, patch_nodes
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import MEANS, bundled_tokenizer, weights_sha256
from sparse_interp.model.load_report import LoadReport
from sparse_interp.model.sites import NODE_SITES, NodeValues
from sparse_interp.model.transformer import HookedSparseTransformer, load
from sparse_interp.report import report
from sparse_interp.results import Table, save_figure, write_whole
from sparse_interp.tasks.library import load_task
from sparse_interp.tasks.library import tasks as task_table
from sparse_interp.tasks.survey import score_tasks
from sparse_interp.tasks.task import Task
from sparse_interp.tokenizer import blocks as blocks_of
from sparse_interp.training import recipes
from sparse_interp.training.checkpoints import CHECKPOINT, METRICS, refuse_occupied
from sparse_interp.training.loop import MODEL, StepRecord, claim_folder, set_bigram_table_, stored_run
from sparse_interp.training.loop import train as train_model
from sparse_interp.training.recipes import RunConfig, replace_model
from sparse_interp.training.text import TrainingText, folder_text, python_text, source_of
from sparse_interp.viewer.content import CircuitPage

DONE, FAILED, REFUSED = 0, 1, 2
TEXT = "text"

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

CIRCUIT = "circuit.json"

EXPORTS = {"graphml": ".graphml", "json": ".graph.json", "dot": ".dot", "mib": ".mib.json"}
"""Formats of other tools, and how files in them end."""

PUBLISHED_MEANS = "mean_baseline_pretrain.pt"

BRIDGE_BLOCKS = 64
"""Held-out blocks, about so many, that a bridge is measured on."""

CONTEXT_BLOCKS = 100
"""Blocks of held-out text that the contexts on a page are chosen from."""

Threads = Annotated[int | None, Option(min=1, help="CPU threads; the same number gives the same bits.")]
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
def models(
    inspect: Annotated[
        str | None,
        Option(metavar="NAME_OR_PATH", help="Load this model, fetched if need be, and say what its files held."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that can be loaded by name, bundled and published; or with --inspect look into one of them.

    Of the listed ones: where they are, their shape, non-zero parameters and loss on held-out text, as far as known. Of
    the one: what was read, taken for granted, ignored and folded, and how many entries of each tensor are not zero.
    """
    table = zoo.models() if inspect is None else load(inspect).load_report
    assert table is not None
    if not as_json:
        print(table)
        return
    rows = json.loads(table.frame.to_json(orient="records"))
    print(json.dumps(rows if inspect is None else _remarks_of(table) | {"tensors": rows}, indent=1))


def _remarks_of(report: LoadReport) -> dict[str, Any]:
    """What a load report says besides its rows."""
    said = {field.name: getattr(report, field.name) for field in fields(report) if field.name != "frame"}
    counts = {"n_entries": report.n_entries, "n_nonzero": report.n_nonzero}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in said.items()} | counts


@app.command()
def tasks(
    model: Annotated[str | None, Option(help="Put them to this model: a bundled one's name, or a folder.")] = None,
    task: Annotated[list[str] | None, Option(help="Only this task; may be given again.")] = None,
    prompts: Annotated[int, Option(help="Prompts per task and split.")] = 128,
    seed: Annotated[int, Option(help="Seed of prompts and intervals.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks, or with --model say which of them a model does: look here before looking for circuits."""
    if model is None:
        table: Table = task_table()
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        drawn = torch.Generator().manual_seed(seed)
        table = score_tasks(load(model), task or None, n_prompts=prompts, generator=drawn, progress=True)
    print(table.frame.to_json(orient="records", indent=1) if as_json else table)


@app.command()
def train(
    recipe: Annotated[str, Argument(help=f"One of {', '.join(recipes.RECIPES)}.")],
    out: Annotated[Path, Option(help="Folder of the run: checkpoint, metrics, text, and the finished model.")],
    resume: Annotated[bool, Option("--resume", help="Continue the run in the folder, bit for bit.")] = False,
    tokens: Annotated[int | None, Option(help="Tokens to train on, instead of the recipe's number.")] = None,
    density: Annotated[float | None, Option(help="Share of weights that stay non-zero, in (0, 1].")] = None,
    seed: Annotated[int | None, Option(help="Seed of the initial weights and of the order of the text.")] = None,
    threads: Threads = None,
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
    if run.model.tokenizer_name is None:
        raise CheckpointError(f"the recipe {run.name!r} names no tokenizer, and text cannot be read without one.")
    tokenizer = bundled_tokenizer(run.model.tokenizer_name)
    if text is not None and not text.is_dir():
        raise CheckpointError(f"--text {text} is not a folder that can be read; name one that holds text files.")
    claim_folder(out, run, resume=resume)
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
        "weights_sha256": weights_sha256(load(out / MODEL)),
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


@app.command()
def bridge(
    sparse: Annotated[str, Argument(help="The sparse model: a bundled one's name or a folder; or a recipe.")],
    dense: Annotated[str, Argument(help="The dense model that it is tied to: a bundled one's name, or a folder.")],
    out: Annotated[Path, Option(help="Folder of the run: checkpoint, metrics, text, and the finished bridge.")],
    scratch: Annotated[
        bool, Option("--scratch", help="Train the model of the recipe SPARSE from scratch, and its bridge with it.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Continue the run in the folder, bit for bit.")] = False,
    steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, Option(help="Blocks of text per step.")] = None,
    encoder: Annotated[str | None, Option(help=f"What cuts encoded streams: {' or '.join(ENCODERS)}.")] = None,
    afrac: Annotated[float | None, Option(help="Share of a stream's channels that the encoder keeps.")] = None,
    entries: Annotated[int | None, Option(help="Pairs of sites at which a step enters the models.")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate of the bridge.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the order of the text and of the sites entered.")] = None,
    threads: Threads = None,
    text: Annotated[Path | None, Option(help="Train on the UTF-8 files below this folder, up to 1 MB each.")] = None,
    pattern: Annotated[str, Option(help="With --text: which files, by name.")] = "*",
    evaluate: Annotated[bool, Option("--evaluate", help="Measure the bridge beside its controls, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a bridge between a SPARSE and a DENSE model, on the Python sources of this machine or a folder's files.

    Both models stay as they are, unless --scratch trains the sparse one too. Ctrl-C stops after the current step and
    keeps a checkpoint of it. Options given when a run began need not be repeated with --resume.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    asked = {"n_steps": steps, "batch_size": batch, "encoder": encoder, "afrac": afrac, "entries_per_step": entries,
             "lr": lr, "seed": seed}  # fmt: skip
    config = replace(
        stored_config(out) if resume else BridgeConfig(), **{k: v for k, v in asked.items() if v is not None}
    )
    if not resume:
        refuse_occupied(out, (CHECKPOINT, METRICS, BRIDGE, MODEL))
    run = recipes.recipe(sparse) if scratch else None
    if run is None:
        network = load(sparse)
    else:
        network = HookedSparseTransformer(run.model, bundled_tokenizer(run.model.tokenizer_name or "none"))
    target, cfg = load(dense), network.cfg
    if network.tokenizer is None:
        raise TokenizerError(f"{sparse} has no tokenizer, and text cannot be read without one.")
    Bridge.between(network, target, config)
    _claim(out)
    asked_of = run or RunConfig(name=sparse, model=cfg, n_tokens=10**9)
    reading = _reading(out, text, pattern, network.tokenizer, asked_of)
    if run is not None:
        set_bigram_table_(network, reading)
    n_ctx = min(cfg.n_ctx, target.cfg.n_ctx)
    blocks, held_out = blocks_of(reading.stream, n_ctx, reading.bos), _some(reading.validation[:, :n_ctx])
    records = bridge_steps(network, target, blocks, config, run=run, validation=held_out, folder=out, resume=resume)
    with _stop_signals() as stopping:
        for record in records:
            if stopping and record.step < config.n_steps:
                records.close()
                print(f"stopped after step {record.step} of {config.n_steps}; --resume continues it.", file=sys.stderr)
                raise typer.Exit(FAILED)
    _say_bridged(out / BRIDGE, as_json)
    if evaluate:
        if run is not None:
            network = load(out / MODEL)
        drawn = torch.Generator().manual_seed(config.seed)
        found = Bridge.load(out / BRIDGE, network, target)
        table = evaluate_bridge(found, network, target, held_out, fit_blocks=_some(blocks), generator=drawn)
        table.save(out / "evaluation.csv")


def _some(blocks: torch.Tensor) -> torch.Tensor:
    """A few blocks, taken at even distances."""
    return blocks[:: max(1, len(blocks) // BRIDGE_BLOCKS)]


def _say_bridged(folder: Path, as_json: bool) -> None:
    """How well a finished bridge fits, from its card."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"bridge": str(folder)} | card, indent=1))
        return
    rows = [{"pair": pair} | losses for pair, losses in card["held_out_by_pair"].items()]
    print(f"{folder}: NMSE of encoded and decoded streams, KL of models entered (nats per token), changes not carried")
    print(Table(pd.DataFrame(rows, columns=["pair", *PAIR_LOSSES])))


@app.command()
def find(
    model: Annotated[str, Argument(help="A bundled model's name, or a model's folder.")],
    task: Annotated[str, Argument(help="A task's name.")],
    out: Annotated[Path, Option(help="Folder for the circuit: circuit.json, its tensors, nodes.csv, edges.csv.")],
    objective: Annotated[str, Option(help="agreement with the model, or the paper's task_loss.")] = "agreement",
    steps: Annotated[int, Option(help="Optimizer steps on gates.")] = PruneConfig.n_steps,
    price: Annotated[float, Option(help="Price of one open gate at the start, nats.")] = PruneConfig.k_coef,
    max_kl: Annotated[
        float, Option(help="Largest KL(model || circuit) on the selection pairs, nats.")
    ] = PruneConfig.max_kl,
    trials: Annotated[
        int | None, Option(help="Search settings too, this many; the same command goes on after an interruption.")
    ] = None,
    calibrate: Annotated[bool, Option("--calibrate", help="Report losses with scaled logits too.")] = False,
    edges: Annotated[bool, Option("--edges", help="Prune the weights themselves, and not the nodes.")] = False,
    seed: Annotated[int, Option(help="Seed of the search.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest circuit of MODEL for TASK that the search can find; audit it next."""
    config = PruneConfig(objective=objective, n_steps=steps, k_coef=price, max_kl=max_kl, calibrate=calibrate)
    if edges and trials is not None:
        raise ConfigError("--trials searches settings for nodes, and --edges prunes weights; give one of the two.")
    network, prompts = _model_and_task(model, task, threads)
    _claim(out)
    result: dict[str, Any] = {"circuit": str(out / CIRCUIT)}
    if trials is None:
        circuit = _found(network, prompts, model, config, seed, edges=edges)
    else:
        kept = {"baseline": _baseline(network, model), "generator": torch.Generator().manual_seed(seed)}
        search = search_circuits(network, prompts, config, n_trials=trials, folder=out / "trials", **kept)
        circuit = search.circuit
        search.save(out / "trials.csv")
        search.size_at_budget.save(out / "size_at_budget.csv")
        result |= {"n_trials": len(search), "budget": search.summary}
    circuit.save(out / CIRCUIT)
    circuit.save_tables(out)
    result |= {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges}
    result |= {row.measure: row.value for row in circuit.scores.itertuples()}
    said = [str(circuit), *([result["budget"]] if trials else []), circuit.scores.to_string(index=False)]
    print(json.dumps(result, indent=1) if as_json else "\n".join(said))


@app.command()
def rivals(
    model: Annotated[str, Option(help="A bundled model's name, or a model's folder.")],
    task: Annotated[str, Option(help="A task's name.")],
    out: Annotated[Path, Option(help="Folder for every circuit, and rivals, pairs, nodes and edges as CSV and PNG.")],
    seeds: Annotated[int, Option(help="How many searches.")] = 8,
    steps: Annotated[int, Option(help="Optimizer steps on gates.")] = PruneConfig.n_steps,
    max_kl: Annotated[
        float, Option(help="Largest KL(model || circuit), nats; also how far equal circuits may be apart.")
    ] = PruneConfig.max_kl,
    prompts: Annotated[int, Option(help="Held-out pairs that circuits are compared on.")] = 256,
    seed: Annotated[int, Option(help="Seed of the prompts and of the first search.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Search a model for the circuit of a task from many seeds, and say what the circuits have in common.

    The same command goes on after an interruption: circuits that are in the folder are not searched for again.
    """
    network, its_task = _model_and_task(model, task, threads)
    _claim(out)
    kept = {"baseline": _baseline(network, model), "generator": torch.Generator().manual_seed(seed)}
    config = PruneConfig(n_steps=steps, max_kl=max_kl)
    found = find_rivals(network, its_task, config, n_seeds=seeds, n_pairs=prompts, folder=out, **kept)
    for name, table in {"rivals": found, "pairs": found.pairs, "nodes": found.nodes, "edges": found.edges}.items():
        table.save(out / f"{name}.csv")
    save_figure(found.plot(), out / "rivals.png")
    counts = {"n_core": len(found.core), "n_periphery": len(found.periphery)}
    counts |= {"n_distinct": found.n_distinct, "n_behaviours": found.n_behaviours, "n_equal": found.n_equal}
    rows = {
        name: json.loads(t.frame.to_json(orient="records"))
        for name, t in {"rivals": found, "pairs": found.pairs}.items()
    }
    print(json.dumps(counts | rows, indent=1) if as_json else f"{found}\n{found.summary}")


@app.command()
def patch(
    model: Annotated[str, Option(help="A bundled model's name, or a model's folder.")],
    task: Annotated[str, Option(help="A task's name.")],
    out: Annotated[
        Path, Option(help="Folder for nodes.csv and nodes.png; with --estimate for estimate.* and ranks.csv too.")
    ],
    sites: Annotated[str, Option(help=f"Sites whose nodes are patched, by commas, of {', '.join(NODE_SITES)}.")] = "",
    positions: Annotated[
        str, Option(help="each, or positions by commas, negative from the end; else all at once.")
    ] = "",
    noising: Annotated[
        bool, Option("--noising", help="Corrupt values in the clean run, not clean in the corrupt.")
    ] = False,
    estimate: Annotated[str | None, Option(help=f"Estimate too, and compare: {', '.join(METHODS)}.")] = None,
    prompts: Annotated[int, Option(help="Pairs of prompts, of the test split.")] = 64,
    budget: Annotated[int, Option(help="Memory for the sweep besides the model, MB.")] = BUDGET_BYTES // 10**6,
    seed: Annotated[int, Option(help="Seed of the prompts.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Patch every node of a model alone, exactly, and say what that does to the logit difference of a task."""
    network, its_task = _model_and_task(model, task, threads)
    batch = its_task.batch(prompts, split="test", generator=torch.Generator().manual_seed(seed))
    asked = {
        "sites": tuple(sites.split(",")) if sites else NODE_SITES,
        "positions": _positions(positions),
        "direction": "noising" if noising else "denoising",
    }
    _claim(out)
    tables: dict[str, Table] = {}
    if estimate is not None:
        tables["estimate"] = attribute_nodes(network, batch, method=estimate, **asked)
    exact = tables["nodes"] = patch_nodes(network, batch, budget_bytes=budget * 10**6, **asked)
    if isinstance(estimated := tables.get("estimate"), PatchingTable):
        tables["ranks"] = exact.rank_correlation(estimated)
    for name, table in tables.items():
        table.save(out / f"{name}.csv")
        if isinstance(table, PatchingTable):
            save_figure(table.plot(), out / f"{name}.png")
    strongest = Table(exact.frame.sort_values("effect", key=abs, ascending=False, kind="stable").head(20))
    shown = {"strongest": strongest} | {name: table for name, table in tables.items() if name == "ranks"}
    if as_json:
        rows = {name: json.loads(table.frame.to_json(orient="records")) for name, table in shown.items()}
        print(json.dumps({"table": str(out / "nodes.csv"), "n_rows": len(exact)} | rows, indent=1))
    else:
        print("\n\n".join([f"{out / 'nodes.csv'}: {len(exact):,} rows; the strongest:", *map(str, shown.values())]))


def _positions(text: str) -> str | list[int] | None:
    """What `patch_nodes` takes, from what the user typed."""
    if text in ("", "each"):
        return text or None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--positions {text}: expected each, or whole numbers separated by commas.") from error


@app.command()
def audit(
    circuit: Annotated[Path, Argument(help="A circuit file, as `find` writes it.")],
    model: Annotated[str | None, Option(help="The model, if not the one that the file names.")] = None,
    level: Annotated[str, Option(help=f"{' or '.join(LEVELS)}; full searches again, for nonsense too.")] = "quick",
    cache: Annotated[
        Path | None, Option(help="With full: folder where searches are kept as they end; beside the circuit if none.")
    ] = None,
    config: Annotated[
        Path | None, Option(help="With full: how to search, as JSON of PruneConfig's fields, if the circuit says not.")
    ] = None,
    rivals: Annotated[int, Option(help="With full: searches from other seeds.")] = 2,
    seed: Annotated[int, Option(help="Seed of prompts, random circuits and intervals.")] = 1,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure CIRCUIT beside its model and controls; writes audit.csv and audit.json beside it.

    The same command goes on after an interruption: searches for controls that had ended are not made again.
    """
    settings = None if config is None else prune_config(config)
    found, network, prompts, _ = _with_its_model(circuit, model, threads)
    folder = (circuit.parent / "controls" if cache is None else cache) if level != "quick" else None
    how = {"level": level, "config": settings, "n_rivals": rivals, "folder": folder}
    table = audit_circuit(network, found, prompts, **how, generator=torch.Generator().manual_seed(seed))
    table.save(circuit.parent / "audit.csv")
    table.to_json(circuit.parent / "audit.json")
    written = (circuit.parent / "audit.json").read_text(encoding="utf-8")
    print(written if as_json else f"{table.headline}\n{table}\n{table.verdict}")


def prune_config(path: Path) -> PruneConfig:
    """The settings of a search from a JSON object of its fields.

    Raises:
        ConfigError: if the file is no such object, naming what is wrong.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return PruneConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} holds no settings of a search ({error}); expected PruneConfig's fields.") from error


@app.command()
def show(
    circuit: Annotated[Path, Argument(help="A circuit file; an audit.json beside it is shown too.")],
    model: Annotated[str | None, Option(help="The model, if not the one that the file names.")] = None,
    compare: Annotated[Path | None, Option(help="Another circuit file, shown beside it in a tab of its own.")] = None,
    seed: Annotated[int, Option(help="Seed of the prompts that contexts are taken from.")] = 2,
    threads: Threads = None,
) -> None:
    """Draw CIRCUIT: writes circuit.html, one self-contained page, and circuit.png beside it."""
    other = None if compare is None else _page_of(compare)
    found, network, prompts, name = _with_its_model(circuit, model, threads)
    table = _audit_beside(circuit, found)
    _draw(found, network, prompts, name, table, circuit.parent, seed, other)
    print(circuit.parent / "circuit.html")


@app.command("describe")
def describe_circuit(
    circuit: Annotated[Path, Argument(help="A circuit file, as `find` writes it.")],
    model: Annotated[str | None, Option(help="The model, if not the one that the file names.")] = None,
    seed: Annotated[int, Option(help="Seed of prompts, inserted tokens and intervals.")] = 3,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say what the nodes and heads of CIRCUIT do, and try prompts on which its model should then fail.

    Writes sentences.csv, heads.csv and adversarial.csv beside it.
    """
    found, network, prompts, name = _with_its_model(circuit, model, threads)
    blocks = zoo.validation_blocks(name)[:CONTEXT_BLOCKS]
    batch = prompts.batch(64, split="train", generator=torch.Generator().manual_seed(seed))
    known = describe(found, network, blocks, batch, progress=True)
    table = _tried(found, network, prompts, circuit.parent, seed)
    known.sentences.save(circuit.parent / "sentences.csv")
    assert table.reading is not None
    if as_json:
        parts = {"heads": table.reading.heads, "nodes": known.sentences, "adversarial": table}
        print(
            json.dumps({key: json.loads(part.frame.to_json(orient="records")) for key, part in parts.items()}, indent=1)
        )
        return
    print("\n".join([*table.reading.heads.frame.sentence, "", *known.sentences.frame.sentence, "", table.summary]))


@app.command()
def export(
    circuit: Annotated[Path, Argument(help="A circuit file, as `find` writes it.")],
    form: Annotated[str, Option("--format", help=f"{', '.join(EXPORTS)}; json is node-link, mib what EAP-IG reads.")],
    out: Annotated[Path | None, Option(help="File to write; beside the circuit if none is named.")] = None,
) -> None:
    """Write CIRCUIT for another tool; no model is needed."""
    if form not in EXPORTS:
        raise CircuitError(f"--format {form}; choose one of {', '.join(EXPORTS)}.")
    found = Circuit.load(circuit)
    out = circuit.with_suffix(EXPORTS[form]) if out is None else out
    if form == "dot":
        write_whole(out, found.to_dot())
    else:
        {"graphml": found.to_graphml, "json": found.to_node_link, "mib": found.to_mib}[form](out)
    print(out)


@app.command()
def released(
    model: Annotated[str, Argument(help="A released model, such as openai/csp_yolo2, or its folder.")],
    task: Annotated[str, Argument(help="The task as the release calls it, such as bracket_counting_beeg.")],
    sweep: Annotated[str, Option(help="The pruning sweep that the circuit is from.")] = "prune_v4",
    k: Annotated[str, Option(help="Its number of nodes, or k_optim.")] = "k_optim",
    payload: Annotated[Path | None, Option(help="A viz_data.pt to read instead of fetching one.")] = None,
    means: Annotated[Path | None, Option(help="A mean_baseline_pretrain.pt to read instead of fetching one.")] = None,
    answers: Annotated[
        tuple[int, int] | None, Option(help="Right token ids after either class of prompts; else the model's own.")
    ] = None,
    form: Annotated[str, Option(help=f"How the task's loss is defined: {' or '.join(FORMS)}.")] = FORMS[0],
    tolerance: Annotated[float | None, Option(help="Exit with 1 if a loss differs by more, in nats.")] = None,
    out: Annotated[Path | None, Option(help="Folder for circuit.json, its page, figure and the whole table.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a released circuit, and show its losses beside those that were published with it.

    The payload states a loss for the model, for the circuit, and for the circuit without each node; and what every node
    holds on 32 prompts. All of it is measured again, in nats per prompt: stored losses are halved.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if out is not None:
        _claim(out)
    files = _released_files(model, task, sweep, k, payload, means)
    published, baseline = read_payload(files[0]), read_means(files[1])
    network = load(model)
    circuit = released_circuit(network, published, baseline, task_name=task)
    rows = None
    if published.samples is not None:
        rows = (
            answers_of_classes(published.samples, *answers) if answers else likely_answers(network, published.samples)
        )
    table = replay(network, circuit, published, answers=rows, form=form)
    _say_replayed(circuit, [*published.notes, *baseline.notes], rows, table, as_json)
    if out is not None:
        circuit.save(out / CIRCUIT)
        table.save(out / "replay.csv")
        circuit.to_html(out / "circuit.html", released_page(circuit, published, token_text(network), rows))
        save_figure(circuit.plot(), out / "circuit.png")
    if tolerance is not None and not table.largest("nats") <= tolerance:
        raise typer.Exit(FAILED)


def _released_files(
    model: str, task: str, sweep: str, k: str, payload: Path | None, means: Path | None
) -> tuple[Path, Path]:
    """Payload and means: those that were named, or lie beside each other as they are published, or are fetched."""
    if payload is None:
        payload, found = zoo.released_circuit_files(model, task, sweep, k)
    else:
        beside = (folder / PUBLISHED_MEANS for folder in list(payload.absolute().parents)[:4])
        found = next((path for path in beside if path.is_file()), None)
    if means is None and found is None:
        raise CircuitError(
            f"there is no {PUBLISHED_MEANS} for the circuits of {model}, and nothing else says what the rest is held "
            "at; name one with --means, or make means of your own text in Python (docs/released_circuits.md)."
        )
    return payload, means or found


def _say_replayed(
    circuit: Circuit, notes: list[str], answers: torch.Tensor | None, table: ReplayTable, as_json: bool
) -> None:
    classes = [] if answers is None else [int(answers[0]), int(answers[-1])]
    if as_json:
        shown = {name: json.loads(part.frame.to_json(orient="records")) for name, part in
                 {"summary": table.summary(), "rows": table}.items()}  # fmt: skip
        result = {"n_nodes": circuit.n_nodes, "n_edges": circuit.n_edges, "answers": classes, "notes": notes, **shown}
        print(json.dumps(result, indent=1))
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{circuit}\nanswers: tokens {classes[0]} and {classes[1]}\n{table.summary()}")


@app.command("demo")
def demo_run(
    out: Annotated[Path, Option(help="Folder for everything that the demo leaves.")] = Path("out/demo"),
    model: Annotated[str, Option(help="The model to look into.")] = "stdlib-small",
    task: Annotated[str, Option(help="The behaviour to look for.")] = "single_double_quote",
    seed: Annotated[int, Option(help="Seed of the search; the audit takes the next one.")] = 0,
    threads: Threads = None,
) -> None:
    """Find a real circuit of a real model, audit it, draw it, and say in words what was found.

    Leaves circuit.json and its tensors, nodes.csv, edges.csv, audit.csv, audit.json, sentences.csv, heads.csv,
    adversarial.csv, circuit.html, circuit.png and report.md in the folder; what an earlier demo left there is replaced.
    """
    began = time.monotonic()
    network, prompts = _model_and_task(model, task, threads)
    _claim(out)
    circuit = _found(network, prompts, model, PruneConfig(), seed)
    table = audit_circuit(network, circuit, prompts, generator=torch.Generator().manual_seed(seed + 1))
    with _replacing(out) as folder:
        circuit.save(folder / CIRCUIT)
        circuit.save_tables(folder)
        table.save(folder / "audit.csv")
        table.to_json(folder / "audit.json")
        known = _draw(circuit, network, prompts, model, table, folder, seed + 2)
        known.sentences.save(folder / "sentences.csv")
        tried = _tried(circuit, network, prompts, folder, seed + 3)
        commands = [
            f"sparse-interp find {model} {task} --out {out} --seed {seed}",
            f"sparse-interp audit {out / CIRCUIT} --seed {seed + 1}",
            f"sparse-interp show {out / CIRCUIT} --seed {seed + 2}",
            f"sparse-interp describe {out / CIRCUIT} --seed {seed + 3}",
        ]
        drawn = torch.Generator().manual_seed(seed + 3)
        text = report(network, circuit, table, prompts, known, tried, commands=commands, generator=drawn)
        (folder / "report.md").write_text(text, encoding="utf-8")
    said = [str(circuit), table.headline, table.verdict, str(out / "report.md"), str(out / "circuit.html")]
    print("\n".join(said))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


@app.command()
def figures(
    out: Annotated[Path, Option(help="Folder for figures, their numbers and their captions.")] = Path("out/figures"),
    only: Annotated[list[str] | None, Option(help=f"One of {', '.join(FIGURES)}; may be given again.")] = None,
    results: Annotated[Path, Option(help="Folder of the tables that figures are drawn from.")] = RESULTS,
    from_scratch: Annotated[
        bool, Option("--from-scratch", help="Make the tables first, in a folder of OUT, where it goes on if stopped.")
    ] = False,
    yes: Annotated[bool, Option("--yes", help="With --from-scratch: do not ask.")] = False,
    page: Annotated[
        Path | None, Option(help="Also write a page of all that was drawn, with figures/ beside it.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Draw the published figures: as SVG, PDF and PNG, each with its numbers as CSV and its caption.

    The same tables give the same bytes. A figure whose tables are missing or broken is left out, with the command that
    makes them, and the exit code is then 1.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    names = chosen_figures(only or ())
    _claim(out)
    if from_scratch:
        results = _made_tables(names, results, out / "scratch", yes)
    outcomes = []
    for outcome in draw_figures(names, results, out):
        outcomes.append(outcome)
        if outcome.caption is None:
            print(f"sparse-interp: {outcome.name} is left out: {outcome.reason}", file=sys.stderr)
        else:
            print(out / f"{outcome.name}.svg")
    drawn = [outcome for outcome in outcomes if outcome.caption is not None]
    if page is not None:
        write_page(drawn, out, page)
        print(page)
    if len(drawn) < len(outcomes):
        raise typer.Exit(FAILED)


def _made_tables(names: list[str], results: Path, work: Path, yes: bool) -> Path:
    """Run what makes the tables, once the user has seen how long it took before; the folder that they are in."""
    steps = steps_of(names)
    for step in steps:
        took = last_time(step, results)
        said = "not known" if took is None else f"{took / 60:.0f} minutes of processor time"
        print(f"{' '.join(STEPS[step].command)}\n    the last time: {said}", file=sys.stderr)
    if steps and not yes:
        typer.confirm(f"Run {len(steps)} commands, in {work}?", abort=True, err=True)
    for step in make_tables(steps, results.parent, work):
        print(f"== {step}", file=sys.stderr)
    return work / "results"


@app.command()
def groundtruth(
    board: Annotated[str, Option(help="default, which takes under half an hour on two cores, or full.")] = "default",
    method: Annotated[list[str] | None, Option(help="Only this way of finding circuits; may be given again.")] = None,
    case: Annotated[list[str] | None, Option(help="Only this model; may be given again.")] = None,
    out: Annotated[Path, Option(help="Folder for board.csv, board.png and the finished cells.")] = Path(
        "out/groundtruth"
    ),
    seeds: Annotated[int | None, Option(help="Seeds of each cell; else 1, on the full board 3.")] = None,
    processes: Annotated[int, Option(help="Cells that run at once, on one thread each.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Look for circuits that are known, in every way there is, and say how much of them each way finds.

    The same command goes on after an interruption: a cell that is finished is not run again.
    """
    cells = {"chosen_methods": method or (), "chosen_cases": case or (), "n_seeds": seeds}
    board_cells(board, *cells.values())
    _claim(out)
    torch.set_num_threads(1)
    table = run_board(out / "cells", board, n_processes=processes, **cells)
    table.save(out / "board.csv")
    frame, ax, _ = recovery_board(table)
    Table(frame).save(out / "methods.csv")
    save_figure(ax, out / "board.png")
    if as_json:
        print(frame.to_json(orient="records", indent=1))
        return
    print(f"{table.summary('kind', 'method')}\n\n{Table(frame)}\n{out / 'board.csv'}\n{out / 'board.png'}")


def _model_and_task(model: str, task: str, threads: int | None) -> tuple[HookedSparseTransformer, Task]:
    """Both, or an error before any work."""
    if threads is not None:
        torch.set_num_threads(threads)
    network = load(model)
    if network.tokenizer is None:
        raise TokenizerError(f"{model} has no tokenizer, and prompts cannot be written without one.")
    prompts = load_task(task, network.tokenizer)
    prompts.check_fits(network.cfg.n_ctx)
    return network, prompts


def _with_its_model(
    path: Path, model: str | None, threads: int | None
) -> tuple[Circuit, HookedSparseTransformer, Task, str]:
    """A circuit from its file, with the model and the task that the file names."""
    circuit = Circuit.load(path)
    if circuit.task_name is None:
        raise CircuitError(f"{path} names no task, so there are no prompts to run it on.")
    name = model or circuit.model_name
    try:
        network, prompts = _model_and_task(name, circuit.task_name, threads)
        circuit.check_origin(network, prompts)
    except (ConfigError, CircuitError) as error:
        if model is not None:
            raise
        raise CircuitError(f"{error} If the model is in a folder of yours, name it with --model.") from error
    return circuit, network, prompts, name


def _found(
    network: HookedSparseTransformer, prompts: Task, model: str, config: PruneConfig, seed: int, *, edges: bool = False
) -> Circuit:
    kept = {"baseline": _baseline(network, model), "generator": torch.Generator().manual_seed(seed)}
    if edges:
        return find_edges(network, None, prompts, config, **kept)
    return find_circuit(network, prompts, config, **kept)


def _baseline(network: HookedSparseTransformer, model: str) -> NodeValues:
    """The means kept beside the model; for one that was trained here, means over its held-out text."""
    if (zoo.model_folder(model) / MEANS).exists():
        return zoo.baseline_means(model)
    return mean_activations(network, zoo.validation_blocks(model), progress=True)


def _draw(
    circuit: Circuit,
    network: HookedSparseTransformer,
    prompts: Task,
    model: str,
    table: AuditTable | None,
    folder: Path,
    seed: int,
    other: CircuitPage | None = None,
) -> Description:
    """circuit.html and circuit.png in `folder`."""
    blocks = zoo.validation_blocks(model)[:CONTEXT_BLOCKS]
    batch = prompts.batch(64, split="train", generator=torch.Generator().manual_seed(seed))
    known = describe(circuit, network, blocks, batch, progress=True)
    shown = page(
        circuit,
        network,
        batch,
        known,
        None if table is None else table.on_page(),
        readings=read_heads(circuit, network, batch),
        knocked=knock_outs(circuit, network, batch, progress=True),
        other=other,
        facts=_facts(model),
    )
    circuit.to_html(folder / "circuit.html", shown)
    save_figure(circuit.plot(tokens=token_wires(network, circuit, batch)), folder / "circuit.png")
    return known


def _facts(model: str) -> dict[str, str | float]:
    """What the model's card says of its training; nothing if it has none."""
    card = zoo.model_folder(model) / "card.json"
    if not card.exists():
        return {}
    known = json.loads(card.read_text(encoding="utf-8"))
    measured = known.get("validation", {})
    facts = {"loss on held-out text, nats": measured.get("loss_nats"), "tokens trained on": known.get("n_tokens"),
             "the bigram table alone": measured.get("bigram_loss_nats"), "made by": known.get("command")}  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def _page_of(path: Path) -> CircuitPage:
    """A circuit to compare with, as its file and the audit beside it give it."""
    found = Circuit.load(path)
    audited = _audit_beside(path, found)
    title = f"{found.task_name or 'circuit'} in {found.model_name}"
    return replace(found.bare_page(), title=title, audit=None if audited is None else audited.on_page())


def _audit_beside(path: Path, circuit: Circuit) -> AuditTable | None:
    """The audit.json beside a circuit file, if there is one and it is of this circuit."""
    judged = path.parent / "audit.json"
    table = AuditTable.from_json(judged) if judged.exists() else None
    if table is None or table.is_of(circuit):
        return table
    print(f"{judged} is the audit of another circuit and is left out; audit this one.", file=sys.stderr)
    return None


def _tried(
    circuit: Circuit, network: HookedSparseTransformer, prompts: Task, folder: Path, seed: int
) -> AdversarialTable:
    """heads.csv and adversarial.csv in `folder`."""
    table = adversarial_inputs(network, circuit, prompts, generator=torch.Generator().manual_seed(seed))
    assert table.reading is not None
    table.reading.heads.save(folder / "heads.csv")
    table.save(folder / "adversarial.csv")
    return table


def _claim(out: Path) -> None:
    """Refuse a folder that cannot be written, before any long work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CircuitError(f"cannot write to {out}: {error.strerror}; choose another folder with --out.") from error


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out`; if all goes well its files take their places in `out` at the end."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            file.replace(out / file.name)


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
