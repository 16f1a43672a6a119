"""What the heads of a circuit look for and what they carry, channel by channel, on a task's prompts.

    score[query, key]    sum over channels c of q[query, c] k[key, c] / sqrt(d_head)
    share of channel c   cov(q_c k_c, score sqrt(d_head)) / var(score sqrt(d_head)) among the keys of a query, each
                         query's own mean taken out, since the softmax does not see it; the shares of a head add up to 1
    carried z_c          sum over keys of attention * v[key, c], at the answer position
    direct               z_c W_O[c, m] (gain_m / scale) (W_U[m, answer] - W_U[m, foil]), summed over kept writes m that
                         AbsTopK left standing: what the channel adds to the logit difference on the direct path
    knock-out            mean logit difference of the circuit, less that with the head's v nodes held as well; or held
                         only for what the answer position gets of them

QK and OV circuits: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*. Everything is measured
while the model runs as the circuit, on both prompts of every pair, so that a constant preference for one answer is
worth nothing; the model's own attention stands beside the circuit's. Where scores are no such sum (rotary positions
turn q and k before they meet) a head has no QK channels, and its note says so.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.circuit.drives import N_SAID, N_SEEN, Text, followed, token_text
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.looking import (
    ANSWER,
    EVERY,
    ROLES,
    Looks,
    Recorded,
    even,
    even_frac,
    explained_by,
    looks,
    masses,
    record,
)
from sparse_interp.circuit.pictures import shown
from sparse_interp.interventions.ablation import FwdHooks, Masks, ablate
from sparse_interp.interventions.answers import answer_logits, stream_at
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Z_HOOK, Node, Place, V, group_size, heads_of, wires
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, logit_difference

SAME_PATTERN = 1e-3
"""Attention that softmax of the channels' products may be off by, for scores to count as their sum."""

TELLING, LITTLE, NEARLY_EVEN = 0.5, 0.05, 0.9
"""In a sentence: the share of variance or attention that is worth naming, the attention that is as good as none, and
the share of keys from which on a head averages."""


@dataclass(frozen=True, eq=False)
class HeadTable(Table):
    """One row per head, those first that the circuit needs most: kept nodes `n_q`, `n_k`, `n_v`; `knockout`,
    `knockout_at_answer` and `direct` in logits of answer over foil; a `note` on what could not be read; a `sentence`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "head", "n_q", "n_k", "n_v", "knockout", "knockout_at_answer", "direct",
        "note", "sentence")  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """What each head is worth, as a bar."""
        rows = self.frame.assign(name=_names(self.frame), low=math.nan, high=math.nan)
        return bars_with_intervals(rows, label="name", value="knockout", low="low", high="high", ax=ax)


@dataclass(frozen=True, eq=False)
class LookTable(Table):
    """What tells where a head looks, at the answer position and at every one: `even_frac`, and the shares of the
    variance of its attention that go with the key's token, its distance and its role; `sink` is what no key gets."""

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "head", "query", "sink", "even_frac",
        "explained_by_token", "explained_by_distance", "explained_by_role")  # fmt: skip


@dataclass(frozen=True, eq=False)
class RoleTable(Table):
    """Attention to keys by `role`: its `mass` in the circuit, in the model, and of an average over all keys."""

    columns: ClassVar[tuple[str, ...]] = ("layer", "head", "query", "role", "mass", "model_mass", "even_mass")


@dataclass(frozen=True, eq=False)
class KeyTable(Table):
    """Attention that a key gets from the answer position, by its token: `attention` per key, and `seen` keys."""

    columns: ClassVar[tuple[str, ...]] = ("layer", "head", "token_id", "token", "seen", "attention")


@dataclass(frozen=True, eq=False)
class ChannelTable(Table):
    """QK, channel by channel: its `share` of the score's variance, for the queries that `query` names; mean and
    spread of q at the queries and of k at all positions; `wants` keys whose k is `high`, `low`, or `like q`; where q
    and k come from, and what k follows."""

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "head", "query", "q", "k", "q_kept", "k_kept", "share", "wants",
        "q_mean", "q_spread", "k_mean", "k_spread", "q_from", "k_from", "k_follows")  # fmt: skip


@dataclass(frozen=True, eq=False)
class ValueTable(Table):
    """OV, wire by wire: the `weight` from v to a write, the mean size of what is `carried` to the answer position, and
    the logits of answer over foil that the wire adds on the `direct` path; where v comes from, and what it follows."""

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "head", "v", "write", "weight", "carried", "direct", "v_from", "v_follows")  # fmt: skip


