"""One scale for a circuit's logits: what it is fitted to, and that nothing else hangs on it."""

import pytest
import torch

from sparse_interp.circuit.calibration import SCALES, calibrate, fit_scale
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.model.dense import hooked
from sparse_interp.tasks.task import answer_loss, kl_divergence, logit_difference


@pytest.fixture
def noisy(truth, generator):
    """Prompts, and random logits that know the answer a little: a teacher, and a student that is too sure of itself."""
    batch = truth.task.batch(24, generator=generator).both_sides()
    teacher = torch.randn(len(batch), truth.model.cfg.d_vocab, generator=generator)
    teacher[torch.arange(len(batch)), batch.answer] += 1
    return batch, teacher, 3 * teacher + torch.randn(teacher.shape, generator=generator)


def on_a_grid(loss):
    scales = torch.linspace(0, 4, 4001, dtype=torch.float64)
    losses = torch.stack([loss(s) for s in scales])
    return scales[losses.argmin()].item(), losses.min().item()


def test_the_scale_is_where_a_search_over_scales_finds_the_least_loss(noisy):
    batch, teacher, logits = noisy
    d, d_teacher = logit_difference(logits.double(), batch), logit_difference(teacher.double(), batch)
    losses = {
        "agreement": lambda s: kl_divergence(teacher.double(), s * logits.double(), batch).mean(),
        "task_loss": lambda s: answer_loss(s * logits.double(), batch).mean(),
        "logit_difference": lambda s: ((s * d - d_teacher) ** 2).sum() / (d_teacher**2).sum(),
    }
    for objective, loss in losses.items():
        found = fit_scale(logits, teacher, batch, objective)
        scale, least = on_a_grid(loss)
        assert found.scale == pytest.approx(scale, abs=1e-3) and found.objective == objective
        assert found.loss == pytest.approx(least, abs=1e-5) and found.loss <= least
        assert found.loss_without == pytest.approx(loss(1.0).item()) and found.loss < found.loss_without - 0.01


def test_the_model_itself_needs_no_scale_and_one_that_was_turned_up_is_turned_down(noisy):
    batch, teacher, _ = noisy
    for objective in ("agreement", "logit_difference"):
        itself = fit_scale(teacher, teacher, batch, objective)
        assert itself.scale == pytest.approx(1, abs=1e-9) and abs(itself.loss) < 1e-9
        louder = fit_scale(2.5 * teacher, teacher, batch, objective)
        assert louder.scale == pytest.approx(0.4, abs=1e-6) and louder.loss < 1e-9 < louder.loss_without


def test_a_loss_that_falls_for_ever_ends_with_the_range(noisy):
    batch, teacher, _ = noisy
    sure = torch.zeros_like(teacher)
    sure[torch.arange(len(batch)), batch.answer] = 1
    assert fit_scale(sure, teacher, batch, "task_loss").scale == SCALES[1]
    assert fit_scale(-sure, teacher, batch, "task_loss").scale == SCALES[0]


def test_the_circuit_of_all_nodes_has_scale_one_in_ours_and_in_a_bridge(truth, dense_truth, zero, generator):
    batch = truth.task.batch(16, generator=generator)
    for model in dense_truth:
        everything = Circuit.of_nodes(model, all_nodes(dense_truth[0].cfg), zero(model))
        assert calibrate(model, everything, batch).scale == pytest.approx(1, abs=1e-6)
        part = Circuit.of_nodes(model, sorted(truth.nodes)[:-1], zero(model))
        found = calibrate(model, part, batch)
        both = batch.both_sides()
        with part.running(model):
            logits = all_answer_logits(hooked(model), both)
        scaled = kl_divergence(all_answer_logits(hooked(model), both), found.apply(logits), both).mean().item()
        assert scaled == pytest.approx(found.loss, abs=1e-5) and found.loss < found.loss_without


def test_prompts_without_finite_logits_have_no_scale(noisy):
    batch, teacher, logits = noisy
    logits[0, 0] = torch.inf
    with pytest.raises(CircuitError, match="finite logits of at least one prompt"):
        fit_scale(logits, teacher, batch, "agreement")
