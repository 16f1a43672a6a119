"""What heads look for and carry: against brute force, and against models whose algorithm is known in words."""

import math
from functools import cache

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.looking import ANSWER, EVERY, ROLES, even_frac, explained_by, looks
from sparse_interp.circuit.readings import read_heads
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node, Place, flat, group_size, key_of
from sparse_interp.tasks.task import TaskBatch, logit_difference


@cache
def read(name):
    """A hand-built model, the circuit of its key, prompts, and the reading."""
    from sparse_interp.faithfulness.ground_truth import ground_truth

    truth, generator = ground_truth(name), torch.Generator().manual_seed(0)
    means = mean_activations(truth.model, truth.blocks(64, generator=generator))
    circuit = Circuit.of_nodes(truth.model, truth.nodes, means)
    batch = truth.task.batch(24, generator=generator)
    return truth, circuit, batch, read_heads(circuit, truth.model, batch)


def head_of(frame, layer, head, **values):
    frame = frame[(frame.layer == layer) & (frame["head"] == head)]
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


@pytest.fixture
def pairs():
    """Pairs of random prompts of several lengths, each with one changed token."""
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(1, 12, (6, 9), generator=generator)  # few ids, so that tokens come again
    lengths = torch.tensor([9, 5, 7, 9, 6, 8])
    corrupt = clean.clone()
    corrupt[torch.arange(6), torch.tensor([2, 4, 1, 8, 3, 3])] += 20
    answer, foil = torch.randint(50, (2, 6), generator=generator)
    return TaskBatch(clean, corrupt, answer, (foil + (foil == answer)) % 50, lengths, torch.arange(6))


@pytest.fixture
def random_reading(plain_model, some_nodes, pairs):
    """A random circuit of the plain model, and its reading."""
    means = mean_activations(plain_model, torch.randint(50, (6, 12), generator=torch.Generator().manual_seed(0)))
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.6), means)
    return circuit, read_heads(circuit, plain_model, pairs)


def alone(model, circuit, batch):
    """Each prompt of both sides by itself, without padding: (row, cache, logits)."""
    sides = batch.both_sides()
    for row, length in enumerate(sides.lengths.tolist()):
        with circuit.running(model), torch.no_grad():
            logits, seen = model.run_with_cache(sides.clean[row : row + 1, :length])
        yield row, seen, logits[0, -1]


def role_of(tokens, changed, query, key, kind):
    """What a key is to its query, by the definition."""
    if key == query:
        return "itself"
    if kind == ANSWER and changed[key]:
        return "changed"
    if key == query - 1:
        return "previous"
    if tokens[key] == tokens[query]:
        return "same token"
    if key > 0 and tokens[key - 1] == tokens[query] and key - 1 < query:
        return "after same token"
    return "first" if key == 0 else "other"


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ANSWER, EVERY])
def test_attention_by_role_equals_brute_force_on_prompts_without_padding(plain_model, pairs, random_reading, kind):
    circuit, reading = random_reading
    sides, paid, rows = pairs.both_sides(), {}, 0
    for row, seen, _ in alone(plain_model, circuit, pairs):
        n = int(sides.lengths[row])
        tokens, changed = sides.clean[row].tolist(), (sides.clean[row] != sides.corrupt[row]).tolist()
        for query in [n - 1] if kind == ANSWER else range(1, n):
            rows += 1
            for key in range(query + 1):
                role = role_of(tokens, changed, query, key, kind)
                paid[role] = paid.get(role, 0) + seen["blocks.1.attn.hook_pattern"][0, :, query, key]
    for head in range(3):
        table = head_of(reading.roles.frame, 1, head, query=kind).set_index("role")
        for role in ROLES:
            expected = float(paid[role][head]) / rows if role in paid else 0.0
            assert table.mass[role] == pytest.approx(expected, abs=1e-5), role
        assert table.even_mass.sum() == pytest.approx(1)
        look = head_of(reading.looks.frame, 1, head, query=kind).iloc[0]
        assert look.sink == pytest.approx(1 - table.mass.sum(), abs=1e-6) and look.sink > 0.01
    assert set(paid) == set(ROLES) - ({"changed"} if kind == EVERY else set())


