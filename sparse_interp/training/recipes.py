"""What a training run is, and the named runs. A control is its recipe changed in one place."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from sparse_interp.errors import ConfigError
from sparse_interp.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides how a model comes out of training."""

    name: str
    """What the run and its model are called."""

    model: ModelConfig
    """Shape of the model; its `density` is the target of the anneal."""

    n_tokens: int
    """Tokens that the model sees, repeats counted."""

    batch_size: int = 32
    """Blocks of `n_ctx` tokens per step."""

    lr: float = 1e-2
    """Peak learning rate at density 1; divided by sqrt(density) as the density falls."""

    lr_follows_density: bool = True
    """Whether the learning rate is divided by sqrt(density)."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 0.1
    """AdamW's eps, against gradients of root mean square 1."""

    weight_decay: float = 0.1
    """AdamW's decoupled decay of weight matrices, times the learning rate."""

    warmup_frac: float = 0.01
    """Share of training over which the learning rate rises."""

    density_schedule: str = "exponential"
    """`exponential` or `linear` fall of the density."""

    density_begin_frac: float = 0.01
    """Share of training before the density begins to fall."""

    density_end_frac: float = 0.5
    """Share of training at which the density has reached its target."""

    precision: str = "bf16"
    """`bf16` autocast around the forward, or `fp32`; weights, loss and optimizer are float32 in both."""

    seed: int = 0
    """Seed of the initial weights and of the order of the text."""

    validate_every: int = 500
    """Steps between two measurements on held-out text."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.n_tokens // (self.batch_size * self.model.n_ctx)

    def __post_init__(self) -> None:
        for name in ("n_tokens", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, and a run needs at least 1.")
        if self.n_steps < 1:
            raise ConfigError(
                f"n_tokens={self.n_tokens} is less than one step, which reads batch_size * n_ctx = {self.batch_size} * "
                f"{self.model.n_ctx} = {self.batch_size * self.model.n_ctx} tokens; give at least that many."
            )
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision={self.precision!r}; choose 'bf16' or 'fp32'.")
        if self.density_schedule not in ("exponential", "linear"):
            raise ConfigError(f"density_schedule={self.density_schedule!r}; choose 'exponential' or 'linear'.")
        if not 0 <= self.density_begin_frac < self.density_end_frac <= 1:
            raise ConfigError(
                f"density falls from {self.density_begin_frac} to {self.density_end_frac} of training; the first must "
                "be at least 0 and below the second, and the second at most 1."
            )
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}, and it must be above 0.")
        if not 0 <= self.warmup_frac <= 1 or self.weight_decay < 0 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(
                f"warmup_frac={self.warmup_frac}, weight_decay={self.weight_decay}, betas={self.betas}: a share of "
                "training in [0, 1], a decay of at least 0 and two rates in [0, 1) are needed."
            )

    def to_json(self) -> str:
        """The run as JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["model"] = json.loads(self.model.to_json())
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Inverse of `to_json`; unknown keys raise ConfigError."""
        try:
            data: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"a run config is not JSON: {error}.") from error
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown field {key!r} in a run config.{hint} Known: {', '.join(sorted(known))}.")
        try:
            data["model"] = ModelConfig.from_dict(data["model"])
            data["betas"] = tuple(data.get("betas", (0.9, 0.95)))
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"a run config is incomplete or has a value of the wrong kind: {error}.") from error

    def differences(self, other: "RunConfig") -> list[str]:
        """`field: mine, not theirs` for each field in which the two runs differ, those of the model included."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        mine |= {f"model.{k}": v for k, v in mine.pop("model").items()}
        theirs |= {f"model.{k}": v for k, v in theirs.pop("model").items()}
        return [f"{k}: {v}, not {theirs.get(k)}" for k, v in mine.items() if v != theirs.get(k)]


def stdlib_small() -> RunConfig:
    """The bundled sparse model: Python source, one weight in twenty, one activation in four."""
    model = ModelConfig(
        model_name="stdlib-small",
        n_layers=2,
        d_model=256,
        d_head=16,
        n_ctx=128,
        d_vocab=2048,
        density=0.05,
        afrac=0.25,
        tokenizer_name="python_2k",
        seed=0,
    )
    return RunConfig(name="stdlib-small", model=model, n_tokens=61_000_000)


def stdlib_small_control() -> RunConfig:
    """`stdlib_small` with every weight allowed: nothing but the density, and the names, differs."""
    run = stdlib_small()
    model = replace_model(run.model, model_name="stdlib-small-control", density=1.0)
    return replace(run, name="stdlib-small-control", model=model)


def stdlib_small_dense() -> RunConfig:
    """The dense twin that a user would compare with: no AbsTopK, its own optimizer, width set to match the loss."""
    run = stdlib_small()
    model = replace_model(
        run.model, model_name="stdlib-small-dense", density=1.0, afrac=None, d_model=128, n_heads=8, d_mlp=512
    )
    return replace(
        run, name="stdlib-small-dense", model=model, n_tokens=18_000_000, eps=1e-6, lr=1e-2, lr_follows_density=False
    )


def tiny() -> RunConfig:
    """Two layers of width 32 for a few hundred thousand tokens: seconds, for tests and for trying the command."""
    run = stdlib_small()
    model = replace_model(run.model, model_name="tiny", d_model=32, n_heads=2, d_mlp=128, n_ctx=64)
    return replace(run, name="tiny", model=model, n_tokens=400_000, validate_every=100, checkpoint_every=100)


def replace_model(model: ModelConfig, **changes: Any) -> ModelConfig:
    """A copy of `model` with `changes`, derived fields worked out anew."""
    return ModelConfig.from_dict({**json.loads(model.to_json()), **changes})


RECIPES: dict[str, Callable[[], RunConfig]] = {
    f().name: f for f in (stdlib_small, stdlib_small_control, stdlib_small_dense, tiny)
}


def recipe(name: str) -> RunConfig:
    """The named run.

    Raises:
        ConfigError: for a name that no run has, with the nearest ones.
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise ConfigError(f"no recipe is called {name!r}; the nearest are {', '.join(near)}.")
    return RECIPES[name]()
