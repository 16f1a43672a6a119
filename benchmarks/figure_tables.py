"""Tables of figures that no benchmark writes: gathered from what others kept, without a search or a run of a model.

    python benchmarks/figure_tables.py [--cells out/faithful_pruning] [--audits out/audits] [--board FILE]
                                       [--out benchmarks/results]

    size_curves.csv               faithful_pruning.py ranks nodes in every search: how well the first n of them agree
                                  with the model on held-out pairs, for the bundled models' tasks and their nonsense
    necessity_and_sufficiency.csv audits.py: the model, the circuit alone, the model without it, random circuits of its
                                  size, and everything at its mean, on both splits, with intervals
    groundtruth.csv               with --board: the board that `sparse-interp groundtruth` left, as it is

What is not there is left out, and said.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from faithful_pruning import N_FEWER, RESULTS, full_cells, record_of

from sparse_interp.faithfulness.audit_table import AuditTable
from sparse_interp.results import write_whole

ABOUT = ("sufficiency", "necessity", "agreement", "gap to controls")
CONDITIONS = ("model", "circuit", "circuit removed", "random circuits", "all at baseline")
MEASURES = ("accuracy", "task loss", "KL(model || circuit)")
COLUMNS = ["about", "measure", "condition", "split", "value", "low", "high", "unit", "n_prompts", "n_templates"]


def size_curves(cells: Path) -> Iterator[dict]:
    """A row for every size at which a ranking was measured."""
    for cell in full_cells():
        record = record_of(cell, cells) if cell.kind == "bundled" else None
        if record is None:
            continue
        named = cell._asdict() | {"all_nodes": record["all_nodes"], "n_pairs": N_FEWER}
        named["asked_loss_nats"] = record["ranking"]["asked_loss_nats"]
        curve = record["ranking"]["curve"]
        for nodes, kl, loss in zip(curve["nodes"], curve["kl_nats"], curve["loss_nats"], strict=True):
            yield named | {"nodes": nodes, "kl_nats": kl, "loss_nats": loss}


def audited(audits: Path) -> Iterator[pd.DataFrame]:
    """The rows of every audit that say what is left with the circuit alone, and without it."""
    for path in sorted(audits.glob("*/*/*-quick-*.json")):
        table = AuditTable.from_json(path)
        frame, origin = table.frame, table.origin
        chosen = frame.about.isin(ABOUT) & frame.measure.isin(MEASURES) & frame.condition.isin(CONDITIONS)
        named = {"model": origin["model_name"], "task": origin["task_name"], "pruned": path.name.split("-")[0]}
        named |= {"nodes": origin["n_nodes"], "edges": origin["n_edges"], "seed": origin["seed"]}
        rows = frame.loc[chosen & frame.value.notna(), COLUMNS]
        yield pd.concat([pd.DataFrame([named] * len(rows), index=rows.index), rows], axis=1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cells", type=Path, default=Path("out/faithful_pruning"))
    arguments.add_argument("--audits", type=Path, default=Path("out/audits"))
    arguments.add_argument("--board", type=Path, help="board.csv, as `sparse-interp groundtruth` leaves it")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    given = arguments.parse_args()
    curves, audits = pd.DataFrame(size_curves(given.cells)), list(audited(given.audits))
    tables = {"size_curves": curves, "necessity_and_sufficiency": pd.concat(audits) if audits else pd.DataFrame()}
    if given.board is not None:
        tables["groundtruth"] = pd.read_csv(given.board, keep_default_na=False)
    for name, table in tables.items():
        if table.empty:
            print(f"{name}.csv: left out, there is nothing to gather")
            continue
        text = table.to_csv(index=False, float_format=None if name == "groundtruth" else "%.4g")
        write_whole(given.out / f"{name}.csv", text)
        print(f"{given.out / f'{name}.csv'}: {len(table)} rows")


if __name__ == "__main__":
    main()
