"""The report: what was found, in words and numbers, as one Markdown text.

It says what a reader should ask of any circuit, in that order: which model, which behaviour, how large, is it what the
model computes, what does it do, and how to get it again. Every number comes from a table that is also in a file.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from sparse_interp.circuit.describe import Description, main_path, token_wires
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.adversarial import AdversarialTable
from sparse_interp.faithfulness.audit_table import AuditTable
from sparse_interp.model.dense import AnyModel
from sparse_interp.tasks.task import Task, TaskBatch

N_PAIRS, N_NODES, N_TOKENS, N_SAID, N_HEADS = 4, 12, 3, 5, 4
"""Example pairs, most needed nodes, tokens per node, nodes in words and heads in words that a report shows."""


def report(
    model: AnyModel,
    circuit: Circuit,
    audit: AuditTable,
    task: Task,
    known: Description,
    adversarial: AdversarialTable,
    *,
    commands: Sequence[str],
    generator: torch.Generator,
) -> str:
    """Markdown: model, behaviour, circuit, nodes, heads and audit, and the `commands` that reproduce it all."""
    pairs = task.batch(64, split="test", generator=generator)
    parts = [
        f"# The circuit of {circuit.model_name} for {task.name}",
        f"**Verdict of the audit (level {audit.origin.get('level', 'unknown')}): {_escaped(audit.verdict)}.**",
        f"The {_escaped(audit.headline)}.",
        _summary(circuit, audit),
        "## The behaviour",
        "Pairs of prompts that differ in one token; the model is asked which of two tokens comes next.",
        _examples(pairs, task),
        "## The circuit beside its model",
        _markdown(_comparison(audit)),
        _losses(circuit),
        "## What it is made of",
        _markdown(_sizes(circuit)),
        _path(model, circuit, pairs),
        f"The {min(N_NODES, circuit.n_nodes)} nodes whose knock-out costs most (growth of KL(model || circuit), nats):",
        _markdown(_needed(circuit, known)),
        "In words, on held-out text (shares of variance; what drives a node by weight times spread):",
        _listed(known.sentences.of(node) for node in _most_needed(known, N_SAID).node),
        *_heads(adversarial),
        "## What the verdict rests on",
        _markdown(_four(audit)),
        "## The audit, row by row",
        _markdown(_audit_rows(audit)),
        "## To get this again",
        "```sh\n" + "\n".join(commands) + "\n```",
        _origin(circuit, audit),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(circuit: Circuit, audit: AuditTable) -> str:
    total = sum(len(v) for v in circuit.baseline.values.values())
    own, alone, random = (_value(audit, "accuracy", on) for on in ("model", "circuit", "random circuits"))
    kl = _value(audit, "KL(model || circuit)", "circuit")
    return (
        f"Of the model's {total:,} nodes the circuit keeps {circuit.n_nodes:,}, joined by {circuit.n_edges:,} non-zero "
        f"weights; every other node is held at its {circuit.baseline.kind}. On held-out prompts the model is right on "
        f"{own:.1%}, the circuit alone on {alone:.1%}, and random circuits of the same size on {random:.1%} (chance is "
        f"50 %). Over the whole vocabulary the circuit's distribution is {kl:.3f} nats from the model's."
    )


def _value(audit: AuditTable, measure: str, condition: str) -> float:
    rows = audit.frame[(audit.frame.measure == measure) & (audit.frame.condition == condition)]
    rows = rows[rows.split == "test"]
    return float(rows.value.iloc[0]) if len(rows) else float("nan")


def _examples(pairs: TaskBatch, task: Task) -> str:
    frame = pairs.to_frame(task.tokenizer).head(N_PAIRS)[["clean", "corrupt", "answer", "foil"]]
    return _markdown(frame.map(repr))


def _comparison(audit: AuditTable) -> pd.DataFrame:
    """Accuracy, loss and agreement, one row per split and condition."""
    wanted = audit.frame[audit.frame.measure.isin(["accuracy", "task loss"]) & audit.frame.value.notna()]
    return wanted[["split", "measure", "condition", "value", "low", "high"]].round(4)


def _losses(circuit: Circuit) -> str:
    """Both losses side by side, as the search saw them, and the size that the paper's rule would have given."""
    if circuit.scores.empty:
        return ""
    shown = circuit.scores[["measure", "value", "unit", "split", "n_prompts"]].round(4)
    return "On the prompts that the size was chosen on (apart from those that gates were trained on):\n\n" + _markdown(
        shown
    )


