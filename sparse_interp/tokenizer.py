"""Text to token ids and back: a byte-level BPE, the stream of a corpus, the blocks a model reads, bigram counts.

    text  ->  ids            any text comes back exactly: every byte is a piece
    documents  ->  stream    doc <|endoftext|> doc <|endoftext|> ...
    stream  ->  blocks       <|endoftext|> followed by n_ctx - 1 consecutive stream tokens
    blocks  ->  bigram[a, b] = log(1 + count(a, b) / smoothing)

The softmax of a bigram row is the additively smoothed estimate (count + smoothing) / (total + smoothing * d_vocab),
because a constant added to a row changes no probability; unseen pairs are exact zeros, so the table is stored sparsely.

The pre-tokenisation pattern is that of the tokenizer of Gao et al. 2025 (arXiv:2511.13653, released as
`tinypython_2k`): words with one leading character, numbers of up to three digits, runs of punctuation, white space.

That tokenizer was itself published as two files for tiktoken, which joins two neighbours wherever their union is a
piece, the earliest piece first, and takes a word that is a piece as it is. A list of merges says the same only if every
way to split a piece into two is on it. One id has no bytes there and cannot be decoded, `<|startoftext|>`; here it
decodes to that name, and no text encodes to it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt16
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_interp.corpus import Document
from sparse_interp.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
"""The one special token: begins every block and prompt, ends every document, pads."""

START_OF_TEXT = "<|startoftext|>"
"""The last id but one of `tinypython_2k`, which no text has."""

TOKENIZER_JSON, SETTINGS_JSON = "tokenizer.json", "tokenizer_config.json"
MERGES_BPE, IDS_JSON = "vocab.bpe", "encoder.json"

PIECE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""No piece crosses the boundaries that this pattern draws."""

