"""What a circuit page can show, as plain data: nodes, wires, prompts, heads, channels, audit, and how it was found.

Everything but the nodes is optional: a part that is not there is not drawn, or the page says that nobody measured it.
Numbers are plain Python numbers, texts any strings; what they mean is said here and nowhere else. The page itself is
made of this by `viewer/page.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Number = float | int

SITES = ("attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write", "final_read")
"""The sites that the page has a column for, in the order of the forward pass."""

EDGE_KINDS = ("weight", "residual", "attention", "embedding", "unembedding")
"""Weights within a block; identity along a rail; q and k to the write; token to channel; channel to token."""


@dataclass(frozen=True, kw_only=True)
class PageContext:
    """A stretch of text, with one node's activation at each of its tokens."""

    pieces: Sequence[str]
    """The text of each token, in order."""

    values: Sequence[Number]
    """The node's activation at each token, as many as there are pieces."""

    at: int
    """Index of the token that this context is shown for."""

    part: str = "strongest"
    """Which part of the distribution that token is from; contexts of one part follow each other under its name."""


@dataclass(frozen=True, kw_only=True)
class PageHistogram:
    """How often what occurs: counts in bins of equal width."""

    low: Number
    """Where the first bin begins."""

    high: Number
    """Where the last bin ends."""

    counts: Sequence[int]
    """How many fall into each bin."""


@dataclass(frozen=True, kw_only=True)
class PageKnockOut:
    """What is left of the task with something knocked out; or, of the whole circuit or model, what there is.

    None is what nobody measured.
    """

    kl: Number | None
    """KL(model || circuit) over the vocabulary at the answer position, nats."""

    lead: Number | None
    """Mean logit of the right token less that of the other one."""

    accuracy: Number | None
    """Share of prompts whose lead is above 0."""

    loss: Number | None
    """Cross-entropy of answer against foil, nats."""

    leads: Sequence[tuple[Number, Number]] = ()
    """For each prompt of the page, the lead on it and on its twin."""


@dataclass(frozen=True, kw_only=True)
class PageWrite:
    """What a node does to one token's logit."""

    token: str
    """The token's text."""

    effect: Number
    """Change of the token's logit per unit of the node's activation, in logits; above 0 promotes it."""


@dataclass(frozen=True, kw_only=True)
class PageNode:
    """One node of the circuit and what is known of it."""

    id: str
    """Unique in the page, such as "L0.neuron.123"."""

    layer: int
    """Block that the node is in, from 0; `final_read` has the number of layers."""

    site: str
    """One of `SITES`."""

    channel: int
    """Index within the site; at reads and writes this is the residual channel, hence the rail."""

    head: int | None = None
    """Attention head of a q, k or v node."""

    importance: Number | None = None
    """How much the task suffers without this node, in any unit of at least 0; drawn relative to the largest."""

    baseline: Number | None = None
    """The value that the node is held at when it is not part of a circuit, in units of its activation."""

    sentence: str = ""
    """What is known of the node, in words."""

    top_contexts: Sequence[PageContext] = ()
    """Stretches of text, part by part of the distribution, from its top to its bottom."""

    histogram: PageHistogram | None = None
    """The distribution of its activations on text."""

    on_prompts: Sequence[tuple[Sequence[Number], Sequence[Number]]] = ()
    """For each prompt of the page, the node's activation at every token of it and of its twin."""

    knock_out: PageKnockOut | None = None
    """What is left without it."""

    writes: Sequence[PageWrite] = ()
    """Tokens that the node promotes and suppresses, in any order."""

    stats: Mapping[str, str | Number | None] = field(default_factory=dict)
    """Label to number or words, listed in this order."""


@dataclass(frozen=True, kw_only=True)
class PageToken:
    """A token that the circuit reads (embedding) or decides about (unembedding)."""

    id: str
    """Unique in the page, also among the nodes, such as "in.34"; edges join tokens by it."""

    piece: str
    """The token's text."""

    side: str
    """ "embedding" draws the token at the start of the graph, "unembedding" at its end."""

    role: str = ""
    """What the token is to the task: "answer", "foil" or nothing."""


@dataclass(frozen=True, kw_only=True)
class PageEdge:
    """A wire between two nodes, or between a token and a node."""

    source: str
    """Id of the node or token that the wire leaves."""

    target: str
    """Id of the node or token that the wire enters."""

    weight: Number = 1
    """The weight, or what the page's `edge_value` says; residual and attention wires leave it at 1."""

    kind: str = "weight"
    """One of `EDGE_KINDS`."""


