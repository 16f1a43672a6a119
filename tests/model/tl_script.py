"""One script for every TransformerLens that is supported: cache, patch and decompose a small sparse model.

    python tests/model/tl_script.py

Needs neither the network nor a trained model. Prints the versions and the largest error of each check, and exits with 1
if one is above its bound.
"""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

BOUND = 1e-5


def small_model():
    """Every mechanism at work, random biases, sinks and gains."""
    from sparse_interp.model.config import ModelConfig
    from sparse_interp.model.transformer import HookedSparseTransformer

    cfg = ModelConfig(
        d_model=24, d_head=4, n_layers=3, d_mlp=48, d_vocab=60, n_ctx=16, afrac=0.25, initializer_range=0.3, seed=0
    )
    model = HookedSparseTransformer(cfg)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=noise)
        model.bigram_table.normal_(generator=noise)
    return model.eval()


def patching_error(model, clean, corrupt, clean_cache) -> float:
    """TransformerLens' sweep over the stream against hooks written out here."""
    from transformer_lens import patching

    metric = lambda logits: logits[:, -1, 3].mean() - logits[:, -1, 4].mean()
    sweep = patching.get_act_patch_resid_pre(model, corrupt, clean_cache, metric)
    expected = torch.zeros_like(sweep)
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        for pos in range(clean.shape[1]):

            def patch(resid, hook, pos=pos, name=name):
                resid = resid.clone()
                resid[:, pos] = clean_cache[name][:, pos]
                return resid

            expected[layer, pos] = metric(model.run_with_hooks(corrupt, fwd_hooks=[(name, patch)]))
    whole = lambda resid, hook: clean_cache["blocks.0.hook_resid_pre"]
    restored = model.run_with_hooks(corrupt, fwd_hooks=[("blocks.0.hook_resid_pre", whole)])
    bigram = model.bigram_table[corrupt] - model.bigram_table[clean]  # the one path beside the stream
    return max(float((sweep - expected).abs().max()), float((restored - bigram - model(clean)).abs().max()))


def errors() -> dict[str, float]:
    """The largest error of every check."""
    model = small_model()
    tokens = torch.randint(60, (2, 4, 10), generator=torch.Generator().manual_seed(2))
    clean, corrupt = tokens
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
        found = {"run_with_cache against a plain run": float((logits - model(clean)).abs().max())}
        for layer in (0, 1, 2, 3):
            stream = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
            sums = {
                "decompose_resid": cache.decompose_resid(layer).sum(0),
                "full decomposition": cache.get_full_resid_decomposition(layer).sum(0),
            }
            if layer:
                sums["heads and remainder"] = cache.stack_head_results(layer, incl_remainder=True).sum(0)
                sums["neurons and remainder"] = cache.stack_neuron_results(layer, incl_remainder=True).sum(0)
            for name, total in sums.items():
                name = f"{name} against the stream"
                found[name] = max(found.get(name, 0.0), float((total - stream).abs().max()))
        found["resid-pre patching sweep against plain hooks"] = patching_error(model, clean, corrupt, cache)
    return found


def main() -> int:
    found = errors()
    lines = [f"transformer-lens {version('transformer-lens')}, torch {version('torch')}, bound {BOUND:g}"]
    lines += [f"  {error:.1e}  {name}" for name, error in found.items()]
    sys.stdout.write("\n".join([*lines, f"  {max(found.values()):.1e}  largest", ""]))
    return int(max(found.values()) > BOUND)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
