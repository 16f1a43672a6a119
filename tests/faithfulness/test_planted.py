"""A hidden model does what it did, its key is in other places, and what is around it is alive and no part of it."""

from dataclasses import replace

import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import (
    HARMFUL,
    HARMLESS,
    all_nodes,
    edges_among,
    effects_alone,
    ground_truth,
    key_effects,
    logits_of,
    nodes_outside,
    spread,
)
from sparse_interp.faithfulness.planted import DEAD_BIAS, TOLERANCE_NATS, PlantConfig, planted
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import WIRES, Node
from sparse_interp.tasks.task import answer_loss, is_correct, kl_divergence

SMALL = PlantConfig(n_layers=3, d_model=32, n_heads=6, d_mlp=20, density=0.2)
built = {}


def hidden(name, config=SMALL, seed=0):
    if (name, config, seed) not in built:
        generator = torch.Generator().manual_seed(seed)
        built[name, config, seed] = planted(ground_truth(name), config, generator=generator)
    return built[name, config, seed]


def measured(truth, generator):
    means = mean_activations(truth.model, truth.blocks(32, generator=generator), batch_size=128)
    return truth.task.batch(6, "test", generator=generator).both_sides(), means


@pytest.mark.parametrize("name", ["quote", "mlp_gate", "two_hop", "distractor", "attention_copy"])
def test_a_hidden_model_gives_the_probabilities_that_it_gave_by_itself(name, generator):
    truth, host = ground_truth(name), hidden(name)
    batch = truth.task.batch(24, "shifted", generator=generator)
    logits = logits_of(host.model, batch)
    assert is_correct(logits, batch).min() == 1
    assert kl_divergence(logits_of(truth.model, batch), logits, batch).max() < 1e-3
    assert host.model.cfg.d_model == SMALL.d_model and host.model.cfg.n_layers == SMALL.n_layers


@pytest.mark.parametrize("name", ["mlp_gate", "two_copies"])
def test_the_key_of_a_hidden_model_is_one_and_nothing_of_the_host_is_in_it(name, generator):
    truth, host = ground_truth(name), hidden(name)
    batch, means = measured(host, generator)
    for key, own in zip(host.keys, truth.keys, strict=True):
        assert len(key.nodes) == len(own.nodes) and len(key.edges) == len(own.edges)
        assert key.edges <= edges_among(host.model, key.nodes)
        kl = key_effects(host, key, batch, means)
        assert kl.whole < HARMLESS and min(kl.without.values()) > HARMFUL
    alone = effects_alone(host, batch, means)
    matter = {node for node, nats in alone.items() if nats > HARMFUL}
    assert matter == frozenset.union(*(key.nodes for key in host.keys)) - host.repaired
    assert max(nats for node, nats in alone.items() if node not in matter) < HARMLESS


def test_a_key_keeps_the_names_and_weights_of_what_it_consists_of():
    truth, host = ground_truth("two_hop"), hidden("two_hop")

    def named(found):
        return sorted((n.site, found.channels[n.channel]) for n in found.nodes if n.site.endswith(("read", "write")))

    assert named(host) == named(truth)
    weights = sorted(round(w.item(), 3) for w in weights_on(host, host.edges))
    assert weights == sorted(round(w.item(), 3) for w in weights_on(truth, truth.edges))


def weights_on(truth, edges):
    for source, target in edges:
        wire = next(wire for wire in WIRES if (wire.source.name, wire.target.name) == (source.site, target.site))
        yield wire.weight(truth.model.layers[source.layer])[source.channel, target.channel]


def test_most_of_a_host_is_alive_as_sparse_as_asked_and_in_no_key(generator):
    host = hidden("quote")
    deviation = spread(host, 16, generator=generator)
    active = [node for node in all_nodes(host.model.cfg) if deviation.of(node) > 0.1 and node not in host.nodes]
    assert len(active) > 10 * len(host.nodes)
    (other,) = set(range(SMALL.n_layers)) - {node.layer for node in host.nodes if node.site != "final_read"}
    share = (host.model.layers[other].mlp.W_in != 0).float().mean().item()
    assert share == pytest.approx(SMALL.density, rel=0.3)


