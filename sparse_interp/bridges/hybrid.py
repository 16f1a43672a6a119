"""Hybrid passes: a forward pass that begins in one model and crosses to the other, once or several times.

    tokens -> sparse, up to site i -> decode -> dense, up to site j -> encode -> sparse -> ... -> logits

Each crossing is a switch at one pair of tied sites, so n pairs give 2 * 2^n paths: 2 models to begin with, and each
pair crossed or passed by. A path without a switch is the model that it begins in.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Logits, Tokens
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import SitePair, check_order
from sparse_interp.errors import BridgeError
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import stream_hook

Stream = Float[Tensor, "batch pos channel"]

SPARSE, DENSE = "sparse", "dense"
"""The two models, as `start` names them."""


class HybridPath(NamedTuple):
    """Where a hybrid pass begins, and where it crosses."""

    start: str
    """`sparse` or `dense`."""

    switches: tuple[SitePair, ...]
    """Pairs at which it crosses, in the order of the forward pass."""

    def __str__(self) -> str:
        return " ".join([self.start, *(f"@{pair}" for pair in self.switches)])


def hybrid_logits(
    sparse: AnyModel,
    dense: AnyModel,
    bridge: Bridge,
    tokens: Tokens,
    *,
    start: str,
    switches: Sequence[SitePair] = (),
    attention_mask: Tensor | None = None,
) -> Logits:
    """Logits of a pass that begins in one model and crosses to the other at each of `switches`.

    One switch from `dense` enters the sparse model from encoded dense activations; one from `sparse` the dense model
    from decoded sparse ones. Models run in the mode that they are in, with their hooks; gradients flow.

    Args:
        sparse: the sparse model.
        dense: the dense model, ours or one of TransformerLens.
        bridge: what ties them.
        tokens: prompts, for both.
        start: the model that is given the tokens: `sparse` or `dense`.
        switches: tied pairs in the order of the forward pass.
        attention_mask: 1 for tokens, 0 for padding on either side.

    Raises:
        BridgeError: for another start, switches that the bridge does not tie or that lead back, or models that the
            bridge does not fit.
    """
    if start not in (SPARSE, DENSE):
        raise BridgeError(f"start={start!r}; a hybrid pass begins in 'sparse' or in 'dense'.")
    switches = [SitePair(*pair) for pair in switches]
    if switches:
        check_order(switches)
    for pair in switches:
        bridge[pair]
    bridge.check_shapes(sparse, dense)
    models, here, enter = {SPARSE: hooked(sparse), DENSE: hooked(dense)}, start, None
    for pair in switches:
        stream = models[here].between(tokens, enter=enter, leave=getattr(pair, here), attention_mask=attention_mask)
        here = DENSE if here == SPARSE else SPARSE
        enter = getattr(pair, here), crossed(bridge, stream, pair, models[here], here)
    return models[here].between(tokens, enter=enter, attention_mask=attention_mask)


def crossed(
    bridge: Bridge, stream: Stream, pair: SitePair, model: HookedModel, to: str
) -> Float[Tensor, "batch pos other_channel"]:
    """A stream of one model as the other (`to`, which is `model`) would have it, in that model's precision."""
    found = bridge.encode(stream, pair) if to == SPARSE else bridge.decode(stream, pair)
    return found.to(model.embed.W_E.dtype)


def sampled_paths(bridge: Bridge, n_paths: int, *, generator: torch.Generator) -> list[HybridPath]:
    """Different paths, each as likely as any other; all of them if there are no more.

    Raises:
        BridgeError: if `n_paths` is below 1.
    """
    if n_paths < 1:
        raise BridgeError(f"n_paths={n_paths}; at least 1 path is needed.")
    n_bits = len(bridge.pairs) + 1
    if n_paths * 2 >= 2**n_bits:
        drawn = torch.randperm(2**n_bits, generator=generator)[:n_paths].tolist()
        return [_path(bridge, number) for number in drawn]
    found: dict[int, None] = {}
    while len(found) < n_paths:
        bits = torch.randint(2, (n_bits,), generator=generator).tolist()
        found[sum(bit << i for i, bit in enumerate(bits))] = None
    return [_path(bridge, number) for number in found]


def _path(bridge: Bridge, number: int) -> HybridPath:
    """The path whose choices are the bits of a number: the start, then pair by pair whether it is crossed."""
    crossings = [pair for i, pair in enumerate(bridge.pairs, 1) if number >> i & 1]
    return HybridPath((SPARSE, DENSE)[number & 1], tuple(crossings))


def streams_and_logits(
    model: HookedModel, tokens: Tokens, sites: Collection[int], attention_mask: Tensor | None = None
) -> tuple[dict[int, Stream], Logits]:
    """One run, and the residual stream that left each of `sites` in it."""
    found: dict[int, Stream] = {}
    hooks: FwdHooks = [(stream_hook(site), _noting(found, site)) for site in sorted(set(sites))]
    with model.hooks(hooks):
        logits = model(tokens, attention_mask=attention_mask)
    return found, logits


def _noting(found: dict[int, Stream], site: int):
    def note(stream: Tensor, hook: HookPoint) -> None:
        found[site] = stream

    return note


def token_kl(reference_logits: Logits, logits: Logits) -> Float[Tensor, "batch pos"]:
    """KL(reference || logits) over the vocabulary, nats, for every token."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    reference = reference_logits.to(wide).log_softmax(-1)
    return (reference.exp() * (reference - logits.to(wide).log_softmax(-1))).sum(-1)
