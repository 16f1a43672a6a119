"""A task: pairs of prompts that differ in one place, and therefore in their next token.

    clean   . . . p0    next token: answer
    corrupt . . . p1    next token: foil

    logit difference  =  logit[answer] - logit[foil]                        at the last token of `clean`
    answer loss       =  -ln( e^logit[answer] / (e^logit[answer] + e^logit[foil]) )
    correct           =  logit[answer] > logit[foil]                        (chance 0.5)

The loss between the two answers alone is the task loss of Gao et al. 2025 (arXiv:2511.13653). Their released code adds
the two sides of a pair; here every prompt has its own number; `batch.swapped()` is the other side, and
`batch.both_sides()` has both.

Pairs come from a source: a template file (`tasks/templates.py`), pairs that somebody has written down or found in text
(`tasks/pairs.py`, `tasks/occurrences.py`), or either of them with other labels (`tasks/controls.py`).
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softplus
from transformers import PreTrainedTokenizerBase

from sparse_interp.axes import PerPrompt, Tokens
from sparse_interp.corpus import Document
from sparse_interp.errors import TaskError
from sparse_interp.tasks.occurrences import occurrence_pairs
from sparse_interp.tasks.pairs import (
    Candidate,
    EncodedPair,
    Pair,
    PairRows,
    encode,
    listed,
    pair_frame,
    special_ids,
    token_ids,
)

AnswerLogits = Float[Tensor, "batch d_vocab"]
LogitsAnywhere = Float[Tensor, "batch pos d_vocab"] | AnswerLogits


@dataclass(frozen=True)
class TaskBatch:
    """Prompts whose next token is `answer`, beside minimally edited twins whose next token is `foil`."""

    clean: Tokens
    """Token ids, padded on the right; the first is the bos token."""
    corrupt: Tokens
    """The twins, of the same lengths."""
    answer: Int[Tensor, " batch"]
    """Token id that continues `clean`."""
    foil: Int[Tensor, " batch"]
    """Token id that continues `corrupt`."""
    lengths: Int[Tensor, " batch"]
    """Real tokens per prompt, as counted when it was made: padding is never recognised by its id."""
    template: Int[Tensor, " batch"]
    """Template that each prompt came from; intervals resample these."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position whose logits predict the answer: that of the last real token."""
        return self.lengths - 1

    @property
    def attention_mask(self) -> Int[Tensor, "batch pos"]:
        """1 at real tokens, 0 at padding."""
        pos = torch.arange(self.clean.shape[1], device=self.clean.device)
        return (pos < self.lengths[:, None]).long()

    def swapped(self) -> "TaskBatch":
        """The other side of every pair: `corrupt` becomes clean, and `foil` the answer."""
        return replace(self, clean=self.corrupt, corrupt=self.clean, answer=self.foil, foil=self.answer)

    def both_sides(self) -> "TaskBatch":
        """Every pair twice, [2 batch ...]: all of them as they are, and behind them all of them `swapped`.

        What asks one number of each prompt then asks it of both prompts of a pair.
        """
        other = self.swapped()
        return TaskBatch(**{name: torch.cat([values, getattr(other, name)]) for name, values in vars(self).items()})

    def rows(self, chosen: slice | Int[Tensor, " chosen"]) -> "TaskBatch":
        """Some of the pairs, in the order of `chosen`; padding stays as it is."""
        return TaskBatch(**{name: values[chosen] for name, values in vars(self).items()})

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same batch on another device."""
        return TaskBatch(**{name: values.to(device) for name, values in vars(self).items()})

    def to_frame(self, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
        """The pairs as text, without bos and padding: `clean`, `corrupt`, `answer`, `foil`, `length`, `template`."""
        rows = []
        for row, length in enumerate(self.lengths.tolist()):
            texts = [tokenizer.decode(side[row, 1:length].tolist()) for side in (self.clean, self.corrupt)]
            texts += [tokenizer.decode([int(token[row])]) for token in (self.answer, self.foil)]
            rows.append((*texts, length, int(self.template[row])))
        return pd.DataFrame(rows, columns=["clean", "corrupt", "answer", "foil", "length", "template"])


def collate(encoded: Sequence[EncodedPair], pad_id: int) -> TaskBatch:
    """Stack encoded pairs, padding with `pad_id` on the right."""
    lengths = [len(row.clean) for row in encoded]
    width = max(lengths)

    def stacked(prompts: Iterable[list[int]]) -> Tokens:
        return torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in prompts])

    return TaskBatch(
        clean=stacked(row.clean for row in encoded),
        corrupt=stacked(row.corrupt for row in encoded),
        answer=torch.tensor([row.answer for row in encoded]),
        foil=torch.tensor([row.foil for row in encoded]),
        lengths=torch.tensor(lengths),
        template=torch.tensor([row.pair.template for row in encoded]),
    )


Metric = Callable[[Tensor, TaskBatch], Tensor]
"""Logits (everywhere, or at the answer position) and their batch -> one number per prompt."""


def at_answer(logits: LogitsAnywhere, batch: TaskBatch) -> AnswerLogits:
    """The logits that predict each answer; logits `[batch d_vocab]` are taken to be those already."""
    expected = tuple(batch.clean.shape) if logits.ndim == 3 else (len(batch),)
    if tuple(logits.shape[:-1]) != expected:
        raise TaskError(
            f"Logits of shape {tuple(logits.shape)} do not belong to {len(batch)} prompts of {batch.clean.shape[1]} "
            "positions; give logits [batch pos d_vocab] of batch.clean, or [batch d_vocab] at batch.last."
        )
    if logits.ndim == 2:
        return logits
    return logits[torch.arange(len(batch), device=logits.device), batch.last.to(logits.device)]


def logit_difference(logits: LogitsAnywhere, batch: TaskBatch) -> PerPrompt:
    """How much the model prefers `answer` to `foil`, in logits, per prompt."""
    here = at_answer(logits, batch)
    answer, foil = (token.to(here.device)[:, None] for token in (batch.answer, batch.foil))
    return (here.gather(1, answer) - here.gather(1, foil)).squeeze(1)


def answer_loss(logits: LogitsAnywhere, batch: TaskBatch) -> PerPrompt:
    """Cross-entropy of the choice between `answer` and `foil`, in nats, per prompt (ln 2 is a coin)."""
    return softplus(-logit_difference(logits, batch))


def is_correct(logits: LogitsAnywhere, batch: TaskBatch) -> PerPrompt:
    """1 where `answer` has the larger logit of the two, else 0 (a tie is wrong); its mean is the accuracy."""
    return (logit_difference(logits, batch) > 0).float()


def is_argmax(logits: LogitsAnywhere, batch: TaskBatch) -> PerPrompt:
    """1 where no token of the vocabulary has a larger logit than `answer`, else 0."""
    here = at_answer(logits, batch)
    return (here.argmax(-1) == batch.answer.to(here.device)).float()


def kl_divergence(reference_logits: LogitsAnywhere, logits: LogitsAnywhere, batch: TaskBatch) -> PerPrompt:
    """KL(reference || logits) over the vocabulary at the answer position, in nats, per prompt."""
    reference = log_softmax(at_answer(reference_logits, batch), dim=-1)
    return (reference.exp() * (reference - log_softmax(at_answer(logits, batch), dim=-1))).sum(-1)


def logit_difference_error(
    reference_logits: LogitsAnywhere, logits: LogitsAnywhere, batch: TaskBatch
) -> Float[Tensor, ""]:
    """Mean squared error of the logit difference over the batch, as a share of the reference's own mean square.

    0 is the reference itself, 1 what a logit difference of 0 on every prompt would have.
    """
    expected = logit_difference(reference_logits, batch)
    error = logit_difference(logits, batch) - expected
    return error.pow(2).mean() / expected.pow(2).mean().clamp_min(torch.finfo(expected.dtype).tiny)


def kl_to(reference_logits: LogitsAnywhere) -> Metric:
    """The metric that measures how far logits are from `reference_logits` (of the same batch), by `kl_divergence`."""

    def kl_from_reference(logits: Tensor, batch: TaskBatch) -> Tensor:
        return kl_divergence(reference_logits, logits, batch)

    return kl_from_reference


@runtime_checkable
class Source(Protocol):
    """Where the pairs of a task come from."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have pairs."""

    @property
    def sha256(self) -> str:
        """Hash of everything that the pairs are made from."""

    @property
    def max_changed(self) -> int | None:
        """Tokens in which the two prompts of a pair may differ, if that is bounded."""

    @property
    def first_difference(self) -> bool:
        """Which of the two rules of `tasks/pairs.py` makes tokens of a pair."""

    def n_pairs(self, split: str) -> int | None:
        """How many pairs `split` has; None where they are drawn and not listed."""

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """Distinct pairs of `split`, in a drawn order."""

    def longest(self, split: str, n_tokens: Callable[[str], int]) -> list[Candidate]:
        """Pairs among which the longest prompt of `split` is, by `n_tokens`."""


