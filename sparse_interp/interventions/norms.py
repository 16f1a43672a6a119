"""Frozen norms: while nodes are ablated, norms divide by what they divided by in the full model's run.

    norm(x)  =  x / s(x_full) * w        instead of  x / s(x) * w; LayerNorm still centres x itself

A node that is ablated otherwise changes every other one through the norm. Frozen scales make circuits much larger and
only sometimes more faithful (Drori 2026). With nothing ablated they change nothing: in our models to the last digit, in
a TransformerBridge, which computes an edited norm in other steps, up to rounding.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.interventions.answers import answer_logits
from sparse_interp.model.dense import FwdHooks, HookedModel
from sparse_interp.model.packing import Packing
from sparse_interp.model.sites import FINAL_SCALE_HOOK, SCALE_HOOKS
from sparse_interp.tasks.task import TaskBatch

NormScales = Mapping[str, Tensor]
"""By hook point what norms divide by, [batch pos 1]; the last norm's at the answer position alone."""


@torch.no_grad()
def norm_scales(model: HookedModel, batch: TaskBatch, packing: Packing | None = None) -> NormScales:
    """What norms divide by in a run of `answer_logits` on `batch`, packed or not, with whatever hooks there are."""
    if model.cfg.norm == "none":
        return {}
    scales: dict[str, Tensor] = {}
    names = [hook.format(layer=layer) for layer in range(model.cfg.n_layers) for hook in SCALE_HOOKS]
    with model.hooks(fwd_hooks=[(name, partial(_note, scales, name)) for name in (*names, FINAL_SCALE_HOOK)]):
        answer_logits(model, batch, packing=packing)
    return scales


def _note(scales: dict[str, Tensor], name: str, scale: Tensor, hook: HookPoint) -> None:
    scales[name] = scale


@contextmanager
def frozen_norms(model: HookedModel, scales: NormScales) -> Iterator[None]:
    """Inside the block norms divide by `scales`, in runs of `answer_logits` on the prompts that these are of."""
    hooks: FwdHooks = [(name, partial(_held, scale)) for name, scale in scales.items()]
    with warnings.catch_warnings(), model.hooks(fwd_hooks=hooks):
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        yield


def _held(scale: Tensor, own: Tensor, hook: HookPoint) -> Tensor:
    return scale