def _sizes(circuit: Circuit) -> pd.DataFrame:
    counts = circuit.nodes.groupby(["layer", "site"], sort=False).size().rename("nodes").reset_index()
    wires = circuit.edges.kind.value_counts()
    extra = [
        ("all", f"{kind} wires{'' if kind == 'weight' else ' (not counted as edges)'}", n) for kind, n in wires.items()
    ]
    return pd.concat([counts, pd.DataFrame(extra, columns=["layer", "site", "nodes"])]).rename(
        columns={"nodes": "number"}
    )


def _path(model: AnyModel, circuit: Circuit, pairs: TaskBatch) -> str:
    path = main_path(circuit, token_wires(model, circuit, pairs))
    return f"The path whose least needed node is needed most: {_escaped(path)}." if path else ""


def _needed(circuit: Circuit, known: Description) -> pd.DataFrame:
    """The most needed nodes with what is known of each."""
    rows = []
    for row in _most_needed(known, N_NODES).itertuples():
        writes = known.effects.of(row.node).frame
        contexts = known.contexts.frame
        seen = contexts[(contexts.node == row.node) & (contexts.source == "text")]
        rows.append(
            {
                "node": row.node,
                "importance_nats": round(float(row.importance_nats), 4),
                "changes with the pair by": round(float(row.change_at_last), 3),
                "most active at": _tokens(seen.sort_values("rank").token),
                "promotes": _tokens(writes[writes.effect > 0].token),
                "suppresses": _tokens(writes[writes.effect < 0].token),
            }
        )
    return pd.DataFrame(rows)


def _most_needed(known: Description, n: int) -> pd.DataFrame:
    return known.statistics.frame.sort_values("importance_nats", ascending=False).head(n)


def _heads(adversarial: AdversarialTable) -> list[str]:
    """What the heads do that are needed most, and the prompts that this suggests."""
    parts = []
    if adversarial.reading is not None and len(adversarial.reading.heads):
        frame = adversarial.reading.heads.frame
        parts += [
            "## What its heads do",
            f"The {min(N_HEADS, len(frame))} of {len(frame)} heads that the circuit needs most, on the task's prompts:",
            _listed(frame.sentence.head(N_HEADS)),
        ]
    parts += ["## Prompts on which it should then fail", _escaped(adversarial.summary)]
    if not len(adversarial):
        return parts
    shown = ["rule", "heads", "on", "accuracy_before", "accuracy", "accuracy_control", "accuracy_low", "accuracy_high",
             "logits_before", "logits", "logits_control", "outcome"]  # fmt: skip
    examples = adversarial.frame.drop_duplicates(["rule", "heads"])
    lines = [f"{row.rule}: {row.example!r}" for row in examples.itertuples()]
    said = "The circuit is the prediction, the model the test. One edited prompt of each:"
    return [*parts, _markdown(adversarial.frame[shown].round(3)), said, _listed(lines)]


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_escaped(sentence)}" for sentence in sentences)


def _tokens(tokens: Iterable[str]) -> str:
    return " ".join([repr(token) for token in dict.fromkeys(tokens)][:N_TOKENS])


def _four(audit: AuditTable) -> pd.DataFrame:
    words = {True: "yes", False: "NO"}
    frame = audit.four.frame
    return frame.assign(passed=[words.get(p, "not run") for p in frame.passed]).rename(columns={"passed": "kept"})


def _audit_rows(audit: AuditTable) -> pd.DataFrame:
    frame = audit.frame.copy()
    words = {True: "yes", False: "NO"}
    frame["kept its bound"] = [
        words.get(p, "not run" if pd.isna(v) else "") for p, v in zip(frame.passed, frame.value, strict=True)
    ]
    return frame[["measure", "condition", "split", "value", "low", "high", "unit", "kept its bound", "note"]].round(4)


def _origin(circuit: Circuit, audit: AuditTable) -> str:
    return (
        f"Model weights {circuit.model_sha256[:16]}, task {(circuit.task_sha256 or 'none')[:16]}, search seed "
        f"{circuit.seed}, audit seed {audit.origin.get('seed', 'unknown')}."
    )


def _markdown(frame: pd.DataFrame) -> str:
    """A table that Markdown renders as it is, whatever its cells hold."""
    cells = [
        [_escaped("" if _is_nothing(cell) else str(cell)) for cell in row] for row in frame.itertuples(index=False)
    ]
    head = [_escaped(str(column)) for column in frame.columns]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_nothing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _escaped(text: str) -> str:
    """Text that cannot end a cell, open a tag or start a span."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
