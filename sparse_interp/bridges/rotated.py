"""Rotated twins: a sparse and a dense model between which the perfect bridge exists and is known.

    stream of the dense model  =  stream of the sparse model  R,          R orthogonal, drawn at random
    what writes to the stream  W  ->  W R          what reads it  W  ->  R^T W

so the two compute the same, and  encode(x) = x R^T,  decode(y) = y R.  That needs everything on the way to commute with
a rotation: AbsTopK at q, k, v and neurons alone (not on the stream, nor on what reads and writes it), RMSNorm or none,
and gains that are one number for all channels.

With features missing, some channels of the sparse model are taken out first: in the dense model nothing writes to them
and nothing reads them, so that its stream is the same in those directions whatever the prompt. Then no bridge can say
what they hold, the known one gives 0 there, and the two models no longer compute the same.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_interp.bridges.bridge import Bridge
from sparse_interp.bridges.bridge_config import BridgeConfig
from sparse_interp.errors import BridgeError
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.dense import AnyModel
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.training.sparsity import project_

ROTATABLE = ("q", "k", "v", "neuron")
"""Sites at which AbsTopK may act in a model that has a rotated twin: none of them is the stream."""


@dataclass(frozen=True, eq=False)
class RotatedTwin:
    """A dense model made from a sparse one, and the bridge between the two; `rotated_twin` makes them."""

    dense: HookedSparseTransformer
    """The sparse model in rotated coordinates: no channel of its stream means anything by itself."""

    bridge: Bridge
    """The rotation and its inverse at every site; the encoder keeps everything."""

    rotation: Float[Tensor, "d_sparse d_dense"]
    """R: row c is the direction that channel c of the sparse stream has in the dense one."""

    missing: tuple[int, ...]
    """Channels of the sparse stream that the dense model does without."""


@torch.no_grad()
def rotated_twin(sparse: AnyModel, *, missing_frac: float = 0.0, generator: torch.Generator) -> RotatedTwin:
    """A dense model that computes what `sparse` does in a stream rotated at random, and the bridge between them.

    Args:
        sparse: the model; AbsTopK at q, k, v and neurons alone, RMSNorm or none, gains alike on all channels.
        missing_frac: share of the stream's channels, drawn at random, that the dense model is made without, in [0, 1).
        generator: draws the rotation, uniformly among all, and the channels that are missing.

    Raises:
        BridgeError: for a model that a rotation does not leave as it is, or a share outside [0, 1).
    """
    if not isinstance(sparse, HookedSparseTransformer):
        raise BridgeError(f"a {type(sparse).__name__} has no rotated twin: pass a HookedSparseTransformer.")
    _refuse_what_does_not_rotate(sparse)
    if not 0 <= missing_frac < 1:
        raise BridgeError(f"missing_frac={missing_frac} is not a share of the channels in [0, 1).")
    d_model = sparse.cfg.d_model
    rotation = _random_rotation(d_model, generator)
    missing = torch.randperm(d_model, generator=generator)[: round(missing_frac * d_model)].sort().values
    into = rotation.clone()
    into[missing] = 0
    dense = _rotated(sparse, into)
    bridge = Bridge.between(sparse, dense, BridgeConfig(afrac=1.0)).to(sparse.cfg.dtype)
    for pair in bridge.pairs:
        bridge[pair].W_encode.copy_(into.mT)
        bridge[pair].W_decode.copy_(into)
    return RotatedTwin(dense, bridge, rotation.to(sparse.embed.W_E), tuple(missing.tolist()))


def rotatable_model(
    tokenizer: object = None, *, density: float = 0.3, generator: torch.Generator, **shape: object
) -> HookedSparseTransformer:
    """A sparse model of random weights that has a rotated twin, in eval mode.

    Args:
        tokenizer: its tokenizer, if it is to read text.
        density: share of weights that are not zero in every matrix.
        generator: draws the weights.
        shape: fields of `ModelConfig` other than these: 2 layers, 32 channels, 4 heads of 8, 64 neurons, AbsTopK at a
            quarter of q, k, v and neurons, 64 tokens, RMSNorm.
    """
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "d_vocab": 64, "n_ctx": 32}
    fixed = {"afrac": 0.25, "afrac_sites": ROTATABLE, "density": density, "model_name": "random", "bigram": False}
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    # with weights that a projection leaves so few of, reads and writes of about 1 need larger ones than usual
    std = (density * int(str(shape.get("d_model", sizes["d_model"])))) ** -0.5
    cfg = ModelConfig.from_dict({**sizes, **fixed, "seed": seed, "initializer_range": std, **shape})
    model = HookedSparseTransformer(cfg, tokenizer).eval()
    project_(model, density)
    return model


def _refuse_what_does_not_rotate(model: HookedSparseTransformer) -> None:
    """Raise BridgeError unless a model computes the same in rotated coordinates, saying what does not."""
    cfg = model.cfg
    cut = [site for site in cfg.afrac_sites if site not in ROTATABLE] if cfg.afrac not in (None, 1.0) else []
    if cut:
        raise BridgeError(
            f"{cfg.model_name!r} has no rotated twin: AbsTopK acts at {', '.join(cut)}, where the largest channels are "
            f"others after a rotation. Only {', '.join(ROTATABLE)} may be cut: afrac_sites={ROTATABLE}."
        )
    if cfg.norm == "layer" or cfg.residual_act != "identity":
        raise BridgeError(
            f"{cfg.model_name!r} has no rotated twin: norm={cfg.norm!r}, residual_act={cfg.residual_act!r}, and only "
            "norm='rms' or 'none' on a stream that nothing is applied to give the same in rotated coordinates."
        )
    for name, gain in model.named_parameters():
        if name.endswith(".w") and not name.endswith("_pos.w") and not torch.equal(gain, gain[:1].expand_as(gain)):
            raise BridgeError(
                f"{cfg.model_name!r} has no rotated twin: the gains {name} differ between channels "
                f"({float(gain.min()):.3g} to {float(gain.max()):.3g}), and a rotation mixes these. Set them to one "
                "number and scale the rows of the weights behind them."
            )


def _random_rotation(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Uniform among orthogonal matrices: Q of a gaussian's QR with R's diagonal made positive (Mezzadri 2007)."""
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def _rotated(sparse: HookedSparseTransformer, into: Float[Tensor, "d_model d_model"]) -> HookedSparseTransformer:
    """The model with what writes to the stream multiplied by `into`, and what reads it by its transpose."""
    dense = copy.deepcopy(sparse)
    dense.cfg.density, dense.cfg.model_name = 1.0, f"{sparse.cfg.model_name}-rotated"
    into = into.to(sparse.embed.W_E.device)
    writing, reading = [dense.embed.W_E], [] if dense.cfg.tie_unembed else [dense.unembed.W_U]
    if dense.pos_embed is not None and dense.cfg.positions == "add":
        writing.append(dense.pos_embed.W_pos)
    for block in dense.layers:
        attn, mlp = block.attn, block.mlp
        writing += [attn.W_O, attn.b_O, mlp.W_out, mlp.b_out]
        reading += [*(attn.get_parameter(f"W_{letter}") for letter in "QKV"), mlp.W_in]
    for weight in writing:
        weight.copy_(weight.double() @ into)
    for weight in reading:
        weight.copy_(into.mT @ weight.double())
    return dense
