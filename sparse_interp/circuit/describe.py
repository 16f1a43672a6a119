"""What the nodes of a circuit do: where they are active, what they read and what they write.

    contexts      for each node, the blocks of text in which |activation| is largest anywhere but at the first token
    effect[t]     what one unit of a node adds to the logit of token t on the direct path alone:

                      ((d . centring) * gain / scale) W_U[:, t]      d = what the unit adds to the stream:
                                                                     the channel itself (a write), a row of W_out
                                                                     (a neuron), a row of W_O (a v node that gets all
                                                                     the attention)

`scale` is the final norm's denominator, frozen at its mean where it was measured, and every cut and layer between the
write and the end is passed over: a first-order account (the direct logit attribution of Elhage et al. 2021, *A
Mathematical Framework for Transformer Circuits*), not an intervention. At `final_read` it is exact. Reads, q and k
write nothing to the stream; for reads the tokens whose embeddings write the channel stand in that place.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.circuit.drives import (
    ByGroup,
    SentenceTable,
    Text,
    TokenTable,
    WireTable,
    by_groups,
    token_rows,
    token_text,
    wire_table,
)
from sparse_interp.circuit.drives import sentences as sentences_of
from sparse_interp.circuit.graph import Circuit, token_edges
from sparse_interp.circuit.pictures import shown
from sparse_interp.circuit.spectrum import HistogramTable, Spectrum, SpectrumTable
from sparse_interp.errors import CircuitError
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import (
    FINAL_SCALE_HOOK,
    PATTERN_HOOK,
    RESID_PRE_HOOK,
    SITES,
    Node,
    Place,
    flat,
    heads_of,
    places,
    queries_of,
)
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch

N_BEFORE, N_AFTER = 16, 6
"""Tokens shown on either side of the one that a context is for."""

N_TOKENS_IN, N_TOKENS_OUT = 6, 8
"""Tokens drawn at the two ends of a circuit."""


@dataclass(frozen=True, eq=False)
class ContextTable(Table):
    """The strongest contexts of every node: `pieces` and `activations` are the window, and
    `at_piece` counts to the token that it is shown for."""

    columns: ClassVar[tuple[str, ...]] = (
        "node", "source", "rank", "value", "token", "block", "pos", "pieces", "activations", "at_piece")  # fmt: skip


@dataclass(frozen=True, eq=False)
class EffectTable(Table):
    """Logits of tokens per unit of a node's activation, on the direct path: `node`, `token_id`, `token`, `effect`."""

    columns: ClassVar[tuple[str, ...]] = ("node", "token_id", "token", "effect")

    def of(self, node: str) -> "EffectTable":
        """The rows of one node."""
        return EffectTable(self.frame[self.frame.node == node].reset_index(drop=True))

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar per row."""
        rows = self.frame.assign(bar=self.frame.node + "  " + self.frame.token.map(repr), low=math.nan, high=math.nan)
        return bars_with_intervals(rows, label="bar", value="effect", low="low", high="high", ax=ax)


@dataclass(frozen=True, eq=False)
class ReadTable(Table):
    """Tokens whose embedding writes a read's channel, by W_E: `node`, `token_id`, `token`, `weight`."""

    columns: ClassVar[tuple[str, ...]] = ("node", "token_id", "token", "weight")


@dataclass(frozen=True, eq=False)
class StatisticsTable(Table):
    """One row per node: its `mean`, `nonzero_frac`, `at_first_token` and `spread` (standard deviation over positions)
    on text, and the shares of its variance there that go with the token at hand, the token before it and the position;
    on the task, its `spread_on_task`, by how much the two prompts of a pair differ in it at the changed token and at
    the last one (`change_at_edit`, `change_at_last`, mean absolute difference); and for q, k and v the
    `attention_to_edit` that the last token pays the changed one.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "node", "layer", "site", "channel", "head", "baseline", "importance_nats",
        "mean", "nonzero_frac", "at_first_token", "spread",
        "explained_by_current", "explained_by_previous", "explained_by_position",
        "spread_on_task", "change_at_edit", "change_at_last", "attention_to_edit")  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What is known of every node of a circuit, as tables."""

    statistics: StatisticsTable
    """One row per node."""

    contexts: ContextTable
    """Where each node is active, on text and on the task's prompts."""

    spectrum: SpectrumTable
    """Where each node is high, in between and low on text."""

    histograms: HistogramTable
    """How its activations on text are distributed."""

    effects: EffectTable
    """What writes, neurons, v nodes and final reads do to logits, on the direct path."""

    reads: ReadTable
    """Which tokens write the channels that reads read."""

    wires: WireTable
    """Which kept nodes drive each node, and where it writes: spread is over the task's prompts, without them text."""

    tokens: TokenTable
    """At which tokens, and after which, each node is high or low on text."""

    sentences: SentenceTable
    """The largest numbers of all this in a sentence per node."""


