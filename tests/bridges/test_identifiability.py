"""What no text can teach a bridge and interchanges do: of two with the same losses on text, one carries ablations."""

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.bridges.rotated import rotated_twin
from sparse_interp.bridges.steering import transfer
from sparse_interp.bridges.stretches import streams
from sparse_interp.bridges.training import BridgeTrainer
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations


def test_bridges_that_differ_outside_the_span_of_the_streams_have_equal_losses_and_other_directions():
    generator = torch.Generator().manual_seed(0)
    truth = ground_truth("quote")
    twin = rotated_twin(truth.model, generator=generator)
    blocks = truth.blocks(60, generator=generator)
    other = Bridge.between(truth.model, twin.dense, BridgeConfig(afrac=1.0))
    other.load_state_dict(twin.bridge.state_dict())
    dropped = 0
    for pair in other.pairs:  # keep of the decoder what the streams of the text span, and nothing else
        stream = streams(truth.model, blocks, [pair.sparse])[pair.sparse].flatten(0, 1).double()
        _, sizes, directions = torch.linalg.svd(stream, full_matrices=False)
        spanned = directions[sizes > 1e-5 * sizes[0]]
        dropped += stream.shape[1] - len(spanned)
        with torch.no_grad():
            weight = other[pair].W_decode
            weight.copy_(spanned.mT @ spanned @ weight.double())
    assert dropped > 0
    measured = []
    for bridge in (twin.bridge, other):
        config = BridgeConfig(afrac=1.0, entries_per_step=None)
        trainer = BridgeTrainer(truth.model, twin.dense, blocks, config, validation=blocks)
        trainer.bridge = bridge
        measured.append(trainer.measure())
    for name in ("encode", "decode", "enter_sparse", "enter_dense"):
        assert measured[0][name] == pytest.approx(measured[1][name], abs=2e-6)
        assert max(measured[0][name].values()) < 2e-6
    interchanged = [max(found["interchange"].values()) for found in measured]
    assert interchanged[0] < 1e-5 and interchanged[1] > 0.1
    batch, means = truth.task.batch(16, generator=generator), mean_activations(truth.model, blocks)
    worst, rows = [], torch.arange(16)
    for bridge in (twin.bridge, other):
        errors = []
        for node in sorted(truth.nodes):
            ablating = lambda model, node=node: ablate(model, [node], means)
            with torch.no_grad():
                with ablating(truth.model):
                    wanted = truth.model(batch.clean)[rows, batch.last]
                with transfer(bridge, truth.model, twin.dense, ablating):
                    errors.append(float((twin.dense(batch.clean)[rows, batch.last] - wanted).abs().max()))
        worst.append(max(errors))
    assert worst[0] < 1e-3 and worst[1] > 0.1
