"""Template files: slots, words and sides become pairs, and files that cannot are refused."""

import json
import random
from pathlib import Path

import pytest

from sparse_interp.errors import TaskError
from sparse_interp.tasks.task import Task
from sparse_interp.tasks.templates import TemplateFile, words_of


def small_file(folder: Path, **changes) -> TemplateFile:
    spec = {
        "description": "d",
        "max_changed_tokens": 1,
        "sides": [{"quote": '"'}, {"quote": "'"}],
        "marks": {},
        "fillers": {"train": {"key": ["name", "path"]}, "test": {"key": ["mode"]}},
        "templates": [{"splits": ["train", "test"], "text": "x = $quote$key", "answers": ["$quote"], "rest": "\n"}],
    }
    path = folder / "small.json"
    path.write_text(json.dumps({**spec, **changes}))
    return TemplateFile.read(path)


def test_a_word_in_two_splits_is_refused_even_inside_a_longer_filler(tmp_path):
    with pytest.raises(TaskError, match="'name' is a filler of both 'train' and 'test'"):
        small_file(tmp_path, fillers={"train": {"key": ["name"]}, "test": {"key": ["file_name"]}})


def test_a_slot_that_nothing_fills_and_a_file_without_templates_are_refused(tmp_path):
    form = {"splits": ["train"], "text": "$word = $quote$key", "answers": ["$quote"], "rest": ""}
    with pytest.raises(TaskError, match=r"template 0 has slots \['word'\]"):
        small_file(tmp_path, templates=[form])
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(TaskError, match="empty.json is not a template file"):
        TemplateFile.read(tmp_path / "empty.json")


def test_more_pairs_than_a_template_file_can_make_are_refused(tmp_path, shipped_tokenizer, seeded):
    task = Task("small", shipped_tokenizer, small_file(tmp_path))
    assert len(task.pairs(2, "train", generator=seeded())) == 2
    with pytest.raises(TaskError, match="gave 2 pairs of split 'train' and not the 3 asked for"):
        task.pairs(3, "train", generator=seeded())


def test_two_slots_of_a_prompt_never_hold_the_same_word(tmp_path, shipped_tokenizer, seeded):
    form = {"splits": ["train"], "text": "$key1 = $quote$key2", "answers": ["$quote"], "rest": "\n"}
    task = Task("small", shipped_tokenizer, small_file(tmp_path, templates=[form]))
    prompts = {pair.clean.replace("'", '"') for pair in task.pairs(2, generator=seeded())}
    assert prompts == {'name = "path', 'path = "name'}
    with pytest.raises(TaskError, match="gave 2 pairs"):
        task.pairs(3, generator=seeded())


def test_templates_that_no_pair_of_equal_length_comes_from_are_refused_when_the_task_is_made(
    tmp_path, shipped_tokenizer
):
    sides = [{"quote": '"'}, {"quote": '["a", "'}]
    with pytest.raises(TaskError, match="(?s)refused, the last because: clean .* expected equal lengths"):
        Task("small", shipped_tokenizer, small_file(tmp_path, sides=sides))


def test_pairs_that_a_tokenizer_spoils_are_passed_over(tmp_path, shipped_tokenizer, seeded):
    forms = [
        {"splits": ["train"], "text": f"x = {edit}$quote$key", "answers": ["$quote"], "rest": "\n"}
        for edit in ("", "$long")
    ]
    sides = [{"quote": '"', "long": ""}, {"quote": "'", "long": "f(a) + "}]
    task = Task("small", shipped_tokenizer, small_file(tmp_path, sides=sides, templates=forms))
    batch = task.batch(2, generator=seeded())
    assert batch.template.tolist() == [0, 0]


def test_the_first_form_of_answer_that_is_one_token_on_both_sides_is_taken(tmp_path, shipped_tokenizer, seeded):
    form = {"splits": ["train"], "text": "x = f($quote$key", "rest": "\n"}
    for forms, taken in ((["$quote zz", "$quote)\n", "$quote"], ")\n"), (["$quote zz", "$quote"], "")):
        source = small_file(tmp_path, templates=[{**form, "answers": forms}])
        pair = Task("small", shipped_tokenizer, source).pairs(1, generator=seeded())[0]
        assert pair.answer[1:] == pair.foil[1:] == taken


