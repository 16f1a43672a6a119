"""Agreement inside: the numbers of plain loops, keys that agree, and circuits that come to the answer another way."""

from dataclasses import replace
from math import isnan, nan

import numpy as np
import pytest
import torch
from known_models import hand_built

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.faithfulness.inside import agreement_inside, kept_heads
from sparse_interp.interventions.baselines import task_means
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, NodeAt, Place

EARLY = ("attn_read", "k", "v")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def half_of(model, pairs, edges_pruned):
    nodes = [node for i, node in enumerate(all_nodes(hooked(model).cfg)) if i % 2]
    circuit = Circuit.of_nodes(model, nodes, task_means(model, pairs))
    if not edges_pruned:
        return circuit
    masks = {matrix: mask & (torch.rand(mask.shape, generator=seeded()) < 0.5) for matrix, mask in
             circuit.edge_masks(model).items()}  # fmt: skip
    return Circuit.of_nodes(model, nodes, circuit.baseline, edges=masks)


def seen_alone(model, prompt, names):
    """What hook points see of one prompt without padding."""
    seen = {}
    hooks = [(name, lambda activation, hook, name=name: seen.update({name: activation[0].double()})) for name in names]
    with torch.no_grad(), hooked(model).hooks(hooks):
        model(prompt)
    return seen


@pytest.mark.parametrize("edges_pruned", [False, True], ids=["nodes", "edges"])
def test_numbers_are_those_of_a_loop_over_prompts_without_padding(any_kind, pairs, edges_pruned):
    model, cfg = any_kind, hooked(any_kind).cfg
    circuit, sides = half_of(model, pairs, edges_pruned), pairs.both_sides()
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(cfg.n_layers)]
    names = {*patterns, *(Place(node.layer, node.site).hook for node in circuit.node_set)}
    runs = []
    for prompt, n in zip(sides.clean, sides.lengths.tolist(), strict=True):
        own = seen_alone(model, prompt[None, :n], names)
        with circuit.running(model):
            runs.append((seen_alone(model, prompt[None, :n], names), own))
    table = agreement_inside(model, circuit, pairs, generator=seeded())
    assert len(table) == circuit.n_nodes
    for row in table.frame.itertuples():
        place, b = Place(row.layer, row.site), circuit.baseline.of(Node(row.layer, row.site, row.channel))
        moments = []
        for run, own in runs:
            c, m = (x[place.hook].flatten(1)[:, row.channel].numpy() - b for x in (run, own))
            if row.layer == cfg.n_layers or (row.layer == cfg.n_layers - 1 and row.site not in EARLY):
                c, m = c[-1:], m[-1:]
            moments.append([x.mean() for x in (c, m, c * c, m * m, c * m, (c - m) ** 2)])
        c, m, cc, mm, cm, difference = np.mean(moments, 0)
        assert (row.model_rms, row.circuit_rms) == pytest.approx((mm**0.5, cc**0.5), abs=1e-6)
        assert row.error == pytest.approx(difference / (cc + mm) if cc + mm > 1e-9 else nan, abs=1e-5, nan_ok=True)
        if not isnan(row.correlation):
            assert row.correlation == pytest.approx((cm - c * m) / ((cc - c * c) * (mm - m * m)) ** 0.5, abs=1e-4)
    assert table.activations.mean == pytest.approx(table.frame.error.mean()) and table.activations.mean > 0.01
    heads = table.heads.frame
    for row in heads.itertuples():
        each = []
        for run, own in runs:
            c, m = (x[patterns[row.layer]][row.head].numpy() for x in (run, own))
            queries = [len(c) - 1] if row.layer == cfg.n_layers - 1 else range(1, len(c))
            each.append(np.mean([(abs(c[q] - m[q]).sum() + abs(c[q].sum() - m[q].sum())) / 2 for q in queries]))
        assert row.distance == pytest.approx(np.mean(each), abs=1e-6)
    assert table.patterns.mean == pytest.approx(heads.distance.mean()) and table.patterns.mean > 1e-3


@pytest.mark.parametrize("name", ["quote", "attention_copy", "bracket_depth"])
def test_a_key_holds_and_looks_as_the_model_does(name):
    truth, means = hand_built(name)
    pairs = truth.task.batch(8, "test", generator=seeded())
    key = Circuit.of_nodes(truth.model, truth.nodes, means)
    table = agreement_inside(truth.model, key, pairs, generator=seeded())
    assert table.activations.mean < 1e-6 and table.patterns.mean < 1e-5 and table.evened.mean == 0
    assert table.frame.correlation.min() > 0.999


