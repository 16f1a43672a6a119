"""Where things happen in a model, and which weights join which places.

A *site* is a kind of place, a *node* one channel of a site in one layer, a *wire* the weights between two sites.
This is the only file that spells hook names, and the table `WIRES` the only place that says what a weight joins.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.model.config import AnyShape


class Site(NamedTuple):
    """One kind of place whose channels are nodes."""

    name: str
    """What nodes, tables and files call it."""

    hook: str
    """Hook name; `{layer}` stands for the layer where there is one."""

    per_head: bool
    """Whether the activation there is [batch pos head d_head]; a node's channel counts head and d_head flat."""

    def at(self, layer: int) -> str:
        """Hook name in `layer`."""
        return self.hook.format(layer=layer)


ATTN_READ = Site("attn_read", "blocks.{layer}.attn.hook_in", False)
Q = Site("q", "blocks.{layer}.attn.hook_q", True)
K = Site("k", "blocks.{layer}.attn.hook_k", True)
V = Site("v", "blocks.{layer}.attn.hook_v", True)
ATTN_WRITE = Site("attn_write", "blocks.{layer}.hook_attn_out", False)
MLP_READ = Site("mlp_read", "blocks.{layer}.mlp.hook_in", False)
NEURON = Site("neuron", "blocks.{layer}.mlp.hook_post", False)
MLP_WRITE = Site("mlp_write", "blocks.{layer}.hook_mlp_out", False)
FINAL_RESID = Site("final_resid", "blocks.{layer}.hook_resid_post", False)
FINAL_READ = Site("final_read", "unembed.hook_in", False)

BLOCK_SITES = (ATTN_READ, Q, K, V, ATTN_WRITE, MLP_READ, NEURON, MLP_WRITE)
SITES = {site.name: site for site in (*BLOCK_SITES, FINAL_RESID, FINAL_READ)}

NODE_SITES = tuple(name for name in SITES if name != FINAL_RESID.name)
"""The sites whose nodes make up a model.

A node of `final_resid` is a channel of `final_read` held before the last norm instead of after it. Only circuits that
were found so, as the released ones were, speak of it.
"""

EMBED_HOOK = "hook_embed"
BIGRAM_HOOK = "hook_bigram"
RESID_PRE_HOOK = "blocks.{layer}.hook_resid_pre"
RESID_MID_HOOK = "blocks.{layer}.hook_resid_mid"
RESID_POST_HOOK = FINAL_RESID.hook
PATTERN_HOOK = "blocks.{layer}.attn.hook_pattern"
Z_HOOK = "blocks.{layer}.attn.hook_z"
RESULT_HOOK = "blocks.{layer}.attn.hook_result"
PRE_HOOK = "blocks.{layer}.mlp.hook_pre"
PRE_LINEAR_HOOK = "blocks.{layer}.mlp.hook_pre_linear"
FINAL_SCALE_HOOK = "ln_final.hook_scale"
SCALE_HOOKS = ("blocks.{layer}.ln1.hook_scale", "blocks.{layer}.ln2.hook_scale")
"""What the norms before attention and before the MLP divide by."""


def n_stream_sites(n_layers: int) -> int:
    """How many residual sites a model of so many layers has: before its blocks, and after each half of one."""
    return 2 * n_layers + 1


def stream_hook(site: int) -> str:
    """Hook point of a residual site: 0 before block 0, 2 l + 1 after attention of block l, 2 l + 2 after its MLP."""
    if site == 0:
        return RESID_PRE_HOOK.format(layer=0)
    layer, is_mlp = divmod(site - 1, 2)
    return (RESID_POST_HOOK if is_mlp else RESID_MID_HOOK).format(layer=layer)


def check_sites(n_layers: int, start: int, leave: int | None) -> int:
    """The residual site at which a run from `start` ends: `leave`, or None for the last.

    Raises:
        ConfigError: if one of the two is not there, or the second comes before the first.
    """
    last = n_stream_sites(n_layers) - 1
    stop = last if leave is None else leave
    if not 0 <= start <= stop <= last:
        raise ConfigError(
            f"a run from residual site {start} to {stop}: a model of {n_layers} layers has sites 0 to {last}, and a "
            "run ends where it begins or behind that."
        )
    return stop


class Node(NamedTuple):
    """One channel of one site. `final_read` has the layer number `n_layers`, `final_resid` that of the last block."""

    layer: int
    site: str
    channel: int

    def __str__(self) -> str:
        return f"L{self.layer}.{self.site}.{self.channel}"


class NodeAt(NamedTuple):
    """A node at one position of prompts that are all of one length."""

    layer: int
    site: str
    channel: int
    pos: int

    def __str__(self) -> str:
        return f"{self.node}@{self.pos}"

    @property
    def node(self) -> Node:
        """The node, at whatever position."""
        return Node(*self[:3])


