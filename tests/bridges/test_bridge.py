"""A bridge maps streams as its equation says, has a gradient for its thresholds, and refuses other models."""

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge, End, nmse, threshold
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.errors import BridgeError


def test_an_encoder_is_a_linear_map_of_which_the_largest_channels_are_kept(sparse, dense, generator):
    bridge = Bridge.between(sparse, dense, BridgeConfig(afrac=0.25), generator=generator)
    pair, stream = SitePair(2, 2), torch.randn(3, 5, 10, generator=generator)
    part = bridge[pair]
    with torch.no_grad():
        part.b_encode.normal_(generator=generator)
        linear = stream @ part.W_encode + part.b_encode
        encoded = bridge.encode(stream, pair)
    kept = encoded != 0
    assert (kept.sum(-1) == 3).all()
    assert torch.equal(encoded[kept], linear[kept])
    assert (linear.abs().masked_fill(~kept, torch.inf).amin(-1) >= linear.abs().masked_fill(kept, 0).amax(-1)).all()


def test_a_decoder_is_a_linear_map(sparse, dense, generator):
    bridge = Bridge.between(sparse, dense, generator=generator)
    pair, stream = SitePair(1, 1), torch.randn(3, 5, 12, generator=generator)
    with torch.no_grad():
        bridge[pair].b_decode.normal_(generator=generator)
        torch.testing.assert_close(
            bridge.decode(stream, pair),
            torch.einsum("bps,sd->bpd", stream, bridge[pair].W_decode) + bridge[pair].b_decode,
        )


def test_a_threshold_keeps_what_exceeds_it():
    z = torch.tensor([[0.9, -1.1, 2.0], [1.1, 0.0, -3.1]])
    found = threshold(z, torch.tensor([1.0, 1.0, 3.0]).log(), 0.1)
    assert torch.equal(found, torch.tensor([[0.0, -1.1, 0.0], [1.1, 0.0, -3.1]]))


def test_a_thresholds_gradient_is_the_derivative_of_the_expected_loss():
    """Against a difference quotient of the loss itself, on so many values that neither is noise."""
    share = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    z = (1.5 * torch.special.ndtri(share))[:, None].expand(-1, 2)
    wanted = 0.7 * z + 0.2 + torch.sin(3 * z)
    log_theta = torch.tensor([-0.5, 0.4], dtype=torch.float64, requires_grad=True)

    def loss(log_theta, width):
        return (threshold(z, log_theta, width) - wanted).square().mean(0).sum()

    loss(log_theta, 0.02).backward()
    step = 0.01
    with torch.no_grad():
        for channel in range(2):
            change = torch.zeros(2, dtype=torch.float64)
            change[channel] = step
            quotient = (loss(log_theta + change, 0.02) - loss(log_theta - change, 0.02)) / (2 * step)
            assert float(log_theta.grad[channel]) == pytest.approx(float(quotient), rel=0.02)


def test_what_a_threshold_cuts_has_no_gradient():
    z = torch.tensor([[0.5, 2.0]], requires_grad=True)
    threshold(z, torch.zeros(2), 0.1).sum().backward()
    assert torch.equal(z.grad, torch.tensor([[0.0, 1.0]]))


def test_nmse_is_0_for_the_target_and_1_for_its_mean(generator):
    target = 5 + torch.randn(4, 6, 3, generator=generator)
    mean = target.mean((0, 1)).expand_as(target)
    assert float(nmse(target, target)) == 0
    assert float(nmse(mean, target)) == pytest.approx(1.0, rel=1e-5)
    by_hand = sum(float((2 - t).square().sum()) for t in target) / sum(
        float((m - t).square().sum()) for m, t in zip(mean, target, strict=True)
    )
    assert float(nmse(torch.full_like(target, 2.0), target)) == pytest.approx(by_hand, rel=1e-5)


def test_nmse_sends_no_gradient_through_the_spread(generator):
    target = torch.randn(8, 3, generator=generator, requires_grad=True)
    nmse(torch.zeros(8, 3), target).backward()
    spread = float((target - target.mean(0)).square().sum().detach())
    torch.testing.assert_close(target.grad, 2 * target.detach() / spread)


@pytest.mark.parametrize("encoder", ["abs_topk", "threshold"])
def test_a_fit_finds_the_linear_maps_that_there_are(sparse, dense, generator, encoder):
    bridge = Bridge.between(sparse, dense, BridgeConfig(encoder=encoder, afrac=1.0)).double()
    pair = SitePair(3, 3)
    streams = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    there = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    bridge.fit_(pair, streams @ there + 2.0, streams)
    with torch.no_grad():
        assert float(nmse(bridge[pair].before_cut(streams), streams @ there + 2.0)) < 1e-12
        assert float(nmse(bridge.decode(streams @ there + 2.0, pair), streams)) < 1e-12


def test_fitted_thresholds_leave_the_share_that_was_asked_for(sparse, dense, generator):
    bridge = Bridge.between(sparse, dense, BridgeConfig(encoder="threshold", afrac=0.25))
    pair, streams = SitePair(0, 0), torch.randn(500, 10, generator=generator)
    bridge.fit_(pair, streams @ torch.randn(10, 12, generator=generator), streams)
    with torch.no_grad():
        assert float((bridge.encode(streams, pair) != 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_a_pair_that_is_not_tied_and_a_stream_of_another_width_are_refused(sparse, dense):
    bridge = Bridge.between(sparse, dense, BridgeConfig(sites=((0, 0), (4, 4))))
    with pytest.raises(BridgeError, match=r"does not tie sites 2-2 .*ties 0-0, 4-4"):
        bridge.encode(torch.zeros(1, 1, 10), SitePair(2, 2))
    with pytest.raises(BridgeError, match="12 channels came to a bridge's side of 10"):
        bridge.encode(torch.zeros(1, 1, 12), SitePair(0, 0))
    with pytest.raises(BridgeError, match="10 channels came to a bridge's side of 12"):
        bridge.decode(torch.zeros(1, 1, 10), SitePair(0, 0))


def test_models_of_other_token_ids_or_another_tokenizer_are_not_tied(sparse, dense, make_model):
    with pytest.raises(BridgeError, match="50 token ids and 'other' 40"):
        Bridge.between(sparse, make_model(model_name="other", d_vocab=40))
    ends = End.of(sparse), End.of(dense)
    one, two = (End(**vars(end) | {"tokenizer_sha256": letter * 64}) for end, letter in zip(ends, "ab", strict=True))
    with pytest.raises(BridgeError, match="aaaaaaaaaaaa and 'dense' with bbbbbbbbbbbb"):
        Bridge(BridgeConfig(), one, two)


def test_a_bridge_refuses_models_that_it_does_not_fit(sparse, dense, make_model):
    bridge = Bridge.between(sparse, dense)
    bridge.check(sparse, dense, weights=True)
    with pytest.raises(BridgeError, match=r"sparse model of 12 channels \('sparse'\), and 'dense' has 10"):
        bridge.check(dense, sparse)
    with pytest.raises(BridgeError, match="dense model of 2 layers"):
        bridge.check(sparse, make_model(afrac=None, d_model=10, n_layers=3))
    other = make_model(model_name="sparse", seed=9)
    bridge.check(other, dense)
    with pytest.raises(BridgeError, match="made for 'sparse' with weights"):
        bridge.check(other, dense, weights=True)


def test_depths_are_compared_before_any_weight_is_made(sparse, make_model):
    deep = make_model(afrac=None, n_layers=3)
    with pytest.raises(BridgeError, match="2 layers and the dense one 3"):
        Bridge.between(sparse, deep)
