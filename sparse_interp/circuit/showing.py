"""Everything that the circuit page shows of a circuit: its tables, put node by node, head by head, rail by rail.

    page(circuit, model, batch, known, ...)     what nodes do, from `describe`
        readings                                what heads look for and carry, from `read_heads`
        knocked                                 what is left without each node, from `knock_outs`
        audit, other, facts                     what it is worth; a circuit to compare with; more to say of the model

Nothing is measured here but what nodes and heads do on the few prompts that the page shows. What was not handed in is
not shown, and the page says so where a reader would miss it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.circuit.describe import (
    Description,
    activations,
    edit_is_last,
    in_order,
    main_path,
    token_wires,
)
from sparse_interp.circuit.drives import Text, token_text
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.knock_outs import CIRCUIT, HALF, HEAD, MODEL, NODE, KnockOutTable
from sparse_interp.circuit.looking import record
from sparse_interp.circuit.pictures import page_edges, page_nodes, shown
from sparse_interp.circuit.readings import HeadReadings
from sparse_interp.errors import CircuitError
from sparse_interp.model.config import Shape
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, key_of, queries_of, wires
from sparse_interp.tasks.task import TaskBatch
from sparse_interp.viewer.content import (
    CircuitPage,
    PageAudit,
    PageChannel,
    PageContext,
    PageCurve,
    PageHalf,
    PageHead,
    PageHistogram,
    PageKnockOut,
    PageNode,
    PagePrompt,
    PageTable,
    PageToken,
    PageWrite,
)

N_PROMPTS = 4
"""Pairs of prompts that a page shows, each of another template where there are so many."""

N_WRITERS = 5
"""Tokens that the page lists as writers of a read's channel."""

N_KEYS = 6
"""Tokens that the page lists as what a head pays most to."""

N_CHANNEL_TOKENS = 10
"""Tokens at either end of a channel's weights."""

N_CHANNEL_BINS = 21
"""Bins of the histogram of a channel's embedding weights."""

N_STEPS = 200
"""Steps of a search that its curve keeps."""

PromptValues = list[tuple[list[float], list[float]]]
"""For each prompt of the page, a number per token of it and of its twin."""


def page(
    circuit: Circuit,
    model: AnyModel,
    batch: TaskBatch,
    known: Description,
    audit: PageAudit | None = None,
    *,
    readings: HeadReadings | None = None,
    knocked: KnockOutTable | None = None,
    other: CircuitPage | None = None,
    facts: Mapping[str, str | float] | None = None,
) -> CircuitPage:
    """Everything that the circuit page shows: pass it to `circuit.to_html(path, page)`.

    Args:
        circuit: what to show.
        model: the model that it belongs to.
        batch: prompts of the task: examples, and the tokens at both ends, come from them.
        known: what `describe(circuit, model, blocks, batch)` found out.
        audit: what the circuit is worth; without it the page says that nobody measured.
        readings: what `read_heads(circuit, model, ...)` found out.
        knocked: what `knock_outs(circuit, model, batch)` measured, on this very batch.
        other: the page of a circuit to compare with, as `other_circuit.bare_page()` or this function give it.
        facts: what else to say of the model, such as its loss on held-out text.

    Raises:
        CircuitError: if `knocked` was measured on another number of prompts.
    """
    model, text = hooked(model), token_text(hooked(model))
    ends = token_wires(model, circuit, batch)
    path = main_path(circuit, ends, edit_is_last=edit_is_last(batch))
    chosen = _chosen_rows(batch)
    outcomes = _Outcomes(knocked, chosen, len(batch))
    bare = circuit.bare_page()
    return replace(
        bare,
        nodes=_full_nodes(circuit, known, _node_values(circuit, model, batch.rows(chosen)), outcomes),
        edges=[*bare.edges, *page_edges(ends)],
        tokens=_page_tokens(ends, batch),
        subtitle=f"Widest path: {path}" if path else "",
        n_layers=model.cfg.n_layers,
        summary=_summary(circuit, ends),
        prompts=_page_prompts(batch.rows(chosen), text),
        audit=audit,
        whole=outcomes.of(CIRCUIT, CIRCUIT),
        model_alone=outcomes.of(MODEL, circuit.model_name),
        heads=list(_page_heads(circuit, model, batch.rows(chosen), readings, outcomes)),
        halves=_page_halves(outcomes),
        channels=list(_page_channels(circuit, model, text)),
        tables=[*circuit_tables(circuit), _model_table(model, facts or {})],
        curves=circuit_curves(circuit),
        other=other,
    )


