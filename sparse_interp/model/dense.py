"""Dense TransformerLens models, spoken to as one of ours: the one place that knows the difference.

    hooked(model)     ours as it is; a TransformerBridge or a HookedTransformer as a DenseModel

Interventions, circuits and audits ask little of a model: what its config says, hook points by name, weight matrices
between sites, a forward pass that can stop and start between blocks, a state dict. `DenseModel` is that list. Both
TransformerLens classes have our names for nearly everything, and what they hold is the same:

    attn_read, mlp_read    what W_Q, W_K, W_V and W_in multiply: normalised, with the norm's gain and bias unless these
                           are folded away. A bridge has `attn.hook_in` and `mlp.hook_in`; a HookedTransformer has no
                           such points (`ln1.hook_normalized` comes before gain and bias, and fires three times a run),
                           so it is given them the first time it comes by
    q, k, v                before rotation; with grouped queries k and v have `n_key_value_heads` heads
    neuron                 what W_out multiplies; in a gated MLP the product of the two branches

None of this is taken on trust. The first time a model comes by, every node of it is set to noise, and a model whose
hook points do not carry that noise through its weights as `WIRES` says, or whose blocks are not attention and then an
MLP on one stream, is refused with the sentence that does not hold.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import Logits, Resid, Tokens
from sparse_interp.errors import ConfigError
from sparse_interp.model import sites
from sparse_interp.model.config import Shape
from sparse_interp.model.edges import EdgeGate, Matrix, carried, placed
from sparse_interp.model.sites import SITES, WIRES, Wire, check_sites, flat, group_size, places, width, wires
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer

NORMS = {"LN": "layer", "LNPRE": "layer", "RMS": "rms", "RMSPRE": "rms", "NONE": "none"}
"""TransformerLens' names of norms, in capitals, and ours; `Pre` are those with gain and bias folded away."""

FOREIGN = {
    "attn_only": "its blocks have no MLP",
    "parallel_attn_mlp": "its MLPs read the stream beside attention and not after it",
    "num_experts": "its MLPs choose among experts",
    "use_attn_in": "each head reads a stream of its own; call model.set_use_attn_in(False)",
    "use_split_qkv_input": "each head reads streams of its own; call model.set_use_split_qkv_input(False)",
    "ungroup_grouped_query_attention": "k and v are repeated; call model.set_ungroup_grouped_query_attention(False)",
}
"""Settings of a TransformerLens config under which a model is not made of our sites, and what they mean."""

FwdHooks = list[tuple[str | Callable, Callable]]
"""What TransformerLens takes as `fwd_hooks`; its parameter is an invariant list of such pairs."""

_proved: WeakSet[nn.Module] = WeakSet()
"""Models that have shown that their hook points and weights belong together."""

_gated: WeakKeyDictionary[nn.Module, dict[Matrix, list[EdgeGate]]] = WeakKeyDictionary()
"""For every model inside a block of gated edges, the gates of each matrix."""


class _Stopped(Exception):
    """Carries the stream out of a run that need not go on."""

    def __init__(self, resid: Resid):
        super().__init__()
        self.resid = resid


