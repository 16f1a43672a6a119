"""What published configurations say of a model's shape, in our words.

A key that is missing takes the default that the published code gives it, and the report says so. A key that has no
effect on what a trained model computes is named in the report with the reason. A key that would have one, in code that
was never published, is refused unless it is switched off, as it is in everything that was published.

Places of AbsTopK are split at commas and not stripped, as in the published code: one that is misspelled, or follows a
space, is none, and the report says so.

Sources: openai/circuit_sparsity, commit 8a029a3, `GPTConfig`; jacobcd52/sparse_pretrain_public, `ModelConfig` and
`SparsityConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_interp.errors import CheckpointError, ConfigError
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.tensor_files import LARGEST_JSON, read_json

PLACES = {
    "attn_in": "attn_read",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_out": "attn_write",
    "resid_post_attn": "resid_mid",
    "mlp_in": "mlp_read",
    "mlp_neuron": "neuron",
    "mlp_out": "mlp_write",
    "resid_post_mlp": "resid_post",
}
"""Places where the released code may apply AbsTopK, and our names for them."""

RECIPE = "training_config.yaml"
"""What sparse_pretrain keeps beside `config.json`, which leaves out where AbsTopK acts."""

_OTHER_PLACES = {place: PLACES[place] for place in PLACES if not place.startswith("resid")} | {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
}
_EIGHT_PLACES = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"

_WOULD_CHANGE = {
    "afrac_approx": "an approximate AbsTopK would keep other activations",
    "rtopk": "another top-k would keep other activations",
    "bigram_table_rank": "a bigram table of low rank is stored in another way",
    "use_tied_aux_matrix": "an auxiliary matrix would be one more term",
    "scale_invariance": "the network would be scaled in another way",
    "mup": "the network would be scaled in another way",
    "unembed_rank": "an unembedding of low rank is stored in another way",
    "enable_fp8_linear": "products would be rounded to eight bits",
}
"""Keys that nothing published sets, and what they would do."""

_TRAINING = "matters in training only"
_NO_EFFECT = {
    **dict.fromkeys(("dropout", "dropout_cat_pos_emb", "grad_checkpointing", "ignore_dw_grad"), _TRAINING),
    **dict.fromkeys(("afrac_ste", "afrac_ste_only_non_neurons"), "shapes gradients only"),
    "mup_width_multiplier": "is read only with mup",
    "pfrac": "says how sparse training was",
    "expansion_factor": "says how sparse training was",
    "expansion_factor_mlp": "says how sparse training was",
    "flash": "either way of computing attention gives the same, here always with the sink",
    "enable_sparse_kernels": "chooses among ways of computing the same",
    "sparse_matmul_impl": "chooses among ways of computing the same",
    "debug_nans": "looks and changes nothing",
    "debug_exact_topk": "AbsTopK is always exact here",
    "n_embd": "the released code reads d_model",
}
_TRANSFORMERS = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "is_decoder",
    "label2id", "max_position_embeddings", "model_type", "pad_token_id", "return_dict", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
_NO_EFFECT |= dict.fromkeys(_TRANSFORMERS, "is for the transformers library")
"""Keys that change nothing that a trained model computes, and why."""

_OF_TRAINING = (
    "anneal_type", "bridges_config", "dropout", "enable_weight_sparsity", "min_weights_per_neuron",
    "sparsity_anneal_end_fraction", "sparsity_anneal_start_fraction", "target_l0_fraction", "training_config",
)  # fmt: skip


@dataclass
class Translation:
    """A shape of ours, and what has to be said about where it came from."""

    cfg: ModelConfig
    """The shape."""

    read: dict[str, str] = field(default_factory=dict)
    """File -> what came from it."""

    assumed: dict[str, str] = field(default_factory=dict)
    """Key -> what was taken in its place."""

    ignored: dict[str, str] = field(default_factory=dict)
    """Key -> why it is without effect."""

    sinusoid: bool = False
    """Whether concatenated positions were a fixed table of sines and cosines before training."""

    @property
    def remarks(self) -> dict[str, dict[str, str]]:
        """What a load report says of it."""
        return {"read": self.read, "assumed": self.assumed, "ignored": self.ignored}


class Said:
    """A published configuration, which remembers what it was asked for."""

    def __init__(self, said: Mapping[str, Any], path: Path):
        self.said, self.path = said, path
        self.assumed: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        self.asked: set[str] = set()

    def take(self, key: str, kind: type, default: Any, optional: bool = False) -> Any:
        """The value of `key`, or its default; `optional` lets it be null."""
        self.asked.add(key)
        if key not in self.said:
            self.assumed[key] = f"is not said; {default!r} is what the published code takes"
            return default
        value = self.said[key]
        right = isinstance(value, int | float if kind is float else kind) and (kind is bool) == isinstance(value, bool)
        if not (right or (optional and value is None)):
            known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
            raise ConfigError(f"{self.path}: {key} is {value!r}, and should be {known}{' or null' * optional}.")
        return float(value) if kind is float and value is not None else value

    def choose(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """The value of `key`, one of `choices`."""
        value = self.take(key, str, default)
        if value not in choices:
            raise ConfigError(f"{self.path}: {key} is {value!r}; known are {', '.join(choices)}.")
        return value

    def places(self, key: str, default: str, known: Mapping[str, str]) -> tuple[str, ...]:
        """Our names of the places where AbsTopK acts, which `key` lists between commas."""
        found = self.take(key, str, default).split(",")
        for place in found:
            if place and place not in known:
                self.ignored[f"{key}: {place!r}"] = "is no place, neither here nor in the published code"
        return tuple(known[place] for place in known if place in found)

    def leave(self, no_effect: Mapping[str, str]) -> None:
        """Say why what nobody asked for is without effect, or refuse it."""
        for key, value in self.said.items():
            if key in self.asked:
                continue
            if key in _WOULD_CHANGE and value not in (None, False, 0):
                raise ConfigError(
                    f"{self.path}: {key} is {value!r}, and {_WOULD_CHANGE[key]}. The code that did so was not "
                    "published, so the model cannot be computed as it was trained."
                )
            reason = "is off" if key in _WOULD_CHANGE else no_effect.get(key, "is unknown, also to the published code")
            self.ignored[key] = f"{value!r:.60}, {reason}"


def circuit_sparsity_config(path: Path) -> Translation:
    """The shape in a `beeg_config.json`, or in a `config.json` that has the same keys.

    Raises:
        ConfigError: if it describes no model, or one that would be another one here.
        CheckpointError: if it cannot be read.
    """
    said = Said(read_json(path), path)
    d_model, n_heads = said.take("d_model", int, 768), said.take("n_head", int, 12)
    concat = said.take("d_pos_emb", int, None, optional=True)
    if concat == 0:
        raise ConfigError(f"{path}: d_pos_emb is 0, with which the published code fails too; null switches it off.")
    shape = {
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": _d_head(said, d_model, n_heads),
        "n_layers": said.take("n_layer", int, 12),
        "d_mlp": _d_mlp(said, d_model),
        "d_vocab": said.take("vocab_size", int, 50304),
        "n_ctx": said.take("block_size", int, 1024),
        "positions": "add" if concat is None else "concat",
        "d_pos_emb": concat,
        "bias": said.take("bias", bool, True),
        "norm": "rms" if said.take("rms_norm", bool, False) else "layer",
        "norm_bias": said.take("ln_bias", bool, True),
        "act_fn": said.choose("activation_type", "gelu", ("gelu", "relu")),
        "residual_act": said.choose("residual_activation_type", "identity", ("identity", "relu")),
        "tie_unembed": said.take("tied_unembed", bool, True),
        "sink": said.take("sink", bool, False),
        "bigram": said.take("enable_bigram_table", bool, False),
        "bigram_learnable": said.take("learnable_bigram_table", bool, False),
        "afrac": said.take("afrac", float, None, optional=True),
        "afrac_sites": said.places("afrac_loctypes", "attn_in,attn_out,mlp_in,mlp_out", PLACES),
        "tokenizer_name": said.take("tokenizer_name", str, "tinypython_2k", optional=True),
        "density": _density(said.said),
    }
    sinusoid = said.take("sinusoidal_cat_pos_emb", bool, False) and concat is not None
    said.leave(_NO_EFFECT)
    return Translation(_shape(shape, path), {path.name: "shape"}, said.assumed, said.ignored, sinusoid)


def sparse_pretrain_config(path: Path) -> Translation:
    """The shape in a `config.json` of sparse_pretrain, and in the recipe beside it where that says more.

    Raises:
        ConfigError: if it describes no model.
        CheckpointError: if it cannot be read, or says nothing of activation sparsity.
    """
    whole = read_json(path)
    for part in ("model_config", "sparsity_config"):
        if not isinstance(whole.get(part), dict):
            raise CheckpointError(
                f"{path} has no {part}, without which the published code leaves AbsTopK out; restore the file."
            )
    rest = {key: value for key, value in whole.items() if key not in ("model_config", "sparsity_config")}
    recipe = _recipe(path.with_name(RECIPE), whole)
    said = Said(rest | recipe | whole["sparsity_config"] | whole["model_config"], path)
    d_model, flash = said.take("d_model", int, 1024), said.take("use_flash_attention", bool, True)
    sink, d_mlp = said.take("use_attention_sinks", bool, True), said.take("d_mlp", int, None, optional=True)
    if sink and not flash:
        said.ignored["use_attention_sinks"] = "the published code leaves sinks out where use_flash_attention is false"
    fraction = said.take("activation_topk_fraction", float, 0.25)
    shape = {
        "d_model": d_model,
        "d_head": said.take("d_head", int, 16),
        "n_layers": said.take("n_layer", int, 8),
        "d_mlp": 4 * d_model if d_mlp is None else d_mlp,
        "d_vocab": said.take("vocab_size", int, None),
        "n_ctx": said.take("n_ctx", int, 256),
        "positions": "add" if said.take("use_positional_embeddings", bool, False) else "none",
        "bias": said.take("use_bias", bool, True),
        "norm": "rms" if said.take("use_rms_norm", bool, True) else "layer",
        "act_fn": said.choose("activation", "gelu", ("gelu", "relu")),
        "tie_unembed": said.take("tie_embeddings", bool, False),
        "sink": sink and flash,
        "bigram": said.take("use_bigram_table", bool, True),
        "bigram_learnable": True,
        "afrac": fraction if said.take("enable_activation_sparsity", bool, True) else None,
        "afrac_min": 1,
        "afrac_sites": said.places("activation_sparsity_locations", _EIGHT_PLACES, _OTHER_PLACES),
        "tokenizer_name": _tokenizer_name(whole),
    }
    said.leave(dict.fromkeys(_OF_TRAINING, _TRAINING))
    read = {path.name: "shape"} | ({RECIPE: ", ".join(recipe)} if recipe else {})
    return Translation(_shape(shape, path), read, said.assumed, said.ignored)


def _shape(shape: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig(**shape, default_prepend_bos=False)  # the published code puts no token in front of a text
    except ConfigError as error:
        raise ConfigError(f"{path} describes no model: {error}") from error


def _d_head(said: Said, d_model: int, n_heads: int) -> int:
    d_head = said.take("d_head", int, None, optional=True)
    if d_head is None and (n_heads < 1 or d_model % n_heads):
        raise ConfigError(f"{said.path}: d_model={d_model} does not split into n_head={n_heads} heads; give d_head.")
    return d_model // n_heads if d_head is None else d_head


def _d_mlp(said: Said, d_model: int) -> int:
    """`d_mlp`, or `n_mlp` as it was once called, or four times the stream."""
    values = {said.said[key] for key in ("d_mlp", "n_mlp") if said.said.get(key) is not None}
    if len(values) > 1:
        raise ConfigError(f"{said.path}: d_mlp is {said.said['d_mlp']} and n_mlp, its old name, {said.said['n_mlp']}.")
    key = "n_mlp" if "n_mlp" in said.said and said.said.get("d_mlp") is None else "d_mlp"
    said.asked |= {"d_mlp", "n_mlp"} & said.said.keys()
    d_mlp = said.take(key, int, None, optional=True)
    return 4 * d_model if d_mlp is None else d_mlp


def _density(said: Mapping[str, Any]) -> float:
    """Share of the entries of a block's matrices that training left; 1 where that is not said."""
    factors = [said.get(key) for key in ("pfrac", "expansion_factor", "expansion_factor_mlp")]
    if not all(isinstance(factor, int | float) and factor > 0 for factor in factors):
        return 1.0
    pfrac, stream, mlp = factors
    return min(1.0, pfrac / (stream * mlp))


def _recipe(path: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe says of the model that `config.json` leaves out."""
    if not path.is_file() or path.stat().st_size > LARGEST_JSON:
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = recipe.get("model") or recipe.get("sparse_model") or {}
        found = {
            "use_flash_attention": model.get("use_flash_attention"),
            "activation_sparsity_locations": recipe.get("sparsity", {}).get("activation_sparsity_locations"),
        }
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again, or delete it.") from error
    said = whole["model_config"].keys() | whole["sparsity_config"].keys()
    return {key: value for key, value in found.items() if value is not None and key not in said}


def _tokenizer_name(whole: Mapping[str, Any]) -> str | None:
    training = whole.get("training_config")
    name = training.get("tokenizer_name") if isinstance(training, dict) else None
    return name if isinstance(name, str) and name else None
