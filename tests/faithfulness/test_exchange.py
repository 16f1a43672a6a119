"""Exchange: the numbers of hooks written out, keys whose nodes do what they do in the model, circuits whose do not."""

from contextlib import nullcontext
from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch
from known_models import hand_built

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.exchange import exchange_between_prompts, exchange_between_runs
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.faithfulness.scores import CONSTANT
from sparse_interp.interventions.baselines import task_means
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def two(pairs):
    """A pair of 7 tokens and one of 4."""
    return pairs.rows(slice(2))


@pytest.fixture(params=[False, True], ids=["nodes", "edges"])
def circuit(request, any_kind, pairs):
    """A fifth of the neurons and values, other sites left alone; with the edges to half of the writes cut."""
    sites, cfg = ("neuron", "v"), hooked(any_kind).cfg
    nodes = [node for node in all_nodes(cfg) if node.site in sites][::5]
    if not request.param:
        return Circuit.of_nodes(any_kind, nodes, task_means(any_kind, pairs), sites=sites)
    nodes += [node for node in all_nodes(cfg) if node.site == "mlp_write"][::5]
    whole = Circuit.of_nodes(any_kind, nodes, task_means(any_kind, pairs), sites=(*sites, "mlp_write"))
    thinned = {matrix: mask & (torch.arange(mask.shape[1]) % 2 > 0) for matrix, mask in
               whole.edge_masks(any_kind).items()}  # fmt: skip
    return Circuit.of_nodes(any_kind, nodes, whole.baseline, sites=whole.sites, edges=thinned)


def logits_alone(model, prompt, within, node=None, held=None):
    """Answer logits of one prompt without padding, one node set to what it has in `held`, in float64."""

    def put(activation, hook):
        flat = activation.flatten(2).clone()
        flat[..., node.channel] = held[Place(node.layer, node.site)][..., node.channel]
        return flat.view_as(activation)

    hooks = [] if node is None else [(Place(node.layer, node.site).hook, put)]
    with torch.no_grad(), within(model), hooked(model).hooks(hooks):
        return model(prompt)[0, -1].double().numpy()


def held_alone(model, prompt, within, circuit):
    """What every place with nodes holds on one prompt without padding."""
    seen = {}
    for place in {Place(node.layer, node.site) for node in circuit.node_set}:
        keep = lambda activation, hook, place=place: seen.update({place: activation.flatten(2).clone()})
        with torch.no_grad(), within(model), hooked(model).hooks([(place.hook, keep)]):
            model(prompt)
    return seen


def prompts_of(pairs):
    """Every prompt alone, with its other prompt, answer and foil."""
    sides = pairs.both_sides()
    for i, n in enumerate(sides.lengths.tolist()):
        yield sides.clean[i : i + 1, :n], sides.corrupt[i : i + 1, :n], int(sides.answer[i]), int(sides.foil[i])


def kl(p, q):
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum())


def loss(logits, answer, foil):
    return float(np.log1p(np.exp(logits[foil] - logits[answer])))


def test_between_prompts_is_what_hooks_written_out_do(any_kind, two, circuit):
    table = exchange_between_prompts(any_kind, circuit, two, n_prompts=4, generator=seeded())
    effects = {"model": {}, "circuit": {}}
    for name, within in (("model", nullcontext), ("circuit", circuit.running)):
        for clean, corrupt, answer, foil in prompts_of(two):
            base, held = logits_alone(any_kind, clean, within), held_alone(any_kind, corrupt, within, circuit)
            for node in circuit.node_set:
                change = logits_alone(any_kind, clean, within, node, held) - base
                effects[name].setdefault(node, []).append(change[answer] - change[foil])
    for row in table.frame.itertuples():
        node = Node(row.layer, row.site, row.channel)
        m, c = (np.array(effects[name][node]) for name in ("model", "circuit"))
        assert (row.model_effect, row.circuit_effect) == pytest.approx((m.mean(), c.mean()), abs=2e-5)
        if not isnan(row.error) and row.model_rms > 1e-2:
            assert row.error == pytest.approx(((c - m) ** 2).sum() / (c**2 + m**2).sum(), abs=2e-3)
    m, c = (np.array([effects[name][node] for node in circuit.node_set]).ravel() for name in ("model", "circuit"))
    assert table.correlation.mean == pytest.approx(np.corrcoef(m, c)[0, 1], abs=1e-3)
    assert table.size.mean == pytest.approx(((c**2).sum() / (m**2).sum()) ** 0.5, rel=1e-3)
    same = (abs(m) * (np.sign(m) == np.sign(c)) * (abs(c) > CONSTANT)).sum() / abs(m).sum()
    assert table.same_sign.mean == pytest.approx(same, abs=2e-3)
    assert len(table) == circuit.n_nodes and (table.frame.n_prompts == 4).all() and table.frame.model_rms.max() > 0.05


