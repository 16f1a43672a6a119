"""Names lead to models, bundled or published, paths to folders, and what leads nowhere names what is near."""

import json
from pathlib import Path

import pandas as pd
import platformdirs
import pytest
import torch
from faulty_server import BODY, SHORT, FaultyServer, archive, as_hub, honest, hub

from sparse_interp.errors import CheckpointError, ConfigError, DownloadError, NotPublishedError
from sparse_interp.model import download, zoo
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.releases import RELEASES, CircuitName
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
    with pytest.raises(ConfigError, match="the nearest are first-sparse, second, openai/circuit-sparsity"):
        load("@@@")


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "runs/mine/model", "/nowhere", Path("openai/csp_yolo2")])
def test_a_path_without_a_folder_is_refused(bundle, path):
    with pytest.raises(CheckpointError, match="is no folder; name a model, or a folder that holds one"):
        zoo.model_folder(path)


def test_a_folder_or_file_without_a_model_is_refused(bundle, tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="config.json is no folder"):
        load(str(tmp_path / "models" / "second" / "config.json"))


def test_the_table_of_models_says_what_their_cards_say(bundle):
    frame = zoo.models().frame.set_index("name")
    assert list(frame[frame.form == "sparse_interp"].index) == ["first-sparse", "second"] == list(frame.index[:2])
    assert (frame.loc["second", ["where", "cached"]] == ["bundled", True]).all() and frame.loc["second", "n_bytes"] > 0
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


def test_without_bundled_models_the_published_ones_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "data_folder", lambda: tmp_path)
    assert "bundled" not in set(zoo.models().frame["where"])
    with pytest.raises(ConfigError, match="the nearest are openai/circuit-sparsity"):
        zoo.model_folder("anything")


def bundled_models():
    frame = zoo.models().frame
    return frame[frame["where"] == "bundled"]


def test_every_bundled_model_has_its_card():
    for row in json.loads(bundled_models().to_json(orient="records")):
        assert row["validation_loss_nats"] is not None and row["n_nonzero"] is not None, row["name"]


@pytest.mark.parametrize("name", bundled_models().name)
def test_a_bundled_model_loads_and_has_the_loss_that_its_card_states(name):
    model, card = load(name), json.loads((zoo.model_folder(name) / "card.json").read_text())
    assert validation_loss(model, zoo.validation_blocks(name)) == pytest.approx(
        card["validation"]["loss_nats"], abs=1e-4
    )
    assert parameter_counts(model)["n_nonzero"] == card["parameters"]["n_nonzero"]
    zoo.baseline_means(name).check(model.cfg)


# -- published models --------------------------------------------------------------------------------------------------

SWEPT = "openai/csp_sweep1_1x_0.9Mnonzero_afrac0.125"
MIRROR = {
    "/s/tinypython/vocab.bpe": b"# BPE",
    "/s/tinypython/encoder.json": b"{}",
    "/s/models/dense1_1x/beeg_config.json": b"{}",
    "/s/models/dense1_1x/final_model.pt": archive(a=torch.ones(3)),
    "/s/viz/csp_yolo1/single_double_quote/prune_v2/34/viz_data.pt": archive(a=torch.ones(1)),
    "/s/viz/csp_yolo1/single_double_quote/prune_v2/8/viz_data.pt": archive(a=torch.ones(2)),
    "/s/viz/csp_yolo1/single_double_quote/prune_v2/k_optim/viz_data.pt": archive(a=torch.ones(4)),
}
SYNTHETIC = Path(__file__).parents[3] / "shared" / "fixtures" / "openai" / "viz_mirror_synthetic"
needs_synthetic = pytest.mark.skipif(not SYNTHETIC.is_dir(), reason=f"no {SYNTHETIC}: this clone stands alone")


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A mirror of OpenAI's store that is at the same time a hub; its files may be changed. The cache is empty."""
    for name, value in SHORT.items():
        monkeypatch.setattr(download, name, value)
    monkeypatch.setenv("SPARSE_INTERP_CACHE", str(tmp_path / "cache"))
    with FaultyServer(dict(MIRROR), [store_or_hub]) as server:
        server.files["/s"] = lambda request: listed(server, request)
        monkeypatch.setenv("SPARSE_INTERP_MIRROR", f"{server.url}/s/")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def store_or_hub(request, body):
    (honest if request.path.startswith(("/s/", "/s?")) else as_hub)(request, body)


