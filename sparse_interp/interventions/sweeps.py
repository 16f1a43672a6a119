"""Exact sweeps: every node patched alone, and the model run on from there.

    for every node (and position):  run the model with that one value exchanged, read the metric

is what this computes, and it runs as little of it as can matter:

    before      blocks before the node's are not run again: the stream that enters its block is kept
    earlier     nor, in a causal model of ours, are positions before the first that changes: their keys and values are
                kept
    unchanged   a prompt in which the node holds the same in both runs has an effect of exactly 0; so has a change in
                the last block, past its keys and values, at a position that is not asked about
    together    what is left, pairs of a node and a prompt, is sorted by length and run by as many as the budget holds
    answers     nothing but the answer position is unembedded, if that is all that the metric looks at

A metric that needs the logits of every position, or of all prompts at once, and hooks of somebody else's, which may
count rows and positions, get whole batches instead. Then only the blocks before are saved, and nodes that hold the same
in every prompt.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import HeadVectors, PerPrompt, Resid, Tokens
from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import FwdHooks
from sparse_interp.interventions.answers import AnswerLogits
from sparse_interp.interventions.memory import MARGIN, Meter
from sparse_interp.interventions.node_effects import PatchingTable, Positions, Question
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import AnyModel, HookedModel
from sparse_interp.model.layers import heard
from sparse_interp.model.sites import ATTN_READ, FINAL_READ, NODE_SITES, K, Node, Place, V, flat, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference

BUDGET_BYTES = 1 << 30
"""What a sweep may hold besides the model, unless told otherwise."""

TOKENS_AT_ONCE = 1 << 12
"""Tokens of one pass, at most: on a CPU more are no faster."""

Values = Float[Tensor, "batch pos width"]


@torch.no_grad()
def patch_nodes(
    model: AnyModel,
    batch: TaskBatch,
    metric: Metric = logit_difference,
    *,
    sites: Collection[str] = NODE_SITES,
    nodes: Iterable[Node] | None = None,
    positions: Positions = None,
    direction: str = "denoising",
    budget_bytes: int = BUDGET_BYTES,
    progress: bool = True,
) -> PatchingTable:
    """Patch every node alone, exactly, and say what that does to the metric.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: clean and corrupt prompts.
        metric: logits and batch -> one number per prompt.
        sites: sites whose nodes are patched, unless `nodes` names them.
        nodes: the nodes to patch; None is every node at `sites`.
        positions: None patches a node at all positions of a prompt at once; `each` at one after the other, a row each;
            a list of positions at each of those alone, negative ones counted from the end of each prompt.
        direction: `denoising` (values of the clean run in the corrupt one) or `noising` (the other way round).
        budget_bytes: what the sweep may hold in memory at any time besides the model. How many nodes run together
            follows from it.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: for an unknown site, direction or position, or a budget in which not even one node fits.
        CircuitError: for a node that the model does not have.
        TaskError: if the metric gives anything but one number per prompt.
    """
    question = Question(model, batch, metric, sites=sites, nodes=nodes, positions=positions, direction=direction)
    with evaluating(question.model):
        sweep = _Sweep(question, budget_bytes)
        work = {place: sweep.work(place) for place in question.channels}
        form = "{l_bar}{bar}| {elapsed}<{remaining}"
        with tqdm(total=sum(work.values()), disable=not progress, desc="patching nodes", bar_format=form) as bar:
            effects = dict(sweep.effects(bar.update))
    return question.table(effects, float(sweep.base_metric.mean()), float(sweep.source_metric.mean()))


class Rows(NamedTuple):
    """Prompts to run, each with one node patched at the positions from `begin` to before `end`."""

    item: Int[Tensor, " row"]
    """Which effect of a place the row belongs to: the channel's place among those chosen, times labels, plus label."""

    prompt: Int[Tensor, " row"]
    begin: Int[Tensor, " row"]
    end: Int[Tensor, " row"]

    def of(self, chosen: Int[Tensor, " chosen"] | slice) -> "Rows":
        """Some of them."""
        return Rows(*(values[chosen] for values in self))


