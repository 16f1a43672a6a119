"""What drives nodes and what they write, against sums written out and against hand-built models."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.describe import describe
from sparse_interp.circuit.drives import EMBEDDING, ByGroup, followed
from sparse_interp.circuit.graph import Circuit
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Place, flat


@pytest.fixture(scope="module")
def known(truth, key_circuit):
    """The key of the quote model, described on its prompts."""
    generator = torch.Generator().manual_seed(3)
    blocks = truth.blocks(32, generator=generator)
    return describe(key_circuit, truth.model, blocks, truth.task.batch(24, generator=generator))


def test_what_drives_a_node_is_weight_times_spread_of_its_sources(plain_model, some_nodes, zero):
    blocks = torch.randint(50, (9, 12), generator=torch.Generator().manual_seed(5))
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.4), zero(plain_model))
    wires = describe(circuit, plain_model, blocks).wires.frame
    with torch.no_grad():
        _, cache = plain_model.run_with_cache(blocks)
    assert set(wires.kind) == {"weight", "residual", "embedding"}
    for row in wires.sample(60, random_state=0).itertuples():
        name = row.target if row.kind == "embedding" else row.source
        layer, site, channel = name.split(".")
        hook = "blocks.0.hook_resid_pre" if row.kind == "embedding" else Place(int(layer[1:]), site).hook
        spread = float(flat(cache[hook])[..., int(channel)].double().std(correction=0))
        assert row.spread == pytest.approx(spread, rel=1e-4, abs=1e-6), row
        assert row.contribution == pytest.approx(row.weight * row.spread)
    shares = wires.groupby("target").share.sum()
    assert ((shares - 1).abs() < 1e-9).sum() > 50 and set(shares[(shares - 1).abs() >= 1e-9]) <= {0.0}


def test_wires_of_a_circuit_whose_edges_were_pruned_are_those_that_it_lists(plain_model, some_nodes, zero):
    blocks = torch.randint(50, (9, 12), generator=torch.Generator().manual_seed(5))
    nodes, means = some_nodes(plain_model, 0.4), zero(plain_model)
    whole = Circuit.of_nodes(plain_model, nodes, means)
    half = {
        matrix: mask & (torch.arange(mask.shape[1]) % 2 == 0) for matrix, mask in whole.edge_masks(plain_model).items()
    }
    pruned = Circuit.of_nodes(plain_model, nodes, means, edges=half)
    priced = replace(pruned, edges=pruned.edges.assign(importance_nats=1.0))  # the column that an edge search adds
    wires = describe(priced, plain_model, blocks).wires.frame
    listed = pruned.edges[pruned.edges.kind != "attention"]
    drawn = wires[wires.kind != EMBEDDING]
    assert set(zip(drawn.source, drawn.target, strict=True)) == set(zip(listed.source, listed.target, strict=True))
    assert 0 < (drawn.kind == "weight").sum() < (whole.edges.kind == "weight").sum()


def test_spreads_are_of_the_task_where_there_is_one_and_never_of_padding(truth, key_circuit, generator):
    batch = truth.task.batch(20, generator=generator)
    assert batch.lengths.min() < batch.lengths.max()
    known = describe(key_circuit, truth.model, truth.blocks(4, generator=generator), batch)
    values = []
    for side in (batch.clean, batch.corrupt):
        for row, length in enumerate(batch.lengths.tolist()):
            with torch.no_grad():
                _, cache = truth.model.run_with_cache(side[row : row + 1, :length])
            values.append(cache[Place(1, "k").hook][0, :, 0, 0])
    expected = float(torch.cat(values).std(correction=0))
    rows = known.statistics.frame.set_index("node")
    assert rows.spread_on_task["L1.k.0"] == pytest.approx(expected, rel=1e-5)
    assert rows.spread["L1.k.0"] != pytest.approx(expected, rel=1e-3)


def test_token_means_equal_brute_force(truth, key_circuit, generator):
    blocks = truth.blocks(16, generator=generator)
    table = describe(key_circuit, truth.model, blocks).tokens.frame
    with torch.no_grad():
        _, cache = truth.model.run_with_cache(blocks)
    assert {"current", "previous"} == set(table.by)
    for row in table.sample(40, random_state=0).itertuples():
        layer, site, channel = row.node.split(".")
        values = flat(cache[Place(int(layer[1:]), site).hook])[..., int(channel)].double()[:, 1:]
        at = blocks[:, 1:] if row.by == "current" else blocks[:, :-1]
        chosen = values[at == row.token_id]
        between = len(chosen) * float(chosen.mean() - values.mean()) ** 2
        total = float((values - values.mean()).pow(2).sum())
        assert (row.seen, row.mean) == (len(chosen), pytest.approx(float(chosen.mean()), abs=1e-6))
        assert row.share == pytest.approx(between / total, rel=1e-5)


def test_groups_that_mean_nothing_explain_nothing_even_where_each_was_seen_twice():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(500).repeat(2, 1)
    groups = ByGroup(tokens, 2)
    values = torch.randn(2, 500, 2, generator=generator)
    values[..., 1] = torch.randn(500, generator=generator)  # told by the token altogether
    groups.add(values, torch.ones(2, 500, dtype=torch.bool), 0)
    nothing, everything = groups.explained.tolist()
    assert nothing < 0.1 and everything == pytest.approx(1)


def test_a_constant_node_follows_nothing():
    groups = ByGroup(torch.arange(4).repeat(3, 1), 1)
    groups.add(torch.full((3, 4, 1), 0.3), torch.ones(3, 4, dtype=torch.bool), 0)
    assert math.isnan(float(groups.explained)) and float(groups.shares()[1].abs().max()) == 0


def test_what_a_channel_follows_is_the_token_the_one_before_or_the_position():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 5, (40, 12), generator=generator)
    real = torch.ones_like(tokens).bool()
    before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
    said = [
        followed(values.float()[..., None], tokens, real, lambda token: "abcde"[token])
        for values in ((tokens == 3) * 2, (before == 4) * -2, torch.arange(12).expand(40, -1), 0 * tokens + 7)
    ]
    assert said[0].startswith("at d (+2)") and said[1].startswith("after e (-2)")
    assert said[2:] == ["told by position", "always 7"]
    assert followed(torch.randn(40, 12, 1, generator=generator), tokens, real, str) == (
        "told by neither token nor position"
    )


def test_the_wires_of_a_hand_built_model_are_its_diagram(known):
    into = known.wires.into("L0.neuron.0")
    assert set(zip(into.source, into.weight, strict=True)) == {("L0.mlp_read.1", 1.0), ("L0.mlp_read.2", 1.0)}
    out_of = known.wires.out_of("L0.neuron.2")
    assert list(zip(out_of.target, out_of.weight, strict=True)) == [("L0.mlp_write.7", -1.0)]
    assert known.wires.into("L0.mlp_read.1").source.tolist() == [EMBEDDING]
    assert known.wires.into("L1.attn_read.7").source.tolist() == ["L0.mlp_write.7"]


def test_sentences_of_a_hand_built_model_name_its_tokens_sources_and_targets(known):
    said = known.sentences
    assert said.of("L0.neuron.0").startswith(
        "Neuron 0 of layer 0 follows the token it stands at (100% of its variance)"
    )
    assert "' (+1)" in said.of("L0.neuron.0") and '" (+1)' in said.of("L0.neuron.0")
    assert "' (+1)" in said.of("L0.neuron.2") and '"' not in said.of("L0.neuron.2")
    assert "goes to channel 7 as MLP 0 writes it (-1)" in said.of("L0.neuron.2")
    assert "' (-1)" in said.of("L1.v.0") and '" (+1)' in said.of("L1.v.0")
    assert "is driven by channel 6 as attention 1 reads it (+6, 100%)" in said.of("L1.k.0")
    assert "most those of \" (+4) and ' (-4) per unit" in said.of("L2.final_read.8")
    assert len(said) == len(known.statistics) and not said.frame.sentence.str.contains("nan").any()


def test_every_number_of_a_sentence_stands_in_a_table(known):
    rows = known.statistics.frame.set_index("node")
    at_quote = known.tokens.of("L1.v.0").set_index("token").loc["'"]
    sentence = known.sentences.of("L1.v.0")
    assert f"{rows.explained_by_current['L1.v.0']:.0%} of its variance" in sentence
    assert f"' ({at_quote['mean']:+.2g})" in sentence and f"{rows['mean']['L1.v.0']:+.2g} on average" in sentence


def test_of_two_layers_that_need_each_other_one_follows_the_token_before(generator):
    from sparse_interp.faithfulness.ground_truth import ground_truth

    truth = ground_truth("induction")
    blocks = truth.blocks(32, generator=generator)
    circuit = Circuit.of_nodes(truth.model, truth.nodes, mean_activations(truth.model, blocks))
    known = describe(circuit, truth.model, blocks)
    rows = known.statistics.frame.set_index("node")
    assert rows.explained_by_previous["L1.k.0"] > 0.95 and rows.explained_by_current["L1.v.0"] > 0.95
    assert rows.explained_by_position["L0.q.0"] > 0.95
    assert "follows the position" in known.sentences.of("L0.q.0")
    after = known.tokens.of("L1.k.0", "previous").head(4)
    assert set(after.token) == {"red", "blue", "green", "pink"} and (after["mean"].abs() > 2.5).all()


def test_a_dense_model_is_described_in_the_same_words(truth, dense_truth, generator):
    batch, said = truth.task.batch(16, generator=generator), []
    for model in dense_truth:
        circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, batch.clean))
        known = describe(circuit, model, batch.clean, batch)
        said.append(known)
        assert isinstance(known.wires.frame, pd.DataFrame)
    assert said[0].sentences == said[1].sentences
    numbers = [known.wires.frame.select_dtypes("number").fillna(-1).to_numpy() for known in said]
    assert abs(numbers[0] - numbers[1]).max() < 1e-5
