"""The gap to controls: a key is told from nonsense and from a random network, and cheating circuits are failed."""

import json

import pytest
import torch

from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness import gap, repruned
from sparse_interp.faithfulness.audit import audit
from sparse_interp.faithfulness.audit_table import FAITHFUL
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.faithfulness.repruned import CONTROLS, Found
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.tasks.controls import shuffled

SEARCH = PruneConfig(n_steps=30, batch_size=8, n_train=64, n_selection=32, lr=0.2)


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))


def circuit_of(truth, means, nodes, **origin):
    known = {"task_name": truth.task.name, "task_sha256": truth.task.templates_sha256} | origin
    return Circuit.of_nodes(truth.model, nodes, means, **known)


def audited(truth, circuit, level="full", **changes):
    options = {"n_prompts": 32, "n_random": 3, "n_rivals": 0, "progress": False} | changes
    return audit(truth.model, circuit, truth.task, level=level, generator=torch.Generator().manual_seed(1), **options)


def row(table, measure, condition):
    frame = table.frame
    (found,) = frame[(frame.measure == measure) & (frame.condition == condition) & (frame.split == "test")].itertuples()
    return found


@pytest.fixture(scope="module")
def of_key(truth, means, tmp_path_factory):
    """A full audit of the key, and where it kept its searches."""
    folder = tmp_path_factory.mktemp("controls")
    circuit = circuit_of(truth, means, truth.nodes, prune=SEARCH, seed=3)
    return audited(truth, circuit, folder=folder, n_rivals=1), folder, circuit


def test_the_key_is_told_from_nonsense_and_from_a_random_network(of_key):
    table, _, circuit = of_key
    assert table.verdict == FAITHFUL
    for control in CONTROLS:
        size = row(table, "size at the same agreement", f"{control} / circuit")
        n_all = sum(len(values) for values in circuit.baseline.values.values())
        assert size.passed is True and size.decides and size.value == n_all / circuit.n_nodes
        assert size.note.startswith(f"not found with all {n_all} nodes")
        apart = row(table, "KL(teacher || control) at equal size, gap", f"{control} - circuit")
        assert apart.passed is True and apart.low > 0.3
    assert "nonsense twin: more than 14 times the nodes" in table.headline
    searches = table.details["searches for controls"]
    assert list(searches.control) == list(CONTROLS) and searches.found.isna().all() and (searches.seed == 3).all()


def test_a_full_audit_leaves_out_nothing_but_what_nobody_asked_for(of_key):
    table = of_key[0]
    absent = table.frame[table.frame.note.str.startswith("not run")]
    assert absent.about.tolist() == ["hypothesis"]
    about = {"completeness", "robustness", "sizes", "agreement inside", "sufficiency", "necessity"}
    assert about <= set(table.frame[~table.frame.decides].about)
    assert {"completeness", "robustness", "sizes", "minimality", "partial ablation"} <= table.details.keys()


def test_rivals_from_other_seeds_inform(of_key):
    table = of_key[0]
    rival = table.details["rivals"].iloc[0]
    assert rival.seed == 4
    overlap = row(table, "nodes in common", "circuit, rivals from other seeds")
    assert overlap.value == pytest.approx(rival.node_jaccard) and overlap.value > 0.5
    assert not table.frame[table.frame.condition.str.contains("rivals")].decides.any()


