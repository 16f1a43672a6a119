"""One function per published figure: tables in; the numbers that are drawn, their axes, and the caption out.

    table(s)  ->  Drawn(frame, ax, caption)

What is drawn is in `frame` and nowhere else, and every number of a caption is read from the tables: how many prompts,
cases or blocks there are, which seed, what an interval draws. A table that lacks a column, a row or a number is
refused. Which files the tables are in, and what makes those, `gallery.py` knows; drawn within
`results.published_style`, the same tables give the same bytes.
"""

from collections.abc import Mapping, Sequence
from math import exp, inf, nan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.board import BoardTable
from sparse_interp.results import (
    FAINT,
    INK,
    LEVEL,
    Axes,
    Interval,
    bars_with_intervals,
    bootstrap_interval,
    line_look,
    panels,
)

REAL, NONSENSE, REINITIALISED = "real", "nonsense", "reinitialised"

MODEL_WORDS = {"stdlib-small": "sparse", "stdlib-small-dense": "dense"}
"""What figures call the bundled models."""

TARGETS = tuple(float(f"{0.02 * 2 ** (i / 2):.3g}") for i in range(15))
"""Targets, nats, at which sizes are read off a ranking."""


class Drawn(NamedTuple):
    """A figure."""

    frame: pd.DataFrame
    """Every number that is drawn, one row per point."""

    ax: Axes
    """The first of its axes."""

    caption: str
    """What it shows, of how many, with which seed, and what its intervals are."""


# -- training ---------------------------------------------------------------------------------------------------------


def density_and_size(runs: pd.DataFrame) -> Drawn:
    """Loss on held-out text against the share of weights that is not zero, and against their number, by width."""
    numbers = ("width", "density", "n_nonzero", "seed", "n_tokens", "loss_nats", "low", "high", "n_blocks", "n_ctx")
    frame = checked(runs, "density_and_size", (*numbers, "bigram_loss_nats")).sort_values(["width", "n_nonzero"])
    axes = panels(1, 2, width=8.2, height=3.4, sharey=True)
    for ax, x, label in zip(
        axes, ("density", "n_nonzero"), ("share of weights not zero", "weights not zero"), strict=True
    ):
        for i, (width, part) in enumerate(frame.groupby("width")):
            away = np.abs(part[["low", "high"]].to_numpy().T - part.loss_nats.to_numpy())
            ax.errorbar(part[x], part.loss_nats, yerr=away, capsize=2, label=f"{width} channels", **line_look(i))
        ax.axhline(frame.bigram_loss_nats.iloc[0], color=INK, linestyle=":", linewidth=1, label="bigram table alone")
        ax.set(xscale="log", xlabel=label)
        ax.grid(color=FAINT, linewidth=0.5)
    axes[0].set_ylabel("loss on held-out text, nats")
    beside(axes[1])
    caption = (
        f"Loss on held-out text of models of {listed(frame.width)} channels that keep some of their weights, against "
        f"the share (left) and the number (right) of those. {listed(frame.n_tokens)} training tokens each, a short "
        f"run: where the losses end up is not seen here. {listed(frame.n_blocks)} held-out blocks of "
        f"{listed(frame.n_ctx)} tokens; seed {listed(frame.seed)}, one run per point. Whiskers: {LEVEL:.0%} bootstrap "
        "intervals over blocks of the difference from the bigram table's own loss on the same block."
    )
    return Drawn(frame, axes[0], caption)


# -- circuits ---------------------------------------------------------------------------------------------------------


