"""The circuit file, version 1: what was found, in what, how, and what was measured, as JSON beside safetensors.

    circuit.json          model, task and tokenizer by name and hash; sites, nodes, edges; baseline kind; objective, the
                          full search configuration and its seed; library and torch versions; every score with the
                          ablation, metric, split and number of prompts behind it; the search step by step
    circuit.safetensors   `baseline.LAYER.SITE` and, after a search, `tau.LAYER.SITE`: one number per node of the model

The JSON holds a hash of itself and one of the tensors, so a file that was edited, cut short or paired with another's
tensors is refused. Both files are written beside their places first and then renamed.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor

from sparse_interp.errors import CircuitError, SparseInterpError
from sparse_interp.interventions.pruning import PruneConfig
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.config import Shape
from sparse_interp.model.dense import AnyModel
from sparse_interp.model.sites import NODE_SITES, Node, NodeValues, Place, check_nodes
from sparse_interp.model.tensor_files import read_record
from sparse_interp.results import Table
from sparse_interp.tasks.task import Task
from sparse_interp.tokenizer import tokenizer_hash

FORMAT_VERSION = 1

NODE_TYPES = {"layer": "int64", "site": str, "channel": "int64", "head": "Int64", "baseline": float, "tau": float,
              "importance_nats": float}  # fmt: skip
EDGE_TYPES = {"source": str, "target": str, "kind": str, "weight_name": str, "weight": float}
SCORE_TYPES = {"measure": str, "value": float, "unit": str, "ablation": str, "metric": str,
               "split": str, "n_prompts": "int64"}  # fmt: skip

C = TypeVar("C", bound="CircuitFiles")


class CircuitFiles:
    """Saving and loading, for a circuit with these parts."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    baseline: NodeValues
    tau: NodeValues | None
    cfg: Shape
    model_name: str
    model_sha256: str
    sites: tuple[str, ...]
    n_pos: int | None
    edges_pruned: bool
    task_name: str | None
    task_sha256: str | None
    tokenizer_sha256: str | None
    prune: PruneConfig | None
    seed: int | None
    scores: pd.DataFrame
    history: pd.DataFrame

    def save(self, path: Path | str) -> Path:
        """Write `path` (JSON) and, beside it under the same name, the tensors; a circuit that is there is replaced.

        Raises:
            CircuitError: if `path` does not end in .json, or cannot be written; what was there before stays then.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise CircuitError(f"A circuit is saved as a .json file with its tensors beside it; got {path.name!r}.")
        if not self.model_sha256:
            raise CircuitError("a circuit without a model has no baseline to save; write_tables keeps its tables.")
        tensors = bytes_of_tensors(_tensors(self.baseline, self.tau))
        record = self._record() | {"tensors_sha256": hashlib.sha256(tensors).hexdigest()}
        record["sha256"] = _record_sha256(record)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        _write_together({path.with_suffix(".safetensors"): tensors, path: text.encode()})
        return path

    def save_tables(self, folder: Path | str) -> tuple[Path, Path]:
        """Write `nodes.csv` and `edges.csv` to `folder`, each whole or not at all."""
        folder = Path(folder)
        return Table(self.nodes).save(folder / "nodes.csv"), Table(self.edges).save(folder / "edges.csv")

    @classmethod
    def load(
        cls: type[C],
        path: Path | str,
        model: AnyModel | None = None,
        task: Task | None = None,
        *,
        allow_mismatch: bool = False,
    ) -> C:
        """The circuit that `save` wrote to `path`.

        Args:
            path: the JSON file; its tensors lie beside it.
            model: if given, the weights that the circuit has to belong to.
            task: if given, the templates and tokenizer that it has to have been found with.
            allow_mismatch: load it even if it belongs to another model or task; `circuit.transplanted(model)` then
                moves it.

        Raises:
            CircuitError: if a file is missing, damaged, of another format version, or belongs to another model or task.
        """
        path = Path(path)
        record, tensors = _read(path)
        try:
            circuit = cls(**_fields(record, tensors))
            circuit._check(path)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # ours are ValueErrors too
            raise CircuitError(f"{path} does not describe a circuit ({_said(error)}); save it again.") from error
        if not allow_mismatch:
            circuit.check_origin(model, task)
        return circuit

    def check_origin(self, model: AnyModel | None = None, task: Task | None = None) -> None:
        """Raise CircuitError unless the circuit was found in `model` and on `task`, by their hashes."""
        told = "Load what it belongs to, or pass allow_mismatch=True if you mean to compare."
        if model is not None and (found := weights_sha256(model)) != self.model_sha256:
            raise CircuitError(
                f"this circuit was found in {self.model_name!r} with weights {self.model_sha256[:12]}, and the model "
                f"at hand ({model.cfg.model_name!r}) has weights {found[:12]}. {told}"
            )
        if task is None:
            return
        if self.task_sha256 != task.templates_sha256:
            raise CircuitError(
                f"this circuit was found on {self.task_name!r} with templates {(self.task_sha256 or 'none')[:12]}, and "
                f"the task at hand ({task.name!r}) has templates {task.templates_sha256[:12]}. {told}"
            )
        if self.tokenizer_sha256 not in (None, found := tokenizer_hash(task.tokenizer)):
            raise CircuitError(
                f"this circuit was found with tokenizer {(self.tokenizer_sha256 or 'none')[:12]}, and the task at hand "
                f"was tokenised with {found[:12]}. {told}"
            )

    def _record(self) -> dict[str, Any]:
        prune = None if self.prune is None else asdict(self.prune)
        return {
            "format_version": FORMAT_VERSION,
            "library_version": _library_version(),
            "torch_version": torch.__version__,
            "model": {
                "name": self.model_name,
                "weights_sha256": self.model_sha256,
                "shape": asdict(self.cfg),
            },
            "task": None if self.task_name is None else {"name": self.task_name, "templates_sha256": self.task_sha256},
            "tokenizer_sha256": self.tokenizer_sha256,
            "objective": None if self.prune is None else self.prune.objective,
            "prune": prune,
            "seed": self.seed,
            "sites": list(self.sites),
            "n_pos": self.n_pos,
            "edges_pruned": self.edges_pruned,
            "baseline": self.baseline.kind,
            "scores": _rows_of(self.scores),
            "nodes": _rows_of(self.nodes),
            "edges": _rows_of(self.edges),
            "history": _rows_of(self.history),
        }

    def _check(self, path: Path) -> None:
        """What a file says has to fit together."""
        nodes = [Node(*row) for row in self.nodes[["layer", "site", "channel"]].itertuples(index=False)]
        check_nodes(nodes, self.cfg)
        self.baseline.check(self.cfg, self.sites)
        if self.tau is not None:
            self.tau.check(self.cfg)
        for place, values in self.baseline.values.items():
            if not bool(torch.isfinite(values).all()):
                raise CircuitError(f"the baseline of {place.site} in layer {place.layer} is not finite")
        if len(set(nodes)) < len(nodes):
            raise CircuitError("a node is listed twice")
        strangers = {*self.edges.source, *self.edges.target} - set(map(str, nodes))
        if strangers:
            raise CircuitError(f"an edge ends at {min(strangers)}, which is not among its nodes")


# -- tables and tensors as they lie in a file -------------------------------------------------------------------------


def _rows_of(frame: pd.DataFrame) -> dict[str, list]:
    """A frame as column names and rows that JSON can say."""
    rows = [[_plain(cell) for cell in row] for row in frame.astype(object).itertuples(index=False)]
    return {"columns": [str(column) for column in frame.columns], "rows": rows}


def _plain(cell: Any) -> Any:
    if cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, float) and math.isinf(cell):
        return "inf" if cell > 0 else "-inf"
    return cell.item() if hasattr(cell, "item") else cell


def _frame_of(table: Mapping[str, list], types: Mapping[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(table["rows"], columns=table["columns"])
    lacking = [column for column in types if column not in frame.columns]
    if lacking:
        raise CircuitError(f"a table lacks {', '.join(lacking)}")
    unknown = [column for column in frame.columns if column not in types and frame[column].isna().all()]
    return frame.astype(dict(types) | dict.fromkeys(unknown, float))  # JSON has no word for a number that is none


def _tensors(baseline: NodeValues, tau: NodeValues | None) -> dict[str, Tensor]:
    named = {"baseline": baseline} | ({} if tau is None else {"tau": tau})
    return {
        f"{name}.{place.layer}.{place.site}": v.detach().cpu().contiguous().clone()
        for name, values in named.items()
        for place, v in values.values.items()
    }


def _node_values(tensors: Mapping[str, Tensor], name: str, kind: str) -> NodeValues | None:
    found = {}
    for key, tensor in tensors.items():
        owner, layer, site = key.split(".")
        if owner == name:
            found[Place(int(layer), site)] = tensor
    return NodeValues(found, kind) if found else None


def _fields(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a circuit is made of, from the two files."""
    task = record["task"] or {"name": None, "templates_sha256": None}
    prune = record["prune"]
    sites = record.get("sites") or (prune or {}).get("sites") or NODE_SITES  # the first files did not say
    baseline = _node_values(tensors, "baseline", record["baseline"])
    if baseline is None:
        raise CircuitError("its tensors hold no baseline")
    return {
        "nodes": _frame_of(record["nodes"], NODE_TYPES),
        "edges": _frame_of(record["edges"], EDGE_TYPES),
        "baseline": baseline,
        "tau": _node_values(tensors, "tau", "gate tau"),
        "cfg": Shape.from_dict(record["model"]["shape"]),
        "model_name": record["model"]["name"],
        "model_sha256": record["model"]["weights_sha256"],
        "sites": tuple(sites),
        "n_pos": record.get("n_pos"),
        "edges_pruned": bool(record.get("edges_pruned", False)),
        "task_name": task["name"],
        "task_sha256": task["templates_sha256"],
        "tokenizer_sha256": record["tokenizer_sha256"],
        "prune": None
        if prune is None
        else PruneConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in prune.items()}),
        "seed": record["seed"],
        "scores": _frame_of(record["scores"], SCORE_TYPES),
        "history": _frame_of(record["history"], {}),
    }


