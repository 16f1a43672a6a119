"""Two hundred files that something happened to: each is refused with a message that names it, none is run, none hangs.

What cannot be found is a test too: in a safetensors file that others wrote nothing says what the values were, and the
bookkeeping of an archive (padding, times) has bits that carry nothing.
"""

import functools
import json
import pickle
import shutil
import signal
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_interp.errors import SparseInterpError
from sparse_interp.model.checkpoint import CONFIG, MEANS, WEIGHTS, load_node_values, weights_sha256
from sparse_interp.model.sites import NodeValues, places, width
from sparse_interp.model.transformer import load

SECONDS = 10
"""What reading a small file may take before it counts as hanging."""


class Runs:
    """Unpickled by Python, it makes a file."""

    def __init__(self, path, how):
        self.path, self.how = str(path), how

    def __reduce__(self):
        made = f"__import__('pathlib').Path({self.path!r}).touch()"
        return {
            "exec": (exec, (made,)),
            "eval": (eval, (made,)),
            "open": (open, (self.path, "w")),
            "partial": (functools.partial, (open, self.path, "w")),
        }[self.how]


@contextmanager
def promptly():
    def late(*_):
        raise TimeoutError(f"reading took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def ruined(released_numpy, make_model, tmp_path, monkeypatch):
    """Builds and judges damaged copies of three small models: an archive, a safetensors file of others, and ours."""
    return Ruin(released_numpy, make_model, tmp_path, monkeypatch)


class Ruin:
    def __init__(self, released_numpy, make_model, folder, monkeypatch):
        monkeypatch.setenv("SPARSE_INTERP_CACHE", str(folder / "cache"))
        self.folder, self.ran, self.rng = folder, folder / "ran", np.random.default_rng(0)
        self.refused: dict[str, int] = {}
        config = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "d_head": 3, "d_model": 6, "d_mlp": 9}
        config |= {"rms_norm": True, "tied_unembed": False, "sink": True, "enable_bigram_table": True, "d_pos_emb": 3}
        weights = released_numpy.random_weights(config, self.rng)
        self.tensors = {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}
        self.config = json.dumps(config).encode()
        for form, name in (("archive", "final_model.pt"), ("foreign", "model.safetensors")):
            (folder / form).mkdir()
            (folder / form / "beeg_config.json").write_bytes(self.config)
            self.write(folder / form / name, self.tensors)
        model = make_model()
        means = {p: torch.rand(width(model.cfg, p.site)) for p in places(model.cfg)}
        model.save(folder / "ours", means=NodeValues(means, "mean over a test"))
        self.whole = {form: weights_sha256(load(folder / form)) for form in ("archive", "foreign", "ours")}

    def write(self, path, tensors):
        if path.suffix == ".pt":
            with path.open("wb") as file:
                torch.save(tensors, file)
        else:
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)

    def copy(self, form):
        shutil.rmtree(self.folder / "copy", ignore_errors=True)
        return shutil.copytree(self.folder / form, self.folder / "copy")

    def judge(self, kind, form, harmless=False):
        """The damaged copy is refused by name and promptly, and runs nothing; `harmless` lets it be read unchanged."""
        folder = self.folder / "copy"
        try:
            with promptly():
                model = load(folder)
        except SparseInterpError as error:
            assert any(path.name in str(error) for path in folder.iterdir()) or str(folder) in str(error), str(error)
            assert len(str(error)) > 30 and not self.ran.exists(), (kind, str(error))
            self.refused[kind] = self.refused.get(kind, 0) + 1
        else:
            assert harmless and weights_sha256(model) == self.whole[form], f"{kind} of {form} was not noticed"

    def flip(self, path, place):
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << int(self.rng.integers(8))
        path.write_bytes(content)


