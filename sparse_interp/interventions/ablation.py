"""Ablation = baseline x scheme: chosen nodes lose what they compute, all of it or part, everything else is as ever.

    x_node  <-  b + (m + (1 - m) r) (x_node - b)      after AbsTopK; m = 1 for a node that is kept, 0 for one outside

    full            r = 0: the node holds its baseline b
    stochastic      r drawn from U[0, 1], one number per node outside
    adversarial     r in [0, 1] by projected ascent on what the ablation costs

All positions share r, and all prompts do (`scope="batch"`), so that an adversary cannot make use of noise; or every
prompt has its own (`scope="example"`). x is the run's own value, not that of an untouched run. A circuit that is all a
behaviour needs survives any partial ablation of the rest: to take out everything at once lets errors cancel (stochastic
masks: Bushnaq et al. 2025, arXiv:2506.20790; baselines are in interventions/baselines.py).

An ablation is a `with` block: it never writes into a tensor that the model still holds, it nests, and it ends when the
block does.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import PerPrompt
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.answers import AnswerLogits, answer_logits, at_answers, frozen, packed
from sparse_interp.interventions.baselines import Baseline, Counterfactual, Resample
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import (
    ATTN_READ,
    FINAL_READ,
    FINAL_RESID,
    MLP_READ,
    SITES,
    Node,
    NodeAt,
    NodeValues,
    Place,
    flat,
    masks,
)
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch, kl_divergence

Masks = Mapping[Place, Bool[Tensor, " width"] | Bool[Tensor, "pos width"] | Bool[Tensor, "row 1 width"]]
"""What is kept, at all positions or position by position; or in each row of packed prompts."""

Values = NodeValues | Mapping[Place, Tensor]
"""What nodes are held at: [width] for constants, or what broadcasts to [batch pos width] for values of prompts."""

Shares = Mapping[Place, Tensor]
"""How much of each node is left, in [0, 1]; like values, or with a row per scheme."""

SCHEMES = ("full", "stochastic", "adversarial")
SCOPES = ("batch", "example")
ANSWERS_AT_ONCE = 128
"""Prompts per forward pass."""

Running = Callable[[AnyModel], AbstractContextManager[Any]]
"""A block inside which a model runs as something else: `circuit.running`, say."""

Loss = Callable[[AnswerLogits, AnswerLogits, TaskBatch], PerPrompt]
"""(model's logits, ablated logits, batch) -> what the ablation costs each prompt, nats."""


def partly(x: Tensor, baseline: Tensor, share: Tensor) -> Tensor:
    """`baseline + share (x - baseline)`: a node of which `share` is left, in [0, 1]; the one formula of ablation."""
    return baseline + share * (x - baseline)


def partial(m: Tensor, baseline: Tensor, r: Tensor | None = None) -> Callable:
    """A forward hook: value = baseline + (m + (1 - m) r) (x - baseline), with gradients in m, r and baseline.

    Each is [width], or broadcasts to [batch pos width]. m is the gate, 1 for a node that is kept; r in [0, 1] is how
    much of a node outside is left, None for nothing. Values of prompts are of the prompts and positions that are run.
    """
    return functools.partial(_partly_held, baseline, m if r is None else m + (1 - m) * r)


def _partly_held(baseline: Tensor, share: Tensor, activation: Tensor, hook: HookPoint) -> Tensor:
    channels = flat(activation)
    return partly(channels, fitting(baseline, channels, hook), share).view_as(activation)


def hold(kept: Bool[Tensor, "*pos width"], values: Tensor, r: Tensor | None = None) -> Callable:
    """A forward hook under which channels outside `kept` hold `values`, or have a share `r` left; others are exact."""
    return functools.partial(_held, kept, values, r)


def _held(
    kept: Bool[Tensor, "*pos width"], values: Tensor, r: Tensor | None, activation: Tensor, hook: HookPoint
) -> Tensor:
    channels = flat(activation)
    if kept.ndim == 2 and len(kept) not in (1, channels.shape[1]):
        raise CircuitError(
            f"{hook.name}: what is kept is told for prompts of {len(kept)} tokens, and the run has "
            f"{channels.shape[1]}; run prompts of that length."
        )
    held = fitting(values.to(channels), channels, hook)
    if r is not None:
        held = partly(channels, held, r.to(channels))
    return torch.where(kept.to(channels.device), channels, held).unflatten(-1, activation.shape[2:])


def fitting(values: Tensor, channels: Float[Tensor, "batch pos width"], hook: HookPoint) -> Tensor:
    """`values`, if they are constants or belong to as many prompts and positions as are run.

    Raises:
        CircuitError: if they belong to other prompts.
    """
    if values.ndim == 1 or all(a in (1, b) for a, b in zip(values.shape, channels.shape, strict=True)):
        return values
    raise CircuitError(
        f"{hook.name}: the values to hold are those of {values.shape[0]} prompts of {values.shape[1]} positions, and "
        f"the run has {channels.shape[0]} of {channels.shape[1]}; make them of the prompts that are run."
    )


def less(kept: Masks, nodes: Iterable[Node | NodeAt]) -> Masks:
    """`kept` without `nodes`; what was given stays as it is. A node without a position leaves at all."""
    fewer = dict(kept)
    for node in nodes:
        place = Place(node.layer, node.site)
        fewer[place] = fewer[place].clone()
        where = min(node.pos, len(fewer[place]) - 1) if isinstance(node, NodeAt) else ...
        fewer[place][where, node.channel] = False
    return fewer


def holding_hooks(kept: Masks, values: Values, shares: Shares | None = None) -> FwdHooks:
    """Forward hooks that hold every node outside `kept` at its value; places that keep everything get none.

    With `shares`, that much of such a node is left. Values and shares are [width], or broadcast to [batch pos width].
    """
    return [
        (place.hook, hold(mask, values[place], None if shares is None else shares[place]))
        for place, mask in kept.items()
        if not bool(mask.all())
    ]


def ascend(
    parts: Sequence[Callable[[Shares], Float[Tensor, " scheme"]]], start: Shares, *, n_steps: int, step_size: float
) -> tuple[dict[Place, Tensor], Float[Tensor, " scheme"]]:
    """Projected sign-gradient ascent on how much of each node is left: the worst shares on the way, and their loss.

        r  <-  clip(r + step_size sign(dloss/dr), 0, 1)

    Several schemes rise side by side, each by its own loss; of each the best iterate is kept, the start among them, so
    no loss is below that of the start (projected ascent: Madry et al. 2018, arXiv:1706.06083).

    Args:
        parts: the loss of every scheme is the sum of what these return for the shares; one after the other, so that
            prompts need not all be in memory.
        start: shares in [0, 1], [scheme ...]: one row per scheme.
        n_steps: how often the shares are moved.
        step_size: how far; n_steps * step_size bounds the way from the start.
    """
    shares = {place: r.detach() for place, r in start.items()}
    best, highest = shares, None
    for step in range(n_steps + 1):
        leaves = {place: r.clone().requires_grad_() for place, r in shares.items()}
        losses, grads = [], [torch.zeros_like(r) for r in leaves.values()]
        for part in parts:
            with torch.set_grad_enabled(step < n_steps):
                loss = part(leaves)
                losses.append(loss.detach())
                if loss.requires_grad:  # not where a circuit leaves nothing outside
                    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
                    grads = [grad if more is None else grad + more for grad, more in zip(grads, found, strict=True)]
        total = torch.stack(losses).sum(0)
        if highest is None:
            highest = total
        else:
            higher = total > highest
            best = {place: _chosen(higher, shares[place], best[place]) for place in best}
            highest = torch.where(higher, total, highest)
        moves = zip(shares.items(), grads, strict=True)
        shares = {place: (r + step_size * grad.sign()).clamp(0, 1) for (place, r), grad in moves}
    assert highest is not None
    return dict(best), highest


def _chosen(where: Bool[Tensor, " scheme"], there: Tensor, elsewhere: Tensor) -> Tensor:
    """Row by row, one or the other."""
    return torch.where(where.view(-1, *[1] * (there.ndim - 1)), there, elsewhere)


@dataclass(frozen=True, eq=False)
class Ablation:
    """What nodes outside a circuit are ablated to, and how much of each is left."""

    baseline: Baseline
    """What a node that is ablated holds."""

    scheme: str = "full"
    """`full`, `stochastic` or `adversarial`."""

    n_draws: int = 1
    """Stochastic draws; of an adversary, among which it takes its start."""

    n_steps: int = 0
    """Steps of the adversary."""

    step_size: float = 0.1
    """How far a step moves a share; n_steps * step_size bounds the way from the start."""

    scope: str = "batch"
    """`batch`: one number per node for all prompts. `example`: one per node and prompt."""

    loss: Loss = field(default=kl_divergence)
    """What the adversary raises: KL(model || ablated) over the vocabulary at the answer position unless told otherwise.
    (reference logits, ablated logits, batch) -> one number per prompt."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES or self.scope not in SCOPES:
            raise ConfigError(
                f"scheme={self.scheme!r} and scope={self.scope!r}: a scheme is one of {', '.join(SCHEMES)}, its scope "
                f"one of {', '.join(SCOPES)}."
            )
        if self.n_draws < 1 or self.n_steps < 0 or self.step_size <= 0:
            raise ConfigError(
                f"n_draws={self.n_draws}, n_steps={self.n_steps}, step_size={self.step_size}: expected at least one "
                "draw, no fewer than 0 steps, and steps above 0."
            )

    @classmethod
    def full(cls, baseline: Baseline) -> "Ablation":
        """Every node outside holds its baseline."""
        return cls(baseline)

    @classmethod
    def stochastic(cls, baseline: Baseline, *, n_draws: int = 8, scope: str = "batch") -> "Ablation":
        """Of every node outside a random share is left; scores are means over the draws."""
        return cls(baseline, "stochastic", n_draws=n_draws, scope=scope)

    @classmethod
    def adversarial(
        cls,
        baseline: Baseline,
        *,
        n_steps: int = 20,
        step_size: float = 0.1,
        n_draws: int = 8,
        scope: str = "batch",
        loss: Loss = kl_divergence,
    ) -> "Ablation":
        """Of every node outside the share is left that costs most: never milder than the full ablation or its draws.

        The ascent starts from the worst of `n_draws` draws, the full ablation, and everything left up to the reads of
        one layer or of the end and nothing from there on; it keeps its best iterate. The last are what tells of parts
        that look away as long as something else is there: no share in between does, and no gradient leads there.
        """
        return cls(baseline, "adversarial", n_draws, n_steps, step_size, scope, loss)

    @classmethod
    def counterfactual(cls) -> "Ablation":
        """Every node outside holds what it holds on the prompt's own twin."""
        return cls(Counterfactual())

    @classmethod
    def resample(cls, pool: TaskBatch, *, generator: torch.Generator) -> "Ablation":
        """Every node outside holds what it holds on another prompt of `pool`, drawn once for each prompt."""
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return cls(Resample(pool, int(seed)))

    @property
    def name(self) -> str:
        """For tables: scheme and baseline."""
        scope = {"batch": "one scheme for all prompts", "example": "one scheme per prompt"}[self.scope]
        steps = f"{self.n_steps} steps of {self.step_size:g} from {self.n_draws} draws"
        how = {"stochastic": f" ({self.n_draws} draws, {scope})", "adversarial": f" ({steps}, {scope})"}
        return f"{self.scheme}{how.get(self.scheme, '')}, {self.baseline.kind}"

    def hooks(
        self,
        model: AnyModel,
        kept: Masks,
        batch: TaskBatch | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> FwdHooks:
        """Forward hooks for a run in which nodes outside `kept` are ablated; a stochastic scheme is drawn once.

        Constants, fully ablated or with shares for a whole batch, fit any prompts. All else needs the `batch` whose
        clean prompts are going to be run, with their padding.

        Raises:
            CircuitError: without the prompts or the generator that are needed, or with the baseline of another model.
        """
        model = hooked(model)
        values = _values(self.baseline, model, batch)
        if self.scheme == "full":
            return holding_hooks(kept, values)
        if batch is None and not (self.scheme == "stochastic" and self.scope == "batch"):
            raise CircuitError(f"{self.name}: the shares depend on the prompts; pass batch=, the prompts to be run.")
        n = 1 if batch is None else len(batch)
        if self.scheme == "stochastic":
            return holding_hooks(kept, values, self._drawn(kept, n, generator))
        assert batch is not None
        return holding_hooks(kept, values, self._worst(_Evaluation(self, model, kept, batch), generator))

    def answer_logits(
        self,
        model: AnyModel,
        kept: Masks,
        batch: TaskBatch,
        *,
        generator: torch.Generator | None = None,
        within: Running = nullcontext,
    ) -> Float[Tensor, "draw batch d_vocab"]:
        """Logits at the answer positions with nodes outside `kept` ablated: a row per draw, or a single one.

        Ablated runs happen inside `within(model)`; those that they are compared with, or take values from, do not.

        Raises:
            CircuitError: without the generator that a scheme needs, or with the baseline of another model.
        """
        run = _Evaluation(self, hooked(model), kept, batch, within)
        if self.scheme == "full":
            drawn: list[Shares | None] = [None]
        elif self.scheme == "stochastic":
            drawn = [self._drawn(kept, len(batch), generator) for _ in range(self.n_draws)]
        else:
            drawn = [self._worst(run, generator)]
        return torch.stack([run.logits(shares) for shares in drawn])

    def _drawn(self, kept: Masks, n_prompts: int, generator: torch.Generator | None) -> dict[Place, Tensor]:
        """Shares [1 or prompt, 1, width], uniform in [0, 1]."""
        if generator is None:
            raise CircuitError(f"{self.name}: pass generator=, which draws the shares.")
        rows = n_prompts if self.scope == "example" else 1
        return {
            place: torch.rand(rows, 1, mask.shape[-1], generator=generator, device=generator.device)
            for place, mask in kept.items()
            if not bool(mask.all())
        }

    def _worst(self, run: "_Evaluation", generator: torch.Generator | None) -> dict[Place, Tensor]:
        """The shares that the adversary ends with."""
        drawn = [self._drawn(run.kept, len(run.batch), generator) for _ in range(self.n_draws)]
        drawn += _left_up_to_reads(drawn[0])
        start, highest = drawn[0], run.losses(drawn[0])
        for shares in drawn[1:]:
            losses = run.losses(shares)
            start = {place: _chosen(losses > highest, shares[place], start[place]) for place in start}
            highest = losses.maximum(highest)
        if not start:
            return {}
        steps = {"n_steps": self.n_steps, "step_size": self.step_size}
        if self.scope == "batch":
            return ascend(run.parts(), run.on_device(start), **steps)[0]
        found = []
        for part, rows in zip(run.parts(), run.chunks, strict=True):
            mine = {place: shares[rows] for place, shares in start.items()}
            found.append(ascend([part], run.on_device(mine), **steps)[0])
        back = torch.cat(run.chunks).argsort()
        return {place: torch.cat([shares[place].cpu() for shares in found])[back] for place in start}


def _left_up_to_reads(like: Shares) -> list[dict[Place, Tensor]]:
    """Nothing left, and all that is computed before the reads of a layer, or before those of the end."""
    order = sorted(like, key=_in_forward_order)
    ends = [i for i, place in enumerate(order) if i and place.site in READS]
    return [
        {place: torch.full_like(like[place], float(i < end)) for i, place in enumerate(order)} for end in (0, *ends)
    ]


READS = (ATTN_READ.name, MLP_READ.name, FINAL_RESID.name, FINAL_READ.name)
"""Sites at which something of the stream is taken up."""


def _in_forward_order(place: Place) -> tuple[int, int]:
    return place.layer, list(SITES).index(place.site)


class _Evaluation:
    """One circuit under one kind of ablation on fixed prompts, answers alone, a chunk of prompts after the other."""

    def __init__(
        self, ablation: Ablation, model: HookedModel, kept: Masks, batch: TaskBatch, within: Running = nullcontext
    ):
        self.ablation, self.model, self.kept, self.within = ablation, model, kept, within
        self.batch = batch.to(model.embed.W_E.device)
        self.chunks = list(batch.lengths.cpu().argsort(stable=True).split(ANSWERS_AT_ONCE))
        self.references: list[AnswerLogits] = []
        self.packings: dict[int, Packing | None] = {}
        constant = isinstance(ablation.baseline, NodeValues) and ablation.scope == "batch"
        self.alike = constant and all(mask.ndim == 1 for mask in kept.values())
        """Whether nothing tells prompts apart but their tokens."""

    def _logits(self, number: int, shares: Shares | None) -> AnswerLogits:
        """Answer logits of a chunk; `shares` are of the chunk's own prompts."""
        here = self.batch.rows(self.chunks[number])
        values = _values(self.ablation.baseline, self.model, here)
        values = values if isinstance(values, NodeValues) else at_answers(values, here)
        with evaluating(self.model), self.within(self.model):
            if number not in self.packings:
                self.packings[number] = packed(self.model, [here]) if self.alike else None
            with self.model.hooks(fwd_hooks=holding_hooks(self.kept, values, shares)):
                return answer_logits(self.model, here, packing=self.packings[number])

    def _of_chunk(self, rows: Tensor, shares: Shares | None) -> Shares | None:
        if shares is None or self.ablation.scope == "batch":
            return shares
        return {place: of_prompts[rows] for place, of_prompts in shares.items()}

    @torch.no_grad()
    def logits(self, shares: Shares | None) -> AnswerLogits:
        """Answer logits of all prompts in their order."""
        found = [self._logits(i, self._of_chunk(rows, shares)) for i, rows in enumerate(self.chunks)]
        return torch.cat(found)[torch.cat(self.chunks).argsort()]

    def parts(self) -> list[Callable[[Shares], Tensor]]:
        """For every chunk, what its prompts add to the loss of each scheme, of shares of its own."""
        if not self.references:
            with torch.no_grad(), evaluating(self.model):
                self.references = [answer_logits(self.model, self.batch.rows(rows)) for rows in self.chunks]
        return [self._part(i, reference) for i, reference in enumerate(self.references)]

    def _part(self, number: int, reference: AnswerLogits) -> Callable[[Shares], Tensor]:
        here = self.batch.rows(self.chunks[number])

        def losses(shares: Shares) -> Tensor:
            with frozen(self.model):
                found = self.ablation.loss(reference, self._logits(number, shares), here)
            return found if self.ablation.scope == "example" else found.sum()[None] / len(self.batch)

        return losses

    @torch.no_grad()
    def losses(self, shares: Shares) -> Float[Tensor, " scheme"]:
        """The loss of each scheme: of each prompt, or of all."""
        found = [part(self._of_chunk(rows, shares) or {}) for part, rows in zip(self.parts(), self.chunks, strict=True)]
        if self.ablation.scope == "batch":
            return torch.stack(found).sum(0).cpu()
        return torch.cat(found)[torch.cat(self.chunks).argsort()].cpu()

    def on_device(self, shares: Shares) -> dict[Place, Tensor]:
        """Shares where the model is, in its precision."""
        return {place: of_nodes.to(self.model.embed.W_E) for place, of_nodes in shares.items()}


def _values(baseline: Baseline, model: HookedModel, batch: TaskBatch | None) -> Values:
    """A baseline's values for the clean prompts of `batch`."""
    if isinstance(baseline, NodeValues):
        return baseline.to(model.embed.W_E)
    if batch is None:
        raise CircuitError(f"{baseline.kind}: the values depend on the prompts; pass batch=, the prompts to be run.")
    return baseline.on(model, batch)


@contextmanager
def ablate(
    model: AnyModel,
    nodes: Iterable[Node],
    ablation: Baseline | Ablation,
    *,
    batch: TaskBatch | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[AnyModel]:
    """Inside the block `nodes` are ablated; outside it the model is untouched.

    Args:
        model: the model, ours or a dense one of TransformerLens.
        nodes: what is ablated.
        ablation: a baseline that nodes hold, constant or of the prompts, or an `Ablation` with a scheme of its own.
        batch: the prompts that are going to be run, clean ones, where values or shares depend on them.
        generator: draws shares.

    Raises:
        CircuitError: for a node that the model does not have, values of another model, or prompts or generator missing.
    """
    nodes, cfg = list(nodes), hooked(model).cfg
    ablation = ablation if isinstance(ablation, Ablation) else Ablation(ablation)
    if isinstance(ablation.baseline, NodeValues):
        ablation.baseline.check(cfg, {node.site for node in nodes})
    kept = {place: ~mask for place, mask in masks(nodes, cfg).items()}
    with hooked(model).hooks(fwd_hooks=ablation.hooks(model, kept, batch, generator=generator)):
        yield model
