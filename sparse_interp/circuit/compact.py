"""A circuit as a small model of its own: what it computes, without what it does not.

    compact = circuit.compact(model);  compact(tokens)      the logits of circuit.running(model), far sooner

A node outside a circuit holds a constant, whatever the prompt. So

    source outside       its row of the weight matrix becomes a part of the target's bias: baseline x weight
    edge cut             the same, for that entry alone
    target outside       is not computed, unless AbsTopK acts there: then whether a kept node survives depends on it
    v outside            writes baseline x W_O x (1 - what the sink takes): one channel that is 1 carries that sum, and
                         where there is no sink it is a constant
    q or k outside       meets its kept partner as a constant, and needs one channel for all that do; where both are
                         outside, their product shifts every score of the head, which shifts its sink
    write outside        a constant in the stream, added with that of the half block before
    half block           without a kept write it is that constant and nothing else

What a token writes into the stream stays whole, because the norm of every read is over all of it, and so is AbsTopK at
a read. At other sites of AbsTopK competitors that vary stay. Of those that do not vary, the `k` largest stay: one that
is smaller than `k` others that are always there can neither survive nor displace anything.

All of it is folded in float64 and then cast to the model's precision. Equal to `running` up to rounding; where two
magnitudes at the edge of AbsTopK are closer than that, either may survive in either.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks
from sparse_interp.interventions.edges import EdgeMasks
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.edges import Matrix
from sparse_interp.model.layers import Norm
from sparse_interp.model.narrow import (
    ACTIVATIONS,
    NarrowAttention,
    NarrowHalf,
    NarrowLinear,
    NarrowMLP,
    NarrowRead,
    NarrowStream,
    NarrowTransformer,
)
from sparse_interp.model.sites import FINAL_RESID, WIRES, NodeValues, Place, Wire, width
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Table

W_Q, W_K, W_V, W_O, W_IN, W_OUT = WIRES

Channels = Bool[Tensor, " width"]
Sources = Bool[Tensor, " source"]
Numbers = Float[Tensor, " width"]
Sinks = Float[Tensor, " head"]
Weights = Float[Tensor, "source target"]


@dataclass(frozen=True, eq=False)
class CompactionTable(Table):
    """What is left of a model: one row per site of a half block, in the order of the forward pass."""

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "site", "width", "kept", "computed", "used", "abs_topk", "n_weights", "n_weights_left",
    )  # fmt: skip
    """`width` channels of the model, of which the circuit keeps `kept`; `computed` channels are left, competitors
    included, and `used` of them are handed on. `abs_topk` is the number of entries that survive there, if it still
    acts. `n_weights` are the entries, zeros too, of the matrix into the site, before and after."""


class CompactCircuit(NarrowTransformer):
    """What `Circuit.compact` returns: tokens -> logits, as its circuit gives them."""

    table: CompactionTable
    """What was dropped, site by site."""

    @property
    def frame(self) -> pd.DataFrame:
        """The table's rows."""
        return self.table.frame


class Known(NamedTuple):
    """What is known of a site before any prompt: which channels vary, and what the others hold."""

    varies: Channels
    value: Numbers


@dataclass(frozen=True)
class Target:
    """A site that weights lead to."""

    place: Place
    weight: Weights
    """What varying sources carry to it; rows of other sources are zero."""

    bias: Numbers
    """What all other sources add up to."""

    act: str
    k: int | None
    """Entries that survive AbsTopK; None where it does not act, or no longer decides anything."""

    computed: Channels
    known: Known
    """What the site holds after AbsTopK and after the circuit has held its nodes."""

    def used_by(self, later: "Target") -> "Target":
        """This site with only those channels handed on that `later` reads."""
        return self.handing_on((later.weight[:, later.computed] != 0).any(1))

    def handing_on(self, needed: Channels) -> "Target":
        """This site with no other channels handed on than `needed`; competitors stay while any of them is."""
        varies = self.known.varies & needed
        k = self.k if varies.any() else None
        computed = varies if k is None else self.computed
        return replace(self, k=k, computed=computed, known=Known(varies, self.known.value))

    def linear(self, sources: Sources) -> NarrowLinear:
        """The site as a layer on those of its `sources` that are handed on."""
        chosen = None if self.k is None else self.known.varies[self.computed].nonzero().flatten()
        weight, bias = self.weight[sources][:, self.computed], self.bias[self.computed]
        return NarrowLinear(weight, bias, self.act, self.k, chosen)

    def spread(
        self, sources: Sources, onto: Float[Tensor, "width slot"], constant: Float[Tensor, " slot"]
    ) -> nn.Module:
        """`linear`, then what varies of it times `onto` plus `constant`: one product where nothing acts in between."""
        if self.k is None:
            weight, bias = self.weight[sources][:, self.computed], self.bias[self.computed]
            return NarrowLinear(weight @ onto[self.computed], bias @ onto[self.computed] + constant)
        return nn.Sequential(self.linear(sources), NarrowLinear(onto[self.known.varies], constant))


