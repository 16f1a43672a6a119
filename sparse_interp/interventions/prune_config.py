"""What a search for a circuit is asked for, and how it goes about it."""

from dataclasses import dataclass

from sparse_interp.errors import ConfigError
from sparse_interp.model.sites import NODE_SITES

OBJECTIVES = ("agreement", "task_loss", "logit_difference")
SCHEMES = ("full", "stochastic", "adversarial")
TARGETS = ("agreement", "kl", "loss_gap", "task_loss", "logit_difference")

BOUND_IN_LOSS = ("agreement", "loss_gap", "logit_difference")
"""Targets that include max_loss_gap."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a circuit is searched for. The defaults ask for agreement with the model, not for doing the task well."""

    objective: str = "agreement"
    """What the search minimises besides size: `agreement` (KL to the full model at the answer position, nats),
    `logit_difference` (mean squared error of the model's logit difference, as a share of its mean square), or
    `task_loss` (the paper's, nats, which may cheat)."""

    schemes: tuple[str, ...] = ("full",)
    """How nodes outside are ablated while gates are trained, of `full`, `stochastic` (of each a random share is left,
    one draw per batch) and `adversarial` (the share that hurts most); of several, the objective is their mean. Sizes
    are chosen under full ablation whatever is said here."""

    adversary_steps: int = 4
    """Steps of sign-gradient ascent that the scheme `adversarial` takes from a stochastic draw on every batch."""

    adversary_step_size: float = 0.25
    """How far each of them moves the share that is left of a node, which stays within [0, 1]."""

    frozen_norms: bool = False
    """Whether norms divide by what they divide by in the full model's run on the same prompts, both while gates are
    trained and while the size is chosen."""

    per_position: bool = False
    """Whether a node has a gate of its own at every position; all prompts of the task have to be of one length then."""

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

    target: str = "objective"
    """What a circuit has to reach: `agreement` (max_kl and max_loss_gap), `kl` (max_kl), `loss_gap` (max_loss_gap),
    `task_loss` (target_task_loss) or `logit_difference` (max_ld_error and max_loss_gap); `objective` takes the one
    called like the objective."""

    max_kl: float = 0.2
    """Largest mean KL(model || circuit) of the chosen circuit on the selection pairs, nats."""

    max_loss_gap: float = 0.03
    """Largest |task loss of circuit - task loss of model| on the selection pairs, nats."""

    max_ld_error: float = 0.05
    """Largest mean squared error of the logit difference on the selection pairs, as a share of the model's own mean
    square."""

    target_task_loss: float = 0.15
    """The paper's stopping rule, used by the target `task_loss` and reported as a column for every search, nats."""

    stop_after: int = 0
    """End the search early once gates are without noise and the number of open ones has stayed within 1 % for this
    many steps; 0 never does."""

    calibrate: bool = False
    """Whether to fit one scale to the circuit's logits in the end and report losses with it too; decides nothing."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r}; choose {' or '.join(map(repr, OBJECTIVES))}.")
        if self.target not in ("objective", *TARGETS):
            raise ConfigError(f"target={self.target!r}; choose 'objective' or {' or '.join(map(repr, TARGETS))}.")
        if not self.schemes or len({*self.schemes} & {*SCHEMES}) < len(self.schemes):
            raise ConfigError(f"schemes={self.schemes}: expected some of {', '.join(SCHEMES)}, each once.")
        for name in ("n_steps", "batch_size", "n_train", "n_selection"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, and a search needs at least 1.")
        above_0 = ("lr", "temperature", "max_kl", "max_loss_gap", "max_ld_error", "target_task_loss")
        for name in (*above_0, "adversary_step_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be above 0.")
        for name in ("adversary_steps", "stop_after", "k_coef", "price_rate", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it cannot be below 0.")
        unknown = [site for site in self.sites if site not in NODE_SITES]
        if unknown or not self.sites:
            raise ConfigError(f"sites={self.sites}: expected some of {', '.join(NODE_SITES)}.")
        if self.share_qk and ("q" in self.sites) != ("k" in self.sites):
            raise ConfigError("share_qk needs q and k both among sites, or neither; set share_qk=False.")

    @property
    def rule(self) -> str:
        """What a circuit has to reach, one of TARGETS."""
        return self.objective if self.target == "objective" else self.target

    def noise_scale(self, step: int) -> float:
        """Scale of the noise on tau at `step`, counted from 0."""
        return self.noise * max(0.0, 1 - step / max(1.0, self.noise_until_frac * self.n_steps))
