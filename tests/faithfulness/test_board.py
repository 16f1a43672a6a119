"""The board runs every cell once, whatever happens in between, and says what each method found."""

import json
from dataclasses import replace

import pytest

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness import board, methods
from sparse_interp.faithfulness.board import NOT_RUN, board_cases, board_cells, run_board
from sparse_interp.faithfulness.methods import METHODS
from sparse_interp.faithfulness.planted_cases import planted_cases
from sparse_interp.faithfulness.tracr import tracr_cases
from sparse_interp.figures import BOARD_PANELS, recovery_board

CELLS = {"chosen_methods": ("eap", "rivals", "broken"), "chosen_cases": ("attention_copy",), "progress": False}


@pytest.fixture
def calls(monkeypatch):
    """Every search that runs; `broken` finds no circuit."""
    seen, eap = [], METHODS["eap"]

    def counted(truth, *, generator):
        seen.append("eap")
        return eap(truth, generator=generator)

    def broken(truth, *, generator):
        seen.append("broken")
        raise CircuitError("no circuit meets the stopping rule")

    monkeypatch.setitem(METHODS, "eap", counted)
    monkeypatch.setitem(METHODS, "broken", broken)
    return seen


def test_a_finished_cell_is_not_run_again_and_a_damaged_or_outdated_one_is(calls, tmp_path, monkeypatch):
    first = run_board(tmp_path, **CELLS)
    assert calls == ["eap", "broken"] and len(list(tmp_path.iterdir())) == 3
    again = run_board(tmp_path, **CELLS)
    assert calls == ["eap", "broken"] and again == first

    path = tmp_path / "attention_copy--eap--0.json"
    path.write_text(path.read_text()[:-40])
    assert run_board(tmp_path, **CELLS).frame.node_auc.equals(first.frame.node_auc) and calls[2:] == ["eap"]
    record = json.loads(path.read_text())
    record["scores"]["node_auc"] = 1.0
    path.write_text(json.dumps(record))
    run_board(tmp_path, **CELLS)
    assert calls[3:] == ["eap"] and json.loads(path.read_text())["scores"]["node_auc"] < 1
    path.rename(tmp_path / "attention_copy--eap--1.json")  # a cell is what its file says, not what it is called
    run_board(tmp_path, **CELLS | {"n_seeds": 2, "chosen_methods": ("eap",)})
    assert calls[4:] == ["eap", "eap"]

    monkeypatch.setattr(methods, "N_MEANS", 32)
    run_board(tmp_path, **CELLS | {"chosen_methods": ("eap",)})
    assert calls[6:] == ["eap"]


def test_an_interruption_leaves_what_was_finished(calls, tmp_path, monkeypatch):
    def stopped(truth, *, generator):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "broken", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_board(tmp_path, **CELLS)
    assert {path.name for path in tmp_path.iterdir()} == {f"attention_copy--{m}--0.json" for m in ("eap", "rivals")}


def test_no_circuit_counts_as_not_found_and_a_cell_that_does_not_apply_not_at_all(calls, tmp_path):
    table = run_board(tmp_path, **CELLS)
    rows = table.frame.set_index("method")
    assert rows.note["broken"] == "no circuit: no circuit meets the stopping rule"
    assert not rows.nodes_exact["broken"] and rows.node_f1["broken"] == 0
    assert rows.note["rivals"] == NOT_RUN and not rows.note["eap"]
    summary = table.summary().frame.set_index("method")
    assert list(summary.index) == ["eap", "broken"]
    assert summary.edges_exact["eap"] == 1 and summary.edges_exact["broken"] == 0
    assert list(table.summary("kind", "method").frame.kind) == ["hand-built"] * 2
    frame, ax, _ = recovery_board(table)
    summed = table.summary().frame
    assert frame[list(summed)].equals(summed) and len(ax.figure.axes) == len(BOARD_PANELS)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["eap (1)", "broken (1)"]


def test_the_boards_have_every_case_once_and_every_method_but_between_components_acdc_alone():
    cases = board_cases("default")
    assert {"quote", "two_copies", "backup"} <= cases.keys() and cases["quote"].kind == "hand-built"
    kinds = [case.kind for case in cases.values()]
    assert kinds.count("components") == 2 and kinds.count("planted") == len(planted_cases("default"))
    assert kinds.count("tracr") == len(tracr_cases("default"))
    assert len(board_cells("default")) == (len(cases) - 2) * len(METHODS) + 2
    full = board_cases("full")
    assert len(board_cells("full")) == 3 * ((len(full) - 2) * len(METHODS) + 2)


def test_greedy_removal_lands_on_the_published_edges_of_both_programs(tmp_path):
    chosen = {"chosen_cases": ("acdc-reverse", "acdc-proportion"), "progress": False}
    rows = run_board(tmp_path, **chosen).frame
    assert list(rows.method) == ["acdc", "acdc"] and list(rows.n_edges) == [11, 7]
    assert (rows[["node_auc", "edge_auc", "edge_f1"]] == 1).all(axis=None) and rows.edges_exact.all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"board": "small"}, "board='small'; expected 'default' or 'full'"),
        ({"chosen_methods": ("acd",)}, "No method is called 'acd'; did you mean 'acdc'"),
        ({"chosen_cases": ("quot",)}, "the default board has no case 'quot'; did you mean 'quote'"),
        ({"n_seeds": 0}, "n_seeds=0; a cell needs at least 1"),
        ({"n_processes": 0}, "n_processes=0"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        run_board(tmp_path / "new", **{"progress": False} | given)
    assert not (tmp_path / "new").exists()


def test_another_default_of_our_searches_runs_their_cells_again_and_no_others(monkeypatch):
    def told():
        return {method: board.settings(method) for method in METHODS}

    before = told()
    changes = {"schemes": {"find_circuit", "find_edges", "rivals"}, "max_kl": {*METHODS}}
    for name, value in {"schemes": ("full", "stochastic"), "max_kl": 0.1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(methods, "PRUNING", replace(methods.PRUNING, **{name: value}))
            assert {method for method, settings in told().items() if settings != before[method]} == changes[name]
    for name, others in {"TAUS": {"acdc"}, "N_SEEDS": {"rivals"}, "PRICES": {"subnetwork_probing"}}.items():
        with monkeypatch.context() as patch:
            patch.setattr(methods, name, 5)
            assert {method for method, settings in told().items() if settings != before[method]} == others
    assert told() == before
