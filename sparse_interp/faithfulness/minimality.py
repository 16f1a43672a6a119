"""Minimality: whether each node and edge of a circuit does more than a random extra one would.

    effect of a part     KL(model || circuit without it) - KL(model || circuit)        its knock-out, prompt by prompt
    effect of an extra   KL(model || circuit) - KL(model || circuit with it)           the same, once it has been added

    a draw               the mean effect of one random extra, over templates drawn with replacement
    p(part)              share of draws no less than the part's mean effect; adjusted after Holm, nodes and edges apart

Extras are outside nodes, of the circuit's own layers and sites in the circuit's proportions, or weights between its
nodes that were cut; where there are few of those, an outside node with all its weights stands for a path of them. So a
part is told from them if it does more than random extras do. An extra is one thing in all templates: were another drawn
in each, the draws would hardly differ from their mean, and every extra above it would be told from extras. What
templates are drawn anew for is the tail: a hundred extras do not show what one in ten thousand does, and the strongest
of them, where it is strong in some templates, does. A part whose knock-out brings circuit and model together has an
effect below 0 and is told from nothing.

A permutation of the part itself with the extras would have to find the part's effect in every template before it calls
it large; of the nodes that only some forms of a prompt need, it tells none.

To inflate a circuit with random extras and to compare knock-outs: Shi et al. 2024 (arXiv:2410.13032),
whose tests are binomial and are not corrected for their number; Holm 1979 (Scand. J. Statist. 6:65-70).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.scores import groups_of, mean_of, some_pairs
from sparse_interp.interventions.ablation import Masks
from sparse_interp.interventions.edges import EdgeMasks, row_values
from sparse_interp.interventions.selection import EdgeCut, Selection
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import FINAL_READ, Node, NodeAt, Place, V, key_of, wires
from sparse_interp.results import Axes, Interval, Table, lines
from sparse_interp.tasks.task import TaskBatch

LEVEL = 0.05
"""Adjusted p-value below which a part is told from random extras."""

N_EXTRAS = 100
"""Extras of a kind that are measured, unless there are fewer."""

FEWEST_EXTRAS = 10
"""Extras of a kind below which there is nothing to compare with."""

LEAST_EFFECT_NATS = 1e-6
"""What an extra is taken to do at least: a divergence that changes by less has not changed."""


@dataclass(frozen=True, eq=False)
class MinimalityTable(Table):
    """One row per node of the circuit and, where its edges were pruned, per edge; effects are means over prompts.

    `kind` (node or edge), `name`, `layer`; `effect_nats`, what the knock-out adds to KL(model || circuit), with its
    interval `low` to `high` over templates (95 %); `p_value`, and `p_holm`, adjusted for all rows of its kind; `told`,
    whether the part is told from random extras.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "kind",
        "name",
        "layer",
        "effect_nats",
        "low",
        "high",
        "p_value",
        "p_holm",
        "told",
    )

    extras: Table
    """One row per extra: `kind`, `name`, `layer`, `effect_nats`."""

    n_prompts: int
    """Prompts that every effect is a mean over, both sides of pairs."""

    n_groups: int
    """Templates that they came from, or pairs where there is only one template."""

    n_draws: dict[str, int]
    """Draws behind the p-values of each kind."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was tested: nodes, and edges where they were pruned."""
        return tuple(self.n_draws)

    def not_told(self, kind: str = "node") -> list[str]:
        """The parts that are not told from random extras, by name, those that do least first."""
        rows = self.frame[(self.frame.kind == kind) & ~self.frame.told]
        return rows.sort_values("effect_nats", kind="stable").name.tolist()

    def not_told_frac(self, kind: str = "node") -> Interval:
        """Their share among all parts of the kind; a count, which has no interval."""
        rows = self.frame[self.frame.kind == kind]
        return Interval(float((~rows.told).mean()), math.nan, math.nan)

    @property
    def summary(self) -> str:
        """How many parts are not told from random extras, in words."""
        said = []
        for kind in self.kinds:
            n, idle = int((self.frame.kind == kind).sum()), self.not_told(kind)
            named = f" ({', '.join(idle[:5])}{', ...' * (len(idle) > 5)})" if idle else ""
            said.append(f"{len(idle)} of {n} {kind}s are not told from random extra ones{named}")
        return f"{'; '.join(said)}; {self.n_prompts} prompts of {self.n_groups} templates or pairs."

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effects from the largest to the smallest, of the circuit's parts and of random extras."""
        extras = self.extras.frame.assign(kind="extra " + self.extras.frame.kind)
        both = pd.concat([self.frame[["kind", "effect_nats"]], extras[["kind", "effect_nats"]]])
        both = both.sort_values("effect_nats", ascending=False, kind="stable")
        return lines(both.assign(rank=both.groupby("kind").cumcount()), x="rank", y="effect_nats", by="kind", ax=ax)