def listed(server, request) -> bytes:
    """As the store lists its files."""
    prefix = request.path.partition("prefix=")[2].partition("&")[0].replace("%2F", "/")
    names = [path.removeprefix("/s/") for path in server.files if path.startswith(f"/s/{prefix}")]
    blobs = "".join(f"<Blob><Name>{name}</Name></Blob>" for name in names)
    return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>".encode()


def release(server, name: str, config: bytes = b"{}", weights: bytes = MIRROR["/s/models/dense1_1x/final_model.pt"]):
    folder = f"/s/models/{name.removeprefix('openai/')}"
    server.files |= {f"{folder}/beeg_config.json": config, f"{folder}/final_model.pt": weights}


def test_a_published_model_is_fetched_once_and_so_is_the_tokenizer(mirror, tmp_path, monkeypatch):
    kept = tmp_path / "cache" / "openai"
    for fetched, folder, n_requests in (
        (lambda: zoo.model_folder("openai/dense1_1x", progress=False), "models/dense1_1x", 2),
        (lambda: zoo.tokenizer_folder(progress=False), "tinypython", 4),
    ):
        assert fetched() == kept / folder == fetched()
        for path, body in MIRROR.items():
            if path.startswith(f"/s/{folder}"):
                assert (kept / path.removeprefix("/s/")).read_bytes() == body
        assert len(mirror.requests) == n_requests
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    assert zoo.model_folder("openai/dense1_1x").is_dir() and zoo.tokenizer_folder().is_dir()


def test_offline_a_published_model_is_refused_with_the_files_to_copy(mirror, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    with pytest.raises(DownloadError) as refused:
        zoo.model_folder("openai/csp_yolo2")
    place = tmp_path / "cache" / "openai" / "models" / "csp_yolo2" / "final_model.pt"
    said = f"  {mirror.url}/s/models/csp_yolo2/final_model.pt\n    -> {place} (1,676,532,054 bytes)"
    assert said in str(refused.value) and "/s/tinypython/vocab.bpe" in str(refused.value)
    assert "SPARSE_INTERP_OFFLINE forbids" in str(refused.value) and mirror.requests == []
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "0")
    assert zoo.model_folder("openai/dense1_1x", progress=False).is_dir()


@pytest.mark.parametrize(("asked", "got"), [("openai/csp_bridge2", "csp_bridges2"), (SWEPT, SWEPT[7:])])
def test_every_spelling_leads_to_the_published_folder(mirror, asked, got):
    release(mirror, got)
    assert zoo.model_folder(asked, progress=False).name == got


def test_what_a_mirror_holds_is_checked_like_the_store(mirror):
    release(mirror, "openai/csp_yolo2")
    with pytest.raises(DownloadError, match="openai/csp_yolo2: .*beeg_config.json has 2 bytes, .* should be has 823"):
        zoo.model_folder("openai/csp_yolo2", progress=False)
    release(mirror, "openai/csp_yolo2", config=b" " * 821 + b"{}")
    with pytest.raises(DownloadError, match="its sha256 is [0-9a-f]{64}, and that of the file .* is a80b49d2"):
        zoo.model_folder("openai/csp_yolo2", progress=False)


@pytest.mark.parametrize("weights", [b"", archive(a=torch.ones(9))[:-40]], ids=["empty", "corrupt"])
def test_models_that_were_served_broken_are_refused_with_that_word(mirror, weights):
    release(mirror, "openai/csp_bridges1", weights=weights)
    with pytest.raises(DownloadError, match="openai/csp_bridge1: .*known to have been served broken: in January 2026"):
        zoo.model_folder("openai/csp_bridge1", progress=False)


def test_a_combination_of_the_sweep_that_is_not_published_is_said_to_be_none(mirror):
    with pytest.raises(NotPublishedError, match="404.* Not every combination .* need have been published"):
        zoo.model_folder(SWEPT, progress=False)


@pytest.mark.parametrize("name", ["csp_yolo2", "openai/csp_yolo3", f"{SWEPT}x", "openai/dense1_8x"])
def test_an_unknown_name_of_the_store_is_refused_without_asking(mirror, name):
    with pytest.raises(ConfigError, match="no model is called .*; the nearest are .*openai/"):
        zoo.model_folder(name)
    assert mirror.requests == []