def describe(
    circuit: Circuit,
    model: AnyModel,
    blocks: Int[Tensor, "block pos"],
    batch: TaskBatch | None = None,
    *,
    n_contexts: int = 6,
    n_tokens: int = 6,
    progress: bool = False,
) -> Description:
    """Describe every node of `circuit`, in one pass over `blocks` and one over the prompts of `batch`.

    Args:
        circuit: nodes to describe.
        model: the model that they belong to; it runs whole, not as the circuit.
        blocks: text; as a rule held-out text.
        batch: prompts of the task; None leaves out what needs them, and freezes the final norm at its mean over text.
        n_contexts: contexts per node on text; half as many on prompts.
        n_tokens: tokens per node that are listed as promoted, as suppressed, and as writers of a read's channel.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to another model, or there is no text.
    """
    model = hooked(model)
    circuit.check_model(model)
    nodes, text = in_order(circuit), token_text(model)
    names = [str(node) for node in nodes]
    on_text = _watched(model, nodes, blocks, None, n_contexts, text, "text", progress)
    last = on_text if batch is None else _on_task(model, nodes, batch, max(1, n_contexts // 2), text)
    contexts = [on_text.contexts] if batch is None else [last.contexts, on_text.contexts]
    spread_on_task = math.nan if batch is None else last.sums["spread"]
    statistics = circuit.nodes[["layer", "site", "channel", "head", "baseline", "importance_nats"]].assign(
        node=names, **on_text.sums, **on_text.explained, spread_on_task=spread_on_task,
        **_task_changes(model, nodes, batch),
    )  # fmt: skip
    effects = _strongest(direct_effects(model, nodes, last.scale), nodes, text, n_tokens, "effect")
    wires = wire_table(circuit, dict(zip(names, last.sums["spread"], strict=True)), last.at_embedding)
    told = [row for by in ("current", "previous") for row in token_rows(by, on_text.by[by], nodes, text, n_tokens)]
    tokens = TokenTable(pd.DataFrame(told, columns=list(TokenTable.columns)))
    return Description(
        StatisticsTable(statistics[list(StatisticsTable.columns)]),
        ContextTable(pd.concat(contexts, ignore_index=True)),
        *on_text.spectrum.tables(names, blocks.cpu(), text),
        EffectTable(effects),
        ReadTable(_strongest(embedding_writes(model, nodes), nodes, text, n_tokens, "weight")),
        wires,
        tokens,
        sentences_of(statistics, wires, tokens, effects, model.cfg.d_head),
    )


def _on_task(model: HookedModel, nodes: Sequence[Node], batch: TaskBatch, n: int, text: Text) -> "_Watched":
    sides = batch.both_sides()
    return _watched(model, nodes, sides.clean, sides.attention_mask, n, text, "task", False)


def in_order(circuit: Circuit) -> list[Node]:
    """The nodes of `circuit`, in the order of its table."""
    columns = circuit.nodes[["layer", "site", "channel"]]
    return [Node(int(layer), str(site), int(c)) for layer, site, c in columns.itertuples(index=False)]


# -- where nodes are active -------------------------------------------------------------------------------------------


def activations(
    model: HookedModel,
    nodes: Sequence[Node],
    tokens: Tokens,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> Iterator[Float[Tensor, "rows pos node"]]:
    """Activations of `nodes` alone, a few rows of `tokens` at a time, in eval mode and on the CPU."""
    device = model.embed.W_E.device
    wanted = {
        place: [i for i, node in enumerate(nodes) if (node.layer, node.site) == place]
        for place in places(model.cfg, SITES)
    }
    wanted = {place: rows for place, rows in wanted.items() if rows}
    for start in tqdm(range(0, len(tokens), batch_size), disable=not progress, desc="contexts", unit="batch"):
        rows = slice(start, start + batch_size)
        out = torch.zeros(*tokens[rows].shape, len(nodes))

        def note(place: Place, out: Tensor = out) -> Callable:
            columns = wanted[place]
            channels = torch.tensor([nodes[i].channel for i in columns], device=device)

            def hook(activation: Tensor, hook: HookPoint) -> None:
                out[:, :, columns] = flat(activation)[:, :, channels].float().cpu()

            return hook

        hooks: FwdHooks = [(place.hook, note(place)) for place in wanted]
        mask = None if attention_mask is None else attention_mask[rows].to(device)
        with torch.no_grad(), evaluating(model), model.hooks(fwd_hooks=hooks):
            model(tokens[rows].to(device), attention_mask=mask, return_type=None)
        yield out


class _Strongest:
    """For each node the `n` rows with the largest |activation| so far, with the window around that token."""

    def __init__(self, n_nodes: int, n: int):
        self.n, width = n, N_BEFORE + 1 + N_AFTER
        self.size = torch.full((n_nodes, 0), -1.0)
        self.row = torch.zeros(n_nodes, 0, dtype=torch.long)
        self.pos = torch.zeros(n_nodes, 0, dtype=torch.long)
        self.window = torch.zeros(n_nodes, 0, width)

    def add(self, values: Float[Tensor, "rows pos node"], real: Int[Tensor, "rows pos"], first_row: int) -> None:
        """Take in the activations of rows `first_row`, `first_row` + 1, ...; `real` is 0 at padding."""
        sizes = values.abs().masked_fill(real[:, :, None] == 0, -1.0)
        sizes[:, 0] = -1.0  # every block begins alike, and a node that fires there would show nothing else
        size, pos = sizes.max(1)
        rows = torch.arange(len(values))[:, None].expand_as(pos)
        around = pos[:, :, None] + torch.arange(-N_BEFORE, N_AFTER + 1)
        inside = around.clamp(0, values.shape[1] - 1)
        window = values[rows[:, :, None], inside, torch.arange(values.shape[2])[None, :, None]]
        self.size = torch.cat([self.size, size.T], 1)
        best = self.size.argsort(dim=1, descending=True, stable=True)[:, : self.n]
        self.size = self.size.gather(1, best)
        self.row = torch.cat([self.row, rows.T + first_row], 1).gather(1, best)
        self.pos = torch.cat([self.pos, pos.T], 1).gather(1, best)
        window = torch.cat([self.window, window.transpose(0, 1)], 1)
        self.window = window.gather(1, best[:, :, None].expand(-1, -1, window.shape[2]))

    def frame(self, nodes: Sequence[Node], tokens: Tokens, lengths: Sequence[int], text: Text, source: str):
        """The rows of a ContextTable; a node that is zero everywhere has none."""
        found = []
        for i, node in enumerate(nodes):
            for rank in range(self.size.shape[1]):
                row, pos = int(self.row[i, rank]), int(self.pos[i, rank])
                if self.size[i, rank] <= 0:
                    continue
                start, stop = max(0, pos - N_BEFORE), min(lengths[row], pos + N_AFTER + 1)
                pieces = [text(token) for token in tokens[row, start:stop].tolist()]
                shift = N_BEFORE - pos
                values = self.window[i, rank, start + shift : stop + shift].tolist()
                at = pos - start
                found.append((str(node), source, rank, values[at], pieces[at], row, pos, pieces, values, at))
        return pd.DataFrame(found, columns=list(ContextTable.columns))


class _Watched(NamedTuple):
    """What one pass over tokens showed."""

    contexts: pd.DataFrame
    """Rows of a ContextTable."""

    spectrum: Spectrum
    """The activations that are ranked."""

    sums: dict[str, list[float]]
    """Mean, share of tokens that are not zero, mean at the first token, and standard deviation, of every node."""

    by: dict[str, ByGroup]
    """Activations by the token at hand, the token before it, and the position."""

    at_embedding: dict[str, float]
    """For every read, the standard deviation of its channel as the stream enters the first block."""

    scale: float
    """Denominator of the final norm, at the last tokens where there is a mask."""

    @property
    def explained(self) -> dict[str, list[float]]:
        """The shares of every node's variance that go with each of them."""
        return {f"explained_by_{by}": groups.explained.tolist() for by, groups in self.by.items()}


def _watched(
    model: HookedModel,
    nodes: Sequence[Node],
    tokens: Tokens,
    attention_mask: Int[Tensor, "batch pos"] | None,
    n: int,
    text: Text,
    source: str,
    progress: bool,
) -> _Watched:
    """One pass over `tokens`."""
    if len(tokens) == 0:
        raise CircuitError("a description needs at least one block of tokens, and there are none.")
    tokens = tokens.cpu()
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask
    lengths, n_real = real.sum(1), int(real.sum())
    strongest, spectrum, row = _Strongest(len(nodes), n), Spectrum(), 0
    total, nonzero, first, squares = (torch.zeros(len(nodes), dtype=torch.float64) for _ in range(4))
    by = by_groups(tokens, len(nodes))
    with _watching_ends(model) as ends:
        for values in activations(model, nodes, tokens, attention_mask, progress=progress):
            rows = slice(row, row + len(values))
            strongest.add(values, real[rows], row)
            spectrum.add(values)
            later = real[rows].bool()
            later[:, 0] = False
            for group in by.values():
                group.add(values, later, row)
            shown = values.double() * real[rows, :, None]
            total, nonzero = total + shown.sum((0, 1)), nonzero + (shown != 0).double().sum((0, 1))
            first, squares, row = first + shown[:, 0].sum(0), squares + shown.pow(2).sum((0, 1)), row + len(values)
    scale = 1.0
    if ends.inverse_scales:
        inverse = torch.cat(ends.inverse_scales)
        chosen = inverse.flatten() if attention_mask is None else inverse[torch.arange(len(inverse)), lengths - 1]
        scale = 1 / float(chosen.mean())
    spread = (squares / n_real - (total / n_real) ** 2).clamp(min=0).sqrt()
    sums = {
        "mean": total / n_real,
        "nonzero_frac": nonzero / n_real,
        "at_first_token": first / len(tokens),
        "spread": spread.where(spread.pow(2) > 1e-10 * squares / n_real, 0.0),  # rounding is no spread
    }
    frame = strongest.frame(nodes, tokens, lengths.tolist(), text, source)
    at_embedding = _read_spreads(torch.cat(ends.embeddings)[real.bool()], nodes)
    return _Watched(frame, spectrum, {name: values.tolist() for name, values in sums.items()}, by, at_embedding, scale)


class _Ends(NamedTuple):
    """What was seen at the two ends of runs."""

    embeddings: list[Tensor]
    inverse_scales: list[Tensor]


@contextmanager
def _watching_ends(model: HookedModel) -> Iterator[_Ends]:
    """Inside the block, the stream that enters the first block and the final norm's scale are noted."""
    ends = _Ends([], [])

    def note_embedding(stream: Tensor, hook: HookPoint) -> None:
        ends.embeddings.append(stream.detach().float().cpu())

    def note_scale(scale: Tensor, hook: HookPoint) -> None:
        ends.inverse_scales.append(scale[:, :, 0].detach().float().reciprocal().cpu())

    hooks: FwdHooks = [(RESID_PRE_HOOK.format(layer=0), note_embedding)]
    if model.cfg.norm != "none":
        hooks.append((FINAL_SCALE_HOOK, note_scale))
    with model.hooks(fwd_hooks=hooks):
        yield ends


def _read_spreads(stream: Float[Tensor, "token d_model"], nodes: Sequence[Node]) -> dict[str, float]:
    """Standard deviation of the channel of every read, as `stream` holds it."""
    deviations = stream.double().std(0, correction=0).tolist()
    reads = [n for n in nodes if n.site in ("attn_read", "mlp_read", "final_resid", "final_read")]
    return {str(node): deviations[node.channel] for node in reads if node.channel < len(deviations)}


def _task_changes(model: HookedModel, nodes: Sequence[Node], batch: TaskBatch | None) -> dict[str, list[float]]:
    """How nodes differ between the prompts of a pair, and how much the last token attends to the changed one."""
    names = ("change_at_edit", "change_at_last", "attention_to_edit")
    if batch is None:
        return {name: [math.nan] * len(nodes) for name in names}
    edited = (batch.clean != batch.corrupt).int().argmax(1)
    rows, last, mask = torch.arange(len(batch)), batch.last.cpu(), batch.attention_mask
    patterns: dict[int, Tensor] = {}

    def note(layer: int) -> Callable:
        def hook(pattern: Tensor, hook: HookPoint) -> None:
            patterns[layer] = pattern.detach().cpu()

        return hook

    size = max(1, len(batch))
    hooks: FwdHooks = [(PATTERN_HOOK.format(layer=layer), note(layer)) for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=hooks):
        clean = next(activations(model, nodes, batch.clean, mask, batch_size=size))
    corrupt = next(activations(model, nodes, batch.corrupt, mask, batch_size=size))
    difference = (clean - corrupt).abs()
    paid = {layer: pattern[rows, :, last, edited].mean(0) for layer, pattern in patterns.items()}
    attention = [
        float(paid[node.layer][heads_of(model.cfg, node)].mean()) if node.site in ("q", "k", "v") else math.nan
        for node in nodes
    ]
    changes = (difference[rows, edited].mean(0).tolist(), difference[rows, last].mean(0).tolist(), attention)
    return dict(zip(names, changes, strict=True))


# -- what nodes read and write ----------------------------------------------------------------------------------------


def direct_effects(model: HookedModel, nodes: Sequence[Node], scale: float = 1.0) -> Float[Tensor, "node d_vocab"]:
    """What one unit of each node adds to every logit on the direct path; zeros for reads within blocks, q and k.

    `scale` is the denominator of the final norm. A v node is taken to get all the attention.
    """
    d_model, vocabulary = model.cfg.d_model, model.unembed.W_U.detach().float()
    stream, final = torch.zeros(len(nodes), d_model), torch.zeros(len(nodes), d_model)
    for i, node in enumerate(nodes):
        if node.site in ("attn_write", "mlp_write", "final_resid"):
            stream[i, node.channel] = 1
        elif node.site == "neuron":
            stream[i] = model.layers[node.layer].mlp.W_out.detach()[node.channel].float().cpu()
        elif node.site == "v":
            rows = queries_of(model.cfg, node.channel)
            stream[i] = model.layers[node.layer].attn.W_O.detach().flatten(0, 1)[rows].float().sum(0).cpu()
        elif node.site == "final_read":
            final[i, node.channel] = 1
    if model.cfg.norm == "layer":
        stream = stream - stream.mean(1, keepdim=True)
    if model.cfg.norm != "none":
        stream = stream * model.ln_final.w.detach().float().cpu() / scale
    return (stream + final) @ vocabulary.cpu()


def embedding_writes(model: HookedModel, nodes: Sequence[Node]) -> Float[Tensor, "node d_vocab"]:
    """What each token's embedding holds in the channel of each read; zeros for other sites and for positions."""
    embedding = model.embed.W_E.detach().float().cpu()
    out = torch.zeros(len(nodes), len(embedding))
    for i, node in enumerate(nodes):
        if node.site in ("attn_read", "mlp_read", "final_resid", "final_read") and node.channel < model.cfg.d_model:
            out[i] = embedding[:, node.channel]
    return out


def _strongest(
    values: Float[Tensor, "node d_vocab"], nodes: Sequence[Node], text: Text, n: int, name: str
) -> pd.DataFrame:
    """The `n` largest positive and the `n` largest negative entries of each node, by size."""
    rows = []
    for node, row in zip(nodes, values, strict=True):
        order = row.argsort(descending=True, stable=True)
        ends = [i for i in order[:n].tolist() if row[i] > 0] + [i for i in order[-n:].tolist() if row[i] < 0]
        for token in sorted(dict.fromkeys(ends), key=lambda i: (-abs(float(row[i])), i)):
            rows.append((str(node), token, text(token), float(row[token])))
    return pd.DataFrame(rows, columns=["node", "token_id", "token", name])


# -- the ends of a circuit, and the way between them ------------------------------------------------------------------


def token_wires(model: AnyModel, circuit: Circuit, batch: TaskBatch) -> pd.DataFrame:
    """Entries of W_E and W_U at the tokens that matter, with their text in `piece`: `in.ID` -> node, node -> `out.ID`.

    Those are the tokens in which the pairs of `batch` differ, and its answers and foils, the most frequent first.
    """
    model, sides = hooked(model), batch.both_sides()
    inputs = Counter(sides.clean[sides.clean != sides.corrupt].tolist())
    outputs = Counter(sides.answer.tolist())
    chosen = [[token for token, _ in c.most_common(n)] for c, n in ((inputs, N_TOKENS_IN), (outputs, N_TOKENS_OUT))]
    edges = token_edges(model, in_order(circuit), *chosen)
    if not edit_is_last(batch):  # what stands elsewhere in a prompt is not what the final read meets
        edges = edges[~((edges.kind == "embedding") & edges.target.str.contains("final_re"))]
    text = token_text(model)
    reading = edges.kind == "embedding"
    ids = edges.source.where(reading, edges.target).str.removeprefix("token.")
    return edges.assign(
        source=edges.source.where(~reading, "in." + ids),
        target=edges.target.where(reading, "out." + ids),
        piece=[text(int(token)) for token in ids],
    )


def edit_is_last(batch: TaskBatch) -> bool:
    """Whether some pair differs in the token at the answer position."""
    rows = torch.arange(len(batch))
    return bool((batch.clean[rows, batch.last] != batch.corrupt[rows, batch.last]).any())


def main_path(circuit: Circuit, wires: pd.DataFrame, *, edit_is_last: bool = False) -> str:
    """From a token through nodes to a token, in words: the path whose least needed node is needed most.

    Unless the tokens differ at the answer position itself (`edit_is_last`), only attention can bring them there, and a
    path goes through a v, or, where no v joins the two ends, through the k that steers it. Empty if no path joins them,
    or nobody measured how much nodes are needed.
    """
    if circuit.nodes.importance_nats.isna().all() or wires.empty:
        return ""
    carried = circuit.edges[circuit.edges.kind != "attention"]
    tried = (_widest_path(circuit, pd.concat([edges, wires]), edit_is_last) for edges in (carried, circuit.edges))
    path = next(filter(None, tried), [])
    piece = {end: row["piece"] for row in wires.to_dict("records") for end in (row["source"], row["target"])}
    names = {str(node): _in_words(node, circuit.cfg.d_head) for node in in_order(circuit)}
    words = [names.get(step) or shown(piece[step]) for step in path]
    return " → ".join(word for i, word in enumerate(words) if i == 0 or word != words[i - 1])


def _widest_path(circuit: Circuit, edges: pd.DataFrame, moved: bool) -> list[str]:
    """Names from an `in.` token to an `out.` token; among equally wide paths the shorter one.

    The state of a search is a name and whether what it carries has reached the answer position; `moved` is that of the
    first token.
    """
    nodes = {str(node): node for node in in_order(circuit)}
    needed = dict(zip(nodes, circuit.nodes.importance_nats.astype(float), strict=True))
    into: dict[str, list[str]] = {}
    for source, target in zip(edges.source, edges.target, strict=True):
        into.setdefault(target, []).append(source)
    ends = sorted({*edges.source, *edges.target} - needed.keys())
    State = tuple[str, bool]
    best: dict[State, tuple[float, int, State | None]] = {
        (name, moved): (math.inf, 0, None) for name in ends if name.startswith("in.")
    }
    for name in [*nodes, *(end for end in ends if end.startswith("out."))]:  # nodes come in forward order
        for state in [(source, there) for source in into.get(name, []) for there in (False, True)]:
            if state not in best:
                continue
            here = (name, state[1] or (name in nodes and nodes[name].site in ("k", "v")))
            way = (min(best[state][0], needed.get(name, math.inf)), best[state][1] - 1, state)
            if here not in best or way > best[here]:  # pyright: ignore[reportOperatorIssue]
                best[here] = way
    finished = [(*best[state][:2], state) for state in best if state[0].startswith("out.") and state[1]]
    state = max(finished)[2] if finished else None
    path: list[str] = []
    while state is not None:
        path.append(state[0])
        state = best[state][2]
    return path[::-1]


def _in_words(node: Node, d_head: int) -> str:
    """`channel 7` for reads and writes, which makes the two ends of a rail one word."""
    if node.site in ("q", "k", "v"):
        return f"L{node.layer} head {node.channel // d_head} {node.site} {node.channel}"
    return f"L{node.layer} neuron {node.channel}" if node.site == "neuron" else f"channel {node.channel}"
