"""Knock-outs against the model run once for each, with nothing shared."""

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.knock_outs import knock_outs
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.model.sites import Node, heads_of
from sparse_interp.tasks.task import answer_loss, kl_divergence, logit_difference


@pytest.fixture(scope="module")
def batch(truth):
    return truth.task.batch(10, generator=torch.Generator().manual_seed(2))


def measured(truth, circuit, batch, nodes):
    """KL, lead, accuracy and loss of the circuit without `nodes`, on both sides, one run each."""
    sides = batch.both_sides()
    reference = all_answer_logits(truth.model, sides)
    with circuit.running(truth.model), ablate(truth.model, nodes, circuit.baseline):
        logits = all_answer_logits(truth.model, sides)
    lead = logit_difference(logits, sides)
    return [float(x.double().mean()) for x in (kl_divergence(reference, logits, sides), lead, (lead > 0).float(),
                                               answer_loss(logits, sides))], lead  # fmt: skip


def test_every_row_equals_a_run_of_its_own(truth, key_circuit, batch):
    table = knock_outs(key_circuit, truth.model, batch)
    nodes = sorted(key_circuit.node_set)
    sets = {("circuit", "circuit"): []} | {("node", str(node)): [node] for node in nodes}
    for node in nodes:
        if node.site in ("q", "k", "v"):
            for head in heads_of(truth.model.cfg, node):
                sets.setdefault(("head", f"head {node.layer}.{head}"), []).append(node)
        if node.site != "final_read":
            half = "MLP" if node.site in ("mlp_read", "neuron", "mlp_write") else "attention"
            sets.setdefault(("half", f"layer {node.layer} {half}"), []).append(node)
    rows = {(row.kind, row.what): row for row in table.frame.itertuples() if row.kind != "model"}
    assert rows.keys() == sets.keys()
    for what, out in sets.items():
        numbers, leads = measured(truth, key_circuit, batch, out)
        row = rows[what]
        assert [row.kl_nats, row.lead, row.accuracy, row.loss_nats] == pytest.approx(numbers, abs=1e-5), what
        assert row.leads == pytest.approx(leads.tolist(), abs=1e-4), what


def test_the_first_row_is_the_whole_model(truth, key_circuit, batch):
    row = knock_outs(key_circuit, truth.model, batch).frame.iloc[0]
    sides = batch.both_sides()
    assert row.kind == "model" and row.kl_nats == pytest.approx(0, abs=1e-6)
    assert row.leads == pytest.approx(logit_difference(all_answer_logits(truth.model, sides), sides).tolist(), abs=1e-4)


def test_edges_that_were_cut_stay_cut(truth, key_circuit, batch):
    among = key_circuit.edge_masks(truth.model)
    kept = {matrix: torch.zeros_like(mask) for matrix, mask in among.items()}
    pruned = Circuit.of_nodes(truth.model, key_circuit.node_set, key_circuit.baseline, edges=kept)
    rows = knock_outs(pruned, truth.model, batch).frame
    numbers, _ = measured(truth, pruned, batch, [])
    assert rows.kl_nats[1] == pytest.approx(numbers[0], abs=1e-5)
    assert rows.kl_nats[1] > knock_outs(key_circuit, truth.model, batch).frame.kl_nats[1]


def test_a_circuit_without_nodes_is_refused(truth, key_circuit, batch):
    empty = Circuit.of_nodes(truth.model, list[Node](), key_circuit.baseline)
    with pytest.raises(CircuitError, match="nothing to knock out"):
        knock_outs(empty, truth.model, batch)