class Part(NamedTuple):
    """Something that can be knocked out of a circuit, or added to it."""

    kind: str
    """`node` or `edge`."""

    where: Place | Matrix
    """The place of a node, the matrix of an edge."""

    at: tuple[int, ...]
    """Where in the mask of its place, or row and column of the matrix."""


@torch.no_grad()
def minimality(
    model: AnyModel,
    circuit: Circuit,
    pairs: TaskBatch,
    *,
    n_pairs: int = 32,
    generator: torch.Generator,
    progress: bool = True,
) -> MinimalityTable:
    """Knock out every node, and every edge of a circuit whose edges were pruned, and compare with random extra ones.

    One run for each node, edge and extra, from its layer on.

    Args:
        model: the model that the circuit is of, ours or a dense one of TransformerLens.
        circuit: the circuit.
        pairs: prompts with their twins.
        n_pairs: how many of them are measured on, from all templates alike; both prompts of each.
        generator: draws pairs, extras, permutations and resamples.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit belongs to other weights, has no nodes, or leaves hardly any outside; or keeps
            nodes at positions of prompts of another length.
        ConfigError: if `n_pairs` is below 2.
    """
    if n_pairs < 2:
        raise ConfigError(f"n_pairs={n_pairs}; effects on fewer than 2 pairs make no test.")
    circuit.check_lengths(pairs)
    circuit.check_model(model)
    model = hooked(model)
    pairs = some_pairs(pairs, n_pairs, generator=generator)
    per_position = circuit.n_pos is not None
    selection = Selection(model, pairs, circuit.baseline, per_position=per_position)
    groups = [groups_of(selection.batch)[row] for row in selection.measured(1).tolist()]
    parts = nodes_of(circuit, inside=True)
    if not parts:
        raise CircuitError("this circuit has no nodes, so there is nothing to knock out; find one first.")
    tested, extras = {"node": parts}, {"node": _random_nodes(circuit, parts, generator)}
    if circuit.edges_pruned:
        tested["edge"] = list(_edges(circuit.edge_masks(model)))
        extras["edge"] = _random_of(list(_edges(circuit.cut_edges(model))), generator)
    chosen = [[part for of_kind in kinds.values() for part in of_kind] for kinds in (tested, extras)]
    effects = _effects(selection, circuit, *chosen, progress)
    if "edge" in extras:
        extras["edge"] += extras["node"][: N_EXTRAS - len(extras["edge"])]
    sheets = [_Sheet(kind, tested[kind], extras[kind], effects, groups) for kind in tested]
    frames = [sheet.frames(model.cfg, generator) for sheet in sheets]
    return MinimalityTable(
        pd.concat([frame for frame, _ in frames], ignore_index=True),
        Table(pd.concat([frame for _, frame in frames], ignore_index=True)),
        len(selection.batch),
        len(set(groups)),
        {kind: n_draws(len(of_kind)) for kind, of_kind in tested.items()},
    )


