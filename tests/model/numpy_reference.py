"""The forward pass once more, in float64 NumPy and from the rules alone, for tests to compare with.

Written from the description of the architecture, position by position and head by head: it shares no code with the
model, no array operation is fused, and nothing is fast.
"""

import math

import numpy as np


def abs_topk(x, afrac, at_least=0):
    """Along the last axis keep the int(afrac * width) entries of largest magnitude, and never fewer than `at_least`."""
    k = max(at_least, int(afrac * x.shape[-1]))
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        for channel in sorted(range(x.shape[-1]), key=lambda c: -abs(x[at][c]))[:k]:
            out[at][channel] = x[at][channel]
    return out


def norm(x, weights, prefix, kind, eps):
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{prefix}.w"]
    return x + weights.get(f"{prefix}.b", 0.0)


def attention(q, k, v, sink, allowed):
    """One head of one sequence: [pos d_head] each; `allowed[i]` are the keys that query i sees."""
    z, pattern = np.zeros_like(q), np.zeros((len(q), len(q)))
    for i in range(len(q)):
        scores = {j: q[i] @ k[j] / math.sqrt(q.shape[1]) for j in allowed[i]}
        top = max([*scores.values(), *([] if sink is None else [sink])])
        total = sum(math.exp(s - top) for s in scores.values()) + (0 if sink is None else math.exp(sink - top))
        for j, score in scores.items():
            pattern[i, j] = math.exp(score - top) / total
            z[i] += pattern[i, j] * v[j]
    return z, pattern


def brought(x, weight, gate=None):
    """What a matrix brings from `x`; with a gate (share, baseline) edge by edge, each with its own message."""
    if gate is None:
        return x @ weight
    share, baseline = gate
    out = np.zeros((*x.shape[:-1], weight.shape[1]))
    for s, t in np.ndindex(weight.shape):
        out[..., t] += weight[s, t] * (baseline[..., s] + share[s, t] * (x[..., s] - baseline[..., s]))
    return out


