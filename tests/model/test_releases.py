"""The names that were published, and where their files lie."""

import pytest

from sparse_interp.errors import ConfigError
from sparse_interp.model.releases import ALIASES, HUB_TWIN, RELEASES, SINGLE, CircuitName, PublishedFile


def test_every_published_name_is_known():
    assert len(SINGLE) == 7 and len(RELEASES) == 7 + 125
    assert RELEASES["openai/csp_sweep1_16x_14.8Mnonzero_afrac1.000"].d_model == 4096
    assert RELEASES["openai/csp_sweep1_1x_0.9Mnonzero_afrac0.062"].d_model == 256
    assert all(name == release.name for name, release in RELEASES.items())
    assert all(name in RELEASES and alias not in RELEASES for alias, name in ALIASES.items())
    assert HUB_TWIN in RELEASES


def test_a_model_is_two_files_and_what_is_known_of_them():
    config, weights = RELEASES["openai/csp_yolo2"].files
    assert config == PublishedFile("models/csp_yolo2/beeg_config.json", 823, "a80b49d2")
    assert (weights.path, weights.size, len(weights.sha256)) == ("models/csp_yolo2/final_model.pt", 1_676_532_054, 64)
    assert RELEASES["openai/dense1_4x"].files[1] == PublishedFile("models/dense1_4x/final_model.pt")


def test_a_circuit_is_known_by_its_path_and_back():
    circuit = CircuitName("csp_yolo2", "bracket_counting_beeg", "prune_v4", "k_optim")
    assert circuit.file.path == "viz/csp_yolo2/bracket_counting_beeg/prune_v4/k_optim/viz_data.pt"
    assert circuit.means.path == "viz/csp_yolo2/mean_baseline_pretrain.pt"
    assert CircuitName.of_path(circuit.file.path) == circuit
    assert CircuitName.of_path(circuit.means.path) is None
    assert CircuitName.of_path("models/csp_yolo2/x/y/z/viz_data.pt") is None
    assert CircuitName.folder("csp_yolo2") == "viz/csp_yolo2/"


@pytest.mark.parametrize("part", ["", "..", "a/b", ".hidden", "a b", "a?b"])
def test_a_part_that_could_lead_elsewhere_is_no_name(part):
    with pytest.raises(ConfigError, match="task=.* is no name; a circuit is named by its model, task, sweep and k"):
        CircuitName("csp_yolo2", part, "prune_v4", "17").check()
    with pytest.raises(ConfigError, match="model=.* is no name"):
        CircuitName.folder(part)