@dataclass(frozen=True)
class HeadReadings:
    """What every head of a circuit looks for and carries."""

    heads: HeadTable
    """A row and a sentence per head."""

    looks: LookTable
    """What tells where it looks."""

    roles: RoleTable
    """Where it looks."""

    keys: KeyTable
    """Which tokens get its attention at the answer position."""

    channels: ChannelTable
    """QK: which channels make its scores."""

    values: ValueTable
    """OV: what it carries, and where to."""

    def _repr_html_(self) -> str:
        return self.heads._repr_html_()


class _Head(NamedTuple):
    """A head with the runs that it is read from."""

    layer: int
    index: int
    model: HookedModel
    circuit: Circuit
    batch: TaskBatch
    alone: Recorded
    """The circuit's run."""
    masks: Masks
    """What the circuit keeps."""

    @property
    def key_head(self) -> int:
        """Which head of k and v it meets."""
        return self.index // group_size(self.model.cfg)

    def node(self, site: str, channel: int) -> Node:
        """Its node for one of its channels."""
        head = self.index if site == "q" else self.key_head
        return Node(self.layer, site, head * self.model.cfg.d_head + channel)

    def values(self, site: str) -> Float[Tensor, "batch pos d_head"]:
        """Its q, k or v."""
        start = self.node(site, 0).channel
        return self.alone.nodes[Place(self.layer, site)][..., start : start + self.model.cfg.d_head]

    def kept(self, site: str) -> list[Node]:
        """Its nodes that are in the circuit."""
        nodes = (self.node(site, channel) for channel in range(self.model.cfg.d_head))
        return [node for node in nodes if node in self.circuit.node_set]


def read_heads(circuit: Circuit, model: AnyModel, batch: TaskBatch) -> HeadReadings:
    """Read every head that has a node in `circuit`, on both prompts of every pair of `batch`.

    Patterns of all prompts are held at once: layers * prompts * heads * positions^2 * 4 bytes.

    Raises:
        CircuitError: if the circuit belongs to another model.
    """
    model = hooked(model)
    circuit.check_model(model)
    found = {(n.layer, head) for n in circuit.node_set if n.site in ("q", "k", "v") for head in heads_of(model.cfg, n)}
    sides, layers = batch.both_sides(), {layer for layer, _ in found}
    whole = record(model, sides, layers)
    with circuit.running(model):
        alone = record(model, sides, layers)
    kept = circuit.kept
    heads = [_Head(layer, head, model, circuit, sides, alone, kept) for layer, head in sorted(found)]
    text, asked = token_text(model), {q: looks(sides, q, model.cfg.attention_dir) for q in (ANSWER, EVERY)}
    worth = dict(_knock_outs(heads))
    looked = [row for head in heads for row in _looks(head, asked)]
    roles = [row for head in heads for row in _roles(head, whole, asked)]
    keys = [row for head in heads for row in _keys(head, asked[ANSWER], text)]
    channels = ChannelTable(_frame(ChannelTable, [r for h in heads for r in _channels(h, asked, text)]))
    values = ValueTable(_frame(ValueTable, [row for head in heads for row in _values(head, text)]))
    tables = (
        LookTable(_frame(LookTable, looked)),
        RoleTable(_frame(RoleTable, roles)),
        KeyTable(_frame(KeyTable, keys)),
    )
    rows = [_row(head, worth[head.layer, head.index], (*tables, channels, values), asked) for head in heads]
    frame = _frame(HeadTable, rows).sort_values("knockout", ascending=False, kind="stable", ignore_index=True)
    return HeadReadings(HeadTable(frame), *tables, channels, values)


