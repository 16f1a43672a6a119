"""A model's folder: what the model is, and its weights, as JSON and safetensors.

    config.json             format version, shape, tokenizer, hash of the weights
    weights.safetensors     every weight; a tensor that is mostly zeros as its non-zero values and the gaps between them
    tokenizer/              what `save_tokenizer` writes; absent where config.json refers to a bundled tokenizer
    card.json, card.md      where the model comes from; optional, like the two below
    validation.safetensors  held-out blocks of tokens, fixed
    means.safetensors       each node's mean over text

Gaps: with p_0 < p_1 < ... the places of the non-zero entries in the flattened tensor, gap_i = p_i - p_(i-1), where
p_(-1) = -1. A gap nearly always fits 16 bits, so a weight that is not zero costs six bytes in float32.

A folder appears whole or not at all, is never overwritten, and is read strictly: a tensor that is missing, surplus, of
another shape, not finite or not the one that was saved is an error, and no model comes out. The three safetensors files
carry the sha256 of each of their tensors (model/tensor_files.py), and the weights' header that of config.json. Files
from before they did are read too: there the one hash of all weights, in config.json, has to be right.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Integer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparse_interp.data_files import data_folder
from sparse_interp.errors import CheckpointError, ConfigError, TokenizerError
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.load_report import LoadReport, rows_of
from sparse_interp.model.sites import NodeValues, Place
from sparse_interp.model.tensor_files import own_bytes, read_own, read_record
from sparse_interp.tokenizer import load_bigram_table, load_tokenizer, save_tokenizer, tokenizer_hash

FORMAT_VERSION = 1
_CONFIG_SUM = "config_sha256"
"""Header entry of the weights: the sha256 of what config.json says."""

CONFIG, WEIGHTS, TOKENIZER = "config.json", "weights.safetensors", "tokenizer"
CARD, CARD_TEXT = "card.json", "card.md"
VALIDATION, MEANS = "validation.safetensors", "means.safetensors"
BIGRAM_TABLE = "bigram.safetensors"


class ModelFiles:
    """Saving, for a model with a `cfg` and a `tokenizer`. Loading is in model/loading.py."""

    cfg: ModelConfig
    tokenizer: Any

    def save(
        self,
        folder: Path | str,
        *,
        bundled: bool = False,
        stored_as: torch.dtype | None = None,
        card: Mapping[str, Any] | None = None,
        validation: Integer[Tensor, "block pos"] | None = None,
        means: NodeValues | None = None,
    ) -> Path:
        """Write the model to a new `folder`, from which `si.load` reads it.

        Args:
            bundled: refer to the tokenizer that ships under `cfg.tokenizer_name`, and to its bigram table, instead of
                writing them into the folder.
            stored_as: precision of the stored weights; None keeps the model's own, which is lossless.
            card: where the model comes from, for `si.models()` and readers.
            validation: held-out blocks to keep beside the model.
            means: a baseline for every node to keep beside the model.

        Raises:
            CheckpointError: if `folder` holds something, cannot be written, or a weight is not finite.
            TokenizerError: with `bundled`, if the tokenizer is not the bundled one.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise CheckpointError(f"{folder} is there already, and a model is never overwritten; name a new folder.")
        kept = {"bigram_table"} if _has_frozen_table(self.cfg) else set()  # shared, hence the same for every precision
        tensors = {
            name: tensor.detach().cpu().to(tensor.dtype if stored_as is None or name in kept else stored_as)
            for name, tensor in self.state_dict().items()
        }
        _refuse_non_finite(tensors, "the model")
        as_loaded = {name: tensor.to(self.cfg.dtype) for name, tensor in tensors.items()}
        config = {
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "model": json.loads(self.cfg.to_json()),
            "tokenizer": _tokenizer_entry(self.tokenizer, self.cfg, bundled),
            "bigram_table": _bundled_table_entry(tensors, self.cfg)
            if bundled and _has_frozen_table(self.cfg)
            else None,
            "weights_sha256": _sha256(as_loaded),
        }
        if config["bigram_table"] is not None:
            del tensors["bigram_table"]
        files = {
            CONFIG: json.dumps(config, indent=2).encode() + b"\n",
            WEIGHTS: _packed(tensors, {_CONFIG_SUM: _config_sum(config)}),
        }
        if card is not None:
            files[CARD] = json.dumps(card, indent=2).encode() + b"\n"
            files[CARD_TEXT] = card_text(card).encode()
        if validation is not None:
            files[VALIDATION] = own_bytes({"tokens": validation.to(torch.uint16)}, {})
        if means is not None:
            files[MEANS] = node_values_bytes(means)
        write_folder(folder, files, None if bundled else self.tokenizer)
        return folder


