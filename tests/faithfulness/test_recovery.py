"""The searches, with one setting for all, find every hand-built circuit: node for node, and edge for edge."""

import pytest
import torch

from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.find_edges import find_edges
from sparse_interp.faithfulness.ground_truth import ground_truth, ground_truths, nearest_key, recovery
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.prune_config import PruneConfig

ONE_SETTING = PruneConfig(n_train=60, n_selection=36, n_steps=40, batch_size=16)
"""The defaults, but for fewer pairs and steps: these models are small, and so are their vocabularies."""


@pytest.mark.parametrize("name", ground_truths())
def test_a_hand_built_circuit_is_recovered_exactly(name):
    truth, generator = ground_truth(name), torch.Generator().manual_seed(0)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    given = {"baseline": means, "generator": generator, "progress": False}
    circuit = find_circuit(truth.model, truth.task, ONE_SETTING, **given)
    key = nearest_key(truth, circuit.node_set)
    assert recovery(circuit.node_set, key.nodes).exact, circuit.node_set ^ key.nodes
    assert circuit.n_edges == len(key.edges) + (3 if name == "distractor" else 0)  # whose idle weights are no edges

    pruned = find_edges(truth.model, circuit, truth.task, ONE_SETTING, **given)
    weights = pruned.edges[pruned.edges.kind == "weight"]
    found = set(zip(weights.source, weights.target, strict=True))
    assert recovery(found, {(str(source), str(target)) for source, target in key.edges}).exact, found
    assert pruned.node_set == circuit.node_set
