"""Tables refuse, compare, draw and save themselves; intervals resample groups; drawings refuse what is not there."""

import json
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_interp.errors import ConfigError, SparseInterpError
from sparse_interp.results import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    PAPER,
    UNDATED,
    VERMILION,
    Table,
    bars_with_intervals,
    bootstrap_interval,
    graph,
    heatmap,
    lines,
    published_style,
    save_figure,
)


@dataclass(frozen=True, eq=False)
class Losses(Table):
    """A table with promised columns."""

    columns: ClassVar[tuple[str, ...]] = ("layer", "loss_nats")


FRAME = pd.DataFrame({"layer": [0, 1], "loss_nats": [1.5, 0.25], "name": ["a<b", "c"]})


def test_a_table_names_the_columns_it_lacks_and_those_it_got():
    with pytest.raises(
        ConfigError, match=r"lacks the column\(s\) loss_nats; it needs layer, loss_nats and got layer\."
    ):
        Losses(FRAME[["layer"]])


def test_a_table_cannot_be_given_another_frame():
    with pytest.raises(FrozenInstanceError):
        Table(FRAME).frame = FRAME


def test_tables_are_equal_when_class_and_rows_are():
    assert Losses(FRAME) == Losses(FRAME.copy())
    assert Losses(FRAME) != Losses(FRAME.assign(layer=[1, 0]))
    assert Losses(FRAME) != Table(FRAME)


def test_a_terminal_shows_what_a_subclass_holds_and_not_how_it_is_made():
    @dataclass(frozen=True, eq=False)
    class Losses(Table):
        columns = ()

    assert repr(Losses(FRAME)).startswith(f"Losses of {len(FRAME)} rows\n") and "frame=" not in repr(Losses(FRAME))


def test_a_table_in_a_notebook_escapes_its_text():
    html = Table(FRAME)._repr_html_()
    assert "a&lt;b" in html
    assert "a<b" not in html


def test_a_table_shows_four_digits_and_keeps_them_all():
    table = Table(pd.DataFrame({"loss_nats": [1 / 3]}))
    assert "0.3333" in str(table) and "0.33333" not in str(table)
    assert table.frame.loss_nats[0] == 1 / 3


def test_a_saved_table_comes_back_row_by_row(tmp_path):
    table = Table(FRAME)
    assert pd.read_csv(table.save(tmp_path / "new folder" / "t.csv")).equals(FRAME)
    assert json.loads(table.save(tmp_path / "t.json").read_text()) == FRAME.to_dict("records")


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"saved as \.csv or \.json; got 't\.xlsx'"):
        Table(FRAME).save(tmp_path / "t.xlsx")


def test_a_table_that_cannot_be_written_says_where_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SparseInterpError, match=r"t\.csv cannot be written"):
        Table(FRAME).save(tmp_path / "file" / "t.csv")
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(SparseInterpError, match=r"taken\.csv cannot be written"):
        Table(FRAME).save(tmp_path / "taken.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.csv"]


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_mean():
    values = torch.rand(40, generator=torch.Generator().manual_seed(1))
    first, second = (bootstrap_interval(values, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert first == second
    assert first.mean == pytest.approx(values.double().mean().item())
    assert first.low < first.mean < first.high


def test_an_interval_has_the_width_of_the_normal_one_for_many_values(generator):
    values = torch.randn(4000, generator=generator, dtype=torch.float64)
    interval = bootstrap_interval(values, generator=generator)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std().item() / 4000**0.5, rel=0.1)


def test_prompts_of_one_template_do_not_narrow_the_interval(generator):
    by_template = torch.tensor([0.0, 1.0, 2.0, 5.0])
    once = bootstrap_interval(by_template, generator=generator, n=4000)
    repeated = bootstrap_interval(
        by_template.repeat_interleave(50),
        [f"template {i}" for i in range(4) for _ in range(50)],
        generator=generator,
        n=4000,
    )
    naive = bootstrap_interval(by_template.repeat_interleave(50), generator=generator, n=4000)
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.15)
    assert naive.high - naive.low < 0.3 * (repeated.high - repeated.low)


