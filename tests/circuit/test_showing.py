"""The circuit page's content against the tables that it is made of, and against what the model itself does."""

import base64
import html
import json
import re
import zlib
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit import showing as module
from sparse_interp.circuit.describe import describe, in_order
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.knock_outs import knock_outs
from sparse_interp.circuit.readings import read_heads
from sparse_interp.circuit.showing import page
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node, Place, flat
from sparse_interp.viewer.content import PageAudit
from sparse_interp.viewer.page import page_data, render_page


def nothing():
    """No knock-outs."""
    return module._Outcomes(None, torch.tensor([], dtype=torch.long), 0)


@pytest.fixture(scope="module")
def whole_page(truth, key_circuit):
    """Batch, and the page with everything that can be handed to it."""
    generator = torch.Generator().manual_seed(4)
    batch = truth.task.batch(12, generator=generator)
    known = describe(key_circuit, truth.model, truth.blocks(8, generator=generator), batch)
    given = {"readings": read_heads(key_circuit, truth.model, batch), "other": key_circuit.bare_page(),
             "knocked": knock_outs(key_circuit, truth.model, batch), "facts": {"loss": 1.5}}  # fmt: skip
    return batch, page(key_circuit, truth.model, batch, known, **given)


def test_a_circuit_of_a_dense_model_is_described_and_drawn_as_that_of_ours(truth, dense_truth, generator):
    batch, described = truth.task.batch(8, generator=generator), []
    for model in dense_truth:
        circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, batch.clean))
        known = describe(circuit, model, batch.clean, batch)
        described.append((known, page(circuit, model, batch, known)))
    (ours, our_page), (theirs, their_page) = described
    assert their_page.edges == our_page.edges and their_page.tokens == our_page.tokens
    assert theirs.effects.frame.token.equals(ours.effects.frame.token)
    for table in ("statistics", "effects", "reads"):
        mine, others = (getattr(known, table).frame.select_dtypes("number") for known in (ours, theirs))
        assert (mine.fillna(-1) - others.fillna(-1)).abs().max().max() < 1e-5, table
    render_page(their_page)


def test_the_headline_says_which_prompts_its_losses_are_from(truth, key_circuit, whole_page):
    batch, _ = whole_page
    measured = [
        ("task loss of circuit", 0.25, "selection", 512),
        ("task loss of model", 0.2, "selection", 512),
        ("KL(model || circuit)", 0.125, "selection", 512),
        ("nodes at task loss 0.15", 9.0, "test", 64),
    ]
    scores = pd.DataFrame(measured, columns=["measure", "value", "split", "n_prompts"]).assign(unit="", ablation="")
    known = describe(key_circuit, truth.model, batch.clean, batch)
    headed, bare = (page(replace(key_circuit, scores=of), truth.model, batch, known) for of in (scores, scores[3:]))
    assert list(bare.summary) == ["nodes", "edges", "token weights"]
    assert list(headed.summary.items())[3:] == [
        ("task loss (model's), nats", "0.250 (0.200)"),
        ("KL from model, nats", "0.125"),
        ("selection prompts", "512"),
    ]


def test_partners_of_grouped_queries_are_named(make_bridge, tokens):
    bridge, _ = make_bridge(n_kv=2)
    circuit = Circuit.of_nodes(bridge, [Node(0, "k", 5), Node(0, "q", 13)], mean_activations(bridge, tokens))
    known = describe(circuit, bridge, tokens)
    partners = {node.id: node.stats["score partner"] for node in module._full_nodes(circuit, known, {}, nothing())}
    assert partners == {"L0.q.13": "L0.k.5", "L0.k.5": "L0.q.9 (not in the circuit), L0.q.13"}


def test_a_page_has_every_node_edge_and_number(truth, key_circuit, generator, tmp_path):
    audit = PageAudit(verdict="not run", passed=None)
    batch = truth.task.batch(20, generator=generator)
    known = describe(key_circuit, truth.model, truth.blocks(8, generator=generator), batch)
    shown = page(key_circuit, truth.model, batch, known, audit)
    assert [node.id for node in shown.nodes] == [str(node) for node in in_order(key_circuit)]
    assert sum(edge.kind == "weight" for edge in shown.edges) == key_circuit.n_edges
    assert shown.audit is audit and shown.prompts and shown.summary["nodes"] == str(key_circuit.n_nodes)
    by_id = {node.id: node for node in shown.nodes}
    assert by_id["L1.v.0"].stats["attention, end to edit"] > 0.9
    assert by_id["L1.k.0"].stats["score partner"] == "L1.q.0 (not in the circuit)"
    assert by_id["L0.mlp_read.1"].stats["written by tokens"] == "' +1"
    assert {write.token for write in by_id["L2.final_read.8"].writes} == {"'", '"'}
    sides = {(token.piece, token.side): token.role for token in shown.tokens}
    assert sides["'", "embedding"] == sides["'", "unembedding"] != sides['"', "unembedding"]
    assert key_circuit.to_html(tmp_path / "circuit.html", shown).read_text().startswith("<!")


def test_a_page_without_a_model_shows_nodes_and_edges(key_circuit, tmp_path):
    data = page_data(key_circuit.bare_page())
    assert len(data["nodes"]) == key_circuit.n_nodes and len(data["edges"]) == len(key_circuit.edges)
    assert "circuit" in key_circuit.to_html(tmp_path / "circuit.html").read_text()