def places_of_data(path):
    """Bytes of an archive that belong to records."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2")
            begin = info.header_offset + 30 + int(name) + int(extra)
            yield from range(begin, begin + info.file_size)


def with_one(tensors, name, tensor):
    return {**tensors, name: tensor}


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


CHANGES = {
    "renamed": lambda t, n: {**without(t, n), f"{n}s": t[n]},
    "missing": without,
    "surplus": lambda t, n: with_one(t, f"{n}.copy", t[n].clone()),
    "wrong shape": lambda t, n: with_one(t, n, t[n][..., :-1].contiguous()),
    "wrong precision": lambda t, n: with_one(t, n, t[n].half()),
    "whole numbers": lambda t, n: with_one(t, n, t[n].int()),
    "complex numbers": lambda t, n: with_one(t, n, t[n].to(torch.complex64)),
    "NaN": lambda t, n: with_one(t, n, torch.full_like(t[n], torch.nan)),
    "infinite": lambda t, n: with_one(
        t, n, torch.where(torch.arange(t[n].numel()).view(t[n].shape) == 0, torch.inf, t[n])
    ),
}


def test_two_hundred_damaged_files_are_refused(ruined):
    names = [name for name in ruined.tensors if name != "final_logits_bias"]  # which old files lack

    for form, file in (("archive", "final_model.pt"), ("foreign", "model.safetensors")):
        for kind, change in CHANGES.items():
            for name in ruined.rng.choice(names, 4, replace=False):
                ruined.write(ruined.copy(form) / file, change(ruined.tensors, name))
                ruined.judge(kind, form)

    for form, file in (("archive", "final_model.pt"), ("foreign", "model.safetensors"), ("ours", WEIGHTS)):
        for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
            whole = (ruined.folder / form / file).read_bytes()
            (ruined.copy(form) / file).write_bytes(whole[: int(share * len(whole))])
            ruined.judge("truncated", form)
            if form != "foreign":
                zeros = bytes(len(whole) - int(share * len(whole)))
                (ruined.copy(form) / file).write_bytes(whole[: int(share * len(whole))] + zeros)
                ruined.judge("ends in zeros", form, harmless=form == "archive")  # its directory's end is there twice

    records = list(places_of_data(ruined.folder / "archive" / "final_model.pt"))
    for place in ruined.rng.choice(records, 40, replace=False):
        ruined.flip(ruined.copy("archive") / "final_model.pt", place)
        ruined.judge("flipped bit", "archive")
    ours = (ruined.folder / "ours" / WEIGHTS).stat().st_size
    for place in ruined.rng.integers(ours, size=60):
        ruined.flip(ruined.copy("ours") / WEIGHTS, place)
        ruined.judge("flipped bit", "ours")
    header = int.from_bytes((ruined.folder / "foreign" / "model.safetensors").read_bytes()[:8], "little")
    for place in ruined.rng.integers(8 + header, size=20):
        ruined.flip(ruined.copy("foreign") / "model.safetensors", place)
        ruined.judge("flipped bit", "foreign", harmless=True)
    for place in ruined.rng.integers((ruined.folder / "ours" / CONFIG).stat().st_size, size=20):
        ruined.flip(ruined.copy("ours") / CONFIG, place)
        ruined.judge("flipped bit of the configuration", "ours", harmless=True)

    for how in ("exec", "eval", "open", "partial"):
        runs = Runs(ruined.ran, how)
        for content in ({**ruined.tensors, names[0]: runs}, {**ruined.tensors, "extra": runs}, runs, [runs]):
            ruined.write(ruined.copy("archive") / "final_model.pt", content)
            ruined.judge("code", "archive")
        (ruined.copy("archive") / "final_model.pt").write_bytes(pickle.dumps(runs))
        ruined.judge("code", "archive")

    assert sum(ruined.refused.values()) >= 200, ruined.refused
    assert set(ruined.refused) == {
        *CHANGES, "truncated", "ends in zeros", "flipped bit", "flipped bit of the configuration", "code"
    }  # fmt: skip


def test_of_the_bits_around_the_records_of_an_archive_none_changes_a_weight(ruined):
    path = ruined.folder / "archive" / "final_model.pt"
    inside = set(places_of_data(path))
    outside = [place for place in range(path.stat().st_size) if place not in inside]
    for place in ruined.rng.choice(outside, 40, replace=False):
        ruined.flip(ruined.copy("archive") / "final_model.pt", place)
        ruined.judge("flipped bit", "archive", harmless=True)


def test_damaged_means_are_refused(ruined):
    size = (ruined.folder / "ours" / MEANS).stat().st_size
    for place in ruined.rng.integers(size, size=20):
        ruined.flip(ruined.copy("ours") / MEANS, place)
        with pytest.raises(SparseInterpError, match=r"means\.safetensors"):
            load_node_values(ruined.folder / "copy" / MEANS)


def test_values_that_others_stored_may_change_unnoticed_but_not_ours(ruined):
    """The hole that is known: a safetensors file of others says nowhere what its values were."""
    a, b = "transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.weight"
    path = ruined.copy("foreign") / "model.safetensors"
    ruined.write(path, {**ruined.tensors, a: ruined.tensors[b], b: ruined.tensors[a]})
    assert weights_sha256(load(ruined.folder / "copy")) != ruined.whole["foreign"]

    path = ruined.copy("ours") / WEIGHTS
    with safe_open(path, "pt") as file:
        entries = file.metadata()
    tensors = load_file(path)
    a, b = "blocks.0.ln1.w", "blocks.0.ln2.w"
    save_file({**tensors, a: tensors[b].clone(), b: tensors[a].clone()}, path, entries)
    ruined.judge("swapped", "ours")
    assert ruined.refused == {"swapped": 1}