def circuit_size(curves: pd.DataFrame) -> Drawn:
    """Nodes of the smallest circuit along a ranking that reaches a target, task by task and for either objective."""
    numbers = ("seed", "all_nodes", "n_pairs", "nodes", "kl_nats", "loss_nats")
    rows = checked(curves, "size_curves", numbers, ("model", "task", "twin", "setting"))
    panel_of = {"task loss": ("loss_nats", "task loss, nats"), "agreement": ("kl_nats", "KL(model ‖ circuit), nats")}
    rows = rows[(rows.twin == REAL) & rows.setting.isin(panel_of)]
    points = []
    for (model, task, setting, seed), curve in rows.groupby(["model", "task", "setting", "seed"], sort=False):
        value = panel_of[setting][0]
        for target in TARGETS:
            kept = curve.nodes[curve[value] <= target]
            if len(kept):
                named = {"model": model, "task": task, "searched for": setting, "seed": seed}
                points.append(named | {"target_nats": target, "nodes": int(kept.min())})
    frame = checked(pd.DataFrame(points), "size_curves", ("target_nats", "nodes"))
    axes = panels(1, 2, width=8.6, height=3.6, sharey=True)
    order = {task: i for i, task in enumerate(frame.task.drop_duplicates())}
    for ax, (setting, (_, label)) in zip(axes, panel_of.items(), strict=True):
        here = frame[frame["searched for"] == setting]
        for (task, seed), part in here.groupby(["task", "seed"], sort=False):
            name = task if seed == here.seed.min() else None
            ax.plot(part.target_nats, part.nodes, drawstyle="steps-post", label=name, **line_look(order[task]))
        ax.set(xscale="log", xlabel=f"target: {label}", title=f"searched for {setting}")
        ax.set_yscale("symlog", linthresh=1)
        ax.grid(color=FAINT, linewidth=0.5)
    axes[0].set_ylabel(f"nodes, of {listed(rows.all_nodes)}")
    beside(axes[1])
    caption = (
        "Smallest circuit that reaches a target, along the ranking of nodes that a search ends with, "
        f"{frame.task.nunique()} tasks of {listed(frame.model)}: task loss where that was searched for (left), "
        f"divergence from the model where agreement was (right). A point is a mean over {listed(rows.n_pairs)} "
        f"held-out pairs of prompts, seed {listed(frame.seed)}; with one search per curve there is no interval. No "
        "point: the whole model does not reach the target either."
    )
    return Drawn(frame, axes[0], caption)


def frontier(circuits: pd.DataFrame, models: pd.DataFrame, generator: torch.Generator, seed: int) -> Drawn:
    """Edges of circuits of a sparse and a dense model of equal loss: task by task, and their mean against that loss."""
    rows = checked(circuits, "discovery", ("nodes", "edges"), ("model", "task", "pruned"), gaps=("nodes", "edges"))
    losses = checked(models, "models", ("loss_nats", "n_blocks"), ("model",)).set_index("model")
    rows = rows.dropna(subset=["edges"])
    sparse, dense = MODEL_WORDS
    both = rows.groupby(["task", "pruned"]).model.transform("nunique") == rows.model.nunique()
    points, ratios = rows[both & (rows.edges > 0)][["model", "pruned", "task", "edges"]].copy(), {}
    points["loss_nats"] = points.model.map(losses.loss_nats)
    means = []
    for pruned, part in points.groupby("pruned", sort=False):
        logs = np.log(part.pivot(index="task", columns="model", values="edges").astype(float))
        for model in logs:
            mean = exp_interval(logs[model], generator)
            named = {"model": model, "pruned": pruned, "task": "geometric mean", "loss_nats": losses.loss_nats[model]}
            means.append(named | {"edges": mean.mean, "low": mean.low, "high": mean.high})
        ratios[pruned] = exp_interval(logs[dense] - logs[sparse], generator)
    frame = pd.concat([points, pd.DataFrame(means)], ignore_index=True)
    left, right = panels(1, 2, width=9.0, height=3.6, width_ratios=(1.25, 1))
    tasks = list(dict.fromkeys(points.sort_values("edges").task))
    kinds = {kind: i for i, kind in enumerate(frame[["model", "pruned"]].drop_duplicates().itertuples(index=False))}
    for kind, i in kinds.items():
        part = frame[(frame.model == kind.model) & (frame.pruned == kind.pruned)]
        each, mean = part[part.task != "geometric mean"], part[part.task == "geometric mean"]
        look = line_look(i) | {"linestyle": "none", "markersize": 6}
        name = f"{word(kind.model)}, {kind.pruned} pruned"
        left.plot(each.edges, [tasks.index(task) for task in each.task], label=name, **look)
        away = np.abs(mean[["low", "high"]].to_numpy().T - mean.edges.to_numpy())
        right.errorbar(mean.edges, mean.loss_nats, xerr=away, capsize=3, label=name, **look | {"linestyle": "none"})
    left.set_yticks(range(len(tasks)), tasks)
    middle = losses.loss_nats[list(points.model.unique())].mean()
    right.set(ylim=(middle - 0.1, middle + 0.1), ylabel="loss of the model on held-out text, nats")
    for ax, label in ((left, "edges of the circuit"), (right, "edges, geometric mean over tasks")):
        ax.set(xscale="log", xlabel=label)
        ax.grid(color=FAINT, linewidth=0.5)
    beside(right)
    said = "; ".join(f"{pruned} pruned {r.mean:.3g} [{r.low:.3g}, {r.high:.3g}]" for pruned, r in ratios.items())
    shown = "; ".join(f"{word(m)} {losses.loss_nats[m]:.3f} nats" for m in points.model.unique())
    caption = (
        f"Circuits of two models of nearly the same loss ({shown}; {listed(losses.n_blocks)} held-out blocks): edges "
        "task by task (left), and their geometric mean against the model's loss (right; lower and further left is "
        f"better). n = {len(tasks)} tasks of which both models have a circuit, one search each, seed {seed}. Whiskers: "
        f"{LEVEL:.0%} bootstrap intervals over tasks. Edges of the dense circuits over those of the sparse ones: "
        f"{said}."
    )
    return Drawn(frame, left, caption)


