"""A dense model's metric attributed to nodes of a sparse one, through the bridge between them.

    effect of a node  ~  sum over positions of  (source - base) * d metric / d node

`base` and `source` are what the node holds where the sparse model is entered from the dense model's activations, in the
dense run that is patched and in the other one. The gradient is that of the dense run's metric at the tied site behind
the node, back through the decoder, and through the sparse model from there to the node:

    d metric / d node  =  (d metric / d x_after) W_decode^T  d y_after / d node

so it is attribution patching (Nanda 2023) of what `transfer` carries, and on a rotated twin it is that of the sparse
model itself. Under AbsTopK a change can make another entry survive, and no gradient says so.
"""

from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.stretches import (
    as_stream,
    decoded,
    last_read,
    read_by,
    sparse_side,
    stretch_of,
    through,
)
from sparse_interp.errors import ConfigError
from sparse_interp.interventions.answers import frozen
from sparse_interp.interventions.node_effects import PatchingTable, Positions, Question
from sparse_interp.model.dense import AnyModel, FwdHooks, hooked
from sparse_interp.model.sites import FINAL_READ, FINAL_SCALE_HOOK, NODE_SITES, Node, Place, flat, stream_hook
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference


def attribute_across(
    bridge: Bridge,
    sparse: AnyModel,
    dense: AnyModel,
    batch: TaskBatch,
    metric: Metric = logit_difference,
    *,
    sites: Collection[str] = NODE_SITES,
    nodes: Iterable[Node] | None = None,
    positions: Positions = None,
    direction: str = "denoising",
) -> PatchingTable:
    """Estimate what exchanging each node of the sparse model does to the dense one, when the bridge carries it over.

    Args:
        bridge: ties the two models.
        sparse: the model whose nodes are meant.
        dense: the model whose metric is attributed, ours or TransformerLens'.
        batch: clean and corrupt prompts; all of them run at once.
        metric: the dense model's logits and batch -> one number per prompt, differentiable.
        sites: sites whose nodes are meant, unless `nodes` names them.
        nodes: nodes that are meant; None is every node at `sites`.
        positions: as in `patch_nodes`.
        direction: as in `patch_nodes`.

    Raises:
        BridgeError: if the bridge does not fit the models, or nothing is tied around a node.
        ConfigError: for an unknown site, direction or position, or a metric without a gradient.
        CircuitError: for a node that the sparse model does not have.
    """
    bridge.check(sparse, dense)
    model, about = sparse_side(sparse), {"sites": sites, "nodes": nodes, "positions": positions}
    asked = Question(model, batch, metric, direction=direction, **about)
    stretches = {place: stretch_of(bridge, place) for place in asked.channels}
    run = _Crossed(bridge, model, dense, asked)
    with evaluating(run.sparse), evaluating(run.dense), frozen(run.sparse), frozen(run.dense):
        base, source = run.ran(asked.base, True), run.ran(asked.source, False)
        held = {}
        for k in sorted(set(stretches.values())):
            inside = [place for place, there in stretches.items() if there == k]
            held |= run.stretch(k, inside, base, source)
    chosen = {place: held[place][..., channels.to(asked.device)] for place, channels in asked.channels.items()}
    effects = {place: _summed(asked, product) for place, product in chosen.items()}
    return asked.table(effects, float(base["metric"].mean()), float(source["metric"].mean()))


def _summed(asked: Question, product: Tensor) -> Tensor:
    """Means over prompts of products at the positions asked for."""
    product = product * asked.mask[..., None]
    if asked.at is None:
        return product.sum(1).mean(0)[:, None]
    index = asked.at.clamp(min=0)[..., None].expand(-1, -1, product.shape[-1])
    return (product.gather(1, index) * (asked.at >= 0)[..., None]).mean(0).T


