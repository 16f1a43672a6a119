"""Modules of this folder that tests load by path: the reference forward passes."""

import importlib.util
import json
from pathlib import Path

import pytest

from_here = Path(__file__).parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, from_here / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def numpy_reference():
    """The forward pass written independently, `numpy_reference.py`."""
    return load("numpy_reference")


@pytest.fixture(scope="session")
def released_numpy():
    """The released models' forward pass, and random models in their forms, `released_numpy.py`."""
    return load("released_numpy")


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled tokenizer; 2,048 ids."""
    from sparse_interp.data_files import data_folder
    from sparse_interp.tokenizer import load_tokenizer

    return load_tokenizer(data_folder() / "tokenizers" / "python_2k")


@pytest.fixture(scope="session")
def tokenizer_files(tokenizer):
    """`tokenizer_files(folder, n_ids)`: the first pieces of the bundled tokenizer as `vocab.bpe` and `encoder.json`."""

    def write(folder, n_ids=2048):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["merges"]][: n_ids - 258]
        ids = {piece: i for piece, i in spec["vocab"].items() if len(piece) == 1}
        printed = sorted(ids, key=lambda symbol: (ord(symbol) > 255, ord(symbol)))
        pieces = [*printed, *(left + right for left, right in merges), "<|startoftext|>", "<|endoftext|>"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "encoder.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        lines = ["# BPE Encoder", *(f"{left} {right}" for left, right in merges), ""]
        (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
        return folder

    return write
