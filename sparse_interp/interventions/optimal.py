"""Optimal ablation: the constants that make an ablation cost least.

    b*  =  argmin_b  E loss(model with every node outside the circuit held at b)

so that only missing information is charged, and not that a mean is a value which the model never sees (Li & Janson
2024, arXiv:2409.09951, equation 2). Nodes that are kept compute as ever. The search starts at another baseline, the
mean say. It loosens the test that an adversarial ablation tightens: the two bracket the truth. Constants are fitted to
prompts, so what they are worth on others is reported beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import Ablation, Loss, Masks, holding_hooks
from sparse_interp.interventions.answers import all_answer_logits, answer_logits, frozen
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, lines
from sparse_interp.tasks.task import TaskBatch, kl_divergence

MEASURED_TIMES = 10
"""How often the loss over all prompts is measured on the way, apart from the start."""


@dataclass(frozen=True, eq=False)
class LearnedBaseline(Table):
    """How the loss fell: one row per `step` and `split` (`train`, `held out`), with the mean `loss_nats` over prompts.

    The constants are those of the step with the least loss on the training prompts, `chosen`.
    """

    columns: ClassVar[tuple[str, ...]] = ("step", "split", "loss_nats", "chosen")

    baseline: NodeValues
    """The constants; nodes that were kept have those of the start."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss by step, on both splits."""
        return lines(self.frame, x="step", y="loss_nats", by="split", ax=ax)


def learn_baseline(
    model: AnyModel,
    kept: Masks,
    pairs: TaskBatch,
    start: NodeValues,
    *,
    held_out: TaskBatch,
    loss: Loss = kl_divergence,
    n_steps: int = 300,
    batch_size: int = 32,
    lr: float = 0.02,
    generator: torch.Generator,
    progress: bool = True,
) -> LearnedBaseline:
    """Learn what nodes outside `kept` are best held at, by gradient, on both prompts of every pair.

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode and stays as it is.
        kept: which channels of each place compute as ever: `circuit.kept`, say.
        pairs: what the constants are fitted to.
        start: where they start.
        held_out: other pairs, on which the loss is measured too and nothing is chosen.
        loss: what they make small: KL(model || ablated) at the answer position unless told otherwise, nats.
        n_steps: steps of Adam.
        batch_size: pairs per step.
        lr: its learning rate, in units of the activations, falling linearly to 0.
        generator: draws batches.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if `start` does not fit the model.
        ConfigError: for numbers of steps or pairs below 1, or a learning rate of 0 or less.
    """
    if n_steps < 1 or batch_size < 1 or lr <= 0 or not len(pairs) or not len(held_out):
        raise ConfigError(
            f"n_steps={n_steps}, batch_size={batch_size}, lr={lr}, {len(pairs)} pairs and {len(held_out)} held out: "
            "expected at least one step and pair of each kind, and a learning rate above 0."
        )
    model = hooked(model)
    start.check(model.cfg, {place.site for place in kept})
    here = {"train": pairs.both_sides(), "held out": held_out.both_sides()}
    here = {split: batch.to(model.embed.W_E.device) for split, batch in here.items()}
    like = model.embed.W_E
    constants = {place: start[place].to(like).clone() for place, mask in kept.items() if not bool(mask.all())}
    leaves = [values.requires_grad_() for values in constants.values()]
    optimizer = torch.optim.Adam(leaves, lr=lr) if leaves else None
    rows, best, kind = [], (float("inf"), 0, start), f"optimal from {start.kind}"
    with evaluating(model), frozen(model):
        references = {split: all_answer_logits(model, batch) for split, batch in here.items()}
        steps = tqdm(range(n_steps + 1), disable=not progress, desc="optimal ablation", unit="step")
        for step, drawn in zip(steps, _draws(len(pairs), batch_size, generator), strict=False):
            if step % max(1, n_steps // MEASURED_TIMES) == 0 or step == n_steps:
                now = NodeValues({**start.values, **{p: v.detach().clone() for p, v in constants.items()}}, kind)
                costs = {split: _cost(model, kept, now, here[split], references[split], loss) for split in here}
                rows += [(step, split, cost) for split, cost in costs.items()]
                best = min(best, (costs["train"], step, now), key=lambda found: found[0])
                steps.set_postfix_str(f"train {costs['train']:.3f}, held out {costs['held out']:.3f} nats")
            if step == n_steps or optimizer is None:
                continue
            batch = here["train"].rows(drawn.to(like.device))
            with model.hooks(fwd_hooks=holding_hooks(kept, {**start.to(like).values, **constants})):
                cost = loss(references["train"][drawn.to(like.device)], answer_logits(model, batch), batch).mean()
            found = torch.autograd.grad(cost, leaves, allow_unused=True)
            for leaf, grad in zip(leaves, found, strict=True):
                leaf.grad = grad
            optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
            optimizer.step()
    frame = pd.DataFrame(rows, columns=["step", "split", "loss_nats"])
    return LearnedBaseline(frame.assign(chosen=frame.step == best[1]), best[2])


def _draws(n_pairs: int, batch_size: int, generator: torch.Generator) -> Iterator[Int[Tensor, " row"]]:
    """Rows of both prompts of random pairs, epoch after epoch."""
    while True:
        for pairs in torch.randperm(n_pairs, generator=generator, device=generator.device).cpu().split(batch_size):
            yield torch.cat([pairs, pairs + n_pairs])


def _cost(
    model: HookedModel, kept: Masks, values: NodeValues, batch: TaskBatch, reference: Tensor, loss: Loss
) -> float:
    return loss(reference, Ablation.full(values).answer_logits(model, kept, batch)[0], batch).double().mean().item()
