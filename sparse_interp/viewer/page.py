"""The circuit page: one HTML file in which a circuit can be looked at, node by node, beside its audit.

    page  =  template( style, graph library, script, JSON( payload ) )

`CircuitPage` says what a page can show; everything but its nodes is optional. `render_page` turns it into text and
`inline_html` into a cell of a notebook. The file needs no network and no server, and equal payloads give equal bytes.

Three promises, and where each is kept:

    token text stays text   the payload is JSON with `<`, `>`, `&` and line separators escaped; the script writes text
                            nodes only; the policy in the page's head runs no script but ours, known by hash
    no request leaves       the same policy forbids every source but the page itself
    same input, same bytes  no time, no random id, no dictionary order that the caller did not choose

Library: d3-zoom and d3-selection with the seven small modules that they need (64 kB, ISC and BSD-3-Clause; versions and
hashes in `vendor/README.md`). Columns of a circuit are fixed by layer and site and its rails by residual channel, so a
layout engine (dagre, elkjs, cytoscape) would be told every position; what is worth borrowing is D3's handling of
wheel, drag and touch, and it draws SVG, which style sheets, keyboards and screen readers can reach.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from sparse_interp.errors import CircuitError

Number = float | int

SITES = ("attn_read", "q", "k", "v", "attn_write", "mlp_read", "neuron", "mlp_write", "final_read")
"""The sites that the page has a column for, in the order of the forward pass."""

EDGE_KINDS = ("weight", "residual", "attention", "embedding", "unembedding")
"""Weights within a block; identity along a rail; q and k to the write; token to channel; channel to token."""

VENDORED = (
    "d3-color",
    "d3-dispatch",
    "d3-ease",
    "d3-timer",
    "d3-interpolate",
    "d3-selection",
    "d3-drag",
    "d3-transition",
    "d3-zoom",
)
"""The graph library's modules, each after those that it needs."""

SCRIPTS = ("text.js", "layout.js", "graph.js", "panel.js", "page.js")
"""The page's own script, in the order in which its parts build on each other."""

SIGNIFICANT_DIGITS = 4
"""Digits kept of every number in a page: what a reader can use, and far fewer bytes than a float's 17."""


@dataclass(frozen=True, kw_only=True)
class PageContext:
    """A stretch of text, with one node's activation at each of its tokens."""

    pieces: Sequence[str]
    """The text of each token, in order."""

    values: Sequence[Number]
    """The node's activation at each token, as many as there are pieces."""

    at: int
    """Index of the token that this context is shown for."""

    source: str = "text"
    """Where the stretch is from: "text" or "task"."""


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

    top_contexts: Sequence[PageContext] = ()
    """Stretches of text that activate the node, strongest first."""

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


@dataclass(frozen=True, kw_only=True)
class PageAudit:
    """The audit that travels with the circuit."""

    verdict: str
    """The verdict in words."""

    passed: bool | None
    """Whether the circuit passed; None when the audit reached no verdict."""

    rows: Sequence[PageAuditRow] = ()
    """Every measurement, controls beside claims."""


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


def render_page(page: CircuitPage) -> str:
    """The page as one self-contained HTML document."""
    import jinja2  # only those who draw a page pay for it

    check_page(page)
    vendor, script, style = _vendored_script(), _own_script(), _resource("page.css")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.from_string(_resource("page.html.j2")).render(
        title=_well_formed(page.title),
        policy=content_policy(scripts=(vendor, script), styles=(style,)),
        vendor=Markup(vendor),
        script=Markup(script),
        style=Markup(style),
        data=Markup(embed_json(page_data(page))),
    )


def inline_html(page: str, height: int = 720, title: str = "Circuit page") -> str:
    """`page` in a frame of `height` pixels: what `_repr_html_` hands to a notebook.

    The frame carries the document itself, so it needs no file beside the notebook, and its sandbox keeps the page's
    script and style away from the notebook's own.
    """
    document = html.escape(page, quote=True)
    return (
        f'<iframe srcdoc="{document}" sandbox="allow-scripts allow-downloads" title="{html.escape(title)}" '
        f'style="width:100%;height:{height}px;border:1px solid #8884;border-radius:10px;background:#fff"></iframe>'
    )


