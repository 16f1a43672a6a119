"""Patching: what a run on corrupt prompts does when one thing in it is as in the run on the clean ones.

A *direct path* leads from a sender, which writes to the stream, to one reader, past everything between them:

    message  =  what the sender wrote in the clean run  -  what it wrote in the corrupt run
    read     =  T(norm(x + message))        for that reader alone; all others read x, and the run goes on from there

(Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.) A reader may be a single node: it
alone takes the value that it has with the message in what it reads. What was written is what
reached the stream: under AbsTopK a head, neuron or v channel has its share of those channels of the half block's write
that survived, in either run. That is `attn.hook_result`, what the decompositions of a cache and TransformerLens' edge
attribution mean too; and messages of all heads of a layer add up to the change of its write. TransformerLens' own
`get_act_patch_direct_path` sends `z W_O`, which is the same without AbsTopK and another number with it.

In one of our models a reader gets a stream of its own. In a dense one of TransformerLens, where nothing is cut, what it
reads is changed by norm(x + message) - norm(x), and its q, k or v by that times their weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.axes import PerPrompt, Resid
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.ablation import hold
from sparse_interp.model.dense import AnyModel, DenseModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import (
    ATTN_READ,
    ATTN_WRITE,
    FINAL_READ,
    MLP_READ,
    MLP_WRITE,
    NEURON,
    RESID_MID_HOOK,
    RESID_POST_HOOK,
    RESID_PRE_HOOK,
    RESULT_HOOK,
    SITES,
    Z_HOOK,
    Node,
    Place,
    V,
    check_nodes,
    flat,
    group_size,
    queries_of,
)
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Axes, Table, heatmap
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference

READS = ("q", "k", "v", "mlp", "final")
"""Kinds of readers: a head's query, key or value input, an MLP's input, and what is unembedded."""

_READERS = dict.fromkeys((ATTN_READ.name, *"qkv"), 0) | {MLP_READ.name: 1, NEURON.name: 1, FINAL_READ.name: 0}
"""Sites whose nodes read the stream, and the half block that they read in."""

_WRITERS = {V.name: 0, ATTN_WRITE.name: 0, NEURON.name: 1, MLP_WRITE.name: 1}
"""Sites whose nodes write to the stream, and the half block that they write in."""


class Head(NamedTuple):
    """One attention head, as a sender."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


class Receiver(NamedTuple):
    """One reader of the stream. `final` has the layer number `n_layers`; only q, k and v have a head.

    With grouped queries k and v have as many heads as there are groups.
    """

    layer: int
    read: str
    head: int | None = None

    def __str__(self) -> str:
        return {"mlp": f"L{self.layer}.mlp", "final": "final"}.get(self.read, f"L{self.layer}H{self.head}.{self.read}")

    @property
    def half(self) -> int:
        """Half blocks before it."""
        return 2 * self.layer + (self.read == "mlp")


