"""Circuits as graphs, as hooks and as sets."""

import copy
from dataclasses import replace

import networkx
import pytest
import torch

from sparse_interp.circuit.describe import token_wires
from sparse_interp.circuit.graph import Circuit, token_edges
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import holding_hooks
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.edges import cutting, edges_among
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import NODE_SITES, WIRES, Node, NodeAt, Place, flat, masks


def edges_by_brute_force(model, nodes):
    """Every weight and wire between two of `nodes`, one pair of nodes at a time."""
    model = copy.deepcopy(model).requires_grad_(False)
    d_model, d_head = model.cfg.d_model, model.cfg.d_head
    at = ["attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write", "final_read"]
    found = {}
    for a in nodes:
        for b in nodes:
            block = model.layers[a.layer] if a.layer < model.cfg.n_layers else None
            same_layer, pair = a.layer == b.layer, (a.site, b.site)
            if same_layer and a.site == "attn_read" and b.site in "qkv":
                name = f"W_{b.site.upper()}" + ("" if a.channel < d_model else "_pos")
                row = a.channel if a.channel < d_model else a.channel - d_model
                weight = float(getattr(block.attn, name)[b.channel // d_head, row, b.channel % d_head])
            elif same_layer and pair == ("v", "attn_write"):
                weight = float(block.attn.W_O[a.channel // d_head, a.channel % d_head, b.channel])
            elif same_layer and pair == ("mlp_read", "neuron"):
                positional = a.channel >= d_model
                matrix = block.mlp.W_in_pos if positional else block.mlp.W_in
                weight = float(matrix[a.channel - d_model * positional, b.channel])
            elif same_layer and pair == ("neuron", "mlp_write"):
                weight = float(block.mlp.W_out[a.channel, b.channel])
            else:
                weight = 0.0
            if weight:
                found[str(a), str(b), "weight"] = weight
            later = (a.layer, at.index(a.site)) < (b.layer, at.index(b.site))
            if a.site.endswith("_write") and b.site.endswith("_read") and later and a.channel == b.channel:
                found[str(a), str(b), "residual"] = 1.0
            if same_layer and a.site in ("q", "k") and b.site == "attn_write":
                head = a.channel // d_head
                values = [v for v in nodes if v[:2] == (a.layer, "v") and v.channel // d_head == head]
                if any(float(block.attn.W_O[head, v.channel % d_head, b.channel]) for v in values):
                    found[str(a), str(b), "attention"] = 0.0
    return found


@pytest.mark.parametrize("changes", [{}, {"positions": "concat", "d_pos_emb": 3}], ids=["added", "concatenated"])
def test_edges_are_the_non_zero_weights_between_kept_nodes(make_model, some_nodes, zero, changes):
    model = make_model(**changes)
    with torch.no_grad():
        for p in model.parameters():
            p *= torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    nodes = some_nodes(model, 0.3)
    circuit = Circuit.of_nodes(model, nodes, zero(model))
    rows = circuit.edges[["source", "target", "kind", "weight"]].itertuples(index=False)
    found = {(source, target, kind): weight for source, target, kind, weight in rows}
    expected = edges_by_brute_force(model, nodes)
    assert found == expected
    assert len(found) == len(circuit.edges), "an edge is listed twice"
    assert circuit.n_edges == sum(kind == "weight" for _, _, kind in expected)
    assert circuit.n_nodes == len(nodes) == len(circuit.nodes)


def weights_by_brute_force(weights, nodes, n_heads, n_kv, d_head):
    """Every non-zero entry between two of `nodes` of matrices in a HookedTransformer's layout, one entry at a time."""
    kept, found = set(map(str, nodes)), {}
    for name, matrix in weights.items():
        parts = name.split(".")
        if parts[0] != "blocks" or not parts[-1].startswith("W_"):
            continue
        layer, kind = parts[1], parts[-1]
        for entry in matrix.nonzero().tolist():
            head, row, column = entry if len(entry) == 3 else (0, *entry)
            label = f"{parts[2]}.{kind}"
            if kind == "W_O":
                ends = (f"v.{head // (n_heads // n_kv) * d_head + row}", f"attn_write.{column}")
                label += f"[{head}]" if n_kv < n_heads else ""
            elif kind in ("W_Q", "W_K", "W_V"):
                ends = (f"attn_read.{row}", f"{kind[-1].lower()}.{head * d_head + column}")
            else:
                ends = (
                    (f"neuron.{row}", f"mlp_write.{column}")
                    if kind == "W_out"
                    else (f"mlp_read.{row}", f"neuron.{column}")
                )
            source, target = (f"L{layer}.{end}" for end in ends)
            if {source, target} <= kept:
                found[source, target, label] = float(matrix[tuple(entry)])
    return found


DENSE = {"plain": {}, "grouped": {"n_kv": 2}, "grouped and gated": {"n_kv": 2, "gated": True}}


@pytest.fixture(params=DENSE, ids=str)
def half_zero(request, dense_script):
    """A bridge of which half the weights are zero, and those weights."""
    shape = dense_script.shape_of(50, norm="rms", **DENSE[request.param])
    drawn = dense_script.random_weights(shape)
    generator = torch.Generator().manual_seed(3)
    weights = {name: w * (torch.rand(w.shape, generator=generator) < 0.5) for name, w in drawn.items()}
    return dense_script.bridge(shape, weights), weights, shape


def test_edges_of_a_dense_model_are_its_non_zero_weights_between_kept_nodes(half_zero, dense_script):
    bridge, weights, shape = half_zero
    nodes = dense_script.some_nodes(hooked(bridge).cfg, 0.4)
    circuit = Circuit.of_nodes(bridge, nodes, zero_values(bridge))
    rows = circuit.edges[circuit.edges.kind == "weight"]
    found = {(row.source, row.target, row.weight_name): row.weight for row in rows.itertuples()}
    expected = weights_by_brute_force(weights, nodes, shape["n_heads"], shape["n_kv"] or 4, shape["d_head"])
    assert found == expected and len(rows) == circuit.n_edges == len(expected)


def test_attention_wires_of_grouped_queries_reach_the_writes_of_their_own_heads(half_zero, dense_script):
    bridge, weights, shape = half_zero
    nodes = dense_script.some_nodes(hooked(bridge).cfg, 0.4)
    circuit = Circuit.of_nodes(bridge, nodes, zero_values(bridge))
    steering = circuit.edges[circuit.edges.kind == "attention"]
    group, d_head = shape["n_heads"] // (shape["n_kv"] or 4), shape["d_head"]
    expected = set()
    for a in nodes:
        for b in nodes:
            if a.site in "qk" and b.site == "attn_write" and a.layer == b.layer:
                head = a.channel // d_head
                heads = [head] if a.site == "q" else range(head * group, (head + 1) * group)
                matrix = weights[f"blocks.{a.layer}.attn.W_O"]
                values = [v for v in nodes if v[:2] == (a.layer, "v")]
                if any(
                    matrix[h, v.channel % d_head, b.channel]
                    for h in heads
                    for v in values
                    if v.channel // d_head == h // group
                ):
                    expected.add((str(a), str(b)))
    assert set(zip(steering.source, steering.target, strict=True)) == expected and expected


def test_circuits_of_a_dense_model_combine_as_sets_of_nodes(half_zero, dense_script):
    bridge, _, _ = half_zero
    drawn = [set(dense_script.some_nodes(hooked(bridge).cfg, 0.5, seed)) for seed in (0, 1)]
    a, b = (Circuit.of_nodes(bridge, nodes, zero_values(bridge)) for nodes in drawn)
    for combined, nodes in ((a & b, drawn[0] & drawn[1]), (a - b, drawn[0] - drawn[1])):
        columns = ["source", "target", "kind", "weight_name"]
        anew = Circuit.of_nodes(bridge, nodes, zero_values(bridge)).edges[columns]
        known = combined.edges[columns]
        assert sorted(known.itertuples(index=False)) == sorted(anew.itertuples(index=False))


def test_of_several_weights_between_two_nodes_the_graph_has_the_largest(half_zero, dense_script):
    bridge, _, _ = half_zero
    circuit = Circuit.of_nodes(bridge, dense_script.some_nodes(hooked(bridge).cfg, 0.4), zero_values(bridge))
    weights = circuit.edges[circuit.edges.kind == "weight"]
    largest = weights.assign(size=weights.weight.abs()).groupby(["source", "target"])["size"].max()
    graph = circuit.to_networkx()
    assert all(abs(graph.edges[ends]["weight"]) == size for ends, size in largest.items())


def test_token_edges_are_embedding_and_unembedding_entries(plain_model, some_nodes):
    nodes = some_nodes(plain_model, 0.4)
    edges = token_edges(plain_model, nodes, [3, 4], [5])
    reads = [n for n in nodes if n.site.endswith("_read")]
    finals = [n for n in nodes if n.site == "final_read"]
    assert len(edges) == 2 * len(reads) + len(finals)
    plain_model.requires_grad_(False)
    row = edges[(edges.source == "token.4") & (edges.target == str(reads[0]))].iloc[0]
    assert row.weight == float(plain_model.embed.W_E[4, reads[0].channel]) and row.kind == "embedding"
    row = edges[(edges.target == "token.5") & (edges.source == str(finals[0]))].iloc[0]
    assert row.weight == float(plain_model.unembed.W_U[finals[0].channel, 5]) and row.kind == "unembedding"


def test_a_circuit_of_all_nodes_equals_the_model_bit_for_bit(any_model, some_nodes, tokens):
    circuit = Circuit.of_nodes(any_model, some_nodes(any_model, 1.0), mean_activations(any_model, tokens))
    with torch.no_grad():
        expected = any_model(tokens)
        with circuit.running(any_model):
            assert torch.equal(any_model(tokens), expected)


def test_inside_running_every_node_outside_holds_its_baseline(plain_model, some_nodes, tokens):
    means = mean_activations(plain_model, tokens)
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.5), means)
    with torch.no_grad(), circuit.running(plain_model):
        _, cache = plain_model.run_with_cache(tokens)
    for place, kept in circuit.kept.items():
        held = flat(cache[place.hook])[..., ~kept]
        assert torch.equal(held, means[place][~kept].expand_as(held)), place


WITH_LAST_STREAM = (*NODE_SITES[:-1], "final_resid")


def held_before_the_last_norm(model, nodes, tokens):
    """A circuit whose last nodes are channels of the stream itself, as in the released ones."""
    means = mean_activations(model, tokens, sites=WITH_LAST_STREAM)
    nodes = [n._replace(layer=1, site="final_resid") if n.site == "final_read" else n for n in nodes]
    return Circuit.of_nodes(model, nodes, means, sites=WITH_LAST_STREAM)


def test_a_circuit_may_hold_the_last_stream_before_its_norm(any_model, some_nodes, tokens):
    circuit = held_before_the_last_norm(any_model, some_nodes(any_model), tokens)
    last, means = Place(1, "final_resid"), circuit.baseline
    inside = {place: kept for place, kept in circuit.kept.items() if place.site in NODE_SITES[:-1]}
    with torch.no_grad():
        with any_model.hooks(fwd_hooks=holding_hooks(inside, means)):
            stream = any_model(tokens, stop_at_layer=2)
        read = any_model.ln_final(torch.where(circuit.kept[last], stream, means[last]))
        expected = any_model.unembed(read)
        if any_model.cfg.bigram:
            expected = expected + any_model.bigram_table[tokens]
        with circuit.running(any_model):
            assert torch.allclose(any_model(tokens), expected, atol=1e-6)
        with circuit.removed(any_model):
            _, cache = any_model.run_with_cache(tokens)
    held = cache[last.hook][..., circuit.kept[last]]
    assert torch.equal(held, means[last][circuit.kept[last]].expand_as(held))


def test_channels_of_the_last_stream_are_joined_and_drawn_like_those_of_the_final_read(plain_model, some_nodes, tokens):
    nodes = some_nodes(plain_model, 0.3)
    circuit = held_before_the_last_norm(plain_model, nodes, tokens)
    usual = Circuit.of_nodes(plain_model, nodes, mean_activations(plain_model, tokens))
    renamed = [
        column.str.replace("L1.final_resid", "L2.final_read") for column in (circuit.edges.source, circuit.edges.target)
    ]
    assert circuit.edges.assign(source=renamed[0], target=renamed[1]).equals(usual.edges)
    places_of = [[tuple(row) for row in c.plot().collections[0].get_offsets()] for c in (circuit, usual)]
    assert places_of[0] == places_of[1]
    assert circuit.bare_page().nodes[-1].site == "final_read" and circuit.bare_page().nodes[-1].layer == 2


def test_removed_is_the_other_half(plain_model, some_nodes, tokens):
    means = mean_activations(plain_model, tokens)
    nodes = some_nodes(plain_model, 0.5)
    everything = some_nodes(plain_model, 1.0)
    circuit = Circuit.of_nodes(plain_model, nodes, means)
    rest = Circuit.of_nodes(plain_model, set(everything) - set(nodes), means)
    with torch.no_grad():
        with circuit.removed(plain_model):
            without = plain_model(tokens)
        with rest.running(plain_model):
            assert torch.equal(plain_model(tokens), without)


def test_hooks_run_the_circuit_in_a_plain_transformer_lens_call(plain_model, some_nodes, tokens):
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model), mean_activations(plain_model, tokens))
    with torch.no_grad():
        plain = plain_model.run_with_hooks(tokens, fwd_hooks=circuit.hooks(plain_model))
        with circuit.running(plain_model):
            assert torch.equal(plain_model(tokens), plain)
        assert not torch.equal(plain_model(tokens), plain)


def test_running_ends_with_its_block_even_when_the_block_raises(plain_model, some_nodes, tokens):
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model), mean_activations(plain_model, tokens))
    with torch.no_grad():
        before = plain_model(tokens)
        with pytest.raises(ZeroDivisionError), circuit.running(plain_model):
            _ = 1 / 0
        assert torch.equal(plain_model(tokens), before)


