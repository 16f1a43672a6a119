"""A model of ours in the form in which OpenAI published theirs: `beeg_config.json` and `final_model.pt`.

    matrices        [out, in], the other way round than here
    c_attn.weight   rows: q of all heads, k of all heads, v of all heads; columns: the stream, then the position
    final_logits_bias, bigram_table   added to the logits

What that form cannot say is refused. A model without positions is written with positions of zero, which add nothing.
openai/circuit_sparsity, commit 8a029a3. The archive is theirs to define and so a `torch.save` one, of tensors alone;
models that are kept for ourselves are safetensors (`model.save`).
"""

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.layers import Block, Norm
from sparse_interp.model.released_config import PLACES
from sparse_interp.model.transformer import HookedSparseTransformer

_PLACES = {ours: theirs for theirs, ours in PLACES.items()}


def publish_model(model: HookedSparseTransformer, folder: Path | str) -> Path:
    """Write `beeg_config.json` and `final_model.pt` to `folder`, from which `si.load` and OpenAI's code read the model.

    Raises:
        ConfigError: if the released form cannot say what the model is.
        CheckpointError: if a model is there already, or the folder cannot be written.
    """
    folder = Path(folder)
    contents = {
        "beeg_config.json": (json.dumps(published_config(model), indent=1) + "\n").encode(),
        "final_model.pt": archive_bytes(published_tensors(model)),
    }
    for name in contents:
        if (folder / name).exists():
            raise CheckpointError(f"{folder / name} is there already; name another folder.")
    write_files(folder, contents)
    return folder


def published_config(model: HookedSparseTransformer) -> dict[str, Any]:
    """The keys of `beeg_config.json`.

    Raises:
        ConfigError: if the released form cannot say what the model is.
    """
    cfg = model.cfg
    check_publishable(cfg)
    return {
        "block_size": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "dropout": 0.0,
        "bias": _has_biases(model),
        "ln_bias": cfg.norm_bias,
        "rms_norm": cfg.norm == "rms",
        "residual_activation_type": cfg.residual_act,
        "activation_type": cfg.act_fn,
        "afrac": cfg.afrac,
        "afrac_loctypes": ",".join(_PLACES[site] for site in cfg.afrac_sites),
        "tied_unembed": cfg.tie_unembed,
        "tokenizer_name": cfg.tokenizer_name,
        "enable_bigram_table": cfg.bigram,
        "learnable_bigram_table": cfg.bigram and cfg.bigram_learnable,
        "d_pos_emb": cfg.d_pos_emb,
        "flash": True,
        "sink": cfg.sink,
    }


def check_publishable(cfg: ModelConfig) -> None:
    """Raise ConfigError if the released form has no word for what the model is."""
    eps = ModelConfig(d_model=1, n_heads=1, d_head=1, n_layers=1, d_mlp=1, d_vocab=1, n_ctx=1, norm=cfg.norm).eps
    wanted = {"attention_dir": "causal", "eps": eps, "afrac_min": 0}
    if cfg.norm == "none":
        raise ConfigError("norm='none' has no word in the released form; a model with norm 'rms' or 'layer' has.")
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise ConfigError(f"{name}={getattr(cfg, name)!r} has no word in the released form, which has {value!r}.")
    unknown = [site for site in cfg.afrac_sites if site not in _PLACES]
    if cfg.afrac is not None and unknown:
        raise ConfigError(f"AbsTopK at {', '.join(unknown)} has no word in the released form.")


def published_tensors(model: HookedSparseTransformer) -> dict[str, Tensor]:
    """The state dict of `final_model.pt`, float32."""
    cfg = model.cfg
    positions = torch.zeros(cfg.n_ctx, cfg.d_model) if model.pos_embed is None else model.pos_embed.W_pos
    tensors = {
        "transformer.wte.weight": model.embed.W_E,
        "transformer.wpe.weight": positions,
        "lm_head.weight": model.unembed.W_U.T,
        "final_logits_bias": model.unembed.b_U,
        **_norm("transformer.ln_f", model.ln_final),
    }
    if cfg.bigram:
        tensors["bigram_table"] = model.bigram_table
    for layer, block in enumerate(model.layers):
        named = _block(block, cfg, _has_biases(model))
        tensors |= {f"transformer.h.{layer}.{name}": tensor for name, tensor in named}
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _has_biases(model: HookedSparseTransformer) -> bool:
    """Whether a block has biases; those of a model that trains none may have been set all the same."""
    ours = (p for name, p in model.named_parameters() if name.startswith("blocks") and ".b_" in name)
    return model.cfg.bias or any(bool(p.any()) for p in ours)


def _block(block: Block, cfg: ModelConfig, biases: bool) -> Iterator[tuple[str, Tensor]]:
    attn, mlp = block.attn, block.mlp
    yield from (_norm("ln_1", block.ln1) | _norm("ln_2", block.ln2)).items()
    if cfg.d_pos_emb is not None:
        yield from (_norm("ln_p1", block.ln1_pos) | _norm("ln_p2", block.ln2_pos)).items()

    def rows(letter: str) -> Tensor:
        weight = getattr(attn, f"W_{letter}")
        if cfg.d_pos_emb is not None:
            weight = torch.cat([weight, getattr(attn, f"W_{letter}_pos")], 1)
        return weight.transpose(1, 2).flatten(0, 1)

    yield "attn.c_attn.weight", torch.cat([rows(letter) for letter in "QKV"])
    yield "attn.c_proj.weight", attn.W_O.flatten(0, 1).T
    yield "mlp.c_fc.weight", (mlp.W_in if mlp.W_in_pos is None else torch.cat([mlp.W_in, mlp.W_in_pos])).T
    yield "mlp.c_proj.weight", mlp.W_out.T
    if attn.sink is not None:
        yield "attn.attn_imp.sink_logit", attn.sink
    if biases:
        yield "attn.c_attn.bias", torch.cat([getattr(attn, f"b_{letter}").flatten() for letter in "QKV"])
        yield from (("attn.c_proj.bias", attn.b_O), ("mlp.c_fc.bias", mlp.b_in), ("mlp.c_proj.bias", mlp.b_out))


def _norm(name: str, norm: Norm) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.w} | ({} if norm.b is None else {f"{name}.bias": norm.b})


def archive_bytes(content: Any) -> bytes:
    """`content` as `torch.save` writes it to an open file: a zip archive whose root is `archive/`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write every file under a temporary name in `folder`, and rename them once all are there."""
    partial = {name: folder / f".{name}.partial" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial[name].write_bytes(content)
        for name, unfinished in partial.items():
            unfinished.replace(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); name another folder.") from error
    finally:
        for unfinished in partial.values():
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
