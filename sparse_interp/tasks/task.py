"""A task: pairs of prompts that differ in one place, and therefore in their next token.

    clean   . . . p0    next token: answer
    corrupt . . . p1    next token: foil

    logit difference  =  logit[answer] - logit[foil]                        at the last token of `clean`
    answer loss       =  -ln( e^logit[answer] / (e^logit[answer] + e^logit[foil]) )
    correct           =  logit[answer] > logit[foil]                        (chance 0.5)

The loss between the two answers alone is the task loss of Gao et al. 2025 (arXiv:2511.13653). Their released code adds
the two sides of a pair; here every prompt has its own number, and `batch.swapped()` is the other side.

A template file (`data/tasks/<name>.json`) makes pairs out of

    templates   `text` with slots ($key, $key1), `answers` in order of preference (the first that is one token on both
                sides is taken), `rest` (what would follow in a program), and the `splits` that the template serves
    sides       what the slots that tell the two prompts apart hold on either side
    fillers     per split and kind, the words for the slots; no word serves two splits
    marks       choices that are no words (quote characters, say) and serve every split

The slots $key, $key1 and $key2 are all of kind `key`. In one prompt a slot has one filler, and no two slots the same
word.
"""

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softplus
from transformers import PreTrainedTokenizerBase

from sparse_interp.axes import PerPrompt, Tokens
from sparse_interp.errors import TaskError

SPLITS = ("train", "test", "shifted")
"""`test` shares the form of `train` and no word with it; `shifted` other words in other, mostly longer templates."""

Option = TypeVar("Option")
AnswerLogits = Float[Tensor, "batch d_vocab"]
LogitsAnywhere = Float[Tensor, "batch pos d_vocab"] | AnswerLogits


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


class Candidate(NamedTuple):
    """A pair before a tokenizer has seen it: (answer, foil) comes in several forms, the preferred one first."""

    clean: str
    corrupt: str
    answers: tuple[tuple[str, str], ...]
    template: int


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


def kl_to(reference_logits: LogitsAnywhere) -> Metric:
    """The metric that measures how far logits are from `reference_logits` (of the same batch), by `kl_divergence`."""

    def kl_from_reference(logits: Tensor, batch: TaskBatch) -> Tensor:
        return kl_divergence(reference_logits, logits, batch)

    return kl_from_reference


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


def encode_candidate(
    candidate: Candidate, tokenizer: PreTrainedTokenizerBase, max_changed: int | None = None
) -> EncodedPair:
    """Tokenise a pair and check it: equal lengths, single-token answers, at most `max_changed` tokens apart."""
    clean, corrupt = candidate.clean, candidate.corrupt
    if clean == corrupt:
        raise TaskError(f"clean and corrupt are the same prompt {clean!r}; expected two that differ.")
    clean_ids, corrupt_ids = token_ids(clean, tokenizer), token_ids(corrupt, tokenizer)
    if len(clean_ids) != len(corrupt_ids):
        raise TaskError(
            f"clean {clean!r} is {len(clean_ids)} tokens and corrupt {corrupt!r} is {len(corrupt_ids)}; expected equal "
            "lengths, so that positions correspond: choose an edit that this tokenizer writes with as many tokens."
        )
    n_changed = sum(a != b for a, b in zip(clean_ids, corrupt_ids, strict=True))
    if max_changed is not None and n_changed > max_changed:
        raise TaskError(f"clean {clean!r} and corrupt {corrupt!r} differ in {n_changed} tokens, not {max_changed}.")
    bos, _ = special_ids(tokenizer)
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