class Place(NamedTuple):
    """One site in one layer: a hook point whose channels are nodes."""

    layer: int
    site: str

    @property
    def hook(self) -> str:
        """Name of the hook point."""
        return SITES[self.site].at(self.layer)


def places(cfg: AnyShape, sites: Collection[str] = NODE_SITES) -> list[Place]:
    """Every place of a model that is of one of `sites`, in the order of its forward pass."""
    blocks = [Place(layer, site.name) for layer in range(cfg.n_layers) for site in BLOCK_SITES]
    ends = [Place(cfg.n_layers - 1, FINAL_RESID.name), Place(cfg.n_layers, FINAL_READ.name)]
    return [place for place in (*blocks, *ends) if place.site in sites]


def width(cfg: AnyShape, site: str) -> int:
    """Number of nodes that `site` has in one layer."""
    assert cfg.d_mlp is not None
    if site not in SITES:
        raise CircuitError(f"{site!r} is no site; the sites are {', '.join(SITES)}.")
    queries = cfg.n_heads * cfg.d_head
    return {
        "attn_read": cfg.d_read,
        "mlp_read": cfg.d_read,
        "q": queries,
        "k": queries // group_size(cfg),
        "v": queries // group_size(cfg),
        "neuron": cfg.d_mlp,
    }.get(site, cfg.d_model)


def group_size(cfg: AnyShape) -> int:
    """How many query heads share one head of keys and values: 1 unless queries are grouped."""
    return cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)


def queries_of(cfg: AnyShape, channel: int) -> list[int]:
    """The q channels that meet channel `channel` of k; or the channels of all heads that carry that one of v."""
    head, channel = divmod(channel, cfg.d_head)
    size = group_size(cfg)
    return [query * cfg.d_head + channel for query in range(head * size, (head + 1) * size)]


