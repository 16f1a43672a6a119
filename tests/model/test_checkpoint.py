"""A model's folder comes back bit for bit, appears whole or not at all, and nothing damaged is ever loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_interp.errors import CheckpointError, ConfigError, TokenizerError
from sparse_interp.model import checkpoint
from sparse_interp.model.checkpoint import (
    BIGRAM_TABLE,
    CONFIG,
    MEANS,
    TOKENIZER,
    VALIDATION,
    WEIGHTS,
    bundled_tokenizer,
    card_text,
    load_node_values,
    load_validation,
    weights_sha256,
)
from sparse_interp.model.sites import NodeValues, places, width
from sparse_interp.model.tensor_files import SUMS
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tokenizer import load_bigram_table

TOKENS = torch.arange(12)[None]


@pytest.fixture
def sparse(make_model):
    """A model nine tenths of whose matrices are zeros, some of them negative ones."""
    model = make_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.split(".")[-1].startswith("W_"):
                p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.1)
    return model


@pytest.fixture
def folder(sparse, tmp_path) -> Path:
    return sparse.save(tmp_path / "model")


def rewrite(folder: Path, **changes) -> None:
    """Replace stored tensors (None deletes one) in a file as it was before files carried sums, and leave the rest."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = {key: entry for key, entry in file.metadata().items() if key != SUMS}
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata)


def reconfigure(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "concat", "d_pos_emb": 3},
        {"positions": "none", "norm": "layer", "tie_unembed": True, "sink": False},
        {"bigram": False},
        {"bigram_learnable": True},
        {"dtype": torch.float64},
    ],
)
def test_a_model_comes_back_bit_for_bit_and_in_eval_mode(make_model, tmp_path, changes):
    model = make_model(**changes)
    back = HookedSparseTransformer.load(model.train().save(tmp_path / "model"))
    assert not back.training
    assert back.cfg == model.cfg
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(back(TOKENS), model.eval()(TOKENS))


def test_sparse_weights_are_stored_sparsely_and_come_back_bit_for_bit(sparse, folder):
    stored = load_file(folder / WEIGHTS)
    assert stored["blocks.0.mlp.W_in:gap"].dtype == torch.uint16 and "blocks.0.mlp.W_in" not in stored
    assert len(stored["blocks.0.mlp.W_in:value"]) == int(sparse.blocks[0].mlp.W_in.count_nonzero())
    back = HookedSparseTransformer.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), sparse.state_dict().values(), strict=True))
    assert torch.equal(back(TOKENS), sparse(TOKENS))


def test_a_gap_of_more_than_16_bits_and_a_tensor_of_zeros_come_back(make_model, tmp_path):
    model = make_model(d_vocab=300)
    with torch.no_grad():
        model.bigram_table.zero_()[299, 299] = 2.0
        model.embed.W_E.zero_()
    stored = load_file(model.save(tmp_path / "model") / WEIGHTS)
    assert stored["bigram_table:gap"].dtype == torch.int32 and len(stored["embed.W_E:gap"]) == 0
    back = HookedSparseTransformer.load(tmp_path / "model")
    assert torch.equal(back.bigram_table, model.bigram_table) and not back.embed.W_E.any()


def test_rounding_to_bf16_is_asked_for_and_the_hash_is_that_of_the_rounded_weights(make_model, tmp_path):
    model = make_model()
    back = HookedSparseTransformer.load(model.save(tmp_path / "model", stored_as=torch.bfloat16))
    assert back.cfg.dtype == torch.float32
    assert torch.equal(back.W_in, model.W_in.bfloat16().float())
    assert weights_sha256(back) == json.loads((tmp_path / "model" / CONFIG).read_text())["weights_sha256"]
    assert weights_sha256(back) != weights_sha256(model)


def test_the_hash_knows_weights_and_not_how_they_are_stored(sparse, folder, tmp_path):
    back = HookedSparseTransformer.load(folder)
    assert weights_sha256(back) == weights_sha256(sparse)
    with torch.no_grad():
        back.blocks[1].mlp.b_in[0] += 1e-6
    assert weights_sha256(back) != weights_sha256(sparse)


