"""Placing: the weights of a small model written into a larger one, and its answer key into the names used there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_interp.faithfulness.answer_key import Edge, GroundTruth, Key
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.sites import FINAL_READ, Node
from sparse_interp.model.transformer import HookedSparseTransformer

Indices = Int[Tensor, " part"]


class Places(NamedTuple):
    """Where the parts of a hidden model are in its host."""

    layers: list[int]
    stream: Indices
    heads: list[Indices]
    """For each of its layers."""

    neurons: list[Indices]
    """For each of its layers."""

    tokens: Indices
    """Its vocabulary in that of the host."""


def empty(cfg: ModelConfig, tokenizer: Any, **changes: Any) -> HookedSparseTransformer:
    """A model of zeros, and gains of one, like `cfg` but for `changes`."""
    model = HookedSparseTransformer(ModelConfig.from_dict({**cfg.to_dict(), **changes}), tokenizer).eval()
    for name, p in model.named_parameters():
        if not name.endswith(".w"):
            p.data.zero_()
    return model


@torch.no_grad()
def put(small: HookedSparseTransformer, host: HookedSparseTransformer, where: Places) -> None:
    """Write the weights of `small` into `host`; its logits are added to what is there."""
    stream, tokens = where.stream, where.tokens
    host.embed.W_E[tokens[:, None], stream] = small.embed.W_E
    host.unembed.W_U[stream[:, None], tokens] += small.unembed.W_U
    host.unembed.b_U[tokens] += small.unembed.b_U
    if small.pos_embed is not None and host.pos_embed is not None:
        if small.cfg.positions == "add":
            host.pos_embed.W_pos[:, stream] = small.pos_embed.W_pos
        else:
            host.pos_embed.W_pos.copy_(small.pos_embed.W_pos)
    for block, layer, heads, neurons in zip(small.layers, where.layers, where.heads, where.neurons, strict=True):
        into = host.layers[layer]
        for letter in "QKV":
            into.attn.get_parameter(f"W_{letter}")[heads[:, None], stream] = block.attn.get_parameter(f"W_{letter}")
            into.attn.get_parameter(f"b_{letter}")[heads] = block.attn.get_parameter(f"b_{letter}")
            if small.cfg.positions == "concat":
                into.attn.get_parameter(f"W_{letter}_pos")[heads] = block.attn.get_parameter(f"W_{letter}_pos")
        into.attn.W_O[heads[:, None, None], torch.arange(small.cfg.d_head)[None, :, None], stream] = block.attn.W_O
        if block.attn.sink is not None:
            into.attn.sink[heads] = block.attn.sink
        into.mlp.W_in[stream[:, None], neurons] = block.mlp.W_in
        into.mlp.b_in[neurons] = block.mlp.b_in
        into.mlp.W_out[neurons[:, None], stream] = block.mlp.W_out
        if small.cfg.positions == "concat":
            into.mlp.W_in_pos[:, neurons] = block.mlp.W_in_pos
    norms = {name: p for name, p in small.named_parameters() if name.endswith("_pos.w")}
    for name, p in host.named_parameters():  # every norm of a small model has one gain throughout
        if name.endswith("_pos.w"):
            p.copy_(next(iter(norms.values())))
        elif name.endswith(".w"):
            p.fill_(small.get_parameter("ln_final.w")[0].item())


def moved(truth: GroundTruth, host: HookedSparseTransformer, where: Places, **changes: Any) -> GroundTruth:
    """`truth` for the host that its model was put into."""
    keys = [mapped(key, lambda node: node_in_host(node, truth.model.cfg, host.cfg, where)) for key in truth.keys]
    everything = Key(truth.repaired, frozenset())
    repaired = mapped(everything, lambda node: node_in_host(node, truth.model.cfg, host.cfg, where)).nodes
    return replace(
        truth,
        model=host,
        nodes=keys[0].nodes,
        edges=keys[0].edges,
        alternatives=tuple(keys[1:]),
        repaired=repaired,
        **changes,
    )


def mapped(key: Key, move: Callable[[Node], Node]) -> Key:
    """A key with every node moved."""
    edges: set[Edge] = {(move(source), move(target)) for source, target in key.edges}
    return Key(frozenset(move(node) for node in key.nodes), frozenset(edges))


def node_in_host(node: Node, cfg: ModelConfig, host: ModelConfig, where: Places) -> Node:
    """Where a node of a hidden model is in its host."""
    if node.site == FINAL_READ.name:
        return Node(host.n_layers, node.site, int(where.stream[node.channel]))
    layer = where.layers[node.layer]
    if node.site in ("q", "k", "v"):
        head, channel = divmod(node.channel, cfg.d_head)
        return Node(layer, node.site, int(where.heads[node.layer][head]) * cfg.d_head + channel)
    if node.site == "neuron":
        return Node(layer, node.site, int(where.neurons[node.layer][node.channel]))
    if node.channel >= cfg.d_model:  # a concatenated position
        return Node(layer, node.site, node.channel - cfg.d_model + host.d_model)
    return Node(layer, node.site, int(where.stream[node.channel]))
