"""train(): the recipe as a generator of records, with checkpoints that continue bit for bit.

    for record in train(run, text, out):  ...

One step: loss and gradient, gradient divided by its size, AdamW, projection onto the largest weights (method: Gao et
al. 2025, arXiv 2511.13653). What a step depends on (weights, moments, place in the text, step number) is in the
checkpoint; the records already yielded are in `metrics.jsonl` beside it. A file takes its name only when it is whole,
so a run may be killed at any moment; whoever stops asking for records leaves a checkpoint of the last step.
"""

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sparse_interp.errors import CheckpointError, SparseInterpError
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tokenizer import BlockSampler
from sparse_interp.training.card import model_card
from sparse_interp.training.checkpoints import (
    CHECKPOINT,
    METRICS,
    RUN,
    check_writable,
    load_optimizer_,
    on_disk,
    optimizer_tensors,
    read_checkpoint,
    refuse_occupied,
    replace_file,
    rewind_metrics,
    warn_of_threads,
    write_checkpoint,
    writing,
)
from sparse_interp.training.optimizer import advance_, normalise_gradients_, optimizer_of
from sparse_interp.training.recipes import RunConfig
from sparse_interp.training.sparsity import (
    PAPER_FLOOR,
    low_floor_matrices,
    sparse_matrices,
)
from sparse_interp.training.text import TrainingText

MODEL = "model"


class NonFiniteLossError(SparseInterpError, ArithmeticError):
    """Training produced a loss that is no number."""


class StepRecord(NamedTuple):
    """What one optimizer step did."""

    step: int
    """Steps done so far, this one included."""

    loss: float
    """Mean next-token cross-entropy of the batch before the step, nats."""

    lr: float
    """Learning rate of the step."""

    density: float
    """Share of weights allowed to be non-zero after the step."""

    grad_rms: float
    """Root mean square of the gradient before it was divided by it."""

    tokens: int
    """Tokens seen so far."""

    turnover: float | None
    """Share of the surviving weights that were zero at the last measurement; None between measurements."""

    validation_loss: float | None
    """Mean next-token cross-entropy on held-out blocks, nats; None between measurements."""


