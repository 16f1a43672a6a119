"""Causal scrubbing: whether nodes mean what somebody says they mean, and nothing else matters.

    hypothesis       {node: function of the prompt}: two prompts with equal values mean the same to that node
    1  exchanged     each such node takes, in every prompt, its value in another one that means the same to it
    2  resampled     every other node takes its value in a random other prompt
    scrubbed         both;  shuffled: every node takes its value in a random other prompt

    loss recovered   (L(shuffled) - L(run)) / (L(shuffled) - L(model))        1: the hypothesis is all that it takes

Values are exchanged between prompts of one length, position by position, and on the way of a forward pass: what a node
takes from another prompt was made there from nodes that had been exchanged before, each by its own meaning. So this is
the recursion of Chan et al. 2022 (causal scrubbing, AI Alignment Forum), with one partner for each node and prompt in
place of one for each path through them. Condition 2 alone is plain resample ablation of what is outside the claims.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from sparse_interp.axes import PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.scores import groups_of, mean_of, of_means
from sparse_interp.interventions.ablation import fitting
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits, answer_logits, at_answers
from sparse_interp.interventions.baselines import values_on
from sparse_interp.interventions.edges import cutting
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import Node, Place, flat, places
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Interval, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, answer_loss, is_correct, kl_divergence


class Prompt(NamedTuple):
    """What a claim may look at."""

    text: str
    """The prompt in words, without bos; empty if the model has no tokenizer."""

    tokens: tuple[int, ...]
    """Its token ids, bos included."""

    answer: int
    """Token id that continues it."""

    foil: int
    """Token id that continues its twin."""

    template: int
    """Template that it came from."""


Hypothesis = Mapping[Node, Callable[[Prompt], Hashable]]
"""What nodes mean: a function of the prompt each."""

CONDITIONS = ("model", "exchanged", "resampled", "scrubbed", "shuffled")


@dataclass(frozen=True, eq=False)
class ScrubTable(Table):
    """One row per condition, means over draws and prompts.

    `task_loss_nats` with its interval `low` to `high` over templates (95 %); `loss_recovered` with `recovered_low` and
    `recovered_high`, not a number where shuffling costs nothing; `kl_nats`, KL(model || run); `accuracy`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "condition",
        "task_loss_nats",
        "low",
        "high",
        "loss_recovered",
        "recovered_low",
        "recovered_high",
        "kl_nats",
        "accuracy",
    )

    nodes: Table
    """One row per claim: `name`, `n_values` (different meanings among the prompts), `exchanged_frac` (share of prompts
    that have a partner of the same meaning), `loss_recovered` if this claim alone is put to the test."""

    n_prompts: int
    """Prompts that every number is a mean over, both sides of pairs."""

    n_draws: int
    """How often partners were drawn."""

    @property
    def recovered(self) -> Interval:
        """Loss recovered by the hypothesis, with its interval."""
        row = self.frame.set_index("condition").loc["scrubbed"]
        return Interval(float(row.loss_recovered), float(row.recovered_low), float(row.recovered_high))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss recovered by condition; the dashed line is all of it."""
        return bars_with_intervals(
            self.frame, label="condition", value="loss_recovered", low="recovered_low", high="recovered_high",
            reference=1.0, ax=ax,
        )  # fmt: skip


@torch.no_grad()
def scrub(
    model: AnyModel,
    circuit: Circuit,
    hypothesis: Hypothesis,
    pairs: TaskBatch,
    *,
    n_draws: int = 8,
    generator: torch.Generator,
    progress: bool = True,
) -> ScrubTable:
    """Put to the test what nodes of a circuit are said to mean.

        quote = lambda prompt: '"' in prompt.text
        si.scrub(model, circuit, {si.Node(1, "v", 0): quote}, pairs, generator=generator)

    Where in the prompt something stands is part of a meaning too, for nodes that act there: prompts of one length
    exchange values position by position. Nodes of the circuit without a claim are resampled as all others are, and so
    are nodes with one at positions where the circuit has them not. Of a circuit whose edges were pruned, those that it
    lacks carry what their source holds in the random other prompt.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit: whose nodes the claims are about, and at which sites others are resampled.
        hypothesis: what its nodes mean.
        pairs: prompts with their twins; both are run, and are each other's possible partners.
        n_draws: how often partners are drawn.
        generator: draws partners and resamples.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to other weights, keeps nodes at positions of prompts of another length, or
            a claim is about a node that it does not have or that no site of it holds.
        ConfigError: if `n_draws` is below 1, or no two prompts have the same length.
    """
    circuit.check_lengths(pairs)
    circuit.check_model(model)
    _check(circuit, hypothesis, n_draws)
    model, batch = hooked(model), pairs.both_sides()
    claims = _Claims.of(hypothesis, batch, model.tokenizer)
    run = _Scrubbing(model, circuit, claims, batch)
    conditions = {name: run.found() for name in CONDITIONS[1:]}
    alone = {node: run.found() for node in hypothesis}
    total = n_draws * (len(conditions) + len(alone))
    with tqdm(total=total, disable=not progress, desc="scrubbing", unit="run") as bar:
        for _ in range(n_draws):
            partners = run.drawn(generator)
            for name, found in conditions.items():
                kept = () if name == "shuffled" else hypothesis
                found.add(run.logits(partners, kept, exchanged=name != "resampled", resampled=name != "exchanged"))
                bar.update()
            for node, found in alone.items():
                found.add(run.logits(partners, (node,), exchanged=True, resampled=False))
                bar.update()
    own = run.found()
    own.add(run.reference)
    return _table({"model": own, **conditions}, alone, claims, batch, n_draws, generator)


def _check(circuit: Circuit, hypothesis: Hypothesis, n_draws: int) -> None:
    if n_draws < 1:
        raise ConfigError(f"n_draws={n_draws}; scrubbing draws partners at least once.")
    for node in hypothesis:
        if node not in circuit.node_set or node.site not in circuit.sites:
            raise CircuitError(
                f"{node} is claimed to mean something and is no node of the circuit that is held outside it; claims "
                f"are about its {circuit.n_nodes} nodes at {', '.join(circuit.sites)}."
            )


@dataclass(frozen=True)
class _Claims:
    """What every prompt means to every node, and who may stand in for whom."""

    meaning: Mapping[Node, Int[Tensor, " prompt"]]
    """Numbers of meanings."""

    lengths: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, hypothesis: Hypothesis, batch: TaskBatch, tokenizer: PreTrainedTokenizerBase | None) -> "_Claims":
        prompts = [_prompt(batch, row, tokenizer) for row in range(len(batch))]
        meaning = {}
        for node, function in hypothesis.items():
            values = pd.Series([function(prompt) for prompt in prompts], dtype=object)
            meaning[node] = torch.from_numpy(pd.factorize(values, use_na_sentinel=False)[0].copy())
        lengths = batch.lengths.cpu()
        if int(lengths.bincount().max()) < 2:
            raise ConfigError(f"no two of {len(batch)} prompts have the same length, so none can exchange values.")
        return cls(meaning, lengths)

    def like(self, node: Node | None) -> Bool[Tensor, "prompt other"]:
        """Who may stand in for whom: those of one length and one meaning, a prompt for itself too.

        Without a node: any other prompt of the length, and itself only where it is the only one.
        """
        same = self.lengths[:, None] == self.lengths
        if node is not None:
            return same & (self.meaning[node][:, None] == self.meaning[node])
        others = same & ~torch.eye(len(same), dtype=torch.bool)
        return torch.where(others.any(1, keepdim=True), others, same)


def _prompt(batch: TaskBatch, row: int, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    tokens = batch.clean[row, : int(batch.lengths[row])].tolist()
    text = "" if tokenizer is None else tokenizer.decode(tokens[1:])
    return Prompt(text, tuple(tokens), int(batch.answer[row]), int(batch.foil[row]), int(batch.template[row]))


Partners = Mapping[Node | None, Int[Tensor, " prompt"]]
"""For every node the prompt whose value each prompt takes; under None the random other prompt of each."""


class _Found:
    """Numbers per prompt, summed over draws."""

    def __init__(self, batch: TaskBatch, reference: AnswerLogits):
        self.batch, self.reference = batch, reference
        self.sums, self.n = torch.zeros(3, len(batch), dtype=torch.float64), 0

    def add(self, logits: AnswerLogits) -> None:
        """One more draw."""
        kl = kl_divergence(self.reference.double(), logits.double(), self.batch)
        found = (answer_loss(logits, self.batch), kl, is_correct(logits, self.batch))
        self.sums += torch.stack([values.double().cpu() for values in found])
        self.n += 1

    @property
    def means(self) -> tuple[PerPrompt, PerPrompt, PerPrompt]:
        """Task loss, divergence from the model, and whether the answer is above the foil."""
        loss, kl, correct = (self.sums / self.n).unbind(0)
        return loss, kl, correct


class _Scrubbing:
    """Prompts by length, with what every node holds in the model's own run of them."""

    def __init__(self, model: HookedModel, circuit: Circuit, claims: _Claims, batch: TaskBatch):
        self.model, self.circuit, self.claims = model, circuit, claims
        self.batch = batch.to(model.embed.W_E.device)
        self.cut, self.inside = circuit.cut_edges(model), circuit.inside
        self.rows = [(claims.lengths == n).nonzero().flatten() for n in claims.lengths.unique().tolist()]
        with evaluating(model):
            self.reference = all_answer_logits(model, self.batch)
        self.parts = [self.batch.rows(rows.to(self.batch.clean.device)) for rows in self.rows]
        self.values = [values_on(model, part, int(part.lengths[0])) for part in self.parts]

    def found(self) -> _Found:
        """Nothing yet."""
        return _Found(self.batch, self.reference)

    def drawn(self, generator: torch.Generator) -> Partners:
        """Partners of all prompts, drawn anew."""
        found: dict[Node | None, Tensor] = {}
        for node in (None, *self.claims.meaning):
            chance = self.claims.like(node).float()
            drawn = torch.rand(chance.shape, generator=generator, device=generator.device).cpu()
            found[node] = (chance * (drawn + 1)).argmax(1)
        return found

    def logits(
        self, partners: Partners, kept: Mapping[Node, object] | Sequence[Node], *, exchanged: bool, resampled: bool
    ) -> AnswerLogits:
        """Answer logits with the nodes `kept` exchanged, or as they come, and all others resampled, or as they come."""
        found = torch.empty_like(self.reference)
        for rows, part, values in zip(self.rows, self.parts, self.values, strict=True):
            here = {node: torch.searchsorted(rows, others[rows]).to(found.device) for node, others in partners.items()}
            other = {place: of_place[here[None]] for place, of_place in values.items()}
            cutting_here = cutting(self.model, self.cut, other) if resampled else nullcontext()
            hooks = self.hooks(at_answers(other, part), here, list(kept), exchanged, resampled)
            with evaluating(self.model), cutting_here, self.model.hooks(fwd_hooks=hooks):
                found[rows.to(found.device)] = answer_logits(self.model, part)
        return found

    def hooks(
        self, other: Mapping[Place, Tensor], here: Partners, kept: Sequence[Node], exchanged: bool, resampled: bool
    ) -> FwdHooks:
        """Hooks for prompts of one length."""
        hooks: FwdHooks = []
        for place in places(self.circuit.cfg, self.circuit.sites):
            nodes = [node for node in kept if Place(node.layer, node.site) == place]
            channels = torch.tensor([node.channel for node in nodes], dtype=torch.long, device=self.reference.device)
            own = self.inside[place].to(channels.device)
            inside = torch.zeros_like(own).index_copy(-1, channels, own[..., channels])
            source = torch.stack([here[node] for node in nodes], 1) if nodes and exchanged else None
            if resampled or source is not None:
                held = other[place] if resampled else None
                hooks.append((place.hook, partial(_scrubbed, inside, channels, held, source)))
        return hooks


