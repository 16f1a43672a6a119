"""A search over settings: what it spends, what it finds, and that stopping it changes nothing."""

import math
import shutil
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from filelock import FileLock

from sparse_interp.circuit import search
from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.graph import SCORE_COLUMNS, Circuit
from sparse_interp.circuit.search import LOG, RANGES, CircuitSearch, search_circuits
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.faithfulness.ground_truth import all_nodes
from sparse_interp.interventions.baselines import mean_activations, zero_values
from sparse_interp.interventions.prune_config import PruneConfig

BASE = PruneConfig(n_train=8, n_selection=4, n_steps=2, batch_size=4)
QUICK = replace(BASE, n_train=16, n_selection=8, n_steps=5, batch_size=8, sites=("neuron", "attn_write"))


class Killed(BaseException):
    """What no handler of ours catches, as SIGKILL is."""


@pytest.fixture
def searched(truth):
    def run(base=BASE, seed=0, at_once=3, model=truth.model, task=truth.task, **options) -> CircuitSearch:
        kept = {"baseline": zero_values(model), "generator": torch.Generator().manual_seed(seed), "progress": False}
        return search_circuits(model, task, base, at_once=at_once, **options, **kept)

    return run


@pytest.fixture
def landscape(monkeypatch):
    """Instead of gates: sizes that follow from the settings, least near lr 0.01 and noise 0.5. Lists who was sized."""
    asked = []

    def sized(model, task, found, selection, baseline, config, *, seed):
        asked.append(config)
        n_nodes = round(3 + 8 * abs(math.log10(config.lr) + 2) + 10 * abs(config.noise - 0.5))
        values = {"KL(model || circuit)": 0.1 * config.lr, "task loss of circuit": 0.3, "task loss of model": 0.25}
        scores = pd.DataFrame([(name, v, "nats", "full", "", "selection", 8) for name, v in values.items()])
        kept = {"prune": config, "seed": seed, "scores": scores.set_axis(SCORE_COLUMNS, axis=1)}
        kept |= {"task_name": task.name, "task_sha256": task.templates_sha256}
        return Circuit.of_nodes(model, all_nodes(model.cfg)[:n_nodes], baseline, **kept)

    monkeypatch.setattr(search, "learn_many", lambda model, pairs, configs, baseline, generators: list(configs))
    monkeypatch.setattr(search, "sized", sized)
    return asked


def told(found: CircuitSearch) -> pd.DataFrame:
    return found.frame.drop(columns="seconds")


def test_the_first_trial_is_the_settings_as_given_and_finds_what_find_circuit_finds(truth, searched):
    found = searched(QUICK, n_trials=2, at_once=1)
    drawn = torch.Generator().manual_seed(0)
    alone = find_circuit(
        truth.model, truth.task, QUICK, baseline=zero_values(truth.model), generator=drawn, progress=False
    )
    first = found.frame.iloc[0]
    assert {name: first[name] for name in RANGES} == {name: getattr(QUICK, name) for name in RANGES}
    scores = alone.scores.set_index("measure").value
    assert (first.n_nodes, first.n_edges, first.kl_nats) == (
        alone.n_nodes,
        alone.n_edges,
        scores["KL(model || circuit)"],
    )
    assert found.circuit.n_nodes <= alone.n_nodes
    second = found.frame.iloc[1]
    assert all(second[name] != first[name] and low <= second[name] <= high for name, (low, high, _) in RANGES.items())


def test_a_bridge_is_searched_as_ours_is(truth, dense_truth):
    found = []
    for model in dense_truth:
        means = mean_activations(model, truth.blocks(32, generator=torch.Generator().manual_seed(0)))
        kept = {"baseline": means, "generator": torch.Generator().manual_seed(0), "progress": False}
        found.append(search_circuits(model, truth.task, QUICK, n_trials=2, **kept))
    ours, theirs = found
    assert (
        ours.circuit.node_set == theirs.circuit.node_set == {node for node in truth.nodes if node.site in QUICK.sites}
    )
    assert told(theirs)[["n_nodes", "n_edges", "lr"]].equals(told(ours)[["n_nodes", "n_edges", "lr"]])


