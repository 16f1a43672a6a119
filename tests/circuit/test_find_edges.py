"""find_edges on models of which every edge that matters is known."""

from dataclasses import replace

import pytest
import torch

from sparse_interp.circuit.find_edges import CUT_EVERY, NO_EFFECT_NATS, find_edges
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CheckpointError, CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.edges import cutting
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.selection import split_pairs
from sparse_interp.model.sites import Node
from sparse_interp.tasks.task import kl_divergence

QUICK = PruneConfig(n_train=40, n_selection=27, n_steps=40, batch_size=8)


def searched(model, truth, start, config=QUICK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = mean_activations(model, truth.blocks(64, generator=generator))
    if start == "the whole model":
        circuit = None
    else:
        nodes = truth.nodes if start == "the key" else all_nodes(model.cfg)
        circuit = Circuit.of_nodes(model, nodes, means)
    return find_edges(model, circuit, truth.task, config, baseline=means, generator=generator, progress=False)


def edges_of(circuit):
    rows = circuit.edges[circuit.edges.kind == "weight"]
    return set(zip(rows.source, rows.target, strict=True))


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("quote", "the key"),
        ("bracket_depth", "the whole model"),
    ],
)
def test_the_edges_of_a_hand_built_model_are_recovered_exactly(name, start):
    truth = ground_truth(name)
    circuit = searched(truth.model, truth, start)
    assert edges_of(circuit) == {(str(source), str(target)) for source, target in truth.edges}
    assert circuit.node_set == truth.nodes and circuit.edges_pruned
    scores = circuit.scores.set_index("measure").value
    assert scores["KL(model || circuit)"] < 1e-3
    assert scores["task loss of circuit"] == pytest.approx(scores["task loss of model"], abs=1e-3)


@pytest.fixture(scope="module")
def found(truth):
    """The edges of the quote model, found from all of it."""
    return searched(truth.model, truth, "the whole model")


def measured_on(truth):
    """The prompts on which `searched` measures cuts."""
    generator = torch.Generator().manual_seed(0)
    truth.blocks(64, generator=generator)
    _, pairs = split_pairs(truth.task, QUICK, generator)
    batch = pairs.both_sides()
    return batch.rows(torch.arange(0, len(batch), CUT_EVERY))


def test_every_edge_of_the_result_matters_by_what_its_row_says(truth, found):
    circuit = found
    assert edges_of(circuit) == {(str(source), str(target)) for source, target in truth.edges}
    batch = measured_on(truth)
    weights = circuit.edges[circuit.edges.kind == "weight"]
    for row, entry in zip(weights.itertuples(), circuit.entries.itertuples(), strict=True):
        assert row.importance_nats > NO_EFFECT_NATS
        masks = {matrix: torch.zeros_like(mask) for matrix, mask in circuit.edge_masks(truth.model).items()}
        masks[entry.layer, entry.name][entry.row, entry.column] = True
        with torch.no_grad():
            reference = truth.model(batch.clean)
            with circuit.running(truth.model):
                whole = kl_divergence(reference, truth.model(batch.clean), batch).mean()
                with cutting(truth.model, masks, circuit.baseline):
                    without = kl_divergence(reference, truth.model(batch.clean), batch).mean()
        assert float(without - whole) == pytest.approx(row.importance_nats, abs=1e-5)
    assert circuit.edges[circuit.edges.kind != "weight"].importance_nats.isna().all()


def test_the_edges_of_a_bridge_are_those_of_our_model_with_its_weights(truth, dense_truth):
    ours, theirs = (searched(model, truth, "the key", replace(QUICK, n_steps=10)) for model in dense_truth)
    assert edges_of(theirs) == edges_of(ours) == {(str(source), str(target)) for source, target in truth.edges}
    assert theirs.edges.importance_nats.dropna().tolist() == pytest.approx(
        ours.edges.importance_nats.dropna().tolist(), abs=1e-4
    )


def test_a_search_may_begin_where_another_ended_and_finds_nothing_to_drop(truth, found):
    again = find_edges(
        truth.model, found, truth.task, QUICK, generator=torch.Generator().manual_seed(3), progress=False
    )
    assert edges_of(again) == edges_of(found) and again.node_set == found.node_set


def test_sites_without_gates_keep_their_nodes_and_have_no_edges_to_them(truth):
    config = replace(QUICK, sites=("mlp_read", "neuron", "mlp_write"))
    circuit = searched(truth.model, truth, "the whole model", config)
    mlps = {node for node in truth.nodes if node.site in config.sites}
    assert circuit.node_set == mlps and circuit.sites == config.sites
    assert edges_of(circuit) == {(str(a), str(b)) for a, b in truth.edges if {a, b} <= mlps}


def test_what_cannot_be_searched_is_refused(truth, dense_truth):
    means = mean_activations(truth.model, truth.blocks(8, generator=torch.Generator().manual_seed(0)))
    draw = {"generator": torch.Generator().manual_seed(0), "progress": False}
    apart = Circuit.of_nodes(truth.model, [Node(0, "q", 0), Node(1, "neuron", 0)], means)
    with pytest.raises(CircuitError, match="there is no edge between these nodes"):
        find_edges(truth.model, apart, truth.task, QUICK, **draw)
    with pytest.raises(CircuitError, match="Load the model it belongs to"):
        find_edges(dense_truth[0], apart, truth.task, QUICK, **draw)
    with pytest.raises(CheckpointError, match="make them with mean_activations"):
        find_edges(truth.model, None, truth.task, QUICK, **draw)
    with pytest.raises(ConfigError, match="an edge has one gate for all positions"):
        find_edges(truth.model, None, truth.task, replace(QUICK, per_position=True), baseline=means, **draw)
    demanding = replace(QUICK, objective="task_loss", target_task_loss=1e-9)
    with pytest.raises(
        CircuitError, match=r"no choice of edges .* rule: with all \d+ of them KL\(model \|\| circuit\) is"
    ):
        find_edges(truth.model, None, truth.task, demanding, baseline=means, **draw)