class _Crossed:
    """Both models on the prompts of a question."""

    def __init__(self, bridge: Bridge, sparse: HookedSparseTransformer, dense: AnyModel, asked: Question):
        self.bridge, self.sparse, self.dense, self.asked = bridge, sparse, hooked(dense), asked

    def ran(self, tokens: Tokens, sloped: bool) -> dict[str, Tensor]:
        """The dense stream at every tied site of a run, the last read, its scale, the metric; if `sloped` gradients."""
        seen: dict[str, Tensor] = {}
        names = [stream_hook(pair.dense) for pair in self.bridge.pairs]
        names.append(FINAL_READ.hook)
        probes: dict[str, Tensor] = {}
        hooks: FwdHooks = [(name, partial(_probe, seen, probes, name)) for name in dict.fromkeys(names)]
        if self.dense.cfg.norm != "none":
            hooks.append((FINAL_SCALE_HOOK, partial(_note, seen, FINAL_SCALE_HOOK)))
        with self.dense.hooks(hooks), torch.set_grad_enabled(sloped):
            logits = self.asked.widened(self.dense(tokens, attention_mask=self.asked.seen))
            numbers = self.asked.metric(logits, self.asked.batch)
        if sloped:
            if not numbers.requires_grad:
                raise ConfigError("the metric has no gradient, as counts have none; `transfer` takes it.")
            slopes = torch.autograd.grad(numbers.sum(), list(probes.values()), allow_unused=True)
            for name, slope in zip(probes, slopes, strict=True):
                seen[f"slope of {name}"] = torch.zeros_like(probes[name]) if slope is None else slope
        return {name: value.detach() for name, value in (seen | {"metric": numbers}).items()}

    def stretch(
        self, k: int, inside: list[Place], base: dict[str, Tensor], source: dict[str, Tensor]
    ) -> dict[Place, Tensor]:
        """(source - base) * gradient of every node of places in one stretch, [batch pos width]."""
        pair = self.bridge.pairs[k]
        here = stream_hook(pair.dense)
        probes: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        hooks: FwdHooks = [(place.hook, partial(_probe, held, probes, place.hook)) for place in inside]
        with self.sparse.hooks(hooks), torch.enable_grad():
            number = self._reached(k, self.bridge.encode(base[here], pair), base)
        slopes = torch.autograd.grad(number, list(probes.values()), allow_unused=True)
        before = dict(held)
        with self.sparse.hooks(hooks), torch.no_grad():
            self._reached(k, self.bridge.encode(source[here], pair), base)
        found = {}
        for place, slope in zip(inside, slopes, strict=True):
            change = (held[place.hook] - before[place.hook].detach()).double()
            found[place] = flat(change * (torch.zeros_like(change) if slope is None else slope.double()))
        return found

    def _reached(self, k: int, begun: Tensor, base: dict[str, Tensor]) -> Tensor:
        """What a stretch says of the dense metric, to first order."""
        into = self.bridge.pairs[min(k + 1, len(self.bridge.pairs) - 1)]
        if k < len(self.bridge.pairs) - 1:
            end = through(self.sparse, self.bridge.pairs[k].sparse, into.sparse, begun, self.asked.seen)
            return (decoded(self.bridge, end, into) * base[f"slope of {stream_hook(into.dense)}"]).sum()
        read, per_channel = last_read(self.sparse, begun)
        moved = decoded(self.bridge, as_stream(read, per_channel.detach()), into)
        return (read_by(self.dense, moved, base.get(FINAL_SCALE_HOOK, 1.0)) * base[f"slope of {FINAL_READ.hook}"]).sum()


def _note(seen: dict[str, Tensor], name: str, activation: Tensor, hook: HookPoint) -> None:
    seen[name] = activation


def _probe(
    seen: dict[str, Tensor], probes: dict[str, Tensor], name: str, activation: Tensor, hook: HookPoint
) -> Tensor:
    """Note what comes by, and add a zero whose gradient is wanted."""
    seen[name] = activation
    if not torch.is_grad_enabled():
        return activation
    probes[name] = torch.zeros_like(activation).requires_grad_()
    return activation + probes[name]