class _Sweep:
    """Two runs that advance layer by layer, and between their steps one run after the other with a node exchanged."""

    def __init__(self, question: Question, budget_bytes: int):
        self.asked, self.model, self.cfg = question, question.model, question.model.cfg
        self.overheard = overheard(self.model)
        self.resumable = resumable(self.model)
        self.budget = _Budget(question, budget_bytes, self.resumable)
        self.budget.measure(self._trial, only=len(question) if self.overheard else None)
        self.past: dict[Place, HeadVectors] = {}
        answers = self._answers_and_past(question.base)
        self.reading = question.reading(question.base, answers)
        self.packed = self.reading.answers_alone and self.reading.prompts_alone and not self.overheard
        if not self.packed:
            self.budget.take_whole_batches(everywhere=not self.reading.answers_alone)
        self.base_metric = self._number(question.base, answers)
        self.source_metric = self._number(question.source, self._answers_and_past(question.source, keep=False))
        self.streams = {"base": self._entered(question.base), "source": self._entered(question.source)}

    def work(self, place: Place) -> float:
        """How much there is to do at a place, in some unit."""
        n_labels = 1 if self.asked.labels is None else len(self.asked.labels)
        return len(self.asked.channels[place]) * n_labels * (self.cfg.n_layers - place.layer + 0.25)

    def effects(self, done: Callable[[float], Any]) -> Iterator[tuple[Place, Float[Tensor, "channel label"]]]:
        """The mean effects at every place in turn."""
        for layer in range(max(place.layer for place in self.asked.channels) + 1):
            here = [place for place in self.asked.channels if place.layer == layer]
            runs = {"base": self.asked.base, "source": self.asked.source}
            steps = {run: self._advanced(layer, tokens, self.streams[run], here) for run, tokens in runs.items()}
            for place in here:
                values = (steps[run][1].pop(place) for run in runs)
                yield place, self._swept(place, *values, done)
            self.streams = {run: stream for run, (stream, _) in steps.items()}

    # -- the two runs -------------------------------------------------------------------------------------------------

    def _trial(self, n: int) -> None:
        """As much as a pass holds: `n` prompts of full length through all blocks, with a copy made at every place."""
        rows = torch.arange(n, device=self.asked.device) % len(self.asked)
        copies: FwdHooks = [(place.hook, lambda seen, hook: seen.clone()) for place in self.asked.channels]
        tokens = self.asked.base[rows]
        seen = None if self.asked.seen is None else self.asked.seen[rows]
        with self.model.hooks(copies):
            stream = self.model(tokens, attention_mask=seen, stop_at_layer=self.cfg.n_layers)
            self.model(stream[:, -1:], tokens=tokens[:, -1:], start_at_layer=self.cfg.n_layers)

    def _parts(self) -> tuple[Int[Tensor, " row"], ...]:
        """The prompts by as many as may run together; all of them while somebody listens."""
        n = len(self.asked) if self.overheard else self.budget.n_rows(self.asked.n_pos, 0)
        return torch.arange(len(self.asked), device=self.asked.device).split(n)

    def _answers_and_past(self, tokens: Tokens, keep: bool = True) -> AnswerLogits:
        """Answer logits of a run; the keys and values of every layer stay in `past`, if they are of use."""
        kept: dict[Place, list[Tensor]] = {
            place: [] for place in places(self.cfg, (K.name, V.name)) if keep and self.resumable
        }
        hooks: FwdHooks = [(place.hook, partial(_note, seen)) for place, seen in kept.items()]
        logits = []
        for rows in self._parts():
            with self.model.hooks(hooks):
                stream = self._between(tokens[rows], rows, stop_at_layer=self.cfg.n_layers)
            logits.append(self.asked.unembedded(tokens[rows], stream, self.asked.batch.last[rows]))
        self.past |= {place: torch.cat(kept.pop(place)) for place in list(kept)}
        return torch.cat(logits)

    def _between(self, given: Tensor, rows: Int[Tensor, " row"], **where: Any) -> Resid:
        seen = None if self.asked.seen is None else self.asked.seen[rows]
        return self.model(given, attention_mask=seen, **where)

    def _number(self, tokens: Tokens, answers: AnswerLogits) -> PerPrompt:
        everyone = torch.arange(len(self.asked), device=self.asked.device)
        logits = answers if self.reading.answers_alone else self.asked.everywhere(tokens, everyone)
        return self.asked.metric(logits, self.asked.batch)

    def _entered(self, tokens: Tokens) -> Resid:
        """The stream that enters block 0."""
        return torch.cat([self._between(tokens[rows], rows, stop_at_layer=0) for rows in self._parts()])

    def _advanced(
        self, layer: int, tokens: Tokens, stream: Resid, here: list[Place]
    ) -> tuple[Resid, dict[Place, Values]]:
        """The stream after a layer, and what the nodes of places in it hold."""
        seen: dict[Place, list[Tensor]] = {place: [] for place in here}
        streams = []
        with self.model.hooks([(place.hook, partial(_note, found)) for place, found in seen.items()]):
            for rows in self._parts():
                if layer < self.cfg.n_layers:
                    where = {"tokens": tokens[rows], "start_at_layer": layer, "stop_at_layer": layer + 1}
                    streams.append(self._between(stream[rows], rows, **where))
                elif self.reading.answers_alone:
                    self.asked.unembedded(tokens[rows], stream[rows], self.asked.batch.last[rows])
                else:
                    self.model(stream[rows], tokens=tokens[rows], start_at_layer=layer)
        values = {place: flat(torch.cat(seen.pop(place))) for place in here}
        if layer == self.cfg.n_layers and self.reading.answers_alone:
            values = {place: self.asked.spread(found) for place, found in values.items()}
        return (torch.cat(streams) if streams else stream), values

    # -- one place ----------------------------------------------------------------------------------------------------

    def _swept(
        self, place: Place, base: Values, source: Values, done: Callable[[float], Any]
    ) -> Float[Tensor, "channel label"]:
        channels = self.asked.channels[place].to(self.asked.device)
        n_labels = 1 if self.asked.labels is None else len(self.asked.labels)
        effects = torch.zeros(len(channels) * n_labels, dtype=torch.float64, device=channels.device)
        measured = self._by_pairs if self.packed else self._by_batches
        matters, first = self._matters(place)[..., None], 0
        for some in channels.split(self.budget.n_channels()):
            rows = self._rows((base[..., some] != source[..., some]) & matters, first * n_labels)
            for n in measured(place, channels, source, rows, effects):
                done(self.work(place) * len(some) / len(channels) * n / len(rows.item))
            if len(rows.item) == 0:
                done(self.work(place) * len(some) / len(channels))
            first += len(some)
        return (effects / len(self.asked)).view(len(channels), n_labels)

    def _matters(self, place: Place) -> Bool[Tensor, "batch pos"]:
        """Where a change at a place can change the metric."""
        if self.overheard or not self.reading.answers_alone:
            return self.asked.mask
        return reaching(self.asked.batch, place, self.cfg)[:, : self.asked.n_pos]

    def _rows(self, moved: Bool[Tensor, "batch pos channel"], first_item: int) -> Rows:
        """A row for every prompt and node, or prompt, node and label, where something would change."""
        at, lengths = self.asked.at, self.asked.batch.lengths
        if at is None:
            prompt, item = moved.any(1).nonzero().unbind(1)
            return Rows(first_item + item, prompt, moved.byte().argmax(1)[prompt, item], lengths[prompt])
        index = at.clamp(min=0)[..., None].expand(-1, -1, moved.shape[2])
        prompt, label, item = (moved.gather(1, index) & (at >= 0)[..., None]).nonzero().unbind(1)
        begin = at[prompt, label]
        return Rows(first_item + item * at.shape[1] + label, prompt, begin, begin + 1)

    def _by_pairs(
        self, place: Place, channels: Tensor, source: Values, rows: Rows, effects: Float[Tensor, " item"]
    ) -> Iterator[int]:
        """Add to `effects`, a pass of rows at a time; yields how many rows each pass had."""
        lengths = self.asked.batch.lengths[rows.prompt]
        shortened = self.resumable or place.layer == self.cfg.n_layers
        sizes, order = (lengths - rows.begin if shortened else lengths).sort(descending=True, stable=True)
        n_done = 0
        while n_done < len(order):
            n_pos = int(sizes[n_done])
            part = rows.of(order[n_done : n_done + self.budget.n_rows(n_pos, self.asked.n_pos - n_pos)])
            logits = self._patched(place, channels, source, part, n_pos)
            change = self.asked.metric(logits, self.asked.batch.rows(part.prompt)) - self.base_metric[part.prompt]
            effects.index_add_(0, part.item, change.to(effects))
            n_done += len(part.item)
            yield len(part.item)

    def _by_batches(
        self, place: Place, channels: Tensor, source: Values, rows: Rows, effects: Float[Tensor, " item"]
    ) -> Iterator[int]:
        """The same with all prompts of some items in each pass."""
        items, counts = rows.item.unique(return_counts=True)
        if not len(items):
            return
        prompts, at = torch.arange(len(self.asked), device=items.device), self.asked.at
        n_labels = 1 if at is None else at.shape[1]
        together = 1 if self.overheard else self.budget.n_rows(self.asked.n_pos, 0) // len(self.asked)
        for some, n in zip(items.split(together), counts.split(together), strict=True):
            begin = torch.zeros_like(prompts).repeat(len(some)) if at is None else at.T[some % n_labels].flatten()
            end = self.asked.batch.lengths.repeat(len(some)) if at is None else begin + 1
            part = Rows(some.repeat_interleave(len(prompts)), prompts.repeat(len(some)), begin, end)
            logits = self._patched(place, channels, source, part, self.asked.n_pos)
            for item, one in zip(some.tolist(), logits.chunk(len(some)), strict=True):
                effects[item] = (self.asked.metric(one, self.asked.batch) - self.base_metric).to(effects).sum()
            yield int(n.sum())

    def _patched(
        self, place: Place, channels: Tensor, source: Values, rows: Rows, n_pos: int
    ) -> Float[Tensor, "row d_vocab"] | Float[Tensor, "row run d_vocab"]:
        """Logits of rows of one place, of which the last `n_pos` positions are run (all of a shorter prompt)."""
        last = self.asked.batch.last[rows.prompt]
        start = (last + 1 - n_pos).clamp(min=0)
        pos = start[:, None] + torch.arange(n_pos, device=start.device)
        tokens, stream = (x[rows.prompt[:, None], pos] for x in (self.asked.base, self.streams["base"]))
        at_last = place.site == FINAL_READ.name and self.reading.answers_alone
        exchanged = exchanging(source, channels, rows, last[:, None] if at_last else pos, self.budget.n_labels)
        seen = None if self.asked.seen is None else self.asked.seen[rows.prompt][:, :n_pos]
        with self.model.hooks([(place.hook, exchanged)]):
            if place.layer < self.cfg.n_layers:
                where = {"start_at_layer": place.layer, "stop_at_layer": self.cfg.n_layers}
                past = {}
                if self.resumable:
                    past["past_kv_cache"] = keys_before(self.cfg, self.past, rows.prompt, start, place.layer)
                stream = self.model(stream, tokens=tokens, attention_mask=seen, **where, **past)
            if self.reading.answers_alone:
                return self.asked.unembedded(tokens, stream, last - start)
            return self.asked.widened(self.model(stream, tokens=tokens, start_at_layer=self.cfg.n_layers))


