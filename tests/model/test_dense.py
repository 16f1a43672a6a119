"""Dense TransformerLens models as ours: what agrees with what, what is left alone, and what is refused."""

import copy
from collections import Counter
from operator import attrgetter

import pytest
import torch
from torch import nn

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, n_nodes, places, stream_hook, width


@pytest.fixture(scope="module")
def task():
    from sparse_interp.faithfulness.ground_truth import ground_truth

    return ground_truth("quote").task


def above(bound, errors):
    return {name: error for name, error in errors.items() if not error <= bound}


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "no norm, ReLU"])
def test_nodes_circuits_and_audits_of_a_bridge_are_those_of_our_model_with_the_same_weights(dense_script, task, kind):
    shape = dense_script.shape_of(len(task.tokenizer.get_vocab()), **dense_script.OURS[kind])
    weights = dense_script.random_weights(shape)
    errors = dense_script.against_ours(
        dense_script.our_model(shape, weights), dense_script.bridge(shape, weights), task
    )
    assert len(errors) == 12 and not above(dense_script.BOUND, errors)


@pytest.mark.parametrize(
    "kind", ["rotary", "grouped queries", "rotary, grouped queries, gated MLP", "one key head, bidirectional"]
)
def test_a_bridge_computes_what_arithmetic_says_whole_ablated_as_a_circuit_and_resumed(dense_script, task, kind):
    shape = dense_script.shape_of(len(task.tokenizer.get_vocab()), **dense_script.THEIRS[kind])
    weights = dense_script.random_weights(shape)
    errors = dense_script.against_reference(shape, weights, dense_script.bridge(shape, weights), task)
    assert len(errors) == 7 and not above(dense_script.BOUND, errors)


def test_the_checks_above_see_a_weight_that_is_off_by_a_little(dense_script, task):
    shape = dense_script.shape_of(len(task.tokenizer.get_vocab()), norm="rms", n_kv=2, rotary=True)
    weights = dense_script.random_weights(shape)
    other = weights | {"blocks.1.attn.b_V": weights["blocks.1.attn.b_V"] + 0.001}
    errors = dense_script.against_reference(shape, weights, dense_script.bridge(shape, other), task)
    assert "logits" in above(dense_script.BOUND, errors)


def test_our_model_and_one_that_was_adapted_are_left_as_they_are(plain_model, make_bridge):
    bridge, _ = make_bridge()
    assert hooked(plain_model) is plain_model
    assert hooked(hooked(bridge)).tl is bridge


def test_a_model_is_tried_out_once(make_bridge):
    bridge, _ = make_bridge()
    runs = []
    bridge.unembed.register_forward_hook(lambda *_: runs.append(1))
    hooked(bridge)
    n_runs = len(runs)
    zero_values(bridge)
    assert len(runs) == n_runs > 0


def test_nodes_are_counted_with_as_many_key_heads_as_there_are(make_bridge):
    cfg = hooked(make_bridge(n_kv=2)[0]).cfg
    assert [width(cfg, site) for site in ("q", "k", "v")] == [16, 8, 8]
    assert n_nodes(cfg) == 2 * (4 * 12 + 16 + 8 + 8 + 20) + 12


def test_a_circuit_is_plain_hooks_inside_any_transformer_lens_call(dense_script, make_bridge, tokens):
    bridge, _ = make_bridge(rotary=True, n_kv=2)
    means = mean_activations(bridge, tokens)
    circuit = Circuit.of_nodes(bridge, dense_script.some_nodes(hooked(bridge).cfg), means)
    with torch.no_grad():
        whole = bridge(tokens)
        plain = bridge.run_with_hooks(tokens, fwd_hooks=circuit.hooks(bridge))
        with circuit.running(bridge):
            logits, cache = bridge.run_with_cache(tokens)
        assert torch.equal(logits, plain) and not torch.equal(logits, whole)
        for place, kept in circuit.kept.items():
            held = cache[place.hook].flatten(2)[..., ~kept]
            assert torch.equal(held, means[place][~kept].expand_as(held)), place


def test_a_bridge_is_restored_even_when_the_block_raises_and_ablations_nest(make_bridge, tokens):
    bridge, _ = make_bridge()
    means, nodes = zero_values(bridge), [Node(0, "neuron", 1), Node(1, "k", 2)]
    with torch.no_grad():
        before = bridge(tokens)
        with pytest.raises(ZeroDivisionError), ablate(bridge, nodes, means):
            _ = 1 / 0
        assert torch.equal(bridge(tokens), before)
        with ablate(bridge, nodes, means):
            together = bridge(tokens)
        with ablate(bridge, nodes[:1], means), ablate(bridge, nodes[1:], means):
            assert torch.equal(bridge(tokens), together)