class DenseModel:
    """A dense TransformerLens model with what interventions, circuits and audits ask of one of ours.

    Args:
        tl: a `TransformerBridge`, or TransformerLens 3's `HookedTransformer`; `hooked` checks that it is one.
    """

    def __init__(self, tl: Any):
        self.tl = tl
        self.cfg = _shape(tl.cfg)

    # -- its parts ----------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return self.tl.tokenizer

    @property
    def embed(self) -> Any:
        """Has `W_E` [d_vocab d_model]."""
        return self.tl.embed

    @property
    def unembed(self) -> Any:
        """Has `W_U` [d_model d_vocab]."""
        return self.tl.unembed

    @property
    def ln_final(self) -> Any:
        """The last norm's gain `w`: ones where it is folded away."""
        return SimpleNamespace(w=getattr(self.tl.ln_final, "w", torch.ones(self.cfg.d_model)))

    @property
    def layers(self) -> list[SimpleNamespace]:
        """The weight matrices of each block under the names that `WIRES` reads, with as many heads as are stored."""
        return [_matrices(block) for block in self.tl.blocks]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        return self.tl.parameters()

    def state_dict(self) -> Mapping[str, Tensor]:
        """All weights by name."""
        return self.tl.state_dict()

    # -- running it ---------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self.tl.training

    def train(self, mode: bool = True) -> None:
        """Set training mode."""
        self.tl.train(mode)

    def eval(self) -> None:
        """Set eval mode."""
        self.tl.eval()

    def hooks(self, fwd_hooks: FwdHooks) -> Any:
        """A block inside which the hooks act."""
        return self.tl.hooks(fwd_hooks=fwd_hooks)

    def __call__(
        self,
        input: Tensor,
        return_type: str | None = "logits",
        *,
        tokens: Tokens | None = None,
        attention_mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Run the model, as ours is run: tokens in and logits (or None) out, or a stream where it starts or stops.

        A run that starts at a layer has to be given the `tokens` too. TransformerLens has no way into the middle of
        every model, so the blocks before are run as well and the stream that they make is exchanged for `input`.
        """
        assert tokens is not None or start_at_layer in (None, self.cfg.n_layers)
        enter = None if start_at_layer is None else (2 * start_at_layer, input)
        leave = None if stop_at_layer is None else 2 * stop_at_layer
        found = self._run(input if tokens is None else tokens, enter, leave, attention_mask)
        return found if return_type is not None or leave is not None else None

    def between(
        self,
        tokens: Tokens,
        *,
        enter: tuple[int, Resid] | None = None,
        leave: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Resid | Logits:
        """Run from one residual site to another, as ours is run; what comes before the site entered is run as well.

        Raises:
            ConfigError: for a site that is not there or behind the one entered.
        """
        check_sites(self.cfg.n_layers, 0 if enter is None else enter[0], leave)
        return self._run(tokens, enter, leave, attention_mask)

    def _run(
        self, tokens: Tensor, enter: tuple[int, Resid] | None, leave: int | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Logits, or the stream at residual site `leave`; with `enter` a site's stream is exchanged for another."""
        hooks: FwdHooks = []
        if enter is not None:
            site, resid = enter
            if site in (leave, 2 * self.cfg.n_layers):
                return resid if leave is not None else self._after_blocks(resid)
            hooks.append((sites.stream_hook(site), lambda _, hook: resid))
        if leave is not None:
            hooks.append((sites.stream_hook(leave), _stop))
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        try:
            with self.hooks(hooks):
                # asked for nothing, a HookedTransformer does not unembed, and the last read is never made
                return self.tl(tokens, return_type="logits", **given)
        except _Stopped as stopped:
            return stopped.resid

    @contextmanager
    def gated_edges(self, gates: Mapping[Matrix, EdgeGate]) -> Iterator[None]:
        """Inside the block edges carry the share of their source that `gates` say, and else its baseline."""
        with ExitStack() as stack:
            if self.tl not in _gated:
                stack.enter_context(self._listening_to_edges())
            stack.enter_context(placed(gates, _gated[self.tl].__getitem__))
            yield

    @contextmanager
    def _listening_to_edges(self) -> Iterator[None]:
        """Inside the block the gates of `_gated` hold: changes reach what edges lead to before any hook does."""
        layers = range(self.cfg.n_layers)
        _gated[self.tl] = {Matrix(layer, wire.weight_name): [] for layer in layers for wire in wires(self.cfg)}
        with ExitStack() as stack:
            stack.callback(_gated.pop, self.tl)
            joined = [(layer, wire, *_carried(self.cfg, wire)) for layer in layers for wire in wires(self.cfg)]
            sources = {_HOOKS[source].format(layer=layer) for layer, _, source, _ in joined}
            patterns = {sites.PATTERN_HOOK.format(layer=layer) for layer in layers}
            seen = stack.enter_context(self._leaving(sources | patterns))
            for layer, wire, source, target in joined:
                names = {"source": source, "pattern": "pattern"}
                names = {end: _HOOKS[name].format(layer=layer) for end, name in names.items()}
                change = partial(self._change, layer=layer, wire=wire, seen=seen, **names)
                point = self.tl.hook_dict[_HOOKS[target].format(layer=layer)]
                before = partial(_add_change, change)
                stack.callback(point.register_forward_pre_hook(before).remove)
            yield

    @contextmanager
    def _leaving(self, names: set[str]) -> Iterator[dict[str, Tensor]]:
        """Inside the block, what left hook points in the last run, after whoever else listens there."""
        seen: dict[str, Tensor] = {}
        points = {name: self.tl.hook_dict[name] for name in names}
        with ExitStack() as stack:
            handles = {name: point.register_forward_hook(partial(_note, seen, name)) for name, point in points.items()}
            for handle in handles.values():
                stack.callback(handle.remove)

            def begin(*_: Any) -> None:
                seen.clear()
                for name, point in points.items():
                    point._forward_hooks.move_to_end(handles[name].id)

            stack.callback(self.tl.hook_dict[sites.EMBED_HOOK].register_forward_pre_hook(begin).remove)
            yield seen

    def _change(
        self, layer: int, wire: Wire, seen: Mapping[str, Tensor], source: str, pattern: str
    ) -> Float[Tensor, "batch pos width"] | None:
        """By how much gates change what comes through a matrix; None where it has none."""
        gates = _gated[self.tl][Matrix(layer, wire.weight_name)]
        if not gates:
            return None
        weight = wire.weight(self.layers[layer])
        whole, held = carried(weight, gates)
        change = flat(seen[source]) @ (whole - weight)
        for baseline, part in held:
            if wire.source is sites.V:
                baseline = self._mixed(baseline, seen[pattern])
            change = change + baseline @ part
        return change

    def _mixed(self, baseline: Tensor, pattern: Tensor) -> Tensor:
        """What heads take in if every value is its baseline: that itself, unless somebody has changed the pattern."""
        values = baseline.unflatten(-1, (-1, self.cfg.d_head))
        return torch.einsum("bhqk,hd->bqhd" if values.ndim == 2 else "bhqk,bkhd->bqhd", pattern, values).flatten(2)

    def normed(self, resid: Resid, half: int) -> Resid:
        """What half block `half` reads of a stream; attention of layer l is half 2 l, its MLP the next."""
        layer, is_mlp = divmod(half, 2)
        block = self.tl.blocks[layer]
        return resid if self.cfg.norm == "none" else (block.ln2 if is_mlp else block.ln1)(resid)

    def _after_blocks(self, resid: Resid) -> Logits:
        read = resid if self.cfg.norm == "none" else self.tl.ln_final(resid)
        return self.tl.unembed(read)


HookedModel = HookedSparseTransformer | DenseModel
"""What algorithms work on."""

AnyModel = nn.Module | DenseModel
"""What a user may pass: ours, or a dense TransformerLens model."""


def hooked(model: AnyModel) -> HookedModel:
    """The model with what interventions, circuits and audits ask of it: ours as it is, another's as a DenseModel.

    Raises:
        ConfigError: for what is no model, or a model that is not made of our sites; says what it is made of.
    """
    if isinstance(model, HookedSparseTransformer | DenseModel):
        return model
    parts = ("cfg", "hooks", "embed", "blocks", "unembed")
    lacking = [part for part in parts if not hasattr(model, part)]
    if lacking:
        raise ConfigError(
            f"a {type(model).__name__} is no model with hook points: it has no {', no '.join(lacking)}. Pass a "
            "HookedSparseTransformer, or TransformerLens' TransformerBridge or HookedTransformer."
        )
    for setting, meaning in FOREIGN.items():
        if getattr(model.cfg, setting, None):
            raise _refusal(model, f"{setting}={getattr(model.cfg, setting)}: {meaning}")
    dense = DenseModel(model)
    if model not in _proved:
        _add_read_points(model)
        _prove(dense)
        _proved.add(model)
    return dense


def _refusal(tl: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{tl.cfg.model_name!r} cannot be taken apart into nodes, {why}. What can: models in which each block is "
        "attention and then an MLP, both reading a normalised stream and adding to it, and logits are linear in the "
        "last read."
    )


def _shape(cfg: Any) -> Shape:
    """What a TransformerLens config says, in our words."""
    norm = str(cfg.normalization_type).upper()
    final = "RMS" if getattr(cfg, "final_rms", False) else norm
    return Shape(
        model_name=cfg.model_name,
        n_layers=cfg.n_layers,
        n_ctx=cfg.n_ctx,
        d_vocab=cfg.d_vocab,
        d_model=cfg.d_model,
        d_pos_emb=None,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None),
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        gated_mlp=bool(getattr(cfg, "gated_mlp", False)),
        attention_dir=cfg.attention_dir,
        norm=NORMS.get(final, final),
    )


