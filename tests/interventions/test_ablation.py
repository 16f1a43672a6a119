"""What an ablation means, in sentences, for every baseline and every scheme."""

from dataclasses import replace

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.ablation import Ablation, ablate, ascend, hold, holding_hooks, partial
from sparse_interp.interventions.answers import all_answer_logits, at_answers
from sparse_interp.interventions.baselines import (
    Counterfactual,
    Resample,
    mean_activations,
    position_means,
    task_means,
    zero_values,
)
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, flat, masks, places, width
from sparse_interp.tasks.task import answer_loss, kl_divergence

NODES = (Node(0, "neuron", 1), Node(1, "v", 2))
BASELINES = {
    "zero": lambda model, pairs: zero_values(model),
    "mean over text": lambda model, pairs: mean_activations(model, pairs.clean[:1]),
    "mean over the task": task_means,
    "mean per position": position_means,
    "counterfactual": lambda model, pairs: Counterfactual(),
    "resample": lambda model, pairs: Resample(pairs, 3),
}
SCHEMES = {
    "full": Ablation.full,
    "stochastic": lambda baseline: Ablation.stochastic(baseline, n_draws=1),
    "stochastic, per prompt": lambda baseline: Ablation.stochastic(baseline, n_draws=1, scope="example"),
    "adversarial": lambda baseline: Ablation.adversarial(baseline, n_draws=1, n_steps=1),
    "adversarial, per prompt": lambda baseline: Ablation.adversarial(baseline, n_draws=1, n_steps=1, scope="example"),
}
every_baseline = pytest.mark.parametrize("baseline", BASELINES.values(), ids=BASELINES)
OF_EACH_SHAPE = ("mean over the task", "mean per position", "counterfactual")
"""Values [width], [1 pos width] and [batch pos width], which is all that a scheme can tell apart."""
every_pair = pytest.mark.parametrize(
    ("baseline", "scheme"),
    [(b, s) for b in BASELINES for s in SCHEMES if s == "full" or b in OF_EACH_SHAPE],
)
a_few = pytest.mark.parametrize(
    ("baseline", "scheme"),
    [("mean per position", "stochastic, per prompt"), ("counterfactual", "adversarial"), ("resample", "full")],
)
"""Of all pairs of a baseline and a scheme, enough to see each of both with every kind of model."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def everything(model):
    cfg = hooked(model).cfg
    return [Node(*place, channel) for place in places(cfg) for channel in range(width(cfg, place.site))]


def kept_half(model, seed=0):
    """A random half of every place."""
    cfg, generator = hooked(model).cfg, seeded(seed)
    return {place: torch.rand(width(cfg, place.site), generator=generator) < 0.5 for place in places(cfg)}


def run(model, tokens):
    with torch.no_grad():
        return model(tokens)


def real(pairs, logits):
    """Logits at real tokens."""
    return logits[pairs.attention_mask.bool()]


# -- doing nothing, and doing everything ------------------------------------------------------------------------------


def nothing_changes(model, pairs, ablation):
    before = run(model, pairs.clean)
    with ablate(model, (), ablation, batch=pairs, generator=seeded()):
        assert torch.equal(run(model, pairs.clean), before)
    whole = {place: torch.ones_like(kept) for place, kept in kept_half(model).items()}
    for logits in ablation.answer_logits(model, whole, pairs, generator=seeded()):
        torch.testing.assert_close(logits, all_answer_logits(hooked(model), pairs), atol=1e-6, rtol=1e-5)


@every_pair
def test_ablating_nothing_changes_nothing(plain_model, pairs, baseline, scheme):
    nothing_changes(plain_model, pairs, SCHEMES[scheme](BASELINES[baseline](plain_model, pairs)))


@a_few
def test_ablating_nothing_changes_nothing_in_any_model(any_kind, pairs, baseline, scheme):
    nothing_changes(any_kind, pairs, SCHEMES[scheme](BASELINES[baseline](any_kind, pairs)))


@pytest.mark.parametrize("baseline", ["zero", "mean over text", "mean over the task"])
def test_ablating_everything_leaves_a_prediction_that_the_bigram_row_of_the_last_token_alone_decides(
    any_kind, pairs, baseline
):
    with ablate(any_kind, everything(any_kind), BASELINES[baseline](any_kind, pairs)):
        logits = run(any_kind, pairs.clean)
        other = run(any_kind, pairs.corrupt.roll(1, 0))
    table = getattr(any_kind, "bigram_table", torch.zeros(50, 50))
    constant = logits - table[pairs.clean]
    torch.testing.assert_close(constant, constant[0, 0].expand_as(constant), atol=1e-5, rtol=0)
    rows = {int(token): row for token, row in zip(pairs.clean.flatten(), logits.flatten(0, 1), strict=True)}
    shared = [
        (rows[int(t)], row)
        for t, row in zip(pairs.corrupt.roll(1, 0).flatten(), other.flatten(0, 1), strict=True)
        if int(t) in rows
    ]
    assert len(shared) > 10 and all(torch.equal(a, b) for a, b in shared)
    if hasattr(any_kind, "bigram_table"):
        assert (logits[0, 0] - logits[0, 1]).abs().max() > 0.1


def test_patching_all_nodes_of_the_clean_run_gives_the_clean_logits(any_kind, pairs):
    """The bigram row is no node: it stays that of the token that is there."""
    table = getattr(any_kind, "bigram_table", torch.zeros(50, 50))
    clean = run(any_kind, pairs.clean)
    with ablate(any_kind, everything(any_kind), Counterfactual(), batch=pairs.swapped()):
        found = run(any_kind, pairs.corrupt)
    same = (pairs.clean == pairs.corrupt) & pairs.attention_mask.bool()
    assert torch.equal(found[same], clean[same]) and int(same.sum()) == int(pairs.lengths.sum()) - 3
    expected = clean - table[pairs.clean] + table[pairs.corrupt]
    torch.testing.assert_close(real(pairs, found), real(pairs, expected), atol=1e-5, rtol=0)
    assert (run(any_kind, pairs.corrupt)[same] - clean[same]).abs().max() > 0.01


# -- what is held, and how much of it ---------------------------------------------------------------------------------


@pytest.fixture
def means(plain_model, tokens):
    return mean_activations(plain_model, tokens, batch_size=1)


def test_an_ablated_node_holds_its_mean_everywhere_and_others_of_its_place_are_as_before(plain_model, tokens, means):
    _, before = plain_model.run_with_cache(tokens)
    with ablate(plain_model, NODES[:1], means):
        _, cache = plain_model.run_with_cache(tokens)
    found, hook = cache["blocks.0.mlp.hook_post"], "blocks.0.mlp.hook_post"
    assert torch.equal(found[..., 1], torch.full_like(found[..., 1], means.of(NODES[0])))
    others = [c for c in range(found.shape[-1]) if c != 1]
    assert torch.equal(found[..., others], before[hook][..., others])


@every_baseline
def test_a_node_holds_what_its_baseline_says_at_every_real_position(any_kind, pairs, baseline):
    baseline, place = baseline(any_kind, pairs), Place(1, "k")
    values = baseline[place] if isinstance(baseline.kind, str) and hasattr(baseline, "values") else None
    values = baseline.on(any_kind, pairs)[place] if values is None else values
    seen = {}
    keep = lambda activation, hook: seen.update(k=flat(activation))
    with ablate(any_kind, [Node(1, "k", 2)], baseline, batch=pairs), hooked(any_kind).hooks([(place.hook, keep)]):
        run(any_kind, pairs.clean)
    assert torch.equal(seen["k"][..., 2], values[..., 2].expand(3, 7))


def test_a_share_is_left_of_the_runs_own_value():
    """value = b + (m + (1 - m) r) (x - b), in float64 and by hand, with its gradients."""
    x, b = torch.tensor([[[3.0, -1.0, 0.5]]], dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    m = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    value = partial(m, b, r)(x, HookPoint())[0, 0]
    torch.testing.assert_close(value, torch.tensor([3.0, 0.5, 4 + 0.85 * -3.5], dtype=torch.float64))
    by_m, by_r = torch.autograd.grad(value.sum(), [m, r])
    torch.testing.assert_close(by_m, torch.tensor([0.7 * 2, 0.5 * -3, 0.2 * -3.5], dtype=torch.float64))
    torch.testing.assert_close(by_r, torch.tensor([0.0, 1 * -3, 0.75 * -3.5], dtype=torch.float64))
    kept = m == 1
    assert torch.equal(hold(kept, b, r)(x, HookPoint())[0, 0][:2].detach(), value[:2].detach())
    assert torch.equal(partial(m, b)(x, HookPoint())[0, 0].detach(), (b + m * (x[0, 0] - b)).detach())


def test_shares_are_the_runs_own_and_everything_left_is_the_model(plain_model, pairs, means):
    """With r = 1 nothing is ablated; with r in between a later layer sees what the ablation of the first made of it."""
    kept = kept_half(plain_model)
    whole = {place: torch.ones(len(mask)) for place, mask in kept.items()}
    with plain_model.hooks(fwd_hooks=holding_hooks(kept, means, whole)):
        torch.testing.assert_close(run(plain_model, pairs.clean), run(plain_model, pairs.clean), atol=1e-5, rtol=0)
    nodes = [Node(0, "neuron", c) for c in range(20)]
    kept = {place: ~mask for place, mask in masks(nodes, plain_model.cfg).items()}
    with ablate(plain_model, nodes, Ablation.stochastic(means), generator=seeded(2)):
        _, cache = plain_model.run_with_cache(pairs.clean)
    _, before = plain_model.run_with_cache(pairs.clean)
    r = torch.rand(1, 1, 20, generator=seeded(2))
    place = Place(0, "neuron")
    expected = means[place] + r * (before[place.hook] - means[place])
    torch.testing.assert_close(cache[place.hook], expected)


# -- with blocks ------------------------------------------------------------------------------------------------------


@a_few
def test_the_model_is_restored_even_when_the_block_raises_and_ablations_nest(any_kind, pairs, baseline, scheme):
    ablation = SCHEMES[scheme](BASELINES[baseline](any_kind, pairs))
    block = lambda nodes, seed: ablate(any_kind, nodes, ablation, batch=pairs, generator=seeded(seed))
    before = run(any_kind, pairs.clean)
    with pytest.raises(RuntimeError), block(NODES, 0):
        raise RuntimeError
    assert torch.equal(run(any_kind, pairs.clean), before)
    with block(NODES[:1], 0):
        outer = run(any_kind, pairs.clean)
        with block(NODES[1:], 1):
            assert not torch.equal(run(any_kind, pairs.clean), outer)
        assert torch.equal(run(any_kind, pairs.clean), outer)
    assert torch.equal(run(any_kind, pairs.clean), before) and not torch.equal(outer, before)


def test_constants_of_two_blocks_are_those_of_one(plain_model, tokens, means):
    with ablate(plain_model, NODES, means):
        together = run(plain_model, tokens)
    with ablate(plain_model, NODES[:1], means), ablate(plain_model, NODES[1:], means):
        assert torch.equal(run(plain_model, tokens), together)


def test_the_mode_and_the_parameters_are_as_they_were_after_an_adversary(plain_model, pairs):
    plain_model.train()
    asked = [p.requires_grad for p in plain_model.parameters()]
    ablation = SCHEMES["adversarial"](Counterfactual())
    ablation.answer_logits(plain_model, kept_half(plain_model), pairs, generator=seeded())
    assert plain_model.training and [p.requires_grad for p in plain_model.parameters()] == asked
    assert all(p.grad is None for p in plain_model.parameters())


@pytest.mark.parametrize("site", ["attn_read", "q", "v", "attn_write", "mlp_read", "neuron", "mlp_write"])
def test_an_ablation_never_writes_into_what_lower_layers_hold(plain_model, pairs, site):
    """Neither into a cache of another run, nor into what stands before the place in this one."""
    _, before = plain_model.run_with_cache(pairs.clean)
    copies = {name: tensor.clone() for name, tensor in before.items()}
    nodes = [Node(1, site, channel) for channel in range(12)]
    with ablate(plain_model, nodes, Ablation.stochastic(Counterfactual()), batch=pairs, generator=seeded()):
        _, cache = plain_model.run_with_cache(pairs.clean)
    assert all(torch.equal(before[name], copies[name]) for name in before)
    names = list(copies)
    upstream = names[: names.index(Place(1, site).hook)]
    assert len(upstream) > 10 and all(torch.equal(cache[name], copies[name]) for name in upstream)
    assert not torch.equal(cache[Place(1, site).hook], copies[Place(1, site).hook])


def test_values_of_prompts_are_those_of_the_model_whatever_else_is_ablated(any_kind, pairs):
    for baseline in (Counterfactual(), Resample(pairs, 3)):
        alone = baseline.on(any_kind, pairs)
        with ablate(any_kind, everything(any_kind), baseline, batch=pairs):
            inside = baseline.on(any_kind, pairs)
            held = run(any_kind, pairs.clean)
        assert all(torch.equal(inside[place], alone[place]) for place in alone)
        assert not torch.equal(held, run(any_kind, pairs.clean))


# -- padding ----------------------------------------------------------------------------------------------------------


@every_baseline
def test_a_padded_batch_gives_what_its_prompts_give_one_by_one(any_kind, pairs, alone, baseline):
    ablation, kept = SCHEMES["stochastic"](baseline(any_kind, pairs)), kept_half(any_kind)
    together = ablation.answer_logits(any_kind, kept, pairs, generator=seeded())
    for row, pair in enumerate(alone):
        one = ablation.answer_logits(any_kind, kept, pair, generator=seeded())
        torch.testing.assert_close(together[:, row], one[:, 0], atol=1e-5, rtol=1e-4)


@every_pair
def test_more_padding_and_other_padding_change_nothing(plain_model, pairs, baseline, scheme):
    padding_changes_nothing(plain_model, pairs, SCHEMES[scheme](BASELINES[baseline](plain_model, pairs)))


@a_few
def test_more_padding_and_other_padding_change_nothing_in_any_model(any_kind, pairs, baseline, scheme):
    padding_changes_nothing(any_kind, pairs, SCHEMES[scheme](BASELINES[baseline](any_kind, pairs)))


def padding_changes_nothing(model, pairs, ablation):
    kept = kept_half(model)
    found = ablation.answer_logits(model, kept, pairs, generator=seeded())
    noise = torch.randint(50, (3, 9), generator=seeded(1))
    where = torch.arange(9) < pairs.lengths[:, None]
    sides = [torch.where(where, torch.cat([side, noise[:, :2]], 1), noise) for side in (pairs.clean, pairs.corrupt)]
    padded = replace(pairs, clean=sides[0], corrupt=sides[1])
    more = ablation.answer_logits(model, kept, padded, generator=seeded())
    torch.testing.assert_close(found, more, atol=1e-5, rtol=1e-4)


@every_baseline
def test_answers_are_those_of_the_whole_run_at_the_last_token(any_kind, pairs, baseline):
    """The last read is made at the answer alone, and its values are those of that position."""
    ablation, kept = Ablation.full(baseline(any_kind, pairs)), kept_half(any_kind)
    with hooked(any_kind).hooks(ablation.hooks(any_kind, kept, pairs)):
        whole = run(any_kind, pairs.clean)[torch.arange(3), pairs.last]
    found = ablation.answer_logits(any_kind, kept, pairs)[0]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_a_block_around_the_runs_sees_prompts_by_position(plain_model, pairs):
    """Where somebody else has hooks nothing is packed: they may tell prompts apart."""
    means, kept, shapes = task_means(plain_model, pairs), kept_half(plain_model), []

    def seeing(model):
        return model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: shapes.append(x.shape) or x)])

    for ablation in (Ablation.full(means), Ablation.adversarial(means, n_steps=1, n_draws=1)):
        expected = ablation.answer_logits(plain_model, kept, pairs, generator=seeded())
        found = ablation.answer_logits(plain_model, kept, pairs, generator=seeded(), within=seeing)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert {shape[:2] for shape in shapes} == {(3, int(pairs.lengths.max()))}


def test_prompts_of_many_chunks_keep_their_order_and_their_shares(plain_model, pairs, monkeypatch):
    ablation, kept = SCHEMES["adversarial, per prompt"](Counterfactual()), kept_half(plain_model)
    batch = pairs.both_sides()
    together = ablation.answer_logits(plain_model, kept, batch, generator=seeded())
    monkeypatch.setattr("sparse_interp.interventions.ablation.ANSWERS_AT_ONCE", 2)
    torch.testing.assert_close(ablation.answer_logits(plain_model, kept, batch, generator=seeded()), together)


# -- the adversary ----------------------------------------------------------------------------------------------------


def cost(model, logits, pairs, loss=kl_divergence):
    return loss(all_answer_logits(hooked(model), pairs), logits, pairs)


def never_milder(model, pairs, seed):
    kept, means = kept_half(model, seed), task_means(model, pairs)
    worst = Ablation.adversarial(means, n_steps=3, n_draws=2)
    worst = cost(model, worst.answer_logits(model, kept, pairs, generator=seeded(seed))[0], pairs).mean()
    same = Ablation.stochastic(means, n_draws=2).answer_logits(model, kept, pairs, generator=seeded(seed))
    other = Ablation.stochastic(means, n_draws=3).answer_logits(model, kept, pairs, generator=seeded(99 + seed))
    full = Ablation.full(means).answer_logits(model, kept, pairs)
    at_end = {place: mask if place.site == "final_read" else torch.ones_like(mask) for place, mask in kept.items()}
    all_but_end = Ablation.full(means).answer_logits(model, at_end, pairs)
    assert worst >= cost(model, all_but_end[0], pairs).mean() - 1e-6
    assert all(worst >= cost(model, logits, pairs).mean() - 1e-6 for logits in (*same, *other, *full))
    return bool(worst > max(cost(model, logits, pairs).mean() for logits in (*same, *full)) + 1e-3)


def test_adversarial_is_never_milder_than_stochastic_or_full(plain_model, pairs):
    worse = [never_milder(plain_model, pairs, seed) for seed in range(5)]
    assert sum(worse) >= 3  # the ascent gets somewhere


def test_adversarial_is_never_milder_in_any_model(any_kind, pairs):
    assert never_milder(any_kind, pairs, 0)


def test_a_scheme_of_its_own_is_never_milder_for_any_prompt_and_is_worse_than_a_shared_one(plain_model, pairs):
    kept, means = kept_half(plain_model), task_means(plain_model, pairs)
    found = {}
    for scope in ("batch", "example"):
        ablation = Ablation.adversarial(means, n_steps=4, n_draws=2, scope=scope)
        found[scope] = cost(plain_model, ablation.answer_logits(plain_model, kept, pairs, generator=seeded())[0], pairs)
    draws = Ablation.stochastic(means, n_draws=2, scope="example")
    for logits in draws.answer_logits(plain_model, kept, pairs, generator=seeded()):
        assert (found["example"] >= cost(plain_model, logits, pairs) - 1e-6).all()
    assert found["example"].mean() > found["batch"].mean()


def test_an_adversary_raises_the_loss_that_it_is_given(plain_model, pairs):
    kept, means = kept_half(plain_model), task_means(plain_model, pairs)
    task_loss = lambda reference, logits, batch: answer_loss(logits, batch)
    found = []
    for loss in (task_loss, kl_divergence):
        ablation = Ablation.adversarial(means, n_steps=5, n_draws=1, loss=loss)
        found.append(ablation.answer_logits(plain_model, kept, pairs, generator=seeded())[0])
    assert answer_loss(found[0], pairs).mean() > answer_loss(found[1], pairs).mean() + 1e-3
    assert cost(plain_model, found[0], pairs).mean() < cost(plain_model, found[1], pairs).mean() - 1e-3


def test_the_hooks_of_an_adversary_are_its_worst_scheme(plain_model, pairs):
    ablation, kept = SCHEMES["adversarial, per prompt"](Counterfactual()), kept_half(plain_model)
    with plain_model.hooks(ablation.hooks(plain_model, kept, pairs, generator=seeded())):
        whole = run(plain_model, pairs.clean)[torch.arange(3), pairs.last]
    found = ablation.answer_logits(plain_model, kept, pairs, generator=seeded())[0]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_ascent_finds_the_worst_corner_of_a_plain_function_scheme_by_scheme():
    """Two schemes of three nodes, each a linear loss in two parts: the worst is 1 where its weight is positive."""
    place, weight = Place(0, "neuron"), torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 0.0]])
    parts = [lambda r: (r[place] * weight).sum(1), lambda r: (r[place] * weight).sum(1)]
    start = {place: torch.full((2, 3), 0.5)}
    worst, losses = ascend(parts, start, n_steps=6, step_size=0.1)
    torch.testing.assert_close(worst[place], torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.5]]))
    torch.testing.assert_close(losses, torch.tensor([3.0, 6.0]))
    bounded, _ = ascend(parts, start, n_steps=2, step_size=0.1)
    torch.testing.assert_close(bounded[place][0], torch.tensor([0.7, 0.3, 0.7]))
    assert torch.equal(start[place], torch.full((2, 3), 0.5))


def test_ascent_keeps_the_best_of_its_steps_and_the_start_among_them():
    place = Place(0, "neuron")
    peak = lambda r: -(r[place] - torch.tensor([[0.5], [0.62]])).abs().sum(1)
    worst, losses = ascend([peak], {place: torch.tensor([[0.5], [0.5]])}, n_steps=5, step_size=0.1)
    torch.testing.assert_close(worst[place], torch.tensor([[0.5], [0.6]]))
    torch.testing.assert_close(losses, torch.tensor([0.0, -0.02]))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_node_that_the_model_lacks_is_refused(plain_model, means):
    with pytest.raises(CircuitError, match="exists in layers"), ablate(plain_model, [Node(9, "q", 0)], means):
        pass
    assert sum(int(m.sum()) for m in masks(NODES, plain_model.cfg).values()) == len(NODES)


def test_values_of_other_prompts_than_those_that_run_are_refused(plain_model, pairs):
    with (
        ablate(plain_model, NODES, Counterfactual(), batch=pairs),
        pytest.raises(CircuitError, match="of 3 prompts of 7 positions, and the run has 1 of 4"),
    ):
        plain_model(pairs.clean[:1, :4])
    with pytest.raises(CircuitError, match="counterfactual: the values depend on the prompts; pass batch="):
        Ablation.counterfactual().hooks(plain_model, kept_half(plain_model))


def test_shares_need_a_generator_and_an_adversary_the_prompts(plain_model, pairs, means):
    kept = kept_half(plain_model)
    with pytest.raises(CircuitError, match="pass generator=, which draws the shares"):
        Ablation.stochastic(means).answer_logits(plain_model, kept, pairs)
    with pytest.raises(CircuitError, match="the shares depend on the prompts; pass batch="):
        Ablation.adversarial(means).hooks(plain_model, kept, generator=seeded())
    with pytest.raises(ConfigError, match="scheme='half' and scope='batch': a scheme is one of full"):
        Ablation(means, "half")
    with pytest.raises(ConfigError, match="n_draws=0"):
        Ablation.stochastic(means, n_draws=0)


def test_values_at_answers_are_cut_and_gathered(pairs):
    values = {Place(0, "neuron"): torch.rand(3, 9, 4), Place(2, "final_read"): torch.rand(1, 9, 4)}
    found = at_answers(values, pairs)
    assert torch.equal(found[Place(0, "neuron")], values[Place(0, "neuron")][:, :7])
    assert torch.equal(found[Place(2, "final_read")], values[Place(2, "final_read")][0, pairs.last][:, None])


def test_the_name_of_an_ablation_says_scheme_scope_and_baseline(plain_model, means):
    assert Ablation.full(means).name == "full, mean over 21 tokens of text"
    assert Ablation.counterfactual().name == "full, counterfactual"
    assert "20 steps of 0.1 from 8 draws, one scheme per prompt" in Ablation.adversarial(means, scope="example").name