def test_any_other_owner_and_name_is_a_repository_of_the_hub(mirror, monkeypatch, tmp_path):
    mirror.files |= hub("openai/circuit-sparsity", {"config.json": b"{}", "model.safetensors": BODY, "gpt.py": b"1/0"})
    folder = zoo.model_folder("openai/circuit-sparsity", progress=False)
    assert folder == tmp_path / "cache" / "hub" / "openai" / "circuit-sparsity"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    assert zoo.model_folder("openai/circuit-sparsity") == folder
    with pytest.raises(DownloadError, match="is no folder here. Did you mean openai/circuit-sparsity\\? .*forbids"):
        zoo.model_folder("openai/circuit-sparsty")


def test_the_tokenizer_of_a_repository_comes_without_its_weights(mirror, tmp_path):
    mirror.files |= hub("someone/stories", {"tokenizer.json": b"{}", "model.safetensors": BODY})
    folder = zoo.tokenizer_folder("someone/stories", progress=False)
    assert folder == tmp_path / "cache" / "tokenizers" / "someone" / "stories"
    assert [file.name for file in folder.iterdir()] == ["tokenizer.json"]
    for name in ("../../someone", "a/b/c", "", "a b"):
        with pytest.raises(DownloadError, match="is no name of a tokenizer"):
            zoo.tokenizer_folder(name)


def test_a_name_that_is_neither_folder_nor_repository_is_said_to_be_neither(mirror):
    with pytest.raises(NotPublishedError, match="runs/nowhere is no folder here. As .* has no repository runs/nowhere"):
        zoo.model_folder("runs/nowhere", progress=False)


def test_the_table_lists_what_is_published_without_asking_for_it(mirror):
    frame = zoo.models().frame.set_index("name")
    assert set(RELEASES) - set(frame.index) == {name for name in RELEASES if "sweep" in name}
    assert frame.loc["openai/csp_yolo2", "n_bytes"] == 1_676_532_054 + 823
    yolo1 = frame.loc["openai/csp_yolo1", ["form", "kind", "n_layers", "cached"]].tolist()
    assert yolo1 == ["circuit_sparsity", "sparse", 12, False]
    assert frame.loc["openai/csp_yolo2", "where"] == mirror.url.removeprefix("http://")
    assert frame.loc["openai/circuit-sparsity", "form"] == "circuitgpt"
    assert pd.isna(frame.loc["openai/dense1_1x", "n_bytes"])
    assert list(frame.index).count("openai/csp_sweep1_<width>x_<n>Mnonzero_afrac<share>") == 1
    assert not frame[frame["where"] != "bundled"].cached.any() and mirror.requests == []


def test_the_table_says_what_is_cached(mirror):
    release(mirror, SWEPT)
    mirror.files |= hub("someone/model", {"config.json": b"{}", "model.safetensors": BODY})
    for name in ("openai/dense1_1x", SWEPT, "someone/model"):
        zoo.model_folder(name, progress=False)
    frame = zoo.models().frame
    assert set(frame[frame.cached & (frame["where"] != "bundled")].name) == {"openai/dense1_1x", SWEPT, "someone/model"}


def test_a_published_model_is_loaded_by_name_and_offline_once_more(mirror, make_model, tokens, tmp_path, monkeypatch):
    from sparse_interp.model.publishing import publish_model

    model = make_model(bigram_learnable=True, tokenizer_name="tinypython_2k")
    folder = publish_model(model, tmp_path / "published")
    release(mirror, SWEPT, *((folder / name).read_bytes() for name in ("beeg_config.json", "final_model.pt")))
    for path in ("/s/tinypython/vocab.bpe", "/s/tinypython/encoder.json"):
        del mirror.files[path]
    loaded = load(SWEPT, fold_ln_final=False, progress=False)
    assert loaded.cfg.model_name == SWEPT and torch.equal(loaded(tokens), model(tokens))
    assert "could not be fetched" in loaded.load_report.assumed["tokenizer"]
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    n_requests = len(mirror.requests)
    assert torch.equal(load(SWEPT, fold_ln_final=False)(tokens), model(tokens)) and len(mirror.requests) == n_requests


@needs_synthetic
def test_a_model_of_the_synthetic_store_is_loaded_by_name_with_its_tokenizer(mirror, monkeypatch):
    folder = SYNTHETIC / "models" / "csp_yolo2"
    release(mirror, SWEPT, *((folder / name).read_bytes() for name in ("beeg_config.json", "final_model.pt")))
    mirror.files |= {f"/s/tinypython/{file.name}": file.read_bytes() for file in (SYNTHETIC / "tinypython").iterdir()}
    loaded, local = load(SWEPT, progress=False), load(folder)
    assert len(loaded.tokenizer) == 2048 and loaded.tokenizer.get_vocab() == local.tokenizer.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    assert len(load(SWEPT).tokenizer) == 2048


