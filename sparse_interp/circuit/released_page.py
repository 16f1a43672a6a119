"""The page of a released circuit: what was published of it, each number in the place that the page has for it.

snippets of pretraining text    contexts, from the top of a node's distribution to its bottom
task samples                    prompts beside their twins, with what each node holds
losses without a node or half   what is left with it knocked out, halved into means over prompts
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.circuit.drives import Text
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.payload import Payload, Snippet, TaskSamples
from sparse_interp.circuit.released import SIDES, place_of
from sparse_interp.circuit.showing import N_PROMPTS, circuit_curves, circuit_tables, page_table
from sparse_interp.circuit.spectrum import N_AFTER, N_BEFORE
from sparse_interp.model.sites import Node
from sparse_interp.viewer.content import (
    CircuitPage,
    PageContext,
    PageHalf,
    PageKnockOut,
    PageNode,
    PagePrompt,
    PageTable,
)

N_CONTEXTS = 2
"""Distinct snippets that a page shows from each published part of a node's distribution."""


def released_page(
    circuit: Circuit, payload: Payload, text: Text, answers: Int[Tensor, " row"] | None = None
) -> CircuitPage:
    """The circuit's page with all that was published of it; stored losses are halved, which makes them means.

    Args:
        circuit: the circuit, as `released_circuit` makes it.
        payload: what was published.
        text: what a token id stands for; `drives.token_text(model)` gives it.
        answers: right token of every task sample, for the prompts of the page; None shows no prompts.
    """
    samples = payload.samples if answers is not None else None
    pairs = [] if samples is None or answers is None else list(_pairs(samples, answers, text))
    where = {str(Node(*place_of(loc, circuit.cfg.n_layers), channel)): (loc, i)
             for loc, channels in payload.retained.items() for i, channel in enumerate(channels)}  # fmt: skip
    bare = circuit.bare_page()
    halves = [
        PageHalf(layer=int(half.split(".")[0]), kind="MLP" if half.endswith("mlp") else "attention",
                 n_nodes=_kept_in(payload, half), knock_out=_outcome(loss))
        for half, loss in payload.layer_interv_losses.items() if _kept_in(payload, half)
    ]  # fmt: skip
    return replace(
        bare,
        nodes=[_published_node(node, *where[node.id], payload, text, samples) for node in bare.nodes],
        prompts=pairs,
        halves=halves,
        whole=None if payload.interv_loss is None else _outcome(payload.interv_loss),
        model_alone=None if payload.loss is None else _outcome(payload.loss),
        tables=[*circuit_tables(circuit), *_published_tables(payload)],
        curves=circuit_curves(circuit),
    )


def _published_node(
    node: PageNode, loc: str, i: int, payload: Payload, text: Text, samples: TaskSamples | None
) -> PageNode:
    """One node with its snippets, what it holds on the prompts, and the loss without it."""
    channel, losses = payload.retained[loc][i], payload.ch_interv_losses.get(loc)
    held = None if samples is None else samples.activations.get(loc, {}).get(channel)
    return replace(
        node,
        top_contexts=_contexts(payload.snippets.get((loc, channel), ()), text),
        knock_out=None if losses is None else _outcome(losses[i]),
        on_prompts=[] if held is None or samples is None else _on_pairs(held, samples),
    )


def _outcome(stored_loss: float) -> PageKnockOut:
    """A stored loss as the page shows it; nothing else was published."""
    return PageKnockOut(kl=None, lead=None, accuracy=None, loss=stored_loss / SIDES)


def _kept_in(payload: Payload, half: str) -> int:
    return sum(len(channels) for loc, channels in payload.retained.items() if loc.startswith(f"{half}."))


def _pairs(samples: TaskSamples, answers: Int[Tensor, " row"], text: Text) -> Iterator[PagePrompt]:
    n = samples.n_pairs
    for row in range(min(n, N_PROMPTS)):
        sides = [[text(t) for t in samples.tokens[i, : int(samples.lengths[i])].tolist()] for i in (row, row + n)]
        answer, foil = (text(int(answers[i])) for i in (row, row + n))
        yield PagePrompt(pieces=sides[0], answer=answer, foil=foil, twin=sides[1])


def _on_pairs(held: Float[Tensor, "row pos"], samples: TaskSamples) -> list[tuple[list[float], list[float]]]:
    n = samples.n_pairs

    def of(i: int) -> list[float]:
        return held[i, : int(samples.lengths[i])].tolist()

    return [(of(row), of(row + n)) for row in range(min(n, N_PROMPTS))]


def _published_tables(payload: Payload) -> Iterator[PageTable]:
    known = {"settings of the pruning": payload.prune_config, "configuration of the model": payload.model_config}
    for title, values in known.items():
        if values:
            frame = pd.DataFrame([(str(name), str(value)) for name, value in values.items()], columns=["what", "value"])
            yield page_table(f"Published {title}", frame)
    if payload.notes:
        yield page_table("What was not there, or not understood", pd.DataFrame({"note": list(payload.notes)}))


def _contexts(snippets: Iterable[Snippet], text: Text) -> list[PageContext]:
    """Distinct snippets from the top of the distribution to its bottom, some from each published part of it."""
    parts: dict[tuple[str, float], dict[tuple, PageContext]] = {}
    for snippet in snippets:
        start = max(0, snippet.at - N_BEFORE)
        part = slice(start, snippet.at + N_AFTER + 1)
        tokens, values = snippet.tokens[part].tolist(), snippet.activations[part].tolist()
        name = f"{snippet.end} {100 * snippet.share:g} %"
        context = PageContext(pieces=[text(t) for t in tokens], values=values, at=snippet.at - start, part=name)
        parts.setdefault((snippet.end, snippet.share), {}).setdefault((*tokens, snippet.at), context)
    order = sorted(parts, key=lambda part: part[1] if part[0] == "top" else 2 - part[1])
    return [context for part in order for context in list(parts[part].values())[:N_CONTEXTS]]