@dataclass(frozen=True, eq=False)
class PathTable(Table):
    """One row per receiver, means over prompts.

    `sender`, `receiver`, its `layer`, `read` (of a node its site) and `head`; `metric` (with the path patched),
    `effect` (the change of the metric from the corrupt run's) and `recovered_frac` (that as a share of clean minus
    corrupt).
    """

    columns: ClassVar[tuple[str, ...]] = (
        "sender",
        "receiver",
        "layer",
        "read",
        "head",
        "metric",
        "effect",
        "recovered_frac",
    )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effects by layer and kind of reader."""
        reads = self.frame.read + self.frame["head"].map(lambda head: "" if pd.isna(head) else str(head))
        return heatmap(self.frame.assign(reader=reads), x="reader", y="layer", value="effect", ax=ax)


def receivers_of(model: AnyModel, sender: Head | Iterable[Node], reads: Sequence[str] = READS) -> list[Receiver]:
    """Every reader that part of what `sender` writes can reach, in the order of the forward pass."""
    model = hooked(model)
    layers, n_heads = range(model.cfg.n_layers), model.cfg.n_heads
    heads = {read: range(n_heads if read == "q" else n_heads // group_size(model.cfg)) for read in "qkv"}
    readers = [Receiver(layer, read, head) for layer in layers for read in "qkv" for head in heads[read]]
    readers += [Receiver(layer, "mlp") for layer in layers] + [Receiver(len(layers), "final")]
    first = min(_halves(model, sender))
    return sorted(
        (r for r in readers if r.half > first and r.read in reads), key=lambda r: (r.half, READS.index(r.read))
    )


@torch.no_grad()
def patch_direct_paths(
    model: AnyModel,
    batch: TaskBatch,
    metric: Metric = logit_difference,
    *,
    sender: Head | Iterable[Node],
    receivers: Sequence[Receiver | Node] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> PathTable:
    """Patch the direct path from `sender` to one receiver after the other, exactly.

    Several receivers of a layer share a forward pass, which begins at their layer.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: clean prompts, which the message comes from, and corrupt ones, which the model runs on.
        metric: logits and batch -> one number per prompt.
        sender: a head, or nodes that write: channels of `attn_write` or `mlp_write`, neurons, or v channels. A reader
            between two of the nodes gets the message of those before it.
        receivers: who gets the message: readers, or single nodes of attn_read, q, k, v, mlp_read, neuron or final_read.
            None is every reader that can, `receivers_of(model, sender)`.
        batch_size: prompts per forward pass, counted once for each receiver; a pass has at least one receiver.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: for senders that write nothing or are not in the model, and receivers that they do not reach.
        ConfigError: if the stream is no sum of what is written to it.
    """
    model, sender = hooked(model), sender if isinstance(sender, Head) else tuple(sender)
    receivers = receivers_of(model, sender) if receivers is None else list(receivers)
    _check_reached(model, sender, receivers)
    readers = [receiver for receiver in receivers if isinstance(receiver, Receiver)]
    nodes = [receiver for receiver in receivers if isinstance(receiver, Node)]
    batch = batch.to(model.embed.W_E.device)
    with evaluating(model), forks(model):
        clean, in_clean = _run(model, batch, batch.clean, sender)
        corrupt, in_corrupt = _run(model, batch, batch.corrupt, sender)
        messages = {
            half: _written(model, sender, half, in_clean) - _written(model, sender, half, in_corrupt)
            for half in _halves(model, sender)
        }

        def message_to(receiver: Receiver | Node) -> Resid:
            return sum((m for half, m in messages.items() if half < _half(receiver)), torch.zeros(()))

        together = _together(readers, max(1, batch_size // len(batch)))
        patched: dict[str, PerPrompt] = {}
        for chosen in tqdm(together, disable=not progress, desc=f"direct paths from {_name(sender)}"):
            logits = _patched_logits(model, batch, in_corrupt, chosen, [message_to(r) for r in chosen])
            patched |= {str(r): metric(one, batch) for r, one in zip(chosen, logits.chunk(len(chosen)), strict=True)}
    with evaluating(model):
        for node in tqdm(nodes, disable=not (progress and nodes), desc=f"direct paths from {_name(sender)} to nodes"):
            patched[str(node)] = metric(_patched_node(model, batch, in_corrupt, node, message_to(node)), batch)
    return _table(_name(sender), receivers, patched, metric(clean, batch), metric(corrupt, batch))


def _half(receiver: Receiver | Node) -> int:
    """Half blocks before it."""
    return receiver.half if isinstance(receiver, Receiver) else 2 * receiver.layer + _READERS[receiver.site]


def _check_reached(model: HookedModel, sender: Head | Sequence[Node], receivers: Sequence[Receiver | Node]) -> None:
    """Raise CircuitError for who reads nothing, is not in the model, or comes before the sender."""
    reachable, first = receivers_of(model, sender), min(_halves(model, sender))
    for receiver in receivers:
        if isinstance(receiver, Node):
            check_nodes([receiver], model.cfg)
            if receiver.site not in _READERS:
                raise CircuitError(f"{receiver} reads nothing: a receiving node is one of {', '.join(_READERS)}.")
        if receiver not in reachable if isinstance(receiver, Receiver) else _half(receiver) <= first:
            raise CircuitError(
                f"{_name(sender)} does not reach {receiver}; receivers_of(model, sender) lists who it does."
            )


def _name(sender: Head | Sequence[Node]) -> str:
    if isinstance(sender, Head):
        return str(sender)
    return str(sender[0]) if len(sender) == 1 else f"{len(sender)} nodes from {min(sender)} on"


def _halves(model: HookedModel, sender: Head | Iterable[Node]) -> list[int]:
    """The half blocks that the sender writes in, counted through the model; checks it on the way."""
    reason = model.layers[0].why_no_sum if isinstance(model, HookedSparseTransformer) else None
    if reason is not None:
        raise ConfigError(f"the stream is not the sum of what is written to it ({reason}): there are no direct paths.")
    cfg = model.cfg
    if isinstance(sender, Head):
        if not (0 <= sender.layer < cfg.n_layers and 0 <= sender.head < cfg.n_heads):
            raise CircuitError(f"{sender} is no head: there are {cfg.n_layers} layers of {cfg.n_heads} heads.")
        return [2 * sender.layer]
    nodes = list(sender)
    check_nodes(nodes, cfg)
    silent = [node for node in nodes if node.site not in _WRITERS]
    if silent or not nodes:
        what = f"{silent[0]} writes nothing" if silent else "there are no nodes"
        raise CircuitError(f"{what}: a sender is a Head, or nodes of {', '.join(_WRITERS)}.")
    return sorted({2 * node.layer + _WRITERS[node.site] for node in nodes})


@contextmanager
def forks(model: HookedModel) -> Iterator[None]:
    """Inside the block readers of ours have streams of their own and heads have results; then flags are as before."""
    if isinstance(model, DenseModel):
        yield
        return
    flags = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True}
    before = {flag: getattr(model.cfg, flag) for flag in flags}
    try:
        for flag, on in flags.items():
            setattr(model.cfg, flag, on)
        yield
    finally:
        for flag, on in before.items():
            setattr(model.cfg, flag, on)


def _run(
    model: HookedModel, batch: TaskBatch, tokens: Tensor, sender: Head | Sequence[Node]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Logits, what the sender's layers held, and the stream before, within and after every block."""
    hooks = [RESID_PRE_HOOK, RESID_MID_HOOK, RESID_POST_HOOK]
    names = [hook.format(layer=layer) for hook in hooks for layer in range(model.cfg.n_layers)]
    for layer in {half // 2 for half in _halves(model, sender)}:
        names += [Z_HOOK.format(layer=layer), *(site.at(layer) for site in (ATTN_WRITE, NEURON, MLP_WRITE))]
        if isinstance(model, HookedSparseTransformer):
            names.append(RESULT_HOOK.format(layer=layer))
    seen: dict[str, Tensor] = {}
    keeping: FwdHooks = [(name, lambda held, hook, name=name: seen.update({name: held})) for name in names]
    with model.hooks(fwd_hooks=keeping):
        return model(tokens, attention_mask=batch.attention_mask), seen


def _written(model: HookedModel, sender: Head | Sequence[Node], half: int, seen: Mapping[str, Tensor]) -> Resid:
    """What the sender wrote to the stream in half block `half` of the run that was `seen`."""
    layer, is_mlp = divmod(half, 2)
    attn, mlp = model.layers[layer].attn, model.layers[layer].mlp
    if isinstance(sender, Head) and isinstance(model, DenseModel):
        return seen[Z_HOOK.format(layer=layer)][:, :, sender.head] @ attn.W_O[sender.head]
    if isinstance(sender, Head):
        return seen[RESULT_HOOK.format(layer=layer)][:, :, sender.head]
    units, whole = (NEURON, MLP_WRITE) if is_mlp else (V, ATTN_WRITE)
    part, weight = (NEURON.hook, mlp.W_out) if is_mlp else (Z_HOOK, attn.W_O.flatten(0, 1))
    chosen, channels = (
        [node.channel for node in sender if (node.layer, node.site) == (layer, site.name)] for site in (units, whole)
    )
    rows = chosen if is_mlp else [row for channel in chosen for row in queries_of(model.cfg, channel)]
    write = seen[whole.at(layer)]
    total = flat(seen[part.format(layer=layer)])[..., rows] @ weight[rows]
    if isinstance(model, HookedSparseTransformer) and (mlp if is_mlp else attn).cut_write.k is not None:
        total = total * (write != 0)
    total[..., channels] = write[..., channels]
    return total


def _together(receivers: Sequence[Receiver], n: int) -> list[list[Receiver]]:
    """Receivers of a layer by up to `n`."""
    by_layer: dict[int, list[Receiver]] = {}
    for receiver in receivers:
        by_layer.setdefault(receiver.layer, []).append(receiver)
    return [same[i : i + n] for same in by_layer.values() for i in range(0, len(same), n)]


def _patched_logits(
    model: HookedModel,
    batch: TaskBatch,
    seen: Mapping[str, Tensor],
    chosen: Sequence[Receiver],
    messages: Sequence[Resid],
) -> Float[Tensor, "receiver_and_batch pos d_vocab"]:
    """Logits of the corrupt prompts, once for each receiver of one layer, with its message in what it reads alone."""
    n, (layer,) = len(chosen), {receiver.layer for receiver in chosen}
    rows = [slice(i * len(batch), (i + 1) * len(batch)) for i in range(n)]
    sent = list(zip(rows, chosen, messages, strict=True))
    tokens, mask = batch.corrupt.repeat(n, 1), batch.attention_mask.repeat(n, 1)
    start = {"start_at_layer": layer, "tokens": tokens, "attention_mask": mask}
    if layer == model.cfg.n_layers:
        stream = seen[RESID_POST_HOOK.format(layer=layer - 1)].repeat(n, 1, 1)
        return model(stream + torch.cat(list(messages)), **start)
    hooks = _changed_reads(model, seen, sent) if isinstance(model, DenseModel) else _changed_streams(model, sent)
    with model.hooks(fwd_hooks=hooks):
        if layer == 0:
            return model(tokens, attention_mask=mask)
        return model(seen[RESID_POST_HOOK.format(layer=layer - 1)].repeat(n, 1, 1), **start)


def _patched_node(
    model: HookedModel, batch: TaskBatch, seen: Mapping[str, Tensor], node: Node, message: Resid
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the corrupt prompts with one node as it is when the message is in what it reads."""
    place, everybody = Place(node.layer, node.site), slice(None)
    found: list[Tensor] = []
    keeping: FwdHooks = [(place.hook, lambda held, hook: found.append(flat(held).clone()))]
    if node.layer == model.cfg.n_layers:
        with model.hooks(fwd_hooks=keeping):
            _from_layer(model, batch, seen, node.layer, message)
    else:
        is_mlp = _READERS[node.site] == 1
        stream, site = (RESID_MID_HOOK, MLP_READ) if is_mlp else (RESID_PRE_HOOK, ATTN_READ)
        name, change = stream.format(layer=node.layer), message
        if isinstance(model, DenseModel):
            read = [model.normed(seen[name] + part, _half(node)) for part in (message, torch.zeros_like(message))]
            name, change = site.at(node.layer), read[0] - read[1]
        with model.hooks(fwd_hooks=[*_adding([(name, everybody, None, change)]), *keeping]):
            _from_layer(model, batch, seen, node.layer)
    others = torch.arange(found[0].shape[-1], device=message.device) != node.channel
    with model.hooks(fwd_hooks=[(place.hook, hold(others, found[0]))]):
        return _from_layer(model, batch, seen, node.layer)


def _from_layer(
    model: HookedModel, batch: TaskBatch, seen: Mapping[str, Tensor], layer: int, message: Resid | float = 0.0
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the corrupt prompts, run from `layer` on."""
    if layer == 0:
        return model(batch.corrupt, attention_mask=batch.attention_mask)
    start = {"start_at_layer": layer, "tokens": batch.corrupt, "attention_mask": batch.attention_mask}
    return model(seen[RESID_POST_HOOK.format(layer=layer - 1)] + message, **start)


Sent = Sequence[tuple[slice, Receiver, Resid]]
"""Which rows of a run have which receiver's message."""


def _changed_streams(model: HookedSparseTransformer, sent: Sent) -> FwdHooks:
    """Hooks that add every message to the stream that its receiver has for itself."""
    block = model.layers[sent[0][1].layer]
    points = {read: getattr(block.attn, f"hook_{read}_input") for read in "qkv"} | {"mlp": block.hook_mlp_in}
    changes = [(points[receiver.read].name, row, receiver.head, message) for row, receiver, message in sent]
    return _adding(changes)


def _changed_reads(model: DenseModel, seen: Mapping[str, Tensor], sent: Sent) -> FwdHooks:
    """Hooks that add to a q, k, v or MLP read what its message changes there."""
    changes = []
    for row, receiver, message in sent:
        site = MLP_READ if receiver.read == "mlp" else SITES[receiver.read]
        stream = seen[(RESID_MID_HOOK if receiver.read == "mlp" else RESID_PRE_HOOK).format(layer=receiver.layer)]
        change = model.normed(stream + message, receiver.half) - model.normed(stream, receiver.half)
        if receiver.head is not None:
            weights = vars(model.layers[receiver.layer].attn)[f"W_{receiver.read.upper()}"]
            change = change @ weights[receiver.head]
        changes.append((site.at(receiver.layer), row, receiver.head, change))
    return _adding(changes)


def _adding(changes: Sequence[tuple[str, slice, int | None, Tensor]]) -> FwdHooks:
    """Hooks that add to what is seen at some hook points, in some rows and, where one is given, one head."""

    def at(name: str) -> Callable:
        def hook(seen: Tensor, hook: Any) -> Tensor:
            seen = seen.clone()
            for _, row, head, change in (change for change in changes if change[0] == name):
                (seen[row] if head is None else seen[row, :, head]).add_(change)
            return seen

        return hook

    return [(name, at(name)) for name in dict.fromkeys(name for name, *_ in changes)]


def _table(
    sender: str,
    receivers: Sequence[Receiver | Node],
    patched: Mapping[str, PerPrompt],
    clean: PerPrompt,
    corrupt: PerPrompt,
) -> PathTable:
    gap, base = float((clean - corrupt).mean()), float(corrupt.mean())
    rows = []
    for r in receivers:
        read, head = (r.read, r.head) if isinstance(r, Receiver) else (r.site, None)
        rows.append((sender, str(r), r.layer, read, head, float(patched[str(r)].mean())))
    frame = pd.DataFrame(rows, columns=list(PathTable.columns[:6])).astype({"head": "Int64"})
    frame["effect"] = frame.metric - base
    return PathTable(frame.assign(recovered_frac=frame.effect / gap if gap else float("nan")))
