"""Packed prompts: what they answer is what they answer one by one, and nothing runs twice."""

import pytest
import torch

from sparse_interp.model.edges import EdgeGate, Matrix, RowCuts
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import WIRES, places

PROMPTS = [[1, 5, 6, 7, 8], [1, 5, 6, 9], [1, 5, 6, 7], [1, 4, 4, 4, 4, 4], [1, 5, 6, 7, 8]]
KINDS = {
    "sink, bigram, AbsTopK": {},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
    "no positions, no AbsTopK": {"positions": "none", "afrac": None},
    "one layer, layer norm": {"n_layers": 1, "norm": "layer"},
    "bidirectional": {"attention_dir": "bidirectional"},
    "three layers, AbsTopK in the stream": {"n_layers": 3, "afrac_sites": ("q", "resid_mid", "mlp_write")},
}


@pytest.fixture(params=KINDS, ids=str)
def model(request, make_model):
    """Kinds of models that prompts can be packed for, in float64."""
    return make_model(dtype=torch.float64, **KINDS[request.param])


def packing_of(*rows, model):
    return Packing.of(rows, torch.device("cpu"), causal=model.cfg.attention_dir == "causal")


def distinct_of(prompts, model):
    """What a position can hold: the tokens that it sees, and which of them is its own."""
    causal = model.cfg.attention_dir == "causal"
    return {(n, tuple(prompt[: n + 1] if causal else prompt)) for prompt in prompts for n in range(len(prompt))}


def packed_logits(model, packing):
    return model.packed_logits(packing, model.packed_stream(packing, model.cfg.n_layers))


def one_by_one(model, prompts):
    return torch.stack([model(torch.tensor([prompt]))[0, -1] for prompt in prompts])


@torch.no_grad()
def test_packed_prompts_answer_as_they_do_one_by_one(model):
    (found,) = packed_logits(model, packing_of(PROMPTS, model=model))
    torch.testing.assert_close(found, one_by_one(model, PROMPTS), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rows_of_unlike_prompts_do_not_see_each_other(model):
    rows = PROMPTS, PROMPTS[1:3], [[2]]
    packing = packing_of(*rows, model=model)
    assert packing.counts == (5, 2, 1)
    for found, prompts in zip(packed_logits(model, packing), rows, strict=True):
        expected = one_by_one(model, prompts)
        torch.testing.assert_close(found[: len(prompts)], expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_beginning_runs_once_and_the_last_block_at_the_ends_of_prompts_alone(model):
    seen, last = {}, model.cfg.n_layers - 1
    hooks = [(place.hook, lambda x, hook, place=place: seen.update({place: x.shape[1]})) for place in places(model.cfg)]
    with model.hooks(fwd_hooks=hooks):
        packed_logits(model, packing_of(PROMPTS, model=model))
    distinct = distinct_of(PROMPTS, model)
    everywhere = {place for place, n in seen.items() if n == len(distinct)}
    assert everywhere == {p for p in seen if p.layer < last or (p.layer == last and p.site in ("attn_read", "k", "v"))}
    assert all(seen[place] == len(PROMPTS) for place in seen if place not in everywhere)
    packing = packing_of(PROMPTS, model=model)
    tokens, positions = packing.tokens[0].tolist(), packing.positions[0].tolist()
    assert sorted(zip(positions, tokens, strict=True)) == sorted((n, seen[n]) for n, seen in distinct)


def test_gradients_of_packed_prompts_are_those_of_prompts_one_by_one(model):
    scales = {place: torch.full((), 0.9, dtype=torch.float64, requires_grad=True) for place in places(model.cfg)}
    hooks = [(place.hook, lambda x, hook, place=place: x * scales[place]) for place in places(model.cfg)]
    weights = torch.randn(len(PROMPTS), model.cfg.d_vocab, generator=torch.Generator().manual_seed(0)).double()
    with model.hooks(fwd_hooks=hooks):
        together, alone = packed_logits(model, packing_of(PROMPTS, model=model))[0], one_by_one(model, PROMPTS)
    grads = [torch.autograd.grad((side * weights).sum(), list(scales.values())) for side in (together, alone)]
    assert max(float(grad.abs()) for grad in grads[1]) > 1e-2
    torch.testing.assert_close(*(torch.stack(side) for side in grads), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rows_that_a_hook_makes_run_as_they_would_alone(model):
    factors = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    packing = packing_of(PROMPTS, model=model)
    for place in places(model.cfg):
        with model.hooks(fwd_hooks=[(place.hook, lambda x, hook: x * factors.view(-1, *[1] * (x.ndim - 1)))]):
            rows = packed_logits(model, packing)
        for row, factor in zip(rows, factors, strict=True):
            with model.hooks(fwd_hooks=[(place.hook, lambda x, hook, factor=factor: x * factor)]):
                torch.testing.assert_close(row, one_by_one(model, PROMPTS), atol=1e-12, rtol=0)


@torch.no_grad()
def test_each_row_has_an_edge_of_its_own_cut_beside_those_that_gates_hold_back(model):
    noise = torch.Generator().manual_seed(0)
    for matrix in [Matrix(layer, wire.weight_name) for layer in range(model.cfg.n_layers) for wire in WIRES]:
        weight = next(w for w in WIRES if w.weight_name == matrix.name).weight(model.layers[matrix.layer])
        baseline = torch.randn(len(weight), generator=noise, dtype=torch.float64)
        gates = {matrix: EdgeGate(torch.ones_like(weight).index_fill(0, torch.tensor([0]), 0.0), baseline)}
        sources, targets = torch.tensor([1, 2, 2]), torch.tensor([3, 3, 1])
        with model.gated_edges(gates), model.cutting_rows(matrix, RowCuts(sources, targets, baseline)):
            rows = packed_logits(model, packing_of(PROMPTS, model=model))
        for row, source, target in zip(rows, sources, targets, strict=True):
            share = torch.ones_like(weight)
            share[source, target] = 0
            with model.gated_edges(gates), model.gated_edges({matrix: EdgeGate(share, baseline)}):
                torch.testing.assert_close(row, one_by_one(model, PROMPTS), atol=1e-12, rtol=0)
    assert len(packed_logits(model, packing_of(PROMPTS, model=model))) == 1  # nothing is cut when the blocks have ended


def test_prompts_are_packed_only_where_nothing_but_tokens_tells_them_apart(make_model):
    model, matrix = make_model(), Matrix(0, "mlp.W_in")
    share = torch.zeros_like(model.blocks[0].mlp.W_in)
    assert model.packable
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x)]):
        assert not model.packable
    with model.gated_edges({matrix: EdgeGate(share, torch.zeros(12))}):
        assert model.packable
    with model.gated_edges({matrix: EdgeGate(share, torch.zeros(2, 3, 12))}):
        assert not model.packable
    model.set_use_attn_result(True)
    assert not model.packable
