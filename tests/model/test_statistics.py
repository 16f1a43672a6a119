"""What a model is like: shares of positions, sizes and degrees against sums done by hand."""

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import NODE_SITES, n_nodes
from sparse_interp.model.statistics import (
    NEURONS_IN,
    NEURONS_OUT,
    READS,
    WRITES,
    activation_statistics,
    degrees,
    weight_sizes,
)


def test_every_node_of_every_kind_of_model_has_a_row_and_batches_do_not_matter(any_kind, tokens):
    table = activation_statistics(any_kind, tokens)
    assert len(table) == n_nodes(hooked(any_kind).cfg)
    assert set(table.frame.site) <= set(NODE_SITES)
    one_by_one = activation_statistics(any_kind, tokens, batch_size=1)
    assert table.frame[["layer", "site", "channel", "active_frac"]].equals(
        one_by_one.frame[["layer", "site", "channel", "active_frac"]]
    )
    assert table.frame.rms.to_numpy() == pytest.approx(one_by_one.frame.rms.to_numpy(), nan_ok=True, rel=1e-5)


def test_shares_and_sizes_are_those_of_the_recorded_activations(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    frame = activation_statistics(plain_model, tokens).frame
    for layer, site, hook in ((0, "neuron", "blocks.0.mlp.hook_post"), (1, "q", "blocks.1.attn.hook_q")):
        held = cache[hook].flatten(2).double().flatten(0, 1)
        rows = frame[(frame.layer == layer) & (frame.site == site)].sort_values("channel")
        assert rows.active_frac.tolist() == [float((column != 0).double().mean()) for column in held.T]
        active = [column[column != 0].square().mean().sqrt().item() for column in held.T]
        assert rows.rms.to_numpy() == pytest.approx(active, nan_ok=True, rel=1e-5)


def test_a_node_that_is_never_active_has_no_size(make_model, tokens):
    model = make_model()
    with torch.no_grad():
        model.layers[0].mlp.b_in[3], model.layers[0].mlp.W_in[:, 3] = 0, 0
    frame = activation_statistics(model, tokens).frame
    row = frame[(frame.layer == 0) & (frame.site == "neuron") & (frame.channel == 3)].iloc[0]
    assert row.active_frac == 0 and row.rms != row.rms


def test_statistics_of_no_text_are_refused(plain_model, tokens):
    with pytest.raises(ConfigError, match="at least one block of tokens, and there are none"):
        activation_statistics(plain_model, tokens[:0])


def test_degrees_count_the_weights_on_each_side(make_model):
    model = make_model()
    block = model.layers[1]
    with torch.no_grad():
        for matrix in (block.attn.W_Q, block.attn.W_K, block.attn.W_V, block.attn.W_O):
            matrix.zero_()
        block.mlp.W_in.zero_()
        block.mlp.W_out.zero_()
        block.mlp.W_in[2, 5], block.mlp.W_in[7, 5], block.attn.W_Q[1, 2, 3] = 1.0, -1.0, 0.5
        block.mlp.W_out[5, 0], block.attn.W_O[0, 1, 0] = 2.0, 3.0
    frame = degrees(model).frame
    found = {
        unit: {int(row.channel): int(row.degree) for row in rows.itertuples() if row.degree}
        for unit, rows in frame[frame.layer == 1].groupby("unit")
    }
    assert found == {READS: {2: 2, 7: 1}, WRITES: {0: 2}, NEURONS_IN: {5: 2}, NEURONS_OUT: {5: 1}}
    assert frame[frame.layer == 1].unit.value_counts().to_dict() == {
        READS: 12, WRITES: 12, NEURONS_IN: 20, NEURONS_OUT: 20}  # fmt: skip


def test_sizes_are_those_of_weights_that_are_not_zero(make_model):
    model = make_model()
    with torch.no_grad():
        model.layers[0].attn.W_K.zero_()
        model.layers[1].attn.W_K.zero_()
        model.layers[1].attn.W_K[1, 0, 0], model.layers[0].attn.W_K[0, 2, 4] = -0.25, 0.5
    frame = weight_sizes(model).frame
    assert sorted(frame[frame.matrix == "W_K"]["size"]) == [0.25, 0.5]
    assert set(frame.matrix) == {"W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}
    assert len(frame[frame.matrix == "W_E"]) == int(model.embed.W_E.count_nonzero())
