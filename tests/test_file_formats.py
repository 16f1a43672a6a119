"""docs/file_formats.md names every key of every file that the library writes, and no other."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sparse_interp as si
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.released import RELEASED_SITES
from sparse_interp.faithfulness.answer_files import save_truth
from sparse_interp.model.sites import Node
from sparse_interp.training.recipes import replace_model

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "file_formats.md"

PLACEHOLDERS = {
    "LAYER": r"\d+", "SITE": r"\w+", "PAIR": r"\d+-\d+", "PARAMETER": r"[\w.]+", "KEY": r"[\w.]+", "NAME": r"\w+",
    "LOC": r"[\w.]+", "PROGRAM": r"\w+", "N": r"\d+",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory, truth) -> Path:
    """A folder with everything that the library writes, of one tiny model."""
    folder = tmp_path_factory.mktemp("written")
    generator = torch.Generator().manual_seed(0)
    model, task = truth.model, truth.task
    blocks = torch.randint(model.cfg.d_vocab, (8, model.cfg.n_ctx), generator=generator)
    means = si.mean_activations(model, blocks)
    model.save(folder / "model", card={"name": "quote"}, validation=blocks, means=means)
    little = si.PruneConfig(n_steps=20, batch_size=8, n_train=32, n_selection=16, max_kl=1.9, max_loss_gap=4.0)
    circuit = si.find_circuit(model, task, little, baseline=means, generator=generator, progress=False)
    circuit.save(folder / "circuit.json")
    circuit.save_tables(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_interp.faithfulness.audit.add_tests", lambda *_: None)  # they add rows like the others
        audit = si.audit(model, circuit, task, n_prompts=8, n_random=2, generator=generator, progress=False)
    audit.save(folder / "audit.json")
    audit.save(folder / "audit.csv")
    save_truth(truth, folder / "truth")
    config = si.BridgeConfig(n_steps=2, batch_size=2, validate_every=1, encoder="threshold")
    si.train_bridges(model, model, blocks, config, validation=blocks, folder=folder / "bridging", progress=False)
    run = replace_model(
        si.recipe("tiny").model, d_model=16, n_heads=2, d_head=8, d_mlp=16, n_ctx=8, d_vocab=40, density=0.9
    )
    text = si.TrainingText(torch.randint(39, (400,), generator=generator), blocks[:2, :8] % 39, bos=39)
    steps = replace(
        si.recipe("tiny"), model=run, n_tokens=2 * 2 * 8, batch_size=2, validate_every=1, checkpoint_every=1
    )
    list(si.train(steps, text, folder / "training", progress=False))
    plain = si.HookedSparseTransformer(run).eval()
    held = si.mean_activations(plain, text.validation, sites=RELEASED_SITES)
    kept = [Node(0, "neuron", 1), Node(0, "mlp_read", 2), Node(1, "final_resid", 3)]
    pairs = si.TaskBatch(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]]), *torch.tensor([[3], [9], [3], [0]]))
    si.publish_circuit(
        Circuit.of_nodes(plain, kept, held, sites=RELEASED_SITES), plain, pairs, folder / "released", progress=False
    )
    return folder


def section(name: str) -> str:
    """What the page says of the file called `name`."""
    parts = re.split(r"^###? (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if heading == name]
    return text


def told(name: str, kind: str = "key") -> dict[str, str]:
    """`key` -> what it holds, as the page says it of a file."""
    for table in re.split(r"\n\n", section(name)):
        if table.lstrip().startswith(f"| {kind} |"):
            rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", table, flags=re.MULTILINE)
            assert len(rows) == len(table.strip().splitlines()) - 2, table
            return dict(rows)
    return {}


def keys(content: dict[str, Any], whole: set[str], inside: str = "") -> Iterator[str]:
    """Keys of nested objects, dotted; those of `whole` and of tables as one."""
    for key, value in content.items():
        name = f"{inside}{key}"
        if isinstance(value, dict) and name not in whole and set(value) != {"columns", "rows"}:
            yield from keys(value, whole, f"{name}.")
        else:
            yield name


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


JSON_FILES = {
    "config.json": ("model/config.json", {"model", "bigram_table"}),
    "circuit.json": ("circuit.json", {"model.shape", "prune"}),
    "audit.json": ("audit.json", {"origin.prune", "origin.versions", "thresholds", "details"}),
    "bridge.json": ("bridging/bridge/bridge.json", {"config"}),
    "bridge-run.json": ("bridging/run.json", {"config", "run", "sparse", "dense"}),
    "answer_key.json": ("truth/answer_key.json", {"task.fillers", "task.marks"}),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_every_key_of_a_json_file_is_told(written, name):
    path, whole = JSON_FILES[name]
    assert list(told(name)) == list(keys(read(written / path), whole))


TENSOR_FILES = {
    "weights.safetensors": "model/weights.safetensors",
    "validation.safetensors": "model/validation.safetensors",
    "means.safetensors": "model/means.safetensors",
    "circuit.safetensors": "circuit.safetensors",
    "bridge.safetensors": "bridging/bridge/bridge.safetensors",
    "checkpoint.safetensors": "training/checkpoint.safetensors",
}


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_every_tensor_and_header_entry_is_told(written, name):
    with safe_open(written / TENSOR_FILES[name], "pt") as file:
        names, entries = set(file.keys()), set(file.metadata() or {})
    forms = [
        re.compile(re.sub("|".join(PLACEHOLDERS), lambda word: PLACEHOLDERS[word[0]], re.escape(form)))
        for form in told(name, "tensor")
    ]
    assert not [found for found in names if not any(form.fullmatch(found) for form in forms)]
    assert not [form.pattern for form in forms if not any(form.fullmatch(found) for found in names)]
    assert entries == set(told(name, "header entry")) | (entries & {"sha256"})


@pytest.mark.parametrize("table", ["scores", "nodes", "edges", "history"])
def test_every_column_of_a_circuit_is_told(written, table):
    said = set(re.findall(r"`([^`]+)`", told("circuit.json")[table]))
    found = set(read(written / "circuit.json")[table]["columns"])
    assert found <= said
    assert said - found <= {"positions", "importance_nats", "L0.neuron.12"}


def test_every_column_of_an_audit_is_told(written):
    columns = (written / "audit.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert list(told("audit.csv", "column")) == columns == list(read(written / "audit.json")["rows"][0])


def test_every_key_of_a_training_record_is_told(written):
    first = json.loads((written / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(told("metrics.jsonl")) == list(first)


def test_every_key_of_the_shipped_data_is_told():
    data = PROJECT / "data"
    for program in read(data / "groundtruth" / "tracr.json").values():
        assert list(told("tracr.json")) == list(program)
    for key in read(data / "groundtruth" / "tracr_keys.json").values():
        assert list(told("tracr_keys.json"))[: len(key)] == list(key)
    for task in (data / "tasks").glob("*.json"):
        assert set(read(task)) <= set(told("task.json")), task.name
        assert set().union(*read(task)["templates"]) <= set(re.findall(r"`(\w+)`", told("task.json")["templates"]))


def test_every_key_of_a_released_circuit_is_told(written):
    from sparse_interp.model.tensor_files import plain_archive

    payload = plain_archive(written / "released" / "viz_data.pt")
    inside = {f"importances.{key}" for key in payload["importances"]}
    assert set(told("viz_data.pt")) == (set(payload) - {"importances"}) | inside
    means = plain_archive(written / "released" / "mean_baseline_pretrain.pt")
    assert list(told("mean_baseline_pretrain.pt")) == ["LOC"]
    assert {"final_resid", "0.attn.q"} <= set(means)
