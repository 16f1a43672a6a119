"""The shape of a weight-sparse transformer, as a TransformerLens config.

A dense model is the same shape with `density=1` and `afrac=None`: its fields are all here, and no second class exists.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from transformer_lens.config import TransformerLensConfig

from sparse_interp.errors import ConfigError

ABSTOPK_SITES = ("attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write")
"""The sites inside a block at which AbsTopK may act."""

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post")
"""Where it may act on the stream itself: as a block takes it over, after attention has written, after the MLP has."""

_CHOICES = {
    "positions": ("add", "concat", "none"),
    "act_fn": ("gelu", "relu"),
    "norm": ("rms", "layer", "none"),
    "attention_dir": ("causal", "bidirectional"),
    "residual_act": ("identity", "relu"),
}
_NORMALIZATION_TYPE = {"rms": "RMS", "layer": "LN", "none": None}
_POSITIONAL_TYPE = {"add": "standard", "concat": "concat", "none": "none"}
_DERIVED = ("normalization_type", "uses_rms_norm", "positional_embedding_type", "d_vocab_out")
_FIXED: dict[str, Any] = {"n_key_value_heads": None, "attn_only": False, "gated_mlp": False, "num_experts": None}


@dataclass(kw_only=True, repr=False)
class ModelConfig(TransformerLensConfig):
    """Shape of a weight-sparse transformer. Mutable, because TransformerLens writes `use_*` and `device`."""

    _RUNTIME: ClassVar[tuple[str, ...]] = (
        "device",
        "use_attn_result",
        "use_split_qkv_input",
        "use_attn_in",
        "use_hook_mlp_in",
    )
    """Fields that say how a model is being used and not what it is; they are not saved."""

    density: float = 1.0
    """Share of entries allowed to be non-zero in every weight matrix, in (0, 1]."""

    afrac: float | None = None
    """Share of entries that AbsTopK keeps at each of `afrac_sites`, in [0, 1]; None switches AbsTopK off."""

    afrac_min: int = 0
    """Entries that AbsTopK keeps at least, where `afrac` of a site's width is fewer."""

    afrac_sites: tuple[str, ...] = ABSTOPK_SITES
    """Where AbsTopK acts: any of the eight block sites, and of `resid_pre`, `resid_mid` and `resid_post`."""

    sink: bool = True
    """Whether each head has a learned sink logit: one extra term in the softmax's denominator."""

    bigram: bool = True
    """Whether logits get the row of the current token from a table over pairs of tokens."""

    bigram_learnable: bool = False
    """Whether that table is trained; else it stays as it was set, at log counts as a rule."""

    positions: str = "add"
    """`add` position vectors to the stream, `concat` them to every block read, or `none`."""

    d_pos_emb: int | None = None
    """Channels of a concatenated position vector; None unless `positions` is `concat`."""

    tie_unembed: bool = False
    """Whether the unembedding is the embedding's transpose."""

    bias: bool = True
    """Whether the six weight matrices of a block have biases."""

    act_fn: str = "gelu"
    """Non-linearity of the neurons: `gelu` (the exact form) or `relu`."""

    norm: str = "rms"
    """What normalises each read: `rms`, `layer` or `none`."""

    norm_bias: bool = True
    """Whether LayerNorm has a bias; RMSNorm never has."""

    eps: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Added to the mean square before its root; None takes torch's own, 1.19e-7 for rms and 1e-5 for layer."""

    attention_dir: str = "causal"
    """`causal`, or `bidirectional` for hand-built and compiled models."""

    residual_act: str = "identity"
    """Applied to the whole stream after each addition: `identity` or `relu`."""

    initializer_range: float = 0.02
    """Standard deviation of initial weights; writes to the stream get it divided by sqrt(2 n_layers)."""

    seed: int | None = None
    """Seed of the initial weights; None draws from torch's global generator."""

    model_name: str = "custom"
    """What the model is called in tables and files."""

    original_architecture: str = "HookedSparseTransformer"
    """Read by TransformerLens; says which class built the model."""

    tokenizer_name: str | None = None
    """Name of the bundled tokenizer that the model was trained with."""

    tokenizer_prepends_bos: bool | None = False
    """Whether the tokenizer itself puts a bos token in front; ours never does."""

    use_attn_in: bool = False
    """Whether each head reads its own copy of the stream through `attn.hook_attn_in`."""

    use_hook_mlp_in: bool = False
    """Whether the MLP reads its own copy of the stream through `hook_mlp_in`."""

    parallel_attn_mlp: bool = False
    """Always False: attention writes before the MLP reads."""

    init_mode: str = "gpt2"
    """Read by TransformerLens; initial weights are normal."""

    d_vocab_out: int = -1
    """Columns of the unembedding; always `d_vocab`."""

    def __post_init__(self) -> None:
        if self.device is None:
            self.device = "cpu"
        if self.eps is None:
            self.eps = 1e-5 if self.norm == "layer" else float(torch.finfo(torch.float32).eps)
        self.afrac_sites = tuple(self.afrac_sites)
        self.validate_heads()
        super().__post_init__()
        self.d_vocab_out = self.d_vocab
        self.uses_rms_norm = self.norm == "rms"
        self.normalization_type = _NORMALIZATION_TYPE.get(self.norm, self.norm)
        self.positional_embedding_type = _POSITIONAL_TYPE.get(self.positions, self.positions)
        self.validate()

    def validate_heads(self) -> None:
        """Raise ConfigError if the heads' number is left open and the width does not split into heads."""
        if self.n_heads == -1 and (self.d_head < 1 or self.d_model % self.d_head):
            below = self.d_model - self.d_model % max(self.d_head, 1)
            raise ConfigError(
                f"d_model={self.d_model} does not split into heads of d_head={self.d_head}; the nearest widths "
                f"that do are {below} and {below + self.d_head}. Or give n_heads: any number of heads is allowed."
            )

    def validate(self) -> None:
        """Raise ConfigError if the fields do not describe a model."""
        for name in ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_mlp", "d_vocab"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, and a model needs at least 1. Set {name}.")
        if not 0 < self.density <= 1:
            raise ConfigError(
                f"density={self.density} is not a share of weights that may be non-zero: it must be above 0 and "
                "at most 1 (1 is a dense model; 0.05 keeps one weight in twenty)."
            )
        if self.afrac is not None and not 0 <= self.afrac <= 1:
            raise ConfigError(f"afrac={self.afrac} is not a share in [0, 1]; None switches AbsTopK off.")
        if self.afrac_min < 0:
            raise ConfigError(f"afrac_min={self.afrac_min}; the number of entries kept at least is 0 or more.")
        known = (*ABSTOPK_SITES, *STREAM_SITES)
        for site in self.afrac_sites:
            if site not in known:
                raise ConfigError(f"afrac_sites names {site!r}, which is no site; choose from {', '.join(known)}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(map(repr, allowed))}.")
        if (self.positions == "concat") != (self.d_pos_emb is not None):
            raise ConfigError(
                f"positions={self.positions!r} with d_pos_emb={self.d_pos_emb}: d_pos_emb is the width of "
                "concatenated position vectors. Set both, or neither."
            )
        if self.d_pos_emb is not None and self.d_pos_emb < 1:
            raise ConfigError(f"d_pos_emb={self.d_pos_emb}, and concatenated positions need at least 1 channel.")
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not supported: leave it at {value!r}.")

    @property
    def d_read(self) -> int:
        """Channels of a block read: the stream's, and the concatenated position's if there is one."""
        return self.d_model + (self.d_pos_emb or 0)

    @property
    def n_params(self) -> int:
        """Entries of the blocks' six weight matrices, zeros included, as TransformerLens counts them."""
        assert self.d_mlp is not None
        return self.n_layers * (
            (3 * self.d_read + self.d_model) * self.n_heads * self.d_head + (self.d_read + self.d_model) * self.d_mlp
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the state dict of a model of this shape."""
        assert self.d_mlp is not None
        d_model, d_mlp, pos, heads = self.d_model, self.d_mlp, self.d_pos_emb, (self.n_heads, self.d_head)
        block = self._norm_shapes("ln1", d_model) | self._norm_shapes("ln2", d_model)
        for letter in "QKV":
            block |= {f"attn.W_{letter}": (self.n_heads, d_model, self.d_head), f"attn.b_{letter}": heads}
            block |= {} if pos is None else {f"attn.W_{letter}_pos": (self.n_heads, pos, self.d_head)}
        block |= {"attn.W_O": (*heads, d_model), "attn.b_O": (d_model,)}
        block |= {"attn.sink": (self.n_heads,)} if self.sink else {}
        block |= {"mlp.W_in": (d_model, d_mlp), "mlp.b_in": (d_mlp,), "mlp.W_out": (d_mlp, d_model)}
        block |= {"mlp.b_out": (d_model,)}
        if pos is not None:
            block |= {"mlp.W_in_pos": (pos, d_mlp)}
            block |= self._norm_shapes("ln1_pos", pos) | self._norm_shapes("ln2_pos", pos)
        shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (self.d_vocab, d_model)}
        shapes |= {} if self.positions == "none" else {"pos_embed.W_pos": (self.n_ctx, pos or d_model)}
        shapes |= {f"blocks.{layer}.{name}": shape for layer in range(self.n_layers) for name, shape in block.items()}
        shapes |= self._norm_shapes("ln_final", d_model) | {"unembed.b_U": (self.d_vocab,)}
        shapes |= {} if self.tie_unembed else {"unembed.W_U": (d_model, self.d_vocab)}
        return shapes | ({"bigram_table": (self.d_vocab, self.d_vocab)} if self.bigram else {})

    def _norm_shapes(self, name: str, size: int) -> dict[str, tuple[int, ...]]:
        gain = {} if self.norm == "none" else {f"{name}.w": (size,)}
        return gain | ({f"{name}.b": (size,)} if self.norm == "layer" and self.norm_bias else {})

    def to_dict(self) -> dict[str, Any]:
        """Every field as TransformerLens wants it, the dtype as a torch dtype."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to_json(self) -> str:
        """What the model is, as JSON; how it is being used (device, `use_*` flags) is left out."""
        data = {k: v for k, v in self.to_dict().items() if k not in self._RUNTIME and k not in _DERIVED}
        data["dtype"] = str(self.dtype).removeprefix("torch.")
        return json.dumps(data, indent=2)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "ModelConfig":
        """Build a config from a dict; an unknown key raises ConfigError, naming the nearest field."""
        known = {f.name for f in fields(cls)}
        for key in config_dict:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown field {key!r} in a model config.{hint} Known: {', '.join(sorted(known))}.")
        data = dict(config_dict)
        if isinstance(data.get("afrac_sites"), list):  # JSON has no tuples
            data["afrac_sites"] = tuple(data["afrac_sites"])
        if isinstance(data.get("dtype"), str):
            data["dtype"] = getattr(torch, data["dtype"].removeprefix("torch."), None)
            if not isinstance(data["dtype"], torch.dtype):
                raise ConfigError(f"dtype={config_dict['dtype']!r} is not a torch dtype such as 'float32'.")
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"a model config is incomplete or has a value of the wrong kind: {error}.") from error

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Inverse of `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a model config is not JSON: {error}.") from error
        if not isinstance(data, dict):
            raise ConfigError(f"a model config must be a JSON object, not a {type(data).__name__}.")
        return cls.from_dict(data)

    def __repr__(self) -> str:
        default = {f.name: f.default for f in fields(self)}
        shown = [f"{k}={v!r}" for k, v in self.to_dict().items() if v != default[k] and k not in _DERIVED]
        return f"ModelConfig({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What nodes, wires and circuit files need to know of a model, ours or another's: how much of what there is."""

    model_name: str
    """What the model is called in tables and files."""

    n_layers: int
    """Blocks."""

    n_ctx: int
    """Longest prompt, tokens."""

    d_vocab: int
    """Token ids."""

    d_model: int
    """Residual-stream channels."""

    d_pos_emb: int | None
    """Channels of a concatenated position vector; None where there is none."""

    n_heads: int
    """Heads of queries."""

    n_key_value_heads: int | None
    """Heads of keys and of values; None where every head has its own."""

    d_head: int
    """Channels of one head."""

    d_mlp: int
    """Neurons of one MLP."""

    gated_mlp: bool
    """Whether a neuron is a product of two branches, each with a weight from the read."""

    attention_dir: str
    """`causal` or `bidirectional`."""

    norm: str
    """What normalises each read: `rms`, `layer` or `none`."""

    @property
    def d_read(self) -> int:
        """Channels of a block read: the stream's, and the concatenated position's if there is one."""
        return self.d_model + (self.d_pos_emb or 0)

    @classmethod
    def of(cls, cfg: "AnyShape") -> "Shape":
        """The shape that a config describes."""
        return cls(**{f.name: getattr(cfg, f.name) for f in fields(cls)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Shape":
        """The shape in a dict that may say more: a whole config, as the first circuit files hold it."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


AnyShape = ModelConfig | Shape
"""What places and nodes are counted from."""
