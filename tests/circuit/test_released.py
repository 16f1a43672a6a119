"""Released circuits run: what was stored with them is what running them gives, by a reference that shares no code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_interp.circuit import released
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.payload import Means, Pair, TaskSamples, read_means, read_payload
from sparse_interp.circuit.released import (
    RELEASED_SITES,
    answers_of_classes,
    likely_answers,
    loc_of,
    losses_without,
    place_of,
    released_circuit,
    released_loss,
    released_prompts,
    replay,
)
from sparse_interp.circuit.released_page import released_page
from sparse_interp.errors import CircuitError
from sparse_interp.faithfulness.controls import random_circuits
from sparse_interp.faithfulness.scores import score_circuit
from sparse_interp.interventions.answers import all_answer_logits
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import SITES, Node, places, width
from sparse_interp.model.transformer import load
from sparse_interp.tasks.task import TaskBatch
from sparse_interp.viewer.page import render_page

OPENAI = Path(__file__).parents[3] / "shared" / "fixtures" / "openai"
MIRROR, EXTRAS = OPENAI / "viz_mirror_synthetic", OPENAI / "released_form_variants" / "extras"


def opened(folder, dtype=torch.float64):
    """Model, payload and means; in float64, where AbsTopK decides as the reference does."""
    payload, means = read_payload(folder / "viz_data.pt"), read_means(folder / "mean_baseline_pretrain.pt")
    return load(folder, dtype=dtype), payload, means


def replayed(folder, change=lambda payload, means: (payload, means), dtype=torch.float64):
    model, *files = opened(folder, dtype)
    payload, means = change(*files)
    return replayed_in(model, released_circuit(model, payload, means), payload)


def replayed_in(model, circuit, payload):
    return replay(model, circuit, payload, answers=answers_of_classes(payload.samples, 4, 2), progress=False)


def without_single_nodes(payload):
    """The payload with fewer numbers to compare."""
    return replace(payload, ch_interv_losses={}, loc_interv_losses={})


def fewer(payload, means):
    return without_single_nodes(payload), means


def test_every_stored_number_comes_out_again(published):
    table = replayed(published)
    payload = read_payload(published / "viz_data.pt")
    assert table.largest("nats") < 1e-12
    assert table.largest("activation") < 1e-6, "activations are stored in float32"
    costs = table.frame[table.frame.measure == "ch_interv_losses"].stored - payload.interv_loss / 2
    assert (costs.abs() > 1e-6).mean() > 0.5, "a circuit that its nodes do not matter to would prove nothing"
    counts = table.frame.groupby("measure", sort=False).size().to_dict()
    assert counts["loss"] == counts["interv_loss"] == 1
    assert counts["ch_interv_losses"] == payload.n_nodes and counts["layer_interv_losses"] == 4
    assert counts["loc_interv_losses"] == len(payload.retained) == 17
    assert counts["task_samples"] == counts["task_samples_circuit"] == sum(map(bool, payload.retained.values()))


def test_losses_are_the_papers_half_of_what_is_stored(published_yolo2):
    table, payload = replayed(published_yolo2, fewer), read_payload(published_yolo2 / "viz_data.pt")
    rows = table.frame.set_index("measure")
    assert rows.stored["loss"] == payload.loss / 2 and rows.stored["interv_loss"] == payload.interv_loss / 2
    nodes = released_circuit(*opened(published_yolo2)).nodes.set_index(["layer", "site", "channel"])
    for loc, channels in payload.retained.items():
        for channel, loss in zip(channels, payload.ch_interv_losses[loc], strict=True):
            row = nodes.loc[(*place_of(loc, 2), channel)]
            assert row.importance_nats == pytest.approx((loss - payload.interv_loss) / 2) and row.stored_loss == loss


def test_in_float32_the_difference_is_rounding(published_yolo2):
    assert replayed(published_yolo2, fewer, torch.float32).largest("nats") < 1e-5


# -- what would go wrong shows -----------------------------------------------------------------------------------------


def no_half(monkeypatch):
    monkeypatch.setattr(released, "SIDES", 1)


def keys_for_values(monkeypatch):
    swapped = released.LOCS | {"k": "attn.v", "v": "attn.k"}
    monkeypatch.setattr(released, "LOCS", swapped)
    monkeypatch.setattr(released, "_SITE_OF", {loc: site for site, loc in swapped.items()})


def padding_as_text(monkeypatch):
    prompts = released.released_prompts

    def padded(samples, answers):
        return prompts(replace(samples, lengths=torch.full_like(samples.lengths, samples.tokens.shape[1])), answers)

    monkeypatch.setattr(released, "released_prompts", padded)


def held_after_the_last_norm(monkeypatch):
    monkeypatch.setitem(SITES, "final_resid", SITES["final_read"])


def zeros_for_means(monkeypatch):
    read = released.baseline_of
    monkeypatch.setattr(
        released,
        "baseline_of",
        lambda model, means: read(model, Means({loc: 0 * value for loc, value in means.values.items()}, ())),
    )


MISTAKES = [no_half, keys_for_values, padding_as_text, held_after_the_last_norm, zeros_for_means]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.replace("_", " "))
def test_a_reader_that_is_wrong_in_one_place_is_found_out(published_yolo2, monkeypatch, mistake):
    assert replayed(published_yolo2, fewer).largest("nats") < 1e-12
    mistake(monkeypatch)
    assert replayed(published_yolo2, fewer).largest("nats") > 1e-6


def first_head_last(payload, means):
    """q of all heads, but with the heads in another order."""
    order = torch.tensor([2, 3, 0, 1])
    values = {loc: v[order] if loc.endswith(".q") else v for loc, v in means.values.items()}
    retained = {
        loc: tuple((c + 2) % 4 for c in channels) if loc.endswith(".q") else channels
        for loc, channels in payload.retained.items()
    }
    return replace(without_single_nodes(payload), retained=retained), Means(values, ())


def positions_first(payload, means):
    """Reads whose two positional channels come before the stream's."""
    retained = {
        loc: tuple((c + 2) % 8 for c in channels) if loc.endswith("act_in") else channels
        for loc, channels in payload.retained.items()
    }
    values = {loc: v.roll(2) if loc.endswith("act_in") else v for loc, v in means.values.items()}
    return replace(without_single_nodes(payload), retained=retained), Means(values, ())