def _matrices(block: Any) -> SimpleNamespace:
    attn, mlp = block.attn, block.mlp
    stored = {letter: getattr(attn, f"_W_{letter}", getattr(attn, f"W_{letter}")) for letter in "QKVO"}
    gate = getattr(mlp, "W_gate", None)
    return SimpleNamespace(
        attn=SimpleNamespace(**{f"W_{letter}": weight for letter, weight in stored.items()}),
        mlp=SimpleNamespace(W_in=mlp.W_in, W_in_pos=None, W_gate=gate, W_out=mlp.W_out),
    )


def _note(seen: dict[str, Tensor], name: str, point: HookPoint, given: tuple, left: Tensor) -> None:
    seen[name] = left


def _add_change(change: Callable, point: HookPoint, given: tuple) -> tuple | None:
    """A pre-hook: what came to a hook point, with a change of what edges brought."""
    (arrived,) = given
    found = change()
    return None if found is None else (arrived + found.view_as(arrived),)


def _stop(resid: Resid, hook: HookPoint) -> None:
    raise _Stopped(resid)


# -- read points for a HookedTransformer ------------------------------------------------------------------------------


def _add_read_points(tl: Any) -> None:
    """Give attention and MLPs a `hook_in` where they have none. Weights and results stay as they are."""
    if sites.ATTN_READ.at(0) in tl.hook_dict:
        return
    if tl.cfg.positional_embedding_type == "shortformer":
        raise _refusal(tl, "positional_embedding_type='shortformer': its values read another stream than its queries")
    for block in tl.blocks:
        for part in (block.attn, block.mlp):
            part.hook_in = HookPoint()
            part.register_forward_pre_hook(_through_hook_in, with_kwargs=True)
    tl.setup()  # names the new points


