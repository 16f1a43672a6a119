"""What repairs a model whose circuit is gone is named, and effects are those of plain ablations."""

import pandas as pd
import pytest
import torch
from known_models import hand_built

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.completeness import completeness
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.edges import edges_among
from sparse_interp.model.sites import Node, NodeAt, masks


def key_of(name):
    """A hand-built model and the circuit of its key."""
    truth, means = hand_built(name)
    return truth, Circuit.of_nodes(truth.model, truth.nodes, means)


def test_the_head_that_stands_in_is_named_node_by_node_and_nothing_else_is(generator):
    truth, circuit = key_of("backup")
    at = truth.channels.index
    stand_in = {
        *(Node(1, site, 0) for site in ("q", "k", "v")),
        *(Node(1, "attn_read", at(name)) for name in ("is_mark", "mark", "present")),
        Node(0, "mlp_write", at("present")),
        Node(1, "attn_write", at("spare")),
        Node(2, "final_read", at("spare")),
    }
    pairs = truth.task.batch(16, "test", generator=generator)
    found = completeness(truth.model, circuit, pairs, generator=generator, progress=False)
    assert set(found.backups) == set(map(str, stand_in))
    assert found.largest.low > 0.5 and found.frame[found.frame.backup].alone_nats.abs().max() < 1e-6
    assert found.n_prompts == 16 and len(found) + circuit.n_nodes == sum(
        len(v) for v in circuit.baseline.values.values()
    )
    assert found.plot().get_xlabel() == "growth_nats"


def test_nothing_stands_in_for_a_key_that_has_no_backup(generator):
    truth, circuit = key_of("quote")
    candidates = [Node(0, "v", 2), Node(1, "final_read", 4)._replace(layer=2), Node(0, "neuron", 6)]
    pairs = truth.task.batch(8, "test", generator=generator)
    found = completeness(truth.model, circuit, pairs, candidates=candidates, generator=generator, progress=False)
    assert found.backups == [] and set(found.frame.name) == set(map(str, candidates))


@pytest.mark.parametrize("edges", [False, True])
def test_effects_are_those_of_plain_ablations_prompt_by_prompt(edges, generator):
    truth, circuit = key_of("backup")
    means = circuit.baseline
    if edges:
        among = edges_among(truth.model, masks(truth.nodes, truth.model.cfg))
        circuit = Circuit.of_nodes(truth.model, truth.nodes, means, edges=among)
    nodes = [Node(1, "q", 0), Node(1, "k", 0), Node(0, "neuron", 0)]
    pairs = truth.task.batch(3, "test", generator=generator)
    found = completeness(truth.model, circuit, pairs, candidates=nodes, n_pairs=3, generator=generator, progress=False)
    batch, rows = pairs.both_sides(), found.frame.set_index("name")
    for node in nodes:
        alone, removed = [], []
        for i in range(len(batch)):
            prompt = batch.clean[i : i + 1, : int(batch.lengths[i])]

            def run(prompt=prompt):
                with torch.no_grad():
                    return truth.model(prompt)[0, -1].double().log_softmax(-1)

            with ablate(truth.model, [node], means):
                held = run()
            alone.append(divergence(run(), held))
            with circuit.removed(truth.model):
                rest = run()
                with ablate(truth.model, [node], means):
                    removed.append(divergence(rest, run()))
        measured = rows.loc[str(node), ["alone_nats", "removed_nats", "growth_nats"]].tolist()
        before, after = (sum(values) / len(values) for values in (alone, removed))
        assert measured == pytest.approx([before, after, after - before], abs=1e-5)
    assert rows.growth_nats.max() > 0.1


def divergence(p, q):
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize(("name", "other"), [("quote", Node(0, "neuron", 6)), ("backup", Node(1, "q", 0))])
def test_at_positions_a_candidate_is_held_wherever_the_circuit_has_it_not(name, other, generator):
    truth, means = hand_built(name)
    pairs = truth.task.batch(16, "test", generator=generator)
    pairs = pairs.rows((pairs.lengths == pairs.lengths[0]).nonzero().flatten()[:3])
    n_pos, own = int(pairs.lengths[0]), min(n for n in truth.nodes if n.site == "v")

    def circuit_of(spots):
        return Circuit.of_nodes(truth.model, spots, means, n_pos=n_pos)

    circuit = circuit_of([NodeAt(*n, pos) for n in truth.nodes for pos in range(n_pos) if n != own or pos > 1])
    nodes = [own, other, Node(2, "final_read", truth.channels.index("spare"))]
    found = completeness(truth.model, circuit, pairs, candidates=nodes, n_pairs=3, generator=generator, progress=False)
    batch, rows = pairs.both_sides(), found.frame.set_index("name")
    outside, everything = set(circuit.outside), circuit.members | set(circuit.outside)

    def run(spots):
        with torch.no_grad(), circuit_of(spots).running(truth.model):
            return all_answer_logits(truth.model, batch).double().log_softmax(-1)

    for node in nodes:
        held = {spot for spot in outside if spot.node == node}
        before, after = (
            sum(divergence(*both) for both in zip(run(spots), run(spots - held), strict=True)) / len(batch)
            for spots in (everything, outside)
        )
        assert rows.loc[str(node), ["alone_nats", "removed_nats"]].tolist() == pytest.approx([before, after], abs=1e-5)
    whole = circuit_of(spot for spot in everything if spot.node != own)
    with torch.no_grad(), whole.running(truth.model):
        everywhere = all_answer_logits(truth.model, batch).double().log_softmax(-1)
    lost = sum(divergence(*both) for both in zip(run(everything), everywhere, strict=True)) / len(batch)
    assert lost > 0.1 > rows.alone_nats[str(own)] if name == "quote" else rows.removed_nats[str(other)] > 0.1
    every = completeness(truth.model, circuit, pairs, n_pairs=3, generator=generator, progress=False)
    assert set(every.frame.name) == {str(spot.node) for spot in outside} and own in {spot.node for spot in outside}


def test_a_bridge_gives_what_our_model_gives(dense_truth, truth, generator):
    tables = []
    for model in dense_truth:
        seed = torch.Generator().manual_seed(0)
        means = mean_activations(model, truth.blocks(16, generator=seed))
        circuit = Circuit.of_nodes(model, truth.nodes, means)
        pairs = truth.task.batch(4, "test", generator=seed)
        candidates = [Node(0, "v", 0), Node(1, "v", 1), Node(1, "mlp_write", 3), Node(2, "final_read", 2)]
        found = completeness(model, circuit, pairs, candidates=candidates, n_pairs=2, generator=seed, progress=False)
        tables.append(found.frame.sort_values("name", ignore_index=True))
    pd.testing.assert_frame_equal(*tables, atol=1e-5, rtol=1e-4)


def test_candidates_are_nodes_outside(generator):
    truth, circuit = key_of("backup")
    pairs = truth.task.batch(2, "test", generator=generator)
    own = min(truth.nodes)
    for candidates, words in (
        ([own], f"{own} is kept by the circuit"),
        ([], "no candidate"),
        ([Node(7, "q", 0)], "L7"),
    ):
        with pytest.raises(CircuitError, match=words):
            completeness(truth.model, circuit, pairs, candidates=candidates, generator=generator)
