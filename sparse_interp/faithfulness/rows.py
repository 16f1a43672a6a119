"""The tests of an audit beyond sufficiency, necessity and agreement: what each is about, and the rows that it makes.

A test is a function of a sheet. One that cannot be run makes a row that says so, with the reason that the library gave;
one that belongs to another level makes a row that says which.
"""

from collections.abc import Callable
from math import nan
from typing import NamedTuple

from sparse_interp.errors import ConfigError, SparseInterpError
from sparse_interp.faithfulness.audit_table import not_run
from sparse_interp.faithfulness.completeness import completeness
from sparse_interp.faithfulness.curves import size_curve
from sparse_interp.faithfulness.exchange import exchange_between_prompts, exchange_between_runs
from sparse_interp.faithfulness.inside import agreement_inside
from sparse_interp.faithfulness.minimality import minimality
from sparse_interp.faithfulness.partial import partial_ablation
from sparse_interp.faithfulness.robustness import robustness_grid
from sparse_interp.faithfulness.scores import groups_of, some_pairs
from sparse_interp.faithfulness.scrubbing import scrub
from sparse_interp.faithfulness.sheet import ABOVE_FOIL, ANSWER_OR_FOIL, KL, VOCABULARY, Sheet
from sparse_interp.faithfulness.thresholds import MINIMAL, WORST
from sparse_interp.results import Interval
from sparse_interp.tasks.task import TaskBatch

QUICK, FULL = "quick", "full"

LEVELS = (QUICK, FULL)
"""How much an audit does. `quick` prunes nothing anew."""

INTERCHANGE = "interchange"

ATTACKED = 32
"""Pairs on which an adversary looks for the worst share of the outside: every step of it is a run with gradients."""


CURVED = 64
"""Pairs on which circuits of all sizes run."""


class Test(NamedTuple):
    """One test of an audit."""

    about: str
    measure: str
    condition: str
    what: str
    """What is done, in words, for when it is not."""
    run: Callable[[Sheet], None]
    decides: bool = False
    """Whether the verdict needs it."""
    level: str = QUICK
    """The level from which on it is run."""


def add_tests(sheet: Sheet, level: str, progress: Callable[[str], None]) -> None:
    """The rows of every test, run or not; `progress` is told what is run next."""
    for test in TESTS:
        named = (test.about, test.measure, test.condition, sheet.split)
        if LEVELS.index(test.level) > LEVELS.index(level):
            why = f"{test.what}; a {level} audit leaves it out"
            sheet.rows.append(not_run(*named, why))
            continue
        progress(test.about)
        try:
            test.run(sheet)
        except SparseInterpError as error:
            sheet.rows.append(not_run(*named, str(error), decides=test.decides))


def _some(sheet: Sheet, n: int) -> tuple[TaskBatch, tuple[int, int]]:
    """Some of a sheet's pairs, and how many prompts and templates (or pairs) they are."""
    pairs = some_pairs(sheet.pairs, n, generator=sheet.generator)
    return pairs, (2 * len(pairs), len(set(groups_of(pairs.both_sides()))))


def _partial(sheet: Sheet) -> None:
    pairs, on = _some(sheet, ATTACKED)
    table = partial_ablation(sheet.model, sheet.circuit, pairs, generator=sheet.generator)
    sheet.details["partial ablation"] = table.frame
    outcomes = {"stochastic": ("expected", table.expected), "adversarial": ("worst", table.worst)}
    for scheme, (word, found) in outcomes.items():
        worst = scheme == "adversarial"
        given = {"scheme": scheme, "on": on}
        judged = (sheet.bounds.worst_kl(found.kl), sheet.bounds.worst_loss(found.loss_gap)) if worst else (None, None)
        sheet.add(WORST, f"{word} {KL}", "circuit", found.kl, "nats", VOCABULARY, judged[0], **given)
        gap = f"{word} task loss gap", "circuit - model", found.loss_gap, "nats", ANSWER_OR_FOIL
        sheet.add(WORST, *gap, judged[1], **given)
        sheet.add(WORST, f"{word} accuracy", "circuit", found.accuracy, "share", ABOVE_FOIL, **given)
        same = f"{word} argmax agreement with model", "circuit", found.agreement, "share", VOCABULARY
        sheet.add(WORST, *same, **given)


