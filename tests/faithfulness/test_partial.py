"""Partial ablation: true keys do not care what is left of the rest, and the adversary finds what a grid would find."""

import itertools
from dataclasses import replace

import pytest
import torch
from known_models import hand_built

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes, edges_among
from sparse_interp.faithfulness.partial import _table, partial_ablation
from sparse_interp.faithfulness.scores import PromptScores, score_circuit
from sparse_interp.interventions.ablation import Ablation
from sparse_interp.interventions.answers import all_answer_logits, answer_logits
from sparse_interp.interventions.baselines import task_means
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place
from sparse_interp.tasks.task import kl_divergence

few = {"n_draws": 2, "n_steps": 4, "step_size": 0.25}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def circuit_of(name, nodes, **more):
    truth, means = hand_built(name)
    return Circuit.of_nodes(truth.model, nodes, means, **more)


@pytest.mark.parametrize("name", ["quote", "mlp_gate", "two_hop"])
def test_a_key_survives_any_share_of_the_rest_and_half_of_it_does_not(name):
    truth, _ = hand_built(name)
    pairs = truth.task.batch(8, "test", generator=seeded())
    key = partial_ablation(truth.model, circuit_of(name, truth.nodes), pairs, **few, generator=seeded())
    assert max(key.frame.kl_nats) < 1e-4 and abs(key.worst.loss_gap.mean) < 1e-4
    assert key.worst.accuracy.mean == key.worst.agreement.mean == 1
    half = sorted(truth.nodes)[len(truth.nodes) // 2 :]
    part = partial_ablation(truth.model, circuit_of(name, half), pairs, **few, generator=seeded())
    assert part.worst.kl.mean > 0.1 and part.worst.loss_gap.mean > 0.1


def test_the_worst_case_is_that_of_a_grid_over_all_shares():
    """Three nodes outside: every combination of five shares is tried."""
    truth, means = hand_built("quote")
    pairs = truth.task.batch(4, "test", generator=seeded())
    outside = sorted(truth.nodes)[-3:]
    circuit = circuit_of("quote", set(all_nodes(truth.model.cfg)) - set(outside))
    batch, model = pairs.both_sides(), truth.model
    with torch.no_grad():
        reference = all_answer_logits(model, batch)
        grid = []
        for shares in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=3):

            def leave(activation, hook, shares=shares):
                changed = activation.flatten(2).clone()
                for node, share in zip(outside, shares, strict=True):
                    if Place(node.layer, node.site).hook == hook.name:
                        mean = means.of(node)
                        changed[..., node.channel] = mean + share * (changed[..., node.channel] - mean)
                return changed.view_as(activation)

            with model.hooks([(name, leave) for name in {Place(node.layer, node.site).hook for node in outside}]):
                grid.append(kl_divergence(reference, answer_logits(model, batch), batch).mean().item())
    found = partial_ablation(model, circuit, pairs, **few, generator=seeded())
    assert max(grid) > 0.1 and max(grid) > min(grid) + 0.1
    assert found.worst.kl.mean >= max(grid) - 1e-5


def test_no_scheme_is_worse_than_the_worst():
    truth, _ = hand_built("attention_copy")
    pairs = truth.task.batch(6, "test", generator=seeded())
    circuit = circuit_of("attention_copy", sorted(truth.nodes)[2:])
    for seed in range(3):
        table = partial_ablation(truth.model, circuit, pairs, n_draws=4, n_steps=1, generator=seeded(seed))
        assert table.worst.kl.mean == pytest.approx(table.frame.kl_nats.max(), rel=1e-6)
        assert table.worst.task_loss.mean == pytest.approx(table.frame.task_loss_nats.max(), rel=1e-6)
        adversary = table.frame[table.frame.raises == "KL"].kl_nats.item()
        assert adversary >= table.frame[table.frame.scheme != "adversarial"].kl_nats.max() - 1e-6


def test_the_worst_of_each_measure_is_that_of_its_own_scheme():
    """One adversary finds the largest divergence, another the largest loss, and a draw is worse than neither."""

    def run(kl, loss):
        names = {"kl": kl, "task_loss": loss, "correct": 1 - loss, "agrees": 1 - kl, "argmax": 0, "logit_difference": 0}
        return PromptScores(**{name: torch.full((4,), float(value)) for name, value in names.items()})

    found = {("full", ""): (0.1, 0.1), ("stochastic", ""): (0.3, 0.2), ("adversarial", "KL"): (0.9, 0.2)}
    found |= {("adversarial", "task loss"): (0.4, 0.8)}
    tried = [
        ({"scheme": scheme, "draw": None, "raises": raises, "ablation": ""}, run(*values))
        for (scheme, raises), values in found.items()
    ]
    table = _table(tried, torch.full((4,), 0.05), [0, 0, 1, 1], seeded())
    names = ("kl", "agreement", "task_loss", "loss_gap", "accuracy")
    outcomes = (table.full, table.expected, table.worst)
    means = [[round(getattr(outcome, name).mean, 5) for name in names] for outcome in outcomes]
    assert means == [[0.1, 0.9, 0.1, 0.05, 0.9], [0.3, 0.7, 0.2, 0.15, 0.8], [0.9, 0.1, 0.8, 0.75, 0.2]]