class Trainer:
    """A model, its optimizer and its place in the text: everything that a step changes."""

    def __init__(self, run: RunConfig, text: TrainingText, tokenizer: Any = None):
        self.run, self.text = run, text
        self.model = HookedSparseTransformer(run.model, tokenizer).train()
        set_bigram_table_(self.model, text)
        self.optimizer = optimizer_of(self.model, run)
        order = torch.Generator().manual_seed(run.seed)
        self.sampler = BlockSampler(text.stream, run.model.n_ctx, run.batch_size, order, text.bos)
        self.step_done = 0
        self.seconds = 0.0
        """Time spent in steps and measurements so far, interruptions not counted."""
        self._text_sha256 = text.sha256()
        self._support: list[Tensor] | None = None

    def step(self) -> StepRecord:
        """One optimizer step on the next batch.

        Raises:
            NonFiniteLossError: if the loss or its gradient is not finite; weights are left as they were.
        """
        began = time.monotonic()
        run, model = self.run, self.model
        tokens = next(self.sampler).to(model.embed.W_E.device)
        with torch.autocast(tokens.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext():
            loss = model(tokens, return_type="loss")
        value = loss.item()
        if not math.isfinite(value):
            raise self._non_finite(f"the loss is {value}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_rms = normalise_gradients_(model)
        if not math.isfinite(grad_rms):
            raise self._non_finite(f"the loss is {value:.4g} and its gradient {grad_rms}")
        lr, density = advance_(model, self.optimizer, run, self.step_done)
        self.step_done += 1
        measured = self.step_done % run.validate_every == 0 or self.step_done == run.n_steps
        record = StepRecord(
            self.step_done,
            value,
            lr,
            density,
            grad_rms,
            self.step_done * tokens.numel(),
            self._turnover() if measured else None,
            self.validation_loss() if measured else None,
        )
        self.seconds += time.monotonic() - began
        return record

    def validation_loss(self) -> float:
        """Loss on the held-out blocks as analysis sees the model: eval mode, float32."""
        return validation_loss(self.model, self.text.validation)

    def _non_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what} at step {self.step_done + 1} of {self.run.n_steps}. The last checkpoint, if any, is sound: "
            f"train again with a lower lr (now {self.run.lr}) or a larger eps (now {self.run.eps}), or resume from it."
        )

    def _turnover(self) -> float | None:
        support = [(p != 0) for m in sparse_matrices(self.model) for p in m.parts]
        before, self._support = self._support, support
        if before is None:
            return None
        new = sum(int((now & ~then).sum()) for now, then in zip(support, before, strict=True))
        return new / max(1, sum(int(s.sum()) for s in support))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`, once the new one is whole.

        Raises:
            NonFiniteLossError: if the weights, or their loss on held-out text, are not finite; the old one stays.
        """
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items() if n != "bigram_table" or self._learns}
        sound = all(bool(torch.isfinite(t).all()) for t in tensors.values())
        if not sound or not math.isfinite(validation_loss(self.model, self.text.validation[:8])):
            raise self._non_finite("the weights have left the range in which the loss is a number")
        tensors |= optimizer_tensors(self.optimizer, self.model)
        tensors |= {f"sampler.{k}": v for k, v in self.sampler.state_dict().items()}
        for i, support in enumerate(self._support or []):
            tensors[f"support.{i}"] = support
        tensors["rng"] = torch.get_rng_state()
        metadata = {
            "step": str(self.step_done),
            "run": self.run.to_json(),
            "text": json.dumps(self._text_sha256),
            "seconds": repr(self.seconds),
        }
        write_checkpoint(folder, tensors, metadata)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`.

        Raises:
            CheckpointError: if there is none, it is damaged, or it belongs to another run or text.
        """
        path = folder / CHECKPOINT
        tensors, metadata = read_checkpoint(path)
        self._refuse_another(path, metadata)
        try:
            saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
            if not self._learns and self.model.cfg.bigram:
                saved["bigram_table"] = self.model.bigram_table
            self.model.load_state_dict(saved)
            self.sampler.load_state_dict(
                {k.removeprefix("sampler."): v for k, v in tensors.items() if k.startswith("sampler.")}
            )
            load_optimizer_(self.optimizer, self.model, tensors)
            n_support = sum(n.startswith("support.") for n in tensors)
            device = self.model.embed.W_E.device
            self._support = [tensors[f"support.{i}"].to(device) for i in range(n_support)] or None
            torch.set_rng_state(tensors["rng"])
            self.step_done, self.seconds = int(metadata["step"]), float(metadata.get("seconds", 0.0))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is incomplete ({error}); delete it and train again.") from error
        warn_of_threads(metadata)

    def _refuse_another(self, path: Path, metadata: dict[str, str]) -> None:
        """Raise CheckpointError unless the checkpoint belongs to this run and text."""
        differences = RunConfig.from_json(metadata["run"]).differences(self.run)
        if differences:
            raise CheckpointError(_another_run(path, differences))
        text = json.loads(metadata.get("text", "null")) or self._text_sha256
        changed = [part for part, sha256 in self._text_sha256.items() if text.get(part) != sha256]
        if changed:
            raise CheckpointError(
                f"{path} was trained on another text: the {' and the '.join(changed)} changed since. Restore the text "
                "that the run began with, or train in another folder."
            )

    @property
    def _learns(self) -> bool:
        return self.model.cfg.bigram and self.model.cfg.bigram_learnable


@torch.no_grad()
def set_bigram_table_(model: HookedSparseTransformer, text: TrainingText) -> None:
    """Give a model the bigram table that its text begins with, if there is one."""
    if text.bigram_table is not None and model.cfg.bigram:
        model.bigram_table.copy_(text.bigram_table)


@torch.no_grad()
def validation_loss(model: HookedSparseTransformer, blocks: Int[Tensor, "block pos"], batch_size: int = 16) -> float:
    """Mean next-token cross-entropy on `blocks`, nats, in eval mode and the model's own precision."""
    was_training = model.training
    model.eval()
    losses = [model(b.to(model.embed.W_E.device), return_type="loss").item() * len(b) for b in blocks.split(batch_size)]
    model.train(was_training)
    return sum(losses) / len(blocks)


