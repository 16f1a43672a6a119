"""Axis names, and the tensor types built from them.

The same words stand in signatures, einsums, data-frame columns and plots.

    batch      prompts or text blocks processed together
    pos        token position, 0 = first token
    query      position that attends
    key        position attended to
    head       attention head
    d_model    residual-stream channels
    d_head     channels of one head
    d_mlp      neurons of one MLP
    d_vocab    token ids
    width      channels of one site, flat: what `channel` of a node counts
"""

from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Logits = Float[Tensor, "batch pos d_vocab"]
Resid = Float[Tensor, "batch pos d_model"]
HeadVectors = Float[Tensor, "batch pos head d_head"]
Pattern = Float[Tensor, "batch head query key"]
PerPrompt = Float[Tensor, " batch"]
