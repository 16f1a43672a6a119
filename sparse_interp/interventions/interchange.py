"""Interchange: in one run nodes hold what they hold in another, and a table says what that does.

    base         a prompt
    source       another prompt, its twin unless told otherwise; or the same one, in another version of the model
    exchanged    the base run, in which the nodes hold what they hold in the source run at the same position

    effect          =  metric(exchanged) - metric(base)
    recovered_frac  =  effect / (metric(source) - metric(base))
    follows_frac    =  share of prompts that choose between answer and foil as their source does, among those where base
                       and source choose differently (interchange intervention accuracy: Geiger et al. 2021,
                       arXiv:2106.02997, section 3)

`interchange_each` exchanges every node alone and keeps each prompt apart, which is what a comparison of circuit and
model needs; blocks and positions before a node are not run again.

The same as a `with` block, for runs of your own, is `ablate(model, nodes, Counterfactual(), batch=batch)`. For
subspaces, learned ones too, TransformerLens has `SubspaceInterchange` and `fit_das`, which are right on our models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_interp.axes import PerPrompt
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, Running, holding_hooks
from sparse_interp.interventions.answers import AnswerLogits, answer_logits, at_answers, stream_at
from sparse_interp.interventions.baselines import values_on
from sparse_interp.interventions.sweeps import TOKENS_AT_ONCE, Rows, exchanging, keys_before, reaching, resumable
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import FINAL_READ, K, Node, Place, V, masks, places
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference

ANSWERS_AT_ONCE = 128
"""Prompts per forward pass."""


@dataclass(frozen=True, eq=False)
class InterchangeTable(Table):
    """One row per set of nodes, means over prompts.

    `nodes` (what the set is called) and `n_nodes`; the metric in the `base`, the `source` and the `exchanged` run;
    `effect`, `recovered_frac` and `follows_frac` as in the module's docstring, not a number where there is nothing to
    recover or no choice to follow; `n_prompts`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "nodes",
        "n_nodes",
        "base",
        "source",
        "exchanged",
        "effect",
        "recovered_frac",
        "follows_frac",
        "n_prompts",
    )

    def plot(self, ax: Axes | None = None) -> Axes:
        """What each set of nodes recovers; the dashed line is all of it."""
        bars = self.frame.assign(low=float("nan"), high=float("nan"))
        return bars_with_intervals(
            bars, label="nodes", value="recovered_frac", low="low", high="high", reference=1.0, ax=ax
        )


@torch.no_grad()
def interchange(
    model: AnyModel,
    batch: TaskBatch,
    nodes: Iterable[Node] | Mapping[str, Iterable[Node]],
    metric: Metric = logit_difference,
    *,
    source: TaskBatch | None = None,
    running: Running = nullcontext,
    source_running: Running = nullcontext,
    progress: bool = False,
) -> InterchangeTable:
    """Give `nodes` the values that they have in another run, and measure what becomes of the answers.

        interchange(model, batch, circuit.node_set)                                    from the twins
        interchange(model, batch, nodes, source=batch, running=circuit.running)        from the model into its circuit
        interchange(model, batch, nodes, source=batch, source_running=circuit.running) from the circuit into its model

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: the prompts of the base runs: the clean ones.
        nodes: one set of nodes, or several with a name each, which are exchanged one set after the other.
        metric: answer logits and `batch` -> one number per prompt; of the source run too, at its own answer position.
        source: prompts of the source runs, clean ones, row by row; None takes the twins of `batch`. Where a source ends
            before its base, the value at its last token stands for the rest.
        running: what the model runs as in base and exchanged runs; outside values do not undo the exchange.
        source_running: what it runs as in source runs.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: for nodes that the model does not have, or as many sources as there are not prompts.
    """
    model = hooked(model)
    groups = nodes if isinstance(nodes, Mapping) else {"": nodes}
    groups = {name: tuple(of_group) for name, of_group in groups.items()}
    taking = {name: {p: ~mask for p, mask in masks(of, model.cfg).items()} for name, of in groups.items()}
    source = batch.swapped() if source is None else source
    if len(source) != len(batch):
        raise CircuitError(f"{len(batch)} prompts take values from {len(source)} sources; each needs one of its own.")
    batch, source = (side.to(model.embed.W_E.device) for side in (batch, source))
    found: list[dict[str, PerPrompt]] = []
    order = batch.lengths.argsort(stable=True).split(ANSWERS_AT_ONCE)
    for rows in tqdm(order, disable=not progress, desc="interchange", unit="batch"):
        here, there = batch.rows(rows), source.rows(rows)
        with evaluating(model):
            found.append(_exchanged(model, here, there, taking, metric, running, source_running))
    return _table({name: torch.cat([part[name] for part in found]) for name in found[0]}, groups)


