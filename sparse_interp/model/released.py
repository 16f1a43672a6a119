"""Weight-sparse models that others published, in our shape and under our names.

    beeg_config.json + model.safetensors or final_model.pt       circuit_sparsity: OpenAI's code and store
    config.json of model_type circuitgpt + safetensors           circuitgpt: the same on the Hugging Face hub
    config.json with model_config, sparsity_config + an archive  sparse_pretrain: a second family of checkpoints

A matrix of theirs is [out, in]; ours are, for a head h, its channel d and D = d_head,

    W_Q[h, :, d] = c_attn[h D + d, :]     W_K, W_V: the same, all heads' rows further down
    W_O[h, d, :] = c_proj[:, h D + d]     W_in = c_fc^T,  W_out = c_proj^T,  W_U = lm_head^T

Columns of c_attn and c_fc beyond d_model read the concatenated position: W_Q_pos, W_K_pos, W_V_pos, W_in_pos. Names and
shapes are held to the configuration. Allowed are only a missing `final_logits_bias` (old files; it is zero), one name
of a matrix that is tied, a missing table of positions that is a sinusoid, and stored attention masks (not weights).

Gao et al. 2025 (arXiv:2511.13653); openai/circuit_sparsity, commit 8a029a3; jacobcd52/sparse_pretrain_public.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.checkpoint import StoredModel
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.load_report import LoadReport, rows_of
from sparse_interp.model.released_config import Translation, circuit_sparsity_config, sparse_pretrain_config
from sparse_interp.model.tensor_files import TensorSource, archive_source, read_json, safetensors_source, sharded_source
from sparse_interp.tokenizer import MERGES_BPE, TOKENIZER_JSON, load_tokenizer, save_tokenizer, tokenizer_hash

BEEG_CONFIG, CONFIG = "beeg_config.json", "config.json"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
TINYPYTHON = "tinypython"
"""Folder of the tokenizer in OpenAI's store, beside that of the models."""

PRECISIONS = ("float32", "float64", "float16", "bfloat16")
"""Those that weights may be stored in."""

_SECOND = "lm_head.weight"
"""A tied unembedding that is stored a second time, until it was compared."""

HOOKS = {
    "resid_in": "blocks.{layer}.hook_resid_pre",
    "attn.act_in": "blocks.{layer}.attn.hook_in",
    "attn.q": "blocks.{layer}.attn.hook_q",
    "attn.k": "blocks.{layer}.attn.hook_k",
    "attn.v": "blocks.{layer}.attn.hook_v",
    "attn.y": "blocks.{layer}.attn.hook_z",
    "attn.resid_delta": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "mlp.act_in": "blocks.{layer}.mlp.hook_in",
    "mlp.post_act": "blocks.{layer}.mlp.hook_post",
    "mlp.resid_delta": "blocks.{layer}.hook_mlp_out",
}
"""Hooks of the released code within a layer, and ours. Theirs hold q, k, v and y with all heads on one axis."""


class Dialect(NamedTuple):
    """What the files of one form are called, and the tensors in them."""

    config: str
    """The file that says the shape."""

    translated: Callable[[Path], Translation]
    """The shape that it says."""

    archives: tuple[str, ...]
    """Files that may hold the tensors where no safetensors file does."""

    prefix: str
    """What may precede all names."""

    stem: str
    """What precedes embeddings and the final norm."""

    block: str
    """What precedes the parts of a block."""

    sink: str
    """A block's sink logits."""

    mask: str
    """A block's stored attention mask, which is no weight."""

    logits_bias: bool
    """Whether the form has one."""


_OF_GPT = ("transformer.", "transformer.h.{layer}.", "attn.attn_imp.sink_logit", "attn.bias", True)
_OF_SPARSE_GPT = ("", "blocks.{layer}.", "attn.attn_fn.sink_logit", "attn.causal_mask", False)
_ARCHIVES = ("pytorch_model.bin", "sparse_model.bin")

