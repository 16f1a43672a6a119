"""One script for every TransformerLens that is supported: dense models of TransformerLens taken as ours are.

    python tests/model/dense_script.py

The same weights are loaded into our model, into a native TransformerBridge and, where there is one, into a
HookedTransformer; what ablations, circuits and audits say of them has to agree. Rotary positions, grouped queries and
gated MLPs, which ours does not have, are held against a forward pass written out here in float64. Needs no network.
Prints the largest error of each check, and exits with 1 if one is above its bound.
"""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.nn import functional

BOUND = 1e-5
SHAPE = {"n_layers": 2, "n_ctx": 32, "d_model": 12, "n_heads": 4, "d_head": 4, "d_mlp": 20, "act": "gelu"}
OURS = {
    "LayerNorm": {"norm": "layer"},
    "RMSNorm": {"norm": "rms"},
    "no norm, ReLU": {"norm": "none", "act": "relu"},
}
"""Kinds of models that ours can be as well."""

THEIRS = {
    "rotary": {"norm": "layer", "rotary": True},
    "grouped queries": {"norm": "rms", "n_kv": 2},
    "rotary, grouped queries, gated MLP": {"norm": "rms", "rotary": True, "n_kv": 2, "gated": True, "act": "silu"},
    "one key head, bidirectional": {"norm": "layer", "n_kv": 1, "direction": "bidirectional"},
}
"""Kinds that only TransformerLens has."""


# -- the same weights, in three models and in plain arithmetic ---------------------------------------------------------


def shape_of(d_vocab, **kind):
    """Everything that a kind of model is, defaults included."""
    plain = {"rotary": False, "n_kv": None, "gated": False, "direction": "causal", "d_vocab": d_vocab}
    return SHAPE | plain | kind