def _exchanged(
    model: HookedModel,
    here: TaskBatch,
    there: TaskBatch,
    taking: Mapping[str, Masks],
    metric: Metric,
    running: Running,
    source_running: Running,
) -> dict[str, PerPrompt]:
    """The metric per prompt, and the choice between the answers, in the base, source and exchanged runs."""
    found = {}

    def note(run: str, logits: Tensor) -> None:
        found[f"metric of {run}"] = metric(logits, here).cpu().double()
        found[f"choice of {run}"] = (logit_difference(logits, here) > 0).cpu().double()

    with source_running(model):
        values = at_answers(values_on(model, there, here.clean.shape[1]), here)
        note("source", answer_logits(model, there))
    with running(model):
        note("base", answer_logits(model, here))
        for name, kept in taking.items():
            with model.hooks(fwd_hooks=holding_hooks(kept, values)):
                note(f"set {name}", answer_logits(model, here))
    return found


def _table(found: Mapping[str, PerPrompt], groups: Mapping[str, tuple[Node, ...]]) -> InterchangeTable:
    base, source = (float(found[f"metric of {run}"].mean()) for run in ("base", "source"))
    differ = found["choice of base"] != found["choice of source"]
    rows = []
    for name, nodes in groups.items():
        exchanged = float(found[f"metric of set {name}"].mean())
        follows = found[f"choice of set {name}"] == found["choice of source"]
        called = name or (str(nodes[0]) if len(nodes) == 1 else f"{len(nodes)} nodes")
        recovered = (exchanged - base) / (source - base) if source != base else float("nan")
        followed = float(follows[differ].double().mean()) if bool(differ.any()) else float("nan")
        rows.append((called, len(nodes), base, source, exchanged, exchanged - base, recovered, followed, len(follows)))
    return InterchangeTable(pd.DataFrame(rows, columns=list(InterchangeTable.columns)))


# -- every node alone -------------------------------------------------------------------------------------------------

Read = Callable[[AnswerLogits, Int[Tensor, " row"]], Float[Tensor, "row number"]]
"""Answer logits of some prompts, and which of the batch they are -> one or more numbers of each."""


class Each(NamedTuple):
    """What exchanging every node alone does, prompt by prompt."""

    nodes: tuple[Node, ...]
    """The nodes, in the order of the forward pass."""

    base: Float[Tensor, "prompt number"]
    """What is read of base runs."""

    exchanged: Float[Tensor, "node prompt number"]
    """What is read with one node exchanged; exactly what base runs have where the node holds the same in both."""


@torch.no_grad()
def interchange_each(
    model: AnyModel,
    batch: TaskBatch,
    inside: Masks,
    read: Read,
    *,
    source: TaskBatch | None = None,
    running: Running = nullcontext,
    source_running: Running = nullcontext,
    progress: bool = False,
) -> Each:
    """Give the nodes of `inside`, one after the other, the values that they have in another run.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: the prompts of the base runs: the clean ones.
        inside: for every place which nodes are exchanged, at all positions or position by position, as
            `circuit.inside` has it.
        read: what is asked of the answer logits.
        source: prompts of the source runs, clean ones, row by row; None takes the twins of `batch`.
        running: what the model runs as in base and exchanged runs. What it holds nodes at must not depend on prompts.
        source_running: what it runs as in source runs.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: for as many sources as there are not prompts.
    """
    model = hooked(model)
    source = batch.swapped() if source is None else source
    if len(source) != len(batch):
        raise CircuitError(f"{len(batch)} prompts take values from {len(source)} sources; each needs one of its own.")
    batch, source = (side.to(model.embed.W_E.device) for side in (batch, source))
    at = {place: mask if mask.ndim == 2 else mask[None] for place, mask in inside.items() if bool(mask.any())}
    chosen = {place: mask.any(0).nonzero()[:, 0] for place, mask in at.items()}
    later = resumable(model) and all(mask.ndim == 1 for mask in inside.values())
    order, base, exchanged = batch.lengths.cpu().argsort(stable=True), [], []
    n_nodes = sum(map(len, chosen.values()))
    with tqdm(total=len(batch) * n_nodes, disable=not progress, desc="interchange", unit="node") as bar:
        for rows in order.split(ANSWERS_AT_ONCE):
            with evaluating(model):
                part = _Part(model, batch.rows(rows), source.rows(rows), later, source_running)
                with running(model):
                    base.append(read(part.begun(), rows).cpu().double())
                    each = [base[-1].new_zeros(0, *base[-1].shape)]
                    for place, channels in chosen.items():
                        each.append(base[-1].expand(len(channels), *base[-1].shape).clone())
                        for some, logits in part.exchanged(place, channels, at[place]):
                            each[-1][some.item, some.prompt] = read(logits, rows[some.prompt]).cpu().double()
                        bar.update(len(rows) * len(channels))
            exchanged.append(torch.cat(each))
    nodes = tuple(Node(*place, channel) for place, channels in chosen.items() for channel in channels.tolist())
    back = order.argsort()
    return Each(nodes, torch.cat(base)[back], torch.cat(exchanged, 1)[:, back])