class _Outcomes:
    """Rows of a table of knock-outs as the page shows them; nothing without a table."""

    def __init__(self, knocked: KnockOutTable | None, chosen: Int[Tensor, " chosen"], n_pairs: int):
        self.halves: list[tuple[str, int]] = []
        self._found: dict[tuple[str, str], PageKnockOut] = {}
        for row in [] if knocked is None else knocked.frame.to_dict("records"):
            leads = row["leads"]
            if len(leads) != 2 * n_pairs:
                raise CircuitError(
                    f"knock-outs were measured on {len(leads)} prompts, and the page's batch has {n_pairs} pairs; "
                    "measure them on that batch."
                )
            both = [(leads[i], leads[n_pairs + i]) for i in chosen.tolist()]
            self._found[row["kind"], row["what"]] = PageKnockOut(
                kl=row["kl_nats"], lead=row["lead"], accuracy=row["accuracy"], loss=row["loss_nats"], leads=both
            )
            if row["kind"] == HALF:
                self.halves.append((row["what"], row["n_nodes"]))

    def of(self, kind: str, what: str) -> PageKnockOut | None:
        return self._found.get((kind, what))


# -- nodes ------------------------------------------------------------------------------------------------------------


def _full_nodes(
    circuit: Circuit, known: Description, on_prompts: Mapping[str, PromptValues], outcomes: _Outcomes
) -> list[PageNode]:
    """Page nodes with contexts, effects and statistics."""
    rows = {row["node"]: row for row in known.statistics.frame.to_dict("records")}
    effects = {str(node): part for node, part in known.effects.frame.groupby("node")}
    reads = {str(node): part for node, part in known.reads.frame.groupby("node")}
    contexts = {str(node): part for node, part in known.spectrum.frame.groupby("node")}
    histograms = {row.node: PageHistogram(low=row.low, high=row.high, counts=row.counts)
                  for row in known.histograms.frame.itertuples()}  # fmt: skip
    sentences = dict(zip(known.sentences.frame.node, known.sentences.frame.sentence, strict=True))
    partners = set(rows)
    nodes = []
    for node in page_nodes(circuit.nodes):
        writes = [PageWrite(token=row.token, effect=row.effect) for row in effects.get(node.id, known.effects.frame[:0])
                  .itertuples()]  # fmt: skip
        stats = _stats(rows[node.id])
        if node.site in ("q", "k"):
            others = _partners(circuit.cfg, Node(node.layer, node.site, node.channel))
            stats["score partner"] = ", ".join(o if o in partners else f"{o} (not in the circuit)" for o in others)
        if node.id in reads:
            written = [f"{shown(row.token)} {row.weight:+.2g}" for row in reads[node.id].head(N_WRITERS).itertuples()]
            stats["written by tokens"] = " · ".join(written)
        nodes.append(
            replace(
                node,
                sentence=sentences.get(node.id, ""),
                top_contexts=_page_contexts(contexts.get(node.id, known.spectrum.frame[:0])),
                histogram=histograms.get(node.id),
                on_prompts=on_prompts.get(node.id, ()),
                knock_out=outcomes.of(NODE, node.id),
                writes=writes,
                stats=stats,
            )
        )
    return nodes


def _page_contexts(rows: pd.DataFrame) -> list[PageContext]:
    return [
        PageContext(pieces=row.pieces, values=row.activations, at=row.at_piece, part=row.part)
        for row in rows.itertuples()
    ]


def _partners(cfg: Shape, node: Node) -> list[str]:
    """The k that a q node meets, or every q that a k node meets."""
    if node.site == "q":
        return [str(node._replace(site="k", channel=key_of(cfg, node.channel)))]
    return [str(node._replace(site="q", channel=channel)) for channel in queries_of(cfg, node.channel)]


def _stats(row: dict) -> dict[str, str | float | int | None]:
    """What the panel of one node lists."""
    stats: dict[str, str | float | int | None] = {
        "mean on text": row["mean"],
        "active on text": f"{100 * row['nonzero_frac']:.1f} %",
        "at first token": row["at_first_token"],
        "changes at the edit": row["change_at_edit"],
        "changes at the end": row["change_at_last"],
    }
    if not math.isnan(row["attention_to_edit"]):
        stats["attention, end to edit"] = row["attention_to_edit"]
    return stats


# -- prompts ----------------------------------------------------------------------------------------------------------


def _chosen_rows(batch: TaskBatch) -> Int[Tensor, " chosen"]:
    """The first pair of each template, and more of them where templates are few."""
    first = {int(template): row for row, template in reversed(list(enumerate(batch.template.tolist())))}
    rows = sorted(first.values())[:N_PROMPTS]
    rows += [row for row in range(len(batch)) if row not in rows][: N_PROMPTS - len(rows)]
    return torch.tensor(sorted(rows))