def test_running_nests_as_the_circuit_of_the_nodes_in_both(plain_model, some_nodes, tokens):
    means = mean_activations(plain_model, tokens)
    a = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.6, seed=0), means)
    b = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.6, seed=1), means)
    with torch.no_grad():
        with (a & b).running(plain_model):
            expected = plain_model(tokens)
        with a.running(plain_model), b.running(plain_model):
            assert torch.equal(plain_model(tokens), expected)


def test_circuits_combine_as_sets_of_nodes(plain_model, some_nodes, zero):
    a_nodes, b_nodes = set(some_nodes(plain_model, 0.4, seed=0)), set(some_nodes(plain_model, 0.4, seed=1))
    a, b = (Circuit.of_nodes(plain_model, nodes, zero(plain_model)) for nodes in (a_nodes, b_nodes))
    with pytest.warns(UserWarning, match="transplanted"):
        union = a | b
    for combined, nodes in ((a & b, a_nodes & b_nodes), (a - b, a_nodes - b_nodes), (union, a_nodes | b_nodes)):
        assert combined.node_set == nodes
        anew = Circuit.of_nodes(plain_model, nodes, zero(plain_model))
        assert combined.nodes[["layer", "site", "channel"]].equals(anew.nodes[["layer", "site", "channel"]])
        known = set(combined.edges[["source", "target", "kind"]].itertuples(index=False, name=None))
        expected = set(anew.edges[["source", "target", "kind"]].itertuples(index=False, name=None))
        assert known == expected if combined is not union else known < expected
        assert {row for row in known if row[2] == "residual"} == {row for row in expected if row[2] == "residual"}
        assert combined.transplanted(plain_model).edges.equals(anew.edges)


