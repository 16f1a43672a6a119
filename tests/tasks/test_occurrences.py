"""Tasks found in text: every prompt is there with its answer, and its twin is the closest place with the other."""

import random

import numpy as np
import pytest

from sparse_interp.corpus import Document, split_documents
from sparse_interp.errors import TaskError
from sparse_interp.tasks.occurrences import distances, occurrence_pairs
from sparse_interp.tasks.task import Task

NAMES = "alpha beta gamma delta kappa sigma omega theta lambda zeta".split()  # noqa: SIM905 - words read better so


def documents(n: int = 60) -> list[Document]:
    """Small files in which `=` is followed by None or True."""
    rng = random.Random(0)
    made = []
    for i in range(n):
        lines = []
        for j in range(12):
            name, value = rng.choice(NAMES), rng.choice(["None", "True"])
            lines.append(f"    if {rng.choice(NAMES)} > {i}:\n        self.{name}{j} = {value}\n")
        made.append(Document(f"made/module_{i}.py", f"def run_{i}(self):\n" + "".join(lines)))
    return made


ANSWERS = (" None", " True")


@pytest.fixture(scope="module")
def found(shipped_tokenizer):
    """Pairs per split, and the documents that they come from."""
    made = documents()
    rng = random.Random(3)
    pairs = occurrence_pairs(
        made, shipped_tokenizer, ANSWERS, n_tokens=10, n_pairs=40, max_changed=None, edit=None, rng=rng
    )
    return made, pairs


def test_both_prompts_of_a_pair_stand_in_the_text_with_their_answers(found):
    made, pairs = found
    whole = "\0".join(document.text for document in made)
    assert {pair.answer for pair in pairs["train"]} == set(ANSWERS)
    for pair in (*pairs["train"], *pairs["test"]):
        assert pair.clean + pair.answer in whole and pair.corrupt + pair.foil in whole
        assert {pair.answer, pair.foil} == set(ANSWERS)


def test_splits_come_from_different_documents_and_share_no_prompt(found):
    made, pairs = found
    texts = {split: {text for pair in pairs[split] for text in (pair.clean, pair.corrupt)} for split in pairs}
    assert not texts["train"] & texts["test"]
    assert not {p.template for p in pairs["train"]} & {p.template for p in pairs["test"]}
    for pair in pairs["train"]:
        own = made[pair.template].text
        assert pair.clean + pair.answer in own or pair.corrupt + pair.foil in own


def test_no_place_is_in_two_pairs_and_the_closest_are_paired(found, shipped_tokenizer):
    _, pairs = found
    texts = [text for pair in pairs["test"] for text in (pair.clean, pair.corrupt)]
    assert len(set(texts)) == len(texts)
    encoded = {text: np.array(shipped_tokenizer.encode(text, add_special_tokens=False)) for text in texts}
    apart = [(encoded[pair.clean] != encoded[pair.corrupt]).sum() for pair in pairs["test"]]
    assert apart == sorted(apart), "smallest edits first"
    first = pairs["test"][0]
    others = [p.corrupt if p.foil == first.foil else p.clean for p in pairs["test"]]
    assert all((encoded[first.clean] != encoded[other]).sum() >= apart[0] for other in others)


def test_distances_are_those_counted_one_by_one():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 3, (5, 7)), rng.integers(0, 3, (4, 7))
    expected = [[sum(a != b for a, b in zip(x, y, strict=True)) for y in theirs] for x in ours]
    assert distances(ours, theirs).tolist() == expected


def test_a_task_from_text_has_prompts_of_the_length_asked_for_and_documents_as_templates(shipped_tokenizer, seeded):
    task = Task.from_corpus(documents(), shipped_tokenizer, ANSWERS, n_tokens=12, n_pairs=30, generator=seeded())
    assert task.splits == ("train", "test") and task.n_pairs("train") == 30
    batch = task.batch(20, "train", generator=seeded())
    assert (batch.lengths == 13).all() and len(set(batch.template.tolist())) > 3
    ids = {token: shipped_tokenizer.encode(token, add_special_tokens=False)[0] for token in ANSWERS}
    assert set(batch.answer.tolist()) == set(ids.values())
    again = Task.from_corpus(documents(), shipped_tokenizer, ANSWERS, n_tokens=12, n_pairs=30, generator=seeded())
    assert again.templates_sha256 == task.templates_sha256


def test_a_bound_on_the_edit_is_kept(shipped_tokenizer, seeded):
    def within(bound: int) -> Task:
        given = {"n_tokens": 11, "n_pairs": 50, "max_changed": bound, "generator": seeded()}
        return Task.from_corpus(documents(), shipped_tokenizer, ANSWERS, **given)

    task, widest = within(6), 0
    for split in task.splits:
        batch = task.batch(task.n_pairs(split), split, generator=seeded())
        widest = max(widest, int((batch.clean != batch.corrupt).sum(1).max()))
    assert widest <= 6
    assert within(widest).templates_sha256 == task.templates_sha256, "a pair at the bound itself is within it"


def test_with_an_edit_the_twin_is_the_edited_place(shipped_tokenizer, seeded):
    def edit(text: str) -> str | None:
        return text.replace(" >", " <") if text.count(" >") == 1 else None

    given = {"n_tokens": 12, "n_pairs": 20, "generator": seeded()}
    task = Task.from_corpus(documents(), shipped_tokenizer, ANSWERS, edit=edit, **given)
    for pair in task.pairs(20, generator=seeded()):
        assert edit(pair.clean) == pair.corrupt or edit(pair.corrupt) == pair.clean
        assert {pair.answer, pair.foil} == set(ANSWERS)


def test_what_makes_no_task_is_refused_with_the_reason(shipped_tokenizer, seeded):
    def find(answers: tuple[str, str], **given) -> Task:
        return Task.from_corpus(documents(), shipped_tokenizer, answers, generator=seeded(), **given)

    with pytest.raises(TaskError, match=r"answer ' omega theta' is \d tokens .* with their leading space"):
        find((" omega theta", " None"))
    with pytest.raises(TaskError, match="answers ' None' and ' None' are one token"):
        find((" None", " None"))
    with pytest.raises(
        TaskError, match=r"No pairs for split 'train': in its \d+ .* and 0 with ' while', 0 of them usable"
    ):
        find((" None", " while"))
    with pytest.raises(TaskError, match="n_tokens=0, n_pairs=500; expected at least 1"):
        find(ANSWERS, n_tokens=0)
    one = documents(1)
    for given, message in ((one, "1 documents with 1 names"), (2 * one, "2 documents with 1 names")):
        with pytest.raises(TaskError, match=f"{message}; expected two or more, each with its own"):
            Task.from_corpus(given, shipped_tokenizer, ANSWERS, generator=seeded())


def test_text_that_was_held_out_from_training_has_both_splits_as_well(shipped_tokenizer, seeded):
    _, held_out = split_documents(documents(200), 0.1)
    task = Task.from_corpus(held_out, shipped_tokenizer, ANSWERS, n_tokens=11, n_pairs=20, generator=seeded())
    assert task.splits == ("train", "test")