def _page_prompts(pairs: TaskBatch, text: Text) -> list[PagePrompt]:
    prompts = []
    for row in range(len(pairs)):
        length = int(pairs.lengths[row])
        clean, twin = ([text(t) for t in side[row, 1:length].tolist()] for side in (pairs.clean, pairs.corrupt))
        answer, foil = text(int(pairs.answer[row])), text(int(pairs.foil[row]))
        prompts.append(PagePrompt(pieces=clean, answer=answer, foil=foil, twin=twin))
    return prompts


def _on_prompts(values: Float[Tensor, "prompt pos"], lengths: Int[Tensor, " pair"]) -> PromptValues:
    """Both sides' values, pair by pair, without the first token and padding."""
    n = len(lengths)
    rows = [values[i, 1 : int(lengths[i % n])].tolist() for i in range(2 * n)]
    return list(zip(rows[:n], rows[n:], strict=True))


def _node_values(circuit: Circuit, model: HookedModel, pairs: TaskBatch) -> dict[str, PromptValues]:
    """What every node holds on the page's prompts, in the whole model."""
    sides, nodes = pairs.both_sides(), in_order(circuit)
    (values,) = activations(model, nodes, sides.clean, sides.attention_mask, batch_size=max(1, len(sides)))
    return {str(node): _on_prompts(values[..., i], pairs.lengths) for i, node in enumerate(nodes)}


# -- heads ------------------------------------------------------------------------------------------------------------


def _page_heads(
    circuit: Circuit, model: HookedModel, pairs: TaskBatch, readings: HeadReadings | None, outcomes: _Outcomes
) -> Iterator[PageHead]:
    """Every head that was read, those first that the circuit needs most."""
    if readings is None or readings.heads.frame.empty:
        return
    sides, layers = pairs.both_sides(), set(readings.heads.frame.layer)
    whole = record(model, sides, layers)
    with circuit.running(model):
        alone = record(model, sides, layers)
    rows, last = torch.arange(len(sides)), sides.last.cpu()
    for row in readings.heads.frame.itertuples():
        paid = [_on_prompts(run.patterns[row.layer][rows, row.head, last], pairs.lengths) for run in (whole, alone)]
        yield PageHead(
            layer=row.layer,
            head=row.head,
            d_head=model.cfg.d_head,
            sentence=row.sentence,
            tables=_head_tables(readings, row.layer, row.head),
            attention=paid[0],
            in_circuit=paid[1],
            knock_out=outcomes.of(HEAD, f"head {row.layer}.{row.head}"),
        )


def _head_tables(readings: HeadReadings, layer: int, head: int) -> list[PageTable]:
    def own(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[(frame.layer == layer) & (frame["head"] == head)]

    roles, keys = own(readings.roles.frame), own(readings.keys.frame).head(N_KEYS)
    channels, values = own(readings.channels.frame), own(readings.values.frame)
    roles = roles[(roles["query"] == "answer") & (roles[["mass", "model_mass", "even_mass"]].max(axis=1) > 0)]
    channels = channels.sort_values("share", key=lambda share: -share.abs(), kind="stable")
    tables = [
        ("Where it looks, from the answer position", roles,
         {"role": "key", "mass": "circuit", "model_mass": "model", "even_mass": "an average"},
         "Shares of its attention, by what the key is to the query."),
        ("Tokens that it pays", keys.assign(token=keys.token.map(shown)),
         {"token": "token", "attention": "per key", "seen": "keys seen"}, "From the answer position, in the circuit."),
        ("QK: what makes its scores", channels,
         {"query": "query at", "k": "k", "wants": "wants", "share": "share of score", "q_mean": "q",
          "k_follows": "k follows", "q_from": "q from", "k_from": "k from"},
         "Each channel's share of the variance of its scores among the keys of a query."),
        ("OV: what it carries, and where to", values,
         {"v": "v", "write": "to", "weight": "weight", "carried": "carried", "direct": "logits, directly",
          "v_follows": "v follows", "v_from": "v from"},
         "Carried: mean size of what reaches the answer position. Directly: logits of answer over foil."),
    ]  # fmt: skip
    return [page_table(title, frame[list(names)].rename(columns=names), note) for title, frame, names, note in tables]


def page_table(title: str, frame: pd.DataFrame, note: str = "") -> PageTable:
    """A table of the page; cells that hold nothing, and numbers that are none, are None."""
    rows = [[_cell(cell) for cell in row] for row in frame.itertuples(index=False)]
    return PageTable(title=title, columns=[str(name) for name in frame.columns], rows=rows, note=note)


def _cell(cell: object) -> str | float | int | None:
    if cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool | str):
        return str(cell)
    return cell.item() if hasattr(cell, "item") else cell if isinstance(cell, int | float) else str(cell)