DIALECTS = {
    "circuit_sparsity": Dialect(BEEG_CONFIG, circuit_sparsity_config, ("final_model.pt",), "", *_OF_GPT),
    "circuitgpt": Dialect(CONFIG, circuit_sparsity_config, _ARCHIVES[:1], "circuit_model.", *_OF_GPT),
    "sparse_pretrain": Dialect(CONFIG, sparse_pretrain_config, _ARCHIVES, "", *_OF_SPARSE_GPT),
}
"""The forms that can be read."""


class Part(NamedTuple):
    """A stored tensor, and what it becomes."""

    key: str
    """Its name in the file."""

    shape: tuple[int, ...]
    """Its shape there."""

    becomes: Callable[[Tensor], dict[str, Tensor]]
    """Our tensors, by name, in memory of their own."""


def hook_of(released: str, n_layers: int) -> str:
    """Our name of a hook of the released code: `1.attn.act_in`, say, or `final_resid`, the last stream before its norm.

    Raises:
        ConfigError: for a name that the released code does not have.
    """
    if released == "final_resid":
        return f"blocks.{n_layers - 1}.hook_resid_post"
    layer, _, place = released.partition(".")
    if place not in HOOKS or not layer.isdecimal() or int(layer) >= n_layers:
        raise ConfigError(
            f"{released!r} is no hook of a released model of {n_layers} layers; there are final_resid and, for each "
            f"layer, {', '.join(f'0.{place}' for place in HOOKS)}."
        )
    return HOOKS[place].format(layer=int(layer))


def released_form(folder: Path) -> str | None:
    """Which published form the model in `folder` has, one of `DIALECTS`; None if none of them."""
    if (folder / BEEG_CONFIG).is_file():
        return "circuit_sparsity"
    try:
        said = read_json(folder / CONFIG)
    except CheckpointError:
        return None
    if "model_config" in said:
        return "sparse_pretrain"
    return "circuitgpt" if said.get("model_type") == "circuitgpt" else None


def read_released(folder: Path, *, cache: Path | None = None, name: str | None = None) -> StoredModel:
    """The model that `folder` holds in a published form, in the precision in which it is stored.

    Args:
        cache: where an archive's conversion is kept, and the tokenizer's; None keeps none.
        name: what the model is called; None takes the folder's name.

    Raises:
        ConfigError: if the configuration describes no model, or one whose function would be another one here.
        CheckpointError: if the weights are missing, damaged, or not those that the configuration describes.
        TokenizerError: if there is a tokenizer, and it is damaged.
    """
    form = released_form(folder)
    if form is None:
        raise CheckpointError(f"{folder} holds no model in a published form: {', '.join(DIALECTS)}.")
    dialect = DIALECTS[form]
    said = dialect.translated(folder / dialect.config)
    cfg = said.cfg
    cfg.model_name = name or folder.resolve().name
    source = _weights(folder, dialect, said, cache)
    parts = _parts_in(source, cfg, dialect, said)
    cfg.dtype = _precision(source, parts)
    tensors: dict[str, Tensor] = {}
    for part in sorted(parts, key=lambda part: -math.prod(part.shape)):  # the largest while little else is in memory
        tensors |= part.becomes(_taken(source, part.key))
    if not torch.equal(tensors["embed.W_E"], tensors.pop(_SECOND, tensors["embed.W_E"])):
        raise CheckpointError(
            f"{source.files[0]}: {dialect.stem}wte.weight and lm_head.weight differ, and {dialect.config} says that "
            "they are one matrix (tied). The two files belong to different models."
        )
    names = [name for name in cfg.weight_shapes() if name in tensors]
    report = LoadReport(rows_of({name: tensors[name] for name in names}), cfg.model_name, form)
    for key, shape in cfg.weight_shapes().items():
        if key not in tensors:  # what `_parts_in` let pass, and the biases of a model without biases
            sinusoid = key == "pos_embed.W_pos"
            tensors[key] = sinusoid_table(*shape).to(cfg.dtype) if sinusoid else torch.zeros(shape, dtype=cfg.dtype)
    tokenizer = _tokenizer(folder, said, cache)
    return StoredModel(cfg, tensors, tokenizer, replace(report, **said.remarks))


