"""Agreement inside: do the kept nodes hold, and the kept heads look, as they do in the model on the same prompts?

    error(node)      =  sum (c - m)^2 / sum ((c - b)^2 + (m - b)^2)      c: in the circuit's run, m: in the model's,
                        0: the same; 1: unrelated, or gone; 2: opposite     b: the node's baseline
    distance(head)   =  1/2 sum over keys, and the sink, |p_circuit - p_model|          mean over queries
    evened(head)     =  share of queries that choose among their keys in the model and average over them in the circuit

A circuit may come to the model's answers by another way: with nodes in roles that they do not have in the model, or
with heads that look everywhere alike where the model's look for something (Drori, February 2026, *Weight-sparse
circuits may be interpretable yet unfaithful*). Then its answers agree and its insides do not.

Compared is what an answer can hang on: all positions of a prompt, and in the last block, past its keys and values, the
answer position alone. Every prompt weighs as much as any other, however long it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Pattern, PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.looking import ANSWER, EVERY, evenness, looks
from sparse_interp.faithfulness.scores import groups_of, mean_of, pearson
from sparse_interp.interventions.baselines import values_on
from sparse_interp.interventions.sweeps import reaching
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import PATTERN_HOOK, Place, V, queries_of
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch

AT_ONCE = 128
"""Prompts per forward pass."""

NEARLY_EVEN = 0.9
"""Share of the keys it sees, by the exponential of its entropy, to which a query attends that averages over them."""

STILL = 1e-5
"""How far from its baseline, as a share of it, a node has to be somewhere so that it says anything."""


@dataclass(frozen=True, eq=False)
class InsideTable(Table):
    """One row per kept node.

    `layer`, `site`, `channel`; `model_rms` and `circuit_rms`, how far from its baseline it is in each run; `error` and
    `correlation` of the two, over prompts and positions, not a number for a node that never leaves its baseline, or for
    one that is constant; `n_prompts`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "layer",
        "site",
        "channel",
        "model_rms",
        "circuit_rms",
        "error",
        "correlation",
        "n_prompts",
    )

    heads: Table
    """One row per head that carries a kept v node: `layer`, `head`, `distance` (total variation), `model_even` and
    `circuit_even` (share of queries that average over their keys in each run), `evened`, `n_prompts`."""

    activations: Interval
    """Mean error of the nodes that move at all; 0 is agreement. Not a number where none does."""

    patterns: Interval
    """Mean distance of the heads' patterns, 0 to 1. Not a number without heads."""

    evened: Interval
    """Mean share of queries that lost what they look for. Not a number without heads."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean error of the nodes of each site, layer by layer."""
        frame = self.frame.dropna(subset="error").groupby(["layer", "site"], sort=False).error.mean().reset_index()
        frame = frame.assign(place="L" + frame.layer.astype(str) + "." + frame.site, low=np.nan)
        return bars_with_intervals(frame, label="place", value="error", low="low", high="low", by="site", ax=ax)


@torch.no_grad()
def agreement_inside(model: AnyModel, circuit: Circuit, pairs: TaskBatch, *, generator: torch.Generator) -> InsideTable:
    """Compare what kept nodes hold, and where kept heads look, in the circuit's run and in the model's.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit; one that keeps nodes at some positions is compared there.
        pairs: prompts with their twins; both sides are used.
        generator: draws intervals.

    Raises:
        CircuitError: if the circuit belongs to other weights.
    """
    circuit.check_model(model)
    model, batch = hooked(model), pairs.both_sides()
    batch = batch.to(model.embed.W_E.device)
    order = batch.lengths.cpu().argsort(stable=True)
    nodes, heads = [], []
    with evaluating(model):
        for rows in order.split(AT_ONCE):
            of_nodes, of_heads = _compared(model, circuit, batch.rows(rows))
            nodes.append(of_nodes)
            heads.append(of_heads)
    back, groups = order.argsort(), groups_of(batch)
    return _table(circuit, model.cfg, torch.cat(nodes)[back], torch.cat(heads)[back], groups, generator)


Moments = Float[Tensor, "prompt node 5"]
"""Means over a prompt's positions of c, m, c c, m m and c m, measured from the baseline."""

Looked = Float[Tensor, "prompt head 4"]
"""Means over a prompt's queries: distance, even in the model, even in the circuit, evened."""


def _compared(model: HookedModel, circuit: Circuit, batch: TaskBatch) -> tuple[Moments, Looked]:
    """What the two runs have in common on some prompts, node by node and head by head."""
    longest = int(batch.lengths.max())
    batch = replace(batch, clean=batch.clean[:, :longest], corrupt=batch.corrupt[:, :longest])
    places, heads = _kept_places(circuit), kept_heads(circuit, model.cfg)
    own, own_patterns = _recorded(model, batch, heads)
    with circuit.running(model):
        run, run_patterns = _recorded(model, batch, heads)
    moments = [torch.zeros(len(batch), 0, 5, dtype=torch.float64)]
    for place, kept in places.items():
        channels = kept.any(0).nonzero()[:, 0].to(own[place].device)
        baseline = circuit.baseline[place].to(own[place].device)[channels].double()
        asked = reaching(batch, place, model.cfg)[..., None] & kept[:, channels.cpu()].to(own[place].device)
        c, m = ((values[place][..., channels].double() - baseline) * asked for values in (run, own))
        n = asked.sum(1).clamp(min=1)
        moments.append(torch.stack([x.sum(1) / n for x in (c, m, c * c, m * m, c * m)], -1).cpu())
    looked = [torch.zeros(len(batch), 0, 4, dtype=torch.float64)]
    for layer, of_layer in heads.items():
        seen = looks(batch, EVERY if layer < model.cfg.n_layers - 1 else ANSWER, model.cfg.attention_dir).seen
        looked.append(_looked(run_patterns[layer][:, of_layer], own_patterns[layer][:, of_layer], seen[:, None]))
    return torch.cat(moments, 1), torch.cat(looked, 1)


