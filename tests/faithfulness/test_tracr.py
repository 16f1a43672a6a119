"""Tracr programs: the imported models answer what RASP answers, to every word, and their keys are what they claim."""

from collections import Counter

import pytest
import torch

from sparse_interp.errors import ConfigError, TaskError
from sparse_interp.faithfulness.answer_key import Key
from sparse_interp.faithfulness.components import component_edges, greedy_components
from sparse_interp.faithfulness.ground_truth import ground_truth, key_effects, key_kl, logits_of, measured_key
from sparse_interp.faithfulness.recover import roc_auc
from sparse_interp.faithfulness.tracr import (
    COMPONENT_TASKS,
    DEFAULT,
    TOLERANCE,
    tracr_answers,
    tracr_cases,
    tracr_components,
    tracr_model,
    tracr_program,
    tracr_programs,
    tracr_task,
    tracr_truth,
)
from sparse_interp.interventions.baselines import mean_activations


def said_by_the_model(name):
    """Every word that a program was compiled for, what its model says at each place, and what RASP says."""
    program, model = tracr_program(name), tracr_model(name)
    ids = model.tokenizer.get_vocab()
    names = {i: token for token, i in ids.items()}
    by_length = {}
    for word, answers in tracr_answers(program):
        by_length.setdefault(len(word), []).append((word, answers))
    for rows in by_length.values():
        tokens = torch.tensor([[model.tokenizer.bos_token_id, *(ids[x] for x in word)] for word, _ in rows])
        with torch.no_grad():
            said = model(tokens)[:, 1:].argmax(-1).tolist()
        for (word, answers), row in zip(rows, said, strict=True):
            yield word, [names[i] for i in row], answers


@pytest.mark.parametrize("name", tracr_programs())
def test_a_compiled_model_answers_what_rasp_answers_to_every_word(name):
    n = 0
    for word, said, answers in said_by_the_model(name):
        wrong = [(x, y) for x, y in zip(said, answers, strict=True) if y is not None and x != y]
        assert not wrong, (word, said, answers)
        n += sum(y is not None for y in answers)
    assert n > 100


def ints(word):
    return [int(x) for x in word]


def depth(word):
    return word.count("(") - word.count(")")


