"""What training leaves in a folder as it goes, so that it can be killed at any moment and continue bit for bit.

    checkpoint.safetensors    everything that the next step depends on
    metrics.jsonl             a record per step
    run.json                  what is being trained

A file takes its name only when it is whole.
"""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sparse_interp.errors import CheckpointError, SparseInterpError

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
RUN = "run.json"


def check_writable(out: Path) -> None:
    """Make the folder `out`.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}. Choose another folder.") from error


def refuse_occupied(out: Path, names: Collection[str]) -> None:
    """Raise CheckpointError if one of the files `names` of a run is in `out`."""
    for name in names:
        if (out / name).exists():
            raise CheckpointError(
                f"{out} already holds a run ({name} is there). Continue it with resume=True (--resume), or choose "
                "another folder."
            )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, name: str = "optimizer"
) -> dict[str, Tensor]:
    """The optimizer's state for every parameter of `module`, as `load_optimizer_` takes it."""
    return {
        f"{name}.{key}.{parameter}": value
        for parameter, p in module.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], name: str = "optimizer"
) -> None:
    """Put back what `optimizer_tensors` gave."""
    for parameter, p in module.named_parameters():
        keys = [n for n in tensors if n.startswith(f"{name}.") and n.split(".", 2)[2] == parameter]
        if keys:
            optimizer.state[p] = {n.split(".")[1]: tensors[n].to(p.device) for n in keys}


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace the checkpoint in `folder`, once the new one is whole."""
    metadata = {**metadata, "threads": str(torch.get_num_threads())}
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_file(folder / CHECKPOINT, safetensors_bytes(whole, metadata))


def warn_of_threads(metadata: Mapping[str, str]) -> None:
    """Warn if the checkpoint was written by as many threads as are not at work now."""
    if int(metadata.get("threads", torch.get_num_threads())) != torch.get_num_threads():
        warnings.warn(
            f"the run used {metadata['threads']} threads and continues on {torch.get_num_threads()}: sums are "
            "taken in another order, so the last bits of the weights will not be those of an uninterrupted run.",
            stacklevel=3,
        )


def on_disk(metrics: TextIO) -> None:
    """Make sure that what was written to a file is there for good."""
    metrics.flush()
    os.fsync(metrics.fileno())


def rewind_metrics(out: Path, n_steps: int) -> None:
    """Cut the records at the checkpoint that training continues from."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines[:n_steps] if line.endswith("\n")]
    if len(kept) < n_steps:
        raise CheckpointError(
            f"{path} has {len(kept)} records, fewer than the {n_steps} steps of the checkpoint: the folder was changed "
            "by hand. Train again in another folder."
        )
    replace_file(path, "".join(kept).encode())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A full disk is an error that says what to do; what was written before it stays whole."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SparseInterpError):
            raise
        raise SparseInterpError(
            f"cannot write to {out}: {error.strerror}. The last checkpoint is intact; make room and resume."
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` under its temporary name first: on the disk whole, or not there."""
    unfinished = path.with_name(f".{path.name}.partial")
    with writing(path.parent):
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and entries of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name} to resume from; train without resume first.")
    try:
        with safe_open(path, "pt") as file:
            # cloned: what safetensors returns lies in the file, which the next checkpoint replaces
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and train again.") from error
    if not {"run", "step"} <= metadata.keys():
        raise CheckpointError(f"{path} is no checkpoint of a training run; delete it and train again.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} is damaged ({name} is not finite); delete it and train again.")
    return tensors, metadata
