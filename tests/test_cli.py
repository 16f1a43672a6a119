"""The command line says one line when it refuses, keeps standard output for results, and exits 0, 1 or 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_interp import cli
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.publishing import publish_circuit
from sparse_interp.circuit.released import RELEASED_SITES
from sparse_interp.errors import ConfigError, SparseInterpError
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, bundled_tokenizer, weights_sha256
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.publishing import publish_model
from sparse_interp.model.sites import Node
from sparse_interp.model.transformer import HookedSparseTransformer, load
from sparse_interp.tasks.library import load_task
from sparse_interp.tasks.task import TaskBatch
from sparse_interp.tokenizer import tokenizer_hash
from sparse_interp.training import recipes
from sparse_interp.training.loop import CHECKPOINT, MODEL, Trainer


@pytest.fixture
def sources(tmp_path):
    """Text to train on: 30 small files that share hardly a line."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(30):
        lines = [f"def scale_{i}_{j}(value):\n    return value * {i * 31 + j} + OFFSET_{i}[{j}]\n" for j in range(9)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A recipe of ten steps, called `quick`."""
    tiny = recipes.recipe("tiny")
    model = recipes.replace_model(tiny.model, n_layers=1, n_ctx=16, density=1.0)
    run = replace(tiny, name="quick", model=model, batch_size=2, n_tokens=320, checkpoint_every=4, validate_every=10)
    monkeypatch.setitem(recipes.RECIPES, "quick", lambda: run)
    return run


@pytest.fixture
def command(capsys):
    """`command(*arguments)`: exit code, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def test_help_lists_the_commands_and_their_first_lines(command):
    code, out, _ = command("--help")
    assert code == 0 and "List the models that can be loaded by name" in out and "Train the model of a RECIPE" in out
    code, out, _ = command("train", "--help")
    assert code == 0 and "--resume" in out and "stdlib-small" in out


def test_models_prints_a_table_or_json(command):
    code, out, _ = command("models", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == list(zoo.models().frame["name"])
    assert command("models")[0] == 0


def test_inspecting_a_model_says_what_its_files_held(command, whole_model):
    code, out, _ = command("models", "--inspect", whole_model)
    assert code == 0 and "a model in the form of sparse_interp" in out and "blocks.0.mlp.W_in" in out
    code, out, _ = command("models", "--inspect", whole_model, "--json")
    said = json.loads(out)
    report = load(whole_model).load_report
    assert code == 0 and (said["form"], said["read"]) == ("sparse_interp", dict(report.read))
    assert said["n_nonzero"] == report.n_nonzero == sum(row["n_nonzero"] for row in said["tensors"])
    assert [row["tensor"] for row in said["tensors"]] == list(report.frame["tensor"])


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("stdlib-smal", 2, "no model is called 'stdlib-smal'; the nearest are stdlib-small"),
        ("./nowhere", 2, "nowhere is no folder; name a model, or a folder that holds one."),
        ("openai/csp_yolo3", 2, "the nearest are openai/csp_yolo2"),
        ("openai/csp_yolo2", 1, "SPARSE_INTERP_OFFLINE forbids fetching it. Unset that, or copy these files"),
        ("someone/model", 1, "hf download someone/model --local-dir FOLDER"),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_one_message(command, monkeypatch, name, code, words):
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    got, out, err = command("models", "--inspect", name)
    assert (got, out) == (code, "") and words in err and err.startswith("sparse-interp: ")


def test_train_leaves_a_model_that_loads_and_says_so(command, sources, tmp_path):
    code, out, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources, "--json")
    assert code == 0, err
    said = json.loads(out)
    model = load(tmp_path / "run" / MODEL)
    assert said["weights_sha256"] == weights_sha256(model) and said["n_tokens"] == 320
    assert model.tokenizer is not None and "loss" in err and "tokens/s" in err
    assert said["bigram_loss_nats"] > 0
    code, out, err = command("train", "quick", "--out", tmp_path / "run", "--resume")
    assert code == 0 and "had finished" in err and "320 tokens" in out


def test_options_change_the_recipe_and_need_not_be_repeated_on_resume(command, sources, tmp_path):
    options = ["--tokens", 160, "--density", 0.9, "--seed", 5]
    assert command("train", "quick", "--out", tmp_path / "run", "--text", sources, *options)[0] == 0
    run = recipes.RunConfig.from_json((tmp_path / "run" / "run.json").read_text())
    assert (run.n_tokens, run.model.density, run.seed, run.model.seed) == (160, 0.9, 5, 5)
    assert command("train", "quick", "--out", tmp_path / "run", "--resume")[0] == 0
    code, _, err = command("train", "quick", "--out", tmp_path / "run", "--resume", "--seed", 6)
    assert code == 2 and "belongs to another run: seed: 5, not 6" in err
    code, _, err = command("train", "tiny", "--out", tmp_path / "run", "--resume")
    assert code == 2 and "holds a run of 'quick', not of 'tiny'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "stdlib-smal"], "no recipe is called 'stdlib-smal'; the nearest are stdlib-small"),
        (["train", "quick", "--density", "0"], "density=0.0 is not a share of weights"),
        (["train", "quick", "--tokens", "5"], "n_tokens=5 is less than one step"),
        (["train", "quick", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["train", "quick", "--device", "abacus"], "choose cpu or cuda"),
        (["train", "quick", "--text", "nowhere"], "is not a folder that can be read"),
        (["train", "quick", "--resume"], "holds no run to resume"),
        (["trian", "quick"], "No such command"),
    ],
)
def test_bad_input_is_refused_in_one_message_with_exit_code_2(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments, *(["--out", "run"] if arguments[0] == "train" else []))
    assert code == 2 and out == "" and words in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_refused_density_or_recipe_makes_no_folder(command, tmp_path):
    for arguments in (["quick", "--density", 0], ["nothing"], ["quick", "--tokens", 5]):
        command("train", *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_and_one_in_use_are_refused(command, sources, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command("train", "quick", "--out", tmp_path / "file" / "run", "--text", sources)
    assert code == 2 and "cannot write to" in err
    assert command("train", "quick", "--out", tmp_path / "run", "--text", sources)[0] == 0
    code, _, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources)
    assert code == 2 and "already holds a run" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("that is wrong."), 2, "sparse-interp: that is wrong.\n"),
        (SparseInterpError("the disk is full."), 1, "sparse-interp: the disk is full.\n"),
        (KeyError("x"), 1, "sparse-interp: unexpected KeyError: 'x'; --debug shows where it came from.\n"),
    ],
)
def test_errors_are_one_line_and_debug_gives_the_traceback(command, monkeypatch, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr(cli.zoo, "models", fail)
    assert command("models") == (code, "", words)
    for arguments in (["--debug", "models"], ["models", "--debug"]):
        got, _, err = command(*arguments)
        assert got == code and err.startswith("Traceback") and "in fail" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_keeps_its_checkpoint_and_resumes_bit_for_bit(
    command, sources, tmp_path, monkeypatch, number
):
    assert command("train", "quick", "--out", tmp_path / "whole", "--text", sources)[0] == 0
    step, before = Trainer.step, signal.getsignal(number)

    def interrupted(trainer):
        if trainer.step_done == 5:
            os.kill(os.getpid(), number)  # in the middle of step 6
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        code, out, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources)
    assert code == 1 and out == "" and "stopped after step 6 of 10; --resume continues it" in err
    assert (tmp_path / "run" / CHECKPOINT).exists() and not (tmp_path / "run" / MODEL).exists()
    assert signal.getsignal(number) == before
    assert command("train", "quick", "--out", tmp_path / "run", "--resume")[0] == 0
    assert weights_sha256(load(tmp_path / "run" / MODEL)) == weights_sha256(load(tmp_path / "whole" / MODEL))