@pytest.mark.parametrize("change", [first_head_last, positions_first], ids=lambda c: c.__name__.replace("_", " "))
def test_channels_in_another_order_are_found_out(published_yolo2, change):
    assert replayed(published_yolo2, change).largest("nats") > 1e-6


# -- a circuit like any other ------------------------------------------------------------------------------------------


def test_a_released_circuit_is_kept_compared_and_controlled_like_any_other(published_yolo2, tmp_path, generator):
    model, payload, means = opened(published_yolo2, torch.float32)
    payload = without_single_nodes(payload)
    circuit = released_circuit(model, payload, means, task_name="brackets")
    assert "released" in circuit.baseline.kind and circuit.sites == RELEASED_SITES
    back = Circuit.load(circuit.save(tmp_path / "circuit.json"), model)
    assert replayed_in(model, back, payload) == replayed_in(model, circuit, payload)
    assert back.nodes.equals(circuit.nodes) and back.edges.equals(circuit.edges)
    (control,) = random_circuits(model, circuit, 1, generator=generator)
    assert control.nodes.site.value_counts().to_dict() == circuit.nodes.site.value_counts().to_dict()
    batch = released_prompts(payload.samples, answers_of_classes(payload.samples, 4, 2))
    pairs = TaskBatch(**{name: values[1:2] for name, values in vars(batch).items()})  # twins of equal length
    scores = score_circuit(model, circuit, pairs)
    with torch.no_grad(), circuit.running(model):
        run = model(batch.clean[1:2, : int(batch.lengths[1])])[:, -1]
    assert float(scores.circuit.logit_difference[0]) == pytest.approx(float(run[0, 4] - run[0, 2]), abs=1e-5)


def test_layers_that_are_run_once_for_many_change_no_loss(published_yolo2):
    """Groups within a layer, across layers, and none at all, beside the circuit run from its first layer every time."""
    model, payload, means = opened(published_yolo2)
    circuit = released_circuit(model, payload, means)
    batch = released_prompts(payload.samples, answers_of_classes(payload.samples, 4, 2))
    nodes = sorted(circuit.node_set)
    groups = [nodes[-1:], [nodes[0], nodes[-1]], [], nodes[3:9]]
    loss = lambda logits: released_loss(logits, batch).mean().item()
    found = losses_without(model, circuit.kept, circuit.baseline, groups, batch, loss)
    for group, together in zip(groups, found, strict=True):
        rest = Circuit.of_nodes(model, circuit.node_set - set(group), circuit.baseline, sites=circuit.sites)
        with torch.no_grad(), rest.running(model):
            assert together == pytest.approx(loss(all_answer_logits(model, batch)), abs=1e-12)


