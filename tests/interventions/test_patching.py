"""Direct paths: equal to the whole model computed once more, in float64 and by hand, with one read edited."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError, WrongToolWarning
from sparse_interp.interventions.patching import Head, PathTable, Receiver, patch_direct_paths, receivers_of
from sparse_interp.model.sites import Node, Place
from sparse_interp.tasks.task import TaskBatch, logit_difference

MODELS = {
    "plain": {},
    "few entries kept": {"afrac": 0.2, "norm": "layer"},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3, "tie_unembed": True},
    "cut at writes alone": {"afrac_sites": ("attn_write", "mlp_write"), "sink": False},
    "bidirectional": {"attention_dir": "bidirectional"},
    "dense": {"afrac": None, "bigram": False},
    "dense, no norm": {"afrac": None, "norm": "none", "initializer_range": 0.1},
}
SENDERS = {
    "a head": Head(0, 1),
    "channels of a write": [Node(0, "attn_write", c) for c in range(6)],
    "v channels": [Node(0, "v", c) for c in (0, 3, 7, 14)],
    "neurons": [Node(0, "neuron", n) for n in range(0, 20, 2)],
    "an mlp's channels": [Node(0, "mlp_write", c) for c in (1, 4, 10)],
    "nodes of two half blocks": [*(Node(0, "neuron", n) for n in range(8)), Node(1, "attn_write", 3)],
    "neurons beside a whole channel": [*(Node(0, "neuron", n) for n in range(9)), Node(0, "mlp_write", 4)],
}


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parents[1] / "model" / "numpy_reference.py"
    spec = importlib.util.spec_from_file_location("numpy_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batch():
    """Three pairs of unequal lengths, padded on the right."""
    drawn = torch.Generator().manual_seed(5)
    clean, corrupt = torch.randint(1, 50, (2, 3, 6), generator=drawn)
    corrupt = torch.where(torch.tensor([True, False, True, False, True, False]), corrupt, clean)
    lengths = torch.tensor([6, 4, 5])
    padding = torch.arange(6) >= lengths[:, None]
    clean, corrupt = (tokens.masked_fill(padding, 0) for tokens in (clean, corrupt))
    answer, foil = torch.tensor([3, 4, 5]), torch.tensor([13, 14, 15])
    return TaskBatch(clean, corrupt, answer, foil, lengths, torch.zeros(3, dtype=torch.long))


def written(cfg, weights, seen, sender, half):
    """What a sender adds to the stream in one half block: the rules of the module's docstring, spelled out."""
    layer, is_mlp = divmod(half, 2)
    block = f"blocks.{layer}"
    write = seen[f"{block}.hook_mlp_out" if is_mlp else f"{block}.hook_attn_out"]
    cut = cfg["afrac"] is not None and ("mlp_write" if is_mlp else "attn_write") in cfg["afrac_sites"]
    survives = (write != 0) if cut else np.ones_like(write)
    z, post = seen[f"{block}.attn.hook_z"], seen[f"{block}.mlp.hook_post"]
    W_O, W_out = weights[f"{block}.attn.W_O"], weights[f"{block}.mlp.W_out"]
    if isinstance(sender, Head):
        bias = weights[f"{block}.attn.b_O"] / cfg["n_heads"]
        return survives * (z[:, :, sender.head] @ W_O[sender.head] + bias)
    total = np.zeros_like(write)
    for node in sender:
        if node.layer == layer and node.site == "v" and not is_mlp:
            head, channel = divmod(node.channel, cfg["d_head"])
            total += survives * z[:, :, head, channel, None] * W_O[head, channel]
        if node.layer == layer and node.site == "neuron" and is_mlp:
            total += survives * post[..., node.channel, None] * W_out[node.channel]
    for node in sender:
        if node.layer == layer and node.site == ("mlp_write" if is_mlp else "attn_write"):
            total[..., node.channel] = write[..., node.channel]
    return total


