"""Training a bridge lowers what it says, at a cost that is sampled without bias, and continues bit for bit."""

import json
from dataclasses import replace

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge, nmse
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.hybrid import hybrid_logits, token_kl
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.bridges.training import BRIDGE, PAIR_LOSSES, BridgeTrainer, Deck, bridge_steps, train_bridges
from sparse_interp.errors import BridgeError, CheckpointError
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.transformer import load
from sparse_interp.training.checkpoints import METRICS
from sparse_interp.training.loop import MODEL, NonFiniteLossError
from sparse_interp.training.recipes import RunConfig
from sparse_interp.training.sparsity import sparsity_report

SIX = BridgeConfig(n_steps=6, batch_size=4, validate_every=3, checkpoint_every=2)


@pytest.fixture
def blocks():
    """Forty blocks of nine tokens."""
    return torch.randint(50, (40, 9), generator=torch.Generator().manual_seed(4))


def scratch_run(sparse) -> RunConfig:
    return RunConfig(name="scratch", model=sparse.cfg, n_tokens=10**6, lr=3e-3)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_the_recorded_losses_are_those_of_streams_and_hybrid_passes(sparse, dense, blocks):
    trainer = BridgeTrainer(sparse, dense, blocks, replace(SIX, entries_per_step=None), validation=blocks[:8])
    trainer.step()
    bridge, tokens, measured = trainer.bridge, blocks[:8], trainer.measure()
    with torch.no_grad():
        for pair in bridge.pairs:
            streams = sparse.between(tokens, leave=pair.sparse), dense.between(tokens, leave=pair.dense)
            assert measured["encode"][str(pair)] == pytest.approx(
                float(nmse(bridge.encode(streams[1], pair), streams[0]))
            )
            assert measured["decode"][str(pair)] == pytest.approx(
                float(nmse(bridge.decode(streams[0], pair), streams[1]))
            )
            for start, entered in (("dense", "sparse"), ("sparse", "dense")):
                logits = hybrid_logits(sparse, dense, bridge, tokens, start=start, switches=[pair])
                expected = float(token_kl(dense(tokens), logits).mean())
                assert measured[f"enter_{entered}"][str(pair)] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_sum_has_the_coefficients_and_stands_for_all_pairs(sparse, dense, blocks):
    config = replace(
        SIX, entries_per_step=2, encode_coef=2.0, decode_coef=0.5, enter_sparse_coef=3.0, interchange_coef=4.0
    )
    record = BridgeTrainer(sparse, dense, blocks, config).step()
    assert len(record.encode) == 5 and len(record.enter_sparse) == len(record.interchange) == 2
    sums = {name: sum(getattr(record, name).values()) for name in PAIR_LOSSES}
    entered = 3 * sums["enter_sparse"] + sums["enter_dense"] + 4 * sums["interchange"]
    expected = 2 * sums["encode"] + 0.5 * sums["decode"] + 5 / 2 * entered
    assert record.loss == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_does_not_count_is_not_taken(sparse, dense, blocks):
    record = BridgeTrainer(sparse, dense, blocks, replace(SIX, enter_dense_coef=0.0, interchange_coef=0.0)).step()
    assert record.enter_dense == record.interchange == {} and len(record.enter_sparse) == 2
    assert record.next_token is record.distillation is record.density is None


