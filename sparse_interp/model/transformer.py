"""HookedSparseTransformer: a weight-sparse transformer, or a dense one, that any TransformerLens workflow takes.

    x = W_E[token] (+ W_pos[position]);  x = block(x) for each block
    logits = norm(x) W_U + b_U (+ bigram[token])

Gao et al. 2025 (arXiv 2511.13653). This is the only forward pass of the library: ablation, pruning, circuits and
figures are hooks on it.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import lm_cross_entropy_loss

from sparse_interp.axes import Logits, Resid, Tokens
from sparse_interp.errors import ConfigError, TokenizerError
from sparse_interp.model.checkpoint import ModelFiles
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.edges import EdgeGate, Matrix, RowCuts, placed
from sparse_interp.model.generation import Generation
from sparse_interp.model.kernels import next_token_loss
from sparse_interp.model.layers import Block, Norm, heard, redraw_
from sparse_interp.model.loading import Loading
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import check_sites
from sparse_interp.model.surface import TransformerLensSurface


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Logits
    loss: Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]


class Embed(nn.Module):
    """token -> W_E[token]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.W_E = nn.Parameter(torch.ones(cfg.d_vocab, cfg.d_model))
        self.std = cfg.initializer_range
        self.reset_parameters()

    def forward(self, tokens: Tokens) -> Resid:
        """One vector per token."""
        return nn.functional.embedding(tokens, self.W_E)

    def reset_parameters(self) -> None:
        """Normal weights where they are not zero."""
        redraw_(self.W_E, self.std)


