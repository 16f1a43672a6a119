"""What a bridge is for: a feature of the sparse model seen, and moved, in the dense one.

    direction of channel c        row c of W_decode, at every tied site
    direction of neuron n         W_out[n] W_decode, at the tied sites behind it; of a v channel W_O[v] W_decode
    steer                         x + value * direction, at the first of them
    transfer                      at every tied site  x + (with - without) W_decode,  where `with` and `without` are the
                                  sparse model run up to there from encode(x) of the tied site before, under an
                                  intervention of any kind and without it

The last carries the difference that an intervention makes through the decoder (Gao et al. 2025, arXiv 2511.13653) and
leaves to the dense model what becomes of it: what the intervention changes later because of what it changed before is
not carried twice. q and k channels have no direction, since they write nothing; what they do is carried by `transfer`.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import SitePair
from sparse_interp.bridges.stretches import (
    Decode,
    DenseResid,
    change_in,
    decoded,
    ends,
    half_of,
    last_read,
    read_by,
    sparse_side,
    through,
)
from sparse_interp.errors import BridgeError
from sparse_interp.interventions.ablation import Running
from sparse_interp.interventions.steering import push
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import (
    ATTN_READ,
    FINAL_READ,
    FINAL_SCALE_HOOK,
    MLP_READ,
    NEURON,
    Node,
    Place,
    V,
    check_nodes,
    flat,
    places,
    stream_hook,
    wires,
)
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Table

_WRITERS = (V.name, NEURON.name)
_READERS = (ATTN_READ.name, MLP_READ.name, FINAL_READ.name)


def site_of(node: Node) -> int:
    """The residual site of the sparse model at which a node is in the stream: what it reads from, or has written to.

    Raises:
        BridgeError: for q and k channels, which are not.
    """
    if node.site in ("q", "k"):
        raise BridgeError(
            f"{node} has no direction: a {node.site} channel only meets another in an attention score and writes "
            "nothing to the stream. `transfer` carries what intervening on it does."
        )
    return half_of(Place(node.layer, node.site)) + (node.site not in _READERS)


@torch.no_grad()
def feature_direction(bridge: Bridge, sparse: AnyModel, node: Node) -> dict[SitePair, Float[Tensor, " d_dense"]]:
    """What one unit of a node is in the dense model's stream.

    A node that is a channel of the stream (what attention and MLPs read and write, the last read) has a direction at
    every tied site: the decoder's row. A neuron or v channel has the decoded row of its output weights, at the tied
    sites behind it. For a read one unit is one of the stream, not of the normalised read; for a v channel it is one in
    all that a head attends to.

    Raises:
        BridgeError: for a q or k channel, a channel of concatenated positions, or a writer with no tied site behind it.
        CircuitError: for a node that the sparse model does not have.
    """
    model = sparse_side(sparse)
    check_nodes([node], model.cfg)
    site = site_of(node)
    if node.site in _WRITERS:
        wire = next(wire for wire in wires(model.cfg) if wire.source.name == node.site)
        written, pairs = wire.weight(model.layers[node.layer])[node.channel], _from(bridge, node, site)
    else:
        if node.channel >= model.cfg.d_model:
            raise BridgeError(
                f"{node} has no direction: it is channel {node.channel - model.cfg.d_model} of the position vectors "
                "that reads have beside the stream."
            )
        written, pairs = torch.eye(model.cfg.d_model).to(model.embed.W_E)[node.channel], bridge.pairs
    return {pair: decoded(bridge, written, pair) for pair in pairs}


def _from(bridge: Bridge, node: Node, site: int) -> list[SitePair]:
    """The tied pairs at or behind a sparse site."""
    found = [pair for pair in bridge.pairs if pair.sparse >= site]
    if not found:
        tied = ", ".join(map(str, bridge.pairs))
        raise BridgeError(f"nothing is tied at or behind sparse site {site}, where {node} is; the bridge ties {tied}.")
    return found


def first_behind(bridge: Bridge, node: Node) -> SitePair:
    """The first tied pair at or behind which a node is in the stream.

    Raises:
        BridgeError: for q and k channels, or if nothing is tied there.
    """
    return _from(bridge, node, site_of(node))[0]


def steer(
    bridge: Bridge,
    sparse: AnyModel,
    dense: AnyModel,
    node: Node,
    value: float,
    *,
    positions: Collection[int] | Int[Tensor, " batch"] | None = None,
) -> AbstractContextManager[AnyModel]:
    """A block inside which the dense model has `value` more of a feature of the sparse one.

        with si.steer_across(bridge, sparse, dense, si.Node(1, "mlp_write", 86), 3.0): logits = dense(tokens)

    Args:
        bridge: ties the two models.
        sparse: where the node is.
        dense: the model that is steered, ours or TransformerLens'.
        node: any node but q and k channels.
        value: how much, in the units of the sparse model's stream, or of the neuron or v channel.
        positions: where: some positions, counted from the start for all prompts alike, or a tensor with one for every
            prompt (`batch.last`, say); None is everywhere.

    Raises:
        BridgeError: if the node has no direction, or the bridge does not fit the models.
    """
    bridge.check(sparse, dense)
    direction = feature_direction(bridge, sparse, node)
    pair = first_behind(bridge, node)
    return push(dense, pair.dense, value * direction[pair], positions=positions)


@contextmanager
def transfer(
    bridge: Bridge,
    sparse: AnyModel,
    dense: AnyModel,
    running: Running,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    decode: Decode | None = None,
) -> Iterator[AnyModel]:
    """Inside the block the dense model is intervened on as `running` intervenes on the sparse one.

        with transfer(bridge, sparse, dense, lambda model: si.ablate(model, nodes, means)): logits = dense(tokens)

    What acts before the first tied site or, unless the ends of the streams are tied, behind the last is not carried.

    Args:
        bridge: ties the two models.
        sparse: the model that `running` is for.
        dense: the model that is run in the block, ours or TransformerLens'.
        running: a function of the sparse model that gives a block of its own: `ablate`, `steer`, `circuit.running` ...
        attention_mask: of the prompts that are going to be run, where padding is not behind all that a token sees.
        decode: what to add for a change of the sparse stream; None decodes it.

    Raises:
        BridgeError: if the bridge does not fit the models.
    """
    bridge.check(sparse, dense)
    decode = partial(decoded, bridge) if decode is None else decode
    crossing = _Crossing(bridge, sparse_side(sparse), hooked(dense), running, attention_mask, decode)
    with hooked(dense).hooks(fwd_hooks=crossing.hooks()):
        yield dense


class _Crossing:
    """Hooks that carry what an intervention does from one tied site to the next."""

    def __init__(
        self,
        bridge: Bridge,
        sparse: HookedSparseTransformer,
        dense: HookedModel,
        running: Running,
        mask: Tensor | None,
        decode: Decode,
    ):
        self.bridge, self.sparse, self.dense, self.running, self.mask = bridge, sparse, dense, running, mask
        self.decode = decode
        self.moved: Tensor | None = None
        self.scale: Tensor | float = 1.0

    def hooks(self) -> FwdHooks:
        """Forward hooks for the dense model."""
        pairs = enumerate(self.bridge.pairs)
        found: FwdHooks = [(stream_hook(pair.dense), partial(self._at, k)) for k, pair in pairs]
        if ends(self.bridge):
            found += [(FINAL_SCALE_HOOK, self._note_scale)] if self.dense.cfg.norm != "none" else []
            found.append((FINAL_READ.hook, self._at_end))
        return found

    def _at(self, k: int, resid: Tensor, hook: HookPoint) -> Tensor:
        """Add what the stretch before has changed, and see what the next one does."""
        after = resid if k == 0 or self.moved is None else resid + self.moved
        self.moved = None
        if k < len(self.bridge.pairs) - 1 or ends(self.bridge):
            with evaluating(self.sparse):
                change = change_in(self.bridge, self.sparse, k, after, self.running, self.mask)
            into = self.bridge.pairs[min(k + 1, len(self.bridge.pairs) - 1)]
            self.moved = self.decode(change, into).to(resid)
        return after

    def _note_scale(self, scale: Tensor, hook: HookPoint) -> None:
        self.scale = scale

    def _at_end(self, read: Tensor, hook: HookPoint) -> Tensor | None:
        if self.moved is None or not bool(self.moved.any()):
            return None
        if self.moved.shape != read.shape:
            raise BridgeError(
                f"the last read was changed at {self.moved.shape[1]} positions, and {read.shape[1]} are unembedded: "
                "inside `transfer` run the dense model from its tokens to its logits in one call."
            )
        return read + read_by(self.dense, self.moved, self.scale)


@dataclass(frozen=True, eq=False)
class FeatureTable(Table):
    """Which nodes of the sparse model are on in the dense one: a row per prompt, position and node.

    `pair` (where the sparse model was entered), `prompt`, `pos`, `node`, `value`.
    """

    columns: ClassVar[tuple[str, ...]] = ("pair", "prompt", "pos", "node", "value")


@torch.no_grad()
def explain(
    bridge: Bridge,
    sparse: AnyModel,
    activations: Mapping[SitePair, DenseResid],
    *,
    n: int = 5,
    positions: Collection[int] | None = None,
) -> FeatureTable:
    """What the dense model's activations are in the sparse model's terms.

    The sparse model is entered at each tied site that `activations` has and run to the next tied one. Of every place on
    the way, the `n` nodes of largest magnitude are listed that are not zero.

    Args:
        bridge: ties the two models.
        sparse: whose nodes are meant.
        activations: streams of the dense model at tied sites; `dense_streams(bridge, dense, tokens)` makes them.
        n: nodes per prompt, position and place.
        positions: which, counted from the start; None is all of them.

    Raises:
        BridgeError: for a site that is not tied.
    """
    model, rows = sparse_side(sparse), []
    for pair, resid in activations.items():
        encoded = bridge.encode(resid, pair)
        for place, held in _entered(bridge, model, pair, encoded).items():
            for prompt, pos in torch.cartesian_prod(torch.arange(len(held)), torch.arange(held.shape[1])).tolist():
                if positions is not None and pos not in positions:
                    continue
                values = held[prompt, pos]
                for channel in values.abs().argsort(descending=True, stable=True)[:n].tolist():
                    if values[channel] != 0:
                        node = str(Node(*place, channel))
                        rows.append((str(pair), prompt, pos, node, float(values[channel])))
    return FeatureTable(pd.DataFrame(rows, columns=list(FeatureTable.columns)))


def _entered(
    bridge: Bridge, model: HookedSparseTransformer, pair: SitePair, resid: Tensor
) -> dict[Place, Float[Tensor, "batch pos width"]]:
    """What every node holds from one tied site of the sparse model to the next."""
    k, last = bridge.pairs.index(pair) + 1, 2 * model.cfg.n_layers
    at_end = k == len(bridge.pairs)
    stop = last if at_end else bridge.pairs[k].sparse
    held: dict[Place, Tensor] = {}

    def keep(place: Place, activation: Tensor, hook: HookPoint) -> None:
        held[place] = flat(activation)

    inside = [place for place in places(model.cfg) if pair.sparse <= half_of(place) < stop + at_end]
    hooks: FwdHooks = [(place.hook, partial(keep, place)) for place in inside]
    with evaluating(model), model.hooks(fwd_hooks=hooks):
        end = through(model, pair.sparse, stop, resid)
        if at_end:
            last_read(model, end)
    return held