IN_PYTHON = {
    "reverse": lambda w: list(reversed(w)),
    "sort": lambda w: sorted(w),
    "sort_descending": lambda w: sorted(w, reverse=True),
    "copy": lambda w: list(w),
    "histogram": lambda w: [str(w.count(x)) for x in w],
    "maximum": lambda w: [max(w)] * len(w),
    "minimum": lambda w: [min(w)] * len(w),
    "length": lambda w: [str(len(w))] * len(w),
    "count_a": lambda w: [str(w.count("a"))] * len(w),
    "count_a_mod_2": lambda w: [str(w.count("a") % 2)] * len(w),
    "distinct": lambda w: [str(len(set(w)))] * len(w),
    "most_frequent": lambda w: [Counter(w).most_common(1)[0][0]] * len(w),
    "palindrome": lambda w: [str(w == w[::-1])] * len(w),
    "ends_alike": lambda w: [str(w[0] == w[-1])] * len(w),
    "seen_before": lambda w: [str(x in w[:n]) for n, x in enumerate(w)],
    "first_a": lambda w: [str(w.index("a")) if "a" in w else None] * len(w),
    "letter_third_last": lambda w: [w[-3] if len(w) > 2 else None] * len(w),
    "shift_2": lambda w: [None, None, *w[:-2]][: len(w)],
    "rank_ascending": lambda w: [str(sum(y < x for y in ints(w))) for x in ints(w)],
    "dyck_depth": lambda w: [str(depth(w[: n + 1])) for n in range(len(w))],
    "dyck_balanced": lambda w: [str(depth(w) == 0 and all(depth(w[:n]) >= 0 for n in range(len(w))))] * len(w),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_what_rasp_answers_is_what_python_answers(name):
    for word, answers in tracr_answers(tracr_program(name)):
        assert list(answers) == IN_PYTHON[name](word), word


def test_a_task_asks_about_the_last_place_and_no_word_is_of_two_splits():
    task, seen = tracr_task(tracr_program("sort")), {}
    for split in task.splits:
        rows = task.encoded(task.n_pairs(split), split, generator=torch.Generator().manual_seed(0))
        for pair in (row.pair for row in rows):
            assert pair.answer.strip() == max(pair.clean.split()) != max(pair.corrupt.split()) == pair.foil.strip()
            assert seen.setdefault(pair.clean, split) == split == seen.setdefault(pair.corrupt, split)
    assert set(seen.values()) == {"train", "test", "shifted"}
    assert {len(word.split()) for word, split in seen.items() if split == "shifted"} == {4}
    assert {len(word.split()) for word, split in seen.items() if split == "test"} == {2, 3, 4}


@pytest.fixture(scope="module")
def proportion():
    return tracr_truth("proportion")


def prompts_and_means(truth, split="test", n=24):
    generator = torch.Generator().manual_seed(1)
    means = mean_activations(truth.model, truth.blocks(128, generator=generator))
    return truth.task.batch(n, split, generator=generator).both_sides(), means


@pytest.mark.parametrize("name", ["shift_1", "histogram"])
def test_a_key_stands_and_every_part_of_it_is_needed(name):
    truth = tracr_truth(name)
    key = Key(truth.nodes, truth.edges)
    effects = key_effects(truth, key, *prompts_and_means(truth, "train", 64))
    assert effects.whole <= 2 * TOLERANCE and min(effects.without.values()) >= TOLERANCE / 2
    assert effects.without.keys() == truth.nodes | truth.edges
    batch, means = prompts_and_means(truth)
    assert key_kl(truth, key, batch, means) == pytest.approx(key_effects(truth, key, batch, means).whole, abs=1e-6)
    assert key_kl(truth, key, batch, means) <= 2 * TOLERANCE


def test_a_host_answers_as_the_program_that_is_hidden_in_it_and_by_the_same_key(proportion):
    truth = tracr_cases("default")["tracr-proportion"]()
    batch, means = prompts_and_means(truth)
    assert torch.allclose(
        logits_of(truth.model, batch).log_softmax(-1), logits_of(proportion.model, batch).log_softmax(-1), atol=2e-2
    )
    effects = key_effects(truth, Key(truth.nodes, truth.edges), batch, means)
    assert effects.whole <= 2 * TOLERANCE and min(effects.without.values()) >= TOLERANCE
    assert truth.model.cfg.d_model > proportion.model.cfg.d_model and len(truth.nodes) == len(proportion.nodes)
    again = tracr_cases("default")["tracr-proportion"]()
    assert truth.nodes == again.nodes and torch.equal(truth.model.unembed.W_U, again.model.unembed.W_U)


def test_a_measured_key_is_that_of_a_hand_built_model():
    truth = ground_truth("quote")
    batch, means = prompts_and_means(truth)
    assert measured_key(truth.model, batch, means, 1e-3) == Key(truth.nodes, truth.edges)


@pytest.mark.parametrize("name", COMPONENT_TASKS)
def test_greedy_removal_between_components_lands_on_the_edges_that_acdc_published(name):
    """Zero ablation and mean squared error, as in the paper, where both areas are 1.000."""
    truth = tracr_components(name)
    stays = greedy_components(truth, [1e-6, 1e-4, 1e-2, 1.0])
    assert truth.edges < set(component_edges(truth.model))
    assert roc_auc(stays, truth.edges) == 1.0


def test_boards_and_names():
    assert len(tracr_cases("default")) == len(DEFAULT) == 30 and len(tracr_cases("full")) >= 100
    assert tracr_cases("default").keys() <= tracr_cases("full").keys() <= {f"tracr-{name}" for name in tracr_programs()}
    assert "tracr-shift_1" in tracr_cases("default")
    with pytest.raises(ConfigError, match="'default' or 'full'"):
        tracr_cases("small")
    with pytest.raises(TaskError, match="called 'revers'"):
        tracr_program("revers")
    with pytest.raises(TaskError, match="No letter changes what 'length' answers"):
        tracr_task(tracr_program("length"))
    with pytest.raises(TaskError, match="known for reverse, proportion"):
        tracr_components("sort")
