"""What a search for a circuit is asked for, and how it goes about it."""

from dataclasses import dataclass

from sparse_interp.errors import ConfigError
from sparse_interp.model.sites import NODE_SITES

OBJECTIVES = ("agreement", "task_loss")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a circuit is searched for. The defaults ask for agreement with the model, not for doing the task well."""

    objective: str = "agreement"
    """`agreement` (KL to the full model at the answer position) or `task_loss` (the paper's, which may cheat)."""

    k_coef: float = 1e-3
    """Price of one open gate at the start, nats; from there it follows the fit."""

    price_rate: float = 0.015
    """How fast the price follows: its largest relative change per step; 0 keeps it fixed."""

    n_steps: int = 500
    """Optimizer steps on gates."""

    batch_size: int = 32
    """Pairs per step, both prompts of each."""

    lr: float = 3e-2
    """AdamW's learning rate, falling linearly to 0."""

    temperature: float = 1.0
    """T of the gate's surrogate gradient."""

    tau_init: float = 1.5
    """Where gates start; positive is open."""

    noise: float = 1.0
    """Scale of the logistic noise on tau at the start; 0 searches with the paper's deterministic gates."""

    noise_until_frac: float = 0.4
    """Share of the search after which gates are deterministic; until then the noise falls linearly."""

    sites: tuple[str, ...] = NODE_SITES
    """Sites whose nodes have gates; nodes of other sites stay as they are and are not counted."""

    share_qk: bool = True
    """Whether a q and a k node of the same head and channel share one gate: neither does anything alone. With grouped
    queries a k node shares its gate with the q nodes of all heads that meet it."""

    n_train: int = 2048
    """Pairs that gates are trained on."""

    n_selection: int = 256
    """Pairs, apart from those, on which the size is chosen; the test split is never used."""

    max_kl: float = 0.2
    """Largest mean KL(model || circuit) of the chosen circuit on the selection pairs, nats."""

    max_loss_gap: float = 0.03
    """Largest |task loss of circuit - task loss of model| on the selection pairs, nats."""

    target_task_loss: float = 0.15
    """The paper's stopping rule, used by the objective `task_loss` and reported as a column for every search, nats."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r}; choose {' or '.join(map(repr, OBJECTIVES))}.")
        for name in ("n_steps", "batch_size", "n_train", "n_selection"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, and a search needs at least 1.")
        for name in ("lr", "temperature", "max_kl", "max_loss_gap", "target_task_loss"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be above 0.")
        unknown = [site for site in self.sites if site not in NODE_SITES]
        if unknown or not self.sites:
            raise ConfigError(f"sites={self.sites}: expected some of {', '.join(NODE_SITES)}.")
        if self.share_qk and ("q" in self.sites) != ("k" in self.sites):
            raise ConfigError("share_qk needs q and k both among sites, or neither; set share_qk=False.")

    def noise_scale(self, step: int) -> float:
        """Scale of the noise on tau at `step`, counted from 0."""
        return self.noise * max(0.0, 1 - step / max(1.0, self.noise_until_frac * self.n_steps))