def check_page(page: CircuitPage) -> None:
    """Refuse a payload that the page could only draw wrongly."""
    ids = [vertex.id for vertex in (*page.nodes, *page.tokens)]
    known = set(ids)
    if len(known) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise CircuitError(f"Ids of nodes and tokens must be unique in a page; used twice: {_listed(twice)}.")
    for node in page.nodes:
        _check_choice(f"node {node.id!r}", "site", node.site, SITES)
        for context in node.top_contexts:
            _check_context(node, context)
    for token in page.tokens:
        _check_choice(f"token {token.id!r}", "side", token.side, ("embedding", "unembedding"))
    for edge in page.edges:
        _check_choice(f"edge {edge.source!r} -> {edge.target!r}", "kind", edge.kind, EDGE_KINDS)
        if missing := sorted({edge.source, edge.target} - known):
            raise CircuitError(
                f"Edge {edge.source!r} -> {edge.target!r} ends at {_listed(missing)}, which is no node or token of "
                f"this page ({len(page.nodes)} nodes, {len(page.tokens)} tokens). Add it, or leave the edge out."
            )


def page_data(page: CircuitPage) -> dict[str, Any]:
    """The payload as plain JSON values: numbers shortened, and each distinct token text stored once."""
    table: dict[str, int] = {}

    def index_of(pieces: Iterable[str]) -> list[int]:
        return [table.setdefault(piece, len(table)) for piece in pieces]

    data = {
        "title": page.title, "subtitle": page.subtitle, "model": page.model, "task": page.task,
        "n_layers": page.n_layers, "edge_value": page.edge_value, "summary": list(page.summary.items()),
        "nodes": [_node_data(node, index_of) for node in page.nodes],
        "tokens": [vars(token) for token in page.tokens],
        "edges": [[edge.source, edge.target, edge.weight, edge.kind] for edge in page.edges],
        "prompts": [
            vars(prompt) | {"pieces": index_of(prompt.pieces), "twin": index_of(prompt.twin)} for prompt in page.prompts
        ],
        "audit": None if page.audit is None else vars(page.audit) | {"rows": [vars(row) for row in page.audit.rows]},
    }  # fmt: skip
    return shortened(data | {"pieces": list(table)})


def embed_json(data: dict[str, Any]) -> str:
    """`data` as JSON that no HTML parser can read as markup, wherever in a page it stands.

    Everything beyond ASCII is a \\u escape (line separators and lone surrogates among it), and the three characters
    that could open a tag, an end tag or an entity are escaped as well.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _node_data(node: PageNode, index_of: Any) -> dict[str, Any]:
    contexts = [
        {"pieces": index_of(shown.pieces), "values": list(shown.values), "at": shown.at, "source": shown.source}
        for shown in node.top_contexts
    ]
    writes = [[write.token, write.effect] for write in node.writes]
    return vars(node) | {"top_contexts": contexts, "writes": writes, "stats": list(node.stats.items())}


def shortened(value: Any) -> Any:
    """`value` with every float at `SIGNIFICANT_DIGITS`; a number that JSON cannot say (nan, inf) becomes null."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        return int(short) if short.is_integer() else short
    return value


def _check_choice(owner: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise CircuitError(f"The {name} of {owner} is {value!r}; a page knows {_listed(choices)}.")


def _check_context(node: PageNode, context: PageContext) -> None:
    n_pieces, n_values = len(context.pieces), len(context.values)
    if n_pieces != n_values or not 0 <= context.at < n_pieces:
        raise CircuitError(
            f"A context of node {node.id!r} has {n_pieces} pieces, {n_values} values and is shown for token "
            f"{context.at}; it needs one value per piece and a token between 0 and {n_pieces - 1}."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _well_formed(text: str) -> str:
    """`text` with lone surrogates replaced, so that the page can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _vendored_script() -> str:
    """The graph library, under its licences: they ask to travel with every copy, and a page is one."""
    licences = "\n".join(_resource(f"vendor/LICENSE-{name}.txt") for name in ("d3", "d3-ease"))
    return "\n".join([f"/*\n{licences}*/", *(_resource(f"vendor/{name}.min.js") for name in VENDORED)])


def _own_script() -> str:
    """The page's script as one strict function, which leaves no name behind in the window."""
    parts = "\n".join(_resource(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\nstartPage();\n}})();'


def content_policy(scripts: Iterable[str], styles: Iterable[str]) -> str:
    """A policy that allows exactly these scripts and styles, by hash, and nothing from anywhere else.

    Should a hostile text ever become markup, its handlers and scripts still would not run, nor its image load.
    """

    def hashes(texts: Iterable[str]) -> str:
        digests = (hashlib.sha256(text.encode("utf-8")).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)

    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    return f"{nothing}; script-src {hashes(scripts)}; style-src {hashes(styles)}"
