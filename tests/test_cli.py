"""The command line says one line when it refuses, keeps standard output for results, and exits 0, 1 or 2."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from sparse_interp import cli
from sparse_interp.errors import ConfigError, SparseInterpError
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import weights_sha256
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
    assert code == 0 and "List the bundled models" in out and "Train the model of a RECIPE" in out
    code, out, _ = command("train", "--help")
    assert code == 0 and "--resume" in out and "stdlib-small" in out


def test_models_prints_a_table_or_json(command):
    code, out, _ = command("models", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == list(zoo.models().frame["name"])
    assert command("models")[0] == 0


def test_train_leaves_a_model_that_loads_and_says_so(command, sources, tmp_path):
    code, out, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources, "--json")
    assert code == 0, err
    said = json.loads(out)
    model = zoo.load(tmp_path / "run" / MODEL)
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
    step = Trainer.step

    def interrupted(trainer):
        if trainer.step_done == 5:
            os.kill(os.getpid(), number)  # in the middle of step 6
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        code, out, err = command("train", "quick", "--out", tmp_path / "run", "--text", sources)
    assert code == 1 and out == "" and "stopped after step 6 of 10; --resume continues it" in err
    assert (tmp_path / "run" / CHECKPOINT).exists() and not (tmp_path / "run" / MODEL).exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert command("train", "quick", "--out", tmp_path / "run", "--resume")[0] == 0
    assert weights_sha256(zoo.load(tmp_path / "run" / MODEL)) == weights_sha256(zoo.load(tmp_path / "whole" / MODEL))


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