def test_circuits_over_positions_combine_position_by_position(plain_model, some_nodes, tokens):
    means, n_pos = mean_activations(plain_model, tokens), tokens.shape[1]

    def spots_of(first_seed):
        drawn = [some_nodes(plain_model, 0.5, seed=first_seed + pos) for pos in range(n_pos)]
        found = {NodeAt(*node, pos) for pos, nodes in enumerate(drawn) for node in nodes}
        return {spot for spot in found if spot.site != "final_read" or spot.pos == n_pos - 1}  # read there alone

    first, second = spots_of(0), spots_of(n_pos)
    a, b = (Circuit.of_nodes(plain_model, spots, means, n_pos=n_pos) for spots in (first, second))
    every = [NodeAt(*node, pos) for node in some_nodes(plain_model, 1.0) for pos in range(n_pos)]
    every = {spot for spot in every if spot.site != "final_read" or spot.pos == n_pos - 1}
    assert set(a.outside) == every - first and len(a.outside) == len(every - first)
    for combined, spots in ((a & b, first & second), (a | b, first | second), (a - b, first - second)):
        anew = Circuit.of_nodes(plain_model, spots, means, n_pos=n_pos)
        assert combined.spots == spots and combined.nodes.equals(anew.nodes)
        assert combined.transplanted(plain_model).edges.equals(anew.edges)
    with torch.no_grad():
        with (a & b).running(plain_model):
            expected = plain_model(tokens)
        with a.running(plain_model), b.running(plain_model):
            assert torch.equal(plain_model(tokens), expected)
    for other in (Circuit.of_nodes(plain_model, b.node_set, means), replace(b, n_pos=n_pos + 1)):
        with pytest.raises(CircuitError, match=f"one keeps nodes at positions of prompts of {n_pos} tokens and the"):
            a | other


