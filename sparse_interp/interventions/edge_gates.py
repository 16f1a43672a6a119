"""One gate per edge, learned as those of nodes are: which weights a behaviour needs, found by gradient.

    m_e = 1[tau_e + s u >= 0]                              one gate per non-zero within-block weight, as in gates.py
    message_e  <-  W_e ( b_s + m_e (x_s - b_s) )           before AbsTopK acts on the target (model/edges.py)

A node that nothing enters any more is held at its baseline, in training as in the circuit that comes out, so that what
is ranked and what is sized are the same. Gradients pass it as if it were not held: its edges can come back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.ablation import fitting
from sparse_interp.interventions.answers import Teacher
from sparse_interp.interventions.baselines import Baseline, held_at_answers
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edges import gating
from sparse_interp.interventions.gates import Gates, Meeting
from sparse_interp.interventions.norms import frozen_norms, norm_scales
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import SearchHistory, train_gates
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import NodeValues, flat
from sparse_interp.tasks.task import TaskBatch


def _held_through(kept: Tensor, values: Tensor, activation: Tensor, hook: HookPoint) -> Tensor:
    """A hook's answer: what is outside `kept` holds `values`, and gradients pass as if it did not."""
    channels = flat(activation)
    held = fitting(values, channels, hook) + (channels - channels.detach())
    return torch.where(kept.to(channels.device), channels, held).view_as(activation)


class EdgeGates(Gates):
    """One gate per edge of a circuit, or of a whole model, and one per channel that is unembedded.

    Args:
        model: the model.
        baseline: what is carried where a gate is shut, and what nodes outside hold.
        connections: what has a gate, and which nodes are left where gates are shut.
        config: how the gates are learned.
        generator: draws their starts and their noise.
    """

    def __init__(
        self,
        model: HookedModel,
        baseline: Baseline,
        connections: Connections,
        config: PruneConfig,
        generator: torch.Generator,
    ):
        self.model, self.connections, self.units = model, connections, connections.units
        self.frozen_norms = config.frozen_norms
        self.baseline = baseline.to(model.embed.W_E) if isinstance(baseline, NodeValues) else baseline
        super().__init__(self.units.sizes, self.units.sizes, [config], [generator], model.embed.W_E)

    def meeting(self, rows: TaskBatch, counts: Sequence[int], packing: Packing | None = None) -> Meeting:
        """Blocks in which edges and the end are gated and nodes outside held, over the values for these prompts."""
        values = held_at_answers(self.model, self.baseline, rows)
        scales = norm_scales(self.model, rows, packing) if self.frozen_norms else {}

        @contextmanager
        def block(opened: Mapping, shares: Mapping | None = None) -> Iterator[None]:
            left = {group: m[0] for group, m in opened.items()}
            if shares is not None:
                left = {group: m + (1 - m) * shares[group][0] for group, m in left.items()}
            felt = self.connections.felt(torch.cat([m.detach().cpu() > 0 for m in left.values()]))
            held = [(place, mask) for place, mask in felt.items() if not bool(mask.all())]
            unfelt = [(place.hook, partial(_held_through, mask, values[place])) for place, mask in held]
            gated = gating(self.model, self.connections.kept, self.units, values, left)
            with frozen_norms(self.model, scales), gated, self.model.hooks(fwd_hooks=unfelt):
                yield

        return block

    def order(self) -> Int[Tensor, " unit"]:
        """Units by their gates, the most needed first."""
        keys = torch.stack([self.taus[0].detach(), self.gains[0]], 1).cpu()
        by_gain = keys[:, 1].argsort(descending=True, stable=True)
        return by_gain[keys[by_gain, 0].argsort(descending=True, stable=True)]


@dataclass(frozen=True)
class EdgeSearch:
    """What learn_edge_gates found: a ranking of edges, and how the search went."""

    order: Int[Tensor, " unit"]
    """Units, the most needed first."""

    n_open: int
    """How many of them, from the front, have an open gate."""

    history: SearchHistory
    """One row per step."""


def learn_edge_gates(
    model: HookedModel,
    pairs: TaskBatch,
    config: PruneConfig,
    baseline: Baseline,
    connections: Connections,
    *,
    teacher: Teacher | None = None,
    generator: torch.Generator,
    progress: bool = False,
) -> EdgeSearch:
    """Train one gate per unit on `pairs`, nodes that are not connected held at their baseline, and rank the units.

    Raises:
        ConfigError: for gates per position, which edges do not have.
        CircuitError: if there is no edge to begin with.
    """
    if config.per_position:
        raise ConfigError("per_position=True: an edge has one gate for all positions; search edges without it.")
    if not len(connections.units):
        raise CircuitError("there is no edge between these nodes, and so nothing to prune.")
    gates = EdgeGates(model, baseline, connections, config, generator)
    (history,) = train_gates(model, pairs, gates, teacher=teacher, progress=progress)
    return EdgeSearch(gates.order(), gates.n_open(0), history)
