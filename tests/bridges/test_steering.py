"""Using a bridge: on a rotated twin what is done to the sparse model is done to the dense one, to the last digit."""

from contextlib import ExitStack

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.rotated import rotatable_model, rotated_twin
from sparse_interp.bridges.steering import explain, feature_direction, site_of, steer, transfer
from sparse_interp.bridges.stretches import dense_streams
from sparse_interp.errors import BridgeError, CircuitError
from sparse_interp.interventions import steering
from sparse_interp.interventions.ablation import ablate
from sparse_interp.interventions.baselines import zero_values
from sparse_interp.model.sites import Node, flat, places

EXACT = {"atol": 1e-10, "rtol": 1e-10}
NODES = [
    Node(0, "attn_read", 3),
    Node(0, "q", 5),
    Node(1, "k", 9),
    Node(0, "v", 7),
    Node(1, "attn_write", 2),
    Node(0, "mlp_read", 4),
    Node(1, "neuron", 11),
    Node(0, "mlp_write", 6),
    Node(2, "final_read", 8),
    Node(1, "final_resid", 1),
]


@pytest.fixture(scope="module")
def pair():
    """A sparse model in double precision, and its twin."""
    generator = torch.Generator().manual_seed(0)
    sparse = rotatable_model(generator=generator, dtype=torch.float64)
    for block in sparse.layers:
        torch.nn.init.normal_(block.attn.b_V, generator=generator)
    return sparse, rotated_twin(sparse, generator=generator)


@pytest.fixture
def tokens():
    return torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))


def run(model, tokens):
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("node", NODES, ids=str)
def test_any_intervention_on_a_node_is_the_same_one_in_the_twin(pair, tokens, node):
    sparse, twin = pair
    moving = lambda model: steering.steer(model, node, add=3.0)
    with moving(sparse):
        wanted = run(sparse, tokens)
    with transfer(twin.bridge, sparse, twin.dense, moving):
        found = run(twin.dense, tokens)
    assert not torch.allclose(wanted, run(sparse, tokens), atol=1e-4)
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(run(twin.dense, tokens), run(sparse, tokens), **EXACT)


def test_many_nodes_ablated_at_once_and_nested_blocks_are_carried(pair, tokens):
    sparse, twin = pair
    zero, half = zero_values(sparse), [Node(layer, site, 2) for layer, site in places(sparse.cfg)]
    first = lambda model: ablate(model, NODES[:6], zero)
    second = lambda model: ablate(model, half, zero)
    with first(sparse), second(sparse):
        wanted = run(sparse, tokens)
    both = ExitStack()

    def at_once(model):
        both.enter_context(first(model))
        both.enter_context(second(model))
        return both

    with transfer(twin.bridge, sparse, twin.dense, at_once):
        torch.testing.assert_close(run(twin.dense, tokens), wanted, **EXACT)
    alone = lambda model: steering.steer(model, Node(0, "neuron", 1), add=1.0)
    later = lambda model: steering.steer(model, Node(1, "neuron", 1), add=1.0)
    with alone(sparse), later(sparse):
        wanted = run(sparse, tokens)
    with transfer(twin.bridge, sparse, twin.dense, alone), transfer(twin.bridge, sparse, twin.dense, later):
        torch.testing.assert_close(run(twin.dense, tokens), wanted, **EXACT)


def test_a_bridge_at_some_sites_carries_what_lies_between_them(pair, tokens):
    sparse, twin = pair
    some = (SitePair(1, 1), SitePair(3, 3))
    bridge = Bridge.between(sparse, twin.dense, BridgeConfig(sites=some, afrac=1.0)).double()
    for tied in some:
        bridge[tied].load_state_dict(twin.bridge[tied].state_dict())
    within = lambda model: steering.steer(model, Node(1, "k", 9), add=3.0)
    with within(sparse):
        wanted = run(sparse, tokens)
    with transfer(bridge, sparse, twin.dense, within):
        torch.testing.assert_close(run(twin.dense, tokens), wanted, **EXACT)
    outside = lambda model: steering.steer(model, Node(1, "neuron", 9), add=3.0)
    with transfer(bridge, sparse, twin.dense, outside):
        torch.testing.assert_close(run(twin.dense, tokens), run(sparse, tokens), **EXACT)


def test_the_dense_model_is_restored_when_a_block_fails_and_padding_changes_nothing(pair, tokens):
    sparse, twin = pair
    moving = lambda model: steering.steer(model, Node(1, "v", 9), add=3.0)
    with pytest.raises(RuntimeError, match="stop"), transfer(twin.bridge, sparse, twin.dense, moving):
        raise RuntimeError("stop")
    torch.testing.assert_close(run(twin.dense, tokens), run(sparse, tokens), **EXACT)
    with transfer(twin.bridge, sparse, twin.dense, moving):
        together, alone = run(twin.dense, tokens), run(twin.dense, tokens[:1, :4])
    torch.testing.assert_close(together[:1, :4], alone, **EXACT)


def test_a_dense_model_of_transformer_lens_takes_what_is_carried(make_model, make_bridge, tokens):
    sparse, (dense, _) = make_model(), make_bridge()
    bridge = Bridge.between(sparse, dense, generator=torch.Generator().manual_seed(0))
    tokens = tokens % 50
    moving = lambda model: ablate(model, [Node(0, "neuron", 3), Node(2, "final_read", 4)], zero_values(model))
    before = run(dense, tokens)
    with transfer(bridge, sparse, dense, moving):
        moved = run(dense, tokens)
    assert not torch.allclose(before, moved, atol=1e-4)
    with transfer(bridge, sparse, dense, lambda model: ablate(model, [], zero_values(model))):
        assert torch.equal(run(dense, tokens), before)