def exp_interval(logs: pd.Series, generator: torch.Generator) -> Interval:
    """A geometric mean from logarithms, with its interval over them."""
    found = bootstrap_interval(torch.tensor(logs.to_numpy()), generator=generator)
    return Interval(*map(exp, found))


# -- are they real ----------------------------------------------------------------------------------------------------

CONDITIONS = ("model", "circuit", "circuit removed", "random circuits", "all at baseline")


def necessity_and_sufficiency(audits: pd.DataFrame, pruned: str = "nodes", split: str = "test") -> Drawn:
    """What is left with the circuit alone, without it, with random ones of its size, and with nothing."""
    numbers = ("value", "low", "high", "n_prompts", "n_templates", "seed")
    rows = checked(audits, "necessity_and_sufficiency", numbers, ("model", "task", "measure", "condition", "split"))
    rows = rows[(rows.pruned == pruned) & (rows.split == split) & rows.condition.isin(CONDITIONS)]
    measures = {"accuracy": "share of prompts answered right", "KL(model || circuit)": "KL(model ‖ what is left), nats"}
    frame = checked(rows[rows.measure.isin(measures)], "necessity_and_sufficiency", numbers)
    frame = frame[["model", "task", "measure", "condition", "value", "low", "high", "n_prompts", "n_templates", "seed"]]
    models, tasks = list(frame.model.drop_duplicates()), sorted(frame.task.unique(), reverse=True)
    axes = panels(len(models), 2, width=8.8, height=0.9 + 0.36 * len(tasks) * len(models), sharex="col", sharey=True)
    for ax, (model, measure) in zip(axes, [(m, name) for m in models for name in measures], strict=True):
        here = frame[(frame.model == model) & (frame.measure == measure)]
        for i, condition in enumerate(CONDITIONS):
            part = here[here.condition == condition]
            at = [tasks.index(task) + 0.14 * (2 - i) for task in part.task]
            away = np.abs(part[["low", "high"]].to_numpy().T - part.value.to_numpy())
            look = line_look(i) | {"linestyle": "none"}
            ax.errorbar(part.value, at, xerr=away, capsize=2, elinewidth=1, label=condition, **look)
        ax.set_yticks(range(len(tasks)), tasks)
        ax.grid(axis="x", color=FAINT, linewidth=0.5)
        ax.set_title(f"{word(model)} model")
    for ax, label in zip(axes[-2:], measures.values(), strict=True):
        ax.set_xlabel(label)
    axes[-1].set_xscale("log")
    beside(axes[1], from_ax=axes[0])
    caption = (
        f"Sufficiency and necessity of {frame.groupby(['model', 'task']).ngroups} circuits ({pruned} pruned): the "
        "model, the circuit alone, the model with the circuit at its means, random circuits of the circuit's size, "
        f"and everything at its mean. n = {listed(frame.n_prompts)} prompts of the {split} split, of "
        f"{listed(frame.n_templates)} templates; seed {listed(frame.seed)}. Whiskers: {LEVEL:.0%} bootstrap intervals, "
        "over templates, and over draws for random circuits. A circuit is necessary where the model without it does "
        "no better than everything at its mean. Empty rows have no circuit."
    )
    return Drawn(frame, axes[0], caption)


