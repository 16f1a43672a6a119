"""The size of a circuit: how well a set of nodes agrees with its model, and the smallest prefix of a ranking that does.

Candidates are measured on fixed pairs that no gate was trained on, so that bisection compares like with like. What is
outside a candidate is ablated fully, to whatever baseline the search has.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_interp.axes import PerPrompt, Resid
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, Values, holding_hooks
from sparse_interp.interventions.answers import (
    AnswerLogits,
    Teacher,
    answer_logits,
    both_sides,
    length_in_common,
    stream_at,
    taught,
)
from sparse_interp.interventions.baselines import Baseline, held_at_answers
from sparse_interp.interventions.norms import NormScales, frozen_norms, norm_scales
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import Task, TaskBatch, answer_loss, kl_divergence, logit_difference_error

AT_ONCE = 128
"""Prompts per forward pass where a candidate is measured."""


@dataclass(frozen=True)
class Fit:
    """How a set of nodes does on the selection pairs, beside the model."""

    kl: float
    """Mean KL(model || circuit) at the answer position, nats; with a teacher, KL(teacher || circuit)."""

    loss: float
    """Mean task loss of the circuit, nats."""

    model_loss: float
    """Mean task loss of the model, or of the teacher, nats."""

    ld_error: float
    """Mean squared error of the logit difference, as a share of the model's own mean square."""

    def enough(self, config: PruneConfig) -> bool:
        """Whether the circuit may stop growing, by the rule of `config`."""
        agrees, fits = self.kl <= config.max_kl, abs(self.loss - self.model_loss) <= config.max_loss_gap
        return {
            "agreement": agrees and fits,
            "kl": agrees,
            "loss_gap": fits,
            "task_loss": self.loss <= config.target_task_loss,
            "logit_difference": self.ld_error <= config.max_ld_error and fits,
        }[config.rule]


@dataclass(frozen=True)
class _Chunk:
    """Prompts that run together, with all that does not change from candidate to candidate."""

    batch: TaskBatch
    reference: AnswerLogits
    values: Values
    scales: NormScales


