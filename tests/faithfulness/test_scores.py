"""Scores are what a plain loop over prompts would measure, and a circuit of everything is the model."""

import math

import numpy as np
import pytest
import torch
from known_models import hand_built

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.faithfulness.scores import mean_of, prompt_scores, score_circuit, some_pairs
from sparse_interp.interventions.ablation import Ablation, ablate
from sparse_interp.interventions.answers import all_answer_logits


def circuit_of(name, nodes):
    truth, means = hand_built(name)
    return Circuit.of_nodes(truth.model, nodes, means)


def test_scores_equal_a_computation_prompt_by_prompt(generator):
    truth, means = hand_built("mlp_gate")
    nodes = sorted(truth.nodes)[1:]
    everything = all_nodes(truth.model.cfg)
    held = {
        "model": [],
        "circuit": [node for node in everything if node not in nodes],
        "removed": nodes,
        "nothing": everything,
    }
    pairs = truth.task.batch(5, "test", generator=generator)
    scores = score_circuit(truth.model, circuit_of("mlp_gate", nodes), pairs)
    for name, ablated in held.items():
        rows = []
        for side in (pairs, pairs.swapped()):
            for i in range(len(pairs)):
                prompt = side.clean[i : i + 1, : int(side.lengths[i])]
                with torch.no_grad():
                    reference = truth.model(prompt)[0, -1].double().numpy()
                    with ablate(truth.model, ablated, means):
                        logits = truth.model(prompt)[0, -1].double().numpy()
                p, q = (np.exp(x) / np.exp(x).sum() for x in (reference, logits))
                answer, foil = int(side.answer[i]), int(side.foil[i])
                rows.append(
                    {
                        "task_loss": -math.log(q[answer] / (q[answer] + q[foil])),
                        "correct": float(logits[answer] > logits[foil]),
                        "argmax": float(logits.argmax() == answer),
                        "logit_difference": logits[answer] - logits[foil],
                        "kl": float((p * np.log(p / q)).sum()),
                        "agrees": float(logits.argmax() == reference.argmax()),
                    }
                )
        measured = getattr(scores, name).frame()
        for column in measured:
            assert measured[column].tolist() == pytest.approx([row[column] for row in rows], rel=1e-4, abs=1e-5), column


