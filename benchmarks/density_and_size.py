"""What weights that may not be there cost: held-out loss against the share of them that is left, and against how many.

    python benchmarks/density_and_size.py [--width 32 64 128] [--density 1 0.25 0.0625 0.015625] [--tokens 600000]
                                          [--seed 0] [--runs out/density_and_size] [--plan | --collect]
                                          [--out benchmarks/results]

Models of two layers and several widths are trained by the ordinary trainer on the recipe of the bundled model, but for
16 blocks of 64 tokens a step, all on the same tokens of Python's standard library in the same order. A density is that
of the middle width; the others get as many non-zero weights, so that widths are compared at equal counts, and density 1
is all there are. Two models of one width differ in nothing but the density, and in what the recipe makes of it: the
learning rate follows.

The runs are short, a thousandth or less of what the method's authors train: they say how the loss falls with density
and size early on, not where it ends. Each run is a folder that is continued where it was stopped and not run again when
it is done; `--plan` says what is left, `--collect` trains nothing. The loss is that of held-out blocks; its interval is
that of the difference from the bigram table's loss on the same block, of 95 %, and draws blocks. One seed says nothing
of how much another would differ. Seconds are those of the run's own clock, on a machine that does other things.
"""

import argparse
import json
import platform
import sysconfig
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

import sparse_interp as si
from sparse_interp.cli import keep_freed_memory
from sparse_interp.model.checkpoint import bundled_tokenizer
from sparse_interp.results import bootstrap_interval, write_whole
from sparse_interp.training.loop import MODEL, claim_folder, train
from sparse_interp.training.recipes import RunConfig, recipe, replace_model
from sparse_interp.training.sparsity import sparse_matrices
from sparse_interp.training.text import TrainingText, folder_text

WIDTHS, DENSITIES = (32, 64, 128), (1.0, 1 / 4, 1 / 16, 1 / 64)
N_TOKENS, BATCH, N_CTX, D_HEAD = 600_000, 16, 64, 16


def shaped(width: int, density: float, n_tokens: int, seed: int) -> RunConfig:
    """The bundled model's recipe at another width and density."""
    run = recipe("stdlib-small")
    name = f"width-{width}-density-{density:.6g}-seed-{seed}"
    shape = {"d_model": width, "d_mlp": 4 * width, "n_heads": width // D_HEAD, "n_ctx": N_CTX}
    model = replace_model(run.model, model_name=name, density=density, seed=seed, **shape)
    return replace(run, name=name, model=model, n_tokens=n_tokens, seed=seed, batch_size=BATCH, checkpoint_every=100)


def n_weights(run: RunConfig) -> int:
    """Entries of the matrices that the density applies to."""
    matrices = sparse_matrices(si.HookedSparseTransformer(run.model))
    return sum(part.numel() for matrix in matrices for part in matrix.parts)


def runs(widths: list[int], densities: list[float], n_tokens: int, seed: int) -> list[RunConfig]:
    """Every run, the smallest first; a width too narrow for a count of weights is left out."""
    sizes = {width: n_weights(shaped(width, 1.0, n_tokens, seed)) for width in sorted(widths)}
    middle = sizes[sorted(widths)[len(widths) // 2]]
    chosen = [
        shaped(width, 1.0 if density == 1 else density * middle / size, n_tokens, seed)
        for density in densities
        for width, size in sizes.items()
        if density == 1 or density * middle < size
    ]
    return sorted(chosen, key=lambda run: run.model.d_model)


def read_text(run: RunConfig, cache: Path) -> TrainingText:
    """Python's standard library, 10 % of its files held out."""
    folder, name = Path(sysconfig.get_paths()["stdlib"]), run.model.tokenizer_name
    assert name is not None
    return folder_text(folder, name, run, cache, pattern="*.py")


def trained(run: RunConfig, text: TrainingText, folder: Path) -> si.HookedSparseTransformer:
    """The model of a run, which is made, or continued, if it is not there.

    Raises:
        CheckpointError: if the folder holds another run.
    """
    begun = (folder / "run.json").exists()
    claim_folder(folder, run, resume=begun)
    if not (folder / MODEL).exists():
        for _ in train(run, text, folder, resume=begun, tokenizer=bundled_tokenizer(run.model.tokenizer_name)):
            pass
    return si.load(folder / MODEL)


@torch.no_grad()
def block_losses(model: si.HookedSparseTransformer, blocks: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of each block, nats."""
    parts = [model(part, return_type="loss", loss_per_token=True).mean(1) for part in blocks.split(16)]
    return torch.cat(parts)


def table_loss(model: si.HookedSparseTransformer, blocks: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of the bigram table alone, nats."""
    return torch.nn.functional.cross_entropy(model.bigram_table[blocks[:, :-1]].flatten(0, 1), blocks[:, 1:].flatten())


def row_of(run: RunConfig, text: TrainingText, folder: Path) -> dict:
    """A run as a row of the table."""
    model = trained(run, text, folder)
    losses = block_losses(model, text.validation)
    alone = torch.stack([table_loss(model, block[None]) for block in text.validation])
    gain = bootstrap_interval(alone - losses, generator=torch.Generator().manual_seed(run.seed))
    bigram_loss = alone.mean().item()
    card = json.loads((folder / MODEL / "card.json").read_text())
    counts = card["parameters"]
    return {
        "width": run.model.d_model,
        "density": counts["sparse_matrices_nonzero"] / counts["sparse_matrices_entries"],
        "n_nonzero": counts["sparse_matrices_nonzero"],
        "n_weights": counts["sparse_matrices_entries"],
        "seed": run.seed,
        "n_tokens": card["n_tokens"],
        "loss_nats": bigram_loss - gain.mean,
        "low": bigram_loss - gain.high,
        "high": bigram_loss - gain.low,
        "n_blocks": len(losses),
        "n_ctx": run.model.n_ctx,
        "bigram_loss_nats": bigram_loss,
        "seconds": card["wall_time_s"],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--width", nargs="+", type=int, default=list(WIDTHS))
    arguments.add_argument("--density", nargs="+", type=float, default=list(DENSITIES), help="of the middle width")
    arguments.add_argument("--tokens", type=int, default=N_TOKENS)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--plan", action="store_true", help="say what is left to train; no more")
    arguments.add_argument("--collect", action="store_true", help="train nothing; write what is done")
    arguments.add_argument("--runs", type=Path, default=Path("out/density_and_size"))
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    every = runs(given.width, given.density, given.tokens, given.seed)
    done = [run for run in every if (given.runs / run.name / MODEL).exists()]
    if given.plan:
        for run in every:
            print("done " if run in done else "to do", run.name, f"{run.n_steps} steps")
        return
    text = read_text(every[0], given.runs / "text")
    rows = []
    for run in done if given.collect else every:
        rows.append(row_of(run, text, given.runs / run.name))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    if not rows:
        raise SystemExit(f"{given.runs} holds no finished run; train some first.")
    record = {
        "command": f"python benchmarks/density_and_size.py --tokens {given.tokens} --seed {given.seed}",
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seed": given.seed,
        "rows": rows,
    }
    write_whole(given.out / "density_and_size.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