def _said(error: Exception) -> str:
    return str(error).rstrip(".") if isinstance(error, SparseInterpError) else f"{type(error).__name__}: {error}"


# -- reading and writing ----------------------------------------------------------------------------------------------


def _record_sha256(record: Mapping[str, Any]) -> str:
    """Hash of everything that the JSON says but this hash."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files of a circuit, if they are whole, ours, and belong together."""
    beside = path.with_suffix(".safetensors")
    for file in (path, beside):
        if not file.is_file():
            raise CircuitError(f"{file} is missing; name the .json file that circuit.save wrote, tensors beside it.")
    try:
        record, raw = read_record(path, FORMAT_VERSION, "find the circuit again"), beside.read_bytes()
    except OSError as error:  # a CheckpointError is one too
        raise CircuitError(str(error)) from error
    if record.get("sha256") != _record_sha256(record):
        raise CircuitError(f"{path} is not what was saved: its sha256 is not the one that it states. Save it again.")
    if record.get("tensors_sha256") != hashlib.sha256(raw).hexdigest():
        raise CircuitError(f"{beside} is not what was saved with {path.name}: its sha256 differs. Restore both files.")
    try:
        return record, tensors_from_bytes(raw)
    except SafetensorError as error:
        raise CircuitError(f"{beside} is damaged ({error}); save the circuit again.") from error


def _write_together(contents: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, and rename them once all are there."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path].write_bytes(content)
        for path, unfinished in partial.items():
            unfinished.replace(path)
    except OSError as error:
        for unfinished in partial.values():
            with suppress(OSError):
                unfinished.unlink()
        raise CircuitError(
            f"{error.filename or next(iter(contents))} cannot be written ({error.strerror}); "
            "name a file in a folder that you may write to."
        ) from error


def _library_version() -> str:
    try:
        return version("sparse_interp")
    except PackageNotFoundError:  # run from a source folder that nobody installed
        return "unknown"
