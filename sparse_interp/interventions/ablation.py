"""Ablation: chosen nodes hold a baseline value, everything else is computed as ever.

    x_node  <-  baseline_node        at every position of every prompt, after AbsTopK

The baseline of choice is the node's mean over text (Gao et al. 2025, arXiv 2511.13653). An ablation is a `with` block:
it never writes into a tensor that the model still holds, it nests, and it ends when the block does.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import NODE_SITES, Node, NodeValues, Place, flat, masks, places, width
from sparse_interp.model.text import evaluating

Masks = Mapping[Place, Bool[Tensor, " width"]]
Values = NodeValues | Mapping[Place, Tensor]
"""What nodes are held at: [width] for constants, or what broadcasts to [batch pos width] for values of prompts."""

Shares = Mapping[Place, Tensor]
"""How much of each node is left, in [0, 1]; like values, or with a row per scheme."""

FwdHooks = list[tuple[str | Callable, Callable]]
"""What TransformerLens takes as `fwd_hooks`; its parameter is an invariant list of such pairs."""


@torch.no_grad()
def mean_activations(
    model: AnyModel,
    blocks: Int[Tensor, "block pos"],
    *,
    sites: Collection[str] = NODE_SITES,
    batch_size: int = 16,
    progress: bool = False,
) -> NodeValues:
    """The mean of every node at `sites` over all positions of `blocks`, in eval mode.

    Raises:
        CircuitError: if there are no blocks.
    """
    model = hooked(model)
    if len(blocks) == 0:
        raise CircuitError("means need at least one block of tokens, and there are none.")
    sums = dict.fromkeys(places(model.cfg, sites), 0.0)

    def add(place: Place) -> Callable:
        def hook(activation: Tensor, hook: HookPoint) -> None:
            sums[place] = sums[place] + flat(activation).double().sum((0, 1)).cpu()

        return hook

    fwd_hooks: FwdHooks = [(place.hook, add(place)) for place in sums]
    with evaluating(model), model.hooks(fwd_hooks=fwd_hooks):
        for batch in tqdm(blocks.split(batch_size), disable=not progress, desc="means", unit="batch"):
            model(batch.to(model.embed.W_E.device), return_type=None)
    n = blocks.numel()
    means = {place: (total / n).to(model.embed.W_E.dtype) for place, total in sums.items() if isinstance(total, Tensor)}
    return NodeValues(means, f"mean over {n} tokens of text")


def zero_values(model: AnyModel) -> NodeValues:
    """Zero for every node."""
    cfg, dtype = hooked(model).cfg, hooked(model).embed.W_E.dtype
    zeros = {place: torch.zeros(width(cfg, place.site), dtype=dtype) for place in places(cfg)}
    return NodeValues(zeros, "zero")


def partly(x: Tensor, baseline: Tensor, share: Tensor) -> Tensor:
    """`baseline + share (x - baseline)`: a node of which `share` is left, in [0, 1]; the one formula of ablation."""
    return baseline + share * (x - baseline)


def partial(m: Tensor, baseline: Tensor, r: Tensor | None = None) -> Callable:
    """A forward hook: value = baseline + (m + (1 - m) r) (x - baseline), with gradients in m, r and baseline.

    Each is [width], or broadcasts to [batch pos width]. m is the gate, 1 for a node that is kept; r in [0, 1] is how
    much of a node outside is left, None for nothing. Values of prompts are of the prompts and positions that are run.
    """
    share = m if r is None else m + (1 - m) * r

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        channels = flat(activation)
        return partly(channels, fitting(baseline, channels, hook), share).view_as(activation)

    return hook


def hold(kept: Bool[Tensor, " width"], values: Tensor, r: Tensor | None = None) -> Callable:
    """A forward hook under which channels outside `kept` hold `values`, or have a share `r` left; others are exact."""

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        channels = flat(activation)
        held = fitting(values.to(channels), channels, hook)
        if r is not None:
            held = partly(channels, held, r.to(channels))
        return torch.where(kept.to(channels.device), channels, held).view_as(activation)

    return hook


def fitting(values: Tensor, channels: Float[Tensor, "batch pos width"], hook: HookPoint) -> Tensor:
    """`values`, if they are constants or belong to as many prompts and positions as are run.

    Raises:
        CircuitError: if they belong to other prompts.
    """
    if values.ndim == 1 or all(a in (1, b) for a, b in zip(values.shape, channels.shape, strict=True)):
        return values
    raise CircuitError(
        f"{hook.name}: the values to hold are those of {values.shape[0]} prompts of {values.shape[1]} positions, and "
        f"the run has {channels.shape[0]} of {channels.shape[1]}; make them of the prompts that are run."
    )


def less(kept: Masks, nodes: Iterable[Node]) -> Masks:
    """`kept` without `nodes`; what was given stays as it is."""
    fewer = dict(kept)
    for node in nodes:
        place = Place(node.layer, node.site)
        fewer[place] = fewer[place].clone()
        fewer[place][node.channel] = False
    return fewer


def holding_hooks(kept: Masks, values: Values, shares: Shares | None = None) -> FwdHooks:
    """Forward hooks that hold every node outside `kept` at its value; places that keep everything get none.

    With `shares`, that much of such a node is left. Values and shares are [width], or broadcast to [batch pos width].
    """
    return [
        (place.hook, hold(mask, values[place], None if shares is None else shares[place]))
        for place, mask in kept.items()
        if not bool(mask.all())
    ]


def ascend(
    parts: Sequence[Callable[[Shares], Float[Tensor, " scheme"]]], start: Shares, *, n_steps: int, step_size: float
) -> tuple[dict[Place, Tensor], Float[Tensor, " scheme"]]:
    """Projected sign-gradient ascent on how much of each node is left: the worst shares on the way, and their loss.

        r  <-  clip(r + step_size sign(dloss/dr), 0, 1)

    Several schemes rise side by side, each by its own loss; of each the best iterate is kept, the start among them, so
    no loss is below that of the start (projected ascent: Madry et al. 2018, arXiv:1706.06083).

    Args:
        parts: the loss of every scheme is the sum of what these return for the shares; one after the other, so that
            prompts need not all be in memory.
        start: shares in [0, 1], [scheme ...]: one row per scheme.
        n_steps: how often the shares are moved.
        step_size: how far; n_steps * step_size bounds the way from the start.
    """
    shares = {place: r.detach() for place, r in start.items()}
    best, highest = shares, None
    for step in range(n_steps + 1):
        leaves = {place: r.clone().requires_grad_() for place, r in shares.items()}
        losses, grads = [], [torch.zeros_like(r) for r in leaves.values()]
        for part in parts:
            with torch.set_grad_enabled(step < n_steps):
                loss = part(leaves)
            losses.append(loss.detach())
            if step < n_steps:
                found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
                grads = [grad if more is None else grad + more for grad, more in zip(grads, found, strict=True)]
        total = torch.stack(losses).sum(0)
        if highest is None:
            highest = total
        else:
            higher = total > highest
            best = {place: _chosen(higher, shares[place], best[place]) for place in best}
            highest = torch.where(higher, total, highest)
        moves = zip(shares.items(), grads, strict=True)
        shares = {place: (r + step_size * grad.sign()).clamp(0, 1) for (place, r), grad in moves}
    assert highest is not None
    return dict(best), highest


def _chosen(where: Bool[Tensor, " scheme"], there: Tensor, elsewhere: Tensor) -> Tensor:
    """Row by row, one or the other."""
    return torch.where(where.view(-1, *[1] * (there.ndim - 1)), there, elsewhere)


@contextmanager
def ablate(model: AnyModel, nodes: Iterable[Node], values: NodeValues) -> Iterator[AnyModel]:
    """Inside the block `nodes` hold `values`; outside it the model is untouched.

    Raises:
        CircuitError: for a node that the model does not have, or values of another model.
    """
    nodes, cfg = list(nodes), hooked(model).cfg
    values.check(cfg, {node.site for node in nodes})
    kept = {place: ~mask for place, mask in masks(nodes, cfg).items()}
    with hooked(model).hooks(fwd_hooks=holding_hooks(kept, values)):
        yield model
