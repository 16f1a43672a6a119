"""Exchange: does each kept node do in the circuit what it does in the model?

    between prompts     a node holds what it holds on the pair's other prompt, once in the circuit's run and once in the
                        model's; compared is what that does to the logit difference of answer and foil
    between runs        a node of the circuit's run holds what it holds in the model's, or the other way round; measured
                        is what that does to KL(model || run) and to the task loss

    error(node)  =  sum (c - m)^2 / sum (c^2 + m^2)     c, m: effect in the circuit, in the model, prompt by prompt
                    0: the same; 1: unrelated, or gone in one of the two; 2: opposite

A circuit that computes what its model computes answers to each of its nodes as the model does (interchange
interventions: Geiger et al. 2021, arXiv:2106.02997, here with nodes that need no alignment), and its nodes may change
places with the model's own (Drori, February 2026, *Weight-sparse circuits may be interpretable yet unfaithful*). Every
node is exchanged alone and at all positions that can reach the answer; the model runs once for each node and prompt, so
that some prompts have to do (`n_prompts`, a few of each template).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.scores import CONSTANT, groups_of, mean_of, of_means, pearson, some_pairs
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.interventions.interchange import Each, interchange_each
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import Node
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, answer_loss, kl_divergence, logit_difference

NODE = ("layer", "site", "channel")


@dataclass(frozen=True, eq=False)
class PromptExchangeTable(Table):
    """One row per kept node: what it does to the logit difference, in logits, to hold what the other prompt gives it.

    `layer`, `site`, `channel`; `model_effect` and `circuit_effect`, means over prompts; `model_rms` and `circuit_rms`;
    `error` and `correlation` of the two over prompts, not a number where nothing happens, or where one of the two is
    the same on all prompts; `n_prompts`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        *NODE,
        "model_effect",
        "circuit_effect",
        "model_rms",
        "circuit_rms",
        "error",
        "correlation",
        "n_prompts",
    )

    correlation: Interval
    """Pearson correlation of the effects in circuit and model, over all nodes and prompts."""

    same_sign: Interval
    """Share of the effects in the model, by their size, that have the same sign in the circuit."""

    size: Interval
    """Root mean square of the effects in the circuit, as a share of those in the model."""

    def plot(self, ax: Axes | None = None, *, n: int = 30) -> Axes:
        """The `n` nodes that do most, in the model and in the circuit."""
        first = self.frame.loc[self.frame.model_rms.nlargest(n).index]
        rows = [
            (_named(row), of, getattr(row, f"{of}_rms")) for row in first.itertuples() for of in ("model", "circuit")
        ]
        frame = pd.DataFrame(rows, columns=["node", "run", "effect_rms"]).assign(low=float("nan"))
        return bars_with_intervals(frame, label="node", value="effect_rms", low="low", high="low", by="run", ax=ax)


@dataclass(frozen=True, eq=False)
class RunExchangeTable(Table):
    """One row per kept node, means over prompts, nats.

    `layer`, `site`, `channel`; into the circuit, what the model's value there changes: `circuit_kl` and `circuit_loss`
    (below 0: it brings the circuit nearer to its model); into the model, what the circuit's value changes: `model_kl`
    and `model_loss`; `n_prompts`.
    """

    columns: ClassVar[tuple[str, ...]] = (*NODE, "circuit_kl", "circuit_loss", "model_kl", "model_loss", "n_prompts")

    circuit_kl: Interval
    """Change of KL(model || circuit) by one node that holds the model's value, mean over nodes, nats."""

    circuit_loss: Interval
    """Change of the circuit's task loss by the same, nats."""

    model_kl: Interval
    """KL(model || model with one node that holds the circuit's value), mean over nodes, nats; 0 is agreement."""

    model_loss: Interval
    """Change of the model's task loss by the same, nats."""

    def plot(self, ax: Axes | None = None, *, n: int = 30) -> Axes:
        """The `n` nodes whose values in the circuit do most harm in the model."""
        first = self.frame.loc[self.frame.model_kl.nlargest(n).index]
        frame = first.assign(node=[_named(row) for row in first.itertuples()], low=float("nan"))
        return bars_with_intervals(frame, label="node", value="model_kl", low="low", high="low", by="site", ax=ax)


