"""A result is a tidy table that can draw itself, and a mean that says how sure it is.

    interval of a mean = the (1 - level) / 2 and (1 + level) / 2 quantiles of the means of n resamples,
    where a resample draws as many *groups* as there are, with replacement, and takes every value of each

Prompts made from one template are not independent, so the template is what is drawn (the cluster bootstrap:
Davison & Hinkley 1997, *Bootstrap Methods and their Application*, section 3.8); values without groups are
drawn one by one.

The drawing half knows nothing of models or circuits: a function takes a data frame and the names of its columns,
returns the `Axes` it drew on, and labels them with those names. Only this module and figures.py know matplotlib,
which is imported when something is drawn. Every figure states its paper and its ink, so that it stays readable on a
dark page; the colours are told apart without red-green vision (Okabe & Ito 2008, *Color Universal Design*), and what
a colour means, a marker, a dash or a hatch means too. What is drawn and saved within `published_style` is the same
bytes whenever it is drawn from the same numbers.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ForwardRef, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.errors import ConfigError, SparseInterpError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = ForwardRef("matplotlib.axes.Axes")  # named, not imported: annotations must not cost an import of matplotlib

INK = "#1b1b1b"
PAPER = "#ffffff"
FAINT = "#d0d0d0"
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
"""In the order in which series take them."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
"""Beside the colours, in the same order: points, lines and bars of the series."""

STYLE = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib, so every machine has it
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.titlelocation": "left",
    "text.color": INK,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "sparse_interp",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
"""What published figures have in common, as matplotlib calls it; everything else is as matplotlib ships."""

UNDATED = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Formats that figures are saved in, and what would otherwise say when and by what that was done."""

LEVEL = 0.95
"""Share of resamples that an interval covers."""

LONGEST_SIDE = 3000
"""Pixels of a figure's longer side, at most."""

ROWS_SHOWN = 60
"""Rows of a table that a notebook or a drawn table shows; the frame keeps them all."""


