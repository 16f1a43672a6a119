"""Gates where queries are grouped: what shares one, and what a search says of every node."""

import pytest
import torch

from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.interventions.pruning import PruneConfig, learn_gates
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Place

QUICK = {"n_steps": 3, "batch_size": 4, "noise": 0.0}


@pytest.fixture(scope="module")
def pairs():
    return ground_truth("quote").task.batch(8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bridge(make_bridge):
    """Four heads of queries and two of keys and values, four channels each."""
    return make_bridge(n_kv=2)[0]


def test_a_key_and_the_queries_that_meet_it_share_a_gate_and_leave_together(bridge, pairs, generator):
    search = learn_gates(bridge, pairs, PruneConfig(**QUICK), zero_values(bridge), generator=generator)
    assert sorted(search.order) == sorted(all_nodes(hooked(bridge).cfg))
    for layer in (0, 1):
        of_queries, of_keys = (search.tau[Place(layer, site)] for site in "qk")
        assert torch.equal(of_queries, of_keys.view(2, 1, 4).expand(2, 2, 4).flatten())
        assert len(of_keys.unique()) == 8
        order = [node for node in search.order if node.layer == layer and node.site in "qk"]
        for first, second, key in zip(order[::3], order[1::3], order[2::3], strict=True):
            head, channel = divmod(key.channel, 4)
            assert (first.site, second.site, key.site) == ("q", "q", "k")
            assert [first.channel, second.channel] == [8 * head + channel, 8 * head + 4 + channel]


def test_without_sharing_every_query_has_a_gate_of_its_own(bridge, pairs, generator):
    search = learn_gates(bridge, pairs, PruneConfig(**QUICK, share_qk=False), zero_values(bridge), generator=generator)
    assert len(search.tau[Place(0, "q")].unique()) == 16 and len(search.order) == len(set(search.order))
