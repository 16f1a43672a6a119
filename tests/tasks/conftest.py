"""Three tokenizers: the one that is shipped, one that splits otherwise, and one that knows single bytes only."""

import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_interp.data_files import data_folder
from sparse_interp.tokenizer import load_tokenizer


def trained(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level pieces, split otherwise than the shipped ones; pad, bos and eos are three tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_path("stdlib"))
    bpe.train([str(library / name) for name in ("argparse.py", "inspect.py", "tarfile.py", "json/decoder.py")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(data_folder() / "tokenizers" / "python_2k")


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    """600 pieces."""
    return trained(600)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A piece per byte."""
    return trained(259)


@pytest.fixture
def seeded():
    """`seeded(seed)`: a generator of its own."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