def train(
    run: RunConfig,
    text: TrainingText,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    tokenizer: Any = None,
    command: str | None = None,
) -> Iterator[StepRecord]:
    """Train a model, yielding a record after each step; the finished model is in `out / "model"` before the last one.

    `out` receives run.json, metrics.jsonl (one line per step) and checkpoint.safetensors, replaced every
    `run.checkpoint_every` steps and when the caller stops early. Interrupt it at any moment; with `resume=True` the
    weights that come out are, on the CPU and with as many threads, those of the run that was never interrupted, bit
    for bit. `tokenizer` and `command`, the line that a reader would type, go into the model's folder.

    Raises:
        CheckpointError: before any work, if `out` cannot be written, holds another run, or (with `resume`) holds none.
        NonFiniteLossError: if the loss stops being a number; the last good checkpoint stays.
        SparseInterpError: if the disk is full.
    """
    claim_folder(out, run, resume=resume)
    trainer = Trainer(run, text, tokenizer)
    if resume and (out / CHECKPOINT).exists():
        trainer.load(out)
    rewind_metrics(out, trainer.step_done)
    _say_low_floors(trainer)
    if trainer.step_done == run.n_steps:
        _finish(trainer, out, command)
    bar = tqdm(
        total=run.n_steps, initial=trainer.step_done, disable=not progress, unit="step", desc=run.name, mininterval=1.0
    )
    began, began_at = time.monotonic(), trainer.step_done
    with bar, writing(out), (out / METRICS).open("a", encoding="utf-8") as metrics:
        while trainer.step_done < run.n_steps:
            record = trainer.step()
            metrics.write(json.dumps(record._asdict()) + "\n")
            speed = (
                (trainer.step_done - began_at) * run.batch_size * run.model.n_ctx / (time.monotonic() - began + 1e-9)
            )
            bar.set_postfix_str(f"loss {record.loss:.3f}, density {record.density:.3f}, {speed:,.0f} tokens/s", False)
            bar.update()
            due = record.step % run.checkpoint_every == 0 or record.step == run.n_steps
            if due:
                _checkpoint(trainer, metrics, out)
            if record.step == run.n_steps:
                _finish(trainer, out, command)
            try:
                yield record
            except GeneratorExit:  # the caller stops here, between two steps
                if not due:
                    _checkpoint(trainer, metrics, out)
                raise


def claim_folder(out: Path, run: RunConfig, *, resume: bool) -> None:
    """Make `out` the folder of `run`, before any work is done for it; doing so again changes nothing.

    Raises:
        CheckpointError: if `out` cannot be written, holds a run, or (with `resume`) holds none or another.
    """
    check_writable(out)
    if resume:
        differences = stored_run(out).differences(run)
        if differences:
            raise CheckpointError(_another_run(out / RUN, differences))
        return
    refuse_occupied(out, (CHECKPOINT, METRICS, MODEL))
    replace_file(out / RUN, run.to_json().encode())


def stored_run(out: Path) -> RunConfig:
    """The run that `out` is the folder of.

    Raises:
        CheckpointError: if it is the folder of none.
    """
    path = out / RUN
    if not path.is_file():
        raise CheckpointError(f"{out} holds no run to resume: {RUN} is missing. Train without resume first.")
    return RunConfig.from_json(path.read_text(encoding="utf-8"))


def _another_run(path: Path, differences: list[str]) -> str:
    return (
        f"{path} belongs to another run: {'; '.join(differences[:6])}. Resume with the settings that the run began "
        "with, or choose another folder."
    )


def _say_low_floors(trainer: Trainer) -> None:
    """Warn once where the density leaves too little for the paper's floor."""
    density = trainer.run.model.density
    low = low_floor_matrices(trainer.model, density) if density < 1 else {}
    if low:
        kinds = {name.split(".", 1)[1] if name[0].isdigit() else name: floor for name, floor in low.items()}
        listed = ", ".join(f"{floor} in {name}" for name, floor in kinds.items())
        warnings.warn(
            f"density {density:g} is too low for every row and column to keep {PAPER_FLOOR} weights; "
            f"they keep {listed}.",
            stacklevel=3,
        )


def _checkpoint(trainer: Trainer, metrics: TextIO, out: Path) -> None:
    """The records first: a checkpoint never knows of a step that they do not."""
    on_disk(metrics)
    trainer.save(out)


def _finish(trainer: Trainer, out: Path, command: str | None) -> None:
    """Save the finished model, unless the run was interrupted after doing so."""
    if not (out / MODEL).exists():
        card = model_card(
            trainer.model,
            trainer.run,
            trainer.text,
            seconds=trainer.seconds,
            loss=trainer.validation_loss(),
            command=command,
        )
        trainer.model.save(out / MODEL, card=card, validation=trainer.text.validation)