def test_asked_for_answers_a_bridge_passes_every_node_once(make_bridge, task):
    from sparse_interp.interventions.answers import answer_logits

    bridge, _ = make_bridge()
    model, batch = hooked(bridge), task.batch(4, generator=torch.Generator().manual_seed(0))
    passed = Counter()
    count = [(place.hook, lambda x, hook, place=place: passed.update([place])) for place in places(model.cfg)]
    with torch.no_grad(), bridge.hooks(fwd_hooks=count):
        logits = answer_logits(model, batch)
    assert passed == Counter(places(model.cfg))
    rows = torch.arange(4)
    torch.testing.assert_close(logits, bridge(batch.clean)[rows, batch.last])


def test_a_bridge_that_is_training_goes_on_training(make_bridge, tokens):
    bridge = make_bridge()[0].train()
    mean_activations(bridge, tokens)
    assert bridge.training and all(p.requires_grad for p in bridge.parameters())


def test_a_circuit_of_a_bridge_is_saved_loaded_and_refused_by_other_weights(
    dense_script, make_bridge, tokens, tmp_path
):
    bridge, _ = make_bridge(n_kv=2, gated=True)
    circuit = Circuit.of_nodes(bridge, dense_script.some_nodes(hooked(bridge).cfg), mean_activations(bridge, tokens))
    path = circuit.save(tmp_path / "circuit.json")
    back = Circuit.load(path, bridge)
    assert back.cfg == circuit.cfg == hooked(bridge).cfg and back.n_edges == circuit.n_edges
    with torch.no_grad(), circuit.running(bridge):
        expected = bridge(tokens)
    with torch.no_grad(), back.running(bridge):
        assert torch.equal(bridge(tokens), expected)
    other = copy.deepcopy(bridge)
    with torch.no_grad():
        other.unembed.W_U.mul_(1.01)
    with pytest.raises(CircuitError, match="was found in 'native' with weights"):
        Circuit.load(path, other)
    with pytest.raises(CircuitError, match="k of layer 0 has 16 nodes in this model and .8,. values"):
        back.check_model(make_bridge(gated=True)[0])


def test_a_circuit_of_ours_moves_to_a_bridge_of_the_same_shape(dense_script, tokens):
    shape = dense_script.shape_of(50, norm="rms")
    weights = dense_script.random_weights(shape)
    ours, bridge = dense_script.our_model(shape, weights), dense_script.bridge(shape, weights)
    circuit = Circuit.of_nodes(ours, dense_script.some_nodes(ours.cfg), mean_activations(ours, tokens))
    moved = circuit.transplanted(bridge)
    assert moved.edges.equals(circuit.edges) and moved.model_sha256 != circuit.model_sha256
    with pytest.raises(CircuitError, match="Load the model it belongs to"), circuit.running(bridge):
        pass


