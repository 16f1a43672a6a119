"""What a step of bridge training costs at 2, 4 and 8 layers: entering at two pairs of sites, or at all of them.

    python benchmarks/bridge_step.py [--repeats 7] [--out benchmarks/results]

A pass that is entered at a site costs what lies behind it, so entering at all 2 L + 1 pairs costs as the square of the
depth and entering at a fixed number of them as the depth. Both models stay as they are: the sparse one has 64 channels
and AbsTopK at the eight sites, the dense one 32. Steps of all six kinds take turns; figures are medians and their
ratios, in milliseconds of processor time on one thread, which other work on the machine changes little.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from abs_topk import machine

from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.bridges.training import BridgeTrainer
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.transformer import HookedSparseTransformer

DEPTHS, BATCH, N_CTX, D_VOCAB = (2, 4, 8), 4, 64, 512
ENTRIES = {"two": 2, "all": None}


def model(n_layers: int, d_model: int, afrac: float | None) -> HookedSparseTransformer:
    """A model with initial weights: a step costs the same with any."""
    shape = {"n_layers": n_layers, "d_model": d_model, "d_head": 16, "d_vocab": D_VOCAB, "n_ctx": N_CTX}
    return HookedSparseTransformer(ModelConfig(**shape, d_mlp=4 * d_model, afrac=afrac, seed=0))


def trainers() -> dict[tuple[int, str], BridgeTrainer]:
    """One for every depth and number of entries."""
    blocks = torch.randint(D_VOCAB, (64, N_CTX), generator=torch.Generator().manual_seed(0))
    found = {}
    for n_layers in DEPTHS:
        pair = model(n_layers, 64, 0.25), model(n_layers, 32, None)
        for name, entries in ENTRIES.items():
            config = BridgeConfig(batch_size=BATCH, entries_per_step=entries, validate_every=10**9, n_steps=10**6)
            found[n_layers, name] = BridgeTrainer(*pair, blocks, config)
    return found


def measure(repeats: int) -> list[dict[str, float]]:
    """A row for every depth."""
    found = trainers()
    times: dict[tuple[int, str], list[float]] = {key: [] for key in found}
    for repeat in range(-1, repeats):
        for key, trainer in found.items():
            began = time.process_time()
            trainer.step()
            if repeat >= 0:
                times[key].append(1e3 * (time.process_time() - began))
    median = {key: statistics.median(t) for key, t in times.items()}
    return [
        {
            "n_layers": n_layers,
            "two_entries_ms": median[n_layers, "two"],
            "all_entries_ms": median[n_layers, "all"],
            "all_over_two": median[n_layers, "all"] / median[n_layers, "two"],
            "two_over_two_layers": median[n_layers, "two"] / median[DEPTHS[0], "two"],
            "all_over_two_layers": median[n_layers, "all"] / median[DEPTHS[0], "all"],
        }
        for n_layers in DEPTHS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.repeats)
    shape = {"batch": BATCH, "n_ctx": N_CTX, "d_vocab": D_VOCAB, "d_sparse": 64, "d_dense": 32}
    result = {"machine": machine(), "repeats": given.repeats, **shape, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bridge_step.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'layers':>6} {'two entries':>12} {'all entries':>12} {'ratio':>6}")
    for row in rows:
        times = f"{row['two_entries_ms']:9.1f} ms {row['all_entries_ms']:9.1f} ms"
        print(f"{row['n_layers']:>6} {times} {row['all_over_two']:6.2f}")


if __name__ == "__main__":
    main()
