"""What a run reads: documents, encoded once, kept beside the run.

    files  ->  (train, validation) documents  ->  train.npy, valid.npy, manifest.json in a folder  ->  TrainingText

A run that is resumed reads the cache, so packages installed or removed in between change nothing. `manifest.json` says
where the text came from and the sha256 of what was made of it; it is complete only when everything else is there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparse_interp.corpus import Document, content_hash, python_sources, sources_manifest, split_documents, text_files
from sparse_interp.errors import CheckpointError, SparseInterpError
from sparse_interp.model.checkpoint import BIGRAM_TABLE, bundled_tokenizer, bundled_tokenizer_folder
from sparse_interp.tokenizer import (
    bigram_counts,
    bigram_table,
    blocks,
    encode_documents,
    load_bigram_table,
    tokenizer_hash,
)
from sparse_interp.training.recipes import RunConfig

MANIFEST, TRAIN, VALIDATION = "manifest.json", "train.npy", "valid.npy"
N_VALIDATION_BLOCKS = 400
"""Held-out blocks that the loss is measured on, taken at even distances so that every held-out file has its share."""

BIGRAM_SMOOTHING = 0.15
"""Pseudo-count of every pair, where the bigram table is counted on the user's own text."""

Split = tuple[list[Document], list[Document]]


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

    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the text comes from, for the model's card."""

    def sha256(self) -> dict[str, str]:
        """One hash for each part that a run depends on."""
        parts = {"training tokens": self.stream, "validation blocks": self.validation}
        if self.bigram_table is not None:
            parts["bigram table"] = self.bigram_table
        return {name: _sha256(tensor.contiguous().numpy()) for name, tensor in parts.items()}


def python_text(
    tokenizer: str | PreTrainedTokenizerBase, run: RunConfig, cache: Path, *, progress: bool = True
) -> TrainingText:
    """The Python sources of this machine: standard library and installed packages.

    Held out: whole files of the standard library, 20 % of them by name, that share at most 20 % of their lines with the
    rest. The bigram table is the tokenizer's own where one ships with it, else counted on the training text.

    Raises:
        CheckpointError: if `cache` holds another text, was changed, or cannot be written.
    """

    def collect() -> Split:
        return split_documents(python_sources(), 0.2, lambda document: document.is_stdlib)

    source = {"kind": "python sources", "held_out": "20 % of the standard library by name"}
    return _cached(source, collect, tokenizer, run, cache, progress)


def folder_text(
    folder: Path,
    tokenizer: str | PreTrainedTokenizerBase,
    run: RunConfig,
    cache: Path,
    *,
    pattern: str = "*",
    progress: bool = True,
) -> TrainingText:
    """The UTF-8 files below `folder` whose names match `pattern`: 10 % of them, by name, are held out.

    Raises:
        ConfigError: if there are too few files to hold one out.
        CheckpointError: if `cache` holds another text, was changed, or cannot be written.
    """
    source = {"kind": "folder", "folder": str(folder.resolve()), "pattern": pattern, "held_out": "10 % by name"}
    return _cached(source, lambda: split_documents(text_files(folder, pattern)), tokenizer, run, cache, progress)


def source_of(cache: Path) -> dict[str, Any]:
    """Where the text in `cache` comes from, even if it is not complete; empty where there is none."""
    return _manifest(cache).get("source", {})


def _cached(
    source: dict[str, Any],
    collect: Callable[[], Split],
    tokenizer: str | PreTrainedTokenizerBase,
    run: RunConfig,
    cache: Path,
    progress: bool,
) -> TrainingText:
    name = tokenizer if isinstance(tokenizer, str) else run.model.tokenizer_name
    tokenizer = bundled_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    manifest = _manifest(cache)
    if "source" in manifest:
        _refuse_another("source", manifest["source"], source, cache)
    if "files" in manifest:
        _refuse_another("tokenizer", manifest["tokenizer_sha256"], tokenizer_hash(tokenizer), cache)
    else:
        manifest = _encode(source, collect, tokenizer, cache, progress)
    streams = [_stream(cache / file, manifest["files"][file]) for file in (TRAIN, VALIDATION)]
    bos = tokenizer.convert_tokens_to_ids(tokenizer.bos_token)
    train, held_out = streams
    n_ctx = run.model.n_ctx
    return TrainingText(
        stream=train,
        validation=_spread(blocks(held_out, n_ctx, bos)),
        bos=bos,
        bigram_table=_table(name if source["kind"] == "python sources" else None, train, run, bos),
        source={key: value for key, value in manifest.items() if key != "files"},
    )


def _encode(
    source: dict[str, Any],
    collect: Callable[[], Split],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    progress: bool,
) -> dict[str, Any]:
    """Collect and encode the documents, write both streams, and last the manifest that vouches for them."""
    _write(cache / MANIFEST, json.dumps({"source": source}).encode())
    with tqdm(desc="collecting text", unit="file", disable=not progress) as bar:
        train, validation = collect()
        bar.update(len(train) + len(validation))
    manifest: dict[str, Any] = {
        "source": source,
        "sha256": content_hash([*train, *validation]),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "files": {},
    }
    for file, documents in ((TRAIN, train), (VALIDATION, validation)):
        stream = encode_documents(tokenizer, _counted(documents, progress))
        described = {**sources_manifest(documents), "n_tokens": len(stream)}
        manifest["training" if file == TRAIN else "validation"] = described
        manifest["files"][file] = _sha256(stream)
        _write(cache / file, stream)
    _write(cache / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _spread(held_out: Int[Tensor, "block pos"]) -> Int[Tensor, "chosen pos"]:
    chosen = min(N_VALIDATION_BLOCKS, len(held_out))
    return held_out[torch.arange(chosen) * len(held_out) // chosen]


def _counted(documents: list[Document], progress: bool) -> Iterable[Document]:
    return tqdm(documents, desc="encoding", unit="file", disable=not progress)


def _table(name: str | None, stream: Tensor, run: RunConfig, bos: int) -> Tensor | None:
    """The bigram table that ships with tokenizer `name`, else one counted on `stream`."""
    if not run.model.bigram:
        return None
    if name is not None and (bundled_tokenizer_folder(name) / BIGRAM_TABLE).is_file():
        return load_bigram_table(bundled_tokenizer_folder(name) / BIGRAM_TABLE)
    counts = bigram_counts(blocks(stream, run.model.n_ctx, bos), run.model.d_vocab)
    return bigram_table(counts, BIGRAM_SMOOTHING)


def _manifest(cache: Path) -> dict[str, Any]:
    path = cache / MANIFEST
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); delete {cache} and start again.") from error


def _refuse_another(what: str, stored: Any, wanted: Any, cache: Path) -> None:
    if stored != wanted:
        raise CheckpointError(
            f"{cache} holds text of another {what}: {stored} there, {wanted} asked for. "
            "Resume with what the run began with, or train in another folder."
        )


def _stream(path: Path, sha256: str) -> Tensor:
    try:
        stream = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder and start again.") from error
    if _sha256(stream) != sha256:
        raise CheckpointError(
            f"{path} is not what was encoded: its sha256 is {_sha256(stream)}, and {MANIFEST} says {sha256}. "
            "A run resumes only on its own text: restore the file, or train in another folder."
        )
    return torch.from_numpy(stream)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(memoryview(np.ascontiguousarray(array)).cast("B")).hexdigest()


def _write(path: Path, content: bytes | np.ndarray) -> None:
    """Write under a temporary name, then rename."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise SparseInterpError(
            f"cannot write {path}: {error.strerror}. Free some space or choose a folder."
        ) from error
