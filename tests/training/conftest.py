"""The smallest run in which everything happens: an anneal, measurements, several checkpoints, more than one epoch."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture
def small_run():
    """`small_run(**changes)`: 24 steps of 4 blocks of 16 tokens, dense enough for every floor."""

    def make(model=None, **changes):
        from sparse_interp.training.recipes import recipe, replace_model  # after the hook that checks annotations

        shape = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_mlp": 32, "n_ctx": 16, "d_vocab": 48, "density": 0.6}
        run = recipe("tiny")
        run = replace(run, name="small", model=replace_model(run.model, **shape | (model or {})))
        sizes = {"n_tokens": 24 * 4 * 16, "batch_size": 4, "validate_every": 6, "checkpoint_every": 6}
        return replace(run, **sizes | changes)

    return make


@pytest.fixture
def small_text(generator):
    """Repeated text: a fixed cycle of 40 tokens with a fresh start now and then, so that there is much to learn."""
    from sparse_interp.training.text import TrainingText

    cycle = torch.randperm(40, generator=generator)
    stream = torch.cat([cycle[torch.randint(40, (), generator=generator) :] for _ in range(60)])
    held_out = cycle.repeat(5)[: 8 * 15].view(8, 15)
    bos = torch.full((8, 1), 47)
    return TrainingText(stream=stream.to(torch.uint16), validation=torch.cat([bos, held_out], 1), bos=47)


@pytest.fixture
def source_files(tmp_path):
    """A folder of 40 small Python files that share hardly a line."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(40):
        body = [f"def scale_{i}_{j}(value):\n    return value * {i * 31 + j} + OFFSET_{i}[{j}]\n" for j in range(12)]
        (folder / f"module_{i}.py").write_text("\n".join(body))
    return folder
