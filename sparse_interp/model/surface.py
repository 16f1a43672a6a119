"""What TransformerLens' tools and notebooks ask of a model, besides its forward pass.

Runs with a cache, switches for optional hook points, weights stacked over layers under their TransformerLens names,
directions of tokens, biases, and a re-initialisation that keeps zeros zero. Everything here reads the model; nothing
here is a second way to compute it.
"""

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import FactoredMatrix, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from sparse_interp.errors import ConfigError, WrongToolWarning
from sparse_interp.model.aliases import first_name, position_axis, second_names
from sparse_interp.model.cache import SparseActivationCache
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.layers import Block

_SWITCHES = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Hook points that fire only while a flag of the config is on."""


def _stacked(part: str, name: str, axes: str) -> property:
    def get(self: "TransformerLensSurface") -> Tensor:
        weights = [getattr(getattr(block, part), name) for block in self.blocks]
        if weights[0] is None:
            raise AttributeError(name)  # so that hasattr says whether the model has it
        return torch.stack(weights)

    return property(get, doc=f"`{part}.{name}` of every block, [{axes}].")


def _single(part: str, name: str, axes: str) -> property:
    def get(self: "TransformerLensSurface") -> Tensor:
        return getattr(getattr(self, part), name)

    return property(get, doc=f"`{part}.{name}`, [{axes}].")


class TransformerLensSurface(HookedRootModule):
    """The methods and properties that TransformerLens has, for a model with `cfg`, `blocks`, `embed` and `unembed`."""

    cfg: ModelConfig
    blocks: nn.ModuleList
    ln_final: Any
    unembed: Any
    to_single_token: Callable[[str], int]

    # -- running with hooks and caches --------------------------------------------------------------------------------

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, SparseActivationCache | dict[str, Tensor]]:
        """Run the model and keep what its hook points saw: `(output, cache)`, as in TransformerLens.

        `names_filter` takes None, a name, a list of names or a function of a name. The cache's decompositions stay
        exact under AbsTopK. `remove_batch_dim` takes a batch of one.
        """
        batch = model_args[0] if model_args else kwargs.get("input")
        if remove_batch_dim and not isinstance(batch, str) and getattr(batch, "ndim", 2) > 1 and len(batch) != 1:
            raise ConfigError(f"remove_batch_dim takes a batch of one; got {len(batch)}.")
        if isinstance(batch, Tensor) and batch.ndim == 1 and model_args:  # TransformerLens takes its length for a batch
            model_args = (batch[None], *model_args[1:])
        out, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, SparseActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict, list, list]:
        """Hooks that fill a cache: `(cache, forward hooks, backward hooks)`, as in TransformerLens.

        Points that cannot fire are left out where None or a function chose them among others, and refused where they
        were named or chosen alone. What was asked for by a second name is in the cache under both.
        """
        cache, at = {} if cache is None else cache, Slice.unwrap(pos_slice)
        self.is_caching = True

        def save(tensor: Tensor, hook: HookPoint, keys: tuple[str, ...]) -> None:
            kept, axis = tensor.detach().to(device), position_axis(keys[0])
            if remove_batch_dim and len(kept) == 1:
                kept, axis = kept[0], axis - 1
            cache.update(dict.fromkeys(keys, at.apply(kept, dim=axis)))

        fwd, bwd = [], []
        for name, keys in self._chosen(names_filter).items():
            fwd.append((name, partial(save, keys=keys)))
            if incl_bwd:
                bwd.append((name, partial(save, keys=tuple(f"{key}_grad" for key in keys))))
        return cache, fwd, bwd

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add hooks that fill a cache in every run until `reset_hooks`, and return the cache, as in TransformerLens."""
        cache, fwd, bwd = self.get_caching_hooks(names_filter, *args, **kwargs)
        for hooks, direction in ((fwd, "fwd"), (bwd, "bwd")):
            for name, hook in hooks:
                self.add_hook(name, hook, direction)
        return cache

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks`, as in TransformerLens."""
        name = self._named(name) if isinstance(name, str) else self._not_all_silent(name)
        super().add_hook(name, *args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        name = self._named(name)
        self._warn_of_direct_path(name, hook)
        super()._enable_hook_with_name(name, hook, dir)

    def _enable_hooks_for_points(self, hook_points: Any, enabled: Callable, hook: Callable, dir: Any) -> None:
        super()._enable_hooks_for_points(hook_points, self._not_all_silent(enabled), hook, dir)

    def _warn_of_direct_path(self, name: str, hook: Callable) -> None:
        """Warn of TransformerLens' direct path patching, which is known by the hook that it makes, where it is wrong.

        It sends `z W_O`, which is what a head would have written without AbsTopK; and the version of 3.9 adds that to
        q, k or v themselves, past the norm's gain and AbsTopK, with the scale held fixed.
        """
        if not getattr(hook, "__qualname__", "").startswith("_make_direct_path_hook."):
            return
        cut = any(block.attn.cut_write.k is not None for block in self.layers)
        if cut or not name.endswith("_input"):
            reason = "ignores that AbsTopK cuts what heads write" if cut else "holds the norm's scale fixed"
            warnings.warn(
                f"TransformerLens' get_act_patch_direct_path {reason}, so its numbers are wrong on this model; "
                "sparse_interp.patch_direct_paths is exact.",
                WrongToolWarning,
                stacklevel=2,
            )

    # -- choosing hook points -----------------------------------------------------------------------------------------

    def _chosen(self, names_filter: Any) -> dict[str, tuple[str, ...]]:
        """For the first name of every point that a `names_filter` chooses: the keys that its tensor gets in a cache."""
        if names_filter is None or callable(names_filter):
            chosen = self._not_all_silent(names_filter or (lambda name: True))
            return {name: (name,) for name in self.hook_dict if chosen(name) and self.why_silent(name) is None}
        if not isinstance(names_filter, str | list):
            raise ConfigError(f"names_filter takes a name, a list of names or a function; got {names_filter!r:.80}.")
        keys: dict[str, tuple[str, ...]] = {}
        for asked in [names_filter] if isinstance(names_filter, str) else names_filter:
            name = self._named(asked)
            keys[name] = tuple(dict.fromkeys((*keys.get(name, (name,)), asked)))
        return {name: keys[name] for name in self.mod_dict if name in keys}

    def _named(self, name: str) -> str:
        """The first name of a hook point.

        Raises:
            KeyError: for a name that is neither a hook point's nor a module's.
            ConfigError: for a hook point that cannot fire.
        """
        first = first_name(name)
        if first not in self.mod_dict:
            near = get_close_matches(name, [*self.hook_dict, *second_names(self.cfg.n_layers)], n=1)
            raise KeyError(f"{name} is no hook point of this model." + (f" Did you mean {near[0]}?" if near else ""))
        reason = self.why_silent(first)
        if reason is not None:
            known_as = "" if first == name else f", which is {first},"
            raise ConfigError(f"a hook on {name}{known_as} would never fire: {reason}.")
        return first

    def _not_all_silent(self, chosen: Callable[[str], bool]) -> Callable[[str], bool]:
        """The function itself; ConfigError if it chooses hook points, and none of them can fire."""
        names = [name for name in self.hook_dict if chosen(name)]
        if names and all(self.why_silent(name) is not None for name in names):
            self._named(names[0])
        return chosen

    def why_silent(self, name: str) -> str | None:
        """Why the hook point `name` does not fire in this model as it is set now; None if it does."""
        point = name.rpartition(".")[2]
        switch = _SWITCHES.get(point)
        if switch is not None and not getattr(self.cfg, switch):
            return f"{switch} is off, and model.set_{switch}(True) switches it on"
        if point in ("hook_sink", "hook_sink_logits") and not self.cfg.sink:
            return "the model was built with sink=False"
        if point in ("hook_scale", "hook_normalized") and self.cfg.norm == "none":
            return "the model was built with norm='none'"
        return None

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch `attn.hook_result` on or off."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch `attn.hook_q_input`, `hook_k_input` and `hook_v_input` on or off."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch `attn.hook_attn_in` on or off."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch `hook_mlp_in` on or off."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    # -- parts and labels ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return list(self.blocks)  # pyright: ignore[reportReturnType]

    def blocks_with(self, submodule: str) -> list[tuple[int, Block]]:
        """The blocks that have a part of that name, each with its layer."""
        return [(layer, block) for layer, block in enumerate(self.layers) if submodule in block._modules]

    @property
    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... in the order of `cache.stack_head_results`."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    # -- weights ------------------------------------------------------------------------------------------------------

    W_E = _single("embed", "W_E", "d_vocab d_model")
    W_pos = _single("pos_embed", "W_pos", "n_ctx d_model")
    W_U = _single("unembed", "W_U", "d_model d_vocab")
    b_U = _single("unembed", "b_U", "d_vocab")
    W_Q = _stacked("attn", "W_Q", "layer head d_model d_head")
    W_K = _stacked("attn", "W_K", "layer head d_model d_head")
    W_V = _stacked("attn", "W_V", "layer head d_model d_head")
    W_O = _stacked("attn", "W_O", "layer head d_head d_model")
    W_Q_pos = _stacked("attn", "W_Q_pos", "layer head d_pos d_head")
    W_K_pos = _stacked("attn", "W_K_pos", "layer head d_pos d_head")
    W_V_pos = _stacked("attn", "W_V_pos", "layer head d_pos d_head")
    W_in = _stacked("mlp", "W_in", "layer d_model d_mlp")
    W_in_pos = _stacked("mlp", "W_in_pos", "layer d_pos d_mlp")
    W_out = _stacked("mlp", "W_out", "layer d_mlp d_model")
    b_Q = _stacked("attn", "b_Q", "layer head d_head")
    b_K = _stacked("attn", "b_K", "layer head d_head")
    b_V = _stacked("attn", "b_V", "layer head d_head")
    b_O = _stacked("attn", "b_O", "layer d_model")
    b_in = _stacked("mlp", "b_in", "layer d_mlp")
    b_out = _stacked("mlp", "b_out", "layer d_model")

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """Token and position vectors, one below the other."""
        if self.cfg.positions != "add":
            raise ConfigError(
                f"W_E_pos stacks what is added to the stream, and positions={self.cfg.positions!r} adds none: use W_E."
            )
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head, [layer head d_model d_model]; concatenated positions and AbsTopK are not in it."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, [layer head d_model d_model]; AbsTopK is not in it."""
        return FactoredMatrix(self.W_V, self.W_O)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Every parameter under its TransformerLens name; a tied unembedding is there as well."""
        return dict(self.named_parameters()) | {"unembed.W_U": self.unembed.W_U}

    @property
    def n_params_total(self) -> int:
        """Numbers that were trained or could have been, zeros included; a fixed bigram table is none."""
        return sum(p.numel() for p in self.parameters())

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*batch d_model"]:
        """The direction of the normalised stream that a token's logit reads: the final gain times its column of W_U.

        TransformerLens divides the stream by the norm's scale and leaves out the gain, expecting it folded into W_U;
        here it is in the direction, so `cache.logit_attrs` is exact without folding.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.unembed.W_U.device)
        ids = ids.reshape(()) if ids.numel() == 1 else ids
        directions = self.unembed.W_U.T[ids]
        return directions if self.cfg.norm == "none" else directions * self.ln_final.w

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the biases that the blocks before `layer` write, as they stand in the weights.

        Under AbsTopK not all of it reaches the stream; the cache's full decomposition has what did.
        """
        if not 0 <= layer <= self.cfg.n_layers - mlp_input:
            raise ConfigError(f"layer={layer} is not in [0, {self.cfg.n_layers - mlp_input}].")
        before = self.layers[:layer]
        biases = [block.attn.b_O for block in self.layers[: layer + mlp_input]]
        biases += [block.mlp.b_out for block in before if include_mlp_biases]
        return torch.stack(biases).sum(0) if biases else torch.zeros_like(self.layers[0].attn.b_O)

    def reset_parameters(self) -> None:
        """Draw every weight anew; entries that are zero stay zero, so a sparse model keeps its pattern.

        Biases, sinks and a learned bigram table become zero and gains one; a fixed bigram table stays.
        """
        for p in self.parameters(recurse=False):
            nn.init.zeros_(p)
        for module in self.modules():
            if module is not self and callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def to_transformer_bridge(self) -> Any:
        """A `TransformerBridge` that computes the same, for the tools that take nothing else, such as `JacobianLens`.

        The twin has its own copy of the weights; its nodes have their usual names. TransformerLens' weight processing,
        which would change what it computes, is refused.

        Raises:
            ConfigError: with a TransformerLens older than 4, or for a model that a bridge cannot express.
        """
        installed = version("transformer-lens")
        if int(installed.split(".")[0]) < 4:
            raise ConfigError(f"a TransformerBridge twin needs TransformerLens 4 or newer; this is {installed}.")
        from sparse_interp.model.bridge_twin import bridge_twin  # which needs it

        return bridge_twin(self)