def test_warnings_are_notes_of_one_line(command, sources, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        code, _, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources, "--density", 0.05)
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("note: density 0.05 is too low")]


def test_the_module_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparse_interp.cli", "train", "nothing", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("sparse-interp: no recipe is called")


# -- find, audit, show and demo: what they refuse, before any work and with nothing left behind ------------------------

TASK = "single_double_quote"
SHAPE = {"d_model": 8, "n_heads": 1, "d_head": 8, "n_layers": 1, "d_mlp": 8, "d_vocab": 2048, "bigram": False}


def saved(folder: Path, n_ctx: int, tokenizer: str | None = "python_2k") -> Path:
    its = None if tokenizer is None else bundled_tokenizer(tokenizer)
    model = HookedSparseTransformer(ModelConfig(**SHAPE, n_ctx=n_ctx, seed=0), its)
    return model.save(folder, means=zero_values(model), validation=torch.zeros(2, n_ctx, dtype=torch.int64))


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> Path:
    """A model of one layer that nobody trained, with its tokenizer and means."""
    return saved(tmp_path_factory.mktemp("whole") / "model", n_ctx=128)


@pytest.fixture
def model_folder(whole_model, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


@pytest.fixture
def circuit_file(whole_model, tmp_path) -> Path:
    """A circuit of two nodes of that model."""
    model = load(whole_model)
    assert model.tokenizer is not None
    task = load_task(TASK, model.tokenizer)
    circuit = Circuit.of_nodes(
        model,
        [Node(0, "mlp_read", 1), Node(0, "neuron", 2)],
        zero_values(model),
        task_name=TASK,
        task_sha256=task.templates_sha256,
        tokenizer_sha256=tokenizer_hash(model.tokenizer),
    )
    (tmp_path / "found").mkdir()
    return circuit.save(tmp_path / "found" / "circuit.json")


def test_a_task_that_does_not_fit_is_a_row_and_an_unknown_one_is_refused(command, tmp_path):
    short = saved(tmp_path / "short", n_ctx=16)
    code, out, _ = command("tasks", "--model", short, "--task", "with_as", "--prompts", 4, "--json")
    assert code == 0 and all("the context holds 16" in row["note"] for row in json.loads(out))
    code, out, err = command("tasks", "--model", short, "--task", "with_at")
    assert (code, out) == (2, "") and "'with_at'; did you mean 'with_as'" in err


def test_tasks_are_listed_and_put_to_a_model(command, whole_model):
    code, out, _ = command("tasks", "--json")
    listed = json.loads(out)
    assert code == 0 and len(listed) == 24 and listed[0]["task"] == TASK and listed[0]["description"]
    line = ["tasks", "--model", whole_model, "--task", "with_as", "--task", "tense", "--prompts", 6, "--seed", 3]
    code, out, err = command(*line, "--json")
    rows = json.loads(out)
    assert code == 0 and "2/2" in err
    assert [(row["task"], row["split"], row["n_prompts"]) for row in rows] == [
        (task, split, 6) for task in ("with_as", "tense") for split in ("train", "test", "shifted")
    ]
    assert all(row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in rows)
    code, out, _ = command(*line)
    assert code == 0 and out.count("with_as") == 3 and f"{rows[0]['loss_nats']:.3g} [" in out


@pytest.mark.parametrize(("form", "name", "says"), [
    ("graphml", "circuit.graphml", "<graphml"), ("json", "circuit.graph.json", '"directed": true'),
    ("dot", "circuit.dot", "digraph "), ("mib", "circuit.mib.json", '"input->a0.h0<q>"'),
])  # fmt: skip
def test_a_circuit_is_exported_without_its_model(command, circuit_file, tmp_path, form, name, says):
    code, out, _ = command("export", circuit_file, "--format", form)
    assert code == 0 and out.strip() == str(circuit_file.with_name(name))
    text = circuit_file.with_name(name).read_text()
    assert says in text
    assert command("export", circuit_file, "--format", form, "--out", tmp_path / "there")[0] == 0
    assert (tmp_path / "there").read_text() == text


def test_known_circuits_are_looked_for_and_what_was_found_is_drawn(command, tmp_path):
    given = ("groundtruth", "--method", "eap", "--out", tmp_path, "--processes", 1)
    code, out, _ = command(*given, "--case", "attention_copy", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["method"] == "eap" and row["edges_exact"] == 1 and 0.8 < row["edge_auc"] < 1
    assert len(pd.read_csv(tmp_path / "board.csv")) == len(pd.read_csv(tmp_path / "methods.csv")) == 1
    assert (tmp_path / "board.png").stat().st_size > 5000 and len(list((tmp_path / "cells").iterdir())) == 1
    code, out, err = command(*given, "--case", "attention_coppy", "--board", "full")
    assert code == 2 and "no case 'attention_coppy'; did you mean 'attention_copy'" in err and not out


def test_a_format_that_nobody_reads_is_refused(command, circuit_file):
    code, _, err = command("export", circuit_file, "--format", "gml")
    assert code == 2 and "--format gml; choose one of graphml, json, dot, mib." in err


def test_a_circuit_is_described_in_sentences_and_tables(command, circuit_file, whole_model):
    code, out, err = command("describe", circuit_file, "--model", whole_model)
    assert code == 0, err
    assert "Neuron 2 of layer 0 " in out and "None suggested: " in out
    code, out, _ = command("describe", circuit_file, "--model", whole_model, "--json")
    said = json.loads(out)
    assert code == 0 and [row["node"] for row in said["nodes"]] == ["L0.mlp_read.1", "L0.neuron.2"]
    assert said["heads"] == said["adversarial"] == []
    assert {"sentences.csv", "heads.csv", "adversarial.csv"} < {path.name for path in circuit_file.parent.iterdir()}


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_nan(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors["blocks.0.mlp.W_in"][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata)


def with_an_unknown_key(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["model"]["d_modle"] = 8
    (folder / CONFIG).write_text(json.dumps(config))


def with_another_tokenizer(folder: Path) -> None:
    path = folder / TOKENIZER / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["!"], vocab["?"] = vocab["?"], vocab["!"]
    path.write_text(json.dumps(spec))


def without_a_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(folder, n_ctx=128, tokenizer=None)


DAMAGES = {
    cut_short: "weights.safetensors is damaged",
    with_a_nan: "weights.safetensors is damaged: the sha256 of blocks.0.mlp.W_in is",
    with_an_unknown_key: "unknown field 'd_modle' in a model config. Did you mean 'd_model'?",
    with_another_tokenizer: "is not the one that the model was saved with",
    without_a_tokenizer: "has no tokenizer, and prompts cannot be written without one",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_refused_by_every_command_that_loads_one(
    command, model_folder, circuit_file, tmp_path, damage
):
    damage(model_folder)
    for line in (
        ["find", model_folder, TASK, "--out", tmp_path / "run"],
        ["demo", "--model", model_folder, "--out", tmp_path / "run"],
        ["audit", circuit_file, "--model", model_folder],
        ["show", circuit_file, "--model", model_folder],
    ):
        code, out, err = command(*line)
        assert (code, out) == (2, "") and DAMAGES[damage] in err, err
        assert err.count("\n") == 1 and err.startswith("sparse-interp: ")
    assert not (tmp_path / "run").exists()
    assert {path.suffix for path in circuit_file.parent.iterdir()} == {".json", ".safetensors"}


def test_unknown_models_and_tasks_are_refused_with_the_nearest_names(command, model_folder, tmp_path):
    out = tmp_path / "run"
    bundled = zoo.models().frame["name"][0]
    for line in (["find", bundled[:-1], TASK, "--out", out], ["demo", "--model", bundled[:-1], "--out", out]):
        code, said, err = command(*line)
        assert (code, said) == (2, "") and f"no model is called {bundled[:-1]!r}; the nearest are {bundled}" in err
    for line in (
        ["find", model_folder, "single_quote", "--out", out],
        ["demo", "--model", model_folder, "--task", "single_quote", "--out", out],
    ):
        code, said, err = command(*line)
        assert (code, said) == (2, "") and f"'single_quote'; did you mean '{TASK}'" in err
    assert not out.exists()


def test_prompts_longer_than_the_context_are_refused_before_anything_is_made(command, tmp_path):
    short = saved(tmp_path / "short", n_ctx=16)
    for line in (["find", short, TASK], ["demo", "--model", short]):
        code, said, err = command(*line, "--out", tmp_path / "run")
        assert (code, said) == (2, "") and "tokens, and the context holds 16; expected no more than that" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_any_search(command, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "find_circuit", lambda *_, **__: pytest.fail("searched"))
    (tmp_path / "file").write_text("as it was")
    for line in (["find", model_folder, TASK], ["demo", "--model", model_folder]):
        code, said, err = command(*line, "--out", tmp_path / "file" / "run")
        assert (code, said) == (2, "") and f"cannot write to {tmp_path / 'file' / 'run'}: " in err and "--out" in err
    assert (tmp_path / "file").read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "model"}


def test_a_circuit_that_is_missing_damaged_or_of_another_model_is_refused(command, circuit_file, tmp_path):
    other = HookedSparseTransformer(ModelConfig(**SHAPE, n_ctx=128, seed=1), bundled_tokenizer("python_2k"))
    other.save(tmp_path / "other")
    text = circuit_file.read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    shutil.copy(circuit_file.with_suffix(".safetensors"), tmp_path / "cut.safetensors")
    for verb in ("audit", "show"):
        for line, words in (
            ([tmp_path / "nowhere.json"], "nowhere.json"),
            ([tmp_path / "cut.json"], "cut.json"),
            ([circuit_file, "--model", tmp_path / "other"], "this circuit was found in"),
            ([circuit_file, "--model", "nothing"], "no model is called 'nothing'"),
        ):
            code, said, err = command(verb, *line)
            assert (code, said) == (2, "") and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--objective", "loss"], "objective='loss'; choose 'agreement' or 'task_loss'"),
        (["--steps", 0], "n_steps=0, and a search needs at least 1"),
        (["--max-kl", 0], "max_kl=0.0; it must be above 0"),
        (["--threads", 0], "Invalid value for '--threads'"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(command, model_folder, tmp_path, options, words):
    code, out, err = command("find", model_folder, TASK, "--out", tmp_path / "run", *options)
    assert (code, out) == (2, "") and words in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_the_options_of_a_search_reach_it(command, model_folder, tmp_path, monkeypatch):
    asked = []

    def searched(*given, **_):
        asked.append(given[2])
        raise ConfigError("that is enough.")

    monkeypatch.setattr(cli, "find_circuit", searched)
    options = ["--objective", "task_loss", "--steps", 7, "--price", 0.5, "--max-kl", 0.75]
    code, _, err = command("find", model_folder, TASK, "--out", tmp_path / "run", *options)
    assert (code, err) == (2, "sparse-interp: that is enough.\n")
    (config,) = asked
    assert (config.objective, config.n_steps, config.k_coef, config.max_kl) == ("task_loss", 7, 0.5, 0.75)


@pytest.fixture
def easily_content(monkeypatch):
    """Searches of few prompts that take nearly any circuit."""
    little = {"n_train": 8, "n_selection": 8, "batch_size": 4, "max_loss_gap": 9.0}
    monkeypatch.setattr(cli, "PruneConfig", partial(cli.PruneConfig, **little))
    return ["--steps", 2, "--max-kl", 9.0]


def test_settings_are_searched_and_the_same_command_goes_on(command, whole_model, tmp_path, easily_content):
    line = ["find", whole_model, TASK, "--out", tmp_path, *easily_content, "--calibrate", "--json"]
    code, out, err = command(*line, "--trials", 2)
    said = json.loads(out)
    assert code == 0 and said["n_trials"] == 2 and "budget: 2 trials" in said["budget"], err
    assert said["KL(model || calibrated circuit)"] <= said["KL(model || circuit)"]
    assert Circuit.load(tmp_path / "circuit.json").n_nodes == said["n_nodes"]
    code, out, _ = command(*line, "--trials", 3)
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert code == 0 and len(trials) == json.loads(out)["n_trials"] == 3
    assert pd.read_csv(tmp_path / "size_at_budget.csv").n_nodes.tolist() == trials.n_nodes.cummin().tolist()
    code, out, err = command(*line, "--trials", 3, "--seed", 1)
    assert (code, out) == (2, "") and "holds another search: its seed is 0, and here it is 1" in err


def test_weights_are_pruned_instead_of_nodes(command, whole_model, tmp_path, easily_content):
    line = ["find", whole_model, TASK, "--out", tmp_path, *easily_content, "--edges", "--json"]
    code, out, err = command(*line, "--trials", 2)
    assert (code, out) == (2, "") and "give one of the two" in err
    code, out, err = command(*line)
    found = Circuit.load(tmp_path / "circuit.json")
    assert code == 0 and found.edges_pruned and found.n_edges == json.loads(out)["n_edges"], err
    assert found.edges[found.edges.kind == "weight"].importance_nats.notna().all()


def test_rivals_leave_their_circuits_and_tables(command, whole_model, tmp_path, easily_content):
    line = ["rivals", "--model", whole_model, "--task", TASK, "--out", tmp_path, "--seeds", 2, "--prompts", 4]
    code, out, err = command(*line, *easily_content, "--seed", 3, "--json")
    said = json.loads(out)
    assert code == 0 and [row["seed"] for row in said["rivals"]] == [3, 4], err
    nodes = pd.read_csv(tmp_path / "nodes.csv")
    assert (nodes.n_found == 2).sum() == said["n_core"] and (nodes.n_found == 1).sum() == said["n_periphery"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "seed-3.json", "seed-3.safetensors", "seed-4.json", "seed-4.safetensors",
        "rivals.csv", "pairs.csv", "nodes.csv", "edges.csv", "rivals.png",
    }  # fmt: skip
    written = (tmp_path / "seed-4.json").stat().st_mtime_ns
    code, out, _ = command(*line, *easily_content, "--seed", 3)
    assert code == 0 and "2 searches found" in out and (tmp_path / "seed-4.json").stat().st_mtime_ns == written


# -- released circuits -------------------------------------------------------------------------------------------------

ANSWERS = ("--answers", 3, 8)


@pytest.fixture
def store(make_model, tmp_path, monkeypatch):
    """A copy of the published store with one small model and one circuit of it, where downloads are kept."""
    model = make_model(d_model=6, n_heads=2, d_head=2, d_mlp=7)
    noise = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (2, 4, 6), generator=noise)
    answer = torch.full((4,), 3)
    pairs = TaskBatch(*tokens, answer, 11 - answer, torch.tensor([6, 5, 4, 6]), torch.arange(4))
    nodes = [Node(layer, "neuron", c) for layer in (0, 1) for c in range(5)] + [Node(1, "final_resid", 2)]
    means = mean_activations(model, tokens[0], sites=RELEASED_SITES)
    circuit = Circuit.of_nodes(model, nodes, means, sites=RELEASED_SITES)
    folder = tmp_path / "cache" / "openai"
    publish_model(model, folder / "models" / "dense1_1x")
    at = publish_circuit(circuit, model, pairs, folder / "viz/dense1_1x/quote/prune_v4/k_optim", progress=False)
    (at / "mean_baseline_pretrain.pt").rename(folder / "viz/dense1_1x/mean_baseline_pretrain.pt")
    monkeypatch.setenv("SPARSE_INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    return folder


def test_a_released_circuit_is_one_command_away(command, store):
    code, out, err = command("released", "openai/dense1_1x", "quote", *ANSWERS, "--json", "--tolerance", 1e-5)
    assert code == 0, err
    result = json.loads(out)
    assert result["n_nodes"] == 11 and result["answers"] == [3, 8] and result["notes"] == []
    worst = {row["measure"]: row["largest_difference"] for row in result["summary"]}
    assert list(worst)[:5] == ["loss", "interv_loss", "ch_interv_losses", "layer_interv_losses", "loc_interv_losses"]
    assert max(worst.values()) < 1e-5
    assert len(result["rows"]) == 2 + 11 + 4 + 17 + 2 * 3
    code, out, _ = command("released", "openai/dense1_1x", "quote", *ANSWERS)
    assert code == 0 and "11 nodes" in out and "answers: tokens 3 and 8" in out and "ch_interv_losses" in out


def test_a_released_circuit_can_be_in_files_and_folders_of_any_name(command, store, tmp_path):
    shutil.copytree(store / "models" / "dense1_1x", tmp_path / "mine")
    payload = store / "viz/dense1_1x/quote/prune_v4/k_optim/viz_data.pt"
    line = ["released", tmp_path / "mine", "quote", "--payload", payload, *ANSWERS, "--tolerance", 1e-5]
    assert command(*line)[0] == 0, "the means lie where they are published, above the payload"
    means = (store / "viz/dense1_1x/mean_baseline_pretrain.pt").rename(tmp_path / "means.pt")
    code, out, err = command(*line)
    assert (code, out) == (2, "") and "there is no mean_baseline_pretrain.pt" in err and "--means" in err
    assert command(*line, "--means", means)[0] == 0
    assert command("released", "openai/dense1_1x", "quote", "--means", means, *ANSWERS)[0] == 0


def test_a_released_circuit_leaves_its_files_where_asked(command, store, tmp_path):
    code, _, err = command("released", "openai/dense1_1x", "quote", *ANSWERS, "--out", tmp_path / "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "circuit.json", "circuit.safetensors", "replay.csv", "circuit.html", "circuit.png"
    }  # fmt: skip
    assert Circuit.load(tmp_path / "out" / "circuit.json", load("openai/dense1_1x")).task_name == "quote"


def test_a_difference_beyond_the_tolerance_is_a_failure(command, store):
    path = store / "viz/dense1_1x/quote/prune_v4/k_optim/viz_data.pt"
    payload = torch.load(path, weights_only=True)
    payload["importances"]["interv_loss"] += 0.01
    torch.save(payload, path)
    line = ["released", "openai/dense1_1x", "quote", *ANSWERS]
    assert command(*line)[0] == 0
    assert command(*line, "--tolerance", 1e-3)[0] == 1


def test_a_released_circuit_that_is_not_there_or_damaged_is_refused(command, store):
    code, out, err = command("released", "openai/dense1_1x", "brackets")
    assert (code, out) == (1, "") and "brackets/prune_v4/k_optim" in err
    path = store / "viz/dense1_1x/quote/prune_v4/k_optim/viz_data.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    code, out, err = command("released", "openai/dense1_1x", "quote")
    assert (code, out) == (2, "") and "viz_data.pt is damaged" in err


# -- patch ------------------------------------------------------------------------------------------------------------


def test_patch_writes_its_tables_and_figures_and_says_the_strongest(command, whole_model, tmp_path):
    asked = ["--model", whole_model, "--task", TASK, "--prompts", 4, "--sites", "q,neuron", "--out", tmp_path / "out"]
    code, out, err = command("patch", *asked, "--estimate", "gradient", "--positions", "1,-1", "--json")
    assert code == 0, err
    said, frame = json.loads(out), pd.read_csv(tmp_path / "out" / "nodes.csv")
    assert said["n_rows"] == len(frame) == 2 * 16 and list(frame.pos.unique()) == [1, -1]
    assert set(frame.site) == {"q", "neuron"} and "patching nodes: 100%" in err
    assert [row["site"] for row in said["ranks"]] == ["q", "neuron", "all"]
    effects = [abs(row["effect"]) for row in said["strongest"]]
    assert effects == sorted(effects, reverse=True) and effects[0] == pytest.approx(frame.effect.abs().max())
    names = {"nodes.csv", "nodes.png", "estimate.csv", "estimate.png", "ranks.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    code, out, _ = command("patch", *asked, "--noising")
    assert code == 0 and "nodes.csv: 16 rows; the strongest:" in out


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--sites", "z"], "sites=('z',): expected some of attn_read"),
        (["--positions", "last"], "expected each, or whole numbers separated by commas"),
        (["--positions", "99"], "positions=[99]: expected numbers from"),
        (["--estimate", "guess"], "method='guess'"),
        (["--budget", "0"], "budget_bytes=0: to patch one node"),
    ],
)
def test_patch_refuses_what_it_cannot_do_in_one_message(command, whole_model, tmp_path, option, words):
    code, out, err = command("patch", "--model", whole_model, "--task", TASK, "--out", tmp_path / "out", *option)
    assert code == 2 and out == "" and words in " ".join(err.replace("│", " ").split())
    assert not list((tmp_path / "out").glob("*"))


# -- bridge ----------------------------------------------------------------------------------------------------------


def test_a_bridge_is_trained_between_two_models_and_goes_on_after_an_interruption(
    command, sources, whole_model, tmp_path, monkeypatch
):
    dense, text = saved(tmp_path / "dense", n_ctx=16), ("--text", sources, "--pattern", "*.py")
    ways = {}
    for way in ("whole", "cut"):
        line = ("bridge", whole_model, dense, "--out", tmp_path / way, *text)
        if way == "cut":
            monkeypatch.setattr(cli, "_stop_signals", lambda: nullcontext([15]))
            code, _, err = command(*line, "--steps", 3, "--batch", 2, "--entries", 1)
            assert code == 1 and "stopped after step 1 of 3" in err
            monkeypatch.undo()
            line = (*line, "--resume")
        else:
            line = (*line, "--steps", 3, "--batch", 2, "--entries", 1)
        code, out, _ = command(*line, "--json")
        assert code == 0
        ways[way] = json.loads(out)["held_out_by_pair"]
    assert ways["whole"] == ways["cut"] and ways["cut"].keys() == {"0-0", "1-1", "2-2"}
    Bridge.load(tmp_path / "cut" / "bridge", load(whole_model), load(dense))
    assert command("bridge", whole_model, dense, "--out", tmp_path / "cut", *text)[0] == 2


def test_a_sparse_model_is_trained_with_its_bridge(command, sources, quick, tmp_path):
    dense = saved(tmp_path / "dense", n_ctx=16)
    out, given = tmp_path / "run", ("--scratch", "--text", sources, "--steps", 2, "--batch", 2, "--evaluate")
    code, said, _ = command("bridge", "quick", dense, "--out", out, *given)
    assert code == 0 and "NMSE" in said and "2-2" in said
    Bridge.load(out / "bridge", load(out / "model"), load(dense))
    assert len(pd.read_csv(out / "evaluation.csv")) > 0


def test_models_that_cannot_be_tied_are_refused_before_any_text_is_read(command, whole_model, tmp_path):
    code, _, err = command("bridge", whole_model, "stdlib-small-dense", "--out", tmp_path / "run")
    assert code == 2 and "1 layers and the dense one 2" in err
    assert not (tmp_path / "run").exists()
