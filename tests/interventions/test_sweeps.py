"""Exact sweeps: the same numbers as one run per node with a hook, less work, and no more memory than was allowed."""

import gc
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparse_interp.errors import CircuitError, ConfigError, TaskError
from sparse_interp.interventions import sweeps
from sparse_interp.interventions.node_effects import PatchingTable
from sparse_interp.interventions.sweeps import patch_nodes
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import NODE_SITES, Node, Place, flat, places, width
from sparse_interp.tasks.task import TaskBatch, kl_to, logit_difference

VARIANTS = {
    "plain": {},
    "concatenated positions": {"positions": "concat", "d_pos_emb": 3},
    "bidirectional": {"attention_dir": "bidirectional"},
    "residual relu": {"residual_act": "relu"},
    "residual cut on entry": {"afrac_sites": ("resid_pre", "k")},
    "dense": {"afrac": None, "norm": "layer"},
}


@pytest.fixture
def batch():
    """Three pairs of unequal lengths that differ from position 2, 1 and 2 on, padded on the right with a real token."""
    drawn = torch.Generator().manual_seed(5)
    clean, corrupt = torch.randint(1, 50, (2, 3, 6), generator=drawn)
    differs = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]]).bool()
    corrupt = torch.where(differs, corrupt, clean)
    answer, foil, lengths = torch.tensor([3, 4, 5]), torch.tensor([13, 14, 15]), torch.tensor([6, 4, 5])
    return TaskBatch(clean, corrupt, answer, foil, lengths, torch.zeros(3, dtype=torch.long))


def everywhere(logits, batch):
    """A metric that needs the logits of every position."""
    return (logits[:, :4, 1] * logits[:, :4, 2]).sum(1)


def held(model, tokens, mask):
    """What every node of a model holds."""
    seen = {}
    note = lambda place: lambda x, hook: seen.update({place: flat(x)})
    with torch.no_grad(), model.hooks(fwd_hooks=[(place.hook, note(place)) for place in places(model.cfg)]):
        model(tokens, attention_mask=mask)
    return seen


@torch.no_grad()
def one_at_a_time(model, batch, metric, nodes, *, positions=(None,), noising=False):
    """The metric with one node after the other patched by a hook, a run of the whole batch for each."""
    mask = batch.attention_mask
    source, base = (batch.corrupt, batch.clean) if noising else (batch.clean, batch.corrupt)
    values, pos, found = held(model, source, mask), torch.arange(base.shape[1]), []
    for node in nodes:
        place = Place(node.layer, node.site)
        for label in positions:
            here = mask.bool()
            if label is not None:
                here = here & (pos == (batch.lengths[:, None] + label if label < 0 else label))

            def patch(x, hook, place=place, channel=node.channel, here=here):
                nodes = flat(x).clone()
                nodes[..., channel] = torch.where(here, values[place][..., channel], nodes[..., channel])
                return nodes.view_as(x)

            with model.hooks(fwd_hooks=[(place.hook, patch)]):
                found.append(float(metric(model(base, attention_mask=mask), batch).mean()))
    return found


def all_nodes(model, sites=NODE_SITES):
    return [Node(p.layer, p.site, c) for p in places(model.cfg, sites) for c in range(width(model.cfg, p.site))]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("metric", [logit_difference, everywhere])
def test_a_sweep_is_one_run_per_node_with_a_hook(make_model, batch, change, metric):
    model = make_model(**VARIANTS[change]).double()
    nodes = all_nodes(model)[::9]  # runs one by one take their time
    table = patch_nodes(model, batch, metric, nodes=nodes, progress=False)
    assert table.frame.metric.to_list() == pytest.approx(one_at_a_time(model, batch, metric, nodes), abs=1e-10)
    assert table.frame.effect.abs().max() > 0.01


@pytest.mark.parametrize("metric", [logit_difference, everywhere])
@pytest.mark.parametrize("noising", [False, True], ids=["denoising", "noising"])
def test_positions_one_by_one_and_from_the_end_in_both_directions(make_model, batch, metric, noising):
    model = make_model().double()
    nodes = all_nodes(model, ("attn_read", "k", "mlp_write", "final_read"))[::6]
    asked = {"nodes": nodes, "direction": "noising" if noising else "denoising", "progress": False}
    table = patch_nodes(model, batch, metric, positions=[2, 4, -1], **asked)
    expected = one_at_a_time(model, batch, metric, nodes, positions=(2, 4, -1), noising=noising)
    assert table.frame.metric.to_list() == pytest.approx(expected, abs=1e-10)
    each = patch_nodes(model, batch, metric, positions="each", **asked)
    assert list(each.frame.pos[:7]) == [0, 1, 2, 3, 4, 5, 0]
    some = each.frame[each.frame.pos.isin([2, 4])].effect.to_list()
    assert some == pytest.approx(table.frame[table.frame.pos != -1].effect.to_list(), abs=1e-10)