def test_between_runs_is_what_hooks_written_out_do(any_kind, two, circuit):
    table = exchange_between_runs(any_kind, circuit, two, n_prompts=4, generator=seeded())
    runs = {"circuit": (circuit.running, nullcontext), "model": (nullcontext, circuit.running)}
    chosen = table.frame.iloc[:: len(table) // 4]
    found = {(i, name): [] for i in chosen.index for name in runs}
    for clean, _, answer, foil in prompts_of(two):
        reference = logits_alone(any_kind, clean, nullcontext)
        for name, (within, source_within) in runs.items():
            base, held = logits_alone(any_kind, clean, within), held_alone(any_kind, clean, source_within, circuit)
            for row in chosen.itertuples():
                after = logits_alone(any_kind, clean, within, Node(row.layer, row.site, row.channel), held)
                change = kl(reference, after) - kl(reference, base)
                found[row.Index, name].append((change, loss(after, answer, foil) - loss(base, answer, foil)))
    for (i, name), expected in found.items():
        measured = tuple(chosen.loc[i, [f"{name}_kl", f"{name}_loss"]])
        assert measured == pytest.approx(tuple(np.mean(expected, 0)), abs=2e-5)
    assert table.model_kl.mean == pytest.approx(table.frame.model_kl.mean()) and table.frame.model_kl.max() > 1e-5
    assert table.circuit_loss.mean == pytest.approx(table.frame.circuit_loss.mean())


@pytest.mark.parametrize("name", ["quote", "mlp_gate", "induction"])
def test_nodes_of_a_key_do_what_they_do_in_the_model_and_change_places_with_its_own(name):
    truth, means = hand_built(name)
    pairs, key = truth.task.batch(8, "test", generator=seeded()), Circuit.of_nodes(truth.model, truth.nodes, means)
    table = exchange_between_prompts(truth.model, key, pairs, n_prompts=16, generator=seeded())
    assert table.correlation.mean > 0.999 and table.same_sign.mean == pytest.approx(1)
    assert table.size.mean == pytest.approx(1, abs=1e-3) and table.frame.error.max() < 1e-4
    assert (table.frame.model_rms > 1).sum() >= 3
    runs = exchange_between_runs(truth.model, key, pairs, n_prompts=16, generator=seeded())
    assert runs.frame[["circuit_kl", "circuit_loss", "model_kl", "model_loss"]].abs().max().max() < 1e-4
    assert runs.plot().get_xlabel() == "model_kl" and table.plot(n=3).get_xlabel() == "effect_rms"


def test_nodes_of_a_circuit_that_looks_everywhere_alike_do_something_else():
    """`quote` without queries and keys still closes the right quote, more faintly: its values count for less."""
    truth, means = hand_built("quote")
    pairs = truth.task.batch(16, "test", generator=seeded())
    blind = Circuit.of_nodes(truth.model, {node for node in truth.nodes if node.site not in ("q", "k")}, means)
    table = exchange_between_prompts(truth.model, blind, pairs, n_prompts=16, generator=seeded())
    assert table.size.mean < 0.7 and table.frame.error.min() > 0.05
    runs = exchange_between_runs(truth.model, blind, pairs, n_prompts=16, generator=seeded())
    assert runs.model_kl.low > 1e-3 and runs.circuit_kl.high < -1e-3


def test_a_circuit_of_other_weights_and_too_few_prompts_are_refused(plain_model, make_model, pairs):
    circuit = Circuit.of_nodes(plain_model, [Node(0, "v", 1)], task_means(plain_model, pairs))
    for exchange in (exchange_between_prompts, exchange_between_runs):
        with pytest.raises(CircuitError, match="weights"):
            exchange(make_model(seed=1), circuit, pairs, generator=seeded())
        with pytest.raises(ConfigError, match="n_prompts=1"):
            exchange(plain_model, circuit, pairs, n_prompts=1, generator=seeded())


def test_more_padding_changes_nothing_and_an_empty_circuit_has_nothing_to_exchange(plain_model, pairs):
    circuit = Circuit.of_nodes(plain_model, all_nodes(plain_model.cfg)[::5], task_means(plain_model, pairs))
    sides = {side: torch.nn.functional.pad(getattr(pairs, side), (0, 2)) for side in ("clean", "corrupt")}
    empty = Circuit.of_nodes(plain_model, [], circuit.baseline)
    for exchange in (exchange_between_prompts, exchange_between_runs):
        tables = [exchange(plain_model, circuit, b, generator=seeded()).frame for b in (pairs, replace(pairs, **sides))]
        assert tables[0].equals(tables[1])
        assert len(exchange(plain_model, empty, pairs, generator=seeded())) == 0
