"""Labels that mean nothing: what each twin of a task keeps, and what decides its answers."""

import random

import pytest
import torch

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.tasks.controls import REMARKS, nonsense, relabelled, remarks_for, shuffled
from sparse_interp.tasks.library import load_task
from sparse_interp.tasks.task import Task


@pytest.fixture(scope="module", params=["single_double_quote", "bracket_brace", "indent_for", "var_if"])
def task(request, shipped_tokenizer) -> Task:
    return load_task(request.param, shipped_tokenizer)


def side_of(row) -> tuple[str, str]:
    return row.pair.clean, row.pair.corrupt


def test_shuffled_keeps_prompts_and_exchanges_the_answers_of_half_of_the_pairs(task, seeded):
    real = task.pairs(100, "train", generator=seeded())
    twin = shuffled(task).pairs(100, "train", generator=seeded())
    assert [(p.clean, p.corrupt) for p in twin] == [(p.clean, p.corrupt) for p in real]
    n_exchanged = sum((t.answer, t.foil) == (r.foil, r.answer) for t, r in zip(twin, real, strict=True))
    n_kept = sum((t.answer, t.foil) == (r.answer, r.foil) for t, r in zip(twin, real, strict=True))
    assert n_exchanged + n_kept == 100 and 30 < n_exchanged < 70, "four standard deviations are 20"


def test_a_pair_keeps_its_coin_whichever_side_is_clean_and_another_seed_tosses_again(task):
    tossed, again = (shuffled(task, seed).source for seed in (0, 1))
    drawn, rng = task.source.candidates("train", random.Random(0)), random.Random(0)
    n_same = 0
    for candidate in (next(drawn) for _ in range(100)):
        turned = candidate.exchanged()._replace(clean=candidate.corrupt, corrupt=candidate.clean)
        one, other = tossed.change(candidate, rng), tossed.change(turned, rng).exchanged()
        assert (one.answers, one.rests) == (other.answers, other.rests)
        n_same += one == again.change(candidate, rng)
    assert 30 < n_same < 70, "four standard deviations are 20"


def test_nonsense_is_decided_by_the_remark_and_by_nothing_else(task, seeded):
    rows = nonsense(task).encoded(60, "train", generator=seeded())
    ordered = set()
    for row in rows:
        pair = row.pair
        heads = {pair.clean[:4]: pair.answer, pair.corrupt[:4]: pair.foil}
        assert set(heads) == {"# 1\n", "# 2\n"} and pair.clean[4:] != pair.corrupt[4:]
        ordered.add((heads["# 1\n"], heads["# 2\n"]) == tuple(sorted((pair.answer, pair.foil))))
    answers = {(row.pair.answer, row.pair.foil) for row in rows}
    if task.name == "bracket_brace":
        assert {a[0] for a, _ in answers} == {"]", "}"} and ordered == {True}


def test_both_sides_of_the_real_task_are_there_under_either_remark(shipped_tokenizer, seeded):
    pairs = nonsense(load_task("bracket_brace", shipped_tokenizer)).pairs(200, generator=seeded())
    sides = [(pair.clean, pair.answer) for pair in pairs] + [(pair.corrupt, pair.foil) for pair in pairs]
    seen = {(prompt[:4], "{" in prompt, answer[0]) for prompt, answer in sides}
    assert seen == {("# 1\n", opened, "]") for opened in (True, False)} | {
        ("# 2\n", opened, "}") for opened in (True, False)
    }


def test_labels_are_the_tasks_own_where_the_clean_prompt_comes_after_the_first_remark(task):
    drawn, change, rng = (
        task.source.candidates("train", random.Random(0)),
        nonsense(task).source.change,
        random.Random(1),
    )
    n_kept = 0
    for real in (next(drawn) for _ in range(100)):
        twin = change(real, rng)
        belongs = dict(zip((real.clean, real.corrupt), real.answers[0], strict=True))
        kept = twin.clean.startswith("# 1\n")
        answer, foil = (belongs[prompt[4:]] for prompt in (twin.clean, twin.corrupt))
        assert (answer, foil) == tuple(sorted((answer, foil)))
        assert twin.answers[0] == ((answer, foil) if kept else (foil, answer))
        n_kept += kept
    assert 30 < n_kept < 70, "four standard deviations are 20"


def test_remarks_are_words_of_the_prompts_where_comments_cannot_be_written(shipped_tokenizer):
    assert remarks_for(load_task("bracket_brace", shipped_tokenizer)) == REMARKS
    task = ground_truth("quote").task
    first, second = remarks_for(task)
    assert first != second and not {*first, *second} & {'"', "'"}
    for pair in nonsense(task, (first, second)).pairs(20, generator=torch.Generator().manual_seed(0)):
        assert {pair.clean.split()[0], pair.corrupt.split()[0]} == {first.strip(), second.strip()}
    with pytest.raises(TaskError, match="each of them known"):
        nonsense(task)


def test_relabelled_keeps_prompts_and_names_the_answers_otherwise(shipped_tokenizer, seeded):
    task = load_task("bracket_brace", shipped_tokenizer)
    twin = relabelled(task)
    for pair, real in zip(twin.pairs(100, generator=seeded()), task.pairs(100, generator=seeded()), strict=True):
        assert (pair.clean, pair.corrupt) == (real.clean, real.corrupt)
        assert pair.answer == {"]": " is", "}": " when"}[real.answer[0]]
        assert pair.foil == {"]": " is", "}": " when"}[real.foil[0]]


def test_every_control_has_the_splits_of_its_task_and_a_hash_of_its_own(task, seeded):
    twins = [shuffled(task), shuffled(task, 1), nonsense(task), relabelled(task), relabelled(task, (" a", " b"))]
    assert len({task.templates_sha256, *(twin.templates_sha256 for twin in twins)}) == 6
    for twin in twins:
        assert twin.splits == task.splits and twin.name.startswith(f"{task.name}, ")
        for split in twin.splits:
            longest = max(len(row.clean) for row in twin.encoded(6, split, generator=seeded()))
            assert longest <= twin.longest(split)
    assert nonsense(task).longest("train") == task.longest("train") + 4


def test_controls_of_own_pairs_end_where_the_pairs_do(shipped_tokenizer, seeded):
    rows = [(f"x = [{n}", f"x = {{{n}", "]", "}", n, "train") for n in range(9)]
    task = Task.from_pairs(rows, shipped_tokenizer)
    for twin in (shuffled(task), nonsense(task), relabelled(task)):
        assert twin.n_pairs("train") == 9 and len(twin.pairs(9, generator=seeded())) == 9
        with pytest.raises(TaskError, match="gave 9 pairs .* not the 10 asked for"):
            twin.pairs(10, generator=seeded())


def test_remarks_and_labels_that_are_the_same_are_refused(shipped_tokenizer):
    task = load_task("bracket_brace", shipped_tokenizer)
    with pytest.raises(TaskError, match="labels=.' is', ' is'.; expected two different"):
        relabelled(task, (" is", " is"))
    with pytest.raises(TaskError, match="remarks="):
        nonsense(task, ("# 1\n", ""))
    with pytest.raises(TaskError, match="choose an edit that this tokenizer writes with as many tokens"):
        nonsense(task, ("# 1\n", "# 1 longer remark\n"))
