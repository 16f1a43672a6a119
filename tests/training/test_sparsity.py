"""The density falls as written, and the projection keeps what a sort would keep, floors included."""

import math
from itertools import pairwise

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.training.sparsity import (
    density_at,
    floor_for,
    low_floor_matrices,
    project_,
    sparse_matrices,
    sparsity_report,
)


def model(**changes) -> HookedSparseTransformer:
    shape = {"n_layers": 1, "d_model": 12, "d_head": 4, "n_heads": 2, "d_mlp": 20, "n_ctx": 8, "d_vocab": 30, "seed": 0}
    return HookedSparseTransformer(ModelConfig(**{**shape, **changes}))


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_density_is_1_before_the_anneal_and_the_target_from_its_end(schedule):
    at = [
        density_at(s, n_steps=100, final_density=0.05, schedule=schedule, begin_frac=0.1, end_frac=0.5)
        for s in range(100)
    ]
    assert at[:11] == [1.0] * 11
    assert at[50:] == pytest.approx([0.05] * 50)
    assert all(a > b for a, b in pairwise(at[10:51]))


def test_an_exponential_anneal_falls_by_equal_ratios_and_a_linear_one_by_equal_differences():
    def half_way(schedule):
        return density_at(50, n_steps=100, final_density=0.04, schedule=schedule, begin_frac=0.0, end_frac=1.0)

    assert half_way("exponential") == pytest.approx(math.sqrt(0.04))
    assert half_way("linear") == pytest.approx(0.52)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "cosine"}, "'cosine'; choose 'exponential' or 'linear'"),
        ({"final_density": 0.0}, "density=0.0 is not a share in (0, 1]"),
        ({"begin_frac": 0.5}, "give a later end"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError) as refused:
        density_at(1, **{"n_steps": 10, "final_density": 0.1, **changes})
    assert words in str(refused.value)


def naive_mask(weight: torch.Tensor, k: int, floor: int) -> torch.Tensor:
    """The floor's largest of each row and of each column, then the largest of the rest, by sorting lists."""
    rows, columns = weight.shape
    size = weight.abs().tolist()
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    largest = lambda some: sorted(some, key=lambda cell: -size[cell[0]][cell[1]])
    kept = {cell for i in range(rows) for cell in largest([c for c in cells if c[0] == i])[:floor]}
    kept |= {cell for j in range(columns) for cell in largest([c for c in cells if c[1] == j])[:floor]}
    kept |= set(largest([c for c in cells if c not in kept])[: k - len(kept)])
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for cell in kept:
        mask[cell] = True
    return mask


def by_input_and_output(matrix) -> torch.Tensor:
    """Rows are what the matrix reads, columns what it writes; written out, not taken from the source."""
    if matrix.name.endswith("W_O"):
        return torch.cat([matrix.parts[0][head] for head in range(matrix.parts[0].shape[0])])
    if matrix.parts[0].ndim == 3:
        return torch.cat([torch.cat([part[head] for head in range(part.shape[0])], 1) for part in matrix.parts])
    return torch.cat(list(matrix.parts))


@pytest.mark.parametrize("density", [0.9, 0.4, 0.15, 0.02])
@pytest.mark.parametrize("shape", [{}, {"positions": "concat", "d_pos_emb": 4}, {"tie_unembed": True}])
def test_projection_keeps_what_a_sort_would_keep_in_every_matrix(density, shape):
    projected = model(**shape)
    before = {m.name: by_input_and_output(m).clone() for m in sparse_matrices(projected)}
    project_(projected, density)
    for matrix in sparse_matrices(projected):
        weight = before[matrix.name]
        k = max(1, round(density * weight.numel()))
        expected = weight * naive_mask(weight, k, floor_for(*weight.shape, k))
        assert torch.equal(by_input_and_output(matrix), expected), matrix.name
        assert int((by_input_and_output(matrix) != 0).sum()) == k


def test_every_row_and_column_keeps_the_floor_where_the_budget_allows_it():
    projected = model()
    project_(projected, 0.6)
    for matrix in sparse_matrices(projected):
        weight = by_input_and_output(matrix)
        floor = floor_for(*weight.shape, round(0.6 * weight.numel()))
        assert floor >= 2
        assert int((weight != 0).sum(0).min()) >= floor and int((weight != 0).sum(1).min()) >= floor


def test_density_1_touches_nothing_and_norms_biases_and_sinks_are_never_touched():
    projected = model()
    with torch.no_grad():
        for parameter in projected.parameters():
            parameter.add_(0.01)
    before = {name: p.clone() for name, p in projected.named_parameters()}
    project_(projected, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in projected.named_parameters())
    project_(projected, 0.1)
    changed = {name for name, p in projected.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in before if n.split(".")[-1].startswith("W_") and n != "pos_embed.W_pos"}


def test_low_floors_are_named_with_what_they_are_instead():
    assert low_floor_matrices(model(d_model=64, d_mlp=64, n_heads=16, d_vocab=64), 0.9) == {}
    low = low_floor_matrices(model(), 0.05)
    assert low["0.attn.W_Q"] == 0 and set(low) == {m.name for m in sparse_matrices(model())}


def test_the_report_counts_non_zeros_and_dead_rows_and_columns():
    reported = model()
    with torch.no_grad():
        reported.blocks[0].mlp.W_in.zero_()
        reported.blocks[0].mlp.W_in[2, 3] = 1.0
    (row,) = [r for r in sparsity_report(reported) if r.name == "0.mlp.W_in"]
    assert (row.nonzero, row.size, row.dead_rows, row.dead_columns) == (1, 240, 11, 19)
