"""Edges: which there are, and what is cut and gated."""

from contextlib import ExitStack

import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edge_gates import EdgeGates, learn_edge_gates
from sparse_interp.interventions.edges import (
    EdgeUnits,
    cut_estimates,
    cutting,
    edges_among,
    gating,
)
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.selection import Selection
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import NODE_SITES, Node, Place, masks
from sparse_interp.tasks.task import kl_divergence

QUICK = PruneConfig(n_steps=3, batch_size=4)


@pytest.fixture(scope="module")
def pairs():
    return ground_truth("quote").task.batch(8, generator=torch.Generator().manual_seed(0))


def either(make_model, make_bridge, kind):
    return make_model() if kind == "ours" else make_bridge(n_kv=2, gated=True)[0]


both = pytest.mark.parametrize("kind", ["ours", "a bridge"])


def all_kept(model):
    return masks(all_nodes(hooked(model).cfg), hooked(model).cfg)


def units_of(model, kept=None):
    kept = all_kept(model) if kept is None else kept
    return EdgeUnits.of(hooked(model), kept, edges_among(hooked(model), kept), NODE_SITES)


@both
def test_to_cut_every_edge_of_a_source_is_to_hold_it(kind, make_model, make_bridge, tokens):
    """True of all sources but q and k, which act through no weight, and writes and the last read, which have none."""
    model = either(make_model, make_bridge, kind)
    values, edges = mean_activations(model, tokens), edges_among(hooked(model), all_kept(model))
    for site in ("attn_read", "v", "mlp_read", "neuron"):
        nodes = [Node(1, site, 0), Node(1, site, 4), Node(0, site, 2)]
        chosen = masks(nodes, hooked(model).cfg)
        leaving = edges_among(hooked(model), all_kept(model) | {p: m for p, m in chosen.items() if p.site == site})
        cut = {m: mask for m, mask in leaving.items() if _source(m.name) == site}
        assert all(bool((mask <= edges[matrix]).all()) for matrix, mask in cut.items())
        with torch.no_grad(), cutting(model, cut, values):
            found = model(tokens)
        with torch.no_grad(), ablate(model, nodes, values):
            torch.testing.assert_close(found, model(tokens), atol=1e-5, rtol=1e-5)


def _source(name):
    return {"attn.W_O": "v", "mlp.W_out": "neuron"}.get(name, "attn_read" if name.startswith("attn") else "mlp_read")


@both
def test_gates_that_are_open_are_the_model_and_shut_ones_are_cuts(kind, make_model, make_bridge, pairs, generator):
    model = hooked(either(make_model, make_bridge, kind))
    values, units, kept = zero_values(model), units_of(model), all_kept(model)
    connections = Connections(model, kept, units, NODE_SITES)
    gates = EdgeGates(model, values, connections, QUICK, generator)
    here = pairs.both_sides()
    chosen = torch.rand(len(units), generator=generator) < 0.7
    block = gates.meeting(here, [len(here)])
    with torch.no_grad():
        whole = answer_logits(model, here)
        with block({group: part[None] for group, part in gates.groups(torch.ones(len(units))).items()}):
            torch.testing.assert_close(answer_logits(model, here), whole, atol=1e-5, rtol=1e-5)
        edges, _ = units.masks(chosen)
        cut = {matrix: mask & ~edges[matrix] for matrix, mask in edges_among(model, kept).items()}
        _, joined = connections.of(chosen)
        shut = [Node(*place, c) for place, mask in joined.items() for c in (~mask).nonzero().flatten().tolist()]
        assert {node.site for node in shut} > {"final_read"}
        with ExitStack() as stack:
            stack.enter_context(cutting(model, cut, values))
            stack.enter_context(ablate(model, shut, values))
            expected = answer_logits(model, here)
        with block({group: part[None] for group, part in gates.groups(chosen.float()).items()}):
            torch.testing.assert_close(answer_logits(model, here), expected, atol=1e-5, rtol=1e-5)
        nothing = {group: torch.zeros(1, n) for group, n in units.sizes.items()}
        halves = {group: torch.full((1, n), 1.0) for group, n in units.sizes.items()}
        with block(nothing, halves):  # of what is shut a share of 1 is left
            torch.testing.assert_close(answer_logits(model, here), whole, atol=1e-5, rtol=1e-5)


