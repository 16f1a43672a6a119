"""Frozen norms: while nodes are ablated, norms divide by what they divided by in the full model's run.

    norm(x)  =  x / s(x_full) * w        instead of  x / s(x) * w; LayerNorm still centres x itself

A node that is ablated otherwise changes every other one through the norm. Frozen scales make circuits much larger and
only sometimes more faithful (Drori 2026); with nothing ablated they change nothing, to the last digit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.interventions.answers import answer_logits
from sparse_interp.model.dense import FwdHooks, HookedModel
from sparse_interp.model.sites import FINAL_SCALE_HOOK, SCALE_HOOKS
from sparse_interp.tasks.task import TaskBatch


@torch.no_grad()
def frozen_norm_hooks(model: HookedModel, batch: TaskBatch) -> FwdHooks:
    """Hooks under which `answer_logits` on `batch` divides by the scales that it finds without them.

    They are of this batch and this order of prompts; hooks that are on the model already take part in the run.
    """
    if model.cfg.norm == "none":
        return []
    scales: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(scale: Tensor, hook: HookPoint) -> None:
            scales[name] = scale

        return hook

    def hold(name: str) -> Callable:
        def hook(scale: Tensor, hook: HookPoint) -> Tensor:
            return scales[name]

        return hook

    names = [hook.format(layer=layer) for layer in range(model.cfg.n_layers) for hook in SCALE_HOOKS]
    with model.hooks(fwd_hooks=[(name, note(name)) for name in (*names, FINAL_SCALE_HOOK)]):
        answer_logits(model, batch)
    return [(name, hold(name)) for name in scales]