def _frame(table: type[Table], rows: Sequence[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(table.columns))


def _names(frame: pd.DataFrame) -> list[str]:
    return [f"head {layer}.{head}" for layer, head in zip(frame.layer, frame["head"], strict=True)]


def _of(table: Table, head: _Head) -> pd.DataFrame:
    return table.frame[(table.frame.layer == head.layer) & (table.frame["head"] == head.index)]


def _knock_outs(heads: list[_Head]) -> Iterator[tuple[tuple[int, int], tuple[float, float]]]:
    """By how much the circuit's mean logit difference falls when a head's v nodes are held too, for every query or
    for the answer position alone. Heads of one group share their v nodes, and so the first number.
    """
    if not heads:
        return
    model, circuit, batch = heads[0].model, heads[0].circuit, heads[0].batch

    def mean(layer: int, hooks: FwdHooks) -> float:
        with model.hooks(fwd_hooks=hooks):
            return logit_difference(answer_logits(model, batch, streams[layer], layer), batch).mean().item()

    known: dict[frozenset[Node], float] = {}
    with torch.no_grad(), evaluating(model), circuit.running(model):
        streams = {layer: stream_at(model, batch, layer) if layer else None for layer in {head.layer for head in heads}}
        whole = mean(heads[0].layer, [])
        for head in heads:
            nodes = frozenset(head.kept("v"))
            if nodes not in known:
                with ablate(model, nodes, circuit.baseline):
                    known[nodes] = mean(head.layer, [])
            at_answer = whole - mean(head.layer, [(Z_HOOK.format(layer=head.layer), _held_at_answer(head))])
            yield (head.layer, head.index), (whole - known[nodes], at_answer)


def _held_at_answer(head: _Head) -> Callable:
    """A hook under which what the answer position gets of a head's kept v nodes is what their baselines would give."""
    rows, last, d_head = torch.arange(len(head.batch)), head.batch.last.cpu(), head.model.cfg.d_head
    channels = [node.channel % d_head for node in head.kept("v")]
    baseline = torch.tensor([head.circuit.baseline.of(node) for node in head.kept("v")])
    paid = head.alone.patterns[head.layer][rows, head.index, last].sum(1)

    def hook(z: Tensor, hook: HookPoint) -> Tensor:
        held = z.clone()
        for channel, value in zip(channels, baseline.tolist(), strict=True):
            held[rows, last, head.index, channel] = (paid * value).to(z)
        return held

    return hook


# -- where it looks ---------------------------------------------------------------------------------------------------


def _looks(head: _Head, asked: dict[str, Looks]) -> Iterator[tuple]:
    attention = head.alone.patterns[head.layer][:, head.index]
    for query, where in asked.items():
        groups = (where.token, where.distance, where.role)
        told = (explained_by(attention, group, where) for group in groups)
        sink = 1 - sum(masses(attention, where))
        yield head.layer, head.index, query, max(0.0, sink), even_frac(attention, where), *told


def _roles(head: _Head, whole: Recorded, asked: dict[str, Looks]) -> Iterator[tuple]:
    for query, where in asked.items():
        patterns = [run.patterns[head.layer][:, head.index] for run in (head.alone, whole)]
        columns = [masses(pattern, where) for pattern in (*patterns, even(where))]
        for role, *paid in zip(ROLES, *columns, strict=True):
            yield head.layer, head.index, query, role, *paid


def _keys(head: _Head, where: Looks, text: Text) -> Iterator[tuple]:
    paid = head.alone.patterns[head.layer][:, head.index][where.seen].double()
    ids, codes = where.token[where.seen].unique(return_inverse=True)
    seen = torch.bincount(codes, minlength=len(ids))
    mean = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, codes, paid) / seen
    for i in mean.argsort(descending=True, stable=True).tolist():
        yield head.layer, head.index, int(ids[i]), text(int(ids[i])), int(seen[i]), float(mean[i])


# -- what it looks for ------------------------------------------------------------------------------------------------


def _channels(head: _Head, asked: dict[str, Looks], text: Text) -> Iterator[tuple]:
    q, k = (head.values(site).double() for site in ("q", "k"))
    if not _is_sum(head, asked[EVERY]):
        return
    real = head.batch.attention_mask.cpu().bool()
    shares = {query: _shares(q, k, where) for query, where in asked.items()}
    for channel in range(q.shape[2]):
        nodes = head.node("q", channel), head.node("k", channel)
        kept = [node in head.circuit.node_set for node in nodes]
        if not any(kept) and max(abs(share[channel]) for share in shares.values()) < 1e-6:
            continue
        drawn = (_sources(head, nodes[0]), _sources(head, nodes[1]), _follows(k[..., channel], head.batch, text))
        at_keys = k[..., channel][real]
        for query, where in asked.items():
            at_queries = q[..., channel][where.seen.any(2)]
            q_mean, q_spread = float(at_queries.mean()), float(at_queries.std(correction=0))
            wants = "like q" if abs(q_mean) < 2 * q_spread else "high" if q_mean > 0 else "low"
            at = (q_mean, q_spread, float(at_keys.mean()), float(at_keys.std(correction=0)))
            share = shares[query][channel]
            yield head.layer, head.index, query, *map(str, nodes), *kept, share, wants, *at, *drawn


