"""recover: look for a circuit that is known, and say how much of it was found.

    ROC-AUC    P(score of something in the key > score of something in no key) + P(they are equal) / 2
    exact      what was chosen is the key, nothing more and nothing less
    keys       of a model that has several circuits, the share of them that are among those found, node for node

Where there are several keys, each number is that of the key that it is best for; what is in another key only is then
neither right nor wrong for the ROC-AUC, and wrong for the rest.
"""

import time
from collections.abc import Collection, Hashable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from math import nan

import numpy as np
import pandas as pd
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.components import (
    OUT,
    ComponentEdge,
    ComponentTruth,
    component_of,
    connected,
    greedy_components,
)
from sparse_interp.faithfulness.ground_truth import ground_truth, recovery
from sparse_interp.faithfulness.methods import METHODS, Method, Ranked


def roc_auc(scores: Mapping[Hashable, float], key: Collection[Hashable], neither: Collection[Hashable] = ()) -> float:
    """How surely `scores` tell what is in the key from what is not, of equal ones half; nan where one is missing.

    What is in `neither` does not count.
    """
    rated = [(score, item in key) for item, score in scores.items() if item in key or item not in neither]
    frame = pd.DataFrame(rated, columns=["score", "inside"])
    n_inside = int(frame.inside.sum())
    n_outside = len(frame) - n_inside
    if not n_inside or not n_outside:
        return nan
    ranks = frame.score.rank()[frame.inside].sum()
    return float((ranks - n_inside * (n_inside + 1) / 2) / (n_inside * n_outside))


@dataclass(frozen=True)
class Scores:
    """How much of a known circuit was found; for what is in no model, such as edges of a key without any, nan."""

    node_auc: float
    """ROC-AUC over all nodes."""

    edge_auc: float
    """ROC-AUC over all non-zero within-block weights."""

    node_f1: float
    """Harmonic mean of precision and recall of the nodes that were chosen."""

    edge_f1: float
    """The same of the edges."""

    nodes_exact: bool
    """Whether the nodes that were chosen are those of a key."""

    edges_exact: bool
    """Whether the edges are those of the same key."""

    keys_frac: float
    """Share of the keys that are among all circuits found, node for node."""

    n_nodes: int
    """Nodes that were chosen."""

    n_edges: int
    """Edges that were chosen."""


def score(truth: GroundTruth, ranked: Ranked) -> Scores:
    """Compare what was found with the key, or with the nearest of several."""
    nodes, edges = ({part for key in truth.keys for part in key[i]} for i in (0, 1))
    near = max(truth.keys, key=lambda key: recovery(ranked.chosen.nodes, key.nodes).f1)
    of_nodes, of_edges = recovery(ranked.chosen.nodes, near.nodes), recovery(ranked.chosen.edges, near.edges)
    found = {key.nodes for key in (ranked.chosen, *ranked.others)}
    return Scores(
        node_auc=float(np.nanmax([roc_auc(ranked.nodes, key.nodes, nodes) for key in truth.keys])),
        edge_auc=float(np.nanmax([roc_auc(ranked.edges, key.edges, edges) for key in truth.keys])),
        node_f1=of_nodes.f1,
        edge_f1=of_edges.f1,
        nodes_exact=of_nodes.exact,
        edges_exact=of_edges.exact,
        keys_frac=sum(key.nodes in found for key in truth.keys) / len(truth.keys),
        n_nodes=len(ranked.chosen.nodes),
        n_edges=len(ranked.chosen.edges),
    )


COMPONENT_TAUS = (1e-6, 1e-4, 0.01, 1.0, 100.0)
"""Thresholds of greedy removal between components, mean squared change of what counts of the logits."""


def recover_components(truth: ComponentTruth) -> tuple[Scores, float]:
    """Greedy removal between components, as ACDC has it: how much of the key it finds, and its processor time.

    What stays at the smallest threshold is what it settles for.
    """
    began = time.process_time()
    stays = greedy_components(truth, COMPONENT_TAUS)
    return score_components(truth, stays), time.process_time() - began


def score_components(truth: ComponentTruth, stays: Mapping[ComponentEdge, float]) -> Scores:
    """Compare edges, and the components that they join, with the key; a component is worth its best edge."""
    nodes: dict[str, float] = {}
    for edge, tau in stays.items():
        for end in _ends(edge):
            nodes[end] = max(tau, nodes.get(end, 0.0))
    key, chosen = {end for edge in truth.edges for end in _ends(edge)}, connected([e for e in stays if stays[e] > 0])
    kept = {end for edge in chosen for end in _ends(edge)}
    of_nodes, of_edges = recovery(kept, key), recovery(chosen, truth.edges)
    return Scores(
        node_auc=roc_auc(nodes, key),
        edge_auc=roc_auc(stays, truth.edges),
        node_f1=of_nodes.f1,
        edge_f1=of_edges.f1,
        nodes_exact=of_nodes.exact,
        edges_exact=of_edges.exact,
        keys_frac=float(of_nodes.exact),
        n_nodes=len(kept),
        n_edges=len(chosen),
    )


def _ends(edge: ComponentEdge) -> list[str]:
    return [end for end in (edge[0], component_of(edge[1])) if end != OUT]


@dataclass(frozen=True, eq=False)
class Recovered:
    """What one way of finding circuits made of a model whose circuit is known."""

    name: str
    """The model."""

    method: str
    """The way."""

    ranked: Ranked
    """Scores of all nodes and edges, and the circuit chosen."""

    scores: Scores
    """How much of the known circuit that is."""

    seconds: float
    """Processor time."""

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value:.4g}" for name, value in asdict(self.scores).items())
        return f"{self.method} on {self.name}: {said}; {self.seconds:.1f} s"


def recover(truth: GroundTruth | str, method: str = "find_circuit", *, generator: torch.Generator) -> Recovered:
    """Look for the circuit of a model whose circuit is known, and measure how much of it is found.

    Args:
        truth: a model with its key, or the name of a hand-built one.
        method: one of `METHODS` (faithfulness/methods.py): `find_circuit`, `find_edges`, `rivals`, `gradient`,
            `integrated_gradient`, `eap`, `eap_ig`, `patching`, `ablation`, `acdc`, `subnetwork_probing`.
        generator: draws prompts, gates and noise.

    Raises:
        ConfigError: for an unknown method.
        TaskError: for an unknown model, or a task with too few pairs.
        CircuitError: if the method finds no circuit.
    """
    search = method_called(method)
    truth = ground_truth(truth) if isinstance(truth, str) else truth
    began = time.process_time()
    ranked = search(truth, generator=generator)
    seconds = time.process_time() - began
    return Recovered(truth.name, method, ranked, score(truth, ranked), seconds)


def method_called(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"No method is called {name!r}; {hint}Known: {', '.join(METHODS)}.")
    return METHODS[name]
