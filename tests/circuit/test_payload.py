"""Published payloads, in every variant: what they say comes out, what they cannot say is refused, nothing is run."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_interp.circuit.payload import Pair, read_means, read_payload
from sparse_interp.errors import CircuitError, SparseInterpError

MIRROR = Path(__file__).parents[3] / "shared" / "fixtures" / "openai" / "viz_mirror_synthetic" / "viz"
mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason=f"the synthetic copy of the published files is not in {MIRROR}")


def little_payload():
    """Every field once, for a model of one layer."""
    tokens = np.array([[3, 1, 4, 0], [3, 5, 0, 0], [3, 2, 4, 0], [3, 6, 7, 0]])
    held = {"0.attn.v": {2: np.arange(16.0).reshape(4, 4)}, "0.mlp.act_in": {}}
    snippet = (np.array([5.0, 6.0, 7.0]), np.array([0.5, 1.5, -2.0]), 1)
    return {
        "circuit_data": {"0.attn.v": np.array([2, 0]), "0.attn.resid_delta": np.array([1]),
                         "0.mlp.act_in": np.array([]),
                         "final_resid": np.array([3])},
        "samples": {"0.attn.v": {2: {0.001: ([snippet], []), 0.5: ([], [snippet, snippet])}}},
        "importances": {
            "beeg_model_config": {"n_layer": 1, "afrac": None, "rtopk": False},
            "loss": 0.25,
            "interv_loss": 0.5,
            "ch_interv_losses": {"0.attn.v": [0.75, 1.0], "0.attn.resid_delta": [1.25], "0.mlp.act_in": [],
                                 "final_resid": [1.5]},
            "layer_interv_losses": {"0.attn": 2.0, "0.mlp": 0.5},
            "loc_interv_losses": {"0.attn.v": 1.75, "final_resid": 1.5},
            "pair_data": [[np.array([[0.5], [-1.0]]), [2, 0], [1], ("0.attn.v", "0.attn.resid_delta")]],
            "pair_data_connections": [],
            "task_samples": (tokens, held),
            "task_samples_circuit": (tokens, {loc: dict(channels) for loc, channels in held.items()}),
        },
        "all_loss": [(0, 1.5), (7, 0.5)],
        "num_total_nodes": 36,
        "prune_config": {"heaviside_temp": 1.0, "logk_coef": 0.1, "lr": 0.01, "seed": 1},
        "is_kiter_bug_fixed": True,
    }  # fmt: skip


def test_every_field_is_read(written):
    payload = read_payload(written("viz_data.pt", little_payload()))
    assert payload.retained == {"0.attn.v": (2, 0), "0.attn.resid_delta": (1,), "0.mlp.act_in": (), "final_resid": (3,)}
    assert payload.n_nodes == 4 and payload.n_total == 36 and payload.notes == ()
    assert (payload.loss, payload.interv_loss) == (0.25, 0.5)
    assert payload.ch_interv_losses["0.attn.v"] == (0.75, 1.0), "in the order in which channels are retained"
    assert payload.layer_interv_losses == {"0.attn": 2.0, "0.mlp": 0.5}
    assert payload.loc_interv_losses == {"0.attn.v": 1.75, "final_resid": 1.5}
    assert payload.pairs == (
        Pair(("0.attn.v", 2), ("0.attn.resid_delta", 1), 0.5),
        Pair(("0.attn.v", 0), ("0.attn.resid_delta", 1), -1.0),
    )
    assert payload.history == ((0, 1.5), (7, 0.5)) and payload.prune_config["heaviside_temp"] == 1.0
    assert payload.model_config == {"n_layer": 1, "afrac": None, "rtopk": False}
    assert payload.samples.lengths.tolist() == [3, 2, 3, 3] and payload.samples.n_pairs == 2
    assert payload.samples.activations["0.attn.v"][2][1].tolist() == [4, 5, 6, 7]
    first, second, third = payload.snippets["0.attn.v", 2]
    assert (first.share, first.end, first.at, first.tokens.tolist()) == (0.001, "bottom", 1, [5, 6, 7])
    assert second.end == third.end == "top" and third.activations.tolist() == [0.5, 1.5, -2.0]


def with_tensor_keys(payload):
    """Channels of samples as 0-d tensors, of task samples too."""
    for owner in (payload["samples"], *(payload["importances"][f"task_samples{end}"][1] for end in ("", "_circuit"))):
        for loc, channels in owner.items():
            owner[loc] = {torch.tensor(channel): value for channel, value in channels.items()}
    return payload


def with_lists_for_tensors(payload):
    payload["circuit_data"] = {loc: channels.astype(int).tolist() for loc, channels in payload["circuit_data"].items()}
    payload["importances"]["ch_interv_losses"]["0.attn.v"] = np.array([0.75, 1.0])
    payload["importances"]["loss"] = np.array(0.25)
    return payload


def with_pairs_per_rank(payload):
    (entry,) = payload["importances"]["pair_data"]
    payload["importances"]["pair_data"] = [[entry], [entry]]
    return payload


def with_bias_among_pairs(payload):
    (entry,) = payload["importances"]["pair_data"]
    matrix, sources, targets, locs = entry
    wider = np.concatenate([matrix, [[9.0]]])
    payload["importances"]["pair_data"] = [[wider, [*map(torch.tensor, sources), "bias"], np.array(targets), locs]]
    return payload


def with_config_inside(payload):
    payload["circuit_data"]["prune_config"] = {"lr": 0.004}
    return payload


VARIANTS = [with_tensor_keys, with_lists_for_tensors, with_pairs_per_rank, with_bias_among_pairs, with_config_inside]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda change: change.__name__.replace("_", " "))
def test_variants_say_the_same(written, variant):
    plain = read_payload(written("plain.pt", little_payload()))
    other = read_payload(written("other.pt", variant(little_payload())))
    for name in ("retained", "pairs", "ch_interv_losses", "loss", "notes"):
        assert getattr(other, name) == getattr(plain, name), name
    assert other.snippets.keys() == plain.snippets.keys()
    assert other.samples.activations.keys() == plain.samples.activations.keys()
    assert torch.equal(other.samples.activations["0.attn.v"][2], plain.samples.activations["0.attn.v"][2])


def test_pairs_that_ranks_disagree_about_are_kept_once_and_noted(written):
    payload = with_pairs_per_rank(little_payload())
    first, second = payload["importances"]["pair_data"]
    payload["importances"]["pair_data"] = [first, [[second[0][0] + 1, *second[0][1:]]]]
    found = read_payload(written("viz_data.pt", payload))
    assert [pair.value for pair in found.pairs] == [0.5, -1.0]
    assert any("different values; the first is kept" in note for note in found.notes)


@pytest.mark.parametrize("name", [name for name in little_payload() if name != "circuit_data"])
def test_a_field_that_is_absent_is_noted_and_the_rest_is_read(written, name):
    payload = little_payload()
    del payload[name]
    found = read_payload(written("viz_data.pt", payload))
    assert found.retained["0.attn.v"] == (2, 0)
    assert found.notes == (() if name == "is_kiter_bug_fixed" else (f"{name} is absent",))


@pytest.mark.parametrize("name", list(little_payload()["importances"]))
def test_an_importance_that_is_absent_is_noted_and_the_rest_is_read(written, name):
    payload = little_payload()
    del payload["importances"][name]
    found = read_payload(written("viz_data.pt", payload))
    assert found.loss == (None if name == "loss" else 0.25)
    expected = {"task_samples_circuit": {}}.get(name, "whole")
    assert found.samples is None if name == "task_samples" else (expected == "whole" or not found.samples.in_circuit)
    assert found.notes == (() if name == "pair_data_connections" else (f"importances.{name} is absent",))


def test_what_nobody_knows_is_noted(written):
    payload = little_payload() | {"attention_maps": 3}
    payload["importances"]["edges"] = []
    notes = read_payload(written("viz_data.pt", payload)).notes
    assert notes == ("attention_maps was not read: unknown", "importances.edges was not read: unknown")


def at(*path):
    def change(payload, value):
        *owners, last = path
        for key in owners:
            payload = payload[key]
        if value is None:
            del payload[last]
        else:
            payload[last] = value

    return change


TOKENS = np.array([[3, 1, 4, 0], [3, 5, 0, 0], [3, 2, 4, 0], [3, 6, 7, 0]])

REFUSED = [
    (at("circuit_data"), None, "circuit_data is missing"),
    (at("circuit_data"), 3, "circuit_data is int; expected a dict"),
    (at("circuit_data", "0.attn.y"), np.array([1]), "circuit_data names '0.attn.y', which is no loc"),
    (at("circuit_data", "0.attn.v"), np.array([1, 1]), "lists a channel twice"),
    (at("circuit_data", "0.attn.v"), np.array([-1, 0]), "is -1.0; expected a channel"),
    (at("circuit_data", "0.attn.v"), np.array([0.5, 1]), "is 0.5; expected a channel"),
    (at("circuit_data", "0.attn.v"), "all", "is str; expected a list"),
    (at("importances"), [], "importances is list; expected a dict"),
    (at("importances", "loss"), "low", "loss is str; expected a number"),
    (at("importances", "loss"), float("nan"), "loss is nan; expected a number"),
    (at("importances", "interv_loss"), np.array([1.0, 2.0]), r"interv_loss is a tensor \[2\]"),
    (at("importances", "ch_interv_losses", "0.attn.v"), [1.0], "has 1 losses for 2 channels"),
    (at("importances", "ch_interv_losses", "1.attn.v"), [1.0], "has 1 losses for 0 channels"),
    (at("importances", "layer_interv_losses", "0.mlp.act_in"), 1.0, "names no part of a model"),
    (at("importances", "loc_interv_losses", "0.resid_in"), 1.0, "names no part of a model"),
    (at("importances", "pair_data"), [[np.eye(2), [2, 0], [1], ("0.attn.v", "0.attn.resid_delta")]], "for 2 and 1 ch"),
    (at("importances", "pair_data"), [[np.eye(1), [2], [1], ("0.attn.v", "0.attn.q")]], "which no weight does"),
    (
        at("importances", "pair_data"),
        [[np.array([[np.nan]]), [2], [1], ("0.attn.v", "0.attn.resid_delta")]],
        "holds what is no number",
    ),
    (at("importances", "pair_data"), [[np.eye(1), [2], [1]]], "an entry of pair_data is a tensor"),
    (at("importances", "pair_data"), [[np.eye(1), ["b"], [1], ("0.attn.v", "0.attn.resid_delta")]], "is str; expected"),
    (at("importances", "task_samples"), (TOKENS[:3], {}), "as many of each class"),
    (at("importances", "task_samples"), (TOKENS + 0.5, {}), "expected whole numbers"),
    (at("importances", "task_samples"), (TOKENS - 1, {}), "holds the token -1"),
    (at("importances", "task_samples"), (TOKENS * 0, {}), "different tokens|a row of padding alone"),
    (at("importances", "task_samples_circuit"), (TOKENS + 1, {}), "hold different tokens"),
    (at("importances", "task_samples"), (TOKENS, {"0.attn.v": {2: np.zeros((4, 3))}}), r"expected \[4, 4\]"),
    (at("importances", "task_samples"), (TOKENS,), "task_samples is 1 items; expected 2 items"),
    (at("samples", "0.attn.v", 2), {0.5: ([], [(np.array([5.0]), np.array([0.5]), 1)])}, "points at token 1 of 1"),
    (at("samples", "0.attn.v", 2), {0.5: ([], [(np.array([5.0]), np.array([0.5, 1.0]), 0)])}, "activations of"),
    (at("all_loss"), [(0, 1.0, 2.0)], "a row of all_loss is 3 items"),
    (at("num_total_nodes"), "many", "num_total_nodes is str"),
]


@pytest.mark.parametrize(("change", "value", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_is_no_payload_is_refused_with_what_is_wrong(written, change, value, words):
    payload = little_payload()
    change(payload, value)
    path = written("viz_data.pt", payload)
    with pytest.raises(CircuitError, match=words) as refusal:
        read_payload(path)
    assert str(path) in str(refusal.value)


# -- damaged and hostile files -----------------------------------------------------------------------------------------


def test_damage_is_refused_or_has_no_effect(written):
    """Bits flipped and ends cut off: never another payload, never another kind of error."""
    whole = written("viz_data.pt", little_payload())
    raw, sound = whole.read_bytes(), read_payload(whole)
    rng = np.random.default_rng(0)
    n_refused = 0
    for trial in range(120):
        bad = bytearray(raw)
        if trial % 3:
            bad[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        else:
            bad = bad[: int(rng.integers(len(raw)))]
        whole.write_bytes(bytes(bad))
        try:
            found = read_payload(whole)
        except SparseInterpError as error:
            n_refused += 1
            assert str(whole) in str(error)
        else:
            assert found.retained == sound.retained and found.ch_interv_losses == sound.ch_interv_losses
            assert torch.equal(found.samples.tokens, sound.samples.tokens)
    assert n_refused > 60


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("read", [read_payload, read_means])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, read):
    mark, path = tmp_path / "it-ran", tmp_path / "viz_data.pt"
    torch.save({"circuit_data": {}, "more": Hostile(str(mark))}, path)
    with pytest.raises(SparseInterpError, match="viz_data.pt"):
        read(path)
    path.write_bytes(pickle.dumps(Hostile(str(mark))))
    with pytest.raises(SparseInterpError, match="viz_data.pt"):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("read", [read_payload, read_means])
def test_what_is_no_archive_is_refused(tmp_path, read):
    with pytest.raises(SparseInterpError, match="is missing"):
        read(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not an archive")
    with pytest.raises(SparseInterpError, match="text.pt"):
        read(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "an archive of something else")
    with pytest.raises(SparseInterpError, match="other.pt"):
        read(tmp_path / "other.pt")


# -- means -------------------------------------------------------------------------------------------------------------

MEANS = {"0.attn.act_in": np.arange(4.0), "0.attn.q": np.arange(6.0), "final_resid": np.ones(4)}


@pytest.mark.parametrize(
    "stored",
    [
        MEANS,
        {"means": MEANS},
        {"n_tokens": 10, "mean": MEANS},
        {loc: value[None, None] for loc, value in MEANS.items()},
        {**MEANS, "0.attn.q": np.arange(6.0).reshape(2, 3)},
    ],
    ids=["by loc", "in one entry", "beside something", "with axes of one", "by head"],
)
def test_means_are_found_by_loc(written, stored):
    means = read_means(written("mean_baseline_pretrain.pt", stored))
    assert {loc: value.tolist() for loc, value in means.values.items()} == {
        loc: value.tolist() for loc, value in MEANS.items()
    }
    assert means.notes == (("'n_tokens' beside the means in 'mean' was not read",) if "n_tokens" in stored else ())


def test_means_of_places_without_nodes_are_noted(written):
    means = read_means(written("means.pt", {**MEANS, "0.resid_in": np.ones(4), 3: np.ones(2)}))
    assert set(means.values) == set(MEANS)
    assert [note.split(" were not read")[0] for note in means.notes] == ["means of '0.resid_in'", "means of 3"]


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({}, "expected one mapping from locs .* found keys nothing"),
        ({"a": 1}, "expected one mapping from locs .* found keys 'a'"),
        ({"a": MEANS, "b": MEANS}, "expected one mapping from locs"),
        ([1], "the file of means is list; expected a dict"),
        ({**MEANS, "0.attn.k": [1.0]}, "the mean of 0.attn.k is list; expected a tensor of numbers"),
        ({**MEANS, "0.attn.k": np.array([1])}, "the mean of 0.attn.k is a tensor"),
        ({**MEANS, "0.attn.k": np.array([np.nan])}, "the mean of 0.attn.k is not finite"),
    ],
)
def test_what_holds_no_means_is_refused(written, stored, words):
    with pytest.raises(CircuitError, match=words):
        read_means(written("means.pt", stored))


# -- the synthetic copy of the published files -------------------------------------------------------------------------


@mirror
@pytest.mark.parametrize("k", ["17", "34", "k_optim"])
@pytest.mark.parametrize(
    "where", ["csp_yolo1/single_double_quote/prune_v2", "csp_yolo2/bracket_counting_beeg/prune_v4"]
)
def test_the_files_of_the_mirror_are_read_whole(where, k):
    payload = read_payload(MIRROR / where / k / "viz_data.pt")
    raw = torch.load(MIRROR / where / k / "viz_data.pt", weights_only=True)
    assert payload.notes == ()
    assert payload.retained == {loc: tuple(channels.tolist()) for loc, channels in raw["circuit_data"].items()}
    assert payload.n_nodes == sum(channels.numel() for channels in raw["circuit_data"].values())
    assert len(payload.pairs) == sum(entry[0].numel() for entry in raw["importances"]["pair_data"])
    assert payload.samples.tokens.shape == (32, 24)
    assert payload.samples.lengths.tolist()[:2] == [12, 19]
    assert {loc for loc, _ in payload.snippets} == {loc for loc, channels in payload.retained.items() if channels}
