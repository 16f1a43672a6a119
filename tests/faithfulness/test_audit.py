"""The audit passes circuits that are the model's and fails the others, each for its own reason."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from known_models import hand_built, means_of

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness import audit as audit_module
from sparse_interp.faithfulness import rows
from sparse_interp.faithfulness.audit import audit
from sparse_interp.faithfulness.audit_table import FAITHFUL, AuditTable
from sparse_interp.faithfulness.gap import RIVALS
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.faithfulness.repruned import CONTROLS
from sparse_interp.faithfulness.thresholds import FOUR, Thresholds
from sparse_interp.model.sites import NodeAt
from sparse_interp.results import Interval
from sparse_interp.tasks.task import Task

audited = {}


def circuit_of(truth, means, nodes):
    known = {"task_name": truth.task.name, "task_sha256": truth.task.templates_sha256}
    return Circuit.of_nodes(truth.model, nodes, means, **known)


def audit_of(name, what):
    """A small audit of one circuit of a hand-built model, measured once."""
    if (name, what) not in audited:
        truth, means = hand_built(name)
        nodes = {
            "key": truth.nodes,
            "all": all_nodes(truth.model.cfg),
            "none": [],
            "less one": sorted(truth.nodes)[1:],
        }[what]
        audited[name, what] = quick(truth.model, circuit_of(truth, means, nodes), truth.task)
    return audited[name, what]


def quick(model, circuit, task, seed=1, **changes):
    options = {"n_prompts": 32, "n_random": 3, "progress": False} | changes
    return audit(model, circuit, task, generator=torch.Generator().manual_seed(seed), **options)


def row(table, measure, condition, split="test"):
    frame = table.frame
    (found,) = frame[(frame.measure == measure) & (frame.condition == condition) & (frame.split == split)].itertuples()
    return found


@pytest.mark.parametrize("name", ["quote", "mlp_gate"])
def test_the_true_circuit_of_a_hand_built_model_is_faithful(name):
    table = audit_of(name, "key")
    assert table.verdict == FAITHFUL and table.passed is True and table.reasons == []
    assert row(table, "KL(model || circuit)", "circuit").value < 1e-3
    assert row(table, "accuracy gap", "circuit - random circuits").low > 0.3


def test_the_circuit_of_all_nodes_is_the_model_and_nothing_is_left_to_tell_whether_it_needs_them():
    table = audit_of("quote", "all")
    assert table.passed is None and len(table.reasons) == 1
    assert table.reasons[0].startswith("nodes that are not told from random extra ones (circuit): not run: ")
    for split in ("test", "shifted"):
        assert row(table, "KL(model || circuit)", "circuit", split).value == 0
        assert row(table, "task loss gap", "circuit - model", split)[5:8] == (0, 0, 0)
        assert "no other circuit has this size" in row(table, "accuracy", "random circuits", split).note


def test_the_empty_circuit_fails_because_it_does_nothing_and_nothing_needs_it():
    table = audit_of("quote", "none")
    assert table.passed is False and table.verdict.startswith("fails: ")
    starts = [reason.split(":")[0] for reason in table.reasons]
    assert {"worse than its model", "disagrees with its model"} <= set(starts)
    assert "better than its model" not in starts
    assert any(said.startswith("not needed") for said in table.failing(decides=False))


@pytest.mark.parametrize("name", ["quote", "mlp_gate"])
def test_a_circuit_that_lacks_one_needed_node_fails(name):
    table = audit_of(name, "less one")
    assert table.passed is False
    assert any(reason.startswith("worse than its model") for reason in table.reasons)


def test_a_circuit_that_beats_its_model_fails_as_better_than_its_model():
    """The model is unsure, and one of its channels speaks against it at random; the key leaves that channel out."""
    truth = ground_truth("quote")
    tokens, weights = truth.model.tokenizer.get_vocab(), truth.model.unembed.W_U.data
    weights /= 2
    for token, sign in {'"': 1, "'": -1}.items():
        weights[truth.channels.index("word_a"), tokens[token]] = 4 * sign
    table = quick(truth.model, circuit_of(truth, means_of(truth), truth.nodes), truth.task)
    of_model, of_circuit = (row(table, "task loss", condition).value for condition in ("model", "circuit"))
    assert of_circuit < 0.1 < 1 < of_model
    gap = row(table, "task loss gap", "circuit - model")
    assert gap.high < 0 and gap.passed is False
    assert table.verdict.startswith("fails: better than its model: task loss 0.0")


def judged(loss, model, half_width):
    gap = loss - model
    return Thresholds().loss(Interval(gap, gap - half_width, gap + half_width), loss, model)


def test_losses_are_compared_both_ways_and_better_fails_only_beyond_the_interval():
    assert judged(1.13, 1.13, 0.01).passed
    assert judged(1.16, 1.13, 0.01).passed
    assert judged(1.10, 1.13, 0.01).passed
    assert judged(0.01, 1.13, 0.01).note.startswith("better than its model")
    assert judged(0.90, 1.13, 0.30).passed
    assert judged(1.20, 1.13, 0.01).note.startswith("worse than its model")
    assert not judged(1.20, 1.13, 0.30).passed


def test_a_good_model_is_not_beaten_unseen():
    assert judged(0.005, 0.05, 0.01).note.startswith("better than its model")
    assert judged(0.04, 0.05, 0.001).passed
    assert judged(0.001, 0.01, 0.001).passed


def test_what_is_not_a_number_never_passes():
    nothing = Interval(math.nan, math.nan, math.nan)
    bounds = Thresholds()
    for found in (
        bounds.loss(nothing, math.nan, 1.0),
        bounds.accuracy(nothing, math.nan, 1.0),
        bounds.kl(nothing),
        bounds.removed_accuracy(nothing),
        bounds.removed_loss(nothing),
        bounds.random_accuracy(nothing, math.nan),
        bounds.control_gap(nothing),
        bounds.worst_kl(nothing),
        bounds.worst_loss(nothing),
        bounds.size(math.nan, "twin"),
        bounds.size_gap(nothing, "twin"),
        bounds.idle(math.nan, 9, "node"),
    ):
        assert not found.passed


def test_accuracy_may_be_one_point_away():
    bounds = Thresholds()
    assert bounds.accuracy(Interval(-0.01, -0.02, 0.0), 0.97, 0.98).passed
    assert not bounds.accuracy(Interval(-0.011, -0.02, 0.0), 0.969, 0.98).passed
    assert bounds.accuracy(Interval(0.02, -0.01, 0.05), 1.0, 0.98).passed
    assert bounds.accuracy(Interval(0.02, 0.01, 0.03), 1.0, 0.98).note.startswith("more accurate than its model")


def test_a_circuit_no_better_than_chance_of_its_size_fails_for_its_controls():
    bounds = Thresholds()
    assert bounds.random_accuracy(Interval(0.5, 0.48, 0.52), 0.54).passed
    assert bounds.random_accuracy(Interval(0.9, 0.85, 0.95), 1.0).note.startswith("any circuit of this size")
    assert not bounds.control_gap(Interval(0.01, -0.01, 0.03)).passed


def test_other_thresholds_give_another_verdict_and_are_recorded(tmp_path):
    truth, means = hand_built("attention_copy")
    circuit = circuit_of(truth, means, sorted(truth.nodes)[1:])
    lax = Thresholds(loss_gap_nats=9.0, max_kl_nats=9.0, worst_kl_nats=9.0, worst_loss_gap_nats=9.0, idle_frac=1.0)
    table = quick(truth.model, circuit, truth.task, thresholds=lax)
    assert table.passed is True
    assert json.loads(table.to_json(tmp_path / "audit.json").read_text())["thresholds"]["max_kl_nats"] == 9


def test_an_audit_is_decided_by_its_generator():
    truth, means = hand_built("mlp_gate")
    circuit = circuit_of(truth, means, sorted(truth.nodes)[1:])
    one, same, other = (quick(truth.model, circuit, truth.task, seed) for seed in (5, 5, 6))
    assert one == same and one.controls.equals(same.controls)
    assert one != other


def test_an_audit_never_draws_from_the_train_split(monkeypatch):
    truth, means = hand_built("quote")
    drawn, draw = [], Task._draw

    def spy(self, n, split, rng):
        drawn.append(split)
        return draw(self, n, split, rng)

    monkeypatch.setattr(Task, "_draw", spy)
    table = quick(truth.model, circuit_of(truth, means, truth.nodes), truth.task)
    assert set(drawn) == {"test", "shifted"}
    assert set(table.frame.split) == {"test", "shifted"}


def test_every_condition_of_both_splits_has_its_rows():
    frame = audit_of("quote", "key").frame
    for split in ("test", "shifted"):
        on = frame[(frame.split == split) & (frame.measure == "accuracy")].condition
        assert set(on) == {"model", "circuit", "circuit removed", "all at baseline", "random circuits"}
    run = frame[~frame.note.str.startswith("not run")]
    assert set(run.n_prompts) == {32}
    assert dict(run.groupby("split").n_templates.first()) == {"test": 4, "shifted": 2}
    assert not run.duplicated(["measure", "condition", "split"]).any()


def test_every_row_says_by_which_method_it_was_measured():
    run = audit_of("quote", "key").frame
    run = run[~run.note.str.startswith("not run")]
    method = ["baseline", "scheme", "metric", "positions", "direction"]
    assert (run[method] != "").all(axis=None)
    of_model = run[run.condition == "model"]
    assert set(of_model.baseline) == set(of_model.scheme) == set(of_model.direction) == {"none"}
    of_circuit = run[run.condition == "circuit"]
    assert of_circuit.baseline.str.contains("mean over").all()
    assert set(of_circuit.scheme) == {"full", "stochastic", "adversarial"}
    assert set(run[run.condition == "circuit removed"].direction) == {"circuit ablated"}
    assert set(run[run.condition == "random circuits"].direction) == {"all but the control ablated"}


def test_only_the_test_split_decides_and_the_shifted_split_is_named_in_the_verdict():
    table = audit_of("quote", "key")
    assert set(table.frame[table.frame.decides].split) == {"test"}
    frame = table.frame.copy()
    shifted = (frame.measure == "KL(model || circuit)") & (frame.condition == "circuit") & (frame.split == "shifted")
    frame.loc[shifted, ["passed", "note"]] = [False, "disagrees there"]
    assert replace(table, frame=frame).passed is True
    assert replace(table, frame=frame).verdict == f"{FAITHFUL}; beside that: on the shifted split, disagrees there"


def test_the_verdict_rests_on_four_things_and_says_which_of_them_fail():
    table = audit_of("quote", "key")
    assert set(table.frame[table.frame.decides].about) == set(FOUR) == set(table.four.frame.about)
    assert table.four.frame.passed.tolist() == [True] * 4
    frame = table.frame.copy()
    frame.loc[(frame.about == "minimality") & frame.decides, ["passed", "note"]] = [False, "idle nodes"]
    changed = replace(table, frame=frame)
    assert changed.four.frame.passed.tolist() == [True, True, True, False] and changed.verdict == "fails: idle nodes"


def test_the_gap_to_controls_comes_first():
    table = audit_of("quote", "key")
    assert list(dict.fromkeys(table.frame[table.frame.split == "test"].about))[:2] == ["gap to controls", "agreement"]
    said = table.headline
    assert said.startswith("gap to controls: random circuits of its size: less accurate by 1.000; not run: nonsense")


def test_searches_that_a_quick_audit_leaves_out_are_rows_that_say_so():
    table = audit_of("quote", "key")
    for control in (*CONTROLS, RIVALS):
        absent = row(table, "size at the same agreement", f"{control} / circuit")
        assert absent.note == "not run: the same search again; a quick audit prunes nothing"
        assert math.isnan(absent.value) and absent.passed is None and not absent.decides


def test_a_test_that_cannot_be_run_is_a_row_with_the_reason(monkeypatch):
    def refuse(sheet):
        raise CircuitError("there is nothing outside.")

    one = rows.Test("worst case", "worst KL", "circuit", "partial ablation", refuse, decides=True)
    other = one._replace(about="inside", measure="patterns", decides=False)
    late = one._replace(about="later", measure="slow", level="full")
    monkeypatch.setattr(rows, "TESTS", (one, other, late))
    truth, means = hand_built("quote")
    table = quick(truth.model, circuit_of(truth, means, truth.nodes), truth.task)
    assert table.passed is None
    assert table.reasons == ["worst KL (circuit): not run: there is nothing outside."]
    assert row(table, "patterns", "circuit").note == "not run: there is nothing outside."
    assert row(table, "slow", "circuit").note == "not run: partial ablation; a quick audit leaves it out"


def test_a_hypothesis_is_put_to_the_test_if_there_is_one():
    assert "no hypothesis was given" in row(audit_of("quote", "key"), "loss recovered", "circuit").note
    truth, means = hand_built("quote")
    claims = {node: lambda prompt: '"' in prompt.text for node in truth.nodes if node.layer == 1 and node.site == "v"}
    table = quick(truth.model, circuit_of(truth, means, truth.nodes), truth.task, hypothesis=claims)
    found = row(table, "loss recovered", "circuit")
    by_condition = table.details["scrubbing"].set_index("condition").loss_recovered
    assert found.value == by_condition["scrubbed"] and found.scheme == "resampled by meaning" and not found.decides
    assert len(table.details["claims"]) == len(claims)


def test_an_audit_without_random_circuits_is_incomplete():
    truth, means = hand_built("quote")
    table = quick(truth.model, circuit_of(truth, means, truth.nodes), truth.task, n_random=0)
    assert table.verdict == "incomplete" and table.passed is None
    assert table.reasons == ["accuracy (random circuits): not run: n_random=0"]


def test_an_audit_without_held_out_prompts_is_incomplete():
    truth, means = hand_built("quote")
    pairs = truth.task.pairs(6, "train", generator=torch.Generator().manual_seed(0))
    rows = pd.DataFrame([pair._asdict() | {"split": "train"} for pair in pairs])
    task = Task.from_pairs(rows, truth.task.tokenizer)
    circuit = replace(circuit_of(truth, means, truth.nodes), task_sha256=None)
    table = quick(truth.model, circuit, task)
    assert table.verdict == "incomplete"
    assert table.reasons == ["every measure (circuit): not run: the task has no test split"]


def test_a_short_list_of_pairs_is_audited_whole():
    truth, means = hand_built("quote")
    pairs = truth.task.pairs(5, "test", generator=torch.Generator().manual_seed(0))
    rows = pd.DataFrame([pair._asdict() | {"split": "test"} for pair in pairs])
    task = Task.from_pairs(rows, truth.task.tokenizer)
    table = quick(truth.model, replace(circuit_of(truth, means, truth.nodes), task_sha256=None), task)
    assert table.passed is True
    assert row(table, "accuracy", "circuit").n_prompts == 10
    assert "no shifted split" in row(table, "every measure", "circuit", "shifted").note


def test_a_circuit_over_positions_is_audited_on_prompts_of_its_length_and_the_others_are_named():
    truth, means = hand_built("mlp_gate")
    (n_pos,) = truth.task.batch(32, "test", generator=torch.Generator().manual_seed(0)).lengths.unique().tolist()
    spots = [NodeAt(*node, pos) for node in truth.nodes for pos in range(n_pos)]
    table = quick(truth.model, Circuit.of_nodes(truth.model, spots, means, n_pos=n_pos), truth.task)
    assert row(table, "KL(model || circuit)", "circuit").value < 1e-3
    assert row(table, "KL(model || circuit)", "circuit").positions == "of its own"
    (shifted,) = table.frame[table.frame.split == "shifted"].itertuples()
    assert f"at positions of prompts of {n_pos} tokens, and 16 of 16 here have" in shifted.note
    assert not any("shifted" in reason for reason in table.reasons)


def test_a_circuit_of_other_weights_is_refused_unless_told_otherwise():
    truth, means = hand_built("quote")
    circuit = replace(circuit_of(truth, means, truth.nodes), model_sha256="0" * 64)
    with pytest.raises(CircuitError, match="weights 000000000000"):
        quick(truth.model, circuit, truth.task)
    table = quick(truth.model, circuit, truth.task, allow_mismatch=True)
    assert table.passed is True
    assert table.origin["model_sha256"] != "0" * 64


def test_a_circuit_of_another_task_is_refused_unless_told_otherwise():
    truth, means = hand_built("quote")
    circuit = replace(circuit_of(truth, means, truth.nodes), task_name="other", task_sha256="0" * 64)
    with pytest.raises(CircuitError, match="found for task 'other' with templates 000000000000"):
        quick(truth.model, circuit, truth.task)
    assert quick(truth.model, circuit, truth.task, allow_mismatch=True).origin["circuit_task_name"] == "other"


def test_a_circuit_of_another_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr(audit_module, "tokenizer_hash", lambda tokenizer: "1" * 64)
    truth, means = hand_built("quote")
    circuit = replace(circuit_of(truth, means, truth.nodes), tokenizer_sha256="0" * 64)
    with pytest.raises(CircuitError, match="tokenizer 000000000000"):
        quick(truth.model, circuit, truth.task)


def test_settings_that_make_no_audit_are_refused():
    truth, means = hand_built("quote")
    circuit = circuit_of(truth, means, truth.nodes)
    with pytest.raises(ConfigError, match="level='deep'; expected 'quick' or 'full'"):
        quick(truth.model, circuit, truth.task, level="deep")
    with pytest.raises(ConfigError, match="n_prompts=1"):
        quick(truth.model, circuit, truth.task, n_prompts=1)


def test_the_csv_has_every_row(tmp_path):
    table = audit_of("quote", "less one")
    read = pd.read_csv(table.save(tmp_path / "audit.csv"), keep_default_na=False)
    assert list(read.columns) == list(AuditTable.columns)
    assert list(read.note) == list(table.frame.note)
    assert list(read.passed) == [{True: "True", False: "False", None: ""}[passed] for passed in table.frame.passed]
    numbers = pd.to_numeric(read.value)
    assert numbers.tolist() == pytest.approx(table.frame.value.tolist(), nan_ok=True)


def test_the_json_holds_everything_and_comes_back_the_same(tmp_path):
    table = audit_of("quote", "less one")
    path = table.save(tmp_path / "audit.json")
    content = json.loads(path.read_text())
    assert content["verdict"] == table.verdict and content["passed"] is False
    assert content["origin"]["seed"] == 1
    assert {"sparse_interp", "torch", "python"} == set(content["origin"]["versions"])
    assert len(content["origin"]["model_sha256"]) == len(content["origin"]["task_sha256"]) == 64
    assert [draw["split"] for draw in content["details"]["random circuits"]] == ["test"] * 3 + ["shifted"]
    back = AuditTable.from_json(path)
    assert back == table and back.verdict == table.verdict and back.thresholds == table.thresholds
    assert back.controls.equals(table.controls) and back.details.keys() == table.details.keys()


def test_an_audit_knows_its_circuit_also_when_read_from_its_file(tmp_path):
    truth, means = hand_built("quote")
    table = AuditTable.from_json(audit_of("quote", "key").to_json(tmp_path / "audit.json"))
    own = circuit_of(truth, means, truth.nodes)
    assert table.is_of(own)
    assert not table.is_of(circuit_of(truth, means, sorted(truth.nodes)[1:]))
    assert not table.is_of(replace(own, model_sha256="0" * 64))


def test_a_file_that_is_no_audit_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(CircuitError, match="cannot be read as an audit"):
        AuditTable.from_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"format_version": 99}')
    with pytest.raises(CircuitError, match="format 99"):
        AuditTable.from_json(tmp_path / "a.json")


def test_the_page_takes_every_row():
    table = audit_of("quote", "less one")
    page = table.on_page()
    assert len(page.rows) == len(table) and (page.verdict, page.passed) == (table.verdict, table.passed)
    assert page.level == table.origin["level"] == "quick"
    absent = [row for row in page.rows if row.note.startswith("not run")]
    assert absent and all(row.value is None for row in absent)
    assert page.rows[0].measure == "accuracy gap (share)" and page.rows[0].n == 32
    assert [(row.about, row.decides) for row in page.rows] == list(
        zip(table.frame.about, table.frame.decides, strict=True)
    )
    assert [question.about for question in page.questions] == table.four.frame.about.tolist()


def test_the_picture_shows_accuracy_of_every_condition_beside_chance():
    ax = audit_of("quote", "less one").plot()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert {"model, test", "circuit removed, test", "random circuits, shifted"} <= set(labels)
    assert ax.get_title() == "fails" and ax.get_xlabel() == "accuracy"