@pytest.mark.parametrize("node", [n for n in NODES if n.site in ("attn_write", "mlp_write", "neuron", "final_resid")])
def test_steering_along_a_feature_moves_the_twin_as_the_node_moves_the_sparse_model(pair, tokens, node):
    sparse, twin = pair
    last = torch.tensor([8, 3, 5])
    with steering.steer(sparse, node, add=-2.0, positions=last):
        wanted = run(sparse, tokens)
    with steer(twin.bridge, sparse, twin.dense, node, -2.0, positions=last):
        torch.testing.assert_close(run(twin.dense, tokens), wanted, **EXACT)
    torch.testing.assert_close(run(twin.dense, tokens), run(sparse, tokens), **EXACT)


def test_a_read_is_steered_in_the_stream_that_it_reads(pair, tokens):
    sparse, twin = pair
    direction = feature_direction(twin.bridge, sparse, Node(1, "attn_read", 4))
    assert list(direction) == list(twin.bridge.pairs)
    assert all(torch.allclose(x, twin.rotation[4]) for x in direction.values())
    with steering.push(sparse, 2, torch.eye(32).double()[4] * 1.5):
        wanted = run(sparse, tokens)
    with steer(twin.bridge, sparse, twin.dense, Node(1, "attn_read", 4), 1.5):
        torch.testing.assert_close(run(twin.dense, tokens), wanted, **EXACT)


def test_a_writer_has_its_decoded_write_behind_it_and_nowhere_else(pair):
    sparse, twin = pair
    neuron = feature_direction(twin.bridge, sparse, Node(0, "neuron", 11))
    assert list(neuron) == [SitePair(2, 2), SitePair(3, 3), SitePair(4, 4)]
    torch.testing.assert_close(neuron[SitePair(2, 2)], sparse.layers[0].mlp.W_out[11].detach() @ twin.rotation, **EXACT)
    value = feature_direction(twin.bridge, sparse, Node(1, "v", 13))
    torch.testing.assert_close(value[SitePair(3, 3)], sparse.layers[1].attn.W_O[1, 5].detach() @ twin.rotation, **EXACT)


def test_sites_count_reads_where_they_read_and_writes_where_they_have_written():
    sites = {"attn_read": 2, "v": 3, "attn_write": 3, "mlp_read": 3, "neuron": 4, "mlp_write": 4}
    assert {site: site_of(Node(1, site, 0)) for site in sites} == sites
    assert site_of(Node(1, "final_resid", 0)) == site_of(Node(2, "final_read", 0)) == 4


def test_what_is_on_in_the_twin_is_what_is_on_in_the_sparse_model(pair, tokens):
    sparse, twin = pair
    _, cache = sparse.run_with_cache(tokens)
    table = explain(twin.bridge, sparse, dense_streams(twin.bridge, twin.dense, tokens), n=3, positions=[2, 8])
    assert set(table.frame.pos) == {2, 8} and set(table.frame.prompt) == {0, 1, 2}
    expected = 0
    for place in places(sparse.cfg):
        held = flat(cache[place.hook])
        for prompt in range(3):
            for pos in (2, 8):
                rows = table.frame[(table.frame.prompt == prompt) & (table.frame.pos == pos)]
                rows = rows[rows.node.str.startswith(f"L{place.layer}.{place.site}.")]
                largest = held[prompt, pos].abs().topk(3).indices.tolist()
                assert rows.node.tolist() == [str(Node(*place, c)) for c in largest if held[prompt, pos, c] != 0]
                assert rows.value.tolist() == pytest.approx([float(held[prompt, pos, c]) for c in largest])
                expected += len(rows)
    assert len(table) == expected


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (Node(0, "q", 1), BridgeError, "L0.q.1 has no direction: a q channel only meets another .* `transfer`"),
        (Node(1, "k", 1), BridgeError, "writes nothing to the stream"),
        (Node(0, "neuron", 64), CircuitError, "neuron has channels 0 to 63"),
        (Node(2, "neuron", 0), CircuitError, "exists in layers 0 to 1"),
    ],
    ids=str,
)
def test_what_has_no_direction_says_why(pair, node, error, message):
    sparse, twin = pair
    with pytest.raises(error, match=message):
        feature_direction(twin.bridge, sparse, node)


def test_refusals(pair, make_model, make_bridge, tokens, generator):
    sparse, twin = pair
    other = Bridge.between(sparse, twin.dense, BridgeConfig(sites=((0, 0), (1, 1)))).double()
    with pytest.raises(BridgeError, match="nothing is tied at or behind sparse site 4, where L1.neuron.3 is.*0-0, 1-1"):
        feature_direction(other, sparse, Node(1, "neuron", 3))
    with pytest.raises(BridgeError, match="does not tie sites 2-2"):
        explain(other, sparse, {SitePair(2, 2): torch.zeros(1, 1, 32).double()})
    concatenated = make_model(positions="concat", d_pos_emb=3)
    bridge = Bridge.between(concatenated, concatenated, generator=generator)
    with pytest.raises(BridgeError, match="channel 1 of the position vectors"):
        feature_direction(bridge, concatenated, Node(0, "attn_read", 13))
    tl, _ = make_bridge()
    with pytest.raises(BridgeError, match="sparse model of a bridge is run from the middle, and a TransformerBridge"):
        feature_direction(Bridge.between(tl, concatenated), tl, Node(0, "neuron", 1))
    moving = lambda model: steering.steer(model, Node(2, "final_read", 1), add=1.0)
    with (
        pytest.raises(BridgeError, match="9 positions, and 1 are unembedded"),
        transfer(twin.bridge, sparse, twin.dense, moving),
    ):
        resid = twin.dense(tokens, stop_at_layer=2)
        twin.dense(resid[:, -1:], tokens=tokens[:, -1:], start_at_layer=2)