def _page_halves(outcomes: _Outcomes) -> list[PageHalf]:
    halves = []
    for what, n_nodes in outcomes.halves:
        _, layer, kind = what.split(" ")
        halves.append(PageHalf(layer=int(layer), kind=kind, n_nodes=n_nodes, knock_out=outcomes.of(HALF, what)))
    return halves


# -- channels ---------------------------------------------------------------------------------------------------------


def _page_channels(circuit: Circuit, model: HookedModel, text: Text) -> Iterator[PageChannel]:
    """What embedding, positions and unembedding hold in every channel that a node of the circuit reads or writes."""
    embedding, unembedding = model.embed.W_E.detach().float().cpu(), model.unembed.W_U.detach().float().cpu()
    positions = _position_table(model)
    on_rails = circuit.nodes[circuit.nodes.site.str.contains("_read|_write|_resid")]
    for channel in sorted({int(channel) for channel in on_rails.channel}):
        of_stream = channel < model.cfg.d_model
        from_token = embedding[:, channel] if of_stream else torch.zeros(0)
        to_token = unembedding[channel] if of_stream else torch.zeros(0)
        written = from_token[from_token != 0]
        there = positions is not None and channel < positions.shape[1]
        by_position = positions[:, channel].tolist() if there else []
        yield PageChannel(
            channel=channel,
            n_tokens=len(written),
            embedding=_ends(from_token, text),
            unembedding=_ends(to_token, text),
            histogram=_histogram(written),
            positions=by_position if any(by_position) else [],
        )


def _position_table(model: HookedModel) -> Float[Tensor, "pos channel"] | None:
    """What positions hold channel by channel of the reads; concatenated ones behind the stream's own channels."""
    embed = getattr(model, "pos_embed", None)
    if embed is None:
        return None
    table = embed.W_pos.detach().float().cpu()
    behind = table.shape[1] != model.cfg.d_model
    return torch.cat([torch.zeros(len(table), model.cfg.d_model), table], 1) if behind else table


def _ends(weights: Float[Tensor, " token"], text: Text) -> list[PageWrite]:
    """The largest and the smallest weights that are not 0, by size."""
    order = weights.argsort(descending=True, stable=True).tolist()
    kept = [t for t in order[:N_CHANNEL_TOKENS] if weights[t] > 0]
    kept += [t for t in order[-N_CHANNEL_TOKENS:] if weights[t] < 0]
    return [PageWrite(token=text(t), effect=float(weights[t])) for t in kept]


def _histogram(values: Float[Tensor, " token"]) -> PageHistogram | None:
    if len(values) < 2 or values.min() == values.max():
        return None
    low, high = float(values.min()), float(values.max())
    return PageHistogram(low=low, high=high, counts=[int(n) for n in torch.histc(values, N_CHANNEL_BINS, low, high)])


# -- how it was found -------------------------------------------------------------------------------------------------


def circuit_tables(circuit: Circuit) -> list[PageTable]:
    """What the circuit file says of the search: scores, sizes, settings."""
    sizes = circuit.nodes.groupby(["layer", "site"], sort=False).size().rename("nodes").reset_index()
    largest = circuit.edges[circuit.edges.kind == "weight"].copy()
    largest["layer"] = largest.source.str.extract(r"^L(\d+)\.", expand=False).astype(float)
    by_matrix = largest.assign(size=largest.weight.abs()).groupby(["layer", "weight_name"], sort=False).agg(
        edges=("size", "size"), largest=("size", "max")
    ).reset_index()  # fmt: skip
    origin = {"seed of the search": circuit.seed, "model": circuit.model_name, "weights, sha256": circuit.model_sha256,
              "task": circuit.task_name, "task, sha256": circuit.task_sha256,
              "all else is held at": circuit.baseline.kind,
              "edges": "pruned" if circuit.edges_pruned else "all weights between nodes"}  # fmt: skip
    tables = [page_table("Where it comes from", _named(origin))]
    if not circuit.scores.empty:
        columns = ["measure", "value", "unit", "ablation", "split", "n_prompts"]
        note = "On the prompts that the size was chosen on, apart from those that gates were trained on."
        tables.append(page_table("What the search measured", circuit.scores[columns], note))
    tables.append(page_table("Nodes, place by place", sizes))
    tables.append(
        page_table("Edges, matrix by matrix", by_matrix, "The largest weight in size among each matrix's edges.")
    )
    if circuit.prune is not None:
        settings = {field.name: str(getattr(circuit.prune, field.name)) for field in fields(circuit.prune)}
        tables.append(page_table("Settings of the search", _named(settings)))
    return tables


