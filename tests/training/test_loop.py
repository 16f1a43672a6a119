"""A run learns, continues bit for bit, keeps only sound checkpoints, and refuses folders that are not its own."""

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_interp.errors import CheckpointError, SparseInterpError
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.transformer import load
from sparse_interp.tokenizer import bigram_counts, bigram_loss, bigram_table
from sparse_interp.training import loop
from sparse_interp.training.loop import (
    CHECKPOINT,
    METRICS,
    MODEL,
    RUN,
    NonFiniteLossError,
    Trainer,
    claim_folder,
    train,
)


def run_through(run, text, out, **options) -> str:
    """Train to the end; the hash of the model that comes out."""
    for _ in train(run, text, out, progress=False, **options):
        pass
    return weights_sha256(load(out / MODEL))


def steps_in(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()]


def test_a_small_model_on_repeated_text_gets_below_its_bigram_table(small_run, small_text, tmp_path):
    run = small_run(n_tokens=100 * 4 * 16, validate_every=100, checkpoint_every=100, precision="fp32")
    table = bigram_table(bigram_counts(small_text.stream[None], 48), 0.5)
    *_, last = train(run, replace(small_text, bigram_table=table), tmp_path / "run", progress=False)
    assert last.validation_loss < bigram_loss(table, small_text.validation) - 0.1


def test_the_density_is_the_target_exactly_and_the_card_counts_what_is_there(small_run, small_text, tmp_path):
    run_through(small_run(), small_text, tmp_path / "run")
    model = load(tmp_path / "run" / MODEL)
    card = json.loads((tmp_path / "run" / MODEL / "card.json").read_text())
    assert list(card["parameters"]["density_by_matrix"].values()) == pytest.approx([0.6] * 14, abs=1e-3)
    assert card["parameters"]["n_nonzero"] == sum(int(t.count_nonzero()) for t in model.state_dict().values())
    assert card["n_tokens"] == 24 * 64 and card["text_sha256"] == small_text.sha256()
    assert card["neurons"]["n_neurons"] == [32, 32]


def test_records_say_what_each_step_did(small_run, small_text, tmp_path):
    records = list(train(small_run(), small_text, tmp_path / "run", progress=False))
    assert [r.step for r in records] == list(range(1, 25)) and records[-1].tokens == 24 * 64
    assert [r.step for r in records if r.validation_loss is not None] == [6, 12, 18, 24]
    assert records[0].density == 1 and records[-1].density == pytest.approx(0.6)
    assert [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()] == [
        r._asdict() for r in records
    ]


@pytest.mark.parametrize("stop_at", [1, 6, 13, 23])
def test_a_run_that_its_caller_stops_continues_bit_for_bit(small_run, small_text, tmp_path, stop_at):
    whole = run_through(small_run(), small_text, tmp_path / "whole")
    for record in train(small_run(), small_text, tmp_path / "halves", progress=False):
        if record.step == stop_at:
            break
    with safe_open(tmp_path / "halves" / CHECKPOINT, "pt") as checkpoint:
        assert checkpoint.metadata()["step"] == str(stop_at)
    torch.rand(7)  # whatever else draws random numbers in between
    assert run_through(small_run(), small_text, tmp_path / "halves", resume=True) == whole
    assert steps_in(tmp_path / "halves") == list(range(1, 25))


def test_a_finished_run_resumes_to_nothing_and_makes_up_for_a_model_that_was_not_saved(small_run, small_text, tmp_path):
    whole = run_through(small_run(), small_text, tmp_path / "run")
    assert list(train(small_run(), small_text, tmp_path / "run", resume=True, progress=False)) == []
    (tmp_path / "run" / MODEL).rename(tmp_path / "elsewhere")
    assert run_through(small_run(), small_text, tmp_path / "run", resume=True) == whole


def test_a_run_that_was_killed_before_its_first_checkpoint_resumes_from_the_start(small_run, small_text, tmp_path):
    whole = run_through(small_run(), small_text, tmp_path / "whole")
    claim_folder(tmp_path / "run", small_run(), resume=False)
    (tmp_path / "run" / METRICS).write_text('{"step": 1, "lo')
    assert run_through(small_run(), small_text, tmp_path / "run", resume=True) == whole


