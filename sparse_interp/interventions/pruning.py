"""Learned masks: which nodes a behaviour needs, found by gradient.

    m = 1[tau + s u >= 0],   dm/dtau = sigmoid'(tau / T) / T                  one gate per node, shared by all positions
    x_node  <-  m x_node + (1 - m) baseline_node                              after AbsTopK
    loss    =   objective(gated model) + k_coef * sum(m)

Gao et al. 2025 (arXiv 2511.13653) use s = 0. With every gate open the divergence from the model is exactly flat, so
only the price pulls, and deterministic gates all close in the same few steps, needed or not. Logistic noise u, one draw
per batch, shows each gate its worth among random sets of the others; its scale s falls to 0 during the search.

Gao et al. minimise the task's cross-entropy, which rewards circuits that do *better* than their model. The default here
is agreement: the divergence KL(model || circuit) over the whole vocabulary at the answer position, on both sides of
every pair. Gates are then ranked, and the smallest prefix is kept that agrees well enough on prompts held out from
their training (method and pitfalls: Drori 2026).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Resid
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.ablation import FwdHooks, Masks, evaluating, holding_hooks
from sparse_interp.interventions.answers import (
    AnswerLogits,
    all_answer_logits,
    answer_logits,
    both_sides,
    frozen,
    stream_at,
)
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import NODE_SITES, Node, NodeValues, Place, flat, group_size, places, queries_of, width
from sparse_interp.tasks.task import Task, TaskBatch, answer_loss, kl_divergence

OBJECTIVES = ("agreement", "task_loss")
TAU_RANGE = (-1.0, 1.5)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a circuit is searched for. The defaults ask for agreement with the model, not for doing the task well."""

    objective: str = "agreement"
    """`agreement` (KL to the full model at the answer position) or `task_loss` (the paper's, which may cheat)."""

    k_coef: float = 1e-3
    """Price of one open gate at the start, nats; from there it follows the fit."""

    price_rate: float = 0.015
    """How fast the price follows: its largest relative change per step; 0 keeps it fixed."""

    n_steps: int = 500
    """Optimizer steps on gates."""

    batch_size: int = 32
    """Pairs per step, both prompts of each."""

    lr: float = 3e-2
    """AdamW's learning rate, falling linearly to 0."""

    temperature: float = 1.0
    """T of the gate's surrogate gradient."""

    tau_init: float = 1.5
    """Where gates start; positive is open."""

    noise: float = 1.0
    """Scale of the logistic noise on tau at the start; 0 searches with the paper's deterministic gates."""

    noise_until_frac: float = 0.4
    """Share of the search after which gates are deterministic; until then the noise falls linearly."""

    sites: tuple[str, ...] = NODE_SITES
    """Sites whose nodes have gates; nodes of other sites stay as they are and are not counted."""

    share_qk: bool = True
    """Whether a q and a k node of the same head and channel share one gate: neither does anything alone. With grouped
    queries a k node shares its gate with the q nodes of all heads that meet it."""

    n_train: int = 2048
    """Pairs that gates are trained on."""

    n_selection: int = 256
    """Pairs, apart from those, on which the size is chosen; the test split is never used."""

    max_kl: float = 0.2
    """Largest mean KL(model || circuit) of the chosen circuit on the selection pairs, nats."""

    max_loss_gap: float = 0.03
    """Largest |task loss of circuit - task loss of model| on the selection pairs, nats."""

    target_task_loss: float = 0.15
    """The paper's stopping rule, used by the objective `task_loss` and reported as a column for every search, nats."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r}; choose {' or '.join(map(repr, OBJECTIVES))}.")
        for name in ("n_steps", "batch_size", "n_train", "n_selection"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, and a search needs at least 1.")
        for name in ("lr", "temperature", "max_kl", "max_loss_gap", "target_task_loss"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be above 0.")
        unknown = [site for site in self.sites if site not in NODE_SITES]
        if unknown or not self.sites:
            raise ConfigError(f"sites={self.sites}: expected some of {', '.join(NODE_SITES)}.")
        if self.share_qk and ("q" in self.sites) != ("k" in self.sites):
            raise ConfigError("share_qk needs q and k both among sites, or neither; set share_qk=False.")


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tau: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return ((tau if noise is None else tau + noise) >= 0).to(tau.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tau,) = ctx.saved_tensors
        soft = torch.sigmoid(tau / ctx.temperature)
        return grad * soft * (1 - soft) / ctx.temperature, None, None


def gate(
    tau: Float[Tensor, " width"], temperature: float = 1.0, noise: Float[Tensor, " width"] | None = None
) -> Float[Tensor, " width"]:
    """Exactly 1 where `tau (+ noise) >= 0`, else exactly 0; its gradient is that of sigmoid(tau / temperature)."""
    return _Gate.apply(tau, temperature, noise)  # pyright: ignore[reportReturnType]


def _gating(m: Float[Tensor, " width"], baseline: Float[Tensor, " width"]) -> Callable:
    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        channels = flat(activation)
        return (baseline + m * (channels - baseline)).view_as(activation)

    return hook


@dataclass(frozen=True)
class GateSearch:
    """What learn_gates found: a ranking of nodes, and how the search went."""

    order: list[Node]
    """Nodes of the gated sites, the most needed first. Nodes that share a gate follow each other, q before k."""

    tau: NodeValues
    """Final gate parameters; nodes without a gate have +inf."""

    n_open: int
    """How many of them, from the front, have an open gate."""

    history: pd.DataFrame
    """One row per step: `step`, `objective_nats`, `open_gates`, `price_nats`."""


class _Gates:
    """The trainable taus of a model. Where q and k of a channel are tied, theirs stands under q, one per k node."""

    def __init__(self, model: HookedModel, config: PruneConfig, generator: torch.Generator):
        self.cfg, self.config = model.cfg, config
        self.tau: dict[Place, Tensor] = {}
        for place in places(model.cfg):
            if place.site in config.sites and not (config.share_qk and place.site == "k"):
                n_gates = width(model.cfg, "k" if config.share_qk and place.site == "q" else place.site)
                jitter = 0.01 * torch.randn(n_gates, generator=generator)
                self.tau[place] = (config.tau_init + jitter).to(model.embed.W_E).requires_grad_()
        self.gain = {place: torch.zeros_like(tau) for place, tau in self.tau.items()}

    def of(self, place: Place) -> Tensor | None:
        if self.config.share_qk and place.site == "k":
            place = Place(place.layer, "q")
        return self.tau.get(place)

    def per_node(self, place: Place, of_gates: Float[Tensor, " gate"]) -> Float[Tensor, " width"]:
        """One number for every node of a place, from one for every gate."""
        n_heads = group_size(self.cfg) if self.config.share_qk and place.site == "q" else 1
        if n_heads == 1:
            return of_gates
        return of_gates.unflatten(0, (-1, 1, self.cfg.d_head)).expand(-1, n_heads, -1).flatten()

    def hooks(self, baseline: NodeValues, step: int, generator: torch.Generator) -> FwdHooks:
        """One draw of the gates, the same for every prompt and position of a batch."""
        scale = self.config.noise * max(0.0, 1 - step / max(1.0, self.config.noise_until_frac * self.config.n_steps))
        opened: dict[int, Tensor] = {}
        hooks: FwdHooks = []
        for place in places(self.cfg):
            tau = self.of(place)
            if tau is None:
                continue
            if id(tau) not in opened:
                noise = torch.rand(len(tau), generator=generator).logit(eps=1e-6).to(tau) * scale if scale else None
                opened[id(tau)] = gate(tau, self.config.temperature, noise)
            hooks.append((place.hook, _gating(self.per_node(place, opened[id(tau)]), baseline[place])))
        return hooks

    @torch.no_grad()
    def note_gain(self, n_step: int) -> None:
        """Running mean of how steeply the objective falls as a gate opens: what separates gates of equal tau."""
        for place, tau in self.tau.items():
            if tau.grad is not None:
                self.gain[place] += (-tau.grad - self.gain[place]) * max(0.02, 1 / (n_step + 1))

    def ranking(self) -> list[Node]:
        keys = []
        for place, tau in self.tau.items():
            values = torch.stack([tau.detach(), self.gain[place]], 1).tolist()
            keys += [(-t, -g, place, channel) for channel, (t, g) in enumerate(values)]
        order = []
        for _, _, place, channel in sorted(keys):
            if self.config.share_qk and place.site == "q":
                order += [Node(place.layer, "q", query) for query in queries_of(self.cfg, channel)]
                order.append(Node(place.layer, "k", channel))
            else:
                order.append(Node(place.layer, place.site, channel))
        return order

    def values(self) -> NodeValues:
        found = {}
        for place in places(self.cfg):
            tau = self.of(place)
            none = torch.full((width(self.cfg, place.site),), torch.inf)
            found[place] = none if tau is None else self.per_node(place, tau.detach().cpu())
        return NodeValues(found, "gate tau")


def objective_of(config: PruneConfig) -> Callable[[AnswerLogits, AnswerLogits, TaskBatch], Float[Tensor, ""]]:
    """What the search minimises besides size: (model logits, circuit logits, batch) -> nats."""
    if config.objective == "task_loss":
        return lambda reference, logits, batch: answer_loss(logits, batch).mean()
    return lambda reference, logits, batch: kl_div(
        log_softmax(logits, -1), log_softmax(reference, -1), log_target=True, reduction="batchmean"
    )


def learn_gates(
    model: AnyModel,
    pairs: TaskBatch,
    config: PruneConfig,
    baseline: NodeValues,
    *,
    generator: torch.Generator,
    progress: bool = False,
) -> GateSearch:
    """Train one gate per node on `pairs` and rank the nodes by what came out.

    Raises:
        CircuitError: if `baseline` does not fit the model.
    """
    model = hooked(model)
    baseline.check(model.cfg)
    baseline = baseline.to(model.embed.W_E)
    batch = both_sides(pairs).to(model.embed.W_E.device)
    objective = objective_of(config)
    gates = _Gates(model, config, generator)
    taus = list(gates.tau.values())
    optimizer = torch.optim.AdamW(taus, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    history, price = [], _Price(config)
    with evaluating(model), frozen(model):
        reference = all_answer_logits(model, batch)
        steps = tqdm(range(config.n_steps), disable=not progress, desc="gates", unit="step")
        for step, rows in zip(steps, _draws(pairs.lengths, config, generator), strict=False):
            here = batch.rows(rows)
            with model.hooks(fwd_hooks=gates.hooks(baseline, step, generator)):
                fit = objective(reference[rows], answer_logits(model, here), here)
            grads = torch.autograd.grad(fit, taus, retain_graph=False, allow_unused=True)
            for tau, grad in zip(taus, grads, strict=True):
                tau.grad = torch.zeros_like(tau) if grad is None else grad
            gates.note_gain(step)
            price.follow(fit.item())
            _add_price(taus, price.now, config.temperature)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.n_steps))
            optimizer.step()
            with torch.no_grad():
                for tau in taus:
                    tau.clamp_(*TAU_RANGE)  # a gate that went further could not come back in time
            n_open = sum(int((tau >= 0).sum()) for tau in taus)
            history.append((step + 1, fit.item(), n_open, price.now))
            if step % 10 == 0:
                steps.set_postfix_str(f"{config.objective} {fit.item():.3f}, open {n_open}")
    frame = pd.DataFrame(history, columns=["step", "objective_nats", "open_gates", "price_nats"])
    order, tau = gates.ranking(), gates.values()
    return GateSearch(order, tau, sum(tau.of(node) >= 0 for node in order), frame)


class _Price:
    """What an open gate costs: it rises while the objective is better than its bound and falls while it is worse.

    So gates settle at the size that meets the bound, and the ranking is decided where it is going to be cut.
    """

    def __init__(self, config: PruneConfig):
        self.now, self.rate = config.k_coef, config.price_rate
        self.bound = config.target_task_loss if config.objective == "task_loss" else config.max_kl
        self.fit: float | None = None

    def follow(self, fit: float) -> None:
        """Take note of one batch's objective, nats."""
        self.fit = fit if self.fit is None else 0.8 * self.fit + 0.2 * fit
        self.now *= math.exp(self.rate * max(-1.0, min(1.0, (self.bound - self.fit) / (0.5 * self.bound))))


