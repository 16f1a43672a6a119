"""Edges between components: what a cut takes away, and that greedy removal leaves what the answer depends on."""

import pytest
import torch

from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.components import (
    ComponentTruth,
    component_edges,
    connected,
    cutting_components,
    greedy_components,
)
from sparse_interp.faithfulness.ground_truth import ground_truth


def test_edges_run_from_every_sender_to_every_later_reader(plain_model):
    edges = component_edges(plain_model)
    assert len(edges) == len(set(edges)) == 2 * 9 + 5 + 6 * 9 + 9 + 10
    assert edges[0] == ("L1.mlp", "out") and edges[-1] == ("embed", "L0.H0.v")
    assert ("L0.H2", "L0.mlp") in edges and ("L0.mlp", "L0.H2.q") not in edges and ("L1.H0", "L1.H1.v") not in edges


@torch.no_grad()
def test_a_cut_edge_takes_what_its_sender_wrote_from_one_receiver_alone(make_model, tokens):
    model = make_model().double()
    block = model.blocks[1]
    seen = {}
    note = [(p.name, lambda x, hook: seen.update({hook.name: x})) for p in (block.hook_resid_pre, block.hook_resid_mid)]
    note.append((model.blocks[0].hook_mlp_out.name, note[0][1]))
    whole = model.run_with_hooks(tokens, fwd_hooks=note)
    pre, mid, written = (seen[name] for name, _ in note)
    read = block.mlp.cut_write(block.mlp(block.cut_mlp_read(block.ln2(mid - written))))
    expected = model(mid + read, start_at_layer=2, tokens=tokens)
    with cutting_components(model, {("L0.mlp", "L1.mlp")}):
        cut = model(tokens)
    assert torch.allclose(cut, expected, atol=1e-12) and not torch.allclose(cut, whole, atol=1e-3)

    read = {letter: block.cut_attn_read(block.ln1(pre)).unsqueeze(2).repeat(1, 1, 3, 1) for letter in "qkv"}
    read["k"][:, :, 2] = block.cut_attn_read(block.ln1(pre - written))
    mid = pre + block.attn(read, None)
    expected = model(mid + block.mlp(block.cut_mlp_read(block.ln2(mid))), start_at_layer=2, tokens=tokens)
    with cutting_components(model, {("L0.mlp", "L1.H2.k")}):
        cut = model(tokens)
    assert torch.allclose(cut, expected, atol=1e-12) and not torch.allclose(cut, whole, atol=1e-3)


def test_cutting_nothing_changes_nothing_and_the_model_is_left_as_it_was(plain_model, tokens):
    before = plain_model(tokens)
    with cutting_components(plain_model, ()):
        assert torch.allclose(plain_model(tokens), before, atol=1e-5)
    with pytest.raises(RuntimeError, match="on purpose"), cutting_components(plain_model, component_edges(plain_model)):
        raise RuntimeError("on purpose")
    assert torch.equal(plain_model(tokens), before) and not plain_model.cfg.use_attn_result


def test_a_stream_that_is_no_sum_has_no_edges_to_cut(make_model):
    model = make_model(residual_act="relu")
    with pytest.raises(CircuitError, match="is no sum of components: residual_act"), cutting_components(model, ()):
        pass


def test_what_leads_nowhere_is_not_connected():
    edges = {("embed", "L0.H0.q"), ("L0.H0", "L1.mlp"), ("embed", "L0.mlp"), ("L1.mlp", "out")}
    assert connected(edges) == edges - {("embed", "L0.mlp")}
    assert connected(edges - {("L1.mlp", "out")}) == frozenset()


def test_greedy_removal_leaves_the_edges_of_the_algorithm_and_a_larger_tau_fewer(generator):
    """A head reads where the first noun stands (from tokens and positions), a neuron of the next layer its number."""
    truth = ground_truth("distractor")
    batch = truth.task.batch(8, generator=generator)
    rows = torch.arange(8)
    key = {("L1.mlp", "out"), ("L0.H0", "L1.mlp"), ("pos", "L0.H0.k"), ("embed", "L0.H0.k"), ("embed", "L0.H0.v")}
    answer = lambda logits: logits[rows, batch.last].log_softmax(-1)
    stays = greedy_components(
        ComponentTruth("distractor", truth.model, batch.clean, answer, frozenset(key)), [0.1, 1e3]
    )
    assert {edge for edge, tau in stays.items() if tau >= 0.1} == key
    assert not {edge for edge, tau in stays.items() if tau == 1e3}
    assert stays.keys() == set(component_edges(truth.model))
