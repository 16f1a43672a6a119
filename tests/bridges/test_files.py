"""A saved bridge comes back as the same maps, of the same two models, or not at all."""

import json

import pytest
import torch

from sparse_interp.bridges.bridge import Bridge, nmse
from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.files import MAPS, RECORD, bridge_folder
from sparse_interp.bridges.hybrid import streams_and_logits, token_kl
from sparse_interp.errors import BridgeError
from sparse_interp.model.transformer import load
from sparse_interp.model.zoo import validation_blocks


@pytest.fixture
def bridge(sparse, dense, generator):
    """A bridge of two pairs, with thresholds, and no weight at its initial value."""
    config = BridgeConfig(sites=((0, 0), (3, 3)), encoder="threshold", lr=0.03)
    return Bridge.between(sparse, dense, config, generator=generator)


def test_a_bridge_comes_back_as_the_same_maps(bridge, sparse, dense, tmp_path):
    loaded = Bridge.load(bridge.save(tmp_path / "b", card={"name": "tied"}), sparse, dense)
    assert loaded.config == bridge.config
    assert (loaded.sparse, loaded.dense, loaded.pairs) == (bridge.sparse, bridge.dense, bridge.pairs)
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in bridge.state_dict().items())
    assert "# tied" in (tmp_path / "b" / "card.md").read_text()


def test_a_bridge_stored_in_fewer_bits_comes_back_in_float32(bridge, sparse, dense, tmp_path):
    loaded = Bridge.load(bridge.save(tmp_path / "b", stored_as=torch.float16), sparse, dense)
    pair, stream = SitePair(3, 3), torch.ones(1, 1, 12)
    assert loaded[pair].W_decode.dtype == torch.float32
    torch.testing.assert_close(loaded.decode(stream, pair), bridge.decode(stream, pair), atol=1e-2, rtol=1e-2)


def test_a_bridge_of_other_weights_is_refused_unless_told_otherwise(bridge, dense, make_model, tmp_path):
    folder, other = bridge.save(tmp_path / "b"), make_model(model_name="sparse", seed=9)
    with pytest.raises(BridgeError, match="allow_mismatch=True"):
        Bridge.load(folder, other, dense)
    Bridge.load(folder, other, dense, allow_mismatch=True)
    with pytest.raises(BridgeError, match="12 channels"):
        Bridge.load(folder, make_model(d_model=8, d_head=4), dense, allow_mismatch=True)
    with pytest.raises(BridgeError, match="both of its models or neither"):
        Bridge.load(folder, dense=dense)


def test_a_bridge_is_never_overwritten_and_no_half_of_one_is_left(bridge, tmp_path):
    bridge.save(tmp_path / "b")
    with pytest.raises(BridgeError, match="never overwritten"):
        bridge.save(tmp_path / "b")
    with torch.no_grad():
        bridge[SitePair(0, 0)].b_decode[0] = torch.nan
    with pytest.raises(BridgeError, match="b_decode of the bridge is not finite"):
        bridge.save(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("spoil", ["record", "version", "maps", "no maps", "no record"])
def test_a_folder_that_was_changed_is_refused(bridge, tmp_path, spoil):
    folder = bridge.save(tmp_path / "b")
    record, maps = folder / RECORD, folder / MAPS
    said = json.loads(record.read_text())
    if spoil == "record":
        said["config"]["afrac"] = 0.5
        record.write_text(json.dumps(said))
    elif spoil == "version":
        record.write_text(json.dumps(said | {"format_version": 2}))
    elif spoil == "maps":
        content = bytearray(maps.read_bytes())
        content[-3] ^= 1
        maps.write_bytes(content)
    else:
        (maps if spoil == "no maps" else record).unlink()
    expected = {
        "record": "not the one that was saved",
        "version": "format version 2",
        "maps": "damaged",
        "no maps": "bridge.safetensors",
        "no record": "holds no bridge",
    }
    with pytest.raises(BridgeError, match=expected[spoil]):
        Bridge.load(folder)


def test_the_bundled_bridge_fits_the_bundled_models_as_well_as_its_card_says():
    sparse, dense = load("stdlib-small"), load("stdlib-small-dense")
    bridge = Bridge.load("stdlib-small", sparse, dense)
    card = json.loads((bridge_folder("stdlib-small") / "card.json").read_text())
    text = validation_blocks("stdlib-small")[1::6][:48]
    found: dict[str, dict[str, float]] = {str(pair): {} for pair in bridge.pairs}
    with torch.no_grad():
        for part in text.split(16):
            (ours, _), (theirs, said) = (streams_and_logits(model, part, range(5)) for model in (sparse, dense))
            for pair in bridge.pairs:
                here, there = ours[pair.sparse], theirs[pair.dense]
                encoded, decoded = bridge.encode(there, pair), bridge.decode(here, pair)
                losses = {"encode": nmse(encoded, here), "decode": nmse(decoded, there)}
                if pair.sparse > 2:  # what is entered further back costs most, and is the same code
                    for kind, model, stream in (("sparse", sparse, encoded), ("dense", dense, decoded)):
                        entered = model.between(part, enter=(getattr(pair, kind), stream))
                        losses[f"enter_{kind}"] = token_kl(said, entered).mean()
                for name, loss in losses.items():
                    found[str(pair)][name] = found[str(pair)].get(name, 0.0) + float(loss) * len(part) / len(text)
    for pair, losses in found.items():
        on_card = card["as_stored"]["by_pair"][pair]
        assert losses == pytest.approx({name: on_card[name] for name in losses}, rel=2e-3)
    assert sum(path.stat().st_size for path in bridge_folder("stdlib-small").iterdir()) < 1_000_000


def test_a_name_that_no_bridge_has_is_refused_with_those_that_there_are():
    with pytest.raises(BridgeError, match="no bundled bridge is called so; there are stdlib-small"):
        Bridge.load("stdlib-smal")
