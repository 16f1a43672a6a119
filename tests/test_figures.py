"""Figures show what is in their tables, say how much that is, look the same twice, and refuse a broken table."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_interp import figures, gallery
from sparse_interp.errors import ConfigError, SparseInterpError
from sparse_interp.gallery import ENDINGS, FIGURES, STEPS, command_apart, draw_figures, make_tables, write_page
from sparse_interp.model.statistics import activation_statistics, degrees, weight_sizes
from sparse_interp.results import UNDATED, published_style

TASKS = ("quotes", "brackets", "loops")
MODELS = ("stdlib-small", "stdlib-small-dense")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def trained() -> dict:
    rows = []
    for width in (32, 64):
        for i, density in enumerate((1.0, 0.25, 0.0625)):
            loss = 4.0 - width / 100 + 0.11 * i
            bounds = {"loss_nats": loss, "low": loss - 0.02, "high": loss + 0.03}
            counts = {"width": width, "density": density, "n_nonzero": int(9000 * width * density)}
            rows.append(counts | bounds | {"seed": 7, "n_tokens": 54321, "n_blocks": 31, "n_ctx": 48})
    return {"rows": [row | {"bigram_loss_nats": 4.4, "seconds": 60.0} for row in rows]}


def curves() -> pd.DataFrame:
    rows = []
    for i, task in enumerate(TASKS):
        for setting in ("task loss", "agreement"):
            for nodes, value in ((0, 2.0), (5 + i, 0.9), (9 + i, 1.1), (40 + i, 0.2), (700, 0.0)):
                named = {"model": MODELS[0], "task": task, "twin": "real", "setting": setting, "seed": 7}
                sizes = {"all_nodes": 700, "n_pairs": 33, "nodes": nodes, "kl_nats": value, "loss_nats": value / 2}
                rows.append(named | sizes)
    return pd.DataFrame(rows)


def circuits() -> dict:
    rows = [
        {"model": model, "task": task, "pruned": pruned, "nodes": 10, "edges": (3 + 4 * i) * (9 if j else 1) * (k + 1)}
        for i, task in enumerate(TASKS)
        for j, model in enumerate(MODELS)
        for k, pruned in enumerate(("nodes", "edges"))
    ]
    alone = {"model": MODELS[0], "task": "alone", "pruned": "nodes", "nodes": 12, "edges": 55555}
    return {"command": "python benchmarks/discovery.py --seed 7", "rows": [*rows, alone]}


def audited() -> pd.DataFrame:
    rows = []
    for model in MODELS:
        for i, task in enumerate(TASKS):
            for j, condition in enumerate(figures.CONDITIONS):
                for measure, value in (("accuracy", 0.9 - 0.1 * j), ("KL(model || circuit)", 0.1 + 0.5 * j)):
                    value += 0.01 * i
                    named = {"model": model, "task": task, "pruned": "nodes", "measure": measure, "split": "test"}
                    bounds = {"condition": condition, "value": value, "low": value - 0.05, "high": value + 0.04}
                    rows.append(named | bounds | {"n_prompts": 57, "n_templates": 6 + i % 2, "seed": 7})
    return pd.DataFrame(rows)


def study() -> pd.DataFrame:
    rows = []
    for i, task in enumerate(TASKS):
        for setting in ("task loss", "agreement"):
            for twin, nodes in (("real", 20 + i), ("nonsense", 400 + i if setting == "task loss" else np.nan)):
                named = {"model": MODELS[0], "task": task, "twin": twin, "setting": setting, "kind": "bundled"}
                rows.append(named | {"seed": 7, "found": nodes == nodes, "nodes": nodes, "all_nodes": 700})
    return pd.DataFrame(rows)


def full_audits() -> pd.DataFrame:
    size = {"model": MODELS[0], "task": TASKS[0], "pruned": "nodes", "nodes": 20, "level": "full"}
    size["measure"] = "size at the same agreement"
    conditions = {"nonsense twin / circuit": 35.0, "re-initialised network / circuit": 3.5}
    notes = {35.0: "not found: more than all nodes", 3.5: "bound: above 3"}
    return pd.DataFrame([size | {"condition": c, "value": v, "note": notes[v]} for c, v in conditions.items()])


def board() -> pd.DataFrame:
    rows = []
    for i, method in enumerate(("find_circuit", "eap")):
        for j, case in enumerate(("quote", "two_hop", "backup")):
            exact = (i + j) % 2 == 0
            scores = {"node_auc": 0.9 - 0.1 * i - 0.02 * j, "edge_auc": 0.8 - 0.03 * j, "node_f1": 0.5, "edge_f1": 0.5}
            scores |= {"nodes_exact": exact, "edges_exact": not exact, "keys_frac": 1.0, "n_nodes": 5, "n_edges": 6}
            named = {"case": case, "kind": "hand-built", "n_keys": 1, "method": method, "seed": 7}
            rows.append(named | scores | {"seconds": 1.0, "note": ""})
    return pd.DataFrame(rows)


def twins() -> dict:
    rows = []
    for i, bridge in enumerate(("known", "trained")):
        own = {"nmse_worst": 1e-9 * 100**i, "agreement, bridge": 0.9 + i / 50, "agreement, ridge map": 0.4 + i / 50}
        rows.append({"model": "quote", "missing_frac": 0.1 * i, "bridge": bridge, "agreement_low": 0.85, **own})
        rows[-1]["agreement_high"] = 0.97
    return {"seed": 7, "rows": rows}


def bridged() -> pd.DataFrame:
    rows = []
    for i, bridge in enumerate(("bridge", "ridge map")):
        for measure, places in (("nmse encode", ("0-0", "1-1")), ("nmse decode", ("0-0", "1-1")), ("agreement", TASKS)):
            for j, place in enumerate(places):
                value = 0.2 + 0.1 * i + 0.03 * j + 0.001 * len(measure)
                bounds = {"value": value, "low": value - 0.01, "high": value + 0.02}
                rows.append({"part": "text", "where": place, "bridge": bridge, "measure": measure} | bounds)
    beside = {"part": "causal", "where": TASKS[0], "bridge": "bridge less ridge map", "measure": "agreement"}
    return pd.DataFrame([*rows, beside | {"value": -0.77, "low": -0.8, "high": -0.7}])


def steered() -> pd.DataFrame:
    rows = []
    for example in ("quote", "quote, back", "return"):
        for i, direction in enumerate(("feature", "difference of means", "random, mean", "feature less other")):
            for value in (1.0, 2.0, 4.0):
                change = 0.01 * value * (3 - i) if i < 3 else -0.777
                low, high = (np.nan, np.nan) if i == 2 else (change - 0.004, change + 0.006)
                named = {"example": example, "n_prompts": 21, "unit": 0.5, "node": "L1.v.3", "direction": direction}
                rows.append(named | {"value": value, "change": change, "low": low, "high": high})
    return pd.DataFrame(rows)


def about_bridges() -> dict:
    nodes = {"quotes": 40, "loops": 11}
    return {"seed": 7, "blocks": 19, "nodes": nodes, "pairs_per_task": 13, "random_directions": 77}


TABLES = {
    "density_and_size.json": trained,
    "size_curves.csv": curves,
    "discovery.json": circuits,
    "necessity_and_sufficiency.csv": audited,
    "faithful_pruning.csv": study,
    "audits.csv": full_audits,
    "groundtruth.csv": board,
    "bridges_rotated.json": twins,
    "bridges.csv": bridged,
    "bridges_steering.csv": steered,
    "bridges.json": about_bridges,
}

DRAWN = {
    "density_and_size": ("density", "n_nonzero", "loss_nats", "low", "high"),
    "circuit_size": ("target_nats", "nodes"),
    "frontier": ("edges", "low", "high"),
    "necessity_and_sufficiency": ("value", "low", "high"),
    "audit_gap": ("nodes",),
    "recovery_board": (
        *("node_auc", "node_auc_low", "node_auc_high", "edge_auc", "edge_auc_low", "edge_auc_high"),
        *("nodes_exact", "nodes_exact_low", "nodes_exact_high", "edges_exact", "edges_exact_low", "edges_exact_high"),
    ),
    "rotated_bridges": ("nmse_worst", "agreement, bridge", "agreement_low", "agreement_high", "agreement, ridge map"),
    "bridges": ("value", "low", "high"),
    "steering": ("times", "change", "low", "high"),
    "activations": ("q05", "q25", "q50", "q75", "q95"),
    "weights": ("q05", "q25", "q50", "q75", "q95", "degree", "share"),
}
"""Columns of each figure's CSV of which every number is drawn."""

