"""Generation with keys and values kept, against reading the whole text at every step.

    python benchmarks/generate.py [--repeats 3] [--threads 2] [--out benchmarks/results]

The bundled model, with one text and with eight, and a model of 4 layers x 256 with random weights, of which every 64th
is not zero. A prompt of 16 tokens is continued greedily to the end of the context. The two sides take turns, figures
are medians and ratios medians of the ratios within a repeat. In float64 both sides must choose the same tokens, and
their logits' largest difference is reported. In float32, where the times are taken, a near-tie in AbsTopK may fall to
either side of its cut, and texts then part: the share of equal tokens is reported. Times mean most with
OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0.
"""

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from abs_topk import interleaved, machine

import sparse_interp as si
from sparse_interp.training.sparsity import project_

N_PROMPT = 16


def large_model() -> si.HookedSparseTransformer:
    """Random weights: a step costs the same whatever they are."""
    cfg = si.ModelConfig(
        d_model=256, d_head=16, n_layers=4, d_vocab=2048, n_ctx=256, afrac=0.25, density=1 / 64, seed=0,
        initializer_range=0.2, model_name="4 layers x 256",
    )  # fmt: skip
    model = si.HookedSparseTransformer(cfg)
    project_(model, cfg.density)
    return model.eval()


def generated(model: si.HookedSparseTransformer, prompt: torch.Tensor, keep: bool) -> torch.Tensor:
    n_new = model.cfg.n_ctx - N_PROMPT
    quiet = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.generate(prompt, max_new_tokens=n_new, use_past_kv_cache=keep, **quiet)


def largest_difference(model: si.HookedSparseTransformer, prompt: torch.Tensor) -> float:
    """Of the two sides' logits in float64, over all steps; they must choose the same tokens."""
    model = copy.deepcopy(model).double()
    logits: list[list[torch.Tensor]] = []
    tokens = []
    for keep in (True, False):
        seen: list[torch.Tensor] = []
        hook = ("unembed.hook_out", lambda x, hook, seen=seen: seen.append(x[:, -1].clone()))
        with model.hooks(fwd_hooks=[hook]):
            tokens.append(generated(model, prompt, keep))
        logits.append(seen)
    assert torch.equal(*tokens), "the two sides chose different tokens"
    return max(float((a - b).abs().max()) for a, b in zip(*logits, strict=True))


def measure(model: si.HookedSparseTransformer, batch: int, repeats: int) -> dict[str, object]:
    """Milliseconds per new token of both sides, and how far their logits are apart."""
    prompt = torch.randint(2000, (batch, N_PROMPT), generator=torch.Generator().manual_seed(0))
    sides = {"kept": partial(generated, model, prompt, True), "anew": partial(generated, model, prompt, False)}
    equal = (sides["kept"]() == sides["anew"]())[:, N_PROMPT:].double().mean()
    times = interleaved(sides, repeats)
    n_new = model.cfg.n_ctx - N_PROMPT
    return {
        "model": model.cfg.model_name,
        "n_ctx": model.cfg.n_ctx,
        "batch": batch,
        "new_tokens": n_new,
        "kept_ms_per_token": statistics.median(times["kept"]) / n_new,
        "anew_ms_per_token": statistics.median(times["anew"]) / n_new,
        "ratio": statistics.median(b / a for a, b in zip(times["kept"], times["anew"], strict=True)),
        "equal_tokens_frac_float32": float(equal),
        "largest_logit_difference_float64": largest_difference(model, prompt),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    print(f"{'model':>16} {'batch':>5} {'new':>5} {'kept':>9} {'anew':>9} {'ratio':>6}  equal tokens  logits (float64)")
    for model, batches in ((si.load("stdlib-small"), (1, 8)), (large_model(), (1,))):
        for batch in batches:
            rows.append(row := measure(model, batch, given.repeats))
            print(
                f"{row['model']:>16} {batch:>5} {row['new_tokens']:>5} {row['kept_ms_per_token']:>6.2f} ms "
                f"{row['anew_ms_per_token']:>6.2f} ms {row['ratio']:>5.1f}x  "
                f"{row['equal_tokens_frac_float32']:>12.1%}  {row['largest_logit_difference_float64']:>16.1e}"
            )
    given.out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "repeats": given.repeats, "rows": rows}
    (given.out / "generate.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