@both
def test_an_estimate_is_the_slope_of_the_divergence_in_the_share_of_each_edge(kind, make_model, make_bridge, pairs):
    model = hooked(either(lambda: make_model(afrac=None), make_bridge, kind))
    kept, units, values = all_kept(model), units_of(model), zero_values(model)
    generator = torch.Generator().manual_seed(0)
    selection = Selection(model, pairs, values)
    chosen = torch.rand(len(units), generator=generator) < 0.5
    found, here = cut_estimates(selection, kept, units, chosen), selection.batch
    direction = torch.randn(len(units), generator=generator)
    ends = []
    for step in (0.01, -0.01):
        left = dict(zip(units.sizes, (chosen + step * direction).split(list(units.sizes.values())), strict=True))
        with torch.no_grad(), gating(model, kept, units, values, left):
            ends.append(kl_divergence(selection.reference, answer_logits(model, here), here).mean().item())
    assert (ends[1] - ends[0]) / 0.02 == pytest.approx(float(found @ direction), rel=0.02)


def test_units_come_back_as_the_edges_that_they_are(plain_model):
    kept = all_kept(plain_model)
    units, edges = units_of(plain_model), edges_among(plain_model, kept)
    found, end = units.masks(torch.ones(len(units), dtype=torch.bool))
    assert all(torch.equal(found[matrix], mask) for matrix, mask in edges.items()) and bool(end.all())
    assert len(units) == sum(int(mask.sum()) for mask in edges.values()) + plain_model.cfg.d_model
    one = torch.zeros(len(units), dtype=torch.bool)
    one[0] = True
    found, end = units.masks(one)
    assert sum(int(mask.sum()) for mask in found.values()) == 1 and not bool(end.any())


def test_a_zero_weight_is_no_edge_and_a_node_outside_ends_none(plain_model):
    with torch.no_grad():
        plain_model.blocks[0].mlp.W_out[3, 5] = 0
    kept = all_kept(plain_model)
    kept[Place(1, "neuron")] = kept[Place(1, "neuron")] & (torch.arange(20) != 7)
    edges = edges_among(plain_model, kept)
    by_name = {tuple(matrix): mask for matrix, mask in edges.items()}
    assert not by_name[0, "mlp.W_out"][3, 5] and int(by_name[0, "mlp.W_out"].sum()) == 20 * 12 - 1
    assert not by_name[1, "mlp.W_out"][7].any() and not by_name[1, "mlp.W_in"][:, 7].any()


@both
def test_training_ranks_every_unit_and_leaves_the_model_as_it_was(kind, make_model, make_bridge, pairs):
    model = either(make_model, make_bridge, kind)
    units, kept, before = units_of(model), all_kept(model), {n: p.clone() for n, p in model.named_parameters()}
    searches = [
        learn_edge_gates(
            hooked(model),
            pairs,
            QUICK,
            zero_values(model),
            Connections(hooked(model), kept, units, NODE_SITES),
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(2)
    ]
    assert torch.equal(searches[0].order.sort().values, torch.arange(len(units)))
    assert torch.equal(searches[0].order, searches[1].order) and len(searches[0].history.frame) == 3
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_what_edges_cannot_do_is_refused(plain_model, pairs, generator):
    values, kept = zero_values(plain_model), all_kept(plain_model)
    with pytest.raises(ConfigError, match="an edge has one gate for all positions"):
        joined = Connections(plain_model, kept, units_of(plain_model), NODE_SITES)
        learn_edge_gates(plain_model, pairs, PruneConfig(per_position=True), values, joined, generator=generator)
    none = {place: torch.zeros_like(mask) for place, mask in kept.items()}
    with pytest.raises(CircuitError, match="there is no edge between these nodes"):
        joined = Connections(plain_model, none, units_of(plain_model, none), NODE_SITES)
        learn_edge_gates(plain_model, pairs, QUICK, values, joined, generator=generator)
