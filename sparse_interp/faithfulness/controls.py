"""Controls: what a circuit has to be better than before its scores mean anything.

    random circuit    as many nodes per layer and site as the circuit, drawn from all nodes of that place
    empty circuit     none of them
    nonsense twin     the same search, where labels and answers are re-paired by an irrelevant feature of the prompt
    re-initialised    the same search in a network of random weights, told to agree with the trained model

A score without its control says little: enough nodes do most tasks, whichever they are. Random circuits are held at the
same baseline as the circuit, leave the same sites alone, and join q and k as it does: where the circuit has the q and
the k of a channel, a random one has both of another channel, since neither does anything alone (with grouped queries,
the k and the q of the same heads of its group). They are drawn without regard to the circuit and share nodes with it by
chance (`overlap`); to forbid that would make the control of a large circuit worse than chance.

A search that finds as small a circuit for nonsense, or in a random network, shows nothing by finding one at all (Drori,
February 2026, *Weight-sparse circuits may be interpretable yet unfaithful*). What nonsense is depends on the objective.
For task loss it is the labels that are re-paired. For agreement labels play no part, so the teacher's answers are
re-paired: always those of the trained model, and in the random network too. Both twins here re-pair, or keep, labels
and answers alike, so that one twin serves every objective and every stopping rule.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import ConfigError, TaskError
from sparse_interp.interventions.answers import AnswerLogits, Teacher, all_answer_logits
from sparse_interp.model.config import Shape
from sparse_interp.model.dense import AnyModel, DenseModel, HookedModel, hooked
from sparse_interp.model.sites import SITES, Node, Place, places, queries_of, width
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.controls import nonsense, remarks_for
from sparse_interp.tasks.pairs import token_ids
from sparse_interp.tasks.task import Task, TaskBatch


def random_circuits(model: AnyModel, circuit: Circuit, n: int, *, generator: torch.Generator) -> list[Circuit]:
    """`n` random circuits with as many nodes as `circuit` in every layer and site.

    Raises:
        CircuitError: if the circuit has another shape than the model.
        ConfigError: if `n` is negative.
    """
    if n < 0:
        raise ConfigError(f"n={n} random circuits were asked for; expected 0 or more.")
    circuit.baseline.check(hooked(model).cfg, circuit.sites)
    return [_alike(model, circuit, _drawn(circuit, generator)) for _ in range(n)]


def empty_circuit(model: AnyModel, circuit: Circuit) -> Circuit:
    """The circuit of no nodes, over the same baseline; sites that the search left alone are left alone here too."""
    return _alike(model, circuit, ())


def has_room(circuit: Circuit) -> bool:
    """Whether another circuit has its size: some place is kept in part, and neither whole nor not at all."""
    return any(0 < len(kept) < width(circuit.cfg, place.site) for place, kept in _channels(circuit).items())


def overlap(control: Circuit, circuit: Circuit) -> float:
    """Share of the circuit's nodes that a control has as well."""
    return len(control.node_set & circuit.node_set) / max(1, circuit.n_nodes)


# -- searches that should find nothing --------------------------------------------------------------------------------


class Twin(NamedTuple):
    """A task, and the answers that a search on it is to agree with: `find_circuit(model, twin.task, teacher=...)`."""

    task: Task
    teacher: Teacher


def nonsense_twin(model: AnyModel, task: Task, *, remarks: tuple[str, str] | None = None) -> Twin:
    """The task's prompts after one of two remarks, which alone decides labels and what is to be agreed with.

    The teacher's answer to a prompt is the trained model's own, to this prompt if the remark fits it and else to the
    other one of its pair, which comes after the other remark. So for every loss the right answer follows the remark,
    and what the task turns on is left to chance.

    Args:
        model: the trained model.
        task: the real task.
        remarks: what is put before prompts; None takes comments, or words of the prompts where comments are not to be
            written in this tokenizer.

    Raises:
        TaskError: if there are no two remarks that this tokenizer tells apart.
    """
    remarks = remarks_for(task) if remarks is None else remarks
    twin = nonsense(task, remarks)
    first, second = (token_ids(remark, task.tokenizer) for remark in remarks)
    at = next(pos for pos, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)
    return Twin(twin, _RePaired(hooked(model), 1 + at, (first[at], second[at])))


