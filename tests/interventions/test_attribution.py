"""Estimates: the slope of the exact effect, in float64, and that effect itself wherever the way there is straight."""

import pandas as pd
import pytest
import torch

from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.attribution import EdgeTable, attribute_edges, attribute_nodes
from sparse_interp.interventions.node_effects import PatchingTable
from sparse_interp.interventions.sweeps import patch_nodes
from sparse_interp.model.sites import Node, Place, flat, places, width
from sparse_interp.tasks.task import TaskBatch, is_correct, logit_difference

VARIANTS = {
    "plain": {},
    "bidirectional": {"attention_dir": "bidirectional"},
    "dense": {"afrac": None},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
}
EPS = 1e-5


@pytest.fixture
def batch():
    """Three pairs of unequal lengths that differ from position 1 or 2 on, padded on the right."""
    drawn = torch.Generator().manual_seed(5)
    clean, corrupt = torch.randint(1, 50, (2, 3, 6), generator=drawn)
    differs = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    corrupt = torch.where(differs, corrupt, clean)
    answer, foil, lengths = torch.tensor([3, 4, 5]), torch.tensor([13, 14, 15]), torch.tensor([6, 4, 5])
    return TaskBatch(clean, corrupt, answer, foil, lengths, torch.zeros(3, dtype=torch.long))


def everywhere(logits, batch):
    """A metric that needs the logits of every position."""
    return (logits[:, :4, 1] * logits[:, :4, 2]).sum(1)


def seen_by(model, batch, tokens, *names):
    """What some hook points hold."""
    seen = {}
    note = lambda name: lambda x, hook: seen.update({name: x})
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, note(name)) for name in names]):
        model(tokens, attention_mask=batch.attention_mask)
    return [seen[name] for name in names]


def metric_with(model, batch, metric, hooks):
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return metric(model(batch.corrupt, attention_mask=batch.attention_mask), batch).mean().item()


def slope(model, batch, metric, node, hooks=()):
    """How fast the metric of the corrupt run grows as one node goes to what it is on the clean prompts."""
    name = Place(node.layer, node.site).hook
    clean, corrupt = (seen_by(model, batch, tokens, name)[0] for tokens in (batch.clean, batch.corrupt))
    change = torch.zeros_like(flat(clean))
    change[..., node.channel] = (flat(clean) - flat(corrupt))[..., node.channel] * batch.attention_mask
    step = lambda share: (name, lambda x, hook: x + share * change.view_as(x))
    after, before = (metric_with(model, batch, metric, [*hooks, step(share)]) for share in (EPS, -EPS))
    return (after - before) / (2 * EPS)


def some_nodes(model, every=29):
    return [Node(p.layer, p.site, c) for p in places(model.cfg) for c in range(width(model.cfg, p.site))][::every]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("metric", [logit_difference, everywhere])
def test_the_gradient_is_the_slope_of_the_exact_effect(make_model, batch, change, metric):
    model = make_model(**VARIANTS[change]).double()
    nodes = some_nodes(model)
    table = attribute_nodes(model, batch, metric, nodes=nodes, progress=False)
    expected = [slope(model, batch, metric, node) for node in sorted(nodes, key=lambda n: nodes.index(n))]
    assert table.frame.effect.to_list() == pytest.approx(expected, abs=1e-7)
    assert table.frame.effect.abs().max() > 0.01


def test_integrated_inputs_are_mean_slopes_between_the_two_embeddings(make_model, batch):
    model = make_model(afrac=None).double()
    nodes = some_nodes(model)
    clean, corrupt = (seen_by(model, batch, tokens, "hook_embed")[0] for tokens in (batch.clean, batch.corrupt))
    between = lambda share: [("hook_embed", lambda x, hook: corrupt + share * (clean - corrupt))]
    table = attribute_nodes(model, batch, nodes=nodes, method="integrated inputs", steps=2, progress=False)
    slopes = [[slope(model, batch, logit_difference, n, between(share)) for n in nodes] for share in (0.25, 0.75)]
    # the change of the node is that of the two runs themselves, which is what `slope` moves it by
    assert table.frame.effect.to_list() == pytest.approx(torch.tensor(slopes).mean(0).tolist(), abs=1e-6)


