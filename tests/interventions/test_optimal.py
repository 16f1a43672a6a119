"""Learned constants: the ones that are known to be best, and never worse than where they started."""

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import Ablation
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import task_means, zero_values
from sparse_interp.interventions.optimal import learn_baseline
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Place, places, width
from sparse_interp.tasks.task import kl_divergence


def seeded():
    return torch.Generator().manual_seed(0)


def squared(reference, logits, batch):
    return (logits - reference).square().sum(-1)


def test_constants_of_the_last_read_that_least_squares_would_choose_are_found(make_model, pairs):
    """Logits are linear in the last read: the best constant is the mean of the reads at the answers."""
    model = make_model(bigram=False, afrac=None)
    place = Place(2, "final_read")
    kept = {p: torch.full((width(model.cfg, p.site),), p != place) for p in places(model.cfg)}
    options = {"held_out": pairs, "loss": squared, "generator": seeded(), "progress": False}
    found = learn_baseline(model, kept, pairs, zero_values(model), n_steps=150, lr=0.1, **options)
    with torch.no_grad():
        both = pairs.both_sides()
        reads = model.run_with_cache(both.clean)[1][place.hook][torch.arange(6), both.last]
    torch.testing.assert_close(found.baseline[place], reads.mean(0), atol=2e-2, rtol=0)
    assert found.frame.loss_nats.iloc[-1] < 0.2 * found.frame.loss_nats.iloc[0]
    others = [p for p in places(model.cfg) if p != place]
    assert all(torch.equal(found.baseline[p], torch.zeros_like(found.baseline[p])) for p in others)


def test_they_cost_less_than_the_mean_and_the_table_says_what_they_cost_on_other_prompts(any_kind, pairs):
    cfg, generator = hooked(any_kind).cfg, seeded()
    kept = {place: torch.rand(width(cfg, place.site), generator=generator) < 0.5 for place in places(cfg)}
    start, weights = task_means(any_kind, pairs), [p.clone() for p in any_kind.parameters()]
    train, held_out = pairs.rows(slice(2)), pairs.rows(slice(2, 3))
    options = {"held_out": held_out, "generator": seeded(), "progress": False}
    found = learn_baseline(any_kind, kept, train, start, n_steps=10, **options)
    for split, batch in (("train", train.both_sides()), ("held out", held_out.both_sides())):
        rows = found.frame[found.frame.split == split]
        for values, row in ((start, rows.iloc[0]), (found.baseline, rows[rows.chosen].iloc[0])):
            logits = Ablation.full(values).answer_logits(any_kind, kept, batch)[0]
            expected = kl_divergence(all_answer_logits(hooked(any_kind), batch), logits, batch).mean().item()
            assert row.loss_nats == pytest.approx(expected, rel=1e-4)
    trained = found.frame[found.frame.split == "train"]
    assert trained[trained.chosen].loss_nats.item() == trained.loss_nats.min() < trained.loss_nats.iloc[0]
    assert all(torch.equal(p, before) for p, before in zip(any_kind.parameters(), weights, strict=True))
    assert found.baseline.kind.startswith("optimal from mean over 6 prompts")
    for place, mask in kept.items():
        same = found.baseline[place] == start[place]
        assert same[mask].all()


def test_refusals(plain_model, pairs):
    kept = {
        place: torch.zeros(width(plain_model.cfg, place.site), dtype=torch.bool) for place in places(plain_model.cfg)
    }
    with pytest.raises(ConfigError, match="0 held out"):
        learn_baseline(
            plain_model, kept, pairs, zero_values(plain_model), held_out=pairs.rows(slice(0)), generator=seeded()
        )
