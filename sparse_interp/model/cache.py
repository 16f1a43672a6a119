"""SparseActivationCache: TransformerLens' cache, with decompositions that stay exact under AbsTopK."""

from transformer_lens import ActivationCache


class SparseActivationCache(ActivationCache):
    """What the hook points saw in one run."""