@dataclass(frozen=True, eq=False)
class Table:
    """Measurements, one per row, with units in the column names.

    A subclass names the columns that it promises in `columns` and draws its one picture in `plot`. Subclasses are
    declared `@dataclass(frozen=True, eq=False)`, which keeps the comparison written here.
    """

    frame: pd.DataFrame
    """The data."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that every table of this class has; it may have more."""

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Table.__repr__  # in the class's own dictionary, or its dataclass would write another

    def __post_init__(self) -> None:
        missing = [column for column in self.columns if column not in self.frame.columns]
        if missing:
            raise ConfigError(
                f"{type(self).__name__} lacks the column(s) {', '.join(missing)}; "
                f"it needs {', '.join(self.columns)} and got {', '.join(map(str, self.frame.columns)) or 'none'}."
            )

    def __len__(self) -> int:
        return len(self.frame)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.frame.equals(other.frame)

    __hash__ = None  # a frame can change, so a table is no key

    def __str__(self) -> str:
        return self.frame.to_string(index=False, max_rows=ROWS_SHOWN, float_format=_number)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} rows\n{self}"

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False, max_rows=ROWS_SHOWN, float_format=_number, border=0)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the table as text, which is the picture of a table that has no other."""
        ax = _axes(ax, width=1 + 1.4 * len(self.frame.columns), height=0.6 + 0.28 * min(len(self), ROWS_SHOWN))
        ax.set_axis_off()
        shown = self.frame.head(ROWS_SHOWN).map(lambda cell: _number(cell) if isinstance(cell, float) else str(cell))
        if len(shown):
            ax.table(
                shown.to_numpy().tolist(), colLabels=[str(c) for c in shown.columns], loc="center", edges="horizontal"
            )
        return ax

    def save(self, path: Path | str) -> Path:
        """Write the rows to `path`, as CSV or JSON by its ending; the file appears whole or not at all."""
        path = Path(path)
        writers = {
            ".csv": lambda: self.frame.to_csv(index=False),
            ".json": lambda: self.frame.to_json(orient="records", indent=1) + "\n",
        }
        if path.suffix not in writers:
            raise ConfigError(f"A table is saved as {' or '.join(writers)}; got {path.name!r}.")
        write_whole(path, writers[path.suffix]())
        return path


class Interval(NamedTuple):
    """A mean and the bounds it is believed to lie between."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Float[Tensor, " prompt"],
    groups: Sequence[Hashable] | None = None,
    *,
    generator: torch.Generator,
    n: int = 1000,
    level: float = LEVEL,
) -> Interval:
    """Mean of `values` with its bootstrap interval; with `groups`, whole groups are resampled.

    `groups` names the group of each value (its template), `n` counts resamples, and `level` is the share of them that
    the interval covers. A difference between two models on the same prompts is an interval of the differences.
    """
    if not 0 < level < 1 or n < 1:
        raise ConfigError(f"An interval needs 0 < level < 1 and n >= 1 resamples; got level={level}, n={n}.")
    labels = list(range(len(values))) if groups is None else list(groups)
    if len(labels) != len(values):
        raise ConfigError(f"Each value needs a group: got {len(values)} values and {len(labels)} groups.")
    codes, names = pd.factorize(pd.Series(labels, dtype=object))
    if len(names) < 2:
        raise ConfigError(
            f"An interval needs at least 2 groups to draw from; got {len(names)} for {len(values)} values. "
            "With one template, leave `groups` out and say that prompts were resampled."
        )
    membership = torch.as_tensor(np.asarray(codes, dtype=np.int64))
    values = values.detach().to("cpu", torch.float64)
    totals = torch.zeros(len(names), dtype=torch.float64).index_add(0, membership, values)
    sizes = torch.bincount(membership, minlength=len(names)).to(torch.float64)
    drawn = torch.randint(len(names), (n, len(names)), generator=generator, device=generator.device).cpu()
    means = totals[drawn].sum(-1) / sizes[drawn].sum(-1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails).tolist()
    return Interval(values.mean().item(), low, high)


def heatmap(frame: pd.DataFrame, *, x: str, y: str, value: str, ax: Axes | None = None) -> Axes:
    """One coloured cell per (x, y); values of both signs share a scale that is white at zero."""
    _need(frame, "heatmap", x, y, value)
    repeated = frame.duplicated([x, y])
    if repeated.any():
        cell = frame.loc[repeated, [x, y]].iloc[0]
        raise ConfigError(
            f"heatmap draws one value per cell, and {int(repeated.sum())} row(s) repeat one, "
            f"the first at {x}={cell[x]}, {y}={cell[y]}; average or select them first."
        )
    grid = frame.pivot(index=y, columns=x, values=value).astype(float)
    ax = _axes(ax, width=2.5 + 0.3 * len(grid.columns), height=1.5 + 0.3 * len(grid.index))
    largest = float(np.nanmax(np.abs(grid.to_numpy()), initial=0.0)) or 1.0
    signed = bool((grid.to_numpy() < 0).any())
    colours, lowest = ("RdBu_r", -largest) if signed else ("cividis", 0.0)
    image = ax.imshow(grid.to_numpy(), cmap=colours, vmin=lowest, vmax=largest, aspect="auto", origin="lower")
    ax.set_xticks(range(len(grid.columns)), [str(c) for c in grid.columns])
    ax.set_yticks(range(len(grid.index)), [str(r) for r in grid.index])
    ax.set(xlabel=x, ylabel=y)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(value, color=INK)
    bar.ax.tick_params(colors=INK)
    return ax