def test_the_circuit_of_all_nodes_is_the_model_exactly(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(16, "test", generator=generator)
    scores = score_circuit(truth.model, circuit_of("quote", all_nodes(truth.model.cfg)), pairs)
    assert scores.circuit.kl.abs().max() == 0
    assert scores.loss_gap(generator) == (0, 0, 0)
    assert scores.accuracy_gap(generator) == (0, 0, 0)
    assert scores.faithfulness(generator) == (1, 1, 1)
    assert torch.equal(scores.removed.task_loss, scores.nothing.task_loss)


def test_the_empty_circuit_restores_nothing_and_removing_it_removes_nothing(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(16, "test", generator=generator)
    scores = score_circuit(truth.model, circuit_of("quote", []), pairs)
    assert scores.faithfulness(generator) == (0, 0, 0)
    assert scores.removed.kl.abs().max() == 0
    assert scores.circuit.task_loss.mean() == pytest.approx(math.log(2))


def test_the_key_of_a_hand_built_model_scores_as_the_model_does(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(16, "shifted", generator=generator)
    scores = score_circuit(truth.model, circuit_of("quote", truth.nodes), pairs)
    assert scores.circuit.kl.max() < 1e-4
    assert scores.faithfulness(generator).mean == pytest.approx(1, abs=1e-3)
    assert scores.removed.correct.mean() <= 0.5


def test_both_sides_of_every_pair_are_asked(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(8, "test", generator=generator)
    scores = score_circuit(truth.model, circuit_of("quote", truth.nodes), pairs)
    assert len(scores.model.correct) == 16
    assert torch.equal(scores.batch.clean[8:], pairs.corrupt) and torch.equal(scores.batch.answer[8:], pairs.foil)


def test_correlation_is_pearsons_over_prompts(generator):
    truth, _ = hand_built("attention_copy")
    pairs = truth.task.batch(16, "test", generator=generator)
    scores = score_circuit(truth.model, circuit_of("attention_copy", sorted(truth.nodes)[1:]), pairs)
    found = scores.correlation(generator)
    both = np.stack([scores.circuit.logit_difference, scores.model.logit_difference])
    assert both.std(1).min() > 1e-3
    assert found.mean == pytest.approx(np.corrcoef(both)[0, 1], abs=1e-6)
    assert found.low <= found.mean <= found.high


def test_a_constant_logit_difference_correlates_with_nothing(generator):
    truth, _ = hand_built("quote")
    scores = score_circuit(truth.model, circuit_of("quote", []), truth.task.batch(8, "test", generator=generator))
    assert math.isnan(scores.correlation(generator).mean)


def test_intervals_draw_templates_and_of_one_template_pairs(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(24, "test", generator=generator)
    many = score_circuit(truth.model, circuit_of("quote", truth.nodes), pairs)
    assert many.groups == 2 * pairs.template.tolist()
    alike = pairs.rows((pairs.template == pairs.template[0]).nonzero()[:, 0])
    one = score_circuit(truth.model, circuit_of("quote", truth.nodes), alike)
    assert one.groups == [*range(len(alike)), *range(len(alike))]


def test_values_that_depend_on_the_template_alone_get_the_interval_of_templates(generator):
    groups = [0] * 500 + [1] * 500
    found = mean_of(torch.tensor([0.0] * 500 + [1.0] * 500), groups, generator)
    assert (found.low, found.mean, found.high) == (0, 0.5, 1)


def test_some_pairs_are_of_every_template_and_always_the_same():
    truth, _ = hand_built("quote")
    seeded = lambda: torch.Generator().manual_seed(0)
    pairs = truth.task.batch(64, "test", generator=seeded())
    chosen = some_pairs(pairs, 8, generator=seeded())
    n_each = pairs.template.unique()
    assert len(chosen) == 8 and {*chosen.template.tolist()} == {*n_each.tolist()}
    assert max(chosen.template.bincount()[n_each]) - min(chosen.template.bincount()[n_each]) <= 1
    assert torch.equal(chosen.clean, some_pairs(pairs, 8, generator=seeded()).clean)
    assert len(some_pairs(pairs, 100, generator=seeded())) == 64


def test_one_group_has_a_mean_and_no_interval(generator):
    found = mean_of(torch.tensor([1.0, 2.0]), [7, 7], generator)
    assert found.mean == 1.5 and math.isnan(found.low) and math.isnan(found.high)


def test_scoring_leaves_the_model_as_it_was(generator):
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(4, "test", generator=generator)
    before = truth.model(pairs.clean)
    truth.model.train()
    try:
        score_circuit(truth.model, circuit_of("quote", truth.nodes), pairs)
        assert truth.model.training
    finally:
        truth.model.eval()
    assert torch.equal(truth.model(pairs.clean), before)


def test_a_circuit_of_other_weights_is_refused(generator):
    truth, _ = hand_built("quote")
    other = ground_truth("quote")
    other.model.unembed.W_U.data *= 2
    with pytest.raises(CircuitError, match="weights"):
        score_circuit(other.model, circuit_of("quote", truth.nodes), truth.task.batch(4, "test", generator=generator))


def test_divergence_from_oneself_is_never_below_zero(generator):
    truth, _ = hand_built("quote")
    batch = truth.task.batch(8, "test", generator=generator)
    logits = torch.randn(8, 50, generator=generator) * 20
    assert prompt_scores(logits + 1e-6, logits, batch).kl.min() > -1e-9


# -- other ablations --------------------------------------------------------------------------------------------------


def test_a_circuit_of_all_nodes_is_the_model_under_any_ablation(generator):
    truth, means = hand_built("quote")
    pairs = truth.task.batch(8, "test", generator=generator)
    whole = circuit_of("quote", all_nodes(truth.model.cfg))
    for ablation in (Ablation.adversarial(means, n_steps=2, n_draws=1), Ablation.counterfactual()):
        scores = score_circuit(truth.model, whole, pairs, ablation, generator=generator)
        assert scores.circuit.kl.abs().max() == 0 and scores.ablation == ablation.name


def test_the_key_of_a_hand_built_model_survives_its_adversary_and_half_of_it_does_not(generator):
    """All else in the model takes no part: whatever is left of it, the key goes on as the model does."""
    truth, means = hand_built("attention_copy")
    pairs = truth.task.batch(8, "test", generator=generator)
    found = {}
    for name, nodes in (("key", truth.nodes), ("part", sorted(truth.nodes)[1:])):
        for kind in ("full", "stochastic", "adversarial"):
            ablation = {"full": Ablation.full(means), "stochastic": Ablation.stochastic(means, n_draws=3)}.get(
                kind, Ablation.adversarial(means, n_steps=4, n_draws=3)
            )
            seed = torch.Generator().manual_seed(0)
            scores = score_circuit(truth.model, circuit_of("attention_copy", nodes), pairs, ablation, generator=seed)
            found[name, kind] = scores.circuit.kl.mean().item()
    assert max(found["key", kind] for kind in ("full", "stochastic", "adversarial")) < 1e-3
    assert found["part", "adversarial"] >= found["part", "stochastic"] and found["part", "adversarial"] > 0.1


def test_scores_of_a_stochastic_ablation_are_means_over_its_draws(generator):
    truth, means = hand_built("attention_copy")
    pairs, circuit = truth.task.batch(6, "test", generator=generator), circuit_of("attention_copy", [])
    seed = lambda: torch.Generator().manual_seed(0)
    ablation = Ablation.stochastic(means, n_draws=3)
    scores = score_circuit(truth.model, circuit, pairs, ablation, generator=seed())
    draws = ablation.answer_logits(truth.model, circuit.kept, scores.batch, generator=seed())
    each = [prompt_scores(logits, scores.reference, scores.batch).kl for logits in draws]
    torch.testing.assert_close(scores.circuit.kl, torch.stack(each).mean(0))
    assert (each[0] - each[1]).abs().max() > 1e-4
    assert torch.equal(scores.nothing.kl, score_circuit(truth.model, circuit, pairs).nothing.kl)


def test_edges_that_a_circuit_lacks_are_cut_under_every_ablation_and_in_the_ablated_run_alone(generator):
    truth, means = hand_built("attention_copy")
    pairs = truth.task.batch(6, "test", generator=generator)
    nodes = all_nodes(truth.model.cfg)
    none = {
        matrix: torch.zeros_like(mask)
        for matrix, mask in circuit_of("attention_copy", nodes).edge_masks(truth.model).items()
    }
    circuit = Circuit.of_nodes(truth.model, nodes, means, edges=none)
    with circuit.running(truth.model), torch.no_grad():
        batch = pairs.both_sides()
        expected = all_answer_logits(truth.model, batch)
    for ablation in (None, Ablation.counterfactual(), Ablation.adversarial(means, n_steps=1, n_draws=1)):
        scores = score_circuit(truth.model, circuit, pairs, ablation, generator=generator)
        torch.testing.assert_close(scores.circuit.kl, prompt_scores(expected, scores.reference, batch).kl)
        assert scores.circuit.kl.mean() > 0.1 and scores.model.kl.abs().max() == 0