def exchange_between_prompts(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    n_prompts: int = 32,
    generator: torch.Generator,
    progress: bool = False,
) -> PromptExchangeTable:
    """Give each kept node its value on the pair's other prompt, in the circuit and in the model, and compare.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit; one that keeps nodes at some positions is compared there.
        pairs: prompts with their twins; both sides are used.
        n_prompts: prompts that nodes are exchanged on, both sides of half as many pairs, evenly from the templates.
        generator: draws pairs and intervals.
        progress: whether to show progress bars.

    Raises:
        CircuitError: if the circuit belongs to other weights.
        ConfigError: for fewer than two prompts.
    """
    circuit.check_model(model)
    batch = _drawn(pairs, n_prompts, generator)

    def read(logits: AnswerLogits, rows: Int[Tensor, " row"]) -> Float[Tensor, "row 1"]:
        return logit_difference(logits, batch.rows(rows))[:, None]

    as_circuit = {"running": circuit.running, "source_running": circuit.running}
    runs = [interchange_each(model, batch, circuit.inside, read, progress=progress, **as_) for as_ in (as_circuit, {})]
    c, m = (_effects(run)[..., 0] for run in runs)
    moments = torch.stack([c, m, c * c, m * m, c * m], -1)
    means = moments.mean(1)
    x, y, cc, mm, cm = means.unbind(-1)
    moves = (cc + mm).sqrt() > CONSTANT
    varies = torch.minimum(cc - x * x, mm - y * y).clamp(min=0).sqrt() > CONSTANT
    frame = _nodes(runs[0]).assign(
        model_effect=y.tolist(),
        circuit_effect=x.tolist(),
        model_rms=mm.sqrt().tolist(),
        circuit_rms=cc.sqrt().tolist(),
        error=torch.where(moves, (cc + mm - 2 * cm) / (cc + mm), torch.nan).tolist(),
        correlation=torch.where(varies, pearson(means), torch.nan).tolist(),
        n_prompts=len(batch),
    )
    groups, over_nodes = groups_of(batch), moments.mean(0)
    signs = torch.stack([m.abs() * (c.sign() == m.sign()) * (c.abs() > CONSTANT), m.abs()], -1).mean(0)
    return PromptExchangeTable(
        frame,
        correlation=of_means(over_nodes, pearson, groups, generator),
        same_sign=of_means(signs, lambda means: means[:, 0] / means[:, 1], groups, generator),
        size=of_means(over_nodes, lambda means: (means[:, 2] / means[:, 3]).sqrt(), groups, generator),
    )


def exchange_between_runs(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    n_prompts: int = 32,
    generator: torch.Generator,
    progress: bool = False,
) -> RunExchangeTable:
    """Give each kept node of the circuit's run its value in the model's run, and the other way round.

    Args and errors are those of `exchange_between_prompts`.
    """
    circuit.check_model(model)
    model, batch = hooked(model), _drawn(pairs, n_prompts, generator)
    with evaluating(model):
        reference = all_answer_logits(model, batch).double()

    def read(logits: AnswerLogits, rows: Int[Tensor, " row"]) -> Float[Tensor, "row 2"]:
        here, logits = batch.rows(rows), logits.double()
        return torch.stack([kl_divergence(reference[rows], logits, here), answer_loss(logits, here)], 1)

    into = {"circuit": {"running": circuit.running}, "model": {"source_running": circuit.running}}
    runs = {
        name: interchange_each(model, batch, circuit.inside, read, source=batch, progress=progress, **as_)
        for name, as_ in into.items()
    }
    columns, intervals, groups = {}, {}, groups_of(batch)
    for name, run in runs.items():
        for measure, effects in zip(("kl", "loss"), _effects(run).unbind(-1), strict=True):
            columns[f"{name}_{measure}"] = effects.mean(1).tolist()
            intervals[f"{name}_{measure}"] = mean_of(effects.mean(0), groups, generator)
    return RunExchangeTable(_nodes(runs["model"]).assign(**columns, n_prompts=len(batch)), **intervals)


def _drawn(pairs: TaskBatch, n_prompts: int, generator: torch.Generator) -> TaskBatch:
    if n_prompts < 2:
        raise ConfigError(f"n_prompts={n_prompts}; an exchange needs both prompts of at least one pair: 2 or more.")
    return some_pairs(pairs, n_prompts // 2, generator=generator).both_sides()


def _effects(run: Each) -> Float[Tensor, "node prompt number"]:
    return run.exchanged - run.base


def _nodes(run: Each) -> pd.DataFrame:
    return pd.DataFrame(list(run.nodes), columns=list(NODE))


def _named(row: Any) -> str:
    return str(Node(row.layer, row.site, row.channel))
