"""The parts of a block, in the order in which a forward pass meets them.

    read_a = T(norm(x))                              T = AbsTopK at the sites that the config names
    q, k, v = T(read_a W + b)                        each cut over all heads jointly
    p = softmax([sink, q.k / sqrt(d_head)]), sink column dropped
    x = x + T(p v W_O + b)                           attention write
    read_m = T(norm(x));  n = T(act(read_m W_in + b))
    x = x + T(n W_out + b)                           MLP write

Gao et al. 2025 (arXiv 2511.13653) and the code released with it. Every hook sees what comes out of AbsTopK, in memory
of its own. In training mode, and where nobody listens inside, attention and norms run as fused kernels; in eval
mode they never do, so that looking at a model does not change its last digit.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import HeadVectors, Pattern, Resid
from sparse_interp.model.config import STREAM_SITES, ModelConfig
from sparse_interp.model.edges import EdgeGate, RowCuts, carried
from sparse_interp.model.kernels import abs_topk, causal_mask, sink_attention
from sparse_interp.model.packing import Packing

ForkedResid = Float[Tensor, "batch pos head d_model"]
Read = Float[Tensor, "batch pos d_read"]
KeyMask = Bool[Tensor, "batch key"]
Queries = Float[Tensor, "batch query head d_head"]
Keys = Float[Tensor, "batch key head d_head"]
PastKeys = TransformerLensKeyValueCacheEntry


def heard(*points: HookPoint) -> bool:
    """Whether any hook listens at one of `points`."""
    return any(p._forward_hooks or p._backward_hooks or p._forward_pre_hooks for p in points)


@torch.no_grad()
def redraw_(weight: Tensor, std: float) -> None:
    """Normal draws in place of every entry that is not zero. Zeros stay, so that a sparse model keeps its pattern.

    A new weight is made of ones, and so all of it is drawn. One without memory, as while a model is loaded, is left.
    """
    if weight.is_meta:
        return
    weight.copy_(torch.empty_like(weight).normal_(std=std) * (weight != 0))


class Cut(nn.Module):
    """T at one site: AbsTopK keeping floor(afrac * width) entries, or nothing where the config names no such site."""

    def __init__(self, cfg: ModelConfig, site: str, size: int):
        super().__init__()
        active = cfg.afrac is not None and site in cfg.afrac_sites
        self.k = max(cfg.afrac_min, int(cfg.afrac * size)) if active and cfg.afrac is not None else None
        """Entries kept, the released code's int(afrac * width); None keeps all."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`x`, cut."""
        return x if self.k is None or self.k >= x.shape[-1] else abs_topk(x, self.k)


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w, LayerNorm's centred form with bias, or x itself."""

    def __init__(self, cfg: ModelConfig, size: int):
        super().__init__()
        self.kind, self.eps = cfg.norm, cfg.eps
        if cfg.norm != "none":
            self.w = nn.Parameter(torch.ones(size))
        self.b = nn.Parameter(torch.zeros(size)) if cfg.norm == "layer" and cfg.norm_bias else None
        self.hook_scale = HookPoint()  # batch pos 1
        self.hook_normalized = HookPoint()  # batch pos size, before the gain

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`x`, normalised, in memory of its own."""
        if self.kind == "none":
            return x.clone()
        if self.training and self.kind == "rms" and not heard(self.hook_scale, self.hook_normalized):
            return nn.functional.rms_norm(x, x.shape[-1:], self.w.to(x.dtype), self.eps)
        return self.unhooked(x, self.hook_scale, self.hook_normalized)

    def unhooked(
        self, x: Float[Tensor, "*batch width"], on_scale=lambda s: s, on_normalized=lambda n: n
    ) -> Float[Tensor, "*batch width"]:
        """The same function without its hook points firing, for copies of the stream that share one norm."""
        if self.kind == "none":
            return x.clone()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = on_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        y = on_normalized(x / scale) * self.w
        return y if self.b is None else y + self.b

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        if self.kind != "none":
            nn.init.ones_(self.w)
        if self.b is not None:
            nn.init.zeros_(self.b)


class Attention(nn.Module):
    """read -> sum over heads of (pattern v) W_O, with a sink that takes attention and gives nothing."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        heads, d_head, d_model, flat = cfg.n_heads, cfg.d_head, cfg.d_model, cfg.n_heads * cfg.d_head
        for letter in "QKV":
            setattr(self, f"W_{letter}", nn.Parameter(torch.ones(heads, d_model, d_head)))
            if cfg.d_pos_emb is not None:
                setattr(self, f"W_{letter}_pos", nn.Parameter(torch.ones(heads, cfg.d_pos_emb, d_head)))
            setattr(self, f"b_{letter}", nn.Parameter(torch.zeros(heads, d_head), requires_grad=cfg.bias))
        self.W_O = nn.Parameter(torch.ones(heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model), requires_grad=cfg.bias)
        self.sink = nn.Parameter(torch.zeros(heads)) if cfg.sink else None
        self.cut_q, self.cut_k, self.cut_v = (Cut(cfg, site, flat) for site in "qkv")
        self.cut_write = Cut(cfg, "attn_write", d_model)
        self.edge_gates: dict[str, list[EdgeGate]] = {f"W_{letter}": [] for letter in "QKVO"}
        self.row_cuts: dict[str, list[RowCuts]] = {f"W_{letter}": [] for letter in "QKVO"}
        self.hook_in = HookPoint()  # batch pos d_read
        self.hook_attn_in = HookPoint()  # batch pos head d_model, with use_attn_in
        self.hook_q_input = HookPoint()  # batch pos head d_model, with use_split_qkv_input
        self.hook_k_input = HookPoint()  # batch pos head d_model, with use_split_qkv_input
        self.hook_v_input = HookPoint()  # batch pos head d_model, with use_split_qkv_input
        self.hook_q = HookPoint()  # batch pos head d_head
        self.hook_k = HookPoint()  # batch pos head d_head
        self.hook_v = HookPoint()  # batch pos head d_head
        self.hook_attn_scores = HookPoint()  # batch head query key, masked with -inf
        self.hook_sink_logits = HookPoint()  # batch head query 1
        self.hook_pattern = HookPoint()  # batch head query key, rows sum to 1 - sink
        self.hook_sink = HookPoint()  # batch head query, read-only by nature: the sink writes nothing
        self.hook_z = HookPoint()  # batch pos head d_head
        self.hook_result = HookPoint()  # batch pos head d_model, with use_attn_result
        self.reset_parameters()

    def forward(
        self,
        reads: "dict[str, Read | Float[Tensor, 'batch pos head d_read']]",
        mask: KeyMask | None,
        past: PastKeys | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "_batch _at d_model"]:
        """`reads` holds what q, k and v read: one tensor for all heads, or one per head.

        With `past`, its keys and values stand before those of this run, and these are added to it unless it is frozen.
        With `packing`, what comes in is packed, and so is what goes out: the ends of prompts where only they are asked.
        """
        alone = packing is not None and packing.ends_alone
        q = self.hook_q(self._project("Q", packing.at_ends(reads["q"]) if alone else reads["q"], self.cut_q))
        k = self.hook_k(self._project("K", reads["k"], self.cut_k))
        v = self.hook_v(self._project("V", reads["v"], self.cut_v))
        if past is not None:
            k, v = past.append(k, v)
        if packing is None:
            z, pattern = self._mix(q, k, v, mask)
        else:
            z, pattern = self._mix(*packing.by_prompt(q, k, v))
            z = packing.gathered(z)
        return self._write(self.hook_z(z), pattern, packing)

    def _project(self, letter: str, read: Tensor, cut: Cut) -> HeadVectors:
        weight, bias = getattr(self, f"W_{letter}"), getattr(self, f"b_{letter}")
        if hasattr(self, f"W_{letter}_pos"):
            weight = torch.cat([weight, getattr(self, f"W_{letter}_pos")], 1)
        matrix, held = carried(weight.permute(1, 0, 2).flatten(1), self.edge_gates[f"W_{letter}"])
        if read.ndim == 4:
            out = torch.einsum("bphm,mhd->bphd", read, matrix.unflatten(1, bias.shape)).flatten(2)
        else:
            out = read @ matrix
        for baseline, part in held:
            out = out + baseline @ part
        for each in self.row_cuts[f"W_{letter}"]:
            out = each.less(out, read - each.baseline, matrix)
        return cut(out + bias.flatten().to(out.dtype)).unflatten(-1, bias.shape)

    def _mix(self, q: Queries, k: Keys, v: Keys, mask: KeyMask | None) -> tuple[Queries, Pattern | None]:
        """What each head takes in, and its pattern where anybody wants it."""
        inside = (self.hook_attn_scores, self.hook_sink_logits, self.hook_pattern, self.hook_sink)
        plain = mask is None and self.cfg.attention_dir == "causal" and q.shape == k.shape
        if self.training and plain and not heard(*inside) and not self.edge_gates["W_O"]:
            full = torch.promote_types(q.dtype, torch.float32)  # the CPU's fused backward is slow in bf16
            fused = (t.to(full).transpose(1, 2) for t in (q, k, v))
            sink = None if self.sink is None else self.sink.to(full)
            return sink_attention(*fused, sink).transpose(1, 2).contiguous().to(self.W_O.dtype), None
        pattern = self.pattern(q, k, mask)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, v.to(pattern.dtype)).contiguous(), pattern

    def pattern(self, q: Queries, k: Keys, mask: KeyMask | None) -> Pattern:
        """Attention weights through their four hook points; what the sink takes is missing from a row's sum.

        The last query stands at the last key; keys before the first query are those of the past.
        """
        n_query, n_key = q.shape[1], k.shape[1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        seen = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device)
        if self.cfg.attention_dir == "causal":
            seen = causal_mask(n_query, n_key, q.device)
        if mask is not None:  # a padding query sees itself, so that no row is empty
            own = torch.eye(n_key, dtype=torch.bool, device=q.device)[n_key - n_query :]
            seen = seen & (mask[:, None, None, :] | own)
        scores = self.hook_attn_scores(scores.masked_fill(~seen, -torch.inf))
        total = scores.logsumexp(-1, keepdim=True)
        if self.sink is not None:
            sink = self.sink[None, :, None, None].expand(*scores.shape[:3], 1).clone()
            sink = self.hook_sink_logits(sink.to(scores.dtype))
            both = torch.logaddexp(total, sink)
            self.hook_sink((sink - both).exp().squeeze(-1))
            total = both
        return self.hook_pattern((scores - total).exp())

    def _write(
        self, z: HeadVectors, pattern: Float[Tensor, "_batch head query key"] | None, packing: Packing | None
    ) -> Float[Tensor, "_batch pos d_model"]:
        weight, held = carried(self.W_O.flatten(0, 1), self.edge_gates["W_O"])
        mixed = [(self._mixed(baseline, pattern), part) for baseline, part in held]
        if packing is not None:
            mixed = [(packing.gathered(values), part) for values, part in mixed]
        sent = [(z, weight), *mixed]
        if not self.cfg.use_attn_result:
            write = sum((mixed.flatten(2) @ part for mixed, part in sent[1:]), z.flatten(2) @ weight)
            for each in self.row_cuts["W_O"]:
                held_back = self._mixed(each.baseline, pattern)
                held_back = held_back if packing is None else packing.gathered(held_back)
                write = each.less(write, (z - held_back).flatten(2), weight)
            return self.cut_write(write + self.b_O.to(z.dtype))
        # Per head, what survives of the joint write: AbsTopK acts on the sum, so each head is cut by the sum's mask,
        # and the bias is shared out evenly so that the heads add up to the write exactly.
        by_head = [torch.einsum("bphd,hdm->bphm", x, part.unflatten(0, self.b_V.shape)) for x, part in sent]
        heads = sum(by_head[1:], by_head[0]) + self.b_O / self.cfg.n_heads
        if self.cut_write.k is not None:
            heads = heads * (self.cut_write(heads.sum(2)) != 0).unsqueeze(2)
        return self.hook_result(heads).sum(2)

    def _mixed(self, baseline: Float[Tensor, "*batch_pos width"], pattern: Pattern | None) -> HeadVectors:
        """What each head would take in if every value were its baseline."""
        assert pattern is not None
        values = baseline.unflatten(-1, self.b_V.shape)
        return torch.einsum("bhqk,hd->bqhd" if values.ndim == 2 else "bhqk,bkhd->bqhd", pattern, values)

    def reset_parameters(self) -> None:
        """Normal weights where they are not zero, zero biases and sinks; the write is scaled down with depth."""
        std = self.cfg.initializer_range
        for name, p in self.named_parameters(recurse=False):
            if name == "W_O":
                redraw_(p, std / math.sqrt(2 * self.cfg.n_layers))
            elif name.startswith("W_"):
                redraw_(p, std)
            else:
                nn.init.zeros_(p)


