"""What is fetched lies where it was published; what is there already is taken; offline, the message says what to do."""

import io
import shutil
import zipfile

import pytest
import torch
from faulty_server import (
    BODY,
    COMMIT,
    SHORT,
    FaultyServer,
    archive,
    as_hub,
    honest,
    hub,
    status,
)

from sparse_interp.errors import DownloadError, NotPublishedError
from sparse_interp.model import download
from sparse_interp.model.releases import PublishedFile
from sparse_interp.model.store import Store, model_files, tokenizer_files

CONFIG = PublishedFile("models/m/beeg_config.json")
WEIGHTS = PublishedFile("models/m/final_model.pt")
FILES = {
    "/store/models/m/beeg_config.json": b'{"n_layer": 1}',
    "/store/models/m/final_model.pt": archive(a=torch.ones(9)),
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def serve(tmp_path):
    """`serve(files, *script)`: a server, and a store that keeps what comes from it."""
    servers = []

    def start(files, *script, **options):
        server = FaultyServer(files, list(script) or [honest]).__enter__()
        servers.append(server)
        return server, Store(tmp_path / "cache", f"{server.url}/store", server.url, **options)

    yield start
    for server in servers:
        server.__exit__()


def test_files_lie_as_they_were_published_and_are_fetched_once(serve, tmp_path):
    server, store = serve(FILES)
    assert store.lacking([CONFIG, WEIGHTS]) == [CONFIG, WEIGHTS]
    places = store.files("m", [CONFIG, WEIGHTS], progress=False)
    assert places == [tmp_path / "cache" / "openai" / file.path for file in (CONFIG, WEIGHTS)]
    assert [place.read_bytes() for place in places] == list(FILES.values())
    assert store.files("m", [CONFIG, WEIGHTS], progress=False) == places and len(server.requests) == 2
    assert store.lacking([CONFIG, WEIGHTS]) == []


def test_offline_what_was_fetched_is_there_and_for_the_rest_the_message_says_what_to_do(serve, tmp_path):
    _, store = serve(FILES)
    (config,) = store.files("m", [CONFIG], progress=False)
    server, offline = serve(FILES, offline=True)
    assert offline.files("m", [CONFIG], progress=False) == [config]
    with pytest.raises(DownloadError) as refused:
        offline.files("openai/m", [CONFIG, WEIGHTS._replace(size=5)], progress=False, note="It is heavy.")
    place = tmp_path / "cache" / "openai" / "models" / "m" / "final_model.pt"
    assert str(refused.value) == (
        f"openai/m is not whole in the cache folder {tmp_path / 'cache'}, and SPARSE_INTERP_OFFLINE forbids fetching "
        f"it. It is heavy. Unset that, or copy these files from a machine with a network:\n"
        f"  {server.url}/store/models/m/final_model.pt\n    -> {place} (5 bytes)"
    )
    place.write_bytes(b"1234")
    with pytest.raises(DownloadError, match="5 bytes; what is there has 4"):
        offline.files("openai/m", [WEIGHTS._replace(size=5)], progress=False)
    place.write_bytes(b"12345")  # as told
    assert offline.files("openai/m", [WEIGHTS._replace(size=5)], progress=False) == [place]
    assert server.requests == []


def damaged(weights: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(weights)) as file:
        at = next(entry.header_offset for entry in file.infolist() if "/data/" in entry.filename)
    flipped = bytearray(weights)
    flipped[weights.index(torch.ones(9).numpy().tobytes(), at)] ^= 1
    return bytes(flipped)


@pytest.mark.parametrize(
    ("file", "body", "words"),
    [
        (WEIGHTS, damaged(FILES["/store/models/m/final_model.pt"]), "its record archive/data/0 is damaged"),
        (WEIGHTS, b"Service restarted, please wait", "it is no archive of tensors"),
        (CONFIG, b"Service restarted, please wait", "it is not JSON"),
        (CONFIG, b"\xff\xfe", "it is not JSON"),
    ],
    ids=["a bit", "text for an archive", "text for JSON", "bytes for JSON"],
)
def test_a_file_that_is_damaged_where_it_is_served_is_refused_with_what_is_known_of_it(serve, file, body, words):
    _, store = serve({f"/store/{file.path}": body})
    with pytest.raises(DownloadError, match=f"openai/m: .*{words}.* deleted.* It was broken before."):
        store.files("openai/m", [file], progress=False, note="It was broken before.")
    assert store.lacking([file]) == [file]


def test_a_file_that_is_not_published_is_told_from_one_that_cannot_be_had(serve):
    _, store = serve({})
    with pytest.raises(NotPublishedError, match="openai/m: http.*/store/models/m/final_model.pt is not there"):
        store.files("openai/m", [WEIGHTS], progress=False)
    _, store = serve(FILES, status(403))
    with pytest.raises(DownloadError, match="HTTP 403") as refused:
        store.files("openai/m", [WEIGHTS], progress=False)
    assert not isinstance(refused.value, NotPublishedError)


# -- listings ----------------------------------------------------------------------------------------------------------


def page(names, marker=""):
    blobs = "".join(f"<Blob><Name>{name}</Name><Properties/></Blob>" for name in names)
    results = f"<Blobs>{blobs}</Blobs><NextMarker>{marker}</NextMarker>"
    return f'<?xml version="1.0"?><EnumerationResults>{results}</EnumerationResults>'.encode()


def test_a_listing_is_read_page_by_page(serve):
    def pages(request):
        return (
            page(["viz/m/d"]) if "marker=next+page" in request.path else page(["viz/m/a", "viz/m/b&amp;c"], "next page")
        )

    server, store = serve({"/store": pages})
    assert store.listing("viz/m/", progress=False) == ["viz/m/a", "viz/m/b&c", "viz/m/d"]
    assert server.requests[0][0] == "/store?restype=container&comp=list&prefix=viz%2Fm%2F"
    stuck, store = serve({"/store": page(["viz/m/a"], "again")})
    assert store.listing("viz/m/", progress=False) == ["viz/m/a", "viz/m/a"] and len(stuck.requests) == 2


@pytest.mark.parametrize(
    "text",
    [
        b"no XML",
        b"<EnumerationResults><Blobs>",
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>',
        b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><x>&a;</x>',
    ],
)
def test_a_listing_that_is_none_is_refused_and_its_entities_are_not_read(serve, text):
    _, store = serve({"/store": text})
    with pytest.raises(DownloadError, match="something else than a list of its files.*name the circuit"):
        store.listing("viz/m/", progress=False)


def test_offline_what_is_here_is_listed(serve):
    _, store = serve(FILES)
    store.files("m", [CONFIG, WEIGHTS], progress=False)
    _, offline = serve({}, offline=True)
    assert sorted(offline.listing("models/m/", progress=False)) == [CONFIG.path, WEIGHTS.path]
    assert offline.listing("viz/m/", progress=False) == []


# -- repositories ------------------------------------------------------------------------------------------------------

FORMS = {
    "released on the hub": ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
    "in parts": ["config.json", "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"],
    "the second dialect": ["config.json", "pytorch_model.bin", "training_config.yaml"],
    "as in the store": ["beeg_config.json", "vocab.bpe", "encoder.json", "final_model.pt"],
    "ours": ["config.json", "tokenizer/tokenizer.json", "weights.safetensors", "means.safetensors", "card.json"],
}


@pytest.mark.parametrize("form", FORMS)
def test_of_a_repository_the_data_are_wanted_and_never_code(form):
    others = [
        "modeling_circuitgpt.py",
        "gpt.py",
        "README.md",
        "logs/old.safetensors",
        "logs/old.json",
        "other.yaml",
        "run.sh",
        "x.pkl",
    ]
    assert sorted(model_files(sorted(FORMS[form] + others))) == sorted(FORMS[form])


def test_weights_are_fetched_in_one_form():
    weights = ["model.safetensors", "pytorch_model.bin", "final_model.pt"]
    assert model_files(weights) == ["model.safetensors"]
    assert model_files(weights[1:]) == ["final_model.pt"]
    assert tokenizer_files([*weights, "tokenizer.json", "vocab.json", "merges.txt"]) == [
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    ]
    with pytest.raises(DownloadError, match="holds no weights; its files are README.md"):
        model_files(["README.md"])


def test_a_repository_is_kept_by_its_name_and_offline_it_is_there(serve, tmp_path):
    contents = {"config.json": b"{}", "model.safetensors": BODY, "gpt.py": b"1/0"}
    _, store = serve(hub("someone/model", contents), as_hub)
    folder = store.repository("someone/model", "hub", model_files, progress=False)
    assert folder == tmp_path / "cache" / "hub" / "someone" / "model" and store.repositories() == ["someone/model"]
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    _, offline = serve({}, offline=True)
    assert offline.repository("someone/model", "hub", model_files, progress=False) == folder
    with pytest.raises(DownloadError) as refused:
        offline.repository("someone/other", "hub", model_files, progress=False)
    assert "  hf download someone/other --local-dir FOLDER\n    -> " in str(refused.value)
    shutil.copytree(folder, tmp_path / "cache" / "hub" / "someone" / "other")  # as told
    assert offline.repository("someone/other", "hub", model_files, progress=False).is_dir()


def test_an_interrupted_repository_is_not_taken_for_a_whole_one(serve, tmp_path):
    files = hub("someone/model", {"config.json": b"{}", "model.safetensors": BODY})
    weights = f"/someone/model/resolve/{COMMIT}/model.safetensors"

    def broken(request, body):
        if request.path == weights and request.command == "GET":
            request.answer(403)
        else:
            as_hub(request, body)

    _, store = serve(files, broken)
    with pytest.raises(DownloadError, match="someone/model could not be fetched"):
        store.repository("someone/model", "hub", model_files, progress=False)
    assert store.repositories() == []
    _, store = serve(files, as_hub)
    folder = store.repository("someone/model", "hub", model_files, progress=False)
    assert (folder / "model.safetensors").read_bytes() == BODY
