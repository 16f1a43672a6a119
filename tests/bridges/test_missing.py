"""What a twin lacks is named exactly where text can tell, and what it leads to is not; the rest is left open."""

import pytest
import torch

from sparse_interp.bridges.bridge_config import SitePair
from sparse_interp.bridges.missing import _left, _Look, missing_features
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.faithfulness.ground_truth import ground_truth


def looked_at(sparse, blocks, share, generator):
    twin = rotated_twin(sparse, missing_frac=share, generator=generator)
    return twin, missing_features(sparse, twin.dense, twin.bridge.pairs, blocks[:24], fit_blocks=blocks[24:])


@pytest.mark.parametrize("seed", [0, 1])
def test_of_a_random_model_exactly_what_is_missing_is_named(seed):
    generator = torch.Generator().manual_seed(seed)
    sparse = rotatable_model(generator=generator)
    blocks = torch.randint(64, (96, 16), generator=generator)
    for share, n_missing in ((0.0, 0), (0.1, 3)):
        twin, found = looked_at(sparse, blocks, share, generator)
        assert tuple(found.missing) == twin.missing and len(twin.missing) == n_missing
        assert found.undecided == ()
        assert all(said < 0.5 for said in found.missing.values())
        assert min(found.said.values()) > 0.9  # of the median channel everything is said


@pytest.mark.parametrize("name", ["two_hop", "quote"])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_text_cannot_tell_is_left_open_and_what_a_missing_channel_leads_to_is_not_named(name, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = ground_truth(name)
    twin, found = looked_at(truth.model, truth.blocks(120, generator=generator), 0.1, generator)
    assert set(found.missing) <= set(twin.missing) <= {*found.missing, *found.undecided}
    assert not {*found.missing} & {*found.undecided}


def test_a_channel_that_never_changes_cannot_be_told():
    generator = torch.Generator().manual_seed(0)
    truth = ground_truth("two_hop")
    _, found = looked_at(truth.model, truth.blocks(120, generator=generator), 0.0, generator)
    assert found.missing == {} and 0 in found.undecided  # channel 0 is the constant that fixes the norm


def test_what_others_leave_of_a_channel_is_that_of_a_regression_on_them():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    fit, other = (torch.randn(n, 6, generator=generator, dtype=torch.float64) @ mix + 3 for n in (500, 300))
    _, left = _left(fit, other)
    for channel in range(6):
        rest = [c for c in range(6) if c != channel]
        design = torch.cat([fit[:, rest], torch.ones(500, 1, dtype=torch.float64)], 1)
        found = torch.linalg.lstsq(design, fit[:, channel]).solution
        error = other[:, rest] @ found[:-1] + found[-1] - other[:, channel]
        assert float(left[channel]) == pytest.approx(float(error.square().mean()), rel=1e-6)


def test_between_models_apart_that_is_missing_of_which_less_is_said_than_of_the_rest(monkeypatch):
    """A dense stream that says a fifth of twelve channels, and nothing of the other four."""
    generator = torch.Generator().manual_seed(0)
    sparse = rotatable_model(generator=generator, d_model=16)
    texts = [torch.randn(n, 10, 16, generator=generator) for n in (600, 200)]
    noisy = [held[..., :12] + 2 * torch.randn(held[..., :12].shape, generator=generator) for held in texts]
    looking = _Look.__new__(_Look)
    looking.sparse, looking.texts, looking.theirs = sparse, texts, [{0: stream} for stream in noisy]
    monkeypatch.setattr("sparse_interp.bridges.missing.held", lambda model, held, sites, without: {0: held})
    here = looking.at(SitePair(0, 0), ())
    assert here.lost == {12, 13, 14, 15} and here.found == set(range(12))
    assert here.typical == pytest.approx(0.2, abs=0.04)  # of a channel and twice as much noise, 1 / (1 + 4)
