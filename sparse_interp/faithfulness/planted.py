"""Planted circuits: a model whose circuit is known, hidden in a larger one of random sparse weights.

    stream of the host  =  the model's own channels, in drawn places  |  free channels
    free heads, neurons:   read any channel, the model's own among them; write to free channels
    free channels:         raise all logits alike, so that nothing they carry is seen by a softmax

So the host does what the hidden model does, and the key is the model's key in other places. `noise` lets the host in:
it reaches the model's heads, neurons, channels and the logits by small weights, and the key is then right up to a
tolerance. Every planted model is measured before it is handed out. Among the free parts are decoys, heads that attend
as one of the key does and read the same tokens, and dead neurons that point at the key.

Planting known circuits in random weights: after the semi-synthetic models of InterpBench
(Gupta et al. 2024, arXiv:2407.14494), which train around a known circuit what is written here.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.ground_truth import check_keys
from sparse_interp.faithfulness.placing import Indices, Places, empty, moved, put
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.sites import width
from sparse_interp.model.transformer import HookedSparseTransformer


@dataclass(frozen=True, kw_only=True)
class PlantConfig:
    """Shape of the host in which a model is hidden, and what else is in there."""

    n_layers: int = 4
    """Layers of the host; those of the hidden model are among them, in order."""

    d_model: int = 64
    """Channels of its stream."""

    n_heads: int = 8
    """Heads in each layer."""

    d_mlp: int = 64
    """Neurons in each layer."""

    density: float = 0.1
    """Share of weights of the free heads and neurons that are not zero, in (0, 1]."""

    n_decoys: int = 2
    """Free heads, in every layer of the hidden model, that are copies of heads of its key but for where they write."""

    n_opposed: int = 0
    """Pairs of free heads, in every layer of the hidden model, that do at half its size what a head of its key does,
    one as it is and one with the other sign: together nothing; the first alone, the other held, does the task."""

    dead_frac: float = 0.1
    """Share of free neurons that never fire and have a large weight to a channel that the hidden model writes."""

    strength: float = 0.5
    """How large the features of tokens in free channels are, and what free heads and neurons add to them."""

    noise: float = 0.0
    """Size of weights by which free parts reach the hidden model and the logits; with 0 they do not."""

    def __post_init__(self) -> None:
        for name in ("density", "dead_frac"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected a share above 0 and at most 1.")
        for name in ("n_decoys", "n_opposed", "strength", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; expected 0 or more.")


def planted(truth: GroundTruth, config: PlantConfig, *, generator: torch.Generator) -> GroundTruth:
    """A host with the model of `truth` in it, which does the same task by the same circuit in other places.

    Raises:
        ConfigError: if the host is too small for the model, or has no room for the decoys.
        CircuitError: if the noise is so large that the key is none.
    """
    found = hidden(truth, config, generator=generator)
    means = mean_activations(found.model, found.blocks(N_CHECKED, generator=generator))
    check_keys(found, found.task.batch(N_CHECKED, "test", generator=generator).both_sides(), means, TOLERANCE_NATS)
    return found


def hidden(truth: GroundTruth, config: PlantConfig, *, generator: torch.Generator) -> GroundTruth:
    """`planted`, without measuring what comes out.

    Raises:
        ConfigError: if the host is too small for the model, or has no room for the decoys.
    """
    small = truth.model
    _check_room(small.cfg, config)
    sizes = {name: getattr(config, name) for name in ("n_layers", "d_model", "n_heads", "d_mlp")}
    host = empty(small.cfg, small.tokenizer, **sizes, model_name=f"{truth.name} in {config.d_model} channels")
    where = _drawn_places(small.cfg, host.cfg, generator)
    put(small, host, where)
    if "anchor" in truth.channels:  # the norms of a wider stream are kept level by a higher anchor
        _raise_anchor(host, int(where.stream[truth.channels.index("anchor")]), small.cfg.d_model)
    _fill(host, where, truth, config, generator)
    names = ["" for _ in range(config.d_model)] + list(truth.channels[small.cfg.d_model :])
    for name, channel in zip(truth.channels, where.stream.tolist(), strict=False):
        names[channel] = name
    return moved(truth, host, where, name=f"{truth.name} planted", channels=tuple(names))


TOLERANCE_NATS = 0.02
"""How far a key may be from its noisy host at the answer, KL on prompts of the test split; without noise it is 1e-6."""

N_CHECKED = 16
"""Pairs on which a key is measured."""


# -- the host -------------------------------------------------------------------------------------------------------


def _check_room(cfg: ModelConfig, config: PlantConfig) -> None:
    n_heads = cfg.n_heads + config.n_decoys + 2 * config.n_opposed
    needed = {"n_layers": cfg.n_layers, "d_model": cfg.d_model + 1, "n_heads": n_heads}
    needed["d_mlp"] = int(cfg.d_mlp or 0)
    for name, least in needed.items():
        if getattr(config, name) < least:
            raise ConfigError(
                f"{name}={getattr(config, name)} is too small: the hidden model, its decoys and a free channel need "
                f"{least}. Choose a larger host or fewer decoys."
            )


def _drawn_places(cfg: ModelConfig, host: ModelConfig, generator: torch.Generator) -> Places:
    def drawn(n: int, of: int) -> Indices:
        return torch.randperm(of, generator=generator)[:n]

    n_layers, d_mlp = range(cfg.n_layers), width(cfg, "neuron")
    return Places(
        layers=drawn(cfg.n_layers, host.n_layers).sort().values.tolist(),
        stream=drawn(cfg.d_model, host.d_model),
        heads=[drawn(cfg.n_heads, host.n_heads) for _ in n_layers],
        neurons=[drawn(d_mlp, width(host, "neuron")) for _ in n_layers],
        tokens=torch.arange(cfg.d_vocab),
    )


@torch.no_grad()
def _raise_anchor(host: HookedSparseTransformer, anchor: int, d_small: int) -> None:
    """Scale the towering constant with the width, and the gains with it, so that reads stay as they were."""
    higher = math.sqrt(host.cfg.d_model / d_small)
    host.embed.W_E[:, anchor] *= higher
    gain = host.embed.W_E[0, anchor].item() / math.sqrt(host.cfg.d_model)
    for name, p in host.named_parameters():
        if name.endswith(".w") and not name.endswith("_pos.w"):
            p.fill_(gain)


def _others(taken: Tensor, n: int) -> Tensor:
    mask = torch.ones(n, dtype=torch.bool)
    mask[taken] = False
    return mask.nonzero()[:, 0]


class _Sparse:
    """Draws sparse weights of one density."""

    def __init__(self, density: float, generator: torch.Generator):
        self.density, self.generator = density, generator

    def __call__(self, *shape: int, scale: float) -> Float[Tensor, "..."]:
        values = torch.randn(shape, generator=self.generator) * scale
        return values * (torch.rand(shape, generator=self.generator) < self.density)


@torch.no_grad()
def _fill(
    host: HookedSparseTransformer, where: Places, truth: GroundTruth, config: PlantConfig, generator: torch.Generator
) -> None:
    """Random weights everywhere that the hidden model is not."""
    draw, cfg = _Sparse(config.density, generator), host.cfg
    free = _others(where.stream, cfg.d_model)
    host.embed.W_E[:, free] = (2 * torch.rand(cfg.d_vocab, len(free), generator=generator) - 1) * config.strength
    host.unembed.W_U[free] = torch.randn(len(free), 1, generator=generator).expand(-1, cfg.d_vocab)
    host.unembed.W_U[free] += config.noise * torch.randn(len(free), cfg.d_vocab, generator=generator)
    readable = _readable(where, truth, cfg.d_model)
    for layer in range(cfg.n_layers):
        own = where.layers.index(layer) if layer in where.layers else None
        none = torch.zeros(0, dtype=torch.long)
        heads = _others(none if own is None else where.heads[own], cfg.n_heads)
        neurons = _others(none if own is None else where.neurons[own], width(cfg, "neuron"))
        _fill_heads(host.layers[layer].attn, heads, readable, free, config, draw)
        if own is not None:
            true = where.heads[own][_key_heads(truth, own)]
            _make_decoys(host.layers[layer].attn, true, heads[: config.n_decoys], where.stream, free, draw)
        _fill_neurons(host.layers[layer].mlp, neurons, readable, free, config, draw)
        n_dead = round(config.dead_frac * len(neurons))
        _kill(host.layers[layer].mlp, neurons[:n_dead], _key_writes(truth, where), generator)
        if config.noise and own is not None:
            _let_in(host.layers[layer], where, own, free, config.noise, draw)
        if config.n_opposed and own is not None:
            pairs = heads[config.n_decoys : config.n_decoys + 2 * config.n_opposed].view(-1, 2)
            _make_opposed(host.layers[layer].attn, true, pairs, where.stream, generator)


def _readable(where: Places, truth: GroundTruth, d_model: int) -> Tensor:
    """Channels that free parts read: all but an anchor, which would drown everything else."""
    if "anchor" not in truth.channels:
        return torch.arange(d_model)
    return _others(where.stream[[truth.channels.index("anchor")]], d_model)


def _key_heads(truth: GroundTruth, layer: int) -> list[int]:
    """Heads that nodes of a key belong to in one layer of the hidden model; all heads where there are none."""
    nodes = [node for key in truth.keys for node in key.nodes if node.layer == layer and node.site in ("q", "k", "v")]
    cfg = truth.model.cfg
    return sorted({node.channel // cfg.d_head for node in nodes}) or list(range(cfg.n_heads))


def _key_writes(truth: GroundTruth, where: Places) -> Tensor:
    """Channels of the host that nodes of a key write to."""
    written = {node.channel for key in truth.keys for node in key.nodes if node.site in ("attn_write", "mlp_write")}
    return where.stream[sorted(written)]


def _fill_heads(attn, heads: Tensor, readable: Tensor, free: Tensor, config: PlantConfig, draw: _Sparse) -> None:
    d_head, fan_in = attn.W_Q.shape[2], max(1.0, config.density * len(readable))
    for weight in (attn.W_Q, attn.W_K, attn.W_V):
        weight[heads[:, None], readable] = draw(len(heads), len(readable), d_head, scale=1 / math.sqrt(fan_in))
    out = draw(len(heads), d_head, len(free), scale=config.strength)
    attn.W_O[heads[:, None, None], torch.arange(d_head)[None, :, None], free] = out


def _make_decoys(attn, heads: Tensor, decoys: Tensor, stream: Tensor, free: Tensor, draw: _Sparse) -> None:
    """Free heads that do what some of `heads` do, and write it elsewhere."""
    copied = heads[torch.randint(len(heads), (len(decoys),), generator=draw.generator)]
    for name, p in attn.named_parameters():
        if name not in ("W_O", "b_O"):
            p[decoys] = p[copied]
    targets = free[torch.randint(len(free), (len(decoys), stream.numel()), generator=draw.generator)]
    for decoy, head, target in zip(decoys.tolist(), copied.tolist(), targets, strict=True):
        attn.W_O[decoy] = 0
        attn.W_O[decoy].index_add_(1, target, attn.W_O[head][:, stream])


HALF = 0.5
"""Size of an opposed head beside the one that it copies: with its twin held it is enough, and it takes away less than
what is there where its twin alone is held."""


def _make_opposed(attn, heads: Tensor, pairs: Tensor, stream: Tensor, generator: torch.Generator) -> None:
    """Pairs of free heads that do what some of `heads` do, write it where these do, and cancel each other."""
    copied = heads[torch.randint(len(heads), (len(pairs),), generator=generator)]
    for name, p in attn.named_parameters():
        if name not in ("W_O", "b_O"):
            p[pairs] = p[copied][:, None]
    for head, (one, other) in zip(copied.tolist(), pairs.tolist(), strict=True):
        attn.W_O[one] = 0
        attn.W_O[one][:, stream] = HALF * attn.W_O[head][:, stream]
        attn.W_O[other] = -attn.W_O[one]


def _fill_neurons(mlp, neurons: Tensor, readable: Tensor, free: Tensor, config: PlantConfig, draw: _Sparse) -> None:
    fan_in = max(1.0, config.density * len(readable))
    mlp.W_in[readable[:, None], neurons] = draw(len(readable), len(neurons), scale=1 / math.sqrt(fan_in))
    mlp.W_out[neurons[:, None], free] = draw(len(neurons), len(free), scale=config.strength)


DEAD_BIAS = -100.0
"""Far below what a neuron of unit weights reads, positions and all."""


def _kill(mlp, neurons: Tensor, targets: Tensor, generator: torch.Generator) -> None:
    """Neurons that never fire, each with a large weight to a channel of the key."""
    mlp.b_in[neurons] = DEAD_BIAS
    aim = targets[torch.randint(len(targets), (len(neurons),), generator=generator)]
    mlp.W_out[neurons, aim] = 4.0


def _let_in(block, where: Places, own: int, free: Tensor, noise: float, draw: _Sparse) -> None:
    """Small weights from free channels into the hidden model, and from free heads and neurons to its channels."""
    heads, neurons, stream = where.heads[own], where.neurons[own], where.stream
    d_head = block.attn.W_Q.shape[2]
    for weight in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
        weight[heads[:, None], free] = draw(len(heads), len(free), d_head, scale=noise)
    block.mlp.W_in[free[:, None], neurons] = draw(len(free), len(neurons), scale=noise)
    others = _others(heads, block.attn.W_Q.shape[0])
    out = draw(len(others), d_head, len(stream), scale=noise)
    block.attn.W_O[others[:, None, None], torch.arange(d_head)[None, :, None], stream] = out
    spare = _others(neurons, block.mlp.W_out.shape[0])
    spare = spare[block.mlp.b_in[spare] > DEAD_BIAS]
    block.mlp.W_out[spare[:, None], stream] = draw(len(spare), len(stream), scale=noise)
