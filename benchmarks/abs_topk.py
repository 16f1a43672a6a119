"""AbsTopK against torch.topk: a quarter of each row kept, forward, and forward with backward.

    python benchmarks/abs_topk.py [--repeats 15] [--threads 2] [--out benchmarks/results]

The two sides and a plain copy take turns within each repeat, so a busy machine slows all alike; figures are medians,
ratios are medians of the ratios within a repeat. Times mean most with OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparse_interp.model.kernels import abs_topk, abs_topk_reference

SHAPES = ((2048, 256), (2048, 1024), (2048, 8192))
KEPT_FRAC = 0.25


def machine() -> dict[str, object]:
    """What the figures depend on besides the code."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "n_cpus": len(names) or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def interleaved(
    sides: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of each side, one run each per repeat, after two unmeasured ones."""
    for side in sides.values():
        side(), side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = clock()
            side()
            times[name].append(1e3 * (clock() - began))
    return times


def sides_for(x: torch.Tensor, k: int, backward: bool) -> dict[str, Callable[[], object]]:
    def both(select: Callable) -> Callable[[], object]:
        if not backward:
            return lambda: select(x, k)
        leaf = x.clone().requires_grad_()
        weights = torch.randn_like(x)

        def run() -> None:
            leaf.grad = None
            select(leaf, k).backward(weights)

        return run

    return {"torch.topk": both(abs_topk_reference), "ours": both(abs_topk), "copy": x.clone}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    rows = []
    print(f"{'shape':>14} {'dtype':>9} {'pass':>9} {'torch.topk ms':>14} {'ours ms':>9} {'copy ms':>9} {'ratio':>7}")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, generator=generator).to(dtype)
            k = int(KEPT_FRAC * shape[1])
            if dtype == torch.float32:
                assert torch.equal(abs_topk(x, k), abs_topk_reference(x, k))
            for backward in (False, True):
                times = interleaved(sides_for(x, k, backward), given.repeats)
                median = {name: statistics.median(t) for name, t in times.items()}
                ratio = statistics.median(a / b for a, b in zip(times["torch.topk"], times["ours"], strict=True))
                row = {
                    "shape": list(shape),
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "both" if backward else "forward",
                    "torch_topk_ms": median["torch.topk"],
                    "ours_ms": median["ours"],
                    "copy_ms": median["copy"],
                    "ratio": ratio,
                }
                rows.append(row)
                print(
                    f"{shape!s:>14} {row['dtype']:>9} {row['pass']:>9} {row['torch_topk_ms']:14.2f} "
                    f"{row['ours_ms']:9.2f} {row['copy_ms']:9.2f} {ratio:6.1f}x"
                )
    given.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "repeats": given.repeats, "kept_frac": KEPT_FRAC, "rows": rows}
    (given.out / "abs_topk.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
