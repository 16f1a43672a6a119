"""A file from the web: whole and as it should be, or not there at all.

    final_model.pt                appears by a rename, after its size and sha256 were found right
    final_model.pt.partial        what has come so far; the next attempt, or the next run, goes on from its end
    final_model.pt.partial.json   what that is the beginning of: URL, ETag, length
    .final_model.pt.lock          held by the one process that is fetching; the others wait, and find the file there

An answer is appended to what is there only if it is more of the same version: the ETag is sent as If-Range and compared
with the answer's (RFC 9110, sections 13.1.5 and 14.4), or a known sha256 judges the whole. All else begins anew.

What may pass is tried again after pauses that double: a connection that is refused, lost or silent, HTTP 408, 425, 429
and 5xx. What will not pass ends at once: any other status, a web page in place of a file, another length, a full disk.
"""

import hashlib
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from sparse_interp.errors import DownloadError, NotPublishedError, SparseInterpError

ATTEMPTS = 5
"""Attempts in a row that bring less than `HEADWAY`, before giving up."""

HEADWAY = 2**20
"""Bytes beyond what any earlier attempt had that make the next attempt the first one again."""

PAUSE_S = 1.0
"""Pause after the first such attempt, seconds; each further one is twice as long."""

LONGEST_PAUSE_S = 60.0
"""The longest pause, also if a server asks for more."""

CONNECT_S, READ_S = 15.0, 60.0
"""How long a connection may take, and how long a server may send nothing, seconds."""

CHUNK = 2**16
"""Bytes written at a time; a lost connection costs fewer than these."""

PASSING = {408, 425, 429}
"""Refusals that say: later."""


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], str | None] | None = None,
    progress: bool = True,
) -> Path:
    """The file at `url`, as `path`; a file that is there already, of the right size, is taken as it is.

    An interrupted call leaves what had come, and the next one goes on from there. Processes that want one file fetch it
    once.

    Args:
        size: bytes that the file has, where that is known.
        sha256: its sha256 in hexadecimal digits, where that is known; or the first of them.
        check: says what else is wrong with the file, before it takes its place.

    Raises:
        NotPublishedError: if the server says that there is no such file.
        DownloadError: if the file cannot be fetched, is not the one that it should be, or cannot be written.
    """
    if is_there(path, size):
        return path
    with _disk_errors(path), only_one(path, progress):
        if not is_there(path, size):
            partial = _Partial(path)
            _bring(url, partial, size, sha256, check, progress)
            partial.become(path)
    return path


def fetch_repository(
    name: str,
    folder: Path,
    choose: Callable[[list[str]], list[str]],
    *,
    hub: str | None = None,
    progress: bool = True,
) -> Path:
    """Files of a Hugging Face repository as `folder`, which appears whole or not at all; nothing in it is ever run.

    Args:
        name: owner and name, as in "openai/circuit-sparsity".
        choose: which of the repository's files are wanted.
        hub: address of the hub; None leaves it to huggingface_hub, which obeys HF_ENDPOINT.

    Raises:
        NotPublishedError: if the hub says that there is no such repository.
        DownloadError: if the repository cannot be fetched, or a file in it is not what the hub says it is.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    with _disk_errors(folder), only_one(folder, progress):
        if not folder.is_dir():
            wanted = _from_the_hub(name, partial, choose, hub, progress)
            for file in wanted:
                fault = _fault(partial / file.rfilename, file.size, file.lfs and file.lfs.sha256)
                if fault is not None:
                    (partial / file.rfilename).unlink(missing_ok=True)
                    raise DownloadError(f"{file.rfilename} of {name}: {fault}. It is deleted; try again.")
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own notes
            partial.replace(folder)
    return folder


@contextmanager
def only_one(path: Path, progress: bool) -> Iterator[None]:
    """Inside the block, no other process fetches `path`; a process that has to wait for that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = f"{path.name}: another process is fetching it"
        with tqdm(desc=said, bar_format="{desc} [{elapsed}]", disable=not progress) as bar:
            while not lock.is_locked:
                with suppress(Timeout):
                    lock.acquire(timeout=0.2)
                bar.refresh()
    try:
        yield
    finally:
        lock.release()


# -- what has come so far ----------------------------------------------------------------------------------------------