def test_a_circuit_without_queries_and_keys_comes_to_the_answer_and_has_lost_what_its_head_looks_for():
    """The head of `quote` finds the mark by its key; one that looks everywhere alike meets the mark too."""
    truth, means = hand_built("quote")
    pairs = truth.task.batch(16, "test", generator=seeded())
    blind = Circuit.of_nodes(truth.model, {node for node in truth.nodes if node.site not in ("q", "k")}, means)
    table = agreement_inside(truth.model, blind, pairs, generator=seeded())
    (head,) = {node.channel // 2 for node in truth.nodes if node.site == "k"}
    heads = table.heads.frame
    row = heads[(heads.layer == 1) & (heads["head"] == head)].iloc[0]
    assert row.model_even == 0 and row.circuit_even == 1 and row.evened == 1 and row.distance > 0.3
    written = table.frame[(table.frame.layer == 1) & (table.frame.site == "attn_write")]
    assert written.error.max() > 0.1


def test_a_node_that_nothing_drives_any_more_has_error_one_and_one_that_never_moves_has_none(make_model, pairs):
    """An MLP's write is linear in its neurons: these at their means, it is at its own."""
    model = make_model(afrac=None)
    circuit = Circuit.of_nodes(model, [Node(0, "mlp_write", 3)], task_means(model, pairs))
    table = agreement_inside(model, circuit, pairs, generator=seeded())
    assert table.frame.error.item() == pytest.approx(1, abs=1e-4) == table.activations.mean
    assert isnan(table.frame.correlation.item()) and table.frame.model_rms.item() > 0.01
    place = Place(0, "mlp_write")
    with model.hooks([(place.hook, lambda write, hook: circuit.baseline[place].expand_as(write))]):
        still = agreement_inside(model, circuit, pairs, generator=seeded())
    assert isnan(still.frame.error.item()) and isnan(still.activations.mean)


def test_heads_are_kept_if_they_carry_a_kept_value(plain_model, pairs):
    nodes = [Node(0, "v", 1), Node(0, "q", 7), Node(1, "v", 14)]
    circuit = Circuit.of_nodes(plain_model, nodes, task_means(plain_model, pairs))
    assert kept_heads(circuit, plain_model.cfg) == {0: [0], 1: [2]}


def test_the_circuit_of_all_nodes_agrees_exactly_and_the_empty_one_has_nothing_to_compare(any_kind, pairs):
    means = task_means(any_kind, pairs)
    whole = Circuit.of_nodes(any_kind, all_nodes(hooked(any_kind).cfg), means)
    table = agreement_inside(any_kind, whole, pairs, generator=seeded())
    assert table.activations == (0, 0, 0) and table.patterns == (0, 0, 0) and table.evened == (0, 0, 0)
    empty = agreement_inside(any_kind, Circuit.of_nodes(any_kind, [], means), pairs, generator=seeded())
    assert len(empty) == len(empty.heads) == 0 and isnan(empty.activations.mean) and isnan(empty.patterns.mean)


def test_nodes_at_positions_are_compared_there(plain_model, pairs):
    whole = pairs.rows(slice(1))
    sides = {side: torch.nn.functional.pad(getattr(whole, side), (0, 2)) for side in ("clean", "corrupt")}
    wider = replace(whole, **sides)
    spots = [NodeAt(0, "neuron", 3, 2), NodeAt(1, "v", 4, 1), NodeAt(2, "final_read", 5, 6)]
    circuit = Circuit.of_nodes(plain_model, spots, task_means(plain_model, pairs), n_pos=7)
    tables = [agreement_inside(plain_model, circuit, batch, generator=seeded()).frame for batch in (whole, wider)]
    assert tables[0].equals(tables[1])
    hook, b = Place(0, "neuron").hook, circuit.baseline.of(Node(0, "neuron", 3))
    moved = [seen_alone(plain_model, prompt, [hook])[hook][2, 3].item() - b for prompt in (whole.clean, whole.corrupt)]
    assert tables[0].model_rms[0] == pytest.approx(np.mean(np.square(moved)) ** 0.5, rel=1e-4)


def test_a_circuit_of_other_weights_is_refused(plain_model, make_model, pairs):
    circuit = Circuit.of_nodes(plain_model, [Node(0, "v", 1)], task_means(plain_model, pairs))
    with pytest.raises(CircuitError, match="weights"):
        agreement_inside(make_model(seed=1), circuit, pairs, generator=seeded())