def audit_gap(study: pd.DataFrame, audits: pd.DataFrame) -> Drawn:
    """Nodes that a search needs for a task, for its nonsense, and for the task on a re-initialised network."""
    rows = checked(
        study, "faithful_pruning", ("seed", "all_nodes"), ("model", "task", "twin", "setting", "kind", "found")
    )
    rows = rows[(rows.kind == "bundled") & rows.setting.isin(("task loss", "agreement"))]
    frame = rows[["model", "task", "setting", "twin", "found", "nodes", "all_nodes", "seed"]].assign(source="study")
    known = set(frame[["model", "task", "twin", "setting"]].itertuples(index=False, name=None))
    more = [
        row
        for row in audited_sizes(audits, rows)
        if (row["model"], row["task"], row["twin"], row["setting"]) not in known
    ]
    frame = pd.concat([frame, pd.DataFrame(more, columns=frame.columns)], ignore_index=True) if more else frame
    frame = frame.assign(nodes=frame.nodes.where(frame.found.astype(bool)), found=frame.found.astype(bool))
    several = frame.model.nunique() > 1
    frame = frame.assign(name=[f"{row.task}, {word(row.model)}" if several else row.task for row in frame.itertuples()])
    real = frame[(frame.twin == REAL) & (frame.setting == "agreement")].groupby(["model", "name"]).nodes.min()
    real = real.reset_index().sort_values(["model", "nodes"], ascending=False)
    tasks = list(real.name)
    frame = frame[frame.name.isin(tasks)]
    axes = panels(1, 2, width=8.6, height=1.2 + 0.36 * len(tasks), sharey=True)
    twins, edge = (REAL, NONSENSE, REINITIALISED), float(frame.all_nodes.max())
    for ax, setting in zip(axes, ("task loss", "agreement"), strict=True):
        ax.axvspan(edge * 1.3, edge * 4, color=FAINT, alpha=0.5, linewidth=0)
        for i, twin in enumerate(twins):
            part = frame[(frame.setting == setting) & (frame.twin == twin)]
            at = np.array([tasks.index(name) + 0.2 * (1 - i) for name in part.name])
            look = line_look(i) | {"linestyle": "none", "markersize": 6}
            there = part.found.to_numpy()
            ax.plot(part.nodes[there], at[there], label=WORDS[twin], **look)
            ax.plot([edge * 2.2] * int((~there).sum()), at[~there], markerfacecolor="none", **look)
        ax.set(xscale="log", xlim=(0.7, edge * 4), xlabel="nodes of the circuit", title=f"searched for {setting}")
        ax.set_xticks([10**power for power in range(int(np.log10(edge)) + 1)])
        ax.minorticks_off()
        ax.set_yticks(range(len(tasks)), tasks)
        ax.grid(axis="x", color=FAINT, linewidth=0.5)
        ax.text(edge * 2.2, len(tasks) - 0.35, "none", ha="center", fontsize=8, color=INK)
    beside(axes[1])
    found = frame.groupby(["setting", "twin"], sort=False).found.agg(["sum", "size"])
    said = "; ".join(
        f"{WORDS[twin]}, {setting}: {row['sum']} of {row['size']}" for (setting, twin), row in found.iterrows()
    )
    all_nodes = frame.groupby("model").all_nodes.max()
    of_models = " and ".join(
        f"n = {n} tasks of {model} (all {all_nodes[model]:,} nodes)" for model, n in real.model.value_counts().items()
    )
    caption = (
        f"Nodes that a search needs for {of_models}, for their nonsense twins, and for the tasks on a re-initialised "
        "network; hollow, in the grey: no circuit meets the rule, not even all nodes. "
        f"Searches that end with a circuit: {said}. One search per "
        f"point, seed {listed(frame.seed)}: no interval."
    )
    return Drawn(frame.drop(columns="name"), axes[0], caption)


WORDS = {REAL: "real task", NONSENSE: "nonsense twin", REINITIALISED: "re-initialised network"}


def audited_sizes(audits: pd.DataFrame, study: pd.DataFrame) -> list[dict]:
    """Sizes of controls that full audits searched for, as rows of the study."""
    rows = checked(
        audits, "audits", ("nodes",), ("model", "task", "pruned", "measure", "condition", "note"), gaps=("note",)
    )
    rows = rows[(rows.measure == "size at the same agreement") & (rows.pruned == "nodes") & rows.value.notna()]
    everything = study.groupby("model").all_nodes.max()
    twin_of = {"nonsense twin / circuit": NONSENSE, "re-initialised network / circuit": REINITIALISED}
    found = []
    for row in rows[rows.condition.isin(twin_of) & rows.model.isin(everything.index)].itertuples():
        missed = str(row.note).startswith("not found")
        named = {"model": row.model, "task": row.task, "setting": "agreement", "twin": twin_of[row.condition]}
        sizes = {"found": not missed, "nodes": round(row.value * row.nodes), "all_nodes": everything[row.model]}
        found.append(named | sizes | {"seed": study.seed.min(), "source": "full audit"})
    return found


