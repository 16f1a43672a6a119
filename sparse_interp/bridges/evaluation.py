"""What a bridge is worth: four questions, each beside what costs nothing to have.

    reconstruction    per tied site  NMSE  =  sum |prediction - x|^2 / sum |x - mean x|^2,  and the mean share of each
                      channel's variance that is explained (below 0 counts as 0), both ways
    hybrid            KL(dense || pass) and next-token loss, nats per token, of passes that cross once or several times
    causal            a node of the sparse model is ablated, and the difference is carried over: do logit differences of
                      both models change alike?  With s and d the changes, over all nodes of circuits and their prompts,
                      agreement  =  2 sum s d / (sum s^2 + sum d^2):   1 only if d = s, 0 if they have nothing in common
    missing           how much the dense stream says of channels of the sparse one, whatever the bridge; which it says
                      less of than of the rest; and those of which that cannot be told (`bridges/missing.py`)

`agreement` is Lin's concordance (1989, Biometrics 45) about zero; beside it the share of equal signs, the size ratio
sum s d / sum s^2, and Pearson's correlation. The controls: a `ridge map` fitted by least squares; an `untrained sparse
model` with such a map; the bridge's own maps at the `wrong site`; the carried change turned in a `random direction`, or
along the `difference of means` between a task's two sides, at equal norm. Intervals draw templates of prompts, or
blocks of text.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Tokens
from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.hybrid import DENSE, SPARSE, HybridPath, hybrid_logits, sampled_paths, token_kl
from sparse_interp.bridges.missing import BLOCKS_AT_ONCE, held, missing_features
from sparse_interp.bridges.stretches import change_in, decoded, read_by, sparse_side, streams, stretch_of
from sparse_interp.errors import BridgeError
from sparse_interp.faithfulness.controls import reinitialised
from sparse_interp.faithfulness.scores import groups_of, mean_of, of_means, pearson
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.model.dense import AnyModel, FwdHooks, HookedModel, hooked
from sparse_interp.model.sites import FINAL_READ, FINAL_SCALE_HOOK, Node, NodeValues, Place, stream_hook
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, logit_difference

BRIDGE, RIDGE, UNTRAINED, WRONG = "bridge", "ridge map", "untrained sparse model", "wrong site"
RANDOM, MEANS = "random direction", "difference of means"
LACKED, OPEN = "missing: share of its own that is said", "cannot be told whether missing"
SAID = "share of its own that is said, median channel"

FELT = 1e-3
"""Logits by which an ablation changes a prompt's logit difference before the sign of that is asked about."""


@dataclass(frozen=True, eq=False)
class BridgeTable(Table):
    """One row per measurement.

    `part` (reconstruction, hybrid, causal, missing), `where` (pair of sites, path, task, channel), `bridge` (the bridge
    or a control), `measure`, `value` with the bounds `low` and `high`.
    """

    columns: ClassVar[tuple[str, ...]] = ("part", "where", "bridge", "measure", "value", "low", "high")

    @property
    def missing(self) -> list[int]:
        """Channels of the sparse stream whose features the dense model does not have."""
        return self._channels(LACKED)

    @property
    def undecided(self) -> list[int]:
        """Channels of the sparse stream of which it cannot be told whether the dense model has them."""
        return self._channels(OPEN)

    def _channels(self, measure: str) -> list[int]:
        return [int(where.split()[1]) for where in self.frame[self.frame.measure == measure]["where"]]

    def value(self, measure: str, where: str = "all tasks", bridge: str = BRIDGE) -> float:
        """One number.

        Raises:
            BridgeError: if the table has no such row.
        """
        frame = self.frame
        found = frame[(frame.measure == measure) & (frame["where"] == where) & (frame.bridge == bridge)]
        if len(found) != 1:
            raise BridgeError(f"{len(found)} rows have measure={measure!r}, where={where!r}, bridge={bridge!r}.")
        return float(found.value.iloc[0])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Causal agreement by task and control; without tasks, the NMSE of decoding by site."""
        rows = self.frame[self.frame.measure == "agreement"]
        rows = rows if len(rows) else self.frame[self.frame.measure == "nmse decode"]
        rows = rows.assign(label=rows["where"] + ", " + rows.bridge)
        return bars_with_intervals(rows, label="label", value="value", low="low", high="high", by="bridge", ax=ax)


@dataclass(frozen=True)
class CausalCase:
    """Nodes to ablate one by one, and the prompts on which to see what that does."""

    name: str
    """What the table calls it: the task."""

    nodes: tuple[Node, ...]
    """Nodes of the sparse model, a circuit's as a rule."""

    baseline: NodeValues
    """What an ablated node holds."""

    pairs: TaskBatch
    """Prompts that are asked about, from both sides."""

    fit: TaskBatch
    """Other prompts of the task, from which the difference of means is taken."""


