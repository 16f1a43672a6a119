"""Tracr programs: RASP compiled into weights, read from files, as models whose algorithm is known.

    word over a small alphabet  ->  bos x_1 ... x_n  ->  stream of one-hot channels  ->  what RASP says at every place

    output that is a choice    logit of y = 3 if the channel of y is 1, 0 if it is 0; other tokens -3
    output that is a number    logit of y = 3 (2 u y - y^2) / gap^2:  the number nearest to the channel's u is largest

Attention is bidirectional and there are no norms, biases, sinks. Weights are Tracr's own to the last bit; it reads the
argmax off the output channels or the number off one, which the logits do here. The programs and what RASP's interpreter
answers to every word were written by benchmarks/tracr_programs.py, once (data/SOURCES.md); no JAX is needed here.

Nearly every weight of a compiled model is true, so on the board each is planted in a host (planted.py).

Tracr: Lindner et al. 2023 (arXiv:2301.05062). The edges between components of two programs: Conmy et al. 2023 (ACDC,
arXiv:2304.14997).
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_interp.axes import Logits
from sparse_interp.data_files import data_folder
from sparse_interp.errors import ConfigError, TaskError
from sparse_interp.faithfulness.answer_key import GroundTruth, Key
from sparse_interp.faithfulness.components import ComponentTruth
from sparse_interp.faithfulness.draft import word_tokenizer
from sparse_interp.faithfulness.planted import PlantConfig, hidden
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.sites import Node
from sparse_interp.model.tensor_files import own_source, read_json
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.pairs import SPLITS
from sparse_interp.tasks.task import Task

NO_ANSWER = 255
"""Stands where RASP answers nothing, and the compiled model anything."""

SHARP = 3.0
"""What a right answer is above a wrong one, in logits."""


TOLERANCE = 0.01
"""How far a key is from its model at most, KL at the answers, nats; without any part of it it is farther. On
prompts that it was not measured on it may be twice as far."""


class Program(NamedTuple):
    """A RASP program as it was compiled."""

    name: str
    family: str
    means: str
    """What it answers at each place, in words."""
    alphabet: tuple[str, ...]
    longest: int
    """Letters of the longest word that it was compiled for."""
    outputs: tuple[str, ...]
    """Tokens that it answers with."""
    numbers: tuple[float, ...] | None
    """What they stand for, if the output is one channel that holds a number."""
    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int
    channels: tuple[str, ...]
    """What the channels of the stream carry, in Tracr's words."""

    @property
    def words(self) -> Iterator[tuple[str, ...]]:
        """Every word that it was compiled for, the shorter first."""
        for n in range(1, self.longest + 1):
            yield from itertools.product(self.alphabet, repeat=n)


def _file(name: str) -> Path:
    return data_folder() / "groundtruth" / name


@cache
def _programs() -> dict[str, Program]:
    found = {}
    for name, record in read_json(_file("tracr.json")).items():
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        found[name] = Program(name=name, **lists)
    return found


def tracr_programs() -> list[str]:
    """The names of all programs."""
    return list(_programs())


def tracr_program(name: str) -> Program:
    """The program called `name`.

    Raises:
        TaskError: for an unknown name.
    """
    if name not in _programs():
        raise TaskError(f"No Tracr program is called {name!r}; `tracr_programs()` lists all {len(_programs())}.")
    return _programs()[name]


def _array(program: Program, part: str) -> Tensor:
    return own_source(_file("tracr.safetensors"))[0].take(f"{program.name}.{part}").clone()


def tracr_answers(program: Program) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]]:
    """Every word, and what RASP's interpreter answers at each of its places; None where it answers nothing."""
    told = iter(_array(program, "answers").tolist())
    said = (*program.outputs, *[None] * (NO_ANSWER + 1 - len(program.outputs)))
    return [(word, tuple(said[next(told)] for _ in word)) for word in program.words]


def _tokenizer(program: Program) -> PreTrainedTokenizerFast:
    return word_tokenizer([*program.alphabet, *program.outputs])


# -- the task -------------------------------------------------------------------------------------------------------

N_LENGTHS, N_WORDS, N_TWINS = 3, 64, 2
"""Words of the longest lengths, as many of each length and split, and as many twins of each, make a task."""


def tracr_task(program: Program) -> Task:
    """Words whose last place is asked about, beside the words nearest to them that are answered otherwise there.

    A word is of one split. `shifted` has the longest words alone; answers are as evenly spread as words allow. A word
    with its twins counts as one template.

    Raises:
        TaskError: if no letter changes what is answered there, as with the length of the word.
    """
    found: dict[tuple[str, int], list[tuple[tuple[str, ...], str]]] = {}
    for word, said in tracr_answers(program):
        if len(word) > program.longest - N_LENGTHS and said[-1] is not None:
            found.setdefault((_split(word, program.longest), len(word)), []).append((word, said[-1]))
    rows = [row for (split, _), words in sorted(found.items()) for row in _pairs(program, split, words)]
    if {row["split"] for row in rows} != set(SPLITS):
        raise TaskError(f"No letter changes what {program.name!r} answers at the last place, or hardly any; no pairs.")
    return Task.from_pairs(pd.DataFrame(rows), _tokenizer(program), name=program.name)