def wrapped(kind, tokenizer, folder):
    """A bridge around a Hugging Face model with random weights, made here and nowhere looked up."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    size = {"vocab_size": len(tokenizer.get_vocab()), "attn_implementation": "eager"}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=32, n_embd=12, n_layer=2, n_head=3, **size)
        model = transformers.GPT2LMHeadModel(config)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, **heads, **size)
        model = transformers.LlamaForCausalLM(config)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=noise)
    model.config.architectures = [type(model).__name__]
    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(
        kind, hf_model=model.eval(), tokenizer=loaded, device="cpu", dtype=torch.float32
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
def test_a_bridge_around_a_hugging_face_model_is_taken_too(dense_script, task, tmp_path, kind, folded):
    from sparse_interp.interventions.answers import answer_logits, stream_at

    bridge = wrapped(kind, task.tokenizer, tmp_path)
    if folded:
        bridge.enable_compatibility_mode(disable_warnings=True)
    batch = task.batch(4, generator=torch.Generator().manual_seed(0))
    cfg, means = hooked(bridge).cfg, mean_activations(bridge, batch.clean)
    nodes = dense_script.some_nodes(cfg)
    whole = Circuit.of_nodes(bridge, dense_script.some_nodes(cfg, 1.0), means)
    with torch.no_grad():
        before = bridge(batch.clean)
        with whole.running(bridge):
            assert torch.equal(bridge(batch.clean), before)
        with ablate(bridge, nodes, means):
            expected = bridge(batch.clean)[torch.arange(4), batch.last]
            resumed = answer_logits(hooked(bridge), batch, stream_at(hooked(bridge), batch, 1), 1)
    torch.testing.assert_close(resumed, expected)
    assert not torch.allclose(expected, before[torch.arange(4), batch.last])
    assert cfg.n_key_value_heads == (2 if kind == "llama" else None) and cfg.gated_mlp == (kind == "llama")
    n_weights = sum(w.numel() for block in hooked(bridge).layers for part in (block.attn, block.mlp)
                    for w in vars(part).values() if w is not None)  # fmt: skip
    assert whole.n_edges == n_weights


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="a Linear is no model with hook points: it has no cfg, no hooks"):
        hooked(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attn_only": True}, "attn_only=True: its blocks have no MLP"),
        ({"output_logits_soft_cap": 2.0}, "it is not true that W_U carries the last read to the logits"),
    ],
)
def test_a_bridge_that_is_not_made_of_our_sites_is_refused(dense_script, fields, words):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    shape = dense_script.shape_of(50, norm="rms")
    cfg = TransformerBridgeConfig(**dense_script.their_fields(shape), **fields, architecture="TransformerLensNative")
    with pytest.raises(ConfigError, match=words):
        hooked(TransformerBridge.boot_native(cfg))


def test_heads_that_read_streams_of_their_own_are_refused_also_when_the_model_was_taken_before(
    make_bridge, monkeypatch
):
    bridge, _ = make_bridge()
    hooked(bridge)
    monkeypatch.setitem(vars(bridge.cfg), "use_split_qkv_input", True)
    with pytest.raises(ConfigError, match="call model.set_use_split_qkv_input"):
        hooked(bridge)


def discarding(part):
    """A forward pass that shows a hook point what it computes and goes on with what it had."""

    def forward(x, *args, **kwargs):
        out = part.original_component(part.hook_in(x))
        part.hook_out(out)
        return out

    return forward


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("attn.q", "what is written to blocks.0.attn.hook_q does not reach the pattern"),
        ("attn.k", "what is written to blocks.0.attn.hook_k does not reach the pattern"),
        ("attn.v", "blocks.0.attn.hook_z is the pattern times blocks.0.attn.hook_v"),
    ],
)
def test_a_model_that_discards_what_hooks_return_is_refused(make_bridge, path, words):
    bridge, _ = make_bridge()
    part = attrgetter(path)(bridge.blocks[0])
    vars(part)["forward"] = discarding(part)  # assigned, it would become the wrapped layer
    with pytest.raises(ConfigError, match=words):
        hooked(bridge)


def test_a_model_whose_weights_are_not_those_it_computes_with_is_refused(make_bridge):
    bridge, _ = make_bridge()
    part = bridge.blocks[1].mlp.get_submodule("out")
    part.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ConfigError, match="mlp.W_out carries blocks.1.mlp.hook_post to blocks.1.hook_mlp_out"):
        hooked(bridge)


def test_a_mean_needs_places_that_fire_once(make_bridge):
    bridge, _ = make_bridge()
    attn = bridge.blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args: (module.hook_in(args[0]), *args[1:]))
    with pytest.raises(ConfigError, match="blocks.0.attn.hook_in fires more than once in a run"):
        mean_activations(bridge, torch.zeros(1, 3, dtype=torch.long))


def test_a_run_between_residual_sites_holds_what_a_whole_run_holds_there(any_kind, tokens):
    model = hooked(any_kind)
    with torch.no_grad():
        logits, streams = model(tokens), [model.between(tokens, leave=site) for site in range(5)]
        for site, stream in enumerate(streams):
            torch.testing.assert_close(model.between(tokens, enter=(site, stream)), logits)
            torch.testing.assert_close(model.between(tokens, enter=(site, stream), leave=4), streams[4])
            if site % 2 == 0:
                assert torch.equal(stream, model(tokens, stop_at_layer=site // 2))
    with pytest.raises(ConfigError, match="site 0 to 5"):
        model.between(tokens, leave=5)


def test_what_enters_a_residual_site_is_what_moves_the_rest(any_kind, tokens):
    model = hooked(any_kind)
    with torch.no_grad():
        stream = model.between(tokens, leave=3) + 1.0
        moved = [(stream_hook(3), lambda resid, hook: stream)]
        with model.hooks(fwd_hooks=moved):
            expected = model(tokens)
        torch.testing.assert_close(model.between(tokens, enter=(3, stream)), expected)
