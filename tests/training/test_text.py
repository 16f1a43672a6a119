"""Text is encoded once, kept whole beside the run, and never mistaken for another run's."""

import json

import pytest
import torch

from sparse_interp.errors import CheckpointError, ConfigError, SparseInterpError, TokenizerError
from sparse_interp.model.checkpoint import bundled_tokenizer
from sparse_interp.tokenizer import load_bigram_table
from sparse_interp.training import text
from sparse_interp.training.recipes import recipe, replace_model
from sparse_interp.training.text import folder_text, python_text, source_of


@pytest.fixture(scope="module")
def python_2k():
    return bundled_tokenizer("python_2k")


def read(source_files, python_2k, cache, **options):
    return folder_text(source_files, python_2k, recipe("tiny"), cache, progress=False, **options)


def test_a_folder_becomes_a_stream_and_held_out_blocks(source_files, python_2k, tmp_path):
    made = read(source_files, python_2k, tmp_path / "cache")
    written = python_2k.decode(made.stream.long())
    held_out = python_2k.decode(made.validation[:, 1:].flatten())
    assert "return value * 31 + OFFSET_1[0]" in written + held_out
    assert made.validation.shape[1] == 64 and made.bos == python_2k.bos_token_id
    assert (made.validation[:, 0] == made.bos).all()
    assert made.source["training"]["n_files"] + made.source["validation"]["n_files"] == 40
    assert made.source["training"]["n_tokens"] == len(made.stream)
    shared = {line for line in held_out.splitlines() if line.startswith("def ")} & set(written.splitlines())
    assert not shared


def test_the_bigram_table_of_a_folder_is_counted_on_its_training_text(source_files, python_2k, tmp_path):
    made = read(source_files, python_2k, tmp_path / "cache")
    first, second = made.stream[:2].tolist()
    assert made.bigram_table[first, second] > 0
    without = recipe("tiny")
    without = type(without)(**{**without.__dict__, "model": replace_model(without.model, bigram=False)})
    assert folder_text(source_files, python_2k, without, tmp_path / "cache", progress=False).bigram_table is None


def test_python_text_is_split_by_whole_files_and_takes_the_tokenizers_own_table(monkeypatch, python_2k, tmp_path):
    from sparse_interp.corpus import Document

    name = "import os\nprint('hello from the file number {i}')\nvalue_{i} = compute_something_else({i})\n"
    files = [Document(f"{'stdlib' if i % 2 else 'site-packages'}/m{i}.py", name.format(i=i) * 30) for i in range(60)]
    monkeypatch.setattr(text, "python_sources", lambda: files)
    made = python_text("python_2k", recipe("tiny"), tmp_path / "cache", progress=False)
    table = load_bigram_table(text.bundled_tokenizer_folder("python_2k") / text.BIGRAM_TABLE)
    assert torch.equal(made.bigram_table, table)
    assert all(package.startswith("stdlib/") for package in made.source["validation"]["packages"])
    with pytest.raises(TokenizerError, match="the nearest are python_2k"):
        python_text("python_3k", recipe("tiny"), tmp_path / "other", progress=False)


def test_the_cache_is_read_again_whatever_became_of_the_files(source_files, python_2k, tmp_path):
    before = read(source_files, python_2k, tmp_path / "cache")
    for path in source_files.iterdir():
        path.unlink()
    again = read(source_files, python_2k, tmp_path / "cache")
    assert again.sha256() == before.sha256() and again.source == before.source
    assert source_of(tmp_path / "cache")["folder"] == str(source_files)
    assert source_of(tmp_path / "nowhere") == {}


def test_a_cache_that_was_interrupted_is_made_anew(source_files, python_2k, tmp_path):
    before = read(source_files, python_2k, tmp_path / "cache")
    manifest = tmp_path / "cache" / text.MANIFEST
    manifest.write_text(json.dumps({"source": json.loads(manifest.read_text())["source"]}))
    (tmp_path / "cache" / text.TRAIN).write_bytes(b"half")
    (tmp_path / "cache" / f".{text.TRAIN}.partial").write_bytes(b"half")
    assert read(source_files, python_2k, tmp_path / "cache").sha256() == before.sha256()


def test_a_cache_of_another_source_or_with_changed_files_is_refused(source_files, python_2k, tmp_path):
    read(source_files, python_2k, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="holds text of another source: .*'pattern': '\\*'.* there"):
        read(source_files, python_2k, tmp_path / "cache", pattern="*.py")
    path = tmp_path / "cache" / text.TRAIN
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    with pytest.raises(CheckpointError, match="train.npy is not what was encoded: its sha256 is"):
        read(source_files, python_2k, tmp_path / "cache")
    path.write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match="train.npy cannot be read"):
        read(source_files, python_2k, tmp_path / "cache")
    (tmp_path / "cache" / text.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="manifest.json is not JSON"):
        read(source_files, python_2k, tmp_path / "cache")


def test_held_out_blocks_are_taken_from_the_whole_of_the_held_out_text(source_files, python_2k, tmp_path, monkeypatch):
    every = read(source_files, python_2k, tmp_path / "cache").validation
    monkeypatch.setattr(text, "N_VALIDATION_BLOCKS", 3)
    n = len(every)
    chosen = read(source_files, python_2k, tmp_path / "cache").validation
    assert n > 3 and torch.equal(chosen, every[[0, n // 3, 2 * n // 3]])


def test_too_few_files_and_a_place_that_cannot_be_written_are_refused(source_files, python_2k, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.py").write_text("print('the only file that is here')\n")
    with pytest.raises(ConfigError, match="both need one or more"):
        read(tmp_path / "one", python_2k, tmp_path / "cache")
    with pytest.raises(SparseInterpError, match="cannot write .*manifest.json"):
        read(source_files, python_2k, source_files / "module_1.py" / "cache")
