"""A bridge: at each of some residual sites, a map from a dense model's stream to a sparse one's, and one back.

    encode(x) = T(x W_encode + b_encode)          dense -> sparse;  T = AbsTopK, or a threshold learned per channel
    decode(y) = y W_decode + b_decode             sparse -> dense

Gao et al. 2025 (arXiv 2511.13653). The threshold:  T(z) = z where |z| > theta, else 0.  As a step it has no gradient
for theta; as the derivative of the expected loss it has one, which a symmetric kernel K estimates without bias as its
width goes to 0, and exactly so where the loss is quadratic (Rajamanoharan et al. 2024, arXiv 2407.14435, there for
positive activations). With u = log |z| - log theta, dT/dlog theta = -z K(u / width) / width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_interp.bridges.bridge_config import BridgeConfig, SitePair
from sparse_interp.bridges.files import MAPS, bridge_folder, read_bridge, write_bridge
from sparse_interp.errors import BridgeError
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.kernels import abs_topk
from sparse_interp.tokenizer import tokenizer_hash

DenseStream = Float[Tensor, "*batch d_dense"]
SparseStream = Float[Tensor, "*batch d_sparse"]

RIDGES = (1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths of a ridge regression to choose from, as shares of the mean variance of what is read."""


@dataclass(frozen=True)
class End:
    """What a bridge knows of a model that it leads to."""

    name: str
    """What the model is called."""

    n_layers: int
    """Its blocks."""

    d_model: int
    """Channels of its stream."""

    d_vocab: int
    """Its token ids."""

    weights_sha256: str
    """Which weights it has."""

    tokenizer_sha256: str | None
    """Which tokenizer it has; None where it has none."""

    @classmethod
    def of(cls, model: AnyModel) -> "End":
        """What there is to know of `model`."""
        model = hooked(model)
        tokenizer, cfg = model.tokenizer, model.cfg
        found = None if tokenizer is None else tokenizer_hash(tokenizer)
        return cls(cfg.model_name, cfg.n_layers, cfg.d_model, cfg.d_vocab, weights_sha256(model), found)


class _Threshold(torch.autograd.Function):
    """z where |z| > theta, else 0; a gradient for z where it is kept, and for log theta near the threshold."""

    @staticmethod
    def forward(ctx, z: Tensor, log_theta: Tensor, width: float) -> Tensor:
        kept = z * (z.abs() > log_theta.exp())
        ctx.save_for_backward(z, kept, log_theta)
        ctx.width = width
        return kept

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, kept, log_theta = ctx.saved_tensors
        near = ((z.abs().log() - log_theta).abs() < ctx.width / 2) / ctx.width
        to_theta = -(grad * z * near).flatten(0, -2).sum(0)
        return grad * (kept != 0), to_theta.to(log_theta.dtype), None


def threshold(z: SparseStream, log_theta: Float[Tensor, " d_sparse"], width: float) -> SparseStream:
    """`z` where its magnitude exceeds exp(`log_theta`), else 0; `width` is that of the kernel, in log |z|."""
    return _Threshold.apply(z, log_theta, width)  # pyright: ignore[reportReturnType]


class PairMap(nn.Module):
    """Encoder and decoder of one pair of sites."""

    def __init__(self, config: BridgeConfig, d_sparse: int, d_dense: int):
        super().__init__()
        self.k = max(1, int(config.afrac * d_sparse))
        """Channels that AbsTopK keeps."""
        self.bandwidth = config.bandwidth
        self.W_encode = nn.Parameter(torch.zeros(d_dense, d_sparse))
        self.b_encode = nn.Parameter(torch.zeros(d_sparse))
        self.W_decode = nn.Parameter(torch.zeros(d_sparse, d_dense))
        self.b_decode = nn.Parameter(torch.zeros(d_dense))
        learned = config.encoder == "threshold"
        self.log_theta = nn.Parameter(torch.zeros(d_sparse)) if learned else None

    def before_cut(self, dense_resid: DenseStream) -> SparseStream:
        """The encoder's linear map alone."""
        return dense_resid.to(self.W_encode.dtype) @ self.W_encode + self.b_encode

    def encode(self, dense_resid: DenseStream) -> SparseStream:
        """Dense stream to sparse stream."""
        linear = self.before_cut(dense_resid)
        if self.log_theta is None:
            return abs_topk(linear, self.k)
        return threshold(linear, self.log_theta, self.bandwidth)

    def decode(self, sparse_resid: SparseStream) -> DenseStream:
        """Sparse stream to dense stream."""
        return sparse_resid.to(self.W_decode.dtype) @ self.W_decode + self.b_decode