def test_a_union_with_a_part_of_itself_knows_all_edges_and_does_not_warn(plain_model, some_nodes, zero):
    nodes = some_nodes(plain_model, 0.4)
    whole, part = (Circuit.of_nodes(plain_model, some, zero(plain_model)) for some in (nodes, nodes[::2]))
    assert (whole | part).n_edges == (part | whole).n_edges == whole.n_edges


def test_diff_says_where_each_node_is(plain_model, zero):
    shared, first, second = Node(0, "neuron", 1), Node(1, "v", 2), Node(0, "q", 3)
    a = Circuit.of_nodes(plain_model, [shared, first], zero(plain_model))
    b = Circuit.of_nodes(plain_model, [second, shared], zero(plain_model))
    assert a.diff(b).frame.values.tolist() == [
        [0, "q", 3, "second"],
        [0, "neuron", 1, "both"],
        [1, "v", 2, "first"],
    ]


def test_circuits_of_two_models_do_not_combine(make_model, some_nodes, zero):
    one, other = make_model(), make_model(seed=1)
    a, b = (Circuit.of_nodes(model, some_nodes(model), zero(model)) for model in (one, other))
    with pytest.raises(CircuitError, match="circuits of different models do not combine"):
        a & b
    with pytest.raises(CircuitError, match="Load the model it belongs to"), a.running(other):
        pass


