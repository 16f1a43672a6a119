"""Circuits in the formats of other tools, read back by readers that share nothing with what wrote them."""

import json
import re
from dataclasses import replace

import networkx
import pytest

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, SparseInterpError
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.model.sites import Node


@pytest.fixture
def small(plain_model):
    """Token -> L0 heads 0 and 2 -> L1 MLP -> logits, and a head whose v reaches nothing that is kept."""
    nodes = [
        Node(0, "attn_read", 1), Node(0, "q", 0), Node(0, "k", 0), Node(0, "v", 0), Node(0, "v", 11),
        Node(0, "attn_write", 4), Node(0, "attn_write", 5),
        Node(1, "attn_read", 4), Node(1, "v", 7),
        Node(1, "mlp_read", 4), Node(1, "mlp_read", 9), Node(1, "neuron", 3), Node(1, "mlp_write", 6),
        Node(2, "final_read", 6), Node(2, "final_read", 0),
    ]  # fmt: skip
    return Circuit.of_nodes(plain_model, nodes, zero_values(plain_model), task_name="a task")


def test_graphml_is_the_graph_of_networkx(key_circuit, tmp_path):
    graph = networkx.read_graphml(key_circuit.to_graphml(tmp_path / "circuit.graphml"))
    expected = key_circuit.to_networkx()
    assert dict(graph.nodes(data=True)) == dict(expected.nodes(data=True))
    assert {(a, b): d for a, b, d in graph.edges(data=True)} == {(a, b): d for a, b, d in expected.edges(data=True)}
    assert graph.graph["model"] == key_circuit.model_name


def test_node_link_json_is_the_graph_of_networkx(key_circuit, tmp_path):
    text = key_circuit.to_node_link(tmp_path / "circuit.json").read_text()

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    graph = networkx.node_link_graph(json.loads(text, parse_constant=refuse), edges="edges")
    expected = key_circuit.to_networkx()
    assert set(graph.nodes) == set(expected.nodes) and set(graph.edges) == set(expected.edges)
    for name, columns in expected.nodes(data=True):
        assert graph.nodes[name] == {k: v for k, v in columns.items() if v not in (float("inf"), -float("inf"))}
    for source, target, columns in expected.edges(data=True):
        assert graph.edges[source, target] == columns


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|->|[{}\[\];=,]|[\w.]+')


def read_dot(text):
    """Name, nodes and edges of Graphviz text: whatever is left over between tokens is an error."""
    assert not TOKEN.sub("", text).strip(), "something is neither a word nor a string"
    tokens = [re.sub(r"\\(.)", r"\1", t[1:-1]) if t[0] == '"' else t for t in TOKEN.findall(text)]
    kinds = ["string" if t[0] == '"' else t for t in TOKEN.findall(text)]
    assert kinds.count("{") == kinds.count("}") and tokens[0] == "digraph"
    nodes, edges, i = {}, [], 0
    while i < len(tokens):
        if kinds[i] == "->":
            edges.append((tokens[i - 1], tokens[i + 1]))
        elif kinds[i] == "string" and i + 1 < len(kinds) and kinds[i + 1] == "[" and kinds[i - 1] != "->":
            nodes[tokens[i]] = tokens[i + 4]
        i += 1
    return tokens[1], nodes, edges


def test_graphviz_text_has_every_node_and_every_wire_and_names_are_escaped(key_circuit):
    odd = replace(key_circuit, task_name='say "hi" \\ bye', model_name="a -> b; c")
    title, nodes, edges = read_dot(odd.to_dot())
    assert title == 'say "hi" \\ bye in a -> b; c'
    assert set(nodes) == {str(node) for node in key_circuit.node_set}
    assert sorted(edges) == sorted(zip(key_circuit.edges.source, key_circuit.edges.target, strict=True))
    assert odd.to_dot().count("subgraph cluster_") == key_circuit.nodes.layer.nunique()


