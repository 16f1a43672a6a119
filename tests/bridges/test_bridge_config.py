"""A bridge's config says which sites are tied, and refuses what ties nothing."""

import json

import pytest

from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.errors import BridgeError


def test_models_of_equal_depth_are_tied_at_every_site():
    assert BridgeConfig().pairs_of(2, 2) == tuple(SitePair(site, site) for site in range(5))


def test_models_of_other_depths_need_a_map():
    with pytest.raises(BridgeError, match=r"2 layers and the dense one 3.*SitePair\(4, 6\)"):
        BridgeConfig().pairs_of(2, 3)
    named = BridgeConfig(sites=((0, 0), (2, 2), (2, 3), (4, 6)))
    assert named.pairs_of(2, 3) == (SitePair(0, 0), SitePair(2, 2), SitePair(2, 3), SitePair(4, 6))


@pytest.mark.parametrize("sites", [((0, 0), (5, 4)), ((0, 0), (4, 7)), ((-1, 0),)])
def test_a_site_that_does_not_exist_is_refused(sites):
    with pytest.raises(BridgeError, match="residual sites are 0 to"):
        BridgeConfig(sites=sites).pairs_of(2, 3)


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ((), "no pair of sites"),
        (((1, 1), (1, 1)), "named twice"),
        (((1, 2), (2, 1)), "must not lead back"),
    ],
)
def test_sites_that_no_forward_pass_meets_in_order_are_refused(sites, said):
    with pytest.raises(BridgeError, match=said):
        BridgeConfig(sites=sites)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "relu"},
        {"afrac": 0.0},
        {"afrac": 1.5},
        {"precision": "fp16"},
        {"n_steps": 0},
        {"entries_per_step": 0},
        {"lr": 0.0},
        {"decode_coef": -1.0},
        {"betas": (0.9, 1.0)},
        {"warmup_frac": 2.0},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_a_config_that_describes_no_training_is_refused_by_the_name_of_its_field(changes):
    with pytest.raises(BridgeError, match=next(iter(changes))):
        BridgeConfig(**changes)


def test_a_config_comes_back_from_json():
    config = BridgeConfig(sites=(SitePair(0, 0), SitePair(3, 4)), lr=0.01, entries_per_step=None)
    assert BridgeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_of_before_there_were_interchanges_says_that_there_were_none():
    older = {name: value for name, value in BridgeConfig().to_dict().items() if name != "interchange_coef"}
    assert BridgeConfig.from_dict(older) == BridgeConfig(interchange_coef=0.0)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(BridgeError, match="'encoder'"):
        BridgeConfig.from_dict({"encodr": "abs_topk"})
