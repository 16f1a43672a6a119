"""What drives each node of a circuit and what it writes: wires by what they carry, tokens by what they tell of a node.

    contribution   weight * standard deviation of the wire's source
    share          contribution^2 / sum of contribution^2 over the wires into the same node
    explained      the share of a node's variance that goes with the token at hand, with the token before it, or with
                   the position: 1 - (SS_within / (n - k)) / (SS_total / (n - 1)) for k groups of n values, which of
                   groups that mean nothing is 0 on average (epsilon squared, Kelley 1935)

Shares take the sources of a node for independent, and a v node's wire into a write for one that gets all attention. A
sentence per node puts the largest of these numbers into words, and has no word that is not a number of a table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_interp.axes import Tokens
from sparse_interp.circuit.graph import EDGE_COLUMNS, Circuit
from sparse_interp.circuit.pictures import shown
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.sites import Node
from sparse_interp.results import Table

Text = Callable[[int], str]
"""Token id -> its text."""

EMBEDDING = "embedding"
"""What writes a channel of the stream before any block does: the token, and where positions are added, the position."""

N_SEEN = 3
"""Times that a token has to occur before its mean is worth a row."""

TELLING = 0.3
"""Share of a node's variance from which on a sentence says that it follows something."""

N_SAID = 2
"""Wires and tokens that a sentence names."""


@dataclass(frozen=True, eq=False)
class WireTable(Table):
    """What every wire into a node carries: `source`, `target`, `kind`, `weight_name`, `weight`, the `spread` of the
    source, `contribution` = weight * spread, and `share`, that of its square among the wires into the same node."""

    columns: ClassVar[tuple[str, ...]] = (
        "source", "target", "kind", "weight_name", "weight", "spread", "contribution", "share")  # fmt: skip

    def into(self, node: str) -> pd.DataFrame:
        """The wires that drive a node, the largest contribution first."""
        return _largest(self.frame[self.frame.target == node], "contribution")

    def out_of(self, node: str) -> pd.DataFrame:
        """The wires that a node writes by, the largest weight first."""
        return _largest(self.frame[self.frame.source == node], "weight")


@dataclass(frozen=True, eq=False)
class TokenTable(Table):
    """Tokens that tell something of a node: `by` the token at hand (`current`) or the one before it (`previous`), its
    `mean` activation there, how often it was `seen`, and the `share` of the node's variance that lies between its mean
    and that of all tokens. The first position is left out: every block begins alike."""

    columns: ClassVar[tuple[str, ...]] = ("node", "by", "token_id", "token", "seen", "mean", "share")

    def of(self, node: str, by: str = "current") -> pd.DataFrame:
        """The tokens of one node, those first that tell most."""
        rows = self.frame[(self.frame.node == node) & (self.frame.by == by)]
        return rows.sort_values("share", ascending=False, kind="stable")


@dataclass(frozen=True, eq=False)
class SentenceTable(Table):
    """What is said of each `node`, in one `sentence`."""

    columns: ClassVar[tuple[str, ...]] = ("node", "sentence")

    def of(self, node: str) -> str:
        """The sentence of one node."""
        return str(self.frame.set_index("node").sentence[node])


