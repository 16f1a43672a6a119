"""Tasks: what their pairs promise, under the shipped tokenizer and under another one; what the metrics measure."""

import ast
import math
import string

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_interp.data_files import data_folder
from sparse_interp.errors import TaskError
from sparse_interp.tasks import (
    Task,
    TaskBatch,
    answer_loss,
    at_answer,
    is_argmax,
    is_correct,
    kl_divergence,
    kl_to,
    load_task,
    logit_difference,
)
from sparse_interp.tasks.templates import TemplateFile

QUOTES = {'"', "'"}
QUOTE_FILE = data_folder() / "tasks" / "single_double_quote.json"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["shipped", "other"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="module")
def quotes(tokenizer) -> Task:
    return load_task("single_double_quote", tokenizer)


@pytest.fixture(scope="module")
def shipped_quotes(shipped_tokenizer) -> Task:
    return load_task("single_double_quote", shipped_tokenizer)


PAIRS = [
    {"clean": f'{name} = "{word}', "corrupt": f"{name} = '{word}", "answer": '"', "foil": "'"}
    for name in ("x", "value")
    for word in ("alpha", "name", "path", "data", "key")
]


@pytest.mark.parametrize("split", ["train", "test", "shifted"])
def test_a_pair_differs_in_one_token_and_there_only_in_the_quote(quotes, split):
    batch = quotes.batch(200, split, generator=seeded())
    assert ((batch.clean != batch.corrupt).sum(1) == 1).all()
    for pair in quotes.pairs(200, split, generator=seeded()):
        edits = [(a, b) for a, b in zip(pair.clean, pair.corrupt, strict=True) if a != b]
        assert len(edits) == 1 and set(edits[0]) == QUOTES
        assert edits[0] == (pair.answer[0], pair.foil[0]), "the answer closes what the prompt opened"


@pytest.mark.parametrize("split", ["train", "test", "shifted"])
def test_an_answer_is_the_one_token_that_continues_its_prompt(quotes, split):
    pairs = quotes.pairs(50, split, generator=seeded())
    batch = quotes.batch(50, split, generator=seeded())
    for side in (batch, batch.swapped()):
        for row, pair in enumerate(pairs):
            prompt, answer = (pair.clean, pair.answer) if side is batch else (pair.corrupt, pair.foil)
            ids = quotes.tokenizer.encode(prompt + answer, add_special_tokens=False)
            assert ids == [*side.clean[row, 1 : side.lengths[row]].tolist(), int(side.answer[row])]
    assert (batch.answer != batch.foil).all()


def test_the_answer_is_the_token_that_a_whole_program_has_there(shipped_quotes):
    for split in shipped_quotes.splits:
        batch = shipped_quotes.batch(100, split, generator=seeded(1))
        for row, pair in enumerate(shipped_quotes.pairs(100, split, generator=seeded(1))):
            form = shipped_quotes.source.templates[pair.template]
            rest = string.Template(form.rest).safe_substitute(var1="item", var2="items")
            program = pair.clean + form.answers[0].replace("$quote", pair.answer[0]) + rest
            ast.parse(program)
            ids = shipped_quotes.tokenizer.encode(program, add_special_tokens=False)
            assert ids[batch.lengths[row] - 1] == batch.answer[row], program


@pytest.mark.parametrize("split", ["train", "test", "shifted"])
def test_both_quotes_and_every_template_come_equally_often(quotes, split):
    numbers = [i for i, form in enumerate(quotes.source.templates) if split in form.splits]
    batch = quotes.batch(60 * len(numbers), split, generator=seeded())
    double = sum('"' in quotes.tokenizer.decode([token]) for token in batch.answer.tolist())
    assert 0.4 * len(batch) < double < 0.6 * len(batch)
    found, n_per_template = torch.unique(batch.template, return_counts=True)
    assert found.tolist() == numbers
    assert n_per_template.min() > 30 and n_per_template.max() < 90, "60 each; four standard deviations are 30"


def marks_before(pair) -> str:
    """The quotes of a pair that stand before the string which it leaves open, which are those of closed strings."""
    opened_at = next(at for at, (a, b) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if a != b)
    before = "".join(mark for mark in pair.clean[:opened_at] if mark in QUOTES)
    assert before[::2] == before[1::2], "each is closed with what opened it"
    return before


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_string_came_before_the_open_one_in_train_and_test(quotes, split):
    assert not any(marks_before(pair) for pair in quotes.pairs(200, split, generator=seeded()))


