"""Stretches: the sparse model run from one tied site to the next, begun with what the dense model holds.

    y       =  encode(x)                             x the dense model's stream at the beginning of the stretch
    change  =  stretch under an intervention (y)  -  stretch (y)
    moved   =  change W_decode                       for the dense model's stream at its end

The last stretch, from the end of both models, is the last read: a change of it is the change of the stream that would
make it with the norm as it is, decoded, and read by the dense model with its norm as it is.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import SitePair
from sparse_interp.errors import BridgeError
from sparse_interp.interventions.ablation import Running
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import (
    FINAL_READ,
    FINAL_RESID,
    FINAL_SCALE_HOOK,
    MLP_READ,
    MLP_WRITE,
    NEURON,
    Place,
    stream_hook,
)
from sparse_interp.model.transformer import HookedSparseTransformer

DenseResid = Float[Tensor, "batch pos d_dense"]
SparseResid = Float[Tensor, "batch pos d_sparse"]

Decode = Callable[[SparseResid, SitePair], DenseResid]
"""(change of the sparse stream, where) -> what is added to the dense stream there."""


def sparse_side(model: AnyModel) -> HookedSparseTransformer:
    """The model, which a bridge enters half-way.

    Raises:
        BridgeError: if it is not of our class.
    """
    if not isinstance(model, HookedSparseTransformer):
        raise BridgeError(
            f"the sparse model of a bridge is run from the middle, and a {type(model).__name__} cannot be: pass a "
            "HookedSparseTransformer, and the other model as the dense one."
        )
    return model


def half_of(place: Place) -> int:
    """The half block in which a place is: attention of layer l is half 2 l, its MLP the next; then comes the end."""
    if place.site == FINAL_READ.name:
        return 2 * place.layer
    return 2 * place.layer + (place.site in (MLP_READ.name, NEURON.name, MLP_WRITE.name, FINAL_RESID.name))


def ends(bridge: Bridge) -> bool:
    """Whether the last pair ties the ends of both streams, so that last reads correspond too."""
    return bridge.pairs[-1] == (2 * bridge.sparse.n_layers, 2 * bridge.dense.n_layers)


def stretch_of(bridge: Bridge, place: Place) -> int:
    """The stretch, by the number of the pair that it begins with, in which nodes of a place act.

    Raises:
        BridgeError: if nothing is tied before the place, or behind it.
    """
    half = half_of(place)
    begun = [k for k, pair in enumerate(bridge.pairs) if pair.sparse <= half]
    closed = ends(bridge) if half == 2 * bridge.sparse.n_layers else bridge.pairs[-1].sparse > half
    if not begun or not closed:
        tied = ", ".join(map(str, bridge.pairs))
        raise BridgeError(
            f"what {place.site} of layer {place.layer} does is carried from a tied site at or before sparse site "
            f"{half} to one behind it, and the bridge ties {tied} (sparse-dense): train one with both."
        )
    return begun[-1]


def through(
    model: HookedSparseTransformer, start: int, stop: int, resid: SparseResid, mask: Tensor | None = None
) -> SparseResid:
    """The stream at residual site `stop` of a run that begins with `resid` at site `start`; hooks are felt."""
    behind = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)  # a run that ends in the stream
    return model.between(behind, enter=(start, resid), leave=stop, attention_mask=mask)


def last_read(model: HookedSparseTransformer, resid: SparseResid) -> tuple[SparseResid, Tensor]:
    """What is unembedded of a stream, hooks felt, and by how much a channel of the stream counts in it."""
    found: dict[str, Tensor] = {"scale": torch.ones_like(resid[..., :1])}
    hooks: FwdHooks = [] if model.cfg.norm == "none" else [(FINAL_SCALE_HOOK, partial(_note, found, "scale"))]
    with model.hooks(fwd_hooks=hooks):
        read = model.unembed.hook_in(model.ln_final(resid))
    return read, gain_of(model) / found["scale"]


def gain_of(model: HookedModel) -> Tensor | float:
    """The gain of the last norm."""
    return getattr(model.ln_final, "w", 1.0)


def as_stream(change: SparseResid, per_channel: Tensor) -> SparseResid:
    """The change of a stream that changes its last read so, with the norm as it is; 0 where a gain is 0."""
    return torch.where(per_channel != 0, change / per_channel, torch.zeros_like(change))


def read_by(dense: HookedModel, moved: DenseResid, scale: Tensor | float) -> DenseResid:
    """By how much a change of a dense model's last stream changes what is unembedded, with the norm as it is."""
    if dense.cfg.norm == "layer":
        moved = moved - moved.mean(-1, keepdim=True)
    return moved / scale * gain_of(dense)


def decoded(
    bridge: Bridge, change: Float[Tensor, "*batch d_sparse"], pair: SitePair
) -> Float[Tensor, "*batch d_dense"]:
    """What a change of the sparse stream is in the dense one: the difference of what is decoded with and without it."""
    weight = bridge[pair].W_decode
    return change.to(weight) @ weight


def change_in(
    bridge: Bridge,
    sparse: HookedSparseTransformer,
    k: int,
    resid: DenseResid,
    running: Running,
    mask: Tensor | None = None,
) -> SparseResid:
    """By how much an intervention changes the sparse stream at the end of stretch `k`, begun from the dense one."""
    begun = bridge.encode(resid, bridge.pairs[k])
    if k == len(bridge.pairs) - 1:
        plain, per_channel = last_read(sparse, begun)
        with running(sparse):
            changed, _ = last_read(sparse, begun)
        return as_stream(changed - plain, per_channel)
    sites = bridge.pairs[k].sparse, bridge.pairs[k + 1].sparse
    plain = through(sparse, *sites, begun, mask)
    with running(sparse):
        return through(sparse, *sites, begun, mask) - plain


def streams(
    model: HookedModel, tokens: Tokens, sites: Sequence[int], mask: Tensor | None = None
) -> dict[int, Float[Tensor, "batch pos d_model"]]:
    """The residual stream at some sites of one run; hooks are felt."""
    found: dict[str, Tensor] = {}
    hooks: FwdHooks = [(stream_hook(site), partial(_note, found, stream_hook(site))) for site in set(sites)]
    with model.hooks(fwd_hooks=hooks):
        model(tokens, attention_mask=mask, stop_at_layer=model.cfg.n_layers)
    return {site: found[stream_hook(site)] for site in sites}


def dense_streams(bridge: Bridge, dense: AnyModel, tokens: Tokens) -> dict[SitePair, DenseResid]:
    """What the dense model holds at every tied site of a run: what `explain` and a bridge's encoders read."""
    found = streams(hooked(dense), tokens, [pair.dense for pair in bridge.pairs])
    return {pair: found[pair.dense] for pair in bridge.pairs}


def _note(found: dict[str, Tensor], name: str, activation: Tensor, hook: HookPoint) -> None:
    found[name] = activation
