"""Curves: what circuits of every size restore, from a thousandth of the nodes to all of them.

    f(k)  =  (m(C_k) - m(nothing)) / (m(model) - m(nothing))        m = mean logit difference of answer and foil
    CPR   =  area under f          how much small circuits do; above 1 they do more than their model
    CMD   =  area of |1 - f|       how far they are from their model, either way; 0 for one that is found at every size

C_k keeps the first k nodes of a ranking, k from 0.1 to 100 % of all; areas are trapezoids over the share of nodes, as
in MIB's circuit track (Mueller et al. 2025, arXiv:2504.13151). CPR alone rewards circuits that beat their model, so
neither is given without the other.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.axes import PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.scores import CONSTANT, groups_of, of_means
from sparse_interp.interventions.ablation import Ablation, Masks
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, NodeAt, Place, masks, masks_at
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, lines
from sparse_interp.tasks.task import TaskBatch, logit_difference

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all nodes at which the curve is measured."""


@dataclass(frozen=True, eq=False)
class SizeCurve(Table):
    """One row per size.

    `size_frac` and `n_nodes` kept; `logit_difference`, its mean over prompts, in logits; `faithfulness` with its
    interval `low` to `high` over templates (95 %).
    """

    columns: ClassVar[tuple[str, ...]] = ("size_frac", "n_nodes", "logit_difference", "faithfulness", "low", "high")

    cpr: Interval
    """Area under faithfulness; above what a curve that is 1 everywhere has, small circuits beat their model."""

    cmd: Interval
    """Area of |1 - faithfulness|."""

    n_prompts: int
    """Prompts that every number is a mean over, both sides of pairs."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Faithfulness against the share of nodes, which grows by factors."""
        ax = lines(self.frame, x="size_frac", y="faithfulness", ax=ax)
        ax.set_xscale("log")
        return ax


@torch.no_grad()
def size_curve(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    ranking: Sequence[Node] | Sequence[NodeAt] | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> SizeCurve:
    """What the first nodes of a ranking restore, at every size.

    Nodes outside hold the circuit's baseline. Weights between the circuit's nodes that were cut stay so at sizes up to
    its own; larger ones have all weights. Where a circuit keeps nodes at positions, a node at each position is one.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit: what is held at what, and the ranking if none is given.
        pairs: prompts with their twins.
        ranking: nodes, the first that are kept first; nodes of the circuit's sites that are missing come last, in a
            random order. None takes `ranked(circuit)`.
        generator: draws the order of what no ranking tells apart, and resamples.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to other weights, or keeps nodes at positions of prompts of another length.
        ConfigError: if a node comes twice in the ranking.
    """
    circuit.check_lengths(pairs)
    circuit.check_model(model)
    model, batch = hooked(model), pairs.both_sides()
    order = _completed(circuit, ranked(circuit) if ranking is None else list(ranking), generator)
    sizes = [round(frac * len(order)) for frac in SIZES]
    with evaluating(model):
        own = logit_difference(all_answer_logits(model, batch), batch).double().cpu()
    runs = tqdm([*sizes, 0], disable=not progress, desc="sizes", unit="run")
    found = [_run(model, circuit, order[:n], batch) for n in runs]
    columns = torch.stack([*found, own], 1)
    groups = groups_of(batch)

    def shares(means: Float[Tensor, "draw column"]) -> Float[Tensor, "draw size"]:
        nothing, whole = means[:, -2:-1], means[:, -1:]
        return (means[:, :-2] - nothing) / (whole - nothing)

    def interval(of_shares: int | str) -> Interval:
        if abs(columns[:, -1].mean() - columns[:, -2].mean()) < CONSTANT:
            return Interval(nan, nan, nan)
        if isinstance(of_shares, int):
            return of_means(columns, lambda means: shares(means)[:, of_shares], groups, generator)
        which = ("cpr", "cmd").index(of_shares)
        return of_means(columns, lambda means: areas(SIZES, shares(means))[which], groups, generator)

    rows = [
        (frac, n, float(values.mean()), *interval(i))
        for i, (frac, n, values) in enumerate(zip(SIZES, sizes, found, strict=False))
    ]
    frame = pd.DataFrame(rows, columns=list(SizeCurve.columns))
    return SizeCurve(frame, interval("cpr"), interval("cmd"), len(batch))


def areas(
    sizes: Sequence[float], faithfulness: Float[Tensor, "*draw size"]
) -> tuple[Float[Tensor, "*draw"], Float[Tensor, "*draw"]]:
    """CPR and CMD of curves: trapezoids under faithfulness, and under its distance from 1, over the sizes."""
    at = torch.tensor(sizes, dtype=faithfulness.dtype)
    return torch.trapezoid(faithfulness, at, dim=-1), torch.trapezoid((1 - faithfulness).abs(), at, dim=-1)


def ranked(circuit: Circuit) -> list[Node] | list[NodeAt]:
    """A circuit's nodes, the most important first, and behind them those outside in the order that a search left.

    Without importance or search, nodes come as the circuit lists them; positions of a node, which neither tells apart,
    as they follow each other.
    """
    frame = circuit.nodes.sort_values("importance_nats", ascending=False, kind="stable", na_position="last")
    rows = frame[["layer", "site", "channel"]].itertuples(index=False)
    rank = {Node(int(layer), str(site), int(channel)): i for i, (layer, site, channel) in enumerate(rows)}
    first = sorted(sorted(circuit.members), key=lambda member: rank[Node(*member[:3])])
    if circuit.tau is None:
        return first
    tau = circuit.tau
    gated = [member for member in circuit.outside if Place(member.layer, member.site) in tau.values]
    return [*first, *sorted(gated, key=lambda member: tau.of(Node(*member[:3])), reverse=True)]


def _completed(
    circuit: Circuit, ranking: list[Node] | list[NodeAt], generator: torch.Generator
) -> list[Node] | list[NodeAt]:
    """The ranking, and behind it every other node that can be held, in a random order."""
    known = set(ranking)
    if len(known) < len(ranking):
        raise ConfigError(f"the ranking of {len(ranking)} nodes has only {len(known)} different ones.")
    rest = sorted(member for member in {*circuit.members, *circuit.outside} - known if member.site in circuit.sites)
    drawn = torch.randperm(len(rest), generator=generator, device=generator.device).tolist()
    return [*(member for member in ranking if member.site in circuit.sites), *(rest[i] for i in drawn)]


def _run(model: HookedModel, circuit: Circuit, nodes: Sequence[Node] | Sequence[NodeAt], batch: TaskBatch) -> PerPrompt:
    """Logit differences of the circuit of `nodes`."""
    cfg, n_pos, sites = model.cfg, circuit.n_pos, circuit.sites
    inside = masks(nodes, cfg, sites) if n_pos is None else masks_at(nodes, cfg, n_pos, sites)
    kept: Masks = {p: m if p.site in circuit.sites else torch.ones_like(m) for p, m in inside.items()}

    def within(model: AnyModel) -> AbstractContextManager[AnyModel]:
        return circuit.cutting(model) if len(nodes) <= len(circuit.members) else nullcontext(model)

    logits = Ablation.full(circuit.baseline).answer_logits(model, kept, batch, within=within)[0]
    return logit_difference(logits, batch).double().cpu()
