"""Gated edges: every message on its own in float64, and what is left when the block ends."""

import numpy as np
import pytest
import torch

from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.dense import hooked
from sparse_interp.model.edges import EdgeGate, Matrix
from sparse_interp.model.sites import Node, masks, wires

KINDS = {
    "sink, bigram, AbsTopK": {},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
    "AbsTopK at some sites": {"afrac_sites": ("q", "neuron", "attn_write", "mlp_write")},
    "layer norm, no AbsTopK, both ways": {"norm": "layer", "afrac": None, "attention_dir": "bidirectional"},
}


@pytest.fixture
def random_gates(dense_script):
    """`random_gates(model, seed)`: for every matrix shares, some 1 and some 0, and a random baseline per row."""
    return lambda model, *seed, **shares: dense_script.random_gates(hooked(model), *seed, **shares)


def as_arrays(gates):
    return {tuple(matrix): tuple(part.numpy() for part in gate) for matrix, gate in gates.items()}


def padded(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 5:] = 0
    return mask


def numpy_logits(reference, model, tokens, mask=None, **said):
    arrays = {name: p.double().numpy() for name, p in model.state_dict().items()}
    given = None if mask is None else mask.numpy()
    logits, seen = reference.forward(model.cfg.to_dict(), arrays, tokens.numpy(), given, **said)
    return torch.from_numpy(logits), seen


@pytest.mark.parametrize("kind", KINDS)
def test_each_edge_brings_its_share_of_its_source_and_else_of_its_baseline(
    kind, make_model, numpy_reference, tokens, random_gates
):
    model, mask = make_model(dtype=torch.float64, **KINDS[kind]), padded(tokens)
    gates = random_gates(model)
    expected, seen = numpy_logits(numpy_reference, model, tokens, mask, gates=as_arrays(gates))
    with torch.no_grad(), model.gated_edges(gates):
        logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    for name, value in seen.items():
        np.testing.assert_allclose(cache[name], value, atol=1e-9, err_msg=name)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"afrac": None}], ids=["AbsTopK", "none"])
def test_each_switch_of_the_model_brings_the_same(changes, make_model, tokens, random_gates):
    model = make_model(dtype=torch.float64, **changes)
    gates = random_gates(model)
    with torch.no_grad(), model.gated_edges(gates):
        expected = model(tokens)
        for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"):
            setattr(model.cfg, flag, True)
            torch.testing.assert_close(model(tokens), expected)
            setattr(model.cfg, flag, False)
        model.train()
        torch.testing.assert_close(model(tokens), expected)


def either(make_model, make_bridge, kind):
    return make_model() if kind == "ours" else make_bridge(n_kv=2)[0]


both = pytest.mark.parametrize("kind", ["ours", "a bridge"])


@both
def test_a_padded_batch_equals_its_prompts_one_by_one(kind, make_model, make_bridge, random_gates):
    model = either(make_model, make_bridge, kind)
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(2))
    lengths = [9, 6, 4]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad(), hooked(model).gated_edges(random_gates(model)):
        together = hooked(model)(tokens, attention_mask=mask.long())
        for row, n in enumerate(lengths):
            torch.testing.assert_close(
                together[row, :n], hooked(model)(tokens[row : row + 1, :n])[0], atol=1e-4, rtol=0
            )


@both
def test_edges_that_carry_everything_change_no_bit_of_ours_and_nothing_stays_behind(
    kind, make_model, make_bridge, tokens, random_gates
):
    model = either(make_model, make_bridge, kind)
    whole = {matrix: EdgeGate(torch.ones_like(g.share), g.baseline) for matrix, g in random_gates(model).items()}
    with torch.no_grad():
        before = model(tokens)
        hooks_before = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        with hooked(model).gated_edges(whole):
            torch.testing.assert_close(model(tokens), before, atol=0 if kind == "ours" else 1e-6, rtol=0)
        with pytest.raises(ZeroDivisionError), hooked(model).gated_edges(random_gates(model)):
            assert not torch.allclose(model(tokens), before)
            _ = 1 / 0
        assert torch.equal(model(tokens), before)
        assert hooks_before == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@both