def keys_before(
    cfg: AnyShape,
    past: Mapping[Place, HeadVectors],
    prompt: Int[Tensor, " row"],
    start: Int[Tensor, " row"],
    layer: int,
) -> TransformerLensKeyValueCache | None:
    """Keys and values of the positions before `start`, for `layer` and those after it, padded on the left."""
    n_past = int(start.max())
    if n_past == 0:
        return None
    pos = start[:, None] - n_past + torch.arange(n_past, device=start.device)
    cache = TransformerLensKeyValueCache.init_cache(cfg, str(start.device), len(start))
    cache.previous_attention_mask = (pos >= 0).int()
    index = prompt[:, None], pos.clamp(min=0)
    for later in range(layer, cfg.n_layers):
        entry = cache.entries[later]
        entry.past_keys, entry.past_values = (past[Place(later, s.name)][index] for s in (K, V))
    cache.freeze()
    return cache


def reaching(batch: TaskBatch, place: Place, cfg: AnyShape) -> Bool[Tensor, "batch pos"]:
    """Where what a place holds can reach the answer: past keys and values of the last block at a prompt's end alone."""
    if place.layer < cfg.n_layers - 1 or place.site in (ATTN_READ.name, K.name, V.name):
        return batch.attention_mask.bool()
    return torch.arange(batch.clean.shape[1], device=batch.clean.device) == batch.last[:, None]


