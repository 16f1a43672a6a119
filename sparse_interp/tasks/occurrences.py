"""Places in real text where the next token is one of two answers, paired by the smallest edit.

    . . . w_1 w_2 ... w_n | answer        a place: the n tokens before one of the answers
    . . . v_1 v_2 ... v_n | foil          its twin: of all places that go on with the other answer, the most similar one
                                          (fewest positions with v_i != w_i; the closest two are paired first)

Both sides of such a pair are text as somebody wrote it, so nothing about it is artificial, and little is minimal. With
an edit of one's own the twin is an edited place instead, and the other answer is claimed, not found.

A place counts only if its text gives back the same tokens when it is read again, answer included. Whole documents are
held out for `test`, and no context of one split is one of the other.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer
from transformers import PreTrainedTokenizerBase

from sparse_interp.corpus import Document
from sparse_interp.errors import TaskError
from sparse_interp.tasks.pairs import Candidate, Pair, encode, token_ids

TEST_FRAC = 0.2
"""Share of the documents that is held out."""

POOL_PER_PAIR = 4
"""Places per answer among which the pairs are looked for, for each pair that is asked for."""

Edit = Callable[[str], str | None]
Position = tuple[int, tuple[int, ...], int]
"""(document, context, which answer)."""


class Place(NamedTuple):
    """A context, and which of the two answers follows it."""

    text: str
    ids: tuple[int, ...]
    which: int
    document: int


def occurrence_pairs(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    answers: tuple[str, str],
    *,
    n_tokens: int,
    n_pairs: int,
    max_changed: int | None,
    edit: Edit | None,
    rng: random.Random,
) -> dict[str, list[Pair]]:
    """Up to `n_pairs` pairs of `train` and of `test`; the number of its document is a pair's template.

    Raises:
        TaskError: if an answer is not one token, documents share a name, or a split comes out empty.
    """
    if n_tokens < 1 or n_pairs < 1:
        raise TaskError(f"n_tokens={n_tokens}, n_pairs={n_pairs}; expected at least 1 of each.")
    answer_ids = tuple(_answer_id(answer, tokenizer) for answer in answers)
    if answer_ids[0] == answer_ids[1]:
        raise TaskError(f"The answers {answers[0]!r} and {answers[1]!r} are one token; expected two.")
    numbers = {document.name: i for i, document in enumerate(documents)}
    seen: set[str] = set()
    found: dict[str, list[Pair]] = {}
    for split, part in _split(documents).items():
        at = [where for document in part for where in _positions(document, numbers, tokenizer, answer_ids, n_tokens)]
        places = _pool(at, tokenizer, answers, answer_ids, POOL_PER_PAIR * n_pairs, seen, rng)
        if edit is None:
            twins = _by_similarity(places, n_pairs, max_changed)
        else:
            twins = _by_edit(places, edit)
        pairs = _usable(twins, tokenizer, answers, n_pairs, max_changed, rng)
        if not pairs:
            raise TaskError(_none_found(split, len(part), answers, n_tokens, at, places))
        found[split] = pairs
    return found


def _split(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The fifth of the documents whose names have the smallest hashes is `test`, the others are `train`.

    The hash is none of those by which `sparse_interp.corpus` holds text out, so held-out text has both as well.
    """
    names = {document.name for document in documents}
    if len(names) < 2 or len(names) < len(documents):
        raise TaskError(f"{len(documents)} documents with {len(names)} names; expected two or more, each with its own.")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"places {name}".encode()).digest())
    held_out = set(ranked[: max(1, round(TEST_FRAC * len(ranked)))])
    return {
        "train": [document for document in documents if document.name not in held_out],
        "test": [document for document in documents if document.name in held_out],
    }


def _none_found(
    split: str, n_documents: int, answers: tuple[str, str], n_tokens: int, at: list[Position], places: list[Place]
) -> str:
    counts = [
        f"{sum(p[2] == which for p in at)} with {answer!r}, {sum(p.which == which for p in places)} of them usable"
        for which, answer in enumerate(answers)
    ]
    return (
        f"No pairs for split {split!r}: in its {n_documents} documents there are places that go on "
        f"{' and '.join(counts)} (their {n_tokens} tokens read back as the same tokens, and stand nowhere else in the "
        "text). Give more text, a larger max_changed, or another n_tokens."
    )


