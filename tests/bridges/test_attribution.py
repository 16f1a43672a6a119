"""Attribution through a bridge: on a rotated twin that of the sparse model, and exact where everything is linear."""

import pandas as pd
import pytest
import torch

from sparse_interp.bridges.attribution import attribute_across
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.bridges.steering import transfer
from sparse_interp.bridges.stretches import last_read, streams, through
from sparse_interp.errors import BridgeError, ConfigError
from sparse_interp.interventions.attribution import attribute_nodes
from sparse_interp.model.sites import Node, Place, flat
from sparse_interp.tasks.task import is_correct, logit_difference


@pytest.fixture(scope="module")
def twins():
    generator = torch.Generator().manual_seed(0)
    sparse = rotatable_model(generator=generator, dtype=torch.float64)
    return sparse, rotated_twin(sparse, generator=generator)


@pytest.mark.parametrize("given", [{}, {"direction": "noising"}, {"positions": [1, -1]}], ids=str)
def test_on_a_rotated_twin_it_is_the_attribution_of_the_sparse_model_itself(twins, pairs, given):
    sparse, twin = twins
    found = attribute_across(twin.bridge, sparse, twin.dense, pairs, **given)
    wanted = attribute_nodes(sparse, pairs, progress=False, **given)
    pd.testing.assert_frame_equal(found.frame, wanted.frame, rtol=1e-8, atol=1e-10)
    assert (found.frame.effect.abs() > 1e-3).sum() > 100


def test_where_all_is_linear_it_is_what_transfer_does_even_through_a_bad_bridge(make_model, pairs):
    """From the last MLP's neurons on, without norms and AbsTopK."""
    kind = {"afrac": None, "norm": "none", "initializer_range": 0.2, "dtype": torch.float64}
    sparse, dense = make_model(**kind), make_model(**kind | {"d_model": 10, "seed": 3})
    bridge = Bridge.between(sparse, dense, BridgeConfig(afrac=1.0), generator=torch.Generator().manual_seed(0)).double()
    nodes = [Node(1, "neuron", 3), Node(1, "mlp_write", 5), Node(2, "final_read", 7), Node(1, "final_resid", 2)]
    table = attribute_across(bridge, sparse, dense, pairs, nodes=nodes)
    for node, effect in zip(nodes, by_node(table, nodes), strict=True):
        assert effect == pytest.approx(exchanged(bridge, sparse, dense, pairs, node), rel=1e-8, abs=1e-12)
        assert abs(effect) > 1e-6


def by_node(table, nodes):
    frame = table.frame.set_index(["layer", "site", "channel"])
    return [frame.effect[tuple(node)] for node in nodes]


def exchanged(bridge, sparse, dense, pairs, node):
    """The corrupt run, with one node as it is where the clean run enters the sparse model; by transfer."""
    before, after = (bridge.pairs[-1],) * 2 if node.site == "final_read" else bridge.pairs[-2:]
    held = {}
    place = Place(node.layer, node.site)
    with torch.no_grad():
        entering = bridge.encode(streams(dense, pairs.clean, [before.dense])[before.dense], before)
        with sparse.hooks([(place.hook, lambda x, hook: held.update(x=flat(x)[..., node.channel]))]):
            if node.site == "final_read":
                last_read(sparse, entering)
            else:
                through(sparse, before.sparse, after.sparse, entering)

    def hold(model):
        def hook(x, hook):
            x = x.clone()
            x[..., node.channel] = held["x"]
            return x

        return model.hooks([(place.hook, hook)])

    with torch.no_grad():
        plain = logit_difference(dense(pairs.corrupt), pairs)
        with transfer(bridge, sparse, dense, hold):
            return float((logit_difference(dense(pairs.corrupt), pairs) - plain).mean())


def test_a_padded_batch_is_attributed_as_its_prompts_one_by_one(twins, pairs, alone):
    sparse, twin = twins
    together = attribute_across(twin.bridge, sparse, twin.dense, pairs).frame.effect
    each = [attribute_across(twin.bridge, sparse, twin.dense, pair).frame.effect for pair in alone]
    pd.testing.assert_series_equal(together, sum(each) / 3, rtol=1e-8, atol=1e-10)


def test_dense_models_of_transformer_lens_are_attributed_to_nodes(make_model, make_bridge, pairs):
    sparse, (dense, _) = make_model(), make_bridge()
    bridge = Bridge.between(sparse, dense, generator=torch.Generator().manual_seed(0))
    table = attribute_across(bridge, sparse, dense, pairs, sites=("neuron", "final_read"))
    assert set(table.frame.site) == {"neuron", "final_read"} and (table.frame.effect != 0).any()
    assert all(p.requires_grad for p in dense.parameters())


def test_refusals(twins, pairs):
    sparse, twin = twins
    with pytest.raises(ConfigError, match="the metric has no gradient"):
        attribute_across(twin.bridge, sparse, twin.dense, pairs, is_correct)
    some = Bridge.between(sparse, twin.dense, BridgeConfig(sites=((1, 1), (3, 3)))).double()
    with pytest.raises(BridgeError, match="attn_read of layer 0 does is carried from a tied site at or before .* 0 to"):
        attribute_across(some, sparse, twin.dense, pairs)
