"""Files give tensors or an error, whatever they were made to be; nothing that lies in them is run."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_interp.errors import CheckpointError
from sparse_interp.model.tensor_files import (
    archive_source,
    own_bytes,
    read_json,
    read_own,
    read_record,
    safetensors_source,
    sharded_source,
)

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([7], dtype=torch.uint16),
}


def archive(path, tensors=None):
    with path.open("wb") as file:
        torch.save(TENSORS if tensors is None else tensors, file)
    return path


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


def everything(source):
    return {name: source.take(name) for name in source.known}


def rezipped(path, change):
    """The records of an archive, as `change` leaves them, in an archive with right CRCs."""
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    records = change(records)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in records.items():
            new.writestr(name, content)
    return path


# -- ours -------------------------------------------------------------------------------------------------------------


def test_what_was_written_comes_back_with_its_header_entries(tmp_path):
    (tmp_path / "f").write_bytes(own_bytes(TENSORS, {"kind": "test"}))
    tensors, entries = read_own(tmp_path / "f")
    assert same(tensors, TENSORS) and entries == {"kind": "test"}


def test_the_same_contents_give_the_same_bytes():
    entries = {"kind": "test", "shapes": "{}", "config": "é"}
    assert len({own_bytes(TENSORS, entries) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, e: t.update(a=t["a"] + 1), "the sha256 of a is"),
        (lambda t, e: t.update(a=t["a"].view(3, 2)), "the sha256 of a is"),
        (lambda t, e: t.update(b=t["b"].view(torch.float16)), "the sha256 of b is"),
        (lambda t, e: t.pop("a"), "missing a"),
        (lambda t, e: t.update(d=t["a"]), "unexpected d"),
        (lambda t, e: t.update(a=t["b"], b=t["a"]), "the sha256 of a is"),
        (lambda t, e: e.update(kind="another"), "other header entries"),
        (lambda t, e: e.update(extra="entry"), "other header entries"),
        (lambda t, e: e.update(sha256="{"), "is not what was saved"),
        (lambda t, e: e.update(sha256="[]"), "is not what was saved"),
    ],
)
def test_a_change_of_a_tensor_or_of_the_header_is_named(tmp_path, change, words):
    path = tmp_path / "f"
    path.write_bytes(own_bytes(TENSORS, {"kind": "test"}))
    with safe_open(path, "pt") as file:
        entries = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, entries)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, entries)
    with pytest.raises(CheckpointError, match=words):
        read_own(path)


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_several_files_are_one_source_whose_names_may_be_others(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "1")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "2")
    source = safetensors_source([tmp_path / "1", tmp_path / "2"])
    assert source.known["a"] == ((2, 3), "float32") and source.known["c"].dtype == "U16"
    assert same(everything(source), TENSORS)
    upper = safetensors_source([tmp_path / "2"]).renamed(str.upper)
    assert same(everything(upper), {"B": TENSORS["b"], "C": TENSORS["c"]})


def test_what_was_read_of_a_file_of_ours_does_not_lie_in_it(tmp_path):
    (tmp_path / "f").write_bytes(own_bytes(TENSORS, {}))
    tensors, _ = read_own(tmp_path / "f")
    with (tmp_path / "f").open("r+b") as file:
        file.write(bytes((tmp_path / "f").stat().st_size))
    assert same(tensors, TENSORS)


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in "12":
        save_file({"a": TENSORS["a"]}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a is in 1 and in 2"):
        safetensors_source([tmp_path / "1", tmp_path / "2"])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "does not say which file holds which tensor"),
        ({"weight_map": {"a": 3}}, "does not say which file"),
        ({"weight_map": {"a": "../1"}}, "names '../1', which is not a file of its own folder"),
        ({"weight_map": {"a": "3"}}, "3 is missing"),
        ({"weight_map": {"a": "1", "b": "1"}}, "disagree about b"),
        ({"weight_map": {"b": "2"}}, "disagree about c"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, index, words):
    save_file({"a": TENSORS["a"]}, tmp_path / "1")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "2")
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        sharded_source(tmp_path / "index.json")


# -- archives ---------------------------------------------------------------------------------------------------------


def test_an_archive_gives_its_tensors_each_in_memory_of_its_own(tmp_path):
    shared = torch.arange(12.0)
    tensors = {
        "whole": shared,
        "part": shared[2:5],
        "turned": shared.view(3, 4).T,
        "parameter": torch.nn.Parameter(shared),
    }
    found = everything(archive_source(archive(tmp_path / "f.pt", tensors), None))
    assert same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    assert len({t.data_ptr() for t in found.values()}) == 4 and all(t.is_contiguous() for t in found.values())


def test_an_archive_is_converted_once_and_then_read_from_its_conversion(tmp_path, monkeypatch):
    path = archive(tmp_path / "f.pt")
    first = archive_source(path, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    assert same(everything(first), TENSORS) and first.converted == kept and first.files == (path,)
    monkeypatch.setattr(torch, "load", None)
    assert same(everything(archive_source(path, tmp_path / "kept")), TENSORS)


def test_a_conversion_is_found_by_contents_and_not_by_name(tmp_path):
    archive_source(archive(tmp_path / "f.pt"), tmp_path / "kept")
    other = archive(tmp_path / "f.pt", {"a": TENSORS["a"] + 1})
    assert same(everything(archive_source(other, tmp_path / "kept")), {"a": TENSORS["a"] + 1})
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_conversion_that_lost_its_header_is_made_again_and_one_with_a_changed_value_named(tmp_path):
    path = archive(tmp_path / "f.pt")
    archive_source(path, tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:50])
    assert same(everything(archive_source(path, tmp_path / "kept")), TENSORS) and kept.read_bytes() == whole
    kept.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"\.safetensors is damaged: the sha256 of . is"):
        everything(archive_source(path, tmp_path / "kept"))


def test_where_nothing_can_be_kept_the_archive_itself_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    source = archive_source(archive(tmp_path / "f.pt"), tmp_path / "file")
    assert same(everything(source), TENSORS) and source.converted is None


class Runs:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["beside tensors", "alone", "as a key's value", "in the first bytes", "rezipped"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, where):
    path, runs = tmp_path / "f.pt", Runs(tmp_path / "ran")
    if where == "in the first bytes":
        path.write_bytes(pickle.dumps(runs))
    elif where == "rezipped":
        rezipped(
            archive(path), lambda r: {n: pickle.dumps(runs, 2) if n.endswith("data.pkl") else c for n, c in r.items()}
        )
    else:
        archive(
            path,
            {"beside tensors": {**TENSORS, "x": runs}, "alone": runs, "as a key's value": {"x": {"y": runs}}}[where],
        )
    with pytest.raises(CheckpointError) as refused:
        archive_source(path, tmp_path / "kept")
    assert "system" in str(refused.value) or where == "in the first bytes"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([TENSORS["a"]], "holds a list, and not tensors by name"),
        ({}, "holds a dict, and not tensors by name"),
        ({"model": TENSORS}, "'model' is a dict and no ordinary tensor"),
        ({3: TENSORS["a"]}, "3 is a Tensor and no ordinary tensor"),
        ({"a": 1.5}, "'a' is a float and no ordinary tensor"),
        ({"a": TENSORS["a"].to_sparse()}, "'a' is a Tensor and no ordinary tensor"),
        ({"a": TENSORS["a"].to("meta")}, "'a' is a Tensor and no ordinary tensor"),
    ],
    ids=str,
)
def test_an_archive_of_anything_but_tensors_by_name_is_refused(tmp_path, content, words):
    with pytest.raises(CheckpointError, match=words):
        archive_source(archive(tmp_path / "f.pt", content), None)


def test_a_changed_byte_of_a_record_is_found_by_its_crc(tmp_path):
    path = archive(tmp_path / "f.pt")
    whole = path.read_bytes()
    place = whole.index(TENSORS["a"].numpy().tobytes())
    path.write_bytes(whole[:place] + b"\x55" + whole[place + 1 :])
    with pytest.raises(
        CheckpointError, match="the CRC of its record f/data/0 is wrong|the CRC of its record archive/data/0"
    ):
        archive_source(path, None)


def test_tensors_larger_than_their_records_are_refused_before_they_are_read(tmp_path):
    path = rezipped(
        archive(tmp_path / "f.pt"), lambda r: {n: c[:8] if n.endswith("data/0") else c for n, c in r.items()}
    )
    with pytest.raises(CheckpointError, match="is damaged"):
        archive_source(path, None)


def test_compressed_records_are_refused(tmp_path):
    path = archive(tmp_path / "f.pt", {"a": torch.zeros(1000)})
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)
    with pytest.raises(CheckpointError, match="is damaged"):
        archive_source(path, None)


def test_an_old_file_that_is_no_archive_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "f.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="no archive that torch.save wrote"):
        archive_source(tmp_path / "f.pt", None)


def test_a_file_of_many_megabytes_is_no_configuration(tmp_path):
    (tmp_path / "f.json").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(CheckpointError, match="16777217 bytes, which is no configuration"):
        read_json(tmp_path / "f.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is missing; restore it, or train it again"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "has format version None"),
        ("{}", "has format version None"),
        ('{"format_version": 2}', "has format version 2, and this library reads version 1; .* or train it again"),
    ],
)
def test_a_record_of_another_format_is_refused(tmp_path, text, words):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=f"record.json {words}"):
        read_record(path, 1, "train it again")


def test_a_record_of_the_right_format_is_read_whole(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"format_version": 3, "more": [1]}')
    assert read_record(path, 3, "train it again") == {"format_version": 3, "more": [1]}