def test_of_two_blocks_the_inner_one_gates_what_the_outer_one_left(kind, make_model, make_bridge, tokens, random_gates):
    model = either(make_model, make_bridge, kind)
    outer, inner = random_gates(model, 0), random_gates(model, 1, whole=0.5, cut=0.5)
    one = {
        matrix: EdgeGate(outer[matrix].share * gate.share, outer[matrix].baseline) for matrix, gate in inner.items()
    }  # which is right where both blocks have one baseline
    inner = {matrix: gate._replace(baseline=outer[matrix].baseline) for matrix, gate in inner.items()}
    other = {matrix: gate._replace(baseline=gate.baseline + 1) for matrix, gate in inner.items()}
    cut = {matrix: gate._replace(share=torch.zeros_like(gate.share)) for matrix, gate in other.items()}
    with torch.no_grad():
        with hooked(model).gated_edges(one):
            expected = model(tokens)
        with hooked(model).gated_edges(outer):
            first = model(tokens)
            with hooked(model).gated_edges(inner):
                torch.testing.assert_close(model(tokens), expected)
            with hooked(model).gated_edges(cut):
                nothing_left = model(tokens)
            torch.testing.assert_close(model(tokens), first)
        with hooked(model).gated_edges(cut):
            torch.testing.assert_close(model(tokens), nothing_left)


@both
@pytest.mark.parametrize("order", ["edges within", "edges around"])
def test_ablations_inside_and_outside_act_on_nodes_as_ever(
    kind, order, make_model, make_bridge, tokens, random_gates, dense_script, numpy_reference
):
    """A held target keeps its value, and a held source is what whole edges carry, whichever block is the outer one."""
    model = either(make_model, make_bridge, kind)
    nodes = [
        Node(0, site, c) for site in ("attn_read", "q", "v", "attn_write", "mlp_read", "neuron") for c in (0, 2, 5)
    ]
    values, gates = mean_activations(model, tokens), random_gates(model)
    blocks = [lambda: hooked(model).gated_edges(gates), lambda: ablate(model, nodes, values)]
    outer, inner = blocks if order == "edges around" else blocks[::-1]
    with torch.no_grad(), outer(), inner():
        found = model(tokens)
    held = {place: (~mask, values[place]) for place, mask in masks(nodes, hooked(model).cfg).items()}
    if kind == "ours":
        by_hook = {place.hook: tuple(part.numpy() for part in pair) for place, pair in held.items()}
        expected, _ = numpy_logits(numpy_reference, model, tokens, gates=as_arrays(gates), held=by_hook)
    else:
        shape, weights = dense_script.shape_of(50, norm="rms", n_kv=2), make_bridge(n_kv=2)[1]
        by_place = {tuple(place): pair for place, pair in held.items()}
        expected = dense_script.reference(shape, weights, tokens, by_place, gates=gates)
    assert dense_script.largest(found, expected) < 1e-5


@both
def test_the_gradient_of_a_share_is_that_of_differences(kind, make_model, make_bridge, tokens, random_gates):
    ours = lambda: make_model(dtype=torch.float64, afrac=None)
    model = either(ours, lambda **shape: [make_bridge(**shape, norm="none")[0].double()], kind)
    gates = random_gates(model, whole=0.0, cut=0.0)
    direction = torch.randn(50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    goal = lambda: (model(tokens)[:, -1] @ direction).sum()
    for matrix, gate in gates.items():
        share = gate.share.clone().requires_grad_()
        with hooked(model).gated_edges({**gates, matrix: gate._replace(share=share)}):
            (grad,) = torch.autograd.grad(goal(), share)
        at = int(grad.abs().flatten().argmax())
        step = torch.zeros_like(gate.share).flatten()
        step[at] = 1e-5
        step, ends = step.view_as(gate.share), []
        for sign in (1, -1):
            with (
                torch.no_grad(),
                hooked(model).gated_edges({**gates, matrix: gate._replace(share=gate.share + sign * step)}),
            ):
                ends.append(goal())
        assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(float(grad.flatten()[at]), rel=1e-4), matrix


@both
def test_baselines_may_differ_between_prompts_and_positions(kind, make_model, make_bridge, tokens):
    """Under baselines that are the sources themselves a cut edge carries what it always does."""
    model = either(make_model, make_bridge, kind)
    cfg, given = hooked(model).cfg, {}
    with torch.no_grad():
        before, cache = model.run_with_cache(tokens)
        for layer, block in enumerate(hooked(model).layers):
            for wire in wires(cfg):
                source = cache[wire.source.at(layer)]
                rows = source.repeat_interleave(cfg.n_heads // source.shape[2], 2) if source.ndim == 4 else source
                cut = torch.zeros_like(wire.weight(block))
                given[Matrix(layer, wire.weight_name)] = EdgeGate(cut, rows.flatten(2))
        with hooked(model).gated_edges(given):
            torch.testing.assert_close(model(tokens), before, atol=1e-4, rtol=0)
