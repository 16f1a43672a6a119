"""A report counts what files store, and says in words what was done with it."""

import torch

from sparse_interp.model.load_report import LoadReport, rows_of
from sparse_interp.model.transformer import load

TENSORS = {
    "embed.W_E": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    "pos_embed.W_pos": torch.ones(3, 2),
    "blocks.0.attn.W_Q_pos": torch.zeros(1, 2, 2),
    "blocks.0.attn.b_Q": torch.ones(4),
    "bigram_table": torch.eye(2),
}


def report(**said):
    return LoadReport(rows_of(TENSORS), "m", "circuit_sparsity", **said)


def test_each_tensor_is_counted_and_matrices_apart_from_what_stays_dense():
    frame = report().frame.set_index("tensor")
    assert frame["n_nonzero"].tolist() == [1, 6, 0, 4, 2]
    assert (
        frame.loc["embed.W_E", "share_nonzero"] == 0.25 and frame.loc["blocks.0.attn.W_Q_pos", "shape"] == "1 x 2 x 2"
    )
    assert dict(frame["group"]) == {
        "embed.W_E": "sparse matrices",
        "pos_embed.W_pos": "dense rest",
        "blocks.0.attn.W_Q_pos": "sparse matrices",
        "blocks.0.attn.b_Q": "dense rest",
        "bigram_table": "bigram table",
    }
    assert (report().n_entries, report().n_nonzero) == (22, 13)


def test_in_words_it_names_what_was_read_assumed_ignored_and_folded():
    said = str(report(read={"a.pt": "5 tensors"}, assumed={"b": "zero"}, ignored={"c": "off"}, folded={"d": "gone"}))
    for line in ("read     a.pt: 5 tensors", "assumed  b: zero", "ignored  c: off", "folded   d: gone"):
        assert line in said
    assert "13 of 22 (59.09%) of all stored parameters" in said and "1 of 8 (12.50%) in the sparse matrices" in said


def test_a_loaded_model_of_ours_has_its_report(make_model, tmp_path):
    model = make_model(bias=True)
    found = load(model.save(tmp_path / "model")).load_report
    assert found.form == "sparse_interp" and set(found.read) == {"config.json", "weights.safetensors"}
    assert found.n_entries == sum(t.numel() for t in model.state_dict().values()) and not found.ignored