def _answer_id(answer: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = token_ids(answer, tokenizer)
    if len(ids) != 1:
        raise TaskError(
            f"answer {answer!r} is {len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)}), and places are found by "
            "one; choose answers that this tokenizer writes as a single token, with their leading space if they have "
            "one."
        )
    return ids[0]


def _positions(
    document: Document,
    numbers: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    answer_ids: Sequence[int],
    n_tokens: int,
) -> Iterator[Position]:
    """Every place of a document."""
    ids = token_ids(document.text, tokenizer)
    for which, answer in enumerate(answer_ids):
        for at in np.flatnonzero(np.asarray(ids) == answer).tolist():
            if at >= n_tokens:
                yield numbers[document.name], tuple(ids[at - n_tokens : at]), which


def _pool(
    positions: list[Position],
    tokenizer: PreTrainedTokenizerBase,
    answers: tuple[str, str],
    answer_ids: Sequence[int],
    n_per_answer: int,
    seen: set[str],
    rng: random.Random,
) -> list[Place]:
    """Up to `n_per_answer` drawn places per answer whose text reads back as the same tokens, no text twice."""
    pool: list[Place] = []
    room = [n_per_answer, n_per_answer]
    for document, ids, which in sorted(positions, key=lambda _: rng.random()):
        if not room[which]:
            continue
        text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        if text not in seen and token_ids(text + answers[which], tokenizer) == [*ids, answer_ids[which]]:
            seen.add(text)
            pool.append(Place(text, ids, which, document))
            room[which] -= 1
    return pool


def _by_similarity(places: list[Place], n_pairs: int, max_changed: int | None) -> Iterator[tuple[Place, str]]:
    """A place that goes on with the first answer and the text of one that goes on with the second, closest first."""
    ours, theirs = ([place for place in places if place.which == which] for which in (0, 1))
    if not ours or not theirs:
        return
    apart = distances(*(np.array([place.ids for place in side]) for side in (ours, theirs)))
    free = [True] * len(ours), [True] * len(theirs)
    for flat in np.argsort(apart, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(theirs))
        if max_changed is not None and apart[i, j] > max_changed:
            return
        if free[0][i] and free[1][j]:
            free[0][i] = free[1][j] = False
            yield ours[i], theirs[j].text


def _by_edit(places: list[Place], edit: Edit) -> Iterator[tuple[Place, str]]:
    for place in places:
        twin = edit(place.text)
        if twin is not None:
            yield place, twin


def distances(
    ours: Integer[np.ndarray, "ours pos"], theirs: Integer[np.ndarray, "theirs pos"]
) -> Integer[np.ndarray, "ours theirs"]:
    """In how many positions each of `ours` differs from each of `theirs`."""
    apart = np.zeros((len(ours), len(theirs)), dtype=np.int32)
    for pos in range(ours.shape[1]):
        apart += ours[:, pos, None] != theirs[None, :, pos]
    return apart


def _usable(
    twins: Iterator[tuple[Place, str]],
    tokenizer: PreTrainedTokenizerBase,
    answers: tuple[str, str],
    n_pairs: int,
    max_changed: int | None,
    rng: random.Random,
) -> list[Pair]:
    """The first `n_pairs` that make pairs with this tokenizer; either place of a pair may be the clean one."""
    pairs: list[Pair] = []
    for place, twin in twins:
        ours, others = answers[place.which], answers[1 - place.which]
        pair = Pair(place.text, twin, ours, others, place.document)
        if rng.random() < 0.5:
            pair = Pair(twin, place.text, others, ours, place.document)
        try:
            encode(
                Candidate(pair.clean, pair.corrupt, ((pair.answer, pair.foil),), pair.template), tokenizer, max_changed
            )
        except TaskError:
            continue
        pairs.append(pair)
        if len(pairs) == n_pairs:
            break
    return pairs
