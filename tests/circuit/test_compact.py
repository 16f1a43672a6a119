"""Compact circuits: the logits of `running`, from a model of which little is left."""

import copy

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, TokenizerError
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.edges import edges_among
from sparse_interp.model.sites import NODE_SITES, Node, NodeAt, NodeValues, masks, places, width

MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [1] * 5 + [0] * 2])
SHARES = (1.0, 0.6, 0.3, 0.1)


def thinned(model, share):
    """The model in float64, of whose matrices a share of entries is not zero."""
    model, draw = copy.deepcopy(model).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "W_" in name:
                p *= torch.rand(p.shape, generator=draw) < share
    return model


@pytest.fixture
def sparse(make_model):
    """`sparse(**changes)`: a model in float64 of whose matrices two entries in five are not zero."""
    return lambda **changes: thinned(make_model(**changes), 0.4)


def means_of(model):
    blocks = torch.randint(model.cfg.d_vocab, (4, 16), generator=torch.Generator().manual_seed(5))
    return mean_activations(model, blocks)


def assert_runs_as(circuit, model, tokens, *attention_masks, atol=1e-10):
    """That the compact circuit has the logits of the running one, everywhere."""
    compact = circuit.compact(model)
    for mask in attention_masks:
        with torch.no_grad(), circuit.running(model):
            expected = model(tokens, attention_mask=mask)
        torch.testing.assert_close(compact(tokens, attention_mask=mask), expected, atol=atol, rtol=0)
    return compact


def test_a_compact_circuit_has_the_logits_of_the_running_one(any_model, some_nodes, tokens):
    for share, density in zip(SHARES, (1.0, 0.4, 0.4, 0.15), strict=True):
        model = thinned(any_model, density)
        circuit = Circuit.of_nodes(model, some_nodes(model, share, seed=int(10 * share)), means_of(model))
        assert_runs_as(circuit, model, tokens, None, MASK)


CUT = {
    "plain": {},
    "no sink": {"sink": False},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
    "no AbsTopK": {"afrac": None},
}


@pytest.mark.parametrize("kind", CUT, ids=str)
def test_cut_edges_carry_their_baseline_in_a_compact_circuit_too(kind, sparse, some_nodes, tokens):
    model = sparse(**CUT[kind])
    draw = torch.Generator().manual_seed(7)
    for share in (1.0, 0.5):
        nodes = some_nodes(model, share)
        among = edges_among(model, masks(nodes, model.cfg))
        listed = {matrix: mask & (torch.rand(mask.shape, generator=draw) < 0.5) for matrix, mask in among.items()}
        circuit = Circuit.of_nodes(model, nodes, means_of(model), edges=listed)
        whole = Circuit.of_nodes(model, nodes, means_of(model))
        compact = assert_runs_as(circuit, model, tokens, None, MASK)
        assert not torch.allclose(compact(tokens), whole.compact(model)(tokens)), "cutting edges changed nothing"


def test_one_node_at_a_time_is_in_or_out_and_the_logits_agree(sparse, tokens):
    """Each of the ways in which a node can matter, alone: q without k, v without its write, a write without source."""
    model = sparse()
    means = means_of(model)
    everything = [Node(p.layer, p.site, c) for p in places(model.cfg) for c in range(width(model.cfg, p.site))]
    draw = torch.Generator().manual_seed(0)
    for i in torch.randperm(len(everything), generator=draw)[:5].tolist():
        node = everything[i]
        ends = [n for n in everything if n.site in ("final_read", "attn_write", "attn_read")]
        for nodes in ({node, *ends}, set(everything) - {node}):
            assert_runs_as(Circuit.of_nodes(model, nodes, means), model, tokens, None)


@pytest.mark.parametrize("site", NODE_SITES)
def test_a_site_that_is_wholly_outside_is_not_computed(site, sparse, tokens):
    model = sparse(bias=True)
    everything = [Node(p.layer, p.site, c) for p in places(model.cfg) for c in range(width(model.cfg, p.site))]
    circuit = Circuit.of_nodes(model, [n for n in everything if n.site != site], means_of(model))
    frame = assert_runs_as(circuit, model, tokens, None, MASK).frame
    assert frame.computed[frame.site == site].sum() == 0


