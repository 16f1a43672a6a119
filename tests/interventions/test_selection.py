"""How the size of a circuit is chosen, and what candidates are measured under."""

import warnings

import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.interventions.ablation import less
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import Counterfactual, mean_activations, position_means, zero_values
from sparse_interp.interventions.edges import edges_among, row_values
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.selection import EdgeCut, Fit, Selection, needed_among, smallest_prefix
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, masks


@pytest.fixture(scope="module")
def truth():
    return ground_truth("attention_copy")


@pytest.fixture(scope="module")
def pairs(truth):
    return truth.task.batch(12, generator=torch.Generator().manual_seed(0))


def everything(model):
    return {place: ~mask for place, mask in masks((), hooked(model).cfg).items()}


def test_the_smallest_good_prefix_is_found_above_and_below_the_start():
    assert smallest_prefix(100, lambda n: n >= 37, start=50) == 37
    assert smallest_prefix(100, lambda n: n >= 63, start=50) == 63
    with pytest.raises(CircuitError, match="not even all nodes"):
        smallest_prefix(100, lambda n: False, start=50)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_candidate_of_all_nodes_is_the_model_bit_for_bit(truth, pairs, frozen):
    for baseline in (zero_values(truth.model), Counterfactual(), position_means(truth.model, pairs)):
        selection = Selection(truth.model, pairs, baseline, frozen_norms=frozen)
        assert torch.equal(selection.logits(everything(truth.model)), selection.reference)


