"""Steering curves: a twin pushed along a feature does what the sparse model does with more of it."""

import pytest
import torch

from sparse_interp.bridges.curves import AHEAD, steering_curve
from sparse_interp.bridges.rotated import rotated_twin
from sparse_interp.errors import BridgeError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.interventions.steering import steer
from sparse_interp.model.sites import Node


@pytest.fixture(scope="module")
def made():
    generator = torch.Generator().manual_seed(0)
    truth = ground_truth("quote")
    batch = truth.task.batch(16, "test", generator=generator)
    batch = batch.rows((batch.foil == batch.foil[0]).nonzero()[:, 0])
    fit = truth.task.batch(8, "train", generator=generator)
    return truth, rotated_twin(truth.model, generator=generator), batch, fit


def curve(made, node, values, **given):
    truth, twin, batch, fit = made
    generator = torch.Generator().manual_seed(1)
    text = truth.blocks(4, generator=generator)
    about = {"target": int(batch.foil[0]), "fit": fit, "blocks": text, "n_random": 20} | given
    return steering_curve(
        twin.bridge, truth.model, twin.dense, node, values, batch, generator=generator, progress=False, **about
    )


def test_the_answer_of_the_hand_written_model_is_turned_over_by_its_own_feature_and_by_no_random_one(made):
    truth, _, batch, _ = made
    node = Node(1, "attn_write", truth.channels.index("close"))
    sign = -1 if truth.model.unembed.W_U[node.channel, batch.foil[0]] < 0 else 1
    table = curve(made, node, [0.0, 3.0 * sign])
    frame = table.frame.set_index(["value", "direction"])
    feature, marked = frame.loc[(3.0 * sign, "feature")], frame.loc[(3.0 * sign, "random, 95th percentile")]
    assert feature.probability > 0.9 > 0.5 > marked.probability
    assert feature.low > marked.change
    assert frame.loc[(0.0, "feature"), "change"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad(), steer(truth.model, node, add=3.0 * sign, positions=batch.last):
        wanted = answer_logits(truth.model, batch).softmax(-1)[:, batch.foil[0]].mean()
    assert feature.probability == pytest.approx(float(wanted), abs=1e-5)
    assert frame.loc[(3.0 * sign, "difference of means"), "probability"] > feature.probability - 0.1
    ahead, means = frame.loc[(3.0 * sign, AHEAD)], frame.loc[(3.0 * sign, "difference of means")]
    assert ahead.change == pytest.approx(feature.change - means.change, abs=1e-9)
    assert ahead.low <= ahead.change <= ahead.high
    assert len(table.plot().lines) == 4


def test_what_a_push_costs_elsewhere_is_told_and_pushes_everywhere_are_felt_everywhere(made):
    truth, _, _, _ = made
    read = curve(made, Node(1, "attn_write", truth.channels.index("close")), [1.0], at_end=False, n_random=1)
    spare = curve(made, Node(1, "attn_write", truth.channels.index("spare")), [1.0], at_end=False, n_random=1)
    costs = [table.frame.set_index("direction").loss_change_frac["feature"] for table in (read, spare)]
    assert abs(costs[0]) > 1e-3 and costs[1] == pytest.approx(0, abs=1e-6)
    assert spare.frame.set_index("direction").change["feature"] == pytest.approx(0, abs=1e-6)


def test_refusals(made):
    with pytest.raises(BridgeError, match="0 continue with token 3; a difference of means needs some that do"):
        curve(made, Node(1, "neuron", 0), [1.0], target=3)
    with pytest.raises(BridgeError, match="has no direction"):
        curve(made, Node(1, "q", 0), [1.0])