def test_loading_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    HookedSparseTransformer.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_holds_something_is_never_written_to(sparse, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="is there already, and a model is never overwritten"):
        sparse.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert sparse.save(tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_nothing_behind(sparse, tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (checkpoint.os, "fsync"), "replace": (Path, "replace")}[failing], fail)
    with pytest.raises(CheckpointError, match="cannot write a model to .*: No space left on device"):
        sparse.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(sparse, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write a model"):
        sparse.save(tmp_path / "file" / "model")


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(sparse, folder, tmp_path):
    rewrite(folder, **{"blocks.0.mlp.b_in": torch.full((20,), torch.inf)})
    with pytest.raises(CheckpointError, match="20 of the 20 entries of blocks.0.mlp.b_in are NaN or infinite"):
        HookedSparseTransformer.load(folder)
    with torch.no_grad():
        sparse.unembed.b_U[3] = torch.nan
    with pytest.raises(CheckpointError, match="the model: 1 of the 50 entries of unembed.b_U are NaN or infinite"):
        sparse.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_damaged(folder, share):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="is damaged"):
        HookedSparseTransformer.load(folder)


def test_one_flipped_bit_anywhere_among_the_values_is_found(folder):
    whole = (folder / WEIGHTS).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in range(begin, len(whole), (len(whole) - begin) // 23):
        (folder / WEIGHTS).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            HookedSparseTransformer.load(folder)
    (folder / WEIGHTS).write_bytes(whole)
    HookedSparseTransformer.load(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    rewrite(folder, **{"blocks.0.mlp.b_in": None, "surplus": torch.ones(2)})
    with pytest.raises(CheckpointError) as refused:
        HookedSparseTransformer.load(folder)
    assert "missing blocks.0.mlp.b_in; unexpected surplus" in str(refused.value)


def test_a_shape_that_does_not_fit_the_config_is_named(folder):
    reconfigure(folder, lambda config: config["model"].update(d_mlp=24))
    with pytest.raises(CheckpointError) as refused:
        HookedSparseTransformer.load(folder)
    assert "blocks.0.mlp.W_in has shape [12, 20] and not [12, 24]" in str(refused.value)


def test_gaps_that_lead_outside_the_tensor_are_damage(folder):
    gap = load_file(folder / WEIGHTS)["blocks.0.mlp.W_in:gap"].clone()
    rewrite(folder, **{"blocks.0.mlp.W_in:gap": torch.full_like(gap.int(), 60000).to(torch.uint16)})
    with pytest.raises(CheckpointError, match="blocks.0.mlp.W_in is damaged"):
        HookedSparseTransformer.load(folder)


def test_other_weights_of_the_right_shapes_are_not_those_that_were_saved(folder):
    rewrite(folder, **{"blocks.0.mlp.b_in": torch.zeros(20)})
    with pytest.raises(CheckpointError, match="are not those that were saved: their sha256 is"):
        HookedSparseTransformer.load(folder)


def test_a_file_from_before_sums_is_read(sparse, folder):
    rewrite(folder)
    assert weights_sha256(HookedSparseTransformer.load(folder)) == weights_sha256(sparse)


def test_a_config_that_was_changed_after_saving_is_refused(folder):
    reconfigure(folder, lambda config: config["model"].update(afrac=0.5))
    with pytest.raises(CheckpointError, match="config.json is not the one that was saved with weights.safetensors"):
        HookedSparseTransformer.load(folder)


def test_a_tensor_that_is_not_the_one_that_was_saved_is_named(folder):
    whole = (folder / WEIGHTS).read_bytes()
    values = load_file(folder / WEIGHTS)["blocks.0.mlp.W_in:value"].numpy().tobytes()
    place = whole.index(values) + 9
    (folder / WEIGHTS).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="the sha256 of blocks.0.mlp.W_in:value is"):
        HookedSparseTransformer.load(folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda c: c["model"].update(d_modell=3),
            ConfigError,
            "unknown field 'd_modell' in a model config. Did you mean 'd_model'?",
        ),
        (lambda c: c.update(tokeniser=None), ConfigError, "unknown field 'tokeniser'"),
        (
            lambda c: c.update(format_version=2),
            CheckpointError,
            "has format version 2, and this library reads version 1",
        ),
        (lambda c: c.pop("weights_sha256"), CheckpointError, "lacks weights_sha256"),
        (lambda c: c["model"].update(density=0.0), ConfigError, "density=0.0"),
        (lambda c: c["model"].update(n_layers=10**12), CheckpointError, "too few for the 1000000000000 layers"),
    ],
)
def test_a_config_that_says_something_else_is_refused(folder, change, error, words):
    reconfigure(folder, change)
    with pytest.raises(error) as refused:
        HookedSparseTransformer.load(folder)
    assert words in str(refused.value) and str(folder / CONFIG) in str(refused.value)