def bars_with_intervals(
    frame: pd.DataFrame,
    *,
    label: str,
    value: str,
    low: str,
    high: str,
    by: str | None = None,
    reference: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One horizontal bar per row, first row on top, with its interval as a whisker.

    `by` names the column that colours and hatches the bars, `reference` a value to mark with a dashed line (chance, or
    the whole model). A bound that is missing leaves out the whisker, not the bar.
    """
    _need(frame, "bars_with_intervals", label, value, low, high, *([by] if by else []))
    ax = _axes(ax, width=6.5, height=1.2 + 0.35 * len(frame))
    kinds = list(dict.fromkeys(frame[by])) if by else [None]
    look_of = {kind: (COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]) for i, kind in enumerate(kinds)}
    looks = [look_of[kind] for kind in (frame[by] if by else [None] * len(frame))]
    heights = np.arange(len(frame))
    middle = frame[value].to_numpy(float)
    drawn = ax.barh(heights, middle, color=[colour for colour, _ in looks], height=0.7)
    for bar, (_, hatch) in zip(drawn, looks, strict=True):
        bar.set(hatch=hatch, edgecolor=PAPER, linewidth=0)
    bounds = np.stack([middle - frame[low].to_numpy(float), frame[high].to_numpy(float) - middle])
    known = np.isfinite(bounds).all(0)
    if known.any():
        whiskers = bounds[:, known].clip(min=0)  # a bootstrap bound may fall a rounding error inside the mean
        ax.errorbar(middle[known], heights[known], xerr=whiskers, fmt="none", ecolor=INK, capsize=3, linewidth=1)
    if reference is not None:
        ax.axvline(reference, color=INK, linestyle="--", linewidth=1)
    ax.set_yticks(heights, [str(name) for name in frame[label]])
    ax.invert_yaxis()
    ax.set(xlabel=value)
    if by:
        _legend(ax, by, {str(kind): colour for kind, (colour, _) in look_of.items()}, HATCHES)
    return ax


def lines(frame: pd.DataFrame, *, x: str, y: str, by: str | None = None, ax: Axes | None = None) -> Axes:
    """One line through (x, y) per value of `by`, each with its own colour, marker and dashes; points in order of x."""
    _need(frame, "lines", x, y, *([by] if by else []))
    ax = _axes(ax, width=6.0, height=3.8)
    parts = list(frame.groupby(by, sort=False)) if by else [(None, frame)]
    for i, (name, part) in enumerate(parts):
        part = part.sort_values(x)
        ax.plot(part[x].to_numpy(), part[y].to_numpy(), label=str(name), **line_look(i))
    ax.set(xlabel=x, ylabel=y)
    ax.grid(color=FAINT, linewidth=0.5)
    if by:
        ax.legend(title=by, frameon=False, labelcolor=INK, bbox_to_anchor=(1, 1), loc="upper left")
    return ax


def line_look(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the `i`-th series, for `ax.plot` and `ax.errorbar`."""
    look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
    return look | {"linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)], "linewidth": 1.5}


def graph(nodes: pd.DataFrame, edges: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Points joined by lines: blue for positive weights, vermilion for negative ones, wider and fuller for larger.

    `nodes` has the columns `x`, `y`, `label` and `kind` (which colours a point), and optionally `size` (area in square
    points), and is indexed by node; `edges` has `source` and `target`, which are such indices, and `weight`, not a
    number where a line has none (drawn faint).
    """
    _need(nodes, "graph", "x", "y", "label", "kind")
    _need(edges, "graph", "source", "target", "weight")
    strangers = [end for end in [*edges.source, *edges.target] if end not in nodes.index]
    if strangers:
        raise ConfigError(f"graph was given an edge at {strangers[0]!r}, which is not among its {len(nodes)} nodes.")
    ax = _axes(ax, width=9.0, height=6.0)
    largest = float(np.nanmax(np.abs(edges.weight.to_numpy(float)), initial=0.0)) or 1.0
    for source, target, weight in zip(edges.source, edges.target, edges.weight.astype(float), strict=True):
        ends = nodes.loc[[source, target]]
        colour = FAINT if np.isnan(weight) else BLUE if weight > 0 else VERMILION
        share = 0.0 if np.isnan(weight) else abs(weight) / largest
        strength = {"linewidth": 0.6 + 2.4 * share, "alpha": 1.0 if np.isnan(weight) else 0.3 + 0.7 * share}
        ax.plot(ends.x.to_numpy(), ends.y.to_numpy(), color=colour, zorder=1, **strength)
    kinds = list(dict.fromkeys(nodes.kind))
    colour_of = {str(kind): COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    colours, sizes = [colour_of[str(k)] for k in nodes.kind], nodes.get("size", 60)
    ax.scatter(nodes.x, nodes.y, c=colours, s=sizes, zorder=2, edgecolors=INK, linewidths=0.5)
    for x, y, label in zip(nodes.x, nodes.y, nodes.label, strict=True):
        text = str(label).replace("$", r"\$")  # a label is text, never a formula
        ax.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7, color=INK)
    if kinds:
        _legend(ax, "kind", colour_of)
    ax.set_axis_off()
    return ax


def panels(n_rows: int, n_columns: int, *, width: float, height: float, **how: Any) -> list[Axes]:
    """Axes row by row of a new figure of `width` x `height` inches (at most 16 a side), on stated paper and ink.

    `how` goes to matplotlib's `subplots`: `sharex`, `sharey`, `width_ratios`.
    """
    from matplotlib import pyplot

    size = (min(width, 16.0), min(height, 16.0))
    figure, grid = pyplot.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False, **how)
    figure.set_facecolor(PAPER)
    return [_axes(ax, width=width, height=height) for ax in grid.flat]


def _axes(ax: Axes | None, *, width: float, height: float) -> Axes:
    """`ax`, or the axes of a new figure of `width` x `height` inches (at most 16 a side), on stated paper and ink."""
    if ax is None:
        return panels(1, 1, width=width, height=height)[0]
    ax.set_facecolor(PAPER)
    ax.tick_params(colors=INK)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return ax


def _legend(ax: Axes, title: str, colour_of: dict[str, str], hatches: Sequence[str] = ("",)) -> None:
    """A legend of coloured patches beside the drawing, hatched in turn."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor=PAPER, linewidth=0, hatch=hatches[i % len(hatches)], label=name)
        for i, (name, colour) in enumerate(colour_of.items())
    ]
    ax.legend(handles=patches, title=title, frameon=False, labelcolor=INK, bbox_to_anchor=(1, 1), loc="upper left")


def _need(frame: pd.DataFrame, drawing: str, *columns: str) -> None:
    """Refuse a frame that lacks a column that `drawing` was asked to draw."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ConfigError(
            f"{drawing} was asked to draw {', '.join(missing)}, and the frame has {', '.join(map(str, frame.columns))}."
        )


def _number(value: float) -> str:
    """Four significant digits; a count stays whole."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader never meets half a file and a failure leaves none."""
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` when all is written and goes when that fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise SparseInterpError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that you may write to."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def published_style() -> Iterator[None]:
    """Within: matplotlib as it ships, with `STYLE`, whatever the user has set; afterwards as it was."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save_figure(ax: Axes, *paths: Path) -> None:
    """Write the figure that `ax` is part of as PNG, SVG or PDF by each path's ending, and close it.

    A file appears whole or not at all, and says nothing of when it was made.

    Raises:
        ConfigError: for another ending, before anything is written.
    """
    import matplotlib.pyplot as plt

    for path in paths:
        if path.suffix not in UNDATED:
            raise ConfigError(f"A figure is saved as {', '.join(UNDATED)}; got {path.name!r}.")
    try:
        dpi = min(150.0, LONGEST_SIDE / max(ax.figure.get_size_inches()))
        for path in paths:
            with _whole(path) as partial:
                how = {"format": path.suffix[1:], "metadata": UNDATED[path.suffix]}
                ax.figure.savefig(partial, dpi=dpi, bbox_inches="tight", **how)
    finally:
        plt.close(ax.figure)
