"""SparseActivationCache: TransformerLens' cache, with decompositions that stay exact under AbsTopK.

    attn_out = m * (sum_h z_h W_O[h] + b_O)        m = 1 where AbsTopK kept the channel, else 0
             = sum_h result_h,                      result_h = m * (z_h W_O[h] + b_O / n_heads)
    mlp_out  = sum_n m * post_n W_out[n] + m * b_out

TransformerLens computes z W_O and post W_out, which is what would have been written without the cut. `result_h` is what
`attn.hook_result` sees while its flag is on: the attention bias is shared out evenly, so heads add up to the write.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice, get_act_name

from sparse_interp.errors import ConfigError, WrongToolWarning
from sparse_interp.model.aliases import first_name


def _as_slice(given: Any) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)


class SparseActivationCache(ActivationCache):
    """What the hook points saw in one run.

    As in TransformerLens, `cache["resid_post", 0]` is short for `cache["blocks.0.hook_resid_post"]`. Decompositions of
    the stream refuse models whose stream is no sum: those with `residual_act="relu"` or AbsTopK on the stream itself.
    """

    # -- by name ------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple) -> Tensor:
        """What a hook point saw: by its name, by a second name of it, or in short, as in TransformerLens.

        Raises:
            KeyError: if the cache does not hold it, saying why.
        """
        name = self._name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        reason = None if self.model is None else self.model.why_silent(name)
        if reason is None and self.model is not None and name.removesuffix("_grad") not in self.model.hook_dict:
            reason = "the model has no such hook point"
        raise KeyError(f"{name} is not in the cache: {reason or 'it was not asked for, or the run did not reach it'}.")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self._name(key) in self.cache_dict

    def _name(self, key: str | tuple) -> str:
        if isinstance(key, tuple) and len(key) > 1 and key[1] is not None and key[1] < 0:
            key = (key[0], self.model.cfg.n_layers + key[1], *key[2:])
        if key in self.cache_dict:
            return key  # pyright: ignore[reportReturnType]
        return first_name(get_act_name(*key) if isinstance(key, tuple) else get_act_name(key))

    # -- what reaches the stream --------------------------------------------------------------------------------------

    def _kept(self, layer: int, write: str) -> Tensor | None:
        """1 where AbsTopK let a channel of `attn_out` or `mlp_out` through, else 0; None where nothing is cut."""
        block = self.model.blocks[layer]
        cut = block.attn.cut_write if write == "attn_out" else block.mlp.cut_write
        return None if cut.k is None else (self[write, layer] != 0).to(self[write, layer].dtype)

    def _refuse_unless_sum(self) -> None:
        reason = self.model.blocks[0].why_no_sum
        if reason is not None:
            raise ConfigError(
                f"this model's residual stream is not the sum of what was written to it, because of {reason}: it has "
                "no decomposition. accumulated_resid and the hook points themselves are fine."
            )

    def compute_head_results(self) -> None:
        """Put what each head wrote, [batch pos head d_model], into the cache as `attn.hook_result`."""
        self._ensure_head_results()

    def _ensure_head_results(self) -> bool:
        names = [f"blocks.{layer}.attn.hook_result" for layer in range(self.model.cfg.n_layers)]
        missing = [layer for layer, name in enumerate(names) if name not in self.cache_dict]
        for layer in missing:
            attn = self.model.blocks[layer].attn
            heads = torch.einsum("...hd,hdm->...hm", self["z", layer], attn.W_O) + attn.b_O / attn.cfg.n_heads
            kept = self._kept(layer, "attn_out")
            self.cache_dict[names[layer]] = heads if kept is None else heads * kept.unsqueeze(-2)
        return not missing

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """What every head wrote, [component batch pos d_model]; arguments as in TransformerLens.

        A head's share of the attention bias is part of it, so that heads add up to `attn_out`.
        """
        self._refuse_unless_sum()
        return super().stack_head_results(*args, **kwargs)

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Float[Tensor, "*batch_and_pos neuron d_out"] | Float[Tensor, "*batch_and_pos neuron"]:
        """What each neuron of `layer` wrote, [batch pos neuron d_model], or its product with a direction or several.

        Args:
            layer: its layer.
            neuron_slice: which neurons, as TransformerLens' `Slice` takes it.
            pos_slice: which positions, likewise.
            project_output_onto: [d_model] or [d_model n]; never makes the large tensor where nothing is cut.
        """
        pos_slice = _as_slice(pos_slice)
        post = _as_slice(neuron_slice).apply(pos_slice.apply(self["post", layer], dim=-2), dim=-1)
        weight = _as_slice(neuron_slice).apply(self.model.blocks[layer].mlp.W_out, dim=0)
        kept = self._kept(layer, "mlp_out")
        kept = None if kept is None else pos_slice.apply(kept, dim=-2)
        if project_output_onto is None:
            written = post[..., None] * weight
            return written if kept is None else written * kept.unsqueeze(-2)
        onto = project_output_onto if project_output_onto.ndim == 2 else project_output_onto[:, None]
        effect = weight @ (onto if kept is None else kept[..., None] * onto)
        projected = post[..., None] * effect
        return projected if project_output_onto.ndim == 2 else projected.squeeze(-1)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """What every neuron wrote, [component batch pos d_model]; arguments as in TransformerLens."""
        self._refuse_unless_sum()
        return super().stack_neuron_results(*args, **kwargs)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Slice, neuron_slice: Slice, project_2d: Tensor, mlp_input: bool = False
    ) -> Tensor:
        """Neurons normalised and projected without the large tensor; TransformerLens calls it from its stack."""
        if layer == 0:
            return self.decompose_resid(0, pos_slice=pos_slice)[:0] @ project_2d
        self._warn_of_bigram(layer)
        norm = self.model.cfg.norm
        if norm == "layer":
            project_2d = project_2d - project_2d.mean(0)  # (x - mean x) P = x (P - mean P)
        rows = [self.get_neuron_results(before, neuron_slice, pos_slice, project_2d) for before in range(layer)]
        stack = torch.cat(rows, -2).movedim(-2, 0)
        return stack if norm == "none" else stack / self._get_cached_ln_scale(layer, mlp_input, pos_slice)

    # -- the stream taken apart ---------------------------------------------------------------------------------------

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """What the embeddings and every half block wrote, [component batch pos d_model]; arguments as TransformerLens'.

        Raises:
            ConfigError: if the stream is no sum, or the embedding is not in the cache and would go missing silently.
        """
        self._refuse_unless_sum()
        with_embeds = kwargs.get("incl_embeds", args[5] if len(args) > 5 else True)
        wanted = ["hook_embed", *["hook_pos_embed"] * (self.model.cfg.positions == "add")]
        missing = [name for name in wanted if with_embeds and name not in self.cache_dict]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} is not in the cache, so the components would not add up to the stream: run "
                "with it among the names, or pass incl_embeds=False."
            )
        return super().decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """The stream that enters `layer`, taken apart as far as it goes; the rows add up to it exactly.

        Rows: heads, each with its share of the attention bias; neurons (or whole MLPs, without `expand_neurons`);
        `embed`; `pos_embed`; and `bias`, the MLP biases that AbsTopK let through, which differ by position.

        Args:
            layer: in [0, n_layers]; None or -1 is n_layers, the stream that is unembedded.
            mlp_input: whether to take the stream that enters the MLP of `layer`.
            expand_neurons: whether neurons have a row each.
            apply_ln: whether to divide by the scale of the norm that reads the stream there.
            pos_slice: which positions, as TransformerLens' `Slice` takes it.
            return_labels: whether to return `(rows, labels)`.
            project_output_onto: [d_model] or [d_model n]: return products with these directions instead.
        """
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        at = _as_slice(pos_slice)
        one = project_output_onto is not None and project_output_onto.ndim == 1
        onto = project_output_onto[:, None] if one and project_output_onto is not None else project_output_onto

        def read(stack: Tensor) -> Tensor:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=at) if apply_ln else stack
            return stack if onto is None else stack @ onto

        embeds, labels_of_embeds = self.decompose_resid(0, pos_slice=at, return_labels=True)
        heads, labels = self.stack_head_results(layer + mlp_input, pos_slice=at, return_labels=True)
        stacks = [read(heads)]
        if layer > 0 and not expand_neurons:
            mlps, more = self.decompose_resid(layer, mode="mlp", incl_embeds=False, pos_slice=at, return_labels=True)
            stacks, labels = [*stacks, read(mlps)], labels + more
        elif layer > 0:
            stacks.append(self._read_neurons(layer, mlp_input, at, apply_ln, onto))
            labels += [f"L{before}N{n}" for before in range(layer) for n in range(self.model.cfg.d_mlp or 0)]
        stacks += [read(embeds), read(self._bias_row(layer if expand_neurons else 0, at))]
        rows = torch.cat(stacks)
        rows = rows.squeeze(-1) if one else rows
        return (rows, [*labels, *labels_of_embeds, "bias"]) if return_labels else rows

    def _read_neurons(self, layer: int, mlp_input: bool, at: Slice, apply_ln: bool, onto: Tensor | None) -> Tensor:
        if onto is not None and apply_ln:
            return self._stack_neuron_results_apply_ln_projected(layer, at, Slice(None), onto, mlp_input)
        stack = self.stack_neuron_results(layer, pos_slice=at, project_output_onto=onto)
        return self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice=at) if apply_ln else stack

    def _bias_row(self, layer: int, at: Slice) -> Float[Tensor, "1 *batch_and_pos d_model"]:
        """What reached the stream of the MLP biases before `layer`."""
        total = torch.zeros_like(self["hook_embed"])
        for before in range(layer):
            bias, kept = self.model.blocks[before].mlp.b_out, self._kept(before, "mlp_out")
            total = total + (bias if kept is None else bias * kept)
        return at.apply(total, dim=-2)[None]

    # -- read for logits ----------------------------------------------------------------------------------------------

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d_model"],
        tokens: str | int | Tensor,
        incorrect_tokens: str | int | Tensor | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "*component_and_batch_and_pos"]:
        """What each component adds to the logit of `tokens`, or to its lead over `incorrect_tokens`.

        Tokens: one for all, [batch] (one per prompt, at all of its positions), or [batch pos]; the slices are those of
        TransformerLens. Adds up to the logits but for `b_U`, LayerNorm's bias and the bigram table.
        """
        batch = _as_slice(batch_slice)
        if has_batch_dim and residual_stack.ndim == 4 and batch.mode != "int":  # 3.9 takes [batch] for [pos]
            n = len(batch.apply(torch.arange(residual_stack.shape[1]), dim=0))
            per_prompt = [isinstance(t, Tensor) and t.shape == (n,) for t in (tokens, incorrect_tokens)]
            if all(per_prompt) or (per_prompt[0] and incorrect_tokens is None):
                tokens = tokens[:, None]  # pyright: ignore[reportIndexIssue]
                incorrect_tokens = None if incorrect_tokens is None else incorrect_tokens[:, None]  # pyright: ignore
        return super().logit_attrs(residual_stack, tokens, incorrect_tokens, pos_slice, batch, has_batch_dim)

    def apply_ln_to_stack(self, residual_stack: Tensor, layer: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Components divided by the scale of the norm that reads them at `layer`; arguments as in TransformerLens.

        Warns:
            WrongToolWarning: where the final norm is applied and the model has a bigram table. It is the step that
                `logit_attrs`, the logit lens of a cache, decompositions with `apply_ln=True` and TransformerLens'
                `direct_logit_attribution` have in common.
        """
        self._warn_of_bigram(layer)
        return super().apply_ln_to_stack(residual_stack, layer, *args, **kwargs)

    def _warn_of_bigram(self, layer: int | None) -> None:
        """Warn that logits read off the stream at `layer`, if that is its end, lack the bigram table's row."""
        cfg = self.model.cfg
        if layer in (None, -1, cfg.n_layers) and cfg.bigram and bool(self.model.bigram_table.any()):
            warnings.warn(
                "this model adds a row of its bigram table to the logits, and no component of the stream holds it: "
                "logits and attributions read off the stream lack it. sparse_interp.direct_logit_attribution(model, "
                "tokens, answer, foil) has it as a row of its own.",
                WrongToolWarning,
                stacklevel=3,
            )

    # -- attention ----------------------------------------------------------------------------------------------------

    def pattern_with_sink(self, layer: int) -> Float[Tensor, "*batch head query key_and_sink"]:
        """Attention weights of `layer` with the sink's share as the last key, so that rows sum to 1."""
        pattern = self["pattern", layer]
        sink = self["sink", layer, "attn"] if self.model.cfg.sink else torch.zeros_like(pattern[..., 0])
        return torch.cat([pattern, sink.unsqueeze(-1)], -1)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "SparseActivationCache":
        """The same cache for some of its prompts."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return SparseActivationCache(sliced.cache_dict, self.model, has_batch_dim=sliced.has_batch_dim)
