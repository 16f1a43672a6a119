"""What tests share: a seeded generator, and no state that outlives a test."""

import os
import sys

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn into memory, whatever screen there is


@pytest.fixture
def generator() -> torch.Generator:
    """The only source of randomness that a test has."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def close_figures():
    """Close what a test drew: matplotlib keeps every figure that nobody closes, and warns after twenty."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