class StoredModel(NamedTuple):
    """What a folder holds, in the names and shapes that `HookedSparseTransformer` has."""

    cfg: ModelConfig
    """The model's shape."""

    tensors: dict[str, Tensor]
    """Its state dict, in `cfg.dtype`."""

    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer that it was trained with, where the folder says which."""

    report: LoadReport
    """What was read."""


def read_model(folder: Path) -> StoredModel:
    """What `save` wrote to `folder`.

    Raises:
        CheckpointError: if the folder holds no model, or one that is damaged or incomplete.
        ConfigError: for an unknown field, naming the nearest one, or a shape that describes no model.
        TokenizerError: if the tokenizer is not the one that the model was saved with.
    """
    config = read_config(folder)
    try:
        cfg = ModelConfig.from_dict(config["model"])
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    tokenizer = _stored_tokenizer(config["tokenizer"], folder, cfg)
    stored, entries = read_own(folder / WEIGHTS)
    if cfg.n_layers > len(stored):
        raise CheckpointError(
            f"{folder / WEIGHTS} holds {len(stored)} tensors, too few for the {cfg.n_layers} layers that "
            f"{folder / CONFIG} describes."
        )
    expected, table = cfg.weight_shapes(), config["bigram_table"]
    if table is not None:
        expected.pop("bigram_table", None)
    unpacked = _unpacked(stored, entries, expected, folder / WEIGHTS)
    tensors = {name: t.to(cfg.dtype) for name, t in unpacked.items()}
    if table is not None:
        tensors["bigram_table"] = _bundled_table(table).to(cfg.dtype)
    _refuse_non_finite(tensors, str(folder / WEIGHTS))
    if _sha256(tensors) != config["weights_sha256"]:
        raise CheckpointError(
            f"the weights in {folder} are not those that were saved: their sha256 is {_sha256(tensors)}, and "
            f"{CONFIG} says {config['weights_sha256']}. Fetch or save the model again."
        )
    if entries.get(_CONFIG_SUM, _config_sum(config)) != _config_sum(config):
        raise CheckpointError(
            f"{folder / CONFIG} is not the one that was saved with {WEIGHTS}. Restore it; to change what it says, load "
            "the model, change model.cfg, and save it under another name."
        )
    sizes = {name: f"{(folder / name).stat().st_size:,} bytes" for name in (CONFIG, WEIGHTS)}
    report = LoadReport(rows_of(tensors), cfg.model_name, "sparse_interp", sizes)
    return StoredModel(cfg, tensors, tokenizer, report)


def weights_sha256(model: Any) -> str:
    """sha256 over names, shapes and values of all weights, whatever form they are stored in; 0 and -0 are one value."""
    return _sha256(model.state_dict())


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in `folder` says.

    Raises:
        CheckpointError: if there is none, or it is not ours.
        ConfigError: for an unknown field, naming the nearest one.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no model: {CONFIG} is missing. Name a folder that `model.save` wrote.")
    config = read_record(path, FORMAT_VERSION, "save the model again")
    known = ("format_version", "library_version", "model", "tokenizer", "bigram_table", "weights_sha256")
    for key in config:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown field {key!r} in {path}.{hint} Known: {', '.join(known)}.")
    lacking = [key for key in known if key not in config]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}; fetch or save the model again.")
    return config


def bundled_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that ships as `name`.

    Raises:
        TokenizerError: for an unknown name, with the nearest ones.
    """
    return load_tokenizer(bundled_tokenizer_folder(name))


def bundled_tokenizer_folder(name: str) -> Path:
    """Where the tokenizer that ships as `name` is, and the bigram table of its models."""
    folder = data_folder() / "tokenizers"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise TokenizerError(f"no tokenizer is bundled as {name!r}; the nearest are {', '.join(near) or 'none'}.")
    return folder / name


