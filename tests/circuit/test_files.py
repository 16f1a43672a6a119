"""The circuit file: what goes in comes out, and what is not what was saved is refused."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.tasks.task import Task, logit_difference


@pytest.fixture
def saved(key_circuit, tmp_path):
    return key_circuit.save(tmp_path / "demo" / "circuit.json")


def rewritten(path, change):
    """Apply `change` to what the JSON says and state the hash anew, as somebody who wants to deceive would."""
    record = json.loads(path.read_text())
    change(record)
    rest = {key: value for key, value in record.items() if key != "sha256"}
    record["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(record))


def test_a_circuit_comes_back_whole(key_circuit, saved):
    back = Circuit.load(saved)
    for frame in ("nodes", "edges", "scores", "history"):
        pd.testing.assert_frame_equal(getattr(back, frame), getattr(key_circuit, frame))
    for values in ("baseline", "tau"):
        ours, theirs = getattr(key_circuit, values), getattr(back, values)
        assert ours.kind == theirs.kind and ours.values.keys() == theirs.values.keys()
        assert all(torch.equal(ours[place], theirs[place]) for place in ours.values)
    for name in ("cfg", "model_name", "model_sha256", "task_name", "task_sha256", "tokenizer_sha256", "prune", "seed"):
        assert getattr(back, name) == getattr(key_circuit, name), name


def test_a_circuit_made_by_hand_comes_back_too(truth, key_circuit, tmp_path):
    bare = Circuit.of_nodes(truth.model, truth.nodes, key_circuit.baseline)
    back = Circuit.load(bare.save(tmp_path / "circuit.json"))
    pd.testing.assert_frame_equal(back.nodes, bare.nodes)
    assert back.prune is None and back.tau is None and back.task_name is None


def test_the_sites_that_are_held_come_back_and_files_that_do_not_say_hold_what_was_searched(saved, key_circuit):
    sites = ("neuron", "mlp_write")
    back = Circuit.load(replace(key_circuit, sites=sites).save(saved))
    assert back.sites == sites

    def forget(record):
        del record["sites"]
        record["prune"] |= {"sites": list(sites), "share_qk": False}

    rewritten(saved, forget)
    assert Circuit.load(saved).sites == sites


def test_the_file_says_what_was_found_how_and_with_what(saved):
    record = json.loads(saved.read_text())
    assert record["format_version"] == 1
    assert record["objective"] == "agreement" and record["prune"]["n_steps"] == 7 and record["seed"] == 5
    assert record["torch_version"] == torch.__version__ and record["library_version"]
    assert record["baseline"].startswith("mean over")
    assert set(record["scores"]["columns"]) >= {"measure", "value", "ablation", "metric", "split", "n_prompts"}
    assert all(
        len(record[owner][sha]) == 64 for owner, sha in (("model", "weights_sha256"), ("task", "templates_sha256"))
    )


def test_a_loaded_circuit_scores_the_same_in_a_new_process(truth, key_circuit, saved):
    script = f"""
