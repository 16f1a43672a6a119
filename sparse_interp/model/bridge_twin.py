"""A `TransformerBridge` that computes what a HookedSparseTransformer computes, for the tools that take nothing else.

    weights W [d_in, d_out]           ->  a linear layer W^T, with AbsTopK inside it where the model cuts what it gives
    attention, MLP, block             ->  modules of the layout that TransformerLens' bridges are made for
    the softmax with its sink         ->  the model's own code, on the bridge's hook points

Every node is at its usual name (`attn.hook_in`, `hook_q`, `mlp.hook_post`, `hook_attn_out`, ...), after AbsTopK, and an
edit there does what it does in the model. A bridge may rewrite its weights into a processed form; AbsTopK stands
between the weights that this would merge, so the twin refuses it. TransformerLens 4 is needed; this module imports it,
so only those who build a twin import this module.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    PositionEmbeddingsAttentionBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.utilities import get_act_name

from sparse_interp.axes import HeadVectors, Logits, Resid, Tokens
from sparse_interp.errors import ConfigError, WrongToolWarning
from sparse_interp.model.config import STREAM_SITES, ModelConfig
from sparse_interp.model.layers import MLP, Attention, Block, Cut, KeyMask, Norm

LetterReads = dict[str, Tensor]
"""What q, k and v read: one tensor [batch pos d_model], or one per head [batch pos head d_model]."""


def bridge_twin(model: Any) -> "SparseBridge":
    """The twin of a HookedSparseTransformer: its own copy of the weights, on the same device, in eval mode.

    Raises:
        ConfigError: if a bridge cannot express the model: positions that are concatenated, or a stream that is no sum.
    """
    cfg = model.cfg
    _check_expressible(cfg)
    config = TransformerBridgeConfig(
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        n_layers=cfg.n_layers,
        n_ctx=cfg.n_ctx,
        n_heads=cfg.n_heads,
        d_vocab=cfg.d_vocab,
        d_mlp=cfg.d_mlp,
        act_fn=cfg.act_fn,
        eps=cfg.eps,
        normalization_type=cfg.normalization_type,
        uses_rms_norm=cfg.uses_rms_norm,
        attention_dir=cfg.attention_dir,
        positional_embedding_type=cfg.positional_embedding_type,
        default_prepend_bos=cfg.default_prepend_bos,
        tokenizer_prepends_bos=False,
        model_name=cfg.model_name,
        original_architecture=cfg.original_architecture,
        architecture="HookedSparseTransformer",
        dtype=cfg.dtype,
        device=cfg.device,
    )
    with torch.no_grad():
        module = Twin(model).eval()
    return SparseBridge(module, SparseAdapter(config, cfg), model.tokenizer).eval()


def _check_expressible(cfg: ModelConfig) -> None:
    beyond = []
    if cfg.positions == "concat":
        beyond.append("positions='concat' (a bridge knows positions that are added)")
    if cfg.residual_act != "identity":
        beyond.append(f"residual_act={cfg.residual_act!r}")
    beyond += [f"AbsTopK at {site}" for site in STREAM_SITES if cfg.afrac is not None and site in cfg.afrac_sites]
    if beyond:
        raise ConfigError(
            f"this model has no TransformerBridge twin, because of {', '.join(beyond)}. The model itself runs in every "
            "tool of TransformerLens that does not insist on a TransformerBridge."
        )


# -- the modules that the bridge is built around ----------------------------------------------------------------------


class CutLinear(nn.Linear):
    """read -> T(read W + b)."""

    def __init__(self, weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"], cut: Cut | None = None):
        super().__init__(*weight.shape, device="meta")
        self.weight, self.bias = nn.Parameter(weight.detach().T.clone()), nn.Parameter(bias.detach().clone())
        self.cut = None if cut is None or cut.k is None else cut

    def forward(self, input: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What is written, cut."""
        out = super().forward(input)
        return out if self.cut is None else self.cut(out)


class TwinHead(CutLinear):
    """read -> read W_U + b_U (+ a row of the bigram table), float32 at least."""

    def forward(self, input: Resid, row: Logits | None = None) -> Logits:
        """Logits; without a row they are what the stream alone says."""
        logits = super().forward(input)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if row is None else logits + row.to(logits.dtype)


class Copy(nn.Module):
    """x, in memory of its own."""

    def forward(self, x: Resid) -> Resid:
        """A copy."""
        return x.clone()


