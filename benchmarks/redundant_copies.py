"""Where a model has several circuits for one task, each enough by itself: which of them does what find?

    python benchmarks/redundant_copies.py [--case two_copies ...] [--seed 0] [--found out/redundant_copies]
                                          [--out benchmarks/results]

    find_circuit     one search
    rivals           four searches that know nothing of each other
    completeness     backups of the circuit found: nodes whose effect grows once it is removed
    the silent part  backups of those of its nodes that alone do nothing while the rest of the model is there

A circuit counts if it is a key node for node. Of nodes it counts which are in another key than the nearest to the
circuit found, and in no key. Whatever is in `--found` (a file per case and way) is not measured again. Seconds are of
processor time.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.circuit.find import find_circuit
from sparse_interp.circuit.graph import Circuit
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.completeness import GROWS_NATS, completeness
from sparse_interp.faithfulness.ground_truth import effects_alone, ground_truths, nearest_key
from sparse_interp.faithfulness.methods import N_MEANS, PRUNING
from sparse_interp.faithfulness.planted_cases import planted_cases
from sparse_interp.faithfulness.rivals import rivals
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import Node, NodeValues
from sparse_interp.results import write_whole

CASES = ("two_copies", "two_copies-medium", "quote_x2-small", "distractor_x2-small", "bracket_depth_x3-small")
SEARCHES = ("find_circuit", "rivals")
WAYS = (*SEARCHES, "completeness", "the silent part")
N_SEARCHES = 4
N_PAIRS = 16


def circuits(truth: GroundTruth, way: str, means: NodeValues, generator: torch.Generator) -> list[Circuit]:
    """What a search finds, or several do."""
    how: dict[str, Any] = {"baseline": means, "generator": generator, "progress": False}
    if way == "find_circuit":
        return [find_circuit(truth.model, truth.task, PRUNING, **how)]
    how |= {"n_seeds": N_SEARCHES, "at_once": N_SEARCHES, "n_pairs": N_PAIRS}
    found = rivals(truth.model, truth.task, PRUNING, **how)
    return list(found.circuits)


def backups(truth: GroundTruth, way: str, circuit: Circuit, generator: torch.Generator) -> list[str]:
    """Nodes whose effect grows once a circuit, or its silent part, is removed; none where no part is silent."""
    pairs = truth.task.batch(N_PAIRS, "test", generator=generator)
    if way == "the silent part":
        alone = effects_alone(truth, pairs.both_sides(), circuit.baseline, sorted(circuit.node_set))
        silent = [node for node, nats in alone.items() if nats < GROWS_NATS]
        if not silent:
            return []
        circuit = Circuit.of_nodes(truth.model, silent, circuit.baseline)
    found = completeness(truth.model, circuit, pairs, n_pairs=N_PAIRS, generator=generator, progress=False)
    return found.backups


def cell(name: str, truth: GroundTruth, way: str, seed: int) -> dict[str, Any]:
    """What a way finds in a model."""
    generator = torch.Generator().manual_seed(seed)
    means = mean_activations(truth.model, truth.blocks(N_MEANS, generator=generator), batch_size=128)
    began = time.process_time()
    found = circuits(truth, way if way in SEARCHES else "find_circuit", means, generator)
    keys, sets = [key.nodes for key in truth.keys], {circuit.node_set for circuit in found}
    row = {"case": name, "n_keys": len(keys), "way": way, "n_circuits": len(sets)}
    row |= {"keys_found": sum(key in sets for key in keys), "no_key": sum(nodes not in keys for nodes in sets)}
    if way not in SEARCHES:
        named = set(backups(truth, way, found[0], generator))
        near = nearest_key(truth, found[0].node_set).nodes
        others: set[Node] = {node for key in keys for node in key} - near
        row |= {"named": len(named), "of_other_keys": len(named & {*map(str, others)}), "others": len(others)}
        row["of_no_key"] = len(named - {str(node) for key in keys for node in key})
    return row | {"seconds": time.process_time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", help="models with several keys; some small ones if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("out/redundant_copies"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    builds, rows = {**ground_truths(), **planted_cases("full")}, []
    for name in args.case or CASES:
        truth = None
        for way in WAYS:
            path = args.found / name / f"{way.replace(' ', '_')}-{args.seed}.json"
            if not path.exists():
                truth = truth or builds[name]()
                if len(truth.keys) < 2:
                    raise si.TaskError(f"{name} has one circuit; this is about models that have several.")
                write_whole(path, json.dumps(cell(name, truth, way, args.seed), indent=1))
            rows.append(json.loads(path.read_text()))
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(1).to_string(index=False))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {"command": "benchmarks/redundant_copies.py", "seed": args.seed, "machine": machine, "rows": rows}
    write_whole(args.out / "redundant_copies.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
