"""The same search started differently: what circuits have in common, and which of them do the same."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness import rivals as module
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.faithfulness.rivals import Rivals, _compared, edges_of, jaccard, rivals
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import hooked
from sparse_interp.tasks.task import kl_divergence

QUICK = PruneConfig(n_train=16, n_selection=8, n_steps=10, batch_size=8, sites=("v", "neuron", "attn_write"))
NEURONS = replace(QUICK, n_steps=3, sites=("neuron",))


def means_of(truth, model=None):
    blocks = truth.blocks(16, generator=torch.Generator().manual_seed(1))
    return mean_activations(truth.model if model is None else model, blocks)


def gated(nodes):
    return frozenset(node for node in nodes if node.site in QUICK.sites)


def searched(truth, config=QUICK, model=None, seed=0, **options) -> Rivals:
    model = truth.model if model is None else model
    kept = {"generator": torch.Generator().manual_seed(seed), "baseline": means_of(truth, model), "progress": False}
    return rivals(model, truth.task, config, **{"n_pairs": 8} | kept | options)


@pytest.fixture(scope="module")
def copies():
    """Two heads that bring the same, either of which is enough."""
    return ground_truth("two_copies")


@pytest.fixture(scope="module")
def of_copies(copies):
    return searched(copies, n_seeds=3)


def test_a_model_without_redundancy_has_one_circuit():
    truth = ground_truth("mlp_gate")
    found = searched(truth, n_seeds=2)
    assert [circuit.node_set for circuit in found.circuits] == [gated(truth.nodes)] * 2
    assert found.core == gated(truth.nodes) and not found.periphery
    assert found.pairs.frame[["node_jaccard", "edge_jaccard", "equal"]].values.tolist() == [[1, 1, True]]
    assert (found.n_distinct, found.n_behaviours, found.n_equal) == (1, 1, 1)
    assert set(found.nodes.frame.found_frac) == {1.0} and len(found.edges) == found.circuits[0].n_edges


def test_two_copies_of_a_head_are_two_circuits_that_do_the_same(copies, of_copies):
    assert {circuit.node_set for circuit in of_copies.circuits} <= {gated(key.nodes) for key in copies.keys}
    assert (of_copies.n_distinct, of_copies.n_behaviours, of_copies.n_equal) == (2, 1, 2)
    assert of_copies.frame.holds.all() and of_copies.frame.behaviour.tolist() == [0] * 3
    first, second = {circuit.node_set for circuit in of_copies.circuits}
    assert of_copies.core == first & second and of_copies.periphery == first ^ second
    apart = len(first & second) / len(first | second)
    assert set(of_copies.pairs.frame.node_jaccard) == {1.0, apart} and of_copies.pairs.frame.equal.all()
    counts = of_copies.nodes.frame.set_index(["layer", "site", "channel"]).n_found
    assert all(counts[tuple(node)] == 3 for node in of_copies.core)
    assert sum(counts) == sum(circuit.n_nodes for circuit in of_copies.circuits)
    assert of_copies.edges.frame.n_found.sum() == sum(circuit.n_edges for circuit in of_copies.circuits)
    assert "found 2 different circuits" in of_copies.summary and "the largest has 2 different ones" in of_copies.summary


def test_the_picture_falls_from_everything_found_to_the_core(of_copies):
    nodes, edges = of_copies.plot().lines
    assert nodes.get_xdata().tolist() == [1, 2, 3]
    assert nodes.get_ydata()[[0, -1]].tolist() == [len(of_copies.nodes), len(of_copies.core)]
    assert edges.get_ydata()[0] == len(of_copies.edges)


def test_divergences_are_those_of_the_runs_on_held_out_pairs(copies, of_copies):
    """Once more from the logits of `running`, with a circuit that lacks a node beside the others."""
    whole = of_copies.circuits[0]
    maimed = Circuit.of_nodes(copies.model, sorted(whole.node_set)[1:], whole.baseline, prune=QUICK, seed=7)
    batch = copies.task.batch(12, "test", generator=torch.Generator().manual_seed(3)).both_sides()
    found = _compared(hooked(copies.model), [whole, maimed], batch, QUICK, None)
    logits = []
    for circuit in (whole, maimed):
        with circuit.running(copies.model), torch.no_grad():
            logits.append(copies.model(batch.clean).double())
    both_ways = [kl_divergence(*pair, batch).mean().item() for pair in (logits, logits[::-1])]
    assert found.pairs.frame.kl_nats[0] == pytest.approx(max(both_ways), rel=1e-4) and max(both_ways) > 0.2
    reference = all_answer_logits(hooked(copies.model), batch)
    kl = kl_divergence(reference.double(), logits[1][torch.arange(len(batch)), batch.last], batch)
    assert found.frame.kl_nats[1] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.frame.kl_low[1] <= found.frame.kl_nats[1] <= found.frame.kl_high[1]
    assert found.frame.holds.tolist() == [True, False] and found.frame.behaviour.isna().tolist() == [False, True]
    assert (found.n_distinct, found.n_behaviours, found.n_equal) == (2, 1, 1)
    lenient = _compared(hooked(copies.model), [whole, maimed], batch, replace(QUICK, max_kl=9.0, max_loss_gap=9.0), 0.1)
    assert lenient.frame.holds.all() and lenient.n_behaviours == 2 and not lenient.pairs.frame.equal.any()


def test_a_class_holds_only_circuits_of_which_every_two_are_equal():
    """1 is equal to 0 and to 2, which are not equal to each other; 3 is equal to none, 4 does not hold."""
    frame = pd.DataFrame(
        {"seed": [0, 1, 2, 3, 4], "n_nodes": [5, 4, 6, 3, 2], "n_edges": 0, "holds": [True] * 4 + [False]}
    )
    equal = {(0, 1), (1, 2), (2, 4)}
    pairs = pd.DataFrame([(i, j, (i, j) in equal) for i in range(5) for j in range(i + 1, 5)])
    found = module._classes(frame, pairs.set_axis(["first", "second", "equal"], axis=1))
    assert found.tolist() == [1, 1, 2, 0, pd.NA]


def test_jaccard_counts_what_is_shared():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), {1}) == 0 and jaccard(set(), set()) == 1


def test_a_search_that_was_stopped_goes_on_and_ends_as_it_would_have(copies, tmp_path, monkeypatch):
    whole = searched(copies, NEURONS, n_seeds=3, at_once=2)
    real, calls = module.sized, []

    def sized(*given, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(module, "sized", sized)
    with pytest.raises(KeyboardInterrupt):
        searched(copies, NEURONS, n_seeds=3, at_once=2, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-0.json", "seed-0.safetensors"]
    again = searched(copies, NEURONS, n_seeds=3, at_once=2, folder=tmp_path)
    assert calls == [0, 1, 1, 2]
    assert again == whole and [edges_of(c) for c in again.circuits] == [edges_of(c) for c in whole.circuits]
    assert searched(copies, NEURONS, n_seeds=3, at_once=2, folder=tmp_path) == whole and len(calls) == 4


def test_circuits_of_another_search_are_refused(copies, tmp_path):
    searched(copies, NEURONS, n_seeds=1, folder=tmp_path)
    with pytest.raises(CircuitError, match=r"seed-0.json is of a search with another settings"):
        searched(copies, replace(NEURONS, n_steps=5), n_seeds=1, folder=tmp_path)
    (tmp_path / "seed-0.json").rename(tmp_path / "seed-5.json")
    (tmp_path / "seed-0.safetensors").rename(tmp_path / "seed-5.safetensors")
    with pytest.raises(CircuitError, match="another seed"):
        searched(copies, NEURONS, n_seeds=1, seed=5, folder=tmp_path)
    with pytest.raises(ConfigError, match="n_seeds=0; rivals need at least 1"):
        searched(copies, NEURONS, n_seeds=0)


def test_rivals_in_a_bridge_are_those_in_ours(truth, dense_truth):
    ours, theirs = (searched(truth, NEURONS, model, n_seeds=2) for model in dense_truth)
    assert [c.node_set for c in theirs.circuits] == [c.node_set for c in ours.circuits]
    assert theirs.pairs.frame.node_jaccard.equals(ours.pairs.frame.node_jaccard) and theirs.n_equal == ours.n_equal
    assert theirs.frame.kl_nats.tolist() == pytest.approx(ours.frame.kl_nats.tolist(), abs=1e-6)
