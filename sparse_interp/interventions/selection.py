"""The size of a circuit: how well a set of nodes agrees with its model, and the smallest prefix of a ranking that does.

Candidates are measured on fixed pairs that no gate was trained on, so that bisection compares like with like. What is
outside a candidate is ablated fully, to whatever baseline the search has.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple, TypeVar

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
    length_in_common,
    packed,
    stream_at,
    taught,
)
from sparse_interp.interventions.baselines import Baseline, held_at_answers
from sparse_interp.interventions.norms import NormScales, frozen_norms, norm_scales
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.edges import EdgeGate, Matrix, RowCuts
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import ATTN_READ, K, NodeValues, Place, V
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task, TaskBatch, answer_loss, kl_divergence, logit_difference_error

T = TypeVar("T")

AT_ONCE = 128
"""Prompts per forward pass where a candidate is measured."""

TOKENS_TOGETHER = 2048
"""Positions of packed prompts up to which candidates run together."""

KEY_SITES = (ATTN_READ.name, K.name, V.name)
"""Sites that matter before the ends of prompts in the last block too."""


class EdgeCut(NamedTuple):
    """One edge that is cut beside what a circuit lacks."""

    matrix: Matrix
    shape: tuple[int, int]
    source: int
    target: int
    baseline: Tensor
    """What its matrix's sources are at: a number for each row."""


Candidate = Masks | EdgeCut
"""What is kept, or which edge is cut beside what is not."""

Outcome = Callable[[AnswerLogits, AnswerLogits, TaskBatch], Tensor]
"""From the model's answer logits, a candidate's and the prompts: a number, or several, for each prompt."""


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
    rows: Int[Tensor, " prompt"]
    packing: Packing | None
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
        self.batch = pairs.both_sides().to(model.embed.W_E.device)
        with evaluating(model):
            self.reference = self.logits({}) if teacher is None else taught(model, self.batch, teacher)
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
                    parts.append(answer_logits(self.model, chunk.batch, packing=chunk.packing))
        return torch.cat(parts)[order.argsort()]

    def _chunk(self, rows: torch.Tensor) -> _Chunk:
        batch = self.batch.rows(rows)
        values = held_at_answers(self.model, self.baseline, batch)
        packing = packed(self.model, [batch]) if isinstance(values, NodeValues) and self.n_pos is None else None
        scales = norm_scales(self.model, batch, packing) if self.frozen_norms else {}
        return _Chunk(batch, rows, packing, values, scales)

    @contextmanager
    def _holding(self, kept: Masks, chunk: _Chunk) -> Iterator[None]:
        """Inside the block nodes outside `kept` are ablated, for the prompts of one chunk."""
        with frozen_norms(self.model, chunk.scales), self.model.hooks(fwd_hooks=holding_hooks(kept, chunk.values)):
            yield

    def measured(self, every: int) -> Int[Tensor, " prompt"]:
        """Which prompts measure a knock-out, one in `every`, in the order in which they run."""
        rows = torch.arange(0, len(self.batch), every)
        return rows[self.batch.lengths[rows.to(self.batch.lengths.device)].cpu().argsort(stable=True)]

    def knock_outs(self, kept: Masks, without: Mapping[int, Iterable[Candidate]], every: int) -> Iterator[float]:
        """By how much the mean KL(model || circuit) grows from `kept` to each of `without`, nats; see `divergences`."""
        found = self.divergences(kept, without, every)
        whole = next(found).mean().item()
        for kl in found:
            yield kl.mean().item() - whole

    def divergences(
        self, kept: Masks, without: Mapping[int, Iterable[Candidate]], every: int = 1
    ) -> Iterator[PerPrompt]:
        """KL(model || circuit) of `kept`, then of each of `without`; see `outcomes`."""
        return self.outcomes(kl_divergence, kept, without, every)

    @torch.no_grad()
    def outcomes(
        self, measure: Outcome, kept: Masks, without: Mapping[int, Iterable[Candidate]], every: int = 1
    ) -> Iterator[Tensor]:
        """What `measure` says of `kept`, then of each of `without`, layer by layer, on the prompts `measured(every)`.

        `without` holds, under the number of a layer, what is kept when something of that layer is knocked out too, or
        added: the layers before it are run once for all of them. Candidates in a sequence that differ from `kept` in
        the same place run together, from there on; those that an iterator makes run one by one, each while it is the
        last that was made.
        """
        model, n_layers = self.model, self.model.cfg.n_layers

        def run(candidates: Sequence[Candidate], chunk: _Chunk, resid: Resid | None, layer: int) -> list[Tensor]:
            with self._holding(_stacked(kept, candidates), chunk), _cutting(model, candidates, chunk.packing):
                logits = answer_logits(model, chunk.batch, resid, layer, chunk.packing)
            reference = self.reference[chunk.rows]
            return [measure(reference, one, chunk.batch) for one in logits.chunk(len(candidates))]

        def stream(chunk: _Chunk, layer: int) -> Resid | None:
            with self._holding(kept, chunk):
                return stream_at(model, chunk.batch, layer, packing=chunk.packing) if layer else None

        with evaluating(model):
            chunks = [self._chunk(part) for part in self.measured(every).split(64)]
            yield torch.cat([run([kept], chunk, None, 0)[0] for chunk in chunks])
            for layer in range(n_layers + 1):
                streams = [stream(chunk, layer) for chunk in chunks] if layer in without else []
                for candidates in _together(kept, without.get(layer, ()), chunks[0].packing, n_layers):
                    runs = [run(candidates, chunk, s, layer) for chunk, s in zip(chunks, streams, strict=True)]
                    yield from map(torch.cat, zip(*runs, strict=True))

    def fit(self, kept: Masks) -> Fit:
        """What the stopping rules look at."""
        logits = self.logits(kept)
        kl = kl_divergence(self.reference, logits, self.batch).mean().item()
        ld_error = logit_difference_error(self.reference, logits, self.batch).item()
        return Fit(kl, answer_loss(logits, self.batch).mean().item(), self.model_loss, ld_error)