def overheard(model: HookedModel) -> bool:
    """Whether somebody's hooks are on a model, or edges of it are gated: these may count rows and positions."""
    ours = isinstance(model, HookedSparseTransformer)
    points = (model if ours else model.tl).hook_dict.values()
    return heard(*points) or (ours and _gated(model))


def resumable(model: HookedModel) -> bool:
    """Whether a run may begin at a later position, with keys and values of the earlier ones given."""
    return isinstance(model, HookedSparseTransformer) and model.cfg.attention_dir == "causal" and not overheard(model)


def _gated(model: HookedSparseTransformer) -> bool:
    """Whether edges are gated: their baselines may be of prompts and positions too."""
    return any(any(part.edge_gates.values()) for block in model.layers for part in (block.attn, block.mlp))


def _note(seen: list[Tensor], activation: Tensor, hook: HookPoint) -> None:
    seen.append(activation)


def exchanging(source: Values, channels: Tensor, rows: Rows, pos: Int[Tensor, "row run"], n_labels: int) -> Callable:
    """A hook under which each row's node holds, from its `begin` to its `end`, what it holds in `source`."""
    row, column = torch.arange(len(pos), device=pos.device)[:, None], torch.arange(pos.shape[1], device=pos.device)
    channel, prompt = channels[rows.item // n_labels][:, None], rows.prompt[:, None]
    inside = (pos >= rows.begin[:, None]) & (pos < rows.end[:, None])

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        nodes = flat(activation)
        values = torch.where(inside, source[prompt, pos, channel].to(nodes), nodes[row, column, channel])
        return nodes.index_put((row, column, channel), values).view_as(activation)

    return hook


class _Budget:
    """How much may run at once, so that no more than so many bytes are held."""

    def __init__(self, asked: Question, n_bytes: int, resumable: bool):
        self.asked, self.n_bytes = asked, n_bytes
        self.n_labels = 1 if asked.labels is None else len(asked.labels)
        cfg, n_tokens = asked.model.cfg, len(asked) * asked.n_pos
        self.number = torch.finfo(asked.model.embed.W_E.dtype).bits // 8
        by_layer: dict[int, int] = {}
        for place in asked.channels:
            by_layer[place.layer] = by_layer.get(place.layer, 0) + width(cfg, place.site)
        streams = 4 * cfg.d_model + 2 * max(by_layer.values())
        self.kept = 2 * width(cfg, K.name) * self.number if resumable else 0
        """Bytes of keys and values of a token in one layer."""
        self.logits = 4 * cfg.d_vocab * self.number
        """Bytes of the logits of one position, and what a metric makes of them."""
        widest = max(width(cfg, place.site) for place in asked.channels)
        held = n_tokens * (self.number * (streams + 2 * widest) + cfg.n_layers * self.kept) + len(asked) * self.logits
        self.per_channel = len(asked) * (60 * self.n_labels + (4 + 2 * self.number) * asked.n_pos)
        """Bytes of the list of what would change at a channel, at most."""
        self.listed = max(self.per_channel, n_bytes // 8)
        self.fixed, self.per_token = float(held + self.listed), 0.0

        self.everywhere = False

    def measure(self, trial: Callable[[int], None], only: int | None) -> None:
        """Learn what a token costs from trial runs of a few prompts, or of `only` so many.

        Raises:
            ConfigError: if not even one node fits.
        """

        def peak(n: int) -> float:
            with Meter() as meter:
                trial(n)
            return MARGIN * meter.peak

        n_few = only or 1
        few = peak(n_few)
        self.per_token = few / (n_few * self.asked.n_pos)
        self._check(n_few)
        if only is None and self.fixed + 3 * few <= self.n_bytes:
            slope = (peak(3) - few) / 2
            self.per_token, self.fixed = slope / self.asked.n_pos, self.fixed + max(0.0, few - slope)
            self._check(1)

    def take_whole_batches(self, everywhere: bool) -> None:
        """From here on a pass has all prompts of a node, and with `everywhere` logits at all their positions.

        Raises:
            ConfigError: if not even one node fits.
        """
        self.everywhere = everywhere
        self.fixed += len(self.asked) * self.logits * (self.asked.n_pos if everywhere else 1)
        self._check(len(self.asked))

    def n_rows(self, n_pos: int, n_past: int) -> int:
        """How many prompts may run at once with `n_pos` positions each, and keys of `n_past` before them."""
        fit = int((self.n_bytes - self.fixed) // self._row(n_pos, n_past))
        return max(1, min(fit, TOKENS_AT_ONCE // n_pos))

    def n_channels(self) -> int:
        """Of how many channels what would change may be listed at once."""
        return max(1, self.listed // self.per_channel)

    def _row(self, n_pos: int, n_past: int) -> float:
        past = n_past * self.kept * (self.asked.model.cfg.n_layers + 3)  # one layer's are copied as they are used
        return self.per_token * n_pos + past + self.logits * (n_pos if self.everywhere else 1)

    def _check(self, n_rows: int) -> None:
        pass_bytes = n_rows * self._row(self.asked.n_pos, self.asked.n_pos)
        if self.fixed + pass_bytes > self.n_bytes:
            what = "one prompt" if n_rows == 1 else f"{n_rows} prompts at once, as this metric or your hooks need"
            raise ConfigError(
                f"budget_bytes={self.n_bytes:,}: to patch one node of these {len(self.asked)} prompts of up to "
                f"{self.asked.n_pos} tokens takes {self.fixed + pass_bytes:,.0f} bytes, {self.fixed:,.0f} for what "
                f"both runs hold and {pass_bytes:,.0f} to run {what}. Give more, or a batch of fewer or shorter "
                "prompts."
            )
