"""find_circuit on models whose circuits are known."""

from dataclasses import replace

import pytest
import torch

from sparse_interp.circuit.find import _units, find_circuit
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CheckpointError, CircuitError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.faithfulness.scores import score_circuit
from sparse_interp.interventions.baselines import (
    Counterfactual,
    Resample,
    mean_activations,
    position_means,
    zero_values,
)
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, NodeAt
from sparse_interp.tasks.task import Task, kl_divergence
from sparse_interp.tokenizer import tokenizer_hash

QUICK = PruneConfig(n_train=60, n_selection=36, n_steps=40, batch_size=16)


def searched(truth, seed=0, config=QUICK):
    generator = torch.Generator().manual_seed(seed)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    return find_circuit(truth.model, truth.task, config, baseline=means, generator=generator, progress=False)


def test_a_hand_built_circuit_is_recovered_exactly_with_the_numbers_of_its_model(truth):
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
        found.append(find_circuit(model, truth.task, QUICK, **kept))
    ours, theirs = found
    assert theirs.node_set == ours.node_set == truth.nodes
    assert theirs.edges.equals(ours.edges) and theirs.n_edges == len(truth.edges)
    assert theirs.scores.value.tolist() == pytest.approx(ours.scores.value.tolist(), abs=1e-5)
    assert theirs.nodes.importance_nats.tolist() == pytest.approx(ours.nodes.importance_nats.tolist(), abs=1e-5)


def test_nodes_that_change_nothing_alone_stay_where_the_rule_needs_them_together(truth, monkeypatch):
    monkeypatch.setattr("sparse_interp.circuit.find.NO_EFFECT_NATS", float("inf"))
    assert searched(truth).node_set == truth.nodes


def test_nodes_that_change_nothing_alone_all_stay_where_no_few_of_them_are_found_to_be_enough(monkeypatch):
    truth = ground_truth("attention_copy")
    monkeypatch.setattr("sparse_interp.circuit.find.NO_EFFECT_NATS", float("inf"))
    monkeypatch.setattr("sparse_interp.circuit.find.needed_among", lambda items, good: None)
    constant = Node(0, "q", 0)  # shares the gate of a k that is needed, and is the first to go otherwise
    assert searched(truth).node_set == truth.nodes | {constant}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "task_loss"},
        {"objective": "task_loss", "target": "agreement"},
        {"objective": "logit_difference"},
        {"target": "kl"},
        {"target": "loss_gap"},
        {"schemes": ("stochastic",)},
        {"schemes": ("adversarial",), "adversary_steps": 2},
        {"schemes": ("full", "stochastic")},
        {"frozen_norms": True},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()),
)
def test_a_hand_built_circuit_is_recovered_whatever_the_objective_and_scheme(options):
    truth = ground_truth("attention_copy")
    assert searched(truth, config=replace(QUICK, **options)).node_set == truth.nodes


@pytest.mark.parametrize("kind", ["resample", "mean per position"])
def test_a_search_holds_what_its_own_baseline_says_and_the_scores_say_so(kind):
    truth, generator = ground_truth("attention_copy"), torch.Generator().manual_seed(0)
    pool = truth.task.batch(40, generator=generator)
    held = Resample(pool, 3) if kind == "resample" else position_means(truth.model, pool)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    kept = {"baseline": means, "search_baseline": held, "generator": generator, "progress": False}
    circuit = find_circuit(truth.model, truth.task, QUICK, **kept)
    assert circuit.node_set == truth.nodes and circuit.baseline.kind == means.kind
    scores = circuit.scores.set_index("measure")
    assert scores.ablation["KL(model || circuit)"].startswith(f"full, {kind}")
    assert scores.ablation["KL(model || circuit), as it runs"] == f"full, {means.kind}"


def test_nodes_that_are_constant_between_twins_are_not_found_by_holding_them_at_their_twins():
    """What marks the name is the same in both prompts of a pair: a counterfactual cannot tell that it is needed."""
    truth, generator = ground_truth("attention_copy"), torch.Generator().manual_seed(0)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    kept = {"baseline": means, "search_baseline": Counterfactual(), "generator": generator, "progress": False}
    found = find_circuit(truth.model, truth.task, QUICK, **kept).node_set
    marks = {Node(0, "attn_read", truth.channels.index("is_name")), Node(0, "k", 0)}
    assert found == truth.nodes - marks


@pytest.fixture(scope="module")
def fixed_quote():
    """The quote model, and prompts of one form: `print ( " word word word`, the quote at position 3, asked at 6."""
    truth, generator = ground_truth("quote"), torch.Generator().manual_seed(0)
    rows = [pair._asdict() for pair in truth.task.pairs(600, generator=generator) if pair.template == 0]
    rows = [{name: row[name] for name in ("clean", "corrupt", "answer", "foil")} for row in rows]
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    return truth, Task.from_pairs(rows, truth.task.tokenizer), means