def _together(
    kept: Masks, candidates: Iterable[Candidate], packing: Packing | None, n_layers: int
) -> Iterator[list[Candidate]]:
    """Candidates in their order, in groups that run together."""
    if packing is None or not isinstance(candidates, Sequence):
        yield from ([candidate] for candidate in candidates)
        return
    n_distinct, n_prompts = packing.tokens.shape[1], packing.spots.shape[1]
    for where, alike in groupby(candidates, partial(_first_change, kept)):
        ends_alone = isinstance(where, Place) and where.layer >= n_layers - 1 and where.site not in KEY_SITES
        some, size = list(alike), max(1, TOKENS_TOGETHER // (n_prompts if ends_alone else n_distinct))
        yield from (some[i : i + size] for i in range(0, len(some), size))


def _first_change(kept: Masks, candidate: Candidate) -> Place | Matrix:
    """Where a candidate begins to differ from `kept`."""
    if isinstance(candidate, EdgeCut):
        return candidate.matrix
    return next((place for place, mask in kept.items() if candidate[place] is not mask), next(iter(kept)))


def _stacked(kept: Masks, candidates: Sequence[Candidate]) -> Masks:
    """The masks of candidates that run together, in rows where they differ from `kept`."""
    if isinstance(candidates[0], EdgeCut):
        return kept
    several = [candidate for candidate in candidates if not isinstance(candidate, EdgeCut)]
    if len(several) == 1:
        return several[0]
    found = dict(kept)
    for place, mask in kept.items():
        if any(one[place] is not mask for one in several):
            found[place] = torch.stack([one[place] for one in several])[:, None]
    return found


def _cutting(
    model: HookedModel, candidates: Sequence[Candidate], packing: Packing | None
) -> AbstractContextManager[None]:
    """A block in which each row has the edge of its candidate cut, if candidates are edges to cut."""
    cuts = [candidate for candidate in candidates if isinstance(candidate, EdgeCut)]
    if not cuts:
        return nullcontext()
    matrix, baseline = cuts[0].matrix, cuts[0].baseline
    if packing is None:
        share = baseline.new_ones(cuts[0].shape)
        share[cuts[0].source, cuts[0].target] = 0
        return model.gated_edges({matrix: EdgeGate(share, baseline)})
    assert isinstance(model, HookedSparseTransformer)
    ends = (torch.tensor([getattr(cut, end) for cut in cuts], device=baseline.device) for end in ("source", "target"))
    return model.cutting_rows(matrix, RowCuts(*ends, baseline))


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


def needed_among(items: Sequence[T], good: Callable[[Sequence[T]], bool]) -> list[T] | None:
    """Some of `items` that are good together, none of which can be spared; in their order, earlier ones preferred.

    The halves of what is left are tried in turn (QuickXplain, Junker 2004), so k needed ones among n take about
    k log2(n / k) trials: it is how the few that matter are told from many of which none does anything alone.
    That is so where more is never worse; where it is, what comes out may not be good, and the answer is None.
    """

    def search(background: list[T], rest: Sequence[T], has_grown: bool) -> list[T]:
        if has_grown and good(background):
            return []
        if len(rest) == 1:
            return list(rest)
        first, second = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        later = search([*background, *first], second, True)
        earlier = search([*background, *later], first, bool(later))
        return [*earlier, *later]

    found = search([], items, True) if items else []
    return found if good(found) else None
