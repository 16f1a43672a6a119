"""Gates: for every node a number that decides whether the model computes it or holds it; several masks at once.

    m = 1[tau + s u >= 0],   dm/dtau = sigmoid'(tau / T) / T                  u logistic noise, one draw per batch
    x_node  <-  b + m (x_node - b)                                            after AbsTopK; b the node's baseline

S masks stand side by side on one frozen model: a batch holds the prompts of mask 0, behind them those of mask 1, and
so on, and every row meets the gates of its own mask. Each mask draws from its own generator what it would draw alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.interventions.ablation import partial
from sparse_interp.interventions.answers import packed
from sparse_interp.interventions.baselines import Baseline, held_at_answers
from sparse_interp.interventions.norms import frozen_norms, norm_scales
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import FwdHooks, HookedModel
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import (
    FINAL_READ,
    Node,
    NodeAt,
    NodeValues,
    Place,
    group_size,
    places,
    queries_of,
    width,
)
from sparse_interp.tasks.task import TaskBatch

Meeting = Callable[..., AbstractContextManager]
"""(gates, shares or None), both group -> [mask ...]: a block in which each row of a batch meets those of its mask."""


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tau: Tensor, temperature: Tensor | float, noise: Tensor | None) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return ((tau if noise is None else tau + noise) >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tau,) = ctx.saved_tensors
        soft = torch.sigmoid(tau / ctx.temperature)
        return grad * soft * (1 - soft) / ctx.temperature, None, None


def gate(
    tau: Float[Tensor, "*mask gate"],
    temperature: Float[Tensor, "*mask 1"] | float = 1.0,
    noise: Float[Tensor, "*mask gate"] | None = None,
) -> Float[Tensor, "*mask gate"]:
    """Exactly 1 where `tau (+ noise) >= 0`, else exactly 0; its gradient is that of sigmoid(tau / temperature)."""
    return _Gate.apply(tau, temperature, noise)  # pyright: ignore[reportReturnType]


class Gates(ABC):
    """The parameters of S masks over the same gates, which come in named groups.

    Args:
        sizes: how many gates each group has, in the order in which they lie in `taus`.
        free: how many things with a share of their own are gated by group; nodes that share a gate are several.
        configs: how each mask is learned.
        generators: where each mask's randomness comes from.
        like: a tensor whose dtype and device the gates take.
    """

    model: HookedModel
    baseline: Baseline
    n_pos: int | None = None
    """The length of all prompts, where gates are those of positions."""

    def __init__(
        self,
        sizes: Mapping[Hashable, int],
        free: Mapping[Hashable, int],
        configs: Sequence[PruneConfig],
        generators: Sequence[torch.Generator],
        like: Tensor,
    ):
        self.free = dict(free)
        self.sizes, self.configs, self.generators = dict(sizes), list(configs), list(generators)
        self.taus = [self._start(*each).to(like).requires_grad_() for each in zip(configs, generators, strict=True)]
        """For each mask all its parameters, group after group."""
        self.gains = [torch.zeros_like(tau) for tau in self.taus]
        """For each mask a running mean of how steeply its objective falls as a gate opens."""

    def _start(self, config: PruneConfig, generator: torch.Generator) -> Float[Tensor, " gate"]:
        return torch.cat(
            [config.tau_init + 0.01 * torch.randn(size, generator=generator) for size in self.sizes.values()]
        )

    def packing(self, of_masks: Sequence[TaskBatch]) -> Packing | None:
        """The prompts of each mask packed into a row, where what gates do is the same for all prompts and positions."""
        constant = isinstance(self.baseline, NodeValues) and self.n_pos is None
        return packed(self.model, of_masks) if constant else None

    @abstractmethod
    def meeting(self, rows: TaskBatch, counts: Sequence[int], packing: Packing | None = None) -> Meeting:
        """How the prompts `rows`, of which the first `counts[0]` are the first mask's, meet gates; packed or not.

        What it returns makes a block of the gates that were drawn (group -> [mask gate], 1 open) and of shares, how
        much is left where a gate is shut (group -> [mask free], in [0, 1], or None for nothing).
        """

    def groups(self, of_gates: Float[Tensor, "*mask gate"]) -> dict[Hashable, Float[Tensor, "*mask group"]]:
        """One number for every gate, taken apart into groups."""
        return dict(zip(self.sizes, of_gates.split(list(self.sizes.values()), -1), strict=True))

    def drawn(self, step: int, chosen: Sequence[int]) -> dict[Hashable, Float[Tensor, "mask group"]]:
        """The gates of the `chosen` masks, 1 open and 0 shut, with the noise of this step where it has any."""
        tau = torch.stack([self.taus[i] for i in chosen])
        noises = [self._noise(i, step) for i in chosen]
        noise = None
        if any(n is not None for n in noises):
            noise = torch.stack([torch.zeros_like(tau[0]) if n is None else n for n in noises])
        temperature = torch.tensor([[self.configs[i].temperature] for i in chosen]).to(tau)
        return self.groups(gate(tau, temperature, noise))

    def _noise(self, i: int, step: int) -> Float[Tensor, " gate"] | None:
        """Logistic noise for the gates of mask `i`; None where its scale has fallen to 0."""
        scale = self.configs[i].noise_scale(step)
        if not scale:
            return None
        uniform = [torch.rand(size, generator=self.generators[i]) for size in self.sizes.values()]
        return torch.cat(uniform).logit(eps=1e-6).to(self.taus[i]) * scale

    def shares(self, chosen: Sequence[int]) -> dict[Hashable, Float[Tensor, "mask free"]]:
        """A stochastic draw of how much is left of what shut gates ablate, for each of the `chosen` masks."""
        drawn = {}
        for group, n in self.free.items():
            rows = [torch.rand(n, generator=self.generators[i]) for i in chosen]
            drawn[group] = torch.stack(rows).to(self.taus[0])
        return drawn

    def n_open(self, i: int) -> int:
        """How many gates of mask `i` are open without noise."""
        return int((self.taus[i] >= 0).sum())

    @torch.no_grad()
    def note_gain(self, i: int, grad: Float[Tensor, " gate"], n_step: int) -> None:
        """Take note of the objective's gradient: what separates gates of equal tau."""
        self.gains[i] += (-grad - self.gains[i]) * max(0.02, 1 / (n_step + 1))

    def keys(self, i: int) -> list[tuple[float, float, Hashable, int]]:
        """(-tau, -gain, group, number within it) for every gate of mask `i`: sorted, the most needed comes first."""
        found = []
        both = torch.stack([self.taus[i].detach(), self.gains[i]], 1)
        for group, values in zip(self.sizes, both.split(list(self.sizes.values())), strict=True):
            found += [(-t, -g, group, number) for number, (t, g) in enumerate(values.tolist())]
        return found


