"""The study of objectives and schemes: which cells it has, how it goes on, and what it says of them."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from filelock import FileLock

from sparse_interp.faithfulness.ground_truth import ground_truth

STUDY = Path(__file__).parents[1] / "benchmarks" / "faithful_pruning.py"


@pytest.fixture
def study(monkeypatch) -> ModuleType:
    """The benchmark, with searches of a second."""
    spec = importlib.util.spec_from_file_location("faithful_pruning", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    little = {"n_steps": 50, "batch_size": 16, "n_train": 128, "n_selection": 48, "lr": 0.1}
    monkeypatch.setattr(module, "SETTINGS", {name: setting | little for name, setting in module.SETTINGS.items()})
    monkeypatch.setattr(module, "N_PAIRS", 16)
    monkeypatch.setattr(module, "N_FEWER", 8)
    return module


@pytest.fixture
def cell(study):
    return study.Cell("attention_copy", "attention_copy", "real", study.DEFAULT, 0)


@pytest.fixture
def counted(study, monkeypatch):
    """The cells that were searched, in order; what a search finds is what the first one found."""
    made = []

    def searched(cell, subject):
        made.append(cell)
        nodes = sorted(ground_truth(cell.model).nodes)
        record = {"config": study.as_json(cell.config), **cell._asdict(), "kind": cell.kind, "found": True}
        record |= {"nodes": len(nodes), "edges": 0}
        return record | {"circuit": nodes, "ranking": {}}

    monkeypatch.setattr(study, "searched", searched)
    monkeypatch.setattr(study, "MEASURES", {"key": study.MEASURES["key"]})
    return made


# -- which cells there are --------------------------------------------------------------------------------------------


def test_the_quick_share_comes_first_in_the_full_one_and_no_cell_comes_twice(study, tmp_path):
    quick, full = list(study.quick_cells()), list(study.full_cells())
    assert full[: len(quick)] == quick
    assert len(set(full)) == len(full) == len({cell.path(tmp_path) for cell in full})


def test_both_objectives_meet_every_solved_task_and_its_nonsense_in_the_quick_share(study):
    rows = json.loads((STUDY.parent / "results" / "discovery.json").read_text())["rows"]
    solved = {row["task"] for row in rows if row["model"] == "stdlib-small" and row["pruned"] == "nodes"}
    bundled = {tuple(cell) for cell in study.quick_cells() if cell.kind == "bundled"}
    twins, settings = ("real", "nonsense"), ("task loss", "agreement")
    assert bundled == {("stdlib-small", t, twin, s, 0) for t in solved for twin in twins for s in settings}


def test_settings_differ_in_objective_scheme_norms_and_target_alone_and_all_of_them_differ(study):
    allowed = {"objective", "schemes", "frozen_norms", "target"}
    configs = [study.Cell("quote", "quote", "real", name, 0).config for name in study.SETTINGS]
    first = study.as_json(configs[0])
    for config in map(study.as_json, configs):
        assert {name for name, value in config.items() if value != first[name]} <= allowed
    assert len(set(configs)) == len(configs)


# -- how it goes on ---------------------------------------------------------------------------------------------------


def test_a_search_is_kept_whole_with_what_was_measured_of_it(study, cell, tmp_path):
    study.work([cell], tmp_path, say=False)
    truth, record = ground_truth("attention_copy"), study.record_of(cell, tmp_path)
    assert {tuple(node) for node in record["circuit"]} == truth.nodes and record["nodes"] == len(truth.nodes)
    assert record["key"]["key_exact"] and record["held out"]["test_kl_nats"] < 1e-4
    assert record["partial"]["worst_kl_nats"] >= record["partial"]["expected_kl_nats"] - 1e-9
    curve = record["ranking"]["curve"]
    assert curve["nodes"][0] == 0 and curve["nodes"][-1] == record["all_nodes"]
    assert curve["kl_nats"][-1] == pytest.approx(0, abs=1e-5) and curve["kl_nats"][0] > 0.5
    assert record["ranking"]["nodes_at_kl_0.2"] in curve["nodes"]


def test_nonsense_that_no_circuit_does_is_a_record_that_says_so(study, cell, tmp_path):
    nonsense = cell._replace(twin="nonsense")
    study.work([nonsense], tmp_path, say=False)
    record = study.record_of(nonsense, tmp_path)
    assert not record["found"] and "no circuit meets the stopping rule" in record["note"]
    assert study.is_done(nonsense, record)
    assert record["ranking"]["best_kl_nats"] > 0.2 and record["ranking"]["nodes_at_kl_0.2"] is None


def test_what_is_done_is_not_searched_for_again(study, cell, counted, tmp_path):
    others = [cell, cell._replace(seed=1)]
    study.work(others[:1], tmp_path, say=False)
    study.work(others, tmp_path, say=False)
    assert counted == others


def test_a_cell_of_other_settings_is_made_anew(study, cell, counted, tmp_path, monkeypatch):
    study.work([cell], tmp_path, say=False)
    monkeypatch.setitem(study.SETTINGS, study.DEFAULT, study.SETTINGS[study.DEFAULT] | {"lr": 0.05})
    assert study.record_of(cell, tmp_path) is None
    study.work([cell], tmp_path, say=False)
    assert counted == [cell, cell] and study.record_of(cell, tmp_path)["config"]["lr"] == 0.05


def test_a_new_measurement_is_made_of_the_circuit_that_is_there(study, cell, counted, tmp_path, monkeypatch):
    study.work([cell], tmp_path, say=False)

    def size(subject, circuit, seed):
        return {"n": circuit.n_nodes}

    monkeypatch.setitem(study.MEASURES, "size", study.Measure(size, lambda cell: True))
    assert study.missing(cell, study.record_of(cell, tmp_path)) == ["size"]
    study.work([cell], tmp_path, say=False)
    record = study.record_of(cell, tmp_path)
    assert counted == [cell] and record["size"] == {"n": record["nodes"]} and record["key"]["key_exact"]


def test_a_cell_that_another_process_makes_is_left_to_it(study, cell, counted, tmp_path):
    path = cell.path(tmp_path)
    path.parent.mkdir(parents=True)
    with FileLock(path.with_suffix(".making")):
        study.work([cell, cell._replace(seed=1)], tmp_path, say=False)
    assert counted == [cell._replace(seed=1)]


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_search_that_was_interrupted_leaves_nothing(study, cell, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "searched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.work([cell], tmp_path, say=False)
    assert not list(tmp_path.rglob("*.json*"))


def test_a_measurement_that_was_interrupted_leaves_the_search(study, cell, counted, tmp_path, monkeypatch):
    monkeypatch.setitem(study.MEASURES, "key", study.Measure(interrupted, lambda cell: True))
    with pytest.raises(KeyboardInterrupt):
        study.work([cell], tmp_path, say=False)
    assert not study.is_done(cell, study.record_of(cell, tmp_path))
    monkeypatch.setitem(study.MEASURES, "key", study.Measure(study.against_key, lambda cell: True))
    study.work([cell], tmp_path, say=False)
    assert counted == [cell] and study.is_done(cell, study.record_of(cell, tmp_path))


def test_the_plan_counts_cells_and_what_is_left_costs_what_its_like_has_cost(study, cell, counted, tmp_path):
    bundled = study.Cell("stdlib-small", "for_while", "real", study.PAPER, 0)
    paper = cell._replace(setting=study.PAPER)
    cells = [cell, cell._replace(seed=1), cell._replace(seed=2), paper, bundled]
    for made, seconds in zip(cells[:2], (10.0, 30.0), strict=True):
        study.work([made], tmp_path, say=False)
        record = study.record_of(made, tmp_path) | {"seconds": seconds}
        made.path(tmp_path).write_text(json.dumps(record))
    table = study.plan(cells, tmp_path).set_index("kind")
    assert table.loc["hand-built", ["cells", "done", "seconds_left"]].tolist() == [4, 2, 40.0]
    assert table.loc["bundled", ["cells", "done"]].tolist() == [1, 0]
    assert math.isnan(table.loc["bundled", "seconds_left"])


# -- what it says -----------------------------------------------------------------------------------------------------


def row(study, twin, task, nodes):
    kept = {"kind": "bundled", "model": "m", "task": task, "twin": twin, "setting": "s", "seed": 0, "nodes": nodes}
    kept |= {"best_kl_nats": 0.1, "edges": nodes, "found": nodes is not None, "search_seconds": 1.0}
    measured = [name for name in study.MEASURED if not name.startswith(("key", "audit"))]
    return kept | dict.fromkeys(measured, 0.5) | {f"nodes_at_kl_{b}": nodes for b in ("0.1", "0.2", "0.5", "1")}


@pytest.fixture
def frame(study) -> pd.DataFrame:
    """Nonsense needs twice the nodes of `a`, has none in `b`, is the only one of `c`, and was not searched for `d`."""
    cells = [("real", "a", 10), ("nonsense", "a", 20), ("real", "b", 10), ("nonsense", "b", None)]
    cells += [("real", "c", None), ("nonsense", "c", 30), ("real", "d", 10), ("reinitialised", "d", 10)]
    return pd.DataFrame([row(study, *cell) for cell in cells])


def test_a_gap_is_a_ratio_of_sizes_infinite_without_a_nonsense_circuit_and_missing_without_a_real_one(study, frame):
    gap = study.gaps(frame).set_index("task")
    assert list(gap.index) == ["a", "b", "c"]
    for name in ("gap", "gap_at_kl_0.2", "gap_at_kl_1"):
        assert gap[name]["a"] == 2 and gap[name]["b"] == math.inf and math.isnan(gap[name]["c"])


def test_a_setting_is_summed_up_over_real_tasks_and_their_gaps(study, frame):
    (found,) = study.by_setting(frame).to_dict("records")
    assert (found["tasks"], found["found"], found["nodes"]) == (4, 3, 10)
    assert (found["twins"], found["nonsense_found"], found["gap_enough"]) == (2, 1, 1)


def test_keys_that_no_circuit_was_found_for_are_not_recovered(study, frame):
    known = frame.assign(
        kind="hand-built", key_f1=[1.0, None, 0.5, *[None] * 5], key_exact=[True, None, False, *[None] * 5]
    )
    (found,) = study.by_setting(known).to_dict("records")
    assert (found["key_f1"], found["key_exact"]) == (1.5 / 4, 1)


@pytest.fixture
def two_settings(study) -> pd.DataFrame:
    """Tasks a and b under the default and under a setting with half and a quarter of the nodes; c under one alone."""
    frame = pd.DataFrame([row(study, "real", task, 40) for task in "abc"] + [row(study, "real", t, 40) for t in "abd"])
    frame["setting"] = [study.DEFAULT] * 3 + ["agreement, adversarial"] * 3
    frame.loc[3:4, ["nodes", "worst_kl_nats"]] = [[20, 1.0], [10, 2.0]]
    return frame


def test_settings_are_compared_on_the_tasks_that_both_have(study, two_settings):
    (found,) = study.beside_default(two_settings).to_dict("records")
    assert (found["setting"], found["tasks"]) == ("agreement, adversarial", 2)
    assert found["nodes_ratio"] == pytest.approx((1 / 2 * 1 / 4) ** 0.5)
    assert (found["worst_kl_nats"], found["worst_kl_nats_default"]) == (1.5, 0.5)


def test_a_setting_that_found_nothing_is_compared_with_nothing(study, two_settings):
    two_settings.loc[3:, ["found", "nodes"]] = False, None
    assert not len(study.beside_default(two_settings))


def test_sentences_say_what_the_tables_hold(study, frame, two_settings):
    frame["setting"] = study.DEFAULT
    both = pd.concat([frame, two_settings[two_settings.setting != study.DEFAULT]])
    *sentences, last = study.said(study.by_setting(both), study.gaps(both), study.beside_default(both))
    assert sentences == [
        "Searched for agreement, nonsense has a circuit in 1 of 2 bundled cases, of 2 to 2 times the nodes of the real "
        "ones; that it takes at least 5 times the nodes or has none holds in 1 of 2.",
        "Were KL 1 nats enough, rankings searched for agreement would have nonsense in 1 of 2 bundled cases, in 2 to 2 "
        "times the nodes.",
        "On held-out prompts circuits searched for agreement have a task loss +0 nats from their models', mean of 3 "
        "bundled searches; 0 of them are better than their model.",
    ]
    assert last == "No setting was tried on known circuits, solved tasks and nonsense yet, so none wins."
    known = two_settings.assign(kind="planted", seed=3, key_f1=1.0, key_exact=[True] * 5 + [False])
    *sentences, _ = study.said(study.by_setting(known), study.gaps(known), study.beside_default(known))
    assert sentences == [
        "Settings that find every known planted circuit exactly, of so many: agreement (3). Others: agreement, "
        "adversarial: 2 of 3."
    ]


def test_the_main_settings_are_told_beside_the_default(study, two_settings):
    other = study.MAIN[-1]
    two_settings["setting"] = two_settings.setting.replace("agreement, adversarial", other)
    two_settings.loc[:1, "test_loss_circuit_nats"] = [0.2, 0.4]
    *sentences, _ = study.said(
        study.by_setting(two_settings), study.gaps(two_settings), study.beside_default(two_settings)
    )
    assert sentences == [
        "On held-out prompts circuits searched for agreement have a task loss -0.133 nats from their models', mean of "
        "3 bundled searches; 2 of them are better than their model.",
        f"On the same 2 bundled tasks, {other} has 0.354 times the nodes of agreement and takes 1 times as long; the "
        "worst partial ablation leaves its circuits 1.5 nats from their model, those of agreement 0.5.",
    ]


def test_what_audits_say_is_counted_over_the_circuits_that_were_audited(study, two_settings):
    audits = {"agreement": [True, True, False], "worst_case": [None] * 3, "gap_to_controls": True, "minimality": False}
    for about, passed in audits.items():
        two_settings[f"audit_{about}"] = None
        two_settings.loc[:2, f"audit_{about}"] = passed
    two_settings.loc[:2, "audit_idle_share"] = [0.2, 0.4, None]
    found = study.by_setting(two_settings).set_index("setting").loc[study.DEFAULT]
    assert found.audits == 2 and found.audit_idle_share == pytest.approx(0.3)
    assert found[list(study.AUDITED)].tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize(
    ("missed", "nonsense", "worst", "wins"),
    [
        (None, (100, 100), (0.5, 0.4), "agreement, adversarial"),  # nearer to its model at the worst
        (None, (100, 100), (0.5, 0.6), "agreement"),
        (None, (100, 30), (0.5, 0.4), "agreement"),  # nonsense is as small
        ("agreement, adversarial", (100, 100), (0.5, 0.4), "agreement"),  # a known circuit is missed
        ("agreement", (100, 100), (0.5, 0.6), "agreement, adversarial"),
    ],
)
def test_who_wins_finds_known_circuits_and_no_nonsense_and_stands_the_worst(study, missed, nonsense, worst, wins):
    rows = []
    for setting, size, nats in zip((study.DEFAULT, "agreement, adversarial"), nonsense, worst, strict=True):
        rows.append(row(study, "real", "a", 10) | {"setting": setting, "worst_kl_nats": nats})
        rows.append(row(study, "nonsense", "a", size) | {"setting": setting})
        known = {"setting": setting, "kind": "hand-built", "key_exact": setting != missed, "key_f1": 1.0}
        rows.append(row(study, "real", "b", 10) | known)
    frame = pd.DataFrame(rows)
    sentence = study.chosen(study.by_setting(frame), study.beside_default(frame))
    assert sentence == f"Of 2 settings that were tried on known circuits, solved tasks and nonsense, {wins} wins."


def test_tables_are_json_without_infinities(study, frame):
    rows = study.as_rows(study.gaps(frame))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["gap"] for row in rows] == [2.0, "inf", None]


def test_a_study_without_cells_says_so(study, cell, tmp_path):
    with pytest.raises(SystemExit, match="holds none of these 1 cells"):
        study.write([cell], tmp_path, tmp_path / "results", "command")


def test_the_tables_are_written_of_what_there_is(study, cell, frame, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "collected", lambda cells, folder: frame)
    study.write([cell] * 9, tmp_path, tmp_path, "command")
    record = json.loads((tmp_path / "faithful_pruning.json").read_text())
    assert (record["cells"], record["done"], len(record["gaps"]), len(record["by setting"])) == (9, 8, 3, 1)
    again = pd.read_csv(tmp_path / "faithful_pruning.csv")
    assert study.as_rows(study.gaps(again)) == record["gaps"]


def test_a_setting_under_which_nothing_is_found_is_summed_up_too(study, frame):
    nothing = frame[frame.task == "c"].query("twin == 'real'")[["kind", "model", "task", "twin", "setting", "seed"]]
    (found,) = study.by_setting(nothing.assign(nodes=None, found=False, best_kl_nats=1.0, search_seconds=1.0,
                                               **dict.fromkeys([f"nodes_at_kl_{b:g}" for b in study.KL_BOUNDS]))
                                ).to_dict("records")  # fmt: skip
    assert (found["tasks"], found["found"], found["twins"]) == (1, 0, 0) and math.isnan(found["test_kl_nats"])