def test_a_page_draws_itself_in_a_notebook_as_the_document_that_it_is_written_as(whole_page, tmp_path, key_circuit):
    _, shown = whole_page
    document = shown._repr_html_().partition('srcdoc="')[2].partition('"')[0]
    assert html.unescape(document) == key_circuit.to_html(tmp_path / "circuit.html", shown).read_text()
    assert f"{key_circuit.n_nodes} nodes" in repr(shown) and len(repr(shown)) < 200


def test_hostile_tokens_reach_the_page_as_text(make_model, some_nodes):
    hostile = "</script><img src=x onerror=alert(1)>"
    model = make_model()
    blocks = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(0))

    class Decoder:
        """Stands in for a tokenizer of which every piece is an attack."""

        def decode(self, ids):
            return f"{hostile}{ids[0]}"

    circuit = Circuit.of_nodes(model, some_nodes(model, 0.1), mean_activations(model, blocks))
    model.tokenizer = Decoder()
    known = describe(circuit, model, blocks)
    shown = module.replace(circuit.bare_page(), nodes=module._full_nodes(circuit, known, {}, nothing()))
    text = render_page(shown)
    assert "<img" not in text and "onerror=alert(1)>" not in text
    (data,) = re.findall(r'id="circuit-data">([A-Za-z0-9+/=]*)</script>', text)
    pieces = json.loads(zlib.decompress(base64.b64decode(data)))["pieces"]
    assert pieces and all(piece.startswith(hostile) for piece in pieces)
    known.contexts.plot()
    assert "<img" not in known.contexts._repr_html_()


def test_prompts_carry_what_the_node_holds_at_every_token(truth, whole_page):
    batch, shown = whole_page
    with torch.no_grad():
        caches = [
            truth.model.run_with_cache(side, attention_mask=batch.attention_mask)[1]
            for side in (batch.clean, batch.corrupt)
        ]
    rows = module._chosen_rows(batch).tolist()
    for node in shown.nodes:
        held = [flat(cache[Place(node.layer, node.site).hook])[..., node.channel] for cache in caches]
        for row, prompt, both in zip(rows, shown.prompts, node.on_prompts, strict=True):
            stop = int(batch.lengths[row])
            assert len(both[0]) == len(prompt.pieces) and len(both[1]) == len(prompt.twin)
            for values, side in zip(both, held, strict=True):
                assert values == pytest.approx(side[row, 1:stop].tolist(), abs=1e-5), node.id


def test_heads_carry_the_attention_of_the_answer_position(truth, whole_page):
    batch, shown = whole_page
    (head,) = [head for head in shown.heads if (head.layer, head.head) == (1, 0)]
    with torch.no_grad():
        pattern = truth.model.run_with_cache(batch.clean, attention_mask=batch.attention_mask)[1][
            "blocks.1.attn.hook_pattern"
        ]
    for row, (ours, _) in zip(module._chosen_rows(batch).tolist(), head.attention, strict=True):
        stop = int(batch.lengths[row])
        assert ours == pytest.approx(pattern[row, 0, stop - 1, 1:stop].tolist(), abs=1e-5)
    assert head.knock_out is not None and {table.title.split(":")[0] for table in head.tables} >= {"QK", "OV"}


def test_a_node_knocked_out_is_shown_with_its_lead_on_every_prompt(truth, whole_page):
    batch, shown = whole_page
    table = knock_outs(module_circuit(shown, truth), truth.model, batch).of("node")
    rows = module._chosen_rows(batch).tolist()
    for node in shown.nodes:
        leads = table.leads[node.id]
        assert node.knock_out.leads == [(leads[row], leads[len(batch) + row]) for row in rows]
        assert node.knock_out.kl == table.kl_nats[node.id]
    assert shown.whole is not None and {half.kind for half in shown.halves} == {"attention", "MLP"}


def module_circuit(shown, truth):
    """The circuit of the page's nodes, with the baseline of the key."""
    means = mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(1)))
    return Circuit.of_nodes(truth.model, [Node(n.layer, n.site, n.channel) for n in shown.nodes], means)


def test_knock_outs_of_other_prompts_are_refused(truth, key_circuit, generator):
    batch = truth.task.batch(6, generator=generator)
    known = describe(key_circuit, truth.model, truth.blocks(4, generator=generator), batch)
    knocked = knock_outs(key_circuit, truth.model, truth.task.batch(4, generator=generator))
    with pytest.raises(CircuitError, match=r"measured on 8 prompts, and the page's batch has 6 pairs"):
        page(key_circuit, truth.model, batch, known, knocked=knocked)


def test_channels_list_the_weights_of_their_tokens(truth, whole_page):
    _, shown = whole_page
    embedding = truth.model.embed.W_E.detach()
    assert {c.channel for c in shown.channels} == {n.channel for n in shown.nodes if n.site.endswith(("read", "write"))}
    for channel in shown.channels:
        column = embedding[:, channel.channel]
        assert channel.n_tokens == int(column.count_nonzero())
        if channel.n_tokens:
            sizes = [abs(write.effect) for write in channel.embedding]
            assert max(sizes) == pytest.approx(float(column.abs().max()))


def test_the_course_of_the_search_and_its_settings_are_on_the_page(whole_page):
    _, shown = whole_page
    (curve,) = shown.curves
    assert curve.points == [(1.0, 0.5), (2.0, 0.25)]
    settings = next(table for table in shown.tables if table.title == "Settings of the search")
    assert ["n_steps", "7"] in [list(row) for row in settings.rows]
    model = next(table for table in shown.tables if table.title == "The model")
    assert ["loss", 1.5] in [list(row) for row in model.rows]
    render_page(shown)
