"""A model with a known circuit as a folder: what `model.save` writes, and answer_key.json beside it.

    answer_key.json   name; why; names of channels; every key as nodes and edges; nodes that are made good for; the
                      task's templates, sides, fillers and marks; the sha256 of the weights, and its own

The tokenizer is the model's. A key that was edited, or stands beside other weights, is refused.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparse_interp.errors import CheckpointError
from sparse_interp.faithfulness.answer_key import GroundTruth, Key
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.sites import Node, check_nodes
from sparse_interp.model.tensor_files import read_record
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task
from sparse_interp.tasks.templates import Template, TemplateFile

FORMAT_VERSION = 1
ANSWER_KEY = "answer_key.json"


def save_truth(truth: GroundTruth, folder: Path | str) -> Path:
    """Write model, task and answer key to a new `folder`, from which `load_truth` reads them.

    Raises:
        CheckpointError: if `folder` holds something or cannot be written.
    """
    folder = truth.model.save(folder)
    record = {
        "format_version": FORMAT_VERSION,
        "name": truth.name,
        "why": truth.why,
        "channels": list(truth.channels),
        "keys": [{"nodes": sorted(key.nodes), "edges": sorted(key.edges)} for key in truth.keys],
        "repaired": sorted(truth.repaired),
        "task": _task_record(truth.task),
        "weights_sha256": weights_sha256(truth.model),
    }
    path = folder / ANSWER_KEY
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(json.dumps(record | {"sha256": _sum(record)}, indent=1) + "\n", encoding="utf-8")
    return unfinished.replace(path)


def load_truth(folder: Path | str) -> GroundTruth:
    """The model, task and answer key that `save_truth` wrote to `folder`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the key belongs to other weights.
    """
    path = Path(folder) / ANSWER_KEY
    record = read_record(path, FORMAT_VERSION, "save it again")
    if record.pop("sha256", None) != _sum(record):
        raise CheckpointError(f"{path} is not what was saved: its sha256 is not the one that it states. Restore it.")
    model = HookedSparseTransformer.from_pretrained(Path(folder)).eval()
    if record["weights_sha256"] != weights_sha256(model):
        raise CheckpointError(
            f"{path} is the key of other weights ({record['weights_sha256'][:12]}) than those beside it "
            f"({weights_sha256(model)[:12]}). Restore both."
        )
    keys = [
        Key(_nodes(key["nodes"]), frozenset((Node(*a), Node(*b)) for a, b in key["edges"])) for key in record["keys"]
    ]
    for key in keys:
        check_nodes(key.nodes, model.cfg)
    return GroundTruth(
        name=record["name"],
        model=model,
        task=_task(record["task"], model.tokenizer),
        nodes=keys[0].nodes,
        edges=keys[0].edges,
        why=record["why"],
        channels=tuple(record["channels"]),
        alternatives=tuple(keys[1:]),
        repaired=_nodes(record["repaired"]),
    )


def _nodes(rows: Iterable[list[Any]]) -> frozenset[Node]:
    return frozenset(Node(*row) for row in rows)


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _task_record(task: Task) -> dict[str, Any]:
    source = task.source
    assert isinstance(source, TemplateFile)
    return {
        "name": task.name,
        "description": source.description,
        "templates": [
            {"text": form.text, "answers": form.answers, "rest": form.rest, "splits": form.splits, "sides": form.sides}
            for form in source.templates
        ],
        "sides": source.sides,
        "fillers": source.fillers,
        "marks": source.marks,
        "max_changed": source.max_changed,
        "sha256": source.sha256,
    }


def _task(record: dict[str, Any], tokenizer: Any) -> Task:
    templates = [
        Template(
            form["text"],
            tuple(form["answers"]),
            form["rest"],
            tuple(form["splits"]),
            form["sides"] and (form["sides"][0], form["sides"][1]),
        )
        for form in record["templates"]
    ]
    source = TemplateFile(
        description=record["description"],
        templates=tuple(templates),
        sides=(record["sides"][0], record["sides"][1]),
        fillers=record["fillers"],
        marks=record["marks"],
        max_changed=record["max_changed"],
        sha256=record["sha256"],
    )
    source.check(record["name"])
    return Task(record["name"], tokenizer, source)