def test_the_smallest_circuit_comes_with_its_settings_and_the_budget(searched, landscape):
    found = searched(n_trials=12)
    assert len(found) == 12 and len({config.lr for config in landscape}) == 12
    best = found.frame.sort_values(["n_nodes", "n_edges", "trial"]).iloc[0]
    assert found.circuit.n_nodes == best.n_nodes < found.frame.n_nodes[0]
    assert found.circuit.prune == replace(BASE, **{name: best[name] for name in RANGES})
    assert found.summary.startswith(f"{best.n_nodes:.0f} nodes and ") and "12 trials of 2 steps" in found.summary
    assert "budget: 12 trials; " in found.summary and f"given: {found.frame.n_nodes[0]:.0f} nodes" in found.summary
    assert found.frame.loss_gap_nats.tolist() == pytest.approx([0.05] * 12)


def test_proposals_follow_what_was_found(searched, landscape):
    frame = searched(n_trials=30).frame
    assert frame.n_nodes[20:].mean() < 0.7 * frame.n_nodes[:10].mean()


def test_the_same_seed_makes_the_same_search_and_another_one_another(searched, landscape):
    first = searched(n_trials=7)
    assert told(searched(n_trials=7)).equals(told(first))
    assert not told(searched(n_trials=7, seed=1)).equals(told(first))


@pytest.mark.parametrize("where", ["asking", "learning", "sizing", "before it is recorded", "after it is recorded"])
def test_a_search_that_is_killed_ends_as_it_would_have(searched, landscape, tmp_path, monkeypatch, where):
    """In the middle of its fifth round of three, when proposals follow what was found."""
    whole = searched(n_trials=17, folder=tmp_path / "whole")
    owner, name, at, after = {
        "asking": (search._optuna().trial.Trial, "suggest_float", 13 * len(RANGES) + 3, False),
        "learning": (search, "learn_many", 4, False),
        "sizing": (search, "sized", 13, False),
        "before it is recorded": (search._Trials, "record", 13, False),
        "after it is recorded": (search._Trials, "record", 13, True),
    }[where]
    real, calls = getattr(owner, name), []

    def once(*given, **options):
        calls.append(name)
        if len(calls) == at + 1 and not after:
            raise Killed
        value = real(*given, **options)
        if len(calls) == at + 1:
            raise Killed
        return value

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, once)
        with pytest.raises(Killed):
            searched(n_trials=17, folder=tmp_path / "cut")
    n_before = len(landscape)
    again = searched(n_trials=17, folder=tmp_path / "cut")
    assert told(again).equals(told(whole)) and again.circuit.nodes.equals(whole.circuit.nodes)
    assert len(landscape) - n_before <= 5, "trials that were finished are not run again"
    finished = searched(n_trials=17, folder=tmp_path / "cut")
    assert finished.frame.equals(again.frame) and len(landscape) - n_before <= 5
    assert finished.circuit.nodes.equals(whole.circuit.nodes) and finished.circuit.prune == whole.circuit.prune


def test_half_a_line_and_a_lock_that_a_killed_process_left_are_taken_away(searched, landscape, tmp_path):
    whole = searched(n_trials=8, folder=tmp_path / "whole")
    written = (tmp_path / "whole" / LOG).read_bytes()
    lines = written.splitlines(keepends=True)
    for share in (0.3, 0.6, 0.95):
        folder = tmp_path / str(share)
        shutil.copytree(tmp_path / "whole", folder)
        cut = len(b"".join(lines[: int(share * len(lines))])) + 9
        (folder / LOG).write_bytes(written[:cut])
        (folder / (LOG + ".lock")).symlink_to(folder / LOG)
        assert told(searched(n_trials=8, folder=folder)).equals(told(whole))


def test_a_search_goes_on_with_a_larger_budget(searched, landscape, tmp_path):
    first = searched(n_trials=3, folder=tmp_path)
    more = searched(n_trials=6, folder=tmp_path)
    assert told(more)[:3].equals(told(first)) and len(more) == len(landscape) == 6
    assert told(more).equals(told(searched(n_trials=6)))
    kept = sorted(path.name for path in tmp_path.glob("trial-*"))
    best = int(more.size_at_budget.frame.best_trial.iloc[-1])
    assert kept == [f"trial-{best}.json", f"trial-{best}.safetensors"]


