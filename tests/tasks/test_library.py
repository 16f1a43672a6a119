"""What every bundled task promises, under three tokenizers: pairs, splits, answers, and no word in two splits."""

import json
import math
import random
import re
import string
from collections import Counter

import pytest
import torch

from sparse_interp.data_files import data_folder
from sparse_interp.errors import TaskError
from sparse_interp.tasks.library import load_task, task_names, tasks, template_file
from sparse_interp.tasks.pairs import Candidate, EncodedPair, encode
from sparse_interp.tasks.task import Task
from sparse_interp.tasks.templates import words_of

SPLITS = ("train", "test", "shifted")
NEW = [name for name in task_names() if name != "single_double_quote"]
SLOT = re.compile(r"\$\{?\w+\}?")
every_task = pytest.mark.parametrize("name", task_names())

QUOTES_SHA256 = "dde5fe95052c2ae4cdffef357bb4e56fda79aa5abaf6d4136c51946f582f66e6"
QUOTES_FIRST = {
    "train": ('import os\n\nhandler = os.path.join(file_list, "table.txt', '")\n'),
    "test": ('import os\n\ntokens = os.path.join(units, "queries.log', '")\n'),
    "shifted": ("registry['license'] = attrs.get('body", "')\n"),
}
"""Hashes of this file are in saved circuits; a generator state must go on giving these prompts."""


@pytest.fixture(scope="module")
def drawn(shipped_tokenizer):
    """`drawn(name, split)`: the task and 60 pairs of it, made once."""
    kept: dict = {}

    def draw(name: str, split: str):
        if (name, split) not in kept:
            task = load_task(name, shipped_tokenizer)
            kept[name, split] = task, task.encoded(60, split, generator=torch.Generator().manual_seed(1))
        return kept[name, split]

    return draw


def test_the_table_has_a_row_per_task_with_the_templates_of_its_splits():
    frame = tasks().frame
    assert frame.task.tolist() == task_names() and len(frame) == 24
    for row in frame.itertuples():
        forms = template_file(row.task).templates
        assert row.train == row.test == sum("train" in form.splits for form in forms) >= 6
        assert row.shifted == sum("shifted" in form.splits for form in forms) >= 5
        assert row.text in ("Python", "stories") and row.description.endswith(".")


def test_every_template_file_is_a_task_and_every_task_a_template_file():
    assert {path.stem for path in (data_folder() / "tasks").glob("*.json")} == set(task_names())


def test_an_unknown_task_is_refused_with_the_nearest_names(shipped_tokenizer):
    with pytest.raises(TaskError, match="'singel_doubel_qoute'; did you mean 'single_double_quote'"):
        load_task("singel_doubel_qoute", shipped_tokenizer)
    with pytest.raises(TaskError, match="Known tasks: single_double_quote, bracket_counting.*Task.from_pairs"):
        load_task("zzz", shipped_tokenizer)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_a_pair_has_two_prompts_of_one_length_and_answers_that_continue_them(drawn, name, split):
    task, rows = drawn(name, split)
    for row in rows:
        assert len(row.clean) == len(row.corrupt) and row.clean != row.corrupt and row.answer != row.foil
        assert row.pair.answer != row.pair.foil
        for ids, token, text in ((row.clean, row.answer, row.pair.clean), (row.corrupt, row.foil, row.pair.corrupt)):
            assert ids[0] == task.tokenizer.bos_token_id
            assert task.tokenizer.decode(ids[1:]) == text
            assert task.tokenizer.encode(text, add_special_tokens=False) == ids[1:] or not row.is_whole
            assert token in (row.answer, row.foil)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("split", SPLITS)
def test_prompt_and_answer_are_the_tokens_with_which_a_whole_program_begins(drawn, name, split):
    task, _ = drawn(name, split)
    candidates = task.source.candidates(split, random.Random(0))
    n_pairs, n_tried = 0, 0
    while n_pairs < 20 and (n_tried := n_tried + 1) < 400:
        candidate = next(candidates)
        (answer, foil), (rest, foil_rest) = candidate.answers[0], candidate.rests
        wholes = (candidate.clean + answer + rest, candidate.corrupt + foil + foil_rest)
        ids = [task.tokenizer.encode(whole, add_special_tokens=False) for whole in wholes]
        for row in accepted(task, candidate):
            assert ids[0][: len(row.clean)] == [*row.clean[1:], row.answer]
            assert ids[1][: len(row.corrupt)] == [*row.corrupt[1:], row.foil]
            n_pairs += 1
    assert n_pairs == 20


def accepted(task: Task, candidate: Candidate) -> list[EncodedPair]:
    """The pair as this tokenizer has it, or nothing."""
    try:
        return [encode(candidate, task.tokenizer, task.source.max_changed, task.source.first_difference)]
    except TaskError:
        return []


def n_written(name: str, split: str) -> int:
    """How many pairs the templates of a split can write: choices of words for the slots in their prompts."""
    source, total = template_file(name), 0
    options = {kind: len(words) for kind, words in {**source.fillers[split], **source.marks}.items()}
    for form in (form for form in source.templates if split in form.splits):
        sides = form.sides or source.sides
        in_text = string.Template(form.text).get_identifiers()
        texts = [side.get(slot, "$" + slot) for side in sides for slot in in_text]
        slots = {slot for text in texts for slot in string.Template(text).get_identifiers()}
        kinds = Counter(slot.rstrip("0123456789") for slot in slots)
        total += math.prod(math.perm(options[kind], n) for kind, n in kinds.items())
    return total