def node_values_bytes(values: NodeValues) -> bytes:
    """One number for every node, as a safetensors file."""
    tensors = {f"{place.layer}.{place.site}": v.detach().cpu().contiguous() for place, v in values.values.items()}
    return own_bytes(tensors, {"kind": values.kind})


def load_node_values(path: Path) -> NodeValues:
    """What `node_values_bytes` made, read from `path`.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    tensors, metadata = read_own(path)
    places = {Place(int(layer), site): v for name, v in tensors.items() for layer, _, site in [name.partition(".")]}
    return NodeValues(places, metadata.get("kind", "unknown"))


def load_validation(path: Path) -> Int[Tensor, "block pos"]:
    """The held-out blocks in `path`.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    tensors, _ = read_own(path)
    if "tokens" not in tensors:
        raise CheckpointError(f"{path} holds no blocks of tokens; fetch or save the model again.")
    return tensors["tokens"].long()


def card_text(card: Mapping[str, Any]) -> str:
    """A model card as Markdown: mappings become sections, mappings of mappings tables, the rest lines."""
    return f"# {card.get('name', 'A model')}\n" + _section(card, 2)


def _section(card: Mapping[str, Any], depth: int) -> str:
    lines = [f"- {_words(key)}: {_shown(value)}" for key, value in card.items() if not isinstance(value, Mapping)]
    text = "\n" + "\n".join(lines) + "\n" if lines else ""
    for key, value in card.items():
        if isinstance(value, Mapping) and value:
            body = _rows(value) if all(isinstance(v, Mapping) for v in value.values()) else _section(value, depth + 1)
            text += f"\n{'#' * min(depth, 6)} {_words(key)}\n{body}"
    return text


def _rows(card: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in card.values() for column in row))
    lines = [["", *map(_words, columns)], ["---"] * (1 + len(columns))]
    lines += [[key, *(_shown(row.get(column, "")) for column in columns)] for key, row in card.items()]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _words(key: str) -> str:
    return key.replace("_", " ") if key.islower() else key


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)


# -- tensors as they lie in a file ------------------------------------------------------------------------------------


