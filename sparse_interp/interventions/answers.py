"""What a model answers: its logits at the one position of each prompt that a task asks about.

Nothing is unembedded elsewhere, the blocks before a layer need not run again, and prompts of like length run together,
so that a batch of any size costs little more than its tokens. Packed, it costs less than those (model/packing.py).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.axes import Resid
from sparse_interp.errors import TaskError
from sparse_interp.model.dense import HookedModel
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import FINAL_READ, Place
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import TaskBatch

AnswerLogits = Float[Tensor, "batch d_vocab"]

Teacher = Callable[[TaskBatch], AnswerLogits]
"""`batch.both_sides()` of pairs -> the answer logits that a circuit is asked to agree with, instead of its model's."""


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


def packed(model: HookedModel, batches: Sequence[TaskBatch]) -> Packing | None:
    """The clean prompts of each batch packed into a row, for runs in which nothing tells prompts apart.

    None where that cannot be: for a model that is not of our class, and inside hooks that somebody else has set, who
    expects prompts and positions.
    """
    if not isinstance(model, HookedSparseTransformer) or not model.packable:
        return None
    rows = [[ids[:n] for ids, n in zip(b.clean.tolist(), b.lengths.tolist(), strict=True)] for b in batches]
    return Packing.of(rows, model.embed.W_E.device, causal=model.cfg.attention_dir == "causal")


def answer_logits(
    model: HookedModel,
    batch: TaskBatch,
    resid: Resid | None = None,
    layer: int = 0,
    packing: Packing | None = None,
) -> Float[Tensor, "_batch d_vocab"]:
    """The model's logits at each prompt's answer position, nothing unembedded elsewhere.

    With `resid`, the stream that enters `layer` as `stream_at` gives it, the blocks before are not run again. With
    `packing`, the prompts of `batch` packed, hooks see [row n ...], and in the last block, from queries on, what stands
    at the ends of prompts, [row prompt ...]. What they return may have more rows than they were given: the same prompts
    in each. Prompts of several rows follow each other.
    """
    if layer < model.cfg.n_layers or resid is None:
        resid = stream_at(model, batch, model.cfg.n_layers, resid, layer, packing)
    if packing is not None:
        assert isinstance(model, HookedSparseTransformer)
        logits = model.packed_logits(packing, resid)
        counts = packing.counts * (len(logits) // len(packing.counts))
        return torch.cat([row[:n] for row, n in zip(logits, counts, strict=True)])
    device = model.embed.W_E.device
    rows, last = torch.arange(len(batch), device=device), batch.last.to(device)
    here = {"tokens": batch.clean.to(device)[rows, last][:, None], "start_at_layer": model.cfg.n_layers}
    return model(resid[rows, last][:, None], **here)[:, 0]


def stream_at(
    model: HookedModel,
    batch: TaskBatch,
    stop: int,
    resid: Resid | None = None,
    layer: int = 0,
    packing: Packing | None = None,
) -> Float[Tensor, "_batch _pos d_model"]:
    """The residual stream that enters block `stop` on the clean prompts, cut to the longest of them, or packed."""
    if packing is not None:
        assert isinstance(model, HookedSparseTransformer)
        return model.packed_stream(packing, stop, resid, layer)
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