KILLED = """
import contextlib, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from sparse_interp import cli
from sparse_interp.model.checkpoint import bundled_tokenizer
from sparse_interp.model.kernels import abs_topk, keep_largest_mask
from sparse_interp.training import recipes

# compiled and imported before anyone forks
abs_topk(torch.randn(2, 8), 3), abs_topk(torch.randn(2, 8).bfloat16(), 3), keep_largest_mask(torch.randn(8, 8), 20, 1)
bundled_tokenizer("python_2k")
tiny = recipes.tiny()
shrunk = replace(tiny, name="shrunk", batch_size=4, n_tokens=4 * 32 * 40, validate_every=9, checkpoint_every=4)
shrunk = replace(shrunk, model=recipes.replace_model(shrunk.model, n_layers=1, n_ctx=32))
recipes.RECIPES["shrunk"] = lambda: shrunk

folder, text = Path(sys.argv[1]), sys.argv[2]
silence = open(folder / "stderr", "a")

def start(out, *more):
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            try:
                cli.main(["train", "shrunk", "--out", str(folder / out), "--text", text, "--threads", "1", *more])
            except SystemExit as code:
                silence.flush()
                os._exit(code.code or 0)
        os._exit(0)
    return pid

assert os.waitstatus_to_exitcode(os.waitpid(start("whole"), 0)[1]) == 0
chance = random.Random(0)
moments = sorted(chance.uniform(0, 40) for _ in range(5))
more = []
for moment in moments:
    pid = start("killed", *more)
    records = folder / "killed" / "metrics.jsonl"
    seen = lambda: records.read_text().count(chr(10)) if records.exists() else 0
    while not (folder / "killed" / "run.json").exists() or seen() < moment - 4:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "finished before it was killed"
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    print(f"killed after {seen()} records written")
    more = ["--resume"]
assert os.waitstatus_to_exitcode(os.waitpid(start("killed", "--resume"), 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks processes as POSIX does")
def test_kill_9_at_five_random_moments_and_resume_gives_the_weights_of_the_uninterrupted_run(source_files, tmp_path):
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(source_files)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    said = (tmp_path / "stderr").read_text()[-2000:] if (tmp_path / "stderr").exists() else ""
    assert done.returncode == 0, done.stderr + said
    assert done.stdout.count("killed") == 5
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert weights_sha256(load(killed / MODEL)) == weights_sha256(load(whole / MODEL))
    assert (killed / MODEL / "weights.safetensors").read_bytes() == (whole / MODEL / "weights.safetensors").read_bytes()
    assert (killed / METRICS).read_text() == (whole / METRICS).read_text()
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.fixture
def diverging(monkeypatch):
    """`diverging(at, loss)`: from step `at` on the loss is `loss`."""

    def make(at: int, loss: float):
        step = Trainer.step

        def spoilt(trainer: Trainer):
            if trainer.step_done + 1 >= at:
                table = trainer.model.unembed.b_U
                with torch.no_grad():
                    table.fill_(loss)
            return step(trainer)

        monkeypatch.setattr(Trainer, "step", spoilt)

    return make


def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_checkpoint_stays(
    small_run, small_text, tmp_path, diverging, monkeypatch
):
    whole = run_through(small_run(), small_text, tmp_path / "whole")
    diverging(at=15, loss=math.nan)
    with pytest.raises(
        NonFiniteLossError, match="the loss is nan at step 15 of 24. The last checkpoint, if any, is sound"
    ):
        run_through(small_run(), small_text, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / MODEL).exists()
    with safe_open(tmp_path / "run" / CHECKPOINT, "pt") as checkpoint:
        assert checkpoint.metadata()["step"] == "12"
    assert run_through(small_run(), small_text, tmp_path / "run", resume=True) == whole


def test_a_rate_that_blows_the_weights_up_leaves_no_unsound_checkpoint(small_run, small_text, tmp_path):
    run = small_run(lr=1e38, lr_follows_density=False, checkpoint_every=1, warmup_frac=0.0)
    with pytest.raises(NonFiniteLossError, match="train again with a lower lr"):
        run_through(run, small_text, tmp_path / "run")
    if (tmp_path / "run" / CHECKPOINT).exists():
        assert all(
            bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / CHECKPOINT).values() if t.is_floating_point()
        )


def test_a_gradient_that_is_no_number_changes_no_weight(small_run, small_text, monkeypatch):
    trainer = Trainer(small_run(), small_text)
    before = weights_sha256(trainer.model)
    monkeypatch.setattr(loop, "normalise_gradients_", lambda model: math.inf)
    with pytest.raises(NonFiniteLossError, match="and its gradient inf at step 1 of 24"):
        trainer.step()
    assert weights_sha256(trainer.model) == before


def test_a_folder_that_holds_a_run_is_not_trained_into(small_run, small_text, tmp_path):
    run_through(small_run(), small_text, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match="already holds a run"):
        next(train(small_run(), small_text, tmp_path / "run", progress=False))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_resume_refuses_a_folder_without_a_run_and_one_of_another_run(small_run, small_text, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run to resume: run.json is missing"):
        next(train(small_run(), small_text, tmp_path / "none", resume=True, progress=False))
    run_through(small_run(), small_text, tmp_path / "run")
    with pytest.raises(CheckpointError, match="belongs to another run: lr: 0.01, not 0.02. Resume with the settings"):
        next(train(small_run(lr=0.02), small_text, tmp_path / "run", resume=True, progress=False))


def test_a_checkpoint_carried_into_the_folder_of_another_run_is_refused(small_run, small_text, tmp_path):
    run_through(small_run(), small_text, tmp_path / "one")
    claim_folder(tmp_path / "two", small_run(seed=5), resume=False)
    (tmp_path / "two" / CHECKPOINT).write_bytes((tmp_path / "one" / CHECKPOINT).read_bytes())
    with pytest.raises(CheckpointError, match="belongs to another run: seed: 0, not 5"):
        next(train(small_run(seed=5), small_text, tmp_path / "two", resume=True, progress=False))


def test_resume_on_another_text_says_what_changed(small_run, small_text, tmp_path):
    run_through(small_run(), small_text, tmp_path / "run")
    edited = small_text.stream.clone()
    edited[3] = 1 + (edited[3].long() + 1) % 40
    with pytest.raises(CheckpointError, match="trained on another text: the training tokens changed since"):
        next(train(small_run(), replace(small_text, stream=edited), tmp_path / "run", resume=True, progress=False))


def test_resume_refuses_damaged_checkpoints(small_run, small_text, tmp_path):
    run_through(small_run(), small_text, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the file's own memory
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            next(train(small_run(), small_text, tmp_path / "run", resume=True, progress=False))

    path.write_bytes(whole[: len(whole) // 2])
    refused("is damaged")
    save_file(tensors | {"model.embed.W_E": torch.full_like(tensors["model.embed.W_E"], torch.nan)}, path, metadata)
    refused("model.embed.W_E is not finite")
    save_file({k: v for k, v in tensors.items() if k != "model.embed.W_E"}, path, metadata)
    refused("is incomplete")
    save_file(tensors, path)
    refused("is no checkpoint of a training run")
    path.write_bytes(whole)
    (tmp_path / "run" / METRICS).unlink()
    refused("has 0 records, fewer than the 24 steps")


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    small_run, small_text, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(loop, "Trainer", None)
    with pytest.raises(CheckpointError, match="cannot write to .*file/run: Not a directory. Choose another folder"):
        next(train(small_run(), small_text, tmp_path / "file" / "run", progress=False))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_no_half_file(small_run, small_text, tmp_path, monkeypatch):
    whole = run_through(small_run(), small_text, tmp_path / "whole")
    run, fsync = iter(train(small_run(), small_text, tmp_path / "run", progress=False)), os.fsync
    for _ in range(7):
        next(run)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SparseInterpError, match="No space left on device. The last checkpoint is intact; make room"):
        list(run)
    monkeypatch.setattr(os, "fsync", fsync)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {RUN, METRICS, CHECKPOINT}
    assert run_through(small_run(), small_text, tmp_path / "run", resume=True) == whole


def test_a_density_too_low_for_the_papers_floor_is_said_once(small_run, small_text, tmp_path):
    with pytest.warns(UserWarning, match="density 0.1 is too low for every row and column to keep 4 weights") as said:
        run_through(small_run(model={"density": 0.1}), small_text, tmp_path / "run")
    assert len(said) == 1 and "1 in mlp.W_in" in str(said[0].message)


def test_another_number_of_threads_is_remarked_on(small_run, small_text, tmp_path, monkeypatch):
    for _ in train(small_run(), small_text, tmp_path / "run", progress=False):
        break
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.warns(UserWarning, match="threads and continues on 64"):
        next(train(small_run(), small_text, tmp_path / "run", resume=True, progress=False))


def test_the_sampler_continues_where_the_checkpoint_was(small_run, small_text, tmp_path):
    first = Trainer(small_run(), small_text)
    for _ in range(5):
        first.step()
    first.save(tmp_path)
    second = Trainer(small_run(), small_text)
    second.load(tmp_path)
    for _ in range(30):  # beyond the end of the epoch
        assert torch.equal(next(first.sampler), next(second.sampler))


def test_resuming_restores_moments_schedules_and_the_last_measured_support(small_run, small_text, tmp_path):
    first = Trainer(small_run(), small_text)
    for _ in range(8):
        first.step()
    first.save(tmp_path)
    second = Trainer(small_run(), small_text)
    second.load(tmp_path)
    assert [first.step() for _ in range(6)] == [second.step() for _ in range(6)]
    moments = [t.optimizer.state_dict()["state"] for t in (first, second)]
    for index, one in moments[0].items():
        other = moments[1][index]
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