def test_shares_of_channels_are_the_covariance_with_the_score_and_add_up(plain_model, pairs, random_reading):
    circuit, reading = random_reading
    products = {c: [] for c in range(5)}
    for row, seen, _ in alone(plain_model, circuit, pairs):
        q, k = (flat(seen[Place(0, site).hook])[0, :, 5:10].double() for site in "qk")  # head 1
        for query in range(1, int(pairs.both_sides().lengths[row])):
            for c in range(5):
                part = q[query, c] * k[: query + 1, c]
                products[c].append(part - part.mean())
    products = {c: torch.cat(parts) for c, parts in products.items()}
    score = sum(products.values())
    rows = head_of(reading.channels.frame, 0, 1, query=EVERY).set_index("q")
    for c, part in products.items():
        expected = float((part * score).sum() / score.pow(2).sum())
        assert rows.share.get(f"L0.q.{5 + c}", 0.0) == pytest.approx(expected, abs=1e-4)
    sums = reading.channels.frame.groupby(["layer", "head", "query"]).share.sum()
    assert sums[sums.abs() > 1e-4].to_numpy() == pytest.approx(1, abs=1e-4)
    assert (sums.abs() > 1e-4).sum() >= len(sums) - 1, "but for a head of which AbsTopK cuts every q at the answer"


def test_what_v_nodes_add_directly_equals_the_formula_written_out(plain_model, pairs, random_reading):
    circuit, reading = random_reading
    sides, kept = pairs.both_sides(), {place: mask.double() for place, mask in circuit.kept.items()}
    head, found = 2, {}
    unembedding = plain_model.unembed.W_U.detach().double()
    for row, seen, _ in alone(plain_model, circuit, pairs):
        z = seen["blocks.1.attn.hook_z"][0, -1, head].double()
        stands = (seen["blocks.1.hook_attn_out"][0, -1] != 0) * kept[Place(1, "attn_write")]
        gain = plain_model.ln_final.w.detach().double() / seen["ln_final.hook_scale"][0, -1].double()
        towards = unembedding[:, sides.answer[row]] - unembedding[:, sides.foil[row]]
        for c in range(5):
            wires = z[c] * plain_model.layers[1].attn.W_O[head, c].detach().double()
            adds = wires * stands * gain * towards * kept[Place(2, "final_read")]
            found[c] = found.get(c, 0) + float(adds.sum()) / len(sides)
    rows = head_of(reading.values.frame, 1, head).groupby("v").direct.sum()
    assert len(rows) and rows.abs().max() > 1e-3
    for v, direct in rows.items():
        assert direct == pytest.approx(found[int(v.split(".")[2]) - 10], abs=1e-5)