def _kept_places(circuit: Circuit) -> dict[Place, Bool[Tensor, "pos width"]]:
    """The places that have nodes, and which, at which positions: one row where it is the same at all of them."""
    inside = {place: mask if mask.ndim == 2 else mask[None] for place, mask in circuit.inside.items()}
    return {place: mask for place, mask in inside.items() if bool(mask.any())}


def kept_heads(circuit: Circuit, cfg: AnyShape) -> dict[int, list[int]]:
    """By layer the heads of which a v node is computed: those whose patterns make a difference."""
    found = {}
    for place, mask in circuit.kept.items():
        if place.site == V.name:
            channels = mask.reshape(-1, mask.shape[-1]).any(0).nonzero()[:, 0].tolist()
            heads = {query // cfg.d_head for channel in channels for query in queries_of(cfg, channel)}
            found |= {place.layer: sorted(heads)} if heads else {}
    return found


def _recorded(
    model: HookedModel, batch: TaskBatch, heads: dict[int, list[int]]
) -> tuple[dict[Place, Float[Tensor, "batch pos width"]], dict[int, Pattern]]:
    """What nodes hold and where heads look, as wide as the batch."""
    patterns: dict[int, Pattern] = {}
    hooks: FwdHooks = [(PATTERN_HOOK.format(layer=layer), partial(_note, patterns, layer)) for layer in heads]
    with model.hooks(fwd_hooks=hooks):
        values = values_on(model, batch, batch.clean.shape[1])
    return values, patterns


def _note(seen: dict[int, Tensor], layer: int, pattern: Tensor, hook: HookPoint) -> None:
    seen[layer] = pattern


def _looked(circuit: Pattern, model: Pattern, seen: Bool[Tensor, "batch 1 query key"]) -> Looked:
    """How two runs of some heads look, query by query, and the means over the queries of each prompt."""
    seen = seen.to(model.device)
    c, m = ((pattern.double() * seen) for pattern in (circuit, model))
    distance = ((c - m).abs().sum(-1) + (c.sum(-1) - m.sum(-1)).abs()) / 2  # what a row lacks went to the sink
    even = [evenness(pattern, seen) >= NEARLY_EVEN for pattern in (m, c)]
    found = torch.stack([distance, even[0].double(), even[1].double(), (even[1] & ~even[0]).double()], -1)
    asked = seen.any(-1)[..., None]
    return ((found * asked).sum(2) / asked.sum(2).clamp(min=1)).cpu()


def _table(
    circuit: Circuit, cfg: AnyShape, nodes: Moments, heads: Looked, groups: list[int], generator: torch.Generator
) -> InsideTable:
    names = list(_names(circuit))
    means = nodes.mean(0)
    _, _, cc, mm, cm = means.unbind(-1)
    scale = torch.tensor([circuit.baseline[place][channel] for place, channel in names]).double().abs()
    moves = (cc + mm).sqrt() > STILL * scale
    total = (cc + mm).where(moves, torch.full_like(cc, torch.nan))
    spread = (means[:, 2:4] - means[:, :2] ** 2).clamp(min=0).sqrt()
    varies = (spread > STILL * scale[:, None].clamp(min=1e-30)).all(1) & moves
    frame = pd.DataFrame(
        {
            "layer": [place.layer for place, _ in names],
            "site": [place.site for place, _ in names],
            "channel": [channel for _, channel in names],
            "model_rms": mm.sqrt().tolist(),
            "circuit_rms": cc.sqrt().tolist(),
            "error": ((cc + mm - 2 * cm) / total).tolist(),
            "correlation": pearson(means).where(varies, torch.full_like(cc, torch.nan)).tolist(),
            "n_prompts": len(nodes),
        }
    )
    _, _, cc, mm, cm = nodes[:, moves].unbind(-1)
    errors = ((cc + mm - 2 * cm) / total[moves]).mean(1)
    rows = [(layer, head) for layer, of_layer in kept_heads(circuit, cfg).items() for head in of_layer]
    of_heads = pd.DataFrame(rows, columns=["layer", "head"])
    numbers = dict(zip(("distance", "model_even", "circuit_even", "evened"), heads.mean(0).T.tolist(), strict=True))
    of_heads = of_heads.assign(**numbers, n_prompts=len(heads))

    def interval(values: PerPrompt) -> Interval:
        return mean_of(values, groups, generator)

    distance, _, _, evened = heads.mean(1).unbind(-1)
    return InsideTable(frame, Table(of_heads), interval(errors), interval(distance), interval(evened))


def _names(circuit: Circuit) -> Iterator[tuple[Place, int]]:
    """The kept nodes, in the order in which they are compared."""
    for place, kept in _kept_places(circuit).items():
        for channel in kept.any(0).nonzero()[:, 0].tolist():
            yield place, channel