def test_a_metric_that_compares_with_the_whole_batch_sees_the_whole_batch(make_model, batch):
    model = make_model().double()
    with torch.no_grad():
        metric = kl_to(model(batch.clean))
    nodes = all_nodes(model, ("q", "neuron"))[::6]
    table = patch_nodes(model, batch, metric, nodes=nodes, progress=False)
    assert table.frame.metric.to_list() == pytest.approx(one_at_a_time(model, batch, metric, nodes), abs=1e-10)


def test_a_padded_batch_is_its_prompts_one_by_one(make_model, batch):
    model = make_model().double()
    asked = {"nodes": all_nodes(model)[::7], "positions": [-1, 2], "progress": False}
    table = patch_nodes(model, batch, **asked)
    alone = []
    for row in range(3):
        cut = {"clean": batch.clean[:, : batch.lengths[row]], "corrupt": batch.corrupt[:, : batch.lengths[row]]}
        one = TaskBatch(**{**vars(batch), **cut}).rows(slice(row, row + 1))
        alone.append(patch_nodes(model, one, **asked).frame.metric)
    assert table.frame.metric.to_list() == pytest.approx((sum(alone) / 3).to_list(), abs=1e-10)


def test_patching_every_read_of_the_last_stream_gives_the_clean_run_a_node_at_a_time(make_model, batch):
    """Logits are linear in the last read, so its nodes' effects add up to the whole difference (without a bigram)."""
    model = make_model(bigram=False).double()
    table = patch_nodes(model, batch, sites=("final_read",), progress=False)
    assert table.frame.recovered_frac.sum() == pytest.approx(1.0, abs=1e-10)
    assert (table.frame.metric - table.frame.effect).nunique() <= 12


def test_nodes_that_hold_the_same_in_both_runs_are_not_run(make_model, batch, monkeypatch):
    model, ran = make_model().double(), []
    patched = sweeps._Sweep._patched

    def note(self, place, channels, source, rows, n_pos):
        ran.extend((place, int(c), int(p)) for c, p in zip(channels[rows.item], rows.prompt, strict=True))
        return patched(self, place, channels, source, rows, n_pos)

    monkeypatch.setattr(sweeps._Sweep, "_patched", note)
    table = patch_nodes(model, batch, progress=False)
    assert nodes_of(table) == all_nodes(model)
    mask = batch.attention_mask
    clean, corrupt = held(model, batch.clean, mask), held(model, batch.corrupt, mask)
    differ = {
        (place, c, row)
        for place in places(model.cfg)
        for row, c in ((clean[place] != corrupt[place]) & mask.bool()[..., None]).any(1).nonzero().tolist()
    }
    assert len(ran) == len(set(ran)) and set(ran) < differ
    unmoved = {(place, c) for place, c, _ in differ}
    same = [(n.layer, n.site) not in {(p.layer, p.site) for p, c in unmoved if c == n.channel} for n in nodes_of(table)]
    assert any(same) and (table.frame.effect[same] == 0).all()
    last = {site for place, _, _ in differ - set(ran) for site in [place.site] if place.layer == 1}
    assert last == {"q", "attn_write", "mlp_read", "neuron", "mlp_write"}, "changes that no answer can see"


def nodes_of(table):
    return [Node(*row) for row in table.frame[["layer", "site", "channel"]].itertuples(index=False)]


def test_chosen_nodes_come_in_the_order_of_the_model(plain_model, batch):
    nodes = [Node(2, "final_read", 3), Node(0, "neuron", 7), Node(0, "q", 14), Node(0, "neuron", 2)]
    table = patch_nodes(plain_model, batch, nodes=nodes, progress=False)
    assert nodes_of(table) == [nodes[2], nodes[3], nodes[1], nodes[0]]
    whole = patch_nodes(plain_model, batch, progress=False)
    some = whole.frame.merge(table.frame, on=["layer", "site", "channel"])
    assert some.effect_x.to_list() == pytest.approx(some.effect_y.to_list(), abs=1e-5)