class CircuitCompaction:
    """Making a small model of a circuit with these parts."""

    baseline: NodeValues
    sites: tuple[str, ...]
    kept: Masks
    check_model: Callable[[AnyModel], None]
    check_all_positions: Callable[[str], None]
    cut_edges: Callable[[AnyModel], EdgeMasks]

    def compact(self, model: AnyModel) -> CompactCircuit:
        """A small model with the logits that `model` has while it runs as this circuit.

        It takes text or tokens and an attention mask, and its `table` says what was dropped. It has weights of its own:
        what becomes of `model` later does not change it. Logits agree to rounding, 1e-5 in float32, wherever no two
        magnitudes at the edge of AbsTopK are as close as that. Keep the circuit's file, and make it anew from there.

        Raises:
            CircuitError: if the model has another shape or other weights, or is one of TransformerLens' classes; or if
                the circuit keeps nodes at some positions only.
        """
        own = hooked(model)
        if not isinstance(own, HookedSparseTransformer):
            raise CircuitError(
                f"{own.cfg.model_name!r} is a model of TransformerLens, and only models of this library's own class "
                "are made compact; circuit.running(model) gives the same logits."
            )
        self.check_model(own)
        self.check_all_positions("a compact model")
        return _Folding(self, own).result()


class _Folding:
    """One circuit of one model on its way to a compact one."""

    def __init__(self, circuit: CircuitCompaction, model: HookedSparseTransformer):
        self.model, self.cfg, self.sites = model, model.cfg, circuit.sites
        self.kept = circuit.kept
        self.baseline = circuit.baseline
        self.cut = circuit.cut_edges(model)
        self.rows: list[tuple] = []

    # -- one site after the other -------------------------------------------------------------------------------------

    def held(self, place: Place) -> Numbers:
        """What nodes outside the circuit hold."""
        if place not in self.baseline.values:
            return torch.zeros(width(self.cfg, place.site), dtype=torch.float64)
        return _exact(self.baseline[place])

    def read(self, place: Place) -> Known:
        """A read: whatever is kept of it varies."""
        return Known(self.kept[place], self.held(place))

    def carried(self, layer: int, wire: Wire, source: Known) -> tuple[Weights, Weights]:
        """What each weight carries, split: its factor where the source varies, else the constant that comes out."""
        weight = _exact(wire.weight(self.model.layers[layer]))
        cut = self.cut.get(Matrix(layer, wire.weight_name))
        through = torch.ones_like(weight, dtype=torch.bool) if cut is None else ~cut
        varying = through & source.varies[:, None]
        held = self.held(Place(layer, wire.source.name))
        constant = weight * torch.where(through, source.value[:, None], held[:, None])
        return weight * varying, constant.masked_fill(varying, 0)

    def target(self, place: Place, weight: Weights, bias: Numbers, k: int | None, act: str = "identity") -> Target:
        """What is left to compute at a site that these weights lead to."""
        kept, held = self.kept[place], self.held(place)
        moves = (weight != 0).any(0)
        fixed = bias if ACTIVATIONS[act] is None else ACTIVATIONS[act](bias)
        k = None if k is not None and k >= len(bias) else k
        if k is None:
            alive = torch.ones_like(moves)
        else:
            size = fixed.abs().masked_fill(moves, 0)
            least = size.topk(k).values.min() if 0 < k <= (~moves).sum() else size.new_zeros(())
            alive = moves | ((size >= least) & (size > 0)) if k else torch.zeros_like(moves)
            if alive.sum() <= k:  # all of them survive
                k, moves = None, moves & alive
        varies = kept & (moves if k is None else alive)
        value = torch.where(kept, fixed * alive, held)
        found = Target(place, weight, bias, act, k, varies if k is None else alive, Known(varies, value))
        return found.handing_on(kept)

    # -- the halves of a block ----------------------------------------------------------------------------------------

    def mlp(self, layer: int) -> tuple[Target, NarrowRead | None, NarrowMLP | None]:
        """What an MLP writes, and the layers that are left of it."""
        block, read = self.model.layers[layer], Place(layer, "mlp_read")
        weight, constant = self.carried(layer, W_IN, self.read(read))
        bias = self.of(layer, "mlp.b_in") + constant.sum(0)
        neurons = self.target(Place(layer, "neuron"), weight, bias, block.mlp.cut_neuron.k, self.cfg.act_fn)
        weight, constant = self.carried(layer, W_OUT, neurons.known)
        bias = self.of(layer, "mlp.b_out") + constant.sum(0)
        write = self.target(Place(layer, "mlp_write"), weight, bias, block.mlp.cut_write.k)
        neurons = neurons.used_by(write)
        used = self.reads_of(read, neurons)
        self.note(neurons, used)
        self.note(write, neurons.known.varies)
        if not write.known.varies.any():
            return write, None, None
        mlp = NarrowMLP(neurons.linear(used), write.linear(neurons.known.varies))
        return write, self.narrow_read(read, used), mlp

    def attention(self, layer: int) -> tuple[Target, NarrowRead | None, NarrowAttention | None]:
        """What attention writes, and the layers that are left of it."""
        block, read = self.model.layers[layer], Place(layer, "attn_read")
        cuts = {"q": block.attn.cut_q, "k": block.attn.cut_k, "v": block.attn.cut_v}
        qkv = {}
        for (site, cut), wire in zip(cuts.items(), (W_Q, W_K, W_V), strict=True):
            weight, constant = self.carried(layer, wire, self.read(read))
            bias = self.of(layer, f"attn.b_{site.upper()}").flatten() + constant.sum(0)
            qkv[site] = self.target(Place(layer, site), weight, bias, cut.k)
        weight, constant = self.carried(layer, W_O, qkv["v"].known)
        through_ones = constant.unflatten(0, (self.cfg.n_heads, -1)).sum(1)  # times what the sink leaves of each row
        bias = self.of(layer, "attn.b_O")
        if block.attn.sink is None:
            bias, through_ones = bias + through_ones.sum(0), torch.zeros_like(through_ones)
        carried = torch.cat([weight, through_ones])
        write = self.target(Place(layer, "attn_write"), carried, bias, block.attn.cut_write.k)
        rows = (carried[:, write.computed] != 0).any(1)
        qkv["v"] = qkv["v"].handing_on(rows[: len(weight)])
        heads = _Heads(qkv, rows[len(weight) :], self.cfg, self.sink(layer))
        qkv["q"], qkv["k"] = qkv["q"].handing_on(heads.used("q")), qkv["k"].handing_on(heads.used("k"))
        used = self.reads_of(read, *qkv.values())
        for target in qkv.values():
            self.note(target, used)
        self.note(write, torch.cat([qkv["v"].known.varies, rows[len(weight) :]]))
        if not write.known.varies.any():
            return write, None, None
        return write, self.narrow_read(read, used), heads.narrow(qkv, used, write)

    def of(self, layer: int, name: str) -> Tensor:
        """A weight of a block, in float64."""
        return _exact(self.model.layers[layer].get_parameter(name))

    def sink(self, layer: int) -> Sinks | None:
        """The sink logits of a layer, if it has sinks."""
        return self.of(layer, "attn.sink") if self.cfg.sink else None

    def reads_of(self, place: Place, *targets: Target) -> Channels:
        """Which channels of a read some of `targets` need; the read has its row of the table from here."""
        used = torch.stack([(target.weight[:, target.computed] != 0).any(1) for target in targets]).any(0)
        cut = self.cut_of(place)
        computed = len(used) if used.any() and cut is not None else int(used.sum())
        self.rows.append((*place, len(used), int(self.kept[place].sum()), computed, int(used.sum()), cut, 0, 0))
        return used

    def cut_of(self, place: Place) -> int | None:
        """Entries that AbsTopK keeps at a read; None where it does not act."""
        if place.site == "final_read":
            return None
        k = getattr(self.model.layers[place.layer], f"cut_{place.site}").k
        return None if k is None or k >= self.cfg.d_read else k

    def narrow_read(self, place: Place, used: Channels) -> NarrowRead:
        """A read of the channels in `used`."""
        where = self.model if place.site == "final_read" else self.model.layers[place.layer]
        name = {"attn_read": "ln1", "mlp_read": "ln2", "final_read": "ln_final"}[place.site]
        norm, positions = self.copied(getattr(where, name), self.cfg.d_model), None
        if self.cfg.positions == "concat" and place.site != "final_read":
            table = _exact(self.model.pos_embed.W_pos)
            positions = self.copied(getattr(where, f"{name}_pos"), table.shape[1]).unhooked(table)
        return NarrowRead(norm, self.cut_of(place), used.nonzero().flatten(), positions)

    def copied(self, norm: Norm, size: int) -> Norm:
        """A norm of the model, in float64 and without its hooks."""
        copy = Norm(self.cfg, size)
        copy.load_state_dict(norm.state_dict())
        return copy.requires_grad_(False).double().cpu()

    def note(self, target: Target, sources: Sources) -> None:
        """A row of the table for what is left of a site."""
        known, place = target.known, target.place
        computed = int(target.computed.sum())
        n_weights = self.cfg.n_heads * self.cfg.d_head if place.site == "attn_write" else len(target.weight)
        counts = (len(target.bias), int(self.kept[place].sum()), computed, int(known.varies.sum()), target.k)
        self.rows.append((*place, *counts, n_weights * len(target.bias), int(sources.sum()) * computed))

    # -- the whole ----------------------------------------------------------------------------------------------------

    def result(self) -> CompactCircuit:
        """All of it, in the model's precision and on its device."""
        model, place = self.model, Place(self.cfg.n_layers, "final_read")
        unembedding, kept = _exact(model.unembed.W_U), self.kept[place]
        used = kept & (unembedding != 0).any(1)
        constant = _exact(model.unembed.b_U) + (self.held(place) * ~kept) @ unembedding
        tables = {"W_E": _exact(model.embed.W_E), "W_U": unembedding[used]}
        tables["bigram"] = _exact(model.bigram_table) + constant if self.cfg.bigram else constant[None]
        if self.cfg.positions == "add":
            tables["W_pos"] = _exact(model.pos_embed.W_pos)
        steps = self.steps(tables["W_E"]) if used.any() else []
        n = int(used.sum())
        self.rows.append((*place, len(kept), int(kept.sum()), n, n, None, unembedding.numel(), tables["W_U"].numel()))
        made = CompactCircuit(self.cfg, model.tokenizer, tables, steps, self.narrow_read(place, used))
        made.to(device=model.embed.W_E.device, dtype=model.embed.W_E.dtype)
        for name in ("W_U", "bigram"):  # logits are float32 at least
            setattr(made, name, getattr(made, name).to(torch.promote_types(made.W_U.dtype, torch.float32)))
        frame = pd.DataFrame(self.rows, columns=list(CompactionTable.columns)).astype({"abs_topk": "Int64"})
        made.table = CompactionTable(frame)
        return made

    def steps(self, embedding: Float[Tensor, "d_vocab d_model"]) -> list[nn.Module]:
        """What happens to the stream; constants are added as early as they can be, to `embedding` if nothing precedes.

        Every addition here is in memory that is this object's own.
        """
        steps: list[nn.Module] = []
        for layer, block in enumerate(self.model.layers):
            steps += self.between("identity", block.cut_pre.k)
            for half, cut in ((self.attention, block.cut_mid), (self.mlp, block.cut_post)):
                write, read, part = half(layer)
                varies, value = write.known
                constant = torch.where(varies, 0, value)
                if part is not None:
                    steps.append(NarrowHalf(read, part, varies.nonzero().flatten(), constant))
                elif not steps:
                    embedding += constant
                elif isinstance(steps[-1], NarrowHalf):
                    steps[-1].constant += constant
                else:
                    steps.append(NarrowStream(constant))
                steps += self.between(self.cfg.residual_act, cut.k)
        place = Place(self.cfg.n_layers - 1, FINAL_RESID.name)
        if place.site in self.sites:
            steps.append(NarrowStream(held=self.held(place).masked_fill(self.kept[place], torch.nan)))
        return steps

    def between(self, act: str, k: int | None) -> list[nn.Module]:
        """What the model does to the stream itself at one point, if it does anything."""
        k = None if k is not None and k >= self.cfg.d_model else k
        return [] if act == "identity" and k is None else [NarrowStream(act=act, k=k)]