SAID = {
    "density_and_size": ("32 and 64 channels", "54,321", "31 held-out blocks of 48", "seed 7", "95%"),
    "circuit_size": ("3 tasks", "33 held-out pairs", "seed 7", "no interval"),
    "frontier": ("n = 3 tasks", "seed 7", "95%", "nodes pruned 9 [9, 9]"),
    "necessity_and_sufficiency": ("6 circuits", "n = 57 prompts", "6 and 7 templates", "seed 7", "95%"),
    "audit_gap": ("n = 3 tasks", "seed 7", "all 700 nodes", "nonsense twin, task loss: 3 of 3", "agreement: 0 of 3"),
    "recovery_board": ("n = 3 cases (3 hand-built)", "Seed 7", "95%"),
    "rotated_bridges": ("n = 2 bridges", "seed 7", "95%"),
    "bridges": ("19 held-out blocks", "n = 51 nodes of 2 circuits", "13 pairs", "seed 7", "95%"),
    "steering": ("77 random directions", "n = 21 prompts", "seed 7", "95%"),
    "activations": ("3 blocks of 7 tokens", "nothing is drawn at random"),
    "weights": ("no interval", "n_weights"),
}
"""What each caption has to say, in the words of the tables above."""


def written(folder: Path, **changed) -> Path:
    """A results folder; `changed` is tables by the names of their files, without the ending, None for none."""
    for file, made in TABLES.items():
        table = changed.get(file.rpartition(".")[0], made()) if file != "bridges.json" else made()
        if isinstance(table, pd.DataFrame):
            table.to_csv(folder / file, index=False)
        elif table is not None:
            (folder / file).write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("results"))