def test_a_decoy_attends_as_a_head_of_the_hidden_model_and_reads_the_same(generator):
    host = hidden("attention_copy")
    (layer,) = {node.layer for node in host.nodes if node.site == "k"}
    own = {node.channel // host.model.cfg.d_head for node in host.nodes if node.site == "v"}
    _, cache = host.model.run_with_cache(host.task.batch(8, generator=generator).clean)
    pattern, z, attn = cache["pattern", layer], cache["z", layer], host.model.layers[layer].attn
    written = {node.channel for node in host.nodes if node.site == "attn_write"}
    twins = [
        head
        for head in set(range(host.model.cfg.n_heads)) - own
        for true in own
        if torch.equal(pattern[:, head], pattern[:, true]) and torch.equal(z[:, :, head], z[:, :, true])
    ]
    assert twins and all(attn.W_O[head].abs().sum() > 0 for head in twins)
    assert all(not attn.W_O[head][:, sorted(written)].any() for head in twins)


def test_some_neurons_of_the_host_never_fire_and_point_at_the_key(generator):
    host = hidden("quote")
    deviation = spread(host, 16, generator=generator)
    written = sorted({n.channel for n in host.nodes if n.site in ("attn_write", "mlp_write")})
    for layer, block in enumerate(host.model.layers):
        dead = (block.mlp.b_in == DEAD_BIAS).nonzero()[:, 0]
        assert len(dead) and (block.mlp.W_out[dead][:, written] == 4).any(1).all()
        assert all(deviation.of(Node(layer, "neuron", int(neuron))) == 0 for neuron in dead)


def test_noise_reaches_the_key_and_the_key_is_right_up_to_the_tolerance(generator):
    host = hidden("quote", replace(SMALL, noise=0.01))
    batch, means = measured(host, generator)
    kl = key_effects(host, host.keys[0], batch, means)
    assert 1e-6 < kl.whole < TOLERANCE_NATS and min(kl.without.values()) > HARMFUL
    free = [i for i, name in enumerate(host.channels) if not name]
    with ablate(host.model, [Node(0, "attn_read", channel) for channel in free], means):
        changed = logits_of(host.model, batch)
    assert kl_divergence(logits_of(host.model, batch), changed, batch).max() > 1e-7


def test_a_host_in_which_the_key_is_none_is_refused(generator):
    with pytest.raises(CircuitError, match="nats"):
        planted(ground_truth("bracket_depth"), replace(SMALL, noise=1.0), generator=generator)


def test_a_host_without_room_is_refused_with_the_size_that_it_needs(generator):
    for wrong, needed in (("n_layers", 2), ("d_model", 17), ("n_heads", 4), ("d_mlp", 10)):
        with pytest.raises(ConfigError, match=f"{wrong}=1 is too small.*{needed}"):
            planted(ground_truth("quote"), replace(SMALL, **{wrong: 1}), generator=generator)
    with pytest.raises(ConfigError, match="density=0"):
        PlantConfig(density=0.0)


def test_the_generator_decides_where_a_model_is_hidden():
    same = [hidden("quote"), planted(ground_truth("quote"), SMALL, generator=torch.Generator().manual_seed(0))]
    for a, b in zip(*(truth.model.parameters() for truth in same), strict=True):
        assert torch.equal(a, b)
    assert same[0].nodes == same[1].nodes
    assert hidden("quote", seed=1).nodes != same[0].nodes


def test_of_two_opposed_heads_one_is_enough_with_the_other_held_and_both_are_nothing(generator):
    host = hidden("attention_copy", replace(SMALL, n_opposed=1))
    batch, means = measured(host, generator)
    cfg, layer = host.model.cfg, next(node.layer for node in host.nodes if node.site == "v")
    (true,) = {node.channel // cfg.d_head for node in host.nodes if node.site == "v"}
    out = host.model.layers[layer].attn.W_O.detach()
    half, against = (next(h for h in range(cfg.n_heads) if torch.equal(out[h], c * out[true])) for c in (0.5, -0.5))
    outside = nodes_outside(host, host.keys[0])

    def moved(node, head):
        in_head = node.site in ("k", "v")
        return node._replace(channel=node.channel + (head - true) * cfg.d_head) if in_head else node

    for kept, extra, enough in ((half, [], True), (half, [against], False), (true, [half, against], True)):
        keys = [{moved(node, head) for node in host.nodes} for head in (kept, *extra)]
        with ablate(host.model, {*outside, *host.nodes} - set().union(*keys), means):
            loss = answer_loss(logits_of(host.model, batch), batch).mean()
        assert loss < 0.05 if enough else loss > 0.5, (kept, extra)
