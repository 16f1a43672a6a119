"""Modules of this folder that tests load by path: the reference forward passes."""

import importlib.util
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
