"""Models of ours in the released form: the same function, for our reader and for the reference."""

import json

import pytest
import torch
from released_numpy import Run

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.publishing import publish_model, published_config
from sparse_interp.model.transformer import load


@pytest.fixture
def publishable(request, any_model):
    """Every kind of model that the released form has words for."""
    if any_model.cfg.norm == "none" or any_model.cfg.attention_dir == "bidirectional" or any_model.cfg.afrac_min:
        pytest.skip("the released form has no word for it, which another test holds")
    if any_model.cfg.afrac is not None and "resid_pre" in any_model.cfg.afrac_sites:
        pytest.skip("the released form has no word for it, which another test holds")
    return any_model


def test_a_published_model_is_read_as_the_same_function(publishable, tokens, tmp_path):
    folder = publish_model(publishable, tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["beeg_config.json", "final_model.pt"]
    back = load(folder, fold_ln_final=False)
    with torch.no_grad():
        assert torch.equal(back(tokens), publishable(tokens))
        folded = load(folder)
        assert torch.allclose(folded(tokens), publishable(tokens), atol=1e-5)


def test_a_model_without_biases_is_published_without(make_model, tokens, tmp_path):
    """What the config says trains no bias; what counts is whether there are any."""
    model = make_model(bias=False)
    said = [published_config(model)["bias"]]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".b_" in name:
                p.zero_()
        said.append(published_config(model)["bias"])
        assert said == [True, False]
        assert torch.equal(load(publish_model(model, tmp_path), fold_ln_final=False)(tokens), model(tokens))


def test_the_reference_reads_a_published_model_as_the_same_function(publishable, tokens, tmp_path):
    folder = publish_model(publishable, tmp_path / "model")
    config = json.loads((folder / "beeg_config.json").read_text())
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    run = Run(config, weights, tokens.numpy())
    with torch.no_grad():
        assert torch.allclose(publishable(tokens).double(), torch.from_numpy(run.logits), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "none"}, "norm='none' has no word in the released form"),
        ({"attention_dir": "bidirectional"}, "attention_dir='bidirectional' has no word .* which has 'causal'"),
        ({"eps": 1e-3}, "eps=0.001 has no word"),
        ({"afrac_min": 1}, "afrac_min=1 has no word .* which has 0"),
        ({"afrac_sites": ("q", "resid_pre")}, "AbsTopK at resid_pre has no word"),
    ],
)
def test_what_the_released_form_cannot_say_is_refused(make_model, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        publish_model(make_model(**changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_is_never_overwritten(plain_model, tmp_path):
    publish_model(plain_model, tmp_path)
    before = (tmp_path / "final_model.pt").read_bytes()
    with pytest.raises(CheckpointError, match="is there already; name another folder"):
        publish_model(plain_model, tmp_path)
    assert (tmp_path / "final_model.pt").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(plain_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        publish_model(plain_model, tmp_path / "file" / "model")
