"""What the tests of circuits share: circuits of random nodes, and the key of the hand-built quote model as one."""

import json
from functools import cache

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def key_circuit(truth):
    """The key of the quote model as a circuit, with scores and importances as a search leaves them."""
    from dataclasses import replace

    import pandas as pd

    from sparse_interp.circuit.graph import SCORE_COLUMNS, Circuit
    from sparse_interp.interventions.baselines import mean_activations
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
    return replace(circuit, history=pd.DataFrame({"step": [1, 2], "objective": [0.5, 0.25]}))


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
    from sparse_interp.interventions.baselines import zero_values

    return zero_values


# -- published files, written without the library ----------------------------------------------------------------------


EIGHT = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"


def as_tensors(value):
    """Arrays, in whatever they lie, as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: as_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_tensors(part) for part in value)
    return value


def write(folder, name, content):
    with (folder / name).open("wb") as file:
        torch.save(as_tensors(content), file)
    return folder / name


@pytest.fixture
def written(tmp_path):
    """`written(name, content)`: a file as `torch.save` writes it, arrays as tensors."""
    return lambda name, content: write(tmp_path, name, content)


STYLES = {
    "as csp_yolo1": {},
    "as csp_yolo2": {"afrac": 0.4, "afrac_loctypes": EIGHT, "sink": True, "d_pos_emb": 2},
    "AbsTopK everywhere": {"afrac": 0.6, "afrac_loctypes": EIGHT + ",resid_post_attn,resid_post_mlp", "sink": True},
    "layer norm": {"rms_norm": False, "tied_unembed": True, "bias": False, "residual_activation_type": "relu"},
}
"""What differs from two layers of six channels, two heads of two and seven neurons."""


@pytest.fixture(scope="session")
def published_as(tmp_path_factory):
    """`published_as(style)`: a folder with a model, a circuit of it and the means; the reference made every number."""
    return cache(lambda style: published_files(tmp_path_factory.mktemp("published"), STYLES[style]))


@pytest.fixture(params=STYLES, ids=str)
def published(request, published_as):
    """Every style in turn."""
    return published_as(request.param)


@pytest.fixture
def published_yolo2(published_as):
    """AbsTopK at eight sites, sink, concatenated positions."""
    return published_as("as csp_yolo2")


def published_files(folder, changes):
    from published_numpy import random_payload
    from released_numpy import random_weights

    config = {"block_size": 10, "vocab_size": 12, "n_layer": 2, "n_head": 2, "d_head": 2, "d_model": 6, "d_mlp": 7,
              "rms_norm": True, "tied_unembed": False, "enable_bigram_table": True, **changes}  # fmt: skip
    rng = np.random.default_rng(0)
    weights = random_weights(config, rng)
    payload, means = random_payload(rng, config, weights, share=0.8)
    (folder / "beeg_config.json").write_text(json.dumps(config))
    for name, content in {"final_model": weights, "viz_data": payload, "mean_baseline_pretrain": means}.items():
        write(folder, f"{name}.pt", content)
    return folder