def test_seconds_are_a_budget_too(searched, landscape, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    found = searched(seconds=5.0, at_once=1)
    assert found.frame.seconds.tolist() == [2, 2, 2] and "budget: 5 s" in found.summary
    assert len(searched(seconds=5.0, n_trials=2, at_once=1)) == 2


def test_trials_without_a_circuit_are_rows_that_say_why(searched, landscape, tmp_path, monkeypatch):
    real = search.sized

    def sometimes(model, task, found, selection, baseline, config, *, seed):
        if config.noise > 0.9:
            raise CircuitError("no circuit meets the stopping rule")
        return real(model, task, found, selection, baseline, config, seed=seed)

    monkeypatch.setattr(search, "sized", sometimes)
    found = searched(n_trials=9, folder=tmp_path)
    failed = found.frame.noise > 0.9
    assert failed[0] and 0 < failed.sum() < 9
    assert found.frame.n_nodes.isna().equals(failed) and (found.frame.note != "").equals(failed)
    curve = found.size_at_budget.frame
    assert math.isinf(curve.n_nodes[0]) and curve.n_nodes.is_monotonic_decreasing
    assert curve.n_nodes.iloc[-1] == found.circuit.n_nodes == found.frame.n_nodes.min()
    assert curve.seconds.tolist() == pytest.approx(found.frame.seconds.cumsum().tolist())
    assert "as given: no circuit" in found.summary
    line = found.plot().lines[0]
    assert line.get_ydata().tolist() == curve.n_nodes[curve.best_trial.notna()].tolist()


def test_a_search_without_any_circuit_says_why(truth, searched, tmp_path):
    hopeless = replace(BASE, objective="task_loss", target_task_loss=1e-9)
    for _ in range(2):
        with pytest.raises(CircuitError, match="none of 2 trials found a circuit; the first says: no circuit meets"):
            searched(hopeless, n_trials=2, folder=tmp_path)


def test_settings_beyond_the_ranges_widen_them_and_a_price_of_nothing_stays_one(searched, landscape):
    found = searched(replace(BASE, noise=3.0, k_coef=0.0), n_trials=4)
    assert landscape[0].noise == 3.0 and {config.k_coef for config in landscape} == {0.0}
    assert found.frame.k_coef.isna().all() and found.frame.noise[1:].max() <= 3.0


def test_a_folder_of_another_search_is_refused(make_model, truth, searched, landscape, tmp_path):
    searched(n_trials=1, folder=tmp_path)
    refused = {
        "its setting n_steps is 2, and here it is 7": {"base": replace(BASE, n_steps=7)},
        "its seed is 0, and here it is 4": {"seed": 4},
        "its at_once is 3, and here it is 2": {"at_once": 2},
        "its model is ": {"model": make_model(truth.task.tokenizer, d_vocab=len(truth.task.tokenizer), n_ctx=32)},
        "its task is quote ": {"task": replace(truth.task, name="other")},
    }
    for words, change in refused.items():
        with pytest.raises(CircuitError, match=words):
            searched(n_trials=1, folder=tmp_path, **change)
    with FileLock(tmp_path / ".searching"), pytest.raises(CircuitError, match="another process is searching in"):
        searched(n_trials=2, folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CircuitError, match="cannot write to"):
        searched(n_trials=2, folder=tmp_path / "file")
    (tmp_path / LOG).write_text("not a journal\n" * 3)
    with pytest.raises(CircuitError, match="is damaged"):
        searched(n_trials=2, folder=tmp_path)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "a search needs a budget"),
        ({"n_trials": 0}, "n_trials=0, and a search needs at least 1"),
        ({"n_trials": 1, "at_once": 0}, "at_once=0, and a search needs at least 1"),
        ({"seconds": 0.0}, "seconds=0.0; it must be above 0"),
    ],
)
def test_a_search_needs_a_budget(searched, budget, words):
    with pytest.raises(ConfigError, match=words):
        searched(**budget)


def test_without_optuna_a_search_says_what_to_install(searched, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparse_interp\[search\]'"):
        searched(n_trials=1)