def test_integrated_nodes_of_a_place_add_up_to_the_effect_of_patching_all_of_it(make_model, batch):
    model = make_model(afrac=None).double()
    sites = ("k", "neuron")
    table = attribute_nodes(model, batch, sites=sites, method="integrated nodes", steps=8, progress=False).frame
    before = metric_with(model, batch, logit_difference, [])
    for place in places(model.cfg, sites):
        (clean,) = seen_by(model, batch, batch.clean, place.hook)
        whole = metric_with(model, batch, logit_difference, [(place.hook, lambda x, hook, clean=clean: clean)])
        found = table[(table.layer == place.layer) & (table.site == place.site)].effect.sum()
        assert found == pytest.approx(whole - before, abs=5e-3), place


@pytest.mark.parametrize("method", ["gradient", "integrated inputs", "integrated nodes"])
def test_where_the_metric_is_linear_in_a_node_the_estimate_is_exact(make_model, batch, method):
    model = make_model().double()
    asked = {"sites": ("final_read",), "positions": [1, -1], "progress": False}
    for direction in ("denoising", "noising"):
        exact = patch_nodes(model, batch, direction=direction, **asked)
        found = attribute_nodes(model, batch, direction=direction, method=method, steps=2, **asked)
        assert found.frame.effect.to_list() == pytest.approx(exact.frame.effect.to_list(), abs=1e-10)
        assert found.frame.recovered_frac.to_list() == pytest.approx(exact.frame.recovered_frac.to_list(), abs=1e-9)


def test_gradients_of_positions_add_up_and_padding_has_none(make_model, batch):
    model = make_model().double()
    whole = attribute_nodes(model, batch, progress=False).frame
    each = attribute_nodes(model, batch, positions="each", progress=False).frame
    summed = each.groupby(["layer", "site", "channel"], sort=False).effect.sum()
    assert summed.to_list() == pytest.approx(whole.effect.to_list(), abs=1e-12)
    alone = []
    for row in range(3):
        cut = {"clean": batch.clean[:, : batch.lengths[row]], "corrupt": batch.corrupt[:, : batch.lengths[row]]}
        one = TaskBatch(**{**vars(batch), **cut}).rows(slice(row, row + 1))
        alone.append(attribute_nodes(model, one, progress=False).frame.effect)
    assert whole.effect.to_list() == pytest.approx((sum(alone) / 3).to_list(), abs=1e-12)


def test_the_model_is_left_as_it_was(plain_model, batch):
    plain_model.train()
    attribute_nodes(plain_model, batch, progress=False)
    attribute_edges(plain_model, batch)
    assert plain_model.training and all(not p._forward_hooks for p in plain_model.hook_dict.values())
    assert all(p.requires_grad and p.grad is None for p in (plain_model.W_E, plain_model.W_U))


# -- edges ------------------------------------------------------------------------------------------------------------


