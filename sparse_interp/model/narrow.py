"""A transformer of which little is left: every layer as wide as what is computed there.

    x = W_E[token] (+ W_pos[position]);  x[channels] += half(T(norm(x))[used]);  x += constant      half after half
    logits = norm(x)[used] W_U + table[token]

It is the model of `model/transformer.py` with most rows and columns gone. The norm and AbsTopK at a read see the whole
stream, since all of it has a say in both; everything behind them is narrow. Nothing here listens or is trained:
`circuit/compact.py` decides what is left of a circuit, and folds the rest into the numbers below.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_interp.axes import Logits, Resid, Tokens
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.kernels import abs_topk, causal_mask, sink_attention
from sparse_interp.model.layers import Norm
from sparse_interp.model.text import TextMethods

Channels = Int[Tensor, " channel"]
KeyMask = Bool[Tensor, "batch key"]
Positions = Float[Tensor, "batch pos d_pos"]
ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": torch.relu, "identity": None}


class NarrowLinear(nn.Module):
    """x -> T(act(x W + b)) at `chosen` of the computed channels.

    Args:
        weight: one row per channel that it reads, one column per channel that is computed.
        bias: one number per computed channel.
        act: `gelu`, `relu` or `identity`.
        k: entries that AbsTopK keeps; None keeps all.
        chosen: which of the computed channels are handed on; None hands on all.
    """

    def __init__(
        self,
        weight: Float[Tensor, "source computed"],
        bias: Float[Tensor, " computed"],
        act: str = "identity",
        k: int | None = None,
        chosen: Channels | None = None,
    ):
        super().__init__()
        self.register_buffer("weight", weight.T.contiguous())
        self.register_buffer("bias", bias)
        self.register_buffer("chosen", chosen)
        self.act, self.k = ACTIVATIONS[act], k

    def forward(self, x: Float[Tensor, "batch pos source"]) -> Float[Tensor, "batch pos chosen"]:
        """What is handed on."""
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.act is not None:
            y = self.act(y)
        if self.k is not None:
            y = abs_topk(y, self.k)
        return y if self.chosen is None else y.index_select(-1, self.chosen)


class NarrowRead(nn.Module):
    """x -> T(norm(x)) at `used`, normalised vectors of positions behind the stream's channels if there are any.

    Args:
        norm: the whole stream's norm.
        k: entries of the whole read that AbsTopK keeps; None keeps all.
        used: channels of the read that are handed on.
        positions: concatenated position vectors, normalised.
    """

    def __init__(
        self,
        norm: Norm,
        k: int | None,
        used: Channels,
        positions: Float[Tensor, "n_ctx d_pos"] | None = None,
    ):
        super().__init__()
        self.norm, self.k = norm, k
        self.register_buffer("used", used)
        self.register_buffer("positions", positions)

    def forward(self, x: Resid, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos used"]:
        """The channels that are read."""
        if not len(self.used):
            return x[..., :0]
        read = self.norm.unhooked(x)
        if self.positions is not None:
            read = torch.cat([read, nn.functional.embedding(positions, self.positions)], -1)
        if self.k is not None:
            read = abs_topk(read, self.k)
        return read.index_select(-1, self.used)


class NarrowAttention(nn.Module):
    """read -> sum over heads of (pattern v) W_O, for the heads that are left.

    Args:
        qkv: read -> [head d_head] flat, three times, for the heads that attend, all padded to the widest of them; q is
            scaled so that q.k / sqrt(d_head) is the score. Empty where no head attends.
        write: [head d_head] flat, and behind it one channel per idle head -> the channels that are written.
        sink: one logit per head that attends, or None.
        idle: sink logits, less the score, of heads whose scores are all the same and whose values are 1: such a head
            hands on n / (n + e^idle), where n is the number of keys that a query sees.
        causal: whether a query sees no later key.
    """

    def __init__(
        self,
        qkv: Sequence[nn.Module],
        write: NarrowLinear,
        sink: Float[Tensor, " head"] | None,
        idle: Float[Tensor, " idle"],
        n_heads: int,
        causal: bool,
    ):
        super().__init__()
        self.qkv, self.write = nn.ModuleList(qkv), write
        self.n_heads, self.causal = n_heads, causal
        self.register_buffer("sink", sink)
        self.register_buffer("idle", idle)

    def forward(
        self, read: Float[Tensor, "batch pos used"], mask: KeyMask | None
    ) -> Float[Tensor, "batch pos written"]:
        """What attention writes."""
        seen, parts = self._seen(read.shape[1], mask, read.device), []
        if len(self.qkv):
            q, k, v = (part(read).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv)
            parts.append(sink_attention(q, k, v, self.sink, seen).to(read.dtype).transpose(1, 2).flatten(2))
        if len(self.idle):
            n = torch.arange(1, read.shape[1] + 1, device=read.device)[None] if seen is None else seen.sum(-1)[:, 0]
            idle = torch.sigmoid(n.to(self.idle).log()[..., None] - self.idle)
            parts.append(idle.expand(*read.shape[:2], -1))
        return self.write(parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def _seen(self, n: int, mask: KeyMask | None, device: torch.device) -> Bool[Tensor, "batch 1 query key"] | None:
        """Which keys a query sees, if that is not all up to itself; a padding query sees itself."""
        if self.causal and mask is None:
            return None
        seen = torch.ones(1, 1, n, n, dtype=torch.bool, device=device)
        seen = seen & causal_mask(n, n, device) if self.causal else seen
        return seen if mask is None else seen & (mask[:, None, None] | torch.eye(n, dtype=torch.bool, device=device))


class NarrowMLP(nn.Module):
    """read -> T(act(read W_in + b)) W_out + b, for the neurons that are left."""

    def __init__(self, neurons: NarrowLinear, write: NarrowLinear):
        super().__init__()
        self.neurons, self.write = neurons, write

    def forward(
        self, read: Float[Tensor, "batch pos used"], mask: KeyMask | None
    ) -> Float[Tensor, "batch pos written"]:
        """What the MLP writes."""
        return self.write(self.neurons(read))


class NarrowHalf(nn.Module):
    """x -> x + constant, and what `part` writes on top at `written`.

    Args:
        read: what `part` reads.
        part: attention or MLP.
        written: channels of the stream that `part` writes.
        constant: what is added to every channel at every position, whatever the prompt.
    """

    def __init__(
        self,
        read: NarrowRead,
        part: NarrowAttention | NarrowMLP,
        written: Channels,
        constant: Float[Tensor, " d_model"],
    ):
        super().__init__()
        self.read, self.part = read, part
        self.register_buffer("written", written)
        self.register_buffer("constant", constant)

    def forward(self, x: Resid, positions: Int[Tensor, "batch pos"], mask: KeyMask | None) -> Resid:
        """The stream after this half of a block."""
        written = self.part(self.read(x, positions), mask)
        return (x + self.constant).index_add_(-1, self.written, written)


class NarrowStream(nn.Module):
    """x -> T(act(x + constant)), and then `held` wherever that is a number: what happens to the stream between halves.

    Args:
        constant: what is added to it; None adds nothing.
        act: `relu` or `identity`.
        k: entries that AbsTopK keeps; None keeps all.
        held: what channels hold in the end; NaN at those that keep what they have. None holds nothing.
    """

    def __init__(
        self,
        constant: Float[Tensor, " d_model"] | None = None,
        act: str = "identity",
        k: int | None = None,
        held: Float[Tensor, " d_model"] | None = None,
    ):
        super().__init__()
        self.act, self.k = ACTIVATIONS[act], k
        self.register_buffer("constant", constant)
        self.register_buffer("held", held)

    def forward(self, x: Resid, positions: Int[Tensor, "batch pos"], mask: KeyMask | None) -> Resid:
        """The stream."""
        x = x if self.constant is None else x + self.constant
        x = x if self.act is None else self.act(x)
        x = x if self.k is None else abs_topk(x, self.k)
        return x if self.held is None else torch.where(self.held.isnan(), x, self.held)


class NarrowTransformer(TextMethods, nn.Module):
    """tokens -> logits, through the steps that are left.

    Args:
        cfg: shape of the model that this is the rest of: its context, its vocabulary, its positions.
        tokenizer: that model's.
        tables: `W_E` [d_vocab d_model]; `W_pos` [n_ctx d_model] if positions are added; `W_U` [used d_vocab]; and
            `bigram` [d_vocab d_vocab], or [1 d_vocab] for every token alike.
        steps: halves of blocks, and what happens to the stream between them.
        final: what the logits read.
    """

    def __init__(
        self, cfg: ModelConfig, tokenizer: Any, tables: dict[str, Tensor], steps: list[nn.Module], final: NarrowRead
    ):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Module()
        self.embed.register_buffer("W_E", tables["W_E"])
        self.register_buffer("W_pos", tables.get("W_pos"))
        self.register_buffer("W_U", tables["W_U"])
        self.register_buffer("bigram", tables["bigram"])
        self.steps, self.final = nn.ModuleList(steps), final
        self.set_tokenizer(tokenizer)
        self.eval()

    def forward(self, input: Any, attention_mask: Tensor | None = None) -> Logits:
        """Logits after every token.

        Args:
            input: text, a list of texts, or tokens [pos] or [batch pos].
            attention_mask: 1 for tokens, 0 for padding on either side; positions count from the first token.

        Raises:
            TokenizerError: for ids outside the vocabulary, too many tokens, or a mask that does not fit.
        """
        tokens, attention_mask = self.input_to_tokens(input, attention_mask=attention_mask)
        if attention_mask is None:
            positions, mask = torch.arange(tokens.shape[1], device=tokens.device)[None], None
        else:
            positions, mask = (attention_mask.cumsum(-1) - 1).clamp(min=0), attention_mask.bool()
        return self._logits(self._stream(tokens, positions.expand_as(tokens), mask), tokens)

    def _stream(self, tokens: Tokens, positions: Int[Tensor, "batch pos"], mask: KeyMask | None) -> Resid:
        x = nn.functional.embedding(tokens, self.embed.W_E)
        if self.W_pos is not None:
            x = x + nn.functional.embedding(positions, self.W_pos)
        for step in self.steps:
            x = step(x, positions, mask)
        return self.final(x, positions)

    def _logits(self, read: Float[Tensor, "batch pos used"], tokens: Tokens) -> Logits:
        rows = tokens if len(self.bigram) > 1 else torch.zeros_like(tokens)
        logits = nn.functional.embedding(rows, self.bigram)  # memory of its own, so that the product adds to it
        return logits.flatten(0, 1).addmm_(read.flatten(0, 1).to(logits), self.W_U).view_as(logits)