def _minimality(sheet: Sheet) -> None:
    table = minimality(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator, progress=False)
    sheet.details["minimality"] = table.frame
    on = (table.n_prompts, table.n_groups)
    for kind in table.kinds:
        share, n = table.not_told_frac(kind), int((table.frame.kind == kind).sum())
        judged = sheet.bounds.idle(share.mean, n, kind)
        idle = table.not_told(kind)
        named = ", ".join(idle[:5]) + ", ..." * (len(idle) > 5)
        sheet.add(
            MINIMAL,
            f"{kind}s that are not told from random extra ones",
            "circuit",
            share,
            "share",
            f"growth of {KL} in a knock-out, {table.n_draws[kind]:,} draws, Holm-adjusted",
            judged,
            on=on,
            direction=f"all but the circuit and one {kind} ablated",
            note=f"those that do least: {named}" if idle else "",
        )


def _inside(sheet: Sheet) -> None:
    table = agreement_inside(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator)
    sheet.details["activations inside"], sheet.details["patterns inside"] = table.frame, table.heads.frame
    about = "agreement inside"
    error = "squared, as a share of both runs' squares; 0 the same, 1 unrelated"
    sheet.add(about, "error of kept activations", "circuit", table.activations, "share", error)
    sheet.add(about, "distance of attention patterns", "circuit", table.patterns, "share", "total variation")
    lost = "average over their keys in the circuit and choose among them in the model"
    sheet.add(about, "queries that lost what they look for", "circuit", table.evened, "share", lost)


def _between_prompts(sheet: Sheet) -> None:
    table = exchange_between_prompts(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator)
    sheet.details["exchange between prompts"] = table.frame
    given = {
        "on": (int(table.frame.n_prompts.max()), None),
        "baseline": "the pair's other prompt",
        "scheme": "one node",
    }
    given["direction"] = "noising, in the circuit and in the model"
    metric = "change of the logit difference, over nodes and prompts"
    found = {"correlation": table.correlation, "same sign": table.same_sign, "size beside the model's": table.size}
    for name, value in found.items():
        unit = "Pearson r" if name == "correlation" else "share"
        sheet.add(INTERCHANGE, f"effects between prompts: {name}", "circuit, model", value, unit, metric, **given)


def _between_runs(sheet: Sheet) -> None:
    table = exchange_between_runs(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator)
    sheet.details["exchange between runs"] = table.frame
    on = (int(table.frame.n_prompts.max()), None)
    ways = {
        "circuit": ("the model's value in the circuit", table.circuit_kl, table.circuit_loss),
        "model": ("the circuit's value in the model", table.model_kl, table.model_loss),
    }
    for name, (what, kl, loss) in ways.items():
        given = {"on": on, "baseline": "the other run", "scheme": "one node", "direction": what}
        sheet.add(INTERCHANGE, "change of KL, mean over nodes", f"{name}, one node", kl, "nats", VOCABULARY, **given)
        change = "change of task loss, mean over nodes", f"{name}, one node", loss, "nats", ANSWER_OR_FOIL
        sheet.add(INTERCHANGE, *change, **given)


def _completeness(sheet: Sheet) -> None:
    table = completeness(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator, progress=False)
    sheet.details["completeness"] = table.frame
    metric = f"growth of a knock-out's {KL} once the circuit is removed"
    how = {"on": (table.n_prompts, None), "direction": "one node ablated, with the circuit and without it"}
    names = table.backups
    named = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    note = f"of {len(table)} candidates outside{': ' * bool(names)}{named}"
    sheet.add("completeness", "backups", "outside", count(float(len(names))), "nodes", metric, note=note, **how)
    sheet.add("completeness", "largest growth", "outside", table.largest, "nats", metric, **how)


