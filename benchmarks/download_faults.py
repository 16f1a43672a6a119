"""What becomes of a download when a server, a connection, a process or a disk fails: one row per fault.

    python benchmarks/download_faults.py [--shipped] [--out benchmarks/results]

A server on this machine misbehaves as tests/model/faulty_server.py describes; the file has 300,000 bytes. Pauses begin
at 0.02 s and a silent server is waited for 0.3 s, so that the table takes seconds; with `--shipped` they are those of
the library, and all faults happen at once. `requests` counts what the server was asked for; `left` is what lies in the
folder afterwards, with the bytes of an unfinished file.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "model"))

import faulty_server as faulty
from faulty_server import BODY, KEPT, MUCH, SHA256, Fault, FaultyServer

from sparse_interp.errors import DownloadError
from sparse_interp.model import download


def row(name: str, server: FaultyServer, path: Path, act: Callable[[], str], expected: tuple) -> dict[str, object]:
    """Do it, and say what came of it; `expected`: number of requests, what is left, and bytes of an unfinished file."""
    began = time.perf_counter()
    said = act()
    seconds = time.perf_counter() - began
    left = {file.name: file.stat().st_size for file in path.parent.iterdir() if not file.name.endswith(".lock")}
    kept = left.get(faulty.PARTIAL[0], 0)
    shown = ", ".join(f"{name} ({size:,})" for name, size in sorted(left.items()) if not name.endswith(".json"))
    return {
        "fault": name,
        "ends": said,
        "requests": len(server.requests),
        "seconds": round(seconds, 2),
        "left": shown or "nothing",
        "as_expected": (len(server.requests), tuple(sorted(left)), kept) == expected,
    }


def outcome(url: str, path: Path, expected: bytes = BODY, **known: object) -> str:
    try:
        download.fetch(url, path, progress=False, **known)
    except DownloadError as error:
        return f"refused: {str(error).replace(url, 'URL').replace(str(path.parent), 'FOLDER')}"
    return "fetched" if path.read_bytes() == expected else "WRONG BYTES"


def of_server(fault: Fault) -> dict[str, object]:
    """A fault of the server or of the connection."""
    with tempfile.TemporaryDirectory() as folder, FaultyServer({"/f.pt": BODY}, list(fault.script)) as server:
        path = Path(folder) / "f.pt"
        expected = (fault.n_requests, tuple(sorted(fault.left)), fault.kept)
        result = row(
            fault.name,
            server,
            path,
            lambda: outcome(f"{server.url}/f.pt", path, fault.body, **fault.known),
            expected,
        )
        result["as_expected"] &= (result["ends"] == "fetched") == (fault.refused is None)
        return result


def of_processes() -> list[dict[str, object]]:
    """Processes that are stopped, that meet, and that find the disk full."""
    rows = []

    def case(name: str, script: list[Callable], act: Callable[[str, Path], str], expected: tuple) -> None:
        with tempfile.TemporaryDirectory() as folder, FaultyServer({"/f.pt": BODY}, script) as server:
            path = Path(folder) / "f.pt"
            rows.append(row(name, server, path, lambda: act(f"{server.url}/f.pt", path), expected))

    def stopped(number: int) -> Callable[[str, Path], str]:
        def act(url: str, path: Path) -> str:
            child = faulty.start_fetching(url, path, READ_S=60.0)
            faulty.interrupt_after(child, path.with_name(faulty.PARTIAL[0]), KEPT, number)
            return f"exit code {child.returncode}"

        return act

    def stopped_and_again(url: str, path: Path) -> str:
        stopped(signal.SIGINT)(url, path)
        return outcome(url, path, sha256=SHA256)

    def together(url: str, path: Path) -> str:
        children = [faulty.start_fetching(url, path) for _ in range(2)]
        codes = [child.wait(timeout=60) for child in children]
        return "fetched by both" if codes == [0, 0] and path.read_bytes() == BODY else f"exit codes {codes}"

    def full(url: str, path: Path) -> str:
        said = faulty.start_fetching(url, path, largest_file=MUCH).communicate(timeout=60)[1]
        said = said.strip().splitlines()[-1].partition(": ")[2]
        return f"refused: {said.replace(str(path.parent), 'FOLDER')}"

    halves = [faulty.stalled(MUCH), faulty.honest]
    part = tuple(sorted(faulty.PARTIAL))
    case("Ctrl-C half-way", halves, stopped(signal.SIGINT), (1, part, KEPT))
    case("killed half-way", halves, stopped(signal.SIGKILL), (1, part, KEPT))
    case("Ctrl-C half-way, and again", halves, stopped_and_again, (2, faulty.FILE, 0))
    case("two processes at once", [faulty.slow], together, (1, faulty.FILE, 0))
    case("disk full half-way", [faulty.honest], full, (1, part, MUCH))
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shipped", action="store_true")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = options.parse_args()
    if not given.shipped:
        for name, value in faulty.SHORT.items():
            setattr(download, name, value)
    with ThreadPoolExecutor(len(faulty.FAULTS) if given.shipped else 1) as pool:
        rows = [*pool.map(of_server, faulty.FAULTS), *of_processes()]
    limits = {name: getattr(download, name) for name in (*faulty.SHORT, "ATTEMPTS")}
    frame = pd.DataFrame(rows)
    print(frame.drop(columns="as_expected").to_string(index=False, max_colwidth=110, justify="left"))
    name = "download_faults_shipped.json" if given.shipped else "download_faults.json"
    given.out.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    (given.out / name).write_text(json.dumps({"machine": machine, "limits": limits, "rows": rows}, indent=1) + "\n")
    wrong = frame[~frame.as_expected].fault.tolist()
    sys.exit(f"not as expected: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