def test_a_folder_without_a_model_and_a_config_that_is_no_json_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model: config.json is missing"):
        HookedSparseTransformer.load(tmp_path / "empty")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="weights.safetensors is missing"):
        HookedSparseTransformer.load(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        HookedSparseTransformer.load(folder)


# -- tokenizer, bigram table, and what lies beside the weights ---------------------------------------------------------


@pytest.fixture(scope="module")
def python_2k():
    return bundled_tokenizer("python_2k")


@pytest.fixture
def reader(make_model, python_2k):
    """A model with the bundled tokenizer and the bigram table that ships with it."""
    model = make_model(python_2k, d_vocab=2048, tokenizer_name="python_2k")
    with torch.no_grad():
        model.bigram_table.copy_(load_bigram_table(checkpoint.bundled_tokenizer_folder("python_2k") / BIGRAM_TABLE))
    return model


def test_a_saved_model_stands_alone(reader, tmp_path, monkeypatch):
    reader.save(tmp_path / "model")
    monkeypatch.setattr(checkpoint, "data_folder", lambda: tmp_path)  # where nothing is bundled
    back = HookedSparseTransformer.load(tmp_path / "model")
    assert back.tokenizer.encode("def f(x):\n") == reader.tokenizer.encode("def f(x):\n")
    assert torch.equal(back.bigram_table, reader.bigram_table)


def test_a_bundled_model_refers_to_its_tokenizer_and_bigram_table(reader, tmp_path):
    folder = reader.save(tmp_path / "model", bundled=True)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert not [name for name in load_file(folder / WEIGHTS) if name.startswith("bigram_table")]
    back = HookedSparseTransformer.load(folder)
    assert weights_sha256(back) == weights_sha256(reader)
    assert back.tokenizer is not None


def test_what_is_not_bundled_cannot_be_referred_to(reader, make_model, tmp_path):
    with torch.no_grad():
        reader.bigram_table[0, 0] += 1
    with pytest.raises(CheckpointError, match="bigram table is not the one that ships with 'python_2k'"):
        reader.save(tmp_path / "model", bundled=True)
    with pytest.raises(TokenizerError, match="cfg.tokenizer_name is None"):
        make_model().save(tmp_path / "model", bundled=True)
    with pytest.raises(TokenizerError, match="no tokenizer is bundled as 'python2k'; the nearest are python_2k"):
        bundled_tokenizer("python2k")


def test_a_tokenizer_that_does_not_match_the_model_is_refused(reader, tmp_path):
    folder = reader.save(tmp_path / "model")
    path = folder / TOKENIZER / "tokenizer.json"
    whole = path.read_text()
    spec = json.loads(whole)
    vocab = spec["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    path.write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="is not the one that the model was saved with"):
        HookedSparseTransformer.load(folder)
    path.write_text(whole)
    reconfigure(folder, lambda config: config["model"].update(d_vocab=2000))
    with pytest.raises(TokenizerError, match="2048 ids and the model a vocabulary of 2000"):
        HookedSparseTransformer.load(folder)


def test_card_validation_text_and_means_lie_beside_the_weights(sparse, tmp_path):
    means = NodeValues({p: torch.rand(width(sparse.cfg, p.site)) for p in places(sparse.cfg)}, "mean over 5 tokens")
    card = {"name": "a model", "n_tokens": 61_000_000, "validation": {"loss_nats": 3.21987}, "empty": {}}
    folder = sparse.save(tmp_path / "model", card=card, validation=TOKENS.repeat(3, 1), means=means)
    assert torch.equal(load_validation(folder / VALIDATION), TOKENS.repeat(3, 1))
    back = load_node_values(folder / MEANS)
    assert back.kind == "mean over 5 tokens" and all(torch.equal(back[p], means[p]) for p in places(sparse.cfg))
    assert json.loads((folder / "card.json").read_text()) == card
    assert (folder / "card.md").read_text() == card_text(card)
    with pytest.raises(CheckpointError, match="is missing"):
        load_validation(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no blocks of tokens"):
        load_validation(folder / MEANS)


def test_a_card_reads_as_lines_sections_and_tables():
    card = {
        "name": "m",
        "n_tokens": 1000,
        "by_matrix": {"W_E": 0.05},
        "packages": {"re": {"n_files": 2}, "os": {"bytes": 7}},
    }
    assert card_text(card).splitlines() == [
        *["# m", "", "- name: m", "- n tokens: 1,000", "", "## by matrix", "", "- W_E: 0.05", ""],
        *["## packages", "", "|  | n files | bytes |", "| --- | --- | --- |", "| re | 2 |  |", "| os |  | 7 |"],
    ]
