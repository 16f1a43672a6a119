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
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm

from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import ascend
from sparse_interp.interventions.answers import (
    AnswerLogits,
    Teacher,
    answer_logits,
    frozen,
    length_in_common,
    taught,
)
from sparse_interp.interventions.baselines import Baseline
from sparse_interp.interventions.gates import Gates, NodeGates
from sparse_interp.interventions.prune_config import BOUND_IN_LOSS, PruneConfig
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, NodeAt, NodeValues, n_nodes
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, lines
from sparse_interp.tasks.task import TaskBatch, answer_loss, logit_difference_error

TAU_RANGE = (-1.0, 1.5)

PADDED = 1.25
"""By how much the longest prompts of masks that run together may differ: padding is computed too."""

ACTIVATIONS_TOGETHER = 2**22
"""Nodes x tokens up to which masks run together on a CPU: beyond its caches a pass of all is no faster than several."""

MOST_TOKENS = 2**20
"""Tokens of a pass on other devices."""
IN_COMMON = (
    "n_steps",
    "batch_size",
    "sites",
    "share_qk",
    "schemes",
    "adversary_steps",
    "adversary_step_size",
    "frozen_norms",
    "per_position",
)
"""What masks that are learned together have to agree in."""


@dataclass(frozen=True, eq=False)
class SearchHistory(Table):
    """A search step by step: one row per step."""

    columns: ClassVar[tuple[str, ...]] = ("step", "objective", "open_gates", "price")
    """`objective` is that of the step's batch, in its own unit; `price` what an open gate costs in that unit."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """The objective (mean of 20 steps) and the share of gates that are open."""
        return lines(self.series(), x="step", y="value", by="series", ax=ax)

    def series(self) -> pd.DataFrame:
        """What `plot` draws: `step`, `value`, `series`."""
        found = {
            "objective": self.frame.objective.rolling(20, min_periods=1).mean(),
            "open gates, share": self.frame.open_gates / self.frame.open_gates.max(),
        }
        parts = [pd.DataFrame({"step": self.frame.step, "value": v, "series": name}) for name, v in found.items()]
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class GateSearch:
    """What learn_gates found: a ranking of nodes, and how the search went."""

    order: list[Node] | list[NodeAt]
    """Nodes of the gated sites, the most needed first; with gates per position, nodes at positions. Nodes that share a
    gate follow each other, q before k."""

    tau: NodeValues
    """Final gate parameters, of gates per position the largest; nodes without a gate have +inf."""

    n_open: int
    """How many of them, from the front, have an open gate."""

    history: SearchHistory
    """One row per step."""


def learn_gates(
    model: AnyModel,
    pairs: TaskBatch,
    config: PruneConfig,
    baseline: Baseline,
    *,
    teacher: Teacher | None = None,
    generator: torch.Generator,
    progress: bool = False,
) -> GateSearch:
    """Train one gate per node on `pairs` and rank the nodes by what came out: `learn_many` with one mask.

    Raises:
        CircuitError: if `baseline` does not fit the model.
    """
    return learn_many(model, pairs, [config], baseline, teacher=teacher, generators=[generator], progress=progress)[0]


def learn_many(
    model: AnyModel,
    pairs: TaskBatch,
    configs: Sequence[PruneConfig],
    baseline: Baseline,
    *,
    teacher: Teacher | None = None,
    generators: Sequence[torch.Generator],
    progress: bool = False,
) -> list[GateSearch]:
    """Train S masks at once on one frozen model, one for each of `configs` and `generators`.

    Each mask draws prompts and noise from its own generator as it would alone, and a step's gradients are those of
    separate searches up to rounding. Gates are hard, so rounding grows: whole runs agree in distribution only. What a
    step costs, peak memory above all, grows with S; the model is there once. With a `teacher` its answers take the
    place of the model's own wherever an objective or a bound looks at those.

    Raises:
        CircuitError: if `baseline` does not fit the model.
        ConfigError: if the masks differ in what they have to have in common, or share a generator.
        TaskError: for gates per position where prompts differ in length.
    """
    model = hooked(model)
    check_common(configs, generators)
    if isinstance(baseline, NodeValues):
        baseline.check(model.cfg)
    n_pos = length_in_common(pairs) if configs[0].per_position else None
    gates = NodeGates(model, baseline, configs, generators, n_pos)
    histories = train_gates(model, pairs, gates, teacher=teacher, progress=progress)
    rankings = [gates.ranking(i) for i in range(len(configs))]
    return [GateSearch(order, gates.values(i), n_open, histories[i]) for i, (order, n_open) in enumerate(rankings)]


def check_common(configs: Sequence[PruneConfig], generators: Sequence[torch.Generator]) -> None:
    """Raise ConfigError unless masks with these settings can be learned together."""
    if not configs or len(configs) != len(generators):
        raise ConfigError(f"{len(configs)} configurations and {len(generators)} generators; give one of each per mask.")
    if len({id(generator) for generator in generators}) < len(generators):
        raise ConfigError("two masks share a generator; give each its own, seeded as its search alone would be.")
    for name in IN_COMMON:
        values = {getattr(config, name): None for config in configs}
        if len(values) > 1:
            raise ConfigError(
                f"masks that are learned together have one {name}, and these have {', '.join(map(str, values))}; "
                "learn them apart."
            )


def train_gates(
    model: HookedModel, pairs: TaskBatch, gates: Gates, *, teacher: Teacher | None = None, progress: bool = False
) -> list[SearchHistory]:
    """Train the masks of `gates` until their steps are over, or each has stopped; the history of each."""
    batch = pairs.both_sides().to(model.embed.W_E.device)
    searches = [_Search(gates, i, pairs.lengths) for i in range(len(gates.taus))]
    with evaluating(model), frozen(model):
        reference = taught(model, batch, teacher)
        steps = tqdm(range(gates.configs[0].n_steps), disable=not progress, desc="gates", unit="step")
        for step in steps:
            running = [search for search in searches if not search.stopped]
            if not running:
                break
            _step(model, gates, running, batch, reference, step)
            if step % 10 == 0:
                steps.set_postfix_str("; ".join(search.said for search in searches[:4]))
    return [search.history for search in searches]


def _step(
    model: HookedModel,
    gates: Gates,
    running: "Sequence[_Search]",
    batch: TaskBatch,
    reference: AnswerLogits,
    step: int,
) -> None:
    """One step of every running mask on prompts that it draws."""
    for search in running:
        search.rows = next(search.draws)
    for group in _alike(running, batch.lengths, _most_tokens(model)):
        fits, gaps = _fits(model, gates, group, batch, reference, step)
        grads = torch.autograd.grad(fits.sum(), [search.tau for search in group])
        for search, fit, gap, grad in zip(group, fits.tolist(), gaps.tolist(), grads, strict=True):
            search.update(step, fit, gap, grad)


def _alike(searches: "Sequence[_Search]", lengths: Int[Tensor, " prompt"], most_tokens: int) -> "list[list[_Search]]":
    """The masks of a step in groups that run together: prompts of like length, and no more tokens than pays."""
    longest = {search.i: int(lengths[search.rows].max()) for search in searches}
    groups: list[list[_Search]] = []
    for search in sorted(searches, key=lambda search: longest[search.i]):
        group = groups[-1] if groups else []
        n_tokens = longest[search.i] * sum(len(other.rows) for other in (*group, search))
        if group and n_tokens <= most_tokens and longest[search.i] <= PADDED * longest[group[0].i]:
            group.append(search)
        else:
            groups.append([search])
    return groups


def _most_tokens(model: HookedModel) -> int:
    """How many tokens of several masks run in one pass: on a CPU until their activations fill its caches."""
    if model.embed.W_E.device.type != "cpu":
        return MOST_TOKENS
    return ACTIVATIONS_TOGETHER // n_nodes(model.cfg)


def _fits(
    model: HookedModel,
    gates: Gates,
    running: "Sequence[_Search]",
    batch: TaskBatch,
    reference: AnswerLogits,
    step: int,
) -> Float[Tensor, "2 mask"]:
    """What each mask's gates are worth on its prompts, in one pass: its objective, and by how much the task loss lies
    above the model's, both the means over schemes."""
    config, chosen = gates.configs[0], [search.i for search in running]
    rows = [search.rows for search in running]
    counts, joined = [len(own) for own in rows], torch.cat(rows)
    here, opened = batch.rows(joined), gates.drawn(step, chosen)
    own = [batch.rows(own) for own in rows]
    packing, references = gates.packing(own), reference[joined].split(counts)
    block = gates.meeting(here, counts, packing)

    def run(opened: Mapping, shares: Mapping | None) -> tuple[AnswerLogits, ...]:
        with block(opened, shares):
            return answer_logits(model, here, packing=packing).split(counts)

    def fits(logits: Sequence[AnswerLogits]) -> Float[Tensor, " mask"]:
        parts = zip(running, references, logits, own, strict=True)
        return torch.stack([search.objective(ref, got, prompts) for search, ref, got, prompts in parts])

    def gaps(logits: Sequence[AnswerLogits]) -> Float[Tensor, " mask"]:
        parts = zip(references, logits, own, strict=True)
        return torch.stack([(answer_loss(got, on) - answer_loss(ref, on)).mean().detach() for ref, got, on in parts])

    found = []
    for scheme in config.schemes:
        shares = None if scheme == "full" else gates.shares(chosen)
        if scheme == "adversarial":
            shut = {group: m.detach() for group, m in opened.items()}
            steps = {"n_steps": config.adversary_steps, "step_size": config.adversary_step_size}
            shares = ascend([lambda shares, shut=shut: fits(run(shut, shares))], shares, **steps)[0]
        logits = run(opened, shares)
        found.append(torch.stack([fits(logits), gaps(logits)]))
    return torch.stack(found).mean(0)