def _draw(word: tuple[str, ...]) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(word).encode()).digest()[:4], "big")


def _split(word: tuple[str, ...], longest: int) -> str:
    """Half of the words train; of the longest ones, a quarter is shifted."""
    train, test, shifted = SPLITS
    quarter = _draw(word) % 4
    if quarter < 2:
        return train
    return shifted if quarter == 3 and len(word) == longest else test


def _pairs(program: Program, split: str, words: list[tuple[tuple[str, ...], str]]) -> Iterator[dict[str, str]]:
    """Pairs of words of one length: the first ones of each answer in turn, each with the nearest of other answers."""
    words = sorted(words, key=lambda item: _draw(item[0]))
    letters = np.array([[program.alphabet.index(x) for x in word] for word, _ in words])
    answers = np.array([program.outputs.index(answer) for _, answer in words])
    turn = [int((answers[:row] == answer).sum()) for row, answer in enumerate(answers)]
    for row in np.argsort(turn, kind="stable")[:N_WORDS].tolist():
        n_changed = (letters != letters[row]).sum(1)
        others = np.flatnonzero(answers != answers[row])
        for other in others[np.argsort(n_changed[others], kind="stable")][:N_TWINS].tolist():
            (clean, answer), (corrupt, foil) = words[row], words[other]
            text = {"clean": " ".join(clean), "corrupt": " ".join(corrupt), "answer": f" {answer}", "foil": f" {foil}"}
            yield {**text, "template": text["clean"], "split": split}


# -- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tracr_model(name: str) -> HookedSparseTransformer:
    """The compiled model of the program called `name`, in eval mode; its tokenizer takes letters apart by spaces.

    Raises:
        TaskError: for an unknown name.
    """
    program, tokenizer = tracr_program(name), _tokenizer(tracr_program(name))
    cfg = ModelConfig(
        n_layers=program.n_layers,
        d_model=len(program.channels),
        n_heads=program.n_heads,
        d_head=program.d_head,
        d_mlp=program.d_mlp,
        n_ctx=program.longest + 1,
        d_vocab=len(tokenizer),
        act_fn="relu",
        norm="none",
        sink=False,
        bigram=False,
        attention_dir="bidirectional",
        seed=0,
        model_name=f"tracr {name}",
    )
    model = HookedSparseTransformer(cfg, tokenizer).eval()
    for p in model.parameters():
        p.zero_()
    _write(model, program, tokenizer)
    return model


def _write(model: HookedSparseTransformer, program: Program, tokenizer: PreTrainedTokenizerFast) -> None:
    shapes = _shapes(program)
    flat = torch.zeros(sum(map(np.prod, shapes.values())))
    flat[_array(program, "index").long()] = _array(program, "value")
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    weights = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), flat.split(sizes), strict=True)}
    letters = tokenizer.convert_tokens_to_ids([*program.alphabet, tokenizer.bos_token])
    model.embed.W_E[letters] = weights["W_E"]
    model.pos_embed.W_pos.copy_(weights["W_pos"])
    for layer, block in enumerate(model.layers):
        for letter in "QKV":
            by_head = weights[f"{layer}.W_{letter}"].unflatten(1, (program.n_heads, program.d_head))
            block.attn.get_parameter(f"W_{letter}").copy_(by_head.transpose(0, 1))
        block.attn.W_O.copy_(weights[f"{layer}.W_O"].unflatten(0, (program.n_heads, program.d_head)))
        block.mlp.W_in.copy_(weights[f"{layer}.W_in"])
        block.mlp.W_out.copy_(weights[f"{layer}.W_out"])
    model.unembed.b_U.fill_(-SHARP)
    outputs = tokenizer.convert_tokens_to_ids(list(program.outputs))
    if program.numbers is None:
        model.unembed.W_U[:, outputs] = SHARP * weights["W_out"]
        model.unembed.b_U[outputs] = 0
        return
    numbers = torch.tensor(program.numbers, dtype=torch.float64)
    gap = numbers.diff().min()
    model.unembed.W_U[:, outputs] = (weights["W_out"].double() * 2 * SHARP * numbers / gap**2).float()
    model.unembed.b_U[outputs] = (-SHARP * numbers**2 / gap**2).float()


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    d, d_flat, d_mlp = len(program.channels), program.n_heads * program.d_head, program.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"W_E": (len(program.alphabet) + 1, d), "W_pos": (program.longest + 1, d)}
    for layer in range(program.n_layers):
        shapes |= {f"{layer}.W_{letter}": (d, d_flat) for letter in "QKV"}
        shapes |= {f"{layer}.W_O": (d_flat, d), f"{layer}.W_in": (d, d_mlp), f"{layer}.W_out": (d_mlp, d)}
    return shapes | {"W_out": (d, 1 if program.numbers else len(program.outputs))}


