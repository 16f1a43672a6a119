"""Areas are those of curves drawn by hand, and a curve is what its circuits restore."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.curves import SIZES, areas, ranked, size_curve
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.edges import edges_among
from sparse_interp.model.sites import NodeAt, NodeValues, Place, masks
from sparse_interp.tasks.task import logit_difference

# -- areas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "cpr", "cmd"),
    [
        ([1.0] * 10, 0.999, 0.0),  # a circuit at every size
        ([0.0] * 10, 0.0, 0.999),  # nothing at any
        ([2.0] * 10, 1.998, 0.999),  # twice what the model does
        (list(SIZES), (1 - 1e-6) / 2, 0.999 - (1 - 1e-6) / 2),  # a node as good as any other
        ([0.0] * 6 + [1.0] * 4, 0.025 + 0.9, 0.049 + 0.025),  # all of it between 5 and 10 %
    ],
)
def test_areas_of_curves_drawn_by_hand(curve, cpr, cmd):
    found = areas(SIZES, torch.tensor(curve, dtype=torch.float64))
    assert [float(area) for area in found] == pytest.approx([cpr, cmd], abs=1e-12)


def test_a_curve_that_crosses_one_is_charged_on_both_sides_at_the_sizes_where_it_is_measured():
    cpr, cmd = areas([0.0, 0.5, 1.0], torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    assert cpr.tolist() == [1.25, 1.0] and cmd.tolist() == [0.75, 0.0]


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def key(truth, means):
    return Circuit.of_nodes(truth.model, truth.nodes, means)


def test_each_size_restores_what_a_plain_ablation_of_the_rest_does(truth, means, key, generator):
    pairs = truth.task.batch(12, "test", generator=generator)
    order = [*sorted(truth.nodes, reverse=True), *(n for n in all_nodes(truth.model.cfg) if n not in truth.nodes)]
    found = size_curve(truth.model, key, pairs, ranking=order, generator=generator, progress=False)
    batch, restored = pairs.both_sides(), {}
    for n in {0, len(order), *found.frame.n_nodes[4:7]}:
        with ablate(truth.model, order[n:], means):
            restored[n] = float(logit_difference(all_answer_logits(truth.model, batch), batch).mean())
    rows = found.frame[found.frame.n_nodes.isin(restored)]
    gap = restored[len(order)] - restored[0]
    expected = [(restored[n] - restored[0]) / gap for n in rows.n_nodes]
    assert rows.faithfulness.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.frame.n_nodes.tolist() == [round(frac * len(order)) for frac in SIZES]
    assert found.frame.faithfulness.iloc[-1] == pytest.approx(1) and found.n_prompts == 24
    assert (rows.low <= rows.faithfulness + 1e-9).all() and (rows.faithfulness <= rows.high + 1e-9).all()
    assert found.plot().get_xscale() == "log"


def test_at_positions_each_size_restores_what_the_circuit_of_its_first_spots_does(truth, means, generator):
    """A quote that stands at 3 and is asked for at the end: the key there comes first, and then all else."""
    pairs = truth.task.batch(48, "test", generator=generator)
    pairs = pairs.rows((pairs.template == 0).nonzero().flatten())
    n_pos, nodes = int(pairs.lengths[0]), sorted(truth.nodes)
    kept = [NodeAt(*node, n_pos - 1 if node.site in ("attn_write", "final_read") else 3) for node in nodes]
    importance = {spot: float(i) for i, spot in enumerate(kept)}
    circuit = Circuit.of_nodes(truth.model, kept, means, n_pos=n_pos, importance=importance)
    assert ranked(circuit) == kept[::-1] and set(circuit.outside).isdisjoint(kept)
    order = [*kept[::-1], *circuit.outside]
    found = size_curve(truth.model, circuit, pairs, ranking=order, generator=generator, progress=False)
    batch, rows = pairs.both_sides(), found.frame.set_index("n_nodes")
    assert rows.index.tolist() == [round(frac * len(order)) for frac in SIZES]
    for n in rows.index:
        with Circuit.of_nodes(truth.model, order[:n], means, n_pos=n_pos).running(truth.model):
            restored = float(logit_difference(all_answer_logits(truth.model, batch), batch).mean())
        assert rows.logit_difference[n] == pytest.approx(restored, abs=1e-5)
    assert len(set(rows.logit_difference.round(4))) > 3 and rows.faithfulness.iloc[-1] == pytest.approx(1)


def test_the_key_first_is_nearer_to_the_model_than_the_key_last(truth, key, generator):
    pairs = truth.task.batch(12, "test", generator=generator)
    first = size_curve(truth.model, key, pairs, generator=generator, progress=False)
    outside = [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]
    last = size_curve(truth.model, key, pairs, ranking=outside, generator=generator, progress=False)
    assert first.cmd.mean < 0.15 < 0.5 < last.cmd.mean and first.cpr.mean > 0.85 > 0.5 > last.cpr.mean
    assert first.cmd.low <= first.cmd.mean <= first.cmd.high


def test_edges_that_a_circuit_lacks_are_cut_up_to_its_own_size(truth, means, generator):
    pairs = truth.task.batch(6, "test", generator=generator)
    nodes = all_nodes(truth.model.cfg)[:-1]
    none = {m: torch.zeros_like(mask) for m, mask in edges_among(truth.model, masks(nodes, truth.model.cfg)).items()}
    circuit = Circuit.of_nodes(truth.model, nodes, means, edges=none)
    found = size_curve(truth.model, circuit, pairs, generator=generator, progress=False).frame.faithfulness
    assert found[8] == pytest.approx(0, abs=1e-6) and found[9] == pytest.approx(1)


def test_nodes_are_ranked_by_importance_and_then_by_their_gates(truth, means, key):
    nodes, tau = sorted(truth.nodes), {place: torch.zeros(len(v)) for place, v in means.values.items()}
    outside = [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]
    tau[Place(*outside[40][:2])][outside[40].channel] = 0.5
    tau[Place(*outside[7][:2])][outside[7].channel] = 0.2
    importance = {node: float(i) for i, node in enumerate(nodes)}
    circuit = Circuit.of_nodes(truth.model, nodes, means, importance=importance, tau=NodeValues(tau, "gate tau"))
    order = ranked(circuit)
    assert order[: len(nodes)] == nodes[::-1] and order[len(nodes) : len(nodes) + 2] == [outside[40], outside[7]]
    assert sorted(order) == sorted(all_nodes(truth.model.cfg))
    assert set(ranked(key)) == truth.nodes


def test_a_bridge_gives_what_our_model_gives(dense_truth, truth):
    tables = []
    for model in dense_truth:
        seed = torch.Generator().manual_seed(0)
        circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, truth.blocks(16, generator=seed)))
        pairs = truth.task.batch(4, "test", generator=seed)
        tables.append(size_curve(model, circuit, pairs, generator=seed, progress=False).frame)
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-4)


def test_what_makes_no_curve_is_refused(truth, key, generator):
    pairs, node = truth.task.batch(2, "test", generator=generator), min(truth.nodes)
    with pytest.raises(ConfigError, match="only 1 different"):
        size_curve(truth.model, key, pairs, ranking=[node, node], generator=generator)
    with pytest.raises(CircuitError, match="weights"):
        size_curve(truth.model, replace(key, model_sha256="0" * 64), pairs, generator=generator)