def test_a_node_that_the_model_does_not_have_is_refused(plain_model, zero):
    with pytest.raises(CircuitError, match="q has channels 0 to 14, not 15"):
        Circuit.of_nodes(plain_model, [Node(0, "q", 15)], zero(plain_model))
    with pytest.raises(CircuitError, match="q exists in layers 0 to 1, not in 2"):
        Circuit.of_nodes(plain_model, [Node(2, "q", 0)], zero(plain_model))


def test_sites_that_the_search_left_alone_keep_everything(plain_model, zero):
    from sparse_interp.interventions.pruning import PruneConfig

    config = PruneConfig(sites=("neuron",), share_qk=False)
    circuit = Circuit.of_nodes(plain_model, [Node(0, "neuron", 1)], zero(plain_model), prune=config)
    assert circuit.kept[Place(0, "v")].all() and circuit.kept[Place(0, "neuron")].sum() == 1


def test_the_networkx_graph_has_the_same_nodes_and_edges(key_circuit):
    graph = key_circuit.to_networkx()
    assert isinstance(graph, networkx.DiGraph)
    assert set(graph) == {str(node) for node in key_circuit.node_set}
    assert graph.number_of_edges() == len(key_circuit.edges)
    row = key_circuit.edges.iloc[0]
    assert graph.edges[row.source, row.target]["weight"] == row.weight


