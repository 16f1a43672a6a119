"""Calibration: one scale on a circuit's logits, fitted once its size has been chosen, and reported beside it.

    logits  <-  s logits,   s the minimiser of  mean KL(model || softmax(s logits))              for `agreement`
                                                mean -ln sigmoid(s d)                            for `task_loss`
                                                mean (s d - d of the model)^2 / mean (d of it)^2 for `logit_difference`

Gao et al. 2025 (arXiv:2511.13653) fit a scale and a shift after discretisation; a shift of all logits does nothing
under a softmax, so one number is left. With d = logit[answer] - logit[foil] and x all logits, the losses are convex in
s; what their slopes (but for positive factors) have in common is at most one root, which bisection finds in float64:

    mean E_softmax(s x)[x] - E_model[x]          - mean d sigmoid(-s d)          mean d (s d - d of the model)

A circuit that is the model itself has s = 1, but for the task loss, which may fall for ever as s grows (every prompt
right); s is then the end of its range. No search, size or verdict looks at a calibrated number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch, kl_divergence, logit_difference

SCALES = (0.0, 100.0)
"""Where a scale is looked for."""

N_HALVINGS = 60
"""Steps of the bisection; more would not change a float64."""


Loss = Callable[[float], Float[Tensor, " batch"]]
"""A scale -> one number per prompt."""


@dataclass(frozen=True)
class Calibration:
    """A scale for a circuit's logits, with the loss that it was fitted to."""

    scale: float
    """What the logits are multiplied by, at least 0."""

    loss: float
    """The mean loss with the scale, nats (of `logit_difference` a share)."""

    loss_without: float
    """The mean loss without it."""

    objective: str
    """Which loss, as `PruneConfig.objective` names it."""

    def apply(self, logits: Float[Tensor, "*axes d_vocab"]) -> Float[Tensor, "*axes d_vocab"]:
        """The calibrated logits; what was given stays as it is."""
        return self.scale * logits


def calibrate(model: AnyModel, circuit: Circuit, pairs: TaskBatch) -> Calibration:
    """Fit the scale of `circuit` on both sides of `pairs`, to the objective that the circuit was searched with.

    Fit on pairs of the training split and measure on others: a scale is a parameter like any other.

    Raises:
        CircuitError: if the circuit belongs to other weights.
    """
    model = hooked(model)
    batch = pairs.both_sides().to(model.embed.W_E.device)
    with evaluating(model):
        reference = all_answer_logits(model, batch)
        with circuit.running(model):
            logits = all_answer_logits(model, batch)
    return fit_scale(logits, reference, batch, "agreement" if circuit.prune is None else circuit.prune.objective)


def fit_scale(logits: AnswerLogits, reference: AnswerLogits, batch: TaskBatch, objective: str) -> Calibration:
    """The scale at which `logits` have the least loss; `reference` are the model's.

    Raises:
        CircuitError: if there are no prompts, or a logit is not finite.
    """
    if len(batch) == 0 or not bool(torch.isfinite(logits).all()):
        raise CircuitError(f"a scale is fitted to finite logits of at least one prompt; got {len(batch)} prompts.")
    x, wanted = logits.double(), reference.double()
    d, d_wanted = logit_difference(x, batch), logit_difference(wanted, batch)
    expected = (wanted.softmax(-1) * x).sum(-1)
    slopes: dict[str, Loss] = {
        "agreement": lambda s: ((s * x).softmax(-1) * x).sum(-1) - expected,
        "task_loss": lambda s: -d * torch.sigmoid(-s * d),
        "logit_difference": lambda s: d * (s * d - d_wanted),
    }
    losses: dict[str, Loss] = {
        "agreement": lambda s: kl_divergence(wanted, s * x, batch),
        "task_loss": lambda s: softplus(-s * d),
        "logit_difference": lambda s: (s * d - d_wanted).square() / d_wanted.square().mean(),
    }
    scale = _root(lambda s: slopes[objective](s).mean().item())
    without, least = (losses[objective](s).mean().item() for s in (1.0, scale))
    return Calibration(scale, least, without, objective)


def _root(slope: Callable[[float], float]) -> float:
    """Where a rising function passes 0, or the end of `SCALES` that is nearest to that."""
    low, high = SCALES
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
