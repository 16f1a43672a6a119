"""Any text survives the round trip; blocks cover the stream; bigram tables are the counts they came from."""

import inspect
import json
import math
import random
import sysconfig
import textwrap
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from transformer_lens.utilities import get_tokenizer_with_bos

from sparse_interp.corpus import Document
from sparse_interp.errors import TokenizerError
from sparse_interp.tokenizer import (
    _BYTE_OF_SYMBOL,
    END_OF_TEXT,
    PIECE_PATTERN,
    BlockSampler,
    bigram_counts,
    bigram_loss,
    bigram_table,
    blocks,
    encode_documents,
    load_bigram_table,
    load_tokenizer,
    pieces,
    save_bigram_table,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

BUNDLED = Path(__file__).parents[1] / "data" / "tokenizers" / "python_2k"
TEXTS = [inspect.getsource(module) for module in (inspect, json, textwrap, random)]
VOCAB = 400


@pytest.fixture(scope="module")
def in_memory():
    return train_tokenizer(TEXTS, VOCAB)


@pytest.fixture(scope="module")
def folder(in_memory, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "small"
    save_tokenizer(in_memory, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_the_vocabulary_has_the_size_asked_for_every_byte_and_the_special_token_last(tokenizer):
    assert len(tokenizer) == VOCAB
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))
    assert tokenizer.convert_ids_to_tokens(VOCAB - 1) == END_OF_TEXT
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {VOCAB - 1}
    assert len(set(pieces(tokenizer, range(256)))) == 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a  b , c .\n\t don't n't 's\r\n\r \n",
        "é☃\U0001f600\x00\x7f\u00a0",
        f"{END_OF_TEXT} inside {END_OF_TEXT}",
        "".join(map(chr, range(1, 3000))),
        TEXTS[2],
    ],
)
def test_decoding_gives_back_exactly_the_encoded_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_training_twice_on_the_same_text_gives_the_same_tokenizer(in_memory):
    assert tokenizer_hash(train_tokenizer(TEXTS, VOCAB)) == tokenizer_hash(in_memory)


def test_the_hash_survives_saving_and_differs_for_another_vocabulary(in_memory, tokenizer):
    assert tokenizer_hash(tokenizer) == tokenizer_hash(in_memory)
    assert tokenizer_hash(train_tokenizer(TEXTS, VOCAB - 1)) != tokenizer_hash(in_memory)


def test_transformer_lens_can_reload_it_with_a_beginning_token(tokenizer):
    with_bos = get_tokenizer_with_bos(tokenizer)
    assert with_bos.encode("x")[0] == tokenizer.bos_token_id
    assert with_bos.encode("x")[1:] == tokenizer.encode("x")


def test_text_with_too_few_repetitions_is_refused_with_the_size_it_supports():
    with pytest.raises(TokenizerError, match=r"supports \d+ ids, not vocab_size=2048"):
        train_tokenizer(["too short"], 2048)


@pytest.mark.parametrize("size", [0, 256, 2**16 + 1])
def test_a_vocabulary_that_cannot_hold_all_bytes_or_16_bits_is_refused(size):
    with pytest.raises(TokenizerError, match="257 to 65536"):
        train_tokenizer(TEXTS, size)