# -- answer keys ----------------------------------------------------------------------------------------------------


def tracr_truth(name: str) -> GroundTruth:
    """The compiled model of a program with its task, and the key that was measured of it.

    Raises:
        TaskError: for an unknown name, or a program that has no clear key.
    """
    program = tracr_program(name)
    if name not in _keys():
        raise TaskError(
            f"The Tracr program {name!r} has no answer key: what its train split needs is not all that its test split "
            "needs. tracr_model and tracr_task have the program without one."
        )
    key = _keys()[name]
    return GroundTruth(
        name=f"tracr-{name}",
        model=tracr_model(name),
        task=tracr_task(program),
        nodes=key.nodes,
        edges=key.edges,
        why=f"Compiled from RASP: {program.means}. The key is what the answer at the last place depends on.",
        channels=program.channels,
    )


@cache
def _keys() -> dict[str, Key]:
    """The keys that benchmarks/tracr_keys.py found to be clear."""
    found = {}
    for name, record in read_json(_file("tracr_keys.json")).items():
        if record["clear"]:
            nodes = [Node(*node) for node in record["nodes"]]
            edges = frozenset((nodes[source], nodes[target]) for source, target in record["edges"])
            found[name] = Key(frozenset(nodes), edges)
    return found


DEFAULT = (
    *("reverse", "shift_1", "letter_first", "letter_second_last", "letter_middle_abc", "first_or_last_abc"),
    *("histogram", "count_a", "count_ab_mod_2", "at_least_2_a", "a_minus_b", "a_and_b", "a_or_b_not_both_abc"),
    *("majority_a", "proportion", "share_of_all", "surplus", "count_others"),
    *("maximum", "minimum_digits", "rank_ascending", "most_frequent_digits", "is_maximum", "first_a", "last_a"),
    *("dyck_balance", "ends_ab", "ends_alike", "like_first", "same_as_before"),
)
"""The default board: programs that have a key, and take a minute at most; `distinct`, say, is on the full one."""


def tracr_cases(board: str = "default") -> dict[str, Callable[[], GroundTruth]]:
    """Tracr programs in hosts, by the names of a board, `default` or `full`: name -> a function that builds it.

    Each is the same whenever it is built, since its generator is seeded with its name.

    Raises:
        ConfigError: for another board.
    """
    if board not in ("default", "full"):
        raise ConfigError(f"board={board!r}; expected 'default' or 'full'.")
    names = DEFAULT if board == "default" else tracr_programs()
    return {f"tracr-{name}": partial(_in_host, name) for name in names if name in _keys()}


def _in_host(name: str) -> GroundTruth:
    """A program half as large again as it was, with free heads and neurons, decoys among them."""
    truth = tracr_truth(name)
    cfg = truth.model.cfg
    assert cfg.d_mlp is not None
    config = PlantConfig(
        n_layers=cfg.n_layers + 1,
        d_model=cfg.d_model + max(16, cfg.d_model // 2),
        n_heads=cfg.n_heads + 3,
        d_mlp=cfg.d_mlp + max(8, cfg.d_mlp // 2),
        n_decoys=1,
    )
    seed = int.from_bytes(hashlib.sha256(truth.name.encode()).digest()[:4], "big")
    return replace(hidden(truth, config, generator=torch.Generator().manual_seed(seed)), name=truth.name)


# -- edges between components, as others have published them ---------------------------------------------------------


def tracr_components(name: str) -> ComponentTruth:
    """`reverse` or `proportion` on ACDC's prompts, with the edges between components that are published for it.

    The answer is every output channel at every place but the first. ACDC's prompts for `proportion` are four tokens of
    bos, padding, w and x in any order, bos anywhere; padding, which is no letter x, is y here.

    Raises:
        TaskError: for another name.
    """
    if name not in COMPONENT_TASKS:
        raise TaskError(f"Edges between components are known for {', '.join(COMPONENT_TASKS)}; got {name!r}.")
    program, model = tracr_program(name), tracr_model(name)
    ids = model.tokenizer.get_vocab()
    bos, outputs = model.tokenizer.bos_token, [ids[token] for token in program.outputs]
    if name == "reverse":
        words = [(bos, *word) for word in itertools.permutations(program.alphabet)]
    else:
        words, outputs = list(itertools.product((bos, "w", "x", "y"), repeat=4)), [ids["1"]]

    def answer(logits: Logits) -> Tensor:
        return logits[:, 1:, outputs]

    edges = read_json(_file("acdc_edges.json"))[name]
    tokens = torch.tensor([[ids[token] for token in word] for word in words])
    return ComponentTruth(f"tracr-{name}", model, tokens, answer, frozenset((a, b) for a, b in edges))


COMPONENT_TASKS = ("reverse", "proportion")
"""Programs whose edges between components ACDC's authors published."""
