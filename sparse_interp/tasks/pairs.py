"""Pairs of prompts, and what a tokenizer makes of them.

    clean   + answer + rest      the program, or story, that goes on with `answer`
    corrupt + foil   + rest      its twin, minimally edited, that goes on with `foil`

Two rules turn a pair into token ids:

    one token          `answer` is one token after `clean`, and `foil` after `corrupt`; anything else is refused
    first difference   clean + answer and clean + foil are written out, each with its rest; tokens that both begin with
                       belong to the prompt, and the first in which they differ is what is predicted. The same place and
                       the same two tokens must come out of corrupt. So `]` against `]]` becomes, with a tokenizer
                       that writes `]]` as two tokens, a prompt that ends in `]` and goes on with a newline or with `]`

Under both, the prompts of a pair have as many tokens, so that positions correspond.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerBase

from sparse_interp.errors import TaskError

SPLITS = ("train", "test", "shifted")
"""`test` shares the form of `train` and no word with it; `shifted` other words in other, mostly longer templates."""


class Pair(NamedTuple):
    """One row of a task, as text."""

    clean: str
    corrupt: str
    answer: str
    foil: str
    template: int


class EncodedPair(NamedTuple):
    """A pair as its text and as token ids; prompts begin with the bos token."""

    pair: Pair
    clean: list[int]
    corrupt: list[int]
    answer: int
    foil: int
    is_whole: bool = True
    """Whether either token spells its answer from its first letter to its last (and perhaps what follows)."""


class Candidate(NamedTuple):
    """A pair before a tokenizer has seen it: (answer, foil) comes in several forms, the preferred one first."""

    clean: str
    corrupt: str
    answers: tuple[tuple[str, str], ...]
    template: int
    rests: tuple[str, str] = ("", "")
    """What follows the answer, and what follows the foil."""

    def exchanged(self) -> "Candidate":
        """The same prompts, each with the other's answer."""
        answers = tuple((foil, answer) for answer, foil in self.answers)
        return self._replace(answers=answers, rests=self.rests[::-1])


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `text` alone, without bos."""
    return tokenizer.encode(text, add_special_tokens=False)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(bos, pad); each of bos, pad and eos stands in for a missing other."""
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    bos, pad = (bos if bos is not None else pad), (pad if pad is not None else bos)
    if bos is None or pad is None:
        raise TaskError(
            "Prompts begin with a bos token, and this tokenizer has neither bos, eos nor pad; "
            "give it one, for instance with tokenizer.add_special_tokens({'bos_token': '<|endoftext|>'})."
        )
    return bos, pad


def encode(
    candidate: Candidate,
    tokenizer: PreTrainedTokenizerBase,
    max_changed: int | None = None,
    first_difference: bool = False,
) -> EncodedPair:
    """A pair as token ids, by the rule of one token or by that of the first difference (see the module).

    Raises:
        TaskError: if the rule does not apply, prompts differ in length or in more than `max_changed` tokens, or do not
            differ at all.
    """
    if candidate.clean == candidate.corrupt:
        raise TaskError(f"clean and corrupt are the same prompt {candidate.clean!r}; expected two that differ.")
    bos, _ = special_ids(tokenizer)
    if first_difference:
        return _at_first_difference(candidate, tokenizer, bos, max_changed)
    return _with_single_tokens(candidate, tokenizer, bos, max_changed)


def _with_single_tokens(
    candidate: Candidate, tokenizer: PreTrainedTokenizerBase, bos: int, max_changed: int | None
) -> EncodedPair:
    clean, corrupt = candidate.clean, candidate.corrupt
    clean_ids, corrupt_ids = token_ids(clean, tokenizer), token_ids(corrupt, tokenizer)
    if len(clean_ids) != len(corrupt_ids):
        raise TaskError(
            f"clean {clean!r} is {len(clean_ids)} tokens and corrupt {corrupt!r} is {len(corrupt_ids)}; expected equal "
            "lengths, so that positions correspond: choose an edit that this tokenizer writes with as many tokens."
        )
    _check_edit(clean_ids, corrupt_ids, candidate, max_changed)
    for form, (answer, foil) in enumerate(candidate.answers):
        try:
            answer_id = next_token(clean, answer, clean_ids, tokenizer)
            foil_id = next_token(corrupt, foil, corrupt_ids, tokenizer)
        except TaskError:
            if form == len(candidate.answers) - 1:
                raise
            continue
        if answer_id == foil_id:
            raise TaskError(f"answer and foil are both {answer!r}; expected two different tokens.")
        pair = Pair(clean, corrupt, answer, foil, candidate.template)
        return EncodedPair(pair, [bos, *clean_ids], [bos, *corrupt_ids], answer_id, foil_id)
    raise TaskError(f"{clean!r} comes without an answer.")