def circuit_curves(circuit: Circuit) -> list[PageCurve]:
    """Every column of the search's history against its first, which counts steps."""
    if circuit.history.empty:
        return []
    steps, *rest = circuit.history.columns
    rows = circuit.history.iloc[:: max(1, len(circuit.history) // N_STEPS)]
    return [
        PageCurve(title=f"{name} in the search".replace("_", " "), x=str(steps), y=str(name).replace("_", " "),
                  points=[(float(x), float(y)) for x, y in zip(rows[steps], rows[name], strict=True)])
        for name in rest if pd.api.types.is_numeric_dtype(rows[name])
    ]  # fmt: skip


def _model_table(model: HookedModel, facts: Mapping[str, str | float]) -> PageTable:
    cfg = model.cfg
    weights = [wire.weight(block).detach() for block in model.layers for wire in wires(cfg)]
    entries, nonzero = (sum(int(n) for n in counts) for counts in
                        zip(*((w.numel(), w.count_nonzero()) for w in weights), strict=True))  # fmt: skip
    own = {"layers": cfg.n_layers, "d_model": cfg.d_model, "heads": cfg.n_heads, "d_head": cfg.d_head,
           "neurons per layer": cfg.d_mlp, "context, tokens": cfg.n_ctx, "vocabulary": cfg.d_vocab,
           "weights within blocks that are not 0": f"{nonzero:,} of {entries:,}"}  # fmt: skip
    return page_table("The model", _named(own | dict(facts)))


def _named(values: Mapping[str, object]) -> pd.DataFrame:
    rows = [(name, value) for name, value in values.items() if value is not None and value != ""]
    return pd.DataFrame(rows, columns=["what", "value"]).astype(object)


# -- tokens and headline numbers ---------------------------------------------------------------------------------------


def _page_tokens(ends: pd.DataFrame, batch: TaskBatch) -> list[PageToken]:
    roles = _token_roles(batch)
    tokens = {}
    for row in ends.to_dict("records"):
        side = row["kind"]
        end = row["source"] if side == "embedding" else row["target"]
        role = roles.get(int(end.split(".")[1]), "")
        tokens[end] = PageToken(id=end, piece=row["piece"], side=side, role=role)
    return list(tokens.values())


def _token_roles(batch: TaskBatch) -> dict[int, str]:
    """Which tokens belong to the side of the first pair's answer and which to that of its foil.

    In a symmetric task every token is now an answer and now a foil; what stays is which of them go together.
    """
    edited = (batch.clean != batch.corrupt).int().argmax(1)
    rows = torch.arange(len(batch))
    ours = torch.stack([batch.clean[rows, edited], batch.answer], 1).tolist()
    theirs = torch.stack([batch.corrupt[rows, edited], batch.foil], 1).tolist()
    side: dict[int, int] = {}
    for _ in range(2):  # a pair that joins nothing yet may join something later
        for here, there in zip(ours, theirs, strict=True):
            known = [side[t] for t in here if t in side] + [1 - side[t] for t in there if t in side]
            if known or not side:
                mine = known[0] if known else 0
                for token in here:
                    side.setdefault(token, mine)
                for token in there:
                    side.setdefault(token, 1 - mine)
    return {token: ("answer", "foil")[which] for token, which in side.items()}


def _summary(circuit: Circuit, ends: pd.DataFrame) -> dict[str, str]:
    """Headline numbers, and how many prompts of which split the measured ones are from."""
    lines = {"nodes": f"{circuit.n_nodes:,}", "edges": f"{circuit.n_edges:,}", "token weights": f"{len(ends):,}"}
    measured = {row.measure: row for row in circuit.scores.itertuples()}
    ours, models = (measured.get(f"task loss of {what}") for what in ("circuit", "model"))
    if ours is not None and models is not None:
        lines["task loss (model's), nats"] = f"{ours.value:.3f} ({models.value:.3f})"
    if (kl := measured.get("KL(model || circuit)")) is not None:
        lines |= {"KL from model, nats": f"{kl.value:.3f}", f"{kl.split} prompts": f"{kl.n_prompts:,}"}
    return lines