def test_hooks_that_are_on_the_model_stay_on_even_if_they_count_rows_and_positions(make_model, batch):
    model = make_model().double()

    def uneven(x, hook):
        scale = 1 + torch.arange(x.shape[0] * x.shape[1], dtype=x.dtype).view(*x.shape[:2], 1)
        return x * (1 + scale / 10)

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", uneven), ("blocks.0.hook_mlp_out", uneven)]):
        nodes = all_nodes(model, ("v", "mlp_write"))[::5]
        table = patch_nodes(model, batch, nodes=nodes, progress=False)
        expected = one_at_a_time(model, batch, logit_difference, nodes)
    assert table.frame.metric.to_list() == pytest.approx(expected, abs=1e-10)


def test_the_model_is_left_as_it_was(plain_model, batch):
    plain_model.train()
    patch_nodes(plain_model, batch, sites=("q",), progress=False)
    assert plain_model.training and all(not p._forward_hooks for p in plain_model.hook_dict.values())
    with pytest.raises(RuntimeError, match="stop"):
        patch_nodes(plain_model, batch, fail, sites=("q",), progress=False)
    assert plain_model.training and all(not p._forward_hooks for p in plain_model.hook_dict.values())


def fail(logits, batch):
    raise RuntimeError("stop")


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(make_model):
    """A model and prompts of which one pass with everything would take some 60 MB."""
    model = make_model(d_model=64, n_heads=4, d_head=16, d_mlp=256, d_vocab=300, n_ctx=32)
    drawn = torch.Generator().manual_seed(3)
    clean, corrupt = torch.randint(300, (2, 12, 24), generator=drawn)
    corrupt[:, :4] = clean[:, :4]
    lengths = torch.arange(13, 25)
    zeros = torch.zeros(12, dtype=torch.long)
    return model, TaskBatch(clean, corrupt, zeros + 3, zeros + 5, lengths, zeros)