class _Sheet:
    """The rows of one kind, in the making."""

    def __init__(
        self,
        kind: str,
        parts: Sequence[Part],
        extras: Sequence[Part],
        effects: Mapping[Part, Float[Tensor, " prompt"]],
        groups: list[int],
    ):
        if len(extras) < FEWEST_EXTRAS:
            raise CircuitError(
                f"{len(extras)} extra {kind}s are no measure for the {len(parts)} of this circuit; expected at least "
                f"{FEWEST_EXTRAS}. It leaves too little outside: find a smaller circuit."
            )
        self.kind, self.parts, self.extras, self.groups = kind, parts, extras, groups
        none = torch.zeros(0, len(groups))
        self.effects, self.beside = (
            torch.stack([effects[part] for part in some]).double() if some else none.double()
            for some in (parts, extras)
        )

    def frames(self, cfg: AnyShape, generator: torch.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row per part, and one per extra."""
        p = p_values(self.effects, self.beside, self.groups, n_draws(len(self.parts)), generator=generator)
        rows = []
        for part, effects, value, adjusted in zip(self.parts, self.effects, p, holm(p), strict=True):
            effect, told = mean_of(effects, self.groups, generator), bool(adjusted < LEVEL)
            named = (self.kind, name_of(part, cfg), part.where.layer)
            rows.append((*named, *effect, float(value), float(adjusted), told))
        named = [(self.kind, name_of(part, cfg), part.where.layer) for part in self.extras]
        others = [(*name, effect) for name, effect in zip(named, self.beside.mean(1).tolist(), strict=True)]
        return (
            pd.DataFrame(rows, columns=list(MinimalityTable.columns)).astype({"told": bool}),
            pd.DataFrame(others, columns=["kind", "name", "layer", "effect_nats"]),
        )


# -- the parts --------------------------------------------------------------------------------------------------------


def nodes_of(circuit: Circuit, *, inside: bool) -> list[Part]:
    """The nodes that a circuit has, or those that it holds at their baseline, at positions if it says positions."""
    masks = {place: mask if inside else ~mask for place, mask in circuit.inside.items() if place.site in circuit.sites}
    return [Part("node", place, tuple(at)) for place, mask in masks.items() for at in mask.nonzero().tolist()]


def name_of(part: Part, cfg: AnyShape) -> str:
    """What tables call it: `L0.neuron.12`, `L0.neuron.12@3` or `L0.mlp_read.4 -> L0.neuron.12`."""
    if isinstance(part.where, Place):
        node = Node(*part.where, part.at[-1])
        one_row = len(part.at) == 1 or node.site == FINAL_READ.name  # the last read is made where the answer is
        return str(node if one_row else NodeAt(*node, part.at[0]))
    wire = next(wire for wire in wires(cfg) if wire.weight_name == part.where.name)
    row = key_of(cfg, part.at[0]) if wire.source is V else part.at[0]
    return f"{Node(part.where.layer, wire.source.name, row)} -> {Node(part.where.layer, wire.target.name, part.at[1])}"


def _edges(edges: EdgeMasks) -> Iterator[Part]:
    for matrix, mask in edges.items():
        yield from (Part("edge", matrix, tuple(at)) for at in mask.nonzero().tolist())


def _random_nodes(circuit: Circuit, parts: Sequence[Part], generator: torch.Generator) -> list[Part]:
    """Outside nodes, of each layer and site in proportion to the circuit's own there."""
    outside = nodes_of(circuit, inside=False)
    n_here = pd.Series([part.where for part in parts]).value_counts()
    n_out = pd.Series([part.where for part in outside]).value_counts()
    share = [float(n_here.get(part.where, 0)) / float(n_out[part.where]) for part in outside]
    return _random_of(outside, generator, torch.tensor(share))


def _random_of(
    parts: Sequence[Part], generator: torch.Generator, share: Float[Tensor, " part"] | None = None
) -> list[Part]:
    """`N_EXTRAS` of `parts`, or all, in a random order: each with a chance in proportion to its share, or alike."""
    if not parts:
        return []
    weights = torch.ones(len(parts)) if share is None else share + 1e-6  # those without a share come last
    drawn = torch.rand(len(parts), generator=generator, device=generator.device).cpu()
    order = (drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log() / weights).argsort(descending=True)
    return [parts[i] for i in order[:N_EXTRAS].tolist()]


# -- their effects ----------------------------------------------------------------------------------------------------


def _effects(
    selection: Selection, circuit: Circuit, parts: Sequence[Part], extras: Sequence[Part], progress: bool
) -> dict[Part, Float[Tensor, " prompt"]]:
    """What each part's knock-out adds to the divergence, prompt by prompt, in the order of `selection.measured(1)`."""
    order, gates = list(circuit.kept), _gates(selection.model, circuit)
    nodes = sorted((p for p in (*parts, *extras) if isinstance(p.where, Place)), key=lambda p: order.index(p.where))
    cuts, added = (
        sorted((p for p in some if isinstance(p.where, Matrix)), key=lambda p: (p.where.layer, p.where.name))
        for some in (parts, extras)
    )
    turned = {layer: list(_turned(circuit.kept, some, gates)) for layer, some in _by_layer(nodes)}
    cut = {layer: [_cut(part, gates) for part in some] for layer, some in _by_layer(cuts)}
    put_in = {layer: _turned(circuit.kept, some, gates) for layer, some in _by_layer(added)}
    found = {}
    with (
        selection.model.gated_edges(gates),
        tqdm(total=len(nodes) + len(cuts) + len(added), disable=not progress, desc="knock-outs", unit="run") as bar,
    ):
        for some, without in ((nodes, turned), (cuts, cut), (added, put_in)):
            divergences = selection.divergences(circuit.kept, without)
            whole = next(divergences).cpu()
            for part, kl in zip(some, divergences, strict=True):
                found[part] = kl.cpu() - whole
                bar.update()
    return found | {part: -found[part] for part in extras}


def _by_layer(parts: Iterable[Part]) -> Iterator[tuple[int, list[Part]]]:
    yield from ((layer, list(some)) for layer, some in groupby(parts, key=lambda part: part.where.layer))


def _gates(model: HookedModel, circuit: Circuit) -> dict[Matrix, EdgeGate]:
    """Gates for every matrix with edges, where these were pruned: those that the circuit lacks are cut."""
    cut, like = circuit.cut_edges(model), model.embed.W_E
    rows = row_values(model, circuit.baseline) if cut else {}
    return {matrix: EdgeGate((~mask).to(like), rows[matrix].to(like)) for matrix, mask in cut.items()}


def _cut(edge: Part, gates: Mapping[Matrix, EdgeGate]) -> EdgeCut:
    """An edge of the circuit, cut beside what it lacks; those of a matrix run together."""
    assert isinstance(edge.where, Matrix)
    gate = gates[edge.where]
    return EdgeCut(edge.where, (gate.share.shape[0], gate.share.shape[1]), *edge.at, gate.baseline)


def _turned(kept: Masks, parts: Iterable[Part], gates: Mapping[Matrix, EdgeGate]) -> Iterator[Masks]:
    """What is kept, again and again; while one is looked at, the next of `parts` is out, or in if it was out."""
    for part in parts:
        if isinstance(part.where, Place):
            turned = kept[part.where].clone()
            turned[part.at] = ~turned[part.at]
            yield {**kept, part.where: turned}
            continue
        share = gates[part.where].share  # a gate of ours, which the model reads anew in every run
        share[part.at] = 1 - share[part.at]
        try:
            yield kept
        finally:
            share[part.at] = 1 - share[part.at]


# -- the test ---------------------------------------------------------------------------------------------------------


def n_draws(n_parts: int) -> int:
    """Draws behind the p-values of so many parts: the smallest p-value is half of what the correction asks for."""
    return max(4000, round(2 / LEVEL) * n_parts)


def p_values(
    effects: Float[Tensor, "part prompt"],
    extras: Float[Tensor, "extra prompt"],
    groups: Sequence[int],
    n: int,
    *,
    generator: torch.Generator,
) -> Float[Tensor, " part"]:
    """How often a random extra does as much as a part, on groups of prompts drawn with replacement.

    p  =  (1 + number of draws no less than the part's mean effect) / (1 + n)
    """
    codes = torch.from_numpy(pd.factorize(pd.Series(groups))[0])
    sizes = torch.bincount(codes)
    totals = torch.zeros(len(extras), len(sizes), dtype=extras.dtype).index_add(1, codes, extras)
    given = {"generator": generator, "device": generator.device}
    which = torch.randint(len(extras), (n, 1), **given).cpu()
    drawn = torch.randint(len(sizes), (n, len(sizes)), **given).cpu()
    means = totals[which, drawn].sum(1) / sizes[drawn].sum(1)
    means = means.clamp(min=LEAST_EFFECT_NATS).sort().values
    below = torch.searchsorted(means, effects.mean(1) - 1e-12)  # sums in another order
    return (1 + n - below).double() / (1 + n)


def holm(p: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
    """Adjusted p-values: sorted, p_(i) times the number of those not yet rejected, never below an earlier one."""
    order = p.argsort(stable=True)
    scaled = p[order] * torch.arange(len(p), 0, -1).to(p)
    return torch.empty_like(p).index_copy(0, order, scaled.cummax(0).values.clamp(max=1))