def test_closed_strings_of_either_kind_came_before_the_open_one_in_shifted(quotes):
    pairs = [(pair, marks_before(pair)) for pair in quotes.pairs(200, "shifted", generator=seeded())]
    assert sum(pair.answer[0] in before for pair, before in pairs) > 80, "the quote of the open string"
    assert sum(pair.foil[0] in before for pair, before in pairs) > 80, "the other quote"
    without = {pair.template for pair, before in pairs if not before}
    assert len(without) == 1, "one form is only longer than those of train"


def test_shifted_prompts_come_from_other_templates_and_are_longer(quotes):
    batches = {split: quotes.batch(300, split, generator=seeded()) for split in quotes.splits}
    used = {split: set(batch.template.tolist()) for split, batch in batches.items()}
    assert used["train"] == used["test"]
    assert not used["train"] & used["shifted"]
    assert batches["shifted"].lengths.float().mean() > 2 * batches["train"].lengths.float().mean()


def test_the_same_generator_state_gives_the_same_pairs_and_another_gives_others(quotes):
    first, second = (quotes.batch(32, "train", generator=seeded(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    generator = seeded(3)
    quotes.pairs(32, generator=generator)
    assert quotes.pairs(32, generator=generator) != quotes.pairs(32, generator=seeded(3))


def test_pairs_and_batch_are_the_same_rows(quotes):
    pairs = quotes.pairs(20, "shifted", generator=seeded(5))
    frame = quotes.batch(20, "shifted", generator=seeded(5)).to_frame(quotes.tokenizer)
    assert list(frame.columns) == ["clean", "corrupt", "answer", "foil", "length", "template"]
    expected = [(pair.clean, pair.corrupt, pair.answer, pair.foil, pair.template) for pair in pairs]
    assert list(frame.drop(columns="length").itertuples(index=False, name=None)) == expected


def test_prompts_begin_with_bos_and_are_padded_on_the_right(other_tokenizer):
    batch = load_task("single_double_quote", other_tokenizer).batch(50, generator=seeded())
    assert len(batch) == 50
    assert len(set(batch.lengths.tolist())) > 1
    for side in (batch.clean, batch.corrupt):
        assert (side[:, 0] == other_tokenizer.bos_token_id).all()
        for row, length in enumerate(batch.lengths.tolist()):
            assert (side[row, length:] == other_tokenizer.pad_token_id).all()
            assert (side[row, :length] != other_tokenizer.pad_token_id).all()
    assert batch.attention_mask.sum(1).tolist() == batch.lengths.tolist()
    assert (batch.attention_mask.diff(dim=1) <= 0).all()


def test_lengths_count_a_real_token_even_where_it_has_the_id_of_padding(shipped_tokenizer):
    assert shipped_tokenizer.pad_token_id == shipped_tokenizer.bos_token_id
    end = shipped_tokenizer.eos_token
    rows = [(f'x = "a{end}', f"x = 'a{end}", '"', "'"), ('x = "alpha", "beta', 'x = "alpha", \'beta', '"', "'")]
    task = Task.from_pairs([(*row, "t", "train") for row in rows], shipped_tokenizer)
    batch = task.batch(2, generator=seeded())
    for row in range(2):
        text = batch.to_frame(shipped_tokenizer).clean[row]
        assert batch.lengths[row] == 1 + len(shipped_tokenizer.encode(text, add_special_tokens=False))
    assert batch.last.tolist() == [length - 1 for length in batch.lengths.tolist()]
    short = int(batch.lengths.argmin())
    assert batch.clean[short, batch.last[short]] == shipped_tokenizer.pad_token_id
    assert batch.attention_mask[short, batch.last[short]] == 1


def test_swapping_twice_changes_nothing_and_once_exchanges_the_sides(shipped_quotes):
    batch = shipped_quotes.batch(8, generator=seeded())
    other = batch.swapped()
    assert torch.equal(other.clean, batch.corrupt) and torch.equal(other.corrupt, batch.clean)
    assert torch.equal(other.answer, batch.foil) and torch.equal(other.foil, batch.answer)
    again = other.swapped()
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(batch).values(), strict=True))


def test_both_sides_are_the_pairs_and_behind_them_the_same_pairs_swapped(shipped_quotes):
    batch = shipped_quotes.batch(5, generator=seeded())
    both = batch.both_sides()
    for row in range(5):
        first, second = both.clean[[row, 5 + row]], both.corrupt[[5 + row, row]]
        assert torch.equal(first[0], batch.clean[row]) and torch.equal(first[1], batch.corrupt[row])
        assert torch.equal(second, first)
        assert (both.answer[row], both.foil[row]) == (batch.answer[row], batch.foil[row])
        assert (both.answer[5 + row], both.foil[5 + row]) == (batch.foil[row], batch.answer[row])
    assert both.lengths.tolist() == 2 * batch.lengths.tolist()
    assert both.template.tolist() == 2 * batch.template.tolist()


def test_rows_and_devices_keep_every_field_together(shipped_quotes):
    batch = shipped_quotes.batch(10, generator=seeded())
    chosen = torch.tensor([7, 2])
    some = batch.rows(chosen)
    assert len(some) == 2 and len(batch.rows(slice(4, None))) == 6
    assert all(torch.equal(a, b[chosen]) for a, b in zip(vars(some).values(), vars(batch).values(), strict=True))
    assert all(values.device.type == "meta" for values in vars(batch.to("meta")).values())


def three_prompts() -> TaskBatch:
    """Prompts of 2, 3 and 4 tokens out of a vocabulary of 4; answers 0, 1, 2 and foils 1, 0, 3."""
    clean = torch.tensor([[3, 1, 3, 3], [3, 1, 2, 3], [3, 1, 2, 0]])
    return TaskBatch(
        clean=clean,
        corrupt=clean.flip(0),
        answer=torch.tensor([0, 1, 2]),
        foil=torch.tensor([1, 0, 3]),
        lengths=torch.tensor([2, 3, 4]),
        template=torch.tensor([0, 0, 1]),
    )


ANSWER_LOGITS = torch.tensor([[2.0, 0.0, 5.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, -1.0]])


def logits_everywhere() -> torch.Tensor:
    """`ANSWER_LOGITS` at the answer positions of `three_prompts`, and noise everywhere else."""
    logits = 9 * torch.randn(3, 4, 4, generator=seeded())
    for row, last in enumerate((1, 2, 3)):
        logits[row, last] = ANSWER_LOGITS[row]
    return logits


@pytest.mark.parametrize("logits", [ANSWER_LOGITS, logits_everywhere()], ids=["at the answer", "everywhere"])
def test_metrics_have_the_values_computed_by_hand(logits):
    batch = three_prompts()
    assert torch.equal(at_answer(logits, batch), ANSWER_LOGITS)
    assert logit_difference(logits, batch).tolist() == [2, 0, 4]
    expected = [math.log(1 + math.exp(-2)), math.log(2), math.log(1 + math.exp(-4))]
    assert answer_loss(logits, batch).tolist() == pytest.approx(expected)
    assert is_correct(logits, batch).tolist() == [1, 0, 1], "a tie is no right answer"
    assert is_argmax(logits, batch).tolist() == [0, 0, 1]


def test_an_answer_that_beats_its_foil_need_not_be_the_argmax():
    batch = three_prompts()
    assert is_correct(ANSWER_LOGITS, batch)[0] == 1 and is_argmax(ANSWER_LOGITS, batch)[0] == 0


def test_kl_is_zero_to_itself_ignores_a_constant_and_has_the_value_computed_by_hand():
    batch = three_prompts()
    everywhere = logits_everywhere()
    assert kl_divergence(everywhere, ANSWER_LOGITS + 3, batch).abs().max() < 1e-6
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]])).expand(3, 4)
    uniform = torch.zeros(3, 4)
    expected = math.log(4) - 1.75 * math.log(2)  # ln 4 minus the entropy of the reference
    assert kl_divergence(reference, uniform, batch).tolist() == pytest.approx([expected] * 3)
    backward = (math.log(2) * (1 + 2 + 3 + 3) - 4 * math.log(4)) / 4
    assert kl_divergence(uniform, reference, batch).tolist() == pytest.approx([backward] * 3)
    assert torch.equal(kl_to(reference)(uniform, batch), kl_divergence(reference, uniform, batch))


