"""Adversarial inputs find the weakness of a model whose algorithm has one, and claim none where there is none."""

from functools import cache

import pytest
import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, TaskError
from sparse_interp.faithfulness import adversarial as module
from sparse_interp.faithfulness.adversarial import Edit, adversarial_inputs, free_tokens, inserted
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.dense import hooked
from sparse_interp.model.sites import Node
from sparse_interp.tasks.task import Task


def truth_of(name):
    from sparse_interp.faithfulness.ground_truth import ground_truth

    return ground_truth(name)


def tried(truth, model=None, *more):
    """Adversarial inputs of the circuit of a key, and of `more` nodes."""
    model, generator = model or truth.model, torch.Generator().manual_seed(0)
    means = mean_activations(model, truth.blocks(64, generator=generator))
    circuit = Circuit.of_nodes(model, {*truth.nodes, *more}, means)
    return adversarial_inputs(model, circuit, truth.task, n_pairs=24, generator=generator)


@cache
def table_of(name):
    return tried(truth_of(name))


def rewritten(name, **entries):
    """A hand-built model with some weights exchanged: `entries` are parameter name (`_` for `.`) -> {index: value}."""
    truth = truth_of(name)
    parameters = dict(truth.model.named_parameters())
    for written, values in entries.items():
        (parameter,) = [p for key, p in parameters.items() if key.replace(".", "_") == written]
        for index, value in values.items():
            parameter.data[index] = value
    return truth


# -- finding weaknesses that are there --------------------------------------------------------------------------------


def test_depth_by_average_is_diluted_by_its_context_and_restored_by_looking_as_before():
    table = table_of("bracket_depth")
    assert table.weaknesses == ["dilution"]
    for row in table.frame.itertuples():
        assert (row.rule, row.heads, row.outcome) == ("dilution", "0.0", "fails")
        assert row.accuracy_before == row.accuracy_control == 1 and row.accuracy == 0.5
        assert row.logits_control == pytest.approx(row.logits_before, abs=0.1)
        assert row.accuracy_low > 0 and row.logits_low > 0
    assert table.frame.on.tolist() == ["circuit", "model"]
    assert "pays each free token 8" in table.frame.why.iloc[0] and "21 more leave" in table.frame.why.iloc[0]
    assert "The circuit fails, the model fails" in table.summary and "None suggested by the other rules" in table.note


def test_a_head_that_finds_quotes_by_what_they_are_is_led_astray_by_a_second_pair():
    table = table_of("quote")
    assert table.weaknesses == ["distractor"]
    model = table.frame[table.frame.on == "model"].iloc[0]
    assert (model.accuracy_before, model.accuracy, model.accuracy_control) == (1, 0, 1)
    assert model.logits == pytest.approx(-8 / 3, abs=0.05), "two quotes of the other kind and one of the right one"
    assert "by head 1.0 with 100% of its attention" in model.why
    example = model.example.split()
    assert sorted(mark for mark in example if mark in "'\"") in ([*'""\''], [*"\"''"])
    assert "free tokens would leave every needed head more than" in table.note


def test_a_word_that_looks_like_a_quote_is_found_as_a_lure():
    # `alder` is embedded with the mark of a quote, a little less of it than a quote has, and the type of a double one
    truth = truth_of("quote")
    alder = truth.task.tokenizer.get_vocab()["alder"]
    mark, kind = (truth.channels.index(name) for name in ("is_quote", "type"))
    truth = rewritten("quote", embed_W_E={(alder, mark): 0.85, (alder, kind): 1.0})
    table = tried(truth)
    lure = table.frame[(table.frame.rule == "lure") & (table.frame.on == "model")].iloc[0]
    assert lure.edit == "alder before the last token" and lure.outcome == "fails" and "lure" in table.weaknesses
    assert lure.accuracy_before == lure.accuracy_control == 1 and lure.accuracy == 0.5
    assert "alder alder alder alder" in lure.example


# -- claiming none where there is none --------------------------------------------------------------------------------


@cache
def last_quote():
    """The quote model with a head that prefers the last of several quotes, by a position that its keys read."""
    from sparse_interp.model.transformer import HookedSparseTransformer

    truth = truth_of("quote")
    cfg = type(truth.model.cfg).from_dict(truth.model.cfg.to_dict() | {"positions": "concat", "d_pos_emb": 1})
    model = HookedSparseTransformer(cfg, truth.task.tokenizer).eval()
    state = {name: torch.zeros_like(p) for name, p in model.state_dict().items()} | truth.model.state_dict()
    state["pos_embed.W_pos"] = torch.arange(cfg.n_ctx)[:, None] / cfg.n_ctx
    state["blocks.1.attn.W_K_pos"][0, 0, 0] = 200.0
    state["blocks.1.attn.W_K"][0, truth.channels.index("is_quote"), 0] = 200.0  # more than any position
    model.load_state_dict(state)
    return truth, model, Node(1, "attn_read", cfg.d_model)


def test_a_head_that_prefers_the_last_quote_is_suggested_a_distractor_and_withstands_it():
    truth, model, position = last_quote()
    table = tried(truth, model, position)
    assert table.frame.rule.tolist() == ["distractor", "distractor"] and set(table.frame.outcome) == {"holds"}
    assert table.weaknesses == [] and (table.frame.accuracy == 1).all()
    assert "The circuit holds, the model holds" in table.summary


