"""What precision costs: golden numbers of released-form models, and the same models in float64, float32 and bfloat16.

    python benchmarks/released_dtypes.py [--fixtures ../shared/fixtures/openai] [--out benchmarks/results]

Errors are the largest differences from what the released code computed in float32: of logits, of the mean cross-entropy
in nats, of the activations at every hook, and of the logits after some channels were held. A flip is an activation, of
all that AbsTopK decides on, that is zero here and not there or the other way round: rounding turned a near-tie over,
and from there two computations part ways.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import sparse_interp as si
from sparse_interp.model.released import hook_of

AFTER = {
    "attn_in": "attn.act_in",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_out": "attn.resid_delta",
    "mlp_in": "mlp.act_in",
    "mlp_neuron": "mlp.post_act",
    "mlp_out": "mlp.resid_delta",
}
"""Place of AbsTopK -> hook at which its zeros are seen."""


def cut_hooks(config: dict) -> list[str]:
    """Hooks of the released code at which AbsTopK decides what is zero."""
    if config.get("afrac") is None:
        return []
    places = config.get("afrac_loctypes", "attn_in,attn_out,mlp_in,mlp_out").split(",")
    return [f"{layer}.{AFTER[place]}" for layer in range(config["n_layer"]) for place in places if place in AFTER]


def error(found: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest difference."""
    return float((found.double() - golden.double()).abs().max())


def held_logits(model: si.HookedSparseTransformer, golden: dict) -> torch.Tensor:
    """Logits with the channels held that the golden numbers hold."""

    def holding(channels: torch.Tensor, values: torch.Tensor):
        def hook(activation, hook):
            flat = activation.flatten(2).clone()
            flat[:, :, channels] = values[channels].to(flat)
            return flat.view_as(activation)

        return hook

    names = [key.removeprefix("ablate.").removesuffix(".channels") for key in golden if key.endswith(".channels")]
    held = [
        (
            hook_of(name, model.cfg.n_layers),
            holding(golden[f"ablate.{name}.channels"], golden[f"ablate.{name}.values"]),
        )
        for name in names
    ]
    return model.run_with_hooks(golden["tokens"], fwd_hooks=held)


@torch.no_grad()
def row(folder: Path, dtype: str) -> dict:
    """One model in one precision."""
    config = json.loads((folder / "beeg_config.json").read_text())
    golden, model = load_file(folder / "io.safetensors"), si.load(folder, dtype=dtype)
    logits, seen = model.run_with_cache(golden["tokens"])
    names = cut_hooks(config)
    hooks = [key.removeprefix("act.") for key in golden if key.startswith("act.")]
    found = {name: seen[hook_of(name, model.cfg.n_layers)].flatten(2) for name in hooks}
    loss = cross_entropy(logits.double().flatten(0, 1), golden["targets"].flatten(), ignore_index=-1)
    return {
        "model": folder.name,
        "dtype": dtype,
        "abs_topk": bool(names) or "resid_post" in config.get("afrac_loctypes", ""),
        "logit_error": max(error(logits, golden["logits"]), error(model(golden["tokens_full"]), golden["logits_full"])),
        "activation_error": max(error(found[name], golden[f"act.{name}"]) for name in hooks),
        "held_error": error(held_logits(model, golden), golden["ablated_logits"]),
        "largest_logit": float(golden["logits"].abs().max()),
        "loss_error": abs(float(loss) - float(golden["loss"])),
        "flips": sum(int(((found[name] == 0) != (golden[f"act.{name}"] == 0)).sum()) for name in names),
        "decided": sum(golden[f"act.{name}"].numel() for name in names),
    }


def table(rows: list[dict]) -> str:
    """In Markdown, one line per model, and for each precision the errors of logits and loss."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    heads = ["model", *(f"{d}: {what}" for what in ("logits", "loss") for d in dtypes), "flips", "decisions"]
    lines = [heads, ["---"] * len(heads)]
    groups = {r["model"]: [r["model"]] for r in rows}
    for kept, title in ((True, "the {} with AbsTopK"), (False, "the {} without")):
        names = list(dict.fromkeys(r["model"] for r in rows if r["abs_topk"] == kept))
        groups[title.format(len(names))] = names
    for title, names in groups.items():
        per_dtype = [[r for r in rows if r["model"] in names and r["dtype"] == d] for d in dtypes]
        worst = [max(r[key] for r in some) for key in ("logit_error", "loss_error") for some in per_dtype]
        flips = ", ".join(str(sum(r["flips"] for r in some)) for some in per_dtype)
        decided = sum(r["decided"] for r in per_dtype[0])
        lines.append([title, *(f"{w:.0e}" for w in worst), *((flips, f"{decided:,}") if decided else ("", ""))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "fixtures" / "openai"
    options.add_argument("--fixtures", type=Path, default=shared)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    folders = sorted(path.parent for path in given.fixtures.glob("*variants/**/beeg_config.json"))
    if not folders:
        print(f"no golden models in {given.fixtures}; name their folder with --fixtures")
        return
    rows = [row(folder, dtype) for dtype in ("float64", "float32", "bfloat16") for folder in folders]
    print(table(rows))
    for dtype in ("float64", "float32"):
        some = [r for r in rows if r["dtype"] == dtype]
        worst = {key: max(r[key] for r in some) for key in some[0] if key.endswith("_error")}
        print(f"{dtype}, largest of all:", ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    found = {"torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "released_dtypes.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
