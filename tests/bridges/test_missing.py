"""What a twin lacks is named exactly where text can tell, and what it leads to is not; the rest is left open."""

import pytest
import torch

from sparse_interp.bridges.missing import missing_features
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