def peak_of(work):
    """The most bytes that torch's allocator held during `work` beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("metric", [logit_difference, everywhere])
@pytest.mark.parametrize("budget_bytes", [9_000_000, 16_000_000])
def test_the_budget_is_kept_and_used(wide, metric, budget_bytes):
    model, batch = wide
    nodes = [Node(0, site, channel) for site in ("neuron", "k") for channel in range(12)]
    peak = peak_of(lambda: patch_nodes(model, batch, metric, nodes=nodes, budget_bytes=budget_bytes, progress=False))
    assert 0.2 * budget_bytes < peak < budget_bytes


def test_a_smaller_budget_gives_the_same_table(wide):
    model, batch = wide
    model = model.double()
    small, large = (
        patch_nodes(model, batch, nodes=[Node(0, "v", c) for c in range(16)], budget_bytes=size, progress=False).frame
        for size in (11_000_000, 100_000_000)
    )
    assert small.effect.to_list() == pytest.approx(large.effect.to_list(), abs=1e-10)


@pytest.mark.parametrize("metric", [logit_difference, everywhere])
def test_a_budget_in_which_nothing_fits_is_refused_with_numbers(wide, metric):
    model, batch = wide
    with pytest.raises(ConfigError, match=r"budget_bytes=1,000: to patch one node of these 12 prompts of up to 24 tok"):
        patch_nodes(model, batch, metric, budget_bytes=1000, progress=False)
    with pytest.raises(ConfigError, match="12 prompts at once, as this metric"):
        patch_nodes(model, batch, everywhere, sites=("v",), budget_bytes=3_500_000, progress=False)


def test_memory_is_flat_over_hundreds_of_sweeps(make_model, batch):
    model, pair = make_model(n_layers=1, afrac=None), batch.rows(slice(0, 1))

    def held():
        """How many tensors Python knows, and their bytes."""
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.layout is torch.strided]
        return len(tensors), sum(x.untyped_storage().nbytes() for x in tensors)

    def sweep():
        patch_nodes(model, pair, nodes=[Node(0, "q", 1)], progress=False)

    sweep()
    n_before, bytes_before = held()
    for _ in range(200):
        sweep()
    n_after, bytes_after = held()
    assert n_after <= n_before and bytes_after <= bytes_before  # what earlier tests left may go meanwhile


# -- refusals, the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"direction": "sideways"}, ConfigError, "direction='sideways'; choose 'denoising' or 'noising'"),
        ({"sites": ("z",)}, ConfigError, r"sites=\('z',\): expected some of attn_read, q, k"),
        ({"positions": "all"}, ConfigError, "positions='all'; expected None, 'each', or a list"),
        ({"positions": [6]}, ConfigError, r"positions=\[6\]: expected numbers from -6 to 5"),
        ({"nodes": [Node(0, "neuron", 20)]}, CircuitError, "L0.neuron.20: neuron has channels 0 to 19"),
        ({"nodes": []}, CircuitError, "there are no nodes to patch"),
        (
            {"metric": lambda logits, batch: logits.sum()},
            TaskError,
            r"one number per prompt, here 3; this one gave \(\)",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(plain_model, batch, asked, error, message):
    with pytest.raises(error, match=message):
        patch_nodes(plain_model, batch, progress=False, **asked)


def test_effects_are_changes_and_shares_of_the_difference_between_the_runs(plain_model, batch):
    for direction, base, source in (
        ("denoising", batch.corrupt, batch.clean),
        ("noising", batch.clean, batch.corrupt),
    ):
        table = patch_nodes(plain_model, batch, sites=("q",), direction=direction, progress=False)
        with torch.no_grad():
            start, end = (float(logit_difference(plain_model(t), batch).mean()) for t in (base, source))
        assert (table.frame.effect - (table.frame.metric - start)).abs().max() < 1e-5
        assert (table.frame.recovered_frac - table.frame.effect / (end - start)).abs().max() < 1e-5
        assert isinstance(table, PatchingTable)


def test_a_progress_bar_ends_at_the_end_and_says_how_long_is_left(plain_model, batch, capsys):
    patch_nodes(plain_model, batch, sites=("q",))
    said = capsys.readouterr().err
    assert "patching nodes: 100%" in said and "<00:00" in said
    patch_nodes(plain_model, batch, sites=("q",), progress=False)
    assert capsys.readouterr().err == ""


# -- TransformerLens' own ---------------------------------------------------------------------------------------------


def test_transformer_lens_patches_the_same_channels_one_by_one(plain_model, batch):
    """Its sweep takes a setter of ours, which puts one channel of one position: right under AbsTopK, a run for each."""
    patching = pytest.importorskip("transformer_lens.patching")
    whole = TaskBatch(**{**vars(batch), "lengths": torch.full((3,), 6)})
    cache = plain_model.run_with_cache(whole.clean)[1]
    for name, site in (("mlp_out", "mlp_write"), ("post", "neuron"), ("k", "k")):
        nodes = [Node(layer, site, channel) for layer in range(2) for channel in (1, 8)]
        ours = patch_nodes(plain_model, whole, nodes=nodes, positions=[2, 5], progress=False).frame

        def put(corrupt, index, clean):
            _, pos, channel = index
            flat(corrupt)[:, pos, channel] = flat(clean)[:, pos, channel]
            return corrupt

        metric = lambda logits: logit_difference(logits, whole).mean()
        index = ours[["layer", "pos", "channel"]].rename(columns={"channel": "head"})
        theirs = patching.generic_activation_patch(plain_model, whole.corrupt, cache, metric, put, name, index_df=index)
        assert ours.metric.to_list() == pytest.approx(theirs.tolist(), abs=1e-5)


# -- dense models of TransformerLens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_sweep_of_a_bridge_is_that_of_our_model_with_the_same_weights(dense_script, batch, norm):
    shape = dense_script.shape_of(50, norm=norm)
    weights = dense_script.random_weights(shape, std=0.3)
    models = dense_script.our_model(shape, weights), dense_script.bridge(shape, weights)
    nodes = all_nodes(models[0])[::5]
    for positions in (None, [-1]):
        tables = [patch_nodes(m, batch, nodes=nodes, positions=positions, progress=False).frame for m in models]
        assert tables[1].metric.to_list() == pytest.approx(tables[0].metric.to_list(), abs=3e-5)
    assert not math.isclose(tables[0].metric.min(), tables[0].metric.max(), abs_tol=0.1)


def test_rotary_positions_grouped_queries_and_gates_are_swept_as_by_hooks(make_bridge, batch):
    bridge, _ = make_bridge(rotary=True, n_kv=2, gated=True, act="silu")
    nodes = all_nodes(hooked(bridge), ("q", "k", "v", "neuron"))[::6]
    table = patch_nodes(bridge, batch, nodes=nodes, progress=False)
    expected = one_at_a_time(hooked(bridge), batch, logit_difference, nodes)
    assert table.frame.metric.to_list() == pytest.approx(expected, abs=3e-5)
