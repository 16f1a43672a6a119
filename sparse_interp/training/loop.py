"""train(): the recipe as a generator of records, with checkpoints that continue bit for bit.

    for record in train(run, text, out):  ...

One step: loss and gradient, gradient divided by its size, AdamW, projection onto the largest weights (method: Gao et
al. 2025, arXiv 2511.13653). What a step depends on (weights, moments, place in the text, step number) is in the checkpoint;
the records already yielded are in `metrics.jsonl` beside it.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparse_interp.errors import CheckpointError, ConfigError, SparseInterpError
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tokenizer import BlockSampler
from sparse_interp.training.optimizer import lr_schedule, make_optimizer, normalise_gradients_
from sparse_interp.training.recipes import RunConfig
from sparse_interp.training.sparsity import density_at, lr_multiplier, project_, sparse_matrices

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RUN = "run.json"


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


@dataclass(frozen=True)
class TrainingText:
    """What a run reads."""

    stream: Integer[Tensor, " token"]
    """Token ids of the training documents, end to end."""

    validation: Int[Tensor, "block pos"]
    """Held-out blocks."""

    bos: int
    """Token that every block begins with."""

    bigram_table: Float[Tensor, "d_vocab d_vocab"] | None = None
    """Initial bigram logits."""


class Trainer:
    """A model, its optimizer and its place in the text: everything that a step changes."""

    def __init__(self, run: RunConfig, text: TrainingText, tokenizer: Any = None):
        self.run, self.text = run, text
        self.model = HookedSparseTransformer(run.model, tokenizer).train()
        if text.bigram_table is not None and run.model.bigram:
            with torch.no_grad():
                self.model.bigram_table.copy_(text.bigram_table)
        self.optimizer = make_optimizer(
            self.model, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay
        )
        order = torch.Generator().manual_seed(run.seed)
        self.sampler = BlockSampler(text.stream, run.model.n_ctx, run.batch_size, order, text.bos)
        self.step_done = 0
        self._support: list[Tensor] | None = None

    def step(self) -> StepRecord:
        """One optimizer step on the next batch.

        Raises:
            NonFiniteLossError: if the loss is not finite; weights are left as they were.
        """
        run, model = self.run, self.model
        tokens = next(self.sampler).to(model.embed.W_E.device)
        with torch.autocast(tokens.device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext():
            loss = model(tokens, return_type="loss")
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"loss is {value} at step {self.step_done + 1} of {run.n_steps}, after "
                f"{self.step_done * tokens.numel()} tokens. The last checkpoint is intact: lower lr (now {run.lr}) or "
                "raise eps and train again, or resume from it."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_rms = normalise_gradients_(model)
        density = density_at(
            self.step_done,
            n_steps=run.n_steps,
            final_density=run.model.density,
            schedule=run.density_schedule,
            begin_frac=run.density_begin_frac,
            end_frac=run.density_end_frac,
        )
        lr = run.lr * lr_schedule(self.step_done, n_steps=run.n_steps, warmup_frac=run.warmup_frac)
        lr *= lr_multiplier(density) if run.lr_follows_density else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        project_(model, density)
        self.step_done += 1
        measured = self.step_done % run.validate_every == 0 or self.step_done == run.n_steps
        return StepRecord(
            self.step_done,
            value,
            lr,
            density,
            grad_rms,
            self.step_done * tokens.numel(),
            self._turnover() if measured else None,
            self.validation_loss() if measured else None,
        )

    def validation_loss(self) -> float:
        """Loss on the held-out blocks as analysis sees the model: eval mode, float32."""
        return validation_loss(self.model, self.text.validation)

    def _turnover(self) -> float | None:
        support = [(p != 0) for m in sparse_matrices(self.model) for p in m.parts]
        before, self._support = self._support, support
        if before is None:
            return None
        new = sum(int((now & ~then).sum()) for now, then in zip(support, before, strict=True))
        return new / max(1, sum(int(s.sum()) for s in support))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the checkpoint under a temporary name, then rename it."""
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items() if n != "bigram_table" or self._learns}
        for name, p in self._trained():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors |= {f"sampler.{k}": v for k, v in self.sampler.state_dict().items()}
        for i, support in enumerate(self._support or []):
            tensors[f"support.{i}"] = support
        tensors["rng"] = torch.get_rng_state()
        half_written = folder / f".{CHECKPOINT}.part"
        metadata = {"step": str(self.step_done), "run": self.run.to_json()}
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, half_written, metadata)
        half_written.replace(folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`.

        Raises:
            CheckpointError: if there is none, it is damaged, or it belongs to another run.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            raise CheckpointError(f"{folder} has no {CHECKPOINT} to resume from; train without resume first.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and train again.") from error
        if json.loads(metadata["run"]) != json.loads(self.run.to_json()):
            raise CheckpointError(
                f"{path} belongs to another run configuration; resume with the recipe that wrote it, kept in "
                f"{folder / RUN}, or choose another folder."
            )
        self.step_done = int(metadata["step"])
        self.sampler.load_state_dict(
            {k.removeprefix("sampler."): v for k, v in tensors.items() if k.startswith("sampler.")}
        )
        saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        if not self._learns and self.model.cfg.bigram:
            saved["bigram_table"] = self.model.bigram_table
        self.model.load_state_dict(saved)
        for name, p in self._trained():
            keys = [n for n in tensors if n.startswith("optimizer.") and n.split(".", 2)[2] == name]
            if keys:
                self.optimizer.state[p] = {n.split(".")[1]: tensors[n] for n in keys}
        n_support = sum(n.startswith("support.") for n in tensors)
        self._support = [tensors[f"support.{i}"] for i in range(n_support)] or None
        torch.set_rng_state(tensors["rng"])

    @property
    def _learns(self) -> bool:
        return self.model.cfg.bigram and self.model.cfg.bigram_learnable

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]


@torch.no_grad()
def validation_loss(model: HookedSparseTransformer, blocks: Int[Tensor, "block pos"], batch_size: int = 16) -> float:
    """Mean next-token cross-entropy on `blocks`, nats, in eval mode and the model's own precision."""
    was_training = model.training
    model.eval()
    losses = [
        model(b.to(model.embed.W_E.device), return_type="loss").item() * len(b) for b in blocks.split(batch_size)
    ]
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
) -> Iterator[StepRecord]:
    """Train a model, yielding a record after each step; the finished model is saved in `out / "model"`.

    `out` receives run.json, metrics.jsonl (one line per step) and checkpoint.safetensors, replaced every
    `run.checkpoint_every` steps. Interrupt it at any moment; with `resume=True` the weights that come out are, on the
    CPU, those of the run that was never interrupted, bit for bit.

    Raises:
        CheckpointError: before any work, if `out` cannot be written, holds another run, or (with `resume`) holds none.
        NonFiniteLossError: if the loss stops being a number; the last good checkpoint stays.
    """
    trainer = Trainer(run, text, tokenizer)
    _prepare(out, run, trainer, resume)
    bar = tqdm(
        total=run.n_steps, initial=trainer.step_done, disable=not progress, unit="step", desc=run.name, mininterval=1.0
    )
    began, began_at = time.monotonic(), trainer.step_done
    with bar, (out / METRICS).open("a", encoding="utf-8") as metrics:
        while trainer.step_done < run.n_steps:
            record = trainer.step()
            metrics.write(json.dumps(record._asdict()) + "\n")
            seconds = time.monotonic() - began
            per_step = run.batch_size * run.model.n_ctx
            speed = (trainer.step_done - began_at) * per_step / max(seconds, 1e-9)
            bar.set_postfix_str(f"loss {record.loss:.3f}, density {record.density:.3f}, {speed:,.0f} tokens/s", False)
            bar.update()
            if record.step % run.checkpoint_every == 0 or record.step == run.n_steps:
                metrics.flush()
                os.fsync(metrics.fileno())
                trainer.save(out)
            yield record


def _prepare(out: Path, run: RunConfig, trainer: Trainer, resume: bool) -> None:
    """Make `out` ready: a fresh folder, or the one of the run being resumed with its metrics cut at the checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}; choose another folder with --out.") from error
    if resume:
        trainer.load(out)
        lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines[: trainer.step_done] if line.endswith("\n")]
        if len(kept) < trainer.step_done:
            raise CheckpointError(
                f"{out / METRICS} has {len(kept)} records, fewer than the {trainer.step_done} steps of the checkpoint; "
                "the folder was changed by hand. Train again in another folder."
            )
        (out / f".{METRICS}.part").write_text("".join(kept), encoding="utf-8")
        (out / f".{METRICS}.part").replace(out / METRICS)
        return
    if (out / CHECKPOINT).exists() or (out / METRICS).exists():
        raise CheckpointError(f"{out} already holds a run; pass resume=True (--resume) to continue it, or choose another.")
    if run.n_steps < 1:
        raise ConfigError(f"n_tokens={run.n_tokens} is less than one batch.")
    (out / f".{RUN}.part").write_text(run.to_json(), encoding="utf-8")
    (out / f".{RUN}.part").replace(out / RUN)
