"""The planted cases of the board: which algorithm is hidden in which host.

    name  =  algorithm, size, what is other than usual           quote-small, quote-medium-dense, quote-small-noise0.01

    algorithms    the hand-built models; two of them joined; copies of one of them, each of which is enough
    sizes         small 3 layers x 48 channels, medium 4 x 64, large 6 x 128
    densities     of the free heads and neurons: 0.1 as a rule; 0.02, 0.5, and 1 (a dense host)
    noise         none as a rule; 0.003 and 0.01: small weights from the free parts into the algorithm and the logits
    opposed       in each layer two heads that cancel, of which one, with the other held, stands in for a head of the
                  key: a circuit that only partial ablation tells from the true one

Every case is drawn from a generator that is seeded with its name, so that it is the same on every board, and every key
is measured when its case is built (planted.py). `default` has each hand-built algorithm once, each way of putting them
together once, and each size, density and noise at least once; `full` has all algorithms in all hosts, opposed ones too.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from sparse_interp.errors import ConfigError
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.composed import copied, joined
from sparse_interp.faithfulness.ground_truth import ground_truth, ground_truths
from sparse_interp.faithfulness.planted import PlantConfig, planted

HOSTS = {
    "small": PlantConfig(n_layers=3, d_model=48, n_heads=8, d_mlp=32),
    "medium": PlantConfig(n_layers=4, d_model=64, n_heads=8, d_mlp=64),
    "large": PlantConfig(n_layers=6, d_model=128, n_heads=16, d_mlp=128),
}
"""Sizes, at a density of 0.1 and without noise."""

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "sparser": {"density": 0.02},
    "denser": {"density": 0.5},
    "dense": {"density": 1.0},
    "noise0.003": {"noise": 0.003},
    "noise0.01": {"noise": 0.01},
    "opposed": {"n_opposed": 1, "n_heads": 12},
}
"""What may be other than usual."""

JOINED = {"quote_and_distractor": ("quote", "distractor"), "quote_and_two_copies": ("quote", "two_copies")}
"""Algorithms that an answer needs both of."""

COPIED = {"quote_x2": ("quote", 2), "distractor_x2": ("distractor", 2), "bracket_depth_x3": ("bracket_depth", 3)}
"""Algorithms that are there several times, each of which is enough."""

DEFAULT = (
    "quote-large-sparser",
    "mlp_gate-small",
    "attention_copy-medium",
    "induction-small-denser",
    "bracket_depth-small-noise0.003",
    "two_hop-medium",
    "distractor-small-dense",
    "backup-small",
    "two_copies-medium",
    "quote-small-noise0.01",
    "quote_and_distractor-medium",
    "quote_x2-small",
)
"""The default board."""


@dataclass(frozen=True)
class PlantedCase:
    """An algorithm and where it is hidden."""

    algorithm: str
    """A hand-built model, or a name in JOINED or COPIED."""

    size: str
    """One of HOSTS."""

    variant: str = ""
    """One of VARIANTS."""

    name: str = field(init=False)
    """What the board calls it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "-".join(filter(None, (self.algorithm, self.size, self.variant))))

    @property
    def config(self) -> PlantConfig:
        """The host."""
        return replace(HOSTS[self.size], **VARIANTS[self.variant])

    def build(self) -> GroundTruth:
        """The model, its task and its answer key: the same whenever it is built."""
        seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        found = planted(algorithms()[self.algorithm](), self.config, generator=generator)
        return replace(found, name=self.name, why=f"{found.why} All this is hidden: {self.config}.")


def algorithms() -> dict[str, Callable[[], GroundTruth]]:
    """What may be hidden: name -> a function that builds it by itself."""
    found = ground_truths()
    for name, (first, second) in JOINED.items():
        found[name] = partial(_joined, first, second)
    for name, (one, n) in COPIED.items():
        found[name] = partial(_copied, one, n)
    return found


def planted_cases(board: str = "default") -> dict[str, Callable[[], GroundTruth]]:
    """The planted cases of a board, `default` or `full`: name -> a function that builds it, seconds each.

    Raises:
        ConfigError: for another board.
    """
    cases = {case.name: case.build for case in _all_cases()}
    if board == "full":
        return cases
    if board != "default":
        raise ConfigError(f"board={board!r}; expected 'default' or 'full'.")
    return {name: cases[name] for name in DEFAULT}


def _all_cases() -> list[PlantedCase]:
    """Every algorithm in every host; the larger hosts at their usual density, and noise in the small one."""
    within = {
        "small": ("", "dense", "denser", "noise0.003", "noise0.01"),
        "medium": ("", "sparser", "dense", "opposed"),
        "large": ("", "sparser"),
    }
    return [
        PlantedCase(algorithm, size, variant)
        for algorithm in algorithms()
        for size, variants in within.items()
        for variant in variants
    ]


def _joined(first: str, second: str) -> GroundTruth:
    return joined(ground_truth(first), ground_truth(second), generator=torch.Generator().manual_seed(0))


def _copied(name: str, n: int) -> GroundTruth:
    return copied(ground_truth(name), n, generator=torch.Generator().manual_seed(0))
