"""A hybrid pass is its two models, cut and joined: exact identities, and independent computation."""

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.hybrid import HybridPath, hybrid_logits, sampled_paths, streams_and_logits, token_kl
from sparse_interp.errors import BridgeError
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import stream_hook

EVERY_SITE = tuple(SitePair(site, site) for site in range(5))


def identity(model) -> Bridge:
    """A bridge between a model and itself that changes nothing."""
    bridge = Bridge.between(model, model, BridgeConfig(afrac=1.0)).to(hooked(model).embed.W_E.dtype)
    with torch.no_grad():
        for pair in bridge.pairs:
            bridge[pair].W_encode.copy_(torch.eye(bridge.sparse.d_model))
            bridge[pair].W_decode.copy_(torch.eye(bridge.sparse.d_model))
    return bridge


@pytest.fixture
def drawn(sparse, dense, generator):
    """An untrained bridge between two models."""
    return Bridge.between(sparse, dense, generator=generator)


@pytest.mark.parametrize("start", ["sparse", "dense"])
def test_an_identity_bridge_between_a_model_and_itself_changes_nothing(any_kind, tokens, start):
    bridge = identity(any_kind)
    with torch.no_grad():
        logits = hooked(any_kind)(tokens)
        for pair in EVERY_SITE:
            found = hybrid_logits(any_kind, any_kind, bridge, tokens, start=start, switches=[pair])
            torch.testing.assert_close(found, logits, atol=1e-6, rtol=1e-6)
        found = hybrid_logits(any_kind, any_kind, bridge, tokens, start=start, switches=EVERY_SITE)
        torch.testing.assert_close(found, logits, atol=1e-6, rtol=1e-6)


def test_an_identity_bridge_is_exact_to_the_rounding_of_float64(make_model, tokens):
    model = make_model(dtype=torch.float64)
    with torch.no_grad():
        found = hybrid_logits(model, model, identity(model), tokens, start="dense", switches=EVERY_SITE)
        assert float((found - model(tokens)).abs().max()) < 1e-12


def test_a_path_without_a_switch_is_the_model(drawn, sparse, dense, tokens):
    for start, model in (("sparse", sparse), ("dense", dense)):
        assert torch.equal(hybrid_logits(sparse, dense, drawn, tokens, start=start), model(tokens))


def test_a_switch_at_the_last_site_decodes_and_unembeds(drawn, sparse, dense, tokens):
    with torch.no_grad():
        found = hybrid_logits(sparse, dense, drawn, tokens, start="sparse", switches=[SitePair(4, 4)])
        decoded = drawn.decode(sparse(tokens, stop_at_layer=2), SitePair(4, 4))
        scale = (decoded.square().mean(-1, keepdim=True) + dense.cfg.eps).sqrt()
        read = decoded / scale * dense.ln_final.w
        expected = read @ dense.unembed.W_U + dense.unembed.b_U + dense.bigram_table[tokens]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pair", EVERY_SITE, ids=str)
def test_one_switch_is_the_other_model_with_its_stream_exchanged(drawn, sparse, dense, tokens, pair):
    """Against whole runs of both models and a hook that exchanges the stream."""
    with torch.no_grad():
        streams, _ = streams_and_logits(dense, tokens, [pair.dense])
        encoded = drawn.encode(streams[pair.dense], pair)
        exchanged = [(stream_hook(pair.sparse), lambda resid, hook: encoded)]
        expected = sparse.run_with_hooks(tokens, fwd_hooks=exchanged)
        found = hybrid_logits(sparse, dense, drawn, tokens, start="dense", switches=[pair])
    torch.testing.assert_close(found, expected)


def test_models_of_unequal_depth_are_crossed_where_the_map_says(sparse, make_model, tokens, generator):
    deep = make_model(model_name="deep", afrac=None, n_layers=3, d_model=10, d_head=4)
    bridge = Bridge.between(sparse, deep, BridgeConfig(sites=((1, 1), (2, 4), (4, 6))), generator=generator)
    with torch.no_grad():
        found = hybrid_logits(sparse, deep, bridge, tokens, start="sparse", switches=[SitePair(1, 1), SitePair(2, 4)])
        decoded = bridge.decode(sparse.between(tokens, leave=1), SitePair(1, 1))
        on = deep.between(tokens, enter=(1, decoded), leave=4)
        expected = sparse.between(tokens, enter=(2, bridge.encode(on, SitePair(2, 4))))
    assert torch.equal(found, expected)


