"""What OpenAI published, as far as it is known without asking the network: names, files, sizes and hashes.

    <base>/models/<model>/beeg_config.json, final_model.pt        a model
    <base>/tinypython/vocab.bpe, encoder.json                     the tokenizer of all of them
    <base>/viz/<model>/<task>/<sweep>/<k>/viz_data.pt             one circuit; k is a number, or "k_optim"
    <base>/viz/<model>/mean_baseline_pretrain.pt                  what everything outside a circuit is held at

Gao et al. 2025 (arXiv:2511.13653); openai/circuit_sparsity, commit 8a029a3. Sizes and hashes are those that users of
the files wrote down; where only the beginning of a hash is known, that stands here.
"""

import re
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from sparse_interp.errors import ConfigError

BASE = "https://openaipublic.blob.core.windows.net/circuit-sparsity"
"""Where the files are."""

OWNER = "openai"
"""What precedes the name of a model: `openai/csp_yolo2`."""

HUB = "https://huggingface.co"
"""The Hugging Face hub."""

HUB_NAME = "openai/circuit-sparsity"
HUB_TWIN = "openai/csp_yolo2"
"""A repository there, and the model whose network it holds once more."""


class PublishedFile(NamedTuple):
    """A file of the store."""

    path: str
    """Below the base."""

    size: int | None = None
    """Bytes, where they are known."""

    sha256: str | None = None
    """Hexadecimal digits, where they are known; or the first of them."""


@dataclass(frozen=True)
class Release:
    """A published model."""

    name: str
    """As users type it, `openai/...`."""

    kind: str
    """`sparse` or `dense`, as its weights are."""

    n_layers: int
    """Blocks."""

    d_model: int
    """Channels of the residual stream."""

    known: dict[str, tuple[int, str]] = field(default_factory=dict)
    """File -> bytes and sha256, of files of which these are known."""

    note: str = ""
    """What to know if fetching it fails."""

    @property
    def model(self) -> str:
        """Its folder's name in the store."""
        return self.name.removeprefix(f"{OWNER}/")

    @property
    def files(self) -> list[PublishedFile]:
        """What loading it takes."""
        names = ("beeg_config.json", "final_model.pt")
        return [PublishedFile(f"models/{self.model}/{name}", *self.known.get(name, (None, None))) for name in names]


TOKENIZER = [PublishedFile("tinypython/vocab.bpe"), PublishedFile("tinypython/encoder.json")]
"""The two files of `tinypython_2k`."""

EXPANSIONS = ("1", "2", "4", "8", "16")
N_NONZERO = ("0.9", "1.9", "3.7", "7.4", "14.8")
AFRACS = ("0.062", "0.125", "0.250", "0.500", "1.000")
"""What the models of the sweep differ in: width, millions of non-zero weights, share of activations."""

SWEEP = "openai/csp_sweep1_{}x_{}Mnonzero_afrac{}"
"""Their names."""

_SWEEP_NOTE = "Not every combination of width, weights and activations of this family need have been published."

_BRIDGES_NOTE = (
    "The bridges models are known to have been served broken: in January 2026 final_model.pt of csp_bridges1 was "
    "corrupt and final_bridges.pt of both empty."
)


def _sweep(expansion: str, n_nonzero: str, afrac: str) -> Release:
    return Release(SWEEP.format(expansion, n_nonzero, afrac), "sparse", 8, 256 * int(expansion), note=_SWEEP_NOTE)


SINGLE = [
    Release(
        "openai/csp_yolo1",
        "sparse",
        12,
        1024,
        {
            "beeg_config.json": (643, "ce633a6c"),
            "final_model.pt": (642_319_670, "a3a68c34c07ec2b72f3239043d9169d6af7225c3d197e31cc871a9c1aba04b5d"),
        },
    ),
    Release(
        "openai/csp_yolo2",
        "sparse",
        8,
        2048,
        {
            "beeg_config.json": (823, "a80b49d2"),
            "final_model.pt": (1_676_532_054, "988cf534a28ab296b45776a29ea91eb3e942c3895fd18eaabfa3f5bd1e7fbd85"),
        },
    ),
    *(Release(f"openai/dense1_{expansion}x", "dense", 4, 256 * expansion) for expansion in (1, 2, 4)),
    *(Release(f"openai/csp_bridges{i}", "sparse", 4, 2048, note=_BRIDGES_NOTE) for i in (1, 2)),
]
"""The models that have a name of their own."""

RELEASES = {
    release.name: release
    for release in [*SINGLE, *(_sweep(*values) for values in product(EXPANSIONS, N_NONZERO, AFRACS))]
}
"""Name -> model, for each of them and each of the sweep."""

ALIASES = {f"openai/csp_bridge{i}": f"openai/csp_bridges{i}" for i in (1, 2)}
"""Spellings of OpenAI's own README."""


class CircuitName(NamedTuple):
    """One published circuit."""

    model: str
    """The model's folder in the store, `csp_yolo2`."""

    task: str
    """As the task is called there."""

    sweep: str
    """The search that found it: `prune_v4` is the one of the paper."""

    k: str
    """Number of nodes that the search was allowed, or `k_optim`."""

    @property
    def file(self) -> PublishedFile:
        """Where it lies."""
        return PublishedFile(f"viz/{self.model}/{self.task}/{self.sweep}/{self.k}/viz_data.pt")

    @property
    def means(self) -> PublishedFile:
        """Where the means lie that everything outside it was held at."""
        return PublishedFile(f"viz/{self.model}/mean_baseline_pretrain.pt")

    @classmethod
    def folder(cls, model: str) -> str:
        """Where all circuits of a model lie."""
        return f"viz/{cls(model, 'any', 'any', '0').check().model}/"

    @classmethod
    def of_path(cls, path: str) -> "CircuitName | None":
        """The circuit that lies there; None: no circuit lies there."""
        parts = path.split("/")
        return cls(*parts[1:5]) if len(parts) == 6 and (parts[0], parts[5]) == ("viz", "viz_data.pt") else None

    def check(self) -> "CircuitName":
        """Itself, if each part can be part of a path.

        Raises:
            ConfigError: naming the part that cannot.
        """
        for field_name, part in self._asdict().items():
            if not re.fullmatch(r"\w[\w.-]*", part):
                raise ConfigError(
                    f"{field_name}={part!r} is no name; a circuit is named by its model, task, sweep and k, as in "
                    "'csp_yolo2', 'bracket_counting_beeg', 'prune_v4', 'k_optim'."
                )
        return self