def _largest(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows.sort_values(column, key=lambda values: -values.abs(), kind="stable")


def token_text(model: HookedModel) -> Text:
    """Token id -> text, as the model's tokenizer decodes it alone; `#id` without a tokenizer."""
    known: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in known:
            known[token] = f"#{token}" if model.tokenizer is None else model.tokenizer.decode([token])
        return known[token]

    return text


# -- wires ------------------------------------------------------------------------------------------------------------


def wire_table(circuit: Circuit, spread: dict[str, float], at_embedding: dict[str, float]) -> WireTable:
    """Every wire of `circuit` with what it carries.

    Args:
        circuit: whose wires.
        spread: standard deviation of every node.
        at_embedding: for every read, that of its channel as the stream enters the first block.
    """
    wires = circuit.edges.loc[circuit.edges.kind != "attention", list(EDGE_COLUMNS)]
    written = [(EMBEDDING, node, EMBEDDING, "", 1.0) for node, size in at_embedding.items() if size > 0]
    wires = pd.concat([wires, pd.DataFrame(written, columns=wires.columns).astype({"weight": float})])
    from_embedding = wires.target.map(at_embedding)
    wires = wires.assign(spread=wires.source.map(spread).where(wires.kind != EMBEDDING, from_embedding).astype(float))
    wires = wires.assign(contribution=wires.weight * wires.spread)
    total = (wires.contribution**2).groupby(wires.target).transform("sum")
    wires = wires.assign(share=wires.contribution**2 / total.where(total > 0))
    return WireTable(wires[list(WireTable.columns)].reset_index(drop=True))


# -- tokens -----------------------------------------------------------------------------------------------------------


class ByGroup:
    """Sums of activations by group: by the token at hand, the token before, or the position.

    Args:
        groups: group of every position of every row, as an id.
        n_nodes: nodes whose activations are summed.
    """

    def __init__(self, groups: Int[Tensor, "rows pos"], n_nodes: int):
        self.ids, self.codes = groups.unique(return_inverse=True)
        self.seen = torch.zeros(len(self.ids), dtype=torch.float64)
        self.sums = torch.zeros(len(self.ids), n_nodes, dtype=torch.float64)
        self.squares = torch.zeros(n_nodes, dtype=torch.float64)

    def add(self, values: Float[Tensor, "rows pos node"], counted: Tensor, first_row: int) -> None:
        """Take in the activations of rows `first_row`, ... where `counted` is true."""
        codes = self.codes[first_row : first_row + len(values)][counted]
        kept = values[counted].double()
        self.seen.index_add_(0, codes, torch.ones(len(codes), dtype=torch.float64))
        self.sums.index_add_(0, codes, kept)
        self.squares += kept.pow(2).sum(0)

    @property
    def explained(self) -> Float[Tensor, " node"]:
        """The share of each node's variance that goes with the group, in [0, 1]; not a number for a constant node."""
        return explained(self.seen, self.sums, self.squares)

    def shares(self) -> tuple[Float[Tensor, "group node"], Float[Tensor, "group node"]]:
        """Mean of every group, and its share of each node's variance."""
        means = self.sums / self.seen.clamp(min=1)[:, None]
        n = self.seen.sum().clamp(min=1)
        centre = self.sums.sum(0) / n
        total = self.squares - n * centre**2
        between = self.seen[:, None] * (means - centre) ** 2
        return means, between / total.where(total > _noise(self.squares), torch.inf)


def explained(
    seen: Float[Tensor, " group"], sums: Float[Tensor, "group node"], squares: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """Epsilon squared of groups, from how often each was seen, sums of values, and the sum of all squares."""
    seen, sums = seen[seen > 0], sums[seen > 0]
    n, k = float(seen.sum()), len(seen)
    total = squares - sums.sum(0) ** 2 / max(n, 1)
    within = squares - (sums**2 / seen[:, None]).sum(0)
    if n <= k:
        return torch.full_like(squares, math.nan)
    found = 1 - (within / (n - k)) / (total / (n - 1))
    return found.clamp(0, 1).where(total > _noise(squares), math.nan)


def _noise(squares: Tensor) -> Tensor:
    """The sum of squared deviations below which float32 activations with these squares are one number."""
    return 1e-10 * squares


def by_groups(tokens: Tokens, n_nodes: int) -> dict[str, ByGroup]:
    """Empty sums for what a node may follow: the token at hand, the token before it, the position."""
    previous = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    groups = {"current": tokens, "previous": previous, "position": position}
    return {name: ByGroup(codes, n_nodes) for name, codes in groups.items()}


def followed(values: Float[Tensor, "rows pos 1"], tokens: Tokens, real: Bool[Tensor, "rows pos"], text: Text) -> str:
    """What one channel follows, in words: `at ' (+1), " (-1)`, `after blue (+3)`, `told by position`, or `mixed`."""
    later = real & (torch.arange(real.shape[1]) > 0)
    groups = by_groups(tokens, 1)
    for group in groups.values():
        group.add(values, later, 0)
    told = {by: float(group.explained) for by, group in groups.items()}
    if all(math.isnan(share) for share in told.values()):
        return f"always {float(values[later].double().mean()):.3g}"
    by = telling(told)
    if by == "position":
        return "told by position"
    if by is None:
        return "told by neither token nor position"
    rows = token_rows(by, groups[by], [Node(0, "k", 0)], text, N_SAID + 1)
    centre = float(values[later].double().mean())
    named = listed([(token, mean) for _, _, _, token, _, mean, _ in rows], centre)
    return f"{AT[by]} {named}; {centre:+.2g} on average" if named else f"told by the token {BY[by]}"


def telling(told: dict[str, float]) -> str | None:
    """The name of the largest share, if it is worth saying."""
    known = {name: share for name, share in told.items() if share >= TELLING}
    return max(known, key=known.__getitem__) if known else None


AT, BY = {"current": "at", "previous": "after"}, {"current": "it stands at", "previous": "before"}


def listed(means: Sequence[tuple[str, float]], centre: float) -> str:
    """Tokens with what a node is there, as `' (+1), " (-1)`; those are left out where it is close to its `centre`."""
    farthest = max((abs(mean - centre) for _, mean in means), default=0.0)
    return ", ".join(f"{shown(token)} ({mean:+.2g})" for token, mean in means if abs(mean - centre) >= farthest / 4)


def token_rows(by: str, groups: ByGroup, nodes: Sequence[Node], text: Text, n: int) -> list[tuple]:
    """The `n` tokens of each node that tell most of it, as rows of a `TokenTable`."""
    means, shares = groups.shares()
    shares = shares.where(groups.seen[:, None] >= N_SEEN, 0.0)
    rows = []
    for i, node in enumerate(nodes):
        for row in shares[:, i].argsort(descending=True, stable=True)[:n].tolist():
            if shares[row, i] > 0:
                token = int(groups.ids[row])
                seen, mean, share = int(groups.seen[row]), float(means[row, i]), float(shares[row, i])
                rows.append((str(node), by, token, text(token), seen, mean, share))
    return rows


# -- words ------------------------------------------------------------------------------------------------------------


def sentences(
    statistics: pd.DataFrame, wires: WireTable, tokens: TokenTable, effects: pd.DataFrame, d_head: int
) -> SentenceTable:
    """One sentence per row of `statistics`, out of the largest numbers of the tables."""
    promoted = dict(list(effects.groupby("node")))
    rows = []
    for row in statistics.to_dict("records"):
        node = Node(row["layer"], row["site"], row["channel"])
        parts = [_follows(row, tokens), _driven(wires.into(str(node)), d_head)]
        parts += [_writes(wires.out_of(str(node)), d_head), _promotes(promoted.get(str(node)))]
        said = "; ".join(part for part in parts if part)
        name = in_words(node, d_head)
        rows.append((str(node), f"{name[0].upper()}{name[1:]} {said}."))
    return SentenceTable(pd.DataFrame(rows, columns=list(SentenceTable.columns)))


def in_words(node: Node, d_head: int) -> str:
    """A node as a person says it: `neuron 12 of layer 0`."""
    channel, layer = node.channel, node.layer
    if node.site in ("q", "k", "v"):
        return f"{node.site} {channel} (head {layer}.{channel // d_head})"
    return {
        "neuron": f"neuron {channel} of layer {layer}",
        "attn_read": f"channel {channel} as attention {layer} reads it",
        "mlp_read": f"channel {channel} as MLP {layer} reads it",
        "attn_write": f"channel {channel} as attention {layer} writes it",
        "mlp_write": f"channel {channel} as MLP {layer} writes it",
        "final_resid": f"channel {channel} of the last stream",
        "final_read": f"channel {channel} as it is read last",
    }[node.site]


def _follows(row: dict[str, Any], tokens: TokenTable) -> str:
    """Where a node is active: by token, by the token before, by position, or by none of them."""
    told = {by: row[f"explained_by_{by}"] for by in ("current", "previous", "position")}
    if not row["spread"] or all(math.isnan(share) for share in told.values()):
        return f"is {row['mean']:.2g} everywhere"
    by = telling(told)
    if by is None:
        shares = ", ".join(f"{share:.0%}" for share in told.values())
        return f"follows neither token nor position (this, the one before, position: {shares} of its variance)"
    if by == "position":
        return f"follows the position ({told[by]:.0%} of its variance)"
    best = [(row.token, row.mean) for row in tokens.of(row["node"], by).head(N_SAID + 1).itertuples()]
    named = listed(best, row["mean"])
    said = f": {AT[by]} {named}" if named else ""
    return f"follows the token {BY[by]} ({told[by]:.0%} of its variance){said}; {row['mean']:+.2g} on average"


def _driven(wires: pd.DataFrame, d_head: int) -> str:
    if wires.empty:
        return ""
    named = [
        f"{_end(w.source, d_head)} ({f'{w.weight:+.2g}, ' * (w.kind == 'weight')}{w.share:.0%})"
        for w in wires.head(N_SAID).itertuples()
    ]
    return "is driven by " + " and ".join(named)


def _writes(wires: pd.DataFrame, d_head: int) -> str:
    weights = wires[wires.kind == "weight"]
    if weights.empty:
        return f"is read by {_end(wires.target.iloc[0], d_head)}" if len(wires) else ""
    named = [f"{_end(w.target, d_head)} ({w.weight:+.2g})" for w in weights.head(N_SAID).itertuples()]
    more = f" and {len(weights) - N_SAID} more" if len(weights) > N_SAID else ""
    return "goes to " + " and ".join(named) + more


def _promotes(effects: pd.DataFrame | None) -> str:
    if effects is None or effects.empty:
        return ""
    named = [f"{shown(e.token)} ({e.effect:+.2g})" for e in effects.head(N_SAID).itertuples()]
    return "moves logits directly, most those of " + " and ".join(named) + " per unit"


def _end(name: str, d_head: int) -> str:
    if name == EMBEDDING:
        return "the embedding"
    layer, site, channel = name.split(".")
    return in_words(Node(int(layer[1:]), site, int(channel)), d_head)
