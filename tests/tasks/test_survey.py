"""Which behaviours a model has: the numbers are those of its own logits, and what cannot be measured says why."""

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from sparse_interp.errors import TaskError, TokenizerError
from sparse_interp.faithfulness.ground_truth import ground_truth
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import bootstrap_interval
from sparse_interp.tasks.library import load_task
from sparse_interp.tasks.survey import MEASURES, TaskScores, answer_logits, score_tasks
from sparse_interp.tasks.task import Task, is_argmax

SHAPE = {"d_model": 8, "n_heads": 1, "d_head": 8, "n_layers": 1, "d_mlp": 8}


def small_model(tokenizer, n_ctx: int = 128) -> HookedSparseTransformer:
    """A model that nobody trained."""
    return HookedSparseTransformer(ModelConfig(**SHAPE, d_vocab=2048, n_ctx=n_ctx, seed=0), tokenizer)


@pytest.fixture(scope="module")
def truth():
    """A hand-built model that does its task, always."""
    return ground_truth("quote")


def test_a_model_that_was_built_for_a_task_gets_all_of_it_right(truth, seeded):
    scores = score_tasks(truth.model, [truth.task], n_prompts=40, generator=seeded())
    frame = scores.frame.set_index("split")
    assert (frame.accuracy == 1).all() and (frame.accuracy_low == 1).all() and (frame.loss_nats < 0.05).all()
    assert scores.solved() == [truth.task.name] == scores.solved(1.0, "shifted")
    truth.model.unembed.W_U.data.neg_()
    try:
        wrong = score_tasks(truth.model, [truth.task], n_prompts=40, generator=seeded())
    finally:
        truth.model.unembed.W_U.data.neg_()
    assert (wrong.frame.accuracy == 0).all() and not wrong.solved(0.1)


def test_the_numbers_are_means_of_the_metrics_over_both_sides_with_intervals_over_templates(shipped_tokenizer, seeded):
    model = small_model(shipped_tokenizer)
    row = score_tasks(model, ["bracket_brace"], splits=["test"], n_prompts=30, generator=seeded(4)).frame.iloc[0]
    generator = seeded(4)
    batch = load_task("bracket_brace", shipped_tokenizer).batch(15, "test", generator=generator)
    sides = [batch, batch.swapped()]
    with torch.no_grad():
        logits = [torch.cat([model(side.clean[i : i + 1, :n])[:, -1] for i, n in enumerate(side.lengths)])
                  for side in sides]  # fmt: skip
    groups = [*batch.template.tolist(), *batch.template.tolist()]
    for measure, metric in MEASURES.items():
        values = torch.cat([metric(*both) for both in zip(logits, sides, strict=True)])
        expected = bootstrap_interval(values, groups, generator=generator)
        assert [row[measure], row[f"{measure}_low"], row[f"{measure}_high"]] == pytest.approx(expected, abs=1e-5)
    assert row.argmax_frac == torch.cat([is_argmax(*both) for both in zip(logits, sides, strict=True)]).mean()
    assert (row.n_prompts, row.n_templates, row.whole_frac, row.bigram_frac) == (30, len(set(groups)), 1, 0)


def test_logits_are_those_of_every_prompt_alone_in_the_order_of_the_batch(truth, seeded):
    batch = truth.task.batch(60, "shifted", generator=seeded())
    assert len(batch.lengths.unique()) > 1
    whole = torch.cat([truth.model(batch.clean[i : i + 1, :n])[:, -1] for i, n in enumerate(batch.lengths)])
    assert torch.allclose(answer_logits(truth.model, batch), whole, atol=1e-5)


def test_a_model_in_training_mode_is_measured_in_eval_mode_and_left_in_training(truth, seeded):
    truth.model.train()
    try:
        answer_logits(truth.model, truth.task.batch(2, generator=seeded()))
        assert truth.model.training
    finally:
        truth.model.eval()


def test_any_transformer_lens_model_can_be_asked(shipped_tokenizer, seeded):
    cfg = TransformerBridgeConfig(
        n_layers=1, d_model=8, n_ctx=64, d_head=8, n_heads=1, d_mlp=8, d_vocab=2048, act_fn="gelu", seed=0
    )
    bridge = TransformerBridge.boot_native(cfg).eval()
    task = load_task("while_return_true", shipped_tokenizer)
    frame = score_tasks(bridge, [task], splits=["train"], n_prompts=8, generator=seeded()).frame
    batch = task.batch(4, generator=seeded())
    logits = torch.cat([bridge(batch.clean[i : i + 1, :n])[:, -1] for i, n in enumerate(batch.lengths)])
    assert torch.allclose(answer_logits(bridge, batch), logits.detach(), atol=1e-5)
    assert frame.n_prompts.tolist() == [8] and 0.2 < frame.loss_nats[0] < 1.5


def test_a_task_that_cannot_be_measured_has_rows_that_say_why(byte_tokenizer, seeded):
    model = small_model(byte_tokenizer, n_ctx=40)
    frame = score_tasks(model, ["for_while", "fstring_brace"], n_prompts=4, generator=seeded()).frame
    assert (frame.n_prompts == 0).all() and frame.accuracy.isna().all()
    refused, too_long = frame[frame.task == "for_while"], frame[frame.task == "fstring_brace"]
    assert refused.note.str.contains("choose an edit that this tokenizer writes").all() and len(refused) == 3
    assert too_long.note.str.contains("the context holds 40").all()
    shown = str(TaskScores(frame))
    assert "nan" not in shown and "the context holds 40" in shown


def test_a_bigram_can_tell_where_the_last_token_tells(shipped_tokenizer, seeded):
    frame = score_tasks(
        small_model(shipped_tokenizer), ["else_elif", "with_open"], splits=["train"], n_prompts=20, generator=seeded()
    ).frame
    assert frame.bigram_frac.tolist() == [1, 0]


def test_prompts_of_one_template_are_resampled_one_by_one_and_the_row_says_so(shipped_tokenizer, seeded):
    rows = [(f"x = [{n}", f"x = {{{n}", "]", "}", "one", "train") for n in range(9)]
    task = Task.from_pairs(rows, shipped_tokenizer)
    frame = score_tasks(small_model(shipped_tokenizer), [task], n_prompts=100, generator=seeded()).frame
    assert frame.split.tolist() == ["train"] and frame.n_prompts.tolist() == [18]
    assert frame.note.tolist() == ["all prompts are of one template, so prompts were resampled"]


def test_unknown_names_splits_and_numbers_are_refused_before_any_work(shipped_tokenizer, seeded, monkeypatch):
    model = small_model(shipped_tokenizer)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(TaskError, match="No task is called 'with_at'; did you mean 'with_as'"):
        score_tasks(model, ["var_if", "with_at"], generator=seeded())
    with pytest.raises(TaskError, match="n_prompts=1"):
        score_tasks(model, n_prompts=1, generator=seeded())
    with pytest.raises(TaskError, match="expected at least 2 prompts of train, test, shifted"):
        score_tasks(model, splits=["valid"], generator=seeded())
    model.tokenizer = None
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        score_tasks(model, generator=seeded())


def test_the_table_draws_a_bar_per_measured_row(truth, seeded):
    scores = score_tasks(truth.model, [truth.task], n_prompts=10, generator=seeded())
    ax = scores.plot()
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"quote, {s}" for s in ("train", "test", "shifted")]
