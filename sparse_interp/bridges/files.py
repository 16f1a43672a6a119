"""A bridge's folder: what it is, which models it ties, and its maps, as JSON and safetensors.

    bridge.json           format version, config, both models with their hashes, library and torch versions
    bridge.safetensors    `PAIR.W_encode`, `PAIR.b_encode`, `PAIR.W_decode`, `PAIR.b_decode`, and with thresholds
                          `PAIR.log_theta`; PAIR is written SPARSE-DENSE
    card.json, card.md    how it was trained and how well it fits; optional

The folder appears whole or not at all and is never overwritten. The tensors carry the sha256 of each, and of the JSON
beside them, so what was edited, cut short or paired with another's is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.data_files import data_folder
from sparse_interp.errors import BridgeError, CheckpointError
from sparse_interp.model.checkpoint import CARD, CARD_TEXT, card_text, library_version, write_folder
from sparse_interp.model.tensor_files import own_bytes, read_own, read_record

FORMAT_VERSION = 1
RECORD, MAPS = "bridge.json", "bridge.safetensors"
_RECORD_SUM = "record_sha256"
"""Header entry of the maps: the sha256 of what bridge.json says."""


def write_bridge(
    folder: Path,
    config: BridgeConfig,
    ends: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stored_as: torch.dtype | None,
    card: Mapping[str, Any] | None,
) -> None:
    """Write a bridge to a new `folder`.

    Raises:
        BridgeError: if `folder` holds something, cannot be written, or a map is not finite.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise BridgeError(f"{folder} is there already, and a bridge is never overwritten; name a new folder.")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor if stored_as is None else tensor.to(stored_as)).all()):
            raise BridgeError(f"{name} of the bridge is not finite{'' if stored_as is None else f' as {stored_as}'}.")
    record = {
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        "torch_version": torch.__version__,
        "config": config.to_dict(),
        **{kind: asdict(end) for kind, end in ends.items()},
    }
    stored = {name: t.detach().cpu().to(t.dtype if stored_as is None else stored_as) for name, t in tensors.items()}
    files = {
        RECORD: json.dumps(record, indent=1).encode() + b"\n",
        MAPS: own_bytes(stored, {_RECORD_SUM: _sum_of(record)}),
    }
    if card is not None:
        files |= {CARD: json.dumps(card, indent=2).encode() + b"\n", CARD_TEXT: card_text(card).encode()}
    try:
        write_folder(folder, files, None)
    except CheckpointError as error:
        raise BridgeError(f"cannot write a bridge to {folder}; name another folder.") from error


def bridge_folder(name_or_path: Path | str) -> Path:
    """The folder of a bundled bridge, by its name, or of one on this machine.

    Raises:
        BridgeError: if there is neither.
    """
    bundled = {path.parent.name: path.parent for path in (data_folder() / "bridges").glob(f"*/{RECORD}")}
    folder = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in bundled:
        return bundled[name_or_path]
    if not folder.is_dir():
        raise BridgeError(
            f"{name_or_path} is no folder, and no bundled bridge is called so; there are "
            f"{', '.join(sorted(bundled)) or 'none'}. Name one, or a folder that `bridge.save` wrote."
        )
    return folder


def read_bridge(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What bridge.json in `folder` says, and the maps beside it.

    Raises:
        BridgeError: if one is missing, damaged, of another format version, or they do not belong together.
    """
    path = folder / RECORD
    if not path.is_file():
        raise BridgeError(f"{folder} holds no bridge: {RECORD} is missing. Name a folder that `bridge.save` wrote.")
    try:
        record = read_record(path, FORMAT_VERSION, "train the bridge again")
        tensors, entries = read_own(folder / MAPS)
    except CheckpointError as error:
        raise BridgeError(str(error)) from error
    if entries.get(_RECORD_SUM) != _sum_of(record):
        raise BridgeError(f"{path} is not the one that was saved with {MAPS}. Restore both files.")
    return record, tensors


def _sum_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