def _through_hook_in(part: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What a part of a HookedTransformer's block is given, through its `hook_in`: one read for q, k and v."""
    if args:
        return (part.hook_in(args[0]), *args[1:]), kwargs
    inputs = ("query_input", "key_input", "value_input")
    if kwargs["query_input"].ndim != 3:
        raise ConfigError(
            "heads that read streams of their own have no common read: switch use_attn_in and use_split_qkv_input off."
        )
    return args, kwargs | dict.fromkeys(inputs, part.hook_in(kwargs["query_input"]))


# -- proof that hook points and weights belong together ---------------------------------------------------------------


class _Run(NamedTuple):
    """What a run with noise at its nodes showed."""

    came: dict[str, Tensor]
    """What came to each hook point."""

    left: dict[str, Tensor]
    """What left it: where there are nodes, noise."""

    logits: Logits
    """Where the run ended."""


def _noisy(model: DenseModel, tokens: Tokens, spared: str = "") -> _Run:
    """A run in which every node outside the site `spared` is noise, the same noise in every run."""
    generator = torch.Generator().manual_seed(0)
    drawn = {p: torch.randn(*tokens.shape, width(model.cfg, p.site), generator=generator) for p in places(model.cfg)}
    noise = {place.hook: values for place, values in drawn.items() if place.site != spared}
    came, left = {}, {}

    def through(activation: Tensor, hook: HookPoint, name: str) -> Tensor | None:
        if name in came:
            raise _refusal(model.tl, f"{name} fires more than once in a run")
        came[name] = left[name] = activation
        if name not in noise:
            return None
        if flat(activation).shape != noise[name].shape:
            shape, n = list(activation.shape), noise[name].shape[-1]
            raise _refusal(model.tl, f"{name} has shape {shape}, and its config speaks of {n} channels")
        left[name] = noise[name].to(activation).view_as(activation)
        return left[name]

    names, there = _points(model.cfg), model.tl.hook_dict
    missing = [name for name in names if name not in there]
    if missing:
        raise _refusal(model.tl, f"it has no hook point {missing[0]}")
    with model.hooks([(name, partial(through, name=name)) for name in names]):
        logits = model(tokens)
    silent = [name for name in names if name not in came]
    if silent:
        raise _refusal(model.tl, f"{silent[0]} does not fire")
    return _Run(came, left, logits)


def _points(cfg: Shape) -> list[str]:
    """Every hook point that the proof looks at."""
    between = [sites.Z_HOOK, sites.PATTERN_HOOK, sites.RESID_PRE_HOOK, sites.RESID_MID_HOOK, sites.RESID_POST_HOOK]
    between += [sites.PRE_HOOK, *[sites.PRE_LINEAR_HOOK] * cfg.gated_mlp]
    inside = [hook.format(layer=layer) for layer in range(cfg.n_layers) for hook in between]
    last = [] if cfg.norm == "none" else [sites.FINAL_SCALE_HOOK]
    return [sites.EMBED_HOOK, *inside, *last, *(place.hook for place in places(cfg))]


@contextmanager
def nobody_listening(tl: Any) -> Iterator[None]:
    """Inside the block the hooks that somebody has put on a model of TransformerLens' kind, ours too, are off."""
    theirs = {point: point._forward_hooks for point in tl.hook_dict.values()}
    for point in theirs:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in theirs.items():
            point._forward_hooks = hooks


@torch.no_grad()
def _prove(model: DenseModel) -> None:
    """Raise ConfigError unless noise in place of every node goes where `WIRES` says."""
    n = min(4, model.cfg.n_ctx)
    tokens = (torch.arange(2 * n) % model.cfg.d_vocab).view(2, n).to(model.embed.W_E.device)
    with evaluating(model), nobody_listening(model.tl):
        noisy = _noisy(model, tokens)
        for sentence, found, expected in _statements(model, tokens, noisy):
            error = float((found - expected).abs().max())
            bound = torch.finfo(found.dtype).eps ** 0.5 * max(1.0, float(expected.abs().max()))
            if not error <= bound:
                raise _refusal(model.tl, f"it is not true that {sentence} (off by {error:.2g}, bound {bound:.2g})")
        for site in ("q", "k"):
            spared = _noisy(model, tokens, spared=site)
            for layer in range(model.cfg.n_layers):
                name = sites.PATTERN_HOOK.format(layer=layer)
                if torch.equal(spared.came[name], noisy.came[name]):
                    raise _refusal(model.tl, f"what is written to {SITES[site].at(layer)} does not reach the pattern")


def _statements(model: DenseModel, tokens: Tokens, noisy: _Run) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What has to be true, in words, and its two sides."""
    came, left = noisy.came, noisy.left
    read = left[SITES["final_read"].hook]
    yield "W_U carries the last read to the logits", _steps(noisy.logits), _steps(read) @ model.unembed.W_U
    if model.cfg.norm != "none":
        stream = came[sites.RESID_POST_HOOK.format(layer=model.cfg.n_layers - 1)]
        stream = stream - stream.mean(-1, keepdim=True) if model.cfg.norm == "layer" else stream
        normed = stream / came[sites.FINAL_SCALE_HOOK] * model.ln_final.w
        yield (
            "the last norm divides by its scale and has the gain w",
            _steps(came[SITES["final_read"].hook]),
            _steps(normed),
        )
    yield "the embedding is a row of W_E", came[sites.EMBED_HOOK], model.embed.W_E[tokens]
    beside = came[sites.RESID_PRE_HOOK.format(layer=0)] - came[sites.EMBED_HOOK]
    yield "the stream begins with the embedding, and beside it what positions say", beside[0], beside[1]
    for layer, block in enumerate(model.layers):
        at = {name: hook.format(layer=layer) for name, hook in _HOOKS.items()}
        for wire in wires(model.cfg):
            source, target = (at[end] for end in _carried(model.cfg, wire))
            sentence = f"{wire.weight_name} carries {source} to {target}"
            yield sentence, _steps(came[target]), _steps(left[source]) @ wire.weight(block)
        values = left[at["v"]].repeat_interleave(group_size(model.cfg), dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", came[at["pattern"]], values)
        yield f"{at['z']} is the pattern times {at['v']}", came[at["z"]], mixed
        for before, write, after in (("pre", "attn_write", "mid"), ("mid", "mlp_write", "post")):
            total = came[at[before]] + left[at[write]]
            yield f"{at[after]} is {at[before]} plus {at[write]}", came[at[after]], total
    logits = model(tokens)
    for layer in range(model.cfg.n_layers + 1):
        stream = model(tokens, stop_at_layer=layer)
        found = model(stream, tokens=tokens, start_at_layer=layer)
        yield f"a run that starts again at layer {layer} ends as one that never stopped", found, logits


_HOOKS = {name: site.hook for name, site in SITES.items()} | {
    "z": sites.Z_HOOK,
    "pattern": sites.PATTERN_HOOK,
    "neuron input": sites.PRE_HOOK,
    "gated input": sites.PRE_LINEAR_HOOK,
    "pre": sites.RESID_PRE_HOOK,
    "mid": sites.RESID_MID_HOOK,
    "post": sites.RESID_POST_HOOK,
}


def _carried(cfg: Shape, wire: Wire) -> tuple[str, str]:
    """The two hook points between which a weight matrix, but for a bias, is all there is."""
    if wire.source is sites.V:
        return "z", wire.target.name
    if wire.target is sites.NEURON:
        return wire.source.name, "gated input" if cfg.gated_mlp and wire in WIRES else "neuron input"
    return wire.source.name, wire.target.name


def _steps(activation: Tensor) -> Float[Tensor, "row width"]:
    """How an activation differs from one position to the next; biases drop out."""
    return flat(activation).flatten(0, 1).diff(dim=0)
