"""Names of models, and the folders that hold them.

    model_folder("stdlib-small")              a bundled model
    model_folder("runs/mine/model")           a folder of any form that can be loaded
    model_folder("openai/csp_yolo2")          a model of OpenAI's store, fetched once
    model_folder("openai/circuit-sparsity")   a repository of the Hugging Face hub, fetched once; any `owner/name`
    models()                                  what there is, one row each

This module alone reads the environment:

    SPARSE_INTERP_CACHE     the folder where all that is fetched is kept; its layout is in model/store.py
    SPARSE_INTERP_OFFLINE   1 to fetch nothing
    SPARSE_INTERP_MIRROR    another address of OpenAI's store, with the same files
    HF_ENDPOINT             another address of the Hugging Face hub
"""

import json
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import pandas as pd
import platformdirs
from jaxtyping import Int
from torch import Tensor

from sparse_interp.data_files import data_folder
from sparse_interp.errors import CheckpointError, ConfigError, DownloadError, NotPublishedError
from sparse_interp.model.checkpoint import (
    CARD,
    CONFIG,
    MEANS,
    VALIDATION,
    load_node_values,
    load_validation,
    read_config,
    weights_sha256,
)
from sparse_interp.model.released import released_form
from sparse_interp.model.releases import (
    ALIASES,
    BASE,
    HUB,
    HUB_NAME,
    HUB_TWIN,
    OWNER,
    RELEASES,
    SINGLE,
    SWEEP,
    TOKENIZER,
    CircuitName,
    Release,
)
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.store import Store, model_files, tokenizer_files
from sparse_interp.results import Table

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`owner/name`."""

OURS = "sparse_interp"
"""The form of what `model.save` writes."""


@dataclass(frozen=True, eq=False)
class ModelTable(Table):
    """One row per model: what it is, where it is, and for one of ours its loss on held-out text.

    `form` says how it is stored, in the words of its load report: `sparse_interp`, or a form of model/released.py;
    `cached`, whether all its files are on this machine.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "name",
        "form",
        "where",
        "cached",
        "n_bytes",
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
    """The models that can be loaded by name: the bundled ones, and those that are known to be published.

    Nothing is fetched. The sweep has one row, and one more for each of its models that is cached.
    """
    store = _store()
    rows = [_row(folder) for _, folder in sorted(_bundled().items())]
    rows += [_released_row(release, store) for release in SINGLE]
    sweep = [_released_row(release, store) for release in RELEASES.values() if release not in SINGLE]
    family = {"name": SWEEP.format("<width>", "<n>", "<share>"), "form": "circuit_sparsity", "where": _host(store.base)}
    rows += [family | {"cached": False, "kind": "sparse", "n_layers": sweep[0]["n_layers"]}]
    rows += [row for row in sweep if row["cached"]]
    rows += [_repository_row(name, store) for name in dict.fromkeys([HUB_NAME, *store.repositories()])]
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


def means_of(model: Any) -> NodeValues:
    """The means kept beside the bundled model whose name and weights `model` has; of any kind, with `cfg` and weights.

    Raises:
        CheckpointError: if no bundled model has its name and its weights.
    """
    folder = _bundled().get(model.cfg.model_name)
    if folder is None or read_config(folder)["weights_sha256"] != weights_sha256(model):
        raise CheckpointError(
            f"no means over text are kept for {model.cfg.model_name!r} with these weights; make them with "
            "mean_activations(model, blocks) and pass them on."
        )
    return load_node_values(folder / MEANS)


def model_folder(name_or_path: str | Path, *, progress: bool = True) -> Path:
    """The folder of a model: a bundled one, one on this machine, or one that is fetched if it is not here yet.

    Raises:
        ConfigError: for a name that no model has, with the nearest ones.
        CheckpointError: for a path at which there is no folder.
        DownloadError: if the model is published and cannot be fetched; in the offline mode, with what to do.
    """
    bundled = _bundled()
    name = str(name_or_path)
    if name in bundled:
        return bundled[name]
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if isinstance(name_or_path, Path) or folder.exists() or ("/" in name and not _REPOSITORY.fullmatch(name)):
        raise CheckpointError(f"{folder} is no folder; name a model, or a folder that holds one.")
    release = RELEASES.get(ALIASES.get(name, name))
    if release is not None:
        store = _store()
        also = TOKENIZER if store.offline and store.lacking(release.files) else []  # to be copied in the same go
        return store.files(name, [*also, *release.files], progress, release.note)[-1].parent
    if "/" not in name or name.startswith((f"{OWNER}/csp_", f"{OWNER}/dense")):
        near = get_close_matches(name, _known(), n=3, cutoff=0.5) or [*sorted(_bundled()), HUB_NAME]
        raise ConfigError(
            f"no model is called {name!r}; the nearest are {', '.join(near)}. A folder that holds a model is loaded by "
            "its path."
        )
    try:
        return _store().repository(name, "hub", model_files, progress)
    except DownloadError as error:
        near = get_close_matches(name, _known(), n=1, cutoff=0.8)
        meant = f" Did you mean {near[0]}?" if near and near[0] != name else ""
        raise type(error)(f"{name} is no folder here.{meant} As a Hugging Face repository: {error}") from error