def random_weights(shape, seed=0, std=0.4):
    """Random weights under the names and in the layout of a HookedTransformer; none is at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: std * torch.randn(*size, generator=generator)
    d, e, h, kv = shape["d_model"], shape["d_head"], shape["n_heads"], shape["n_kv"] or shape["n_heads"]
    norm = {"none": {}, "rms": {"w": lambda: 1 + draw(d)}, "layer": {"w": lambda: 1 + draw(d), "b": lambda: draw(d)}}
    made = {"embed.W_E": draw(shape["d_vocab"], d), "unembed.W_U": draw(d, shape["d_vocab"])}
    made["unembed.b_U"] = draw(shape["d_vocab"])
    if not shape["rotary"]:
        made["pos_embed.W_pos"] = draw(shape["n_ctx"], d)
    for layer in range(shape["n_layers"]):
        block = f"blocks.{layer}."
        for letter, heads in {"Q": h, "K": kv, "V": kv}.items():
            made[f"{block}attn.W_{letter}"], made[f"{block}attn.b_{letter}"] = draw(heads, d, e), draw(heads, e)
        made |= {f"{block}attn.W_O": draw(h, e, d), f"{block}attn.b_O": draw(d)}
        names = ["W_in", *["W_gate"] * shape["gated"]]
        made |= {f"{block}mlp.{name}": draw(d, shape["d_mlp"]) for name in names}
        scale = 0 if shape["gated"] else 1  # TransformerLens' own gated MLPs have no biases
        made |= {f"{block}mlp.b_in": scale * draw(shape["d_mlp"]), f"{block}mlp.b_out": scale * draw(d)}
        made[f"{block}mlp.W_out"] = draw(shape["d_mlp"], d)
        made |= {f"{block}{ln}.{name}": new() for ln in ("ln1", "ln2") for name, new in norm[shape["norm"]].items()}
    return made | {f"ln_final.{name}": new() for name, new in norm[shape["norm"]].items()}


def our_model(shape, weights, tokenizer=None):
    """A HookedSparseTransformer with density 1 and nothing that a dense model lacks."""
    from sparse_interp.model.config import ModelConfig
    from sparse_interp.model.transformer import HookedSparseTransformer

    names = ("n_layers", "n_ctx", "d_vocab", "d_model", "n_heads", "d_head", "d_mlp", "norm")
    plain = {"sink": False, "bigram": False, "eps": 1e-5, "attention_dir": shape["direction"], "act_fn": shape["act"]}
    model = HookedSparseTransformer(ModelConfig(**{name: shape[name] for name in names}, **plain), tokenizer)
    model.load_state_dict(weights)
    return model.eval()


def their_fields(shape):
    """What the configs of both TransformerLens classes call it."""
    names = ("n_layers", "n_ctx", "d_vocab", "d_model", "n_heads", "d_head", "d_mlp")
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": shape["d_head"]} if shape["rotary"] else {}
    return {name: shape[name] for name in names} | rotary | {
        "act_fn": shape["act"],
        "normalization_type": {"layer": "LN", "rms": "RMS", "none": None}[shape["norm"]],
        "n_key_value_heads": shape["n_kv"],
        "gated_mlp": shape["gated"],
        "attention_dir": shape["direction"],
        "eps": 1e-5,
    }  # fmt: skip


def bridge(shape, weights, tokenizer=None):
    """A native TransformerBridge, whose weights are those of linear layers."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(**their_fields(shape), architecture="TransformerLensNative", init_weights=False)
    model = TransformerBridge.boot_native(cfg)
    layouts = {
        "W_Q": lambda w: w.permute(0, 2, 1).flatten(0, 1),
        "W_O": lambda w: w.flatten(0, 1).T,
        "W_in": lambda w: w.T,
        "W_E": lambda w: w,
    }
    same = {"W_K": "W_Q", "W_V": "W_Q", "W_gate": "W_in", "W_out": "W_in", "W_U": "W_in", "W_pos": "W_E"}
    state = {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        part = kind.partition("_")[2].lower()
        inside = f".{part}" if module.endswith(("attn", "mlp")) else ""
        if kind.startswith("W_"):
            state[f"{module}{inside}.weight"] = layouts[same.get(kind, kind)](weight)
        else:
            state[f"{module}{inside}.{'weight' if kind == 'w' else 'bias'}"] = weight.flatten()
    expected = model.state_dict()
    assert all(not state[name].any() for name in state.keys() - expected.keys()), "a weight has no place"
    model.load_state_dict({name: state[name].contiguous() for name in expected})
    if tokenizer is not None:
        model.tokenizer = tokenizer
    return model.eval()


def hooked_transformer(shape, weights, tokenizer=None):
    """TransformerLens 3's HookedTransformer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    fields = their_fields(shape) | {"rotary_adjacent_pairs": True, "default_prepend_bos": False}
    model = HookedTransformer(HookedTransformerConfig(**fields))
    grouped = ("W_K", "W_V", "b_K", "b_V") if shape["n_kv"] else ()
    state = {name: weight for name, weight in weights.items() if not name.endswith(grouped or ("-",))}
    state |= {name.replace("attn.", "attn._"): w for name, w in weights.items() if grouped and name.endswith(grouped)}
    model.load_state_dict(model.state_dict() | state)
    model.tokenizer = tokenizer
    return model.eval()


def their_models():
    """How to build each dense model that the installed TransformerLens has."""
    found = {"TransformerBridge": bridge}
    if version("transformer-lens").startswith("3."):
        found["HookedTransformer"] = hooked_transformer
    return found


def reference(shape, weights, tokens, held=None, added=None, gates=None):
    """Logits in float64, head by head.

    `held` says by layer and site which channels are kept and what the others hold; `added` by layer, read and head what
    is added to the stream that this one reader reads; `gates` by layer and matrix the share of its source that each
    edge carries, and the baseline that the rest is of.
    """
    w = {name: weight.double() for name, weight in weights.items()}
    heads, kv = shape["n_heads"], shape["n_kv"] or shape["n_heads"]
    activations = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}

    def node(layer, site, x):
        if (layer, site) not in (held or {}):
            return x
        kept, values = held[layer, site]
        return torch.where(kept, x, values.double())

    def norm(name, x):
        if shape["norm"] == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if shape["norm"] == "layer" else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.w"]
        return x + w[f"{name}.b"] if shape["norm"] == "layer" else x

    def heard(name, x, layer, read, head=None):
        return norm(name, x + (added or {}).get((layer, read, head), 0))

    def linear(x, name, bias=None):
        weight = w[name].permute(1, 0, 2).flatten(1) if w[name].ndim == 3 else w[name]
        _, layer, *matrix = name.split(".")
        gate = (gates or {}).get((int(layer), ".".join(matrix))) if matrix else None
        return messages(x, weight, gate) + (0 if bias is None else w[bias].flatten())

    def messages(x, weight, gate):
        if gate is None:
            return x @ weight
        share, baseline = (part.double() for part in gate)
        carried = baseline[:, None] + share * (x[..., :, None] - baseline[:, None])  # ... source target
        return (weight * carried).sum(-2)

    def rotated(x):  # complex numbers are turned by an angle that grows with the position
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        speed = 10000.0 ** -(torch.arange(pairs.shape[-1], dtype=torch.float64) / pairs.shape[-1])
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    seen = seen.tril() if shape["direction"] == "causal" else seen
    x = w["embed.W_E"][tokens]
    if not shape["rotary"]:
        x = x + w["pos_embed.W_pos"][: tokens.shape[1]]
    for layer in range(shape["n_layers"]):
        block = f"blocks.{layer}"
        read = node(layer, "attn_read", norm(f"{block}.ln1", x))
        q, k, v = (
            node(layer, letter.lower(), linear(read, f"{block}.attn.W_{letter}", f"{block}.attn.b_{letter}"))
            .unflatten(-1, (-1, shape["d_head"])) for letter in "QKV"
        )  # fmt: skip
        for letter, part in zip("QKV", (q, k, v), strict=True):
            for head in range(part.shape[2]):
                if (layer, letter.lower(), head) in (added or {}):
                    own = heard(f"{block}.ln1", x, layer, letter.lower(), head)
                    part[:, :, head] = own @ w[f"{block}.attn.W_{letter}"][head] + w[f"{block}.attn.b_{letter}"][head]
        write = w[f"{block}.attn.b_O"].expand_as(x)
        for head in range(heads):
            shared = head // (heads // kv)
            query, key = q[:, :, head], k[:, :, shared]
            query, key = (rotated(query), rotated(key)) if shape["rotary"] else (query, key)
            scores = (query @ key.mT / shape["d_head"] ** 0.5).masked_fill(~seen, -torch.inf)
            rows = slice(head * shape["d_head"], (head + 1) * shape["d_head"])
            gate = (gates or {}).get((layer, "attn.W_O"))
            gate = None if gate is None else (gate[0][rows], gate[1][rows])
            write = write + scores.softmax(-1) @ messages(v[:, :, shared], w[f"{block}.attn.W_O"][head], gate)
        x = x + node(layer, "attn_write", write)
        read = node(layer, "mlp_read", heard(f"{block}.ln2", x, layer, "mlp"))
        ahead = linear(read, f"{block}.mlp.W_in", f"{block}.mlp.b_in")
        act = activations[shape["act"]]
        neurons = act(linear(read, f"{block}.mlp.W_gate")) * ahead if shape["gated"] else act(ahead)
        write = linear(node(layer, "neuron", neurons), f"{block}.mlp.W_out", f"{block}.mlp.b_out")
        x = x + node(layer, "mlp_write", write)
    return linear(
        node(shape["n_layers"], "final_read", heard("ln_final", x, shape["n_layers"], "final")),
        "unembed.W_U",
        "unembed.b_U",
    )


# -- what has to agree -------------------------------------------------------------------------------------------------


def largest(a, b):
    """Largest difference, in units of the largest value where that is above 1."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1))


def some_nodes(cfg, share=0.5, seed=0):
    """A random share of a model's nodes."""
    from sparse_interp.model.sites import Node, places, width

    everything = [Node(*place, channel) for place in places(cfg) for channel in range(width(cfg, place.site))]
    drawn = torch.rand(len(everything), generator=torch.Generator().manual_seed(seed)) < share
    return [node for node, chosen in zip(everything, drawn.tolist(), strict=True) if chosen]


def random_gates(model, seed=0, whole=0.3, cut=0.3):
    """For every matrix shares of which some are 1 and some 0, and a random baseline per row."""
    from sparse_interp.model.edges import EdgeGate, Matrix
    from sparse_interp.model.sites import wires

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, block in enumerate(model.layers):
        for wire in wires(model.cfg):
            weight = wire.weight(block)
            draw = torch.rand(weight.shape, generator=generator)
            share = torch.where(draw < whole, 1.0, torch.where(draw < whole + cut, 0.0, draw))
            baseline = torch.randn(len(weight), generator=generator)
            found[Matrix(layer, wire.weight_name)] = EdgeGate(share.to(weight), baseline.to(weight))
    return found


def seen_at_nodes(model, tokens):
    """What the hook points of all nodes see."""
    from sparse_interp.model.dense import hooked
    from sparse_interp.model.sites import flat, places

    found = {}
    note = lambda t, hook, place: found.update({place: flat(t)})
    hooks = [(p.hook, lambda t, hook, p=p: note(t, hook, p)) for p in places(hooked(model).cfg)]
    with hooked(model).hooks(fwd_hooks=hooks):
        model(tokens)
    return found


@torch.no_grad()
def against_ours(ours, theirs, task) -> dict[str, float]:
    """Largest differences between two models of the same weights, in what is said of nodes, circuits and audits."""
    from sparse_interp.circuit.graph import Circuit
    from sparse_interp.faithfulness.audit import audit
    from sparse_interp.interventions.ablation import ablate
    from sparse_interp.interventions.baselines import mean_activations
    from sparse_interp.interventions.patching import Head, patch_direct_paths
    from sparse_interp.interventions.pruning import PruneConfig, learn_gates
    from sparse_interp.model.dense import hooked

    tokens = torch.randint(ours.cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(2))
    nodes = some_nodes(ours.cfg)
    found = {"logits": largest(theirs(tokens), ours(tokens))}
    here, there = seen_at_nodes(ours, tokens), seen_at_nodes(theirs, tokens)
    found["activations"] = max(largest(there[place], here[place]) for place in here)
    stream = torch.randn(3, 7, ours.cfg.d_model, generator=torch.Generator().manual_seed(6))
    runs = [[hooked(m)(stream, tokens=tokens, start_at_layer=layer) for layer in range(3)] for m in (theirs, ours)]
    found["runs from a stream"] = max(largest(*pair) for pair in zip(*runs, strict=True))
    means, same_means = mean_activations(ours, tokens), mean_activations(theirs, tokens)
    found["means"] = max(largest(same_means[place], means[place]) for place in means.values)
    with ablate(ours, nodes, means), ablate(theirs, nodes, means):
        found["ablations"] = largest(theirs(tokens), ours(tokens))
    known = {"task_name": task.name, "task_sha256": task.templates_sha256}
    circuit, same = (Circuit.of_nodes(model, nodes, means, **known) for model in (ours, theirs))
    for column in ("source", "target", "kind", "weight_name"):
        found["edges"] = max(found.get("edges", 0.0), float((circuit.edges[column] != same.edges[column]).any()))
    found["weights of edges"] = float((circuit.edges.weight - same.edges.weight).abs().max())
    found["counts"] = float(abs(circuit.n_edges - same.n_edges) + abs(circuit.n_nodes - same.n_nodes))
    pairs = task.batch(12, generator=torch.Generator().manual_seed(3))
    config = PruneConfig(n_steps=8, batch_size=6)
    with torch.enable_grad():
        search = [
            learn_gates(m, pairs, config, means, generator=torch.Generator().manual_seed(4)) for m in (ours, theirs)
        ]
    found["search, nats per step"] = float((search[0].history.frame - search[1].history.frame).objective.abs().max())
    found["gates"] = max(largest(search[0].tau[place], search[1].tau[place]) for place in means.values)
    tables = [
        audit(m, c, task, n_prompts=24, n_random=2, generator=torch.Generator().manual_seed(5), progress=False).frame
        for m, c in ((ours, circuit), (theirs, same))
    ]
    # an adversary goes by signs, which rounding may turn: what it finds is not the same to the last digit
    certain = [table[~table.scheme.str.contains("adversarial")] for table in reversed(tables)]
    found["audit"] = largest(*(torch.tensor(table.value.fillna(-1).to_numpy()) for table in certain))
    paths = [patch_direct_paths(m, pairs, sender=Head(0, 1), progress=False).frame.metric for m in (theirs, ours)]
    found["direct paths"] = largest(*(torch.tensor(metric.to_numpy()) for metric in paths))
    return found


@torch.no_grad()
def against_reference(shape, weights, theirs, task) -> dict[str, float]:
    """Largest differences between a model and the arithmetic above, whole, ablated, as a circuit, and resumed."""
    from sparse_interp.circuit.graph import Circuit
    from sparse_interp.interventions.ablation import ablate
    from sparse_interp.interventions.answers import answer_logits, stream_at
    from sparse_interp.interventions.baselines import mean_activations
    from sparse_interp.model.dense import hooked
    from sparse_interp.model.sites import masks

    tokens = torch.randint(shape["d_vocab"], (3, 7), generator=torch.Generator().manual_seed(2))
    before = theirs(tokens)
    cfg = hooked(theirs).cfg
    found = {"the model as it was": largest(theirs(tokens), before)}
    found["logits"] = largest(before, reference(shape, weights, tokens))
    nodes, everything, means = some_nodes(cfg), some_nodes(cfg, 1.0), mean_activations(theirs, tokens)
    held = {tuple(place): (~mask, means[place]) for place, mask in masks(nodes, cfg).items()}
    with ablate(theirs, nodes, means):
        found["ablations"] = largest(theirs(tokens), reference(shape, weights, tokens, held))
    with Circuit.of_nodes(theirs, everything, means).running(theirs):
        found["the circuit of all nodes"] = largest(theirs(tokens), before)
    gates = random_gates(hooked(theirs))
    with ablate(theirs, nodes, means), hooked(theirs).gated_edges(gates):
        found["gated edges"] = largest(theirs(tokens), reference(shape, weights, tokens, held, gates=gates))
    held = {tuple(place): (torch.zeros_like(means[place]).bool(), means[place]) for place in means.values}
    with Circuit.of_nodes(theirs, [], means).running(theirs):
        found["the circuit of none"] = largest(theirs(tokens), reference(shape, weights, tokens, held))
    batch = task.batch(6, generator=torch.Generator().manual_seed(3))
    with ablate(theirs, nodes, means):
        whole = answer_logits(hooked(theirs), batch)
        for layer in range(cfg.n_layers + 1):
            resumed = answer_logits(hooked(theirs), batch, stream_at(hooked(theirs), batch, layer), layer)
            found["resumed runs"] = max(found.get("resumed runs", 0.0), largest(resumed, whole))
    return found


def errors() -> dict[str, float]:
    """The largest error of every check of every kind of model."""
    from sparse_interp.faithfulness.ground_truth import ground_truth

    task = ground_truth("quote").task
    d_vocab = len(task.tokenizer.get_vocab())
    found: dict[str, float] = {}
    for name, build in their_models().items():
        for kind, changes in (OURS | THEIRS).items():
            shape = shape_of(d_vocab, **changes)
            weights = random_weights(shape)
            checks = against_reference(shape, weights, build(shape, weights), task)
            if kind in OURS:
                checks |= against_ours(our_model(shape, weights), build(shape, weights), task)
            for check, error in checks.items():
                found[f"{name}, {check}"] = max(found.get(f"{name}, {check}", 0.0), error)
    return found


def main() -> int:
    found = errors()
    lines = [f"transformer-lens {version('transformer-lens')}, torch {version('torch')}, bound {BOUND:g}"]
    lines += [f"  {error:.1e}  {name}" for name, error in found.items()]
    sys.stdout.write("\n".join([*lines, f"  {max(found.values()):.1e}  largest", ""]))
    return int(max(found.values()) > BOUND)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