class _Heads:
    """The heads of one layer that are left: which channels their scores and values need, and where each is put.

    A head has one channel for every q and k that both vary; one for all q whose k is a constant, which shift the
    scores of a query against its sink; one for all k whose q is a constant; and among its values one that is 1, for all
    v that do not vary. Idle heads are those that have this last one alone.
    """

    def __init__(self, qkv: dict[str, Target], ones: Bool[Tensor, " head"], cfg: ModelConfig, sink: Sinks | None):
        self.cfg, self.sink, self.ones = cfg, sink, ones
        (q, q_value), (k, k_value), (v, _) = ([x.unflatten(0, (cfg.n_heads, -1)) for x in qkv[s].known] for s in "qkv")
        left = (v.any(1) | ones)[:, None]
        self.pairs, self.v = q & k & left, v
        self.with_query = torch.where(q & ~k & left, k_value, 0) * (sink is not None)
        self.with_key = torch.where(~q & k & left, q_value, 0)
        self.shift = torch.where(q | k, 0, q_value * k_value).sum(1) / math.sqrt(cfg.d_head)
        scores = self.pairs.sum(1) + (self.with_query != 0).any(1) + (self.with_key != 0).any(1)
        self.idle = (ones & ~v.any(1) & (scores == 0)).nonzero().flatten().tolist()
        self.attending = (left[:, 0] & (v.any(1) | (scores > 0))).nonzero().flatten().tolist()
        self.size = int(torch.maximum(scores, v.sum(1) + ones).max())

    def used(self, site: str) -> Channels:
        """The q or k channels that scores need."""
        return (self.pairs | ((self.with_query if site == "q" else self.with_key) != 0)).flatten()

    def narrow(self, qkv: dict[str, Target], sources: Sources, write: Target) -> NarrowAttention:
        """The layer that is left, reading `sources`."""
        d_head, flat = self.cfg.d_head, self.cfg.n_heads * self.cfg.d_head
        n = len(self.attending) * self.size
        onto = {site: torch.zeros(flat, n, dtype=torch.float64) for site in "qkv"}
        constant = {site: torch.zeros(n, dtype=torch.float64) for site in "qkv"}
        out = torch.zeros(n, len(write.bias), dtype=torch.float64)
        for i, head in enumerate(self.attending):
            first, slot = head * d_head, i * self.size
            for channel in self.pairs[head].nonzero().flatten().tolist():
                onto["q"][first + channel, slot] = onto["k"][first + channel, slot] = 1
                slot += 1
            for site, other, alone in (("q", "k", self.with_query), ("k", "q", self.with_key)):
                if alone[head].any():
                    onto[site][first : first + d_head, slot], constant[other][slot] = alone[head], 1
                    slot += 1
            slot = i * self.size
            for channel in self.v[head].nonzero().flatten().tolist():
                onto["v"][first + channel, slot], out[slot] = 1, write.weight[first + channel]
                slot += 1
            if self.ones[head]:
                constant["v"][slot], out[slot] = 1, write.weight[flat + head]
        scale = math.sqrt(self.size / d_head)  # the layer divides by the root of its own width
        onto["q"], constant["q"] = onto["q"] * scale, constant["q"] * scale
        layers = [qkv[s].spread(sources, onto[s], constant[s]) for s in "qkv"] if self.attending else []
        out = torch.cat([out, write.weight[flat:][self.idle]])
        wide = replace(write, weight=out).linear(torch.ones(len(out), dtype=torch.bool))
        sink = None if self.sink is None else self.sink - self.shift
        attending = None if sink is None else sink[self.attending]
        idle = out.new_zeros(0) if sink is None else sink[self.idle]
        return NarrowAttention(layers, wide, attending, idle, len(self.attending), self.cfg.attention_dir == "causal")


def _exact(weight: Tensor) -> Tensor:
    """A weight in float64, in memory of its own."""
    return weight.detach().to("cpu", torch.float64, copy=True)