def test_groups_of_unequal_size_weigh_by_their_prompts(generator):
    interval = bootstrap_interval(torch.tensor([0.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"], generator=generator)
    assert interval == (0.25, 0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        (torch.ones(3), ["a", "b"], "got 3 values and 2 groups"),
        (torch.ones(3), ["a", "a", "a"], "at least 2 groups to draw from; got 1 for 3 values"),
        (torch.ones(0), None, "got 0 for 0 values"),
    ],
)
def test_an_interval_that_nothing_supports_is_refused(values, groups, message, generator):
    with pytest.raises(ConfigError, match=message):
        bootstrap_interval(values, groups, generator=generator)


def test_an_interval_needs_a_level_between_none_and_all(generator):
    with pytest.raises(ConfigError, match=r"got level=95\.0"):
        bootstrap_interval(torch.ones(3), generator=generator, level=95.0)


def test_a_heatmap_puts_each_value_in_its_cell_with_white_at_zero():
    frame = pd.DataFrame({"pos": [0, 1, 0, 1], "layer": [0, 0, 1, 1], "effect": [1.0, -2.0, 0.0, 0.5]})
    ax = heatmap(frame, x="pos", y="layer", value="effect")
    image = ax.images[0]
    assert image.get_array().tolist() == [[1.0, -2.0], [0.0, 0.5]]
    assert image.get_clim() == (-2.0, 2.0)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("pos", "layer")


def test_a_heatmap_refuses_two_values_for_one_cell():
    frame = pd.DataFrame({"pos": [0, 0], "layer": [1, 1], "effect": [1.0, 2.0]})
    with pytest.raises(ConfigError, match=r"1 row\(s\) repeat one, the first at pos=0, layer=1; average"):
        heatmap(frame, x="pos", y="layer", value="effect")


def test_a_heatmap_without_values_is_drawn():
    heatmap(pd.DataFrame({"pos": [0], "layer": [0], "effect": [np.nan]}), x="pos", y="layer", value="effect")


def test_bars_keep_the_order_of_the_rows_and_leave_out_missing_whiskers():
    frame = pd.DataFrame(
        {"row": ["circuit", "random"], "accuracy": [0.99, 0.5], "low": [0.97, np.nan], "high": [1.0, np.nan]}
    )
    ax = bars_with_intervals(frame, label="row", value="accuracy", low="low", high="high", reference=0.5)
    assert [bar.get_width() for bar in ax.patches] == [0.99, 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["circuit", "random"]
    assert ax.yaxis_inverted()
    (whiskers,) = ax.collections
    assert [segment[:, 0].tolist() for segment in whiskers.get_segments()] == [pytest.approx([0.97, 1.0])]


def test_bars_are_coloured_by_the_named_column_and_say_so():
    frame = pd.DataFrame(
        {"row": list("abc"), "v": [1.0, 2.0, 3.0], "lo": [0.0] * 3, "hi": [4.0] * 3, "kind": ["x", "y", "x"]}
    )
    ax = bars_with_intervals(frame, label="row", value="v", low="lo", high="hi", by="kind")
    first, second, third = ((bar.get_facecolor(), bar.get_hatch()) for bar in ax.patches[:3])
    assert first == third
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert [patch.get_hatch() for patch in ax.get_legend().get_patches()] == [first[1], second[1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "y"]


def test_lines_join_their_points_in_order_of_x():
    frame = pd.DataFrame({"step": [2, 1, 1, 2], "loss_nats": [4.0, 5.0, 7.0, 6.0], "model": ["a", "a", "b", "b"]})
    ax = lines(frame, x="step", y="loss_nats", by="model")
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 5], [2, 4]], [[1, 7], [2, 6]]]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines]
    assert all(one != other for one, other in zip(*looks, strict=True))  # told apart without colour too


