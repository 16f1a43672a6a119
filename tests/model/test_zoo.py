"""Names lead to bundled models, paths to folders, and what leads nowhere names what is near."""

import json

import pandas as pd
import pytest
import torch

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.transformer import load
from sparse_interp.training.card import parameter_counts
from sparse_interp.training.loop import validation_loss


@pytest.fixture
def bundle(make_model, tmp_path, monkeypatch):
    """Two bundled models: one with a card and validation text, one bare."""
    monkeypatch.setattr(zoo, "data_folder", lambda: tmp_path)
    carded = make_model(model_name="first-sparse", density=0.5)
    card = {
        "name": "first-sparse",
        "n_tokens": 99,
        "parameters": {"n_nonzero": 7},
        "validation": {"loss_nats": 3.2, "bigram_loss_nats": 4.4},
    }
    carded.save(tmp_path / "models" / "first-sparse", card=card, validation=torch.arange(12).view(3, 4))
    make_model(model_name="second").save(tmp_path / "models" / "second")
    return carded


def test_a_name_loads_the_bundled_model(bundle):
    assert weights_sha256(load("first-sparse")) == weights_sha256(bundle)


def test_a_path_loads_a_folder_that_save_wrote(make_model, tmp_path):
    folder = make_model(seed=4).save(tmp_path / "mine")
    assert weights_sha256(load(folder)) == weights_sha256(load(str(folder)))


def test_an_unknown_name_offers_the_nearest(bundle):
    with pytest.raises(ConfigError, match="no model is called 'first-spars'; the nearest are first-sparse"):
        load("first-spars")
    with pytest.raises(ConfigError, match="the nearest are first-sparse, second"):
        load("@@@")


def test_a_path_without_a_model_is_refused(bundle, tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no folder"):
        load("runs/nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)


def test_the_table_of_models_says_what_their_cards_say(bundle):
    frame = zoo.models().frame.set_index("name")
    assert list(frame.index) == ["first-sparse", "second"]
    assert frame.loc["first-sparse", ["kind", "density", "n_nonzero", "n_tokens"]].tolist() == ["sparse", 0.5, 7, 99]
    assert frame.loc["first-sparse", "validation_loss_nats"] == 3.2
    assert frame.loc["second", "kind"] == "dense" and pd.isna(frame.loc["second", "validation_loss_nats"])


def test_a_damaged_card_is_refused_by_name(bundle, tmp_path):
    (tmp_path / "models" / "first-sparse" / "card.json").write_text("{")
    with pytest.raises(CheckpointError, match="card.json is not JSON"):
        zoo.models()


def test_validation_blocks_are_those_kept_beside_the_model(bundle):
    assert torch.equal(zoo.validation_blocks("first-sparse"), torch.arange(12).view(3, 4))
    with pytest.raises(CheckpointError, match="validation.safetensors is missing"):
        zoo.validation_blocks("second")
    with pytest.raises(CheckpointError, match="means.safetensors is missing"):
        zoo.baseline_means("first-sparse")


def test_without_bundled_models_the_table_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "data_folder", lambda: tmp_path)
    assert len(zoo.models()) == 0
    with pytest.raises(ConfigError, match="none are bundled"):
        load("anything")


def test_every_bundled_model_has_its_card():
    for row in json.loads(zoo.models().frame.to_json(orient="records")):
        assert row["validation_loss_nats"] is not None and row["n_nonzero"] is not None, row["name"]


@pytest.mark.parametrize("name", zoo.models().frame.name)
def test_a_bundled_model_loads_and_has_the_loss_that_its_card_states(name):
    model, card = load(name), json.loads((zoo.model_folder(name) / "card.json").read_text())
    assert validation_loss(model, zoo.validation_blocks(name)) == pytest.approx(
        card["validation"]["loss_nats"], abs=1e-4
    )
    assert parameter_counts(model)["n_nonzero"] == card["parameters"]["n_nonzero"]
    zoo.baseline_means(name).check(model.cfg)