def test_a_padded_batch_is_its_prompts_one_by_one(drawn, sparse, dense, tokens):
    switches = [SitePair(1, 1), SitePair(3, 3)]
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), tokens], 1)
    mask = (torch.arange(9) >= 2).long().expand(3, -1)
    with torch.no_grad():
        found = hybrid_logits(sparse, dense, drawn, padded, start="dense", switches=switches, attention_mask=mask)
        alone = hybrid_logits(sparse, dense, drawn, tokens, start="dense", switches=switches)
    torch.testing.assert_close(found[:, 2:], alone)


def test_a_transformer_lens_model_may_be_the_dense_one(make_bridge, sparse, tokens, generator):
    theirs, _ = make_bridge()
    bridge = Bridge.between(sparse, theirs, generator=generator)
    with torch.no_grad():
        streams, logits = streams_and_logits(hooked(theirs), tokens, [3])
        found = hybrid_logits(sparse, theirs, bridge, tokens, start="dense", switches=[SitePair(3, 3)])
        expected = sparse.between(tokens, enter=(3, bridge.encode(streams[3], SitePair(3, 3))))
        torch.testing.assert_close(found, expected)
        there = hybrid_logits(sparse, theirs, bridge, tokens, start="sparse", switches=[SitePair(4, 4)])
        decoded = bridge.decode(sparse(tokens, stop_at_layer=2), SitePair(4, 4))
        torch.testing.assert_close(there, theirs.unembed(theirs.ln_final(decoded)))
    assert logits.shape == found.shape == there.shape


def test_hooks_of_both_models_are_felt(drawn, sparse, dense, tokens):
    met = []
    hooks = [(f"blocks.{layer}.hook_mlp_out", lambda x, hook: met.append(hook.name)) for layer in range(2)]
    with sparse.hooks(fwd_hooks=hooks[:1]), dense.hooks(fwd_hooks=hooks[1:]), torch.no_grad():
        hybrid_logits(sparse, dense, drawn, tokens, start="sparse", switches=[SitePair(2, 2)])
    assert met == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]


def test_what_is_no_path_is_refused(drawn, sparse, dense, tokens, make_model):
    with pytest.raises(BridgeError, match="begins in 'sparse' or in 'dense'"):
        hybrid_logits(sparse, dense, drawn, tokens, start="middle")
    with pytest.raises(BridgeError, match="must not lead back"):
        hybrid_logits(sparse, dense, drawn, tokens, start="dense", switches=[SitePair(2, 2), SitePair(1, 1)])
    with pytest.raises(BridgeError, match="does not tie sites 0-4"):
        hybrid_logits(sparse, dense, drawn, tokens, start="dense", switches=[SitePair(0, 4)])
    with pytest.raises(BridgeError, match="10 channels"):
        hybrid_logits(sparse, make_model(d_model=8, d_head=4), drawn, tokens, start="dense")


def test_sampled_paths_are_different_and_each_is_as_likely(drawn, generator):
    assert len({*sampled_paths(drawn, 100, generator=generator)}) == 64
    few = sampled_paths(drawn, 20, generator=generator)
    assert len({*few}) == 20
    counts: dict[HybridPath, int] = {}
    for _ in range(300):
        for path in sampled_paths(drawn, 4, generator=generator):
            counts[path] = counts.get(path, 0) + 1
    assert len(counts) == 64
    expected = 300 * 4 / 64
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 100  # chi-square, 63 degrees of freedom
    with pytest.raises(BridgeError, match="n_paths=0"):
        sampled_paths(drawn, 0, generator=generator)


def test_kl_of_a_token_is_that_of_its_distributions(generator):
    first, second = torch.randn(2, 2, 3, 7, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=first), torch.distributions.Categorical(logits=second)
    )
    torch.testing.assert_close(token_kl(first, second), expected)
