"""Every cell of the grid is what a plain run of that ablation, metric and position gives."""

import math
from functools import partial

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.completeness import completeness
from sparse_interp.faithfulness.curves import size_curve
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.faithfulness.minimality import minimality
from sparse_interp.faithfulness.robustness import METRICS, POSITIONS, held_at, robustness_grid
from sparse_interp.faithfulness.scrubbing import scrub
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.edges import edges_among
from sparse_interp.model.sites import NodeAt, Place, masks


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))


def test_a_key_is_its_model_by_every_baseline_and_at_all_positions(truth, means, generator):
    """What is outside takes no part, whatever it holds and wherever."""
    circuit = Circuit.of_nodes(truth.model, [*truth.nodes, *constant_on_the_way(truth)], means)
    pairs = truth.task.batch(8, "test", generator=generator)
    found = robustness_grid(truth.model, circuit, pairs, n_pairs=4, generator=generator, progress=False)
    assert len(found) == 6 * len(POSITIONS) * len(METRICS) and found.n_prompts == 8
    assert found.frame[found.frame.own].positions.unique().tolist() == ["all"]
    assert found.highest("KL(model || circuit)").mean < 1e-3
    spread = found.spread.frame.set_index("metric")
    assert spread.lowest["argmax agreement"] == 1 and spread.highest["task loss gap"] < 1e-3
    restored = found.frame[(found.frame.metric == "logit difference restored") & (found.frame.positions == "all")]
    assert restored.value.dropna().tolist() == pytest.approx([1] * restored.value.notna().sum(), abs=1e-3)
    assert len(found.plot().patches) == 18


def constant_on_the_way(truth):
    """Nodes that hold a constant which the key needs: zero is another number than theirs."""
    prompts = truth.blocks(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, cache = truth.model.run_with_cache(prompts)
    constant = []
    for node in all_nodes(truth.model.cfg):
        values = cache[Place(node.layer, node.site).hook].flatten(2)[..., node.channel]
        if values.std() < 1e-6 and values.abs().max() > 1e-6:
            constant.append(node)
    return constant


def divergence(truth, prompt, run):
    with torch.no_grad():
        p, q = (logits.double().log_softmax(-1) for logits in (truth.model(prompt)[0, -1], run()))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("edges", [False, True])
def test_cells_are_those_of_plain_hooks_prompt_by_prompt(truth, means, edges, generator):
    """Zero, at all positions, at the last, and before it; with hooks written here, cut edges beside."""
    nodes = sorted(truth.nodes)[1:]
    cut = edges_among(truth.model, masks(nodes, truth.model.cfg))
    cut = {matrix: mask & (torch.arange(mask.shape[1]) != 0) for matrix, mask in cut.items()}
    circuit = Circuit.of_nodes(truth.model, nodes, means, edges=cut if edges else None)
    pairs = truth.task.batch(2, "test", generator=generator)
    found = robustness_grid(truth.model, circuit, pairs, n_pairs=2, generator=generator, progress=False).frame
    batch = pairs.both_sides()
    for where, held in {"all": slice(None), "answer": slice(-1, None), "before the answer": slice(None, -1)}.items():
        expected = []
        for i in range(len(batch)):
            prompt = batch.clean[i : i + 1, : int(batch.lengths[i])]

            def run(prompt=prompt, held=held):
                hooks = []
                for place, inside in circuit.inside.items():

                    def zero(x, hook, inside=inside):
                        flat = x.flatten(2).clone()
                        flat[:, held] = flat[:, held] * inside
                        return flat.view_as(x)

                    hooks.append((place.hook, zero))
                with circuit.cutting(truth.model), truth.model.hooks(hooks):
                    return truth.model(prompt)[0, -1]

            expected.append(divergence(truth, prompt, run))
        cell = found[(found.baseline == "zero") & (found.positions == where) & (found.metric == "KL(model || circuit)")]
        assert cell.value.tolist() == pytest.approx([sum(expected) / len(expected)], abs=1e-5)
    assert found.value[found.metric == "KL(model || circuit)"].max() > 0.1


def test_what_is_held_at_some_positions_is_kept_at_all_others():
    kept = {Place(0, "v"): torch.tensor([True, False]), Place(1, "final_read"): torch.tensor([False])}
    answer, before = held_at(kept, 3, "answer"), held_at(kept, 3, "before the answer")
    assert answer[Place(0, "v")].tolist() == [[True, True], [True, True], [True, False]]
    assert before[Place(0, "v")].tolist() == [[True, False], [True, False], [True, True]]
    assert answer[Place(1, "final_read")].tolist() == [[False]] and before[Place(1, "final_read")].tolist() == [[True]]


def test_a_bridge_gives_what_our_model_gives(dense_truth, truth):
    tables = []
    for model in dense_truth:
        seed = torch.Generator().manual_seed(0)
        means = mean_activations(model, truth.blocks(16, generator=seed))
        circuit = Circuit.of_nodes(model, sorted(truth.nodes)[1:], means)
        pairs = truth.task.batch(2, "test", generator=seed)
        tables.append(robustness_grid(model, circuit, pairs, generator=seed, progress=False).frame)
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-4)


def test_a_model_that_answers_as_the_empty_circuit_does_restores_nothing_that_could_be_told(truth, generator):
    circuit = Circuit.of_nodes(truth.model, all_nodes(truth.model.cfg), zero_values(truth.model))
    pairs = truth.task.batch(2, "test", generator=generator)
    pairs = type(pairs)(**vars(pairs) | {"foil": pairs.answer})
    found = robustness_grid(truth.model, circuit, pairs, generator=generator, progress=False)
    assert math.isnan(found.highest("logit difference restored").mean)


@pytest.mark.parametrize("test", [completeness, minimality, robustness_grid, size_curve, partial(scrub, hypothesis={})])
def test_prompts_of_another_length_than_the_circuits_positions_are_refused(test, truth, means, generator):
    pairs = truth.task.batch(6, "test", generator=generator)
    circuit = Circuit.of_nodes(truth.model, [NodeAt(0, "v", 0, 1)], means, n_pos=3)
    with pytest.raises(CircuitError, match="prompts of 3 tokens, and 6 of 6 here have [78]"):
        test(truth.model, circuit, pairs=pairs, generator=generator)
