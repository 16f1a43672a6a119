"""The table of verdicts: an audit is made once, goes on where it was stopped, and stands in the page once."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.audit import audit
from sparse_interp.faithfulness.audit_table import FORMAT_VERSION
from sparse_interp.interventions.baselines import mean_activations

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "audits.py"


@pytest.fixture(scope="module")
def circuit(truth):
    means = mean_activations(truth.model, truth.blocks(8, generator=torch.Generator().manual_seed(0)))
    return Circuit.of_nodes(truth.model, sorted(truth.nodes)[1:], means, task_name=truth.task.name)


@pytest.fixture(scope="module")
def table(truth, circuit):
    """A quick audit of a circuit that lacks a node."""
    how = {"n_prompts": 8, "n_random": 2, "generator": torch.Generator().manual_seed(0), "progress": False}
    return audit(truth.model, circuit, truth.task, **how)


@pytest.fixture
def script(truth, circuit, table, tmp_path, monkeypatch) -> ModuleType:
    """The benchmark over one circuit of a model of two, and the audits that it has made."""
    spec = importlib.util.spec_from_file_location("audits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    circuit.save(tmp_path / "found" / "stdlib-small" / "quote" / "nodes" / "circuit.json")
    (tmp_path / "found" / "stdlib-small" / "quote" / "nodes" / "seconds.json").write_text("2.0")
    module.calls = []

    def audited(model, circuit, task, **how):
        module.calls.append(how["level"])
        if module.stopping:
            raise KeyboardInterrupt
        return table

    module.stopping = False
    for name, stand_in in {"load": lambda name: truth.model, "task": lambda *of: truth.task, "audit": audited}.items():
        monkeypatch.setattr(module.si, name, stand_in)
    return module


def jobs_of(script, folder, *levels, seed=0):
    return list(script.jobs(levels, script.MODELS, None, script.KINDS, seed, folder / "found"))


def test_an_audit_is_made_once_for_a_circuit_a_level_and_a_seed(script, tmp_path):
    quick, full = jobs_of(script, tmp_path, "quick", "full")
    for job in (quick, full, quick, *jobs_of(script, tmp_path, "quick", seed=1), quick):
        script.made(job, tmp_path)
    assert script.calls == ["quick", "full", "quick"]
    path = quick.circuit
    path.write_text(path.read_text() + "\n")
    script.made(quick, tmp_path)
    assert len(script.calls) == 4, "another circuit has another audit"


def test_seconds_of_an_audit_that_was_stopped_count(script, tmp_path, monkeypatch):
    (job,) = jobs_of(script, tmp_path, "full")
    clock = iter([10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(script.time, "process_time", lambda: next(clock))
    script.stopping = True
    with pytest.raises(KeyboardInterrupt):
        script.made(job, tmp_path)
    assert not job.path(tmp_path).exists()
    script.stopping = False
    record = script.record_of(job, tmp_path)
    assert (record["seconds"], record["searched"], record["times"]) == (7.0, 2.0, 3.5)


def test_the_record_has_every_row_that_decides_and_the_page_has_it_once(script, table, tmp_path):
    records = [script.record_of(job, tmp_path) for job in jobs_of(script, tmp_path, "quick")]
    (record,) = records
    assert len(record["rows"]) == int(table.frame.decides.sum()) and record["four"]["agreement"] is False
    assert record["verdict"] == table.verdict and json.loads(json.dumps(record)) == record
    page = tmp_path / "page.md"
    page.write_text("# What a circuit is worth\n\nSo much.\n")
    for _ in range(2):
        script.written(records, "the command", tmp_path / "out", page)
    text = page.read_text()
    assert text.startswith("# What a circuit is worth\n\nSo much.\n") and text.count(script.HEADING) == 1
    kl = next(row for row in record["rows"] if row["measure"].startswith("KL"))
    assert f"| **{kl['value']:.3g}** |" in text and "fails: agreement" in text
    cells = {line.replace(script.BAR, "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(cells) == 1, "a bar inside a cell would begin another"
    rows = (tmp_path / "out" / "audits.csv").read_text().splitlines()
    assert len(rows) == 1 + len(record["rows"])
    assert json.loads((tmp_path / "out" / "audits.json").read_text())["audits"] == records


def test_the_plan_says_what_is_left(script, tmp_path):
    todo = jobs_of(script, tmp_path, "quick", "full")
    script.made(todo[0], tmp_path)
    assert [line.split()[0] for line in script.plan(todo, tmp_path)] == ["there", "to", "1"]
    assert json.loads(todo[0].path(tmp_path).read_text())["format_version"] == FORMAT_VERSION
