"""A name or a folder -> a model, in eval mode: `from_pretrained`, as TransformerLens users know it.

    name or path  ->  folder (model/zoo.py)  ->  shape, tensors, tokenizer (model/checkpoint.py)  ->  model

The model is built without memory for its weights, and each stored tensor then becomes a weight as it is: nothing is
drawn at random, and nothing is held twice.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import read_model

M = TypeVar("M", bound="Loading")


class Loading:
    """Loading, for a model that is built from a `ModelConfig` and a tokenizer."""

    @classmethod
    def from_pretrained(cls: type[M], name_or_path: str | Path, **options: Any) -> M:
        """The model called `name_or_path`, or saved in that folder; in eval mode, on the CPU.

        Raises:
            ConfigError: for a name that no model has, with the nearest ones.
            CheckpointError: if the folder holds no model, or a damaged one.
        """
        return cls.load(zoo.model_folder(name_or_path), **options)

    @classmethod
    def load(cls: type[M], folder: Path | str) -> M:
        """The model in `folder`, in eval mode on the CPU; torch's random state is left alone.

        Raises:
            CheckpointError: if the folder holds no model, or one that is damaged or incomplete.
            ConfigError: for an unknown field, naming the nearest one, or a shape that describes no model.
            TokenizerError: if the tokenizer is not the one that the model was saved with.
        """
        cfg, tensors, tokenizer = read_model(Path(folder))
        cfg.device = "meta"
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = cls(cfg, tokenizer)  # pyright: ignore[reportCallIssue]
        assert isinstance(model, nn.Module)
        model.load_state_dict(tensors, assign=True)
        return model.to("cpu").eval()
