"""Template files: prompts with slots, and the words for them, as an endless source of pairs.

A file (`data/tasks/<name>.json`) makes pairs out of

    templates   `text` with slots ($key, $key1), `answers`, `rest` (what would follow in a program), the `splits` that
                the template serves, and where it needs its own, `sides`
    sides       what the slots that tell the two prompts apart hold on either side
    fillers     per split and kind, the words for the slots; no word serves two splits
    marks       choices that are no words (quote characters, numbers) and serve every split

The slots $key, $key1 and $key2 are all of kind `key`. In one prompt a slot has one filler, and no two slots the same
word. `fillers` may name a file of `data/tasks/words/` that holds fillers and marks for many tasks.

With `first_difference` the pair is told apart where its continuations first differ as tokens (`tasks/pairs.py`);
without it `answers` are forms in order of preference, and the first that is one token on both sides is taken.
"""

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparse_interp.errors import TaskError
from sparse_interp.tasks.pairs import SPLITS, Candidate

Option = TypeVar("Option")
Sides = tuple[Mapping[str, str], Mapping[str, str]]

STALE_DRAWS = 1000
"""Draws in a row that bring nothing new, after which a file is taken to have no more pairs."""


class Template(NamedTuple):
    """One form of prompt, with slots."""

    text: str
    answers: tuple[str, ...]
    rest: str
    splits: tuple[str, ...]
    sides: Sides | None = None
    """What tells the two prompts apart, where that is not what the file says."""