def test_the_figure_has_every_node_once_and_rails_keep_their_height(key_circuit):
    ax = key_circuit.plot()
    (points,) = ax.collections
    assert len(points.get_offsets()) == key_circuit.n_nodes
    height = dict(zip(key_circuit.nodes.index, points.get_offsets()[:, 1], strict=True))
    rails = key_circuit.nodes[
        key_circuit.nodes.site.isin(["mlp_write", "attn_read"]) & (key_circuit.nodes.channel == 7)
    ]
    assert len(rails) == 2 and len({round(float(height[i]), 6) for i in rails.index}) == 1


def test_a_figure_of_many_nodes_has_room_for_each(plain_model, some_nodes, zero):
    circuit = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.9), zero(plain_model))
    ax = circuit.plot()
    (points,) = ax.collections
    places = points.get_offsets()
    distance = torch.cdist(torch.tensor(places), torch.tensor(places)).fill_diagonal_(9)
    assert distance.min() > 0.6
    assert ax.figure.get_size_inches()[1] > 5


def test_a_figure_can_be_drawn_on_given_axes(key_circuit):
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert key_circuit.plot(ax) is ax


def test_token_text_in_a_figure_is_text_and_no_formula(truth, key_circuit, generator, tmp_path):
    wires = token_wires(truth.model, key_circuit, truth.task.batch(8, generator=generator))
    ax = key_circuit.plot(tokens=wires.assign(piece=["$x^{", "\n ", "</script>", "a$b\\"]))
    assert {r"\$x^{", "\\n␣", "</script>", r"a\$b" + "\\"} <= {text.get_text() for text in ax.texts}
    ax.figure.savefig(tmp_path / "figure.png")


def test_an_empty_circuit_can_be_drawn_and_shown(plain_model, zero):
    circuit = Circuit.of_nodes(plain_model, [], zero(plain_model))
    circuit.plot()
    assert "iframe" in circuit._repr_html_()


# -- pruned edges ------------------------------------------------------------------------------------------------------


@pytest.fixture
def some_edges(some_nodes):
    """`some_edges(model, seed)`: random nodes, and a random half of the weights between them."""

    def draw(model, seed=0, share=0.5):
        cfg = hooked(model).cfg
        nodes = some_nodes(hooked(model), 0.6, seed)
        generator = torch.Generator().manual_seed(seed)
        among = edges_among(hooked(model), masks(nodes, cfg))
        return nodes, {m: mask & (torch.rand(mask.shape, generator=generator) < share) for m, mask in among.items()}

    return draw


@pytest.mark.parametrize("changes", [{}, {"positions": "concat", "d_pos_emb": 3}], ids=["added", "concatenated"])
def test_a_weight_between_its_nodes_that_it_lacks_carries_the_baseline(make_model, some_edges, tokens, changes):
    """Against a forward pass in which every edge has its message."""
    from numpy_reference import forward

    model = make_model(dtype=torch.float64, **changes)
    means = mean_activations(model, tokens)
    nodes, edges = some_edges(model)
    circuit = Circuit.of_nodes(model, nodes, means, edges=edges)
    kept = masks(nodes, model.cfg)
    gates = {}
    for matrix, mask in edges_among(model, kept).items():
        wire = next(wire for wire in WIRES if wire.weight_name == matrix.name)
        share = 1.0 - (mask & ~edges[matrix]).double().numpy()
        gates[tuple(matrix)] = (share, means[Place(matrix.layer, wire.source.name)].numpy())
    held = {place.hook: (mask.numpy(), means[place].numpy()) for place, mask in kept.items()}
    weights = {name: p.numpy() for name, p in model.state_dict().items()}
    expected, _ = forward(model.cfg.to_dict(), weights, tokens.numpy(), gates=gates, held=held)
    with torch.no_grad(), circuit.running(model):
        torch.testing.assert_close(model(tokens), torch.from_numpy(expected), atol=1e-9, rtol=0)
    assert circuit.edges_pruned and circuit.n_edges == sum(int(mask.sum()) for mask in edges.values())
    assert {m: mask.tolist() for m, mask in circuit.edge_masks(model).items()} == {
        m: mask.tolist() for m, mask in edges.items()
    }


