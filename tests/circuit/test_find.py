"""find_circuit on models whose circuits are known."""

from dataclasses import replace

import pytest
import torch

from sparse_interp.circuit.find import _units, find_circuit
from sparse_interp.errors import CheckpointError, CircuitError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node
from sparse_interp.tokenizer import tokenizer_hash

QUICK = PruneConfig(n_train=150, n_selection=100, n_steps=150)
QUICKER = PruneConfig(n_train=60, n_selection=36, n_steps=40, batch_size=16)


def searched(truth, seed=0, config=QUICK):
    generator = torch.Generator().manual_seed(seed)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    return find_circuit(truth.model, truth.task, config, baseline=means, generator=generator, progress=False)


@pytest.mark.parametrize("name", ["quote", "mlp_gate", "attention_copy"])
def test_a_hand_built_circuit_is_recovered_exactly(name):
    truth = ground_truth(name)
    circuit = searched(truth)
    assert circuit.node_set == truth.nodes
    assert {(row.source, row.target) for row in circuit.edges[circuit.edges.kind == "weight"].itertuples()} == {
        (str(source), str(target)) for source, target in truth.edges
    }
    scores = circuit.scores.set_index("measure").value
    assert scores["KL(model || circuit)"] < 1e-3
    assert scores["task loss of circuit"] == pytest.approx(scores["task loss of model"], abs=1e-3)


def test_the_circuit_of_a_hand_written_dense_model_is_recovered_in_a_bridge_as_in_ours(truth, dense_truth):
    found = []
    for model in dense_truth:
        generator = torch.Generator().manual_seed(0)
        means = mean_activations(model, truth.blocks(64, generator=generator))
        kept = {"baseline": means, "generator": generator, "progress": False}
        found.append(find_circuit(model, truth.task, QUICKER, **kept))
    ours, theirs = found
    assert theirs.node_set == ours.node_set == truth.nodes
    assert theirs.edges.equals(ours.edges) and theirs.n_edges == len(truth.edges)
    assert theirs.scores.value.tolist() == pytest.approx(ours.scores.value.tolist(), abs=1e-5)
    assert theirs.nodes.importance_nats.tolist() == pytest.approx(ours.nodes.importance_nats.tolist(), abs=1e-5)


def test_a_key_and_the_queries_that_meet_it_are_dropped_in_one_piece(make_bridge):
    """Four heads of queries and two of keys, four channels each: k 5 is met by q 9 and q 13."""
    cfg = hooked(make_bridge(n_kv=2)[0]).cfg
    both, key, lone = [Node(1, "q", 9), Node(1, "q", 13)], Node(1, "k", 5), [Node(1, "q", 8), Node(0, "neuron", 3)]
    assert _units([*both, key, *lone], QUICK, cfg) == [(*both, key), (lone[0],), (lone[1],)]
    assert _units([both[1], key], QUICK, cfg) == [(both[1], key)]
    assert _units(both, QUICK, cfg) == [(both[0],), (both[1],)]
    assert _units([*both, key], replace(QUICK, share_qk=False), cfg) == [(both[0],), (both[1],), (key,)]


def test_means_that_nobody_kept_are_asked_for(truth, dense_truth):
    for model in dense_truth:
        with pytest.raises(CheckpointError, match="make them with mean_activations"):
            find_circuit(model, truth.task, QUICK, generator=torch.Generator())


def test_the_same_generator_finds_the_same_circuit_and_leaves_the_model_as_it_was():
    truth = ground_truth("attention_copy")
    truth.model.train()
    before = {name: p.clone() for name, p in truth.model.named_parameters()}
    first, second = searched(truth), searched(truth)
    assert first.nodes.equals(second.nodes) and first.history.equals(second.history)
    assert first.seed == 0 and first.prune == QUICK and first.tokenizer_sha256 == tokenizer_hash(truth.task.tokenizer)
    assert truth.model.training
    for name, p in truth.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
    assert not any(point._forward_hooks for point in truth.model.hook_dict.values())


def test_calibration_adds_losses_with_a_scale_and_changes_nothing_else(truth):
    coarse = replace(QUICKER, max_kl=1.0, max_loss_gap=1.0)
    plain, scaled = searched(truth, config=coarse), searched(truth, config=replace(coarse, calibrate=True))
    assert plain.nodes.equals(scaled.nodes) and plain.scores.equals(scaled.scores[: len(plain.scores)])
    added = scaled.scores[len(plain.scores) :].set_index("measure").value
    without = plain.scores.set_index("measure").value
    assert 0 <= added["KL(model || calibrated circuit)"] < without["KL(model || circuit)"] - 1e-3
    assert added["scale of calibrated logits"] != pytest.approx(1, abs=1e-3)
    exact = searched(truth, config=replace(QUICKER, calibrate=True)).scores.set_index("measure").value
    assert exact["scale of calibrated logits"] == pytest.approx(1, abs=1e-4)


def test_a_rule_that_asks_for_more_than_the_model_does_is_refused(truth):
    config = PruneConfig(n_train=20, n_selection=20, n_steps=5, objective="task_loss", target_task_loss=1e-9)
    with pytest.raises(CircuitError, match="no circuit meets the stopping rule, not even all nodes"):
        searched(truth, config=config)


def test_a_baseline_of_another_model_is_refused(truth, make_model, generator):
    with pytest.raises(CircuitError, match="they belong to another model"):
        find_circuit(truth.model, truth.task, QUICK, baseline=zero_values(make_model()), generator=generator)
