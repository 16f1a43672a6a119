"""A model with its answer key comes back as it was saved, and a key that is not the saved one does not."""

import json

import pytest
import torch

from sparse_interp.errors import CheckpointError
from sparse_interp.faithfulness.answer_files import ANSWER_KEY, load_truth, save_truth
from sparse_interp.faithfulness.ground_truth import ground_truth, logits_of


@pytest.fixture(scope="module")
def saved(joint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth") / "joined"
    save_truth(joint, folder)
    return joint, folder


def test_model_task_and_keys_come_back(saved):
    truth, folder = saved
    again = load_truth(folder)
    assert again.keys == truth.keys and len(again.keys) == 2
    assert (again.name, again.why, again.channels) == (truth.name, truth.why, truth.channels)
    assert again.repaired == truth.repaired and truth.repaired
    assert again.task.templates_sha256 == truth.task.templates_sha256
    for split in truth.task.splits:
        one, other = (t.task.batch(20, split, generator=torch.Generator().manual_seed(4)) for t in (truth, again))
        assert torch.equal(one.clean, other.clean) and torch.equal(one.answer, other.answer)
        assert torch.equal(logits_of(truth.model, one), logits_of(again.model, other))


def test_a_folder_that_holds_something_is_not_written_to(saved):
    truth, folder = saved
    with pytest.raises(CheckpointError, match="never overwritten"):
        save_truth(truth, folder)


def changed(folder, tmp_path, change):
    import shutil

    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def test_a_key_that_was_edited_is_refused(saved, tmp_path):
    def edit(copy):
        record = json.loads((copy / ANSWER_KEY).read_text())
        record["keys"][0]["nodes"].pop()
        (copy / ANSWER_KEY).write_text(json.dumps(record))

    with pytest.raises(CheckpointError, match="not what was saved"):
        load_truth(changed(saved[1], tmp_path, edit))


def test_a_key_beside_other_weights_is_refused(saved, tmp_path):
    other = ground_truth("quote").model.save(tmp_path / "other")
    (other / ANSWER_KEY).write_bytes((saved[1] / ANSWER_KEY).read_bytes())
    with pytest.raises(CheckpointError, match="is the key of other weights"):
        load_truth(other)


def test_a_model_without_a_key_and_a_key_of_another_format_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=f"{ANSWER_KEY} is missing"):
        load_truth(changed(saved[1], tmp_path, lambda copy: (copy / ANSWER_KEY).unlink()))
    (tmp_path / ANSWER_KEY).write_text('{"format_version": 9}')
    with pytest.raises(CheckpointError, match="format version 9"):
        load_truth(tmp_path)