def test_a_knock_out_is_what_ablating_the_kept_v_nodes_of_a_head_costs(plain_model, pairs, random_reading):
    circuit, reading = random_reading
    sides = pairs.both_sides()

    def mean():
        with torch.no_grad():
            return float(logit_difference(plain_model(sides.clean), sides).mean())

    with circuit.running(plain_model):
        whole = mean()
        for row in reading.heads.frame.itertuples():
            nodes = [node for node in circuit.node_set if node.site == "v" and node.layer == row.layer]
            nodes = [node for node in nodes if node.channel // 5 == row.head]
            assert row.n_v == len(nodes)
            with ablate(plain_model, nodes, circuit.baseline):
                assert row.knockout == pytest.approx(whole - mean(), abs=1e-5)
    last = reading.heads.frame[reading.heads.frame.layer == 1]
    assert last.knockout.to_numpy() == pytest.approx(last.knockout_at_answer.to_numpy(), abs=1e-5)
    first = reading.heads.frame[reading.heads.frame.layer == 0]
    assert (first.knockout - first.knockout_at_answer).abs().max() > 1e-3, "what other positions get is part of it"


def test_attention_is_explained_by_what_it_follows_and_an_average_by_nothing(pairs):
    where = looks(pairs, EVERY, "causal")
    by_token = (1.0 + where.token) * where.seen
    assert explained_by(by_token, where.token, where) > 0.8 > explained_by(by_token, where.distance, where)
    back = (where.distance == 1).float() * where.seen
    assert explained_by(back, where.distance, where) > 0.9 > explained_by(back, where.token, where)
    even = where.seen / where.seen.sum(2, keepdim=True).clamp(min=1)
    assert math.isnan(explained_by(even, where.token, where)) and even_frac(even, where) == pytest.approx(1)
    assert even_frac(back, where) < 0.4


# -- models whose algorithm is known ----------------------------------------------------------------------------------


def test_the_head_of_quote_looks_at_quotes_by_its_one_channel_and_copies_their_type():
    _, _, _, reading = read("quote")
    (row,) = reading.heads.frame.itertuples()
    assert (row.layer, row.head, row.note) == (1, 0, "")
    assert row.knockout == pytest.approx(8, abs=0.1) == row.knockout_at_answer == pytest.approx(row.direct, abs=1e-3)
    channel = head_of(reading.channels.frame, 1, 0, query=ANSWER).iloc[0]
    assert (channel.k, channel.wants, channel.q_kept, channel.k_kept) == ("L1.k.0", "high", False, True)
    assert channel.share == pytest.approx(1) and "L1.attn_read.6 (+6, 100%)" in channel.k_from
    assert "' (+6)" in channel.k_follows and '" (+6)' in channel.k_follows
    assert set(head_of(reading.keys.frame, 1, 0).head(2).token) == {"'", '"'}
    value = reading.values.frame.iloc[0]
    assert (value.v, value.write, value.weight) == ("L1.v.0", "L1.attn_write.8", 1.0)
    assert "' (-1)" in value.v_follows and '" (+1)' in value.v_follows and "L1.attn_read.7" in value.v_from
    assert head_of(reading.roles.frame, 1, 0, query=ANSWER, role="changed").mass.iloc[0] > 0.99
    for said in (
        "the token tells 100% of where its attention goes",
        "k 0 being high",
        "carries v 0",
        "to channel 8 (+1)",
    ):
        assert said in row.sentence


def test_the_two_heads_of_mlp_gate_look_at_the_switch_and_at_the_way_and_add_nothing_directly():
    _, _, _, reading = read("mlp_gate")
    for head, tokens, channel in ((0, {"on", "off"}, 4), (1, {"up", "down"}, 5)):
        assert set(head_of(reading.keys.frame, 0, head).head(2).token) == tokens
        value = head_of(reading.values.frame, 0, head).iloc[0]
        assert value.write == f"L0.attn_write.{channel}" and value.direct == 0
        row = head_of(reading.heads.frame, 0, head).iloc[0]
        assert row.knockout > 7 and row.direct == 0, "the neuron stands between"


def test_the_head_of_attention_copy_looks_at_names_and_carries_both_bits():
    _, _, _, reading = read("attention_copy")
    assert set(head_of(reading.keys.frame, 0, 0).head(4).token) == {"ada", "bob", "cleo", "dan"}
    assert set(zip(reading.values.frame.v, reading.values.frame.write, strict=True)) == {
        ("L0.v.0", "L0.attn_write.4"),
        ("L0.v.1", "L0.attn_write.5"),
    }
    (row,) = reading.heads.frame.itertuples()
    assert row.direct == pytest.approx(row.knockout, rel=1e-3), "through the norm that the circuit has"


def test_the_heads_of_induction_look_one_back_and_for_what_came_after_the_same_key():
    _, _, _, reading = read("induction")
    first, second = (head_of(reading.heads.frame, layer, 0).iloc[0] for layer in (0, 1))
    assert first.knockout > 10 > 0.01 > abs(first.knockout_at_answer), "it works before the answer position"
    assert second.knockout_at_answer == pytest.approx(second.knockout)
    look = head_of(reading.looks.frame, 0, 0, query=EVERY).iloc[0]
    assert look.explained_by_distance > 0.9 > 0.1 > look.explained_by_token
    assert head_of(reading.roles.frame, 0, 0, query=EVERY, role="previous").mass.iloc[0] > 0.9
    assert "at every position pays 94% to the position before (averaging: 21%)" in first.sentence
    assert head_of(reading.roles.frame, 1, 0, query=ANSWER, role="after same token").mass.iloc[0] > 0.99
    assert "what came after an earlier occurrence of its token" in second.sentence
    channels = head_of(reading.channels.frame, 1, 0, query=ANSWER)
    assert list(channels.k) == ["L1.k.0", "L1.k.1"] and set(channels.wants) == {"like q"}
    assert channels.share.to_numpy() == pytest.approx(0.5, abs=0.1), "two key bits, one channel each"
    assert all(follows.startswith("after ") for follows in channels.k_follows)
    position = head_of(reading.channels.frame, 0, 0, query=EVERY)
    assert position.set_index("q").wants["L0.q.1"] == "low", "its q is -10 everywhere"
    assert set(position.k_follows) == {"told by position"} and (position.share.abs() > 0.5).all()


def test_a_head_that_averages_is_said_to():
    _, _, _, reading = read("bracket_depth")
    row = head_of(reading.heads.frame, 0, 0).iloc[0]
    assert "at the answer position averages over all that it sees" in row.sentence
    assert head_of(reading.looks.frame, 0, 0, query=ANSWER).even_frac.iloc[0] > 0.99
    assert "none of its v nodes is in the circuit" in head_of(reading.heads.frame, 1, 0).note.iloc[0]


# -- other models, and refusals ---------------------------------------------------------------------------------------


def test_a_dense_model_is_read_in_the_same_words(truth, dense_truth, generator):
    batch, readings = truth.task.batch(12, generator=generator), []
    for model in dense_truth:
        circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, batch.clean))
        readings.append(read_heads(circuit, model, batch))
    ours, theirs = readings
    assert ours.heads.frame.sentence.tolist() == theirs.heads.frame.sentence.tolist()
    for table in ("heads", "looks", "roles", "keys", "channels", "values"):
        frames = [getattr(reading, table).frame for reading in readings]
        frames = [f.sort_values("token_id", kind="stable") if table == "keys" else f for f in frames]  # ties
        mine, others = (frame.select_dtypes("number").fillna(-1) for frame in frames)
        assert abs(mine.to_numpy() - others.to_numpy()).max() < 1e-5, table