def brute_force(reference, model, batch, sender, receiver):
    """Metric of each prompt with the path into `receiver` patched, in float64."""
    cfg = dict(vars(model.cfg))
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    mask = batch.attention_mask.numpy()
    _, clean = reference.forward(cfg, weights, batch.clean.numpy(), mask)
    _, corrupt = reference.forward(cfg, weights, batch.corrupt.numpy(), mask)
    nodes = [Node(sender.layer, "v", 0)] if isinstance(sender, Head) else sender
    halves = {2 * node.layer + (node.site in ("neuron", "mlp_write")) for node in nodes}
    before = [half for half in halves if half < 2 * receiver.layer + (receiver.read == "mlp")]
    message = sum(
        written(cfg, weights, clean, sender, half) - written(cfg, weights, corrupt, sender, half) for half in before
    )
    logits, _ = reference.forward(cfg, weights, batch.corrupt.numpy(), mask, {tuple(receiver): message})
    return logit_difference(torch.tensor(logits), batch)


@pytest.mark.parametrize("change", MODELS, ids=str)
@pytest.mark.parametrize("sender", SENDERS, ids=str)
def test_every_direct_path_is_the_whole_model_with_one_read_edited(reference, make_model, batch, change, sender):
    model, sender = make_model(**MODELS[change]), SENDERS[sender]
    reachable = receivers_of(model, sender)
    chosen = reachable[:: max(1, len(reachable) // 4)]  # every kind of reader over the senders; the reference is slow
    table = patch_direct_paths(model, batch, sender=sender, receivers=chosen, progress=False)
    expected = [float(brute_force(reference, model, batch, sender, receiver).mean()) for receiver in chosen]
    assert table.frame.metric.to_list() == pytest.approx(expected, abs=2e-5)


NODES = [Node(1, "attn_read", 4), Node(1, "q", 3), Node(1, "k", 8), Node(1, "v", 2), Node(0, "neuron", 7)]
NODES += [Node(1, "mlp_read", 5), Node(1, "neuron", 11), Node(2, "final_read", 1)]


def with_the_message_in_one_node(reference, model, batch, sender, node):
    """Metric of each prompt in float64: the node's value from a run whose stream has the message, put into another."""
    cfg = dict(vars(model.cfg))
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    mask, tokens = batch.attention_mask.numpy(), batch.corrupt.numpy()
    _, clean = reference.forward(cfg, weights, batch.clean.numpy(), mask)
    _, corrupt = reference.forward(cfg, weights, tokens, mask)
    message = written(cfg, weights, clean, sender, 0) - written(cfg, weights, corrupt, sender, 0)
    alone = {"mlp_read": "mlp", "neuron": "mlp", "final_read": "final"}.get(node.site)
    readers = [(node.layer, letter, head) for letter in "qkv" for head in range(cfg["n_heads"])]
    readers = readers if alone is None else [(node.layer, alone, None)]
    _, seen = reference.forward(cfg, weights, tokens, mask, dict.fromkeys(readers, message))
    place = Place(node.layer, node.site).hook
    if node.site == "attn_read":
        stream = corrupt[f"blocks.{node.layer}.hook_resid_pre"] + message
        value = reference.norm(stream, weights, f"blocks.{node.layer}.ln1", cfg["norm"], cfg["eps"])
        value = value if cfg["afrac"] is None else reference.abs_topk(value, cfg["afrac"], cfg["afrac_min"])
    else:
        value = seen[place].reshape(*tokens.shape, -1)
    others = np.arange(value.shape[-1]) != node.channel
    logits, _ = reference.forward(cfg, weights, tokens, mask, held={place: (others, value)})
    return logit_difference(torch.tensor(logits), batch)


@pytest.mark.parametrize("change", ["plain", "dense"])
def test_a_path_to_one_node_is_the_whole_model_with_that_node_edited(reference, make_model, batch, change):
    model, sender = make_model(**MODELS[change]), Head(0, 1)
    table = patch_direct_paths(model, batch, sender=sender, receivers=[*NODES, Receiver(1, "q", 1)], progress=False)
    expected = [float(with_the_message_in_one_node(reference, model, batch, sender, node).mean()) for node in NODES]
    assert table.frame.metric.to_list()[:-1] == pytest.approx(expected, abs=2e-5)
    assert table.frame.receiver.to_list() == [*map(str, NODES), "L1H1.q"]
    assert (table.frame.effect[:-1].abs() > 1e-6).sum() >= 5


def test_all_receivers_of_a_head_at_once_or_one_by_one(reference, plain_model, batch):
    together = patch_direct_paths(plain_model, batch, sender=Head(0, 2), batch_size=1000, progress=False)
    alone = patch_direct_paths(plain_model, batch, sender=Head(0, 2), batch_size=1, progress=False)
    assert together.frame.metric.to_list() == pytest.approx(alone.frame.metric.to_list(), abs=1e-6)
    expected = [float(brute_force(reference, plain_model, batch, Head(0, 2), r).mean()) for r in everyone(plain_model)]
    assert together.frame.metric.to_list() == pytest.approx(expected, abs=2e-5)
    assert together.frame.receiver.to_list() == [str(receiver) for receiver in everyone(plain_model)]


def everyone(model):
    heads = [Receiver(1, read, head) for read in "qkv" for head in range(3)]
    return [Receiver(0, "mlp"), *heads, Receiver(1, "mlp"), Receiver(2, "final")]


def test_a_path_from_a_run_to_itself_changes_nothing(plain_model, batch):
    same = TaskBatch(**{**vars(batch), "clean": batch.corrupt})
    table = patch_direct_paths(plain_model, same, sender=Head(0, 0), progress=False)
    assert table.frame.effect.abs().max() < 1e-6
    assert table.frame.recovered_frac.isna().all()


def test_effects_are_changes_from_the_corrupt_run_and_shares_of_the_whole_change(plain_model, batch):
    table = patch_direct_paths(plain_model, batch, sender=Head(0, 0), progress=False)
    clean, corrupt = (
        logit_difference(plain_model(tokens, attention_mask=batch.attention_mask), batch).mean().item()
        for tokens in (batch.clean, batch.corrupt)
    )
    assert (table.frame.effect - (table.frame.metric - corrupt)).abs().max() < 1e-5
    assert (table.frame.recovered_frac - table.frame.effect / (clean - corrupt)).abs().max() < 1e-5
    assert table.frame.effect.abs().max() > 0.01


def test_messages_of_all_heads_are_the_message_of_the_whole_write(plain_model, batch):
    """Under AbsTopK too: the final read adds them up before it reads."""
    identity = lambda logits, batch: logits[:, -1].sum(-1)
    plain_model.ln_final.kind = "none"  # a read that is linear
    plain_model.cfg.norm = "none"
    final = [Receiver(2, "final")]
    patch = lambda sender: patch_direct_paths(
        plain_model, batch, identity, sender=sender, receivers=final, progress=False
    )
    heads = sum(patch(Head(1, head)).frame.effect.item() for head in range(3))
    whole = patch([Node(1, "attn_write", c) for c in range(12)]).frame.effect.item()
    assert heads == pytest.approx(whole, abs=1e-4) and abs(whole) > 0.1


def test_hooks_that_are_on_the_model_stay_on_in_every_pass(plain_model, batch):
    """Among them one on the stream that the patched passes begin with."""
    halve = lambda x, hook: x / 2
    hooks = [("blocks.1.hook_resid_pre", halve), ("blocks.0.hook_mlp_out", halve), ("hook_embed", halve)]
    with plain_model.hooks(fwd_hooks=hooks):
        some = patch_direct_paths(plain_model, batch, sender=Head(0, 1), progress=False)
        own = TaskBatch(**{**vars(batch), "corrupt": batch.clean})
        none = patch_direct_paths(plain_model, own, sender=Head(0, 1), progress=False)
        corrupt = logit_difference(plain_model(batch.corrupt, attention_mask=batch.attention_mask), batch).mean()
    assert none.frame.effect.abs().max() < 1e-6
    assert (some.frame.metric - some.frame.effect).to_list() == pytest.approx([corrupt.item()] * len(some), abs=1e-5)


def test_the_model_is_left_as_it_was(plain_model, batch):
    plain_model.train()
    plain_model.set_use_attn_result(True)
    patch_direct_paths(plain_model, batch, sender=Head(0, 1), progress=False)
    assert plain_model.training and plain_model.cfg.use_attn_result
    assert not plain_model.cfg.use_split_qkv_input and not plain_model.cfg.use_hook_mlp_in
    with pytest.raises(RuntimeError, match="stop"):
        patch_direct_paths(plain_model, batch, fail, sender=Head(0, 1), progress=False)
    assert not plain_model.cfg.use_split_qkv_input


def fail(logits, batch):
    raise RuntimeError("stop")


# -- TransformerLens' own ---------------------------------------------------------------------------------------------


def theirs(model, batch, head, read):
    patching = pytest.importorskip("transformer_lens.patching")
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this TransformerLens approximates direct paths")
    run = lambda tokens: model.run_with_cache(tokens)[1]
    metric = lambda logits: logit_difference(logits, batch).mean()
    return patching.get_act_patch_direct_path(
        model, batch.corrupt, run(batch.clean), run(batch.corrupt), metric, head.layer, head.head, read, verbose=False
    )[1]


@pytest.mark.parametrize("read", ["q", "k", "v"])
def test_transformer_lens_agrees_on_a_dense_model(make_model, batch, read):
    model = make_model(afrac=None)
    whole = TaskBatch(**{**vars(batch), "lengths": torch.full((3,), 6)})
    ours = patch_direct_paths(model, whole, sender=Head(0, 1), progress=False)
    ours = ours.frame[(ours.frame.read == read)].metric.to_list()
    assert theirs(model, whole, Head(0, 1), read).tolist() == pytest.approx(ours, abs=1e-5)


def test_transformer_lens_differs_on_a_sparse_one_and_says_so(plain_model, batch):
    whole = TaskBatch(**{**vars(batch), "lengths": torch.full((3,), 6)})
    ours = patch_direct_paths(plain_model, whole, sender=Head(0, 1), progress=False)
    ours = torch.tensor(ours.frame[(ours.frame.read == "v")].metric.to_list())
    with pytest.warns(WrongToolWarning, match="sparse_interp.patch_direct_paths is exact"):
        found = theirs(plain_model, whole, Head(0, 1), "v")
    assert (found - ours).abs().max() > 0.01


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (Head(2, 0), "L2H0 is no head: there are 2 layers of 3 heads"),
        ([Node(0, "q", 1)], "L0.q.1 writes nothing: a sender is a Head, or nodes of v, attn_write, neuron, mlp_write"),
        ([], "there are no nodes: a sender is"),
        ([Node(0, "neuron", 20)], "L0.neuron.20: neuron has channels 0 to 19"),
    ],
    ids=str,
)
def test_who_writes_nothing_sends_nothing(plain_model, batch, sender, message):
    with pytest.raises(CircuitError, match=message):
        patch_direct_paths(plain_model, batch, sender=sender)


