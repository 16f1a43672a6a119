"""Published circuits by definition: random payloads whose every number comes from the NumPy reference, for tests.

It holds what is not retained where the published names say, runs every prompt by itself without padding, and shares
nothing with the library.
"""

import math

import numpy as np
from released_numpy import DEFAULTS, Run

LOCS = ["attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.act_in", "mlp.post_act",
        "mlp.resid_delta"]  # fmt: skip
ANSWERS = 4, 2


def widths(config):
    """loc -> number of its channels, for every loc at which nodes are counted."""
    c = DEFAULTS | config
    heads = c["n_head"] * (c["d_head"] or c["d_model"] // c["n_head"])
    read = c["d_model"] + (c["d_pos_emb"] or 0)
    d_mlp = c.get("n_mlp") or c["d_mlp"] or 4 * c["d_model"]
    sizes = [read, heads, heads, heads, c["d_model"], read, d_mlp, c["d_model"]]
    found = {f"{i}.{loc}": size for i in range(c["n_layer"]) for loc, size in zip(LOCS, sizes, strict=True)}
    return found | {"final_resid": c["d_model"]}


def outside(retained, means, without=()):
    """What a circuit holds: every channel that is not retained, and those of `without`, pairs of loc and channel."""
    held = {}
    for loc, values in means.items():
        kept = set(retained[loc]) - {channel for where, channel in without if where == loc}
        channels = [channel for channel in range(len(values)) if channel not in kept]
        held[loc] = channels, np.asarray(values, np.float64)[channels]
    return held


def stored_loss(config, weights, prompts, held=None):
    """Mean over pairs of the loss of one side *plus* the loss of the other; the first half of `prompts` is a side."""
    total = 0.0
    for i, prompt in enumerate(prompts):
        out = Run(config, weights, np.array([prompt]), held=held).logits[0, -1]
        right, wrong = (out[answer] for answer in (ANSWERS if i < len(prompts) // 2 else ANSWERS[::-1]))
        total += math.log1p(math.exp(wrong - right))
    return total / (len(prompts) // 2)


def random_prompts(rng, config, n_pairs=2):
    """Prompts of the first class, then their twins; twins differ in a token, and one is longer by one."""
    n_vocab, longest = config["vocab_size"], config["block_size"] - 3  # and two of padding
    first = [[int(t) for t in rng.integers(1, n_vocab, size=rng.integers(2, longest + 1))] for _ in range(n_pairs)]
    second = [[*prompt[:-2], int(rng.integers(1, n_vocab)), prompt[-1]] for prompt in first]
    second[0] = [*second[0], int(rng.integers(1, n_vocab))]
    return first + second


def activations(config, weights, prompts, retained, shape, held):
    """loc -> channel -> what it holds at every token, zero behind the end of a prompt."""
    found = {loc: {c: np.zeros(shape, np.float32) for c in channels} for loc, channels in retained.items()}
    for row, prompt in enumerate(prompts):
        hooks = Run(config, weights, np.array([prompt]), held=held).hooks
        for loc, by_channel in found.items():
            for channel, values in by_channel.items():
                values[row, : len(prompt)] = hooks[loc][0, :, channel]
    return found


def random_payload(rng, config, weights, share=0.4):
    """A payload with random retained nodes, and random means; its losses and activations by definition."""
    sizes = widths(config)
    means = {loc: (0.5 * rng.standard_normal(size)).astype(np.float32) for loc, size in sizes.items()}
    n_kept = {loc: min(size - 1, round(share * size)) for loc, size in sizes.items()}  # everywhere something is held
    retained = {loc: rng.permutation(size)[: n_kept[loc]].tolist() for loc, size in sizes.items()}
    retained["0.mlp.act_in"] = []
    prompts = random_prompts(rng, config)
    tokens = np.zeros((len(prompts), max(map(len, prompts)) + 2), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt

    def loss(without=None):
        return stored_loss(config, weights, prompts, None if without is None else outside(retained, means, without))

    nodes = {loc: [(loc, channel) for channel in channels] for loc, channels in retained.items()}
    halves = {f"{layer}.{half}": [node for loc in nodes if loc.startswith(f"{layer}.{half}.") for node in nodes[loc]]
              for layer in range(config["n_layer"]) for half in ("attn", "mlp")}  # fmt: skip
    runs = {"task_samples": None, "task_samples_circuit": outside(retained, means)}
    shape = tokens.shape
    samples = {n: (tokens, activations(config, weights, prompts, retained, shape, h)) for n, h in runs.items()}
    importances = {
        "beeg_model_config": config,
        "loss": loss(),
        "interv_loss": loss(()),
        "ch_interv_losses": {loc: [loss([node]) for node in here] for loc, here in nodes.items()},
        "layer_interv_losses": {half: loss(here) for half, here in halves.items()},
        "loc_interv_losses": {loc: loss(here) for loc, here in nodes.items()},
        **samples,
    }
    circuit_data = {loc: np.array(channels, np.int64) for loc, channels in retained.items()}
    return {"circuit_data": circuit_data, "importances": importances, "num_total_nodes": sum(sizes.values())}, means
