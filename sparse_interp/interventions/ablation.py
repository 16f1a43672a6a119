"""Ablation: chosen nodes hold a baseline value, everything else is computed as ever.

    x_node  <-  baseline_node        at every position of every prompt, after AbsTopK

The baseline of choice is the node's mean over text (Gao et al. 2025, arXiv 2511.13653). An ablation is a `with` block:
it never writes into a tensor that the model still holds, it nests, and it ends when the block does.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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


def hold(kept: Bool[Tensor, " width"], values: Float[Tensor, " width"]) -> Callable:
    """A forward hook under which channels outside `kept` hold `values`."""

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        channels = flat(activation)
        return torch.where(kept.to(channels.device), channels, values.to(channels)).view_as(activation)

    return hook


def less(kept: Masks, nodes: Iterable[Node]) -> Masks:
    """`kept` without `nodes`; what was given stays as it is."""
    fewer = dict(kept)
    for node in nodes:
        place = Place(node.layer, node.site)
        fewer[place] = fewer[place].clone()
        fewer[place][node.channel] = False
    return fewer


def holding_hooks(kept: Masks, values: NodeValues) -> FwdHooks:
    """Forward hooks that hold every node outside `kept` at its value; places that keep everything get none."""
    return [(place.hook, hold(mask, values[place])) for place, mask in kept.items() if not bool(mask.all())]


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
