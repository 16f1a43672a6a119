"""Random circuits have the circuit's size and shape, and nothing else of it."""

from collections import Counter

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.controls import empty_circuit, has_room, overlap, random_circuits
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.model.sites import Node, Place, places, width

NODES = [
    Node(0, "attn_read", 3),
    Node(0, "attn_read", 4),
    *(Node(0, "q", channel) for channel in (0, 1, 2, 7)),
    *(Node(0, "k", channel) for channel in (1, 2, 9, 10, 11)),
    Node(0, "v", 5),
    Node(1, "neuron", 19),
    *(Node(1, "mlp_write", channel) for channel in range(12)),
    Node(2, "final_read", 6),
]


@pytest.fixture
def circuit(plain_model):
    return Circuit.of_nodes(plain_model, NODES, zero_values(plain_model), task_name="t", task_sha256="s")


def counts(circuit):
    return Counter((node.layer, node.site) for node in circuit.node_set)


def test_random_circuits_have_as_many_nodes_in_every_layer_and_site(plain_model, circuit, generator):
    for control in random_circuits(plain_model, circuit, 5, generator=generator):
        assert counts(control) == counts(circuit)


def test_random_circuits_join_q_and_k_as_often(plain_model, circuit, generator):
    def shared(nodes):
        return sum(Node(node.layer, "k", node.channel) in nodes for node in nodes if node.site == "q")

    assert shared(circuit.node_set) == 2
    assert {shared(control.node_set) for control in random_circuits(plain_model, circuit, 9, generator=generator)} == {
        2
    }


def test_random_circuits_differ_and_every_channel_can_be_drawn(plain_model, circuit, generator):
    drawn = random_circuits(plain_model, circuit, 60, generator=generator)
    assert len({control.node_set for control in drawn}) > 55
    for site in ("attn_read", "q", "k"):
        seen = {node.channel for control in drawn for node in control.node_set if node.site == site}
        assert seen == set(range(width(plain_model.cfg, site))), site


def test_random_circuits_depend_on_the_generator_alone(plain_model, circuit):
    one, same, other = (
        [c.node_set for c in random_circuits(plain_model, circuit, 3, generator=torch.Generator().manual_seed(seed))]
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_controls_keep_baseline_task_and_gated_sites(plain_model, generator):
    prune = PruneConfig(sites=("neuron",))
    nodes = [Node(0, "neuron", 1)]
    circuit = Circuit.of_nodes(plain_model, nodes, zero_values(plain_model), task_sha256="s", prune=prune)
    (control,) = random_circuits(plain_model, circuit, 1, generator=generator)
    for made in (control, empty_circuit(plain_model, circuit)):
        assert made.baseline is circuit.baseline and made.task_sha256 == "s"
        assert bool(made.kept[Place(0, "q")].all())
    assert not empty_circuit(plain_model, circuit).kept[Place(0, "neuron")].any()


def test_a_random_circuit_runs_in_the_model(plain_model, circuit, tokens, generator):
    (control,) = random_circuits(plain_model, circuit, 1, generator=generator)
    before = plain_model(tokens)
    with control.running(plain_model):
        assert not torch.equal(plain_model(tokens), before)
    assert torch.equal(plain_model(tokens), before)


def test_a_circuit_of_whole_places_leaves_no_room_for_another_of_its_size(plain_model, circuit):
    whole = [Node(0, "neuron", channel) for channel in range(20)]
    every = [Node(*place, c) for place in places(plain_model.cfg) for c in range(width(plain_model.cfg, place.site))]
    for nodes in ([], whole, every):
        assert not has_room(Circuit.of_nodes(plain_model, nodes, zero_values(plain_model)))
    assert has_room(circuit)
    assert has_room(Circuit.of_nodes(plain_model, every[:-1], zero_values(plain_model)))


def test_overlap_is_the_share_of_the_circuit_that_a_control_has(plain_model, circuit):
    half = Circuit.of_nodes(plain_model, NODES[: len(NODES) // 2], zero_values(plain_model))
    assert overlap(half, circuit) == pytest.approx(len(NODES) // 2 / len(NODES))
    assert overlap(circuit, half) == 1
    assert overlap(circuit, empty_circuit(plain_model, circuit)) == 0


def test_a_negative_number_of_controls_is_refused(plain_model, circuit, generator):
    with pytest.raises(ConfigError, match="n=-1"):
        random_circuits(plain_model, circuit, -1, generator=generator)


def test_a_circuit_of_another_shape_is_refused(circuit, make_model, generator):
    with pytest.raises(CircuitError, match="another model"):
        random_circuits(make_model(d_mlp=24), circuit, 1, generator=generator)


def test_random_circuits_of_grouped_queries_join_heads_as_the_circuit_does(make_bridge, generator):
    """Four heads of queries and two of keys: q channel 4 h + c meets k channel 4 (h // 2) + c."""
    bridge, _ = make_bridge(n_kv=2)
    whole, lone = [Node(0, "k", 1), Node(0, "q", 1), Node(0, "q", 5)], [Node(0, "k", 2), Node(0, "q", 12)]
    half = [Node(0, "k", 6), Node(0, "q", 14)]
    circuit = Circuit.of_nodes(bridge, [*whole, *half, *lone], zero_values(bridge))

    def joined(nodes):
        """For every k channel: whether it is there, and which of the two q that meet it."""
        states = Counter()
        for key in range(8):
            queries = [4 * head + key % 4 for head in (2 * (key // 4), 2 * (key // 4) + 1)]
            states[Node(0, "k", key) in nodes, *(Node(0, "q", query) in nodes for query in queries)] += 1
        return states

    drawn = random_circuits(bridge, circuit, 8, generator=generator)
    assert all(joined(control.node_set) == joined(circuit.node_set) for control in drawn)
    assert len({control.node_set for control in drawn}) > 4
