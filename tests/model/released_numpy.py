"""The released models' forward pass in float64 NumPy, and random models in every published form, for tests.

Written from the description of the released code alone (GPT-2's layout, with concatenated positions, AbsTopK, sinks and
a bigram table), on the released names and shapes. It shares nothing with the library, and nothing in it is fast. The
second family of checkpoints, sparse_pretrain, is the same network under other names, but for three things that are
named where they are.
"""

import math

import numpy as np

GELU = np.vectorize(lambda t: 0.5 * t * (1 + math.erf(t / math.sqrt(2))), otypes=[np.float64])
PLACES = ["attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "resid_post_attn"]
PLACES += ["mlp_in", "mlp_neuron", "mlp_out", "resid_post_mlp"]
DEFAULTS = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "d_head": None,
    "d_model": 768,
    "bias": True,
    "ln_bias": True,
    "rms_norm": False,
    "residual_activation_type": "identity",
    "activation_type": "gelu",
    "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out",
    "tied_unembed": True,
    "d_mlp": None,
    "enable_bigram_table": False,
    "d_pos_emb": None,
    "sinusoidal_cat_pos_emb": False,
    "sink": False,
}


class Run:
    """One forward pass: `logits`, what every hook of the released code saw, and the smallest gap that AbsTopK met.

    `held` has, for some hooks, the channels that are held there and the values that they hold.
    """

    def __init__(self, config, weights, tokens, at_least=0, held=None):
        self.c = c = DEFAULTS | config
        if "n_mlp" in c:
            c["d_mlp"] = c.pop("n_mlp")
        c["d_head"] = c["d_head"] or c["d_model"] // c["n_head"]
        self.w = {name: np.asarray(w, np.float64) for name, w in weights.items()}
        self.at_least, self.gap, self.hooks, self.held = at_least, math.inf, {}, held or {}
        self.logits = self.forward(np.asarray(tokens))

    def cut(self, place, x):
        if self.c["afrac"] is None or place not in self.c["afrac_loctypes"].split(","):
            return x
        width = x.shape[-1]
        k = max(self.at_least, int(self.c["afrac"] * width))  # sparse_pretrain: at least 1
        if k >= width:
            return x
        out = np.zeros_like(x)
        for at in np.ndindex(x.shape[:-1]):
            order = sorted(range(width), key=lambda channel: -abs(x[at][channel]))
            for channel in order[:k]:
                out[at][channel] = x[at][channel]
            if k and x[at][order[k - 1]]:
                self.gap = min(self.gap, 1 - abs(x[at][order[k]]) / abs(x[at][order[k - 1]]))
        return out

    def see(self, hook, x):
        if hook in self.held:
            channels, values = self.held[hook]
            x = x.copy()
            x[..., channels] = values
        self.hooks[hook] = x
        return x

    def norm(self, x, name):
        gain = self.w[f"{name}.weight"]
        if self.c["rms_norm"]:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps) * gain
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + self.w.get(f"{name}.bias", 0.0)

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def read(self, x, pos, block, half):
        read = self.norm(x, f"{block}.ln_{half}")
        if self.c["d_pos_emb"] is not None:
            where = np.broadcast_to(self.norm(pos, f"{block}.ln_p{half}"), (*x.shape[:2], pos.shape[-1]))
            read = np.concatenate([read, where], -1)
        return self.cut("attn_in" if half == 1 else "mlp_in", read)

    def attend(self, q, k, v, sinks):
        out, size = np.zeros_like(q), self.c["d_head"]
        for b in range(len(q)):
            for head in range(self.c["n_head"]):
                own = slice(head * size, (head + 1) * size)
                for i in range(q.shape[1]):
                    scores = [q[b, i, own] @ k[b, j, own] / math.sqrt(size) for j in range(i + 1)]
                    scores += [] if sinks is None else [sinks[head]]
                    weight = np.exp(np.array(scores) - max(scores))
                    weight /= weight.sum()
                    for j in range(i + 1):
                        out[b, i, own] += weight[j] * v[b, j, own]
        return out

    def stream(self, x, place):
        return self.cut(place, np.maximum(x, 0) if self.c["residual_activation_type"] == "relu" else x)

    def forward(self, tokens):
        c, see = self.c, self.see
        act = GELU if c["activation_type"] == "gelu" else lambda x: np.maximum(x, 0)
        x = self.w["transformer.wte.weight"][tokens]
        pos = self.w["transformer.wpe.weight"][: tokens.shape[1]]
        x = x + pos if c["d_pos_emb"] is None else x
        for layer in range(c["n_layer"]):
            block = f"transformer.h.{layer}"
            x = see(f"{layer}.resid_in", self.cut("resid_pre", x))  # sparse_pretrain only
            a = see(f"{layer}.attn.act_in", self.read(x, pos, block, 1))
            q, k, v = np.split(self.linear(a, f"{block}.attn.c_attn"), 3, -1)
            k = see(f"{layer}.attn.k", self.cut("attn_k", k))
            q = see(f"{layer}.attn.q", self.cut("attn_q", q))
            v = see(f"{layer}.attn.v", self.cut("attn_v", v))
            sinks = self.w[f"{block}.attn.attn_imp.sink_logit"] if c["sink"] else None
            y = see(f"{layer}.attn.y", self.attend(q, k, v, sinks))
            o = see(f"{layer}.attn.resid_delta", self.cut("attn_out", self.linear(y, f"{block}.attn.c_proj")))
            x = see(f"{layer}.resid_mid", self.stream(x + o, "resid_post_attn"))
            m = see(f"{layer}.mlp.act_in", self.read(x, pos, block, 2))
            h = see(f"{layer}.mlp.post_act", self.cut("mlp_neuron", act(self.linear(m, f"{block}.mlp.c_fc"))))
            o = see(f"{layer}.mlp.resid_delta", self.cut("mlp_out", self.linear(h, f"{block}.mlp.c_proj")))
            x = self.stream(x + o, "resid_post_mlp")
        x = see("final_resid", x)
        head = "transformer.wte.weight" if c["tied_unembed"] else "lm_head.weight"
        logits = self.norm(x, "transformer.ln_f") @ self.w[head].T + self.w.get("final_logits_bias", 0.0)
        return logits + (self.w["bigram_table"][tokens] if c["enable_bigram_table"] else 0.0)