def test_an_audit_made_again_searches_for_nothing(of_key, truth, monkeypatch):
    table, folder, circuit = of_key

    def refuse(*args, **kwargs):
        raise AssertionError("a search was made again")

    for module, name in ((repruned, "learn_gates"), (repruned, "find_edges")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("sparse_interp.faithfulness.rivals.learn_many", refuse)
    again = audited(truth, circuit, folder=folder, n_rivals=1)
    assert again.frame.drop(columns="note").equals(table.frame.drop(columns="note"))
    assert again.verdict == table.verdict


def test_what_decides_a_search_decides_its_file(of_key, truth, means):
    _, folder, circuit = of_key
    made = repruned.Control.of(CONTROLS[0], truth.model, circuit, truth.task, SEARCH, 3)
    assert (folder / f"nonsense-twin-{made.digest[:16]}.json").exists()
    other = [
        repruned.Control.of(CONTROLS[0], truth.model, circuit, truth.task, PruneConfig(n_steps=31), 3),
        repruned.Control.of(CONTROLS[0], truth.model, circuit, truth.task, SEARCH, 4),
        repruned.Control.of(CONTROLS[1], truth.model, circuit, truth.task, SEARCH, 3),
        repruned.Control.of(CONTROLS[1], truth.model, circuit, truth.task, SEARCH, 4),
    ]
    assert len({made.digest, *(control.digest for control in other)}) == 5


def test_a_damaged_file_of_a_search_makes_the_audit_incomplete_and_is_named(of_key, truth, tmp_path):
    _, folder, circuit = of_key
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        kept = tmp_path / path.name
        kept.write_text(path.read_text() if path.name.startswith("re-") else json.dumps(record)[:-9])
    table = audited(truth, circuit, folder=tmp_path)
    assert table.passed is None and len(table.reasons) == 1
    assert "nonsense-twin" in table.reasons[0] and "is damaged" in table.reasons[0]


def test_a_circuit_that_does_not_say_how_it_was_found_is_incomplete(truth, means):
    table = audited(truth, circuit_of(truth, means, truth.nodes))
    assert table.verdict == "incomplete" and len(table.reasons) == 2
    assert all("pass config, the PruneConfig that found it" in reason for reason in table.reasons)


def test_a_control_that_is_found_as_small_fails_the_circuit(truth, means, monkeypatch):
    circuit = circuit_of(truth, means, truth.nodes, prune=SEARCH)
    nodes = [list(node) for node in sorted(truth.nodes)]
    found = Found(size=2 * len(nodes), n_all=188, kl_of_all=0.0, at_size=nodes, seconds=0.0)
    monkeypatch.setattr(gap, "searched", lambda control, folder, progress: found)
    table = audited(truth, circuit)
    assert table.four.frame.passed.tolist() == [True, True, False, True]
    said = "the same search finds the nonsense twin with 2.00 times the size, bound: above 3"
    assert said in table.verdict and "nonsense twin: 2 times the nodes" in table.headline


# -- circuits that are none -------------------------------------------------------------------------------------------


def test_a_circuit_pruned_on_shuffled_labels_disagrees_with_its_model(truth, means):
    config = PruneConfig(**{**vars(SEARCH), "objective": "task_loss", "target_task_loss": 0.75})
    how = {"baseline": means, "generator": torch.Generator().manual_seed(0), "progress": False}
    cheat = find_circuit(truth.model, shuffled(truth.task), config, **how)
    table = audited(truth, circuit_of(truth, means, cheat.node_set), level="quick")
    assert table.passed is False
    frame = table.four.frame.set_index("about")
    assert frame.passed["agreement"] is False and "disagrees with its model" in frame.why["agreement"]


def test_a_circuit_that_lacks_a_needed_node_disagrees_and_is_not_failed_for_idle_nodes(truth, means):
    lacking = next(node for node in sorted(truth.nodes) if node.site == "neuron")
    table = audited(truth, circuit_of(truth, means, truth.nodes - {lacking}), level="quick")
    frame = table.four.frame.set_index("about")
    assert frame.passed["agreement"] is False and frame.passed["gap to controls"] is True


def test_twenty_useless_nodes_fail_a_circuit_for_them_and_nothing_else(truth, means):
    outside = [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]
    drawn = torch.randperm(len(outside), generator=torch.Generator().manual_seed(1))[:20].tolist()
    useless = {outside[i] for i in drawn}
    table = audited(truth, circuit_of(truth, means, truth.nodes | useless), level="quick")
    assert table.four.frame.passed.tolist() == [True, True, True, False]
    assert "not minimal: 20 of 33 nodes" in table.verdict
    parts = table.details["minimality"]
    assert set(parts[~parts.told].name) == {str(node) for node in useless}
