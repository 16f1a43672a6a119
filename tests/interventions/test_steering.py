"""Steering: what a node is moved by is what reaches the logits, where it was asked for and nowhere else."""

import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.steering import push, steer
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, Place, flat, stream_hook

NODE = Node(1, "v", 6)


def seen(model, tokens, node):
    """What a node holds, and the logits."""
    held = {}
    keep = lambda activation, hook: held.update(x=flat(activation)[..., node.channel].clone())
    with torch.no_grad(), hooked(model).hooks([(Place(node.layer, node.site).hook, keep)]):
        logits = model(tokens)
    return held["x"], logits


@pytest.mark.parametrize("way", ["add", "set_to", "scale"])
def test_a_node_is_moved_in_the_way_that_was_asked_for(any_kind, tokens, way):
    before, logits = seen(any_kind, tokens, NODE)
    with steer(any_kind, NODE, **{way: -1.5}):
        after, moved = seen(any_kind, tokens, NODE)
    expected = {"add": before - 1.5, "set_to": torch.full_like(before, -1.5), "scale": before * -1.5}[way]
    assert torch.equal(after, expected) and not torch.equal(moved, logits)
    assert torch.equal(seen(any_kind, tokens, NODE)[1], logits)


def test_what_is_added_to_the_last_read_is_in_the_logits_times_its_row_of_the_unembedding(any_kind, tokens):
    node = Node(2, "final_read", 5)
    _, before = seen(any_kind, tokens, node)
    amounts = torch.tensor([1.0, -2.0, 0.5])
    with steer(any_kind, node, add=amounts):
        _, after = seen(any_kind, tokens, node)
    expected = amounts[:, None, None] * hooked(any_kind).unembed.W_U[5].detach()
    torch.testing.assert_close(after - before, expected.expand_as(before), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chosen", [[2], [0, 5], torch.tensor([6, 0, 3])], ids=str)
def test_only_the_positions_that_were_asked_for_are_moved(plain_model, tokens, chosen):
    before, _ = seen(plain_model, tokens, NODE)
    with steer(plain_model, NODE, add=1.0, positions=chosen):
        after, _ = seen(plain_model, tokens, NODE)
    where = torch.zeros(3, 7)
    if isinstance(chosen, torch.Tensor):
        where[torch.arange(3), chosen] = 1
    else:
        where[:, chosen] = 1
    assert torch.equal(after - before != 0, where.bool())


def test_blocks_nest_from_the_outer_to_the_inner_and_end_when_a_run_fails(plain_model, tokens):
    before, logits = seen(plain_model, tokens, NODE)
    with steer(plain_model, NODE, add=1.0), steer(plain_model, NODE, scale=2.0):
        after, _ = seen(plain_model, tokens, NODE)
    assert torch.equal(after, (before + 1) * 2)
    with pytest.raises(RuntimeError, match="stop"), steer(plain_model, NODE, add=1.0):
        raise RuntimeError("stop")
    assert torch.equal(seen(plain_model, tokens, NODE)[1], logits)


def test_nothing_is_written_into_another_runs_cache(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    copies = {name: tensor.clone() for name, tensor in cache.items()}
    with steer(plain_model, NODE, set_to=3.0):
        plain_model(tokens)
    assert all(torch.equal(cache[name], copies[name]) for name in copies)


def test_a_padded_batch_is_steered_as_its_prompts_one_by_one(plain_model, pairs, alone):
    with steer(plain_model, NODE, add=2.0, positions=pairs.last):
        _, together = seen(plain_model, pairs.clean, NODE)
    for row, pair in enumerate(alone):
        with steer(plain_model, NODE, add=2.0, positions=pair.last):
            _, logits = seen(plain_model, pair.clean, NODE)
        torch.testing.assert_close(together[row, : logits.shape[1]], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "give one of add=, set_to= and scale=; got none"),
        ({"add": 1.0, "scale": 2.0}, ConfigError, "got add, scale"),
        ({"add": 1.0, "positions": [-1]}, ConfigError, "pass a tensor, batch.last"),
        ({"add": 1.0, "positions": [7]}, CircuitError, r"positions \[7\], and the run has 0 to 6"),
        ({"add": 1.0, "positions": torch.tensor([1])}, CircuitError, "1 positions for 3 prompts"),
        ({"add": 1.0, "positions": torch.tensor([0, -1, 2])}, CircuitError, r"positions \[0, -1, 2\], and the run has"),
        ({"add": torch.ones(2)}, CircuitError, "2 amounts for 3 prompts"),
    ],
    ids=str,
)
def test_refusals(plain_model, tokens, given, error, message):
    with pytest.raises(error, match=message), steer(plain_model, NODE, **given):
        plain_model(tokens)


def test_a_node_that_the_model_lacks_is_refused(plain_model):
    with pytest.raises(CircuitError, match="L1.v.99"), steer(plain_model, Node(1, "v", 99), add=1.0):
        pass


@pytest.mark.parametrize("site", range(5))
def test_a_direction_is_added_to_the_stream_at_its_site_where_it_was_asked_for(any_kind, tokens, site):
    direction = torch.randn(12, generator=torch.Generator().manual_seed(0))
    held = {}
    keep = lambda activation, hook: held.update(x=activation)
    seen_there = [(stream_hook(site), keep)]
    with torch.no_grad(), hooked(any_kind).hooks(seen_there):
        logits = any_kind(tokens)
    before = held["x"]
    last = torch.tensor([6, 0, 3])
    with torch.no_grad(), push(any_kind, site, direction, positions=last), hooked(any_kind).hooks(seen_there):
        moved = any_kind(tokens)
    expected = (torch.arange(7) == last[:, None])[..., None] * direction
    torch.testing.assert_close(held["x"] - before, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(moved, logits, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(any_kind(tokens), logits)


def test_a_site_or_width_that_the_model_lacks_is_refused(plain_model):
    for site, width in ((5, 12), (-1, 12), (0, 11)):
        message = f"site {site} is pushed along {width} channels, and 'custom' has residual sites 0 to 4 of 12 channels"
        with pytest.raises(ConfigError, match=message), push(plain_model, site, torch.ones(width)):
            pass
    with (
        pytest.raises(ConfigError, match="pass a tensor, batch.last"),
        push(plain_model, 0, torch.ones(12), positions=[-1]),
    ):
        pass