class Bridge(nn.Module):
    """Maps between the streams of a sparse and a dense model, neither of which it holds.

    Args:
        config: which sites are tied, and by what kind of map.
        sparse: what the sparse model is; `End.of(model)`.
        dense: what the dense model is.
        generator: draws the initial weights; None leaves them at zero, for weights that are set or fitted.

    Raises:
        BridgeError: if the two do not share token ids or a tokenizer, or a site does not exist.
    """

    def __init__(self, config: BridgeConfig, sparse: End, dense: End, *, generator: torch.Generator | None = None):
        super().__init__()
        _refuse_other_tokens(sparse, dense)
        self.config, self.sparse, self.dense = config, sparse, dense
        self.pairs = config.pairs_of(sparse.n_layers, dense.n_layers)
        """Tied sites, in the order of the forward pass."""
        self.maps = nn.ModuleDict({str(p): PairMap(config, sparse.d_model, dense.d_model) for p in self.pairs})
        if generator is not None:
            self._draw_(generator)

    @classmethod
    def between(
        cls,
        sparse: AnyModel,
        dense: AnyModel,
        config: BridgeConfig | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> "Bridge":
        """An untrained bridge between two models.

        Raises:
            BridgeError: if the two do not share token ids or a tokenizer, or a site does not exist.
        """
        bridge = cls(config or BridgeConfig(), End.of(sparse), End.of(dense), generator=generator)
        return bridge.to(hooked(sparse).embed.W_E.device)

    @torch.no_grad()
    def _draw_(self, generator: torch.Generator) -> None:
        for part in self.maps.values():
            for weight in (part.W_encode, part.W_decode):
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[0] ** 0.5)

    # -- crossing -----------------------------------------------------------------------------------------------------

    def encode(self, dense_resid: Float[Tensor, "*batch d_dense"], pair: SitePair) -> Float[Tensor, "*batch d_sparse"]:
        """What the sparse model's stream is at `pair.sparse`, said of the dense one's at `pair.dense`.

        Raises:
            BridgeError: if the bridge does not tie these sites, or the stream has another width.
        """
        return self._map(pair, dense_resid, self.dense.d_model).encode(dense_resid)

    def decode(self, sparse_resid: Float[Tensor, "*batch d_sparse"], pair: SitePair) -> Float[Tensor, "*batch d_dense"]:
        """What the dense model's stream is at `pair.dense`, said of the sparse one's at `pair.sparse`.

        Raises:
            BridgeError: if the bridge does not tie these sites, or the stream has another width.
        """
        return self._map(pair, sparse_resid, self.sparse.d_model).decode(sparse_resid)

    def __getitem__(self, pair: SitePair) -> PairMap:
        """The weights of one pair.

        Raises:
            BridgeError: if the bridge does not tie these sites.
        """
        if pair not in self.pairs:
            tied = ", ".join(map(str, self.pairs))
            raise BridgeError(f"the bridge does not tie sites {SitePair(*pair)} (sparse-dense); it ties {tied}.")
        return self.maps[str(SitePair(*pair))]  # pyright: ignore[reportReturnType]

    def _map(self, pair: SitePair, resid: Tensor, d_model: int) -> PairMap:
        if resid.shape[-1] != d_model:
            raise BridgeError(f"a stream of {resid.shape[-1]} channels came to a bridge's side of {d_model}.")
        return self[pair]

    # -- what it belongs to -------------------------------------------------------------------------------------------

    def check(self, sparse: AnyModel, dense: AnyModel, *, weights: bool = False) -> None:
        """Raise BridgeError unless the bridge fits two models: depth, width, token ids and tokenizers.

        With `weights`, these have to be those of the models that it was made for, too.
        """
        self.check_shapes(sparse, dense)
        for kind, end, model in (("sparse", self.sparse, sparse), ("dense", self.dense, dense)):
            found = hooked(model).cfg
            tokenizer = hooked(model).tokenizer
            if None not in (tokenizer, end.tokenizer_sha256) and tokenizer_hash(tokenizer) != end.tokenizer_sha256:
                raise BridgeError(
                    f"{found.model_name!r} has another tokenizer than {end.name!r}, to which the bridge leads: its "
                    f"sha256 is {tokenizer_hash(tokenizer)[:12]} and not {str(end.tokenizer_sha256)[:12]}."
                )
            if weights and (sha256 := weights_sha256(hooked(model))) != end.weights_sha256:
                raise BridgeError(
                    f"the bridge was made for {end.name!r} with weights {end.weights_sha256[:12]}, and the {kind} "
                    f"model at hand ({found.model_name!r}) has weights {sha256[:12]}. Load what it belongs to, or pass "
                    "allow_mismatch=True if you mean to compare."
                )

    def check_shapes(self, sparse: AnyModel, dense: AnyModel) -> None:
        """Raise BridgeError unless two models have the depth, width and number of token ids that the bridge ties."""
        for kind, end, model in (("sparse", self.sparse, sparse), ("dense", self.dense, dense)):
            found = hooked(model).cfg
            for field, what in (("n_layers", "layers"), ("d_model", "channels"), ("d_vocab", "token ids")):
                if getattr(found, field) != getattr(end, field):
                    raise BridgeError(
                        f"the bridge leads to a {kind} model of {getattr(end, field)} {what} ({end.name!r}), and "
                        f"{found.model_name!r} has {getattr(found, field)}. Pass the models that it was made for."
                    )

    # -- files --------------------------------------------------------------------------------------------------------

    def save(
        self, folder: Path | str, *, stored_as: torch.dtype | None = None, card: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the bridge to a new `folder`, in the form that `bridges/files.py` describes.

        Args:
            folder: a folder that is empty or not there.
            stored_as: precision of the stored maps; None keeps their own, which is lossless.
            card: how the bridge was trained and how well it fits, for readers.

        Raises:
            BridgeError: if `folder` holds something, cannot be written, or a map is not finite.
        """
        folder = Path(folder)
        tensors = {name.removeprefix("maps."): tensor for name, tensor in self.state_dict().items()}
        write_bridge(folder, self.config, {"sparse": self.sparse, "dense": self.dense}, tensors, stored_as, card)
        return folder

    @classmethod
    def load(
        cls,
        name_or_path: Path | str,
        sparse: AnyModel | None = None,
        dense: AnyModel | None = None,
        *,
        allow_mismatch: bool = False,
    ) -> "Bridge":
        """A bundled bridge, or one that `save` wrote to a folder, its maps in float32 at least.

            bridge = si.Bridge.load("stdlib-small", si.load("stdlib-small"), si.load("stdlib-small-dense"))

        Args:
            name_or_path: the name of a bundled one, or the folder where it lies.
            sparse: with `dense`, the models that it has to belong to, by their weights and tokenizers.
            dense: the other of them.
            allow_mismatch: load it even if they have other weights; depth, width and tokens still have to fit.

        Raises:
            BridgeError: if a file is missing, damaged or of another format version, or the models are not its own.
        """
        if (sparse is None) != (dense is None):
            raise BridgeError("a bridge is checked against both of its models or neither: pass sparse and dense.")
        folder = bridge_folder(name_or_path)
        record, tensors = read_bridge(folder)
        try:
            ends = (End(**record["sparse"]), End(**record["dense"]))
            bridge = cls(BridgeConfig.from_dict(record["config"]), *ends)
            wide = {f"maps.{name}": t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}
            bridge.to(next(iter(wide.values())).dtype).load_state_dict(wide)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise BridgeError(f"{folder / MAPS} and what is said beside it do not fit together ({error}).") from error
        if sparse is not None and dense is not None:
            bridge.check(sparse, dense, weights=not allow_mismatch)
        return bridge

    # -- a start ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_(
        self,
        pair: SitePair,
        sparse_resid: Float[Tensor, "*batch d_sparse"],
        dense_resid: Float[Tensor, "*batch d_dense"],
    ) -> None:
        """Set one pair's linear maps to the ridge regressions between two streams of the same tokens, in place.

        Each is as strong as predicts the last fifth of the tokens best from the others (`RIDGES`), and is then fitted
        to all of them, in float64. Thresholds are set so that `config.afrac` of all channels exceed theirs.
        """
        part, streams = self[pair], (sparse_resid.flatten(0, -2).double(), dense_resid.flatten(0, -2).double())
        for weight, bias, (read, wanted) in (
            (part.W_encode, part.b_encode, streams[::-1]),
            (part.W_decode, part.b_decode, streams),
        ):
            found, shift = fitted(read, wanted)
            weight.copy_(found)
            bias.copy_(shift)
        if part.log_theta is not None:
            size = part.before_cut(dense_resid).abs().flatten()
            rank = min(len(size), max(1, round((1 - self.config.afrac) * len(size))))
            part.log_theta.fill_(float(size.kthvalue(rank).values.clamp(min=1e-12).log()))


@torch.no_grad()
def fitted(
    read: Float[Tensor, "token d_in"], wanted: Float[Tensor, "token d_out"]
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Weight and bias of the ridge regression of `wanted` on `read`, as strong as predicts tokens left out best."""
    n = max(1, len(read) * 4 // 5)
    errors = [
        float((read[n:] @ weight + bias - wanted[n:]).square().sum())
        for weight, bias in _ridges(read[:n], wanted[:n], RIDGES)
    ]
    return next(_ridges(read, wanted, [RIDGES[errors.index(min(errors))]]))


def _ridges(read: Tensor, wanted: Tensor, shares: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias for every strength, from one decomposition."""
    mean, target = read.mean(0), wanted.mean(0)
    variances, directions = torch.linalg.eigh((read - mean).mT @ (read - mean))
    products = directions.mT @ ((read - mean).mT @ (wanted - target))
    typical = variances.mean().clamp_min(1e-12)
    for share in shares:
        weight = directions @ (products / (variances.clamp(min=0) + share * typical)[:, None])
        yield weight, target - mean @ weight


def nmse(predicted: Float[Tensor, "*batch width"], target: Float[Tensor, "*batch width"]) -> Float[Tensor, ""]:
    """Squared error as a share of the target's variance about its mean over tokens: 0 is exact, 1 no better than that.

    The share is of sums over tokens and channels, and no gradient goes through what it is a share of.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    predicted, target = predicted.to(wide).flatten(0, -2), target.to(wide).flatten(0, -2)
    spread = (target - target.mean(0)).square().sum().detach()
    return (predicted - target).square().sum() / spread


def _refuse_other_tokens(sparse: End, dense: End) -> None:
    """Raise BridgeError unless two models speak of the same tokens."""
    if sparse.d_vocab != dense.d_vocab:
        raise BridgeError(
            f"{sparse.name!r} has {sparse.d_vocab} token ids and {dense.name!r} {dense.d_vocab}: a bridge ties models "
            "of one tokenizer."
        )
    hashes = sparse.tokenizer_sha256, dense.tokenizer_sha256
    if None not in hashes and hashes[0] != hashes[1]:
        raise BridgeError(
            f"{sparse.name!r} was trained with tokenizer {str(hashes[0])[:12]} and {dense.name!r} with "
            f"{str(hashes[1])[:12]}: the same id is another token there, and nothing can be tied."
        )