def test_saving_over_another_tokenizer_is_refused_and_leaves_it_alone(folder, in_memory):
    before = (folder / "tokenizer.json").read_bytes()
    save_tokenizer(in_memory, folder)
    with pytest.raises(TokenizerError, match="holds another tokenizer"):
        save_tokenizer(train_tokenizer(TEXTS, 300), folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_without_or_with_a_damaged_tokenizer_is_refused_by_name(folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_stream_is_the_documents_in_order_each_followed_by_the_special_token(tokenizer):
    stream = encode_documents(tokenizer, [Document("a", "one two"), Document("b", "three")])
    assert stream.dtype == np.uint16
    assert tokenizer.decode(stream.tolist()) == f"one two{END_OF_TEXT}three{END_OF_TEXT}"


def test_the_special_marker_written_inside_a_document_stays_text(tokenizer):
    stream = encode_documents(tokenizer, [Document("a", f"x = '{END_OF_TEXT}'")])
    assert (stream == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(stream[:-1].tolist()) == f"x = '{END_OF_TEXT}'"
    assert END_OF_TEXT in tokenizer.get_vocab()
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


def test_encoding_no_documents_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="no documents"):
        encode_documents(tokenizer, [])


def test_pieces_print_on_one_line(tokenizer):
    ids = tokenizer.encode("a\n\té", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) in {r"a\n\té", r"a\n\t\xc3\xa9"}
    assert pieces(tokenizer, [tokenizer.eos_token_id]) == [END_OF_TEXT]


def test_blocks_begin_with_the_special_token_and_repeat_the_stream_in_order():
    cut = blocks(torch.arange(10).to(torch.uint16), n_ctx=4, bos=99)
    assert cut.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


@pytest.mark.parametrize("n_ctx", [1, 12])
def test_a_stream_too_short_for_one_block_is_refused(n_ctx):
    with pytest.raises(TokenizerError, match="gives no block"):
        blocks(torch.arange(10), n_ctx=n_ctx, bos=99)


def sampler(seed=0, n_tokens=103, n_ctx=6, batch_size=4):
    return BlockSampler(torch.arange(n_tokens), n_ctx, batch_size, torch.Generator().manual_seed(seed), bos=999)


def test_an_epoch_reads_consecutive_tokens_and_each_block_once():
    batches = sampler(batch_size=1)
    seen = torch.cat([next(batches) for _ in range(batches.blocks_per_epoch)])
    assert batches.epoch == 0
    assert (seen[:, 0] == 999).all()
    body = seen[:, 1:][seen[:, 1].argsort()].flatten()
    assert torch.equal(body, torch.arange(body[0], body[0] + len(body)))
    assert len(body) > 103 - 2 * 5
    next(batches)
    assert batches.epoch == 1


def test_block_borders_and_order_change_from_epoch_to_epoch():
    batches = sampler(batch_size=1)
    firsts = []
    for epoch in range(6):
        firsts.append([next(batches)[0, 1].item() for _ in range(batches.blocks_per_epoch)])
        assert batches.epoch == epoch
    assert len({min(epoch) for epoch in firsts}) > 1
    assert all(epoch != sorted(epoch) for epoch in firsts)


@pytest.mark.parametrize("n_before", [0, 1, 5, 13])
def test_a_restored_sampler_draws_exactly_the_batches_that_would_have_followed(n_before):
    original = sampler(seed=3)
    for _ in range(n_before):
        next(original)
    state = original.state_dict()
    expected = [next(original) for _ in range(12)]
    resumed = sampler(seed=77)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, next(resumed)) for a in expected)


def test_a_sampler_state_for_another_stream_or_context_is_refused():
    with pytest.raises(TokenizerError, match="103 tokens at n_ctx=6; this one has 200"):
        sampler(n_tokens=200).load_state_dict(sampler().state_dict())
    with pytest.raises(TokenizerError, match="n_ctx=7"):
        sampler(n_ctx=7).load_state_dict(sampler().state_dict())


def test_a_stream_too_short_to_sample_is_refused():
    with pytest.raises(TokenizerError, match="at least 10 tokens"):
        sampler(n_tokens=9)


def test_bigram_counts_are_the_pairs_inside_each_block():
    counts = bigram_counts(torch.tensor([[0, 1, 1], [0, 1, 2]], dtype=torch.int32), d_vocab=3)
    pairs = zip(counts.first.tolist(), counts.second.tolist(), counts.count.tolist(), strict=True)
    assert list(pairs) == [(0, 1, 2), (1, 1, 1), (1, 2, 1)]


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="beyond d_vocab=3"):
        bigram_counts(torch.tensor([0, 3]), d_vocab=3)


def test_the_softmax_of_a_bigram_row_is_the_additively_smoothed_frequency():
    table = bigram_table(bigram_counts(torch.tensor([0, 1, 0, 1, 0, 2]), d_vocab=3), smoothing=0.5)
    assert table[0, 0] == 0
    expected = torch.tensor([0.5, 2.5, 1.5]) / (3 + 0.5 * 3)
    torch.testing.assert_close(table[0].softmax(-1), expected)


def test_the_loss_of_an_empty_table_is_that_of_guessing():
    assert bigram_loss(torch.zeros(7, 7), torch.tensor([[1, 2, 3]])) == pytest.approx(np.log(7))


def test_smoothing_must_be_positive():
    with pytest.raises(TokenizerError, match="above 0"):
        bigram_table(bigram_counts(torch.tensor([0, 1]), d_vocab=2), smoothing=0.0)


