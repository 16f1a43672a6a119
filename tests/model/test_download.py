"""A file comes whole and as it should be, or not at all; what may pass is tried again, what will not ends at once."""

import errno
import json
import shutil
import signal
import socket
import threading
import time
from collections import namedtuple

import pytest
import requests
from faulty_server import (
    BODY,
    COMMIT,
    FAULTS,
    FILE,
    KEPT,
    MUCH,
    OTHER,
    PARTIAL,
    SHA256,
    SHORT,
    FaultyServer,
    as_hub,
    cut_off,
    etag,
    honest,
    hub,
    interrupt_after,
    slow,
    stalled,
    start_fetching,
    status,
    untagged,
    weakly_tagged,
)

from sparse_interp.errors import DownloadError
from sparse_interp.model import download
from sparse_interp.model.download import fetch, fetch_repository


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    """Pauses and limits that suit a server on this machine."""
    for name, value in SHORT.items():
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def serve():
    """`serve(*script, body=...)`: a server whose file `/f.pt` is answered for as the script says."""
    servers = []

    def start(*script, files=None, body=BODY):
        servers.append(FaultyServer(files or {"/f.pt": body}, list(script) or [honest]).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "f.pt"


def left_in(folder) -> tuple[str, ...]:
    """Names of what is there, without the lock."""
    return tuple(sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock")))


def get(server, path, **known):
    return fetch(f"{server.url}/f.pt", path, progress=False, **known)


# -- one call, one fault -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_ends_as_the_table_says(fault, serve, path):
    server = serve(*fault.script)
    if fault.refused is None:
        assert get(server, path, **fault.known) == path
        assert path.read_bytes() == fault.body
    else:
        with pytest.raises(DownloadError, match=fault.refused) as refused:
            get(server, path, **fault.known)
        assert f"{server.url}/f.pt" in str(refused.value)
    assert len(server.requests) == fault.n_requests
    assert left_in(path.parent) == tuple(sorted(fault.left))
    if fault.left == PARTIAL:
        assert path.with_name(PARTIAL[0]).read_bytes() == BODY[: fault.kept]


def test_only_what_is_lacking_is_asked_for_and_only_of_the_same_version(serve, path):
    server = serve(cut_off(MUCH), honest)
    get(server, path)
    assert server.ranges == [None, f"bytes={KEPT}-"]
    assert server.requests[1][1]["If-Range"] == etag(BODY)
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)


def test_what_an_etag_does_not_name_byte_for_byte_is_fetched_anew(serve, path):
    for answer in (untagged, weakly_tagged):
        server = serve(answer(MUCH), honest)
        get(server, path.with_name(answer.__name__))
        assert server.ranges == [None, None]


def test_headway_starts_the_count_of_attempts_anew(serve, path, monkeypatch):
    monkeypatch.setattr(download, "HEADWAY", 20_000)
    server = serve(*[cut_off(40_000)] * 12)  # each brings as many bytes as it takes, and the connection is lost
    monkeypatch.setattr(download, "CHUNK", 8_192)
    get(server, path, sha256=SHA256)
    assert path.read_bytes() == BODY and len(server.requests) > download.ATTEMPTS
    server = serve(*[cut_off(9_000)] * 99)  # too little of it
    with pytest.raises(DownloadError, match="the connection was lost, 5 times in a row"):
        get(server, path.with_name("slower.pt"))
    assert len(server.requests) <= 3 * download.ATTEMPTS


def test_a_server_without_ranges_that_always_loses_the_connection_is_given_up(serve, path, monkeypatch):
    monkeypatch.setattr(download, "HEADWAY", 20_000)
    server = serve(lambda request, body: (request.answer(200, body[:MUCH], length=len(body)), request.hang_up()))
    with pytest.raises(DownloadError, match="5 times in a row. Nothing had come that could be kept"):
        get(server, path)
    assert left_in(path.parent) == ()


def test_pauses_double_and_obey_the_server_within_limits(serve, path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download, "PAUSE_S", 1.0)
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    with pytest.raises(DownloadError):
        get(serve(status(500)), path)
    assert pauses == [1, 2, 4, 8]
    pauses.clear()
    get(serve(status(503, Retry_After=7), status(429, Retry_After=9999), status(503, Retry_After="soon"), honest), path)
    assert pauses == [7, download.LONGEST_PAUSE_S, 4]


def test_an_address_that_nobody_listens_at_is_tried_and_given_up(path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match="the connection was refused, 5 times in a row. .* HTTPS_PROXY"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/f.pt", path, progress=False)
    assert left_in(path.parent) == ()


def test_a_name_without_an_address_is_said(path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError, match="the name nowhere.invalid leads to no address, 5 times in a row"):
        fetch("https://nowhere.invalid/f.pt", path, progress=False)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/f.pt", "no address", "http://"])
def test_what_is_no_address_is_refused_at_once(url, path):
    with pytest.raises(DownloadError, match="leads nowhere.*check the address"):
        fetch(url, path, progress=False)


def test_a_certificate_that_is_not_trusted_is_refused_at_once(path, monkeypatch):
    asked = []

    def distrust(*_, **__):
        asked.append(1)
        raise requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    monkeypatch.setattr(requests, "get", distrust)
    with pytest.raises(DownloadError, match="certificate is not one that this machine trusts.*REQUESTS_CA_BUNDLE"):
        fetch("https://127.0.0.1/f.pt", path, progress=False)
    assert len(asked) == 1


# -- what is there already ---------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_not_fetched_unless_its_size_is_wrong(serve, path):
    server = serve()
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert get(server, path) == path == get(server, path, size=4) and server.requests == []
    assert get(server, path, size=len(BODY)).read_bytes() == BODY


def test_the_beginning_of_a_hash_is_enough_to_refuse_another_file(serve, path):
    get(serve(), path, sha256=SHA256[:8].upper())
    with pytest.raises(DownloadError, match="its sha256 is"):
        get(serve(body=OTHER), path.with_name("other.pt"), sha256=SHA256[:8])


def begin(path, body, **note):
    path.parent.mkdir(exist_ok=True)
    path.with_name(PARTIAL[0]).write_bytes(body)
    path.with_name(PARTIAL[1]).write_text(json.dumps(note))


def test_bytes_that_were_damaged_on_disk_cost_one_more_download_where_the_hash_is_known(serve, path):
    server = serve()
    begin(path, bytes(MUCH), url=f"{server.url}/f.pt", etag=etag(BODY), total=len(BODY))
    assert get(server, path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges == [f"bytes={MUCH}-", None]


def test_a_whole_partial_file_is_checked_and_not_fetched_again(serve, path):
    server = serve()
    begin(path, BODY, url=f"{server.url}/f.pt", etag=etag(BODY), total=len(BODY))
    assert get(server, path, sha256=SHA256).read_bytes() == BODY and server.requests == []


@pytest.mark.parametrize(
    "note",
    [
        {},
        {"url": "http://elsewhere/f.pt", "etag": etag(BODY), "total": 300_000},
        {"url": "U", "etag": 7, "total": 9},
        {"url": 1},
    ],
    ids=str,
)
def test_bytes_of_unknown_or_other_origin_are_not_gone_on_with(serve, path, note):
    server = serve()
    begin(path, b"of something else", **{key: f"{server.url}/f.pt" if v == "U" else v for key, v in note.items()})
    assert get(server, path).read_bytes() == BODY and server.ranges == [None]


def test_a_note_that_is_damaged_is_no_note(serve, path):
    server = serve()
    begin(path, b"of something else")
    path.with_name(PARTIAL[1]).write_text("{")
    assert get(server, path).read_bytes() == BODY and server.ranges == [None]


def test_more_bytes_than_the_file_has_are_discarded(serve, path):
    server = serve()
    begin(path, BODY + b"!", url=f"{server.url}/f.pt", etag=etag(BODY), total=None)
    assert get(server, path).read_bytes() == BODY
    assert server.ranges == [f"bytes={len(BODY) + 1}-", None]


# -- interrupted, together, and without room ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_an_interrupted_download_goes_on_where_it_was(serve, path, number):
    server = serve(stalled(MUCH), honest)
    child = start_fetching(f"{server.url}/f.pt", path, READ_S=30.0)
    said = interrupt_after(child, path.with_name(PARTIAL[0]), KEPT, number)
    assert child.returncode != 0 and left_in(path.parent) == PARTIAL
    assert number != signal.SIGINT or "KeyboardInterrupt" in said
    assert get(server, path, sha256=SHA256).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={KEPT}-"] and left_in(path.parent) == FILE


def test_processes_that_want_one_file_fetch_it_once(serve, path):
    server = serve(slow)
    children = [start_fetching(f"{server.url}/f.pt", path) for _ in range(2)]
    get(server, path, sha256=SHA256)
    for child in children:
        assert child.communicate(timeout=20) == ("", "") and child.returncode == 0
    assert path.read_bytes() == BODY and len(server.requests) == 1


def test_whoever_waits_for_another_process_says_so(serve, path, capsys):
    fetching = threading.Thread(target=get, args=(serve(slow), path))
    fetching.start()
    while not path.parent.is_dir() or not any(path.parent.iterdir()):
        time.sleep(0.005)
    fetch("http://127.0.0.1:1/f.pt", path)
    fetching.join()
    assert "f.pt: another process is fetching it" in capsys.readouterr().err


def test_a_disk_that_fills_up_half_way_is_named_and_the_bytes_are_kept(serve, path):
    server = serve()
    child = start_fetching(f"{server.url}/f.pt", path, largest_file=MUCH)
    said = child.communicate(timeout=20)[1]
    assert "DownloadError" in said and f"{path} cannot be written (File too large)" in said
    assert left_in(path.parent) == PARTIAL and path.with_name(PARTIAL[0]).stat().st_size == MUCH
    assert get(server, path).read_bytes() == BODY and server.ranges == [None, f"bytes={MUCH}-"]


def test_a_disk_without_room_is_refused_before_any_byte_comes(serve, path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1234))
    with pytest.raises(DownloadError, match="has 1,234 bytes free, and 300,000 more are to come"):
        get(serve(), path)
    assert left_in(path.parent) == ()


def test_a_full_disk_is_an_error_of_ours(serve, path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left on device.*goes on from there"):
        get(serve(), path)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(serve, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        get(serve(), tmp_path / "file" / "f.pt")


def test_the_bar_counts_what_is_left(serve, path, capsys):
    begin(path, BODY[:MUCH], url="x", etag=None, total=len(BODY))
    fetch(f"{serve().url}/f.pt", path, sha256=SHA256)
    bar = capsys.readouterr().err
    assert "f.pt" in bar and "146k/293k" in bar and "100%" in bar
    path.unlink()
    get(serve(), path)
    assert capsys.readouterr().err == ""


# -- repositories ------------------------------------------------------------------------------------------------------

CONTENTS = {"config.json": b'{"a": 1}', "model.safetensors": BODY, "modeling_x.py": b"raise SystemExit"}


def no_code(files):
    return [file for file in files if not file.endswith(".py")]


def test_a_repository_comes_as_a_folder_of_the_files_that_are_wanted(serve, tmp_path):
    server = serve(as_hub, files=hub("someone/model", CONTENTS))
    folder = tmp_path / "hub" / "someone" / "model"
    assert fetch_repository("someone/model", folder, no_code, hub=server.url, progress=False) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.json": b'{"a": 1}',
        "model.safetensors": BODY,
    }
    n_requests = len(server.requests)
    assert fetch_repository("someone/model", folder, no_code, hub=server.url) == folder
    assert len(server.requests) == n_requests and left_in(folder.parent) == ("model",)


def test_a_repository_that_is_not_there_leaves_nothing(serve, tmp_path):
    with pytest.raises(DownloadError, match="has no repository someone/model that you may read.*hf auth login"):
        fetch_repository("someone/model", tmp_path / "m", no_code, hub=serve(as_hub).url, progress=False)
    server = serve(status(403), files=hub("someone/model", CONTENTS))
    with pytest.raises(DownloadError, match="someone/model could not be fetched.* try again.*403 Forbidden"):
        fetch_repository("someone/model", tmp_path / "m", no_code, hub=server.url, progress=False)
    assert left_in(tmp_path) == ()


def test_a_file_that_is_not_what_the_hub_says_is_refused_and_fetched_again(serve, tmp_path):
    files = hub("someone/model", CONTENTS)
    weights = f"/someone/model/resolve/{COMMIT}/model.safetensors"
    server = serve(as_hub, files=files | {weights: OTHER})
    with pytest.raises(DownloadError, match="model.safetensors of someone/model: its sha256 is .* It is deleted"):
        fetch_repository("someone/model", tmp_path / "m", no_code, hub=server.url, progress=False)
    assert left_in(tmp_path) == ("m.partial",)
    server = serve(as_hub, files=files)
    folder = fetch_repository("someone/model", tmp_path / "m", no_code, hub=server.url, progress=False)
    assert (folder / "model.safetensors").read_bytes() == BODY and left_in(tmp_path) == ("m",)