@pytest.fixture
def stand_ins(monkeypatch, plain_model, tokens, make_model):
    """Figures of the bundled models drawn from two small ones."""
    models = dict(zip(MODELS, (plain_model, make_model(afrac=None)), strict=True))
    monkeypatch.setattr(gallery, "load", models.__getitem__)
    monkeypatch.setattr(gallery.zoo, "validation_blocks", lambda name: tokens)
    return models


every_figure = pytest.mark.parametrize("name", FIGURES)


def numbers_drawn(figure) -> list[float]:
    """Every coordinate of points, lines and bars, frames and grids left out."""
    found = []
    for ax in figure.axes:
        for line in ax.lines:
            found += [*np.ravel(line.get_xdata()), *np.ravel(line.get_ydata())]
        for collection in ax.collections:
            found += [end for segment in collection.get_segments() for end in segment.ravel()]
        found += [bar.get_width() for bar in ax.patches]
    return [float(number) for number in found]


@every_figure
def test_the_csv_holds_what_is_drawn_and_the_caption_the_numbers_of_the_table(name, results, stand_ins):
    with published_style():
        drawn = FIGURES[name].draw(results)
    seen = np.array(numbers_drawn(drawn.ax.figure))
    for column in DRAWN[name]:
        for value in drawn.frame[column].dropna().astype(float):
            assert np.isclose(seen, value, rtol=1e-9, atol=1e-12).any(), f"{column}={value} is not drawn"
    for words in SAID[name]:
        if words == "n_weights":
            words = f"sparse {len(weight_sizes(stand_ins[MODELS[0]])):,}"
        assert words in drawn.caption, f"{words!r} is not in: {drawn.caption}"


