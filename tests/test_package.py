"""What a user gets: an import that is quick and changes nothing, and a wheel that is whole."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
IMPORT_SHARE = 0.3  # of what the two libraries take in the same process, so of processors of any speed

ADDED_SHARE = """
import time
start = time.process_time()
import torch, transformer_lens
theirs = time.process_time()
import sparse_interp
print((time.process_time() - theirs) / (theirs - start))
"""

CHANGES = """
import logging, os, random, sys, warnings
import numpy, torch, transformer_lens

def state():
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "Python's random state": random.getstate(),
        "numpy's random state": str(numpy.random.get_state()),
        "torch's random state": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
        "log handlers": list(logging.getLogger().handlers),
        "exception hook": sys.excepthook,
        "optional libraries": {"matplotlib", "numba", "networkx", "optuna", "circuitsvis"} & sys.modules.keys(),
    }

before = state()
import sparse_interp
after = state()
changed = [name for name in before if before[name] != after[name]]
sys.exit(", ".join(changed) or 0)
"""


def python(source: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


def test_importing_adds_little_to_importing_torch_and_transformer_lens(tmp_path):
    added = []
    for _ in range(3):  # the best of three: the first writes byte code
        added.append(float(python(ADDED_SHARE, tmp_path).stdout))
        if added[-1] <= IMPORT_SHARE:
            return
    pytest.fail(
        f"`import sparse_interp` takes {min(added):.0%} of what its dependencies take; at most {IMPORT_SHARE:.0%}"
    )


def test_importing_changes_nothing_and_says_nothing(tmp_path):
    run = python(CHANGES, tmp_path)
    assert (run.returncode, run.stdout, run.stderr.strip()) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built offline by the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def shipped(folder: str) -> set[str]:
    """Files below `folder` of the checkout, less what Python left there."""
    paths = (PROJECT / folder).rglob("*")
    return {
        path.relative_to(PROJECT).as_posix()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".nbi", ".nbc", ".partial")
    }


def test_the_wheel_carries_the_whole_package_and_all_its_data(wheel):
    data = {f"sparse_interp/_{name}" for name in shipped("data")}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == shipped("sparse_interp") | data


def test_the_wheel_carries_the_licence_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {
        name.split(".dist-info/")[1]: archive.read(name).decode() for name in archive.namelist() if "-info/" in name
    }
    assert texts["licenses/LICENSE"] == (PROJECT / "LICENSE").read_text()
    assert "sparse-interp = sparse_interp.cli:" in texts["entry_points.txt"]


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Unpacked as an installer would lay it out; that the demo runs from it is benchmarks/wheel_demo.sh's to show."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    source = "import sparse_interp.data_files as d; print(d.__file__); print(d.data_folder())"
    run = python(source, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert run.returncode == 0, run.stderr
    package = tmp_path / "site" / "sparse_interp"
    assert run.stdout.splitlines() == [str(package / "data_files.py"), str(package / "_data")]