class Template(NamedTuple):
    """One form of prompt, with slots."""

    text: str
    answers: tuple[str, ...]
    rest: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class TemplateFile:
    """Templates and fillers as read from `data/tasks/<name>.json`: an endless source of pairs."""

    description: str
    templates: tuple[Template, ...]
    sides: tuple[Mapping[str, str], Mapping[str, str]]
    fillers: Mapping[str, Mapping[str, Sequence[str]]]
    marks: Mapping[str, Sequence[str]]
    max_changed: int | None
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "TemplateFile":
        """Read and check a template file."""
        raw = path.read_bytes()
        try:
            spec = json.loads(raw)
            templates = tuple(
                Template(form["text"], tuple(form["answers"]), form["rest"], tuple(form["splits"]))
                for form in spec["templates"]
            )
            first, second = spec["sides"]
            source = cls(
                description=spec["description"],
                templates=templates,
                sides=(first, second),
                fillers=spec["fillers"],
                marks=spec["marks"],
                max_changed=spec["max_changed_tokens"],
                sha256=hashlib.sha256(raw).hexdigest(),
            )
        except (ValueError, KeyError, TypeError) as error:
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
                unfilled = [slot for slot in self.slots(form) if kind_of(slot) not in known]
                if unfilled:
                    raise TaskError(
                        f"{where}: template {number} has slots {unfilled} that split {split!r} cannot fill; "
                        f"expected kinds among {sorted(known)}."
                    )

    def slots(self, form: Template) -> list[str]:
        """The slots that need a filler, in order of appearance; those that a side fills are not among them."""
        texts = [form.text, *form.answers, *(text for side in self.sides for text in side.values())]
        found = [slot for text in texts for slot in string.Template(text).get_identifiers()]
        return [slot for slot in dict.fromkeys(found) if slot not in self.sides[0]]

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """Distinct pairs for ever; ends when a thousand draws in a row bring nothing new."""
        numbers = [number for number, form in enumerate(self.templates) if split in form.splits]
        seen: set[frozenset[str]] = set()
        n_stale = 0
        while n_stale < 1000:
            candidate = self.fill(drawn(numbers, rng), self.fillers[split], rng)
            key = frozenset((candidate.clean, candidate.corrupt))
            n_stale = n_stale + 1 if key in seen else 0
            if not n_stale:
                seen.add(key)
                yield candidate

    def fill(self, number: int, fillers: Mapping[str, Sequence[str]], rng: random.Random) -> Candidate:
        """Template `number` with drawn fillers, and either side as the clean one."""
        values: dict[str, str] = {}
        for slot in self.slots(self.templates[number]):
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
            self.written(number, {slot: most[kind_of(slot)] for slot in self.slots(form)}, clean_side=0)
            for number, form in enumerate(self.templates)
            if split in form.splits
        ]

    def written(self, number: int, values: Mapping[str, str], clean_side: int) -> Candidate:
        """Template `number` with `values` in its slots, side `clean_side` being the clean one."""
        form = self.templates[number]
        first, second = self.sides[clean_side], self.sides[1 - clean_side]
        answers = tuple((filled(text, first, values), filled(text, second, values)) for text in form.answers)
        clean, corrupt = filled(form.text, first, values), filled(form.text, second, values)
        return Candidate(clean, corrupt, answers, number)