def _scrubbed(
    inside: Bool[Tensor, "*pos width"],
    channels: Int[Tensor, " claim"],
    held: Tensor | None,
    source: Int[Tensor, "batch claim"] | None,
    activation: Tensor,
    hook: HookPoint,
) -> Tensor:
    """Channels with a claim take their value from the row that `source` says, where they are inside; all others what is
    `held`."""
    came = flat(activation)
    found = came.clone() if held is None else torch.where(inside, came, fitting(held, came, hook))
    if source is not None:
        rows = source[:, None].expand(-1, came.shape[1], -1)
        exchanged = came[..., channels].gather(0, rows)
        found[..., channels] = torch.where(inside[..., channels], exchanged, found[..., channels])
    return found.view_as(activation)


def _table(
    conditions: Mapping[str, _Found],
    alone: Mapping[Node, _Found],
    claims: _Claims,
    batch: TaskBatch,
    n_draws: int,
    generator: torch.Generator,
) -> ScrubTable:
    groups = groups_of(batch)
    model, shuffled = (conditions[name].means[0] for name in ("model", "shuffled"))

    def share(means: Float[Tensor, "draw 3"]) -> Float[Tensor, " draw"]:
        run, whole, none = means.unbind(1)
        return (none - run) / (none - whole)

    def recovered(run: _Found) -> Interval:
        if abs(float((shuffled - model).mean())) < 1e-4:
            return Interval(nan, nan, nan)
        return of_means(torch.stack([run.means[0], model, shuffled], 1), share, groups, generator)

    rows = []
    for name, run in conditions.items():
        loss, kl, correct = run.means
        means = (float(kl.mean()), float(correct.mean()))
        rows.append((name, *mean_of(loss, groups, generator), *recovered(run), *means))
    nodes = [
        (str(node), int(meaning.max()) + 1, float((claims.like(node).sum(1) > 1).double().mean()), recovered(run).mean)
        for (node, meaning), run in zip(claims.meaning.items(), alone.values(), strict=True)
    ]
    by_node = pd.DataFrame(nodes, columns=["name", "n_values", "exchanged_frac", "loss_recovered"])
    return ScrubTable(pd.DataFrame(rows, columns=list(ScrubTable.columns)), Table(by_node), len(batch), n_draws)
