"""AdamW as weight-sparse training wants it: large eps, gradient divided by its own size, a rate that rises as
density falls.

    g  <-  g / rms(g),        rms over every trained entry but the bigram table's
    lr(t) = base_lr * warmup_then_linear(t) / sqrt(density(t))

Released training script: betas 0.9 / 0.95, eps 0.1, weight decay 0.1 decoupled; dense twins use eps 1e-6.
"""

import torch
from torch import Tensor, nn

from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.training.recipes import RunConfig
from sparse_interp.training.sparsity import density_at, lr_multiplier, project_


def lr_schedule(step: int, *, n_steps: int, warmup_frac: float) -> float:
    """Rises linearly to 1 over the first `warmup_frac` of training, then falls linearly to 0."""
    warmup = max(1, round(warmup_frac * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (n_steps - step) / max(1, n_steps - warmup))


def make_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what trains: decay on matrices; none on biases, gains and sinks."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if n.split(".")[-1].startswith("W_")]
    rest = [p for n, p in trained if not n.split(".")[-1].startswith("W_")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def optimizer_of(model: HookedSparseTransformer, run: RunConfig) -> torch.optim.AdamW:
    """The optimizer that `run` asks for."""
    return make_optimizer(model, lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay)


def advance_(
    model: HookedSparseTransformer, optimizer: torch.optim.Optimizer, run: RunConfig, step: int
) -> tuple[float, float]:
    """Step `step` of `run`, once there are gradients: AdamW, then the projection. Returns its rate and density."""
    density = density_at(
        step,
        n_steps=run.n_steps,
        final_density=run.model.density,
        schedule=run.density_schedule,
        begin_frac=run.density_begin_frac,
        end_frac=run.density_end_frac,
    )
    lr = run.lr * lr_schedule(step, n_steps=run.n_steps, warmup_frac=run.warmup_frac)
    lr *= lr_multiplier(density) if run.lr_follows_density else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    project_(model, density)
    return lr, density


def gradient_rms(model: nn.Module) -> float:
    """Root mean square over every gradient."""
    return _rms([p.grad for p in model.parameters() if p.grad is not None])


def _rms(grads: list[Tensor]) -> float:
    if not grads:
        return 0.0
    squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
    return float((squares / sum(g.numel() for g in grads)).sqrt())


@torch.no_grad()
def normalise_gradients_(model: nn.Module) -> float:
    """Divide every gradient by the root mean square over all of them, and return it.

    A learnable bigram table is divided by a size of its own: its millions of near-zero entries would drown the rest.
    """
    by_group: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.grad is not None:
            by_group[name == "bigram_table"].append(p.grad)
    sizes = {}
    for table, grads in by_group.items():
        if grads:
            sizes[table] = _rms(grads)
            if sizes[table] > 0:
                torch._foreach_div_(grads, sizes[table])
    return sizes.get(False, 0.0)