def test_a_circuit_without_what_makes_its_model_withstand_is_found_out():
    truth, model, _ = last_quote()
    table = tried(truth, model)
    assert table.frame.set_index("on").outcome.to_dict() == {"circuit": "fails", "model": "holds"}
    assert table.weaknesses == [], "the model does not do what the circuit says"


@pytest.mark.parametrize("name", ["induction", "two_hop"])
def test_a_model_without_the_weakness_is_suggested_nothing(name):
    table = table_of(name)
    assert table.weaknesses == [] and len(table) == 0
    assert table.summary.startswith("None suggested: no head that is needed finds the changed token; ")


def test_a_circuit_that_does_not_do_the_task_is_suggested_nothing():
    truth = truth_of("quote")
    blind = rewritten("quote", unembed_W_U={truth.channels.index("close"): 0.0})
    table = tried(blind)
    assert len(table) == 0 and "or is right no more often than chance" in table.summary


# -- the edits --------------------------------------------------------------------------------------------------------


def test_tokens_go_into_both_prompts_and_padding_stays_behind(generator):
    truth = truth_of("quote")
    batch = truth.task.batch(12, generator=generator)
    at = torch.arange(12) % 3 + 1
    what = [[40 + row] * (row % 4) for row in range(12)]
    edited = inserted(batch, at, what, 0)
    for row in range(12):
        n, m = int(batch.lengths[row]), len(what[row])
        for before, after in ((batch.clean, edited.clean), (batch.corrupt, edited.corrupt)):
            assert after[row, : at[row]].equal(before[row, : at[row]])
            assert after[row, at[row] : at[row] + m].tolist() == what[row]
            assert after[row, at[row] + m : n + m].equal(before[row, at[row] : n]) and (after[row, n + m :] == 0).all()
        assert int(edited.lengths[row]) == n + m
    assert edited.answer.equal(batch.answer) and edited.template.equal(batch.template)


def test_free_tokens_are_fillers_and_never_structure_answers_or_changes(generator):
    truth = truth_of("bracket_depth")
    batch, text = truth.task.batch(60, generator=generator), lambda token: truth.task.tokenizer.decode([token])
    words = {text(token) for token in free_tokens(batch, text)}
    assert "maple" in words and not words & {"[", "]", "]]", ";", "=", ",", "(", "<|endoftext|>"}
    nowhere = truth_of("induction")
    batch, text = nowhere.task.batch(60, generator=generator), lambda token: nowhere.task.tokenizer.decode([token])
    assert free_tokens(batch, text) == [], "its change is the last token"
    anywhere = {text(token) for token in free_tokens(batch, text, anywhere=True)}
    assert free_tokens(batch, lambda token: f"{text(token)})", anywhere=True) == [], "brackets are no words"
    assert "alder" in anywhere and not anywhere & {"red", "one"}, "keys are changed and values are answers"


@pytest.mark.parametrize("dense", [False, True])
def test_a_head_made_to_look_as_before_undoes_what_it_did_with_further_tokens(truth, dense_truth, generator, dense):
    model = dense_truth[dense]
    before = truth.task.batch(8, generator=generator).both_sides()
    quotes = [[int(before.corrupt[row][(before.clean != before.corrupt)[row]])] * 2 for row in range(16)]
    after = inserted(before, before.last.clone(), quotes, 0)
    edit = Edit("", [(1, 0)], "", "", "", before, after, None, before.last.clone())
    was, now, restored = (
        module._answers(hooked(model), batch, hooks).logits
        for batch, hooks in (
            (before, None),
            (after, None),
            (after, module._looking_as_before(hooked(model), edit)),
        )
    )
    assert was.min() > 7 and now.max() < 0, "two quotes of the other kind win"
    assert torch.allclose(restored, was, atol=1e-4)


def test_on_a_dense_model_the_same_edits_have_the_same_outcomes(truth, dense_truth):
    ours, theirs = (tried(truth, model).frame for model in dense_truth)
    assert ours.rule.tolist() == theirs.rule.tolist() == ["distractor", "distractor"]
    assert ours.outcome.tolist() == theirs.outcome.tolist() == ["fails", "fails"]
    numbers = [frame.select_dtypes("number").to_numpy() for frame in (ours, theirs)]
    assert abs(numbers[0] - numbers[1]).max() < 1e-4


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_task_without_the_split_and_a_circuit_of_another_model_are_refused(generator):
    truth, other = truth_of("quote"), truth_of("induction")
    circuit = Circuit.of_nodes(
        truth.model, truth.nodes, mean_activations(truth.model, truth.blocks(generator=generator))
    )
    only_test = Task.from_pairs([("( '", '( "', " '", ' "', 0, "test")], truth.task.tokenizer)
    with pytest.raises(TaskError, match="are read off the split 'train' and tried on 'test'; task 'pairs' has test"):
        adversarial_inputs(truth.model, circuit, only_test, generator=generator)
    with pytest.raises(TaskError, match="tried on 'nowhere'"):
        adversarial_inputs(truth.model, circuit, truth.task, split="nowhere", generator=generator)
    with pytest.raises(CircuitError):
        adversarial_inputs(other.model, circuit, other.task, generator=generator)


def test_the_table_draws_itself_with_every_edit():
    ax = table_of("bracket_depth").plot()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "dilution, heads 0.0: circuit",
        "dilution, heads 0.0: model",
    ]
