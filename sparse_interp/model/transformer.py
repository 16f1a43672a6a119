"""HookedSparseTransformer: a weight-sparse transformer, or a dense one, that any TransformerLens workflow takes.

    x = W_E[token] (+ W_pos[position]);  x = block(x) for each block
    logits = norm(x) W_U + b_U (+ bigram[token])

Gao et al. 2025 (arXiv 2511.13653). This is the only forward pass of the library: ablation, pruning, circuits and
figures are hooks on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import lm_cross_entropy_loss

from sparse_interp.axes import Logits, Resid, Tokens
from sparse_interp.errors import ConfigError
from sparse_interp.model.cache import SparseActivationCache
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.kernels import next_token_loss
from sparse_interp.model.layers import Block, Norm, heard
from sparse_interp.model.text import TextMethods


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Logits
    loss: Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]


class Embed(nn.Module):
    """token -> W_E[token]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.std = cfg.initializer_range
        self.reset_parameters()

    def forward(self, tokens: Tokens) -> Resid:
        return nn.functional.embedding(tokens, self.W_E)

    def reset_parameters(self) -> None:
        """Normal weights."""
        nn.init.normal_(self.W_E, std=self.std)


class PosEmbed(nn.Module):
    """position -> W_pos[position], in memory of its own."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_pos_emb or cfg.d_model))
        self.std = cfg.initializer_range
        self.reset_parameters()

    def forward(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_pos"]:
        return nn.functional.embedding(positions, self.W_pos)

    def reset_parameters(self) -> None:
        """Normal weights."""
        nn.init.normal_(self.W_pos, std=self.std)


class Unembed(nn.Module):
    """read -> read W_U + b_U."""

    def __init__(self, cfg: ModelConfig, tied_to: Embed | None):
        super().__init__()
        self.std = cfg.initializer_range
        self.tied_to = [tied_to]  # in a list, so that the embedding keeps one name
        if tied_to is None:
            self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.hook_in = HookPoint()  # batch pos d_model
        self.hook_out = HookPoint()  # batch pos d_vocab
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        if name == "W_U" and self.tied_to[0] is not None:
            return self.tied_to[0].W_E.T
        return super().__getattr__(name)

    def forward(self, read: Resid) -> Logits:
        logits = self.hook_in(read) @ self.W_U
        return logits.float() + self.b_U if logits.dtype in (torch.bfloat16, torch.float16) else logits + self.b_U

    def reset_parameters(self) -> None:
        """Normal weights, zero bias."""
        if self.tied_to[0] is None:
            nn.init.normal_(self.W_U, std=self.std)
        nn.init.zeros_(self.b_U)


class HookedSparseTransformer(TextMethods, HookedRootModule):
    """A transformer whose weights and activations may be sparse, on TransformerLens hooks.

    Args:
        cfg: its shape.
        tokenizer: a Hugging Face fast tokenizer; without one, the methods that take text raise TokenizerError.

    Raises:
        ConfigError: if `cfg` describes no model.
        TokenizerError: if the tokenizer has more ids than `cfg.d_vocab`.
    """

    def __init__(self, cfg: ModelConfig, tokenizer: Any = None):
        super().__init__()
        cfg.validate()
        self.cfg = cfg
        with torch.random.fork_rng(devices=[], enabled=cfg.seed is not None):
            if cfg.seed is not None:
                torch.manual_seed(cfg.seed)
            self.embed = Embed(cfg)
            self.pos_embed = None if cfg.positions == "none" else PosEmbed(cfg)
            self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
            self.ln_final = Norm(cfg, cfg.d_model)
            self.unembed = Unembed(cfg, self.embed if cfg.tie_unembed else None)
        self.hook_embed = HookPoint()  # batch pos d_model
        if cfg.positions == "add":
            self.hook_pos_embed = HookPoint()  # batch pos d_model
        elif cfg.positions == "concat":
            self.hook_pos_cat = HookPoint()  # batch pos d_pos_emb
        if cfg.bigram:
            self.hook_bigram = HookPoint()  # batch pos d_vocab
            table = torch.zeros(cfg.d_vocab, cfg.d_vocab)
            if cfg.bigram_learnable:
                self.bigram_table = nn.Parameter(table)
            else:
                self.register_buffer("bigram_table", table)
        self.to(dtype=cfg.dtype, device=cfg.device, print_details=False)
        self.set_tokenizer(tokenizer)
        self.setup()

    # -- the forward pass -------------------------------------------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Tokens | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: text, a list of texts, tokens [pos] or [batch pos]; or, with `start_at_layer`, the residual stream
                [batch pos d_model] that enters that layer.
            return_type: `logits` [batch pos d_vocab], `loss` (mean next-token cross-entropy, nats), `both` (a named
                tuple) or None (run for the hooks; returns None).
            loss_per_token: losses [batch pos-1] instead of their mean.
            prepend_bos: for text, whether to begin with the bos token; None takes `cfg.default_prepend_bos`.
            padding_side: for a list of texts; None takes the tokenizer's.
            start_at_layer: first block to run; negative counts from the end.
            tokens: with `start_at_layer`, the tokens behind the stream: needed for the loss and the bigram table.
            attention_mask: 1 for tokens, 0 for padding on either side; padding gets no attention, positions count
                from the first token, and the loss leaves padding out.
            stop_at_layer: first block not to run; returns the stream [batch pos d_model] there.

        Raises:
            ConfigError: for an unknown `return_type`, or tokens missing where they are needed.
            TokenizerError: for token ids outside the vocabulary, or more tokens than `cfg.n_ctx`.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ConfigError(f"return_type={return_type!r}; choose 'logits', 'loss', 'both' or None.")
        if start_at_layer is None:
            tokens, attention_mask = self.input_to_tokens(input, prepend_bos, padding_side, attention_mask)
            resid, pos = self.input_to_embed(tokens, attention_mask)
        else:
            resid, pos = input, self._positional_read(tokens, attention_mask, input.shape[:2])
        mask = None if attention_mask is None else attention_mask.bool()
        for block in list(self.blocks)[slice(start_at_layer, stop_at_layer)]:
            resid = block(resid, pos, mask)
        if stop_at_layer is not None:
            return resid
        if return_type == "loss" and self._loss_can_fuse(tokens, attention_mask, loss_per_token):
            read = self.unembed.hook_in(self.ln_final(resid))
            table = self.bigram_table if self.cfg.bigram else None
            return next_token_loss(read @ self.unembed.W_U, self.unembed.b_U, table, tokens)
        logits = self._logits(resid, tokens)
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ConfigError("a loss from `start_at_layer` needs the tokens behind the stream: pass tokens=.")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def input_to_embed(
        self, tokens: Tokens, attention_mask: Int[Tensor, "batch pos"] | None
    ) -> tuple[Resid, Float[Tensor, "batch pos d_pos"] | None]:
        """The stream before the first block, and the concatenated positions if the model has them."""
        resid = self.hook_embed(self.embed(tokens))
        pos = self._positional_read(tokens, attention_mask, tokens.shape)
        if self.pos_embed is not None and self.cfg.positions == "add":
            resid = resid + self.hook_pos_embed(self.pos_embed(self._positions(attention_mask, tokens.shape)))
        return resid, pos

    def _positions(self, attention_mask: Tensor | None, shape: torch.Size) -> Int[Tensor, "batch pos"]:
        if attention_mask is None:
            return torch.arange(shape[1], device=self.embed.W_E.device).repeat(shape[0], 1)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def _positional_read(self, tokens: Tokens | None, attention_mask: Tensor | None, shape: Any) -> Tensor | None:
        if self.cfg.positions != "concat":
            return None
        assert self.pos_embed is not None
        return self.hook_pos_cat(self.pos_embed(self._positions(attention_mask, torch.Size(shape))))

    def _logits(self, resid: Resid, tokens: Tokens | None) -> Logits:
        logits = self.unembed(self.ln_final(resid))
        if self.cfg.bigram:
            if tokens is None:
                raise ConfigError(
                    "logits from `start_at_layer` need the tokens behind the stream, for the bigram table: pass tokens=."
                )
            logits = logits + self.hook_bigram(nn.functional.embedding(tokens, self.bigram_table)).to(logits.dtype)
        return self.unembed.hook_out(logits)

    def _loss_can_fuse(self, tokens: Tokens | None, attention_mask: Tensor | None, loss_per_token: bool) -> bool:
        """Training, with nobody listening to logits."""
        logit_hooks = (self.unembed.hook_out, *((self.hook_bigram,) if self.cfg.bigram else ()))
        plain = tokens is not None and attention_mask is None and not loss_per_token
        return self.training and plain and not heard(*logit_hooks)

    def loss_fn(
        self,
        logits: Logits,
        tokens: Tokens,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]:
        """Next-token cross-entropy, nats; padding counts neither as input nor as target."""
        if attention_mask is None and not per_token:
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        return lm_cross_entropy_loss(logits.float(), tokens, attention_mask, per_token)

    # -- what TransformerLens' tools ask of a model -------------------------------------------------------------------

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, SparseActivationCache | dict[str, Tensor]]:
        """Run the model and keep what its hook points saw: `(output, cache)`, as in TransformerLens.

        `names_filter` takes None, a name, a list of names or a function of a name. The cache's decompositions stay
        exact under AbsTopK.
        """
        out, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, SparseActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch `attn.hook_result` on or off."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch `attn.hook_q_input`, `hook_k_input` and `hook_v_input` on or off."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch `attn.hook_attn_in` on or off."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch `hook_mlp_in` on or off."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return list(self.blocks)  # pyright: ignore[reportReturnType]

    def _stacked(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])


def _stacked_property(part: str, name: str, axes: str) -> property:
    def get(self: HookedSparseTransformer) -> Tensor:
        return self._stacked(part, name)

    get.__doc__ = f"`{part}.{name}` of every block, [{axes}]."
    return property(get)


def _single_property(path: str, axes: str) -> property:
    def get(self: HookedSparseTransformer) -> Tensor:
        module, name = path.split(".")
        return getattr(getattr(self, module), name)

    get.__doc__ = f"`{path}`, [{axes}]."
    return property(get)


for _name, _part, _axes in (
    ("W_Q", "attn", "layer head d_model d_head"),
    ("W_K", "attn", "layer head d_model d_head"),
    ("W_V", "attn", "layer head d_model d_head"),
    ("W_O", "attn", "layer head d_head d_model"),
    ("b_Q", "attn", "layer head d_head"),
    ("b_K", "attn", "layer head d_head"),
    ("b_V", "attn", "layer head d_head"),
    ("b_O", "attn", "layer d_model"),
    ("W_in", "mlp", "layer d_model d_mlp"),
    ("b_in", "mlp", "layer d_mlp"),
    ("W_out", "mlp", "layer d_mlp d_model"),
    ("b_out", "mlp", "layer d_model"),
):
    setattr(HookedSparseTransformer, _name, _stacked_property(_part, _name, _axes))
for _name, _path, _axes in (
    ("W_E", "embed.W_E", "d_vocab d_model"),
    ("W_pos", "pos_embed.W_pos", "n_ctx d_model"),
    ("W_U", "unembed.W_U", "d_model d_vocab"),
    ("b_U", "unembed.b_U", "d_vocab"),
):
    setattr(HookedSparseTransformer, _name, _single_property(_path, _axes))

Hook = tuple[str | Callable, Callable]
