"""The report says what its tables say."""

import pytest
import torch


@pytest.fixture(scope="module")
def told(truth):
    """The report of the hand-built quote model's key, and the tables behind it."""
    from sparse_interp.circuit.describe import describe
    from sparse_interp.circuit.graph import Circuit
    from sparse_interp.faithfulness.adversarial import adversarial_inputs
    from sparse_interp.faithfulness.audit import audit
    from sparse_interp.interventions.baselines import mean_activations
    from sparse_interp.report import report

    generator = torch.Generator().manual_seed(0)
    model, task, blocks = truth.model, truth.task, truth.blocks(32, generator=generator)
    circuit = Circuit.of_nodes(model, truth.nodes, mean_activations(model, blocks), task_name=task.name)
    table = audit(model, circuit, task, level="quick", generator=generator)
    known = describe(circuit, model, blocks, task.batch(16, generator=generator))
    tried = adversarial_inputs(model, circuit, task, n_pairs=16, generator=generator)
    text = report(model, circuit, table, task, known, tried, commands=["sparse-interp demo"], generator=generator)
    return text, known, tried


def test_nodes_and_heads_are_told_in_the_sentences_of_their_tables(told):
    text, known, tried = told
    plain = text.replace("\\", "")
    assert tried.reading.heads.frame.sentence.iloc[0].replace("\\", "") in plain
    assert sum(f"- {said}".replace("\\", "") in plain for said in known.sentences.frame.sentence) == 5


def test_prompts_on_which_it_should_fail_stand_beside_what_came_of_them(told):
    text, _, tried = told
    _, _, part = text.partition("## Prompts on which it should then fail")
    assert "The circuit fails, the model fails" in part and "| distractor | 1.0 | model | 1.0 | 0.0 | 1.0 |" in part
    assert tried.frame.example.iloc[0].split()[0] in part


def test_no_token_of_a_prompt_opens_a_tag_or_a_span_and_every_part_has_its_title(told):
    text, _, _ = told
    assert "<" not in text.replace("\\<", "") and "`" not in text.partition("```sh")[0].replace("\\`", "")
    assert text.count("\n## ") == 8
