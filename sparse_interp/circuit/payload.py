"""What was published about one released circuit, `viz_data.pt` and the means beside it, as plain checked data.

    loc                "3.attn.q", or "final_resid" for the last stream: a place; `retained` lists its channels
    loss               of the whole model on the task           interv_loss    of the circuit, all else held at means
    ch_interv_losses   of the circuit with one of its nodes held as well, in the order of `retained`
    layer_, loc_...    with all its nodes of half a block, or of one loc, held as well

Every stored loss is a *sum over the two sides of a pair*, so twice the mean over prompts that the paper and this
library report. They are kept here as they are stored; `circuit/released.py` halves them, once.

The files are archives of tensors and plain values (openai/circuit_sparsity, commit 8a029a3). They are checked byte by
byte, read without unpickling anything else, and whatever is missing or not understood is said in `notes`. Known
variants: channels as ints or as tensors, pairs in one list or in one per rank, any field but `circuit_data` absent.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.axes import Tokens
from sparse_interp.errors import CircuitError
from sparse_interp.model.tensor_files import plain_archive

PAIRED_LOCS = {
    ("attn.act_in", "attn.q"),
    ("attn.act_in", "attn.k"),
    ("attn.act_in", "attn.v"),
    ("attn.v", "attn.resid_delta"),
    ("mlp.act_in", "mlp.post_act"),
    ("mlp.post_act", "mlp.resid_delta"),
}
"""The two ends of a pair, within one layer."""

_LOC = re.compile(r"\d+\.(attn\.(act_in|q|k|v|resid_delta)|mlp\.(act_in|post_act|resid_delta))|final_resid")
_HALF = re.compile(r"\d+\.(attn|mlp)")
_ENDS = ("bottom", "top")

Activations = Mapping[str, Mapping[int, Float[Tensor, "row pos"]]]
"""loc -> channel -> what it holds at every token of the task samples."""


class Pair(NamedTuple):
    """Two retained nodes that a weight may join, and the number that the payload holds for them."""

    source: tuple[str, int]
    """Loc and channel."""

    target: tuple[str, int]
    """Loc and channel."""

    value: float
    """Not a weight: by the one table that was compared, what the task would lose with the pair."""


class Snippet(NamedTuple):
    """A stretch of pretraining text, chosen by what one node does there."""

    share: float
    """Share of the text, in (0, 1], at whose edge the activation lies: 0.01 is the first or last percentile."""

    end: str
    """`bottom` or `top` of the distribution."""

    tokens: Int[Tensor, " pos"]
    """The text."""

    activations: Float[Tensor, " pos"]
    """The node, token by token."""

    at: int
    """Position that the snippet was chosen for."""


@dataclass(frozen=True)
class TaskSamples:
    """Prompts of the task, one class first and their twins of the other class behind, in the same order."""

    tokens: Tokens
    """Token ids, padded with 0 on the right as they are stored."""

    lengths: Int[Tensor, " row"]
    """Tokens of each prompt without the zeros at its end."""

    activations: Activations
    """What each retained node holds in the whole model."""

    in_circuit: Activations
    """What each retained node holds in the circuit."""

    @property
    def n_pairs(self) -> int:
        """Number of prompts in each class."""
        return len(self.tokens) // 2


@dataclass(frozen=True)
class Payload:
    """One released circuit as it was published; losses in nats, summed over the two sides of a pair."""

    retained: Mapping[str, tuple[int, ...]]
    """loc -> channels of the circuit, in the order in which their losses are stored."""

    model_config: Mapping[str, Any] = field(default_factory=dict)
    """The model's `beeg_config.json`."""

    loss: float | None = None
    """Of the whole model."""

    interv_loss: float | None = None
    """Of the circuit."""

    ch_interv_losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """loc -> for each retained channel, of the circuit without it."""

    layer_interv_losses: Mapping[str, float] = field(default_factory=dict)
    """`3.attn` -> of the circuit without its nodes there."""

    loc_interv_losses: Mapping[str, float] = field(default_factory=dict)
    """loc -> of the circuit without its nodes there."""

    pairs: tuple[Pair, ...] = ()
    """Retained nodes of one block, two by two."""

    samples: TaskSamples | None = None
    """Prompts, with activations."""

    snippets: Mapping[tuple[str, int], tuple[Snippet, ...]] = field(default_factory=dict)
    """(loc, channel) -> where in pretraining text it is low and high."""

    history: tuple[tuple[int, float], ...] = ()
    """Step of the hyper-parameter search, and the loss there."""

    prune_config: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the pruning, in the words of the sweep."""

    n_total: int | None = None
    """Nodes of the model, positional channels included."""

    notes: tuple[str, ...] = ()
    """What was absent, and what was there and not understood."""

    @property
    def n_nodes(self) -> int:
        """Number of retained nodes."""
        return sum(map(len, self.retained.values()))


def read_payload(path: Path | str) -> Payload:
    """The payload in a `viz_data.pt`.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than tensors and plain values.
        CircuitError: if it is no payload.
    """
    reader = _Reader(str(path))
    data = reader.mapping(plain_archive(Path(path)), "the payload")
    known = {"circuit_data", "samples", "importances", "all_loss", "num_total_nodes", "prune_config",
             "is_kiter_bug_fixed"}  # fmt: skip
    if "circuit_data" not in data:
        raise reader.wrong("circuit_data is missing, so it says of no node whether it was kept")
    retained = reader.retained(data["circuit_data"])
    importances = reader.mapping(data.get("importances", {}), "importances")
    reader.note_absent(known - {"is_kiter_bug_fixed"}, data, "")
    fields = {"beeg_model_config", "loss", "interv_loss", "ch_interv_losses", "layer_interv_losses",
              "loc_interv_losses", "pair_data", "task_samples", "task_samples_circuit"}  # fmt: skip
    if importances:
        reader.note_absent(fields, importances, "importances.")
    reader.note_unknown(known, data, "")
    reader.note_unknown(fields | {"pair_data_connections"}, importances, "importances.")
    losses = {name: reader.number(importances[name], name) for name in ("loss", "interv_loss") if name in importances}
    n_total = data.get("num_total_nodes")
    return Payload(
        retained,
        model_config=dict(reader.mapping(importances.get("beeg_model_config", {}), "beeg_model_config")),
        **losses,
        ch_interv_losses=reader.losses_per_channel(importances.get("ch_interv_losses", {}), retained),
        layer_interv_losses=reader.losses(importances.get("layer_interv_losses", {}), "layer_interv_losses", _HALF),
        loc_interv_losses=reader.losses(importances.get("loc_interv_losses", {}), "loc_interv_losses", _LOC),
        pairs=reader.pairs(importances.get("pair_data", [])),
        samples=reader.samples(importances),
        snippets=reader.snippets(data.get("samples", {})),
        history=reader.history(data.get("all_loss", [])),
        prune_config=dict(reader.mapping(data.get("prune_config", {}), "prune_config")),
        n_total=None if n_total is None else int(reader.number(n_total, "num_total_nodes")),
        notes=tuple(reader.notes),
    )


class Means(NamedTuple):
    """Means over pretraining text, by loc."""

    values: Mapping[str, Float[Tensor, " width"]]
    """loc -> one number per channel; q, k and v over all heads."""

    notes: tuple[str, ...]
    """What else was in the file."""


def read_means(path: Path | str) -> Means:
    """The means in a `mean_baseline_pretrain.pt`.

    Nothing but the name of this file is documented. Read is {loc: tensor} with one number per channel, in any shape,
    whether that is the whole file or one entry of it; what else is there is named in `notes`.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than tensors and plain values.
        CircuitError: if it holds no such mapping.
    """
    reader = _Reader(str(path))
    data = reader.mapping(plain_archive(Path(path)), "the file of means")
    tables = {name: table for name, table in [("", data), *data.items()] if isinstance(table, dict)}
    with_locs = {name: table for name, table in tables.items() if any(_is_loc(key) for key in table)}
    if len(with_locs) != 1:
        found = ", ".join(map(repr, list(data)[:5])) or "nothing"
        raise reader.wrong(f"expected one mapping from locs such as '0.attn.act_in' to means, found keys {found}")
    ((owner, table),) = with_locs.items()
    if owner:
        reader.notes += [f"{key!r} beside the means in {owner!r} was not read" for key in data if key != owner]
    values = {}
    for loc, value in table.items():
        if not _is_loc(loc):
            reader.notes.append(f"means of {loc!r} were not read: no node of a circuit is there")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            raise reader.wrong(f"the mean of {loc} is {_kind(value)}; expected a tensor of numbers")
        elif not bool(torch.isfinite(value).all()):
            raise reader.wrong(f"the mean of {loc} is not finite")
        else:
            values[loc] = value.flatten()
    return Means(values, tuple(reader.notes))


def _is_loc(key: Any) -> bool:
    return isinstance(key, str) and _LOC.fullmatch(key) is not None


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


class _Reader:
    """Checks what a file holds, part by part; an error names the file, the part and what was expected there."""

    def __init__(self, path: str):
        self.path = path
        self.notes: list[str] = []

    def wrong(self, what: str) -> CircuitError:
        return CircuitError(f"{self.path}: {what}. Get the file again, or name another.")

    def mapping(self, value: Any, where: str) -> Mapping[Any, Any]:
        if not isinstance(value, dict):
            raise self.wrong(f"{where} is {_kind(value)}; expected a dict")
        return value

    def sequence(self, value: Any, where: str, length: int | None = None) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            wanted = "a list" if length is None else f"{length} items"
            got = f"{len(value)} items" if isinstance(value, list | tuple) else _kind(value)
            raise self.wrong(f"{where} is {got}; expected {wanted}")
        return value

    def note_absent(self, known: Iterable[str], data: Mapping[Any, Any], owner: str) -> None:
        self.notes += [f"{owner}{name} is absent" for name in sorted(known) if name not in data]

    def note_unknown(self, known: Iterable[str], data: Mapping[Any, Any], owner: str) -> None:
        self.notes += [f"{owner}{name} was not read: unknown" for name in data if name not in known]

    def number(self, value: Any, where: str) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(f"{where} is {value if isinstance(value, float) else _kind(value)}; expected a number")
        return float(value)

    def channel(self, value: Any, where: str) -> int:
        number = self.number(value, where)
        if number != int(number) or number < 0:
            raise self.wrong(f"{where} is {number}; expected a channel, counted from 0")
        return int(number)

    def channels(self, values: Any, where: str) -> tuple[int, ...]:
        if isinstance(values, Tensor):
            values = values.flatten().tolist()
        return tuple(self.channel(value, where) for value in self.sequence(values, where))

    def loc(self, value: Any, where: str) -> str:
        if not _is_loc(value):
            raise self.wrong(f"{where} names {value!r}, which is no loc such as '0.attn.act_in' or 'final_resid'")
        return value

    def retained(self, value: Any) -> dict[str, tuple[int, ...]]:
        found = {}
        for key, channels in self.mapping(value, "circuit_data").items():
            if key == "prune_config":
                continue
            found[self.loc(key, "circuit_data")] = kept = self.channels(channels, f"circuit_data[{key!r}]")
            if len(set(kept)) < len(kept):
                raise self.wrong(f"circuit_data[{key!r}] lists a channel twice")
        return found

    def losses(self, value: Any, name: str, pattern: re.Pattern[str]) -> dict[str, float]:
        found = {}
        for key, loss in self.mapping(value, name).items():
            if not isinstance(key, str) or not pattern.fullmatch(key):
                raise self.wrong(f"{name} has the key {key!r}, which names no part of a model")
            found[key] = self.number(loss, f"{name}[{key!r}]")
        return found

    def losses_per_channel(self, value: Any, retained: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[float, ...]]:
        found = {}
        for loc, losses in self.mapping(value, "ch_interv_losses").items():
            where = f"ch_interv_losses[{loc!r}]"
            values = losses.tolist() if isinstance(losses, Tensor) else self.sequence(losses, where)
            found[loc] = tuple(self.number(loss, where) for loss in values)
            if len(found[loc]) != len(retained.get(loc, ())):
                raise self.wrong(f"{where} has {len(found[loc])} losses for {len(retained.get(loc, ()))} channels")
        return found

    def pairs(self, entries: Any) -> tuple[Pair, ...]:
        """Every pair once: ranks that repeat one have to agree."""
        found: dict[tuple, float] = {}
        for entry in self._pair_entries(entries):
            matrix, *ends, locs = self.sequence(entry, "an entry of pair_data", 4)
            source, target = (self.loc(loc, "pair_data") for loc in self.sequence(locs, "the locs of pair_data", 2))
            if (source.partition(".")[2], target.partition(".")[2]) not in PAIRED_LOCS:
                raise self.wrong(f"pair_data joins {source} and {target}, which no weight does")
            where = f"pair_data[{source} -> {target}]"
            sources, targets = (self._pair_channels(end, where) for end in ends)
            if not isinstance(matrix, Tensor) or matrix.numel() != len(sources) * len(targets):
                raise self.wrong(f"{where} is {_kind(matrix)} for {len(sources)} and {len(targets)} channels")
            if matrix.is_complex() or not bool(torch.isfinite(matrix).all()):
                raise self.wrong(f"{where} holds what is no number")
            ends_of_pairs = ((i, j) for i in sources for j in targets)
            for (i, j), value in zip(ends_of_pairs, matrix.flatten().tolist(), strict=True):
                if i is None or j is None:
                    continue  # what a bias does is no pair of nodes
                if found.setdefault(((source, i), (target, j)), float(value)) != value:
                    self.notes.append(f"{where} is there more than once with different values; the first is kept")
        return tuple(Pair(source, target, number) for (source, target), number in found.items())

    def _pair_entries(self, value: Any) -> Iterator[Any]:
        """The entries of `pair_data`, from one list or from one list per rank."""
        for entry in self.sequence(value, "pair_data"):
            nested = isinstance(entry, list | tuple) and not (len(entry) == 4 and isinstance(entry[0], Tensor))
            yield from entry if nested else [entry]

    def _pair_channels(self, values: Any, where: str) -> list[int | None]:
        """Channels, with None for `bias`."""
        values = values.tolist() if isinstance(values, Tensor) else self.sequence(values, where)
        return [None if isinstance(value, str) and value == "bias" else self.channel(value, where) for value in values]

    def samples(self, importances: Mapping[Any, Any]) -> TaskSamples | None:
        if "task_samples" not in importances:
            return None
        tokens, whole = self.sequence(importances["task_samples"], "task_samples", 2)
        again, inside = tokens, {}
        if "task_samples_circuit" in importances:
            again, inside = self.sequence(importances["task_samples_circuit"], "task_samples_circuit", 2)
        ids = self._token_ids(tokens, "task_samples")
        if ids.ndim != 2 or len(ids) % 2 or not ids.numel():
            raise self.wrong(f"task_samples has tokens {list(ids.shape)}; expected [rows, pos], as many of each class")
        if not torch.equal(self._token_ids(again, "task_samples_circuit"), ids):
            raise self.wrong("task_samples and task_samples_circuit hold different tokens")
        lengths = ids.shape[1] - (ids != 0).flip(1).int().argmax(1)
        if not bool((ids != 0).any(1).all()):
            raise self.wrong("task_samples has a row of padding alone")
        named = {"task_samples": whole, "task_samples_circuit": inside}
        read = [self._activations(part, name, ids.shape) for name, part in named.items()]
        return TaskSamples(ids, lengths, *read)

    def _token_ids(self, value: Any, where: str) -> Tensor:
        if not isinstance(value, Tensor) or value.is_complex() or bool((value != value.long()).any()):
            raise self.wrong(f"{where} holds {_kind(value)} as tokens; expected whole numbers")
        if bool((value < 0).any()):
            raise self.wrong(f"{where} holds the token {int(value.min())}")
        return value.long()

    def _activations(self, value: Any, name: str, shape: torch.Size) -> dict[str, dict[int, Tensor]]:
        found: dict[str, dict[int, Tensor]] = {}
        for loc, by_channel in self.mapping(value, name).items():
            found[self.loc(loc, name)] = {}
            for key, tensor in self.mapping(by_channel, f"{name}[{loc!r}]").items():
                channel = self.channel(key, f"{name}[{loc!r}]")
                if not isinstance(tensor, Tensor) or tensor.shape != shape:
                    raise self.wrong(f"{name}[{loc!r}][{channel}] is {_kind(tensor)}; expected {list(shape)}")
                found[loc][channel] = tensor.float()
        return found

    def snippets(self, value: Any) -> dict[tuple[str, int], tuple[Snippet, ...]]:
        found = {}
        for loc, by_channel in self.mapping(value, "samples").items():
            for key, by_share in self.mapping(by_channel, f"samples[{loc!r}]").items():
                channel = self.channel(key, f"samples[{loc!r}]")
                where = f"samples[{loc!r}][{channel}]"
                snippets = []
                for share, both in self.mapping(by_share, where).items():
                    for end, items in zip(_ENDS, self.sequence(both, where, 2), strict=True):
                        part = self.number(share, where)
                        snippets += [self._snippet(item, part, end, where) for item in self.sequence(items, where)]
                found[self.loc(loc, "samples"), channel] = tuple(snippets)
        return found

    def _snippet(self, item: Any, share: float, end: str, where: str) -> Snippet:
        tokens, activations, at = self.sequence(item, where, 3)
        ids, position = self._token_ids(tokens, where), self.channel(at, where)
        if not isinstance(activations, Tensor) or activations.shape != ids.shape or ids.ndim != 1:
            raise self.wrong(f"{where} has {_kind(activations)} as activations of {list(ids.shape)} tokens")
        if position >= len(ids):
            raise self.wrong(f"{where} points at token {position} of {len(ids)}")
        return Snippet(share, end, ids, activations.float(), position)

    def history(self, value: Any) -> tuple[tuple[int, float], ...]:
        rows = (self.sequence(row, "a row of all_loss", 2) for row in self.sequence(value, "all_loss"))
        return tuple((self.channel(step, "all_loss"), self.number(loss, "all_loss")) for step, loss in rows)
