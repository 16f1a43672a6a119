"""Weight sparsity: after every optimizer step, keep only the largest weights of each matrix.

    W  <-  W * 1[ |W_ij| ranks among the  round(density * size)  largest ]

Gao et al. 2025 (arXiv 2511.13653): the same density for every matrix, at least j = 4 non-zero weights for every
neuron and channel. The paper protects rows and columns on top of the budget; here the floor is taken out of it, so
that the realised density is the target exactly:  floor = min(4, floor(k / (rows + columns))).
Gradients stay dense, and moments of the optimizer are not masked, so a weight can come back.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.errors import ConfigError
from sparse_interp.model.kernels import keep_largest_mask
from sparse_interp.model.transformer import HookedSparseTransformer

PAPER_FLOOR = 4
"""Non-zero weights that every neuron and channel keeps where the budget allows it, per matrix and side."""


def density_at(
    step: int,
    *,
    n_steps: int,
    final_density: float,
    schedule: str = "exponential",
    begin_frac: float = 0.01,
    end_frac: float = 0.5,
) -> float:
    """Share of weights allowed to be non-zero after `step`: 1 until `begin_frac` of training, final from `end_frac`.

    Between them, `linear` falls by equal differences and `exponential` by equal ratios, final_density ** progress.

    Raises:
        ConfigError: for a schedule of another name, a density outside (0, 1], or an anneal that ends before it begins.
    """
    if schedule not in ("linear", "exponential"):
        raise ConfigError(f"density schedule {schedule!r}; choose 'exponential' or 'linear'.")
    if not 0 < final_density <= 1:
        raise ConfigError(f"density={final_density} is not a share in (0, 1]; 0.05 keeps one weight in twenty.")
    if not begin_frac < end_frac:
        raise ConfigError(f"the density falls from {begin_frac} to {end_frac} of training; give a later end.")
    progress = (step / n_steps - begin_frac) / (end_frac - begin_frac)
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return 1 + (final_density - 1) * progress
    return final_density**progress


class Matrix(NamedTuple):
    """A weight matrix that training keeps sparse, and the parameters that it is made of."""

    name: str
    """TransformerLens name of its first parameter."""

    parts: tuple[Tensor, ...]
    """The parameters: one, or a read's residual and positional rows."""


def sparse_matrices(model: HookedSparseTransformer) -> list[Matrix]:
    """Every matrix that the density applies to: six per block, and both embeddings.

    Norm gains, biases, sinks, positions and the bigram table stay dense and are counted apart.
    """
    found = [Matrix("embed.W_E", (model.embed.W_E,))]
    if not model.cfg.tie_unembed:
        found.append(Matrix("unembed.W_U", (model.unembed.W_U,)))
    for layer, block in enumerate(model.layers):
        prefix = f"{layer}"
        for letter in "QKVO":
            names = [f"W_{letter}", f"W_{letter}_pos"]
            parts = tuple(getattr(block.attn, n) for n in names if hasattr(block.attn, n))
            found.append(Matrix(f"{prefix}.attn.W_{letter}", parts))
        reads = (block.mlp.W_in,) if block.mlp.W_in_pos is None else (block.mlp.W_in, block.mlp.W_in_pos)
        found.append(Matrix(f"{prefix}.mlp.W_in", reads))
        found.append(Matrix(f"{prefix}.mlp.W_out", (block.mlp.W_out,)))
    return found


def _joined(matrix: Matrix) -> Float[Tensor, "row column"]:
    """The matrix with inputs as rows and outputs as columns, heads side by side."""
    if matrix.name.endswith("W_O"):
        return matrix.parts[0].flatten(0, 1)
    flat = [p.permute(1, 0, 2).flatten(1) if p.ndim == 3 else p for p in matrix.parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def floor_for(rows: int, columns: int, k: int) -> int:
    """Non-zero weights that every row and column is sure of when a matrix keeps `k` entries."""
    return min(PAPER_FLOOR, k // (rows + columns))


@torch.no_grad()
def project_(model: HookedSparseTransformer, density: float) -> None:
    """Zero all but the largest `round(density * size)` entries of every sparse matrix, in place."""
    if density >= 1:
        return
    for matrix in sparse_matrices(model):
        joined = _joined(matrix)
        rows, columns = joined.shape
        k = max(1, round(density * rows * columns))
        keep = keep_largest_mask(joined, k, floor_for(rows, columns, k))
        if matrix.name.endswith("W_O"):
            matrix.parts[0].mul_(keep.view_as(matrix.parts[0]))
            continue
        for part, mask in zip(matrix.parts, keep.split([p.shape[-2] for p in matrix.parts]), strict=True):
            if part.ndim == 3:
                mask = mask.unflatten(1, (part.shape[0], part.shape[2])).permute(1, 0, 2)
            part.mul_(mask)


def low_floor_matrices(model: HookedSparseTransformer, density: float) -> dict[str, int]:
    """Matrices whose budget at `density` is too small for the paper's floor of 4, with the floor they get instead."""
    low = {}
    for matrix in sparse_matrices(model):
        rows, columns = _joined(matrix).shape
        floor = floor_for(rows, columns, max(1, round(density * rows * columns)))
        if floor < PAPER_FLOOR:
            low[matrix.name] = floor
    return low


class SparsityReport(NamedTuple):
    """How sparse a matrix is, and what is dead in it."""

    name: str
    size: int
    nonzero: int
    density: float
    dead_rows: int
    dead_columns: int


@torch.no_grad()
def sparsity_report(model: HookedSparseTransformer) -> list[SparsityReport]:
    """One row per sparse matrix: entries, non-zeros, and rows (inputs) and columns (outputs) with no weight at all."""
    rows = []
    for matrix in sparse_matrices(model):
        nonzero = _joined(matrix) != 0
        total = int(nonzero.sum())
        rows.append(
            SparsityReport(
                matrix.name,
                nonzero.numel(),
                total,
                total / nonzero.numel(),
                int((~nonzero.any(1)).sum()),
                int((~nonzero.any(0)).sum()),
            )
        )
    return rows


def lr_multiplier(density: float) -> float:
    """1 / sqrt(density): the fewer weights take part, the larger their steps (released code)."""
    return 1 / math.sqrt(density)
