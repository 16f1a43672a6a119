"""Names of models, and the folders that hold them.

    model_folder("stdlib-small")      a bundled model
    model_folder("runs/mine/model")   a folder that `model.save` wrote, or that training left
    models()                          what is bundled, one row each

A name is a folder of `data/models/`.
"""

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from jaxtyping import Int
from torch import Tensor, nn

from sparse_interp.data_files import data_folder
from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.checkpoint import (
    CARD,
    CONFIG,
    MEANS,
    VALIDATION,
    ModelFiles,
    load_node_values,
    load_validation,
    read_config,
    weights_sha256,
)
from sparse_interp.model.sites import NodeValues
from sparse_interp.results import Table


@dataclass(frozen=True, eq=False)
class ModelTable(Table):
    """One row per model: its shape, its non-zero parameters and its loss on held-out text beside the bigram table's."""

    columns: ClassVar[tuple[str, ...]] = (
        "name",
        "kind",
        "n_layers",
        "d_model",
        "density",
        "n_nonzero",
        "n_tokens",
        "validation_loss_nats",
        "bigram_loss_nats",
    )


def models() -> ModelTable:
    """The bundled models."""
    rows = [_row(folder) for _, folder in sorted(_bundled().items())]
    return ModelTable(pd.DataFrame(rows, columns=list(ModelTable.columns)))


def validation_blocks(name_or_path: str | Path) -> Int[Tensor, "block pos"]:
    """The fixed held-out text that is kept beside a model.

    Raises:
        CheckpointError: if none is kept there.
    """
    return load_validation(model_folder(name_or_path) / VALIDATION)


def baseline_means(name_or_path: str | Path) -> NodeValues:
    """Each node's mean over text, kept beside a model so that installed packages change no result.

    Raises:
        CheckpointError: if none are kept there.
    """
    return load_node_values(model_folder(name_or_path) / MEANS)


def means_of(model: ModelFiles) -> NodeValues:
    """The means kept beside the bundled model whose weights `model` has.

    Raises:
        CheckpointError: if no bundled model has its name and its weights.
    """
    assert isinstance(model, nn.Module)
    folder = _bundled().get(model.cfg.model_name)
    if folder is None or read_config(folder)["weights_sha256"] != weights_sha256(model):
        raise CheckpointError(
            f"no means over text are kept for {model.cfg.model_name!r} with these weights; make them with "
            "mean_activations(model, blocks) and pass them on."
        )
    return load_node_values(folder / MEANS)


def model_folder(name_or_path: str | Path) -> Path:
    """Where the model of that name is, or the folder itself.

    Raises:
        ConfigError: for a name that no model has, with the nearest ones.
        CheckpointError: for a path at which there is no folder.
    """
    bundled = _bundled()
    if str(name_or_path) in bundled:
        return bundled[str(name_or_path)]
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if isinstance(name_or_path, Path) or "/" in name_or_path or folder.exists():
        raise CheckpointError(f"{folder} is no folder; name a bundled model, or a folder that `model.save` wrote.")
    near = get_close_matches(name_or_path, bundled, n=3, cutoff=0.3) or sorted(bundled)
    raise ConfigError(
        f"no model is called {name_or_path!r}; the nearest are {', '.join(near) or '(none are bundled)'}. "
        "A folder that `model.save` wrote is loaded by its path."
    )


def cache_folder() -> Path:
    """Where what was downloaded or converted is kept: `SPARSE_INTERP_CACHE`, else `~/.cache/sparse_interp`."""
    told = os.environ.get("SPARSE_INTERP_CACHE")
    return Path(told) if told else Path.home() / ".cache" / "sparse_interp"


def _bundled() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in (data_folder() / "models").glob(f"*/{CONFIG}")}


def _row(folder: Path) -> dict[str, Any]:
    """What config.json and card.json say; what a card does not say is not a number."""
    shape = read_config(folder)["model"]
    card: dict[str, Any] = {}
    if (folder / CARD).is_file():
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{folder / CARD} is not JSON ({error}); restore it or delete it.") from error
    validation, parameters = card.get("validation", {}), card.get("parameters", {})
    return {
        "name": folder.name,
        "kind": card.get("kind", "sparse" if shape["density"] < 1 else "dense"),
        "n_layers": shape["n_layers"],
        "d_model": shape["d_model"],
        "density": shape["density"],
        "n_nonzero": parameters.get("n_nonzero", float("nan")),
        "n_tokens": card.get("n_tokens", float("nan")),
        "validation_loss_nats": validation.get("loss_nats", float("nan")),
        "bigram_loss_nats": validation.get("bigram_loss_nats", float("nan")),
    }
