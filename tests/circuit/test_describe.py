"""What nodes read, write and are active on, against brute force and finite differences."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit import describe as module
from sparse_interp.circuit.describe import describe, direct_effects, embedding_writes, main_path, token_wires
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, flat


@pytest.fixture
def text_blocks():
    return torch.randint(50, (21, 16), generator=torch.Generator().manual_seed(5))


def cached(model, node, tokens):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return flat(cache[Place(node.layer, node.site).hook])[..., node.channel]


def test_top_contexts_equal_brute_force(plain_model, some_nodes, zero, text_blocks, monkeypatch):
    monkeypatch.setattr(module, "N_BEFORE", 4)
    monkeypatch.setattr(module, "N_AFTER", 2)
    nodes = some_nodes(plain_model, 0.1)
    circuit = Circuit.of_nodes(plain_model, nodes, zero(plain_model))
    table = describe(circuit, plain_model, text_blocks, n_contexts=3).contexts.frame
    for node in nodes:
        values = cached(plain_model, node, text_blocks)
        strongest = values.abs()[:, 1:].max(1)
        order = strongest.values.argsort(descending=True, stable=True)[:3].tolist()
        expected = [(row, int(strongest.indices[row]) + 1) for row in order if strongest.values[row] > 0]
        found = table[table.node == str(node)]
        assert list(zip(found.block, found.pos, strict=True)) == expected, node
        for row in found.itertuples():
            window = slice(max(0, row.pos - 4), row.pos + 3)
            assert row.pieces == [f"#{token}" for token in text_blocks[row.block, window].tolist()]
            assert row.activations == pytest.approx(values[row.block, window].tolist())
            assert (
                row.value
                == pytest.approx(float(values[row.block, row.pos]))
                == pytest.approx(row.activations[row.at_piece])
            )
            assert row.token == f"#{int(text_blocks[row.block, row.pos])}"


def test_statistics_equal_brute_force(plain_model, some_nodes, zero, text_blocks):
    nodes = some_nodes(plain_model, 0.1)
    circuit = Circuit.of_nodes(plain_model, nodes, zero(plain_model))
    table = describe(circuit, plain_model, text_blocks).statistics.frame.set_index("node")
    for node in nodes:
        values, row = cached(plain_model, node, text_blocks), table.loc[str(node)]
        assert row["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
        assert row["nonzero_frac"] == pytest.approx(float((values != 0).float().mean()))
        assert row["at_first_token"] == pytest.approx(float(values[:, 0].mean()), abs=1e-6)
    assert table.change_at_edit.isna().all(), "nothing is known of a task that was not given"


def test_on_the_task_statistics_tell_where_a_node_follows_the_edit(truth, key_circuit, generator):
    batch = truth.task.batch(20, generator=generator)
    known = describe(key_circuit, truth.model, truth.blocks(8, generator=generator), batch)
    rows = known.statistics.frame.set_index("node")
    assert rows.change_at_edit["L0.mlp_write.7"] == pytest.approx(2) and rows.change_at_last["L0.mlp_write.7"] == 0
    assert rows.change_at_last["L1.attn_write.8"] == pytest.approx(2, abs=0.05)
    assert rows.attention_to_edit["L1.v.0"] > 0.9 and math.isnan(rows.attention_to_edit["L1.attn_write.8"])
    assert set(known.contexts.frame.source) == {"task", "text"}
    on_task = known.contexts.frame[(known.contexts.frame.node == "L1.v.0") & (known.contexts.frame.source == "task")]
    assert set(on_task.token) <= {"'", '"'}


def test_contexts_never_show_padding(truth, key_circuit, generator):
    batch = truth.task.batch(20, generator=generator)
    assert batch.lengths.min() < batch.lengths.max()
    contexts = describe(key_circuit, truth.model, batch.clean, batch).contexts.frame
    on_task = contexts[contexts.source == "task"]
    lengths = torch.cat([batch.lengths, batch.lengths])
    assert all(row.pos < lengths[row.block] for row in on_task.itertuples())
    assert "<|endoftext|>" not in {piece for row in on_task.itertuples() for piece in row.pieces[1:]}


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_direct_effects_equal_a_finite_difference_with_everything_else_frozen(make_model, tokens, norm):
    model = make_model(norm=norm, afrac=None, sink=False, initializer_range=0.1)
    nodes = [Node(1, site, c) for site, c in (("mlp_write", 3), ("neuron", 7), ("attn_write", 2), ("v", 6))]
    nodes.append(Node(2, "final_read", 4))
    tokens, scale = tokens[:, :1], 1.7  # with one token, a head pays all its attention to it

    def logits(node=None):
        """With later layers' writes held at 0, the norm's scale frozen, and `node` raised by 1."""
        hooks = []
        if norm != "none":
            hooks.append((model.ln_final.hook_scale.name, lambda s, hook: torch.full_like(s, scale)))
        if node is not None:

            def raised(x, hook):
                channels = flat(x).clone()
                channels[..., node.channel] += 1
                return channels.view_as(x)

            hooks.append((Place(node.layer, node.site).hook, raised))
        if node is None or node.site in ("attn_write", "v"):
            hooks.append((Place(1, "mlp_write").hook, lambda x, hook: torch.zeros_like(x)))
        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=hooks)

    def base(node):
        if node.site in ("attn_write", "v"):
            return logits()
        hooks = []
        if norm != "none":
            hooks.append((model.ln_final.hook_scale.name, lambda s, hook: torch.full_like(s, scale)))
        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=hooks)

    for node, effect in zip(nodes, direct_effects(model, nodes, scale), strict=True):
        measured = (logits(node) - base(node))[0, 0]
        assert torch.allclose(measured, effect, atol=1e-4), node


def test_a_v_node_of_grouped_queries_writes_through_every_head_that_carries_it(make_bridge, tokens):
    bridge, _ = make_bridge(norm="none", n_kv=2)
    node, tokens = Node(1, "v", 5), tokens[:, :1]
    still = (Place(1, "mlp_write").hook, lambda x, hook: torch.zeros_like(x))

    def raised(x, hook):
        return x + torch.eye(8)[node.channel].view(2, 4)

    with torch.no_grad():
        logits = [
            bridge.run_with_hooks(tokens, fwd_hooks=[still, *more]) for more in ([], [(Place(1, "v").hook, raised)])
        ]
    (effect,) = direct_effects(hooked(bridge), [node])
    assert torch.allclose(logits[1][0, 0] - logits[0][0, 0], effect, atol=1e-4) and effect.abs().max() > 0.1


def test_a_key_of_grouped_queries_is_paid_what_its_heads_pay_on_average(make_bridge, truth, generator):
    bridge, _ = make_bridge(n_kv=2)
    batch = truth.task.batch(4, generator=generator)
    nodes = [
        Node(1, "q", 9),
        Node(1, "k", 5),
        Node(1, "v", 1),
    ]  # q 9 is in head 2; k 5 in heads 2 and 3; v 1 in 0 and 1
    known = describe(Circuit.of_nodes(bridge, nodes, mean_activations(bridge, batch.clean)), bridge, batch.clean, batch)
    with torch.no_grad():
        pattern = bridge.run_with_cache(batch.clean, attention_mask=batch.attention_mask)[1][
            "blocks.1.attn.hook_pattern"
        ]
    edited = (batch.clean != batch.corrupt).int().argmax(1)
    paid = pattern[torch.arange(4), :, batch.last, edited].mean(0)
    expected = [float(paid[2]), float(paid[2:].mean()), float(paid[:2].mean())]
    assert known.statistics.frame.attention_to_edit.tolist() == pytest.approx(expected, abs=1e-6)


def test_reads_queries_and_keys_write_nothing(plain_model):
    nodes = [Node(0, site, 1) for site in ("attn_read", "q", "k", "mlp_read")]
    assert not direct_effects(plain_model, nodes).any()


def test_the_writers_of_a_read_are_the_embeddings_in_its_channel(make_model):
    model = make_model(positions="concat", d_pos_emb=3)
    written = embedding_writes(model, [Node(1, "mlp_read", 5), Node(0, "attn_read", 13), Node(0, "neuron", 5)])
    assert torch.equal(written[0], model.embed.W_E[:, 5].detach())
    assert not written[1].any() and not written[2].any(), "positions and neurons have no embedding"


def test_a_description_has_at_most_the_tokens_asked_for(plain_model, some_nodes, zero, text_blocks):
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.2), zero(plain_model))
    known = describe(circuit, plain_model, text_blocks, n_tokens=2)
    for node, part in known.effects.frame.groupby("node"):
        assert (part.effect > 0).sum() <= 2 and (part.effect < 0).sum() <= 2, node
        assert part.effect.abs().is_monotonic_decreasing
    known.effects.of(known.effects.frame.node[0]).plot()


def test_the_model_is_left_without_hooks(truth, key_circuit, generator):
    describe(key_circuit, truth.model, truth.blocks(4, generator=generator), truth.task.batch(4, generator=generator))
    assert not any(point._forward_hooks for point in truth.model.hook_dict.values())


def test_no_text_and_another_model_are_refused(truth, key_circuit, make_model):
    with pytest.raises(CircuitError, match="at least one block"):
        describe(key_circuit, truth.model, torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(CircuitError, match="belong"):
        describe(key_circuit, make_model(), torch.zeros(1, 8, dtype=torch.long))


# -- from end to end --------------------------------------------------------------------------------------------------


def test_the_page_shows_the_way_from_the_quote_that_opens_to_the_quote_that_closes(truth, key_circuit, generator):
    batch = truth.task.batch(20, generator=generator)
    wires = token_wires(truth.model, key_circuit, batch)
    assert {(row.piece, row.kind) for row in wires.itertuples()} == {
        (quote, kind) for quote in ("'", '"') for kind in ("embedding", "unembedding")
    }
    steps = main_path(key_circuit, wires).split(" → ")
    assert steps[0] in {"'", '"'} and steps[-1] in {"'", '"'}
    assert steps[1:] in (
        ["channel 1", "L0 neuron 2", "channel 7", "L1 head 0 v 0", "channel 8", steps[-1]],
        ["channel 2", "L0 neuron 1", "channel 7", "L1 head 0 v 0", "channel 8", steps[-1]],
    )


def test_an_edit_reaches_the_answer_only_through_attention(truth, key_circuit, generator):
    batch = truth.task.batch(8, generator=generator)
    wires = token_wires(truth.model, key_circuit, batch)
    assert not any(row.kind == "embedding" and "final_read" in row.target for row in wires.itertuples())
    shortcut = wires.iloc[:1].assign(target="L2.final_read.8")
    assert " v 0 → " in main_path(key_circuit, pd.concat([wires, shortcut]))
    assert " v 0 → " not in main_path(key_circuit, pd.concat([wires, shortcut]), edit_is_last=True)


def test_where_only_a_key_joins_the_ends_the_path_goes_through_the_key(truth, key_circuit, generator):
    wires = token_wires(truth.model, key_circuit, truth.task.batch(8, generator=generator))
    without_v = replace(
        key_circuit, edges=key_circuit.edges[~key_circuit.edges.target.str.contains(".v.", regex=False)]
    )
    assert " → L1 head 0 k 0 → channel 8 → " in main_path(without_v, wires)


def test_without_importances_there_is_no_main_path(truth, key_circuit, generator):
    bare = Circuit.of_nodes(truth.model, truth.nodes, key_circuit.baseline)
    assert main_path(bare, token_wires(truth.model, bare, truth.task.batch(8, generator=generator))) == ""


def test_tables_hold_what_they_promise(plain_model, some_nodes, zero, text_blocks):
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.05), zero(plain_model))
    known = describe(circuit, plain_model, text_blocks)
    for table in (known.statistics, known.contexts, known.effects, known.reads):
        assert isinstance(table.frame, pd.DataFrame) and set(table.columns) <= set(table.frame.columns)
        assert str(table)


def test_a_channel_of_the_last_stream_does_what_a_write_into_it_does(any_model):
    here, written = Node(1, "final_resid", 3), Node(1, "mlp_write", 3)
    effects = direct_effects(any_model, [here, written, Node(2, "final_read", 3)], scale=2.0)
    assert torch.allclose(effects[0], effects[1], atol=1e-6) and effects[0].any()
    if any_model.cfg.norm != "none":
        assert not torch.allclose(effects[0], effects[2]), "the last norm lies between"
    writes = embedding_writes(any_model, [here, Node(0, "attn_read", 3)])
    assert torch.equal(writes[0], writes[1]) and writes[0].any()
