"""Steering: a node is pushed, set or scaled while the model runs; or the stream is pushed along a direction.

    add      x + amount
    set_to   amount
    scale    amount * x             after AbsTopK, at all positions or at some
    push     x + direction          the whole stream at one residual site

A `with` block, like every intervention: never in place, nested blocks act from the outer to the inner one.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import Node, Place, check_nodes, flat, n_stream_sites, stream_hook

Amount = float | Float[Tensor, " batch"]
"""One number for all prompts, or one for each."""


@contextmanager
def steer(
    model: AnyModel,
    node: Node,
    *,
    add: Amount | None = None,
    set_to: Amount | None = None,
    scale: Amount | None = None,
    positions: Collection[int] | Int[Tensor, " batch"] | None = None,
) -> Iterator[AnyModel]:
    """Inside the block `node` is moved, in one of three ways; outside it the model is untouched.

        with si.steer(model, si.Node(1, "neuron", 17), add=2.0): logits = model(tokens)

    Args:
        model: the model, ours or a dense one of TransformerLens.
        node: what is moved.
        add: this much is added.
        set_to: the node has this value.
        scale: it is multiplied by this; 0 takes it out, -1 turns it over.
        positions: where: some positions, counted from the start for all prompts alike, or a tensor with one for every
            prompt (`batch.last`, say); None is everywhere.

    Raises:
        CircuitError: for a node that the model does not have; in the run, for positions or prompts that it has not.
        ConfigError: for none or several of `add`, `set_to` and `scale`, or a negative position.
    """
    ways = {"add": add, "set_to": set_to, "scale": scale}
    given = [(way, amount) for way, amount in ways.items() if amount is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{node} is moved in one way at a time: give one of add=, set_to= and scale=; got "
            f"{', '.join(way for way, _ in given) or 'none'}."
        )
    check_nodes([node], hooked(model).cfg)
    _refuse_negative(positions)
    (way, amount) = given[0]

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        channels = flat(activation).clone()
        before = channels[..., node.channel]
        by = _per_prompt(amount, before, hook)
        after = {"add": before + by, "set_to": by.expand_as(before), "scale": before * by}[way]
        channels[..., node.channel] = torch.where(_where(positions, before, hook), after, before)
        return channels.view_as(activation)

    with hooked(model).hooks(fwd_hooks=[(Place(node.layer, node.site).hook, hook)]):
        yield model


@contextmanager
def push(
    model: AnyModel,
    site: int,
    direction: Float[Tensor, " d_model"],
    *,
    positions: Collection[int] | Int[Tensor, " batch"] | None = None,
) -> Iterator[AnyModel]:
    """Inside the block `direction` is added to the stream at a residual site; outside it the model is untouched.

    Args:
        model: the model, ours or a dense one of TransformerLens.
        site: 0 before block 0, 2 l + 1 after attention of block l, 2 l + 2 after its MLP.
        direction: what is added.
        positions: where, as in `steer`.

    Raises:
        CircuitError: in the run, for positions or prompts that it has not.
        ConfigError: for a site or a width that the model has not, or a negative position.
    """
    cfg = hooked(model).cfg
    if not 0 <= site < n_stream_sites(cfg.n_layers) or len(direction) != cfg.d_model:
        raise ConfigError(
            f"site {site} is pushed along {len(direction)} channels, and {cfg.model_name!r} has residual sites 0 to "
            f"{2 * cfg.n_layers} of {cfg.d_model} channels."
        )
    _refuse_negative(positions)

    def hook(activation: Tensor, hook: HookPoint) -> Tensor:
        where = _where(positions, activation[..., 0], hook)[..., None]
        return torch.where(where, activation + direction.to(activation), activation)

    with hooked(model).hooks(fwd_hooks=[(stream_hook(site), hook)]):
        yield model


def _refuse_negative(positions: Collection[int] | Tensor | None) -> None:
    if positions is not None and not isinstance(positions, Tensor) and any(pos < 0 for pos in positions):
        raise ConfigError(
            f"positions={sorted(positions)}: they count from the start, where no padding is; for the end of each "
            "prompt pass a tensor, batch.last."
        )


def _per_prompt(
    amount: float | Tensor, like: Float[Tensor, "batch pos"], hook: HookPoint
) -> Float[Tensor, "prompts 1"]:
    values = torch.as_tensor(amount).to(like).reshape(-1, 1)
    if len(values) not in (1, len(like)):
        raise CircuitError(f"{hook.name}: {len(values)} amounts for {len(like)} prompts; give one, or one for each.")
    return values


def _where(
    positions: Collection[int] | Tensor | None, like: Float[Tensor, "batch pos"], hook: HookPoint
) -> Bool[Tensor, "#batch pos"]:
    n_prompts, n_pos = like.shape
    pos = torch.arange(n_pos, device=like.device)
    if positions is None:
        return torch.ones_like(pos, dtype=torch.bool)[None]
    chosen = torch.as_tensor(positions if isinstance(positions, Tensor) else list(positions), device=like.device)
    if isinstance(positions, Tensor) and len(chosen) != n_prompts:
        raise CircuitError(f"{hook.name}: {len(chosen)} positions for {n_prompts} prompts; a tensor has one for each.")
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < n_pos:
        raise CircuitError(f"{hook.name}: positions {chosen.tolist()}, and the run has 0 to {n_pos - 1}.")
    return pos == chosen[:, None] if isinstance(positions, Tensor) else torch.isin(pos, chosen)[None]