def tokenizer_folder(name: str = "tinypython_2k", *, progress: bool = True) -> Path:
    """The folder of a published tokenizer: the two files of `tinypython_2k`, or those of a Hugging Face repository.

    Raises:
        DownloadError: if it cannot be fetched; in the offline mode, with what to do.
    """
    if not _REPOSITORY.fullmatch(f"any/{name}" if "/" not in name else name):
        raise DownloadError(f"{name!r} is no name of a tokenizer that could be fetched; it may be a repository's.")
    if name == "tinypython_2k":
        return _store().files(name, TOKENIZER, progress)[0].parent
    return _store().repository(name, "tokenizers", tokenizer_files, progress)


class CircuitFiles(NamedTuple):
    """Where the files of a published circuit are."""

    payload: Path
    """`viz_data.pt`."""

    means: Path | None
    """`mean_baseline_pretrain.pt` of its model; None if none is published, or in the offline mode none is here."""


def released_circuit_files(model: str, task: str, sweep: str, k: int | str, *, progress: bool = True) -> CircuitFiles:
    """The files of a published circuit, fetched if they are not here yet.

    Args:
        model: as in "openai/csp_yolo2", or without the owner.
        k: a number, or "k_optim".

    Raises:
        ConfigError: for a name that cannot be one.
        DownloadError: if the circuit cannot be fetched; in the offline mode, with what to do.
    """
    circuit = CircuitName(model.removeprefix(f"{OWNER}/"), task, sweep, str(k)).check()
    store = _store()
    (payload,) = store.files(f"the circuit {'/'.join(circuit)}", [circuit.file], progress)
    if store.offline and store.lacking([circuit.means]):
        return CircuitFiles(payload, None)
    try:
        (means,) = store.files(f"the means of {circuit.model}", [circuit.means], progress)
    except NotPublishedError:
        return CircuitFiles(payload, None)
    return CircuitFiles(payload, means)


def released_circuits(model: str, *, progress: bool = True) -> list[CircuitName]:
    """The circuits that are published for `model`, in order; in the offline mode, those that are in the cache.

    Raises:
        DownloadError: if the store, or the mirror, does not list its files.
    """
    found = map(CircuitName.of_path, _store().listing(CircuitName.folder(model.removeprefix(f"{OWNER}/")), progress))
    return sorted(filter(None, found), key=lambda c: (*c[:3], c.k.zfill(9) if c.k.isdigit() else c.k))


def cache_folder() -> Path:
    """Where what was downloaded or converted is kept: SPARSE_INTERP_CACHE, else the user's folder for such things."""
    told = os.environ.get("SPARSE_INTERP_CACHE")
    return Path(told).expanduser() if told else platformdirs.user_cache_path("sparse_interp", appauthor=False)


def _store() -> Store:
    """What is published, as the environment says how to reach it."""
    return Store(
        cache=cache_folder(),
        base=os.environ.get("SPARSE_INTERP_MIRROR", BASE).rstrip("/"),
        hub=os.environ.get("HF_ENDPOINT"),
        offline=os.environ.get("SPARSE_INTERP_OFFLINE", "") not in ("", "0"),
    )


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
        "form": OURS,
        "where": "bundled",
        "cached": True,
        "n_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "kind": card.get("kind", "sparse" if shape["density"] < 1 else "dense"),
        "n_layers": shape["n_layers"],
        "d_model": shape["d_model"],
        "density": shape["density"],
        "n_nonzero": parameters.get("n_nonzero", float("nan")),
        "n_tokens": card.get("n_tokens", float("nan")),
        "validation_loss_nats": validation.get("loss_nats", float("nan")),
        "bigram_loss_nats": validation.get("bigram_loss_nats", float("nan")),
    }


def _released_row(release: Release, store: Store) -> dict[str, Any]:
    sizes = [file.size for file in release.files]
    return {
        "name": release.name,
        "form": "circuit_sparsity",
        "where": _host(store.base),
        "cached": not store.lacking(release.files),
        "n_bytes": float("nan") if None in sizes else sum(filter(None, sizes)),
        "kind": release.kind,
        "n_layers": release.n_layers,
        "d_model": release.d_model,
    }


def _repository_row(name: str, store: Store) -> dict[str, Any]:
    row = {"name": name, "where": _host(store.hub or HUB), "cached": name in store.repositories()}
    if name == HUB_NAME:
        twin = RELEASES[HUB_TWIN]
        return row | {"form": "circuitgpt", "kind": twin.kind, "n_layers": twin.n_layers, "d_model": twin.d_model}
    return row | {"form": released_form(store.cache / "hub" / name) or OURS}


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _known() -> list[str]:
    return [*sorted(_bundled()), *RELEASES, HUB_NAME]