def test_means_of_ones_own_text_can_stand_in_for_the_published_ones(published_yolo2):
    model, payload, _ = opened(published_yolo2, torch.float32)
    own = mean_activations(model, payload.samples.tokens[:, :8], sites=RELEASED_SITES)
    circuit = released_circuit(model, payload, own)
    assert circuit.baseline is own
    by_measure = (
        replayed_in(model, circuit, without_single_nodes(payload))
        .summary()
        .frame.set_index("measure")
        .largest_difference
    )
    assert by_measure["loss"] < 1e-5 < 1e-3 < by_measure["interv_loss"]


def test_pair_values_stand_beside_the_weights_of_their_nodes(published_yolo2, written):
    model, payload, means = opened(published_yolo2)
    plain = released_circuit(model, payload, means)
    assert plain.edges.pair_value.isna().all()
    weights = plain.edges[plain.edges.kind == "weight"]
    of = {str(Node(*place_of(loc, 2), c)): (loc, c) for loc, channels in payload.retained.items() for c in channels}
    pairs = tuple(
        Pair(of[s], of[t], 7.0 + i) for i, (s, t) in enumerate(zip(weights.source, weights.target, strict=True))
    )
    circuit = released_circuit(model, replace(payload, pairs=pairs[1:]), means)
    values = circuit.edges.pair_value[circuit.edges.kind == "weight"].tolist()
    assert values[1:] == [8.0 + i for i in range(len(weights) - 1)] and values[0] != values[0]
    assert circuit.edges.pair_value[circuit.edges.kind != "weight"].isna().all()


def test_every_place_has_a_name_in_the_payload_and_back(any_model):
    named = [loc_of(place) for place in places(any_model.cfg, RELEASED_SITES)]
    assert len(named) == 8 * 2 + 1 == len(set(named))
    assert [place_of(loc, 2) for loc in named] == places(any_model.cfg, RELEASED_SITES)
    with pytest.raises(CircuitError, match="'0.attn.y' is no loc"):
        place_of("0.attn.y", 2)


# -- answers and losses ------------------------------------------------------------------------------------------------


def test_the_models_own_answers_are_the_likeliest_token_of_each_class(published_yolo2):
    model, *_ = opened(published_yolo2)
    tokens = torch.tensor([[3, 5, 0], [7, 1, 5], [3, 6, 0], [7, 1, 6]])
    samples = TaskSamples(tokens, torch.tensor([2, 3, 2, 3]), {}, {})
    with pytest.raises(CircuitError, match="expects token 9 after the prompts of both classes"):
        model.bigram_table.data[:, 9] += 50
        likely_answers(model, samples)
    model.bigram_table.data[5, 4] += 100
    model.bigram_table.data[6, 2] += 100
    assert likely_answers(model, samples).tolist() == [4, 4, 2, 2], "after the last real token, not after padding"


@pytest.mark.skipif(not EXTRAS.is_dir(), reason=f"the golden losses are not in {EXTRAS}")
def test_both_forms_of_the_loss_have_their_golden_values():
    logits, cases = load_file(EXTRAS / "extras.safetensors"), json.loads((EXTRAS / "extras.json").read_text())
    for case in cases["contrast_loss"]:
        rows = golden_logits(logits, case["i"])
        batch = pair_of_prompts(case["tokid"], case["alt_tokid"])
        for form, golden in (("two_way", case["loss_two_way"]), ("vocabulary", case["loss_full_vocab"])):
            assert 2 * float(released_loss(rows, batch, form).mean()) == pytest.approx(golden, abs=2e-6)


def golden_logits(tensors, i):
    """The last row of the patched and of the clean run."""
    return torch.stack([tensors[f"loss.{i}.logits_{name}"][-1] for name in ("patched", "clean")])


def pair_of_prompts(answer, foil):
    tokens = torch.zeros(2, 1, dtype=torch.long)
    answers = torch.tensor([answer, foil])
    one = torch.ones(2, dtype=torch.long)
    return TaskBatch(tokens, tokens, answers, answers.flip(0), one, torch.zeros(2, dtype=torch.long))


