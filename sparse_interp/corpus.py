"""Source text for training: files become documents, documents become a training and a validation part.

    files  ->  readable, hand-written, not yet seen  ->  documents  ->  (train, validation)

Everything here depends on the files alone: the same packages give the same documents in the same order, the same
split and the same content hash. A document is known by a name such as `stdlib/json/decoder.py`, never by its place on
a disk.

Near duplicates are found by line: a file is dropped when most of its distinct lines occur in files kept before it.
That is cheaper than comparing pairs of files and also catches a file stitched together from several others.
"""

import hashlib
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_interp.errors import ConfigError

MAX_FILE_BYTES = 1_000_000
"""Larger files are tables or generated code, bytes."""

MAX_LINE_CHARS = 2_000
"""A file with a longer line is data, characters."""

MIN_INFORMATIVE_CHARS = 20
"""Shorter lines (`else:`, `return None`) recur everywhere and say nothing about copying, characters."""

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Folder names below a root that are never entered: caches, nested package roots, test suites."""

_GENERATED = re.compile(r"(?:auto|automatically|machine)[- ]?generated|generated (?:by|from)|do not edit", re.I)
_GENERATED_WITHIN = 600


@dataclass(frozen=True)
class Document:
    """One text file, with its newlines as `\\n`."""

    name: str
    """Root name and relative path with forward slashes, e.g. `stdlib/json/decoder.py`."""

    text: str
    """The whole file as decoded text."""

    @property
    def is_stdlib(self) -> bool:
        """Whether the file belongs to Python's standard library."""
        return self.name.startswith("stdlib/")

    @property
    def package(self) -> str:
        """Root and top-level package or module: `stdlib/json`, `site-packages/rich`."""
        return "/".join(self.name.removesuffix(".py").split("/")[:2])


def python_sources(roots: Mapping[str, Path] | None = None) -> list[Document]:
    """Hand-written Python files below `roots` (name -> folder), de-duplicated, in a fixed order.

    Without `roots`: the running interpreter's standard library, then its installed packages. Earlier roots win where
    two files are near duplicates. Skipped: tests, files that are not UTF-8, empty, over 1 MB, generated, or mostly
    numbers.
    """
    if roots is None:
        paths = sysconfig.get_paths()
        roots = {"stdlib": Path(paths["stdlib"]), "site-packages": Path(paths["purelib"])}
    read = (document for root, folder in roots.items() for document in _read_folder(root, folder, "*.py"))
    documents = without_near_duplicates(document for document in read if _is_hand_written(document.text))
    if not documents:
        raise ConfigError(f"No usable Python file below {_listed(roots)}; name a folder that holds .py sources.")
    return documents


def text_files(folder: Path, pattern: str = "*.txt") -> list[Document]:
    """Every non-empty UTF-8 file below `folder` whose name matches the glob `pattern`, exact copies removed."""
    documents = without_near_duplicates(_read_folder(folder.name, folder, pattern), max_shared_frac=1.0)
    if not documents:
        raise ConfigError(f"No non-empty UTF-8 file matches {pattern!r} below {folder}; check folder and pattern.")
    return documents


def without_near_duplicates(documents: Iterable[Document], max_shared_frac: float = 0.6) -> list[Document]:
    """Keep each document unless it repeats earlier ones.

    Dropped: the same text up to white space, or more than `max_shared_frac` of the distinct informative lines already
    seen in kept documents.
    """
    kept: list[Document] = []
    seen_texts: set[bytes] = set()
    seen_lines: set[str] = set()
    for document in documents:
        fingerprint = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
        lines = informative_lines(document.text)
        if fingerprint in seen_texts or _shared_frac(lines, seen_lines) > max_shared_frac:
            continue
        seen_texts.add(fingerprint)
        seen_lines |= lines
        kept.append(document)
    return kept


