"""Searches: what one mask finds, what many find at once, and what every option of a search does."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from sparse_interp.errors import ConfigError, TaskError
from sparse_interp.faithfulness.ground_truth import all_nodes, ground_truth
from sparse_interp.interventions.answers import all_answer_logits, answer_logits, frozen
from sparse_interp.interventions.baselines import Counterfactual, mean_activations, zero_values
from sparse_interp.interventions.gates import NodeGates, gate
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import SearchHistory, _draws, learn_gates, learn_many, train_gates
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, flat, places
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import answer_loss, logit_difference

QUICK = {"n_steps": 3, "batch_size": 4, "noise": 0.0}


@pytest.fixture(scope="module")
def truth():
    return ground_truth("quote")


@pytest.fixture(scope="module")
def pairs(truth):
    return truth.task.batch(10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def bridge(make_bridge):
    """Four heads of queries and two of keys and values, four channels each."""
    return make_bridge(n_kv=2)[0]


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -- one mask ----------------------------------------------------------------------------------------------------------


def test_a_key_and_the_queries_that_meet_it_share_a_gate_and_leave_together(bridge, pairs, generator):
    search = learn_gates(bridge, pairs, PruneConfig(**QUICK), zero_values(bridge), generator=generator)
    assert sorted(search.order) == sorted(all_nodes(hooked(bridge).cfg))
    for layer in (0, 1):
        of_queries, of_keys = (search.tau[Place(layer, site)] for site in "qk")
        assert torch.equal(of_queries, of_keys.view(2, 1, 4).expand(2, 2, 4).flatten())
        assert len(of_keys.unique()) == 8
        order = [node for node in search.order if node.layer == layer and node.site in "qk"]
        for first, second, key in zip(order[::3], order[1::3], order[2::3], strict=True):
            head, channel = divmod(key.channel, 4)
            assert (first.site, second.site, key.site) == ("q", "q", "k")
            assert [first.channel, second.channel] == [8 * head + channel, 8 * head + 4 + channel]


def test_without_sharing_every_query_has_a_gate_of_its_own(bridge, pairs, generator):
    search = learn_gates(bridge, pairs, PruneConfig(**QUICK, share_qk=False), zero_values(bridge), generator=generator)
    assert len(search.tau[Place(0, "q")].unique()) == 16 and len(search.order) == len(set(search.order))


def plain_search(model, pairs, config, baseline, generator):
    """One mask, one tau per place, nothing batched: the search as its equations say it."""
    taus, gains, batch = {}, {}, pairs.both_sides()
    for place in places(model.cfg):
        if place.site != "k":
            jitter = 0.01 * torch.randn(len(baseline[place]), generator=generator)
            taus[place] = (config.tau_init + jitter).requires_grad_()
            gains[place] = torch.zeros(len(jitter))
    optimizer = torch.optim.AdamW(taus.values(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    price, smooth, gap, history = config.k_coef, None, 0.0, []
    with evaluating(model), frozen(model):
        reference = all_answer_logits(model, batch)
        for step, rows in zip(range(config.n_steps), _draws(pairs.lengths, config, generator), strict=False):
            scale = config.noise * max(0.0, 1 - step / (config.noise_until_frac * config.n_steps))
            opened = {}
            for place, tau in taus.items():
                noise = torch.rand(len(tau), generator=generator).logit(eps=1e-6) * scale if scale else None
                opened[place] = gate(tau, config.temperature, noise)

            hooks = []
            for place in places(model.cfg):
                m, b = opened[place._replace(site="q") if place.site == "k" else place], baseline[place]
                hooks.append((place.hook, lambda x, hook, m=m, b=b: (b + m * (flat(x) - b)).view_as(x)))
            with model.hooks(fwd_hooks=hooks):
                logits = answer_logits(model, batch.rows(rows))
            target = log_softmax(reference[rows], -1)
            fit = kl_div(log_softmax(logits, -1), target, log_target=True, reduction="batchmean")
            smooth = fit.item() if smooth is None else 0.8 * smooth + 0.2 * fit.item()
            prompts = batch.rows(rows)
            more = (answer_loss(logits, prompts) - answer_loss(reference[rows], prompts)).mean().item()
            gap = 0.9 * gap + 0.1 * more
            used = max(smooth / config.max_kl, abs(gap) / config.max_loss_gap)
            push = max(-1.0, min(1.0, 2 * (1 - used)))
            price *= torch.tensor(config.price_rate * push, dtype=torch.float64).exp().item()
            for place, grad in zip(taus, torch.autograd.grad(fit, list(taus.values())), strict=True):
                gains[place] += (-grad - gains[place]) * max(0.02, 1 / (step + 1))
                soft = torch.sigmoid(taus[place].detach() / config.temperature)
                taus[place].grad = grad + price * soft * (1 - soft) / config.temperature
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 2 * (1 - step / config.n_steps))
            optimizer.step()
            for tau in taus.values():
                tau.data.clamp_(-1.0, 1.5)
            history.append((fit.item(), sum(int((tau >= 0).sum()) for tau in taus.values())))
    keys = [
        (-t, -g, p, c) for p in taus for c, (t, g) in enumerate(zip(taus[p].tolist(), gains[p].tolist(), strict=True))
    ]
    return [(place, channel) for _, _, place, channel in sorted(keys)], history


@pytest.mark.parametrize("bounds", [{"max_loss_gap": 10.0}, {"max_kl": 10.0, "max_loss_gap": 0.003}, {}])
def test_one_mask_is_the_search_that_its_equations_describe(truth, pairs, means, bounds):
    config = PruneConfig(n_steps=20, batch_size=8, k_coef=0.05, lr=0.2, **bounds)
    order, history = plain_search(truth.model, pairs, config, means, *seeded(3))
    search = learn_gates(truth.model, pairs, config, means, generator=seeded(3)[0])
    assert [(Place(n.layer, n.site), n.channel) for n in search.order if n.site != "k"] == order
    assert search.history.frame.open_gates.tolist() == [n_open for _, n_open in history]
    assert search.history.frame.objective.tolist() == pytest.approx([fit for fit, _ in history], abs=1e-6)
    n_open = search.history.frame.open_gates.tolist()
    assert n_open[0] > n_open[-1] > 0  # the search was on its way, so the ranking says something


# -- many masks --------------------------------------------------------------------------------------------------------

UNLIKE = (
    {"k_coef": 1e-3},
    {"k_coef": 1e-2, "lr": 1e-2, "temperature": 0.5, "objective": "logit_difference"},
    {"tau_init": 0.4, "noise": 0.3, "objective": "task_loss"},
    {"noise": 0.0, "price_rate": 0.0, "tau_init": 0.0},
)
"""Masks that differ in all that masks may differ in."""


def step_gradients(model, pairs, baseline, configs, seeds):
    """The gradient of one step for every mask: what a first step notes as its gain, with the sign turned."""
    gates = NodeGates(hooked(model), baseline, configs, seeded(*seeds))
    train_gates(hooked(model), pairs, gates)
    return [-gain for gain in gates.gains]


def agree(together, alone):
    for several, one in zip(together, alone, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(several, one, atol=1e-5, rtol=1e-5)


def differing(**common):
    return [PruneConfig(n_steps=1, batch_size=4, **{"tau_init": 0.8, **own, **common}) for own in UNLIKE]


@pytest.mark.parametrize(
    "common",
    [
        {},
        {"schemes": ("stochastic",)},
        {"schemes": ("full", "adversarial"), "adversary_steps": 2},
        {"frozen_norms": True, "share_qk": False},
    ],
    ids=["full", "stochastic", "mixture", "frozen norms"],
)
def test_gradients_of_a_step_of_many_masks_are_those_of_separate_searches(make_model, make_bridge, pairs, common):
    configs, seeds = differing(**common), [4, 5, 6, 7]
    for model in (make_model(d_vocab=60), make_bridge(n_kv=2)[0]):
        held = mean_activations(model, pairs.clean)
        together = step_gradients(model, pairs, held, configs, seeds)
        alone = [step_gradients(model, pairs, held, [c], [s])[0] for c, s in zip(configs, seeds, strict=True)]
        agree(together, alone)


def test_masks_whose_batches_differ_in_number_and_length_do_not_see_each_other(truth, pairs, means):
    """Ten pairs in batches of four: the last of an epoch has two, and it comes when each mask draws it."""
    assert len(pairs.lengths.unique()) > 1
    configs, seeds = [PruneConfig(n_steps=4, batch_size=4, noise=1.0, k_coef=0.1)] * 3, [1, 2, 3]
    together = learn_many(truth.model, pairs, configs, means, generators=seeded(*seeds))
    for several, config, seed in zip(together, configs, seeds, strict=True):
        one = learn_gates(truth.model, pairs, config, means, generator=seeded(seed)[0])
        assert several.history.frame.objective.tolist() == pytest.approx(one.history.frame.objective, abs=1e-5)
        assert several.n_open == one.n_open
        assert all(torch.allclose(several.tau[p], one.tau[p], atol=1e-5) for p in places(truth.model.cfg))


def test_masks_that_differ_in_what_they_must_share_are_refused_by_name(truth, pairs, means):
    config = PruneConfig(**QUICK)
    for change in ({"batch_size": 5}, {"sites": ("neuron",), "share_qk": False}, {"schemes": ("stochastic",)}):
        with pytest.raises(ConfigError, match=f"have one {next(iter(change))}, and these have"):
            learn_many(truth.model, pairs, [config, replace(config, **change)], means, generators=seeded(0, 1))
    with pytest.raises(ConfigError, match="two masks share a generator"):
        learn_many(truth.model, pairs, [config] * 2, means, generators=seeded(0) * 2)
    with pytest.raises(ConfigError, match="2 configurations and 1 generators"):
        learn_many(truth.model, pairs, [config] * 2, means, generators=seeded(0))


# -- what a search may be asked for ------------------------------------------------------------------------------------


def test_the_logit_difference_objective_is_the_share_of_the_models_own_that_is_missed(truth, pairs, means):
    search = learn_gates(
        truth.model,
        pairs,
        PruneConfig(**QUICK | {"n_steps": 1, "batch_size": 10, "objective": "logit_difference", "tau_init": -0.5}),
        means,
        generator=seeded(0)[0],
    )  # every gate is shut: the circuit is the bigram row of constants, whose logit difference does not vary
    batch = pairs.both_sides()
    hooks = [(p.hook, lambda x, hook, p=p: means[p].expand_as(flat(x)).view_as(x)) for p in places(truth.model.cfg)]
    with torch.no_grad():
        expected = logit_difference(all_answer_logits(truth.model, batch), batch)
        with truth.model.hooks(fwd_hooks=hooks):
            found = logit_difference(all_answer_logits(truth.model, batch), batch)
    share = float(((found - expected) ** 2).sum() / (expected**2).sum())
    assert search.history.frame.objective[0] == pytest.approx(share, rel=1e-5) and share > 0.5


def test_a_search_stops_once_its_gates_are_quiet_and_not_before_its_noise_is(truth, pairs, means):
    config = PruneConfig(n_steps=24, batch_size=4, noise_until_frac=0.5, k_coef=0.0, stop_after=5)
    stopped = learn_gates(truth.model, pairs, config, means, generator=seeded(0)[0])
    whole = learn_gates(truth.model, pairs, replace(config, stop_after=0), means, generator=seeded(0)[0])
    assert len(stopped.history) == 17 and len(whole.history) == 24  # without a price nothing closes once noise is over
    assert stopped.history.frame.equals(whole.history.frame[:17])


def test_a_mask_that_has_stopped_leaves_the_others_to_go_on_as_they_would(truth, pairs, means):
    configs = [PruneConfig(n_steps=8, batch_size=4, noise=0.0, stop_after=n) for n in (2, 0)]
    short, long = learn_many(truth.model, pairs, configs, means, generators=seeded(0, 1))
    alone = learn_gates(truth.model, pairs, configs[1], means, generator=seeded(1)[0])
    assert (len(short.history), len(long.history)) == (2, 8)
    assert long.history.frame.objective.tolist() == pytest.approx(alone.history.frame.objective.tolist(), abs=1e-6)


def test_shares_of_an_adversary_never_leave_the_unit_interval_and_hurt_more_than_its_start(truth, pairs, means):
    from sparse_interp.interventions import gates as module

    seen, partial = [], module.partial

    def noting(m, baseline, r=None):
        seen.append(r)
        return partial(m, baseline, r)

    config = PruneConfig(n_steps=1, batch_size=8, tau_init=-0.2, noise=0.0, adversary_step_size=0.7)
    fits = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "partial", noting)
        for scheme in ("stochastic", "adversarial"):
            search = learn_gates(truth.model, pairs, replace(config, schemes=(scheme,)), means, generator=seeded(2)[0])
            fits[scheme] = search.history.frame.objective[0]
    shares = torch.cat([r.detach().flatten() for r in seen])
    assert shares.min() >= 0 and shares.max() <= 1 and {0.0, 1.0} <= set(shares.tolist())
    assert fits["adversarial"] > fits["stochastic"] + 1e-3


def test_values_of_prompts_are_those_of_the_prompts_that_a_step_draws(truth, pairs):
    """With every gate shut, and nodes held at what they hold on the twin, the model answers for the twin."""
    config = PruneConfig(n_steps=1, batch_size=10, tau_init=-0.5, noise=0.0)
    search = learn_gates(truth.model, pairs, config, Counterfactual(), generator=seeded(0)[0])
    batch = pairs.both_sides()
    with torch.no_grad():
        reference, twins = (log_softmax(all_answer_logits(truth.model, b), -1) for b in (batch, batch.swapped()))
    kl = (reference.exp() * (reference - twins)).sum(-1).mean()
    assert search.history.frame.objective[0] == pytest.approx(float(kl), rel=1e-4) and kl > 0.1


def test_gates_per_position_need_prompts_of_one_length(truth, pairs, means):
    config = PruneConfig(**QUICK, per_position=True)
    with pytest.raises(TaskError, match="prompts of one length, and these have"):
        learn_gates(truth.model, pairs, config, means, generator=seeded(0)[0])


def test_the_history_of_a_search_draws_itself():
    rows = {"step": [1, 2], "objective": [0.0, 0.4], "open_gates": [8, 4], "price": [0.1, 0.2]}
    history = SearchHistory(pd.DataFrame(rows))
    drawn = [line.get_ydata().tolist() for line in history.plot().lines]
    assert drawn == [pytest.approx([0.0, 0.2]), [1.0, 0.5]]


def test_nodes_of_sites_without_gates_are_not_ranked(truth, pairs, means):
    config = PruneConfig(**QUICK, sites=("neuron",), share_qk=False)
    search = learn_gates(truth.model, pairs, config, means, generator=seeded(0)[0])
    assert {node.site for node in search.order} == {"neuron"} and all(isinstance(n, Node) for n in search.order)
    assert torch.isinf(search.tau[Place(0, "v")]).all()
