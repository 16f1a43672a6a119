"""Files of tensors, read as tensors and as nothing else.

    *.safetensors               one tensor at a time, so that nothing is held twice
    *.safetensors.index.json    which of several such files holds which tensor
    *.pt, *.bin                 a zip archive around a pickle, which could name code to run, and here cannot

An archive is read by `torch.load(weights_only=True)`, which builds tensors and refuses everything else, and only after
the CRC-32 of every record was found right. It is converted to safetensors once, in a folder for such things and never
beside the archive, under a name made of those CRCs.

Files of ours carry the sha256 of each tensor, and of what their header says besides. A safetensors file that others
wrote carries none: a value that changed in it, or two tensors of one shape that changed places, cannot be told from
what was meant.
"""

import hashlib
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_interp.errors import CheckpointError

SUMS = "sha256"
"""Header entry of a file of ours: the sha256 of each tensor, and under the empty name that of the other entries."""

LARGEST_JSON = 2**24
"""Bytes of the largest JSON file that is read as one; configurations and indices have a few thousand."""

_DAMAGED = "fetch or save it again"
_PRECISION = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Stored(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """Precision in torch's words, `float32` say."""


@dataclass(frozen=True)
class TensorSource:
    """Tensors that lie in files, handed out one by one."""

    files: tuple[Path, ...]
    """Where they lie."""

    known: Mapping[str, Stored]
    """Shape and precision of each."""

    take: Callable[[str], Tensor]
    """The tensor of a name, which may lie in the file: to be copied, and let go. A name may be asked for once."""

    converted: Path | None = None
    """The conversion, of files that are converted once."""

    def renamed(self, rename: Callable[[str], str]) -> "TensorSource":
        """The same tensors under other names, which `rename` makes of theirs."""
        old = {rename(name): name for name in self.known}
        return replace(self, known={n: self.known[old[n]] for n in old}, take=lambda name: self.take(old[name]))


# -- files of ours ----------------------------------------------------------------------------------------------------


def own_bytes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> bytes:
    """A safetensors file with these tensors and header entries, and the sums by which `read_own` knows them.

    The same contents give the same bytes.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return _with_ordered_entries(safetensors_bytes(whole, _with_sums(whole, entries)))


def _with_ordered_entries(file: bytes) -> bytes:
    """The same safetensors file with its header entries by name: the library writes them in a random order."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + file[start:]


def read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and header entries of a file of ours, checked against its sums.

    A file without sums, as they were until sums were introduced, is taken as it is.

    Raises:
        CheckpointError: if the file is missing or damaged; a tensor that is not the one that was saved is named.
    """
    source, entries = own_source(path)
    return {name: source.take(name).clone() for name in source.known}, entries


def own_source(path: Path) -> tuple[TensorSource, dict[str, str]]:
    """`read_own`, tensor by tensor: each is checked as it is taken."""
    source = safetensors_source([path])
    with _opened(path) as file:
        entries = dict(file.metadata() or {})
    if SUMS not in entries:
        return source, entries
    try:
        sums = json.loads(entries.pop(SUMS))
        astray = [f"missing {name}" for name in sums if name and name not in source.known]
        astray += [f"unexpected {name}" for name in source.known if name not in sums]
        astray += ["other header entries"] * (sums.get("") != _entries_sum(entries))
    except (ValueError, AttributeError) as error:
        astray = [str(error)]
    if astray:
        raise CheckpointError(f"{path} is damaged: it is not what was saved ({'; '.join(astray[:8])}); {_DAMAGED}.")

    def take(name: str) -> Tensor:
        tensor = source.take(name)
        found = tensor_sha256(name, tensor)
        if found != sums[name]:
            raise CheckpointError(
                f"{path} is damaged: the sha256 of {name} is {found}, and was {sums[name]} when it was saved; "
                f"{_DAMAGED}."
            )
        return tensor

    return TensorSource((path,), source.known, take), entries


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """sha256 over a tensor's name, shape, precision and bytes."""
    digest = hashlib.sha256(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _with_sums(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> dict[str, str]:
    sums = {name: tensor_sha256(name, tensor) for name, tensor in tensors.items()}
    return {**entries, SUMS: json.dumps(sums | {"": _entries_sum(entries)})}


def _entries_sum(entries: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


# -- safetensors, of whatever origin ----------------------------------------------------------------------------------


def safetensors_source(paths: Sequence[Path]) -> TensorSource:
    """What one or several safetensors files hold.

    Raises:
        CheckpointError: if a file is missing or damaged, or a name is in two of them.
    """
    where: dict[str, Path] = {}
    known: dict[str, Stored] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if name in where:
                    raise CheckpointError(f"{name} is in {where[name].name} and in {path.name}; {_DAMAGED}.")
                stored = file.get_slice(name)
                dtype = stored.get_dtype()
                where[name], known[name] = path, Stored(tuple(stored.get_shape()), _PRECISION.get(dtype, dtype))

    def take(name: str) -> Tensor:
        # opened anew for each tensor, because what was read of a file counts as memory until all of it is let go
        with _opened(where[name]) as file:
            return file.get_tensor(name)

    return TensorSource(tuple(paths), known, take)


def sharded_source(index: Path) -> TensorSource:
    """What the safetensors files hold that a `*.safetensors.index.json` names.

    Raises:
        CheckpointError: if the index or a file is missing or damaged, or a tensor is not where the index says.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{index} does not say which file holds which tensor (weight_map); {_DAMAGED}.")
    names = sorted(set(placed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file of its own folder.")
    source = safetensors_source([index.parent / name for name in names])
    astray = sorted(source.known.keys() ^ placed.keys())
    if astray:
        raise CheckpointError(
            f"{index} and the files that it names disagree about {', '.join(astray[:8])}; {_DAMAGED}."
        )
    return source


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged ({error}); {_DAMAGED}.") from error


# -- archives that torch.save wrote -----------------------------------------------------------------------------------


def archive_source(path: Path, conversions: Path | None) -> TensorSource:
    """What the archive `path` holds; read from its conversion in the folder `conversions`, which is made if missing.

    Without such a folder, or where nothing can be written to it, the archive itself is read.

    Raises:
        CheckpointError: if it is missing or damaged, or holds anything but tensors by name. Nothing in it is run.
    """
    records = _sound_records(path)
    if conversions is None:
        return _unpickled(path, records)
    converted = conversions / f"{hashlib.sha256(repr(sorted(records.items())).encode()).hexdigest()}.safetensors"
    if converted.is_file():
        with suppress(CheckpointError):  # one whose header is damaged is made again
            return replace(own_source(converted)[0], files=(path,), converted=converted)
    source = _unpickled(path, records)
    tensors = {name: source.take(name) for name in source.known}
    with suppress(OSError):
        _write(converted, tensors)
    return TensorSource((path,), source.known, tensors.pop, converted if converted.is_file() else None)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of ours, without a copy of it in memory; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), unfinished, _with_sums(tensors, {}))
        unfinished.replace(path)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sound_records(path: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and CRC-32 of each record, after all of them were found right."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            odd = next((i.filename for i in infos if i.compress_type or i.flag_bits & 1), None)
            wrong = odd or archive.testzip()
    # what zipfile raises on damage
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error) as error:
        raise CheckpointError(
            f"{path} is damaged, or no archive that torch.save wrote ({error}); {_DAMAGED}."
        ) from error
    records = {info.filename: (info.file_size, info.CRC) for info in infos}
    if wrong is not None:
        raise CheckpointError(f"{path} is damaged: the CRC of its record {wrong} is wrong; {_DAMAGED}.")
    if (
        not infos
        or min(info.header_offset for info in infos)
        or not any(name.endswith("/data.pkl") for name in records)
    ):
        raise CheckpointError(f"{path} is damaged: its directory does not list what torch.save writes; {_DAMAGED}.")
    if len(records) != len(infos) or sum(size for size, _ in records.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its directory lists a record twice; {_DAMAGED}.")
    return records


def plain_archive(path: Path) -> Any:
    """What the archive `path` holds besides a model: tensors, numbers and text, in whatever they lie.

    Raises:
        CheckpointError: if it is missing or damaged, or holds anything else. Nothing in it is run.
    """
    _sound_records(path)
    return _loaded(path)


def _loaded(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that torch would rather not meet; it reads or refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a file that was made to confuse it
        if isinstance(error, pickle.UnpicklingError):
            asked = re.search(r"GLOBAL (\S+)", str(error))
            named = f" ({asked.group(1)})" if asked else ""
            raise CheckpointError(
                f"{path} holds something besides tensors{named}; it was not loaded, and nothing in it was run."
            ) from error
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({said}); {_DAMAGED}.") from error


def _unpickled(path: Path, records: Mapping[str, tuple[int, int]]) -> TensorSource:
    found = _loaded(path)
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds a {type(found).__name__}, and not tensors by name: it is no checkpoint.")
    for name, tensor in found.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__} and no ordinary tensor.")
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values() if t.numel()}
    sizes = Counter(size for name, (size, _) in records.items() if "/data/" in name and size)
    if Counter(memory.values()) - sizes:
        raise CheckpointError(f"{path} is damaged: its tensors are larger than the records that hold them; {_DAMAGED}.")
    known = {n: Stored(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in found.items()}
    users = Counter(t.untyped_storage().data_ptr() for t in found.values())

    def take(name: str) -> Tensor:
        tensor = found.pop(name).detach()
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        alone = users[tensor.untyped_storage().data_ptr()] == 1 and whole and tensor.is_contiguous()
        return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)

    return TensorSource((path,), known, take)


# -- what lies beside them --------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: if the file is missing or is no such thing.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {_DAMAGED}.")
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, which is no configuration; {_DAMAGED}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_DAMAGED}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} and not a JSON object; {_DAMAGED}.")
    return found


def read_record(path: Path, version: int, again: str) -> dict[str, Any]:
    """What a JSON file of ours says, if it has format `version`; `again` is how to come by another one.

    Raises:
        CheckpointError: if the file is missing, cannot be read, or has another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it, or {again}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it, or {again}.") from error
    found = record.get("format_version") if isinstance(record, dict) else None
    if found != version:
        raise CheckpointError(
            f"{path} has format version {found}, and this library reads version {version}; "
            f"load it with the library version that saved it, or {again}."
        )
    return record