def split_documents(
    documents: Sequence[Document],
    validation_frac: float = 0.1,
    eligible: Callable[[Document], bool] = lambda document: True,
    max_shared_frac: float = 0.2,
) -> tuple[list[Document], list[Document]]:
    """Hold out whole files for validation: (train, validation).

    A document is held out when it is `eligible` and the hash of its name falls in the lowest `validation_frac`, so
    adding or removing other files moves none. A held-out file that shares more than `max_shared_frac` of its
    informative lines with the training files would measure memory: it goes back to them.
    """
    if not 0 < validation_frac < 1:
        raise ConfigError(f"validation_frac is a share of the eligible files, between 0 and 1; got {validation_frac}.")
    held_out = {d.name for d in documents if eligible(d) and _unit_hash(d.name) < validation_frac}
    train_lines: set[str] = set()
    for document in documents:
        if document.name not in held_out:
            train_lines |= informative_lines(document.text)
    leaked = {
        d.name
        for d in documents
        if d.name in held_out and _shared_frac(informative_lines(d.text), train_lines) > max_shared_frac
    }
    held_out -= leaked
    train = [d for d in documents if d.name not in held_out]
    validation = [d for d in documents if d.name in held_out]
    if not train or not validation:
        raise ConfigError(
            f"Splitting {len(documents)} documents at validation_frac={validation_frac} leaves {len(train)} for "
            f"training and {len(validation)} for validation ({len(leaked)} went back as near duplicates); both need "
            "one or more. Give more documents or another share."
        )
    return train, validation


def sample_documents(
    documents: Iterable[Document], sample_frac: float, always: Callable[[Document], bool] = lambda document: False
) -> list[Document]:
    """The documents for which `always` holds, and a share `sample_frac` of the others, chosen by name.

    The choice is independent of the one that `split_documents` makes.
    """
    return [d for d in documents if always(d) or _unit_hash(f"sample {d.name}") < sample_frac]


def content_hash(documents: Iterable[Document]) -> str:
    """sha256 over names and texts, whatever the order of the documents."""
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda d: d.name):
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def sources_manifest(documents: Sequence[Document]) -> dict[str, object]:
    """What the documents are and where they came from, ready for JSON: counts, hash, versions, bytes per package."""
    members: dict[str, list[Document]] = {}
    for document in documents:
        members.setdefault(document.package, []).append(document)
    distributions = importlib.metadata.packages_distributions()
    packages = {
        name: {"files": len(files), "bytes": _n_bytes(files), "version": _version(name, distributions)}
        for name, files in sorted(members.items())
    }
    return {
        "n_files": len(documents),
        "n_bytes": _n_bytes(documents),
        "sha256": content_hash(documents),
        "python": platform.python_version(),
        "packages": packages,
    }


def informative_lines(text: str) -> set[str]:
    """The distinct lines of `text`, stripped, that are long enough to tell files apart."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= MIN_INFORMATIVE_CHARS}


def _read_folder(root: str, folder: Path, pattern: str) -> Iterable[Document]:
    """Documents below `folder` in sorted order; an undecodable, empty or oversized file is no document."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} (root {root!r}) is not a folder that can be read; give an existing folder.")
    for path in sorted(folder.rglob(pattern)):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]) or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except (UnicodeDecodeError, PermissionError):
            continue
        if text.strip():
            yield Document(f"{root}/{relative.as_posix()}", text.replace("\r\n", "\n").replace("\r", "\n"))


def _is_hand_written(text: str) -> bool:
    """False for generated code, tables of numbers and embedded data."""
    if _GENERATED.search(text, 0, _GENERATED_WITHIN) or max(map(len, text.split("\n"))) > MAX_LINE_CHARS:
        return False
    counts = np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256)
    visible = counts[33:].sum()
    letters = counts[ord("A") : ord("Z") + 1].sum() + counts[ord("a") : ord("z") + 1].sum()
    digits = counts[ord("0") : ord("9") + 1].sum()
    return bool(letters > 0.5 * visible and digits < 0.15 * visible and counts[128:].sum() < 0.2 * visible)


def _shared_frac(lines: set[str], seen: set[str]) -> float:
    return len(lines & seen) / len(lines) if lines else 0.0


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _n_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _version(package: str, distributions: Mapping[str, Sequence[str]]) -> str | None:
    """Version of the installed distribution that provides `site-packages/NAME`, where there is one."""
    root, _, module = package.partition("/")
    names = distributions.get(module, []) if root == "site-packages" else []
    return importlib.metadata.version(names[0]) if names else None


def _listed(roots: Mapping[str, Path]) -> str:
    return ", ".join(f"{name}={folder}" for name, folder in roots.items())