@pytest.mark.parametrize("metric", [logit_difference, answer_loss, is_correct, is_argmax])
def test_a_padded_batch_measures_what_its_prompts_measure_one_by_one(shipped_quotes, metric):
    batch = shipped_quotes.batch(12, generator=seeded())
    table = torch.randn(2048, 2048, generator=seeded())
    decay = 0.5 ** torch.arange(batch.clean.shape[1])

    def causal_model(tokens: torch.Tensor) -> torch.Tensor:
        """Logits that depend on every token up to their own."""
        return torch.stack([(table[tokens[:, : pos + 1]] * decay[: pos + 1, None]).sum(1)
                            for pos in range(tokens.shape[1])], dim=1)  # fmt: skip

    together = metric(causal_model(batch.clean), batch)
    for row in range(len(batch)):
        length = int(batch.lengths[row])
        one = batch.rows(slice(row, row + 1))
        one = TaskBatch(**{**vars(one), "clean": one.clean[:, :length], "corrupt": one.corrupt[:, :length]})
        assert metric(causal_model(one.clean), one).item() == pytest.approx(together[row].item(), abs=1e-4)


def test_gradients_of_the_losses_stay_finite_at_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0], [0, 0, -1e4, 1e4]], requires_grad=True)
    batch = three_prompts()
    (answer_loss(logits, batch).sum() + kl_divergence(ANSWER_LOGITS, logits, batch).sum()).backward()
    assert torch.isfinite(logits.grad).all()


