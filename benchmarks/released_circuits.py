"""How far a released circuit's numbers are off when they are measured again.

    python benchmarks/released_circuits.py [--seeds 5] [--steps 200] [--out benchmarks/results]

First, payloads of random models of four kinds, every number of which the NumPy reference of the tests made in float64
from the published rules alone: read, run, compared. Then a circuit of the bundled sparse model, found on the quote task
without touching `final_read`: written in the released form, read back, run, compared. The published files themselves
need a network: `sparse-interp released openai/csp_yolo2 bracket_counting_beeg`.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.circuit.payload import Payload, read_means, read_payload
from sparse_interp.circuit.publishing import MEANS, PAYLOAD, publish_circuit
from sparse_interp.circuit.released import ReplayTable, answers_of_classes, released_circuit, replay
from sparse_interp.model.publishing import publish_model
from sparse_interp.model.sites import NODE_SITES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "model"))

from published_numpy import ANSWERS, random_payload
from released_numpy import random_weights

EIGHT = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"
KINDS = {
    "as csp_yolo1": {},
    "as csp_yolo2": {"afrac": 0.4, "afrac_loctypes": EIGHT, "sink": True, "d_pos_emb": 2},
    "AbsTopK at all ten places": {"afrac": 0.6, "afrac_loctypes": EIGHT + ",resid_post_attn,resid_post_mlp"},
    "LayerNorm, tied, relu stream": {"rms_norm": False, "tied_unembed": True, "residual_activation_type": "relu"},
}
SHAPE = {"block_size": 10, "vocab_size": 12, "n_layer": 2, "n_head": 2, "d_head": 2, "d_model": 6, "d_mlp": 7,
         "rms_norm": True, "tied_unembed": False, "enable_bigram_table": True}  # fmt: skip


def as_tensors(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: as_tensors(part) for key, part in value.items()}
    return type(value)(map(as_tensors, value)) if isinstance(value, list | tuple) else value


def made_by_the_reference(folder: Path, kind: str, seed: int) -> Payload:
    """Model, circuit and means of a random release, in `folder`."""
    rng, config = np.random.default_rng(seed), SHAPE | KINDS[kind]
    weights = random_weights(config, rng)
    payload, means = random_payload(rng, config, weights, share=0.8)
    folder.mkdir()
    (folder / "beeg_config.json").write_text(json.dumps(config))
    for name, content in {"final_model.pt": weights, PAYLOAD: payload, MEANS: means}.items():
        torch.save(as_tensors(content), folder / name)
    return read_payload(folder / PAYLOAD)


def row(what: str, tables: list[ReplayTable], seconds: float) -> dict:
    numbers = pd.concat([table.frame for table in tables])
    return {
        "what": what,
        "circuits": len(tables),
        "stored numbers": len(numbers),
        "worst loss, nats": max(table.largest("nats") for table in tables),
        "worst activation": max(table.largest("activation") for table in tables),
        "seconds": round(seconds, 1),
    }


def random_rows(n_seeds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            folders = [Path(place) / f"{kind} {seed}" for seed in range(n_seeds)]
            payloads = [made_by_the_reference(folder, kind, seed) for seed, folder in enumerate(folders)]
            for dtype in (torch.float64, torch.float32):
                began, tables = time.perf_counter(), []
                for folder, payload in zip(folders, payloads, strict=True):
                    model = si.load(folder, dtype=dtype)
                    circuit = released_circuit(model, payload, read_means(folder / MEANS))
                    answers = answers_of_classes(payload.samples, *ANSWERS)
                    tables.append(replay(model, circuit, payload, answers=answers, progress=False))
                name = f"{kind}, {str(dtype).removeprefix('torch.')}"
                rows.append(row(name, tables, time.perf_counter() - began))
    return rows


def row_of_ours(n_steps: int) -> dict:
    model, generator = si.load("stdlib-small"), torch.Generator().manual_seed(0)
    task = si.task("single_double_quote", model.tokenizer)
    config = si.PruneConfig(sites=NODE_SITES[:-1], n_steps=n_steps)
    circuit = si.find_circuit(model, task, config, generator=generator)
    last = si.mean_activations(model, si.validation_blocks("stdlib-small")[:64], sites=["final_resid"])
    pairs = task.batch(16, split="test", generator=generator)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = publish_model(model, Path(place) / "out")
        publish_circuit(circuit, model, pairs, folder, means=last)
        back, payload = si.load(folder), read_payload(folder / PAYLOAD)
        again = released_circuit(back, payload, read_means(folder / MEANS))
        both = torch.stack([pairs.answer, pairs.foil]).sort(0).values
        table = replay(back, again, payload, answers=both.flatten())
    name = f"stdlib-small, quote task, {again.n_nodes} nodes, {again.n_edges} edges"
    return row(name, [table], time.perf_counter() - began)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows = [*random_rows(given.seeds), row_of_ours(given.steps)]
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda number: f"{number:.2g}"))
    about = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.processor(),
             "torch": torch.__version__, "seeds": given.seeds, "steps": given.steps}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "released_circuits.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