@every_task
def test_a_thousand_distinct_pairs_are_there_in_every_split(drawn, name):
    for split in SPLITS:
        task, rows = drawn(name, split)
        assert len({frozenset((row.pair.clean, row.pair.corrupt)) for row in rows}) == len(rows)
        candidates = task.source.candidates(split, random.Random(2))
        some = [next(candidates) for _ in range(100)]
        assert len({frozenset((c.clean, c.corrupt)) for c in some}) == len(some)
        n_accepted = sum(len(accepted(task, candidate)) for candidate in some)
        assert n_accepted / len(some) * n_written(name, split) > 1200


def test_a_thousand_pairs_are_drawn_where_the_fewest_can_be(shipped_tokenizer, seeded):
    name, split = min(((name, split) for name in task_names() for split in SPLITS), key=lambda of: n_written(*of))
    pairs = load_task(name, shipped_tokenizer).pairs(1000, split, generator=seeded())
    assert len({frozenset((pair.clean, pair.corrupt)) for pair in pairs}) == 1000


@every_task
def test_either_side_of_the_edit_is_the_clean_one_equally_often(name):
    candidates = template_file(name).candidates("train", random.Random(0))
    n_in_order = sum(c.clean < c.corrupt for c in (next(candidates) for _ in range(200)))
    assert 60 < n_in_order < 140, "four standard deviations are 28"


@every_task
def test_no_word_of_one_split_is_in_the_prompts_of_another(drawn, name):
    source = template_file(name)
    texts = [text for options in source.marks.values() for text in options]
    texts += [text for form in source.templates for side in (form.sides or source.sides) for text in side.values()]
    fixed = {w for text in (*texts, *(form.text for form in source.templates)) for w in words_of(SLOT.sub(" ", text))}
    words = {}
    for split in SPLITS:
        _, rows = drawn(name, split)
        words[split] = {w for row in rows for w in words_of(row.pair.clean + " " + row.pair.corrupt)} - fixed
        known = {w for kind in source.fillers[split].values() for text in kind for w in words_of(text)}
        cut = {w for w in words[split] if w not in known}  # a prompt may end inside a word
        assert all(any(k.startswith(w) for k in known) for w in cut), cut - known
        words[split] -= cut
    assert not words["train"] & words["test"] and not words["shifted"] & (words["train"] | words["test"])


@every_task
def test_shifted_prompts_are_longer_and_of_other_templates(drawn, name):
    lengths, forms = {}, {}
    for split in SPLITS:
        _, rows = drawn(name, split)
        lengths[split] = sum(len(row.clean) for row in rows) / len(rows)
        forms[split] = {row.pair.template for row in rows}
    assert not forms["shifted"] & (forms["train"] | forms["test"])
    assert lengths["shifted"] > 1.5 * lengths["train"]


@every_task
def test_prompts_fit_a_context_of_128_and_are_as_long_as_announced(drawn, name):
    for split in SPLITS:
        task, rows = drawn(name, split)
        longest = max(len(row.clean) for row in rows)
        assert longest <= task.longest(split) <= 128
        assert task.n_pairs(split) is None


@every_task
def test_the_same_generator_state_gives_the_same_pairs(drawn, seeded, name):
    task, rows = drawn(name, "shifted")
    assert task.encoded(20, "shifted", generator=seeded(1)) == rows[:20]
    assert task.pairs(20, "shifted", generator=seeded(2)) != [row.pair for row in rows[:20]]


WITHOUT = {
    "other": {"for_while", "while_return_true", "tense"},
    "byte": {"with_as", "for_while", "indent_for", "while_return_true"},
}
"""Tasks whose edit these tokenizers cannot write with as many tokens: `while` has more bytes than `for`."""


@pytest.mark.parametrize("which", WITHOUT)
@every_task
def test_another_tokenizer_writes_a_task_or_is_refused_with_the_reason(request, seeded, which, name):
    tokenizer = request.getfixturevalue(f"{which}_tokenizer")
    if name in WITHOUT[which]:
        with pytest.raises(TaskError, match="(?s)the last because: .* choose an edit that this tokenizer writes"):
            load_task(name, tokenizer)
        return
    task = load_task(name, tokenizer)
    for split in SPLITS:
        batch = task.batch(6, split, generator=seeded())
        assert (batch.answer != batch.foil).all() and (batch.clean != batch.corrupt).any(1).all()
        assert batch.clean.shape == batch.corrupt.shape


def test_the_quote_task_is_the_one_that_saved_circuits_know(shipped_tokenizer):
    task = load_task("single_double_quote", shipped_tokenizer)
    raw = json.loads((data_folder() / "tasks" / "single_double_quote.json").read_text())
    assert "first_difference" not in raw and not task.source.first_difference
    assert task.templates_sha256 == QUOTES_SHA256
    pairs = {split: task.pairs(1, split, generator=torch.Generator().manual_seed(0))[0] for split in SPLITS}
    assert {split: (pair.clean, pair.answer) for split, pair in pairs.items()} == QUOTES_FIRST