def test_the_loss_over_the_vocabulary_is_that_of_one_answer(generator):
    rows = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    p = rows.softmax(-1)
    found = released_loss(rows, pair_of_prompts(3, 5), "vocabulary")
    assert found.tolist() == pytest.approx([float(-p[0, 3].log()), float(-(1 - p[1, 3]).log())])
    assert released_loss(rows, pair_of_prompts(3, 5)).tolist() == pytest.approx(
        [float(-(p[i, a] / (p[i, a] + p[i, b])).log()) for i, (a, b) in enumerate([(3, 5), (5, 3)])]
    )
    with pytest.raises(CircuitError, match="form='halved'; choose two_way or vocabulary"):
        released_loss(rows, pair_of_prompts(3, 5), "halved")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_config": {"n_layer": 3}}, "of a model with n_layer=3, and .* has 2"),
        ({"model_config": {"d_pos_emb": None, "n_head": 4}}, "n_head=4"),
        ({"n_total": 7}, "counts 7 nodes in its model, and this model has"),
        ({"retained": {"0.attn.q": (4,)}, "ch_interv_losses": {}}, "q has channels 0 to 3, not 4"),
        ({"retained": {"7.attn.q": (0,)}, "ch_interv_losses": {}}, "q exists in layers 0 to 1, not in 7"),
    ],
)
def test_a_payload_of_another_model_is_refused(published_yolo2, change, words):
    model, payload, means = opened(published_yolo2)
    with pytest.raises(CircuitError, match=words):
        released_circuit(model, replace(payload, **change), means)


def test_means_of_another_model_are_refused(published_yolo2):
    model, payload, means = opened(published_yolo2)
    for loc in ("1.mlp.post_act", "final_resid"):
        rest = {name: value for name, value in means.values.items() if name != loc}
        with pytest.raises(CircuitError, match=f"has none for {loc}"):
            released_circuit(model, payload, Means(rest, ()))
        with pytest.raises(CircuitError, match="nodes in this model"):
            released_circuit(model, payload, Means({**rest, loc: torch.zeros(3)}, ()))


def test_prompts_that_are_missing_or_do_not_fit_are_refused(published_yolo2):
    model, payload, means = opened(published_yolo2)
    circuit = released_circuit(model, payload, means)
    with pytest.raises(CircuitError, match="carries no task_samples"):
        replay(model, circuit, replace(payload, samples=None))
    samples = payload.samples
    with pytest.raises(CircuitError, match="token ids up to 12"):
        replay(model, circuit, replace(payload, samples=replace(samples, tokens=samples.tokens.clamp(min=12))))
    with pytest.raises(CircuitError, match="final_resid has channels 0 to 5, not 9"):
        held = {"final_resid": {9: torch.zeros(samples.tokens.shape)}}
        replay(model, circuit, replace(payload, samples=replace(samples, activations=held)))


# -- the synthetic copy of the published files -------------------------------------------------------------------------


@pytest.mark.skipif(not MIRROR.is_dir(), reason=f"the synthetic copy of the published files is not in {MIRROR}")
@pytest.mark.parametrize(
    ("name", "circuit"),
    [("csp_yolo1", "single_double_quote/prune_v2"), ("csp_yolo2", "bracket_counting_beeg/prune_v4")],
)
def test_nodes_of_the_mirror_hold_what_its_makers_recorded(name, circuit):
    """Its activations are real and its losses are placeholders; its own code recorded the former."""
    model = load(MIRROR / "models" / name)
    payload = read_payload(MIRROR / "viz" / name / circuit / "17" / "viz_data.pt")
    means = mean_activations(model, payload.samples.tokens, sites=RELEASED_SITES)
    found = released_circuit(model, payload, means)
    table = replay(
        model,
        found,
        without_single_nodes(payload),
        answers=answers_of_classes(payload.samples, 60, 1008),
        progress=False,
    )
    frame = table.frame[table.frame.measure == "task_samples"]
    assert len(frame) == 14 and frame.difference.abs().max() < 1e-5
    assert frame.stored.abs().max() > 0.1
    page = released_page(found, payload, str, answers_of_classes(payload.samples, 60, 1008))
    assert all(node.top_contexts and node.on_prompts and node.knock_out for node in page.nodes)
    (loc, channel), snippets = next(iter(payload.snippets.items()))
    held = [
        float(s.activations[s.at]) for s in snippets if s.end == "top" and s.share == min(s.share for s in snippets)
    ]
    shown = next(node for node in page.nodes if node.id == str(Node(*place_of(loc, model.cfg.n_layers), channel)))
    assert {c.values[c.at] for c in shown.top_contexts if c.part == shown.top_contexts[0].part} <= set(held)
    assert shown.knock_out.loss == payload.ch_interv_losses[loc][payload.retained[loc].index(channel)] / 2
    render_page(page)
    assert payload.n_total == sum(width(model.cfg, place.site) for place in places(model.cfg, RELEASED_SITES))