def test_pruned_edges_of_grouped_queries_are_told_apart_by_their_heads(make_bridge, some_edges, tokens):
    bridge, _ = make_bridge(n_kv=2, gated=True)
    nodes, edges = some_edges(bridge)
    circuit = Circuit.of_nodes(bridge, nodes, zero_values(bridge), edges=edges)
    assert all(torch.equal(mask, edges[matrix]) for matrix, mask in circuit.edge_masks(bridge).items())
    among = edges_among(hooked(bridge), masks(nodes, hooked(bridge).cfg))
    with torch.no_grad():
        with circuit.running(bridge):
            found = bridge(tokens)
        held = bridge.hooks(fwd_hooks=holding_hooks(circuit.kept, circuit.baseline))
        with held, cutting(bridge, {m: mask & ~edges[m] for m, mask in among.items()}, circuit.baseline):
            torch.testing.assert_close(bridge(tokens), found)


def test_with_all_edges_listed_nothing_is_cut(plain_model, some_nodes, tokens):
    means, nodes = mean_activations(plain_model, tokens), some_nodes(plain_model, 0.6)
    circuit = Circuit.of_nodes(plain_model, nodes, means)
    listed = replace(circuit, edges_pruned=True)
    assert not any(bool(mask.any()) for mask in listed.cut_edges(plain_model).values())
    assert not circuit.cut_edges(plain_model)
    with torch.no_grad():
        with circuit.running(plain_model):
            expected = plain_model(tokens)
        with listed.running(plain_model):
            assert torch.equal(plain_model(tokens), expected)


def test_pruned_circuits_nest_as_the_circuit_of_what_is_in_both_where_no_node_competes(make_model, some_edges, tokens):
    plain_model = make_model(dtype=torch.float64, afrac=None)
    means = mean_activations(plain_model, tokens)
    a, b = (
        Circuit.of_nodes(plain_model, nodes, means, edges=edges)
        for nodes, edges in (some_edges(plain_model, seed, share=0.8) for seed in (0, 1))
    )
    with torch.no_grad():
        with (a & b).running(plain_model):
            expected = plain_model(tokens)
        with a.running(plain_model), b.running(plain_model):
            torch.testing.assert_close(plain_model(tokens), expected)


def test_pruned_edges_combine_as_sets(plain_model, some_edges, some_nodes):
    values = zero_values(plain_model)
    a, b = (
        Circuit.of_nodes(plain_model, nodes, values, edges=edges)
        for nodes, edges in (some_edges(plain_model, seed) for seed in (0, 1))
    )
    of_nodes = Circuit.of_nodes(plain_model, some_nodes(plain_model, 0.5, seed=2), values)
    key = lambda circuit: set(
        circuit.edges[circuit.edges.kind == "weight"][["source", "target"]].itertuples(index=False, name=None)
    )
    outside = {str(node) for node in b.node_set}
    assert key(a & b) == key(a) & key(b) and key(a | b) == key(a) | key(b)
    assert key(a - b) == {edge for edge in key(a) if not {*edge} & outside}
    assert key(a & of_nodes) == key(of_nodes & a) == key(a) & key(of_nodes)
    for combined in (a & b, a | b, a - b, a & of_nodes, of_nodes | a):
        assert combined.edges_pruned
        anew = Circuit.of_nodes(plain_model, combined.node_set, values, edges=combined.edge_masks(plain_model))
        assert key(anew) == key(combined)
    assert not (of_nodes - a).edges_pruned


