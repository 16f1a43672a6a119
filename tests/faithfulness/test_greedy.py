"""Greedy removal of weights, beside one that takes nothing for granted."""

import torch

from sparse_interp.faithfulness.greedy import WITHIN_A_BLOCK, greedy_edges
from sparse_interp.faithfulness.ground_truth import cut, ground_truth
from sparse_interp.faithfulness.methods import _Bench
from sparse_interp.interventions.ablation import hold
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.tasks.task import kl_divergence


def naive(bench, batch, tau):
    """Every run from the tokens on, every unit tried, edges cut by their names."""
    model, units, reference = bench.model, bench.units, all_answer_logits(bench.model, batch)
    names = [*bench.edges, *bench.ends]
    groups, first = [], 0
    for group, n in units.sizes.items():
        groups.append((group, names[first : first + n]))
        first += n
    depth = lambda group: (-group.layer, WITHIN_A_BLOCK.index(group.name) if hasattr(group, "name") else -1)
    gone, now = set(), 0.0

    def cost(gone):
        kept = torch.ones(units.width, dtype=torch.bool)
        kept[[node.channel for node in gone if node in bench.ends]] = False
        held = (units.end.hook, hold(kept, bench.means[units.end]))
        with model.hooks([held]), cut(model, [edge for edge in gone if edge in bench.ranks], bench.means):
            return float(kl_divergence(reference.double(), all_answer_logits(model, batch).double(), batch).mean())

    bench.ranks = set(bench.edges)
    for _, members in sorted(groups, key=lambda item: depth(item[0])):
        for unit in reversed(members):
            after = cost(gone | {unit})
            if after - now < tau:
                gone, now = gone | {unit}, after
    return [name not in gone for name in names]


def test_shortcuts_change_nothing_and_a_larger_tau_keeps_fewer():
    truth = ground_truth("attention_copy")
    bench = _Bench(truth, torch.Generator().manual_seed(0))
    batch = truth.task.batch(6, "test", generator=torch.Generator().manual_seed(1)).both_sides()
    found = greedy_edges(bench.sizing.connections, batch, bench.means, [0.3, 0.01, 1e3])
    assert list(found) == [0.01, 0.3, 1e3]
    assert found[0.01].tolist() == naive(bench, batch, 0.01)
    assert bench.key(found[0.01]).edges == truth.edges
    assert (found[0.3] <= found[0.01]).all() and not found[1e3].any()
    assert all(not p._forward_hooks for p in truth.model.hook_dict.values())
    assert not any(block.attn.edge_gates["W_Q"] for block in truth.model.blocks)
