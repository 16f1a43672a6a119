"""Stories whose next word somebody who knows nothing of templates works out from the names and words in them."""

import random
import re

import pytest

from sparse_interp.tasks.library import template_file
from sparse_interp.tasks.pairs import Candidate
from sparse_interp.tasks.stories import STORY_TASKS

SPLITS = ("train", "test", "shifted")

GIRLS = (
    "Lily Mia Anna Emma Sara Rosa Lucy Ella Amy Jane Kate Molly Nora Zoe Alice Clara Ruth Maria Julia Sophie Grace "
    "Helen Daisy Ivy Eva Laura Hannah Olivia Violet Stella Martha Bella Chloe Ruby Penny Wendy Fiona Elsa"
)
BOYS = (
    "Tom Ben Max Leo Sam Jack Tim Adam Luke Noah Finn Peter Paul Eric David Simon Oscar Henry Mark John Hugo Fred "
    "Oliver Daniel James Felix George Arthur Edward Thomas Albert Victor Walter Robert Martin Philip Ralph Bruno"
)


def drawn(name: str, split: str) -> list[Candidate]:
    """Every template of the split, with words drawn four times."""
    source, rng = template_file(name), random.Random(1)
    numbers = [number for number, form in enumerate(source.templates) if split in form.splits]
    return [source.fill(number, source.fillers[split], rng) for number in 4 * numbers]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def pronoun(prompt: str) -> str:
    """he or she, by the one person who is named."""
    girls, boys = ({w for w in words(prompt) if w in words(names)} for names in (GIRLS, BOYS))
    assert len(girls) + len(boys) == 1, prompt
    return " she" if girls else " he"


def taker(prompt: str) -> str:
    """Of the two who are named, the one who is named once: the other gives."""
    named = [w for w in words(prompt) if w in words(f"{GIRLS} {BOYS}")]
    (once,) = [name for name in set(named) if named.count(name) == 1]
    assert len(set(named)) == 2, prompt
    return f" {once}"


def ending(prompt: str) -> str:
    """A question mark, if the last sentence begins with a question word."""
    last = re.split(r'[.!?"]\s*"?', prompt)[-1]
    return "?" if words(last)[0] in ("Who", "What", "Where") else "."


def verb_form(prompt: str) -> str:
    """What the last word of time asks for: ed, or will."""
    when = [w for w in words(prompt) if w in ("Last", "last", "Next", "next", "Yesterday", "Tomorrow")]
    return "ed" if when[-1] in ("Last", "last", "Yesterday") else " will"


RULES = {"pronoun_matching": pronoun, "indirect_object": taker, "question_mark": ending, "tense": verb_form}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_about_names_and_words_finds_the_answer_of_either_prompt(name, split):
    for candidate in drawn(name, split):
        answer, foil = candidate.answers[0]
        for prompt, right, wrong in ((candidate.clean, answer, foil), (candidate.corrupt, foil, answer)):
            asked = RULES[name](prompt)
            assert right.endswith(asked) and not wrong.endswith(asked), prompt


def test_every_story_task_has_such_a_rule():
    assert set(RULES) == set(STORY_TASKS)