@dataclass(frozen=True)
class PairList:
    """Somebody's own pairs: a source that ends."""

    by_split: Mapping[str, Sequence[Candidate]]
    sha256: str
    max_changed: None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have pairs."""
        return tuple(split for split in SPLITS if self.by_split.get(split))

    def candidates(self, split: str, rng: random.Random) -> Iterator[Candidate]:
        """The pairs of `split` in a drawn order, once each."""
        yield from sorted(self.by_split[split], key=lambda _: rng.random())

    def longest(self, split: str, n_tokens: Callable[[str], int]) -> list[Candidate]:
        """Its one longest pair, by `n_tokens`."""
        return [max(self.by_split[split], key=lambda candidate: n_tokens(candidate.clean))]


def filled(text: str, side: Mapping[str, str], values: Mapping[str, str]) -> str:
    """`text` with the slots of one side, then the drawn `values`, put in."""
    return string.Template(string.Template(text).safe_substitute(side)).substitute(values)


def words_of(text: str) -> set[str]:
    """The words of a filler or identifier, lower case: `file_name` is made of `file` and `name`."""
    return set(re.findall(r"[a-z]+", text.lower()))


def kind_of(slot: str) -> str:
    """The kind of filler that a slot takes: its name without the number."""
    return slot.rstrip("0123456789")


def drawn(options: Sequence[Option], rng: random.Random) -> Option:
    """One of `options`; built on `random()` alone, whose sequence Python promises never to change."""
    if not options:
        raise TaskError("A template has more slots of one kind than its split has words; add words of that kind.")
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True)
class Task:
    """Pairs of prompts from one source, tokenised by one tokenizer."""

    name: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    source: TemplateFile | PairList = field(repr=False)

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

    def pairs(self, n: int, split: str = "train", *, generator: torch.Generator) -> list[Pair]:
        """`n` distinct pairs as text; the same generator state gives the same pairs."""
        return [row.pair for row in self._draw(n, split, seeded(generator))]

    def batch(self, n: int, split: str = "train", *, generator: torch.Generator) -> TaskBatch:
        """`n` distinct pairs as tokens, padded on the right; the same generator state gives the same batch."""
        return collate(self._draw(n, split, seeded(generator)), special_ids(self.tokenizer)[1])

    def longest(self, split: str) -> int:
        """Tokens of the longest prompt of `split`, bos included (templates: each slot takes its longest filler)."""

        def n_tokens(text: str) -> int:
            return max(len(token_ids(before + text, self.tokenizer)) for before in ("", " "))

        candidates = self.source.longest(split, n_tokens)
        return 1 + max(len(token_ids(side, self.tokenizer)) for row in candidates for side in (row.clean, row.corrupt))

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
        rows: pd.DataFrame | Iterable[Mapping[str, Any] | Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "pairs",
        n_ctx: int | None = None,
    ) -> "Task":
        """A task of your own prompts: columns clean, corrupt, answer, foil, and optionally template and split.

        Without a split column, a fifth of the pairs (at least one, where there are two) is `test` and the others are
        `train`, by the hash of their prompts; a pair and its reverse stay together. Without a template column, every
        pair counts as its own template. `n_ctx` refuses prompts longer than a context of that many tokens.
        """
        frame = pair_frame(rows)
        for number, row in enumerate(frame.itertuples()):
            try:
                encode_candidate(Candidate(row.clean, row.corrupt, ((row.answer, row.foil),), row.template), tokenizer)
            except TaskError as error:
                raise TaskError(f"Pair {number} of task {name!r}: {error}") from error
        task = cls(name, tokenizer, listed(frame))
        if n_ctx is not None:
            task.check_fits(n_ctx)
        return task

    def _draw(self, n: int, split: str, rng: random.Random) -> list[EncodedPair]:
        """`n` pairs that this tokenizer writes as they should be; the others are passed over."""
        if split not in self.splits:
            raise TaskError(f"Task {self.name!r} has no split {split!r}; expected one of {', '.join(self.splits)}.")
        if n < 1:
            raise TaskError(f"Asked for {n} pairs of task {self.name!r}; expected at least 1.")
        found: list[EncodedPair] = []
        n_refused, reason = 0, "none"
        for candidate in self.source.candidates(split, rng):
            try:
                found.append(encode_candidate(candidate, self.tokenizer, self.source.max_changed))
            except TaskError as error:
                n_refused, reason = n_refused + 1, str(error)
            if len(found) == n:
                return found
            if n_refused > 200 + 20 * len(found):
                break
        raise TaskError(
            f"Task {self.name!r} gave {len(found)} pairs of split {split!r} and not the {n} asked for; "
            f"{n_refused} were refused, the last because: {reason}."
            " Ask for fewer pairs, or use a tokenizer that writes them as the task needs."
        )


def seeded(generator: torch.Generator) -> random.Random:
    """A quick source of many small draws, started by one draw from `generator`."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))


TEXT_COLUMNS = ("clean", "corrupt", "answer", "foil")


def pair_frame(rows: pd.DataFrame | Iterable[Mapping[str, Any] | Sequence[Any]]) -> pd.DataFrame:
    """The rows as a frame of checked text columns, a numbered `template` and a `split`."""
    frame = rows.copy() if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
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


def hashed_splits(frame: pd.DataFrame) -> list[str]:
    """`test` for the fifth of the pairs whose prompts have the smallest hashes, `train` for the others."""
    keys = [
        hashlib.sha256("\0".join(sorted(prompts)).encode()).hexdigest()
        for prompts in zip(frame["clean"], frame["corrupt"], strict=True)
    ]
    ranked = sorted(set(keys))
    held_out = set(ranked[: max(len(ranked) // 5, min(1, len(ranked) - 1))])
    return ["test" if key in held_out else "train" for key in keys]


def listed(frame: pd.DataFrame) -> PairList:
    """The rows of a checked frame as a source of pairs."""
    by_split: dict[str, list[Candidate]] = {}
    for row in frame.itertuples():
        candidate = Candidate(row.clean, row.corrupt, ((row.answer, row.foil),), int(row.template))
        by_split.setdefault(row.split, []).append(candidate)
    text = json.dumps(frame[[*TEXT_COLUMNS, "template", "split"]].values.tolist())
    return PairList(by_split, hashlib.sha256(text.encode()).hexdigest())
