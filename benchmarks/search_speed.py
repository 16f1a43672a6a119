"""What a search spends its time on, prompts packed and candidates together against prompts as they are, one by one.

    python benchmarks/search_speed.py [--models stdlib-small ...] [--repeats 5] [--whole] [--out benchmarks/results]

Packed (model/packing.py), positions behind equal tokens run once, padding never, and the last block at the answers
alone; and candidates that differ from a circuit in one place run together from that place on. Both sides do the same
arithmetic on the same prompts and take turns in one process; figures are medians of processor time, ratios medians of
the ratios within a repeat, on one thread. Differences are the largest between gradients of a first step, and between
divergences. `--whole` also times whole searches by `find_circuit` (minutes each).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from abs_topk import machine

import sparse_interp as si
from sparse_interp.interventions.ablation import less
from sparse_interp.interventions.answers import all_answer_logits, frozen
from sparse_interp.interventions.connections import Connections
from sparse_interp.interventions.edge_gates import EdgeGates
from sparse_interp.interventions.edges import EdgeUnits, edges_among, row_values
from sparse_interp.interventions.gates import NodeGates
from sparse_interp.interventions.pruning import _Search, _step
from sparse_interp.interventions.selection import EdgeCut, Selection, split_pairs
from sparse_interp.model.sites import NODE_SITES, Node, masks
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.model.zoo import means_of

TASK = "single_double_quote"
N_CANDIDATES = 48
"""Nodes and edges that are knocked out, evenly over the model."""

KNOCK_OUT_EVERY = 9


@contextmanager
def unpacked() -> Iterator[None]:
    """Inside the block prompts run as they are, and so candidates run one by one."""
    packable = HookedSparseTransformer.packable
    HookedSparseTransformer.packable = property(lambda model: False)
    try:
        yield
    finally:
        HookedSparseTransformer.packable = packable


def timed(side: Callable[[], object]) -> tuple[float, object]:
    """Milliseconds of processor time of one call, and what it returned."""
    began = time.process_time()
    found = side()
    return 1e3 * (time.process_time() - began), found


def stepping(model, pairs, gates) -> Callable[[], torch.Tensor]:
    """A function that takes one gate step and returns the first step's gradient."""
    batch, search = pairs.both_sides(), _Search(gates, 0, pairs.lengths)
    with evaluating(model):
        reference = all_answer_logits(model, batch)

    def step() -> torch.Tensor:
        with evaluating(model), frozen(model):
            _step(model, gates, [search], batch, reference, 0)
        return gates.gains[0].clone()

    return step


def spread(several: list, n: int) -> list:
    return several[:: max(1, len(several) // n)][:n]


def subjects(model) -> dict[str, tuple[Callable[[], Callable[[], object]], int]]:
    """For every part of a search how to make it, and how many units it does."""
    config, means = si.PruneConfig(), means_of(model)
    task = si.task(TASK, model.tokenizer)
    train, select = split_pairs(task, config, torch.Generator().manual_seed(0))
    selection, whole = Selection(model, select, means), {p: ~mask for p, mask in masks((), model.cfg).items()}
    draw = torch.Generator().manual_seed(1)
    kept = {place: torch.rand(len(mask), generator=draw) < 0.2 for place, mask in whole.items()}
    nodes = [Node(*place, int(i)) for place, mask in kept.items() for i in mask.nonzero().flatten()]
    edges = edges_among(model, kept)
    rows = {matrix: values.to(model.embed.W_E) for matrix, values in row_values(model, means).items()}
    cuts = [EdgeCut(m, tuple(mask.shape), *at, rows[m]) for m, mask in edges.items() for at in mask.nonzero().tolist()]
    units = EdgeUnits.of(model, whole, edges_among(model, whole), NODE_SITES)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def knocked_out(candidates: list) -> torch.Tensor:
        without: dict[int, list] = {}
        for layer, candidate in candidates:
            without.setdefault(layer, []).append(candidate)
        return torch.tensor(list(selection.knock_outs(kept, without, KNOCK_OUT_EVERY)))

    some_nodes = [(node.layer, less(kept, [node])) for node in spread(nodes, N_CANDIDATES)]
    some_cuts = [(cut.matrix.layer, cut) for cut in spread(cuts, N_CANDIDATES)]

    def edge_step() -> Callable[[], object]:
        connections = Connections(model, whole, units, NODE_SITES)
        return stepping(model, train, EdgeGates(model, means, connections, config, seeded()))

    return {
        "step on gates of nodes": (lambda: stepping(model, train, NodeGates(model, means, [config], [seeded()])), 1),
        "step on gates of edges": (edge_step, 1),
        "a candidate on all selection prompts": (lambda: lambda: selection.logits(kept), 1),
        "knock-out of a node": (lambda: lambda: knocked_out(some_nodes), len(some_nodes)),
        "cut of an edge": (lambda: lambda: knocked_out(some_cuts), len(some_cuts)),
    }


def row(name: str, part: str, make: Callable, n: int, repeats: int) -> dict[str, object]:
    """Both sides of one part."""
    new, old = make(), make()
    found = new()
    with unpacked():
        expected = old()
    times = []
    for _ in range(repeats):
        packed_ms = timed(new)[0] / n
        with unpacked():
            times.append((packed_ms, timed(old)[0] / n))
    return {
        "model": name,
        "part": part,
        "packed_ms": statistics.median(t for t, _ in times),
        "as_they_are_ms": statistics.median(t for _, t in times),
        "ratio": statistics.median(old / new for new, old in times),
        "largest_difference": float((found - expected).abs().max()),
        "largest_value": float(expected.abs().max()),
    }


def whole_search(name: str) -> dict[str, object]:
    """Seconds of a default search, and the circuit's size and agreement."""
    model = si.load(name)
    task, generator = si.task(TASK, model.tokenizer), torch.Generator().manual_seed(0)
    took, circuit = timed(lambda: si.find_circuit(model, task, generator=generator, progress=False))
    scores = circuit.scores.set_index("measure").value
    return {"model": name, "seconds": took / 1e3, "nodes": len(circuit.nodes), "kl": scores["KL(model || circuit)"]}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", default=["stdlib-small", "stdlib-small-dense"])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--whole", action="store_true")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows, whole = [], []
    for name in given.models:
        for part, (make, n) in subjects(si.load(name)).items():
            rows.append(found := row(name, part, make, n, given.repeats))
            print(
                f"{name:>20} {part:>38} {found['packed_ms']:8.1f} ms {found['as_they_are_ms']:8.1f} ms "
                f"{found['ratio']:6.2f}x  apart {found['largest_difference']:.1e} of {found['largest_value']:.1e}",
                flush=True,
            )
    for name in given.models if given.whole else ():
        whole.append(whole_search(name))
        print(whole[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "task": TASK, "repeats": given.repeats, "parts": rows, "whole": whole}
    partial = given.out / "search_speed.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(given.out / "search_speed.json")


if __name__ == "__main__":
    main()
