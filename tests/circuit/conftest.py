"""What the tests of circuits share: circuits of random nodes, and the hand-built quote model with its answer key."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def truth():
    """The hand-built quote model, its task and its key."""
    from sparse_interp.faithfulness.ground_truth import ground_truth  # after the hook that checks annotations

    return ground_truth("quote")


@pytest.fixture(scope="session")
def key_circuit(truth):
    """The key of the quote model as a circuit, with scores and importances as a search leaves them."""
    from dataclasses import replace

    import pandas as pd

    from sparse_interp.circuit.graph import SCORE_COLUMNS, Circuit
    from sparse_interp.interventions.ablation import mean_activations
    from sparse_interp.interventions.pruning import PruneConfig
    from sparse_interp.model.sites import NodeValues
    from sparse_interp.tokenizer import tokenizer_hash

    means = mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(1)))
    taus = {place: torch.linspace(-1, 1, len(v)) for place, v in means.values.items()}
    taus[next(iter(taus))][0] = torch.inf  # a node without a gate
    scores = [
        ("task loss of circuit", 0.1 + 0.2, "nats", "full, mean", "cross-entropy of answer against foil", "sel.", 64),
        ("nodes at task loss 0.15", float("nan"), "nodes", "full, mean", "prefix of the ranking", "selection", 64),
    ]
    circuit = Circuit.of_nodes(
        truth.model,
        truth.nodes,
        means,
        tau=NodeValues(taus, "gate tau"),
        importance={node: 0.1 * (i + 1) for i, node in enumerate(sorted(truth.nodes))},
        task_name=truth.task.name,
        task_sha256=truth.task.templates_sha256,
        tokenizer_sha256=tokenizer_hash(truth.task.tokenizer),
        prune=PruneConfig(n_steps=7, k_coef=1e-3),
        seed=5,
        scores=pd.DataFrame(scores, columns=list(SCORE_COLUMNS)),
    )
    return replace(circuit, history=pd.DataFrame({"step": [1, 2], "objective_nats": [0.5, 0.25]}))


@pytest.fixture
def some_nodes():
    """`some_nodes(model, share, seed)`: a random share of a model's nodes."""

    def draw(model, share=0.5, seed=0):
        from sparse_interp.model.sites import Node, places, width

        generator = torch.Generator().manual_seed(seed)
        everything = [Node(p.layer, p.site, c) for p in places(model.cfg) for c in range(width(model.cfg, p.site))]
        drawn = torch.rand(len(everything), generator=generator) < share
        return [node for node, chosen in zip(everything, drawn.tolist(), strict=True) if chosen]

    return draw


@pytest.fixture
def zero(make_model):
    """`zero(model)`: zero as the baseline of every node."""
    from sparse_interp.interventions.ablation import zero_values

    return zero_values


# -- published files, written without the library ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference():
    """Released models and circuits written once more in NumPy, `released_reference.py`."""
    path = Path(__file__).parent / "released_reference.py"
    spec = importlib.util.spec_from_file_location("released_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_tensors(value):
    """Arrays, in whatever they lie, as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: as_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_tensors(part) for part in value)
    return value


@pytest.fixture
def written(tmp_path):
    """`written(name, content)`: a file as `torch.save` writes it, arrays as tensors."""

    def write(name, content):
        with (tmp_path / name).open("wb") as file:
            torch.save(as_tensors(content), file)
        return tmp_path / name

    return write