class _Search:
    """One mask's way through a search: what it draws, what an open gate costs it, its optimizer and its history."""

    def __init__(self, gates: Gates, i: int, lengths: Int[Tensor, " pair"]):
        self.gates, self.i, self.config, self.tau = gates, i, gates.configs[i], gates.taus[i]
        self.objective, self.price = objective_of(self.config), _Price(self.config)
        self.draws = _draws(lengths, self.config, gates.generators[i])
        self.optimizer = torch.optim.AdamW([self.tau], lr=self.config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.rows: Int[Tensor, " prompt"] = torch.empty(0, dtype=torch.long)
        self.steps: list[tuple[int, float, int, float]] = []

    def update(self, step: int, fit: float, gap: float, grad: Float[Tensor, " gate"]) -> None:
        """One step on the gates, from the batch's objective and its gradient, and its gap to the model's task loss."""
        config = self.config
        self.gates.note_gain(self.i, grad, step)
        self.price.follow(fit, gap)
        with torch.no_grad():  # the price's gradient is written out, so that the gain holds the objective's share alone
            soft = torch.sigmoid(self.tau / config.temperature)
            self.tau.grad = grad + self.price.now * soft * (1 - soft) / config.temperature
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.n_steps))
        self.optimizer.step()
        with torch.no_grad():
            self.tau.clamp_(*TAU_RANGE)  # a gate that went further could not come back in time
        self.steps.append((step + 1, fit, self.gates.n_open(self.i), self.price.now))

    @property
    def stopped(self) -> bool:
        """Whether the number of open gates has settled, as `stop_after` defines it."""
        n = self.config.stop_after
        if not n:
            return False
        quiet = [n_open for step, _, n_open, _ in self.steps[-n:] if not self.config.noise_scale(step - 1)]
        return len(quiet) == n and max(quiet) - min(quiet) <= 0.01 * max(quiet)

    @property
    def said(self) -> str:
        """Where the search stands, in words."""
        _, fit, n_open, _ = self.steps[-1]
        return f"{self.config.objective} {fit:.3f}, open {n_open}"

    @property
    def history(self) -> SearchHistory:
        """Every step so far."""
        return SearchHistory(pd.DataFrame(self.steps, columns=list(SearchHistory.columns)))