def _packed(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> bytes:
    """A safetensors file with these header entries, in which each tensor takes the smaller of its two forms."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.contiguous().flatten()
        place = flat.nonzero().squeeze(1)
        gap = place.diff(prepend=place.new_tensor([-1]))
        width = torch.uint16 if len(gap) == 0 or int(gap.max()) < 2**16 else torch.int32
        if len(place) * (width.itemsize + flat.element_size()) < flat.numel() * flat.element_size():
            stored |= {f"{name}:gap": gap.to(width), f"{name}:value": flat[place]}
        else:
            stored[name] = tensor
    shapes = json.dumps({name: list(t.shape) for name, t in tensors.items()})
    return own_bytes(stored, {"shapes": shapes, **entries})


def _unpacked(
    stored: Mapping[str, Tensor],
    entries: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    path: Path,
) -> dict[str, Tensor]:
    """The tensors that `_packed` stored in `path`, if their names and shapes are those expected."""
    try:
        shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(entries["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say the shapes of its tensors; save the model again.") from error
    present = {name.partition(":")[0] for name in stored}
    faults = [f"missing {name}" for name in expected if name not in present or name not in shapes]
    faults += [f"unexpected {name}" for name in sorted(present | set(shapes)) if name not in expected]
    faults += [
        f"{name} has shape {list(shapes[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"{path} does not hold the weights that {CONFIG} describes: {'; '.join(faults[:8])}{more}. "
            "The two files belong to different models, or the library has changed since."
        )
    return {name: _tensor(stored, name, shape, path) for name, shape in expected.items()}


def _tensor(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    if name in stored and tuple(stored[name].shape) == shape:
        return stored[name]
    gap, value = stored.get(f"{name}:gap"), stored.get(f"{name}:value")
    if gap is not None and value is not None and gap.shape == value.shape:
        flat = torch.zeros(shape, dtype=value.dtype).flatten()
        place = gap.long().cumsum(0) - 1
        if len(place) == 0 or (int(place.min()) >= 0 and int(place.max()) < len(flat)):
            flat[place] = value
            return flat.view(shape)
    raise CheckpointError(f"{path}: {name} is damaged; fetch or save the model again.")


def _refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(f"{where}: {bad} of the {tensor.numel()} entries of {name} are NaN or infinite.")


def _config_sum(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = (tensors[name].detach().cpu() + 0).contiguous()  # + 0 makes -0, which sparse storage forgets, a 0
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


# -- tokenizer and bigram table ---------------------------------------------------------------------------------------


def _has_frozen_table(cfg: ModelConfig) -> bool:
    return cfg.bigram and not cfg.bigram_learnable


def _tokenizer_entry(tokenizer: Any, cfg: ModelConfig, bundled: bool) -> dict[str, Any] | None:
    """What config.json says of the tokenizer."""
    if bundled and cfg.tokenizer_name is None:
        raise TokenizerError("bundled=True refers to the tokenizer by name, and cfg.tokenizer_name is None; set it.")
    if bundled:
        assert cfg.tokenizer_name is not None
        own, tokenizer = tokenizer, bundled_tokenizer(cfg.tokenizer_name)
        if own is not None and tokenizer_hash(own) != tokenizer_hash(tokenizer):
            raise TokenizerError(
                f"the model's tokenizer is not the one that is bundled as {cfg.tokenizer_name!r}; save without bundled."
            )
    if tokenizer is None:
        return None
    return {
        "name": cfg.tokenizer_name,
        "sha256": tokenizer_hash(tokenizer),
        "n_ids": len(tokenizer),
        "bundled": bundled,
    }


def _stored_tokenizer(entry: dict[str, Any] | None, folder: Path, cfg: ModelConfig) -> PreTrainedTokenizerBase | None:
    if entry is None:
        return None
    tokenizer = bundled_tokenizer(entry["name"]) if entry["bundled"] else load_tokenizer(folder / TOKENIZER)
    if len(tokenizer) > cfg.d_vocab:
        raise TokenizerError(
            f"the tokenizer of {folder} has {len(tokenizer)} ids and the model a vocabulary of {cfg.d_vocab}: "
            "they do not belong together. Restore the tokenizer that the model was saved with."
        )
    if tokenizer_hash(tokenizer) != entry["sha256"]:
        raise TokenizerError(
            f"the tokenizer of {folder} is not the one that the model was saved with: its sha256 is "
            f"{tokenizer_hash(tokenizer)}, and {CONFIG} says {entry['sha256']}. Restore it."
        )
    return tokenizer


def _bundled_table_entry(tensors: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, str]:
    """A reference to the bigram table that ships with the tokenizer."""
    assert cfg.tokenizer_name is not None
    table = load_bigram_table(bundled_tokenizer_folder(cfg.tokenizer_name) / BIGRAM_TABLE)
    if not torch.equal(table.to(tensors["bigram_table"].dtype), tensors["bigram_table"]):
        raise CheckpointError(
            f"the model's bigram table is not the one that ships with {cfg.tokenizer_name!r}; save without bundled."
        )
    return {"tokenizer": cfg.tokenizer_name, "sha256": _sha256({"bigram_table": table})}


def _bundled_table(entry: dict[str, str]) -> Tensor:
    path = bundled_tokenizer_folder(entry["tokenizer"]) / BIGRAM_TABLE
    table = load_bigram_table(path)
    if _sha256({"bigram_table": table}) != entry["sha256"]:
        raise CheckpointError(f"{path} is not the bigram table that the model was saved with; restore it.")
    return table


# -- writing ----------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write everything under a temporary name beside `folder`, then rename it."""
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        unfinished.chmod(0o755)
        for name, content in files.items():
            with (unfinished / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if tokenizer is not None:
            save_tokenizer(tokenizer, unfinished / TOKENIZER)
        if folder.is_dir():
            folder.rmdir()  # empty, else it would have been refused
        unfinished.replace(folder)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write a model to {folder}: {error.strerror}. Name another folder.") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def library_version() -> str:
    """Version of the installed library."""
    try:
        return version("sparse_interp")
    except PackageNotFoundError:
        return "unknown"  # run from a folder that nobody installed