# -- published circuits ------------------------------------------------------------------------------------------------

QUOTES = ("csp_yolo1", "single_double_quote", "prune_v2")


def test_the_circuits_of_a_model_are_listed_in_order(mirror, monkeypatch):
    expected = [CircuitName(*QUOTES, k) for k in ("8", "34", "k_optim")]
    assert zoo.released_circuits("openai/csp_yolo1", progress=False) == expected
    assert zoo.released_circuits("csp_yolo2", progress=False) == []
    zoo.released_circuit_files(*QUOTES, 8, progress=False)
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    assert zoo.released_circuits("csp_yolo1") == expected[:1]


def test_the_files_of_a_circuit_are_fetched_once_and_its_means_if_there_are_any(mirror, monkeypatch, tmp_path):
    files = zoo.released_circuit_files("openai/csp_yolo1", *QUOTES[1:], "k_optim", progress=False)
    assert files.payload == tmp_path / "cache" / "openai" / "viz" / Path(*QUOTES) / "k_optim" / "viz_data.pt"
    assert files.payload.read_bytes() == MIRROR[f"/s/viz/{'/'.join(QUOTES)}/k_optim/viz_data.pt"]
    assert files.means is None
    mirror.files["/s/viz/csp_yolo1/mean_baseline_pretrain.pt"] = archive(a=torch.zeros(2))
    n_requests = len(mirror.requests)
    files = zoo.released_circuit_files(*QUOTES, "k_optim", progress=False)
    assert files.means == tmp_path / "cache" / "openai" / "viz" / "csp_yolo1" / "mean_baseline_pretrain.pt"
    assert len(mirror.requests) == n_requests + 1
    monkeypatch.setenv("SPARSE_INTERP_OFFLINE", "1")
    assert zoo.released_circuit_files(*QUOTES, "k_optim") == files
    with pytest.raises(DownloadError, match="the circuit csp_yolo1/single_double_quote/prune_v2/34 is not whole"):
        zoo.released_circuit_files(*QUOTES, 34)
    files.means.unlink()
    assert zoo.released_circuit_files(*QUOTES, "k_optim").means is None


def test_a_circuit_that_is_not_published_or_no_name_is_refused(mirror):
    with pytest.raises(NotPublishedError, match="the circuit csp_yolo1/single_double_quote/prune_v2/9: .*404"):
        zoo.released_circuit_files(*QUOTES, 9, progress=False)
    with pytest.raises(ConfigError, match="task='..' is no name"):
        zoo.released_circuit_files("csp_yolo1", "..", "prune_v2", 9)
    with pytest.raises(ConfigError, match="model='../models' is no name"):
        zoo.released_circuits("../models")


@needs_synthetic
def test_the_synthetic_copy_of_the_store_is_read_whole(mirror, tmp_path):
    published = [path.relative_to(SYNTHETIC).as_posix() for path in SYNTHETIC.rglob("*") if path.is_file()]
    for path in MIRROR:
        del mirror.files[path]
    mirror.files |= {f"/s/{path}": (SYNTHETIC / path).read_bytes() for path in published}
    zoo.tokenizer_folder(progress=False)
    for model in ("csp_yolo1", "csp_yolo2"):
        for circuit in zoo.released_circuits(model, progress=False):
            zoo.released_circuit_files(*circuit, progress=False)
    kept = tmp_path / "cache" / "openai"
    fetched = {path.relative_to(kept).as_posix() for path in kept.rglob("[!.]*") if path.is_file()}
    assert fetched == {path for path in published if path.startswith(("viz", "tinypython"))} and len(fetched) == 8
    assert all((kept / path).read_bytes() == (SYNTHETIC / path).read_bytes() for path in fetched)


# -- the cache folder --------------------------------------------------------------------------------------------------


def test_the_cache_folder_is_the_users_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_INTERP_CACHE", "~/models")
    assert zoo.cache_folder() == Path.home() / "models"
    monkeypatch.setenv("SPARSE_INTERP_CACHE", "")
    assert zoo.cache_folder() == platformdirs.user_cache_path("sparse_interp", appauthor=False)
    monkeypatch.delenv("SPARSE_INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zoo.cache_folder() == platformdirs.user_cache_path("sparse_interp", appauthor=False)
