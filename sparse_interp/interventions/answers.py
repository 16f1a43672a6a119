"""What a model answers: its logits at the one position of each prompt that a task asks about.

Nothing is unembedded elsewhere, the blocks before a layer need not run again, and prompts of like length run together,
so that a batch of any size costs little more than its tokens.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.axes import Resid
from sparse_interp.errors import TaskError
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.sites import FINAL_READ, Place
from sparse_interp.tasks.task import TaskBatch

AnswerLogits = Float[Tensor, "batch d_vocab"]

Teacher = Callable[[TaskBatch], AnswerLogits]
"""Pairs laid out by `both_sides` -> the answer logits that a circuit is asked to agree with, instead of its model's."""


def both_sides(batch: TaskBatch) -> TaskBatch:
    """Every pair twice: once with each of its prompts as the clean one."""
    other = batch.swapped()
    return TaskBatch(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(batch).items()})


def length_in_common(pairs: TaskBatch) -> int:
    """The length of all prompts, tokens.

    Raises:
        TaskError: if they differ.
    """
    shortest, longest = int(pairs.lengths.min()), int(pairs.lengths.max())
    if shortest != longest:
        raise TaskError(
            f"gates per position need prompts of one length, and these have {shortest} to {longest} tokens; take pairs "
            "of one length (Task.from_pairs), or per_position=False."
        )
    return longest


def answer_logits(model: HookedModel, batch: TaskBatch, resid: Resid | None = None, layer: int = 0) -> AnswerLogits:
    """The model's logits at each prompt's answer position, nothing unembedded elsewhere.

    With `resid`, the stream that enters `layer` as `stream_at` gives it, the blocks before are not run again.
    """
    if layer < model.cfg.n_layers or resid is None:
        resid = stream_at(model, batch, model.cfg.n_layers, resid, layer)
    device = model.embed.W_E.device
    rows, last = torch.arange(len(batch), device=device), batch.last.to(device)
    here = {"tokens": batch.clean.to(device)[rows, last][:, None], "start_at_layer": model.cfg.n_layers}
    return model(resid[rows, last][:, None], **here)[:, 0]


def stream_at(model: HookedModel, batch: TaskBatch, stop: int, resid: Resid | None = None, layer: int = 0) -> Resid:
    """The residual stream that enters block `stop` on the clean prompts, cut to the longest of them."""
    device = model.embed.W_E.device
    tokens = batch.clean[:, : int(batch.lengths.max())].to(device)
    causal = model.cfg.attention_dir == "causal"  # padding on the right is then never seen from the answer position
    mask = None if causal else batch.attention_mask[:, : tokens.shape[1]].to(device)
    if resid is None:
        return model(tokens, attention_mask=mask, stop_at_layer=stop)
    return model(resid, tokens=tokens, attention_mask=mask, start_at_layer=layer, stop_at_layer=stop)


def at_answers(
    values: Mapping[Place, Float[Tensor, "#batch pos width"]], batch: TaskBatch
) -> dict[Place, Float[Tensor, "#batch #at width"]]:
    """Values of prompts as `answer_logits` meets them: cut to the longest, at the last read those at the answer."""
    longest = int(batch.lengths.max())
    found = {}
    for place, of_prompts in values.items():
        found[place] = of_prompts[:, :longest]
        if place.site == FINAL_READ.name and of_prompts.shape[1] > 1:
            last = batch.last.to(of_prompts.device)
            rows = torch.arange(len(batch), device=last.device) if len(of_prompts) > 1 else torch.zeros_like(last)
            found[place] = of_prompts[rows, last][:, None]
    return found


@torch.no_grad()
def all_answer_logits(model: HookedModel, batch: TaskBatch, size: int = 128) -> AnswerLogits:
    """`answer_logits` of a batch of any size: prompts of like length run together, so that little is padding."""
    order = batch.lengths.argsort(stable=True).cpu()
    parts = [answer_logits(model, batch.rows(rows)) for rows in order.split(size)]
    return torch.cat(parts)[order.argsort()]


def taught(model: HookedModel, batch: TaskBatch, teacher: Teacher | None = None) -> AnswerLogits:
    """What a circuit of `model` has to agree with on a batch of both sides: the model's own logits, or a teacher's.

    Raises:
        TaskError: if a teacher does not answer every prompt with logits over the model's vocabulary.
    """
    if teacher is None:
        return all_answer_logits(model, batch)
    found, expected = teacher(batch), (len(batch), model.cfg.d_vocab)
    if tuple(found.shape) != expected:
        raise TaskError(
            f"the teacher's logits have shape {tuple(found.shape)}; expected {expected}, prompts by vocabulary: a row "
            "for every prompt of the batch, in its order."
        )
    return found.detach().to(model.embed.W_E)


class frozen:
    """Inside the block no parameter asks for a gradient."""

    def __init__(self, model: HookedModel):
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self.trained:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self.trained:
            p.requires_grad_(True)
