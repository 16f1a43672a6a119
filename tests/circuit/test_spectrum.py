"""Contexts from all over a node's distribution, against ranks of everything that it holds."""

import pytest
import torch

from sparse_interp.circuit.spectrum import BETWEEN, HIGHEST, LOWEST, N_BINS, Spectrum


@pytest.fixture(scope="module")
def made():
    """Activations of a node that is dense, of one that is mostly 0 and of one that is always 0, with their tables."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40, 30, 3, generator=generator)
    values[..., 1] *= torch.rand(40, 30, generator=generator) < 0.05
    values[..., 2] = 0
    tokens = torch.arange(40 * 30).view(40, 30)
    spectrum = Spectrum()
    for part in values.split(16):
        spectrum.add(part)
    return values, *spectrum.tables(["dense", "sparse", "zero"], tokens, str)


def test_the_ends_are_the_most_extreme_tokens_of_different_blocks(made):
    values, contexts, _ = made
    for part, sign in ((HIGHEST, 1), (LOWEST, -1)):
        own = contexts.frame[(contexts.frame.node == "dense") & (contexts.frame.part == part)]
        best = (sign * values[:, 1:, 0]).max(1).values.sort(descending=True).values[:4]
        assert (sign * torch.tensor(own.value.tolist())).tolist() == pytest.approx(best.tolist())
        assert own.block.is_unique


def test_between_the_ends_tokens_have_their_rank(made):
    values, contexts, _ = made
    everything = values[:, 1:, 0].flatten()
    for part, share in BETWEEN.items():
        own = contexts.frame[(contexts.frame.node == "dense") & (contexts.frame.part == part)]
        for value in own.value:
            assert float((everything < value).double().mean()) == pytest.approx(share, abs=0.01)


def test_a_window_holds_what_the_node_holds_and_never_shows_the_first_token(made):
    values, contexts, _ = made
    for row in contexts.frame.itertuples():
        i = ["dense", "sparse", "zero"].index(row.node)
        assert row.pos > 0 and row.pieces[row.at_piece] == str(row.block * 30 + row.pos)
        start = row.pos - row.at_piece
        assert row.activations == pytest.approx(values[row.block, start : start + len(row.pieces), i].tolist())
        assert row.value == pytest.approx(float(values[row.block, row.pos, i]))


def test_tokens_that_are_tied_come_from_all_over_the_text(made):
    _, contexts, _ = made
    tied = contexts.frame[(contexts.frame.node == "zero")]
    assert set(tied.part) == set(BETWEEN), "a node that is 0 everywhere has no ends"
    assert tied.block.nunique() >= 5


def test_a_histogram_counts_every_token_once(made):
    values, _, histograms = made
    rows = histograms.frame.set_index("node")
    assert sum(rows.counts["dense"]) == sum(rows.counts["sparse"]) == 40 * 29 and len(rows.counts["dense"]) == N_BINS
    assert rows.counts["zero"] == [40 * 29] and rows.low["zero"] == rows.high["zero"] == 0
    assert rows.high["dense"] == pytest.approx(float(values[:, 1:, 0].max()))