class Variant(NamedTuple):
    """The bridge or what it is compared with."""

    name: str
    bridge: Bridge
    sparse: HookedSparseTransformer


SUMS = ("s", "d", "s s", "d d", "s d", "same sign", "felt", "n")
"""Columns of effects: s and d are what an ablation changes in the sparse and, carried over, in the dense model; whether
the signs are equal where s is felt, whether it is, and how many changes there are."""

MEASURES: dict[str, Callable[[Float[Tensor, "draw 8"]], Float[Tensor, " draw"]]] = {
    "agreement": lambda m: 2 * m[:, 4] / (m[:, 2] + m[:, 3]),
    "sign_frac": lambda m: m[:, 5] / m[:, 6],
    "size_ratio": lambda m: m[:, 4] / m[:, 2],
    "correlation": lambda m: pearson(m[:, :5] / m[:, 7:]),
}
"""What is said of the effects, from means of `SUMS`."""


@dataclass(frozen=True, eq=False)
class CausalEffects:
    """What ablating the nodes of one case does to both models, by bridge or control."""

    where: str
    """The case."""

    groups: tuple[int, ...]
    """Template of every prompt."""

    by_prompt: dict[str, Float[Tensor, "prompt 8"]]
    """`SUMS` over all nodes."""

    by_node: dict[str, Float[Tensor, "node 8"]]
    """`SUMS` over all prompts."""


@torch.no_grad()
def evaluate(
    bridge: Bridge,
    sparse: AnyModel,
    dense: AnyModel,
    blocks: Int[Tensor, "block pos"],
    *,
    fit_blocks: Int[Tensor, "fit_block fit_pos"],
    cases: Iterable[CausalCase] = (),
    n_paths: int = 8,
    generator: torch.Generator,
    progress: bool = True,
) -> BridgeTable:
    """Measure a bridge between two models, and its controls, on text and on tasks.

    Args:
        bridge: what is measured.
        sparse: the sparse model.
        dense: the dense model, ours or TransformerLens'.
        blocks: held-out text, on which everything is measured.
        fit_blocks: other text, on which ridge maps are fitted.
        cases: circuits with prompts, for causal agreement.
        n_paths: mixed paths that are drawn beside those that cross once.
        generator: draws paths, random directions, random weights and intervals.
        progress: whether to show a progress bar over nodes.

    Raises:
        BridgeError: if the bridge does not fit the models, or does not tie the sites around a node.
    """
    bridge.check(sparse, dense)
    model, other, cases = sparse_side(sparse), hooked(dense), list(cases)
    for case in cases:
        for node in case.nodes:
            stretch_of(bridge, Place(node.layer, node.site))
    with evaluating(model), evaluating(other):
        variants = compared(bridge, model, other, fit_blocks, generator)
        rows = [row for variant in variants for row in _reconstruction(variant, other, blocks, generator)]
        rows += [row for variant in variants for row in _hybrids(variant, other, blocks, n_paths, generator)]
        rows += _causal(variants, other, cases, generator, progress)
        lost = missing_features(model, other, bridge.pairs, blocks, fit_blocks=fit_blocks)
    rows += [("missing", f"channel {c}", BRIDGE, LACKED, share, nan, nan) for c, share in lost.missing.items()]
    rows += [("missing", f"channel {c}", BRIDGE, OPEN, nan, nan, nan) for c in lost.undecided]
    rows += [("missing", str(pair), BRIDGE, SAID, share, nan, nan) for pair, share in lost.said.items()]
    return BridgeTable(pd.DataFrame(rows, columns=list(BridgeTable.columns)))


# -- what it is compared with -----------------------------------------------------------------------------------------


def compared(
    bridge: Bridge, sparse: AnyModel, dense: AnyModel, fit: Tokens, generator: torch.Generator
) -> list[Variant]:
    """The bridge, and the controls that are maps; those of least squares are fitted on `fit`."""
    sparse = sparse_side(sparse)
    random = reinitialised(sparse, generator=generator)
    assert isinstance(random, HookedSparseTransformer)
    found = [Variant(BRIDGE, bridge, sparse), Variant(RIDGE, ridge_bridge(bridge, sparse, dense, fit), sparse)]
    found.append(Variant(UNTRAINED, ridge_bridge(bridge, random, dense, fit), random))
    if len(bridge.pairs) > 1:
        found.append(Variant(WRONG, _shifted(bridge), sparse))
    return found


