"""Interchange: the numbers of runs with hooks written out, between prompts and between a circuit and its model."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Ablation, ablate
from sparse_interp.interventions.baselines import Counterfactual, task_means
from sparse_interp.interventions.interchange import interchange, interchange_each
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node, NodeAt, Place, flat, masks, places, width
from sparse_interp.tasks.task import logit_difference

NODES = [Node(0, "neuron", c) for c in range(0, 20, 3)] + [Node(1, "v", 4)]


def everything(model):
    cfg = hooked(model).cfg
    return [Node(*place, channel) for place in places(cfg) for channel in range(width(cfg, place.site))]


def answers(model, prompt):
    with torch.no_grad():
        return model(prompt)[:, -1]


def by_hand(model, base, source, nodes):
    """Answer logits of one prompt [1 pos] whose nodes are set, one hook per node, to their values on another."""
    model, seen = hooked(model), {}
    hooks = []
    for node in nodes:
        name = Place(node.layer, node.site).hook

        def put(activation, hook, node=node):
            changed = flat(activation).clone()
            changed[..., node.channel] = seen[node]
            return changed.view_as(activation)

        def keep(activation, hook, node=node):
            seen[node] = flat(activation)[..., node.channel].clone()

        with model.hooks([(name, keep)]):
            answers(model, source)
        hooks.append((name, put))
    with model.hooks(hooks):
        return answers(model, base)


def test_a_set_of_nodes_does_what_it_does_prompt_by_prompt_with_hooks_written_out(any_kind, pairs, alone):
    row = interchange(any_kind, pairs, NODES).frame.iloc[0]
    score = lambda logits, pair: float(logit_difference(logits, pair))
    exchanged = [score(by_hand(any_kind, p.clean, p.corrupt, NODES), p) for p in alone]
    base, source = ([score(answers(any_kind, side(p)), p) for p in alone] for side in (_clean, _corrupt))
    mean = lambda values: sum(values) / len(values)
    assert (row.base, row.source, row.exchanged) == pytest.approx((mean(base), mean(source), mean(exchanged)), abs=1e-5)
    assert row.effect == pytest.approx(mean(exchanged) - mean(base), abs=1e-5) and abs(row.effect) > 1e-3
    assert row.recovered_frac == pytest.approx(row.effect / (mean(source) - mean(base)), rel=1e-3)
    assert row.n_nodes == len(NODES) and row.n_prompts == 3


def _clean(pair):
    return pair.clean


def _corrupt(pair):
    return pair.corrupt


def test_all_nodes_carry_everything_and_none_carry_nothing(any_kind, pairs):
    """The pairs end in the same token, so the bigram row is the same."""
    table = interchange(any_kind, pairs, {"all": everything(any_kind), "none": ()}).frame.set_index("nodes")
    assert table.recovered_frac["all"] == 1 and table.effect["none"] == 0
    assert table.exchanged["all"] == table.source["all"]
    assert table.follows_frac["none"] in (0, pytest.approx(float("nan"), nan_ok=True))


def test_prompts_that_choose_differently_follow_their_source(any_kind, pairs):
    """Of the first and last prompt two tokens are asked about that change places between the runs."""
    with torch.no_grad():
        clean, corrupt = (any_kind(side)[torch.arange(3), pairs.last] for side in (pairs.clean, pairs.corrupt))
    turned = (clean[:, :, None] > clean[:, None]) & (corrupt[:, :, None] < corrupt[:, None])
    answer, foil = zip(*(turned[row].nonzero()[0].tolist() for row in range(3)), strict=True)
    asked = replace(pairs, answer=torch.tensor(answer), foil=torch.tensor(foil))
    asked.answer[1], asked.foil[1] = int(clean[1].argmax()), int(clean[1].argmin())
    table = interchange(any_kind, asked, {"all": everything(any_kind), "none": ()}).frame.set_index("nodes")
    assert table.follows_frac["all"] == 1 and table.follows_frac["none"] == 0


@pytest.fixture
def circuit(any_kind, pairs):
    nodes = [node for i, node in enumerate(everything(any_kind)) if i % 2]
    return Circuit.of_nodes(any_kind, nodes, task_means(any_kind, pairs))


def test_between_a_circuit_and_its_model(any_kind, pairs, circuit):
    """All nodes of the model's run, put into the circuit's, are the model again; and the other way round."""
    whole = everything(any_kind)
    into_circuit = interchange(any_kind, pairs, whole, source=pairs, running=circuit.running).frame.iloc[0]
    into_model = interchange(any_kind, pairs, whole, source=pairs, source_running=circuit.running).frame.iloc[0]
    assert into_circuit.exchanged == into_circuit.source == into_model.base
    assert into_model.exchanged == into_model.source == into_circuit.base
    assert abs(into_circuit.effect) > 1e-3


def test_nodes_of_the_circuit_in_the_models_run_have_the_circuits_values(any_kind, pairs, circuit):
    """By hand: the outside at its means inside the source run alone."""
    node, seen = Node(1, "mlp_read", 3), {}
    keep = lambda activation, hook: seen.update(x=flat(activation)[..., 3].clone())
    put = lambda activation, hook: torch.cat([activation[..., :3], seen["x"][..., None], activation[..., 4:]], -1)
    hook = Place(1, "mlp_read").hook
    model, last = hooked(any_kind), (torch.arange(3), pairs.last)
    with torch.no_grad(), circuit.running(any_kind), model.hooks([(hook, keep)]):
        any_kind(pairs.clean)
    with torch.no_grad(), model.hooks([(hook, put)]):
        expected = logit_difference(any_kind(pairs.clean)[last], pairs).mean().item()
    found = interchange(any_kind, pairs, [node], source=pairs, source_running=circuit.running).frame.iloc[0]
    assert found.exchanged == pytest.approx(expected, abs=1e-5) and found.nodes == "L1.mlp_read.3"


def exchanged_by_hand(model, base, source, node, within, source_within, at=None):
    """Answer logits of one prompt with one node as in another run; both run as told."""
    model, name, seen = hooked(model), Place(node.layer, node.site).hook, {}

    def put(activation, hook):
        changed = flat(activation).clone()
        where = slice(None) if at is None else at
        changed[:, where, node.channel] = seen["x"][:, where]
        return changed.view_as(activation)

    with source_within(model), model.hooks([(name, lambda x, hook: seen.update(x=flat(x)[..., node.channel].clone()))]):
        answers(model, source)
    with within(model), model.hooks([(name, put)]):
        return answers(model, base)


AS_CIRCUIT = {
    "model": (False, False),
    "circuit": (True, True),
    "into circuit": (True, False),
    "into model": (False, True),
}
"""Whether base and source runs are those of the circuit."""


@pytest.mark.parametrize(
    ("runs", "edges_pruned"), [*((runs, False) for runs in AS_CIRCUIT), ("circuit", True), ("into circuit", True)]
)
def test_every_node_alone_does_what_hooks_written_out_do(any_kind, pairs, alone, circuit, runs, edges_pruned):
    if edges_pruned:
        masks = {m: mask & (torch.arange(mask.numel()).view(mask.shape) % 3 > 0) for m, mask in
                 circuit.edge_masks(any_kind).items()}  # fmt: skip
        circuit = Circuit.of_nodes(any_kind, circuit.node_set, circuit.baseline, edges=masks)
    within, source_within = (circuit.running if cut else nullcontext for cut in AS_CIRCUIT[runs])
    source = None if runs in ("model", "circuit") else pairs
    read = lambda logits, rows: torch.stack([logit_difference(logits, pairs.rows(rows)), logits[:, 7]], 1)
    each = interchange_each(
        any_kind, pairs, circuit.inside, read, source=source, running=within, source_running=source_within
    )
    assert set(each.nodes) == circuit.node_set and each.exchanged.shape == (circuit.n_nodes, 3, 2)
    for i, pair in enumerate(alone):
        other = pair.corrupt if source is None else pair.clean
        with torch.no_grad(), within(any_kind):
            base = answers(any_kind, pair.clean)
        expected = torch.stack([logit_difference(base, pair), base[:, 7]], 1)[0].double()
        torch.testing.assert_close(each.base[i], expected, atol=1e-5, rtol=1e-5)
        for node in each.nodes[i :: 1 + len(each.nodes) // 6]:
            logits = exchanged_by_hand(any_kind, pair.clean, other, node, within, source_within)
            expected = torch.stack([logit_difference(logits, pair), logits[:, 7]], 1)[0].double()
            found = each.exchanged[each.nodes.index(node), i]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=str((node, i)))
    assert (each.exchanged - each.base).abs().amax((1, 2)).gt(1e-4).sum() > circuit.n_nodes / 4


@pytest.mark.parametrize("kind", [{"attention_dir": "bidirectional"}, {"positions": "concat", "d_pos_emb": 3}], ids=str)
def test_every_node_alone_in_models_of_other_kinds(make_model, pairs, alone, kind):
    model = make_model(**kind)
    inside = masks(everything(model)[::11], model.cfg)
    each = interchange_each(
        model, pairs, inside, lambda logits, rows: logit_difference(logits, pairs.rows(rows))[:, None]
    )
    for i, pair in enumerate(alone):
        for n, node in enumerate(each.nodes):
            logits = exchanged_by_hand(model, pair.clean, pair.corrupt, node, nullcontext, nullcontext)
            assert each.exchanged[n, i, 0] == pytest.approx(float(logit_difference(logits, pair)), abs=1e-5), node


def test_a_node_kept_at_some_positions_is_exchanged_there(plain_model, pairs):
    pair = pairs.rows(slice(1))
    spots = [NodeAt(1, "k", 3, 2), NodeAt(1, "k", 3, 4), NodeAt(1, "neuron", 2, 6), NodeAt(1, "neuron", 2, 3)]
    spots += [NodeAt(0, "attn_read", 5, pos) for pos in (1, 2, 6)] + [NodeAt(2, "final_read", 5, 6)]
    circuit = Circuit.of_nodes(plain_model, spots, task_means(plain_model, pairs), n_pos=7)
    read = lambda logits, rows: logit_difference(logits, pair.rows(rows))[:, None]
    for within in (nullcontext, circuit.running):
        each = interchange_each(
            plain_model, pair, circuit.inside, read, source=pair.swapped(), running=within, source_running=within
        )
        for node, number in zip(each.nodes, each.exchanged[:, 0, 0].tolist(), strict=True):
            at = [spot.pos for spot in spots if spot.node == node]
            logits = exchanged_by_hand(plain_model, pair.clean, pair.corrupt, node, within, within, at)
            assert number == pytest.approx(float(logit_difference(logits, pair)), abs=1e-5), node


def test_hooks_of_somebody_else_are_felt_by_every_node_alone(plain_model, pairs, alone):
    name, node = Place(0, "attn_write").hook, Node(1, "k", 4)
    third = lambda activation, hook: activation * (torch.arange(activation.shape[1]) == 2)[:, None]
    read = lambda logits, rows: logit_difference(logits, pairs.rows(rows))[:, None]
    with plain_model.hooks([(name, third)]):
        each = interchange_each(plain_model, pairs, masks([node], plain_model.cfg), read)
        for i, pair in enumerate(alone):
            logits = exchanged_by_hand(plain_model, pair.clean, pair.corrupt, node, nullcontext, nullcontext)
            assert each.exchanged[0, i, 0] == pytest.approx(float(logit_difference(logits, pair)), abs=1e-5)


def test_sources_may_be_any_prompts_of_any_length(plain_model, pairs, alone):
    source = pairs.rows(torch.tensor([1, 2, 0]))
    row = interchange(plain_model, pairs, NODES, source=source).frame.iloc[0]
    values = []
    for i, pair in enumerate(alone):
        other = alone[(1, 2, 0)[i]].clean
        n = pair.clean.shape[1]
        # a source that is too short goes on as its last token's values do; one that is too long is cut
        kept = {}
        with torch.no_grad():
            _, cache = plain_model.run_with_cache(other)
        for node in NODES:
            held = flat(cache[Place(node.layer, node.site).hook])[0, :, node.channel]
            kept[node] = torch.cat([held, held[-1:].expand(max(0, n - len(held)))])[:n]

        def put(activation, hook, kept=kept):
            changed = flat(activation).clone()
            for node in NODES:
                if Place(node.layer, node.site).hook == hook.name:
                    changed[0, :, node.channel] = kept[node]
            return changed.view_as(activation)

        names = {Place(node.layer, node.site).hook for node in NODES}
        with plain_model.hooks([(name, put) for name in names]):
            values.append(float(logit_difference(answers(plain_model, pair.clean), pair)))
    assert row.exchanged == pytest.approx(sum(values) / 3, abs=1e-5)


def test_refusals(plain_model, pairs):
    with pytest.raises(CircuitError, match="3 prompts take values from 2 sources"):
        interchange(plain_model, pairs, NODES, source=pairs.rows(slice(2)))
    with pytest.raises(CircuitError, match="L5.q.0"):
        interchange(plain_model, pairs, [Node(5, "q", 0)])


# -- TransformerLens' own ---------------------------------------------------------------------------------------------


def tools():
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "fit_das"):
        pytest.skip("this TransformerLens has no interchange interventions")
    return analysis


@pytest.mark.parametrize("site", ["attn_read", "attn_write", "mlp_read", "neuron", "mlp_write"])
def test_transformer_lens_interchange_in_single_channels_is_ours(any_kind, pairs, site):
    """Theirs changes one position, ours all: the same where prompts differ in their last token alone."""
    analysis, place, channels = tools(), Place(1, site), [1, 4, 6]
    clean = pairs.clean[:, :4]
    corrupt = torch.cat([clean[:, :3], pairs.corrupt[:, 1:2]], 1)
    ends = replace(pairs, clean=clean, corrupt=corrupt, lengths=torch.full((3,), 4))
    at, run = torch.full((3,), 3), lambda tokens: any_kind(tokens)[:, -1]
    any_kind.eval()
    source = analysis.collect_activations(any_kind, place.hook, corrupt, run, positions=at)
    step = analysis.SubspaceInterchange(analysis.neuron_basis(source.shape[1], channels))
    theirs = analysis.intervened_logits(any_kind, place.hook, step, clean, source, run, positions=at)
    ours = interchange(any_kind, ends, [Node(1, site, channel) for channel in channels]).frame.iloc[0]
    assert ours.exchanged == pytest.approx(float(logit_difference(theirs, ends).mean()), abs=1e-5)
    assert abs(ours.effect) > 1e-4


def test_a_subspace_that_das_finds_is_exchanged_as_hooks_of_ours_would(plain_model, pairs):
    analysis = tools()
    hook, at = "blocks.1.hook_resid_post", pairs.last
    run = lambda tokens: plain_model(tokens)[torch.arange(len(tokens)), pairs.last[: len(tokens)]][:, [3, 13]]
    found = analysis.fit_das(
        plain_model, hook, pairs.clean, pairs.corrupt, torch.tensor([1, 0, 1]), run, rank=2, base_positions=at,
        source_positions=at, epochs=2, batch_size=3,
    )  # fmt: skip
    basis = found.basis.detach()
    source = analysis.collect_activations(plain_model, hook, pairs.corrupt, run, positions=at)
    theirs = analysis.intervened_logits(
        plain_model, hook, analysis.SubspaceInterchange(basis), pairs.clean, source, run, positions=at
    )

    def move(activation, hook):
        moved, rows = activation.clone(), torch.arange(3)
        here = activation[rows, at]
        moved[rows, at] = here + (source - here) @ basis @ basis.T
        return moved

    with torch.no_grad(), plain_model.hooks([(hook, move)]):
        torch.testing.assert_close(theirs, run(pairs.clean), atol=1e-5, rtol=0)
        assert (theirs - run(pairs.clean)).abs().max() < 1e-5
    assert (theirs - run(pairs.clean).detach()).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [{}, {"afrac": None}], ids=["sparse", "dense"])
def test_transformer_lens_faithfulness_without_a_writer_is_our_counterfactual_ablation(make_model, pairs, kind):
    """Its graph has edges from writers to readers; without all edges that leave an MLP, that MLP is as on the twin."""
    analysis, model = tools(), make_model(**kind)
    pair = pairs.rows(slice(1))
    metric = lambda logits: logits[:, -1, 3].sum() - logits[:, -1, 13].sum()
    config = analysis.EdgeAttributionConfig(granularity="edge")
    edges = list(analysis.attribution_patch(model, pair.clean, pair.corrupt, metric, config).edge_scores)
    kept = [(writer, reader) for writer, reader in edges if not (writer.kind == "mlp_out" and writer.layer == 0)]
    assert len(kept) < len(edges)
    theirs = analysis.faithfulness(model, pair.clean, pair.corrupt, metric, kept)
    nodes = [Node(0, "mlp_write", channel) for channel in range(12)]
    with torch.no_grad():
        clean, corrupt = metric(model(pair.clean)), metric(model(pair.corrupt))
        with ablate(model, nodes, Ablation.full(Counterfactual()), batch=pair):
            ours = metric(model(pair.clean))
    assert theirs.recovered == pytest.approx(float((ours - corrupt) / (clean - corrupt)), rel=1e-4)
    assert abs(theirs.recovered - 1) > 1e-3
