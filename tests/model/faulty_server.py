"""A web server on this machine that misbehaves as it is told, and the faults that downloads are tried with.

    with FaultyServer({"/f.pt": body}) as server:
        server.script = [cut_off(1000), honest]        # first request, second; the last serves all that follow
        fetch(server.url + "/f.pt", path)
        server.ranges                                  # the Range header of each request, in order

A `Fault` is a script with what has to come of it. The tests hold each one; `benchmarks/download_faults.py` prints them.
"""

import gzip
import hashlib
import io
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

BODY = random.Random(0).randbytes(300_000)
"""A file of several of the pieces that are written at a time, of which no byte can be guessed."""

OTHER = random.Random(1).randbytes(len(BODY))
"""Another version of it, of the same length."""

SHA256 = hashlib.sha256(BODY).hexdigest()

SHORT = {"PAUSE_S": 0.02, "CONNECT_S": 2.0, "READ_S": 0.3, "HEADWAY": 2**20}
"""Pauses and limits of `download`, for tests."""

MUCH = len(BODY) // 2
"""Bytes that come before a connection ends."""

KEPT = MUCH - MUCH % 2**16
"""Bytes that are kept of these: whole pieces."""


def archive(**tensors: torch.Tensor) -> bytes:
    """As `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


class FaultyServer:
    """Serves `files` (path -> bytes, or a function of the query), each request as the next entry of `script` says."""

    def __init__(self, files: dict[str, Any], script: list[Callable] | None = None):
        self.files, self.script = files, script or [honest]
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.over = threading.Event()
        owner, turns = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with turns:
                    owner.requests.append((self.path, dict(self.headers)))
                    behave = owner.script[min(len(owner.requests), len(owner.script)) - 1]
                file = owner.files.get(unquote(urlsplit(self.path).path))
                self.over = owner.over
                with suppress(OSError):  # whoever asked is gone
                    if file is None:
                        status(404, X_Error_Code="RepoNotFound")(self, b"")  # as the hub says it
                    else:
                        behave(self, file(self) if callable(file) else file)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

            def answer(self, code: int, body: bytes = b"", /, length: int | None = None, **headers):
                self.send_response(code)
                headers = {"Content_Length": len(body) if length is None else length} | headers
                for name, value in headers.items():
                    if value is not None:
                        self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def hang_up(self, how: int = 0):
                """Close the connection at once; with `how` = 1, by a reset."""
                self.wfile.flush()
                if how:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    self.connection.shutdown(socket.SHUT_WR)
                self.close_connection = True
                self.connection.close()

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(*_)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


# -- ways to answer ----------------------------------------------------------------------------------------------------


def etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def honest(request, body: bytes, n_sent: int | None = None, tag: str | None = "", if_range: bool = True):
    """As a good server does: ranges, and If-Range obeyed."""
    tag = etag(body) if tag == "" else tag
    said = {"ETag": tag, "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
    asked = request.headers.get("Range", "")
    if not asked or (if_range and request.headers.get("If-Range", tag) != tag):
        return request.answer(200, body[:n_sent], length=len(body), **said)
    start = int(asked.removeprefix("bytes=").rstrip("-"))
    if start >= len(body):
        return request.answer(416, Content_Range=f"bytes */{len(body)}")
    rest, where = body[start:], f"bytes {start}-{len(body) - 1}/{len(body)}"
    sent = rest if n_sent is None else rest[:n_sent]
    return request.answer(206, sent, length=len(rest), Content_Range=where, **said)


def cut_off(n: int, how: int = 0):
    """The connection ends after `n` bytes of the body; with `how` = 1, by a reset."""

    def behave(request, body):
        honest(request, body, n_sent=n)
        request.hang_up(how)

    return behave


def status(code: int, **headers):
    return lambda request, _: request.answer(code, b"no", **headers)


def stalled(n: int):
    """`n` bytes, and then nothing, on an open connection."""

    def behave(request, body):
        honest(request, body, n_sent=n)
        request.wfile.flush()
        request.over.wait(120)
        request.close_connection = True

    return behave


def silent(request, _):
    """Not even a status line."""
    request.over.wait(120)
    request.close_connection = True


def slow(request, body):
    """In twenty pieces, with pauses."""
    honest(request, body, n_sent=0)
    start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    rest = body[start:]
    step = -(-len(rest) // 20)
    for i in range(0, len(rest), step):
        request.wfile.write(rest[i : i + step])
        request.over.wait(0.03)


def no_ranges(n: int | None = None):
    """A server that knows no ranges, and sends `n` bytes before the connection ends."""

    def behave(request, body):
        request.answer(200, body[:n], length=len(body), ETag=etag(body))
        if n is not None:
            request.hang_up()

    return behave


def replaced(request, _):
    """The file is another one now."""
    honest(request, OTHER)


def replaced_without_a_word(request, _):
    """The file is another one now, and the server pays no heed to If-Range."""
    honest(request, OTHER, if_range=False)


def untagged(n: int | None = None):
    """No ETag, so nothing tells one version from the next."""

    def behave(request, body):
        honest(request, body, n_sent=n, tag=None)
        if n is not None:
            request.hang_up()

    return behave


def weakly_tagged(n: int):
    def behave(request, body):
        honest(request, body, n_sent=n, tag=f"W/{etag(body)}")
        request.hang_up()

    return behave


def redirected(request, body):
    if request.path.endswith("?moved"):
        return honest(request, body)
    return request.answer(302, Location=f"{request.path}?moved")


def in_a_circle(request, _):
    request.answer(302, Location=request.path)


def web_page(request, _):
    request.answer(200, b"<html>Log in to the network</html>", Content_Type="text/html; charset=utf-8")


def shorter(request, body):
    """Another length, which its first line says; no byte need come."""
    honest(request, body[:1000], n_sent=0)
    request.hang_up()


def gzipped(request, body):
    request.answer(200, gzip.compress(body, 1), Content_Encoding="gzip", ETag=etag(body))


def gzipped_and_damaged(request, body):
    packed = bytearray(gzip.compress(body, 1))
    packed[:10] = b"not gzip!!"
    request.answer(200, bytes(packed), Content_Encoding="gzip", ETag=etag(body))


def gzipped_with_a_wrong_bit(request, body):
    """Which shows only at the end, when the sum does not fit."""
    packed = bytearray(gzip.compress(body, 0))
    packed[1000] ^= 1
    request.answer(200, bytes(packed), Content_Encoding="gzip", ETag=etag(body))


def gzipped_and_cut_off(request, body):
    packed = gzip.compress(body, 1)
    request.answer(200, packed[:MUCH], length=len(packed), Content_Encoding="gzip", ETag=etag(body))
    request.hang_up()


def in_chunks(n: int | None = None, whole: bool = False, end: bytes = b""):
    """Chunked transfer, which states no length; after `n` bytes the connection is lost, unless they are `whole`."""

    def behave(request, body):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        sent = body[:n] + end
        for i in range(0, len(sent), 50_000):
            piece = sent[i : i + 50_000]
            request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if n is None or whole:
            request.wfile.write(b"0\r\n\r\n")
        else:
            request.hang_up()

    return behave


def without_a_length(n: int | None = None):
    """The end of the connection is the end of the file, or not."""

    def behave(request, body):
        request.answer(200, body[:n], Content_Length=None, ETag=etag(body))
        request.hang_up()

    return behave


# -- a Hugging Face hub ------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(name: str, contents: dict[str, bytes]) -> dict[str, Any]:
    """What a server has to hold to pass for the hub with one repository; `.safetensors` and `.bin` are LFS files."""

    def entry(path: str, body: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(body).hexdigest()
        large = path.endswith((".safetensors", ".bin"))
        lfs = {"lfs": {"oid": digest, "sha256": digest, "size": len(body), "pointerSize": 134}} if large else {}
        return {"path": path, "rfilename": path, "type": "file", "size": len(body), "oid": digest[:40]} | lfs

    def says(what: Any) -> Callable[[Any], bytes]:
        return lambda _: json.dumps(what).encode()

    entries = [entry(path, body) for path, body in contents.items()]
    about = {"id": name, "sha": COMMIT, "siblings": entries, "private": False, "downloads": 0, "tags": []}
    files: dict[str, Any] = {f"/api/models/{name}{end}": says(about) for end in ("", f"/revision/{COMMIT}")}
    files[f"/api/models/{name}/tree/{COMMIT}"] = says(entries)
    return files | {f"/{name}/resolve/{COMMIT}/{path}": body for path, body in contents.items()}


def as_hub(request, body: bytes):
    """Files with the hub's headers; whatever else it says is JSON."""
    if "/resolve/" in request.path:
        request.answer(200, body, ETag=etag(body), X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
    else:
        request.answer(200, body, Content_Type="application/json")


# -- faults, and what has to come of them ------------------------------------------------------------------------------

NOTHING: tuple[str, ...] = ()
FILE = ("f.pt",)
PARTIAL = ("f.pt.partial", "f.pt.partial.json")


@dataclass(frozen=True)
class Fault:
    """A script, and what has to come of it."""

    name: str
    script: list[Callable]
    n_requests: int
    refused: str | None = None
    """Words of the error; None: the file is there in the end."""
    left: tuple[str, ...] = FILE
    known: dict[str, Any] = field(default_factory=lambda: {"size": len(BODY), "sha256": SHA256})
    """What `fetch` is told of the file."""
    body: bytes = BODY
    """What is there in the end."""
    kept: int = 0
    """Bytes of the partial file in the end."""


UNKNOWN: dict[str, Any] = {}
SIZE = {"size": len(BODY)}

FAULTS = [
    Fault("none", [honest], 1),
    Fault("body cut off, once", [cut_off(MUCH), honest], 2),
    Fault("body cut off, once; no hash known", [cut_off(MUCH), honest], 2, known=UNKNOWN),
    Fault("body cut off, and again at once", [cut_off(MUCH), cut_off(0)], 5, "connection was lost", PARTIAL, kept=KEPT),
    Fault("connection reset, once", [cut_off(MUCH, 1), honest], 2),
    Fault("no answer at all, once", [silent, honest], 2),
    Fault("stalled half-way, once", [stalled(MUCH), honest], 2),
    Fault("stalled half-way, always", [stalled(MUCH), stalled(0)], 5, "sent nothing for 0.3 s", PARTIAL, kept=KEPT),
    Fault("slow, but moving", [slow], 1),
    Fault("500, once", [status(500), honest], 2),
    Fault("500, always", [status(500)], 5, "HTTP 500", NOTHING),
    Fault("503 that asks for a pause, once", [status(503, Retry_After=0), honest], 2),
    Fault("429, once", [status(429), honest], 2),
    Fault("404", [status(404)], 1, "HTTP 404", NOTHING),
    Fault("403", [status(403)], 1, "HTTP 403", NOTHING),
    Fault("404 after half the file", [cut_off(MUCH), status(404)], 2, "HTTP 404", PARTIAL, kept=KEPT),
    Fault("204", [status(204)], 1, "HTTP 204", NOTHING),
    Fault("no ranges, cut off once", [no_ranges(MUCH), no_ranges()], 2),
    Fault("no ETag, cut off once; hash known", [untagged(MUCH), untagged()], 2),
    Fault("no ETag, cut off once; no hash known", [untagged(MUCH), untagged()], 2, known=UNKNOWN),
    Fault("weak ETag, cut off once; no hash known", [weakly_tagged(MUCH), honest], 2, known=UNKNOWN),
    Fault("replaced half-way; no hash known", [cut_off(MUCH), replaced], 2, known=UNKNOWN, body=OTHER),
    Fault("replaced, If-Range ignored", [cut_off(MUCH), replaced_without_a_word], 3, known=UNKNOWN, body=OTHER),
    Fault("replaced half-way; hash known", [cut_off(MUCH), replaced], 3, "its sha256 is", NOTHING),
    Fault("wrong hash", [replaced], 1, "its sha256 is", NOTHING),
    Fault("wrong length", [shorter], 1, "has 1,000 bytes, and the file that it should be has 300,000", NOTHING),
    Fault("empty file", [lambda request, _: honest(request, b"")], 1, "is an empty file", NOTHING, known=UNKNOWN),
    Fault("a web page in place of the file", [web_page], 1, "answered with a web page", NOTHING, known=UNKNOWN),
    Fault("redirected", [redirected], 2),
    Fault("redirected in a circle", [in_a_circle], 31, "leads nowhere", NOTHING),
    Fault("compressed unasked", [gzipped], 1),
    Fault("compressed unasked, cut off once", [gzipped_and_cut_off, gzipped], 2),
    Fault("compressed, a bit wrong, once", [gzipped_with_a_wrong_bit, honest], 2, known=UNKNOWN),
    Fault("cut off, then compressed and wrong", [cut_off(MUCH), gzipped_with_a_wrong_bit, honest], 3, known=UNKNOWN),
    Fault("compressed, and damaged", [gzipped_and_damaged], 5, "compressed, and damaged", NOTHING),
    Fault("in chunks", [in_chunks()], 1, known=UNKNOWN),
    Fault("in chunks, cut off once", [in_chunks(MUCH), in_chunks()], 2, known=UNKNOWN),
    Fault("in chunks, and too long", [in_chunks(end=b"!")], 1, "it has 300,001 bytes", NOTHING, known=SIZE),
    Fault("in chunks, and too short", [in_chunks(MUCH, whole=True)], 5, "ended after 150,000", NOTHING, known=SIZE),
    Fault("no length stated; size known, cut off once", [without_a_length(MUCH), honest], 2, known=SIZE),
    Fault("no length stated; nothing known", [without_a_length()], 1, "does not say how long", NOTHING, known=UNKNOWN),
]  # fmt: skip
"""Each happens to one call of `fetch`."""


# -- processes ---------------------------------------------------------------------------------------------------------

CHILD = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored otherwise, if it was when the tests were started
package = types.ModuleType("sparse_interp")
package.__path__ = [sys.argv[1]]        # the package without its index page, which would import everything
sys.modules["sparse_interp"] = package
from pathlib import Path
from sparse_interp.model import download
for name, value in eval(sys.argv[4]).items():
    setattr(download, name, value)
if sys.argv[5] != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
print("ready", flush=True)
download.fetch(sys.argv[2], Path(sys.argv[3]), progress=False)
"""


def start_fetching(url: str, path: Path, largest_file: int = 0, **limits: float) -> subprocess.Popen:
    """A process that fetches; with `largest_file`, on a disk that takes no more than so many bytes of one file."""
    package = Path(__file__).parents[2] / "sparse_interp"
    given = [str(package), url, str(path), repr(SHORT | limits), str(largest_file)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def interrupt_after(child: subprocess.Popen, partial: Path, n_bytes: int, number: int = signal.SIGINT) -> str:
    """Send the signal once `partial` has `n_bytes`; what the process said last."""
    while not (partial.is_file() and partial.stat().st_size >= n_bytes):
        if child.poll() is not None:
            break
        threading.Event().wait(0.01)
    child.send_signal(number)
    return child.communicate(timeout=20)[1]
