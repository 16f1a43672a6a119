"""Models with known circuits, by name, and what is measured of a key and against it.

    key  =  nodes that vary over the task's prompts, and weights between them
    all other nodes held at their means, all other weights between nodes of the key cut   ->  the model's distribution
    any one node or weight of the key held or cut besides                                 ->  another distribution

A key is a claim that needs no trust: `key_effects` measures both sentences, and the tests do so for every model here.
Held alone, a node of the key changes the answer too, unless something outside makes good for it; such nodes are named
(`repaired`), and where a model has two ways to its answer both are keys (`alternatives`).

Compiled models with known algorithms: Lindner et al. 2023 (arXiv:2301.05062); ours are smaller and keep distractors,
after Gao et al. 2025 (arXiv:2511.13653), whose quote circuit `quote` follows.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError, TaskError
from sparse_interp.faithfulness.answer_key import Edge, GroundTruth, Key
from sparse_interp.faithfulness.hand_built import attention_copy, bracket_depth, induction, mlp_gate, quote, two_hop
from sparse_interp.faithfulness.hand_built_traps import backup, distractor, two_copies
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import FwdHooks
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import WIRES, Node, NodeValues, Place, flat, masks, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import TaskBatch, kl_divergence

# -- by name --------------------------------------------------------------------------------------------------------


def ground_truths() -> dict[str, Callable[[], GroundTruth]]:
    """The hand-built models: name -> a function that builds it anew."""
    plain = (quote, mlp_gate, attention_copy, induction, bracket_depth, two_hop)
    return {build.__name__: build for build in (*plain, distractor, backup, two_copies)}


def ground_truth(name: str) -> GroundTruth:
    """The hand-built model called `name`.

    Raises:
        TaskError: for an unknown name.
    """
    known = ground_truths()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TaskError(f"No hand-built model is called {name!r}; {hint}Known: {', '.join(known)}.")
    return known[name]()


Part = TypeVar("Part", Node, Edge)

# -- what a search found, against the key ---------------------------------------------------------------------------


class Recovery(NamedTuple):
    """How much of a key was found, and how much else."""

    precision: float
    """Share of what was found that is in the key."""

    recall: float
    """Share of the key that was found."""

    f1: float
    """Harmonic mean of the two."""

    exact: bool
    """Whether the two sets are equal."""


def recovery(found: Collection[Hashable], key: Collection[Hashable]) -> Recovery:
    """Compare nodes or edges with those of a key; of two empty sets all is 1."""
    found, key = set(found), set(key)
    hits = len(found & key)
    precision = hits / len(found) if found else float(not key)
    recall = hits / len(key) if key else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Recovery(precision, recall, f1, found == key)


def nearest_key(truth: GroundTruth, found: Collection[Node]) -> Key:
    """Of the keys that a model has, the one that has most in common with the nodes `found`."""
    return max(truth.keys, key=lambda key: recovery(found, key.nodes).f1)


class KeyEffects(NamedTuple):
    """KL(model || circuit of a key) at the answer position, mean over prompts, nats."""

    whole: float
    """The key as it is: every node outside it is held, and every weight between its nodes that is not in it is cut."""

    without: dict[Node | Edge, float]
    """The key less one node, or less one edge."""


def key_effects(truth: GroundTruth, key: Key, batch: TaskBatch, means: NodeValues) -> KeyEffects:
    """Measure what a key claims, on the prompts `batch`, by holding nodes at `means`: no gradients, no search."""
    outside, idle = set(nodes_outside(truth, key)), edges_among(truth.model, key.nodes) - key.edges
    held, reference = [outside, *(outside | {node} for node in key.nodes)], logits_of(truth.model, batch)
    with cut(truth.model, idle, means):
        whole, *others = _divergences(reference, truth.model, held, batch, means)
    without: dict[Node | Edge, float] = dict(zip(key.nodes, others, strict=True))
    for edge in key.edges:
        with cut(truth.model, {*idle, edge}, means):
            (without[edge],) = _divergences(reference, truth.model, [outside], batch, means)
    return KeyEffects(whole, without)


def key_kl(truth: GroundTruth, key: Key, batch: TaskBatch, means: NodeValues) -> float:
    """KL(model || circuit of a key) at the answer position, mean over prompts, nats: `key_effects(...).whole` alone."""
    outside, idle = nodes_outside(truth, key), edges_among(truth.model, key.nodes) - key.edges
    with cut(truth.model, idle, means):
        return _divergences(logits_of(truth.model, batch), truth.model, [outside], batch, means)[0]


HARMLESS, HARMFUL = 1e-4, 0.05
"""KL to the model at the answer, nats: more than leaving out what is outside a key may do, less than anything in it."""


def check_keys(truth: GroundTruth, batch: TaskBatch, means: NodeValues, harmless: float = HARMLESS) -> float:
    """The largest KL(model || key), nats, if every key of `truth` is one on these prompts.

    Raises:
        CircuitError: if a key is no circuit, or can do without a node or an edge, naming it and its effect.
    """
    worst = 0.0
    for key in truth.keys:
        measured = key_effects(truth, key, batch, means)
        worst = max(worst, measured.whole)
        if measured.whole > harmless:
            raise CircuitError(
                f"{truth.name}: the key is {measured.whole:.1e} nats from its model; expected at most {harmless:.1e}. "
                "Where there is noise, take less of it."
            )
        part, effect = min(measured.without.items(), key=lambda item: item[1])
        if effect < HARMFUL:
            named = str(part) if isinstance(part, Node) else " -> ".join(map(str, part))
            raise CircuitError(
                f"{truth.name}: without {named} the key changes by {effect:.1e} nats; expected at least {HARMFUL} of "
                "everything in it."
            )
    return worst


def measured_key(
    model: HookedSparseTransformer, batch: TaskBatch, means: NodeValues, harmless: float = HARMLESS
) -> Key:
    """What is left when everything is held or cut that can be, on the prompts `batch`; nothing is known beforehand.

    Nodes that vary are held, those nearest to the output first, and weights between the others are cut: all at once if
    that moves the model's distribution at the answers by at most `harmless` (KL, mean over prompts, nats), else either
    half of them, and so on, until nothing more can go. Where one of two copies is enough, the earlier one is left.
    """
    reference = logits_of(model, batch)

    def may_go(nodes: Collection[Node], edges: Collection[Edge]) -> bool:
        with cut(model, edges, means):
            return _divergences(reference, model, [nodes], batch, means)[0] <= harmless

    live = sorted(_varying(model, batch, means), reverse=True)
    held, idle, n_before = frozenset[Node](), frozenset[Edge](), -1
    while n_before < len(held) + len(idle):  # what was needed may be idle once others are held
        n_before = len(held) + len(idle)
        held = _dropped(live, held, lambda nodes, idle=idle: may_go(nodes, idle))
        edges = sorted(edges_among(model, frozenset(live) - held), reverse=True)
        idle = _dropped(edges, idle & set(edges), lambda some, held=held: may_go(held, some))
    return Key(frozenset(live) - held, frozenset(edges) - idle)


def _dropped(
    parts: Sequence[Part], gone: frozenset[Part], may_go: Callable[[Collection[Part]], bool]
) -> frozenset[Part]:
    """`gone` and whatever else of `parts` may go too: halves of halves are tried, in their order."""
    waiting = [[part for part in parts if part not in gone]]
    while waiting:
        some = waiting.pop()
        if may_go(gone | set(some)):
            gone |= set(some)
        elif len(some) > 1:
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
    return gone


@torch.no_grad()
def _varying(model: HookedSparseTransformer, batch: TaskBatch, means: NodeValues) -> set[Node]:
    """Nodes that are anywhere on these prompts, padding apart, other than their mean."""
    real = batch.attention_mask.bool()
    with evaluating(model):
        _, cache = model.run_with_cache(batch.clean, attention_mask=batch.attention_mask, return_type=None)
    found: set[Node] = set()
    for place in places(model.cfg):
        off = (cache[place.hook].flatten(2)[real] - means[place]).abs().amax(0)
        found |= {Node(place.layer, place.site, c) for c in (off > VARIES).nonzero()[:, 0].tolist()}
    return found


VARIES = 1e-6
"""How far from its mean a node has to be somewhere; a mean is rounded."""


def effects_alone(
    truth: GroundTruth, batch: TaskBatch, means: NodeValues, nodes: Iterable[Node] | None = None
) -> dict[Node, float]:
    """KL(model || model with one node held at its mean) at the answer position, for each of `nodes` (None: for all)."""
    nodes, reference = list(all_nodes(truth.model.cfg) if nodes is None else nodes), logits_of(truth.model, batch)
    found = _divergences(reference, truth.model, [{node} for node in nodes], batch, means)
    return dict(zip(nodes, found, strict=True))


@torch.no_grad()
def _divergences(
    reference: Float[Tensor, "batch pos d_vocab"],
    model: HookedSparseTransformer,
    held: Sequence[Collection[Node]],
    batch: TaskBatch,
    means: NodeValues,
) -> list[float]:
    """KL(reference || model with each of `held` at its means), mean over prompts; many sets share one run."""
    found: list[float] = []
    for some in (held[start : start + 64] for start in range(0, len(held), 64)):
        in_set = [masks(nodes, model.cfg) for nodes in some]
        hooks: FwdHooks = [
            (place.hook, partial(_held_in_rows, torch.stack([m[place] for m in in_set]), means[place]))
            for place in places(model.cfg)
            if any(bool(m[place].any()) for m in in_set)
        ]
        rows = torch.arange(len(batch)).repeat(len(some))
        with model.hooks(fwd_hooks=hooks):
            logits = logits_of(model, batch.rows(rows))
        kl = kl_divergence(reference[rows], logits, batch.rows(rows))
        found += kl.view(len(some), -1).mean(1).tolist()
    return found


def _held_in_rows(
    held: Bool[Tensor, "sets width"], means: Float[Tensor, " width"], activation: Tensor, hook: HookPoint
) -> Tensor:
    nodes = flat(activation)
    rows = held.repeat_interleave(len(nodes) // len(held), 0)[:, None]
    return torch.where(rows, means, nodes).view_as(activation)


@contextmanager
def cut(model: HookedSparseTransformer, edges: Iterable[Edge], means: NodeValues) -> Iterator[None]:
    """Inside the block each of `edges` carries the mean of its source."""
    gates: dict[Matrix, EdgeGate] = {}
    for source, target in edges:
        wire = next(wire for wire in WIRES if (wire.source.name, wire.target.name) == (source.site, target.site))
        matrix = Matrix(source.layer, wire.weight_name)
        if matrix not in gates:
            share = torch.ones_like(wire.weight(model.layers[source.layer]))
            gates[matrix] = EdgeGate(share, means[Place(source.layer, source.site)])
        gates[matrix].share[source.channel, target.channel] = 0
    with model.gated_edges(gates):
        yield


def edges_among(model: HookedSparseTransformer, nodes: Collection[Node]) -> frozenset[Edge]:
    """Every non-zero within-block weight between two of `nodes`."""
    found = set()
    for layer, block in enumerate(model.layers):
        for wire in WIRES:
            for source, target in wire.weight(block).nonzero().tolist():
                found.add((Node(layer, wire.source.name, source), Node(layer, wire.target.name, target)))
    return frozenset(edge for edge in found if set(edge) <= set(nodes))


def spread(truth: GroundTruth, n: int = 128, *, generator: torch.Generator) -> NodeValues:
    """Standard deviation of every node over positions and prompts; 0 where a node is constant or dead."""
    blocks = truth.blocks(n, generator=generator)
    means = mean_activations(truth.model, blocks)
    found = {}
    with torch.no_grad(), evaluating(truth.model):
        _, cache = truth.model.run_with_cache(blocks, return_type=None)
    for place in places(truth.model.cfg):
        values = cache[place.hook].flatten(2)
        found[place] = (values - means[place]).pow(2).mean((0, 1)).sqrt()
    return NodeValues(found, f"standard deviation over {blocks.numel()} tokens")


def all_nodes(cfg: AnyShape) -> list[Node]:
    """Every node of a model, in the order of its forward pass."""
    return [Node(place.layer, place.site, c) for place in places(cfg) for c in range(width(cfg, place.site))]


def nodes_outside(truth: GroundTruth, key: Key) -> list[Node]:
    """Every node of the model that is not in `key`."""
    return [node for node in all_nodes(truth.model.cfg) if node not in key.nodes]


@torch.no_grad()
def logits_of(model: HookedSparseTransformer, batch: TaskBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position of the clean prompts; padding is masked, so that attention both ways is safe."""
    with evaluating(model):
        return model(batch.clean, attention_mask=batch.attention_mask)