def cut_hooks(config):
    """Hooks of the released code at which nothing but AbsTopK decides what is zero, relu apart."""
    after = {
        "attn_in": "attn.act_in",
        "mlp_in": "mlp.act_in",
        "attn_out": "attn.resid_delta",
        "mlp_neuron": "mlp.post_act",
    }
    after |= {"mlp_out": "mlp.resid_delta", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v"}
    after |= {"resid_post_attn": "resid_mid"}
    config = DEFAULTS | config
    cut = [] if config["afrac"] is None else config["afrac_loctypes"].split(",")
    return [f"{layer}.{after[place]}" for layer in range(config["n_layer"]) for place in after if place in cut]


def sinusoids(n_ctx, width):
    """The table that concatenated positions may begin with, by its definition, entry by entry."""
    n = max(1, width // 2)
    low, high = math.log(4), math.log(max(4, n_ctx))
    periods = [math.exp(low + (high - low) * i / max(1, n - 1)) for i in range(n)]
    table = np.zeros((n_ctx, max(width, 2 * n)))
    for position in range(n_ctx):
        for i, period in enumerate(periods):
            table[position, i] = math.sin(position * 2 * math.pi / period)
            table[position, n + i] = math.cos(position * 2 * math.pi / period)
    return table[:, :width]


def random_config(rng):
    """A configuration of the released kind: any of its keys, some left out, some that mean nothing."""
    pick = lambda *choices: choices[rng.integers(len(choices))]
    n_head = pick(1, 2, 3, 4)
    config = {
        "block_size": int(rng.integers(5, 12)),
        "vocab_size": int(rng.integers(7, 30)),
        "n_layer": pick(1, 1, 2, 3),
        "n_head": n_head,
        "d_model": n_head * int(rng.integers(2, 9)),
        "dropout": 0.0,
        "rms_norm": pick(True, True, False),
        "afrac": pick(None, 0.25, 0.29, 0.5, 0.57, 0.3, 1.0, 1, 0.01, 0, 0.8),
    }
    optional = {
        "d_head": pick(None, 1, 3, 5, 8),
        "d_mlp": pick(None, 9, 25, 40),
        "bias": pick(True, False),
        "ln_bias": pick(True, False),
        "residual_activation_type": pick("identity", "relu"),
        "activation_type": pick("gelu", "relu"),
        "afrac_loctypes": ",".join(p for p in PLACES if rng.random() < 0.5)
        or pick("attn_in, mlp_in", "nowhere,attn_v", ""),
        "tied_unembed": pick(True, False, False),
        "enable_bigram_table": pick(True, False),
        "learnable_bigram_table": pick(True, False),
        "d_pos_emb": pick(None, None, 1, 4, 5),
        "dropout_cat_pos_emb": pick(True, False),
        "sinusoidal_cat_pos_emb": pick(True, False),
        "flash": pick(True, False),
        "sink": pick(True, False),
        "grad_checkpointing": True,
        "debug_nans": False,
        "tokenizer_name": "tinypython_2k",
        "afrac_approx": False,
        "rtopk": None,
        "bigram_table_rank": None,
        "pfrac": 0.5,
        "expansion_factor": 2,
        "expansion_factor_mlp": 2,
        "n_embd": None,
        "use_tied_aux_matrix": False,
        "from_the_future": "says nothing",
    }
    config |= {key: value for key, value in optional.items() if rng.random() < 0.75}
    if "d_mlp" in config and rng.random() < 0.2:
        config["n_mlp"] = config.pop("d_mlp")
    return config


def random_weights(config, rng):
    """A state dict for it, in float32: matrices mostly zeros, and nothing at the value that it begins with."""
    c = DEFAULTS | config
    d, vocab, pos = c["d_model"], c["vocab_size"], c["d_pos_emb"]
    flat, read = c["n_head"] * (c["d_head"] or d // c["n_head"]), d + (pos or 0)
    d_mlp = c.get("n_mlp") or c["d_mlp"] or 4 * d
    normal = lambda *shape, std=1.0: rng.normal(0, std, shape).astype(np.float32)

    def sparse(rows, columns):
        keep = rng.random((rows, columns)) < 0.4
        return (rng.normal(0, 1.5 / math.sqrt(columns), (rows, columns)) * keep).astype(np.float32)

    weights = {"final_logits_bias": normal(vocab), "transformer.wte.weight": normal(vocab, d)}
    weights["transformer.wpe.weight"] = normal(c["block_size"], pos or d)
    if c["enable_bigram_table"]:
        weights["bigram_table"] = normal(vocab, vocab)
    norms = {"transformer.ln_f": d}
    for layer in range(c["n_layer"]):
        block = f"transformer.h.{layer}"
        norms |= {f"{block}.ln_1": d, f"{block}.ln_2": d}
        norms |= {} if pos is None else {f"{block}.ln_p1": pos, f"{block}.ln_p2": pos}
        matrices = {"attn.c_attn": (3 * flat, read), "attn.c_proj": (d, flat), "mlp.c_fc": (d_mlp, read)}
        matrices |= {"mlp.c_proj": (d, d_mlp)}
        for name, shape in matrices.items():
            weights[f"{block}.{name}.weight"] = sparse(*shape)
            if c["bias"]:
                weights[f"{block}.{name}.bias"] = normal(shape[0], std=0.3)
        if c["sink"]:
            weights[f"{block}.attn.attn_imp.sink_logit"] = normal(c["n_head"])
        if c.get("flash") is False:
            size = c["block_size"]
            weights[f"{block}.attn.bias"] = np.tril(np.ones((1, 1, size, size), np.float32))
    for name, size in norms.items():
        weights[f"{name}.weight"] = 1 + normal(size, std=0.3)
        if not c["rms_norm"] and c["ln_bias"]:
            weights[f"{name}.bias"] = normal(size, std=0.3)
    weights["lm_head.weight"] = weights["transformer.wte.weight"] if c["tied_unembed"] else sparse(vocab, d)
    return weights


def random_release(seed, smallest_gap=3e-4):
    """A random configuration, its weights, tokens, and the reference's run; AbsTopK nowhere decides by a hair."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    while True:
        weights = random_weights(config, rng)
        tokens = rng.integers(config["vocab_size"], size=(2, int(rng.integers(1, config["block_size"] + 1))))
        run = Run(config, weights, tokens)
        if run.gap > smallest_gap:
            return config, weights, tokens, run


# -- the second family ------------------------------------------------------------------------------------------------


def random_second(seed, smallest_gap=3e-4):
    """`config.json` and state dict of a sparse_pretrain model, tokens, and the reference's run of the same network."""
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    d_head = pick(2, 3, 4)
    model = {"n_layer": pick(1, 2), "d_model": d_head * pick(1, 2, 4), "n_ctx": pick(6, 9), "d_head": d_head}
    model |= {"d_mlp": pick(None, 11, 30), "vocab_size": pick(9, 20), "use_rms_norm": pick(True, False), "dropout": 0.0}
    model |= {"tie_embeddings": pick(True, False), "use_positional_embeddings": pick(True, False)}
    model |= {"use_bigram_table": pick(True, False), "use_attention_sinks": pick(True, False)}
    model |= {"activation": pick("gelu", "relu"), "use_bias": pick(True, False)}
    model |= {"use_flash_attention": False} if rng.random() < 0.3 else {}
    sparsity = {"enable_weight_sparsity": True, "target_l0_fraction": 0.1}
    sparsity |= {
        "enable_activation_sparsity": pick(True, True, False),
        "activation_topk_fraction": pick(0.01, 0.3, 1.0),
    }
    usual = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"
    places = pick(None, f"{usual},resid_mid,resid_pre", "resid_pre,mlp_neuron", "attn_v")
    sparsity |= {} if places is None else {"activation_sparsity_locations": places}
    sinks = model["use_attention_sinks"]
    config = {
        "block_size": model["n_ctx"],
        "vocab_size": model["vocab_size"],
        "n_layer": model["n_layer"],
        "n_head": model["d_model"] // d_head,
        "d_head": d_head,
        "d_model": model["d_model"],
        "d_mlp": model["d_mlp"],
        "bias": model["use_bias"],
        "rms_norm": model["use_rms_norm"],
        "activation_type": model["activation"],
        "tied_unembed": model["tie_embeddings"],
        "enable_bigram_table": model["use_bigram_table"],
        "sink": sinks,
        "afrac": sparsity["activation_topk_fraction"] if sparsity["enable_activation_sparsity"] else None,
        "afrac_loctypes": (places or usual).replace("resid_mid", "resid_post_attn"),
    }
    while True:
        weights = random_weights(config, rng)
        del weights["final_logits_bias"]
        if not model["use_positional_embeddings"]:
            weights["transformer.wpe.weight"][:] = 0
        tokens = rng.integers(config["vocab_size"], size=(2, model["n_ctx"]))
        slow = model.get("use_flash_attention") is False  # sparse_pretrain: slow attention leaves sinks out
        run = Run(config | {"sink": sinks and not slow}, weights, tokens, at_least=1)
        if run.gap > smallest_gap:
            break
    stored = {}
    for name, weight in weights.items():
        name = name.removeprefix("transformer.").replace("attn_imp", "attn_fn")
        stored[f"blocks.{name[2:]}" if name.startswith("h.") else name] = weight
    if not model["use_positional_embeddings"]:
        del stored["wpe.weight"]
    if slow:
        masks = {
            f"blocks.{layer}.attn.causal_mask": np.ones((1, 1, 2, 2), np.float32) for layer in range(config["n_layer"])
        }
        stored |= masks
    training = {"total_tokens": 10, "tokenizer_name": "SimpleStories/SimpleStories-1.25M"}
    return {"model_config": model, "sparsity_config": sparsity, "training_config": training}, stored, tokens, run