def eap_ig_graph(path):
    """What EAP-IG's reader makes of the file: each name is looked up in the graph that `cfg` spans."""
    data = json.loads(path.read_text())
    cfg = data["cfg"]
    assert set(cfg) == {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"} and cfg["parallel_attn_mlp"] is False
    heads = [[f"a{i}.h{j}" for j in range(cfg["n_heads"])] for i in range(cfg["n_layers"])]
    order = ["input"] + [name for i, layer in enumerate(heads) for name in (*layer, f"m{i}")]
    rank = {name: i for i, name in enumerate(order)}
    legal = {"logits"} | set(order)
    assert set(data["nodes"]) == legal
    neurons = {}
    for name, node in data["nodes"].items():
        if name == "logits":
            continue
        if name[0] == "a":  # its reader assigns to the slice of all heads of the layer
            layer = heads[int(name[1 : name.index(".")])]
            assert len(node["neurons"]) == len(layer)
            neurons |= dict(zip(layer, node["neurons"], strict=True))
        else:
            neurons[name] = node["neurons"]
    assert all(len(row) == cfg["d_model"] for row in neurons.values())
    expected = set()
    for target in [*order[1:], "logits"]:
        same_layer = target.split(".")[0] if target[0] == "a" else None
        for source in order:
            if target != "logits" and (rank[source] >= rank[target] or source.split(".")[0] == same_layer):
                continue
            expected |= {f"{source}->{target}<{x}>" for x in "qkv"} if target[0] == "a" else {f"{source}->{target}"}
    assert set(data["edges"]) == expected
    present = {name: edge["score"] for name, edge in data["edges"].items() if edge["in_graph"]}
    assert all(edge["score"] == 0 for edge in data["edges"].values() if not edge["in_graph"])
    return {name for name, node in data["nodes"].items() if node["in_graph"]}, present, neurons


def test_heads_and_mlps_of_eap_ig_are_put_together_from_channels(small, tmp_path):
    nodes, edges, neurons = eap_ig_graph(small.to_mib(tmp_path / "graph.json"))
    assert nodes == {"input", "a0.h0", "a0.h2", "m1", "logits"}  # head 1 of layer 1 writes to nothing that is kept
    assert edges == {
        "input->a0.h0<q>": 1, "input->a0.h0<k>": 1, "input->a0.h0<v>": 1, "input->a0.h2<v>": 1,
        "input->m1": 2, "a0.h0->m1": 1, "a0.h2->m1": 1,
        "input->logits": 2, "m1->logits": 1,
    }  # fmt: skip
    assert [c for c, there in enumerate(neurons["a0.h2"]) if there] == [4, 5]
    assert [c for c, there in enumerate(neurons["m1"]) if there] == [6]
    assert not any(neurons["a0.h1"]) and all(neurons["input"])


def test_an_edge_that_was_cut_carries_nothing_between_heads_and_mlps(small, tmp_path):
    cut = small.edges[~((small.edges.source == "L1.mlp_read.4") & (small.edges.target == "L1.neuron.3"))]
    _, edges, _ = eap_ig_graph(replace(small, edges=cut).to_mib(tmp_path / "graph.json"))
    assert edges["input->m1"] == 1 and "a0.h0->m1" not in edges and "a0.h2->m1" not in edges


def test_grouped_queries_and_gated_mlps_have_a_node_for_every_query_head(make_bridge, tmp_path):
    bridge, _ = make_bridge(n_kv=2, gated=True)
    nodes = [Node(0, "attn_read", 0), Node(0, "k", 0), Node(0, "v", 0), Node(0, "attn_write", 1)]
    nodes += [Node(1, "mlp_read", 1), Node(1, "neuron", 0), Node(1, "mlp_write", 2), Node(2, "final_read", 2)]
    circuit = Circuit.of_nodes(bridge, nodes, zero_values(bridge))
    found, edges, _ = eap_ig_graph(circuit.to_mib(tmp_path / "graph.json"))
    assert found == {"input", "a0.h0", "a0.h1", "m1", "logits"}  # two query heads share the first head of keys
    assert {"input->a0.h0<k>", "input->a0.h1<k>", "a0.h1->m1", "m1->logits"} <= set(edges)


def test_a_circuit_that_keeps_a_site_whole_is_not_put_together(small, tmp_path):
    some = replace(small, sites=("q", "neuron"))
    with pytest.raises(
        CircuitError, match="holds nothing at attn_read, k, v, attn_write, mlp_read, mlp_write, final_r"
    ):
        some.to_mib(tmp_path / "graph.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_leaves_what_was_there(small, tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (small.to_graphml, small.to_node_link, small.to_mib):
        with pytest.raises(SparseInterpError, match="cannot be written"):
            write(tmp_path / "file" / "graph")
    assert (tmp_path / "file").read_text() == "mine"