def test_a_stored_bigram_table_comes_back_to_half_precision_without_its_rare_pairs(tmp_path):
    tokens = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(0)).square() % 50
    counts = bigram_counts(tokens, d_vocab=50)
    path = tmp_path / "bigram.safetensors"
    save_bigram_table(counts, 0.1, path)
    torch.testing.assert_close(load_bigram_table(path), bigram_table(counts, 0.1), rtol=1e-3, atol=0)
    save_bigram_table(counts, 0.1, path, min_count=3)
    frequent = bigram_table(counts.at_least(3), 0.1)
    assert torch.equal(load_bigram_table(path) > 0, frequent > 0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_or_damaged_bigram_table_is_refused_by_name(tmp_path):
    path = tmp_path / "bigram.safetensors"
    with pytest.raises(TokenizerError, match="is missing"):
        load_bigram_table(path)
    path.write_bytes(b"not a table")
    with pytest.raises(TokenizerError, match="holds no bigram table"):
        load_bigram_table(path)


def test_the_bundled_tokenizer_has_2048_ids_and_single_pieces_for_closing_quotes():
    bundled = load_tokenizer(BUNDLED)
    assert len(bundled) == 2048
    for answer in ("'", '"', "')", '")'):
        assert len(bundled.encode(answer, add_special_tokens=False)) == 1


# -- tokenizers that others published ---------------------------------------------------------------------------------

AWKWARD = [
    "",
    "def f(x):\n\treturn x  # ]]\n",
    "a" * 37 + " " * 41 + "\n" * 5 + "-" * 23 + "==" * 9,
    "if x:\r\n\r    y//=3.14159\n",
    "é☃\U0001f600 ǅ \u00a0\u2028\x85\x1c\u200b\ufeff 漢字 ٣²½",
    "<|startoftext|><|endoftext|>",
    "class A:\n    def __init__(self, *args, **kwargs):\n        super().__init__()\n" * 3,
]
"""Runs of one character, line ends, white space and digits of many kinds, and the two special names as text."""


@pytest.fixture(scope="module")
def scrambled(tmp_path_factory):
    """`vocab.bpe` and `encoder.json` of random merges: pieces that can be made in several ways, and one in none."""
    rng = random.Random(0)
    merges = [("a", "b"), ("x", "a"), ("b", "y"), ("xa", "by")]  # no merging leads to xaby: ab comes first
    pieces = [*_BYTE_OF_SYMBOL, *map("".join, merges)]
    while len(merges) < 600:
        pair = (
            rng.choice(["e", "t", "a", "Ġ", "=", "-", *pieces[256:]]),
            rng.choice(["e", "t", "Ġ", "=", "-", *pieces[256:]]),
        )
        if "".join(pair) not in pieces and len("".join(pair)) < 9:
            merges.append(pair)
            pieces.append("".join(pair))
    folder = tmp_path_factory.mktemp("scrambled")
    (folder / "vocab.bpe").write_text("\n".join(["# header", *map(" ".join, merges), ""]), encoding="utf-8")
    ids = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", END_OF_TEXT])}
    (folder / "encoder.json").write_text(json.dumps(ids))
    return folder


def by_the_rules(folder, text):
    """tiktoken's algorithm: of all neighbours whose union is a piece, join the pair whose union has the lowest id."""
    ids = json.loads((folder / "encoder.json").read_text())
    symbol = {byte: s for s, byte in _BYTE_OF_SYMBOL.items()}
    found = []
    for word in regex.findall(PIECE_PATTERN, text):
        parts = [symbol[byte] for byte in word.encode()]
        if "".join(parts) in ids:
            parts = ["".join(parts)]
        while True:
            joined = [(ids.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, i = min(joined, default=(math.inf, 0))
            if lowest == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


def test_two_files_give_the_ids_that_tiktokens_rules_give(scrambled):
    tokenizer, rng = load_tokenizer(scrambled), random.Random(1)
    texts = [
        *AWKWARD,
        *("".join(rng.choices("eetta  ==--\n(x", k=rng.randint(1, 60))) for _ in range(400)),
        TEXTS[2][:4000],
        *(tokenizer.decode([i]) for i in range(256, 856)),  # words that are pieces
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == by_the_rules(scrambled, text), text
        assert tokenizer.decode(ids) == text


def test_two_files_give_the_ids_that_tiktoken_gives(scrambled):
    load = pytest.importorskip("tiktoken.load")
    ranks = load.data_gym_to_mergeable_bpe_ranks(str(scrambled / "vocab.bpe"), str(scrambled / "encoder.json"))
    special = {END_OF_TEXT: len(ranks) + 1}
    theirs = pytest.importorskip("tiktoken").Encoding(
        "t", pat_str=PIECE_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    ours = load_tokenizer(scrambled)
    for text in [*AWKWARD, *TEXTS]:
        assert ours.encode(text, add_special_tokens=False, split_special_tokens=True) == theirs.encode_ordinary(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, allowed_special="all")


def test_the_special_marker_is_one_id_unless_it_is_asked_to_be_text(scrambled):
    tokenizer = load_tokenizer(scrambled)
    assert tokenizer.encode(f"e{END_OF_TEXT}", add_special_tokens=False)[-1] == tokenizer.eos_token_id == 857
    as_text = tokenizer.encode(END_OF_TEXT, add_special_tokens=False, split_special_tokens=True)
    assert 857 not in as_text and tokenizer.decode(as_text) == END_OF_TEXT
    stream = encode_documents(tokenizer, [Document("a", END_OF_TEXT)]).tolist()
    assert stream == [*as_text, 857]


def test_the_id_without_bytes_has_a_name_and_comes_from_no_text(scrambled):
    tokenizer = load_tokenizer(scrambled)
    assert tokenizer.decode([856]) == "<|startoftext|>" and pieces(tokenizer, [856]) == ["<|startoftext|>"]
    assert 856 not in tokenizer.encode("<|startoftext|>", add_special_tokens=False)
    assert len(tokenizer) == 858 and sorted(tokenizer.get_vocab().values()) == list(range(858))


def test_padding_is_never_an_exclamation_mark(scrambled, tmp_path):
    assert load_tokenizer(scrambled).pad_token_id == 857
    save_tokenizer(load_tokenizer(scrambled), tmp_path / "hub")
    settings = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": END_OF_TEXT, "pad_token": "!", "bos_token": None}
    (tmp_path / "hub" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "hub")
    assert (tokenizer.pad_token, tokenizer.bos_token) == (END_OF_TEXT, END_OF_TEXT)
    batch = tokenizer(["e", "e e e e e"], padding=True)["input_ids"]
    assert 0 not in batch[0] and batch[0][-1] == 857


@pytest.mark.parametrize("settings", [None, {}, {"auto_map": {"AutoTokenizer": ["evil.T", None]}}], ids=str)
def test_a_tokenizer_json_of_the_hub_is_the_same_tokenizer_and_runs_nothing(scrambled, tmp_path, settings):
    ours = load_tokenizer(scrambled)
    (tmp_path / "tokenizer.json").write_text(ours.backend_tokenizer.to_str())
    (tmp_path / "evil.py").write_text("raise SystemExit")
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path)
    assert tokenizer_hash(found) == tokenizer_hash(ours) and found.is_fast
    assert {found.bos_token, found.eos_token, found.pad_token} == {END_OF_TEXT}
    assert [found.encode(text) for text in AWKWARD] == [ours.encode(text) for text in AWKWARD]
    with_bos = (
        get_tokenizer_with_bos(load_tokenizer(tmp_path))
        if settings != {"auto_map": {"AutoTokenizer": ["evil.T", None]}}
        else None
    )
    assert with_bos is None or with_bos.encode("e")[0] == 857


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("vocab.bpe", lambda text: text.replace("\n", "\nq q\n", 1), "do not belong together"),
        ("vocab.bpe", lambda text: text[: len(text) // 2], "do not belong together"),
        ("encoder.json", lambda text: text.replace('"!": 0', '"!": 1'), "do not belong together"),
        ("encoder.json", lambda text: text[:100], "cannot be read"),
        ("encoder.json", lambda text: "[1]", "do not belong together"),
        ("vocab.bpe", lambda text: text.encode("latin-1", "replace").decode("latin-1") + "\ud800", "cannot be read"),
    ],
)
def test_two_files_that_do_not_fit_are_refused(scrambled, tmp_path, file, change, words):
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((scrambled / name).read_bytes())
    changed = change((tmp_path / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_bytes(changed.encode("utf-8", "surrogatepass"))
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer|cannot be read"):
        load_tokenizer(tmp_path)


def test_a_thousand_real_python_files_come_back_exactly(scrambled):
    tokenizer, texts = load_tokenizer(scrambled), []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        with suppress(UnicodeDecodeError):
            if path.stat().st_size < 6000:
                texts.append(path.read_bytes().decode())
        if len(texts) == 1000:
            break
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = tokenizer.backend_tokenizer.decode_batch([e.ids for e in encoded], skip_special_tokens=False)
    assert len(texts) == 1000 and decoded == texts