class PosEmbed(nn.Module):
    """position -> W_pos[position], in memory of its own."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.W_pos = nn.Parameter(torch.ones(cfg.n_ctx, cfg.d_pos_emb or cfg.d_model))
        self.std = cfg.initializer_range
        self.reset_parameters()

    def forward(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_pos"]:
        """One vector per position."""
        return nn.functional.embedding(positions, self.W_pos)

    def reset_parameters(self) -> None:
        """Normal weights where they are not zero."""
        redraw_(self.W_pos, self.std)


class Unembed(nn.Module):
    """read -> read W_U + b_U."""

    def __init__(self, cfg: ModelConfig, tied_to: Embed | None):
        super().__init__()
        self.std = cfg.initializer_range
        self.tied_to = [tied_to]  # in a list, so that the embedding keeps one name
        if tied_to is None:
            self.W_U = nn.Parameter(torch.ones(cfg.d_model, cfg.d_vocab))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.hook_in = HookPoint()  # batch pos d_model
        self.hook_out = HookPoint()  # batch pos d_vocab
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        if name == "W_U" and self.tied_to[0] is not None:
            return self.tied_to[0].W_E.T
        return super().__getattr__(name)

    def forward(self, read: Resid) -> Float[Tensor, "_batch pos d_vocab"]:
        """Logits without the bigram table, float32 at least."""
        logits = self.hook_in(read) @ self.W_U
        return logits.float() + self.b_U if logits.dtype in (torch.bfloat16, torch.float16) else logits + self.b_U

    def reset_parameters(self) -> None:
        """Normal weights where they are not zero, zero bias."""
        if self.tied_to[0] is None:
            redraw_(self.W_U, self.std)
        nn.init.zeros_(self.b_U)


class HookedSparseTransformer(Generation, ModelFiles, Loading, TransformerLensSurface):
    """A transformer whose weights and activations may be sparse, on TransformerLens hooks.

    Args:
        cfg: its shape; the model keeps a copy, in which `device`, `dtype` and the `use_*` flags follow the model.
        tokenizer: a Hugging Face fast tokenizer; without one, the methods that take text raise TokenizerError.

    Raises:
        ConfigError: if `cfg` describes no model.
        TokenizerError: if the tokenizer has more ids than `cfg.d_vocab`.
    """

    def __init__(self, cfg: ModelConfig, tokenizer: Any = None):
        super().__init__()
        cfg.validate()
        self.cfg = cfg = copy.copy(cfg)
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
        self.to(dtype=cfg.dtype, device=cfg.device)
        self.set_tokenizer(tokenizer)
        self.setup()

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedSparseTransformer":
        """Every move and cast of a module comes through here; the config follows."""
        super()._apply(fn, recurse)
        self.cfg.device, self.cfg.dtype = str(self.embed.W_E.device), self.embed.W_E.dtype
        return self

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> "HookedSparseTransformer":
        """Move or cast the model, and its config with it. `print_details` is TransformerLens'; nothing is printed."""
        return super().to(*args, **kwargs)

    def mps(self) -> "HookedSparseTransformer":
        """Move the model to Apple's GPU."""
        return self.to("mps")

    # -- the forward pass -------------------------------------------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "*batch pos"] | None = None,
        attention_mask: Int[Tensor, "*batch pos"] | Bool[Tensor, "*batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
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
            past_kv_cache: keys and values (after AbsTopK) of the tokens that came before, and where those were
                padding; this run is added to it unless it is frozen. Masks, positions and losses of the call are
                those of its own tokens. Make one with `TransformerLensKeyValueCache.init_cache(model.cfg,
                model.cfg.device, batch_size)`.

        Raises:
            ConfigError: for an unknown `return_type`, tokens missing where they are needed, or a cache that does not
                fit.
            TokenizerError: for token ids outside the vocabulary, or more tokens than `cfg.n_ctx`, the past included.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ConfigError(f"return_type={return_type!r}; choose 'logits', 'loss', 'both' or None.")
        n_past = 0 if past_kv_cache is None else past_kv_cache.previous_attention_mask.shape[1]
        if start_at_layer is None:
            tokens, attention_mask = self.input_to_tokens(input, prepend_bos, padding_side, attention_mask, n_past)
            shape = tokens.shape
        else:
            tokens, attention_mask = self._beside_stream(input, tokens, attention_mask, n_past)
            shape = input.shape[:2]
        blocks = self._blocks_between(start_at_layer, stop_at_layer)
        mask, positions = self._context(attention_mask, past_kv_cache, shape, blocks)
        resid = input if start_at_layer is not None else self.input_to_embed(tokens, positions)
        pos = None if self.cfg.positions != "concat" else self.hook_pos_cat(self.pos_embed(positions))
        for layer, block in blocks.items():
            resid = block(resid, pos, mask, None if past_kv_cache is None else past_kv_cache[layer])
        if stop_at_layer is not None:
            return resid
        if tokens is not None and tokens.shape[1] < 2 and return_type in ("loss", "both"):
            raise TokenizerError("a next-token loss needs at least 2 tokens; got 1.")
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

    def between(
        self,
        tokens: Tokens,
        *,
        enter: tuple[int, Resid] | None = None,
        leave: int | None = None,
        attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
    ) -> Resid | Logits:
        """Run from one residual site to another: 0 before block 0, 2 l + 1 and 2 l + 2 after each half of block l.

        Args:
            tokens: where the run begins, or what is behind the stream that is given.
            enter: a site, and the stream that leaves it; what comes before is not run.
            leave: the site whose stream is returned; None runs to the end and returns logits.
            attention_mask: 1 for tokens, 0 for padding on either side.

        Raises:
            ConfigError: for a stream of another width, or a site that is not there or behind the one entered.
        """
        start = 0 if enter is None else enter[0]
        stop = check_sites(self.cfg.n_layers, start, leave)
        if enter is None:
            tokens, seen = self.input_to_tokens(tokens, None, None, attention_mask, 0)
        else:
            _, seen = self._beside_stream(enter[1], tokens, attention_mask, 0)
        mask, positions = self._context(seen, None, tokens.shape, ())
        resid = self.input_to_embed(tokens, positions) if enter is None else enter[1]
        if enter is None and leave == 0:
            return self.layers[0].hook_resid_pre(self.layers[0].cut_pre(resid))
        pos = None if self.cfg.positions != "concat" else self.hook_pos_cat(self.pos_embed(positions))
        for half in range(start, stop):
            block = self.layers[half // 2]
            resid = block.processed(resid, pos) if half % 2 else block.attended(resid, pos, mask)
        return resid if leave is not None else self._logits(resid, tokens)

    # -- packed prompts -----------------------------------------------------------------------------------------------

    @property
    def packable(self) -> bool:
        """Whether packed prompts give what they give one by one: nothing tells them apart but the tokens they see."""
        parts = [part for block in self.layers for part in (block.attn, block.mlp)]
        gates = [gate for part in parts for gates in part.edge_gates.values() for gate in gates]
        forked = self.cfg.use_attn_in or self.cfg.use_split_qkv_input or self.cfg.use_attn_result
        alike = all(gate.baseline.ndim == 1 for gate in gates)
        return alike and not forked and not heard(*self.hook_dict.values())

    def packed_stream(
        self, packing: Packing, stop: int, resid: Float[Tensor, "row n d_model"] | None = None, start: int = 0
    ) -> Float[Tensor, "_row _at d_model"]:
        """The stream that enters block `stop`, or after the last block that of the prompts' ends.

        With `resid`, the stream that enters block `start`, the blocks before are not run.
        """
        resid = self.input_to_embed(packing.tokens, packing.positions) if resid is None else resid
        pos = None if self.cfg.positions != "concat" else self.hook_pos_cat(self.pos_embed(packing.positions))
        for layer, block in self._blocks_between(start, stop).items():
            here = packing.of_last_block if layer == self.cfg.n_layers - 1 else packing
            resid = block(resid, pos, None, packing=here)
        return resid

    def packed_logits(self, packing: Packing, ends: Float[Tensor, "row prompt d_model"]) -> Logits:
        """Logits [row prompt d_vocab] from the stream of the prompts' ends after the last block."""
        return self._logits(ends, packing.last_tokens.expand(len(ends), -1))

    def cutting_rows(self, matrix: Matrix, cuts: RowCuts) -> AbstractContextManager[None]:
        """A block inside which each row of a run has an edge of its own cut."""
        part, _, name = matrix.name.partition(".")
        return placed({matrix: cuts}, lambda matrix: getattr(self.layers[matrix.layer], part).row_cuts[name])

    def gated_edges(self, gates: Mapping[Matrix, EdgeGate]) -> AbstractContextManager[None]:
        """A block inside which edges carry the share of their source that `gates` say, and else its baseline."""
        return placed(gates, self._gates_of)

    def _gates_of(self, matrix: Matrix) -> list[EdgeGate]:
        part, _, name = matrix.name.partition(".")
        return getattr(self.layers[matrix.layer], part).edge_gates[name]

    def _beside_stream(
        self, resid: Any, tokens: Any, attention_mask: Any, n_past: int
    ) -> tuple[Tokens | None, Int[Tensor, "batch pos"] | None]:
        """Tokens and mask that belong to a residual stream given with `start_at_layer`, checked."""
        shape = getattr(resid, "shape", None)
        if not isinstance(resid, Tensor) or resid.ndim != 3 or resid.shape[2] != self.cfg.d_model:
            raise ConfigError(
                f"with start_at_layer the input is a residual stream [batch pos d_model={self.cfg.d_model}]; "
                f"got {type(resid).__name__}" + (f" of shape {list(shape)}." if shape is not None else ".")
            )
        self._check_length(resid.shape[1], n_past)
        if tokens is not None:
            tokens = self._checked_tokens(torch.atleast_2d(tokens).long().to(resid.device), n_past)
            if tokens.shape != resid.shape[:2]:
                raise ConfigError(f"tokens {list(tokens.shape)} do not fit a stream {list(resid.shape)}.")
        return tokens, self._checked_mask(attention_mask, resid.shape[:2], n_past)

    def _blocks_between(self, start: int | None, stop: int | None) -> dict[int, Block]:
        """The blocks to run, each with its layer."""
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -self.cfg.n_layers <= layer <= self.cfg.n_layers:
                raise ConfigError(f"{name}={layer}, and the model has {self.cfg.n_layers} layers.")
        return dict(list(enumerate(self.layers))[start:stop])

    def _context(
        self,
        mask: Int[Tensor, "batch pos"] | None,
        cache: TransformerLensKeyValueCache | None,
        shape: Sequence[int],
        blocks: Collection[int],
    ) -> tuple[Bool[Tensor, "batch key"] | None, Int[Tensor, "batch pos"]]:
        """Which keys are no padding, those of the past included (None: all), and the position of each new token.

        Positions count from a row's first token.
        """
        batch, n = shape
        n_past = 0
        if cache is not None:
            n_past = self._checked_past(cache, batch, blocks)
            new = torch.ones(batch, n, dtype=torch.long, device=self.embed.W_E.device) if mask is None else mask
            mask = cache.append_attention_mask(new).to(new.device)
            mask = None if bool((mask == 1).all()) else mask
        if mask is None:
            return None, torch.arange(n_past, n_past + n, device=self.embed.W_E.device).repeat(batch, 1)
        return mask.bool(), (mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:]

    def _checked_past(self, cache: TransformerLensKeyValueCache, batch: int, blocks: Collection[int]) -> int:
        """How many tokens a cache holds, after a check that it holds them for these blocks of this model."""
        if self.cfg.attention_dir != "causal":
            raise ConfigError(
                "past_kv_cache with attention_dir='bidirectional': what a token is depends on those after it, so "
                "nothing of it can be kept. Run the whole text."
            )
        if len(cache.entries) != self.cfg.n_layers:
            raise ConfigError(
                f"past_kv_cache has {len(cache.entries)} layers, and the model {self.cfg.n_layers}: make it from cfg."
            )
        n_past = cache.previous_attention_mask.shape[1]
        expected = (batch, n_past, self.cfg.n_heads, self.cfg.d_head)
        for layer in blocks:
            got = tuple(cache[layer].past_keys.shape)
            if got != expected:
                raise ConfigError(
                    f"past_kv_cache holds keys {list(got)} in layer {layer}, and this run needs {list(expected)}, "
                    "[batch past head d_head]: it belongs to another model or batch, or has seen a run that failed or "
                    "left this layer out. Make a new one."
                )
        return n_past

    def input_to_embed(self, tokens: Tokens, positions: Int[Tensor, "batch pos"]) -> Resid:
        """The stream before the first block."""
        return self.add_positions(self.hook_embed(self.embed(tokens)), positions)

    def add_positions(self, embedded: Resid, positions: Int[Tensor, "batch pos"]) -> Resid:
        """Token vectors with the vectors of their positions, if this model adds any."""
        if self.pos_embed is None or self.cfg.positions != "add":
            return embedded
        return embedded + self.hook_pos_embed(self.pos_embed(positions))

    def _logits(self, resid: Resid, tokens: Tokens | None) -> Float[Tensor, "_batch pos d_vocab"]:
        logits = self.unembed(self.ln_final(resid))
        if self.cfg.bigram:
            if tokens is None:
                raise ConfigError(
                    "logits from `start_at_layer` need the tokens behind the stream for the bigram table: pass tokens=."
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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if attention_mask is None and not per_token:
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return lm_cross_entropy_loss(logits, tokens, attention_mask, per_token)


load = HookedSparseTransformer.from_pretrained
"""`si.load(name_or_path)`."""
