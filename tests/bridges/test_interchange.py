"""The loss of interchanges is what it says, 0 where a change means the same in both models, and always a number."""

import math

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.interchange import LARGEST, Interchange
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.bridges.training import BridgeTrainer
from sparse_interp.training.recipes import RunConfig


@pytest.fixture
def twins(generator):
    """A model of random weights, its rotation, the known bridge, and text."""
    sparse = rotatable_model(generator=generator, n_layers=2, d_model=16, n_heads=2, d_mlp=32, d_vocab=40)
    return sparse, rotated_twin(sparse, generator=generator), torch.randint(40, (12, 10), generator=generator)


def measured(sparse, dense, bridge, text) -> dict[str, float]:
    trainer = BridgeTrainer(sparse, dense, text, BridgeConfig(afrac=1.0, batch_size=4), validation=text)
    trainer.bridge = bridge
    return trainer.measure()["interchange"]


def by_hand(sparse, dense, bridge, pair, tokens, exchanged) -> float:
    """The loss in float64, a token of the text and a word of the vocabulary at a time."""
    with torch.no_grad():
        y, x = sparse.between(tokens, leave=pair.sparse), dense.between(tokens, leave=pair.dense)
        error = spread = 0.0
        y_after, x_after = y.clone(), x.clone()
        for block in range(len(tokens)):
            donor = int(exchanged.donor[block])
            for channel in exchanged.channels[block, 0].nonzero()[:, 0].tolist():
                y_after[block, :, channel] = y[donor, :, channel]
                change = y[donor, :, channel] - y[block, :, channel]
                x_after[block] += change[:, None] * bridge[pair].W_decode[channel]
        logits = [model(tokens).double() for model in (sparse, dense)]
        after = [
            model.between(tokens, enter=(site, stream)).double()
            for model, site, stream in ((sparse, pair.sparse, y_after), (dense, pair.dense, x_after))
        ]
    for block in range(len(tokens)):
        n = int(exchanged.channels[block].sum())
        for pos in range(tokens.shape[1]):
            p = logits[1][block, pos].softmax(-1).tolist()
            s = (after[0].log_softmax(-1) - logits[0].log_softmax(-1))[block, pos].tolist()
            d = (after[1].log_softmax(-1) - logits[1].log_softmax(-1))[block, pos].tolist()
            for change in (s, d):
                mean = math.fsum(q * c for q, c in zip(p, change, strict=True))
                change[:] = [c - mean for c in change]
            error += math.fsum(q * (a - b) ** 2 for q, a, b in zip(p, d, s, strict=True)) / n
            spread += math.fsum(q * a**2 for q, a in zip(p, s, strict=True)) / n
    return error / spread


def test_the_loss_is_that_of_a_float64_sum_over_tokens_and_words(sparse, dense, generator):
    tokens = torch.randint(50, (4, 5), generator=generator)
    trainer = BridgeTrainer(sparse, dense, tokens, BridgeConfig())
    trainer.bridge = bridge = Bridge.between(sparse, dense, trainer.config, generator=generator)
    drawn = Interchange.draw(4, 12, generator=torch.Generator().manual_seed(8))
    assert len(drawn.channels.sum(-1).unique()) > 1  # else the weights of sets would not be seen
    with torch.no_grad():
        found = trainer._losses(tokens, list(bridge.pairs), torch.Generator().manual_seed(8)).by_pair["interchange"]
    for pair in bridge.pairs:
        expected = by_hand(sparse, dense, bridge, pair, tokens, drawn)
        assert float(found[pair]) == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_the_bridge_of_a_rotated_twin_carries_every_change_and_one_with_a_row_turned_does_not(twins):
    sparse, twin, text = twins
    assert max(measured(sparse, twin.dense, twin.bridge, text).values()) < 1e-6
    with torch.no_grad():
        for pair in twin.bridge.pairs:
            twin.bridge[pair].W_decode[5].neg_()
    assert min(measured(sparse, twin.dense, twin.bridge, text).values()) > 1e-2


def test_a_bridge_that_carries_nothing_lacks_all_of_a_change(twins):
    sparse, twin, text = twins
    with torch.no_grad():
        for pair in twin.bridge.pairs:
            twin.bridge[pair].W_decode.zero_()
    assert list(measured(sparse, twin.dense, twin.bridge, text).values()) == pytest.approx([1.0] * 5)


def test_a_change_that_nothing_reads_is_no_loss(twins):
    sparse, twin, text = twins
    with torch.no_grad():
        sparse.unembed.W_U.zero_()
    trainer = BridgeTrainer(sparse, twin.dense, text, BridgeConfig(afrac=1.0, n_steps=2, batch_size=4))
    record = trainer.step()  # which raises if a gradient is not finite
    assert set(record.interchange.values()) == {0.0}


def test_sets_are_log_uniform_up_to_a_quarter_and_taken_from_another_block(generator):
    drawn = Interchange.draw(20_000, 64, generator=generator)
    sizes = drawn.channels.sum(-1).flatten()
    most = int(LARGEST * 64)
    assert (int(sizes.min()), int(sizes.max())) == (1, most)
    for size in (1, 2, 5, most):
        expected = math.log((size + 1) / size) / math.log(most + 1)
        assert float((sizes == size).float().mean()) == pytest.approx(expected, abs=0.01)
    assert drawn.channels.float().mean(0).std() < 0.01  # no channel more than another
    for n_blocks in (2, 3, 8) * 8:
        donor = Interchange.draw(n_blocks, 64, generator=generator).donor
        assert sorted(donor.tolist()) == list(range(n_blocks))
        assert not bool((donor == torch.arange(n_blocks)).any())


def test_the_decoder_learns_from_a_change_and_the_sparse_model_does_not(make_model, dense, generator):
    sparse = make_model(model_name="scratch", density=0.3)
    blocks = torch.randint(50, (8, 9), generator=generator)
    run = RunConfig(name="scratch", model=sparse.cfg, n_tokens=10**6, lr=3e-3)
    trainer = BridgeTrainer(sparse, dense, blocks, BridgeConfig(n_steps=4, batch_size=4), run=run)
    pair = SitePair(3, 3)
    with trainer._working():
        trainer._fit()
        trainer._losses(blocks, [pair], generator).by_pair["interchange"][pair].backward()
    learning = {name for name, p in trainer.bridge[pair].named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"W_decode"}
    assert all(p.grad is None for p in sparse.parameters())
