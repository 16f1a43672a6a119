"""What a bridge is made of and how it is trained. The numbers are those of the paper where it gives any.

    loss = next_token_coef * CE(sparse)  +  distillation_coef * KL(dense || sparse)          with the sparse model alone
         + sum over pairs of  encode_coef * NMSE(encode(dense), sparse)  +  decode_coef * NMSE(decode(sparse), dense)
         + sum over pairs of  enter_sparse_coef * KL(dense || sparse entered from encode(dense))
                            +  enter_dense_coef * KL(dense || dense entered from decode(sparse))
                            +  interchange_coef * share of a change of channels that is not carried

Gao et al. 2025 (arXiv 2511.13653), but for the last (`bridges/interchange.py`); every loss is per token.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NamedTuple

from sparse_interp.errors import BridgeError
from sparse_interp.model.sites import n_stream_sites

ENCODERS = ("abs_topk", "threshold")


class SitePair(NamedTuple):
    """A residual site of the sparse model and the one of the dense model that it is tied to."""

    sparse: int
    """Residual site of the sparse model: 0 before block 0, 2 l + 1 after attention of block l, 2 l + 2 after its MLP.
    """

    dense: int
    """Residual site of the dense model, counted the same way."""

    def __str__(self) -> str:
        return f"{self.sparse}-{self.dense}"


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Which sites are tied, by what maps, and how these are trained."""

    sites: tuple[tuple[int, int], ...] | None = None
    """Pairs of residual sites, sparse and dense, in the order of the forward pass; None ties every site of two models
    of equal depth."""

    encoder: str = "abs_topk"
    """What follows the encoder's linear map: `abs_topk`, or `threshold`, a learned one for every channel."""

    afrac: float = 0.25
    """Share of a sparse stream's channels that the encoder leaves non-zero, in (0, 1]; with `threshold` only to begin
    with."""

    bandwidth: float = 0.3
    """How far from its threshold, in units of log magnitude, a channel still has a say in where that goes."""

    encode_coef: float = 1.0
    """Coefficient of NMSE(encode(dense), sparse)."""

    decode_coef: float = 1.0
    """Coefficient of NMSE(decode(sparse), dense)."""

    enter_sparse_coef: float = 1.0
    """Coefficient of KL(dense || sparse model entered from encoded dense activations), nats per token."""

    enter_dense_coef: float = 1.0
    """Coefficient of KL(dense || dense model entered from decoded sparse activations), nats per token."""

    interchange_coef: float = 1.0
    """Coefficient of the share of the sparse model's change, as some channels are exchanged between blocks of a batch,
    that the dense model's is not (`bridges/interchange.py`)."""

    distillation_coef: float = 1.0
    """Coefficient of KL(dense || sparse), nats per token; counts where the sparse model is trained too."""

    next_token_coef: float = 1.0
    """Coefficient of the sparse model's next-token loss, nats per token; counts where the sparse model is trained."""

    entries_per_step: int | None = 2
    """Pairs at which a step enters both models, drawn so that all have their turn; None enters at every pair."""

    n_steps: int = 4000
    """Optimizer steps."""

    batch_size: int = 16
    """Blocks of text per step."""

    lr: float = 2e-3
    """Peak learning rate of the bridge. Between models that stay as they are: in the coordinates of
    `bridges/coordinates.py`, where a gradient is in units of the error of a map."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment, for the bridge."""

    eps: float = 1e-2
    """AdamW's eps, for the bridge: below gradients of this size a step falls with the gradient."""

    warmup_frac: float = 0.01
    """Share of training over which the bridge's learning rate rises; then it falls linearly to 0."""

    precision: str = "fp32"
    """`bf16` autocast around the forward passes, or `fp32`; weights, losses and optimizers are float32 in both."""

    seed: int = 0
    """Seed of the order of the text and of the sites entered."""

    validate_every: int = 500
    """Steps between two measurements on held-out blocks."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        if self.sites is not None:
            object.__setattr__(self, "sites", _pairs(self.sites))
            check_order(_pairs(self.sites))
        if self.encoder not in ENCODERS:
            raise BridgeError(f"encoder={self.encoder!r}; choose {' or '.join(map(repr, ENCODERS))}.")
        if not 0 < self.afrac <= 1:
            raise BridgeError(f"afrac={self.afrac} is not a share in (0, 1]; 1 keeps every channel.")
        if self.precision not in ("bf16", "fp32"):
            raise BridgeError(f"precision={self.precision!r}; choose 'bf16' or 'fp32'.")
        for name in ("n_steps", "batch_size", "validate_every", "checkpoint_every", "entries_per_step"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BridgeError(f"{name}={getattr(self, name)}, and at least 1 is needed.")
        for name in ("lr", "eps", "bandwidth"):
            if getattr(self, name) <= 0:
                raise BridgeError(f"{name}={getattr(self, name)}, and it must be above 0.")
        for field in fields(self):
            if field.name.endswith("_coef") and getattr(self, field.name) < 0:
                raise BridgeError(f"{field.name}={getattr(self, field.name)}; a loss counts at least 0.")
        if self.interchange_coef > 0 and self.batch_size < 2:
            raise BridgeError(
                f"batch_size={self.batch_size} with interchange_coef={self.interchange_coef}: channels are exchanged "
                "between blocks of a batch, and at least 2 are needed. Take more, or interchange_coef=0."
            )
        if not 0 <= self.warmup_frac <= 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise BridgeError(
                f"warmup_frac={self.warmup_frac}, betas={self.betas}: a share of training in [0, 1] and two rates in "
                "[0, 1) are needed."
            )

    def pairs_of(self, n_sparse: int, n_dense: int) -> tuple[SitePair, ...]:
        """The pairs between models of so many layers.

        Raises:
            BridgeError: if a site does not exist, or the depths differ and no map says which sites belong together.
        """
        if self.sites is None:
            if n_sparse != n_dense:
                raise BridgeError(
                    f"the sparse model has {n_sparse} layers and the dense one {n_dense}: say which sites belong "
                    f"together, as in sites=(SitePair(0, 0), SitePair({2 * n_sparse}, {2 * n_dense}))."
                )
            return tuple(SitePair(site, site) for site in range(n_stream_sites(n_sparse)))
        pairs = _pairs(self.sites)
        for kind, n_layers in (("sparse", n_sparse), ("dense", n_dense)):
            for pair in pairs:
                if not 0 <= getattr(pair, kind) < n_stream_sites(n_layers):
                    raise BridgeError(
                        f"sites names {kind} site {getattr(pair, kind)}, and the {kind} model has {n_layers} layers, "
                        f"whose residual sites are 0 to {2 * n_layers}."
                    )
        return pairs

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can say it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BridgeConfig":
        """Inverse of `to_dict`; an unknown key raises BridgeError, naming the nearest field.

        A bridge of which nothing is said of interchanges was trained before there were any.
        """
        data = {"interchange_coef": 0.0} | data
        known = {field.name for field in fields(cls)}
        for key in data:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise BridgeError(
                    f"unknown field {key!r} in a bridge's config.{hint} Known: {', '.join(sorted(known))}."
                )
        data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        if data.get("sites") is not None:
            data["sites"] = tuple(map(tuple, data["sites"]))
        try:
            return cls(**data)
        except TypeError as error:
            raise BridgeError(f"a bridge's config has a value of the wrong kind: {error}.") from error


def _pairs(sites: Sequence[Sequence[int]]) -> tuple[SitePair, ...]:
    try:
        return tuple(SitePair(*pair) for pair in sites)
    except TypeError as error:
        raise BridgeError(f"sites={sites!r}; it is a tuple of pairs (sparse site, dense site).") from error


def check_order(pairs: Sequence[SitePair]) -> None:
    """Raise BridgeError unless there are pairs, none twice, in the order in which both forward passes meet them."""
    if not pairs:
        raise BridgeError("no pair of sites is named; a bridge needs at least one, and None ties all of them.")
    for before, after in pairwise(pairs):
        if before == after:
            raise BridgeError(f"the pair {after} is named twice.")
        if after.sparse < before.sparse or after.dense < before.dense:
            raise BridgeError(
                f"the pair {after} follows {before}: pairs are named in the order of the forward pass, and must not "
                "lead back in either model."
            )
