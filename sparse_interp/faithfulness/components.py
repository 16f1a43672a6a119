"""Components: embeddings, heads and MLPs, and the edges between them along the residual stream.

    senders      embed   pos   L0.H1   L0.mlp                 what writes to the stream
    receivers    L0.H1.q   L0.H1.k   L0.H1.v   L0.mlp   out   what reads it; `out` is the last norm
    edge         (sender, receiver), for every sender that comes before

    input of a receiver  =  stream - sum over cut edges into it of what their senders wrote           (zero ablation)

These are the edges of ACDC (Conmy et al. 2023, arXiv:2304.14997), whose own lists also hold the ways within a component
(a head's q, k and v to its result, an MLP's input to its output); a component has those as long as anything is left of
it. A head's share of the bias of its layer's write belongs to it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Logits, Tokens
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.patching import forks
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer

ComponentEdge = tuple[str, str]
"""A sender and a receiver, by the names above."""

EMBED, POS, OUT = "embed", "pos", "out"


@dataclass(frozen=True, eq=False)
class ComponentTruth:
    """A model, prompts on which it is looked at, and the edges between components that its answer depends on."""

    name: str
    """What tables call it."""

    model: HookedSparseTransformer
    """The model, in eval mode."""

    tokens: Tokens
    """Prompts, all of one length."""

    answer: Callable[[Logits], Tensor]
    """The part of the logits that counts, of whatever shape: its mean squared change is what a cut costs."""

    edges: frozenset[ComponentEdge]
    """The key."""


def senders(model: HookedSparseTransformer) -> list[str]:
    """Everything that writes to the stream, in the order of the forward pass."""
    found = [EMBED] + [POS] * (model.cfg.positions == "add")
    for layer in range(model.cfg.n_layers):
        found += [f"L{layer}.H{head}" for head in range(model.cfg.n_heads)] + [f"L{layer}.mlp"]
    return found


def component_edges(model: HookedSparseTransformer) -> list[ComponentEdge]:
    """Every edge of a model, those into the receivers nearest to the output first, and of these the latest senders."""
    before, found = [EMBED] + [POS] * (model.cfg.positions == "add"), []
    for layer in range(model.cfg.n_layers):
        heads = [f"L{layer}.H{head}" for head in range(model.cfg.n_heads)]
        found += [(sender, f"{head}.{letter}") for head in heads for letter in "vkq" for sender in before]
        before = [*before, *heads]
        found += [(sender, f"L{layer}.mlp") for sender in before]
        before = [*before, f"L{layer}.mlp"]
    return [*found, *((sender, OUT) for sender in before)][::-1]


def component_of(receiver: str) -> str:
    """The sender that a receiver is part of; `out` for itself."""
    return receiver.rpartition(".")[0] if receiver[-2:] in (".q", ".k", ".v") else receiver


def connected(edges: Collection[ComponentEdge]) -> frozenset[ComponentEdge]:
    """The edges that lead to the output."""
    kept, n_before = frozenset(edges), -1
    while n_before != len(kept):
        n_before, sending = len(kept), {sender for sender, _ in kept} | {OUT}
        kept = frozenset(edge for edge in kept if component_of(edge[1]) in sending)
    return kept


@contextmanager
def cutting_components(model: HookedSparseTransformer, cut: Collection[ComponentEdge]) -> Iterator[None]:
    """Inside the block the edges `cut` carry nothing; what a sender writes is what it writes in this run.

    `cut` may change inside the block.

    Raises:
        CircuitError: if the stream is no sum of what was written to it.
    """
    if why := model.layers[0].why_no_sum:
        raise CircuitError(f"the stream of {model.cfg.model_name} is no sum of components: {why}.")
    with forks(model), model.hooks(_Run(model, cut).hooks()):
        yield


class _Run:
    """Hooks that note what senders write and take it from the receivers whose edges are cut."""

    def __init__(self, model: HookedSparseTransformer, cut: Collection[ComponentEdge]):
        self.model, self.cut = model, cut
        self.written: dict[str, Tensor] = {}
        self.senders = senders(model)

    def hooks(self) -> list[tuple[str, Callable]]:
        """All of them, for `model.hooks`."""
        found: list[tuple[HookPoint, Callable]] = [(self.model.hook_embed, partial(self._note, [EMBED]))]
        if self.model.cfg.positions == "add":
            found.append((self.model.hook_pos_embed, partial(self._note, [POS])))
        for layer, block in enumerate(self.model.layers):
            heads, attn = [f"L{layer}.H{head}" for head in range(self.model.cfg.n_heads)], block.attn
            for letter, point in zip("qkv", (attn.hook_q_input, attn.hook_k_input, attn.hook_v_input), strict=True):
                found.append((point, partial(self._into, [f"{head}.{letter}" for head in heads])))
            found.append((attn.hook_result, partial(self._note, heads)))
            found.append((block.hook_mlp_in, partial(self._into, [f"L{layer}.mlp"])))
            found.append((block.hook_mlp_out, partial(self._note, [f"L{layer}.mlp"])))
        found.append((self.model.layers[-1].hook_resid_post, partial(self._into, [OUT])))
        return [(point.name, hook) for point, hook in found]

    def _note(self, names: list[str], written: Tensor, hook: HookPoint) -> None:
        for name, part in zip(names, _apart(written), strict=True):
            self.written[name] = part

    def _into(self, names: list[str], stream: Tensor, hook: HookPoint) -> Tensor:
        parts = [self._less(name, part) for name, part in zip(names, _apart(stream), strict=True)]
        return torch.stack(parts, 2) if stream.ndim == 4 else parts[0]

    def _less(self, receiver: str, stream: Tensor) -> Tensor:
        for sender in self.senders:
            if (sender, receiver) in self.cut:
                stream = stream - self.written[sender]
        return stream


def _apart(activation: Tensor) -> list[Tensor]:
    """An activation head by head, or as it is where it has no heads."""
    return list(activation.unbind(2)) if activation.ndim == 4 else [activation]


# -- ACDC -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_components(truth: ComponentTruth, taus: Collection[float]) -> Mapping[ComponentEdge, float]:
    """ACDC between components, with zero ablation: for every edge the largest of `taus` at which it stays, else 0.

    For one tau after the other, from the smallest: visit the edges from the output backwards, cut each, and leave it
    cut if that costs less than tau; what leads nowhere any more is cut too. Each tau begins where the last one ended,
    so that a larger one keeps fewer.
    """
    model, left = truth.model, component_edges(truth.model)
    stays = dict.fromkeys(left, 0.0)
    with evaluating(model):
        reference, cut = truth.answer(model(truth.tokens)), set[ComponentEdge]()

        def cost() -> float:
            return float((truth.answer(model(truth.tokens)) - reference).pow(2).mean())

        with cutting_components(model, cut):
            for tau in sorted(taus):
                now = cost()
                for edge in left:
                    if edge not in connected({*left} - cut):
                        cut.add(edge)
                        continue
                    cut.add(edge)
                    after = cost()
                    if after - now < tau:
                        now = after
                    else:
                        cut.remove(edge)
                left = [edge for edge in left if edge not in cut]
                stays.update(dict.fromkeys(left, tau))
    return stays
