"""The size of a circuit: how well a set of nodes agrees with its model, and the smallest prefix of a ranking that does.

Candidates are measured on fixed pairs that no gate was trained on, so that bisection compares like with like.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparse_interp.axes import Resid
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, holding_hooks
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits, answer_logits, both_sides, stream_at
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.text import evaluating
from sparse_interp.tasks.task import Task, TaskBatch, answer_loss, kl_divergence


@dataclass(frozen=True)
class Fit:
    """How a set of nodes does on the selection pairs, beside the model."""

    kl: float
    """Mean KL(model || circuit) at the answer position, nats."""

    loss: float
    """Mean task loss of the circuit, nats."""

    model_loss: float
    """Mean task loss of the model, nats."""

    def enough(self, config: PruneConfig) -> bool:
        """Whether the circuit may stop growing."""
        if config.objective == "task_loss":
            return self.loss <= config.target_task_loss
        return self.kl <= config.max_kl and abs(self.loss - self.model_loss) <= config.max_loss_gap


class Selection:
    """Fixed pairs on which candidate circuits are measured while their size is chosen."""

    def __init__(self, model: HookedModel, pairs: TaskBatch, baseline: NodeValues):
        self.model, self.baseline = model, baseline.to(model.embed.W_E)
        self.batch = both_sides(pairs).to(model.embed.W_E.device)
        with evaluating(model):
            self.reference = all_answer_logits(model, self.batch)
        self.model_loss = answer_loss(self.reference, self.batch).mean().item()

    def logits(self, kept: Masks, batch: TaskBatch) -> AnswerLogits:
        """Answer logits of the circuit that keeps `kept`."""
        with evaluating(self.model), self.model.hooks(fwd_hooks=holding_hooks(kept, self.baseline)):
            return all_answer_logits(self.model, batch)

    @torch.no_grad()
    def knock_outs(self, kept: Masks, without: Mapping[int, Sequence[Masks]], every: int) -> Iterator[float]:
        """By how much the mean KL(model || circuit) grows from `kept` to each of `without`, nats, layer by layer.

        `without` holds, under the number of a layer, what is kept when something of that layer is knocked out too:
        the layers before it are run once for all of them. One in `every` prompts is measured.
        """
        model, n_layers = self.model, self.model.cfg.n_layers
        rows = torch.arange(0, len(self.batch), every)
        rows = rows[self.batch.lengths[rows].argsort(stable=True)]
        chunks = [(self.batch.rows(part), self.reference[part]) for part in rows.split(64)]

        def kl(candidate: Masks, streams: list[Resid | None], layer: int) -> float:
            with model.hooks(fwd_hooks=holding_hooks(candidate, self.baseline)):
                logits = [answer_logits(model, b, s, layer) for (b, _), s in zip(chunks, streams, strict=True)]
            parts = [kl_divergence(r, x, b) for (b, r), x in zip(chunks, logits, strict=True)]
            return torch.cat(parts).mean().item()

        with evaluating(model):
            whole = kl(kept, [None] * len(chunks), 0)
            for layer in range(n_layers + 1):
                with model.hooks(fwd_hooks=holding_hooks(kept, self.baseline)):
                    streams = [stream_at(model, b, layer) if layer else None for b, _ in chunks]
                for candidate in without.get(layer, ()):
                    yield kl(candidate, streams, layer) - whole

    def fit(self, kept: Masks) -> Fit:
        """The three numbers that the stopping rules look at."""
        logits = self.logits(kept, self.batch)
        kl = kl_divergence(self.reference, logits, self.batch).mean().item()
        return Fit(kl, answer_loss(logits, self.batch).mean().item(), self.model_loss)


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
                "max_kl or max_loss_gap (or the task-loss target) asks for more than the model itself does."
            )
        bad, size = size, min(n, size + max(1, size // 20))
    while size - bad > 1:
        middle = (bad + size) // 2
        bad, size = (bad, middle) if good(middle) else (middle, size)
    return size