PER_POSITION = replace(QUICK, per_position=True, n_steps=60, max_kl=0.01)


def test_gates_per_position_find_where_the_quote_stands_and_where_it_is_asked_for(fixed_quote):
    """Held at their mean at every position, marks of where the quote stands change nothing: it always stands there."""
    truth, task, means = fixed_quote
    held = position_means(truth.model, task.batch(60, generator=torch.Generator().manual_seed(1)))
    kept = {"baseline": means, "search_baseline": held, "generator": torch.Generator().manual_seed(0)}
    circuit = find_circuit(truth.model, task, PER_POSITION, **kept, progress=False)
    at = truth.channels.index
    there = [Node(0, "mlp_read", at("single")), Node(0, "mlp_read", at("double")), Node(0, "neuron", 1)]
    there += [Node(0, "neuron", 2), Node(0, "mlp_write", at("type")), Node(1, "attn_read", at("type")), Node(1, "v", 0)]
    asked = [Node(1, "attn_write", at("close")), Node(2, "final_read", at("close"))]
    assert circuit.spots == {NodeAt(*n, 3) for n in there} | {NodeAt(*n, 6) for n in asked}
    assert circuit.node_set == {*there, *asked} and circuit.n_pos == 7


def test_a_circuit_over_positions_runs_is_kept_in_a_file_and_refuses_other_prompts(fixed_quote, tmp_path):
    truth, task, means = fixed_quote
    generator = torch.Generator().manual_seed(0)
    circuit = find_circuit(truth.model, task, PER_POSITION, baseline=means, generator=generator, progress=False)
    asked = ("attn_write", "final_read")  # held at means over all positions, marks of the quote are needed too
    assert circuit.spots == {NodeAt(*node, 6 if node.site in asked else 3) for node in truth.nodes}
    loaded = Circuit.load(circuit.save(tmp_path / "circuit.json"), truth.model)
    assert loaded.spots == circuit.spots and loaded.n_pos == 7 and loaded.prune == PER_POSITION
    batch = task.batch(16, split="test", generator=generator)
    with torch.no_grad():
        reference = truth.model(batch.clean)
        with loaded.running(truth.model):
            logits = truth.model(batch.clean)
    assert kl_divergence(reference, logits, batch).mean() < 0.05
    scored = score_circuit(truth.model, loaded, batch)
    torch.testing.assert_close(scored.circuit.kl[:16], kl_divergence(reference, logits, batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(CircuitError, match="prompts of 7 tokens, and the run has 6"), loaded.running(truth.model):
        truth.model(batch.clean[:, 1:])
    with pytest.raises(CircuitError, match="a compact model is for nodes at all positions"):
        circuit.compact(truth.model)
    moved = circuit.transplanted(truth.model)
    assert moved.spots == circuit.spots


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
    first, second = (searched(truth) for _ in range(2))
    assert first.nodes.equals(second.nodes) and first.history.equals(second.history)
    assert first.seed == 0 and first.prune == QUICK and first.tokenizer_sha256 == tokenizer_hash(truth.task.tokenizer)
    assert truth.model.training
    for name, p in truth.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
    assert not any(point._forward_hooks for point in truth.model.hook_dict.values())


def test_calibration_adds_losses_with_a_scale_and_changes_nothing_else(truth):
    coarse = replace(QUICK, max_kl=1.0, max_loss_gap=1.0)
    plain, scaled = searched(truth, config=coarse), searched(truth, config=replace(coarse, calibrate=True))
    assert plain.nodes.equals(scaled.nodes) and plain.scores.equals(scaled.scores[: len(plain.scores)])
    added = scaled.scores[len(plain.scores) :].set_index("measure").value
    without = plain.scores.set_index("measure").value
    assert 0 <= added["KL(model || calibrated circuit)"] < without["KL(model || circuit)"] - 1e-3
    assert added["scale of calibrated logits"] != pytest.approx(1, abs=1e-3)
    exact = searched(truth, config=replace(QUICK, calibrate=True)).scores.set_index("measure").value
    assert exact["scale of calibrated logits"] == pytest.approx(1, abs=1e-4)


def test_a_rule_that_asks_for_more_than_the_model_does_is_refused(truth):
    config = PruneConfig(n_train=20, n_selection=20, n_steps=5, objective="task_loss", target_task_loss=1e-9)
    with pytest.raises(CircuitError, match="no circuit meets the stopping rule, not even all nodes"):
        searched(truth, config=config)


def test_a_baseline_of_another_model_is_refused(truth, make_model, generator):
    with pytest.raises(CircuitError, match="they belong to another model"):
        find_circuit(truth.model, truth.task, QUICK, baseline=zero_values(make_model()), generator=generator)