def next_token(prompt: str, continuation: str, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The one id that `continuation` adds to `prompt`; anything else is refused."""
    whole = token_ids(prompt + continuation, tokenizer)
    n_prompt = len(prompt_ids)
    if whole[:n_prompt] != prompt_ids:
        raise TaskError(
            f"answer {continuation!r} merges with the end of the prompt {prompt[-20:]!r} into "
            f"{tokenizer.convert_ids_to_tokens(whole[-2:])}, so it never follows this prompt as a token of its own; "
            "end the prompt where a token ends."
        )
    if len(whole) != n_prompt + 1:
        raise TaskError(
            f"answer {continuation!r} is {len(whole) - n_prompt} tokens after the prompt "
            f"({tokenizer.convert_ids_to_tokens(whole[n_prompt:])}), expected 1; "
            "choose an answer that this tokenizer writes as a single token."
        )
    return whole[n_prompt]


def _at_first_difference(
    candidate: Candidate, tokenizer: PreTrainedTokenizerBase, bos: int, max_changed: int | None
) -> EncodedPair:
    (answer, foil), (rest, foil_rest) = candidate.answers[0], candidate.rests
    on_clean, on_corrupt = (
        tuple(token_ids(prompt + text, tokenizer) for text in (answer + rest, foil + foil_rest))
        for prompt in (candidate.clean, candidate.corrupt)
    )
    at, at_corrupt = (first_difference_of(*ids) for ids in (on_clean, on_corrupt))
    if at is None or at_corrupt is None:
        raise TaskError(
            f"{answer!r} and {foil!r} are the same tokens as far as both go after {candidate.clean[-20:]!r}; "
            "expected two answers that differ."
        )
    answer_id, foil_id = (ids[at] for ids in on_clean)
    if (at, answer_id, foil_id) != (at_corrupt, *(ids[at_corrupt] for ids in on_corrupt)):
        raise TaskError(
            f"{answer!r} and {foil!r} first differ in token {at} after clean {candidate.clean!r} and in token "
            f"{at_corrupt} after corrupt {candidate.corrupt!r}, or in other tokens there; expected the same place and "
            "the same two tokens: choose an edit that this tokenizer writes with as many tokens."
        )
    clean_ids, corrupt_ids = on_clean[0][:at], on_corrupt[0][:at]
    _check_edit(clean_ids, corrupt_ids, candidate, max_changed)
    clean, corrupt, told, told_foil = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (clean_ids, corrupt_ids, [answer_id], [foil_id])
    )
    whole = clean == candidate.clean and told.startswith(answer) and told_foil.startswith(foil)
    pair = Pair(clean, corrupt, told, told_foil, candidate.template)
    return EncodedPair(pair, [bos, *clean_ids], [bos, *corrupt_ids], answer_id, foil_id, whole)


def first_difference_of(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two sequences hold different ids; None if one begins with the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _check_edit(clean_ids: list[int], corrupt_ids: list[int], candidate: Candidate, max_changed: int | None) -> None:
    n_changed = sum(a != b for a, b in zip(clean_ids, corrupt_ids, strict=True))
    clean, corrupt = candidate.clean, candidate.corrupt
    if not n_changed:
        raise TaskError(
            f"This tokenizer writes clean {clean!r} and corrupt {corrupt!r} alike up to the answer; "
            "expected prompts that differ before it."
        )
    if max_changed is not None and n_changed > max_changed:
        raise TaskError(f"clean {clean!r} and corrupt {corrupt!r} differ in {n_changed} tokens, not {max_changed}.")


# -- pairs that somebody has written down, or found --------------------------------------------------------------------

TEXT_COLUMNS = ("clean", "corrupt", "answer", "foil")

PairRows = pd.DataFrame | Path | str | Iterable[Mapping[str, Any] | Sequence[Any]]
"""A frame, the path of a CSV file, or rows as mappings or tuples."""


@dataclass(frozen=True)
class PairList:
    """Somebody's own pairs: a source that ends."""

    by_split: Mapping[str, Sequence[Candidate]]
    sha256: str
    first_difference: bool = False
    max_changed: None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have pairs."""
        return tuple(split for split in SPLITS if self.by_split.get(split))

    def n_pairs(self, split: str) -> int:
        """How many pairs `split` has."""
        return len(self.by_split[split])

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """The pairs of `split` in a drawn order, once each."""
        yield from sorted(self.by_split[split], key=lambda _: rng.random())

    def longest(self, split: str, n_tokens: Callable[[str], int]) -> list[Candidate]:
        """Its one longest pair, by `n_tokens`."""
        return [max(self.by_split[split], key=lambda candidate: n_tokens(candidate.clean))]


def pair_frame(rows: PairRows) -> pd.DataFrame:
    """The rows as a frame of checked text columns, a numbered `template` and a `split`."""
    frame = _read(rows)
    if frame.empty:
        raise TaskError(f"There are no pairs; expected at least one row of {', '.join(TEXT_COLUMNS)}.")
    if all(isinstance(column, int) for column in frame.columns):
        frame.columns = [*TEXT_COLUMNS, "template", "split"][: frame.shape[1]]
    missing = [column for column in TEXT_COLUMNS if column not in frame.columns]
    if missing:
        raise TaskError(
            f"Pairs lack {', '.join(missing)}; expected the columns {', '.join(TEXT_COLUMNS)} "
            f"(and optionally template, split), found {', '.join(map(str, frame.columns))}."
        )
    frame = frame.reset_index(drop=True)
    for column in TEXT_COLUMNS:
        for number, value in enumerate(frame[column]):
            if not isinstance(value, str) or not value:
                raise TaskError(f"Pair {number} has {column} {value!r}; expected text that is not empty.")
    repeated = frame.index[frame.duplicated(["clean", "corrupt"])]
    if len(repeated):
        raise TaskError(f"Pair {repeated[0]} repeats an earlier pair of prompts; expected each pair once.")
    frame["template"] = pd.factorize(frame["template"])[0] if "template" in frame else range(len(frame))
    frame["split"] = frame["split"] if "split" in frame else hashed_splits(frame)
    unknown = sorted({str(split) for split in frame["split"]} - set(SPLITS))
    if unknown:
        raise TaskError(f"Pairs have the splits {', '.join(unknown)}; expected {', '.join(SPLITS)}.")
    return frame


def _read(rows: PairRows) -> pd.DataFrame:
    """The rows as they are, in a frame of its own; a CSV file is read as text, so `None` and `NA` stay words."""
    if isinstance(rows, pd.DataFrame):
        return rows.copy()
    if not isinstance(rows, str | Path):
        return pd.DataFrame(list(rows))
    try:
        return pd.read_csv(rows, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TaskError(
            f"{rows} cannot be read as pairs ({error}); expected a CSV file with the columns {', '.join(TEXT_COLUMNS)}."
        ) from error


def hashed_splits(frame: pd.DataFrame) -> list[str]:
    """`test` for the fifth of the pairs whose prompts have the smallest hashes, `train` for the others."""
    keys = [
        hashlib.sha256("\0".join(sorted(prompts)).encode()).hexdigest()
        for prompts in zip(frame["clean"], frame["corrupt"], strict=True)
    ]
    ranked = sorted(set(keys))
    held_out = set(ranked[: max(len(ranked) // 5, min(1, len(ranked) - 1))])
    return ["test" if key in held_out else "train" for key in keys]


def listed(frame: pd.DataFrame, first_difference: bool = False) -> PairList:
    """The rows of a checked frame as a source of pairs."""
    by_split: dict[str, list[Candidate]] = {}
    for row in frame.itertuples():
        candidate = Candidate(row.clean, row.corrupt, ((row.answer, row.foil),), int(row.template))
        by_split.setdefault(row.split, []).append(candidate)
    text = json.dumps(frame[[*TEXT_COLUMNS, "template", "split"]].values.tolist())
    return PairList(by_split, hashlib.sha256(text.encode()).hexdigest(), first_difference)
