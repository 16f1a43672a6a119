"""Pairs of models small enough to be tied in a moment."""

import pytest


@pytest.fixture
def sparse(make_model):
    """Two layers of twelve channels, AbsTopK at the eight sites."""
    return make_model(model_name="sparse")


@pytest.fixture
def dense(make_model):
    """Two layers of ten channels, nothing cut."""
    return make_model(model_name="dense", afrac=None, d_model=10, d_head=4, seed=1)
