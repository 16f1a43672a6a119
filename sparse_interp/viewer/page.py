"""The circuit page: one HTML file in which a circuit can be looked at, node by node, beside its audit.

    page  =  template( style, graph library, script, JSON( payload ) )

`CircuitPage` (viewer/content.py) says what a page can show. `render_page` turns it into text and `inline_html` into a
cell of a notebook. The file needs no network and no server, and equal payloads give equal bytes.

Three promises, and where each is kept:

    token text stays text   the payload is compressed JSON in letters and digits; the script writes text nodes only; the
                            policy in the page's head runs no script but ours, known by hash
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
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from sparse_interp.errors import CircuitError
from sparse_interp.viewer.content import EDGE_KINDS, SITES, CircuitPage, PageContext, PageNode, PageWrite

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

SCRIPTS = (
    "text.js",
    "model.js",
    "sizes.js",
    "layout.js",
    "graph.js",
    "tables.js",
    "panel.js",
    "prompts.js",
    "audit.js",
    "views.js",
    "compare.js",
    "exports.js",
    "controls.js",
    "page.js",
)
"""The page's own script, in the order in which its parts build on each other."""

SIGNIFICANT_DIGITS, ACTIVATION_DIGITS = 4, 3
"""Digits kept of every number in a page, and of activations token by token: what a reader can use, and far fewer bytes
than a float's 17."""

TEXTS = ("pieces", "twin")
"""Fields that hold the texts of tokens, of which a page stores each distinct one once."""

TOKEN_BY_TOKEN = ("values", "on_prompts", "attention", "in_circuit", "positions")
"""Fields that hold a number for every token."""


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
        data=packed(embed_json(page_data(page))),
    )


def inline_html(page: str, height: int = 720, title: str = "Circuit page") -> str:
    """`page` in a frame of `height` pixels: what `_repr_html_` hands to a notebook.

    The frame carries the document itself, so it needs no file beside the notebook, and its sandbox keeps the page's
    script and style away from the notebook's own. A notebook that is not trusted is shown without frames: then the
    words inside this one are what is left, which a browser that draws the frame never shows.
    """
    document, name = html.escape(page, quote=True), html.escape(title)
    return (
        f'<iframe srcdoc="{document}" sandbox="allow-scripts allow-downloads" title="{name}" '
        f'style="width:100%;height:{height}px;border:1px solid #8884;border-radius:10px;background:#fff">'
        f"{name}: shown once this notebook is trusted, or its cell has run again.</iframe>"
    )


def check_page(page: CircuitPage) -> None:
    """Refuse a payload that the page could only draw wrongly."""
    ids = [vertex.id for vertex in (*page.nodes, *page.tokens)]
    known = set(ids)
    if len(known) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise CircuitError(f"Ids of nodes and tokens must be unique in a page; used twice: {_listed(twice)}.")
    lengths = [(len(prompt.pieces), len(prompt.twin)) for prompt in page.prompts]
    for node in page.nodes:
        _check_choice(f"node {node.id!r}", "site", node.site, SITES)
        for context in node.top_contexts:
            _check_context(node, context)
        _check_on_prompts(f"node {node.id!r}", node.on_prompts, lengths)
    for head in page.heads:
        for values in (head.attention, head.in_circuit):
            _check_on_prompts(f"head {head.layer}.{head.head}", values, lengths)
    for token in page.tokens:
        _check_choice(f"token {token.id!r}", "side", token.side, ("embedding", "unembedding"))
    for edge in page.edges:
        _check_choice(f"edge {edge.source!r} -> {edge.target!r}", "kind", edge.kind, EDGE_KINDS)
        if missing := sorted({edge.source, edge.target} - known):
            raise CircuitError(
                f"Edge {edge.source!r} -> {edge.target!r} ends at {_listed(missing)}, which is no node or token of "
                f"this page ({len(page.nodes)} nodes, {len(page.tokens)} tokens). Add it, or leave the edge out."
            )
    if page.other is not None:
        check_page(page.other)


def page_data(page: CircuitPage) -> dict[str, Any]:
    """The payload as plain JSON values: numbers shortened, and each distinct token text stored once."""
    table: dict[str, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, CircuitPage):
            return as_dict(value) | {"edges": _edges_by_number(value)}
        if isinstance(value, PageWrite):
            return [table.setdefault(value.token, len(table)), value.effect]
        if is_dataclass(value):
            return as_dict(value)
        if isinstance(value, Mapping):
            return list(value.items())  # in the order that the caller chose
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    def as_dict(value: Any) -> dict[str, Any]:
        found = {}
        for name in (field.name for field in fields(value)):
            item = getattr(value, name)
            if name in TEXTS:
                found[name] = [table.setdefault(piece, len(table)) for piece in item]
            elif name in TOKEN_BY_TOKEN:
                found[name] = shortened(item, ACTIVATION_DIGITS)
            elif name != "edges":
                found[name] = plain(item)
        return found

    return shortened(plain(page) | {"pieces": list(table)})


def _edges_by_number(page: CircuitPage) -> list[list[Any]]:
    """Source, target, weight and kind of every edge: vertices and kinds by their place in their lists."""
    number = {vertex.id: i for i, vertex in enumerate((*page.nodes, *page.tokens))}
    return [[number[e.source], number[e.target], e.weight, EDGE_KINDS.index(e.kind)] for e in page.edges]


def packed(text: str) -> str:
    """`text` compressed, in letters: a third of its size, and nothing that a parser of HTML could take for markup."""
    return base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def embed_json(data: dict[str, Any]) -> str:
    """`data` as JSON that no HTML parser can read as markup, wherever in a page it stands.

    Everything beyond ASCII is a \\u escape (line separators and lone surrogates among it), and the three characters
    that could open a tag, an end tag or an entity are escaped as well.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def shortened(value: Any, digits: int = SIGNIFICANT_DIGITS) -> Any:
    """`value` with every float at `digits`; a number that JSON cannot say (nan, inf) becomes null."""
    if isinstance(value, Mapping):
        return {key: shortened(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{digits}g}")
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


def _check_on_prompts(owner: str, values: Sequence[tuple], lengths: Sequence[tuple[int, int]]) -> None:
    found = [(len(prompt), len(twin)) for prompt, twin in values]
    if values and found != list(lengths):
        raise CircuitError(
            f"{owner} has values for prompts and twins of {found} tokens; the page has prompts of {list(lengths)}."
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
    return f'(() => {{\n"use strict";\n{parts}\nopenPage();\n}})();'


def content_policy(scripts: Iterable[str], styles: Iterable[str]) -> str:
    """A policy that allows exactly these scripts and styles, by hash, and nothing from anywhere else.

    Should a hostile text ever become markup, its handlers and scripts still would not run, nor its image load.
    """

    def hashes(texts: Iterable[str]) -> str:
        digests = (hashlib.sha256(text.encode("utf-8")).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)

    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:"
    return f"{nothing}; script-src {hashes(scripts)}; style-src {hashes(styles)}"
