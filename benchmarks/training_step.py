"""One training step at 4 layers x 256, batch 16 x 128, density 1/64: written naively, and as shipped.

    python benchmarks/training_step.py [--repeats 9] [--threads 2] [--out benchmarks/results]

Naive: float32, AbsTopK through torch.topk, the sink as one more column of every attention matrix, a log-softmax over
a dense [batch * pos, d_vocab] with the bigram table's rows added, AdamW unfused, projection by sorting. It is built
from the references that stand beside each fast kernel, so it computes the same function: the losses of the first step
are compared; the bigram table is frozen in both. Shipped: what `sparse-interp train` runs (bf16 autocast, fast
kernels). Steps of the two take turns; figures are medians. Times mean most with OMP_WAIT_POLICY=passive
GOMP_SPINCOUNT=0.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from abs_topk import machine

from sparse_interp.cli import keep_freed_memory
from sparse_interp.model import kernels, layers, transformer
from sparse_interp.training import optimizer, sparsity
from sparse_interp.training.loop import Trainer
from sparse_interp.training.recipes import RunConfig, recipe, replace_model
from sparse_interp.training.text import TrainingText

N_LAYERS, D_MODEL, BATCH, N_CTX, DENSITY = 4, 256, 16, 128, 1 / 64
N_STEPS = 1_000_000  # so many that the learning rate and the density stand still while we measure


def run_config(precision: str) -> RunConfig:
    run = recipe("stdlib-small")
    model = replace_model(
        run.model,
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        d_mlp=4 * D_MODEL,
        n_heads=D_MODEL // 16,
        n_ctx=N_CTX,
        density=DENSITY,
    )
    return replace(
        run,
        name=precision,
        model=model,
        batch_size=BATCH,
        n_tokens=N_STEPS * BATCH * N_CTX,
        precision=precision,
        validate_every=10**9,
    )


def random_text() -> TrainingText:
    """Tokens of no meaning: a step costs the same on any."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(2000, (400_000,), generator=generator).to(torch.uint16)
    table = torch.randn(2048, 2048, generator=generator) * (torch.rand(2048, 2048, generator=generator) < 0.2)
    return TrainingText(stream=stream, validation=stream[:N_CTX].long()[None], bos=2047, bigram_table=table)


def attention_with_a_sink_column(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Scores [batch head query key], one column more for the sink, softmax, and the column dropped."""
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
        ~kernels.causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf
    )
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([column, scores], -1).softmax(-1)[..., 1:] @ v


def rms_norm(x: torch.Tensor, shape: torch.Size, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def naive_kernels() -> ExitStack:
    """While it is open, every kernel is its plain version."""
    stack = ExitStack()
    for module, name, plain in (
        (layers, "abs_topk", kernels.abs_topk_reference),
        (layers, "sink_attention", attention_with_a_sink_column),
        (transformer, "next_token_loss", kernels.next_token_loss_reference),
        (sparsity, "keep_largest_mask", kernels.keep_largest_mask_reference),
        (torch.nn.functional, "rms_norm", rms_norm),
    ):
        stack.enter_context(patch.object(module, name, plain))
    return stack


def unfused(trainer: Trainer) -> Trainer:
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in trainer.optimizer.param_groups]
    run = trainer.run
    trainer.optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=run.betas, eps=run.eps, fused=False, foreach=False)
    return trainer


def measure(repeats: int) -> dict[str, object]:
    """Milliseconds per step of both, taking turns."""
    text = random_text()
    shipped = Trainer(run_config("bf16"), text)
    with naive_kernels():
        naive = unfused(Trainer(run_config("fp32"), text))
    times: dict[str, list[float]] = {"naive": [], "shipped": []}
    first: dict[str, float] = {}
    with patch.object(optimizer, "density_at", lambda *_, **__: DENSITY):
        for repeat in range(-2, repeats):
            for name, trainer in (("naive", naive), ("shipped", shipped)):
                with naive_kernels() if name == "naive" else ExitStack():
                    began = time.perf_counter()
                    record = trainer.step()
                    elapsed = 1e3 * (time.perf_counter() - began)
                first.setdefault(name, record.loss)
                if repeat >= 0:
                    times[name].append(elapsed)
    assert abs(first["naive"] - first["shipped"]) < 0.01 * first["naive"], first
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "naive_ms": median["naive"],
        "shipped_ms": median["shipped"],
        "naive_tokens_per_s": BATCH * N_CTX * 1e3 / median["naive"],
        "shipped_tokens_per_s": BATCH * N_CTX * 1e3 / median["shipped"],
        "ratio": statistics.median(a / b for a, b in zip(times["naive"], times["shipped"], strict=True)),
        "first_loss": first,
        "all_ms": times,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    keep_freed_memory()
    if given.threads:
        torch.set_num_threads(given.threads)
    result = measure(given.repeats)
    print(f"{N_LAYERS} layers x {D_MODEL}, batch {BATCH} x {N_CTX}, density 1/{round(1 / DENSITY)}")
    for name in ("naive", "shipped"):
        print(f"{name:>8}: {result[f'{name}_ms']:7.0f} ms per step, {result[f'{name}_tokens_per_s']:7,.0f} tokens/s")
    print(f"   ratio: {result['ratio']:.1f}x")
    given.out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "repeats": given.repeats, **result}
    (given.out / "training_step.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
