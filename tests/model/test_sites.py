"""Names and wires: every site exists with its width, and every wire carries what it says from source to target."""

import pytest
import torch

from sparse_interp.errors import CircuitError
from sparse_interp.model import sites
from sparse_interp.model.sites import SITES, WIRES, Node, Place, flat, masks, n_nodes, places, width


def test_every_place_exists_and_has_the_width_it_declares(any_model, tokens):
    _, cache = any_model.run_with_cache(tokens)
    for place in places(any_model.cfg):
        assert flat(cache[place.hook]).shape == (3, 7, width(any_model.cfg, place.site)), place
        assert (cache[place.hook].ndim == 4) == SITES[place.site].per_head
    for name in (sites.EMBED_HOOK, sites.PATTERN_HOOK.format(layer=1)):
        assert name in cache
    assert (sites.BIGRAM_HOOK in cache) == any_model.cfg.bigram


def test_places_come_in_the_order_of_the_forward_pass(plain_model, tokens):
    order = []
    with plain_model.hooks(fwd_hooks=[(lambda name: True, lambda t, hook: order.append(hook.name))]):
        plain_model(tokens)
    hooks = [place.hook for place in places(plain_model.cfg)]
    assert [name for name in order if name in hooks] == hooks
    assert len(hooks) == 8 * 2 + 1


def test_the_last_stream_is_a_place_only_for_those_who_name_it(any_model, tokens):
    """`final_resid` is what the last norm reads, in the channels of `final_read`; no node is counted twice."""
    cfg = any_model.cfg
    (place,) = set(places(cfg, SITES)) - set(places(cfg))
    assert place == Place(1, "final_resid") and width(cfg, "final_resid") == width(cfg, "final_read")
    assert places(cfg, SITES)[-2:] == [place, Place(2, "final_read")]
    with torch.no_grad():
        _, cache = any_model.run_with_cache(tokens)
        assert torch.equal(any_model.ln_final(cache[place.hook]), cache["unembed.hook_in"])
    assert place not in masks([], cfg)
    assert not masks([], cfg, ["final_resid"])[place].any()
    assert masks([Node(*place, 3)], cfg)[place].nonzero().tolist() == [[3]]
    with pytest.raises(CircuitError, match="final_resid exists in layers 1 to 1, not in 0"):
        masks([Node(0, "final_resid", 0)], cfg)


def test_nodes_are_counted_over_all_places(make_model):
    cfg = make_model(positions="concat", d_pos_emb=3).cfg
    assert n_nodes(cfg) == 2 * (2 * 15 + 3 * 15 + 2 * 12 + 20) + 12


def test_a_node_writes_itself_short_and_a_place_knows_its_hook():
    assert str(Node(1, "neuron", 7)) == "L1.neuron.7"
    assert Place(1, "q").hook == "blocks.1.attn.hook_q"


def test_an_unknown_site_is_refused_with_the_known_ones(plain_model):
    with pytest.raises(CircuitError, match="'z' is no site; the sites are attn_read, q, k, v"):
        width(plain_model.cfg, "z")


def test_every_wire_carries_its_source_to_its_target(any_model, tokens):
    """Recorded source times matrix, plus bias, through non-linearity and cut, is the recorded target."""
    with torch.no_grad():
        _, cache = any_model.run_with_cache(tokens)
        for layer, block in enumerate(any_model.layers):
            attn, mlp = block.attn, block.mlp
            after = {
                "q": lambda x, a=attn: a.cut_q(x + a.b_Q.flatten()),
                "k": lambda x, a=attn: a.cut_k(x + a.b_K.flatten()),
                "v": lambda x, a=attn: a.cut_v(x + a.b_V.flatten()),
                "attn_write": lambda x, a=attn: a.cut_write(x + a.b_O),
                "neuron": lambda x, m=mlp: m.cut_neuron(m.act(x + m.b_in)),
                "mlp_write": lambda x, m=mlp: m.cut_write(x + m.b_out),
            }
            for wire in WIRES:
                source = cache[wire.source.at(layer)]
                if wire.source.name == "v":  # through the pattern: what query q has of each v channel
                    pattern = cache[sites.PATTERN_HOOK.format(layer=layer)]
                    source = torch.einsum("bhqk,bkhd->bqhd", pattern, source)
                got = after[wire.target.name](flat(source) @ wire.weight(block))
                torch.testing.assert_close(got, flat(cache[wire.target.at(layer)]), msg=f"{wire.weight_name} {layer}")


def test_a_wire_has_a_row_per_source_node_and_a_column_per_target_node(any_model):
    for wire in WIRES:
        shape = (width(any_model.cfg, wire.source.name), width(any_model.cfg, wire.target.name))
        assert wire.weight(any_model.layers[0]).shape == shape