def with_scales_put_back(model, batch, written):
    """Answer logits with layer 0's MLP write replaced, and every norm's scale that of a run without."""
    scales = {}
    names = [f"blocks.{layer}.{norm}.hook_scale" for layer in (0, 1) for norm in ("ln1", "ln2")]
    names += ["ln_final.hook_scale"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bridge says that it computes an edited norm in other steps
        for name in names:
            with model.hooks(fwd_hooks=[(name, lambda s, hook: scales.update({hook.name: s}))]):
                model(batch.clean)
        hooks = [(name, lambda s, hook: scales[hook.name]) for name in names]
        with model.hooks(fwd_hooks=[*hooks, ("blocks.0.hook_mlp_out", lambda x, hook: written.expand_as(x))]):
            return model(batch.clean)[torch.arange(len(batch)), batch.last]


def test_frozen_norms_divide_by_what_the_full_model_divides_by(make_model, make_bridge, pairs):
    """Two layers, so that what layer 0 loses reaches the norms of layer 1: the scales have to be put back by hand."""
    for model in (make_model(norm="layer"), make_model(), make_bridge(n_kv=2)[0]):
        own = hooked(model)
        kept = less(everything(model), [Node(0, "mlp_write", c) for c in range(own.cfg.d_model)])
        held = mean_activations(model, pairs.clean)
        expected = with_scales_put_back(own, pairs.both_sides(), held[Place(0, "mlp_write")])
        found = Selection(own, pairs, held, frozen_norms=True).logits(kept)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, Selection(own, pairs, held).logits(kept), atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_knock_outs_that_begin_at_their_layer_are_those_of_whole_runs(truth, pairs, frozen):
    selection = Selection(truth.model, pairs, Counterfactual(), frozen_norms=frozen)
    kept = less(everything(truth.model), [Node(0, "mlp_write", 1)])
    out = {0: [Node(0, "v", 0), Node(0, "attn_write", 4)], 1: [Node(1, "final_read", 4)]}
    without = {layer: [less(kept, [node]) for node in nodes] for layer, nodes in out.items()}
    found = list(selection.knock_outs(kept, without, every=1))
    whole = [selection.fit(less(kept, [node])).kl - selection.fit(kept).kl for nodes in out.values() for node in nodes]
    assert found == pytest.approx(whole, abs=1e-5) and max(found) > 0.1


def test_a_selection_measures_padded_prompts_as_it_would_each_alone(pairs):
    truth = ground_truth("quote")
    mixed = truth.task.batch(12, generator=torch.Generator().manual_seed(0))
    assert len(mixed.lengths.unique()) > 1
    kept = less(everything(truth.model), [Node(0, "neuron", 1), Node(1, "v", 0)])
    logits = Selection(truth.model, mixed, Counterfactual()).logits(kept)
    for row in range(len(mixed)):
        alone = mixed.rows(slice(row, row + 1))
        short = type(alone)(**{n: v[:, : int(alone.lengths)] if v.ndim == 2 else v for n, v in vars(alone).items()})
        found = Selection(truth.model, short, Counterfactual()).logits(kept)[0]
        torch.testing.assert_close(found, logits[row], atol=1e-5, rtol=1e-5)


def test_each_target_looks_at_its_own_bound():
    fit = Fit(kl=0.1, loss=0.5, model_loss=0.3, ld_error=0.04)
    strict = {"max_kl": 0.05, "max_loss_gap": 0.1, "max_ld_error": 0.01, "target_task_loss": 0.4}
    loose = {"max_kl": 0.2, "max_loss_gap": 0.3, "max_ld_error": 0.1, "target_task_loss": 0.6}
    needs = {
        "agreement": {"max_kl", "max_loss_gap"},
        "kl": {"max_kl"},
        "loss_gap": {"max_loss_gap"},
        "task_loss": {"target_task_loss"},
        "logit_difference": {"max_ld_error", "max_loss_gap"},
    }
    for target, bounds in needs.items():
        assert fit.enough(PruneConfig(target=target, **strict | {name: loose[name] for name in bounds}))
        for name in bounds:
            assert not fit.enough(PruneConfig(target=target, **loose | {name: strict[name]}))
    assert [PruneConfig(objective=o).rule for o in ("agreement", "task_loss")] == ["agreement", "task_loss"]
    with pytest.raises(ConfigError, match="target='loss'"):
        PruneConfig(target="loss")


def test_the_reference_is_the_model_itself(truth, pairs):
    selection = Selection(truth.model, pairs, zero_values(truth.model))
    assert torch.equal(selection.reference, all_answer_logits(truth.model, pairs.both_sides()))
    assert selection.ablation == "full, zero" and selection.under(zero_values(truth.model)).ablation == "full, zero"


@pytest.mark.parametrize("frozen", [False, True])
def test_candidates_that_run_together_are_what_they_are_one_by_one(truth, pairs, frozen):
    """Nodes of every place, edges of every matrix; a list runs in groups, an iterator one by one."""
    model, means = truth.model, mean_activations(truth.model, pairs.clean)
    selection, kept = Selection(model, pairs, means, frozen_norms=frozen), everything(model)
    rows, without = row_values(model, means), {}
    for place, mask in kept.items():
        nodes = [Node(*place, channel) for channel in range(len(mask))]
        without.setdefault(place.layer, []).extend(less(kept, [node]) for node in nodes)
    for matrix, mask in edges_among(model, kept).items():
        cuts = mask.nonzero()[:3].tolist()
        without[matrix.layer] += [EdgeCut(matrix, tuple(mask.shape), *cut, rows[matrix]) for cut in cuts]
    together = torch.stack(list(selection.divergences(kept, without)))
    alone = torch.stack(list(selection.divergences(kept, {layer: iter(each) for layer, each in without.items()})))
    assert len(together) > 60
    assert together.std(0).max() > 1e-2
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    with truth.model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):  # somebody listens: nothing is packed
        unpacked = torch.stack(list(selection.divergences(kept, without)))
    torch.testing.assert_close(together, unpacked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("needed", [set(), {0}, {99}, {3, 4}, {0, 37, 50, 99}, set(range(100))])
def test_the_few_that_are_needed_together_are_found_among_many_in_few_trials(needed):
    trials = []

    def good(some):
        trials.append(some)
        return needed <= set(some)

    assert needed_among(range(100), good) == sorted(needed)
    assert len(trials) <= 2 + 2 * len(needed) * 8
    searched = [frozenset(some) for some in trials[:-1]]  # the last one checks what was found
    assert len(set(searched)) == len(searched), "nothing is tried twice"


def test_of_several_that_do_one_earlier_ones_are_preferred_and_none_is_spare():
    assert needed_among("abcd", lambda some: bool({"b", "d"} & {*some}) and bool({"a", "c"} & {*some})) == ["a", "b"]


def test_where_nothing_is_good_nothing_is_named():
    assert needed_among("ab", lambda some: False) is None