def test_rows_are_what_scores_measure_of_the_same_draws():
    truth, means = hand_built("attention_copy")
    pairs, circuit = truth.task.batch(6, "test", generator=seeded()), circuit_of("attention_copy", [])
    table = partial_ablation(truth.model, circuit, pairs, **few, generator=seeded())
    frame = table.frame.set_index("scheme")
    for name, ablation in (("full", Ablation.full(means)), ("stochastic", Ablation.stochastic(means, n_draws=2))):
        scores = score_circuit(truth.model, circuit, pairs, ablation, generator=seeded()).circuit
        rows = frame.loc[[name]]
        assert rows.kl_nats.mean() == pytest.approx(scores.kl.mean().item())
        assert rows.task_loss_nats.mean() == pytest.approx(scores.task_loss.mean().item())
        assert rows.accuracy.mean() == pytest.approx(scores.correct.mean().item())
    assert table.expected.kl.mean == pytest.approx(frame.loc["stochastic"].kl_nats.mean())
    assert (frame.n_prompts == 12).all() and frame.ablation.str.contains("mean over").all()
    assert table.plot().get_xlabel() == "kl_nats"


def test_a_key_with_its_edges_alone_survives_and_edges_it_lacks_are_cut_under_every_scheme():
    truth, _ = hand_built("quote")
    pairs = truth.task.batch(8, "test", generator=seeded())
    nodes = circuit_of("quote", truth.nodes)
    table = partial_ablation(truth.model, without_idle(truth, nodes), pairs, **few, generator=seeded())
    assert table.frame.kl_nats.max() < 1e-4
    none = {matrix: torch.zeros_like(mask) for matrix, mask in nodes.edge_masks(truth.model).items()}
    cut = circuit_of("quote", truth.nodes, edges=none)
    with cut.running(truth.model), torch.no_grad():
        batch = pairs.both_sides()
        expected = all_answer_logits(truth.model, batch)
    with torch.no_grad():
        kl = kl_divergence(all_answer_logits(truth.model, batch), expected, batch).mean().item()
    table = partial_ablation(truth.model, cut, pairs, **few, generator=seeded())
    assert table.frame[table.frame.scheme == "full"].kl_nats.item() == pytest.approx(kl, rel=1e-5) and kl > 0.1


def without_idle(truth, circuit):
    """The circuit of a key with the weights of the key alone."""
    masks = circuit.edge_masks(truth.model)
    for source, target in edges_among(truth.model, truth.nodes) - truth.edges:
        for matrix, mask in masks.items():
            ends = {"q": "W_Q", "k": "W_K", "v": "W_V", "attn_write": "W_O", "neuron": "W_in", "mlp_write": "W_out"}
            if matrix.layer == source.layer and matrix.name.endswith(ends[target.site]):
                mask[source.channel, target.channel] = False
    return Circuit.of_nodes(truth.model, circuit.node_set, circuit.baseline, edges=masks)


def test_more_padding_changes_nothing(truth):
    pairs = truth.task.batch(5, "test", generator=seeded())
    means = task_means(truth.model, pairs)
    circuit = Circuit.of_nodes(truth.model, sorted(truth.nodes)[2:], means)
    wider = {side: torch.nn.functional.pad(getattr(pairs, side), (0, 2), value=1) for side in ("clean", "corrupt")}
    tables = [
        partial_ablation(truth.model, circuit, batch, **few, generator=seeded())
        for batch in (pairs, replace(pairs, **wider))
    ]
    assert tables[0].frame.kl_nats.tolist() == pytest.approx(tables[1].frame.kl_nats.tolist(), rel=1e-5)
    assert tables[0].frame.kl_nats.max() > 0.1


def test_a_dense_model_of_transformer_lens_gives_the_numbers_of_ours(dense_truth, truth):
    pairs = truth.task.batch(4, "test", generator=seeded())
    frames = []
    for model in dense_truth:
        nodes = sorted(truth.nodes)[2:]
        circuit = Circuit.of_nodes(model, nodes, task_means(model, pairs))
        frames.append(partial_ablation(model, circuit, pairs, **few, generator=seeded()).frame)
    assert frames[0].kl_nats.tolist() == pytest.approx(frames[1].kl_nats.tolist(), rel=1e-3)
    assert frames[0].kl_nats.max() > 0.1 and hooked(dense_truth[1]).training is False


def test_refusals(truth):
    pairs = truth.task.batch(4, "test", generator=seeded())
    circuit = Circuit.of_nodes(truth.model, [Node(0, "neuron", 0)], task_means(truth.model, pairs))
    with pytest.raises(ConfigError, match="n_draws=0, n_steps=4"):
        partial_ablation(truth.model, circuit, pairs, n_draws=0, n_steps=4, generator=seeded())
    with pytest.raises(CircuitError, match="weights"):
        partial_ablation(hand_built("quote")[0].model, replace(circuit, model_sha256="0"), pairs, generator=seeded())
