"""What is fetched, and where it is kept.

    <cache>/openai/models/<model>/ ...       a copy of OpenAI's store, as far as it was asked for; see model/releases.py
    <cache>/openai/tinypython/ ...
    <cache>/openai/viz/<model>/ ...
    <cache>/hub/<owner>/<name>/              a Hugging Face repository
    <cache>/tokenizers/<owner>/<name>/       the tokenizer of one

What somebody else put there is taken as if it had been fetched, so a machine without a network needs a copy of the
cache folder and nothing else. Data are fetched and never code.
"""

import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from sparse_interp.errors import DownloadError
from sparse_interp.model.download import fetch, fetch_repository, is_there
from sparse_interp.model.released_config import RECIPE
from sparse_interp.model.releases import BASE, OWNER, PublishedFile

LONGEST_LISTING = 2**26
"""Bytes of a listing that are read; a page of 5,000 files has about two million."""


@dataclass(frozen=True)
class Store:
    """OpenAI's store and the Hugging Face hub, and the folder in which what they hold is kept."""

    cache: Path
    """That folder."""

    base: str = BASE
    """Address of the store, or of a mirror of it."""

    hub: str | None = None
    """Address of the hub; None is its own."""

    offline: bool = False
    """Fetch nothing."""

    def files(self, what: str, files: Sequence[PublishedFile], progress: bool, note: str = "") -> list[Path]:
        """Where these files are, fetched if they are not here yet.

        Args:
            what: they are, for messages.
            note: what to know if they cannot be had.

        Raises:
            NotPublishedError: if the store has no such file.
            DownloadError: if one cannot be fetched; offline, with what to do.
        """
        note = f" {note}" if note else ""
        lacking = self.lacking(files)
        if lacking and self.offline:
            lines = "".join(f"\n  {self._url(file)}\n    -> {self._beside(file)}" for file in lacking)
            raise DownloadError(
                f"{what} is not whole in the cache folder {self.cache}, and SPARSE_INTERP_OFFLINE forbids fetching it."
                f"{note} Unset that, or copy these files from a machine with a network:{lines}"
            )
        for file in lacking:
            check = _CHECKS.get(PurePosixPath(file.path).suffix)
            known = {"size": file.size, "sha256": file.sha256}
            try:
                fetch(self._url(file), self._place(file), **known, check=check, progress=progress)
            except DownloadError as error:
                raise type(error)(f"{what}: {error}{note}") from error
        return [self._place(file) for file in files]

    def lacking(self, files: Sequence[PublishedFile]) -> list[PublishedFile]:
        """Those of the files that are not here."""
        return [file for file in files if not is_there(self._place(file), file.size)]

    def repository(self, name: str, kind: str, choose: Callable[[list[str]], list[str]], progress: bool) -> Path:
        """Where a Hugging Face repository is, or what is `chosen` of it, fetched if it is not here yet.

        Raises:
            NotPublishedError: if the hub has no such repository.
            DownloadError: if it cannot be fetched; offline, with what to do.
        """
        folder = self.cache / kind / name
        if not folder.is_dir() and self.offline:
            raise DownloadError(
                f"{name} is not in the cache folder {self.cache}, and SPARSE_INTERP_OFFLINE forbids fetching it. Unset "
                "that, or have this command fetch it on a machine with a network, and copy the folder:\n"
                f"  hf download {name} --local-dir FOLDER\n    -> {folder}\n"
            )
        return fetch_repository(name, folder, choose, hub=self.hub, progress=progress)

    def repositories(self) -> list[str]:
        """Names of those that are here."""
        found = [path for path in (self.cache / "hub").glob("*/*") if path.is_dir() and path.suffix != ".partial"]
        return sorted(path.relative_to(self.cache / "hub").as_posix() for path in found)

    def listing(self, prefix: str, progress: bool) -> list[str]:
        """Names of the store's files in the folder `prefix`, and in those below it; offline, of those that are here.

        Raises:
            DownloadError: if the store, or the mirror, does not list its files.
        """
        if self.offline:
            here = self.cache / OWNER
            found = (path for path in here.glob(f"{prefix}**/*") if path.is_file() and not path.name.startswith("."))
            return sorted(path.relative_to(here).as_posix() for path in found)
        names: list[str] = []
        marker = ""
        while True:
            asked = {"restype": "container", "comp": "list", "prefix": prefix} | ({"marker": marker} if marker else {})
            with tempfile.TemporaryDirectory() as folder:
                path = fetch(f"{self.base}?{urlencode(asked)}", Path(folder) / "listing.xml", progress=progress)
                page = self._page(path)
            names += [name.text for name in page.iterfind("Blobs/Blob/Name") if name.text]
            following = page.findtext("NextMarker") or ""
            if following in ("", marker):
                return names
            marker = following

    def _page(self, path: Path) -> ElementTree.Element:
        """A listing, which declares nothing of its own: no entities, hence none that grow or that name files."""
        text = path.read_bytes()
        try:
            if len(text) > LONGEST_LISTING or b"<!" in text:
                raise ElementTree.ParseError("it is too long, or declares entities")
            return ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise DownloadError(
                f"{self.base} answered with something else than a list of its files ({error}). A mirror need not be "
                "able to list them: name the circuit by its task, sweep and k."
            ) from error

    def _place(self, file: PublishedFile) -> Path:
        return self.cache / OWNER / file.path

    def _beside(self, file: PublishedFile) -> str:
        """Where a file that is lacking belongs, and what is there in its place."""
        place = self._place(file)
        wrong = f"; what is there has {place.stat().st_size:,}" if place.is_file() else ""
        return str(place) if file.size is None else f"{place} ({file.size:,} bytes{wrong})"

    def _url(self, file: PublishedFile) -> str:
        return f"{self.base}/{quote(file.path)}"


# -- which files of a repository are wanted, and what is looked at in a file -------------------------------------------


def model_files(files: list[str]) -> list[str]:
    """What loading a model takes: its description and recipe, its tokenizer, and its weights in one form.

    Raises:
        DownloadError: if there are no weights.
    """
    here = [file for file in files if "/" not in file]
    for ending in (".safetensors", ".pt", ".bin"):
        weights = [file for file in here if file.endswith(ending)]
        if weights:
            return [*tokenizer_files(files), *(file for file in here if file == RECIPE), *weights]
    raise DownloadError(f"the repository holds no weights; its files are {', '.join(files[:20]) or 'none'}.")


def tokenizer_files(files: list[str]) -> list[str]:
    """Everything in JSON, and the merges of a tokenizer."""
    here = [file for file in files if "/" not in file or file.startswith("tokenizer/")]
    return [file for file in here if file.endswith((".json", ".bpe", "merges.txt"))]


def _archive_fault(path: Path) -> str | None:
    """What is wrong with an archive of tensors, which is a zip archive whose every record has a CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        return f"it is no archive of tensors ({error})"
    return f"its record {damaged} is damaged" if damaged else None


def _json_fault(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"it is not JSON ({error})"
    return None


_CHECKS = {".pt": _archive_fault, ".json": _json_fault}
"""What is looked at besides size and hash, by a file's ending."""