@every_figure
def test_every_point_that_is_drawn_is_in_the_csv(name, results, stand_ins):
    with published_style():
        drawn = FIGURES[name].draw(results)
    known = np.concatenate([drawn.frame[column].dropna().astype(float) for column in DRAWN[name]])
    known = np.append(known, drawn.frame.get("loss_nats", pd.Series(dtype=float)).to_numpy(float))
    for ax in drawn.ax.figure.axes:
        for line in ax.lines:
            hollow = line.get_markerfacecolor() == "none" and name == "audit_gap"  # no circuit: no number either
            if line.get_marker() in ("None", "", "|") or hollow:
                continue
            for number in np.ravel(line.get_xdata()).astype(float):
                assert np.isclose(known, number, rtol=1e-9, atol=1e-12).any(), f"{number} is drawn and not in the CSV"


@every_figure
def test_no_colour_means_what_no_shape_means(name, results, stand_ins):
    with published_style():
        drawn = FIGURES[name].draw(results)
    for ax in drawn.ax.figure.axes:
        shape_of: dict = {}
        for line in (line for line in ax.lines if line.get_marker() not in ("None", "", "|", "_")):
            shape_of.setdefault(line.get_color(), set()).add((line.get_marker(), str(line.get_linestyle())))
        shapes = [shape for shapes in shape_of.values() for shape in shapes]
        assert len(shapes) == len(set(shapes)), f"one shape has two colours: {shape_of}"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_tables_give_the_same_bytes(results, tmp_path):
    names = ("frontier", "recovery_board")
    runs = []
    for again in ("first", "second"):
        assert all(outcome.caption for outcome in draw_figures(names, results, tmp_path / again))
        runs.append(files_of(tmp_path / again))
    assert runs[0] == runs[1] and runs[0].keys() == {f"{name}{ending}" for name in names for ending in ENDINGS}
    text = (tmp_path / "first" / "frontier.md").read_text()
    assert "n = 3 tasks" in text and "`python benchmarks/discovery.py --seed 0`" in text
    table = pd.read_csv(tmp_path / "first" / "frontier.csv")
    assert "alone" not in set(table.task) and len(table) == 2 * 2 * (len(TASKS) + 1)


@pytest.mark.parametrize("name", [name for name, figure in FIGURES.items() if figure.files])
def test_a_figure_whose_table_is_missing_is_left_out_with_the_command_that_makes_it(name, tmp_path):
    (outcome,) = draw_figures([name], tmp_path, tmp_path / "out")
    assert outcome.caption is None and "there is no " in outcome.reason
    assert any(f"`{command}` makes it" in outcome.reason for command in FIGURES[name].commands)
    assert not (tmp_path / "out").exists()