class _Part:
    """Some prompts, what nodes hold in their source runs, and all of their base runs that others begin from."""

    def __init__(self, model: HookedModel, here: TaskBatch, there: TaskBatch, later: bool, source_running: Running):
        self.model, self.cfg, self.later = model, model.cfg, later
        n_pos = int(here.lengths.max())
        self.here = replace(here, clean=here.clean[:, :n_pos], corrupt=here.corrupt[:, :n_pos])
        with source_running(model):
            self.source = values_on(model, there, n_pos)

    def begun(self) -> AnswerLogits:
        """Answer logits of the base run; what nodes hold, the streams between blocks, and keys and values are kept."""
        self.base = values_on(self.model, self.here, self.here.clean.shape[1])
        keys = places(self.cfg, (K.name, V.name))
        self.past = {place: self.base[place].unflatten(-1, (-1, self.cfg.d_head)) for place in keys}
        self.streams = [stream_at(self.model, self.here, 0)]
        for layer in range(self.cfg.n_layers):
            self.streams.append(stream_at(self.model, self.here, layer + 1, self.streams[-1], layer))
        return answer_logits(self.model, self.here, self.streams[-1], self.cfg.n_layers)

    def exchanged(
        self, place: Place, channels: Int[Tensor, " channel"], at: Bool[Tensor, "pos width"]
    ) -> Iterator[tuple[Rows, AnswerLogits]]:
        """Prompts with one node exchanged, where that changes anything, and their answer logits, pass by pass."""
        base, source = (values[place] for values in (self.base, self.source))
        at = at.to(base.device)
        source = torch.where(at, source, base)
        moved = (base[..., channels] != source[..., channels]) & reaching(self.here, place, self.cfg)[..., None]
        prompt, item = moved.any(1).nonzero().unbind(1)
        lengths = self.here.lengths[prompt]
        rows = Rows(item, prompt, moved.byte().argmax(1)[prompt, item], lengths)
        shortened = self.later or place.layer == self.cfg.n_layers
        sizes, order = (lengths - rows.begin if shortened else lengths).sort(descending=True, stable=True)
        n_done = 0
        while n_done < len(order):
            n_pos = int(sizes[n_done])
            some = rows.of(order[n_done : n_done + max(1, TOKENS_AT_ONCE // n_pos)])
            yield some, self._logits(place, channels.to(base.device), source, some, n_pos)
            n_done += len(some.item)

    def _logits(
        self, place: Place, channels: Int[Tensor, " channel"], source: Tensor, rows: Rows, n_pos: int
    ) -> AnswerLogits:
        """Answer logits of rows of one place, of which the last `n_pos` positions are run (all of a shorter prompt)."""
        last = self.here.last[rows.prompt]
        start = (last + 1 - n_pos).clamp(min=0)
        pos = start[:, None] + torch.arange(n_pos, device=start.device)
        tokens, stream = (x[rows.prompt[:, None], pos] for x in (self.here.clean, self.streams[place.layer]))
        hook = exchanging(source, channels, rows, last[:, None] if place.site == FINAL_READ.name else pos, n_labels=1)
        each, end = torch.arange(len(last), device=last.device), last - start
        with self.model.hooks(fwd_hooks=[(place.hook, hook)]):
            if place.layer < self.cfg.n_layers:
                seen = None if self.cfg.attention_dir == "causal" else self.here.attention_mask[rows.prompt][:, :n_pos]
                given: dict[str, Any] = {"start_at_layer": place.layer, "stop_at_layer": self.cfg.n_layers}
                if self.later:
                    given["past_kv_cache"] = keys_before(self.cfg, self.past, rows.prompt, start, place.layer)
                stream = self.model(stream, tokens=tokens, attention_mask=seen, **given)
            ends = {"tokens": tokens[each, end][:, None], "start_at_layer": self.cfg.n_layers}
            return self.model(stream[each, end][:, None], **ends)[:, 0]