_ENCODE_BATCH_CHARS = 4_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE with exactly `vocab_size` ids: 256 bytes, merges, and `<|endoftext|>` as the last.

    Save it and load it again before a model gets it: TransformerLens reloads tokenizers from their folder.
    """
    if not 257 <= vocab_size <= 2**16:
        raise TokenizerError(f"vocab_size={vocab_size}; 256 bytes and one special token need 257 to 65536 ids.")
    backend = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False, min_frequency=2
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size - 1:
        raise TokenizerError(
            f"The text supports {backend.get_vocab_size() + 1} ids, not vocab_size={vocab_size}: it has too few "
            "repeated pieces. Give more text or a smaller vocab_size."
        )
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_TOKENIZER_SETTINGS, **dict.fromkeys(_SPECIAL, END_OF_TEXT)
    )


_SPECIAL = ("bos_token", "eos_token", "pad_token")
_TOKENIZER_SETTINGS = {"clean_up_tokenization_spaces": False}


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` to `folder`: both or nothing.

    Saving the same tokenizer again is a no-op; a folder that holds another one is refused.
    """
    if folder.exists():
        if tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer):
            return
        raise TokenizerError(f"{folder} holds another tokenizer, which its models need; choose a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    special = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    try:
        unfinished.chmod(0o755)
        _backend(tokenizer).save(str(unfinished / TOKENIZER_JSON))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_TOKENIZER_SETTINGS, **special}
        (unfinished / SETTINGS_JSON).write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, as a fast one; never reaches for the network, and runs no code that lies there.

    Read are what `save_tokenizer` wrote; any `tokenizer.json` of the Hugging Face hub; and `vocab.bpe` with
    `encoder.json`, the two files of `tinypython_2k`. Of eos, bos and pad, those that are not set become one another,
    and `<|endoftext|>` before all. A pad token that is an ordinary piece, as an exclamation mark would be, is not used.

    Raises:
        TokenizerError: if there is none, or a damaged one.
    """
    folder = Path(folder)
    if (folder / MERGES_BPE).is_file() and not (folder / TOKENIZER_JSON).is_file():
        return _tinypython(folder)
    if not (folder / TOKENIZER_JSON).is_file():
        raise TokenizerError(
            f"{folder} holds no tokenizer: {TOKENIZER_JSON} is missing, and so is {MERGES_BPE} with {IDS_JSON}. "
            "Give a folder of save_tokenizer, or one with those files."
        )
    try:
        backend = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        settings = _TOKENIZER_SETTINGS | _special_tokens(folder, backend)
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **settings)
    except Exception as error:
        raise TokenizerError(f"The tokenizer in {folder} cannot be read ({error}); restore or retrain it.") from error


def _special_tokens(folder: Path, backend: Tokenizer) -> dict[str, str]:
    """eos, bos and pad as `folder` sets them, or as they set one another."""
    said: dict[str, object] = {}
    for name in ("special_tokens_map.json", SETTINGS_JSON):
        if (folder / name).is_file():
            said |= json.loads((folder / name).read_text(encoding="utf-8"))
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    found: dict[str, str] = {}
    for name in _SPECIAL:
        token = said.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in added:
            found[name] = token
    usual = found.get("eos_token") or (END_OF_TEXT if END_OF_TEXT in added else next(iter(found.values()), None))
    return found if usual is None else dict.fromkeys(_SPECIAL, usual) | found


def _tinypython(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer whose merges and ids are in two files, checked against one another as tiktoken checks them."""
    try:
        lines = (folder / MERGES_BPE).read_text(encoding="utf-8").split("\n")[1:-1]  # a header, and after the last line
        merges = [tuple(line.split()) for line in lines]
        ids = json.loads((folder / IDS_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"The tokenizer in {folder} cannot be read ({error}); fetch both files again.") from error
    expected = {symbol: i for i, symbol in enumerate(_BYTE_OF_SYMBOL)}
    expected |= {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    expected |= {START_OF_TEXT: len(expected), END_OF_TEXT: len(expected) + 1}
    if not isinstance(ids, dict) or ids != expected or not all(len(pair) == 2 for pair in merges):
        wrong = sorted(set(expected.items()) ^ set(ids.items()))[:3] if isinstance(ids, dict) else []
        raise TokenizerError(
            f"{folder}: {MERGES_BPE} and {IDS_JSON} do not belong together, or are damaged; they disagree about "
            f"{', '.join(map(repr, wrong))}. Fetch both again."
        )
    splits = [
        pair
        for piece, _ in sorted(ids.items(), key=lambda item: item[1])[256:-2]
        for pair in sorted(
            ((piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]
    vocab = {piece: i for piece, i in ids.items() if piece != END_OF_TEXT}
    backend = _byte_level(models.BPE(vocab, splits, ignore_merges=True))
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_TOKENIZER_SETTINGS, **dict.fromkeys(_SPECIAL, END_OF_TEXT)
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides the ids: vocabulary, merges, pattern, special tokens. Not of paths or file layout."""
    spec = json.loads(_backend(tokenizer).to_str())
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"].get("merges", [])]
    content = {
        "vocab": sorted(spec["model"]["vocab"].items(), key=lambda item: item[1]),
        "merges": merges,
        "patterns": _patterns(spec["pre_tokenizer"]),
        "special": sorted((token["id"], token["content"]) for token in spec["added_tokens"]),
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> UInt16[np.ndarray, " token"]:
    """All documents as one stream of ids, each followed by `<|endoftext|>`.

    The characters `<|endoftext|>` inside a document are text like any other and become ordinary pieces.
    """
    if len(tokenizer) > 2**16:
        raise TokenizerError(f"The tokenizer has {len(tokenizer)} ids; a stream of 16-bit ids holds at most 65536.")
    backend = Tokenizer.from_str(_backend(tokenizer).to_str())
    backend.encode_special_tokens = True
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    parts = [
        np.array([*encoding.ids, end], dtype=np.uint16)
        for texts in _batches(documents)
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
    if not parts:
        raise TokenizerError("There are no documents to encode; collect at least one.")
    return np.concatenate(parts)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """What each id stands for, one line each: newlines, tabs and lone bytes escaped as `\\n`, `\\t`, `\\xe2`."""
    return [_readable(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def blocks(stream: Integer[Tensor, " token"], n_ctx: int, bos: int) -> Int[Tensor, "block pos"]:
    """The stream cut into consecutive blocks of `n_ctx`, each `bos` and n_ctx - 1 tokens; a shorter rest is dropped."""
    n_blocks = len(stream) // (n_ctx - 1) if n_ctx >= 2 else 0
    if n_blocks == 0:
        raise TokenizerError(f"A stream of {len(stream)} tokens gives no block of n_ctx={n_ctx}; use a longer text.")
    body = stream[: n_blocks * (n_ctx - 1)].view(n_blocks, n_ctx - 1).long()
    return torch.cat([body.new_full((n_blocks, 1), bos), body], dim=1)


class BlockSampler(Iterator[Int[Tensor, "batch pos"]]):
    """Endless random batches of blocks that together read the whole stream, epoch after epoch.

    Every epoch draws one offset, cuts the stream into blocks from there (so block borders move between epochs), and
    visits them in a random order. A batch may begin in one epoch and end in the next. The generator is the sampler's
    own: `load_state_dict` rewinds it, and then exactly the same batches follow.
    """

    def __init__(
        self,
        stream: Integer[Tensor, " token"],
        n_ctx: int,
        batch_size: int,
        generator: torch.Generator,
        bos: int,
    ) -> None:
        """`n_ctx` tokens per block including `bos`, `batch_size` blocks per batch."""
        if n_ctx < 2 or batch_size < 1 or len(stream) < 2 * (n_ctx - 1):
            raise TokenizerError(
                f"A stream of {len(stream)} tokens cannot be sampled in batches of {batch_size} x {n_ctx}: "
                f"at least {2 * (n_ctx - 1)} tokens, n_ctx >= 2 and batch_size >= 1 are needed."
            )
        self._stream = stream
        self._n_ctx = n_ctx
        self._batch_size = batch_size
        self._generator = generator
        self._bos = bos
        self._epoch = -1
        self._next_epoch()

    @property
    def epoch(self) -> int:
        """How many times the stream has been read to its end."""
        return self._epoch

    @property
    def blocks_per_epoch(self) -> int:
        """Blocks in the current epoch."""
        return len(self._starts)

    def __iter__(self) -> "BlockSampler":
        return self

    def __next__(self) -> Int[Tensor, "batch pos"]:
        starts = []
        missing = self._batch_size
        while missing:
            if self._position == len(self._starts):
                self._next_epoch()
            taken = self._starts[self._position : self._position + missing]
            self._position += len(taken)
            missing -= len(taken)
            starts.append(taken)
        within = torch.arange(self._n_ctx - 1)
        body = self._stream[torch.cat(starts)[:, None] + within].long()
        return torch.cat([body.new_full((len(body), 1), self._bos), body], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the sampler is: everything that the next batch depends on besides the stream."""
        sizes = [self._epoch, self._position, len(self._stream), self._n_ctx]
        return {"generator": self._epoch_generator_state.clone(), "place": torch.tensor(sizes)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to a saved place; the batch size may differ, the stream and `n_ctx` may not."""
        epoch, position, n_tokens, n_ctx = state["place"].tolist()
        if (n_tokens, n_ctx) != (len(self._stream), self._n_ctx):
            raise TokenizerError(
                f"The saved sampler read a stream of {n_tokens} tokens at n_ctx={n_ctx}; this one has "
                f"{len(self._stream)} at n_ctx={self._n_ctx}. Resume with the data and context of the saved training."
            )
        self._generator.set_state(state["generator"])
        self._epoch = epoch - 1
        self._next_epoch()
        self._position = position

    def _next_epoch(self) -> None:
        self._epoch += 1
        self._position = 0
        self._epoch_generator_state = self._generator.get_state()
        width = self._n_ctx - 1
        offset = int(torch.randint(width, (), generator=self._generator))
        n_blocks = (len(self._stream) - offset) // width
        self._starts = offset + width * torch.randperm(n_blocks, generator=self._generator)


@dataclass(frozen=True)
class BigramCounts:
    """How often token `second[i]` followed token `first[i]`; pairs that never occurred are absent."""

    first: Int[Tensor, " pair"]
    """Earlier token of each pair, ascending."""

    second: Int[Tensor, " pair"]
    """Later token of each pair, ascending within one `first`."""

    count: Int[Tensor, " pair"]
    """Occurrences, at least 1."""

    d_vocab: int
    """Number of token ids."""

    def at_least(self, min_count: int) -> "BigramCounts":
        """Only the pairs that occurred `min_count` times or more."""
        kept = self.count >= min_count
        return BigramCounts(self.first[kept], self.second[kept], self.count[kept], self.d_vocab)


def bigram_counts(tokens: Integer[Tensor, "*block pos"], d_vocab: int) -> BigramCounts:
    """Count neighbouring pairs along the last axis.

    Count over `blocks`, not over the bare stream, and the row of `<|endoftext|>` describes how blocks begin: mostly in
    the middle of a document.
    """
    pair_ids = (tokens[..., :-1].long() * d_vocab + tokens[..., 1:].long()).flatten()
    if len(pair_ids) and not 0 <= int(tokens.long().min()) <= int(tokens.long().max()) < d_vocab:
        raise TokenizerError(f"Token ids run to {int(tokens.long().max())}, beyond d_vocab={d_vocab}.")
    pair_ids, count = torch.unique(pair_ids, return_counts=True)
    return BigramCounts(pair_ids // d_vocab, pair_ids % d_vocab, count, d_vocab)


def bigram_table(counts: BigramCounts, smoothing: float) -> Float[Tensor, "d_vocab d_vocab"]:
    """log(1 + count / smoothing), zero where unseen; `smoothing` is the pseudo-count of every pair."""
    if smoothing <= 0:
        raise TokenizerError(f"smoothing={smoothing}; it is a pseudo-count and must be above 0.")
    table = torch.zeros(counts.d_vocab, counts.d_vocab)
    table[counts.first, counts.second] = torch.log1p(counts.count / smoothing)
    return table


def bigram_loss(table: Float[Tensor, "d_vocab d_vocab"], tokens: Integer[Tensor, "block pos"]) -> float:
    """Mean cross-entropy of the table's own predictions on `tokens`, nats per token."""
    held_out = bigram_counts(tokens, len(table))
    log_probs = table.log_softmax(dim=-1)[held_out.first, held_out.second].double()
    return float(-(log_probs * held_out.count).sum() / held_out.count.sum())


def save_bigram_table(counts: BigramCounts, smoothing: float, path: Path, min_count: int = 1) -> None:
    """Write the non-zero entries of the table, leaving out pairs rarer than `min_count`.

    Row r holds columns `column[start[r] : start[r + 1]]`; entries are float16, columns uint16.
    """
    kept = counts.at_least(min_count)
    start = torch.searchsorted(kept.first, torch.arange(counts.d_vocab + 1)).int()
    entries = torch.log1p(kept.count / smoothing).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    metadata = {"smoothing": repr(smoothing), "min_count": str(min_count), "d_vocab": str(counts.d_vocab)}
    tensors = {"start": start, "column": kept.second.to(torch.uint16), "entry": entries}
    unfinished.write_bytes(save(tensors, metadata=metadata))
    unfinished.replace(path)


def load_bigram_table(path: Path) -> Float[Tensor, "d_vocab d_vocab"]:
    """The dense float32 table that `save_bigram_table` wrote."""
    if not path.is_file():
        raise TokenizerError(f"{path} is missing; write it with save_bigram_table.")
    try:
        stored = load_file(path)
        start, column, entry = stored["start"].long(), stored["column"].long(), stored["entry"].float()
    except (SafetensorError, KeyError) as error:
        raise TokenizerError(f"{path} holds no bigram table ({error}); write it with save_bigram_table.") from error
    d_vocab = len(start) - 1
    row = torch.repeat_interleave(torch.arange(d_vocab), start.diff())
    table = torch.zeros(d_vocab, d_vocab)
    table[row, column] = entry
    return table


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TokenizerError(f"A fast (tokenizers-backed) tokenizer is needed; got {type(tokenizer).__name__}.")
    return backend


def _patterns(pre_tokenizer: dict[str, object] | None) -> list[str]:
    """Regular expressions of the Split steps, in order."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in groups of a few million characters: enough to keep every core busy, few enough for memory."""
    batch: list[str] = []
    n_chars = 0
    for document in documents:
        batch.append(document.text)
        n_chars += len(document.text)
        if n_chars >= _ENCODE_BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE writes a byte as itself where it prints in Latin-1, else as the next character from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_SYMBOL = _byte_of_symbol()


def _readable(piece: str) -> str:
    if piece == END_OF_TEXT or any(symbol not in _BYTE_OF_SYMBOL for symbol in piece):
        return piece  # a special token, or one of a tokenizer that does not write bytes as symbols
    text = bytes(_BYTE_OF_SYMBOL[symbol] for symbol in piece).decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