class _Partial:
    """The beginning of a file, and the note of what it is the beginning of."""

    def __init__(self, path: Path):
        self.file = path.with_name(f"{path.name}.partial")
        self.note = path.with_name(f"{path.name}.partial.json")

    @property
    def n_bytes(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    def begun(self, url: str, sha256: str | None) -> dict[str, Any]:
        """`url`, `etag` and `total` of the file that this is the beginning of; empty if it cannot be gone on with."""
        try:
            said = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        whole_note = isinstance(said, dict) and said.keys() == {"url", "etag", "total"}
        if not whole_note or not isinstance(said["etag"], str | None) or self.n_bytes == 0:
            return {}
        return said if sha256 is not None or (said["url"] == url and said["etag"] is not None) else {}

    def begin(self, note: dict[str, Any] | None) -> None:
        """Empty the file, then note what comes; None: nothing that can be gone on with."""
        self.file.write_bytes(b"")
        self.note.unlink(missing_ok=True)
        if note is not None:
            self.note.write_text(json.dumps(note), encoding="utf-8")

    def discard(self) -> None:
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def become(self, path: Path) -> None:
        """The partial file is the whole one."""
        with self.file.open("rb") as file:
            os.fsync(file.fileno())
        self.file.replace(path)
        self.note.unlink(missing_ok=True)


def is_there(path: Path, size: int | None) -> bool:
    """A file is at `path`, and has that size, if one is given."""
    return path.is_file() and size in (None, path.stat().st_size)


def _fault(path: Path, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with the file, if anything is."""
    if not path.is_file():
        return "it did not come"
    found = path.stat().st_size
    if size not in (None, found):
        return f"it has {found:,} bytes, and the file that it should be has {size:,}"
    if sha256 is None:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.startswith(sha256.lower()):
        return None
    return f"its sha256 is {digest}, and that of the file that it should be is {sha256}"


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """An error of the disk says which file it kept from being written."""
    try:
        yield
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be written ({error.strerror or error}). Free some space or choose another folder; "
            "what has come is kept, and the next attempt goes on from there."
        ) from error


# -- attempts ----------------------------------------------------------------------------------------------------------


class _Passing(Exception):
    """An attempt that failed for a reason that may pass; `pause_s`: what the server asked for."""

    def __init__(self, reason: str, pause_s: float = 0.0):
        super().__init__(reason)
        self.pause_s = pause_s


def _bring(
    url: str,
    partial: _Partial,
    size: int | None,
    sha256: str | None,
    check: Callable[[Path], str | None] | None,
    progress: bool,
) -> None:
    """Have the whole file in `partial`, checked.

    If the check fails and some of the bytes were there before, they may be what is wrong: once more, from the start.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    shown = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "dynamic_ncols": True}
    for _ in range(2):
        with tqdm(desc=name, total=size, initial=partial.n_bytes, disable=not progress, **shown) as bar:
            resumed = _receive(url, partial, size, sha256, bar)
        fault = _fault(partial.file, size, sha256) or (check and check(partial.file))
        if not fault:
            return
        partial.discard()
        if not resumed:
            break
    raise DownloadError(
        f"what {url} holds is not the file that it should be: {fault}. What had come is deleted. If the file was "
        "replaced on purpose and you trust it, save it in a folder of your own and load that folder."
    )


def _receive(url: str, partial: _Partial, size: int | None, sha256: str | None, bar: tqdm) -> bool:
    """Ask until the last byte is there; True if there were bytes to go on from."""
    failed, furthest, resumed = 0, partial.n_bytes, False
    while True:
        begun = partial.begun(url, sha256)
        resumed |= bool(begun)
        if begun and partial.n_bytes == (size or begun["total"]):
            return resumed
        try:
            _attempt(url, partial, begun, size, sha256, bar)
            return resumed
        except _Passing as fault:
            n_bytes = partial.n_bytes
            failed = 1 if n_bytes >= furthest + HEADWAY else failed + 1
            furthest = max(furthest, n_bytes)
            if failed >= ATTEMPTS:
                raise DownloadError(_gave_up(url, partial, sha256, fault, failed)) from fault
            pause = min(max(PAUSE_S * 2 ** (failed - 1), fault.pause_s), LONGEST_PAUSE_S)
            bar.set_postfix_str(f"{fault}; attempt {failed + 1} of {ATTEMPTS} in {pause:.0f} s")
            time.sleep(pause)
            bar.set_postfix_str("")


def _gave_up(url: str, partial: _Partial, sha256: str | None, fault: _Passing, failed: int) -> str:
    if partial.begun(url, sha256):
        kept = f"{partial.n_bytes:,} bytes are kept in {partial.file}, and the next attempt goes on from there."
    else:
        partial.discard()
        kept = "Nothing had come that could be kept."
    return (
        f"{url} could not be fetched: {fault}, {failed} times in a row. {kept} Check the network (a proxy is named in "
        "HTTPS_PROXY) and try again, or fetch the file by other means."
    )


def _attempt(
    url: str, partial: _Partial, begun: dict[str, Any], size: int | None, sha256: str | None, bar: tqdm
) -> None:
    """Ask once, and write what comes until the end of the file; `begun`: the note of bytes to go on from."""
    start = partial.n_bytes if begun else 0
    with _Answer(url, start, begun.get("etag")) as answer:
        if start and answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.discard()
            raise _Passing("the file on the server is shorter than what had come, which is discarded")
        answer.refuse_what_is_no_file(size, sha256)
        if answer.status == HTTPStatus.PARTIAL_CONTENT and not answer.goes_on(start, begun, sha256):
            partial.discard()
            raise _Passing("the file on the server is another one than what had come, which is discarded")
        if answer.status == HTTPStatus.OK:
            start = 0
        whole = answer.total or size
        _refuse_full_disk(partial, (whole or 0) - start)
        if start == 0:
            partial.begin(answer.note)
        bar.total, bar.n = whole, start
        bar.refresh()
        with partial.file.open("ab") as file:
            for chunk in answer.chunks():
                file.write(chunk)
                bar.update(len(chunk))
                if size is not None and file.tell() > size:
                    break
    if whole is not None and partial.n_bytes < whole:
        raise _Passing(f"the answer ended after {partial.n_bytes:,} of {whole:,} bytes")


def _refuse_full_disk(partial: _Partial, needed: int) -> None:
    free = shutil.disk_usage(partial.file.parent).free
    if needed > free:
        raise DownloadError(
            f"{partial.file.parent} has {free:,} bytes free, and {needed:,} more are to come; "
            "free some space, or choose a folder on another disk."
        )


class _Answer:
    """A server's answer to the request for a file, from byte `start` on.

    Raises:
        _Passing: inside the `with` block too, for what may pass.
        DownloadError: for what will not.
    """

    def __init__(self, url: str, start: int, etag: str | None):
        import requests  # when something is fetched and not before: these two take their time, and set warning filters
        import urllib3

        self.requests, self.url = requests, url
        self.failures = (requests.RequestException, urllib3.exceptions.HTTPError)
        self.headers = {"Accept-Encoding": "identity"}
        if start:
            self.headers["Range"] = f"bytes={start}-"
        if start and etag is not None:
            self.headers["If-Range"] = etag

    def __enter__(self) -> "_Answer":
        try:
            self.response = self.requests.get(self.url, headers=self.headers, stream=True, timeout=(CONNECT_S, READ_S))
        except self.failures as error:
            self._raise(error)
        self.status = self.response.status_code
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.response.close()
        if isinstance(error, self.failures):
            self._raise(error)

    def _raise(self, error: Exception) -> NoReturn:
        """Say what kind of failure of the connection `error` is."""
        known, said = self.requests.exceptions, repr(error)
        if "CERTIFICATE_VERIFY_FAILED" in said:
            raise DownloadError(
                f"{self.url}: the server's certificate is not one that this machine trusts. If a proxy stands between, "
                "name its certificates in REQUESTS_CA_BUNDLE."
            ) from error
        final = known.TooManyRedirects | known.InvalidURL | known.InvalidSchema | known.MissingSchema
        if isinstance(error, final):
            raise DownloadError(f"{self.url} leads nowhere: {error}; check the address.") from error
        if isinstance(error, known.ConnectTimeout):
            raise _Passing(f"no connection within {CONNECT_S:g} s") from error
        if isinstance(error, known.Timeout) or "timed out" in said:
            raise _Passing(f"the server sent nothing for {READ_S:g} s") from error
        if isinstance(error, known.ProxyError):
            raise _Passing("the proxy did not let the connection through") from error
        if "NameResolutionError" in said or "getaddrinfo" in said:
            raise _Passing(f"the name {urlsplit(self.url).hostname} leads to no address") from error
        if isinstance(error, known.ContentDecodingError):
            raise _Passing("the answer is compressed, and damaged") from error
        raise _Passing("the connection was refused" if "refused" in said else "the connection was lost") from error

    def refuse_what_is_no_file(self, size: int | None, sha256: str | None) -> None:
        """Raise unless what follows can be the file."""
        if self.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            self._refuse_status()
        kind = self.response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind == "text/html" and not urlsplit(self.url).path.endswith((".html", ".htm")):
            raise DownloadError(
                f"{self.url} was answered with a web page and not with a file; a proxy or a log-in page of this "
                "network may stand between. Open the address in a browser to see."
            )
        if self.total == 0:
            raise DownloadError(f"{self.url} is an empty file; whoever serves it has to repair it.")
        if None not in (size, self.total) and self.total != size:
            raise DownloadError(
                f"{self.url} has {self.total:,} bytes, and the file that it should be has {size:,}. If the file was "
                "replaced on purpose and you trust it, save it in a folder of your own and load that folder."
            )
        delimited = "chunked" in self.response.headers.get("Transfer-Encoding", "").lower()
        if self.total is None and size is None and sha256 is None and not delimited and not self.encoded:
            raise DownloadError(
                f"{self.url}: the server does not say how long the file is, so half of it would pass for the whole; "
                "fetch the file by other means."
            )

    def _refuse_status(self) -> None:
        phrase = f"HTTP {self.status} {self.response.reason}"
        if self.status in PASSING or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            asked = self.response.headers.get("Retry-After", "")
            raise _Passing(f"the server answered {phrase}", float(asked) if asked.isdigit() else 0.0)
        if self.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            raise NotPublishedError(
                f"{self.url} is not there ({phrase}); check the name, or whether the file has been withdrawn."
            )
        raise DownloadError(
            f"{self.url} could not be fetched: {phrase}; check the address, or whether the server lets you have it."
        )

    @property
    def encoded(self) -> bool:
        """The body is compressed for the way, so its positions are not those of the file."""
        return self.response.headers.get("Content-Encoding", "identity") != "identity"

    @property
    def etag(self) -> str | None:
        """What names this version of the file byte for byte; a weak ETag does not."""
        etag = self.response.headers.get("ETag")
        return None if etag is None or etag.startswith("W/") else etag

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, if the server says so."""
        if self.status == HTTPStatus.PARTIAL_CONTENT:
            said = self.response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            said = "" if self.encoded else self.response.headers.get("Content-Length", "")
        return int(said) if said.isdigit() else None

    @property
    def note(self) -> dict[str, Any] | None:
        """What to remember of a whole file that begins to come; None if it could not be gone on with."""
        return None if self.encoded else {"url": self.url, "etag": self.etag, "total": self.total}

    def goes_on(self, start: int, begun: dict[str, Any], sha256: str | None) -> bool:
        """The body is the rest of the very file whose first `start` bytes are there."""
        said = self.response.headers.get("Content-Range", "")
        same = sha256 is not None if None in (self.etag, begun.get("etag")) else self.etag == begun["etag"]
        return bool(start) and same and not self.encoded and said.startswith(f"bytes {start}-")

    def chunks(self) -> Iterator[bytes]:
        return self.response.iter_content(CHUNK)


# -- the Hugging Face hub ----------------------------------------------------------------------------------------------


def _from_the_hub(
    name: str, folder: Path, choose: Callable[[list[str]], list[str]], hub: str | None, progress: bool
) -> list[Any]:
    """Fetch the chosen files into `folder`; what the hub says of each of them."""
    silent = are_progress_bars_disabled()
    try:
        if not progress:
            disable_progress_bars()
        about = huggingface_hub.HfApi(endpoint=hub).model_info(name, files_metadata=True)
        files = {file.rfilename: file for file in about.siblings or []}
        wanted = choose(sorted(files))
        huggingface_hub.snapshot_download(
            name, revision=about.sha, local_dir=folder, allow_patterns=wanted, endpoint=hub
        )
    except SparseInterpError:
        raise
    except RepositoryNotFoundError as error:
        raise NotPublishedError(
            f"the Hugging Face hub has no repository {name} that you may read; check the name, and for one that is not "
            "public log in with `hf auth login`."
        ) from error
    except Exception as error:  # the client raises the errors of whichever HTTP library its version is built on
        said = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise DownloadError(
            f"the Hugging Face repository {name} could not be fetched. Check the network and try again; what has come "
            f"is kept. {type(error).__name__}: {said}"
        ) from error
    finally:
        if not progress and not silent:
            enable_progress_bars()
    return [files[path] for path in wanted]