Objective = Callable[[AnswerLogits, AnswerLogits, TaskBatch], Float[Tensor, ""]]
"""What a search minimises besides size: (model's logits, circuit's logits, batch) -> a number, 0 at best."""


def objective_of(config: PruneConfig) -> Objective:
    """The objective that a search asks for."""
    return {"agreement": _disagreement, "task_loss": _task_loss, "logit_difference": logit_difference_error}[
        config.objective
    ]


def _disagreement(reference: AnswerLogits, logits: AnswerLogits, batch: TaskBatch) -> Float[Tensor, ""]:
    return kl_div(log_softmax(logits, -1), log_softmax(reference, -1), log_target=True, reduction="batchmean")


def _task_loss(reference: AnswerLogits, logits: AnswerLogits, batch: TaskBatch) -> Float[Tensor, ""]:
    return answer_loss(logits, batch).mean()


class _Price:
    """What an open gate costs: it rises while every bound is kept and falls while one is not.

    So gates settle at the size that meets the stopping rule, and the ranking is decided where it is going to be cut.
    """

    def __init__(self, config: PruneConfig):
        self.now, self.rate = config.k_coef, config.price_rate
        bounds = {"task_loss": config.target_task_loss, "logit_difference": config.max_ld_error}
        self.bound = bounds.get(config.objective, config.max_kl)
        self.max_gap = config.max_loss_gap if config.rule in BOUND_IN_LOSS else math.inf
        self.fit: float | None = None
        self.gap = 0.0

    def follow(self, fit: float, gap: float) -> None:
        """Take note of one batch's objective, and by how much its task loss lies above the model's, nats."""
        self.fit = fit if self.fit is None else 0.8 * self.fit + 0.2 * fit
        self.gap = 0.9 * self.gap + 0.1 * gap
        used = max(self.fit / self.bound, abs(self.gap) / self.max_gap)
        self.now *= math.exp(self.rate * max(-1.0, min(1.0, (1 - used) / 0.5)))


def _draws(lengths: Int[Tensor, " pair"], config: PruneConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of both sides of random pairs, epoch after epoch; a batch's pairs are of similar length, to pad little."""
    n_pairs = len(lengths)
    while True:
        order = torch.randperm(n_pairs, generator=generator)
        for pool in order.split(16 * config.batch_size):
            batches = pool[lengths[pool].argsort(stable=True)].split(config.batch_size)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield torch.cat([batches[i], batches[i] + n_pairs])
