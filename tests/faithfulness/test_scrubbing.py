"""What nodes of a hand-built model mean is confirmed, what they do not mean is not; runs are those of a plain loop."""

import pandas as pd
import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.faithfulness.scrubbing import Prompt, _Claims, _Scrubbing, scrub
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.interventions.edges import edges_among
from sparse_interp.model.sites import Node, NodeAt, flat, masks
from sparse_interp.tasks.task import answer_loss


@pytest.fixture(scope="module")
def means(truth):
    return mean_activations(truth.model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def key(truth, means):
    return Circuit.of_nodes(truth.model, truth.nodes, means)


@pytest.fixture
def pairs(truth, generator):
    return truth.task.batch(16, "test", generator=generator)


def place(truth):
    """Where the quote stands."""
    quotes = {truth.task.tokenizer.encode(text)[0] for text in (' "', " '")}
    return lambda prompt: next(i for i, token in enumerate(prompt.tokens) if token in quotes)


def kind(prompt):
    """Which quote it is."""
    return '"' in prompt.text


def recovered(truth, circuit, hypothesis, pairs, **more):
    seed = torch.Generator().manual_seed(1)
    return scrub(truth.model, circuit, hypothesis, pairs, n_draws=2, generator=seed, progress=False, **more)


def test_what_the_nodes_of_a_key_mean_is_all_that_it_takes(truth, key, pairs):
    at = place(truth)
    found = recovered(truth, key, {node: lambda p: (at(p), kind(p)) for node in truth.nodes}, pairs)
    assert found.recovered.mean == pytest.approx(1, abs=1e-4) and found.recovered.low > 0.999
    rows = found.frame.set_index("condition")
    assert rows.accuracy["scrubbed"] == 1 and rows.kl_nats["scrubbed"] < 1e-4 and rows.kl_nats["shuffled"] > 1
    assert 0.2 < rows.accuracy["shuffled"] < 0.8 and rows.loss_recovered["shuffled"] == 0
    assert found.nodes.frame.exchanged_frac.min() > 0.5 and found.n_prompts == 32
    assert len(found.plot().patches) == 5


def test_a_meaning_that_leaves_something_out_is_not(truth, key, pairs):
    at = place(truth)
    for wrong in (at, lambda p: p.tokens[1]):
        found = recovered(truth, key, dict.fromkeys(truth.nodes, wrong), pairs)
        assert found.recovered.mean < 0.8


def test_the_claim_that_is_wrong_is_told_from_those_that_are_right(truth, key, pairs):
    """The mark says where a quote stands and not which; the type says both."""
    at, channels = place(truth), truth.channels
    mark, type_ = channels.index("is_quote"), channels.index("type")
    claims = {Node(0, "mlp_write", mark): at, Node(1, "v", 0): at}
    claims[Node(1, "attn_read", type_)] = lambda p: (at(p), kind(p))
    found = recovered(truth, key, claims, pairs).nodes.frame.set_index("name")
    assert found.loss_recovered[f"L0.mlp_write.{mark}"] == pytest.approx(1, abs=1e-4)
    assert found.loss_recovered[f"L1.attn_read.{type_}"] == pytest.approx(1, abs=1e-4)
    assert found.loss_recovered["L1.v.0"] < 0.6
    assert found.n_values[f"L1.attn_read.{type_}"] == 2 * found.n_values["L1.v.0"]


def test_a_node_without_a_claim_is_resampled(truth, key, pairs):
    at = place(truth)
    claims = {node: lambda p: (at(p), kind(p)) for node in truth.nodes if node != Node(1, "v", 0)}
    rows = recovered(truth, key, claims, pairs).frame.set_index("condition").loss_recovered
    assert rows["scrubbed"] < 0.7 and rows["resampled"] < 0.7 and rows["exchanged"] == pytest.approx(1, abs=1e-4)


def test_a_cut_edge_carries_what_its_source_holds_in_another_prompt(truth, means, pairs):
    at = place(truth)
    among = edges_among(truth.model, masks(truth.nodes, truth.model.cfg))
    claims = {node: lambda p: (at(p), kind(p)) for node in truth.nodes}
    whole = Circuit.of_nodes(truth.model, truth.nodes, means, edges=among)
    assert recovered(truth, whole, claims, pairs).recovered.mean == pytest.approx(1, abs=1e-4)
    cut = {matrix: torch.zeros_like(mask) if matrix.name == "attn.W_O" else mask for matrix, mask in among.items()}
    lacking = Circuit.of_nodes(truth.model, truth.nodes, means, edges=cut)
    assert recovered(truth, lacking, claims, pairs).recovered.mean < 0.7


def test_at_positions_a_claim_is_about_those_and_the_others_are_resampled(truth, means, generator):
    """Where a quote always stands at 3 and is asked for at 6, what a node holds elsewhere means nothing."""
    pairs = truth.task.batch(96, "test", generator=generator)
    pairs = pairs.rows((pairs.template == 0).nonzero().flatten())
    asked, claims = ("attn_write", "final_read"), dict.fromkeys(truth.nodes, kind)

    def circuit(elsewhere=()):
        spots = [NodeAt(*n, 6 if n.site in asked else 2 if n in elsewhere else 3) for n in truth.nodes]
        return Circuit.of_nodes(truth.model, spots, means, n_pos=7)

    assert recovered(truth, circuit(), claims, pairs).recovered.mean == pytest.approx(1, abs=1e-3)
    assert recovered(truth, circuit([Node(1, "v", 0)]), claims, pairs).recovered.mean < 0.8


def test_scrubbed_runs_are_those_of_the_recursion_written_out(truth, means, generator):
    """One prompt at a time: a node's value is made in a run of its partner, in which all nodes before are scrubbed."""
    nodes = [Node(0, "neuron", 1), Node(0, "mlp_write", truth.channels.index("type")), Node(1, "v", 0)]
    circuit = Circuit.of_nodes(truth.model, truth.nodes, means)
    batch = truth.task.batch(6, "test", generator=generator).both_sides()
    claims = _Claims.of(dict.fromkeys(nodes, kind), batch, truth.model.tokenizer)
    run = _Scrubbing(truth.model, circuit, claims, batch)
    partners = run.drawn(generator)
    with torch.no_grad():
        found = run.logits(partners, nodes, exchanged=True, resampled=True)

    def plain(row, hooks=()):
        with torch.no_grad(), truth.model.hooks(list(hooks)):
            _, cache = truth.model.run_with_cache(batch.clean[row : row + 1, : int(batch.lengths[row])])
        return cache

    def scrubbed_run(row, n_nodes):
        """The cache of a prompt in which the first `n_nodes` are scrubbed, and the others as they come."""
        other, hooks = plain(int(partners[None][row])), []
        taken = {node: scrubbed_run(int(partners[node][row]), i) for i, node in enumerate(nodes[:n_nodes])}
        for here in circuit.inside:

            def hook(x, hook, here=here):
                held = flat(other[here.hook]).clone()
                for node in nodes:
                    if (node.layer, node.site) == here:
                        source = flat(taken[node][here.hook]) if node in taken else flat(x)
                        held[..., node.channel] = source[..., node.channel]
                return held.view_as(x)

            hooks.append((here.hook, hook))
        return plain(row, hooks)

    for row in range(3):
        with torch.no_grad():
            expected = truth.model.unembed(scrubbed_run(row, len(nodes))["unembed.hook_in"])[0, -1]
        torch.testing.assert_close(found[row], expected + bigram(truth, batch, row), atol=1e-5, rtol=1e-5)
    own = all_answer_logits(truth.model, batch)
    assert float(answer_loss(found, batch).mean()) > float(answer_loss(own, batch).mean()) + 0.01


def bigram(truth, batch, row):
    last = batch.clean[row, int(batch.lengths[row]) - 1]
    return truth.model.bigram_table[last] if truth.model.cfg.bigram else 0.0


def test_partners_mean_the_same_and_have_the_same_length_and_the_random_ones_are_others(truth, generator):
    batch = truth.task.batch(16, "test", generator=generator).both_sides()
    claims = _Claims.of({Node(1, "v", 0): kind}, batch, truth.model.tokenizer)
    run = _Scrubbing(truth.model, Circuit.of_nodes(truth.model, truth.nodes, run_means(truth)), claims, batch)
    meant = torch.tensor([kind(Prompt(truth.task.tokenizer.decode(row), (), 0, 0, 0)) for row in batch.clean.tolist()])
    met = set()
    for _ in range(20):
        partners = run.drawn(generator)
        same, other = partners[Node(1, "v", 0)], partners[None]
        assert torch.equal(meant[same], meant) and torch.equal(batch.lengths[same], batch.lengths)
        assert torch.equal(batch.lengths[other], batch.lengths) and (other != torch.arange(len(batch))).all()
        met.add(int(same[0]))
    assert len(met) > 3


def run_means(truth):
    return mean_activations(truth.model, truth.blocks(4, generator=torch.Generator().manual_seed(0)))


def test_a_bridge_gives_what_our_model_gives(dense_truth, truth):
    tables = []
    for model in dense_truth:
        seed = torch.Generator().manual_seed(0)
        circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, truth.blocks(8, generator=seed)))
        pairs = truth.task.batch(6, "test", generator=seed)
        claims = {Node(1, "v", 0): lambda p: p.answer, Node(0, "neuron", 1): lambda p: p.template}
        tables.append(scrub(model, circuit, claims, pairs, n_draws=2, generator=seed, progress=False).frame)
    pd.testing.assert_frame_equal(*tables, atol=1e-4, rtol=1e-4)


def test_claims_are_about_nodes_of_the_circuit(truth, key, pairs, generator):
    with pytest.raises(CircuitError, match="L0.neuron.9 is claimed"):
        scrub(truth.model, key, {Node(0, "neuron", 9): kind}, pairs, generator=generator)
    with pytest.raises(ConfigError, match="n_draws=0"):
        scrub(truth.model, key, {}, pairs, n_draws=0, generator=generator)
    other = ground_truth("quote")
    other.model.unembed.W_U.data *= 2
    with pytest.raises(CircuitError, match="weights"):
        scrub(other.model, key, {}, pairs, generator=generator)