class Selection:
    """Fixed pairs on which candidate circuits are measured while their size is chosen.

    Args:
        model: the model.
        pairs: the pairs; both prompts of each are used.
        baseline: what nodes outside a candidate hold, constants or values of prompts.
        frozen_norms: whether norms divide by what they divide by in the model's own run.
        per_position: whether candidates are nodes at positions; prompts have to be of one length then.
        teacher: what candidates have to agree with; None takes the model's own answers.

    Raises:
        TaskError: if they are not.
    """

    def __init__(
        self,
        model: HookedModel,
        pairs: TaskBatch,
        baseline: Baseline,
        *,
        frozen_norms: bool = False,
        per_position: bool = False,
        teacher: Teacher | None = None,
    ):
        self.model, self.frozen_norms = model, frozen_norms
        self.n_pos = length_in_common(pairs) if per_position else None
        self.baseline = baseline.to(model.embed.W_E) if isinstance(baseline, NodeValues) else baseline
        self.batch = both_sides(pairs).to(model.embed.W_E.device)
        with evaluating(model):
            self.reference = taught(model, self.batch, teacher)
        self.model_loss = answer_loss(self.reference, self.batch).mean().item()

    @property
    def ablation(self) -> str:
        """How what is outside a candidate is ablated, in words."""
        return f"full, {self.baseline.kind}" + ", norms frozen" * self.frozen_norms

    def under(self, baseline: NodeValues) -> "Selection":
        """The same prompts with nodes outside held at `baseline` and norms as they come: how a circuit runs."""
        other = copy.copy(self)
        other.baseline, other.frozen_norms = baseline.to(self.model.embed.W_E), False
        return other

    @torch.no_grad()
    def logits(self, kept: Masks) -> AnswerLogits:
        """Answer logits of the circuit that keeps `kept`, on every prompt."""
        order = self.batch.lengths.argsort(stable=True).cpu()
        parts = []
        with evaluating(self.model):
            for rows in order.split(AT_ONCE):
                chunk = self._chunk(rows)
                with self._holding(kept, chunk):
                    parts.append(answer_logits(self.model, chunk.batch))
        return torch.cat(parts)[order.argsort()]

    def _chunk(self, rows: torch.Tensor) -> _Chunk:
        batch = self.batch.rows(rows)
        values = held_at_answers(self.model, self.baseline, batch)
        scales = norm_scales(self.model, batch) if self.frozen_norms else {}
        return _Chunk(batch, self.reference[rows], values, scales)

    @contextmanager
    def _holding(self, kept: Masks, chunk: _Chunk) -> Iterator[None]:
        """Inside the block nodes outside `kept` are ablated, for the prompts of one chunk."""
        with frozen_norms(self.model, chunk.scales), self.model.hooks(fwd_hooks=holding_hooks(kept, chunk.values)):
            yield

    def measured(self, every: int) -> Int[Tensor, " prompt"]:
        """Which prompts measure a knock-out, one in `every`, in the order in which they run."""
        rows = torch.arange(0, len(self.batch), every)
        return rows[self.batch.lengths[rows.to(self.batch.lengths.device)].cpu().argsort(stable=True)]

    def knock_outs(self, kept: Masks, without: Mapping[int, Iterable[Masks]], every: int) -> Iterator[float]:
        """By how much the mean KL(model || circuit) grows from `kept` to each of `without`, nats; see `divergences`."""
        found = self.divergences(kept, without, every)
        whole = next(found).mean().item()
        for kl in found:
            yield kl.mean().item() - whole

    @torch.no_grad()
    def divergences(self, kept: Masks, without: Mapping[int, Iterable[Masks]], every: int = 1) -> Iterator[PerPrompt]:
        """KL(model || circuit) of `kept`, then of each of `without`, layer by layer, on the prompts `measured(every)`.

        `without` holds, under the number of a layer, what is kept when something of that layer is knocked out too, or
        added: the layers before it are run once for all of them.
        """
        model, n_layers = self.model, self.model.cfg.n_layers

        def run(candidate: Masks, chunk: _Chunk, resid: Resid | None, layer: int) -> AnswerLogits:
            with self._holding(candidate, chunk):
                return answer_logits(model, chunk.batch, resid, layer)

        def stream(chunk: _Chunk, layer: int) -> Resid | None:
            with self._holding(kept, chunk):
                return stream_at(model, chunk.batch, layer) if layer else None

        def kl(candidate: Masks, streams: Sequence[Resid | None], layer: int) -> PerPrompt:
            runs = [(chunk, run(candidate, chunk, s, layer)) for chunk, s in zip(chunks, streams, strict=True)]
            return torch.cat([kl_divergence(c.reference, logits, c.batch) for c, logits in runs])

        with evaluating(model):
            chunks = [self._chunk(part) for part in self.measured(every).split(64)]
            yield kl(kept, [None] * len(chunks), 0)
            for layer in range(n_layers + 1):
                streams = [stream(chunk, layer) for chunk in chunks] if layer in without else []
                for candidate in without.get(layer, ()):
                    yield kl(candidate, streams, layer)

    def fit(self, kept: Masks) -> Fit:
        """What the stopping rules look at."""
        logits = self.logits(kept)
        kl = kl_divergence(self.reference, logits, self.batch).mean().item()
        ld_error = logit_difference_error(self.reference, logits, self.batch).item()
        return Fit(kl, answer_loss(logits, self.batch).mean().item(), self.model_loss, ld_error)


def split_pairs(task: Task, config: PruneConfig, generator: torch.Generator) -> tuple[TaskBatch, TaskBatch]:
    """Distinct training pairs and selection pairs, both from the task's training split."""
    batch = task.batch(config.n_train + config.n_selection, split="train", generator=generator)
    return batch.rows(slice(0, config.n_train)), batch.rows(slice(config.n_train, None))


def smallest_prefix(n: int, good: Callable[[int], bool], start: int) -> int:
    """The smallest good prefix length around `start`: the first good one at or above it, then bisected downwards.

    Looking upwards in small steps matters: behind the gates that a search left open the ranking says little, and a
    circuit of twice the size may well agree less with the model than one of the right size.

    Raises:
        CircuitError: if no length from `start` to `n` is good.
    """
    bad, size = 0, max(1, min(start, n))
    while not good(size):
        if size == n:
            raise CircuitError(
                "no circuit meets the stopping rule, not even all nodes: with all of them the circuit is the model, so "
                "its bound (max_kl, max_loss_gap or target_task_loss) asks for more than the model itself does."
            )
        bad, size = size, min(n, size + max(1, size // 20))
    while size - bad > 1:
        middle = (bad + size) // 2
        bad, size = (bad, middle) if good(middle) else (middle, size)
    return size