@dataclass(frozen=True)
class _RePaired:
    """A model's answers, exchanged between the two prompts of a pair whose clean one comes after the second remark."""

    model: HookedModel
    pos: int
    """Where the remarks differ; position 0 is the bos token."""

    tokens: tuple[int, int]
    """What stands there in either."""

    def __call__(self, batch: TaskBatch) -> AnswerLogits:
        n = len(batch) // 2  # both sides: the clean prompts of all pairs, then the others
        mark = batch.clean[:n, self.pos]
        if not bool(torch.isin(mark, torch.tensor(self.tokens).to(mark.device)).all()):
            raise TaskError("these prompts do not begin with the twin's remarks; give the teacher its own twin's.")
        with evaluating(self.model):
            own = all_answer_logits(self.model, batch)
        exchanged = (mark == self.tokens[1]).to(own.device).repeat(2)
        return torch.where(exchanged[:, None], own.roll(n, 0), own)


def teacher_of(model: AnyModel) -> Teacher:
    """The model's own answers, for a circuit of another model to agree with."""
    model = hooked(model)

    def teacher(batch: TaskBatch) -> AnswerLogits:
        with evaluating(model):
            return all_answer_logits(model, batch)

    return teacher


@torch.no_grad()
def reinitialised(model: AnyModel, *, generator: torch.Generator) -> HookedModel:
    """A copy of the model with random weights wherever it has weights that are not zero, and zeros where it has zeros.

    Matrices are drawn around 0 with the root mean square of their non-zero entries, vectors (gains, biases) around
    their mean with their standard deviation. What no node carries stays as it was, so that the control is not beaten
    for a reason that no circuit is: the bigram table, which is no parameter, and the bias of the logits.
    """
    model = hooked(model)
    made = hooked(copy.deepcopy(model.tl)) if isinstance(model, DenseModel) else copy.deepcopy(model)
    spared = getattr(made.unembed, "b_U", None)
    for weights in made.parameters():
        if weights is not spared:
            weights.copy_(_redrawn(weights, generator))
    return made


def _redrawn(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian draws in place of the entries that are not zero."""
    there = weights != 0
    entries = weights[there].double()
    mean = entries.mean() if weights.ndim == 1 else torch.zeros(())
    spread = (entries - mean).pow(2).mean().sqrt()
    drawn = torch.randn(weights.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.where(there, (mean + spread * drawn.to(weights.device)).to(weights), weights)


# -- how they are drawn -----------------------------------------------------------------------------------------------


def _alike(model: AnyModel, circuit: Circuit, nodes: Iterable[Node]) -> Circuit:
    """`nodes` as a circuit with the baseline, the task and the gated sites of `circuit`."""
    origin = {name: getattr(circuit, name) for name in ("sites", "task_name", "task_sha256", "prune")}
    return Circuit.of_nodes(model, nodes, circuit.baseline, **origin)


def _channels(circuit: Circuit) -> dict[Place, set[int]]:
    """The circuit's channels in every place, in the order of the forward pass."""
    found: dict[Place, set[int]] = {place: set() for place in places(circuit.cfg, SITES)}
    for node in circuit.node_set:
        found[Place(node.layer, node.site)].add(node.channel)
    return found


def _drawn(circuit: Circuit, generator: torch.Generator) -> Iterator[Node]:
    """Random nodes, as many in every place as the circuit has there."""
    kept = _channels(circuit)
    for place, channels in kept.items():
        if place.site == "k":
            continue  # drawn with q
        order = _shuffled(width(circuit.cfg, "k" if place.site == "q" else place.site), generator)
        if place.site == "q":
            yield from _drawn_heads(circuit.cfg, place.layer, channels, kept[Place(place.layer, "k")], order)
        else:
            yield from (Node(*place, channel) for channel in order[: len(channels)])


def _drawn_heads(cfg: Shape, layer: int, queries: set[int], keys: set[int], order: list[int]) -> Iterator[Node]:
    """What the circuit has of the q and k that meet in a channel, moved together to the channel that `order` says."""
    for channel, drawn in enumerate(order):
        meeting = zip(queries_of(cfg, channel), queries_of(cfg, drawn), strict=True)
        yield from (Node(layer, "q", there) for here, there in meeting if here in queries)
        if channel in keys:
            yield Node(layer, "k", drawn)


def _shuffled(n: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=generator, device=generator.device).tolist()
