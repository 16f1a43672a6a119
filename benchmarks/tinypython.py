"""The published tokenizer on real text: 1,000 Python files of this machine, encoded, decoded, and held to tiktoken.

    python benchmarks/tinypython.py [--folder FOLDER] [--files 1000] [--out benchmarks/results]

The folder has `vocab.bpe` and `encoder.json`; without one, such files are made of the bundled tokenizer's pieces.
Held to tiktoken only where it is installed (`pip install tiktoken`); it needs no network for files that are here.
"""

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sparse_interp.data_files import data_folder
from sparse_interp.tokenizer import PIECE_PATTERN, load_tokenizer


def two_files(folder: Path) -> Path:
    """The bundled tokenizer's pieces in the form of the published one."""
    bundled = load_tokenizer(data_folder() / "tokenizers" / "python_2k")
    spec = json.loads(bundled.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["merges"]][:1790]
    printed = sorted((piece for piece in spec["vocab"] if len(piece) == 1), key=lambda s: (ord(s) > 255, ord(s)))
    pieces = [*printed, *(left + right for left, right in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("\n".join(["# BPE", *map(" ".join, merges), ""]), encoding="utf-8")
    return folder


def real_files(n: int) -> list[str]:
    """The first `n` Python files of the standard library and what is installed beside it that are UTF-8."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        with suppress(UnicodeDecodeError):
            texts.append(path.read_bytes().decode())
        if len(texts) == n:
            break
    return texts


def same_as_tiktoken(folder: Path, texts: list[str], ids: list[list[int]]) -> int | None:
    """Files whose ids are tiktoken's; None without tiktoken."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError:
        return None
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    special = {"<|endoftext|>": len(ranks) + 1}
    encoding = tiktoken.Encoding("published", pat_str=PIECE_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return sum(encoding.encode_ordinary(text) == own for text, own in zip(texts, ids, strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, default=None)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or two_files(Path(made))
        tokenizer, texts = load_tokenizer(folder), real_files(given.files)
        began = time.perf_counter()
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        encoded = time.perf_counter()
        back = sum(tokenizer.decode(own) == text for own, text in zip(ids, texts, strict=True))
        found = {
            "tokenizer": "the bundled pieces" if given.folder is None else given.folder.name,
            "files": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": sum(map(len, ids)),
            "come_back_exactly": back,
            "ids_are_tiktokens": same_as_tiktoken(folder, texts, ids),
            "encode_seconds": encoded - began,
            "decode_seconds": time.perf_counter() - encoded,
            "python": sys.version.split()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    print("\n".join(f"{key:20} {value}" for key, value in found.items()))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "tinypython.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
