"""What a tokenizer makes of a pair: one token, or the first in which two continuations differ."""

import pytest
import torch

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.draft import word_tokenizer
from sparse_interp.tasks.pairs import Candidate, PairList, encode, first_difference_of
from sparse_interp.tasks.task import Task


def pieces(tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def brackets(rests: tuple[str, str] = ("\n", "\n")) -> Candidate:
    """A list in a list, and a list."""
    return Candidate("x = [[1, 2], 3", "x = [[1, 2, 3", (("]", "]]"),), 0, rests)


def test_brackets_that_are_one_token_each_are_told_apart_by_the_first(shipped_tokenizer):
    row = encode(brackets(), shipped_tokenizer, first_difference=True)
    assert (row.pair.clean, row.pair.corrupt) == ("x = [[1, 2], 3", "x = [[1, 2, 3")
    assert (row.pair.answer, row.pair.foil) == ("]\n", "]"), "a newline joins the bracket, another bracket does not"
    assert not row.is_whole and len(row.clean) == len(row.corrupt)


def test_what_both_answers_begin_with_is_added_to_both_prompts(byte_tokenizer):
    candidate = Candidate("x = [-1, 2", "x = [[1, 2", (("]", "]]"),), 0, ("\n", "\n"))
    row = encode(candidate, byte_tokenizer, first_difference=True)
    assert (row.pair.clean, row.pair.corrupt) == ("x = [-1, 2]", "x = [[1, 2]")
    assert (row.pair.answer, row.pair.foil) == ("\n", "]")
    assert pieces(byte_tokenizer, row.clean[1:]) == list("x = [-1, 2]") and not row.is_whole
    assert (row.answer, row.foil) == tuple(byte_tokenizer.convert_tokens_to_ids(["Ċ", "]"]))


def test_answers_of_one_token_stay_whole(shipped_tokenizer):
    candidate = Candidate("x = [a, b", "x = {a, b", (("]", "}"),), 3, ("\n", "\n"))
    row = encode(candidate, shipped_tokenizer, first_difference=True)
    assert row.is_whole and row.pair == ("x = [a, b", "x = {a, b", "]\n", "}\n", 3)
    by_one_token = encode(candidate._replace(answers=(("]\n", "}\n"),)), shipped_tokenizer)
    assert (row.clean, row.corrupt, row.answer, row.foil) == by_one_token[1:5]


def test_a_token_that_reaches_back_into_the_prompt_takes_the_end_of_the_prompt_with_it(shipped_tokenizer):
    candidate = Candidate("    with open(path)", "    return open(path)", ((" as", "\n"),), 0, (" f:\n", ""))
    row = encode(candidate, shipped_tokenizer, first_difference=True)
    assert (row.pair.clean, row.pair.answer, row.pair.foil) == ("    with open(path", ")", ")\n")
    assert not row.is_whole
    with pytest.raises(TaskError, match="merges with the end of the prompt|is 2 tokens after the prompt"):
        encode(candidate, shipped_tokenizer)


def test_the_prediction_is_that_of_the_whole_text_on_both_sides(shipped_tokenizer):
    candidate = Candidate("if a is None:\n", "if b is None:\n", (("    alpha", "    beta"),), 0, (" = 1\n", " = 1\n"))
    row = encode(candidate, shipped_tokenizer, first_difference=True)
    for prompt, ids, token, rest in (
        (candidate.clean, row.clean, row.answer, "    alpha = 1\n"),
        (candidate.corrupt, row.corrupt, row.foil, "    beta = 1\n"),
    ):
        assert shipped_tokenizer.encode(prompt + rest)[: len(ids)] == [*ids[1:], token]


REFUSED = {
    "edits of unequal length": (
        Candidate("while x", "for x", ((":", ","),), 0, ("\n", " y in z:\n")),
        "first differ in token 7 after clean 'while x' and in token 5 after corrupt 'for x'",
    ),
    "an answer that begins with the other": (
        Candidate("x = [1", "x = (1", (("]", "]"),), 0, ("", "")),
        "are the same tokens as far as both go",
    ),
    "the same prompt": (Candidate("x", "x", (("1", "2"),), 0), "are the same prompt 'x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_without_a_common_place_of_difference_is_refused_with_both_places(byte_tokenizer, case):
    candidate, message = REFUSED[case]
    with pytest.raises(TaskError, match=message):
        encode(candidate, byte_tokenizer, first_difference=True)


def test_prompts_that_a_tokenizer_does_not_tell_apart_are_refused_under_either_rule():
    tokenizer = word_tokenizer(["x", "=", "(", ")"])
    candidate = Candidate("x = alpha", "x = beta", ((" (", " )"),), 0)
    for first_difference in (False, True):
        with pytest.raises(TaskError, match="writes clean 'x = alpha' and corrupt 'x = beta' alike up to the answer"):
            encode(candidate, tokenizer, None, first_difference)


def test_too_large_an_edit_is_refused_under_either_rule(shipped_tokenizer):
    candidate = Candidate('a = b\nx = "y', "c = b\nx = 'y", (('"', "'"),), 0)
    assert encode(candidate, shipped_tokenizer, max_changed=2).is_whole
    for first_difference in (False, True):
        with pytest.raises(TaskError, match="differ in 2 tokens, not 1"):
            encode(candidate, shipped_tokenizer, 1, first_difference)


def test_the_first_difference_is_none_where_one_begins_with_the_other():
    assert first_difference_of([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference_of([1, 2], [1, 2, 4]) is None


def test_exchanging_swaps_answers_with_what_follows_them():
    candidate = Candidate("a", "b", (("1", "2"), ("3", "4")), 7, ("x", "y"))
    assert candidate.exchanged() == Candidate("a", "b", (("2", "1"), ("4", "3")), 7, ("y", "x"))


ROWS = [
    {"clean": f"x = [[{a}, 2], 3", "corrupt": f"x = [[{a}, 2, 3", "answer": "]\n", "foil": "]]\n"} for a in "abcdefgh"
]


def test_own_pairs_with_long_answers_are_refused_or_mapped_as_asked(shipped_tokenizer, seeded):
    with pytest.raises(TaskError, match=r"Pair 0 .*answer '\]\]\\n' is 2 tokens after the prompt"):
        Task.from_pairs(ROWS, shipped_tokenizer)
    task = Task.from_pairs(ROWS, shipped_tokenizer, long_answers="first_difference")
    rows = task.encoded(5, "train", generator=seeded())
    assert {(row.pair.answer, row.pair.foil) for row in rows} == {("]\n", "]")} and not any(r.is_whole for r in rows)
    with pytest.raises(TaskError, match="long_answers='map'; expected 'refuse' or 'first_difference'"):
        Task.from_pairs(ROWS, shipped_tokenizer, long_answers="map")


def test_own_pairs_come_from_a_csv_file_as_they_were_written(tmp_path, shipped_tokenizer, seeded):
    path = tmp_path / "mine.csv"
    rows = [("if x:\n    y = None", "if x:\n    z = None", "\n", ",", "NA", "train"),
            ('x = "a, b', "x = 'a, b", '"', "'", "t", "train")]  # fmt: skip
    quoted = ["clean,corrupt,answer,foil,template,split"]
    quoted += [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join(quoted) + "\n")
    for given in (path, str(path)):
        pairs = Task.from_pairs(given, shipped_tokenizer).pairs(2, generator=seeded())
        assert {pair[:4] for pair in pairs} == {row[:4] for row in rows}


def test_a_csv_file_that_is_missing_is_refused_with_the_columns_that_it_needs(tmp_path, shipped_tokenizer):
    with pytest.raises(TaskError, match="nowhere.csv cannot be read as pairs.*columns clean, corrupt, answer, foil"):
        Task.from_pairs(tmp_path / "nowhere.csv", shipped_tokenizer)


def test_a_list_of_pairs_knows_how_many_it_has(shipped_tokenizer):
    task = Task.from_pairs(
        [{**row, "split": "train"} for row in ROWS], shipped_tokenizer, long_answers="first_difference"
    )
    assert isinstance(task.source, PairList) and task.n_pairs("train") == len(ROWS)
    assert len(task.batch(8, generator=torch.Generator().manual_seed(0))) == 8