class TwinAttention(nn.Module):
    """The weights of one attention; `SparseAttentionBridge` computes with them."""

    def __init__(self, attn: Attention, read: Cut):
        super().__init__()
        for letter in "QKV":
            weight, bias = getattr(attn, f"W_{letter}"), getattr(attn, f"b_{letter}")
            projection = CutLinear(
                weight.permute(1, 0, 2).flatten(1), bias.flatten(), getattr(attn, f"cut_{letter.lower()}")
            )
            self.add_module(letter.lower(), projection)
        self.o = CutLinear(attn.W_O.flatten(0, 1), attn.b_O, attn.cut_write)
        self.sink = None if attn.sink is None else nn.Parameter(attn.sink.detach().clone())
        self.cut_read = read


class TwinMLP(nn.Module):
    """read -> T(T(act(read W_in + b_in)) W_out + b_out)."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.fc_in, self.fc_out = CutLinear(mlp.W_in, mlp.b_in), CutLinear(mlp.W_out, mlp.b_out, mlp.cut_write)
        self.act, self.cut = mlp.act, mlp.cut_neuron

    def forward(self, read: Resid) -> Resid:
        """What the MLP writes."""
        return self.fc_out(self.cut(self.act(self.fc_in(read))))


class TwinBlock(nn.Module):
    """One block; the stream between its halves has a place of its own, where an edit reaches all that follows."""

    def __init__(self, block: Block):
        super().__init__()
        self.ln1, self.ln2 = _norm(block.ln1), _norm(block.ln2)
        self.attn, self.mlp = TwinAttention(block.attn, block.cut_attn_read), TwinMLP(block.mlp)
        self.cut_attn_read, self.cut_mlp_read, self.mid = block.cut_attn_read, block.cut_mlp_read, Copy()

    def forward(self, hidden_states: Resid, attention_mask: KeyMask | None = None) -> tuple[Resid]:
        """The stream after the block."""
        write, _ = self.attn(self.cut_attn_read(self.ln1(hidden_states.clone())), attention_mask=attention_mask)
        hidden_states = self.mid(hidden_states + write)
        return (hidden_states + self.mlp(self.cut_mlp_read(self.ln2(hidden_states.clone()))),)


class Twin(nn.Module):
    """tokens -> logits, as `HookedSparseTransformer` computes them."""

    def __init__(self, model: Any):
        super().__init__()
        cfg = model.cfg
        self.n_ctx = cfg.n_ctx
        self.tok_embed = _rows(model.embed.W_E)
        self.pos = _rows(model.pos_embed.W_pos) if cfg.positions == "add" else None
        self.layers = nn.ModuleList(TwinBlock(block) for block in model.blocks)
        self.ln_out = _norm(model.ln_final)
        self.head = TwinHead(model.unembed.W_U, model.unembed.b_U)
        self.bigram_rows = _rows(model.bigram_table).requires_grad_(cfg.bigram_learnable) if cfg.bigram else None

    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Resid | None = None,
    ) -> Logits:
        """Logits, float32 at least; without tokens, there are none for a model with a bigram table."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(f"an attention mask is [batch pos], 1 for tokens; got {list(attention_mask.shape)}.")
        if input_ids is not None and input_ids.shape[1] > self.n_ctx:
            raise ConfigError(f"{input_ids.shape[1]} tokens, and the model takes at most n_ctx={self.n_ctx}.")
        hidden_states = self.tok_embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.pos is not None:
            seen = torch.ones_like(hidden_states[..., 0]) if attention_mask is None else attention_mask
            hidden_states = hidden_states + self.pos((seen.long().cumsum(-1) - 1).clamp(min=0))
        mask = None if attention_mask is None else attention_mask.bool()
        for layer in self.layers:
            (hidden_states,) = layer(hidden_states, attention_mask=mask)
        if self.bigram_rows is not None and input_ids is None:
            raise ConfigError(
                "logits of a model with a bigram table need the tokens: give tokens, or stop before logits."
            )
        row = None if self.bigram_rows is None else self.bigram_rows(input_ids)
        return self.head(self.ln_out(hidden_states), row=row)


def _norm(norm: Norm) -> nn.Module:
    if norm.kind == "none":
        return Copy()
    size = len(norm.w)
    out = nn.RMSNorm(size, norm.eps) if norm.kind == "rms" else nn.LayerNorm(size, norm.eps, bias=norm.b is not None)
    out = out.to(norm.w)
    out.weight.copy_(norm.w)
    if norm.b is not None:
        out.bias.copy_(norm.b)
    return out


def _rows(table: Float[Tensor, "row d_out"]) -> nn.Embedding:
    return nn.Embedding.from_pretrained(table.detach().clone(), freeze=False)


# -- the bridge around them -------------------------------------------------------------------------------------------


class SparseAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Attention with a sink and AbsTopK on a bridge's hook points.

    It is of the one class that TransformerLens lets split its inputs and results by head.
    """

    pattern = Attention.pattern  # the model's own softmax, which asks for `cfg`, `sink` and four hook points

    def __init__(self, name: str, config: Any, submodules: dict[str, Any]):
        super().__init__(name, config, submodules)
        self.hook_sink_logits = HookPoint()
        self.hook_sink = HookPoint()

    @property
    def cfg(self) -> Any:
        """The bridge's config."""
        return self.config

    @property
    def sink(self) -> Float[Tensor, " head"] | None:
        """The sink logits."""
        return self.original_component.sink

    def forward(self, hidden_states: Resid, attention_mask: KeyMask | None = None) -> tuple[Resid, Tensor]:
        """What attention writes, and its pattern."""
        forked = self.config.use_split_qkv_input or self.config.use_attn_in
        before = hidden_states.clone() if forked else hidden_states
        read = self.hook_in(hidden_states)
        reads = self._forks(read - before) if forked else dict.fromkeys("qkv", read)
        q, k, v = (self._project(letter, reads[letter]) for letter in "qkv")
        pattern = self.pattern(q, k, attention_mask)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.to(pattern.dtype)).contiguous()
        return self.hook_out(self._write(z)), pattern

    def _forks(self, change: Resid) -> LetterReads:
        """One read for each head, of a copy of the stream; what a hook changed in the common read is added to each."""
        points = {"q": self.hook_q_input, "k": self.hook_k_input, "v": self.hook_v_input}
        if not self.config.use_split_qkv_input:
            points = dict.fromkeys("qkv", self.hook_attn_in)
        stream, cut, heads = self._captured_pre_ln_residual, self.original_component.cut_read, self.config.n_heads
        reads = {point: cut(self._fork_and_norm_per_head(stream, point, heads)) for point in set(points.values())}
        return {letter: reads[point] + change.unsqueeze(2) for letter, point in points.items()}

    def _project(self, letter: str, read: Tensor) -> HeadVectors:
        part, heads = getattr(self, letter), self.config.n_heads
        if read.ndim == 3:
            return part(read).unflatten(-1, (heads, -1))
        linear = part.original_component
        out = torch.einsum("bphm,hdm->bphd", read, linear.weight.unflatten(0, (heads, -1))).flatten(2) + linear.bias
        return part.hook_out(out if linear.cut is None else linear.cut(out)).unflatten(-1, (heads, -1))

    def _write(self, z: HeadVectors) -> Resid:
        """The write of all heads; with `use_attn_result`, as the sum of what survives of each, bias shared evenly."""
        if not self.config.use_attn_result:
            return self.o(z.flatten(2))
        z, linear, heads = self.o.hook_in(z.flatten(2)), self.o.original_component, self.config.n_heads
        weight = linear.weight.unflatten(1, (heads, -1))
        results = torch.einsum("bphd,mhd->bphm", z.unflatten(-1, (heads, -1)), weight) + linear.bias / heads
        if linear.cut is not None:
            results = results * (linear.cut(results.sum(2)) != 0).unsqueeze(2)
        return self.o.hook_out(self.hook_result(results).sum(2))


class SparseAdapter(ArchitectureAdapter):
    """Where a bridge finds the parts of `Twin`."""

    supports_kv_cache = False
    supports_hf_output_attentions = False

    def __init__(self, config: TransformerBridgeConfig, cfg: ModelConfig):
        super().__init__(config)
        self.bigram = cfg.bigram

        def norm(name: str) -> GeneralizedComponent:
            kind = GeneralizedComponent if cfg.norm == "none" else NormalizationBridge
            return kind(name=name, config=self.cfg)

        projections = {letter: LinearBridge(name=letter) for letter in "qkvo"}
        neurons = {"in": LinearBridge(name="fc_in"), "out": LinearBridge(name="fc_out")}
        parts = {
            "ln1": norm("ln1"),
            "attn": SparseAttentionBridge("attn", self.cfg, projections),
            "mid": GeneralizedComponent(name="mid", config=self.cfg),
            "ln2": norm("ln2"),
            "mlp": MLPBridge(name="mlp", config=self.cfg, submodules=neurons),
        }
        stream = {"hook_resid_mid": "mid.hook_out"}
        self.component_mapping = {"embed": EmbeddingBridge(name="tok_embed")}
        if cfg.positions == "add":
            self.component_mapping["pos_embed"] = PosEmbedBridge(name="pos")
        self.component_mapping |= {
            "blocks": BlockBridge(name="layers", config=self.cfg, submodules=parts, hook_alias_overrides=stream),
            "ln_final": norm("ln_out"),
            "unembed": UnembeddingBridge(name="head"),
        }
        if cfg.bigram:
            self.component_mapping["bigram"] = EmbeddingBridge(name="bigram_rows")

    def apply_output_logits_transform(self, logits: Tensor) -> Tensor:
        """What TransformerLens' lenses read off the stream: the logits as they are, and a warning of what they lack."""
        _warn_of_bigram(self.bigram)
        return logits


