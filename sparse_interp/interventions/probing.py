"""Subnetwork probing: gates that stand anywhere between open and shut while they are learned.

    s = sigmoid((ln u - ln(1 - u) + a) / beta)                      u uniform in (0, 1), one draw per step and gate
    m = clip(gamma + (zeta - gamma) s, 0, 1)                        exactly 0 or 1 with some probability
    x_node  <-  b + m (x_node - b)                                  after AbsTopK; b the node's baseline
    loss    =   KL(model || gated model) + price * sum over gates of P(m > 0)

with P(m > 0) = sigmoid(a - beta ln(-gamma / zeta)). Hard-concrete gates, with their beta, gamma and zeta: Louizos et
al. 2018 (arXiv:1712.01312); as a way to circuits: Cao et al. 2021 (arXiv:2104.03514); with the divergence from the
model as the loss: Conmy et al. 2023 (arXiv:2304.14997). Unlike the gates of pruning.py these have gradients of their
own, and a model that is half ablated everywhere may do what no circuit does.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.errors import ConfigError
from sparse_interp.interventions.ablation import partial
from sparse_interp.interventions.answers import all_answer_logits, answer_logits, frozen
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import NODE_SITES, NodeValues, Place, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import TaskBatch, kl_divergence

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

OPEN_AT_FIRST = 0.9
"""P(m > 0) where gates start."""


def hard_concrete(a: Float[Tensor, " gate"], u: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """The gate m of parameters `a` for the draws `u`."""
    s = torch.sigmoid((u.log() - (1 - u).log() + a) / BETA)
    return (GAMMA + (ZETA - GAMMA) * s).clamp(0, 1)


def open_probability(a: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """P(m > 0) of parameters `a`."""
    return torch.sigmoid(a - BETA * math.log(-GAMMA / ZETA))


def probe_nodes(
    model: AnyModel,
    pairs: TaskBatch,
    baseline: NodeValues,
    *,
    price: float,
    n_steps: int = 150,
    batch_size: int = 16,
    lr: float = 0.1,
    generator: torch.Generator,
) -> NodeValues:
    """Learn a hard-concrete gate for every node of `model`; gives P(m > 0), the more the more needed.

    Args:
        model: ours, or a dense one of TransformerLens.
        pairs: training pairs; both prompts of each are used.
        baseline: what nodes hold as far as their gates are shut.
        price: of one gate that is open for sure, nats.
        n_steps: steps of Adam.
        batch_size: pairs per step.
        lr: Adam's learning rate, falling linearly to 0.
        generator: draws pairs and gates.

    Raises:
        ConfigError: unless there is at least one step, and a price of at least 0.
        CircuitError: if `baseline` does not fit the model.
    """
    if n_steps < 1 or price < 0:
        raise ConfigError(f"n_steps={n_steps}, price={price}: expected at least 1 step, and a price of at least 0.")
    model = hooked(model)
    baseline.check(model.cfg)
    values, batch = baseline.to(model.embed.W_E), pairs.both_sides().to(model.embed.W_E.device)
    sizes = {place: width(model.cfg, place.site) for place in places(model.cfg, NODE_SITES)}
    start = math.log(OPEN_AT_FIRST / (1 - OPEN_AT_FIRST)) + BETA * math.log(-GAMMA / ZETA)
    a = torch.full((sum(sizes.values()),), start).to(model.embed.W_E).requires_grad_()
    optimizer = torch.optim.Adam([a], lr=lr)
    with evaluating(model), frozen(model):
        reference = all_answer_logits(model, batch)
        for step in range(n_steps):
            rows = torch.randperm(len(pairs), generator=generator)[:batch_size]
            rows = torch.cat([rows, rows + len(pairs)])
            u = torch.rand(len(a), generator=generator).clamp(1e-6, 1 - 1e-6).to(a)
            m = dict(zip(sizes, hard_concrete(a, u).split(list(sizes.values())), strict=True))
            here = batch.rows(rows)
            with model.hooks(fwd_hooks=[(place.hook, partial(m[place], values[place])) for place in sizes]):
                kl = kl_divergence(reference[rows], answer_logits(model, here), here).mean()
            (a.grad,) = torch.autograd.grad(kl + price * open_probability(a).sum(), [a])
            optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
            optimizer.step()
    found: dict[Place, Tensor] = dict(zip(sizes, open_probability(a.detach()).split(list(sizes.values())), strict=True))
    return NodeValues(found, f"hard-concrete gates at a price of {price:g} nats")