def test_who_cannot_be_reached_is_refused(plain_model, batch):
    nowhere = Receiver(0, "q", 1), Receiver(1, "q"), Receiver(1, "final"), Receiver(0, "mlp"), Node(0, "neuron", 1)
    for receiver in nowhere:
        with pytest.raises(CircuitError, match="does not reach"):
            patch_direct_paths(plain_model, batch, sender=[Node(0, "mlp_write", 1)], receivers=[receiver])
    with pytest.raises(CircuitError, match="L1.mlp_write.2 reads nothing"):
        patch_direct_paths(plain_model, batch, sender=Head(0, 1), receivers=[Node(1, "mlp_write", 2)])


@pytest.mark.parametrize("change", [{"residual_act": "relu"}, {"afrac_sites": ("resid_mid",)}], ids=str)
def test_a_stream_that_is_no_sum_has_no_direct_paths(make_model, batch, change):
    with pytest.raises(ConfigError, match="there are no direct paths"):
        patch_direct_paths(make_model(**change), batch, sender=Head(0, 0))


# -- dense models of TransformerLens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("sender", SENDERS, ids=str)
def test_paths_in_a_bridge_are_those_in_our_model_with_the_same_weights(dense_script, batch, norm, sender):
    shape = dense_script.shape_of(50, norm=norm)
    weights = dense_script.random_weights(shape, std=0.3)
    models = dense_script.our_model(shape, weights), dense_script.bridge(shape, weights)
    who = [*receivers_of(models[0], SENDERS[sender]), *(node for node in NODES if node.layer > 0)]
    tables = [patch_direct_paths(m, batch, sender=SENDERS[sender], receivers=who, progress=False).frame for m in models]
    assert tables[1].receiver.equals(tables[0].receiver)
    assert tables[1].metric.to_list() == pytest.approx(tables[0].metric.to_list(), abs=2e-5)