def _is_sum(head: _Head, where: Looks) -> bool:
    """Whether the head's attention is what the products of its q and k nodes make it, up to the sink."""
    q, k = (head.values(site).double() for site in ("q", "k"))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    expected = scores.masked_fill(~where.seen, -torch.inf).softmax(-1)[where.seen]
    paid = head.alone.patterns[head.layer][:, head.index].double() * where.seen
    paid = paid / paid.sum(2, keepdim=True).clamp(min=1e-30)
    some = (paid.sum(2, keepdim=True) > 0).expand_as(paid)[where.seen]  # a sink may take all that float32 has
    return bool(((paid[where.seen] - expected).abs()[some] < SAME_PATTERN).all())


def _shares(q: Float[Tensor, "batch pos c"], k: Float[Tensor, "batch pos c"], where: Looks) -> list[float]:
    """Each channel's share of the variance of scores among the keys of a query."""
    scores = (q @ k.mT) * where.seen
    scores = (scores - scores.sum(2, keepdim=True) / where.seen.sum(2, keepdim=True).clamp(min=1)) * where.seen
    total = scores.pow(2).sum()
    if float(total) <= 1e-10 * float((q.pow(2).sum() * k.pow(2).sum()).clamp(min=1e-30)) ** 0.5:
        return [0.0] * q.shape[2]
    return ((q * (scores @ k)).sum((0, 1)) / total).tolist()


def _sources(head: _Head, node: Node) -> str:
    """The kept reads that drive a q, k or v node most, by weight times spread, as `L1.attn_read.6 (+6, 98%)`."""
    if node not in head.circuit.node_set:
        return f"held at {head.circuit.baseline.of(node):.3g}" if node.site in head.circuit.sites else "not gated"
    into = head.circuit.edges[head.circuit.edges.target == str(node)]
    if into.empty:
        return "no kept read"
    reads = head.alone.nodes[Place(head.layer, "attn_read")][head.batch.attention_mask.cpu().bool()]
    channels = [int(name.rpartition(".")[2]) for name in into.source]
    size = (torch.tensor(into.weight.to_numpy()) * reads[:, channels].double().std(0, correction=0)).abs()
    total = float(size.pow(2).sum()) or 1.0
    order = size.argsort(descending=True, stable=True)[:N_SAID].tolist()
    return ", ".join(
        f"{into.source.iloc[i]} ({into.weight.iloc[i]:+.3g}, {float(size[i]) ** 2 / total:.0%})" for i in order
    )


def _follows(values: Float[Tensor, "batch pos"], batch: TaskBatch, text: Text) -> str:
    """What a channel follows on the prompts, as `at ' (+1), at " (-1)`; see `drives.followed`."""
    return followed(values[..., None], batch.clean.cpu(), batch.attention_mask.cpu().bool(), text)


# -- what it carries --------------------------------------------------------------------------------------------------


def _values(head: _Head, text: Text) -> Iterator[tuple]:
    rows, last = torch.arange(len(head.batch)), head.batch.last.cpu()
    pattern = head.alone.patterns[head.layer][rows, head.index, last]
    carried = torch.einsum("bk,bkc->bc", pattern.double(), head.values("v").double())
    (wire,) = [w for w in wires(head.model.cfg) if w.source is V]
    start = head.index * head.model.cfg.d_head
    weights = wire.weight(head.model.layers[head.layer]).detach()[start : start + head.model.cfg.d_head].double().cpu()
    place = Place(head.layer, "attn_write")
    write = head.alone.nodes[place][rows, last]
    towards = _towards_answer(head) * (write != 0)
    for node in head.kept("v"):
        channel = node.channel % head.model.cfg.d_head
        sources, follows = _sources(head, node), _follows(head.values("v")[..., channel], head.batch, text)
        for target in weights[channel].nonzero()[:, 0].tolist():
            if not head.masks[place][target]:
                continue
            weight = float(weights[channel, target])
            direct = float((carried[:, channel] * weight * towards[:, target]).mean())
            size = float(carried[:, channel].abs().mean())
            end = Node(head.layer, "attn_write", target)
            yield head.layer, head.index, str(node), str(end), weight, size, direct, sources, follows


def _towards_answer(head: _Head) -> Float[Tensor, "batch d_model"]:
    """What a unit in each channel of the last stream adds to the logit of the answer over that of the foil."""
    model, batch = head.model, head.batch
    unembedding = model.unembed.W_U.detach().double().cpu()
    towards = (unembedding[:, batch.answer.cpu()] - unembedding[:, batch.foil.cpu()]).T
    for place, kept in head.masks.items():
        if place.site in ("final_read", "final_resid"):
            towards = towards * kept.cpu()
    if model.cfg.norm == "none":
        return towards
    towards = towards * model.ln_final.w.detach().double().cpu() / head.alone.scale[:, None]
    return towards - towards.mean(1, keepdim=True) if model.cfg.norm == "layer" else towards


