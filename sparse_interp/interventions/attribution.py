"""Attribution: what patching would do, estimated for every node or edge at once from gradients.

    effect of a node     ~  sum over positions of  (source - base) * d metric / d node          after AbsTopK
    effect of an edge    ~  sum over positions of  (source - base of its source node) * weight * d metric / d input

where `input` is what its target sums up before AbsTopK or activation. The gradient is taken

    gradient             in the run that is patched: attribution patching (Nanda 2023), for edges EAP (Syed et al. 2023,
                         arXiv 2310.10348)
    integrated inputs    as the mean over runs whose embeddings lie between those of the two runs: EAP-IG (Hanna et al.
                         2024, arXiv 2403.17806)
    integrated nodes     as the mean over runs in which all nodes of the place lie between, one run per place and step:
                         the "activations" variant (Marks et al. 2024, arXiv 2403.19647)

at the midpoints of `steps` equal parts of the way. Under AbsTopK a change can make another entry survive, and no
gradient says so; `table.rank_correlation(exact)` says how much that matters.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import PerPrompt, Resid, Tokens
from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import FwdHooks
from sparse_interp.interventions.answers import frozen
from sparse_interp.interventions.edges import row_values
from sparse_interp.interventions.node_effects import PatchingTable, Positions, Question
from sparse_interp.model.dense import AnyModel
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import EMBED_HOOK, NODE_SITES, Node, Place, flat, places, rows_of, width, wires
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference

METHODS = ("gradient", "integrated inputs", "integrated nodes")

Held = dict[Place, Tensor]
"""What the nodes of places hold, [batch pos width]; at the last read [batch 1 width] if only answers are unembedded."""


@dataclass(frozen=True, eq=False)
class EdgeTable(Table):
    """One row per non-zero within-block weight, in the order of the forward pass; means over prompts.

    `source` and `target` (nodes, as circuits write them: `L0.neuron.12`), `weight_name`, `weight`, `effect` (estimated,
    of the source's value of the other run going down this one edge) and `recovered_frac`.
    """

    columns: ClassVar[tuple[str, ...]] = ("source", "target", "weight_name", "weight", "effect", "recovered_frac")

    def plot(self, ax: Axes | None = None, *, n: int = 30) -> Axes:
        """A bar for each of the `n` edges with the largest effects, coloured by matrix."""
        frame = self.frame.sort_values("effect", key=abs, ascending=False, kind="stable").head(n)
        frame = frame.assign(edge=frame.source + " > " + frame.target, low=float("nan"))
        return bars_with_intervals(
            frame, label="edge", value="effect", low="low", high="low", by="weight_name", reference=0.0, ax=ax
        )


def attribute_nodes(
    model: AnyModel,
    batch: TaskBatch,
    metric: Metric = logit_difference,
    *,
    method: str = "gradient",
    steps: int = 5,
    sites: Collection[str] = NODE_SITES,
    nodes: Iterable[Node] | None = None,
    positions: Positions = None,
    direction: str = "denoising",
    progress: bool = True,
) -> PatchingTable:
    """Estimate the table of `patch_nodes` from gradients: a few runs in all instead of one per node.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: clean and corrupt prompts; all of them run at once.
        metric: logits and batch -> one number per prompt, differentiable.
        method: `gradient`, `integrated inputs` or `integrated nodes`; see the head of this module. The bigram table and
            positions stay those of the run that is patched.
        steps: points on the way of the integrated gradients.
        sites: sites whose nodes are meant, unless `nodes` names them.
        nodes: nodes that are meant; None is every node at `sites`.
        positions: as in `patch_nodes`.
        direction: as in `patch_nodes`.
        progress: whether to show a progress bar over runs.

    Raises:
        ConfigError: for an unknown method, site, direction or position, or fewer than one step.
        CircuitError: for a node that the model does not have.
        TaskError: if the metric gives anything but one number per prompt.
    """
    if method not in METHODS or steps < 1:
        raise ConfigError(f"method={method!r}, steps={steps}: choose {', '.join(METHODS)}, and at least 1 step.")
    question = Question(model, batch, metric, sites=sites, nodes=nodes, positions=positions, direction=direction)
    with evaluating(question.model), frozen(question.model):
        runs = _Runs(question)
        gradients = runs.gradients(method, steps, progress)
    effects = {}
    for place, channels in question.channels.items():
        product = runs.everywhere((runs.source[place] - runs.base[place]).double() * gradients[place].double())
        product = product[..., channels.to(product.device)] * question.mask[..., None]
        if question.at is None:
            effects[place] = product.sum(1).mean(0)[:, None]
            continue
        index = question.at.clamp(min=0)[..., None].expand(-1, -1, len(channels))
        effects[place] = (product.gather(1, index) * (question.at >= 0)[..., None]).mean(0).T
    return question.table(effects, runs.base_metric, runs.source_metric)


def attribute_edges(
    model: AnyModel,
    batch: TaskBatch,
    metric: Metric = logit_difference,
    *,
    method: str = "gradient",
    steps: int = 5,
    direction: str = "denoising",
) -> EdgeTable:
    """Estimate, for every non-zero weight within a block, what patching that one edge would do.

    The edge then carries what its source holds in the other run, and every other edge what it carries in this one; an
    edge of a v node takes that through the pattern of this run. The estimate is the gradient of that change.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: clean and corrupt prompts; all of them run at once.
        metric: logits and batch -> one number per prompt, differentiable.
        method: `gradient` (EAP) or `integrated inputs` (EAP-IG); the patterns are then those on the way.
        steps: points on the way of the integrated gradients.
        direction: as in `patch_nodes`.

    Raises:
        ConfigError: for an unknown method or direction, fewer than one step, or a metric without a gradient.
        TaskError: if the metric gives anything but one number per prompt.
    """
    if method not in METHODS[:2] or steps < 1:
        raise ConfigError(f"method={method!r}, steps={steps}: choose {' or '.join(METHODS[:2])}, and at least 1 step.")
    question = Question(model, batch, metric, direction=direction)
    with evaluating(question.model), frozen(question.model):
        runs = _Runs(question)
        effects = edge_effects(runs, steps if method == "integrated inputs" else 0)
    cfg, frames = question.model.cfg, []
    for layer, block in enumerate(question.model.layers):
        for wire in wires(cfg):
            weight, effect = wire.weight(block).detach(), effects[Matrix(layer, wire.weight_name)]
            row, target = weight.nonzero().unbind(1)
            named = {r: (c, name) for c in range(width(cfg, wire.source.name)) for r, name in rows_of(cfg, wire, c)}
            sources = [named[r] for r in row.tolist()]
            columns = {
                "source": [str(Node(layer, wire.source.name, channel)) for channel, _ in sources],
                "target": [str(Node(layer, wire.target.name, channel)) for channel in target.tolist()],
                "weight_name": [name for _, name in sources],
                "weight": weight[row, target].tolist(),
                "effect": effect[row, target].tolist(),
            }
            frames.append(pd.DataFrame(columns))
    frame, gap = pd.concat(frames, ignore_index=True), runs.source_metric - runs.base_metric
    return EdgeTable(frame.assign(recovered_frac=frame.effect / gap if gap else float("nan")))


def edge_effects(runs: "_Runs", steps: int = 0) -> dict[Matrix, Float[Tensor, "source target"]]:
    """The estimate for every entry of every within-block weight matrix, zero where the weight is.

    With `steps` it is the mean over so many runs on the way between the two embeddings, else that of the run itself.
    """
    total: dict[Matrix, Tensor] = {}
    for step in range(max(1, steps)):
        share = (step + 0.5) / steps if steps else 0.0
        hooks: FwdHooks = [(EMBED_HOOK, partial(_moved, runs.embedding_change * share))]
        for matrix, slope in runs.edge_slopes(hooks if steps else []).items():
            total[matrix] = total.get(matrix, 0.0) + slope / (max(1, steps) * len(runs.asked))
    return total


class _Runs:
    """The two runs of a question, and runs between them.

    `base` and `source` are what every node holds in the run that is patched and in the other, as hooks see it.
    """

    def __init__(self, question: Question):
        self.asked, self.model = question, question.model
        with torch.no_grad():
            stream = self.model(question.base, attention_mask=question.seen, stop_at_layer=self.model.cfg.n_layers)
            answers = question.unembedded(question.base, stream, question.batch.last)
            self.at_answers = question.reading(question.base, answers).answers_alone
            self.base, base_embedding, self.base_metric = self._held(question.base)
            self.source, embedding, self.source_metric = self._held(question.source)
        self.embedding_change = embedding - base_embedding

    def number(self, tokens: Tokens) -> PerPrompt:
        """The metric of a run; hooks around it are felt."""
        asked = self.asked
        if self.at_answers:
            stream = self.model(tokens, attention_mask=asked.seen, stop_at_layer=self.model.cfg.n_layers)
            return asked.metric(asked.unembedded(tokens, stream, asked.batch.last), asked.batch)
        return asked.metric(asked.widened(self.model(tokens, attention_mask=asked.seen)), asked.batch)

    def everywhere(self, values: Float[Tensor, "batch at width"]) -> Float[Tensor, "batch pos width"]:
        """Values at all positions, also of a place that only answer positions reach."""
        return self.asked.spread(values) if values.shape[1] < self.asked.n_pos else values

    def gradients(self, method: str, steps: int, progress: bool) -> Held:
        """The gradient of the metric at every node that is asked about, mean over the runs that `method` takes."""
        there = list(self.asked.channels)
        if method == "gradient":
            return self._gradients([], there)
        ways: list[tuple[str, Tensor, list[Place]]] = [(EMBED_HOOK, self.embedding_change, there)]
        if method == "integrated nodes":
            ways = [(place.hook, self.source[place] - self.base[place], [place]) for place in there]
        total = {place: torch.zeros_like(self.base[place]) for place in there}
        with tqdm(total=len(ways) * steps, disable=not progress, desc=method, unit="run") as bar:
            for hook, change, chosen in ways:
                for step in range(steps):
                    moved = self._gradients([(hook, partial(_moved, change * ((step + 0.5) / steps)))], chosen)
                    total |= {place: total[place] + found / steps for place, found in moved.items()}
                    bar.update()
        return total

    def edge_slopes(self, hooks: FwdHooks) -> dict[Matrix, Float[Tensor, "source target"]]:
        """How fast the metric's sum grows under `hooks` as each edge comes to carry its source's change."""
        held = self.base
        if hooks:
            with self.model.hooks(hooks), torch.no_grad():
                held, _, _ = self._held(self.asked.base)
        changed = {place: held[place] + (self.source[place] - self.base[place]) for place in self.base}
        carried = row_values(self.model, changed)
        weights = {
            Matrix(layer, wire.weight_name): wire.weight(block).detach()
            for layer, block in enumerate(self.model.layers)
            for wire in wires(self.model.cfg)
        }
        shares = {matrix: torch.ones_like(weight).requires_grad_() for matrix, weight in weights.items()}
        gates = {matrix: EdgeGate(share, carried[matrix]) for matrix, share in shares.items()}
        with self.model.hooks(hooks), self.model.gated_edges(gates), torch.enable_grad():
            slopes = _slopes(self.number(self.asked.base), list(shares.values()))
        # a share of 1 is the run itself and a share of 0 the edge patched: the way there is against the slope
        return {matrix: -slope for matrix, slope in zip(shares, slopes, strict=True)}

    def _gradients(self, hooks: FwdHooks, chosen: list[Place]) -> Held:
        probes = {place: torch.zeros_like(self.base[place]).requires_grad_() for place in chosen}
        probing = [(place.hook, partial(_moved, probe)) for place, probe in probes.items()]
        with self.model.hooks([*hooks, *probing]), torch.enable_grad():
            slopes = _slopes(self.number(self.asked.base), list(probes.values()))
        return dict(zip(probes, slopes, strict=True))

    def _held(self, tokens: Tokens) -> tuple[Held, Resid, float]:
        """What every node holds in a run, the embedding, and the mean metric."""
        known = dict.fromkeys([*places(self.model.cfg), *self.asked.channels])
        seen: dict[str, Tensor] = {}
        names = [EMBED_HOOK, *(place.hook for place in known)]
        with self.model.hooks([(name, partial(_note, seen, name)) for name in names]):
            number = float(self.number(tokens).mean())
        return {place: flat(seen[place.hook]) for place in known}, seen[EMBED_HOOK], number


def _slopes(numbers: PerPrompt, at: list[Tensor]) -> list[Tensor]:
    """The gradient of a metric's sum, zero at what it does not depend on."""
    if not numbers.requires_grad:
        raise ConfigError("the metric has no gradient, as counts have none; patch_nodes takes it, attribution cannot.")
    slopes = torch.autograd.grad(numbers.sum(), at, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(at, slopes, strict=True)]


def _moved(change: Tensor, activation: Tensor, hook: HookPoint) -> Tensor:
    """A hook, once it knows `change`."""
    return activation + change.view_as(activation)


def _note(seen: dict[str, Tensor], name: str, activation: Tensor, hook: HookPoint) -> None:
    seen[name] = activation
