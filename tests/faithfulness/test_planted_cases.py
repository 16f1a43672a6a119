"""The planted cases: named, the same on every board and every day, and between them all that the board is to have."""

import pytest
import torch

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.answer_files import load_truth, save_truth
from sparse_interp.faithfulness.ground_truth import ground_truth, ground_truths
from sparse_interp.faithfulness.planted_cases import COPIED, HOSTS, JOINED, VARIANTS, PlantedCase, planted_cases


def test_the_full_board_has_every_algorithm_in_every_size_and_the_default_board_is_part_of_it():
    default, full = planted_cases(), planted_cases("full")
    assert set(default) < set(full)
    for algorithm in (*ground_truths(), *JOINED, *COPIED):
        assert all(f"{algorithm}-{size}" in full for size in HOSTS)
    assert {*ground_truths(), *HOSTS, *filter(None, VARIANTS)} - name_parts(default) == {"opposed"}
    assert "opposed" in name_parts(full)


def name_parts(names):
    return {part for name in names for part in name.split("-")}


def test_the_default_board_has_redundant_and_joined_algorithms():
    parts = name_parts(planted_cases())
    assert parts & set(COPIED) and parts & set(JOINED)


def test_a_case_is_the_same_whenever_it_is_built_and_says_what_it_is():
    build = planted_cases()["backup-small"]
    one, other = build(), build()
    assert one.name == "backup-small" and "n_layers=3" in one.why
    assert one.nodes == other.nodes and one.repaired == other.repaired
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert PlantedCase("backup", "small", "dense").build().nodes != one.nodes


def test_a_case_has_the_shape_and_the_density_that_its_name_says():
    dense, sparse = PlantedCase("quote", "small", "dense").build(), PlantedCase("quote", "medium", "sparser").build()
    assert (dense.model.cfg.d_model, sparse.model.cfg.d_model) == (48, 64)
    (free,) = set(range(3)) - {node.layer for node in dense.nodes if node.site != "final_read"}
    assert (dense.model.layers[free].mlp.W_in != 0).float().mean() > 0.95
    assert (sparse.model.layers[free].mlp.W_in != 0).float().mean() < 0.05
    own = next(node.layer for node in sparse.nodes if node.site == "neuron")
    block = sparse.model.layers[own]
    assert (block.mlp.W_in != 0).any(0).sum() > 2 * ground_truth("quote").model.cfg.d_mlp  # distractors share the layer


def test_the_answer_key_is_part_of_the_file(tmp_path):
    truth = planted_cases()["bracket_depth-small-noise0.003"]()
    again = load_truth(save_truth(truth, tmp_path / "case").parent)
    assert (again.name, again.why, again.keys, again.channels) == (truth.name, truth.why, truth.keys, truth.channels)
    batch = truth.task.batch(4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(truth.model(batch.clean), again.model(batch.clean))


def test_an_unknown_board_is_refused():
    with pytest.raises(ConfigError, match="board='all'; expected 'default' or 'full'"):
        planted_cases("all")