@pytest.mark.parametrize("kind", [{"rotary": True}, {"n_kv": 2}, {"rotary": True, "n_kv": 2, "gated": True}], ids=str)
def test_rotated_heads_have_no_channels_and_grouped_ones_share_keys(make_bridge, some_nodes, pairs, kind):
    from sparse_interp.model.dense import hooked

    bridge, _ = make_bridge(**kind)
    cfg = hooked(bridge).cfg
    circuit = Circuit.of_nodes(bridge, some_nodes(hooked(bridge), 0.7), mean_activations(bridge, pairs.clean))
    reading = read_heads(circuit, bridge, pairs)
    assert len(reading.heads.frame) == 2 * cfg.n_heads and len(reading.values.frame)
    total = reading.roles.frame.groupby(["layer", "head", "query"]).mass.sum()
    assert total.to_numpy() == pytest.approx(1, abs=1e-5)
    if "rotary" in kind:
        assert not len(reading.channels.frame)
        assert reading.heads.frame.note.str.contains("not the sum of products of q and k").all()
        return
    assert group_size(cfg) == 2 and not reading.heads.frame.note.str.len().any()
    for row in reading.channels.frame.itertuples():
        assert int(row.k.split(".")[2]) == key_of(cfg, int(row.q.split(".")[2]))
    assert reading.heads.frame.groupby(["layer", reading.heads.frame["head"] // 2]).knockout.nunique().max() == 1


def test_a_circuit_without_heads_has_nothing_to_read_and_one_of_another_model_is_refused(make_model, pairs, zero):
    model = make_model()
    reading = read_heads(Circuit.of_nodes(model, [Node(0, "neuron", 3)], zero(model)), model, pairs)
    assert not len(reading.heads) and not len(reading.values) and not len(reading.roles)
    other = Circuit.of_nodes(make_model(seed=1), [Node(0, "v", 3)], zero(model))
    with pytest.raises(CircuitError, match="was found in"):
        read_heads(other, model, pairs)


def test_reading_leaves_the_model_as_it_was(plain_model, random_reading, tokens):
    with torch.no_grad():
        before = plain_model(tokens)
    circuit, _ = random_reading
    assert not any(point._forward_hooks for point in plain_model.hook_dict.values())
    assert torch.equal(plain_model(tokens), before) and circuit.n_nodes


def test_tables_draw_and_show_themselves():
    _, _, _, reading = read("quote")
    assert "head 1.0" in [tick.get_text() for tick in reading.heads.plot().get_yticklabels()]
    assert "L1.v.0" in reading.values._repr_html_() and "sentence" in reading._repr_html_()