@dataclass(frozen=True)
class TemplateFile:
    """Templates and fillers as read from `data/tasks/<name>.json`: an endless source of pairs."""

    description: str
    templates: tuple[Template, ...]
    sides: Sides
    fillers: Mapping[str, Mapping[str, Sequence[str]]]
    marks: Mapping[str, Sequence[str]]
    max_changed: int | None
    sha256: str
    """Of the file, and of its file of words if it names one."""
    first_difference: bool = False

    @classmethod
    def read(cls, path: Path) -> "TemplateFile":
        """Read and check a template file."""
        raw = path.read_bytes()
        try:
            spec = json.loads(raw)
            words: dict[str, Any] = {"fillers": spec["fillers"], "marks": {}}
            if isinstance(words["fillers"], str):
                raw_words = (path.parent / "words" / f"{spec['fillers']}.json").read_bytes()
                raw, words = raw + raw_words, json.loads(raw_words)
            source = cls(
                description=spec["description"],
                templates=tuple(map(_template, spec["templates"])),
                sides=_two(spec["sides"]),
                fillers=words["fillers"],
                marks={**words["marks"], **spec["marks"]},
                max_changed=spec["max_changed_tokens"],
                sha256=hashlib.sha256(raw).hexdigest(),
                first_difference=spec.get("first_difference", False),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f"{path} is not a template file ({type(error).__name__}: {error}); expected JSON with description, two "
                "sides, marks, max_changed_tokens, fillers per split, and templates of text, answers, rest, splits."
            ) from error
        source.check(path.name)
        return source

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that some template serves."""
        return tuple(split for split in SPLITS if any(split in form.splits for form in self.templates))

    def n_pairs(self, split: str) -> None:
        """Nobody has counted them: fillers are drawn, and pairs end only when nothing new is drawn."""

    def check(self, where: str) -> None:
        """Refuse a word that serves two splits, and a slot that nothing fills."""
        owner: dict[str, str] = {}
        for split, kinds in self.fillers.items():
            for word in sorted({word for filled in kinds.values() for text in filled for word in words_of(text)}):
                if owner.setdefault(word, split) != split:
                    raise TaskError(
                        f"{where}: the word {word!r} is a filler of both {owner[word]!r} and {split!r}; "
                        "expected every word in one split, so that nothing leaks: remove it from one of them."
                    )
        for number, form in enumerate(self.templates):
            for split in form.splits:
                known = {*self.marks, *self.fillers.get(split, {})}
                unfilled = [slot for slot in self.slots[number] if kind_of(slot) not in known]
                if unfilled:
                    raise TaskError(
                        f"{where}: template {number} has slots {unfilled} that split {split!r} cannot fill; "
                        f"expected kinds among {sorted(known)}."
                    )

    @cached_property
    def slots(self) -> list[list[str]]:
        """Per template the slots that need a filler, in order of appearance; none of them is filled by a side."""
        return [self._slots_of(form) for form in self.templates]

    def _slots_of(self, form: Template) -> list[str]:
        sides = form.sides or self.sides
        texts = [form.text, *form.answers, *(text for side in sides for text in side.values())]
        if self.first_difference:
            texts.append(form.rest)
        found = [slot for text in texts for slot in string.Template(text).get_identifiers()]
        return [slot for slot in dict.fromkeys(found) if slot not in sides[0]]

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """Distinct pairs for ever; ends when a thousand draws in a row bring nothing new."""
        numbers = [number for number, form in enumerate(self.templates) if split in form.splits]
        seen: set[frozenset[str]] = set()
        n_stale = 0
        while n_stale < STALE_DRAWS:
            candidate = self.fill(drawn(numbers, rng), self.fillers[split], rng)
            key = frozenset((candidate.clean, candidate.corrupt))
            n_stale = n_stale + 1 if key in seen else 0
            if not n_stale:
                seen.add(key)
                yield candidate

    def fill(self, number: int, fillers: Mapping[str, Sequence[str]], rng: random.Random) -> Candidate:
        """Template `number` with drawn fillers, and either side as the clean one."""
        values: dict[str, str] = {}
        for slot in self.slots[number]:
            kind = kind_of(slot)
            if kind in self.marks:
                values[slot] = drawn(self.marks[kind], rng)
            else:
                values[slot] = drawn([word for word in fillers[kind] if word not in values.values()], rng)
        return self.written(number, values, drawn((0, 1), rng))

    def longest(self, split: str, n_tokens: Callable[[str], int]) -> list[Candidate]:
        """Every template of `split` with the longest filler, by `n_tokens`, in every slot."""
        most = {kind: max(filled, key=n_tokens) for kind, filled in {**self.fillers[split], **self.marks}.items()}
        return [
            self.written(number, {slot: most[kind_of(slot)] for slot in self.slots[number]}, clean_side=0)
            for number, form in enumerate(self.templates)
            if split in form.splits
        ]

    def written(self, number: int, values: Mapping[str, str], clean_side: int) -> Candidate:
        """Template `number` with `values` in its slots, side `clean_side` being the clean one."""
        form = self.templates[number]
        sides = form.sides or self.sides
        first, second = sides[clean_side], sides[1 - clean_side]
        answers = tuple((filled(text, first, values), filled(text, second, values)) for text in form.answers)
        clean, corrupt = filled(form.text, first, values), filled(form.text, second, values)
        if not self.first_difference:
            return Candidate(clean, corrupt, answers, number)
        return Candidate(
            clean, corrupt, answers, number, (filled(form.rest, first, values), filled(form.rest, second, values))
        )


def _template(form: Mapping[str, Any]) -> Template:
    sides = _two(form["sides"]) if "sides" in form else None
    return Template(form["text"], tuple(form["answers"]), form["rest"], tuple(form["splits"]), sides)


def _two(sides: Sequence[Mapping[str, str]]) -> Sides:
    first, second = sides
    return first, second


def filled(text: str, side: Mapping[str, str], values: Mapping[str, str]) -> str:
    """`text` with the drawn `values` and those of one side put in; what a side holds may have slots of its own."""
    of_side = {slot: string.Template(held).substitute(values) for slot, held in side.items()}
    return string.Template(text).substitute({**values, **of_side})


def words_of(text: str) -> set[str]:
    """The words of a filler or identifier, lower case: `file_name` and `FileName` are made of `file` and `name`."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return set(re.findall(r"[a-z]+", apart.lower()))


def kind_of(slot: str) -> str:
    """The kind of filler that a slot takes: its name without the number."""
    return slot.rstrip("0123456789")


def drawn(options: Sequence[Option], rng: random.Random) -> Option:
    """One of `options`; built on `random()` alone, whose sequence Python promises never to change."""
    if not options:
        raise TaskError("A template has more slots of one kind than its split has words; add words of that kind.")
    return options[int(rng.random() * len(options))]
