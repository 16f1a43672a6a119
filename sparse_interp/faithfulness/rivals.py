"""rivals: the same search started differently, because one circuit is one of several that would have done.

    core         nodes (edges) of every circuit            periphery    nodes (edges) of some
    Jaccard      |A and B| / |A or B|                      for every two circuits
    equal        two circuits that both keep the stopping rule on prompts held out from the search (fail it only where
                 the whole 95 % interval does), and of which each is as close to the other as a circuit has to be to
                 its model: max(KL(A || B), KL(B || A)) <= tolerance, over the vocabulary at the answer position
    behaviour    a class of circuits of which every two are equal: in order of size, a circuit joins the first class to
                 all of whose members it is equal, or opens one

The searches share model, settings, and the prompts that they learn and choose from; they differ in starting gates, in
noise and in the order of prompts, and their masks are learned together. So what differs is what the search leaves open,
not the data. Several circuits that do the same are the rule: Meloux et al. 2025 (arXiv:2502.20914). Which of them is
the model's own, none of this says; the audit judges each by itself.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.circuit.find import sized
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.scores import mean_of
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import learn_many
from sparse_interp.interventions.selection import Fit, Selection, split_pairs
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.model.zoo import means_of
from sparse_interp.results import Axes, Interval, Table, lines
from sparse_interp.tasks.task import Task, TaskBatch, answer_loss, kl_divergence, logit_difference_error

HELD_OUT = "test"
"""The split on which circuits are compared; no search looks at it."""

Edge = tuple[str, str]
"""A weight between two nodes, by their names."""


@dataclass(frozen=True, eq=False)
class Rivals(Table):
    """One row per circuit, measured on held-out pairs with 95 % intervals over templates.

    `seed` of the search; `n_nodes`, `n_edges`; `kl_nats` KL(model || circuit); `loss_gap_nats` task loss of circuit -
    task loss of model; `holds` whether it keeps the stopping rule there; `behaviour` the class of equal circuits that
    it is in, counted from 0, missing where it does not hold.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "seed",
        "n_nodes",
        "n_edges",
        "kl_nats",
        "kl_low",
        "kl_high",
        "loss_gap_nats",
        "loss_gap_low",
        "loss_gap_high",
        "holds",
        "behaviour",
    )

    circuits: tuple[Circuit, ...]
    """The circuits, in the order of the rows."""

    pairs: Table
    """One row per two circuits: `first` and `second` (seeds), `node_jaccard`, `edge_jaccard`, `kl_nats` (the larger of
    the two directions), `equal`."""

    tolerance: float
    """How far two equal circuits may be from each other, nats."""

    @property
    def nodes(self) -> Table:
        """Every node of any circuit, the most frequent first: `layer`, `site`, `channel`, `n_found`, `found_frac`."""
        rows = [(*node, n, n / len(self)) for node, n in _frequency(c.node_set for c in self.circuits)]
        return Table(pd.DataFrame(rows, columns=["layer", "site", "channel", "n_found", "found_frac"]))

    @property
    def edges(self) -> Table:
        """Every edge of any circuit, the most frequent first: `source`, `target`, `n_found`, `found_frac`."""
        rows = [(*edge, n, n / len(self)) for edge, n in _frequency(map(edges_of, self.circuits))]
        return Table(pd.DataFrame(rows, columns=["source", "target", "n_found", "found_frac"]))

    @property
    def core(self) -> frozenset[Node]:
        """Nodes of every circuit."""
        return frozenset.intersection(*(circuit.node_set for circuit in self.circuits))

    @property
    def periphery(self) -> frozenset[Node]:
        """Nodes of some circuits and not of all."""
        return frozenset.union(*(circuit.node_set for circuit in self.circuits)) - self.core

    @property
    def n_distinct(self) -> int:
        """How many different circuits there are."""
        return len({_parts(circuit) for circuit in self.circuits})

    @property
    def n_behaviours(self) -> int:
        """How many classes of functionally equal circuits."""
        return self.frame.behaviour.nunique()

    @property
    def n_equal(self) -> int:
        """How many different circuits are functionally equal: those of the largest class."""
        of_class: dict[int, set] = {}
        for circuit, behaviour in zip(self.circuits, self.frame.behaviour, strict=True):
            if not pd.isna(behaviour):
                of_class.setdefault(behaviour, set()).add(_parts(circuit))
        return max(map(len, of_class.values()), default=0)

    @property
    def summary(self) -> str:
        """What the searches have in common and what not, in sentences."""
        nodes, edges = self.nodes.frame, self.edges.frame
        text = (
            f"{len(self)} searches found {self.n_distinct} different circuits of {self.frame.n_nodes.min()} to "
            f"{self.frame.n_nodes.max()} nodes. Core: {(nodes.found_frac == 1).sum()} nodes and "
            f"{(edges.found_frac == 1).sum()} edges; periphery: {(nodes.found_frac < 1).sum()} and "
            f"{(edges.found_frac < 1).sum()}. "
        )
        if len(self.pairs):
            means = self.pairs.frame[["node_jaccard", "edge_jaccard"]].mean()
            text += f"Mean Jaccard: {means.node_jaccard:.2f} of nodes, {means.edge_jaccard:.2f} of edges. "
        return text + (
            f"{self.frame.holds.sum()} keep the stopping rule on held-out prompts, in {self.n_behaviours} class(es) of "
            f"functionally equal circuits (KL to each other at most {self.tolerance:g} nats); the largest has "
            f"{self.n_equal} different ones."
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many nodes and edges at least n of the circuits have: from the union of all to the core."""
        rows = []
        for part, found in {"nodes": self.nodes.frame.n_found, "edges": self.edges.frame.n_found}.items():
            rows += [(n, int((found >= n).sum()), part) for n in range(1, len(self) + 1)]
        return lines(pd.DataFrame(rows, columns=["at least so many circuits", "count", "of"]),
                     x="at least so many circuits", y="count", by="of", ax=ax)  # fmt: skip


def rivals(
    model: AnyModel,
    task: Task,
    config: PruneConfig | None = None,
    *,
    n_seeds: int = 8,
    at_once: int = 4,
    n_pairs: int = 256,
    tolerance: float | None = None,
    baseline: NodeValues | None = None,
    folder: Path | str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Rivals:
    """Search `n_seeds` times with one configuration, and say what the circuits have in common.

    Args:
        model: ours, or a dense one of TransformerLens.
        task: prompts in the model's own tokens, with a test split.
        config: how to search; None takes the defaults.
        n_seeds: how many searches.
        at_once: masks that are learned together; memory grows with it.
        n_pairs: held-out pairs on which the circuits are compared, both prompts of each.
        tolerance: how far equal circuits may be from each other, nats; None takes `config.max_kl`.
        baseline: what nodes outside a circuit are held at, as for `find_circuit`.
        folder: where each circuit is kept as it is found (`seed-N.json`) and looked for first.
        generator: its initial seed draws the prompts and is the seed of the first search; each search has the next one.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: for a number below 1.
        CircuitError: if no circuit meets the stopping rule, or the folder holds circuits of another search.
        CheckpointError: if no baseline is given and none is kept for these weights.
        TaskError: if the task has too few pairs, or prompts longer than the model's context.
    """
    config, model = config or PruneConfig(), hooked(model)
    for name, value in {"n_seeds": n_seeds, "at_once": at_once, "n_pairs": n_pairs}.items():
        if value < 1:
            raise ConfigError(f"{name}={value}; rivals need at least 1.")
    task.check_fits(model.cfg.n_ctx)
    baseline = means_of(model) if baseline is None else baseline
    first = generator.initial_seed()
    drawn = torch.Generator().manual_seed(first)
    train, select = split_pairs(task, config, drawn)
    held_out = task.batch(n_pairs, HELD_OUT, generator=drawn).both_sides().to(model.embed.W_E.device)
    seeds = range(first, first + n_seeds)
    found = _kept(folder, seeds, model, task, config, baseline)
    selection = Selection(model, select, baseline, frozen_norms=config.frozen_norms, per_position=config.per_position)
    with tqdm(total=n_seeds, initial=len(found), disable=not progress, desc="rivals", unit="circuit") as bar:
        for start in range(0, n_seeds, at_once):
            together = seeds[start : start + at_once]
            if found.keys() >= {*together}:
                continue
            generators = [torch.Generator().manual_seed(seed) for seed in together]
            learned = learn_many(model, train, [config] * len(together), baseline, generators=generators)
            for seed, search in zip(together, learned, strict=True):
                if seed not in found:
                    found[seed] = sized(model, task, search, selection, baseline, config, seed=seed)
                    if folder is not None:
                        found[seed].save(_path(folder, seed))
                    bar.update()
    return _compared(model, [found[seed] for seed in seeds], held_out, config, tolerance)


def _path(folder: Path | str, seed: int) -> Path:
    return Path(folder) / f"seed-{seed}.json"


def _kept(
    folder: Path | str | None,
    seeds: Iterable[int],
    model: HookedModel,
    task: Task,
    config: PruneConfig,
    baseline: NodeValues,
) -> dict[int, Circuit]:
    """Circuits of these searches that are in `folder` already."""
    found = {}
    for seed in seeds:
        if folder is None or not (path := _path(folder, seed)).exists():
            continue
        circuit = Circuit.load(path, model, task)
        same = all(torch.equal(circuit.baseline[place], baseline[place].cpu()) for place in baseline.values)
        if (circuit.prune, circuit.seed) != (config, seed) or not same:
            what = "seed" if circuit.seed != seed else "baseline" if not same else "settings"
            raise CircuitError(f"{path} is of a search with another {what}; keep these circuits in another folder.")
        found[seed] = circuit
    return found


def _compared(
    model: HookedModel, circuits: Sequence[Circuit], batch: TaskBatch, config: PruneConfig, tolerance: float | None
) -> Rivals:
    """What the circuits do on `batch`, beside the model and beside each other."""
    bound = config.max_kl if tolerance is None else tolerance
    with evaluating(model):
        reference = all_answer_logits(model, batch)
        logits = []
        for circuit in circuits:
            with circuit.running(model):
                logits.append(all_answer_logits(model, batch).double())
    rows = [_row(circuit, x, reference, batch, config) for circuit, x in zip(circuits, logits, strict=True)]
    frame = pd.DataFrame(rows, columns=[name for name in Rivals.columns if name != "behaviour"])
    pairs = []
    for i, j in combinations(range(len(circuits)), 2):
        apart = max(kl_divergence(logits[a], logits[b], batch).mean().item() for a, b in ((i, j), (j, i)))
        equal = bool(frame.holds[i] and frame.holds[j] and apart <= bound)
        one, other = circuits[i], circuits[j]
        overlaps = jaccard(one.node_set, other.node_set), jaccard(edges_of(one), edges_of(other))
        pairs.append((one.seed, other.seed, *overlaps, apart, equal))
    columns = ["first", "second", "node_jaccard", "edge_jaccard", "kl_nats", "equal"]
    table = Table(pd.DataFrame(pairs, columns=columns))
    return Rivals(frame.assign(behaviour=_classes(frame, table.frame)), tuple(circuits), table, bound)


def _row(
    circuit: Circuit, logits: AnswerLogits, reference: AnswerLogits, batch: TaskBatch, config: PruneConfig
) -> tuple:
    """One row of Rivals, but for its class."""
    reference = reference.double()
    loss, model_loss = answer_loss(logits, batch), answer_loss(reference, batch)
    templates = batch.template.tolist()
    groups = templates if len(set(templates)) > 1 else 2 * list(range(len(batch) // 2))
    drawn = torch.Generator().manual_seed(0)
    kl, gap, own = (
        mean_of(values.cpu(), groups, drawn)
        for values in (kl_divergence(reference, logits, batch), loss - model_loss, loss)
    )
    at_best = Fit(
        kl=_nearest(0.0, kl),
        loss=_nearest(-float("inf"), own)
        if config.rule == "task_loss"
        else model_loss.mean().item() + _nearest(0.0, gap),
        model_loss=model_loss.mean().item(),
        ld_error=logit_difference_error(reference, logits, batch).item(),
    )
    return circuit.seed, circuit.n_nodes, circuit.n_edges, *kl, *gap, at_best.enough(config)


def _nearest(value: float, interval: Interval) -> float:
    """The point of an interval nearest to `value`; of an interval without bounds its mean."""
    low, high = (interval.mean if bound != bound else bound for bound in interval[1:])
    return min(max(value, low), high)


def _classes(frame: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """The class of every circuit; see the head of this file."""
    equal = {frozenset((pair.first, pair.second)) for pair in pairs.itertuples() if pair.equal}
    classes: list[list[int]] = []
    found = pd.Series(pd.NA, index=frame.index, dtype="Int64")
    for row in frame[frame.holds].sort_values(["n_nodes", "n_edges"], kind="stable").itertuples():
        fits = [i for i, members in enumerate(classes) if all({row.seed, other} in equal for other in members)]
        if not fits:
            classes.append([])
            fits = [len(classes) - 1]
        classes[fits[0]].append(row.seed)
        found[row.Index] = fits[0]
    return found


def edges_of(circuit: Circuit) -> frozenset[Edge]:
    """The edges of a circuit that are weights, by the names of their nodes."""
    weights = circuit.edges[circuit.edges.kind == "weight"]
    return frozenset(zip(weights.source, weights.target, strict=True))


def jaccard(first: Collection[Hashable], second: Collection[Hashable]) -> float:
    """Share of what is in either that is in both; 1 for two empty sets."""
    either = len({*first, *second})
    return len({*first} & {*second}) / either if either else 1.0


def _parts(circuit: Circuit) -> tuple[frozenset[Node], frozenset[Edge]]:
    return circuit.node_set, edges_of(circuit)


def _frequency(parts: Iterable[Collection]) -> list[tuple]:
    """What is in any of `parts` with how many it is in, the most frequent first, then in order."""
    counts = Counter(part for found in parts for part in found)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