def forward(cfg, weights, tokens, mask=None, messages=None, gates=None, held=None):
    """Logits [batch pos d_vocab] and what every site holds, by hook name.

    `cfg` is a dict of the model's fields, `weights` its tensors as arrays; `mask` is 0 at padding. `messages` are added
    to the stream for one reader alone: (layer, letter, head), (layer, "mlp", None) or (n_layers, "final", None).
    `gates` are (share [source target], baseline [source]) by (layer, name of matrix), and `held` by hook name which
    channels are kept and what the others hold.
    """
    messages, gates, held = messages or {}, gates or {}, held or {}
    node = lambda name, x: np.where(held[name][0], x, held[name][1]) if name in held else x
    cuts = [] if cfg["afrac"] is None else cfg["afrac_sites"]
    cut = lambda site, x: abs_topk(x, cfg["afrac"], cfg["afrac_min"]) if site in cuts else x
    stream_act = lambda x: np.maximum(x, 0) if cfg["residual_act"] == "relu" else x
    gelu = np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))), otypes=[np.float64])
    act = gelu if cfg["act_fn"] == "gelu" else lambda x: np.maximum(x, 0)
    batch, n = tokens.shape
    mask = np.ones((batch, n), int) if mask is None else mask
    where = np.maximum(mask.cumsum(1) - 1, 0)
    seen = {}
    x = weights["embed.W_E"][tokens]
    pos = None if cfg["positions"] == "none" else weights["pos_embed.W_pos"][where]
    if cfg["positions"] == "add":
        x = x + pos

    def read(x, prefix, site):
        y = norm(x, weights, prefix, cfg["norm"], cfg["eps"])
        if cfg["positions"] == "concat":
            y = np.concatenate([y, norm(pos, weights, f"{prefix}_pos", cfg["norm"], cfg["eps"])], -1)
        return cut(site, y)

    def read_by(reader, x, prefix, site, common):
        return read(x + messages[reader], prefix, site) if reader in messages else common

    def with_position_rows(name):
        rows = [weights[name]] + ([weights[f"{name}_pos"]] if cfg["positions"] == "concat" else [])
        return np.concatenate(rows, -2)

    for layer in range(cfg["n_layers"]):
        block = f"blocks.{layer}"
        x = seen[f"{block}.hook_resid_pre"] = cut("resid_pre", x)
        a = read(x, f"{block}.ln1", "attn_read")
        a = seen[f"{block}.attn.hook_in"] = node(f"{block}.attn.hook_in", a)
        vectors = {}
        for letter in "qkv":
            weight = with_position_rows(f"{block}.attn.W_{letter.upper()}")  # head d_read d_head
            own = [read_by((layer, letter, h), x, f"{block}.ln1", "attn_read", a) for h in range(cfg["n_heads"])]
            gate, size = gates.get((layer, f"attn.W_{letter.upper()}")), cfg["d_head"]
            parts = [gate and (gate[0][:, h * size : (h + 1) * size], gate[1]) for h in range(cfg["n_heads"])]
            biases = weights[f"{block}.attn.b_{letter.upper()}"]
            heads = [brought(own[h], weight[h], parts[h]) + biases[h] for h in range(cfg["n_heads"])]
            flat = node(f"{block}.attn.hook_{letter}", cut(letter, np.concatenate(heads, -1)))
            vectors[letter] = flat.reshape(batch, n, cfg["n_heads"], cfg["d_head"])
            seen[f"{block}.attn.hook_{letter}"] = vectors[letter]
        z = np.zeros_like(vectors["q"])
        pattern = np.zeros((batch, cfg["n_heads"], n, n))
        for b in range(batch):
            reach = [range(n) if cfg["attention_dir"] == "bidirectional" else range(i + 1) for i in range(n)]
            allowed = [[j for j in reach[i] if mask[b, j] or i == j] for i in range(n)]
            for h in range(cfg["n_heads"]):
                sink = weights[f"{block}.attn.sink"][h] if cfg["sink"] else None
                q, k, v = (vectors[letter][b, :, h] for letter in "qkv")
                z[b, :, h], pattern[b, h] = attention(q, k, v, sink, allowed)
        seen[f"{block}.attn.hook_z"], seen[f"{block}.attn.hook_pattern"] = z, pattern
        write = sum(z[:, :, h] @ weights[f"{block}.attn.W_O"][h] for h in range(cfg["n_heads"]))
        if (layer, "attn.W_O") in gates:
            share, baseline = (part.reshape(cfg["n_heads"], cfg["d_head"], -1) for part in gates[layer, "attn.W_O"])
            write = np.zeros_like(x)
            for h, c in np.ndindex(cfg["n_heads"], cfg["d_head"]):  # a value's message is mixed as the value is
                for t in range(cfg["d_model"]):
                    carried = baseline[h, c] + share[h, c, t] * (vectors["v"][:, :, h, c] - baseline[h, c])
                    message = weights[f"{block}.attn.W_O"][h, c, t] * carried
                    write[..., t] += np.einsum("bij,bj->bi", pattern[:, h], message)
        write = cut("attn_write", write + weights[f"{block}.attn.b_O"])
        seen[f"{block}.hook_attn_out"] = node(f"{block}.hook_attn_out", write)
        x = cut("resid_mid", stream_act(x + seen[f"{block}.hook_attn_out"]))
        seen[f"{block}.hook_resid_mid"] = x
        m = read(x + messages.get((layer, "mlp", None), 0.0), f"{block}.ln2", "mlp_read")
        m = seen[f"{block}.mlp.hook_in"] = node(f"{block}.mlp.hook_in", m)
        pre = brought(m, with_position_rows(f"{block}.mlp.W_in"), gates.get((layer, "mlp.W_in")))
        neurons = node(f"{block}.mlp.hook_post", cut("neuron", act(pre + weights[f"{block}.mlp.b_in"])))
        seen[f"{block}.mlp.hook_post"] = neurons
        write = brought(neurons, weights[f"{block}.mlp.W_out"], gates.get((layer, "mlp.W_out")))
        write = cut("mlp_write", write + weights[f"{block}.mlp.b_out"])
        seen[f"{block}.hook_mlp_out"] = node(f"{block}.hook_mlp_out", write)
        x = cut("resid_post", stream_act(x + seen[f"{block}.hook_mlp_out"]))
        seen[f"{block}.hook_resid_post"] = x
    x = x + messages.get((cfg["n_layers"], "final", None), 0.0)
    final = node("unembed.hook_in", norm(x, weights, "ln_final", cfg["norm"], cfg["eps"]))
    seen["unembed.hook_in"] = final
    unembed = weights["embed.W_E"].T if cfg["tie_unembed"] else weights["unembed.W_U"]
    logits = final @ unembed + weights["unembed.b_U"]
    if cfg["bigram"]:
        logits = logits + weights["bigram_table"][tokens]
    return logits, seen