def test_sites_that_hold_nothing_keep_what_is_computed_there(sparse, some_nodes, tokens):
    for sites in (("q", "neuron"), ("attn_read", "final_resid"), NODE_SITES[:-1]):
        model = sparse()
        blocks = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(5))
        means = mean_activations(model, blocks, sites=sites)
        nodes = [node for node in some_nodes(model, 0.5) if node.site in sites]
        nodes += [Node(1, "final_resid", c) for c in range(0, 12, 2) if "final_resid" in sites]
        assert_runs_as(Circuit.of_nodes(model, nodes, means, sites=sites), model, tokens, None, MASK)


def test_the_hand_built_model_has_its_logits_from_its_key_alone(truth, key_circuit, generator):
    batch = truth.task.batch(32, split="test", generator=generator)
    compact = assert_runs_as(key_circuit, truth.model, batch.clean, None, batch.attention_mask, atol=1e-4)
    text = truth.task.tokenizer.decode(batch.clean[0, : batch.lengths[0]])
    ids = truth.model.to_tokens(text)
    torch.testing.assert_close(compact(text), compact(ids)), "text is read as the model reads it"


def test_the_logits_of_the_bundled_model_as_a_circuit_agree_wherever_abs_topk_has_no_near_tie(generator):
    import sparse_interp as si  # the bundled model, its means and a task, as a user meets them

    model, means = si.load("stdlib-small"), si.baseline_means("stdlib-small")
    task = si.task("single_double_quote", model.tokenizer)
    batch = task.batch(16, split="test", generator=generator)
    drawn = [Node(p.layer, p.site, c) for p in places(model.cfg) for c in range(width(model.cfg, p.site))]
    nodes = [node for node in drawn if torch.rand((), generator=generator) < 0.2]
    circuit = Circuit.of_nodes(model, nodes, means)
    compact = circuit.compact(model)
    with torch.no_grad(), circuit.running(model):
        logits = model(batch.clean)
        near = near_ties(model, batch.clean, relative=1e-5)
    off = (compact(batch.clean) - logits).abs().amax(-1)
    assert near.double().mean() < 0.9 and (~near).any()
    assert off[~near].max() < 1e-5 * logits.abs().max()
    exact = copy.deepcopy(model).double()
    in_full = NodeValues({place: v.double() for place, v in means.values.items()}, means.kind)
    circuit = Circuit.of_nodes(exact, nodes, in_full)
    assert_runs_as(circuit, exact, batch.clean, None, batch.attention_mask, atol=1e-9)


def near_ties(model, tokens, relative):
    """Per token, whether in it or before it AbsTopK anywhere had a k-th and a next magnitude that close."""
    from sparse_interp.model.layers import Cut

    near = torch.zeros(tokens.shape, dtype=torch.bool)

    def look(cut, args, out):
        if cut.k is not None and cut.k < args[0].shape[-1]:
            top = args[0].abs().topk(cut.k + 1, dim=-1).values[..., -2:]
            near.logical_or_((top[..., 0] - top[..., 1]) < relative * args[0].abs().amax(-1))

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, Cut)]
    model(tokens)
    for handle in handles:
        handle.remove()
    return near.cummax(-1).values


def test_less_is_computed_and_the_table_says_what(sparse, some_nodes, tokens):
    model = sparse()
    circuit = Circuit.of_nodes(model, some_nodes(model, 0.2), means_of(model))
    compact = circuit.compact(model)
    frame = compact.frame
    assert (frame.used <= frame.kept).all() and (frame.computed <= frame.width).all()
    assert frame.n_weights_left.sum() < 0.3 * frame.n_weights.sum()
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if "attn.W_" in n or "mlp.W_" in n or n.endswith("W_U")
    )
    assert frame.n_weights.sum() == matrices
    left = {(row.layer, row.site): row for row in frame.itertuples()}
    final = left[2, "final_read"]
    assert final.n_weights_left == compact.W_U.numel() and final.used == len(compact.final.used)


