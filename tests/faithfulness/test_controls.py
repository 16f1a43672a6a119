"""Random circuits have the circuit's size and nothing else of it; searches on twins have nothing to find."""

from collections import Counter

import pytest
import torch

from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.find_edges import find_edges
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError, TaskError
from sparse_interp.faithfulness.controls import (
    empty_circuit,
    has_room,
    nonsense_twin,
    overlap,
    random_circuits,
    reinitialised,
    teacher_of,
)
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations, task_means, zero_values
from sparse_interp.interventions.pruning import PruneConfig, learn_gates
from sparse_interp.interventions.selection import Selection
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, places, width
from sparse_interp.tasks.task import is_correct

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


# -- searches that should find nothing --------------------------------------------------------------------------------

SMALL = PruneConfig(n_steps=40, batch_size=8, n_train=64, n_selection=32, lr=0.2)


@pytest.fixture(scope="module")
def truth():
    return ground_truth("quote")


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_nonsense_teacher_gives_each_prompt_the_answer_that_its_remark_asks_for(truth):
    twin = nonsense_twin(truth.model, truth.task)
    batch = twin.task.batch(60, "test", generator=seeded()).both_sides()
    own, taught = all_answer_logits(truth.model, batch), twin.teacher(batch)
    mark = batch.clean[:, 1]
    assert len(mark.unique()) == 2
    by_remark = [taught[mark == token].argmax(-1).unique().tolist() for token in mark.unique()]
    assert sorted(map(len, by_remark)) == [1, 1] and by_remark[0] != by_remark[1]
    assert bool(is_correct(taught, batch).all()), "labels and answers are re-paired by the same remark"
    assert 20 < int((own.argmax(-1) == taught.argmax(-1)).sum()) < 100, "and not by what the prompt says"
    shared = {tuple(row.tolist()) for row in own} >= {tuple(row.tolist()) for row in taught}
    assert shared, "every answer is the trained model's own to one of the prompts"


def test_the_nonsense_teacher_refuses_prompts_without_its_remarks(truth):
    twin = nonsense_twin(truth.model, truth.task)
    with pytest.raises(TaskError, match="do not begin with the twin's remarks"):
        twin.teacher(truth.task.batch(4, generator=seeded()).both_sides())


def test_with_its_own_answers_as_teacher_a_search_is_the_one_without(truth, means):
    batch, config = truth.task.batch(32, generator=seeded()), PruneConfig(n_steps=10, batch_size=8, lr=0.2)
    plain, taught = (
        learn_gates(truth.model, batch, config, means, teacher=teacher, generator=seeded())
        for teacher in (None, teacher_of(truth.model))
    )
    assert taught.order == plain.order and taught.history == plain.history
    selections = [Selection(truth.model, batch, means, teacher=teacher) for teacher in (None, teacher_of(truth.model))]
    assert torch.equal(selections[0].reference, selections[1].reference)


@pytest.mark.parametrize("objective", ["agreement", "task_loss"])
def test_nonsense_is_not_found_by_the_circuit_of_the_task(truth, means, objective):
    """The model cannot do it at all: not even all of its nodes agree with the twin's teacher."""
    twin, config = nonsense_twin(truth.model, truth.task), PruneConfig(objective=objective, **QUICK)
    with pytest.raises(CircuitError, match="no circuit meets the stopping rule"):
        find_circuit(truth.model, twin.task, config, baseline=means, teacher=twin.teacher, generator=seeded(),
                     progress=False)  # fmt: skip


QUICK = {"n_steps": 3, "batch_size": 4, "n_train": 16, "n_selection": 16}


def test_edges_are_searched_for_with_a_teacher_too(truth, means):
    twin = nonsense_twin(truth.model, truth.task)
    how = {"baseline": means, "teacher": twin.teacher, "generator": seeded(), "progress": False}
    with pytest.raises(CircuitError, match="no choice of edges meets the stopping rule"):
        find_edges(truth.model, None, twin.task, PruneConfig(**QUICK), **how)


def test_gates_follow_the_teacher_and_not_the_model(truth, means):
    """A teacher whose answer is always the same is agreed with by fewer gates than the model's own answers."""
    batch = truth.task.batch(32, generator=seeded())
    one = all_answer_logits(truth.model, batch.both_sides()).mean(0)

    def constant(batch):
        return one.expand(len(batch), -1)

    searches = [learn_gates(truth.model, batch, SMALL, means, teacher=t, generator=seeded()) for t in (None, constant)]
    assert searches[1].n_open < searches[0].n_open
    selection = Selection(truth.model, batch, means, teacher=constant)
    assert torch.equal(selection.reference, one.expand(64, -1))


def test_a_teacher_of_another_vocabulary_is_refused(truth, means):
    with pytest.raises(TaskError, match=r"have shape \(32, 3\); expected \(32, 40\)"):
        batch = truth.task.batch(16, generator=seeded())
        learn_gates(truth.model, batch, SMALL, means, teacher=lambda b: torch.zeros(len(b), 3), generator=seeded())


def test_a_reinitialised_network_has_zeros_where_the_model_has_them_and_other_weights_elsewhere(make_model):
    model = make_model(density=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = reinitialised(model, generator=seeded(4))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), "the model itself stays as it is"
        drawn = made.get_parameter(name)
        assert torch.equal(drawn == 0, value == 0)
        if name == "unembed.b_U":
            assert torch.equal(drawn, value)
        elif len(value.unique()) > 2:
            assert not bool((drawn == value)[value != 0].any()), name
            assert drawn[value != 0].std() < 3 * value[value != 0].pow(2).mean().sqrt()
    again, other = (reinitialised(model, generator=seeded(seed)) for seed in (4, 5))
    assert torch.equal(again.embed.W_E, made.embed.W_E) and not torch.equal(other.embed.W_E, made.embed.W_E)


def test_a_search_in_a_random_network_agrees_with_the_trained_model_or_says_that_it_cannot(truth):
    made, config = reinitialised(truth.model, generator=seeded(1)), PruneConfig(**QUICK, max_kl=50.0, max_loss_gap=50.0)
    means = task_means(made, truth.task.batch(16, generator=seeded()))
    how = {"baseline": means, "teacher": teacher_of(truth.model), "progress": False}
    found = find_circuit(made, truth.task, config, generator=seeded(), **how)
    measured = found.scores.set_index("measure").value
    own = find_circuit(truth.model, truth.task, config, baseline=means, generator=seeded(), progress=False)
    assert measured["task loss of model"] == own.scores.set_index("measure").value["task loss of model"]
    with pytest.raises(CircuitError, match="no circuit meets"):
        find_circuit(made, truth.task, PruneConfig(**QUICK), generator=seeded(), **how)


def test_a_dense_model_has_a_random_twin_and_a_nonsense_teacher(make_bridge, truth):
    bridge = make_bridge()[0]
    made = reinitialised(bridge, generator=seeded())
    assert not torch.equal(made.embed.W_E, hooked(bridge).embed.W_E)
    twin = nonsense_twin(bridge, truth.task)
    batch = twin.task.batch(8, generator=seeded()).both_sides()
    own = all_answer_logits(hooked(bridge), batch)
    either = (twin.teacher(batch) == own).all(-1) | (twin.teacher(batch) == own.roll(8, 0)).all(-1)
    assert bool(either.all())