@pytest.mark.parametrize(
    ("sender", "part", "rows"),
    [
        (Head(0, 3), "attn.hook_z", [12, 13, 14, 15]),
        ([Node(0, "v", 5)], "attn.hook_z", [9, 13]),  # the second of two v heads is that of heads 2 and 3
        ([Node(0, "neuron", 2), Node(0, "neuron", 9)], "mlp.hook_post", [2, 9]),
    ],
    ids=str,
)
def test_paths_under_rotation_grouped_queries_and_gates_are_arithmetic_with_one_read_edited(
    dense_script, batch, sender, part, rows
):
    shape = dense_script.shape_of(50, norm="rms", rotary=True, n_kv=2, gated=True, act="silu")
    weights = dense_script.random_weights(shape)
    bridge = dense_script.bridge(shape, weights)
    table = patch_direct_paths(bridge, batch, sender=sender, progress=False).frame.set_index("receiver")
    with torch.no_grad():
        of_clean, of_corrupt = (bridge.run_with_cache(tokens)[1] for tokens in (batch.clean, batch.corrupt))
    change = (of_clean[f"blocks.0.{part}"] - of_corrupt[f"blocks.0.{part}"]).double().flatten(2)
    matrix = weights["blocks.0.attn.W_O" if part == "attn.hook_z" else "blocks.0.mlp.W_out"].double().view(-1, 12)
    message = change[..., rows] @ matrix[rows]
    for receiver in receivers_of(bridge, sender):
        key = (receiver.layer, receiver.read, receiver.head)
        logits = dense_script.reference(shape, weights, batch.corrupt, added={key: message})
        assert table.metric[str(receiver)] == pytest.approx(float(logit_difference(logits, batch).mean()), abs=2e-5), (
            key
        )
    assert [str(r) for r in receivers_of(bridge, sender) if r.read == "k"] == ["L1H0.k", "L1H1.k"]


def test_hooks_that_are_on_a_bridge_stay_on_in_every_pass(dense_script, batch):
    shape = dense_script.shape_of(50, norm="rms")
    weights = dense_script.random_weights(shape)
    halve = lambda x, hook: x / 2
    hooks = [("blocks.1.hook_resid_pre", halve), ("blocks.0.hook_mlp_out", halve), ("hook_embed", halve)]
    tables = []
    for model in (dense_script.our_model(shape, weights), dense_script.bridge(shape, weights)):
        with model.hooks(fwd_hooks=hooks):
            tables.append(patch_direct_paths(model, batch, sender=Head(0, 1), progress=False).frame)
    assert tables[1].metric.to_list() == pytest.approx(tables[0].metric.to_list(), abs=2e-5)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_draws_every_reader(plain_model, batch):
    table = patch_direct_paths(plain_model, batch, sender=Head(0, 1), progress=False)
    assert isinstance(table, PathTable) and set(table.frame.sender) == {"L0H1"}
    ax = table.plot()
    assert {tick.get_text() for tick in ax.get_xticklabels()} == {
        *(f"{r}{h}" for r in "qkv" for h in (0, 1, 2)),
        "mlp",
        "final",
    }
    assert table.frame["head"].isna().sum() == 3