def sinusoid_table(n_ctx: int, width: int) -> Float[Tensor, "n_ctx width"]:
    """Sines, then cosines, of positions; their periods are evenly spaced in the logarithm, from 4 tokens to `n_ctx`."""
    n = max(1, width // 2)
    period = torch.logspace(math.log10(4), math.log10(max(4, n_ctx)), n)
    angle = torch.arange(n_ctx)[:, None] * 2 * math.pi / period
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, max(0, width - 2 * n)))[:, :width]


# -- from their files -------------------------------------------------------------------------------------------------


def _weights(folder: Path, dialect: Dialect, said: Translation, cache: Path | None) -> TensorSource:
    """The tensors in the first of the files that there are, under the names that the form gives them."""
    names = [name for name in (SAFETENSORS, INDEX, *dialect.archives) if (folder / name).is_file()]
    if not names:
        raise CheckpointError(
            f"{folder} holds no weights: there is {dialect.config}, and beside it neither {SAFETENSORS} nor "
            f"{' nor '.join((INDEX, *dialect.archives))}. Fetch or copy one of them."
        )
    first, *others = names
    path = folder / first
    if first == SAFETENSORS:
        source = safetensors_source([path])
    elif first == INDEX:
        source = sharded_source(path)
    else:
        source = archive_source(path, None if cache is None else cache / "converted")
    size = sum(file.stat().st_size for file in source.files)
    kept = "" if source.converted is None else f"; converted once, to {source.converted}"
    said.read[first] = f"{len(source.known)} tensors in {size:,} bytes{kept}"
    said.ignored |= dict.fromkeys(others, f"is not read, because {first} is there")
    if all(key.startswith(dialect.prefix) for key in source.known):
        return source.renamed(lambda key: key.removeprefix(dialect.prefix))
    return source


def _parts_in(source: TensorSource, cfg: ModelConfig, dialect: Dialect, said: Translation) -> list[Part]:
    """The parts to be taken from `source`, after its names and shapes were found to be those of the configuration.

    The exceptions that the module allows are made here, and said.
    """
    if cfg.n_layers > len(source.known):
        raise CheckpointError(
            f"{source.files[0]} holds {len(source.known)} tensors, too few for the {cfg.n_layers} layers that "
            f"{dialect.config} describes."
        )
    expected = {part.key: part for part in _parts(cfg, dialect)}
    wte, wpe, head = f"{dialect.stem}wte.weight", f"{dialect.stem}wpe.weight", "lm_head.weight"
    missing = expected.keys() - source.known.keys()
    if "final_logits_bias" in missing:
        said.assumed["final_logits_bias"] = "is not stored, as in old files; it is zero"
    if said.sinusoid and wpe in missing:
        said.assumed[wpe] = "is not stored; it is the table of sines and cosines that training began with"
    if cfg.tie_unembed and wte in missing and head in source.known:
        said.assumed[wte] = f"is stored as {head}, to which it is tied"
    elif cfg.tie_unembed and head in missing:
        said.assumed[head] = f"is stored as {wte}, to which it is tied"
    surplus = source.known.keys() - expected.keys()
    masks = {f"{dialect.block.format(layer=layer)}{dialect.mask}" for layer in range(cfg.n_layers)}
    said.ignored |= dict.fromkeys(sorted(masks & surplus), "is the mask of causal attention, and no weight")
    allowed = masks | (_sinks(cfg, dialect) if "use_attention_sinks" in said.ignored else set())
    faults = [f"missing {key}" for key in expected if key in missing and key not in said.assumed]
    faults += [f"unexpected {key}" for key in sorted(surplus - allowed)]
    faults += [
        f"{key} has shape {list(source.known[key].shape)} and not {list(part.shape)}"
        for key, part in expected.items()
        if key in source.known and source.known[key].shape != part.shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"{source.files[0]} does not hold the model that {dialect.config} describes: {'; '.join(faults[:8])}{more}."
        )
    parts = [part for key, part in expected.items() if key not in missing]
    if wte in missing:  # tied, and stored under the other name
        parts = [part._replace(becomes=expected[wte].becomes) if part.key == head else part for part in parts]
    return parts