@dataclass(frozen=True, kw_only=True)
class PagePrompt:
    """One prompt of the task, beside its twin."""

    pieces: Sequence[str]
    """The text of each token of the prompt."""

    answer: str
    """The token that should come next."""

    foil: str
    """The token that it is measured against."""

    twin: Sequence[str] = ()
    """The minimally edited prompt whose next token is the foil; may be left out."""


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A small table of words and numbers."""

    title: str
    """What it shows."""

    columns: Sequence[str]
    """Names of its columns."""

    rows: Sequence[Sequence[str | Number | None]]
    """Its rows, a cell for each column."""

    note: str = ""
    """How to read it."""


@dataclass(frozen=True, kw_only=True)
class PageCurve:
    """One number against another, such as a loss against steps."""

    title: str
    """What it shows."""

    x: str
    """Name and unit of the horizontal axis."""

    y: str
    """Name and unit of the vertical axis."""

    points: Sequence[tuple[Number, Number]]
    """Pairs of both, in the order in which they are joined."""

    log_x: bool = False
    """Whether the horizontal axis grows by factors; points at or below 0 are left out then."""


@dataclass(frozen=True, kw_only=True)
class PageHead:
    """An attention head: what it looks for and what it carries."""

    layer: int
    """Block that it is in, from 0."""

    head: int
    """Its number within the block; q, k and v nodes name it."""

    d_head: int
    """Its width: scores are divided by the square root of it."""

    sentence: str = ""
    """The reading in words."""

    tables: Sequence[PageTable] = ()
    """Where it looks; its QK reading, channel by channel; its OV reading, wire by wire."""

    attention: Sequence[tuple[Sequence[Number], Sequence[Number]]] = ()
    """For each prompt of the page, what the answer position pays to every token of it and of its twin."""

    in_circuit: Sequence[tuple[Sequence[Number], Sequence[Number]]] = ()
    """The same while the model runs as the circuit."""

    knock_out: PageKnockOut | None = None
    """What is left without all of its nodes."""


@dataclass(frozen=True, kw_only=True)
class PageHalf:
    """Attention or MLP of one layer."""

    layer: int
    """Block, from 0."""

    kind: str
    """ "attention" or "MLP"."""

    n_nodes: int
    """Nodes of the circuit there."""

    knock_out: PageKnockOut | None = None
    """What is left without all of them."""


@dataclass(frozen=True, kw_only=True)
class PageChannel:
    """A residual channel, hence a rail: which tokens and positions write it, and which tokens it decides about."""

    channel: int
    """Its number; at and above the width of the stream it carries positions alone."""

    n_tokens: int
    """Tokens whose embedding is not zero there."""

    embedding: Sequence[PageWrite] = ()
    """Tokens with the largest and the smallest weight into it."""

    unembedding: Sequence[PageWrite] = ()
    """Tokens with the largest and the smallest weight out of it."""

    histogram: PageHistogram | None = None
    """Embedding weights of those `n_tokens`."""

    positions: Sequence[Number] = ()
    """What each position adds to it; nothing where positions do not write it."""


@dataclass(frozen=True, kw_only=True)
class PageAuditRow:
    """One measurement of the audit."""

    measure: str
    """What was measured, such as "sufficiency"."""

    condition: str
    """What it was measured on, such as "circuit" or "random circuit of equal size"."""

    value: Number | None
    """The measurement; None when it was not run."""

    low: Number | None = None
    """Lower end of its interval."""

    high: Number | None = None
    """Upper end of its interval."""

    n: int | None = None
    """Prompts (or draws) behind it."""

    split: str = ""
    """Split of the task that the prompts are from."""

    passed: bool | None = None
    """Whether the row meets its bound; None for a row that is there for comparison, or was not run."""

    note: str = ""
    """The bound, or why the row was not run."""

    about: str = ""
    """Which question of the audit it belongs to; rows of one question stand together."""

    decides: bool = False
    """Whether the verdict rests on it."""


@dataclass(frozen=True, kw_only=True)
class PageQuestion:
    """One of the things that a verdict rests on."""

    about: str
    """The thing."""

    passed: bool | None
    """Whether it is kept; None if something that it needs was not run."""

    why: str = ""
    """How it is missed, or what was not run."""


@dataclass(frozen=True, kw_only=True)
class PageAudit:
    """The audit that travels with the circuit."""

    verdict: str
    """The verdict in words."""

    passed: bool | None
    """Whether the circuit passed; None when the audit reached no verdict."""

    level: str = ""
    """How thorough it was: "quick" or "full"; nothing where nobody knows."""

    rows: Sequence[PageAuditRow] = ()
    """Every measurement, controls beside claims."""

    headline: str = ""
    """The gap between circuit and controls, in one sentence."""

    questions: Sequence[PageQuestion] = ()
    """What the verdict rests on, taken apart."""

    curves: Sequence[PageCurve] = ()
    """What was measured at several sizes."""


@dataclass(frozen=True, kw_only=True)
class CircuitPage:
    """Everything that a circuit page shows. Only `nodes` is required."""

    nodes: Sequence[PageNode]
    """The circuit's nodes, in any order."""

    edges: Sequence[PageEdge] = ()
    """Wires between nodes and tokens; the count in the page is of kind "weight" alone."""

    edge_value: str = "weight"
    """What the number of an edge is, where it is no weight."""

    tokens: Sequence[PageToken] = ()
    """Tokens drawn at the ends of the graph."""

    title: str = "Circuit"
    """The page's heading."""

    subtitle: str = ""
    """One sentence under the heading."""

    model: str = ""
    """Name of the model."""

    task: str = ""
    """Name of the task."""

    n_layers: int | None = None
    """Blocks of the model."""

    summary: Mapping[str, str] = field(default_factory=dict)
    """Headline numbers, label to value, in order; three to six read well."""

    prompts: Sequence[PagePrompt] = ()
    """Examples of the task."""

    audit: PageAudit | None = None
    """The audit; without one the page says, where nobody can miss it, that the circuit was not audited."""

    model_sha256: str = ""
    """Hash of the model's weights: nodes of two pages are the same where this is."""

    whole: PageKnockOut | None = None
    """What the circuit does with nothing knocked out; without it no knock-out is shown."""

    model_alone: PageKnockOut | None = None
    """What the whole model does on the same prompts."""

    heads: Sequence[PageHead] = ()
    """Readings of attention heads."""

    halves: Sequence[PageHalf] = ()
    """Attention and MLP of each layer that has nodes."""

    channels: Sequence[PageChannel] = ()
    """Residual channels that the circuit reads or writes."""

    tables: Sequence[PageTable] = ()
    """How the circuit was found, and in which model."""

    curves: Sequence[PageCurve] = ()
    """The search, step by step."""

    other: "CircuitPage | None" = None
    """A circuit to compare with: of another model, or of a task that means nothing."""