@dataclass(frozen=True)
class Task:
    """Pairs of prompts from one source, tokenised by one tokenizer."""

    name: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    source: Source = field(repr=False)

    def __post_init__(self) -> None:
        for split in self.splits:
            self._draw(1, split, random.Random(0))  # a tokenizer that cannot write the task is refused here

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have pairs, among `train`, `test` and `shifted`."""
        return self.source.splits

    @property
    def templates_sha256(self) -> str:
        """Hash of the template file, or of the pairs."""
        return self.source.sha256

    def n_pairs(self, split: str) -> int | None:
        """How many pairs `split` has; None where templates make them, more than anybody has counted."""
        return self.source.n_pairs(split)

    def pairs(self, n: int, split: str = "train", *, generator: torch.Generator) -> list[Pair]:
        """`n` distinct pairs as text; the same generator state gives the same pairs."""
        return [row.pair for row in self.encoded(n, split, generator=generator)]

    def encoded(self, n: int, split: str = "train", *, generator: torch.Generator) -> list[EncodedPair]:
        """`n` distinct pairs as text and token ids; the same generator state gives the same pairs."""
        return self._draw(n, split, seeded(generator))

    def batch(self, n: int, split: str = "train", *, generator: torch.Generator) -> TaskBatch:
        """`n` distinct pairs as tokens, padded on the right; the same generator state gives the same batch."""
        return self.collated(self.encoded(n, split, generator=generator))

    def collated(self, rows: Sequence[EncodedPair]) -> TaskBatch:
        """Pairs of this task as a batch, padded on the right."""
        return collate(rows, special_ids(self.tokenizer)[1])

    def longest(self, split: str) -> int:
        """Tokens of the longest prompt of `split`, bos included (templates: each slot takes its longest filler)."""

        def n_tokens(text: str) -> int:
            return max(len(token_ids(before + text, self.tokenizer)) for before in ("", " "))

        lengths = []
        for row in self.source.longest(split, n_tokens):
            ends = ("", *row.answers[0]) if self.source.first_difference else ("",)
            for side in (row.clean, row.corrupt):  # what both answers begin with belongs to the prompt
                lengths.append(max(len(token_ids(side + end, self.tokenizer)) - bool(end) for end in ends))
        return 1 + max(lengths)

    def check_fits(self, n_ctx: int, splits: Sequence[str] | None = None) -> None:
        """Refuse prompts that are longer than a context of `n_ctx` tokens, in `splits` (all unless told otherwise)."""
        lengths = {split: self.longest(split) for split in (self.splits if splits is None else splits)}
        too_long = {split: length for split, length in lengths.items() if length > n_ctx}
        if too_long:
            raise TaskError(
                f"Task {self.name!r} has prompts of up to {max(too_long.values())} tokens, and the context holds "
                f"{n_ctx}; expected no more than that (longest per split: "
                f"{', '.join(f'{split} {length}' for split, length in lengths.items())}). "
                "Use a model with a longer context, or shorter prompts."
            )

    @classmethod
    def from_pairs(
        cls,
        rows: PairRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "pairs",
        n_ctx: int | None = None,
        long_answers: str = "refuse",
    ) -> "Task":
        """A task of your own prompts: columns clean, corrupt, answer, foil, and optionally template and split.

        `rows` are mappings, tuples, a DataFrame, or the path of a CSV file. Without a split column, a fifth of the
        pairs (at least one, where there are two) is `test` and the others are `train`, by the hash of their prompts; a
        pair and its reverse stay together. Without a template column, every pair counts as its own template. `n_ctx`
        refuses prompts longer than a context of that many tokens. An answer of several tokens is refused, or with
        `long_answers="first_difference"` replaced by the first token in which answer and foil differ.

        Raises:
            TaskError: naming the first pair that makes no task, and why.
        """
        if long_answers not in ("refuse", "first_difference"):
            raise TaskError(f"long_answers={long_answers!r}; expected 'refuse' or 'first_difference'.")
        frame = pair_frame(rows)
        source = listed(frame, first_difference=long_answers == "first_difference")
        for number, row in enumerate(frame.itertuples()):
            candidate = Candidate(row.clean, row.corrupt, ((row.answer, row.foil),), row.template)
            try:
                encode(candidate, tokenizer, first_difference=source.first_difference)
            except TaskError as error:
                raise TaskError(f"Pair {number} of task {name!r}: {error}") from error
        task = cls(name, tokenizer, source)
        if n_ctx is not None:
            task.check_fits(n_ctx)
        return task

    @classmethod
    def from_corpus(
        cls,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        answers: tuple[str, str],
        *,
        name: str = "corpus",
        n_tokens: int = 32,
        n_pairs: int = 500,
        max_changed: int | None = None,
        edit: Callable[[str], str | None] | None = None,
        generator: torch.Generator,
    ) -> "Task":
        """A task of places in real text where the next token is one of two `answers`; see `tasks/occurrences.py`.

        A prompt is the `n_tokens` before such a place. Its twin is the most similar place that goes on with the other
        answer, in the same split and at most `max_changed` tokens apart; or, with `edit`, what that function makes of
        the prompt's text (None to leave the place out). At most `n_pairs` per split, drawn by `generator`. A fifth of
        the documents is `test`; a document is a template, so that intervals resample documents.

        Raises:
            TaskError: if an answer is not one token, or too few places are found.
        """
        by_split = occurrence_pairs(
            documents,
            tokenizer,
            answers,
            n_tokens=n_tokens,
            n_pairs=n_pairs,
            max_changed=max_changed,
            edit=edit,
            rng=seeded(generator),
        )
        rows = [(*pair, split) for split, pairs in by_split.items() for pair in pairs]
        return cls.from_pairs(rows, tokenizer, name=name)

    def _draw(self, n: int, split: str, rng: random.Random) -> list[EncodedPair]:
        """`n` pairs that this tokenizer writes as they should be; the others are passed over."""
        if split not in self.splits:
            raise TaskError(f"Task {self.name!r} has no split {split!r}; expected one of {', '.join(self.splits)}.")
        if n < 1:
            raise TaskError(f"Asked for {n} pairs of task {self.name!r}; expected at least 1.")
        found: list[EncodedPair] = []
        n_refused, reason = 0, "none."
        for candidate in self.source.candidates(split, rng):
            try:
                found.append(encode(candidate, self.tokenizer, self.source.max_changed, self.source.first_difference))
            except TaskError as error:
                n_refused, reason = n_refused + 1, str(error)
            if len(found) == n:
                return found
            if n_refused > 200 + 20 * len(found):
                break
        raise TaskError(
            f"Task {self.name!r} gave {len(found)} pairs of split {split!r} and not the {n} asked for; "
            f"{n_refused} were refused, the last because: {reason} "
            "Ask for fewer pairs, or use a tokenizer that writes them as the task needs."
        )


def seeded(generator: torch.Generator) -> random.Random:
    """A quick source of many small draws, started by one draw from `generator`."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