def _curve(sheet: Sheet) -> None:
    pairs, on = _some(sheet, CURVED)
    table = size_curve(sheet.model, sheet.circuit, pairs, generator=sheet.generator, progress=False)
    sheet.details["sizes"] = table.frame
    metric = "mean logit difference between nothing and model; trapezoids over the share of nodes"
    for name, area in {"CPR": table.cpr, "CMD": table.cmd}.items():
        sheet.add("sizes", name, "circuits of 0.1 to 100 % of the nodes", area, "area", metric, on=on)


def _robustness(sheet: Sheet) -> None:
    grid = robustness_grid(sheet.model, sheet.circuit, sheet.pairs, generator=sheet.generator, progress=False)
    sheet.details["robustness"] = grid.frame
    n_ways = len(grid.frame[["baseline", "positions"]].drop_duplicates())
    for row in grid.spread.frame.itertuples():
        far = row.unit == "nats"  # of divergences and losses the highest is the worst, of shares the lowest
        found = grid.highest(row.metric) if far else count(row.lowest)
        note = f"{row.lowest:.3g} to {row.highest:.3g} over {n_ways} ways; {row.own:.3g} by the circuit's own"
        given = {"on": (grid.n_prompts, None), "baseline": f"the worst of {n_ways}", "note": note}
        measure = f"{'highest' if far else 'lowest'} {row.metric}"
        sheet.add("robustness", measure, "circuit", found, row.unit, row.metric, **given)


def _scrubbing(sheet: Sheet) -> None:
    if not sheet.hypothesis:
        raise ConfigError("no hypothesis was given; pass {node: function of the prompt} to put one to the test")
    pairs, on = _some(sheet, CURVED)
    how = {"generator": sheet.generator, "progress": False}
    table = scrub(sheet.model, sheet.circuit, sheet.hypothesis, pairs, **how)
    sheet.details["scrubbing"], sheet.details["claims"] = table.frame, table.nodes.frame
    given = {"on": on, "baseline": "values of other prompts", "scheme": "resampled by meaning"}
    metric = f"task loss beside that of shuffled prompts, {table.n_draws} draws"
    sheet.add("hypothesis", "loss recovered", "circuit", table.recovered, "share", metric, **given)


def count(value: float) -> Interval:
    """A number that has no interval."""
    return Interval(value, nan, nan)


TESTS: tuple[Test, ...] = (
    Test(
        WORST,
        f"worst {KL}",
        "circuit",
        "stochastic and adversarial ablation of the outside",
        _partial,
        decides=True,
    ),
    Test(
        MINIMAL,
        "nodes that are not told from random extra ones",
        "circuit",
        "each node's knock-out against that of random extra ones",
        _minimality,
        decides=True,
    ),
    Test(
        "agreement inside",
        "error of kept activations",
        "circuit",
        "activations of kept nodes and patterns of kept heads in both runs",
        _inside,
    ),
    Test(
        INTERCHANGE,
        "effects between prompts",
        "circuit, model",
        "each kept node exchanged between prompts",
        _between_prompts,
        level=FULL,
    ),
    Test(
        INTERCHANGE,
        "change of KL",
        "one node",
        "each kept node's value exchanged between circuit and model",
        _between_runs,
        level=FULL,
    ),
    Test(
        "sizes", "CPR and CMD", "circuits of all sizes", "the first nodes of the circuit's ranking at ten sizes", _curve
    ),
    Test(
        "completeness",
        "backups",
        "outside",
        "nodes outside whose effect grows once the circuit is removed",
        _completeness,
        level=FULL,
    ),
    Test(
        "robustness",
        "spread of scores",
        "circuit",
        "the circuit's scores by every baseline, at all positions and at some",
        _robustness,
        level=FULL,
    ),
    Test("hypothesis", "loss recovered", "circuit", "causal scrubbing of what nodes are said to mean", _scrubbing),
)
"""In the order of the table."""