def _warn_of_bigram(bigram: bool) -> None:
    if bigram:
        warnings.warn(
            "this model adds a row of its bigram table to the logits, and no component of the stream holds it: logits "
            "and attributions read off the stream lack it. A cache has the row of every token at hook_bigram.",
            WrongToolWarning,
            stacklevel=4,
        )


class TwinCache(ActivationCache):
    """What the hook points of a twin saw; what TransformerLens would take apart without AbsTopK is refused."""

    def compute_head_results(self) -> None:
        """As in TransformerLens, if the run had `use_attn_result` on or nothing cuts the write."""
        self._ensure_head_results()

    def _ensure_head_results(self) -> bool:
        layers = range(self.model.cfg.n_layers)
        if not all(get_act_name("result", layer) in self.cache_dict for layer in layers):
            self._refuse_cut(
                self.model.blocks[0].attn.o, "heads", " So has that of a run after set_use_attn_result(True)."
            )
        return super()._ensure_head_results()

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in TransformerLens, if nothing cuts the write."""
        self._refuse_cut(self.model.blocks[0].mlp.out, "neurons")
        return super().get_neuron_results(*args, **kwargs)

    def _stack_neuron_results_apply_ln_projected(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refuse_cut(self.model.blocks[0].mlp.out, "neurons")
        return super()._stack_neuron_results_apply_ln_projected(*args, **kwargs)

    def _refuse_cut(self, writer: Any, parts: str, way_out: str = "") -> None:
        if writer.original_component.cut is not None:
            raise ConfigError(
                f"TransformerLens would take {parts} for what they wrote before AbsTopK. The cache of the model itself "
                f"(model.run_with_cache) has what they wrote.{way_out}"
            )

    def apply_ln_to_stack(self, residual_stack: Tensor, layer: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As in TransformerLens; at the end of the stream it warns of a bigram table."""
        _warn_of_bigram(self.model.adapter.bigram and layer in (None, -1, self.model.cfg.n_layers))
        return super().apply_ln_to_stack(residual_stack, layer, *args, **kwargs)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "TwinCache":
        """The same cache for some of its prompts."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return TwinCache(sliced.cache_dict, self.model, has_batch_dim=sliced.has_batch_dim)


class SparseBridge(TransformerBridge):
    """The twin. Its weights stay as they are: TransformerLens' weight processing would make another model of it."""

    hook_aliases = TransformerBridge.hook_aliases | {"hook_bigram": "bigram.hook_out"}

    def run_with_cache(self, *args: Any, return_cache_object: bool = True, **kwargs: Any) -> tuple[Any, Any]:
        """As in TransformerLens; the cache refuses what it would take apart wrongly."""
        out, cache = super().run_with_cache(*args, return_cache_object=return_cache_object, **kwargs)
        return out, TwinCache(
            cache.cache_dict, self, has_batch_dim=cache.has_batch_dim
        ) if return_cache_object else cache

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; its direct path patching, which sends what AbsTopK would have cut, gets a warning."""
        names = [getattr(hook, "__qualname__", "") for _, hook in kwargs.get("fwd_hooks", ())]
        cut = self.blocks[0].attn.o.original_component.cut is not None
        if cut and any(name.startswith("_make_direct_path_hook.") for name in names):
            warnings.warn(
                "TransformerLens' get_act_patch_direct_path ignores that AbsTopK cuts what heads write, so its numbers "
                "are wrong on this twin; sparse_interp.patch_direct_paths is exact on the model itself.",
                WrongToolWarning,
                stacklevel=2,
            )
        return super().run_with_hooks(*args, **kwargs)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*batch d_model"]:
        """The direction that a token's logit reads of the normalised stream, final gain included, as in the model."""
        gain = getattr(self.ln_final.original_component, "weight", 1.0)
        return super().tokens_to_residual_directions(tokens) * gain

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, **folds: Any
    ) -> None:
        """Legacy names of TransformerLens, and no processing of weights: `no_processing=True` has to be said.

        Raises:
            ConfigError: without it.
        """
        if not no_processing:
            self.process_weights()
        super().enable_compatibility_mode(disable_warnings=disable_warnings, no_processing=True)

    def process_weights(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "TransformerLens' weight processing (folding norms and value biases, centring) would change what this "
            "model computes: AbsTopK, and a sink, stand between the weights that it merges. For the names alone, call "
            "enable_compatibility_mode(no_processing=True)."
        )