def heads_of(cfg: AnyShape, node: Node) -> list[int]:
    """The heads, as patterns and scores count them, in which a q, k or v node takes part."""
    channels = [node.channel] if node.site == "q" else queries_of(cfg, node.channel)
    return [channel // cfg.d_head for channel in channels]


def key_of(cfg: AnyShape, channel: int) -> int:
    """The k channel that channel `channel` of q meets."""
    head, channel = divmod(channel, cfg.d_head)
    return head // group_size(cfg) * cfg.d_head + channel


def n_nodes(cfg: AnyShape) -> int:
    """Number of nodes of a model."""
    return sum(width(cfg, place.site) for place in places(cfg))


def flat(activation: Float[Tensor, "batch pos *channels"]) -> Float[Tensor, "batch pos width"]:
    """An activation with its channels on one axis, as nodes count them; a view where memory allows."""
    return activation.flatten(2)


class Wire(NamedTuple):
    """A weight matrix, and the two sites of one block whose nodes it joins."""

    source: Site
    target: Site
    weight_name: str
    """TransformerLens name of the matrix within a block."""

    weight: Callable[[Any], Float[Tensor, "source target"]]
    """The matrix of a block, or of what has its weights by the same names: a row per source, a column per target node.

    A v node has one row in W_O for every query head that carries it: those of `queries_of`.
    """


def _heads_out(weight: Float[Tensor, "head d_in d_head"]) -> Float[Tensor, "d_in width"]:
    return weight.permute(1, 0, 2).flatten(1)


def _read(block: Any, letter: str) -> Float[Tensor, "d_read width"]:
    weight = _heads_out(getattr(block.attn, f"W_{letter}"))
    if not hasattr(block.attn, f"W_{letter}_pos"):
        return weight
    return torch.cat([weight, _heads_out(getattr(block.attn, f"W_{letter}_pos"))])


def _mlp_read(block: Any) -> Float[Tensor, "d_read d_mlp"]:
    if block.mlp.W_in_pos is None:
        return block.mlp.W_in
    return torch.cat([block.mlp.W_in, block.mlp.W_in_pos])


WIRES = (
    Wire(ATTN_READ, Q, "attn.W_Q", lambda block: _read(block, "Q")),
    Wire(ATTN_READ, K, "attn.W_K", lambda block: _read(block, "K")),
    Wire(ATTN_READ, V, "attn.W_V", lambda block: _read(block, "V")),
    Wire(V, ATTN_WRITE, "attn.W_O", lambda block: block.attn.W_O.flatten(0, 1)),
    Wire(MLP_READ, NEURON, "mlp.W_in", _mlp_read),
    Wire(NEURON, MLP_WRITE, "mlp.W_out", lambda block: block.mlp.W_out),
)
"""The within-block weights: what `n_edges` counts, and what training keeps sparse together with W_E and W_U."""

GATE_WIRE = Wire(MLP_READ, NEURON, "mlp.W_gate", lambda block: block.mlp.W_gate)
"""The second way into a neuron that gated MLPs have."""


def wires(cfg: AnyShape) -> tuple[Wire, ...]:
    """The within-block weights of a model of this shape."""
    return (*WIRES, GATE_WIRE) if cfg.gated_mlp else WIRES


def rows_of(cfg: AnyShape, wire: Wire, channel: int) -> list[tuple[int, str]]:
    """The rows of a wire's matrix that leave one source node, each with its name.

    There is one row, called as the matrix is; of a v node with grouped queries one per head, called `attn.W_O[head]`.
    """
    if wire.source is not V or group_size(cfg) == 1:
        return [(channel, wire.weight_name)]
    return [(row, f"{wire.weight_name}[{row // cfg.d_head}]") for row in queries_of(cfg, channel)]


@dataclass(frozen=True)
class NodeValues:
    """One number for every node: a baseline to hold ablated nodes at, a gate, a score."""

    values: Mapping[Place, Float[Tensor, " width"]]
    """For every place of the model, one number per channel."""

    kind: str
    """What the numbers are, for tables and files: `mean over text`, say."""

    def __getitem__(self, place: Place) -> Float[Tensor, " width"]:
        return self.values[place]

    def of(self, node: Node) -> float:
        """The number of one node."""
        return float(self.values[Place(node.layer, node.site)][node.channel])

    def to(self, like: Tensor) -> "NodeValues":
        """The same numbers on the device and in the precision of `like`."""
        return NodeValues({place: v.to(like) for place, v in self.values.items()}, self.kind)

    def check(self, cfg: AnyShape, sites: Collection[str] = NODE_SITES) -> None:
        """Raise CircuitError unless there is a number for every node at `sites` of a model of this shape."""
        for place in places(cfg, sites):
            if place not in self.values:
                raise CircuitError(f"{self.kind}: no values for {place.site} of layer {place.layer}; make them anew.")
            expected, got = (width(cfg, place.site),), tuple(self.values[place].shape)
            if got != expected:
                raise CircuitError(
                    f"{self.kind}: {place.site} of layer {place.layer} has {expected[0]} nodes in this model and "
                    f"{got} values here; they belong to another model."
                )


def check_nodes(nodes: Iterable[Node], cfg: AnyShape) -> None:
    """Raise CircuitError for a node that a model of this shape does not have."""
    last = {place.site: place.layer for place in places(cfg, SITES)}
    for node in nodes:
        size = width(cfg, node.site)
        first = last[node.site] if node.site in (FINAL_RESID.name, FINAL_READ.name) else 0
        if not first <= node.layer <= last[node.site]:
            raise CircuitError(
                f"{node}: {node.site} exists in layers {first} to {last[node.site]}, not in {node.layer}."
            )
        if not 0 <= node.channel < size:
            raise CircuitError(f"{node}: {node.site} has channels 0 to {size - 1}, not {node.channel}.")


def masks(nodes: Iterable[Node], cfg: AnyShape, sites: Collection[str] = ()) -> dict[Place, Bool[Tensor, " width"]]:
    """For every place, which of its channels are among `nodes`; `final_resid` is there if nodes or `sites` name it."""
    nodes = list(nodes)
    check_nodes(nodes, cfg)
    there = places(cfg, {*NODE_SITES, *sites, *(node.site for node in nodes)})
    found = {place: torch.zeros(width(cfg, place.site), dtype=torch.bool) for place in there}
    for node in nodes:
        found[Place(node.layer, node.site)][node.channel] = True
    return found


def masks_at(
    nodes: Iterable[NodeAt], cfg: AnyShape, n_pos: int, sites: Collection[str] = ()
) -> dict[Place, Bool[Tensor, "pos width"]]:
    """`masks` position by position, for prompts of `n_pos` tokens.

    The last read has one row, that of the position that answers, where alone it is read.
    """
    nodes = list(nodes)
    found = masks((), cfg, (*sites, *(node.site for node in nodes)))
    check_nodes((node.node for node in nodes), cfg)
    rows = {place: mask.repeat(1 if place.site == FINAL_READ.name else n_pos, 1) for place, mask in found.items()}
    for node in nodes:
        if not 0 <= node.pos < n_pos:
            raise CircuitError(f"{node}: the prompts have positions 0 to {n_pos - 1}.")
        mask = rows[Place(node.layer, node.site)]
        mask[min(node.pos, len(mask) - 1), node.channel] = True
    return rows