class NodeGates(Gates):
    """One gate per node of the gated sites. Where q and k of a channel are tied, theirs stands under q, one per k.

    With `n_pos`, the length of all prompts, every node has one at each position; a group is laid out [pos node]. The
    last read is gated at the position that answers, where alone it is read.
    """

    def __init__(
        self,
        model: HookedModel,
        baseline: Baseline,
        configs: Sequence[PruneConfig],
        generators: Sequence[torch.Generator],
        n_pos: int | None = None,
    ):
        self.n_pos = n_pos
        self.model, self.cfg = model, model.cfg
        self.baseline = baseline.to(model.embed.W_E) if isinstance(baseline, NodeValues) else baseline
        self.sites, self.tied, self.frozen_norms = configs[0].sites, configs[0].share_qk, configs[0].frozen_norms
        sizes = {
            place: self._rows(place) * width(model.cfg, "k" if self.tied and place.site == "q" else place.site)
            for place in places(model.cfg, self.sites)
            if not (self.tied and place.site == "k")
        }
        free = {place: self._rows(place) * width(model.cfg, place.site) for place in places(model.cfg, self.sites)}
        super().__init__(sizes, free, configs, generators, model.embed.W_E)

    def _rows(self, place: Place) -> int:
        """At how many positions nodes of a place have gates of their own; 1 where all share one."""
        return 1 if self.n_pos is None or place.site == FINAL_READ.name else self.n_pos

    def owner(self, place: Place) -> Place | None:
        """Under which place the gates of `place` stand; None where it has none."""
        if place.site not in self.sites:
            return None
        return Place(place.layer, "q") if self.tied and place.site == "k" else place

    def per_node(self, place: Place, of_gates: Float[Tensor, "*mask gate"]) -> Float[Tensor, "*mask #pos width"]:
        """One number for every node of a place, from one for every gate."""
        of_gates = of_gates.unflatten(-1, (self._rows(place), -1))
        n_heads = group_size(self.cfg) if self.tied and place.site == "q" else 1
        if n_heads == 1:
            return of_gates
        grouped = of_gates.unflatten(-1, (-1, 1, self.cfg.d_head))
        return grouped.expand(*grouped.shape[:-2], n_heads, -1).flatten(-3)

    def meeting(self, rows: TaskBatch, counts: Sequence[int], packing: Packing | None = None) -> Meeting:
        """Blocks of hooks, over the baseline's values for these prompts and the norms' scales where they are frozen."""
        values = held_at_answers(self.model, self.baseline, rows)
        scales = norm_scales(self.model, rows, packing) if self.frozen_norms else {}
        counts = [1] * len(counts) if packing is not None else counts

        @contextmanager
        def block(opened: Mapping, shares: Mapping | None = None) -> Iterator[None]:
            found: FwdHooks = []
            for place in places(self.cfg, self.sites):
                m = per_row(self.per_node(place, opened[self.owner(place)]), counts)
                r = None if shares is None else per_row(shares[place].unflatten(1, (self._rows(place), -1)), counts)
                found.append((place.hook, partial(m, values[place], r)))
            with frozen_norms(self.model, scales), self.model.hooks(fwd_hooks=found):
                yield

        return block

    def ranking(self, i: int) -> tuple[list[Node] | list[NodeAt], int]:
        """Nodes of mask `i`, the most needed first, and how many of them have an open gate.

        Nodes that share a gate follow each other, q before k.
        """
        order, n_open = [], 0
        for minus_tau, _, place, number in sorted(self.keys(i)):
            pos, channel = divmod(number, self.sizes[place] // self._rows(place))
            pos = pos if self._rows(place) == self.n_pos else -1
            order += self._sharing(place, channel, pos)
            n_open = len(order) if minus_tau <= 0 else n_open
        return order, n_open

    def _sharing(self, place: Place, channel: int, pos: int) -> list:
        """The nodes behind one gate; `pos` -1 is the last position."""
        found = [Node(*place, channel)]
        if self.tied and place.site == "q":
            found = [Node(place.layer, "q", query) for query in queries_of(self.cfg, channel)]
            found.append(Node(place.layer, "k", channel))
        return found if self.n_pos is None else [NodeAt(*node, pos % self.n_pos) for node in found]

    def values(self, i: int) -> NodeValues:
        """tau of every node of the model in mask `i`, at the position where it is largest; +inf without a gate."""
        tau, found = self.groups(self.taus[i].detach().cpu()), {}
        for place in places(self.cfg):
            owner = self.owner(place)
            none = torch.full((width(self.cfg, place.site),), torch.inf)
            found[place] = none if owner is None else self.per_node(place, tau[owner]).amax(0)
        return NodeValues(found, "gate tau")


def per_row(of_masks: Float[Tensor, "mask pos width"], counts: Sequence[int]) -> Float[Tensor, "row pos width"]:
    """What each row of a batch meets that holds `counts[i]` rows of mask i; one mask alone broadcasts over its rows."""
    if all(n == 1 for n in counts) or len(counts) == 1:
        return of_masks
    return torch.cat([mask[None].expand(n, *mask.shape) for mask, n in zip(of_masks, counts, strict=True)])