def edge_slope(model, batch, layer, source, target, weight_name, weight, hooks=()):
    """How fast the metric grows as one edge comes to carry what its source is on the clean prompts.

    The sum that a target takes is moved before AbsTopK sees it, by a hook of torch's on the model's own cuts.
    """
    block = model.blocks[layer]
    name = Place(layer, source.site).hook
    clean, corrupt = (seen_by(model, batch, tokens, name)[0] for tokens in (batch.clean, batch.corrupt))
    carried = flat(clean - corrupt)[..., source.channel]
    if source.site == "v":
        with model.hooks(list(hooks)):
            (pattern,) = seen_by(model, batch, batch.corrupt, f"blocks.{layer}.attn.hook_pattern")
        carried = torch.einsum("bqk,bk->bq", pattern[:, source.channel // model.cfg.d_head], carried)
    at = {
        "q": block.attn.cut_q,
        "k": block.attn.cut_k,
        "v": block.attn.cut_v,
        "attn_write": block.attn.cut_write,
        "neuron": block.mlp.hook_pre,
        "mlp_write": block.mlp.cut_write,
    }[target.site]
    found = []
    for share in (EPS, -EPS):

        def move(module, given, share=share):
            total = given[0].clone()
            total[..., target.channel] += share * weight * carried
            return (total,)

        handle = at.register_forward_pre_hook(move)
        found.append(metric_with(model, batch, logit_difference, list(hooks)))
        handle.remove()
    return (found[0] - found[1]) / (2 * EPS)


def node_of(text):
    layer, site, channel = text.split(".")
    return Node(int(layer[1:]), site, int(channel))


def test_an_edge_s_estimate_is_the_slope_of_patching_it_before_abs_topk(make_model, batch):
    model = make_model().double()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_in[::2, ::3] = 0
    table = attribute_edges(model, batch)
    assert isinstance(table, EdgeTable) and (table.frame.weight != 0).all()
    n_weights = sum(int((w != 0).sum()) for n, w in model.named_parameters() if ".W_" in n and "blocks" in n)
    assert len(table) == n_weights
    rows = table.frame.sort_values("effect", key=abs).groupby("weight_name").tail(3)
    assert len(rows) == 18 and (rows.effect.abs() > 1e-3).all()
    for row in rows.itertuples():
        source, target = node_of(row.source), node_of(row.target)
        exact = edge_slope(model, batch, source.layer, source, target, row.weight_name, row.weight)
        assert row.effect == pytest.approx(exact, abs=1e-6), row


def test_integrated_edges_are_mean_slopes_between_the_two_embeddings(make_model, batch):
    model = make_model(afrac=None).double()
    clean, corrupt = (seen_by(model, batch, tokens, "hook_embed")[0] for tokens in (batch.clean, batch.corrupt))
    between = lambda share: [("hook_embed", lambda x, hook: corrupt + share * (clean - corrupt))]
    table = attribute_edges(model, batch, method="integrated inputs", steps=2).frame
    rows = table.sort_values("effect", key=abs).groupby("weight_name").tail(2)
    assert len(rows) == 12 and (rows.effect.abs() > 1e-3).all()
    for row in rows.itertuples():
        ends = node_of(row.source), node_of(row.target)
        edge = (model, batch, ends[0].layer, *ends, row.weight_name, row.weight)
        at = [edge_slope(*edge, between(share)) for share in (0.25, 0.75)]
        assert row.effect == pytest.approx(sum(at) / 2, abs=1e-6), row
    assert not table.effect.equals(attribute_edges(model, batch).frame.effect)


def test_edges_into_a_dense_write_add_up_to_their_source_node(make_model, batch):
    """A neuron does nothing but write: its edges' estimates are the parts of its own."""
    model = make_model(afrac=None).double()
    edges, nodes = attribute_edges(model, batch).frame, attribute_nodes(model, batch, progress=False).frame
    for site in ("neuron", "v", "mlp_read"):
        part = nodes[nodes.site == site]
        names = "L" + part.layer.astype(str) + "." + part.site + "." + part.channel.astype(str)
        summed = edges.groupby("source").effect.sum().reindex(names).fillna(0.0)
        assert summed.to_list() == pytest.approx(part.effect.to_list(), abs=1e-10)


# -- beside the exact table, and TransformerLens -----------------------------------------------------------------------


def test_the_rank_correlation_is_that_of_ranks():
    first = pd.DataFrame({"layer": 0, "site": ["q", "q", "q", "v", "v"], "channel": [0, 1, 2, 0, 1]})
    table = lambda effects: PatchingTable(first.assign(effect=effects, metric=effects, recovered_frac=effects))
    ranks = (
        table([1.0, 2.0, 3.0, 0.0, 0.0]).rank_correlation(table([1.0, 30.0, 20.0, 0.0, 0.0])).frame.set_index("site")
    )
    assert ranks.spearman["q"] == pytest.approx(0.5)  # 1 - 6 (0 + 1 + 1) / (3 * 8)
    assert ranks.n_moved.to_dict() == {"q": 3, "v": 0, "all": 3} and ranks.n_nodes["all"] == 5
    assert ranks.spearman.isna().to_dict() == {"q": False, "v": True, "all": False}
    # ranks of the whole: 3 4 5 1.5 1.5 and 3 5 4 1.5 1.5, around 3
    assert ranks.spearman["all"] == pytest.approx((0 + 2 + 2 + 2.25 + 2.25) / (0 + 1 + 4 + 2.25 + 2.25))
    assert ranks.spearman_moved["all"] == pytest.approx(0.5)


def test_estimates_order_nodes_much_as_the_sweep_does(make_model, batch):
    model = make_model(afrac=None, initializer_range=0.1)
    exact = patch_nodes(model, batch, progress=False)
    table = exact.rank_correlation(attribute_nodes(model, batch, progress=False))
    assert table.overall > 0.9 and len(table) == 10
    assert len(table.plot().get_yticklabels()) == 10
    with pytest.raises(CircuitError, match="the tables share 5 rows of 238 and 5"):
        exact.rank_correlation(attribute_nodes(model, batch, nodes=some_nodes(model)[:5], progress=False))


@pytest.mark.parametrize("change", [{}, {"afrac": None}], ids=["AbsTopK", "dense"])
def test_transformer_lens_scores_an_mlp_as_the_sum_of_our_channels(make_model, batch, change):
    """Right under AbsTopK too, since its hook is behind it; nodes of ours it has none."""
    analysis, model, pair = (
        pytest.importorskip("transformer_lens.tools.analysis"),
        make_model(**change),
        batch.rows(slice(0, 1)),
    )
    table = attribute_nodes(model, pair, sites=("mlp_write",), positions="each", progress=False).frame
    ours = table.groupby(["layer", "pos"]).effect.sum()
    metric = lambda logits: logit_difference(logits, pair).mean()
    theirs = analysis.attribution_patch(model, pair.clean, pair.corrupt, metric).node_scores
    scores = {(node.layer, node.position): score for node, score in theirs.items() if node.kind == "mlp_out"}
    assert len(scores) == len(ours) == 12 and ours.abs().max() > 0.01
    assert ours.to_dict() == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_bridge_has_the_estimates_of_our_model_with_the_same_weights(dense_script, batch, norm):
    shape = dense_script.shape_of(50, norm=norm)
    weights = dense_script.random_weights(shape, std=0.3)
    models = dense_script.our_model(shape, weights), dense_script.bridge(shape, weights)
    for method in ("gradient", "integrated inputs", "integrated nodes"):
        asked = {"sites": ("k", "neuron", "final_read"), "method": method, "steps": 1, "progress": False}
        tables = [attribute_nodes(m, batch, **asked).frame for m in models]
        assert tables[1].effect.to_list() == pytest.approx(tables[0].effect.to_list(), abs=5e-5)
    edges = [attribute_edges(m, batch).frame for m in models]
    assert edges[1].source.equals(edges[0].source) and edges[1].target.equals(edges[0].target)
    assert edges[1].effect.to_list() == pytest.approx(edges[0].effect.to_list(), abs=5e-5)


# -- refusals, pictures -----------------------------------------------------------------------------------------------


def test_what_cannot_be_estimated_is_refused(plain_model, batch):
    with pytest.raises(ConfigError, match="method='ig', steps=5: choose gradient, integrated inputs, integrated nodes"):
        attribute_nodes(plain_model, batch, method="ig")
    with pytest.raises(ConfigError, match="at least 1 step"):
        attribute_nodes(plain_model, batch, method="integrated nodes", steps=0)
    with pytest.raises(ConfigError, match="'integrated nodes', steps=5: choose gradient or integrated inputs"):
        attribute_edges(plain_model, batch, method="integrated nodes")
    with pytest.raises(ConfigError, match="the metric has no gradient, as counts have none"):
        attribute_nodes(plain_model, batch, is_correct)


def test_tables_draw_the_strongest(plain_model, batch):
    nodes = attribute_nodes(plain_model, batch, progress=False)
    labels = [tick.get_text() for tick in nodes.plot(n=5).get_yticklabels()]
    frame = nodes.frame.sort_values("effect", key=abs, ascending=False)
    assert labels == [f"L{r.layer}.{r.site}.{r.channel}" for r in frame.head(5).itertuples()]
    each = attribute_nodes(plain_model, batch, positions="each", progress=False).plot(n=5)
    assert len(each.get_xticklabels()) == 6 and len(each.get_yticklabels()) == 5
    assert len(attribute_edges(plain_model, batch).plot(n=4).get_yticklabels()) == 4
