"""Gates that are exactly open or exactly shut, and what shares one where queries are grouped."""

import pytest
import torch

from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.interventions.gates import NodeGates, gate
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Place


@pytest.fixture(scope="module")
def pairs():
    return ground_truth("quote").task.batch(8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bridge(make_bridge):
    """Four heads of queries and two of keys and values, four channels each."""
    return make_bridge(n_kv=2)[0]


def test_a_gate_is_exactly_open_or_exactly_shut_with_the_gradient_of_a_sigmoid():
    tau = torch.tensor([-0.3, 0.0, 2.0], requires_grad=True)
    m = gate(tau, temperature=0.5)
    assert m.tolist() == [0.0, 1.0, 1.0]
    (grad,) = torch.autograd.grad(m.sum(), tau)
    soft = torch.sigmoid(tau / 0.5)
    torch.testing.assert_close(grad, soft * (1 - soft) / 0.5)


def test_a_shared_gate_that_is_shut_holds_the_key_and_its_queries(bridge, pairs, generator):
    baseline = zero_values(bridge)
    gates = NodeGates(hooked(bridge), baseline, [PruneConfig(n_steps=3, noise=0.0)], [generator])
    with torch.no_grad():
        gates.groups(gates.taus[0])[Place(0, "q")][5] = -1
    seen = {}
    places = [Place(0, site) for site in "qk"]
    look = [(place.hook, lambda x, hook, place=place: seen.update({place.site: x.flatten(2)})) for place in places]
    meeting = gates.meeting(pairs, [8])
    with torch.no_grad(), meeting(gates.drawn(3, [0])), bridge.hooks(fwd_hooks=look):
        bridge(pairs.clean)
    held = {site: (x == 0).all(0).all(0).nonzero().flatten().tolist() for site, x in seen.items()}
    assert held == {"q": [9, 13], "k": [5]}
