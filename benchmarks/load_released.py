"""Memory and seconds that loading takes: a checkpoint of csp_yolo2's shape, 419 million float32 parameters.

    python benchmarks/load_released.py [--layers 8] [--threads 2] [--out benchmarks/results]

The checkpoint is made of random numbers, in both of its released forms: `final_model.pt`, and `model.safetensors`. An
archive is read a first time, when it is converted, and once more, from its conversion. Every load has a process of its
own. Its peak is ru_maxrss at the end; the share of it that importing took is said beside it, and taken off in the
second ratio. Files lie in the page cache, as they do after a download.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "block_size": 1024, "vocab_size": 2048, "n_layer": 8, "n_head": 128, "d_head": 16, "d_model": 2048, "dropout": 0.0,
    "bias": True, "ln_bias": True, "rms_norm": True, "residual_activation_type": "identity", "activation_type": "gelu",
    "afrac": 0.25, "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q",
    "tied_unembed": False, "d_mlp": 8192, "enable_bigram_table": True, "learnable_bigram_table": True, "d_pos_emb": 32,
    "flash": True, "sink": True, "tokenizer_name": "tinypython_2k",
}  # fmt: skip

CHILD = """
import json, resource, sys, time
import sparse_interp as si
megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
imported = megabytes()
began = time.perf_counter()
model = si.load(sys.argv[1], **json.loads(sys.argv[2]))
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "imported_mb": imported,
    "peak_mb": megabytes(),
    "n_parameters": model.n_params_total,
    "n_stored": model.load_report.n_entries,
}))
"""


def tensors(config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict of random numbers, one in ten of them not zero."""
    d, vocab, flat, read = 2048, 2048, 2048, 2048 + 32
    shapes = {"final_logits_bias": (vocab,), "bigram_table": (vocab, vocab), "transformer.wte.weight": (vocab, d)}
    shapes |= {"transformer.wpe.weight": (1024, 32), "transformer.ln_f.weight": (d,), "lm_head.weight": (vocab, d)}
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.ln_1.weight": (d,), f"{block}.ln_2.weight": (d,), f"{block}.ln_p1.weight": (32,)}
        shapes |= {f"{block}.ln_p2.weight": (32,), f"{block}.attn.attn_imp.sink_logit": (128,)}
        shapes |= {f"{block}.attn.c_attn.weight": (3 * flat, read), f"{block}.attn.c_attn.bias": (3 * flat,)}
        shapes |= {f"{block}.attn.c_proj.weight": (d, flat), f"{block}.attn.c_proj.bias": (d,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (8192, read), f"{block}.mlp.c_fc.bias": (8192,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (d, 8192), f"{block}.mlp.c_proj.bias": (d,)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for tensor in made.values():
        if tensor.ndim == 2:
            tensor *= torch.rand(tensor.shape, generator=generator) < 0.1
    return made


def loaded(folder: Path, cache: Path, options: dict) -> dict:
    """What one load took, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(options)]
    environment = os.environ | {"SPARSE_INTERP_CACHE": str(cache), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def make(folder: Path, config: dict) -> None:
    """The checkpoint in both forms."""
    made = tensors(config, torch.Generator().manual_seed(0))
    for name in ("archive", "safetensors"):
        (folder / name).mkdir()
        (folder / name / "beeg_config.json").write_text(json.dumps(config))
    with (folder / "archive" / "final_model.pt").open("wb") as file:
        torch.save(made, file)
    save_file(made, folder / "safetensors" / "model.safetensors")


def rows(folder: Path, config: dict) -> list[dict]:
    """One row per way of loading."""
    maker = get_context("spawn").Process(target=make, args=(folder, config))  # a child's peak begins at its parent's
    maker.start()
    maker.join()
    ways = [
        ("model.safetensors", "safetensors", {}),
        ("final_model.pt, first time", "archive", {}),
        ("final_model.pt, from its conversion", "archive", {}),
        ("model.safetensors as bfloat16", "safetensors", {"dtype": "bfloat16"}),
    ]
    found = []
    for name, form, options in ways:
        size = max(path.stat().st_size for path in (folder / form).iterdir()) / 2**20
        row = {"file": name, "file_mb": size} | loaded(folder / form, folder / "cache", options)
        row["peak_per_file"] = row["peak_mb"] / size
        row["peak_less_imports_per_file"] = (row["peak_mb"] - row["imported_mb"]) / size
        found.append(row)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=8, help="fewer make a smaller checkpoint")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder), CONFIG | {"n_layer": given.layers})
    for row in found:
        print(
            f"{row['file']:36} {row['file_mb']:6.0f} MB  {row['seconds']:5.1f} s  peak {row['peak_mb']:6.0f} MB "
            f"(imports {row['imported_mb']:.0f})  {row['peak_per_file']:.2f} of the file, "
            f"{row['peak_less_imports_per_file']:.2f} without imports"
        )
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "platform": platform.platform()}
    machine["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "load_released.json").write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