def recovery_board(board: BoardTable) -> Drawn:
    """How surely each method tells the true nodes and edges from the rest, and how often it finds exactly them."""
    rows = checked(board.run, "groundtruth", ("seed", "nodes_exact", "edges_exact"), ("case", "kind", "method"))
    frame = board.summary().frame
    for value in ("node_auc", "edge_auc"):
        bounds = [_over_cases(rows[rows.method == method], value) for method in frame.method]
        frame = frame.assign(**{f"{value}_low": [b[0] for b in bounds], f"{value}_high": [b[1] for b in bounds]})
    axes = panels(2, 2, width=8.8, height=1.2 + 0.42 * rows.method.nunique())
    for i, (ax, (value, label)) in enumerate(zip(axes, BOARD_PANELS.items(), strict=True)):
        named = frame.assign(name=[f"{row.method} ({row.n_cells})" for row in frame.itertuples()])
        how = {"label": "name", "value": value, "low": f"{value}_low", "high": f"{value}_high"}
        bars_with_intervals(named, reference=0.5 if "auc" in value else None, ax=ax, **how)
        ax.set(xlabel=label, xlim=(0, 1))
        if i % 2:
            ax.set_yticklabels([])
    kinds = ", ".join(f"{n} {kind}" for kind, n in rows.groupby("kind", sort=False).case.nunique().items())
    caption = (
        f"Methods on models whose circuit is known: n = {rows.case.nunique()} cases ({kinds}); how many of them each "
        f"method was run on is in brackets, and not every method is run on every case. Seed {listed(rows.seed)}. "
        f"Whiskers: {LEVEL:.0%} bootstrap intervals over cases; dashed: chance."
    )
    return Drawn(frame, axes[0], caption)


def _over_cases(rows: pd.DataFrame, value: str) -> tuple[float, float]:
    """Bounds of a mean over cases; none of fewer than two."""
    known = rows.dropna(subset=[value])
    if known.case.nunique() < 2:
        return nan, nan
    values, drawn = torch.tensor(known[value].astype(float).to_numpy()), torch.Generator().manual_seed(0)
    return bootstrap_interval(values, known.case.to_list(), generator=drawn)[1:]


BOARD_PANELS = {
    "node_auc": "ROC-AUC of nodes, mean over cases",
    "edge_auc": "ROC-AUC of edges, mean over cases",
    "nodes_exact": "share of cases whose nodes are found exactly",
    "edges_exact": "share of cases whose edges are found exactly",
}


# -- bridges ----------------------------------------------------------------------------------------------------------


def rotated_bridges(twins: pd.DataFrame, seed: int) -> Drawn:
    """Bridges between a model and its rotation: worst reconstruction, and causal agreement beside its controls."""
    controls = [name for name in twins.columns if name.startswith("agreement, ") and name != "agreement, bridge"]
    numbers = ("missing_frac", "nmse_worst", "agreement, bridge", "agreement_low", "agreement_high", *controls)
    frame = checked(twins, "bridges_rotated", numbers, ("model", "bridge"))
    frame = frame[["model", "missing_frac", "bridge", *numbers[1:]]].iloc[::-1].reset_index(drop=True)
    left, right = panels(1, 2, width=8.4, height=1.1 + 0.22 * len(frame), sharey=True)
    at = frame.index.to_numpy()
    left.plot(frame.nmse_worst, at, **line_look(0) | {"linestyle": "none", "markersize": 6})
    away = np.abs(frame[["agreement_low", "agreement_high"]].to_numpy().T - frame["agreement, bridge"].to_numpy())
    right.errorbar(frame["agreement, bridge"], at, xerr=away, capsize=2, label="bridge",
                   zorder=3, **line_look(0) | {"linestyle": "none"})  # fmt: skip
    for i, name in enumerate(controls, 1):
        look = line_look(i) | {"linestyle": "none", "markerfacecolor": "none", "markersize": 7}
        right.plot(frame[name], at, label=name.removeprefix("agreement, "), **look)
    labels = [f"{row.model}, {'whole' if not row.missing_frac else f'{row.missing_frac:.0%} missing'}, {row.bridge}"
              for row in frame.itertuples()]  # fmt: skip
    left.set_yticks(at, labels)
    left.set(xscale="log", xlabel="NMSE at the worst site and way")
    right.set(xlabel="causal agreement")
    for ax in (left, right):
        ax.grid(color=FAINT, linewidth=0.5)
    beside(right)
    caption = (
        "Bridges between models and their random rotations, of which the perfect bridge is known: that one, and one "
        "trained from text; whole twins, and twins that lack a share of the channels. Left: normalised squared error "
        "where it is largest. Right: do ablations carried over the bridge change both models alike, beside what costs "
        f"nothing? n = {len(frame)} bridges, seed {seed}. Whiskers: {LEVEL:.0%} bootstrap intervals over templates of "
        "prompts."
    )
    return Drawn(frame, left, caption)


