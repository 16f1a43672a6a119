"""What a model is like before anything is asked of it: how its nodes are active on text, and how its weights lie.

    active share   of a node: positions of the text at which it is not zero (after AbsTopK), share of all
    size           of a node: root mean square over those positions
    degree         of a neuron, or of a channel that a block reads or writes: weights that are not zero on that side

A node that is never active has no size. Weights are those of the matrices that a density applies to.
"""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import ConfigError
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import (
    ATTN_READ,
    ATTN_WRITE,
    MLP_READ,
    MLP_WRITE,
    NEURON,
    Place,
    flat,
    places,
    width,
    wires,
)
from sparse_interp.model.text import evaluating
from sparse_interp.results import Table

READS, WRITES, NEURONS_IN, NEURONS_OUT = "channel, read", "channel, written", "neuron, in", "neuron, out"


@dataclass(frozen=True, eq=False)
class ActivationTable(Table):
    """One row per node: `layer`, `site`, `channel`, `active_frac`, and `rms` where it is active (none where never)."""

    columns: ClassVar[tuple[str, ...]] = ("layer", "site", "channel", "active_frac", "rms")


@torch.no_grad()
def activation_statistics(model: AnyModel, blocks: Int[Tensor, "block pos"], batch_size: int = 16) -> ActivationTable:
    """How often each node is not zero on `blocks`, and how large it then is, in eval mode.

    Raises:
        ConfigError: if there are no blocks.
    """
    model = hooked(model)
    if not len(blocks):
        raise ConfigError("statistics need at least one block of tokens, and there are none.")
    counts: dict[Place, Tensor] = {}
    squares: dict[Place, Tensor] = {}

    def watch(place: Place):
        def hook(activation: Tensor, hook: HookPoint) -> None:
            held = flat(activation)
            counts[place] = counts.get(place, 0) + (held != 0).sum((0, 1)).cpu()
            squares[place] = squares.get(place, 0) + held.double().square().sum((0, 1)).cpu()

        return hook

    with evaluating(model), model.hooks(fwd_hooks=[(place.hook, watch(place)) for place in places(model.cfg)]):
        for batch in blocks.split(batch_size):
            model(batch.to(model.embed.W_E.device))
    parts = []
    for place in places(model.cfg):
        n, channels = counts[place], range(len(counts[place]))
        rms = (squares[place] / n).sqrt()  # 0 / 0 where a node is never active: not a number
        columns = {"channel": channels, "active_frac": (n.double() / blocks.numel()).tolist(), "rms": rms.tolist()}
        parts.append(pd.DataFrame({"layer": place.layer, "site": place.site, **columns}))
    return ActivationTable(pd.concat(parts, ignore_index=True))


def weight_sizes(model: AnyModel) -> Table:
    """A row per weight that is not zero: `matrix` (of which kind, all layers together) and `size`, its magnitude."""
    model = hooked(model)
    found: dict[str, list[Tensor]] = {"W_E": [model.embed.W_E], "W_U": [model.unembed.W_U]}
    for wire in wires(model.cfg):
        found[wire.weight_name.split(".")[-1]] = [wire.weight(block) for block in model.layers]
    parts = []
    for name, matrices in found.items():
        sizes = torch.cat([matrix.detach().flatten() for matrix in matrices]).abs()
        parts.append(pd.DataFrame({"matrix": name, "size": sizes[sizes > 0].tolist()}))
    return Table(pd.concat(parts, ignore_index=True))


def degrees(model: AnyModel) -> Table:
    """A row per unit and side: `unit` (a channel of a block, read or written; a neuron, in or out), `layer`, `channel`
    and `degree`, the weights within the block that are not zero there."""
    model = hooked(model)
    cfg, parts = model.cfg, []
    for layer, block in enumerate(model.layers):
        sides = dict.fromkeys((READS, WRITES), torch.zeros(cfg.d_model, dtype=torch.long))
        sides |= dict.fromkeys((NEURONS_IN, NEURONS_OUT), torch.zeros(width(cfg, NEURON.name), dtype=torch.long))
        for wire in wires(cfg):
            there = (wire.weight(block).detach() != 0).long().cpu()
            if wire.source in (ATTN_READ, MLP_READ):
                sides[READS] = sides[READS] + there.sum(1)[: cfg.d_model]
            if wire.target in (ATTN_WRITE, MLP_WRITE):
                sides[WRITES] = sides[WRITES] + there.sum(0)
            if wire.target == NEURON:
                sides[NEURONS_IN] = sides[NEURONS_IN] + there.sum(0)
            if wire.source == NEURON:
                sides[NEURONS_OUT] = sides[NEURONS_OUT] + there.sum(1)
        for unit, degree in sides.items():
            rows = {"unit": unit, "layer": layer, "channel": range(len(degree)), "degree": degree.tolist()}
            parts.append(pd.DataFrame(rows))
    return Table(pd.concat(parts, ignore_index=True))