def test_training_begins_with_the_least_squares_of_the_text(sparse, dense, blocks):
    trainer = BridgeTrainer(sparse, dense, blocks, SIX)
    trainer._fit()
    by_hand, pair = Bridge.between(sparse, dense, SIX), SitePair(3, 3)
    with torch.no_grad():
        by_hand.fit_(pair, sparse.between(blocks, leave=3), dense.between(blocks, leave=3))
    torch.testing.assert_close(trainer.bridge[pair].W_encode, by_hand[pair].W_encode, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(trainer.bridge[pair].W_decode, by_hand[pair].W_decode, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("encoder", ["abs_topk", "threshold"])
def test_training_lowers_what_it_minimises_beyond_the_least_squares(sparse, dense, blocks, encoder):
    config = replace(SIX, n_steps=25, lr=1e-2, afrac=0.5, encoder=encoder, validate_every=25)
    trainer = BridgeTrainer(sparse, dense, blocks, config, validation=blocks[:16])
    while trainer.step_done < 25:
        last = trainer.step().validation
    first = trainer.began_at
    for name in ("enter_sparse", "enter_dense", "interchange"):
        assert sum(last[name].values()) < 0.98 * sum(first[name].values())


def test_the_bridge_of_a_rotated_twin_is_found_by_its_least_squares_and_kept_by_its_steps(generator):
    sparse = rotatable_model(generator=generator, n_layers=1, d_model=16, n_heads=2, d_mlp=32, d_vocab=40)
    twin = rotated_twin(sparse, generator=generator)
    text = torch.randint(40, (80, 12), generator=generator)
    config = BridgeConfig(afrac=1.0, n_steps=30, batch_size=8, validate_every=10, entries_per_step=1)
    bridge = train_bridges(sparse, twin.dense, text[16:], config, validation=text[:16], progress=False)
    with torch.no_grad():
        for pair in bridge.pairs:
            ours, theirs = sparse.between(text, leave=pair.sparse), twin.dense.between(text, leave=pair.dense)
            assert float(nmse(bridge.encode(theirs, pair), ours)) < 1e-9
            assert float(nmse(bridge.decode(ours, pair), theirs)) < 1e-9


def test_what_comes_out_is_the_best_that_was_measured_the_start_among_them(sparse, dense, blocks, tmp_path):
    begun = BridgeTrainer(sparse, dense, blocks, SIX)
    with begun._working():
        begun._fit()
    settings = {"validation": blocks[:16], "progress": False}
    ruined = train_bridges(sparse, dense, blocks, replace(SIX, lr=10.0), **settings)
    assert same(weights(begun.bridge), weights(ruined))
    learning = replace(SIX, lr=1e-2, n_steps=15, validate_every=5)
    better = train_bridges(sparse, dense, blocks, learning, folder=tmp_path, **settings)
    card = json.loads((tmp_path / BRIDGE / "card.json").read_text())
    assert not same(weights(begun.bridge), weights(better)) and card["held_out"]["chosen_step"] > 0
    table, start = card["held_out_by_pair"], card["held_out_by_pair_at_the_start"]
    assert sum(sum(row.values()) for row in table.values()) < sum(sum(row.values()) for row in start.values())
    last = train_bridges(sparse, dense, blocks, replace(SIX, lr=10.0), progress=False)
    assert not same(weights(begun.bridge), weights(last))  # without held-out blocks there is nothing to choose by


def test_the_models_of_a_bridge_trained_alone_stay_as_they_are(sparse, dense, blocks):
    before = weights(sparse), weights(dense)
    bridge = train_bridges(sparse, dense, blocks, SIX, progress=False)
    assert same(before[0], weights(sparse)) and same(before[1], weights(dense))
    assert not sparse.training and not dense.training
    assert all(p.requires_grad for name, p in sparse.named_parameters()) and all(
        p.grad is None for p in dense.parameters()
    )
    bridge.check(sparse, dense, weights=True)


def test_a_sparse_model_is_trained_with_its_bridge_by_the_ordinary_schedule(make_model, dense, blocks):
    sparse = make_model(model_name="scratch", density=0.3)
    config = replace(SIX, n_steps=20, batch_size=8, validate_every=20)
    records = list(bridge_steps(sparse, dense, blocks, config, run=scratch_run(sparse), progress=False))
    assert records[0].density == 1 and records[-1].density == pytest.approx(0.3)
    assert all(row.nonzero == round(0.3 * row.size) for row in sparsity_report(sparse))
    assert records[-1].distillation < records[0].distillation
    assert records[-1].next_token < records[0].next_token
    assert records[5].sparse_grad_rms > 0


@pytest.mark.parametrize("jointly", [False, True], ids=["alone", "jointly"])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(make_model, dense, blocks, tmp_path, jointly):
    ends = {}
    for way in ("whole", "cut"):
        out, settings = tmp_path / way, {"validation": blocks[:8], "progress": False}
        sparse = make_model(model_name="scratch", density=0.3)
        settings |= {"run": scratch_run(sparse) if jointly else None, "folder": out}
        if way == "cut":
            steps = bridge_steps(sparse, dense, blocks, SIX, **settings)
            for _ in range(3):
                next(steps)
            steps.close()
            sparse = make_model(model_name="scratch", density=0.3)
            settings["resume"] = True
        bridge = train_bridges(sparse, dense, blocks, SIX, **settings)
        ends[way] = weights(bridge), weights(sparse), (out / METRICS).read_text()
    assert same(ends["whole"][0], ends["cut"][0]) and same(ends["whole"][1], ends["cut"][1])
    assert ends["whole"][2] == ends["cut"][2]
    records = [json.loads(line) for line in ends["cut"][2].splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert records[2]["validation"]["encode"].keys() == {"0-0", "1-1", "2-2", "3-3", "4-4"}
    kept = load(tmp_path / "cut" / MODEL) if jointly else sparse
    Bridge.load(tmp_path / "cut" / BRIDGE, kept, dense)
    assert weights_sha256(kept) == Bridge.load(tmp_path / "cut" / BRIDGE).sparse.weights_sha256


def test_an_interrupt_in_the_middle_of_a_step_saves_the_step_before(sparse, dense, blocks, tmp_path, monkeypatch):
    whole = train_bridges(sparse, dense, blocks, SIX, progress=False)
    losses = BridgeTrainer._losses

    def interrupted(self, *given):
        if self.step_done == 3:
            raise KeyboardInterrupt
        return losses(self, *given)

    monkeypatch.setattr(BridgeTrainer, "_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_bridges(sparse, dense, blocks, SIX, folder=tmp_path, progress=False)
    monkeypatch.undo()
    assert len((tmp_path / METRICS).read_text().splitlines()) == 3
    resumed = train_bridges(sparse, dense, blocks, SIX, folder=tmp_path, resume=True, progress=False)
    assert same(weights(whole), weights(resumed))


def test_a_run_is_not_continued_as_another(sparse, dense, blocks, tmp_path):
    steps = bridge_steps(sparse, dense, blocks, SIX, folder=tmp_path, progress=False)
    next(steps)
    steps.close()
    with pytest.raises(CheckpointError, match="already holds a run"):
        train_bridges(sparse, dense, blocks, SIX, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"config.lr: 0.002, not 0.1"):
        train_bridges(sparse, dense, blocks, replace(SIX, lr=0.1), folder=tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="blocks: "):
        train_bridges(sparse, dense, blocks[1:], SIX, folder=tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="holds no run"):
        train_bridges(sparse, dense, blocks, SIX, folder=tmp_path / "new", resume=True, progress=False)


def test_all_pairs_have_their_turn_and_none_twice_in_a_step(generator):
    deck = Deck(5, generator)
    drawn = [deck.draw(2).tolist() for _ in range(500)]
    assert all(len({*pair}) == 2 for pair in drawn)
    dealt = [number for pair in drawn for number in pair]
    assert all(dealt.count(number) == pytest.approx(200, abs=4) for number in range(5))
    assert sorted(Deck(3, generator).draw(6).tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_expected_gradient_of_few_entries_is_that_of_all(sparse, dense, blocks):
    """Every pair alone, at five times its weight, has on average the gradient of all pairs."""
    trainer = BridgeTrainer(sparse, dense, blocks, replace(SIX, entries_per_step=None))
    trainer.step()

    def gradient(entered):
        trainer.bridge.zero_grad()
        trainer._losses(blocks[:4], entered, torch.Generator().manual_seed(0)).total(trainer.config, 5).backward()
        return torch.cat([p.grad.flatten() for p in trainer.bridge.parameters()])

    pairs = list(trainer.bridge.pairs)
    alone = torch.stack([gradient([pair]) for pair in pairs]).mean(0)
    torch.testing.assert_close(alone, gradient(pairs), atol=1e-5, rtol=1e-3)


def test_what_is_decoded_teaches_the_sparse_model_and_what_is_encoded_does_not(make_model, dense, blocks):
    sparse = make_model(model_name="scratch", density=0.3)
    trainer = BridgeTrainer(sparse, dense, blocks, SIX, run=scratch_run(sparse))
    with trainer._working():
        trainer._fit()
        losses = trainer._losses(blocks[:4], [], torch.Generator())
        for name, taught in (("encode", False), ("decode", True)):
            sparse.zero_grad()
            losses.by_pair[name][SitePair(4, 4)].backward(retain_graph=True)
            moved = sum(float(p.grad.abs().sum()) for p in sparse.parameters() if p.grad is not None)
            assert (moved > 0) is taught


def test_a_transformer_lens_model_may_be_the_dense_one(make_bridge, sparse, blocks):
    theirs, _ = make_bridge()
    records = list(bridge_steps(sparse, theirs, blocks, SIX, progress=False))
    assert records[-1].step == 6
    assert all(0 <= loss < 10 for record in records for loss in record.enter_dense.values())


def test_text_that_a_model_cannot_read_is_refused_before_any_work(sparse, dense, blocks):
    with pytest.raises(BridgeError, match=r"blocks has shape \[2, 20\]; blocks of 2 to 16 tokens"):
        BridgeTrainer(sparse, dense, torch.zeros(2, 20, dtype=torch.long), SIX)
    with pytest.raises(BridgeError, match="validation has token ids 50 to 98; the models know 0 to 49"):
        BridgeTrainer(sparse, dense, blocks, SIX, validation=torch.arange(50, 99).view(7, 7))


def test_a_run_of_another_model_is_refused(sparse, dense, make_model, blocks):
    with pytest.raises(BridgeError, match="density: 0.3, not 1.0"):
        BridgeTrainer(sparse, dense, blocks, SIX, run=scratch_run(make_model(model_name="sparse", density=0.3)))


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(sparse, dense, blocks):
    trainer = BridgeTrainer(sparse, dense, blocks, SIX)
    trainer.step()
    with torch.no_grad():
        trainer.bridge[SitePair(0, 0)].b_encode[0] = torch.inf
    before = weights(trainer.bridge)
    with pytest.raises(NonFiniteLossError, match="at step 2 of 6"):
        trainer.step()
    assert same(before, weights(trainer.bridge))
