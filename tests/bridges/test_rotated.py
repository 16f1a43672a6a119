"""Rotated twins: the same function in other coordinates, and a bridge that is known."""

import pytest
import torch

from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.errors import BridgeError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.model.sites import stream_hook


def streams(model, tokens):
    _, cache = model.run_with_cache(tokens)
    return [cache[stream_hook(site)] for site in range(2 * model.cfg.n_layers + 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "concat", "d_pos_emb": 3},
        {"norm": "none"},
        {"tie_unembed": True},
        {"afrac": None, "afrac_sites": ("attn_read",)},
        {"attention_dir": "bidirectional", "sink": False, "positions": "none"},
    ],
    ids=str,
)
def test_a_twin_computes_the_same_and_the_known_bridge_carries_every_stream_both_ways(make_model, tokens, changes):
    sparse = make_model(**{"afrac_sites": ("q", "k", "v", "neuron"), "dtype": torch.float64} | changes)
    for name, p in sparse.named_parameters():
        if name.endswith(".w") and not name.endswith("_pos.w"):
            p.data.fill_(1.3)
    twin = rotated_twin(sparse, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(twin.dense(tokens), sparse(tokens), atol=1e-12, rtol=1e-12)
    for pair, ours, theirs in zip(twin.bridge.pairs, streams(sparse, tokens), streams(twin.dense, tokens), strict=True):
        assert not torch.allclose(ours, theirs, atol=0.1)
        torch.testing.assert_close(twin.bridge.encode(theirs, pair), ours, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(twin.bridge.decode(ours, pair), theirs, atol=1e-12, rtol=1e-12)


def test_a_rotation_is_orthogonal_and_mixes_all_channels(generator):
    twin = rotated_twin(rotatable_model(generator=generator), generator=generator)
    torch.testing.assert_close(twin.rotation @ twin.rotation.mT, torch.eye(32), atol=1e-5, rtol=0)
    assert (twin.rotation.abs() < 1e-3).float().mean() < 0.05 and twin.missing == ()


def test_what_is_missing_is_nowhere_in_the_dense_stream_and_the_rest_begins_as_it_was(generator):
    sparse = rotatable_model(generator=generator, dtype=torch.float64)
    twin = rotated_twin(sparse, missing_frac=0.1, generator=generator)
    assert len(twin.missing) == 3
    gone = list(twin.missing)
    tokens = torch.randint(64, (4, 10), generator=generator)
    found = [
        twin.bridge.encode(x, pair) for x, pair in zip(streams(twin.dense, tokens), twin.bridge.pairs, strict=True)
    ]
    assert all(x[..., gone].abs().max() < 1e-12 for x in found)
    assert all((x @ twin.rotation[gone].mT).abs().max() < 1e-12 for x in streams(twin.dense, tokens))
    kept = [channel for channel in range(32) if channel not in gone]
    torch.testing.assert_close(found[0][..., kept], streams(sparse, tokens)[0][..., kept], atol=1e-12, rtol=0)
    assert not torch.allclose(twin.dense(tokens), sparse(tokens), atol=0.1)


def test_a_model_of_random_weights_is_sparse_and_alive(generator):
    model = rotatable_model(generator=generator, density=0.2, d_model=48)
    tokens = torch.randint(64, (4, 10), generator=generator)
    assert round((model.blocks[1].mlp.W_in != 0).double().mean().item(), 2) == 0.2
    sizes = [x.pow(2).mean().sqrt().item() for x in streams(model, tokens)]
    assert 0.1 < sizes[0] < sizes[-1] < 10
    assert model(tokens).std() > 0.3


def test_hand_built_models_with_level_norms_have_twins(generator):
    truth = ground_truth("two_hop")
    twin = rotated_twin(truth.model, generator=generator)
    batch = truth.task.batch(8, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(twin.dense(batch.clean), truth.model(batch.clean), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"afrac_sites": ("q", "mlp_read", "resid_mid")}, "AbsTopK acts at mlp_read, resid_mid"),
        ({"afrac": None, "norm": "layer"}, "norm='layer'"),
        ({"afrac": None, "residual_act": "relu"}, "residual_act='relu'"),
        ({"afrac": None}, "gains blocks.0.ln1.w differ between channels"),
    ],
    ids=str,
)
def test_a_model_that_a_rotation_would_change_is_refused_and_told_why(make_model, generator, changes, message):
    with pytest.raises(BridgeError, match=message):
        rotated_twin(make_model(**changes), generator=generator)


def test_refusals(make_bridge, generator):
    with pytest.raises(BridgeError, match="has no rotated twin: pass a HookedSparseTransformer"):
        rotated_twin(make_bridge()[0], generator=generator)
    with pytest.raises(BridgeError, match=r"missing_frac=1.0 is not a share of the channels in \[0, 1\)"):
        rotated_twin(rotatable_model(generator=generator), missing_frac=1.0, generator=generator)