def bridges(rows: pd.DataFrame, said: Mapping[str, Any]) -> Drawn:
    """A bridge on text, site by site both ways, and the ablations that it carries over, each beside its controls."""
    known = checked(rows, "bridges", ("value", "low", "high"), ("part", "where", "bridge", "measure"), gaps=WHISKERS)
    ways = {
        "nmse encode": "NMSE, dense to sparse",
        "nmse decode": "NMSE, sparse to dense",
        "agreement": "causal agreement",
    }
    known = known[known["measure"].isin(ways) & ~known.bridge.str.startswith("bridge less")]
    frame = known[["part", "where", "bridge", "measure", "value", "low", "high"]].reset_index(drop=True)
    checked(frame[frame["measure"] == "agreement"], "bridges (agreement)", ("value",))
    variants = list(dict.fromkeys(frame.bridge))
    sites = list(dict.fromkeys(frame["where"][frame["measure"] != "agreement"]))
    tasks = list(dict.fromkeys(frame["where"][frame["measure"] == "agreement"]))
    axes = panels(1, 3, width=10.0, height=1.6 + 0.34 * max(len(sites), len(tasks)))
    for ax, (measure, label) in zip(axes, ways.items(), strict=True):
        names = tasks if measure == "agreement" else sites
        for i, variant in enumerate(variants):
            part = frame[(frame["measure"] == measure) & (frame.bridge == variant)]
            at = [names.index(where) + 0.1 * (i - len(variants) / 2) for where in part["where"]]
            look = line_look(i) | {"linestyle": "none"}
            ax.errorbar(part.value, at, xerr=away_from(part), capsize=2, elinewidth=1, label=variant, **look)
        ax.set_yticks(range(len(names)), names if ax is not axes[1] else [])
        ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
        ax.set_xscale("linear" if measure == "agreement" else "log")
        ax.grid(axis="x", color=FAINT, linewidth=0.5)
    beside(axes[2])
    caption = (
        "A bridge between the sparse and the dense bundled model. Left and middle: normalised squared error of either "
        f"stream said by the other, at each pair of sites (sparse-dense), on {said['blocks']} held-out blocks. Right: "
        "are logit differences changed alike when a node of the sparse model is ablated and the change is carried "
        f"over? n = {sum(said['nodes'].values())} nodes of {len(said['nodes'])} circuits, {said['pairs_per_task']} "
        f"pairs of prompts of each task; seed {said['seed']}. Whiskers: {LEVEL:.0%} bootstrap intervals, over blocks "
        "on text and over templates of prompts for agreement."
    )
    return Drawn(frame, axes[0], caption)


WHISKERS = ("low", "high")


def away_from(part: pd.DataFrame, value: str = "value") -> np.ndarray:
    """Lengths of whiskers on either side, none where there are no bounds."""
    return np.abs(part[list(WHISKERS)].to_numpy(float).T - part[value].to_numpy(float))