def _sinks(cfg: ModelConfig, dialect: Dialect) -> set[str]:
    return {f"{dialect.block.format(layer=layer)}{dialect.sink}" for layer in range(cfg.n_layers)}


def _precision(source: TensorSource, parts: list[Part]) -> torch.dtype:
    """The one floating type that all parts have."""
    found = {part.key: source.known[part.key].dtype for part in parts}
    usual = max(set(found.values()), key=list(found.values()).count)
    odd = next((key for key, dtype in found.items() if dtype != usual or dtype not in PRECISIONS), None)
    if odd is not None:
        raise CheckpointError(
            f"{source.files[0]}: {odd} is stored as {found[odd]}; weights are all of one precision, and that is one of "
            f"{', '.join(PRECISIONS)}. Fetch or convert the file again."
        )
    return getattr(torch, usual)


def _taken(source: TensorSource, key: str) -> Tensor:
    tensor = source.take(key)
    if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):  # which takes no memory, as isfinite does
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(
            f"{source.files[0]}: {bad} of the {tensor.numel()} entries of {key} are NaN or infinite. Fetch it again."
        )
    return tensor


def _tokenizer(folder: Path, said: Translation, cache: Path | None) -> PreTrainedTokenizerBase | None:
    """The one that lies beside the weights, or where OpenAI's store has it."""
    named, places = said.cfg.tokenizer_name, [folder]
    if named == "tinypython_2k":
        places += [folder / TINYPYTHON, folder.resolve().parent.parent / TINYPYTHON]
    found = [place for place in places if (place / TOKENIZER_JSON).is_file() or (place / MERGES_BPE).is_file()]
    if not found:
        said.assumed["tokenizer"] = f"none lies beside the weights; {named or 'its own'} can be given as tokenizer="
        return None
    tokenizer = load_tokenizer(found[0])
    if len(tokenizer) > said.cfg.d_vocab:
        said.ignored["tokenizer"] = f"{found[0]} has {len(tokenizer)} ids, and the model only {said.cfg.d_vocab}"
        return None
    said.read["tokenizer"] = f"{found[0]}, {len(tokenizer)} ids"
    if cache is None or (found[0] / TOKENIZER_JSON).is_file():
        return tokenizer
    kept = cache / "converted" / f"tokenizer-{tokenizer_hash(tokenizer)[:16]}"
    try:
        save_tokenizer(tokenizer, kept)  # TransformerLens reads tokenizers once more, from a folder with this file
    except OSError:
        return tokenizer
    return load_tokenizer(kept)


# -- what their tensors become ----------------------------------------------------------------------------------------


def _parts(cfg: ModelConfig, dialect: Dialect) -> Iterator[Part]:
    """Every tensor of a model of this shape, in the order of a forward pass."""
    d_model, d_vocab = cfg.d_model, cfg.d_vocab
    yield _same(f"{dialect.stem}wte.weight", (d_vocab, d_model), "embed.W_E")
    if cfg.positions != "none":
        yield _same(f"{dialect.stem}wpe.weight", (cfg.n_ctx, cfg.d_pos_emb or d_model), "pos_embed.W_pos")
    for layer in range(cfg.n_layers):
        theirs, ours = dialect.block.format(layer=layer), f"blocks.{layer}."
        yield from _norm(cfg, f"{theirs}ln_1", f"{ours}ln1", d_model)
        yield from _attention(cfg, f"{theirs}attn.", f"{ours}attn.")
        if cfg.sink:
            yield _same(f"{theirs}{dialect.sink}", (cfg.n_heads,), f"{ours}attn.sink")
        yield from _norm(cfg, f"{theirs}ln_2", f"{ours}ln2", d_model)
        yield from _mlp(cfg, f"{theirs}mlp.", f"{ours}mlp.")
        if cfg.d_pos_emb is not None:
            yield from _norm(cfg, f"{theirs}ln_p1", f"{ours}ln1_pos", cfg.d_pos_emb)
            yield from _norm(cfg, f"{theirs}ln_p2", f"{ours}ln2_pos", cfg.d_pos_emb)
    yield from _norm(cfg, f"{dialect.stem}ln_f", "ln_final", d_model)
    if cfg.tie_unembed:
        yield _same("lm_head.weight", (d_vocab, d_model), _SECOND)
    else:
        yield _transposed("lm_head.weight", (d_vocab, d_model), "unembed.W_U")
    if dialect.logits_bias:
        yield _same("final_logits_bias", (d_vocab,), "unembed.b_U")
    if cfg.bigram:
        yield _same("bigram_table", (d_vocab, d_vocab), "bigram_table")