def test_diff_edges_says_where_each_weight_is(plain_model, some_edges):
    values = zero_values(plain_model)
    a, b = (
        Circuit.of_nodes(plain_model, nodes, values, edges=edges)
        for nodes, edges in (some_edges(plain_model, seed) for seed in (0, 1))
    )
    frame = a.diff_edges(b).frame
    assert (frame["where"] == "both").sum() == (a & b).n_edges and len(frame) == (a | b).n_edges
    both = frame[frame["where"] == "both"]
    assert both.weight.equals(both.weight_other) and frame[frame["where"] == "second"].weight.isna().all()


def test_without_a_pruned_circuit_its_edges_carry_the_baseline_and_all_else_acts(plain_model, some_edges, tokens):
    means = mean_activations(plain_model, tokens)
    nodes, edges = some_edges(plain_model)
    circuit = Circuit.of_nodes(plain_model, nodes, means, edges=edges)
    with torch.no_grad():
        with circuit.removed(plain_model):
            without = plain_model(tokens)
        with cutting(plain_model, edges, means):
            assert torch.equal(plain_model(tokens), without)


def test_cutting_leaves_nodes_outside_alone(plain_model, some_edges, tokens):
    means = mean_activations(plain_model, tokens)
    nodes, edges = some_edges(plain_model)
    circuit = Circuit.of_nodes(plain_model, nodes, means, edges=edges)
    with torch.no_grad():
        with circuit.cutting(plain_model), plain_model.hooks(fwd_hooks=holding_hooks(circuit.kept, means)):
            expected = plain_model(tokens)
        with circuit.running(plain_model):
            assert torch.equal(plain_model(tokens), expected)
        with circuit.cutting(plain_model):
            assert not torch.equal(plain_model(tokens), expected)


def test_cut_edges_are_no_plain_hooks_and_the_message_says_what_to_do(plain_model, some_edges):
    nodes, edges = some_edges(plain_model)
    circuit = Circuit.of_nodes(plain_model, nodes, zero_values(plain_model), edges=edges)
    with pytest.raises(CircuitError, match="make the call inside `with circuit.running"):
        circuit.hooks(plain_model)


def test_a_pruned_circuit_moves_with_the_edges_that_the_other_model_has_too(make_model, some_edges):
    model, other = make_model(), make_model(seed=1)
    with torch.no_grad():
        other.blocks[0].mlp.W_out[::2] = 0
    nodes, edges = some_edges(model)
    moved = Circuit.of_nodes(model, nodes, zero_values(model), edges=edges).transplanted(other)
    found = moved.edge_masks(other)
    there = masks(nodes, other.cfg)
    for matrix, mask in edges_among(other, there).items():
        assert torch.equal(found[matrix], mask & edges[matrix])
    assert moved.edges_pruned and moved.n_edges < sum(int(mask.sum()) for mask in edges.values())


def test_a_pruned_circuit_comes_back_from_its_file_and_can_be_drawn(plain_model, some_edges, tokens, tmp_path):
    nodes, edges = some_edges(plain_model)
    circuit = Circuit.of_nodes(plain_model, nodes, mean_activations(plain_model, tokens), edges=edges)
    cost = circuit.edges.weight.abs().where(circuit.edges.kind == "weight")
    circuit = replace(circuit, edges=circuit.edges.assign(importance_nats=cost))
    back = Circuit.load(circuit.save(tmp_path / "circuit.json"), plain_model)
    assert back.edges_pruned and back.edges.equals(circuit.edges)
    with torch.no_grad():
        with circuit.running(plain_model):
            expected = plain_model(tokens)
        with back.running(plain_model):
            assert torch.equal(plain_model(tokens), expected)
    joined = [kind for _, _, kind in back.to_networkx().edges(data="kind")]
    assert joined.count("weight") == back.n_edges
    back.plot()
    assert str(back.n_edges) in back.bare_page().summary["edges"]
