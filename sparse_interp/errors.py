"""Every error that sparse_interp raises on purpose, in one hierarchy.

A message says what was wrong, with names and numbers; what was expected; and what to do about it.
Each class is also the builtin a caller would have caught anyway.
"""


class SparseInterpError(Exception):
    """Anything that sparse_interp refuses, or could not do, for a reason it can name."""


class ConfigError(SparseInterpError, ValueError):
    """A configuration that describes no model, run or search."""


class CheckpointError(SparseInterpError, ValueError, OSError):
    """Weights or training state that are missing, damaged, or belong to something else."""


class TokenizerError(SparseInterpError, ValueError):
    """Text or token ids that a tokenizer, or the model beside it, cannot take."""


class TaskError(SparseInterpError, ValueError):
    """Prompts that do not make a well-posed task."""


class CircuitError(SparseInterpError, ValueError):
    """Nodes, edges or circuit files that do not fit the model they are used with."""


class BridgeError(SparseInterpError, ValueError):
    """A map between two models that cannot be built or read."""


class DownloadError(SparseInterpError, OSError):
    """A file that could not be fetched, or that is not the file it should be."""


class NotPublishedError(DownloadError):
    """A file or repository that, by its server's word, does not exist."""


class WrongToolWarning(UserWarning):
    """A tool of TransformerLens that gives wrong numbers on this model; the message names what gives the right ones."""
