"""A name or a folder -> a model in eval mode: `from_pretrained`, as TransformerLens users know it.

    name or path  ->  folder (model/zoo.py)  ->  shape, tensors, tokenizer, report  ->  model

A folder that `model.save` wrote is read by model/checkpoint.py, one in a published form by model/released.py. The model
is built without memory for its weights, and each tensor that was read becomes a weight as it is: nothing is drawn at
random, and nothing is held twice.

Of all that TransformerLens may fold into weights, one thing leaves this model as it is, the gain of the last norm:

    W_U <- w[:, None] W_U,   b_U <- b_U + b W_U,   w <- 1,   b <- 0         (b only for LayerNorm; untied first)

A published model is folded, because tools that read W_U expect it. What `model.save` wrote comes back bit for bit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparse_interp.errors import ConfigError, DownloadError
from sparse_interp.model import zoo
from sparse_interp.model.checkpoint import StoredModel, read_model
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.load_report import LoadReport
from sparse_interp.model.released import read_released, released_form
from sparse_interp.tokenizer import load_tokenizer

M = TypeVar("M", bound="Loading")

REFUSED_FOLDS = {
    "fold_ln": "AbsTopK stands between these norms and the weights that read, and would keep other channels; "
    "log-probabilities of stdlib-small change by up to 6.18 nats.",
    "center_writing_weights": "RMSNorm and AbsTopK see the mean that it takes away; log-probabilities of stdlib-small "
    "change by up to 2.01 nats, and 100 % of the zeros in what writes to the stream are lost.",
    "center_unembed": "log-probabilities stay as they are, and 100 % of the zeros in W_U are lost.",
    "fold_value_biases": "beside a sink attention does not sum to 1, and AbsTopK acts on values with their biases; "
    "log-probabilities of stdlib-small change by up to 4.75 nats.",
    "refactor_factored_attn_matrices": "AbsTopK acts on the queries, keys and values that there are; log-probabilities "
    "of stdlib-small change by up to about 6 nats, and 47 % of the zeros in its heads are lost.",
}
"""What else TransformerLens may fold, and why it is refused here; measured on two blocks of text."""


class Loading:
    """Loading, for a model that is built from a `ModelConfig` and a tokenizer."""

    load_report: LoadReport | None = None
    """What was read, ignored and folded when the model was loaded; None if it was not."""

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_path: str | Path,
        *,
        fold_ln_final: bool | None = None,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: PreTrainedTokenizerBase | Path | str | None = None,
        default_prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> M:
        """The model called `name_or_path`, or in that folder; in eval mode, and torch's random state is left alone.

        Args:
            name_or_path: a name of `si.models()`, a repository of the Hugging Face hub, or a folder: one that
                `model.save` wrote, or one in a published form (docs/released_models.md).
            fold_ln_final: whether the gain of the last norm is folded into the unembedding, which changes logits by
                rounding alone; None folds published models, and gives back our own as they were saved.
            fold_ln: refused, like the four below it: they change what the model computes, or make it dense.
            center_writing_weights: refused.
            center_unembed: refused.
            fold_value_biases: refused.
            refactor_factored_attn_matrices: refused.
            device: where the model goes; None is the CPU.
            dtype: precision of the weights; None is the stored one.
            tokenizer: the model's tokenizer, or a folder that holds it; None takes the one that comes with the model.
            default_prepend_bos: whether texts begin with the bos token unless a call says otherwise; None leaves it at
                what the model was trained with.
            progress: whether downloads show a bar.

        Raises:
            ConfigError: for a name that no model has, a shape that describes no model, a fold that is refused, or a
                device or precision that there is not.
            CheckpointError: if the folder holds no model, or one that is damaged or incomplete.
            TokenizerError: if the tokenizer is not the one that the model was saved with, or has more ids.
            DownloadError: if the model is to be fetched, and cannot be.
        """
        _refuse_folds(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        device, wanted = _device(device), _dtype(dtype)
        folder = zoo.model_folder(name_or_path, progress=progress)
        stored = _read(folder, None if Path(name_or_path).is_dir() else str(name_or_path), progress)
        cfg, tensors, report = stored.cfg, stored.tensors, stored.report
        if fold_ln_final or (fold_ln_final is None and report.form != "sparse_interp"):
            report = replace(report, folded=_fold_ln_final(cfg, tensors, wanted or cfg.dtype))
        if default_prepend_bos is not None:
            cfg.default_prepend_bos = default_prepend_bos
        if wanted is not None:
            for name in tensors:
                tensors[name] = tensors[name].to(wanted)
            cfg.dtype = wanted
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        cfg.device = "meta"
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = cls(cfg, stored.tokenizer if tokenizer is None else tokenizer)  # pyright: ignore[reportCallIssue]
        assert isinstance(model, nn.Module)
        model.load_state_dict(tensors, assign=True)
        model.load_report = report
        return model.to(device).eval()

    @classmethod
    def from_pretrained_no_processing(cls: type[M], name_or_path: str | Path, **options: Any) -> M:
        """`from_pretrained` without any fold: the weights as they are stored."""
        return cls.from_pretrained(name_or_path, fold_ln_final=False, **options)

    @classmethod
    def load(cls: type[M], folder: Path | str, **options: Any) -> M:
        """`from_pretrained` for a folder on this machine, also where a model has its name."""
        return cls.from_pretrained(Path(folder).absolute(), **options)


def _read(folder: Path, name: str | None, progress: bool) -> StoredModel:
    """What the folder holds. A model that was asked for by `name` may have its tokenizer fetched too."""
    if released_form(folder) is None:
        return read_model(folder)
    stored = read_released(folder, cache=zoo.cache_folder(), name=name)
    wanted = stored.cfg.tokenizer_name
    if stored.tokenizer is not None or name is None or wanted is None:
        return stored
    try:
        tokenizer = load_tokenizer(zoo.tokenizer_folder(wanted, progress=progress))
    except DownloadError as error:
        said = {"tokenizer": f"{wanted} could not be fetched, and can be given as tokenizer= ({error})"}
        return stored._replace(report=replace(stored.report, assumed=stored.report.assumed | said))
    assumed = {key: why for key, why in stored.report.assumed.items() if key != "tokenizer"}
    read = stored.report.read | {"tokenizer": f"{wanted}, {len(tokenizer)} ids"}
    return stored._replace(tokenizer=tokenizer, report=replace(stored.report, assumed=assumed, read=read))


def _fold_ln_final(cfg: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Fold the last norm's gain into W_U, and its bias into b_U; what was done, for the report.

    Computed in the wider of what is stored and `dtype`, and at least in float32.
    """
    gain, bias = tensors.get("ln_final.w"), tensors.get("ln_final.b")
    if gain is None or (bool((gain == 1).all()) and (bias is None or not bias.any())):
        return {}
    wide = torch.promote_types(torch.promote_types(gain.dtype, dtype), torch.float32)
    stored, said = gain.dtype, "its gain is in unembed.W_U"
    if cfg.tie_unembed:
        cfg.tie_unembed, said = False, f"{said}, which is no longer tied to embed.W_E"
    weight = tensors.get("unembed.W_U", tensors["embed.W_E"].T).to(wide)
    folded = {"unembed.W_U": (gain.to(wide)[:, None] * weight).contiguous(), "ln_final.w": torch.ones_like(gain)}
    if bias is not None:
        said += ", its bias in unembed.b_U"
        moved = tensors["unembed.b_U"].double() + bias.double() @ weight.double()
        folded |= {"unembed.b_U": moved, "ln_final.b": torch.zeros_like(bias)}
    kept = torch.promote_types(stored, dtype)
    tensors |= {name: tensor.to(kept) for name, tensor in folded.items()}
    if kept != stored:
        tensors |= {name: tensor.to(kept) for name, tensor in tensors.items()}
    return {"ln_final": said}


def _refuse_folds(**asked: bool) -> None:
    for fold, wanted in asked.items():
        if wanted:
            raise ConfigError(
                f"{fold}=True is refused: {REFUSED_FOLDS[fold]} The fold that leaves the model as it is: fold_ln_final."
            )


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={str(device)!r} cannot be used here ({reason}); leave it out for the CPU."
        ) from error
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is no precision of weights; choose float32, float64, bfloat16 or float16.")
    return found
