"""Twins of a task whose labels mean nothing: what a search finds there, it finds without a behaviour to find.

    shuffled      the same prompts; a coin per pair, the same whenever the pair is drawn, decides whether its answers
                  are exchanged. There is no rule: whoever scores well has learned the pairs by heart
    nonsense      the label follows a feature that is irrelevant to the task, and the feature that the task turns on is
                  left to chance. The feature is a remark put before the prompt, so that every task has it in all
                  splits. A coin per pair says which of its two prompts comes after which remark: labels are those of
                  the task where it falls one way, and exchanged where it falls the other
    relabelled    the feature that the task turns on decides between two tokens that have nothing to do with it

A circuit's size for task loss means something beside its size on these (Drori, February 2026, *Weight-sparse circuits
may be interpretable yet unfaithful*, whose nonsense task is of the third kind: a pronoun's gender decides between " is"
and " when"). Where a search is told to agree with the model, labels play no part: there `shuffled` *is* the real task,
and the control is to re-pair the answers that are to be agreed with as `nonsense` re-pairs labels
(`nonsense_twin` in faithfulness/controls.py).
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from sparse_interp.errors import TaskError
from sparse_interp.tasks.pairs import Candidate, token_ids
from sparse_interp.tasks.task import Source, Task

Change = Callable[[Candidate, random.Random], Candidate]

REMARKS = ("# 1\n", "# 2\n")
"""What is put before prompts of code or prose."""

LOOKED_AT = 64
"""Pairs in which words are looked for that may serve as remarks."""


@dataclass(frozen=True)
class Changed:
    """The pairs of another source, each changed by one function."""

    source: Source
    change: Change
    sha256: str
    max_changed: int | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the other source."""
        return self.source.splits

    @property
    def first_difference(self) -> bool:
        """As in the other source."""
        return self.source.first_difference

    def n_pairs(self, split: str) -> int | None:
        """As many as the other source has."""
        return self.source.n_pairs(split)

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """The pairs of the other source, changed."""
        for candidate in self.source.candidates(split, rng):
            yield self.change(candidate, rng)

    def longest(self, split: str, n_tokens: Callable[[str], int]) -> list[Candidate]:
        """Its longest pairs, changed."""
        return [self.change(candidate, random.Random(0)) for candidate in self.source.longest(split, n_tokens)]


def shuffled(task: Task, seed: int = 0) -> Task:
    """The same prompts, with the answers of a random half of the pairs exchanged; `seed` chooses the half.

    Raises:
        TaskError: if this tokenizer cannot write the answers after each other's prompts.
    """

    def change(candidate: Candidate, rng: random.Random) -> Candidate:
        key = "\0".join([str(seed), *sorted((candidate.clean, candidate.corrupt))])
        return candidate.exchanged() if hashlib.sha256(key.encode()).digest()[0] % 2 else candidate

    return _changed(task, "shuffled", change, task.source.max_changed, seed)


def nonsense(task: Task, remarks: tuple[str, str] = REMARKS) -> Task:
    """Prompts of the task after one of two `remarks`, which alone decides the answer.

    A pair's two answers, in alphabetical order, follow the first remark and the second, whatever the prompt says. The
    clean prompt is the one that the first of them really belongs to, so that a pair whose clean prompt comes after the
    second remark has its labels exchanged.

    Raises:
        TaskError: if the remarks are the same, or this tokenizer writes them alike or with different numbers of tokens.
    """
    _two_of("remarks", remarks)
    if not _told_apart(remarks, task.tokenizer):
        raise TaskError(
            f"remarks={remarks!r} are {[token_ids(remark, task.tokenizer) for remark in remarks]} to this tokenizer; "
            "choose an edit that this tokenizer writes with as many tokens, each of them known and not all the same."
        )

    def change(candidate: Candidate, rng: random.Random) -> Candidate:
        which = int(rng.random() * 2)
        if candidate.answers[0] != tuple(sorted(candidate.answers[0])):
            candidate = candidate.exchanged()._replace(clean=candidate.corrupt, corrupt=candidate.clean)
        prompts = {"clean": remarks[which] + candidate.clean, "corrupt": remarks[1 - which] + candidate.corrupt}
        return (candidate.exchanged() if which else candidate)._replace(**prompts)

    return _changed(task, "nonsense", change, None, *remarks)


def remarks_for(task: Task) -> tuple[str, str]:
    """Two remarks that the task's tokenizer can write: comments, or else two of the rarer words of its own prompts.

    Raises:
        TaskError: if it has no two such words.
    """
    if _told_apart(REMARKS, task.tokenizer):
        return REMARKS
    split, seen = task.splits[0], Counter()
    n = min(LOOKED_AT, task.n_pairs(split) or LOOKED_AT)
    for row in task.encoded(n, split, generator=torch.Generator().manual_seed(0)):
        seen.update({one for one, other in zip(row.clean[1:], row.corrupt[1:], strict=True) if one == other})
    rarest = sorted(seen, key=lambda token: (seen[token], token))
    words = [f"{task.tokenizer.decode([token]).strip()} " for token in rarest]
    words = [word for word in words if len(token_ids(word, task.tokenizer)) == 1 and word.strip()]
    if len(set(words)) < 2 or not _told_apart((words[0], words[1]), task.tokenizer):
        raise TaskError(f"task {task.name!r} has no two words that could stand before its prompts; give remarks.")
    return words[0], words[1]


def _told_apart(remarks: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows both, writes them with as many tokens, and not with the same ones."""
    first, second = (token_ids(remark, tokenizer) for remark in remarks)
    return len(first) == len(second) and first != second and tokenizer.unk_token_id not in first + second


def relabelled(task: Task, labels: tuple[str, str] = (" is", " when")) -> Task:
    """The same prompts; where the right answer is the alphabetically first of the two, `labels[0]` follows.

    Raises:
        TaskError: if the labels are the same, or not one token each (unless the task allows longer answers).
    """
    _two_of("labels", labels)

    def change(candidate: Candidate, rng: random.Random) -> Candidate:
        in_order = candidate.answers[0] == tuple(sorted(candidate.answers[0]))
        return candidate._replace(answers=(labels if in_order else labels[::-1],), rests=("\n", "\n"))

    return _changed(task, "relabelled", change, task.source.max_changed, *labels)


def _two_of(what: str, given: tuple[str, str]) -> None:
    if len(set(given)) != 2 or not all(given):
        raise TaskError(f"{what}={given!r}; expected two different texts that are not empty.")


def _changed(task: Task, kind: str, change: Change, max_changed: int | None, *settings: object) -> Task:
    digest = hashlib.sha256(repr((task.source.sha256, kind, settings)).encode()).hexdigest()
    return replace(
        task, name=f"{task.name}, {kind}", source=Changed(task.source, change, digest, max_changed=max_changed)
    )
