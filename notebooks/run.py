"""Runs the notebooks from top to bottom, offline, and says where what they show differs from what is committed.

    python notebooks/run.py [NOTEBOOK ...]

writes those that differ anew, and is `make notebooks`; `tests/test_notebooks.py` runs them and writes nothing. What is
compared: words exactly, numbers within a hundredth or one unit of the last digit shown, pictures by their number and
size, and whatever carries a script (CircuitsVis, the circuit page) by its size.

Where a search ends depends on rounding, so on the processor. A cell whose outputs hang on one says so in its metadata,
as `"tolerance"`: the share by which its numbers may be off, or null, and then only what kinds of output it has counts.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
"""A number on its own: not the 5 of L1H5."""

KERNEL = {
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""No progress bars in outputs nor a word of why they would be plain ones, no network, and sums in one order."""

TOLERANCE = 0.01
"""Share by which a number may be off, where a cell does not say otherwise."""

SIZE_TOLERANCE = 0.02
"""Share by which the size of what carries a script may be off, at least."""

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """Every notebook, in reading order."""
    return sorted(HERE.glob("*.ipynb"))


def executed(path: Path) -> Any:
    """The notebook with the outputs that it has now.

    Raises:
        CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel's own draws inline
    place = {"metadata": {"path": str(HERE)}}
    with tempfile.TemporaryDirectory() as folder:
        pipe = {"transport": "ipc", "ip": f"{folder}/kernel"} if os.name == "posix" else {}
        kernel = AsyncKernelManager(kernel_name="python3", **pipe)
        client = NotebookClient(
            notebook, km=kernel, timeout=1800, iopub_timeout=120, record_timing=False, resources=place
        )
        client.execute(cleanup_kc=True, env=kept | KERNEL)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def differences(was: Any, now: Any) -> list[str]:
    """In words, every output of `now` that is not what `was` shows."""
    found = []
    for i, (old, new) in enumerate(zip(was.cells, now.cells, strict=True)):
        outputs = [_shown(old), _shown(new)]
        kinds = [[kind for kind, _ in shown] for shown in outputs]
        if kinds[0] != kinds[1]:
            found.append(f"cell {i} shows {kinds[1] or 'nothing'}, and {kinds[0] or 'nothing'} is committed")
            continue
        tolerance = new.metadata.get("tolerance", TOLERANCE)
        if tolerance is None:
            continue
        for (kind, before), (_, after) in zip(*outputs, strict=True):
            found += [f"cell {i}, {kind}: {what}" for what in _difference(kind, before, after, tolerance)]
    return found


def _shown(cell: Any) -> list[tuple[str, str]]:
    """What a cell shows: kind and content, in order."""
    shown = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and shown and shown[-1][0] == output.name:
            shown[-1] = (output.name, shown[-1][1] + output.text)  # how a stream is cut up is a matter of time
        elif output.output_type == "stream":
            shown.append((output.name, output.text))
        else:
            shown += [(kind, str(output.data[kind])) for kind in sorted(output.data)]
    return shown


def _difference(kind: str, before: str, after: str, tolerance: float) -> list[str]:
    if kind.startswith("image/png"):
        sizes = [_png_size(before), _png_size(after)]
        far = [abs(a - b) > 0.1 * b for a, b in zip(sizes[1], sizes[0], strict=True)]
        return [f"a picture of {sizes[1]} pixels, and one of {sizes[0]} is committed"] if any(far) else []
    if "<script" in before and "<script" in after:
        far = abs(len(after) - len(before)) > max(tolerance, SIZE_TOLERANCE) * len(before)
        return [f"{len(after)} characters, and {len(before)} are committed"] if far else []
    words = [NUMBER.sub("#", text).split() for text in (before, after)]
    if words[0] != words[1]:
        return [f"it says {' '.join(words[1])[:300]!r}, and {' '.join(words[0])[:300]!r} is committed"]
    pairs = zip(NUMBER.findall(before), NUMBER.findall(after), strict=True)
    return [f"{new}, and {old} is committed" for old, new in pairs if not _close(old, new, tolerance)]


def _close(old: str, new: str, tolerance: float) -> bool:
    """Within a share of the old one, or one unit of the last decimal that is shown."""
    decimals = len(old.partition(".")[2].partition("e")[0]) if "." in old else 0
    a, b = float(old.replace("−", "-")), float(new.replace("−", "-"))
    unit = 10.0**-decimals if "." in old and "e" not in old else 0.0
    return abs(a - b) <= max(tolerance * abs(a), 1.001 * unit)


def _png_size(encoded: str) -> tuple[int, int]:
    head = base64.b64decode(encoded[:48])
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def main(given: list[str]) -> int:
    """Write anew what differs; 0 unless a cell raises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="*", type=Path)
    paths = parser.parse_args(given).notebook or notebooks()
    if absent := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"there is no notebook {', '.join(absent)}; there are {', '.join(p.name for p in notebooks())}")
    for path in paths:
        try:
            now = executed(path)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        found = differences(nbformat.read(path, as_version=4), now)
        if found:
            partial = path.with_suffix(".partial")
            nbformat.write(now, partial)
            partial.replace(path)
        print(f"{path.name}: {'written, since ' + found[0] if found else 'shows what is committed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