class MLP(nn.Module):
    """read -> T(act(read W_in + b_in)) W_out + b_out, then T."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.d_mlp is not None
        self.cfg = cfg
        self.W_in = nn.Parameter(torch.ones(cfg.d_model, cfg.d_mlp))
        self.W_in_pos = None if cfg.d_pos_emb is None else nn.Parameter(torch.ones(cfg.d_pos_emb, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp), requires_grad=cfg.bias)
        self.W_out = nn.Parameter(torch.ones(cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model), requires_grad=cfg.bias)
        self.act = nn.functional.gelu if cfg.act_fn == "gelu" else nn.functional.relu
        self.cut_neuron, self.cut_write = Cut(cfg, "neuron", cfg.d_mlp), Cut(cfg, "mlp_write", cfg.d_model)
        self.edge_gates: dict[str, list[EdgeGate]] = {"W_in": [], "W_out": []}
        self.row_cuts: dict[str, list[RowCuts]] = {"W_in": [], "W_out": []}
        self.hook_in = HookPoint()  # batch pos d_read
        self.hook_pre = HookPoint()  # batch pos d_mlp
        self.hook_post = HookPoint()  # batch pos d_mlp
        self.reset_parameters()

    def forward(self, read: Read) -> Float[Tensor, "_batch pos d_model"]:
        """What the MLP writes, before `hook_mlp_out`."""
        weight = self.W_in if self.W_in_pos is None else torch.cat([self.W_in, self.W_in_pos])
        pre = self._through("W_in", weight, read)
        pre = self.hook_pre(pre + self.b_in.to(pre.dtype))
        post = self.hook_post(self.cut_neuron(self.act(pre)))
        out = self._through("W_out", self.W_out, post)
        return self.cut_write(out + self.b_out.to(out.dtype))

    def _through(self, name: str, weight: Tensor, source: Float[Tensor, "batch pos source"]) -> Tensor:
        weight, held = carried(weight, self.edge_gates[name])
        out = sum((baseline @ part for baseline, part in held), source @ weight)
        for each in self.row_cuts[name]:
            out = each.less(out, source - each.baseline, weight)
        return out

    def reset_parameters(self) -> None:
        """Normal weights where they are not zero, zero biases; the write is scaled down with depth."""
        std = self.cfg.initializer_range
        redraw_(self.W_in, std)
        if self.W_in_pos is not None:
            redraw_(self.W_in_pos, std)
        redraw_(self.W_out, std / math.sqrt(2 * self.cfg.n_layers))
        nn.init.zeros_(self.b_in)
        nn.init.zeros_(self.b_out)


class Block(nn.Module):
    """x -> x + attention(T(norm x)) -> that + mlp(T(norm that))."""

    hook_out_is_single_residual_stream = True
    """Read by TransformerLens' logit lens: a block's output is the stream."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.ln1, self.attn = Norm(cfg, cfg.d_model), Attention(cfg)
        self.ln2, self.mlp = Norm(cfg, cfg.d_model), MLP(cfg)
        if cfg.d_pos_emb is not None:
            self.ln1_pos, self.ln2_pos = Norm(cfg, cfg.d_pos_emb), Norm(cfg, cfg.d_pos_emb)
        self.cut_attn_read, self.cut_mlp_read = Cut(cfg, "attn_read", cfg.d_read), Cut(cfg, "mlp_read", cfg.d_read)
        self.cut_pre, self.cut_mid, self.cut_post = (Cut(cfg, site, cfg.d_model) for site in STREAM_SITES)
        self.hook_resid_pre = HookPoint()  # batch pos d_model
        self.hook_attn_out = HookPoint()  # batch pos d_model
        self.hook_resid_mid = HookPoint()  # batch pos d_model
        self.hook_mlp_in = HookPoint()  # batch pos d_model, with use_hook_mlp_in
        self.hook_mlp_out = HookPoint()  # batch pos d_model
        self.hook_resid_post = HookPoint()  # batch pos d_model

    @property
    def submodules(self) -> dict[str, nn.Module] | None:
        """For TransformerLens' edge attribution, faithfulness and direct paths, which take the stream for a sum.

        A block that has `submodules` is asked for its `residual_contribution_scale`, and refused if that is not 1.
        """
        return {"attn": self.attn} if self.why_no_sum else None

    @property
    def residual_contribution_scale(self) -> float | str:
        """1; or, where the stream is no sum, why not, which TransformerLens quotes as it refuses."""
        return self.why_no_sum or 1.0

    @property
    def why_no_sum(self) -> str | None:
        """What keeps the stream from being the sum of what was written to it; None where nothing does."""
        cuts = dict(zip(STREAM_SITES, (self.cut_pre, self.cut_mid, self.cut_post), strict=True))
        cuts = [site for site, cut in cuts.items() if cut.k is not None]
        if cuts:
            return f"AbsTopK at {' and '.join(cuts)}"
        return None if self.cfg.residual_act == "identity" else f"residual_act={self.cfg.residual_act!r}"

    def forward(
        self,
        resid: Resid,
        pos: Float[Tensor, "#batch pos d_pos"] | None,
        mask: KeyMask | None,
        past: PastKeys | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "_batch _at d_model"]:
        """The stream after the block.

        `pos` are concatenated positions; `mask` is False where a key is padding; `past` holds keys of earlier runs;
        `packing` says how the stream is packed.
        """
        mid = self.attended(resid, pos, mask, past, packing)
        if pos is not None and packing is not None and packing.ends_alone:
            pos = packing.at_ends(pos)
        return self.processed(mid, pos)

    def attended(
        self,
        resid: Resid,
        pos: Float[Tensor, "#batch pos d_pos"] | None,
        mask: KeyMask | None,
        past: PastKeys | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "_batch _at d_model"]:
        """The stream between attention and the MLP: the first half of the block."""
        # cloned, because the block before still holds this tensor as its resid_post
        resid = self.hook_resid_pre(self.cut_pre(resid.clone()))
        out = self.hook_attn_out(self.attn(self._attention_reads(resid, pos), mask, past, packing))
        if packing is not None and packing.ends_alone:
            resid = packing.at_ends(resid)
        resid = resid + out
        return self.hook_resid_mid(self.cut_mid(self._activate(resid)))

    def processed(
        self, resid: Float[Tensor, "_batch _at d_model"], pos: Float[Tensor, "_batch _at d_pos"] | None
    ) -> Float[Tensor, "_batch _at d_model"]:
        """The stream after the MLP: the second half."""
        mlp_in = self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid
        read = self.mlp.hook_in(self.cut_mlp_read(self._with_pos(self.ln2(mlp_in), pos, "ln2_pos")))
        resid = resid + self.hook_mlp_out(self.mlp(read))
        return self.hook_resid_post(self.cut_post(self._activate(resid)))

    def _activate(self, resid: Resid) -> Resid:
        return resid.relu() if self.cfg.residual_act == "relu" else resid

    def _with_pos(self, normed: Tensor, pos: Tensor | None, norm: str) -> Tensor:
        """The positional channels, normalised on their own, behind the stream's."""
        if pos is None:
            return normed
        pos = getattr(self, norm)(pos)
        if normed.ndim == 4:
            pos = pos.unsqueeze(2).expand(*normed.shape[:3], -1)
        return torch.cat([normed, pos.expand(*normed.shape[:-1], -1)], -1)

    def _attention_reads(self, resid: Resid, pos: Tensor | None) -> dict[str, Tensor]:
        """What q, k and v read: one tensor, or with `use_attn_in` or `use_split_qkv_input` one for each head.

        Heads fork from the stream at `hook_attn_in`, and each head's q, k and v then at `hook_q_input` and its kin. A
        hook on `attn.hook_in` acts on the forks too: what it changed in the common read is added to each.
        """
        split, forked = self.cfg.use_split_qkv_input, self.cfg.use_split_qkv_input or self.cfg.use_attn_in
        cut = self.cut_attn_read(self._with_pos(self.ln1(resid), pos, "ln1_pos"))
        read = self.attn.hook_in(cut.clone() if forked else cut)
        if not forked:
            return dict.fromkeys("qkv", read)
        heads = resid.unsqueeze(2).repeat(1, 1, self.cfg.n_heads, 1)
        heads = self.attn.hook_attn_in(heads) if self.cfg.use_attn_in else heads
        forks = {"qkv": heads}
        if split:
            forks = {letter: getattr(self.attn, f"hook_{letter}_input")(heads.clone()) for letter in "qkv"}
        change = (read - cut).unsqueeze(2)
        reads = {f: self.cut_attn_read(self._with_pos(self.ln1.unhooked(x), pos, "ln1_pos")) for f, x in forks.items()}
        return {letter: reads[fork] + change for fork in reads for letter in fork}