BROKEN = {
    "density_and_size": ("density_and_size.json", "loss_nats"),
    "circuit_size": ("size_curves.csv", "kl_nats"),
    "frontier": ("discovery.json", "edges"),
    "necessity_and_sufficiency": ("necessity_and_sufficiency.csv", "high"),
    "audit_gap": ("faithful_pruning.csv", "all_nodes"),
    "rotated_bridges": ("bridges_rotated.json", "nmse_worst"),
    "bridges": ("bridges.csv", "value"),
    "steering": ("bridges_steering.csv", "change"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_by_name_and_column(name, tmp_path):
    file, column = BROKEN[name]
    table = TABLES[file]()
    frame = pd.DataFrame(table["rows"]) if isinstance(table, dict) else table
    spoilt = frame.astype({column: object})
    spoilt.loc[1, column] = "n/a!"
    for wrong, words in ((frame.drop(columns=column), f"lacks the column\\(s\\) {column}"),
                         (spoilt, f"'n/a!' for {column} in row 1 and 0 more"),
                         (frame.iloc[:0], "has no rows|lacks the column")):  # fmt: skip
        given = table | {"rows": wrong.to_dict("records")} if isinstance(table, dict) else wrong
        written(tmp_path, **{file.rpartition(".")[0]: given})
        (outcome,) = draw_figures([name], tmp_path, tmp_path / "out")
        assert outcome.caption is None and re.search(words, outcome.reason), outcome.reason


def test_a_file_that_is_no_table_and_a_table_without_a_seed_are_refused(tmp_path):
    written(tmp_path, discovery=circuits() | {"command": "python benchmarks/discovery.py"})
    (tmp_path / "bridges_rotated.json").write_text("[1, 2")
    frontier, bridges = draw_figures(["frontier", "rotated_bridges"], tmp_path, tmp_path / "out")
    assert "says nothing of its seed" in frontier.reason
    assert "is no table" in bridges.reason and "bridges_rotated.py" in bridges.reason


def test_a_size_is_the_smallest_that_reaches_the_target_and_the_curve_never_rises(results):
    drawn = FIGURES["circuit_size"].draw(results)
    rows = drawn.frame[(drawn.frame.task == TASKS[1]) & (drawn.frame["searched for"] == "agreement")]
    expected = {target: 41 if target < 0.9 else 6 for target in rows.target_nats if 0.2 <= target < 2}
    assert {row.target_nats: row.nodes for row in rows.itertuples() if 0.2 <= row.target_nats < 2} == expected
    assert (rows.sort_values("target_nats").nodes.diff().dropna() <= 0).all()


def test_searches_of_the_dense_twin_are_left_out_where_a_line_is_a_task_of_the_sparse_model(tmp_path):
    both = pd.concat([curves(), curves().assign(model=MODELS[1])])
    frame = FIGURES["circuit_size"].draw(written(tmp_path, size_curves=both)).frame
    assert set(frame.model) == {MODELS[0]} and len(frame) > 0


def test_the_gap_names_the_model_of_a_task_where_there_are_two(tmp_path):
    both = pd.concat([study(), study().assign(model=MODELS[1], nodes=study().nodes + 50)])
    drawn = FIGURES["audit_gap"].draw(written(tmp_path, faithful_pruning=both))
    labels = [label.get_text() for label in drawn.ax.get_yticklabels()]
    assert labels == [f"{task}, {model}" for model in ("dense", "sparse") for task in reversed(TASKS)]
    at = {label: i for i, label in enumerate(labels)}
    real, *_ = drawn.ax.lines
    drawn_at = dict(zip(np.round(real.get_ydata() - 0.2).astype(int), real.get_xdata(), strict=True))
    assert drawn_at[at[f"{TASKS[0]}, dense"]] == 70 and drawn_at[at[f"{TASKS[0]}, sparse"]] == 20


def test_a_control_of_a_full_audit_stands_beside_the_study_and_replaces_nothing_of_it(results):
    frame = FIGURES["audit_gap"].draw(results).frame
    more = frame[frame.source == "full audit"]
    assert more[["task", "twin", "found", "nodes"]].values.tolist() == [[TASKS[0], "reinitialised", True, 70.0]]
    assert len(frame) == len(study()) + 1


def test_a_difference_of_two_is_no_variant_and_no_direction(results):
    for name, column, value in (("bridges", "value", -0.77), ("steering", "change", -0.777)):
        drawn = FIGURES[name].draw(results)
        assert value not in set(drawn.frame[column]) and value not in numbers_drawn(drawn.ax.figure)


def test_an_unknown_figure_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ConfigError, match="no figure is called 'frontiers'; did you mean frontier"):
        list(draw_figures(["weights", "frontiers"], tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_page_shows_what_was_drawn(results, tmp_path):
    outcomes = list(draw_figures(["density_and_size"], results, tmp_path / "out"))
    write_page(outcomes, tmp_path / "out", tmp_path / "docs" / "gallery.md")
    text = (tmp_path / "docs" / "gallery.md").read_text()
    assert outcomes[0].caption in text and "![Density and size](figures/density_and_size.png)" in text
    copy = tmp_path / "docs" / "figures" / "density_and_size.png"
    assert 0 < copy.stat().st_size < (tmp_path / "out" / "density_and_size.png").stat().st_size


def test_the_gallery_of_the_documentation_has_every_figure_small_and_with_its_caption():
    page = (BENCHMARKS.parent / "docs" / "gallery.md").read_text()
    there = [name for name in FIGURES if all((BENCHMARKS / "results" / file).exists() for file in FIGURES[name].files)]
    assert len(there) >= 9
    for name in there:
        picture = BENCHMARKS.parent / "docs" / "figures" / f"{name}.png"
        assert f"(figures/{name}.png)" in page and picture.stat().st_size < 100_000
        assert gallery.origin(name) in page


# -- from scratch -----------------------------------------------------------------------------------------------------


def test_every_command_exists_and_takes_what_it_is_given():
    for step in STEPS.values():
        flags = [word for word in (*step.command, *step.apart) if word.startswith("--")]
        program, place = step.command[:2]
        source = BENCHMARKS.parent / (place if program == "python" else "sparse_interp/cli.py")
        text = source.read_text()
        for flag in flags:
            taken = f'"{flag}"' if program == "python" else f"    {flag[2:]}: Annotated"
            where = text if program == "python" else text.partition(f"def {place}(")[2].partition('"""')[0]
            assert taken in where, f"{place} takes no {flag}"


def test_tables_are_made_in_order_in_a_folder_of_their_own(tmp_path):
    assert FIGURES["necessity_and_sufficiency"].steps == [
        "discovery", "audits", "necessity_and_sufficiency"]  # fmt: skip
    folder, work = tmp_path / "benchmarks", tmp_path / "work"
    folder.mkdir()
    (folder / "density_and_size.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[-1]).mkdir(parents=True)")
    assert list(make_tables(["density_and_size"], folder, work)) == ["density_and_size"]
    assert (work / "results").is_dir()
    assert command_apart("audits", folder, work)[-2:] == ["--out", f"{work}/results"]


def test_a_command_that_fails_is_named_and_scripts_that_are_not_there_are_refused_first(tmp_path):
    with pytest.raises(ConfigError, match=r"has no discovery\.py.*Run this in a checkout"):
        next(make_tables(["discovery"], tmp_path, tmp_path))
    (tmp_path / "discovery.py").write_text("raise SystemExit(3)")
    with pytest.raises(SparseInterpError, match="discovery ended with code 3"):
        list(make_tables(["discovery"], tmp_path, tmp_path))


def test_how_long_it_took_is_read_from_the_tables(results):
    assert gallery.last_time("density_and_size", results) == 360.0
    assert gallery.last_time("size_curves", results) is None
    assert gallery.last_time("groundtruth", results) == 6.0


def test_figures_of_models_hold_what_a_sum_by_hand_gives(plain_model, tokens):
    nodes = activation_statistics(plain_model, tokens).frame.assign(model="m", n_blocks=3, n_ctx=7)
    frame = figures.activations(nodes).frame
    here = nodes[(nodes.layer == 1) & (nodes.site == "neuron")].active_frac.to_numpy()
    row = frame[(frame.place == "L1 neuron") & (frame.value == "active_frac")].iloc[0]
    assert row.q50 == pytest.approx(np.median(here), rel=1e-3) and row.n == 20
    units = degrees(plain_model).frame.assign(model="m")
    steps = figures.weights(weight_sizes(plain_model).frame.assign(model="m"), units).frame.dropna(subset=["share"])
    for row in steps.itertuples():
        part = units[units.unit == row.unit]
        assert row.share == pytest.approx((part.degree >= row.degree).mean())


def test_the_command_says_what_is_left_out_and_its_exit_code_tells(results, tmp_path, capsys):
    from sparse_interp.cli import main

    def ran(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["figures", "--out", str(tmp_path / "out"), *arguments])
        return ended.value.code, capsys.readouterr()

    code, said = ran("--results", str(tmp_path), "--only", "circuit_size")
    assert code == 1 and "circuit_size is left out: there is no" in said.err and "figure_tables.py" in said.err
    code, said = ran("--only", "circuit_sizes")
    assert code == 2 and "did you mean circuit_size" in said.err
    code, said = ran("--results", str(results), "--only", "circuit_size")
    assert code == 0 and said.out.split() == [str(tmp_path / "out" / "circuit_size.svg")]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {*UNDATED, ".csv", ".md"}


def test_intervals_over_tasks_are_those_of_logarithms():
    logs = pd.Series(np.log([2.0, 8.0, 4.0]))
    found = figures.exp_interval(logs, torch.Generator().manual_seed(0))
    assert found.mean == pytest.approx(4.0) and 2 <= found.low < 4 < found.high <= 8