def test_a_graph_colours_edges_by_sign_and_draws_unweighted_ones_faintly():
    nodes = pd.DataFrame({"x": [0, 1, 2], "y": [0, 1, 2], "label": ["a", "$b^", "c"], "kind": ["v", "v", "neuron"]})
    edges = pd.DataFrame({"source": [0, 1, 0], "target": [1, 2, 2], "weight": [2.0, -1.0, np.nan]})
    ax = graph(nodes, edges)
    assert [line.get_color() for line in ax.lines] == [BLUE, VERMILION, FAINT]
    ax.figure.canvas.draw()  # a label that looks like a formula stays text


def test_a_graph_refuses_an_edge_at_a_node_that_is_not_there():
    nodes = pd.DataFrame({"x": [0], "y": [0], "label": ["a"], "kind": ["v"]})
    edges = pd.DataFrame({"source": [0], "target": [7], "weight": [1.0]})
    with pytest.raises(ConfigError, match="an edge at 7, which is not among its 1 nodes"):
        graph(nodes, edges)


def test_a_graph_without_edges_or_nodes_is_drawn():
    graph(
        pd.DataFrame({"x": [], "y": [], "label": [], "kind": []}),
        pd.DataFrame({"source": [], "target": [], "weight": []}),
    )


def test_a_drawing_names_the_column_it_misses_and_those_it_has():
    with pytest.raises(ConfigError, match="asked to draw epoch, and the frame has layer, loss_nats, name"):
        lines(FRAME, x="epoch", y="loss_nats")


def test_every_figure_states_its_paper_and_its_ink():
    from matplotlib.colors import to_hex

    ax = lines(FRAME, x="layer", y="loss_nats")
    assert {to_hex(ax.get_facecolor()), to_hex(ax.figure.get_facecolor())} == {PAPER}
    assert to_hex(ax.xaxis.label.get_color()) == INK
    assert {to_hex(label.get_color()) for label in ax.get_xticklabels()} == {INK}


def test_every_colour_can_be_seen_on_the_paper():
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    contrast = {colour: (luminance(PAPER) + 0.05) / (luminance(colour) + 0.05) for colour in (INK, *COLOURS)}
    assert contrast[INK] > 10
    assert min(contrast.values()) > 2


def test_a_drawing_goes_where_it_is_told():
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert lines(FRAME, x="layer", y="loss_nats", ax=ax) is ax
    assert Table(FRAME).plot(ax) is ax


def test_a_table_without_a_picture_of_its_own_draws_its_rows():
    drawn = Table(FRAME).plot().tables[0]
    assert drawn[1, 2].get_text().get_text() == "a<b"


def drawn_twice(tmp_path, **settings):
    """The files of one figure, drawn and saved two times, the second under other settings of matplotlib's."""
    import matplotlib

    files = []
    for again in range(2):
        matplotlib.rcParams.update(settings if again else {})
        with published_style():
            ax = lines(FRAME, x="layer", y="loss_nats")
            paths = [tmp_path / f"{again}{ending}" for ending in UNDATED]
            save_figure(ax, *paths)
        files.append([path.read_bytes() for path in paths])
        after = {name: matplotlib.rcParams[name] for name in settings}
    assert after == settings
    matplotlib.rcdefaults()
    return files


def test_a_published_figure_is_the_same_bytes_whenever_it_is_drawn(tmp_path):
    first, second = drawn_twice(tmp_path, **{"axes.facecolor": "black", "font.size": 30.0, "svg.hashsalt": "other"})
    assert first == second and all(first)


def test_a_figure_is_refused_an_ending_that_nobody_knows_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"saved as \.png, \.svg, \.pdf; got 'a\.gif'"):
        save_figure(lines(FRAME, x="layer", y="loss_nats"), tmp_path / "a.png", tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