# -- in words ---------------------------------------------------------------------------------------------------------


def _row(head: _Head, worth: tuple[float, float], tables: tuple[Table, ...], asked: dict[str, Looks]) -> tuple:
    """The row of a `HeadTable`, from this head's rows of the other tables."""
    looked, roles, keys, channels, values = (_of(table, head) for table in tables)
    counts = [len(head.kept(site)) for site in ("q", "k", "v")]
    notes = []
    if not _is_sum(head, asked[EVERY]):
        notes.append("its scores are not the sum of products of q and k nodes, so it has no QK channels")
    if not counts[2]:
        notes.append("none of its v nodes is in the circuit, so it carries nothing")
    direct = float(values.direct.sum())
    query = EVERY if abs(worth[1]) < abs(worth[0]) / 2 else ANSWER
    said = [_says_where(query, looked, roles, keys), _says_why(query, channels), _says_what(values)]
    if counts[2]:
        where = "of which what the answer position gets is" if query == ANSWER else "but for the answer position alone"
        said.append(
            f"holding it costs the circuit {worth[0]:.2g} logits, {where} {worth[1]:.2g}, directly {direct:.2g}"
        )
    sentence = f"Head {head.layer}.{head.index} {'; '.join(part for part in said if part)}."
    return head.layer, head.index, *counts, *worth, direct, "; ".join(notes), sentence


def _says_where(query: str, looked: pd.DataFrame, roles: pd.DataFrame, keys: pd.DataFrame) -> str:
    look = looked[looked["query"] == query].iloc[0]
    roles = roles[roles["query"] == query]
    start = "at the answer position" if query == ANSWER else "at every position"
    sink = f"; {look.sink:.0%} goes to the sink" if look.sink > 0.005 else ""
    if roles.mass.sum() <= LITTLE:
        return f"{start} looks at next to nothing{sink}"
    if look.even_frac > NEARLY_EVEN:
        return f"{start} averages over all that it sees{sink}"
    parts = []
    first = roles[roles.role != "other"].sort_values("mass", ascending=False, kind="stable").iloc[0]
    if query == ANSWER and look.explained_by_token >= TELLING:
        seen = keys[keys.seen >= N_SEEN].head(N_SAID)
        listed = " and ".join(f"{shown(row.token)} ({row.attention:.0%} per key)" for row in seen.itertuples())
        parts.append(f"looks at {listed}: the token tells {look.explained_by_token:.0%} of where its attention goes")
    if first.mass / roles.mass.sum() >= TELLING or not parts:
        parts.append(f"pays {first.mass:.0%} to {ROLE_WORDS[first.role]} (averaging: {first.even_mass:.0%})")
    return f"{start} {'; it '.join(parts)}{sink}"


ROLE_WORDS = {
    "itself": "the position itself",
    "changed": "the token that the pair differs in",
    "previous": "the position before",
    "same token": "other occurrences of its token",
    "after same token": "what came after an earlier occurrence of its token",
    "first": "the first token",
}


def _says_why(query: str, channels: pd.DataFrame) -> str:
    told = channels[channels["query"] == query]
    told = told[told.share.abs() >= 0.1].sort_values("share", key=lambda s: -s.abs(), kind="stable").head(N_SAID)
    named = [
        f"{row.k.split('.', 1)[1].replace('.', ' ')} being {row.wants} ({row.share:.0%} of the score's variance; k is "
        f"{row.k_follows})"
        for row in told.itertuples()
    ]
    return "its scores are made by " + " and by ".join(named) if named else ""


def _says_what(values: pd.DataFrame) -> str:
    size = (values.weight * values.carried).abs()
    named = []
    for v in size.groupby(values.v).max().sort_values(ascending=False, kind="stable").index[:N_SAID]:
        rows = values.loc[size[values.v == v].sort_values(ascending=False, kind="stable").index]
        ends = " and ".join(f"{row.write.rpartition('.')[2]} ({row.weight:+.2g})" for row in rows[:N_SAID].itertuples())
        more = f" and {len(rows) - N_SAID} more" if len(rows) > N_SAID else ""
        named.append(f"{v.split('.', 1)[1].replace('.', ' ')} ({rows.v_follows.iloc[0]}) to channel {ends}{more}")
    return "it carries " + ", and ".join(named) if named else ""