def test_logits_of_another_batch_are_refused_with_both_shapes():
    with pytest.raises(TaskError, match=r"\(3, 5, 4\).*3 prompts of 4 positions"):
        logit_difference(torch.zeros(3, 5, 4), three_prompts())
    with pytest.raises(TaskError, match=r"\(2, 4\)"):
        is_argmax(torch.zeros(2, 4), three_prompts())


def test_own_pairs_come_as_dicts_tuples_or_a_frame(shipped_tokenizer):
    as_dicts = Task.from_pairs(PAIRS, shipped_tokenizer, name="mine")
    as_tuples = Task.from_pairs([tuple(row.values()) for row in PAIRS], shipped_tokenizer, name="mine")
    as_frame = Task.from_pairs(pd.DataFrame(PAIRS, index=range(50, 60)), shipped_tokenizer, name="mine")
    assert as_dicts.templates_sha256 == as_tuples.templates_sha256 == as_frame.templates_sha256
    for task in (as_dicts, as_tuples, as_frame):
        texts = {pair.clean for split in task.splits for pair in task.pairs(2, split, generator=seeded())}
        assert texts <= {row["clean"] for row in PAIRS}
        assert torch.equal(task.batch(8, generator=seeded()).clean, as_dicts.batch(8, generator=seeded()).clean)


def test_without_a_split_column_a_fifth_is_held_out_whatever_the_order_of_rows(shipped_tokenizer):
    def held_out(rows: list[dict]) -> set[str]:
        return {pair.clean for pair in Task.from_pairs(rows, shipped_tokenizer).pairs(2, "test", generator=seeded())}

    task = Task.from_pairs(PAIRS, shipped_tokenizer)
    assert task.splits == ("train", "test")
    train = {pair.clean for pair in task.pairs(8, "train", generator=seeded())}
    assert held_out(PAIRS) == held_out(PAIRS[::-1])
    assert not train & held_out(PAIRS)
    with pytest.raises(TaskError, match="gave 8 pairs of split 'train' and not the 9 asked for"):
        task.batch(9, generator=seeded())


def test_a_pair_and_its_reverse_are_held_out_together(shipped_tokenizer):
    reverse = [
        {"clean": row["corrupt"], "corrupt": row["clean"], "answer": row["foil"], "foil": row["answer"]}
        for row in PAIRS
    ]
    task = Task.from_pairs(PAIRS + reverse, shipped_tokenizer)
    pairs = task.pairs(4, "test", generator=seeded())
    assert {pair.clean for pair in pairs} == {pair.corrupt for pair in pairs}


def test_split_and_template_columns_are_used(shipped_tokenizer):
    rows = [dict(row, split="shifted" if "value" in row["clean"] else "train", template=row["clean"][-2:])
            for row in PAIRS]  # fmt: skip
    task = Task.from_pairs(rows, shipped_tokenizer)
    assert task.splits == ("train", "shifted")
    assert all("value" in pair.clean for pair in task.pairs(5, "shifted", generator=seeded()))
    train, shifted = (task.pairs(5, split, generator=seeded()) for split in task.splits)
    assert {p.clean[-2:]: p.template for p in train} == {p.clean[-2:]: p.template for p in shifted}
    assert len({p.template for p in train}) == 5


def test_own_pairs_come_in_an_order_that_the_generator_draws(shipped_tokenizer):
    task = Task.from_pairs([{**row, "split": "train"} for row in PAIRS], shipped_tokenizer)
    orders = {tuple(pair.clean for pair in task.pairs(4, generator=seeded(seed))) for seed in range(5)}
    assert len(orders) == 5


def test_without_a_template_column_every_pair_is_its_own_template(shipped_tokenizer):
    batch = Task.from_pairs(PAIRS, shipped_tokenizer).batch(8, generator=seeded())
    assert len(set(batch.template.tolist())) == 8