@torch.no_grad()
def ridge_bridge(like: Bridge, sparse: AnyModel, dense: AnyModel, blocks: Tokens) -> Bridge:
    """A bridge at the sites of another, of linear maps fitted by least squares; its encoders keep everything."""
    made = Bridge.between(sparse, dense, BridgeConfig(sites=like.pairs, afrac=1.0))
    made = made.to(like[like.pairs[0]].W_encode)
    ours = held(hooked(sparse), blocks, [pair.sparse for pair in made.pairs])
    theirs = held(hooked(dense), blocks, [pair.dense for pair in made.pairs])
    for pair in made.pairs:
        made.fit_(pair, ours[pair.sparse], theirs[pair.dense])
    return made


def _shifted(bridge: Bridge) -> Bridge:
    """The bridge with every site's maps taken from the site half of all sites further on."""
    made = Bridge(bridge.config, bridge.sparse, bridge.dense).to(bridge[bridge.pairs[0]].W_encode)
    n = len(bridge.pairs)
    for i, pair in enumerate(bridge.pairs):
        made[pair].load_state_dict(bridge[bridge.pairs[(i + n // 2) % n]].state_dict())
    return made


# -- reconstruction ---------------------------------------------------------------------------------------------------


def _reconstruction(
    variant: Variant, dense: HookedModel, blocks: Tokens, generator: torch.Generator
) -> list[tuple[Any, ...]]:
    bridge, rows = variant.bridge, []
    ours = held(variant.sparse, blocks, [pair.sparse for pair in bridge.pairs])
    theirs = held(dense, blocks, [pair.dense for pair in bridge.pairs])
    for pair in bridge.pairs:
        mine, other = ours[pair.sparse], theirs[pair.dense]
        for way, found, wanted in (
            ("encode", bridge.encode(other, pair), mine),
            ("decode", bridge.decode(mine, pair), other),
        ):
            error = (found.double() - wanted.double()).square().sum(1)
            spread = (wanted.double() - wanted.double().mean((0, 1))).square().sum(1)
            varies = spread.sum(0) > 1e-9 * spread.sum(0).mean()
            explained = torch.where(varies, 1 - error.sum(0) / spread.sum(0).clamp_min(1e-300), nan)
            both = torch.stack([error.sum(1), spread.sum(1)], 1)
            share = of_means(both, lambda means: means[:, 0] / means[:, 1], list(range(len(both))), generator)
            rows.append(("reconstruction", str(pair), variant.name, f"nmse {way}", *share))
            mean = explained.clamp(min=0).nanmean().item()
            rows.append(("reconstruction", str(pair), variant.name, f"explained {way}", mean, nan, nan))
    return rows


# -- hybrid passes ----------------------------------------------------------------------------------------------------


def _hybrids(
    variant: Variant, dense: HookedModel, blocks: Tokens, n_paths: int, generator: torch.Generator
) -> list[tuple[Any, ...]]:
    """Every path that crosses once, some mixed ones, and the two models themselves."""
    bridge = variant.bridge
    paths = [HybridPath(start, (pair,)) for start in (DENSE, SPARSE) for pair in bridge.pairs]
    if n_paths and len(bridge.pairs) > 1:
        drawn = sampled_paths(bridge, n_paths, generator=generator)
        paths += [path for path in drawn if len(path.switches) > 1]
    paths += [HybridPath(SPARSE, ())] + [HybridPath(DENSE, ())] * (variant.name == BRIDGE)
    found: dict[HybridPath, list[Tensor]] = {path: [] for path in paths}
    for part in blocks.split(BLOCKS_AT_ONCE):
        reference = dense(part)
        for path, numbers in found.items():
            logits = hybrid_logits(variant.sparse, dense, bridge, part, **path._asdict())
            losses = cross_entropy(logits[:, :-1].mT, part[:, 1:], reduction="none").mean(1)
            numbers.append(torch.stack([token_kl(reference, logits).mean(1), losses]))
    rows = []
    for path, numbers in found.items():
        for measure, values in zip(("kl, nats", "loss, nats"), torch.cat(numbers, 1), strict=True):
            bounds = mean_of(values, list(range(len(values))), generator)
            rows.append(("hybrid", str(path), variant.name, measure, *bounds))
    return rows


# -- causal agreement -------------------------------------------------------------------------------------------------


def _causal(
    variants: Sequence[Variant],
    dense: HookedModel,
    cases: Sequence[CausalCase],
    generator: torch.Generator,
    progress: bool,
) -> list[tuple[Any, ...]]:
    with tqdm(total=sum(len(case.nodes) for case in cases), disable=not progress, desc="nodes", unit="node") as bar:
        found = [causal_effects(variants, dense, case, generator=generator, done=bar.update) for case in cases]
    return [row for effects in [*found, *together(found)] for row in _agreement(effects, generator)]


def together(found: Sequence[CausalEffects]) -> list[CausalEffects]:
    """The effects of all cases as one; none if there are none."""
    if not found:
        return []
    first = [sum(len(set(effects.groups)) for effects in found[:i]) for i in range(len(found))]
    groups = []
    for effects, before in zip(found, first, strict=True):
        numbers = {group: before + i for i, group in enumerate(dict.fromkeys(effects.groups))}
        groups += [numbers[group] for group in effects.groups]
    names = found[0].by_prompt
    by_prompt = {name: torch.cat([effects.by_prompt[name] for effects in found]) for name in names}
    by_node = {name: torch.cat([effects.by_node[name] for effects in found]) for name in names}
    return [CausalEffects("all tasks", tuple(groups), by_prompt, by_node)]


def _agreement(effects: CausalEffects, generator: torch.Generator) -> list[tuple[Any, ...]]:
    rows = []
    for name, sums in effects.by_prompt.items():
        for measure, how in MEASURES.items():
            bounds = of_means(sums, how, list(effects.groups), generator)
            rows.append(("causal", effects.where, name, measure, *bounds))
    return rows


@torch.no_grad()
def causal_effects(
    variants: Sequence[Variant],
    dense: AnyModel,
    case: CausalCase,
    *,
    generator: torch.Generator,
    done: Callable[[], Any] = lambda: None,
) -> CausalEffects:
    """What ablating each node of a case does to both models, for the bridge (first in `variants`) and every control.

    Args:
        variants: `compared(...)`.
        dense: the dense model.
        case: nodes and prompts; of a pair both sides are asked about.
        generator: draws random directions.
        done: is called after every node.
    """
    dense, trained, batch = hooked(dense), variants[0], case.pairs.both_sides()
    with ExitStack() as stack:
        for model in (dense, *(variant.sparse for variant in variants)):
            stack.enter_context(evaluating(model))
        dense_run, runs = _Run(dense, batch), {id(v.sparse): _Run(v.sparse, batch) for v in variants}
        directions = _mean_differences(trained.bridge, dense, case.fit)
        rows: dict[str, list[Tensor]] = {}
        for node in case.nodes:
            k = stretch_of(trained.bridge, Place(node.layer, node.site))
            ablating = partial(_ablating, node, case.baseline)
            after = trained.bridge.pairs[k + 1] if k + 1 < len(trained.bridge.pairs) else None
            into = trained.bridge.pairs[-1] if after is None else after
            changed = {key: run.ablated(node, ablating) for key, run in runs.items()}
            for variant in variants:
                here = dense_run.stream(trained.bridge.pairs[k].dense)
                moved = decoded(variant.bridge, change_in(variant.bridge, variant.sparse, k, here, ablating), into)
                ways = {variant.name: moved}
                if variant is trained:
                    ways |= {RANDOM: _turned(moved, generator), MEANS: _along(moved, directions[into])}
                for name, by in ways.items():
                    d = dense_run.moved(by, None if after is None else after.dense)
                    rows.setdefault(name, []).append(_sums(changed[id(variant.sparse)], d))
            done()
    stacked = {name: torch.stack(each) for name, each in rows.items()}
    by_prompt = {name: each.sum(0) for name, each in stacked.items()}
    by_node = {name: each.sum(1) for name, each in stacked.items()}
    return CausalEffects(case.name, tuple(groups_of(batch)), by_prompt, by_node)


def _sums(s: Float[Tensor, " prompt"], d: Float[Tensor, " prompt"]) -> Float[Tensor, "prompt 8"]:
    """`SUMS` of one node's changes."""
    felt = s.abs() > FELT
    same = (s.sign() == d.sign()) & felt
    return torch.stack([s, d, s * s, d * d, s * d, same.double(), felt.double(), torch.ones_like(s)], 1)


def _ablating(node: Node, baseline: NodeValues, model: AnyModel) -> Any:
    return ablate(model, [node], baseline)


def _turned(moved: Float[Tensor, "batch pos d_dense"], generator: torch.Generator) -> Tensor:
    """The change with its direction made a random one, and its size and sign as they are."""
    gaussian = torch.randn(moved.shape[-1], generator=generator, device=generator.device).to(moved)
    return _along(moved, gaussian / gaussian.norm(), by=moved.flatten(0, -2).sum(0))


def _along(
    moved: Float[Tensor, "batch pos d_dense"], direction: Float[Tensor, " d_dense"], by: Tensor | None = None
) -> Tensor:
    """A change of equal norm along a unit direction; of the sign that it has along `by`, or along the direction."""
    sign = (moved @ (direction if by is None else by)).sign()
    return (sign * moved.norm(dim=-1))[..., None] * direction


def _mean_differences(bridge: Bridge, dense: HookedModel, fit: TaskBatch) -> dict[SitePair, Float[Tensor, " d_dense"]]:
    """Unit vectors between the means of the dense stream at the answers of a task's two sides."""
    found = {}
    sides = [_at_ends(bridge, dense, side) for side in (fit, fit.swapped())]
    for pair in bridge.pairs:
        difference = sides[0][pair].mean(0) - sides[1][pair].mean(0)
        found[pair] = difference / difference.norm().clamp_min(1e-12)
    return found


def _at_ends(bridge: Bridge, dense: HookedModel, batch: TaskBatch) -> dict[SitePair, Float[Tensor, "batch d_dense"]]:
    """The dense stream at every tied site, at the answer position."""
    held = streams(dense, batch.clean, [pair.dense for pair in bridge.pairs], _mask(dense, batch))
    rows = torch.arange(len(batch), device=batch.last.device)
    return {pair: held[pair.dense][rows, batch.last] for pair in bridge.pairs}


def _mask(model: HookedModel, batch: TaskBatch) -> Tensor | None:
    return None if model.cfg.attention_dir == "causal" else batch.attention_mask


class _Run:
    """A model on prompts, run once; then again from where something is changed."""

    def __init__(self, model: HookedModel, batch: TaskBatch):
        longest = int(batch.lengths.max())
        self.model, self.batch = model, batch.to(model.embed.W_E.device)
        tokens = self.batch.clean[:, :longest]
        self.held = streams(model, tokens, range(2 * model.cfg.n_layers + 1), _cut(_mask(model, self.batch), longest))
        self.base = self._difference(self.held[2 * model.cfg.n_layers], model.cfg.n_layers)

    def stream(self, site: int) -> Tensor:
        """The stream at a residual site."""
        return self.held[site]

    def ablated(self, node: Node, ablating: Callable[[AnyModel], Any]) -> Float[Tensor, " batch"]:
        """How an intervention on a node of this model changes its logit differences."""
        layer = min(node.layer, self.model.cfg.n_layers)
        with ablating(self.model):
            return self._difference(self.held[2 * layer], layer) - self.base

    def moved(self, by: Tensor, site: int | None) -> Float[Tensor, " batch"]:
        """How a change of the stream at a site, or (None) of what the last read is made of, changes them."""
        n_layers = self.model.cfg.n_layers
        if site is None:
            rows = torch.arange(len(by), device=by.device)
            hooks = self._read_hooks(by[rows, self.batch.last][:, None])
            with self.model.hooks(hooks):
                return self._difference(self.held[2 * n_layers], n_layers) - self.base
        layer, is_mid = divmod(site, 2)
        begun = self.held[2 * layer] if is_mid else self.held[2 * layer] + by.to(self.held[2 * layer])
        hooks: FwdHooks = [(stream_hook(site), lambda resid, hook: resid + by.to(resid))] if is_mid else []
        with self.model.hooks(hooks):
            return self._difference(begun, layer) - self.base

    def _read_hooks(self, by: Float[Tensor, "batch 1 d_dense"]) -> FwdHooks:
        scale: dict[str, Tensor] = {}

        def note(activation: Tensor, hook: HookPoint) -> None:
            scale["last"] = activation

        def add(read: Tensor, hook: HookPoint) -> Tensor:
            return read + read_by(self.model, by.to(read), scale.get("last", 1.0))

        noted: FwdHooks = [] if self.model.cfg.norm == "none" else [(FINAL_SCALE_HOOK, note)]
        return [*noted, (FINAL_READ.hook, add)]

    def _difference(self, resid: Tensor, layer: int) -> Float[Tensor, " batch"]:
        return logit_difference(answer_logits(self.model, self.batch, resid, layer), self.batch).double().cpu()


def _cut(mask: Tensor | None, n_pos: int) -> Tensor | None:
    return None if mask is None else mask[:, :n_pos]
