"""A model's card: where it comes from and what it is worth, as numbers that `si.models()` and readers take up.

Non-zero parameters are counted over everything that is stored, in groups, so that what stays dense is not hidden.
A neuron is *silent* if it is zero at every position of the held-out text, and *unwired* if no weight enters or none
leaves it.
"""

import json
import platform
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.model.sites import NEURON
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tokenizer import bigram_loss
from sparse_interp.training.recipes import RunConfig
from sparse_interp.training.sparsity import sparse_matrices, sparsity_report
from sparse_interp.training.text import TrainingText


def model_card(
    model: HookedSparseTransformer,
    run: RunConfig,
    text: TrainingText,
    *,
    seconds: float,
    loss: float,
    command: str | None,
) -> dict[str, Any]:
    """What a reader wants to know of `model`; `loss` is its loss on `text.validation`, nats."""
    return {
        "name": run.model.model_name,
        "kind": "sparse" if run.model.density < 1 else "dense",
        "command": command,
        "n_tokens": run.n_steps * run.batch_size * run.model.n_ctx,
        "epochs": run.n_steps * run.batch_size * (run.model.n_ctx - 1) / len(text.stream),
        "wall_time_s": round(seconds),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "validation": {
            "loss_nats": loss,
            "bigram_loss_nats": None if text.bigram_table is None else bigram_loss(text.bigram_table, text.validation),
            "n_blocks": len(text.validation),
            "n_ctx": text.validation.shape[1],
        },
        "parameters": parameter_counts(model),
        "neurons": neuron_counts(model, text.validation),
        "recipe": json.loads(run.to_json()),
        "text": dict(text.source),
        "text_sha256": text.sha256(),
    }


def parameter_counts(model: HookedSparseTransformer) -> dict[str, Any]:
    """Non-zero and all entries: of the sparse matrices, of what stays dense, of the bigram table, and together."""
    sparse = {id(p) for matrix in sparse_matrices(model) for p in matrix.parts}
    counts = {"sparse_matrices": [0, 0], "dense_rest": [0, 0], "bigram_table": [0, 0]}
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        group = (
            "bigram_table" if name == "bigram_table" else "sparse_matrices" if id(tensor) in sparse else "dense_rest"
        )
        counts[group][0] += int(tensor.count_nonzero())
        counts[group][1] += tensor.numel()
    rows = sparsity_report(model)
    return {
        "n_nonzero": sum(nonzero for nonzero, _ in counts.values()),
        "n_entries": sum(size for _, size in counts.values()),
        **{f"{group}_nonzero": nonzero for group, (nonzero, _) in counts.items()},
        **{f"{group}_entries": size for group, (_, size) in counts.items()},
        "density_by_matrix": {row.name: row.density for row in rows},
        "rows_without_weight": {row.name: row.dead_rows for row in rows if row.dead_rows},
        "columns_without_weight": {row.name: row.dead_columns for row in rows if row.dead_columns},
    }


@torch.no_grad()
def neuron_counts(model: HookedSparseTransformer, blocks: Tensor, batch_size: int = 16) -> dict[str, list[int]]:
    """For each layer: neurons, those that are zero throughout `blocks`, and those without weights in or out."""
    cfg = model.cfg
    active = [torch.zeros(cfg.d_mlp or 0, dtype=torch.bool) for _ in range(cfg.n_layers)]

    def watch(layer: int):
        def hook(activation: Tensor, hook: HookPoint) -> None:
            active[layer] |= (activation != 0).flatten(0, 1).any(0).cpu()

        return hook

    was_training = model.training
    model.eval()
    with model.hooks(fwd_hooks=[(NEURON.at(layer), watch(layer)) for layer in range(cfg.n_layers)]):
        for batch in blocks.split(batch_size):
            model(batch.to(model.embed.W_E.device), return_type=None)
    model.train(was_training)
    unwired = [int((~((b.mlp.W_in != 0).any(0) & (b.mlp.W_out != 0).any(1))).sum()) for b in model.layers]
    return {
        "n_neurons": [cfg.d_mlp or 0] * cfg.n_layers,
        "n_silent": [int((~a).sum()) for a in active],
        "n_unwired": unwired,
    }