def _attention(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    heads, flat = (cfg.n_heads, cfg.d_head), cfg.n_heads * cfg.d_head

    def reads(weight: Tensor) -> dict[str, Tensor]:
        found = {}
        for letter, rows in zip("QKV", weight.chunk(3), strict=True):
            read = rows.unflatten(0, heads).transpose(1, 2)  # head, d_read, d_head
            found[f"{ours}W_{letter}"] = _copy(read[:, : cfg.d_model])
            if cfg.d_pos_emb is not None:
                found[f"{ours}W_{letter}_pos"] = _copy(read[:, cfg.d_model :])
        return found

    def biases(bias: Tensor) -> dict[str, Tensor]:
        chunks = zip("QKV", bias.chunk(3), strict=True)
        return {f"{ours}b_{letter}": _copy(rows.unflatten(0, heads)) for letter, rows in chunks}

    yield Part(f"{theirs}c_attn.weight", (3 * flat, cfg.d_read), reads)
    if cfg.bias:
        yield Part(f"{theirs}c_attn.bias", (3 * flat,), biases)
    yield Part(
        f"{theirs}c_proj.weight",
        (cfg.d_model, flat),
        lambda weight: {f"{ours}W_O": _copy(weight.T).unflatten(0, heads)},
    )
    if cfg.bias:
        yield _same(f"{theirs}c_proj.bias", (cfg.d_model,), f"{ours}b_O")


def _mlp(cfg: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    assert cfg.d_mlp is not None

    def reads(weight: Tensor) -> dict[str, Tensor]:
        read = weight.T
        found = {f"{ours}W_in": _copy(read[: cfg.d_model])}
        return found if cfg.d_pos_emb is None else found | {f"{ours}W_in_pos": _copy(read[cfg.d_model :])}

    yield Part(f"{theirs}c_fc.weight", (cfg.d_mlp, cfg.d_read), reads)
    yield _transposed(f"{theirs}c_proj.weight", (cfg.d_model, cfg.d_mlp), f"{ours}W_out")
    if cfg.bias:
        yield _same(f"{theirs}c_fc.bias", (cfg.d_mlp,), f"{ours}b_in")
        yield _same(f"{theirs}c_proj.bias", (cfg.d_model,), f"{ours}b_out")


def _norm(cfg: ModelConfig, theirs: str, ours: str, size: int) -> Iterator[Part]:
    yield _same(f"{theirs}.weight", (size,), f"{ours}.w")
    if cfg.norm == "layer" and cfg.norm_bias:
        yield _same(f"{theirs}.bias", (size,), f"{ours}.b")


def _same(key: str, shape: tuple[int, ...], ours: str) -> Part:
    return Part(key, shape, lambda tensor: {ours: _copy(tensor)})


def _transposed(key: str, shape: tuple[int, ...], ours: str) -> Part:
    return Part(key, shape, lambda tensor: {ours: _copy(tensor.T)})


def _copy(tensor: Tensor) -> Tensor:
    """In memory of its own also where the layout is right as it is, as that of a matrix with one row."""
    return tensor.clone(memory_format=torch.contiguous_format)