def test_a_template_may_have_sides_of_its_own(tmp_path, shipped_tokenizer, seeded):
    forms = [{"splits": ["train"], "text": f"x{n} = $quote$key", "answers": ["$quote"], "rest": "\n"} for n in range(2)]
    forms[1]["sides"] = [{"quote": "["}, {"quote": "{"}]
    task = Task("small", shipped_tokenizer, small_file(tmp_path, templates=forms))
    found = {pair.template: {pair.answer, pair.foil} for pair in task.pairs(4, generator=seeded())}
    assert found == {0: {'"', "'"}, 1: {"[", "{"}}


def test_what_a_side_holds_may_have_slots_and_may_touch_letters(tmp_path):
    forms = [{"splits": ["train"], "text": "f(${mark}$mode$mark, $one", "answers": ["$two"], "rest": ""}]
    sides = [{"mode": "rb", "one": "$key1", "two": "$key2"}, {"mode": "wb", "one": "$key2", "two": "$key1"}]
    source = small_file(tmp_path, templates=forms, sides=sides, marks={"mark": ["'"]})
    candidate = source.fill(0, source.fillers["train"], random.Random(0))
    assert {candidate.clean, candidate.corrupt} == {"f('rb', path", "f('wb', name"} or {
        candidate.clean,
        candidate.corrupt,
    } == {"f('rb', name", "f('wb', path"}
    for prompt, answer in zip((candidate.clean, candidate.corrupt), candidate.answers[0], strict=True):
        assert {prompt.split(", ")[1], answer} == {"name", "path"}


def test_many_files_share_words_and_each_is_known_by_both(tmp_path):
    (tmp_path / "words").mkdir()
    shared = {"marks": {"num": ["1"]}, "fillers": {"train": {"key": ["name"]}, "test": {"key": ["mode"]}}}
    form = {"splits": ["train"], "text": "$num = $quote$key", "answers": ["$quote"], "rest": ""}

    def read(words: dict) -> TemplateFile:
        (tmp_path / "words" / "mine.json").write_text(json.dumps(words))
        return small_file(tmp_path, fillers="mine", templates=[form])

    one, other = read(shared), read({**shared, "marks": {"num": ["2"]}})
    assert one.fillers["train"] == {"key": ["name"]} and one.marks == {"num": ["1"]}
    assert one.sha256 != other.sha256 == read({**shared, "marks": {"num": ["2"]}}).sha256
    with pytest.raises(TaskError, match="small.json is not a template file .FileNotFoundError"):
        small_file(tmp_path, fillers="nobodys")


def test_with_first_difference_what_follows_is_written_for_either_side(tmp_path):
    form = {"splits": ["train"], "text": "x = $open$key", "answers": ["$close"], "rest": " + $key2$end\n"}
    sides = [{"open": "(", "close": ")", "end": "!"}, {"open": "[", "close": "]", "end": "?"}]
    source = small_file(tmp_path, templates=[form], sides=sides, first_difference=True)
    candidate = source.fill(0, source.fillers["train"], random.Random(0))
    ends = dict(zip(candidate.answers[0], candidate.rests, strict=True))
    assert ends[")"].endswith("!\n") and ends["]"].endswith("?\n") and ends[")"][3:-2] in ("name", "path")
    assert small_file(tmp_path, templates=[form], sides=sides).fill(
        0, source.fillers["train"], random.Random(0)
    ).rests == (
        "",
        "",
    )


def test_words_are_found_in_snake_case_camel_case_and_phrases():
    assert words_of("file_name FileReader no such URL") == {"file", "name", "reader", "no", "such", "url"}


def test_a_template_file_has_not_counted_its_pairs(tmp_path):
    assert small_file(tmp_path).n_pairs("train") is None