@torch.no_grad()
def _add_price(taus: list[Tensor], price: float, temperature: float) -> None:
    """The gradient of price * sum(gate): written out, so that `gain` holds the objective's share alone."""
    for tau in taus:
        soft = torch.sigmoid(tau / temperature)
        assert tau.grad is not None
        tau.grad += price * soft * (1 - soft) / temperature


def _draws(lengths: Int[Tensor, " pair"], config: PruneConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of both sides of random pairs, epoch after epoch; a batch's pairs are of similar length, to pad little."""
    n_pairs = len(lengths)
    while True:
        order = torch.randperm(n_pairs, generator=generator)
        for pool in order.split(16 * config.batch_size):
            batches = pool[lengths[pool].argsort(stable=True)].split(config.batch_size)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield torch.cat([batches[i], batches[i] + n_pairs])


@dataclass(frozen=True)
class Fit:
    """How a set of nodes does on the selection pairs, beside the model."""

    kl: float
    """Mean KL(model || circuit) at the answer position, nats."""

    loss: float
    """Mean task loss of the circuit, nats."""

    model_loss: float
    """Mean task loss of the model, nats."""

    def enough(self, config: PruneConfig) -> bool:
        """Whether the circuit may stop growing."""
        if config.objective == "task_loss":
            return self.loss <= config.target_task_loss
        return self.kl <= config.max_kl and abs(self.loss - self.model_loss) <= config.max_loss_gap


class Selection:
    """Fixed pairs on which candidate circuits are measured while their size is chosen."""

    def __init__(self, model: HookedModel, pairs: TaskBatch, baseline: NodeValues):
        self.model, self.baseline = model, baseline.to(model.embed.W_E)
        self.batch = both_sides(pairs).to(model.embed.W_E.device)
        with evaluating(model):
            self.reference = all_answer_logits(model, self.batch)
        self.model_loss = answer_loss(self.reference, self.batch).mean().item()

    def logits(self, kept: Masks, batch: TaskBatch) -> AnswerLogits:
        """Answer logits of the circuit that keeps `kept`."""
        with evaluating(self.model), self.model.hooks(fwd_hooks=holding_hooks(kept, self.baseline)):
            return all_answer_logits(self.model, batch)

    @torch.no_grad()
    def knock_outs(self, kept: Masks, without: Mapping[int, Sequence[Masks]], every: int) -> Iterator[float]:
        """By how much the mean KL(model || circuit) grows from `kept` to each of `without`, nats, layer by layer.

        `without` holds, under the number of a layer, what is kept when something of that layer is knocked out too:
        the layers before it are run once for all of them. One in `every` prompts is measured.
        """
        model, n_layers = self.model, self.model.cfg.n_layers
        rows = torch.arange(0, len(self.batch), every)
        rows = rows[self.batch.lengths[rows].argsort(stable=True)]
        chunks = [(self.batch.rows(part), self.reference[part]) for part in rows.split(64)]

        def kl(candidate: Masks, streams: list[Resid | None], layer: int) -> float:
            with model.hooks(fwd_hooks=holding_hooks(candidate, self.baseline)):
                logits = [answer_logits(model, b, s, layer) for (b, _), s in zip(chunks, streams, strict=True)]
            parts = [kl_divergence(r, x, b) for (b, r), x in zip(chunks, logits, strict=True)]
            return torch.cat(parts).mean().item()

        with evaluating(model):
            whole = kl(kept, [None] * len(chunks), 0)
            for layer in range(n_layers + 1):
                with model.hooks(fwd_hooks=holding_hooks(kept, self.baseline)):
                    streams = [stream_at(model, b, layer) if layer else None for b, _ in chunks]
                for candidate in without.get(layer, ()):
                    yield kl(candidate, streams, layer) - whole

    def fit(self, kept: Masks) -> Fit:
        """The three numbers that the stopping rules look at."""
        logits = self.logits(kept, self.batch)
        kl = kl_divergence(self.reference, logits, self.batch).mean().item()
        return Fit(kl, answer_loss(logits, self.batch).mean().item(), self.model_loss)


def split_pairs(task: Task, config: PruneConfig, generator: torch.Generator) -> tuple[TaskBatch, TaskBatch]:
    """Distinct training pairs and selection pairs, both from the task's training split."""
    batch = task.batch(config.n_train + config.n_selection, split="train", generator=generator)
    return batch.rows(slice(0, config.n_train)), batch.rows(slice(config.n_train, None))


def smallest_prefix(n: int, good: Callable[[int], bool], start: int) -> int:
    """The smallest good prefix length around `start`: the first good one at or above it, then bisected downwards.

    Looking upwards in small steps matters: behind the gates that a search left open the ranking says little, and a
    circuit of twice the size may well agree less with the model than one of the right size.

    Raises:
        CircuitError: if no length from `start` to `n` is good.
    """
    bad, size = 0, max(1, min(start, n))
    while not good(size):
        if size == n:
            raise CircuitError(
                "no circuit meets the stopping rule, not even all nodes: with all of them the circuit is the model, so "
                "max_kl or max_loss_gap (or the task-loss target) asks for more than the model itself does."
            )
        bad, size = size, min(n, size + max(1, size // 20))
    while size - bad > 1:
        middle = (bad + size) // 2
        bad, size = (bad, middle) if good(middle) else (middle, size)
    return size