def test_of_competitors_that_do_not_vary_only_those_stay_that_could_win(make_model, tokens):
    """Twenty neurons, of which one is kept, reads one channel, and competes with constants of known size."""
    model = make_model(afrac_sites=("neuron",), afrac=0.2, act_fn="relu").double()
    with torch.no_grad():
        block = model.layers[0]
        block.mlp.W_in.zero_()
        block.mlp.W_in[3, 7] = 1.0
        block.mlp.b_in.copy_(torch.arange(20.0) / 10)  # four survive, so of the constants 1.9, 1.8, 1.7, 1.6 can win
    nodes = [Node(0, "mlp_read", 3), Node(0, "neuron", 7), *(Node(0, "mlp_write", c) for c in range(12))]
    nodes += [Node(2, "final_read", c) for c in range(12)]
    circuit = Circuit.of_nodes(model, nodes, zero_values(model))
    compact = assert_runs_as(circuit, model, tokens, None)
    row = compact.frame.query("layer == 0 and site == 'neuron'").iloc[0]
    assert (row.computed, row.used, row.abs_topk) == (5, 1, 4)


def test_a_compact_circuit_does_not_change_with_its_model(sparse, some_nodes, tokens):
    model = sparse()
    compact = Circuit.of_nodes(model, some_nodes(model), means_of(model)).compact(model)
    before = compact(tokens)
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            p.mul_(2)
    assert torch.equal(compact(tokens), before)
    assert not any(p.requires_grad for p in compact.parameters())


def test_making_a_circuit_compact_leaves_the_model_alone(sparse, some_nodes, tokens):
    model = sparse(residual_act="relu")
    circuit = Circuit.of_nodes(model, some_nodes(model, 0.1), means_of(model))
    before, state = model(tokens), torch.get_rng_state()
    circuit.compact(model)(tokens)
    assert torch.equal(model(tokens), before) and torch.equal(torch.get_rng_state(), state)
    circuit.check_model(model)


def test_what_it_is_given_is_checked_as_the_model_checks_it(sparse, some_nodes):
    model = sparse()
    compact = Circuit.of_nodes(model, some_nodes(model), means_of(model)).compact(model)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        compact(torch.tensor([[1, 50]]))
    with pytest.raises(TokenizerError, match="17 tokens, and the model takes at most n_ctx=16"):
        compact(torch.zeros(1, 17, dtype=torch.long))
    assert compact(torch.tensor([1, 2, 3])).shape == (1, 3, 50)


def test_another_model_or_one_of_another_class_is_refused(sparse, some_nodes, make_bridge, dense_script):
    model = sparse()
    circuit = Circuit.of_nodes(model, some_nodes(model), means_of(model))
    with pytest.raises(CircuitError, match="was found in"):
        circuit.compact(sparse(seed=1))
    bridge, _ = make_bridge()
    dense = Circuit.of_nodes(bridge, [], zero_values(bridge))
    with pytest.raises(CircuitError, match=r"a model of TransformerLens.*circuit\.running\(model\)"):
        dense.compact(bridge)


def test_a_circuit_that_keeps_nodes_at_some_positions_is_refused(plain_model):
    spots = [NodeAt(0, "neuron", 1, 2)]
    circuit = Circuit.of_nodes(plain_model, spots, zero_values(plain_model), n_pos=4)
    with pytest.raises(CircuitError, match="a compact model is for nodes at all positions"):
        circuit.compact(plain_model)


def test_half_precision_gives_float32_logits(sparse, some_nodes, tokens):
    model = sparse(afrac=None).to(torch.bfloat16)
    circuit = Circuit.of_nodes(model, some_nodes(model), means_of(model))
    logits = circuit.compact(model)(tokens)
    with torch.no_grad(), circuit.running(model):
        expected = model(tokens)
    assert logits.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.2, rtol=0.05)
