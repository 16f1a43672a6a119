"""A circuit made compact, against its model running as it.

    python benchmarks/compact.py [--circuit FILE] [--repeats 15] [--out benchmarks/results]

The circuit is that of the demo, or the one that is named; where there is no such file it is found anew. Smaller ones
are the nodes of it that are needed most. Prompts are those of its task, held out, one and 32 at a time, and both sides
give the logits of every token. `running` hashes the model's weights each time its block is entered, so the block stays
open while it is timed. Times are processor time of one thread, which a busy machine stretches little. The two sides
take turns; times are medians, and so is the ratio within a repeat. In float64 the largest difference of a logit is
reported; in float32 the median over tokens, and the share of tokens that are off by more than 1e-5, because a near-tie
in AbsTopK fell to the other side or logits are large.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from abs_topk import interleaved, machine

import sparse_interp as si

SIZES = (300, 100, 30)
BATCHES = (1, 32)


def demo_circuit(path: Path, model: si.HookedSparseTransformer) -> si.Circuit:
    """The circuit in the file, or what the demo would leave there."""
    if path.exists():
        return si.Circuit.load(path, model)
    task = si.task("single_double_quote", model.tokenizer)
    means = si.baseline_means(model.cfg.model_name)
    generator = torch.Generator().manual_seed(0)
    return si.find_circuit(model, task, si.PruneConfig(), baseline=means, generator=generator)


def most_needed(circuit: si.Circuit, model: si.HookedSparseTransformer, n: int) -> si.Circuit:
    rows = circuit.nodes.nlargest(n, "importance_nats")[["layer", "site", "channel"]]
    nodes = [si.Node(int(layer), str(site), int(channel)) for layer, site, channel in rows.itertuples(index=False)]
    return si.Circuit.of_nodes(model, nodes, circuit.baseline)


def in_float64(circuit: si.Circuit, model: si.HookedSparseTransformer, tokens: torch.Tensor) -> float:
    """Largest difference of a logit."""
    exact = copy.deepcopy(model).double()
    values = {place: v.double() for place, v in circuit.baseline.values.items()}
    again = circuit.transplanted(exact, si.NodeValues(values, circuit.baseline.kind))
    with again.running(exact):
        expected = exact(tokens)
    return float((again.compact(exact)(tokens) - expected).abs().max())


@torch.no_grad()
def measure(circuit: si.Circuit, model: si.HookedSparseTransformer, tokens: torch.Tensor, repeats: int) -> dict:
    """Milliseconds of both sides, and how far their logits are apart."""
    compact = circuit.compact(model)
    with circuit.running(model):
        off = (compact(tokens) - model(tokens)).abs().amax(-1)
        sides = {"running": lambda: model(tokens), "compact": lambda: compact(tokens)}
        times = interleaved(sides, repeats, time.process_time)
    frame = compact.frame
    return {
        "n_nodes": circuit.n_nodes,
        "n_edges": circuit.n_edges,
        "batch": len(tokens),
        "tokens_per_prompt": tokens.shape[1],
        "weights_left_frac": float(frame.n_weights_left.sum() / frame.n_weights.sum()),
        "running_ms": statistics.median(times["running"]),
        "compact_ms": statistics.median(times["compact"]),
        "ratio": statistics.median(a / b for a, b in zip(times["running"], times["compact"], strict=True)),
        "largest_logit_difference_float64": in_float64(circuit, model, tokens),
        "median_logit_difference_float32": float(off.median()),
        "tokens_off_by_more_than_1e-5_frac": float((off > 1e-5).double().mean()),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--circuit", type=Path, default=Path("out/demo/circuit.json"))
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    torch.set_num_threads(1)
    model = si.load("stdlib-small")
    whole = demo_circuit(given.circuit, model)
    task = si.task(whole.task_name, model.tokenizer)
    rows = []
    print(
        f"{'nodes':>6} {'weights left':>12} {'batch':>5} {'running':>10} {'compact':>10} {'ratio':>6}  logits (float64)"
    )
    for circuit in (whole, *(most_needed(whole, model, n) for n in SIZES)):
        for batch in BATCHES:
            tokens = task.batch(batch, split="test", generator=torch.Generator().manual_seed(1)).clean
            rows.append(row := measure(circuit, model, tokens, given.repeats))
            print(
                f"{row['n_nodes']:>6} {row['weights_left_frac']:>12.1%} {batch:>5} {row['running_ms']:>7.2f} ms "
                f"{row['compact_ms']:>7.2f} ms {row['ratio']:>5.1f}x  {row['largest_logit_difference_float64']:>16.1e}"
            )
    given.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "repeats": given.repeats, "circuit": whole.task_name, "rows": rows}
    (given.out / "compact.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