import torch
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.tasks.task import logit_difference
truth = ground_truth("quote")
circuit = Circuit.load({str(saved)!r}, truth.model, truth.task)
batch = truth.task.batch(32, "test", generator=torch.Generator().manual_seed(3))
with torch.no_grad(), circuit.running(truth.model):
    print(repr(logit_difference(truth.model(batch.clean), batch).mean().item()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    batch = truth.task.batch(32, "test", generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), key_circuit.running(truth.model):
        here = logit_difference(truth.model(batch.clean), batch).mean().item()
    assert float(run.stdout.splitlines()[-1]) == pytest.approx(here, abs=1e-6)


def test_another_model_is_refused_unless_told_otherwise(saved, make_model):
    with pytest.raises(CircuitError, match="was found in 'custom' with weights .* pass allow_mismatch=True"):
        Circuit.load(saved, make_model())
    assert Circuit.load(saved, make_model(), allow_mismatch=True).n_nodes


def test_another_task_is_refused_unless_told_otherwise(truth, saved):
    other = Task.from_pairs([("( elm", "( fir", " oak", " pine")], truth.task.tokenizer)
    with pytest.raises(CircuitError, match="was found on 'quote' with templates .* the task at hand \\('pairs'\\)"):
        Circuit.load(saved, truth.model, other)
    assert Circuit.load(saved, truth.model, other, allow_mismatch=True).n_nodes


def test_another_tokenizer_is_refused(truth, key_circuit, tmp_path):
    path = replace(key_circuit, tokenizer_sha256="0" * 64).save(tmp_path / "circuit.json")
    with pytest.raises(CircuitError, match="tokenizer 000000000000"):
        Circuit.load(path, truth.model, truth.task)


def test_an_edited_file_is_refused(saved):
    saved.write_text(saved.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(CircuitError, match="is not what was saved"):
        Circuit.load(saved)


def test_tensors_of_another_circuit_are_refused(key_circuit, saved, tmp_path):
    other = replace(key_circuit, tau=None).save(tmp_path / "other.json")
    saved.with_suffix(".safetensors").write_bytes(other.with_suffix(".safetensors").read_bytes())
    with pytest.raises(CircuitError, match="is not what was saved with circuit.json"):
        Circuit.load(saved)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_truncated_or_missing_file_is_refused(saved, suffix):
    file = saved.with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CircuitError, match="cannot be read|is not what was saved"):
        Circuit.load(saved)
    file.unlink()
    with pytest.raises(CircuitError, match=f"circuit\\{suffix} is missing"):
        Circuit.load(saved)


def make_version_2(record):
    record["format_version"] = 2


def move_a_node(record):
    record["nodes"]["rows"][0][2] = 10_000


def repeat_a_node(record):
    record["nodes"]["rows"].append(record["nodes"]["rows"][0])


def lead_an_edge_astray(record):
    record["edges"]["rows"][0][0] = "L0.neuron.9"


def forget_the_baseline_column(record):
    record["nodes"]["columns"][4] = "base"


def ask_for_the_unknown(record):
    record["prune"]["n_stepz"] = 3


def change_the_shape(record):
    record["model"]["shape"]["d_mlp"] = 11


def forget_the_task(record):
    del record["task"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (make_version_2, "has format version 2, and this library reads version 1"),
        (move_a_node, "not 10000"),
        (repeat_a_node, "a node is listed twice"),
        (lead_an_edge_astray, "an edge ends at L0.neuron.9, which is not among its nodes"),
        (forget_the_baseline_column, "a table lacks baseline"),
        (ask_for_the_unknown, "n_stepz"),
        (change_the_shape, "neuron of layer 0 has 11 nodes in this model"),
        (forget_the_task, "KeyError: 'task'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_contradicts_itself_is_refused(saved, change, words):
    rewritten(saved, change)
    with pytest.raises(CircuitError, match=words):
        Circuit.load(saved)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "circuit.json"
    path.write_text("[1, 2]")
    path.with_suffix(".safetensors").write_bytes(b"")
    with pytest.raises(CircuitError, match="has format version None"):
        Circuit.load(path)


def test_a_circuit_is_saved_as_json(key_circuit, tmp_path):
    with pytest.raises(CircuitError, match="saved as a .json file"):
        key_circuit.save(tmp_path / "circuit.pkl")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_what_was_there(key_circuit, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("in the way")
    with pytest.raises(CircuitError, match="cannot be written"):
        key_circuit.save(folder / "circuit.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_saving_twice_gives_the_same_bytes_and_leaves_nothing_beside(key_circuit, saved):
    before = [saved.read_bytes(), saved.with_suffix(".safetensors").read_bytes()]
    key_circuit.save(saved)
    assert [saved.read_bytes(), saved.with_suffix(".safetensors").read_bytes()] == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["circuit.json", "circuit.safetensors"]


def test_tables_are_written_beside(key_circuit, tmp_path):
    nodes, edges = key_circuit.save_tables(tmp_path)
    assert len(pd.read_csv(nodes)) == key_circuit.n_nodes
    assert (pd.read_csv(edges).kind == "weight").sum() == key_circuit.n_edges
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edges.csv", "nodes.csv"]