GOOD = PAIRS[0]
REFUSED = {
    "no rows": ([], "no pairs"),
    "a missing column": ([{"clean": "a", "corrupt": "b", "answer": "c"}], "lack foil.*found clean, corrupt, answer"),
    "an empty text": ([GOOD, {**GOOD, "clean": ""}], "Pair 1 has clean ''"),
    "a number": ([{**GOOD, "foil": 3}], "Pair 0 has foil 3"),
    "a missing value": (pd.DataFrame([{**GOOD, "answer": float("nan")}]), "Pair 0 has answer nan"),
    "the same prompt twice": ([{**GOOD, "corrupt": GOOD["clean"]}], "Pair 0.*same prompt"),
    "a repeated pair": ([GOOD, GOOD], "Pair 1 repeats"),
    "an answer of many tokens": ([{**GOOD, "answer": '" if x else None'}], "Pair 0.*tokens after the prompt"),
    "an answer that merges": ([{**GOOD, "clean": "x = a", "corrupt": "y = a", "answer": "lpha"}], "merges with"),
    "answers that agree": (
        [{"clean": "a = x", "corrupt": "b = x", "answer": ",", "foil": ","}],
        "answer and foil are both ','",
    ),
    "an unknown split": ([{**GOOD, "split": "validation"}], "splits validation; expected train, test, shifted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_own_pairs_that_make_no_task_are_refused_with_the_reason(shipped_tokenizer, case):
    rows, message = REFUSED[case]
    with pytest.raises(TaskError, match=f"(?s){message}"):
        Task.from_pairs(rows, shipped_tokenizer)


def test_a_pair_of_unequal_lengths_is_refused_with_its_name_and_both_lengths(shipped_tokenizer):
    rows = [GOOD, {**GOOD, "clean": 'x = a + "alpha'}]
    lengths = [len(shipped_tokenizer.encode(rows[1][side])) for side in ("clean", "corrupt")]
    with pytest.raises(TaskError, match=rf"Pair 1 of task 'mine'.*is {lengths[0]} tokens.*is {lengths[1]}; expected"):
        Task.from_pairs(rows, shipped_tokenizer, name="mine")


def test_prompts_longer_than_the_context_are_refused_with_numbers(shipped_tokenizer, shipped_quotes):
    longest = 1 + max(len(shipped_tokenizer.encode(row["clean"])) for row in PAIRS)
    Task.from_pairs(PAIRS, shipped_tokenizer, n_ctx=longest)
    with pytest.raises(TaskError, match=f"up to {longest} tokens, and the context holds {longest - 1}"):
        Task.from_pairs(PAIRS, shipped_tokenizer, n_ctx=longest - 1)
    with pytest.raises(TaskError, match=r"context holds 64.*train \d+, test \d+, shifted \d+"):
        shipped_quotes.check_fits(64)
    shipped_quotes.check_fits(64, ("train", "test"))
    shipped_quotes.check_fits(128)


@pytest.mark.parametrize("split", ["train", "test", "shifted"])
def test_no_prompt_is_longer_than_the_longest_that_is_announced(quotes, split):
    longest = quotes.longest(split)
    drawn = quotes.batch(400, split, generator=seeded()).lengths.max()
    assert 0.8 * longest <= drawn <= longest


def test_an_unknown_split_and_a_silly_number_are_refused(shipped_quotes):
    with pytest.raises(TaskError, match="no split 'valid'; expected one of train, test, shifted"):
        shipped_quotes.batch(4, "valid", generator=seeded())
    with pytest.raises(TaskError, match="Asked for 0 pairs"):
        shipped_quotes.batch(0, generator=seeded())


def test_a_task_is_known_by_the_hash_of_its_templates(tmp_path, shipped_quotes, shipped_tokenizer):
    again = load_task("single_double_quote", shipped_tokenizer)
    assert again.templates_sha256 == shipped_quotes.templates_sha256
    changed = tmp_path / "changed.json"
    changed.write_text(QUOTE_FILE.read_text().replace("lineno", "lineend"))
    assert TemplateFile.read(changed).sha256 != again.templates_sha256
    mine, other = (Task.from_pairs(rows, shipped_tokenizer) for rows in (PAIRS, PAIRS[:-1]))
    assert mine.templates_sha256 != other.templates_sha256


def test_a_tokenizer_without_special_tokens_is_refused(other_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=other_tokenizer.backend_tokenizer)
    with pytest.raises(TaskError, match="neither bos, eos nor pad"):
        load_task("single_double_quote", bare)