def steering(rows: pd.DataFrame, said: Mapping[str, Any]) -> Drawn:
    """How a dense model's answer changes as it is pushed along a feature of the sparse one, beside other directions."""
    numbers = ("value", "change", "low", "high", "n_prompts", "unit")
    frame = checked(rows, "bridges_steering", numbers, ("example", "node", "direction"), gaps=WHISKERS)
    frame = frame.assign(times=(frame.value / frame.unit).map(lambda times: float(f"{times:.4g}")))
    frame = frame[~frame.direction.str.contains(" less ")]
    frame = frame[["example", "node", "direction", "times", "change", "low", "high", "n_prompts"]]
    examples = list(dict.fromkeys(frame.example))
    n_columns = min(2, len(examples))
    axes = panels(-(-len(examples) // n_columns), n_columns, width=9.0, height=0.8 + 1.25 * len(examples), sharey=True)
    directions = list(dict.fromkeys(frame.direction))
    for ax, example in zip(axes, examples, strict=False):
        here = frame[frame.example == example]
        for i, direction in enumerate(directions):
            part = here[here.direction == direction].sort_values("times")
            ax.errorbar(
                part.times, part.change, yerr=away_from(part, "change"), capsize=2, label=direction, **line_look(i)
            )
        ax.set(title=f"{example}: {here.node.iloc[0]}", xscale="log")
        ax.set_xticks(sorted(set(here.times)), [f"{times:g}" for times in sorted(set(here.times))])
        ax.minorticks_off()
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.grid(color=FAINT, linewidth=0.5)
    for ax in axes[len(examples) :]:
        ax.set_visible(False)
    axes[0].figure.supxlabel("push, multiples of what the feature itself differs by", fontsize=9, color=INK)
    axes[0].figure.supylabel("change of the target's probability", fontsize=9, color=INK)
    beside(axes[n_columns - 1], from_ax=axes[0])
    caption = (
        "The dense bundled model is pushed, at the last position of held-out prompts, along what the bridge makes of "
        "a node of the sparse one; along the difference of means between both kinds of prompts, and along "
        f"{said['random_directions']} random directions, at equal norm. Drawn is by how much the probability of the "
        f"other answer changes. n = {listed(frame.n_prompts)} prompts per example; seed {said['seed']}. Whiskers: "
        f"{LEVEL:.0%} bootstrap intervals over templates of prompts; those of random directions stand for their "
        "distribution."
    )
    return Drawn(frame, axes[0], caption)


# -- models -----------------------------------------------------------------------------------------------------------

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def activations(nodes: pd.DataFrame) -> Drawn:
    """How often nodes are active on text and how strongly, site by site, model beside model."""
    numbers = ("layer", "channel", "active_frac", "rms", "n_blocks", "n_ctx")
    rows = checked(nodes, "activations", numbers, ("model", "site"), gaps=("rms",))
    places = [f"L{layer} {site}" for layer, site in rows[["layer", "site"]].drop_duplicates().itertuples(index=False)]
    rows = rows.assign(place=[f"L{layer} {site}" for layer, site in zip(rows.layer, rows.site, strict=True)])
    frame = quantiles_of(rows, ["model", "place"], ("active_frac", "rms"))
    axes = panels(1, 2, width=9.0, height=1.0 + 0.27 * len(places), sharey=True)
    for ax, value in zip(axes, ("active_frac", "rms"), strict=True):
        ranges(ax, frame[frame.value == value], "place", places)
    axes[0].set_xlabel("share of tokens at which a node is not zero")
    axes[1].set(xscale="log", xlabel="size where it is not zero, root mean square")
    beside(axes[1])
    silent = rows.groupby("model", sort=False).active_frac.agg(lambda share: int((share == 0).sum()))
    never = "; ".join(f"{word(model)} {n:,}" for model, n in silent.items())
    caption = (
        f"Nodes of the bundled models on held-out text ({listed(rows.n_blocks)} blocks of {listed(rows.n_ctx)} "
        f"tokens): how often each is not zero (left), and how large it then is (right). Nodes: {each_model(rows)}; "
        f"never active: {never}. Markers are medians over the nodes of a site, bars go from the {QUANTILES[1]:.0%} to "
        f"the {QUANTILES[3]:.0%} quantile and lines from {QUANTILES[0]:.0%} to {QUANTILES[4]:.0%}: these are "
        "distributions, not intervals, and nothing is drawn at random."
    )
    return Drawn(frame, axes[0], caption)


def weights(sizes: pd.DataFrame, degrees: pd.DataFrame) -> Drawn:
    """How large the weights are that are not zero, and how many of them a neuron or channel has."""
    rows = checked(sizes, "weights", ("size",), ("model", "matrix"))
    units = checked(degrees, "weights", ("degree",), ("model", "unit"))
    matrices = list(rows["matrix"].drop_duplicates())
    spread = quantiles_of(rows, ["model", "matrix"], ("size",))
    sparse = units.groupby("model").degree.median().idxmin()
    steps = []
    for unit, part in units[units.model == sparse].groupby("unit", sort=False):
        at_least = part.degree.value_counts().sort_index()[::-1].cumsum()[::-1] / len(part)
        named = {"model": sparse, "unit": unit, "value": "share with at least so many", "n": len(part)}
        steps += [named | {"degree": int(degree), "share": float(share)} for degree, share in at_least.items()]
    left, right = panels(1, 2, width=9.4, height=1.4 + 0.32 * len(matrices))
    ranges(left, spread, "matrix", matrices)
    left.set(xscale="log", xlabel="size of a weight that is not zero")
    left.legend(frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    for i, (unit, part) in enumerate(pd.DataFrame(steps).groupby("unit", sort=False)):
        right.plot(part.degree, part.share, drawstyle="steps-pre", label=unit, **line_look(i) | {"markevery": 0.12})
    right.set(xscale="log", xlabel=f"weights per unit, {word(sparse)} model")
    right.set_ylabel("share of units with at least so many")
    right.grid(color=FAINT, linewidth=0.5)
    beside(right)
    others = units[units.model != sparse].groupby("unit", sort=False).degree.agg(["min", "max"])
    rest = "; ".join(f"{unit} {row['min']} to {row['max']}" for unit, row in others.iterrows())
    tiny = rows.groupby("model", sort=False)["size"].agg(lambda size: (size < TINY).mean())
    caption = (
        f"Weights of the bundled models that are not zero ({each_model(rows, ', ')}): their size by matrix, layers "
        f"together (left: median, {QUANTILES[1]:.0%} to {QUANTILES[3]:.0%} and {QUANTILES[0]:.0%} to "
        f"{QUANTILES[4]:.0%} of the weights), and how many a neuron or a channel of a block has in the {word(sparse)} "
        f"model (right). In the other one: {rest}. Share of the weights below {TINY:g}: "
        + "; ".join(f"{word(model)} {share:.1%}" for model, share in tiny.items())
        + ". All weights of models that were trained once: there is no interval and no seed but the training's."
    )
    return Drawn(pd.concat([spread, pd.DataFrame(steps)], ignore_index=True), left, caption)


TINY = 1e-6
"""A weight that is smaller is not zero, and as good as zero."""


def quantiles_of(rows: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """A row per group and value with its `QUANTILES`, to four digits, and the number of values."""
    parts = []
    for value in values:
        groups = rows.dropna(subset=[value]).groupby(list(by), sort=False)[value]
        found = groups.quantile(list(QUANTILES)).unstack().map(lambda number: float(f"{number:.4g}"))
        found.columns = [f"q{100 * q:02.0f}" for q in QUANTILES]
        parts.append(found.assign(n=groups.size(), value=value).reset_index())
    return pd.concat(parts, ignore_index=True)


def ranges(ax: Axes, frame: pd.DataFrame, label: str, labels: Sequence[str]) -> None:
    """Median, middle half and middle nine tenths of each group, models beside each other, the first label on top."""
    models = list(frame.model.drop_duplicates())
    for i, model in enumerate(models):
        part = frame[frame.model == model]
        at = [labels.index(name) + 0.26 * (i - (len(models) - 1) / 2) for name in part[label]]
        look = line_look(i)
        ax.hlines(at, part.q05, part.q95, color=look["color"], linewidth=0.9, linestyles=look["linestyle"])
        ax.hlines(at, part.q25, part.q75, color=look["color"], linewidth=3)
        ax.plot(part.q50, at, label=word(model), markeredgecolor=INK, markeredgewidth=0.5,
                **look | {"linestyle": "none", "markersize": 5})  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="x", color=FAINT, linewidth=0.5)


# -- what they share --------------------------------------------------------------------------------------------------


def checked(
    frame: pd.DataFrame, name: str, numbers: Sequence[str], words: Sequence[str] = (), gaps: Sequence[str] = ()
) -> pd.DataFrame:
    """`frame`, if it has rows and these columns, and numbers where numbers belong; those in `gaps` may be missing.

    Raises:
        ConfigError: naming the table, the column and what is wrong with it.
    """
    missing = [column for column in (*numbers, *words) if column not in frame.columns]
    if missing or not len(frame):
        lacks = f"lacks the column(s) {', '.join(missing)}" if missing else "has no rows"
        raise ConfigError(f"the table {name} {lacks}, and a figure is drawn from it; make it again.")
    found = frame.copy()
    for column in numbers:
        values = pd.to_numeric(found[column], errors="coerce").replace([inf, -inf], np.nan)
        broken = values.isna() if column not in gaps else values.isna() & found[column].notna()
        if broken.any():
            raise ConfigError(
                f"the table {name} has {found[column][broken].iloc[0]!r} for {column} in row "
                f"{int(broken.to_numpy().argmax())} and {int(broken.sum()) - 1} more like it, where a number is "
                "expected; make it again."
            )
        found[column] = values
    return found


def word(model: str) -> str:
    """What figures call a model."""
    return MODEL_WORDS.get(model, model)


def each_model(rows: pd.DataFrame, separator: str = "; ") -> str:
    """How many rows each model has, in words."""
    return separator.join(f"{word(model)} {n:,}" for model, n in rows.groupby("model", sort=False).size().items())


def listed(values: pd.Series) -> str:
    """The different values of a column in words: `512`, `6 and 8`, or `6 to 8` of more."""
    known = sorted(values.dropna().unique())
    said = [f"{int(v):,}" if isinstance(v, int | float | np.number) and v == int(v) else str(v) for v in known]
    if len(said) <= 2:
        return " and ".join(said)
    return ", ".join(said[:-1]) + f" and {said[-1]}" if len(said) == 3 else f"{said[0]} to {said[-1]}"


def beside(ax: Axes, from_ax: Axes | None = None) -> None:
    """A legend to the right of `ax`, of what is drawn there or on another."""
    handles = (from_ax or ax).get_legend_handles_labels()
    ax.legend(*handles, frameon=False, labelcolor=INK, bbox_to_anchor=(1.01, 1), loc="upper left")
