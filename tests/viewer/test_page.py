"""The circuit page, opened in a headless Chromium and used with mouse and keyboard.

Without a Chromium the browser's tests are skipped and say so; those of the text alone always run.
"""

import hashlib
import importlib.util
import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sparse_interp.errors import CircuitError
from sparse_interp.viewer import page as page_module
from sparse_interp.viewer.content import (
    SITES,
    CircuitPage,
    PageAudit,
    PageAuditRow,
    PageChannel,
    PageContext,
    PageCurve,
    PageEdge,
    PageHalf,
    PageHead,
    PageHistogram,
    PageKnockOut,
    PageNode,
    PagePrompt,
    PageQuestion,
    PageTable,
    PageToken,
    PageWrite,
)
from sparse_interp.viewer.page import embed_json, inline_html, render_page

HOSTILE = "</script><img src=x onerror=window.wasHacked=1>"
STRANGE = [HOSTILE, "<!--<script>", "\u202eevil", "\ud800", "\u2028", "&lt;b&gt;", "'\"`", "w" * 400, "", "\n", " "]
WORDS = [
    "def",
    " name",
    " (",
    '"',
    "'",
    " =",
    " return",
    "\n",
    "    ",
    " self",
    ".",
    "value",
    ")",
    ":",
    " in",
    " print",
]

# ---------------------------------------------------------------- payloads


def some_contexts(random: Random, n: int) -> list[PageContext]:
    """Contexts of 24 tokens in which about one token in four is active."""
    contexts = []
    for rank in range(n):
        values = [random.choice([0.0, 0.0, 0.0, random.gauss(0.8, 0.5)]) for _ in range(24)]
        at = random.randrange(8, 24)
        values[at] = 3.2 - 0.2 * rank
        pieces = [random.choice(WORDS) for _ in range(24)]
        contexts.append(PageContext(pieces=pieces, values=values, at=at, part="highest" if rank < 3 else "lowest"))
    return contexts


def some_outcome(random: Random) -> PageKnockOut:
    lead = random.uniform(-1, 4)
    return PageKnockOut(kl=random.expovariate(1), lead=lead, accuracy=0.75, loss=0.4, leads=[(lead, -lead)])


def some_nodes(random: Random, n_layers: int, per_site: dict[str, int], rails: list[int]) -> list[PageNode]:
    """Nodes at every site of every layer, reads and writes on a few shared rails."""
    nodes = []
    places = [(layer, site) for layer in range(n_layers) for site in SITES[:-1]] + [(n_layers, "final_read")]
    for layer, site in places:
        on_rail = site.endswith(("read", "write"))
        channels = random.sample(rails if on_rail else range(1024), per_site[site])
        for channel in sorted(channels):
            nodes.append(
                PageNode(
                    id=f"L{layer}.{site}.{channel}",
                    layer=layer,
                    site=site,
                    channel=channel,
                    head=channel % 3 if site in ("q", "k", "v") else None,
                    importance=random.expovariate(4.0),
                    baseline=random.gauss(0, 0.1),
                    sentence="Follows the token it stands at.",
                    top_contexts=some_contexts(random, 6),
                    histogram=PageHistogram(low=-1.5, high=3.2, counts=[3, 0, 120, 7, 1]),
                    on_prompts=[([random.gauss(0, 1) for _ in range(6)], [random.gauss(0, 1) for _ in range(6)])],
                    knock_out=some_outcome(random),
                    writes=[PageWrite(token=random.choice(WORDS), effect=random.gauss(0, 1)) for _ in range(10)],
                    stats={"active": "12.5 %", "mean when active": 0.71},
                )
            )
    return nodes


def some_edges(random: Random, nodes: list[PageNode], share: float) -> list[PageEdge]:
    """Weights between neighbouring sites, attention wires, and identity along rails from writes to the next reads."""
    steps = {
        ("attn_read", "q"),
        ("attn_read", "k"),
        ("attn_read", "v"),
        ("v", "attn_write"),
        ("mlp_read", "neuron"),
        ("neuron", "mlp_write"),
    }
    edges = []
    for a in nodes:
        for b in nodes:
            if a.layer == b.layer and (a.site, b.site) in steps and random.random() < share:
                edges.append(PageEdge(source=a.id, target=b.id, weight=random.gauss(0, 0.6)))
            if a.layer == b.layer and a.site in "qk" and b.site == "attn_write" and random.random() < share:
                edges.append(PageEdge(source=a.id, target=b.id, kind="attention"))
            later = (b.layer, SITES.index(b.site)) > (a.layer, SITES.index(a.site))
            if a.site.endswith("write") and b.site.endswith("read") and a.channel == b.channel and later:
                edges.append(PageEdge(source=a.id, target=b.id, kind="residual"))
    return edges


def some_audit() -> PageAudit:
    row = PageAuditRow
    return PageAudit(
        verdict="The circuit is better than its model beyond the interval, so it does something else.",
        passed=False,
        rows=[
            row(
                measure="sufficiency",
                condition="circuit",
                value=0.991,
                low=0.98,
                high=1.0,
                n=512,
                split="test",
                passed=True,
            ),
            row(
                measure="sufficiency",
                condition="random circuit of equal size",
                value=0.502,
                low=0.46,
                high=0.55,
                n=20,
                split="test",
                note="chance is 0.5",
            ),
            row(
                measure="necessity",
                condition="circuit removed",
                value=0.517,
                low=0.47,
                high=0.56,
                n=512,
                split="test",
                passed=True,
            ),
            row(
                measure="KL to the model (nats)",
                condition="circuit",
                value=0.0123,
                low=0.01,
                high=0.015,
                n=512,
                split="test",
                passed=True,
                note="bound 0.05",
            ),
            row(
                measure="loss gap (nats)",
                condition="circuit − model",
                value=-0.081,
                low=-0.09,
                high=-0.07,
                n=512,
                split="test",
                passed=False,
                note="bound: within 0.05 of the model, on either side",
            ),
            row(measure="sufficiency", condition="adversarial ablation", value=None, split="test", note="level quick"),
        ],
    )


def circuit_page(n_layers: int, per_site: dict[str, int], n_rails: int, share: float, seed: int = 7) -> CircuitPage:
    """A made-up circuit that looks like a real one."""
    random = Random(seed)
    rails = sorted(random.sample(range(256), n_rails))
    nodes = some_nodes(random, n_layers, per_site, rails)
    pieces = {"in.0": '"', "in.1": "'", "in.2": " (", "in.3": " print"}
    tokens = [PageToken(id=name, piece=piece, side="embedding", role="prompt") for name, piece in pieces.items()]
    tokens += [
        PageToken(id="out.0", piece='")', side="unembedding", role="answer"),
        PageToken(id="out.1", piece="')", side="unembedding", role="foil"),
    ]
    edges = some_edges(random, nodes, share)
    for node in nodes:
        if (node.layer, node.site) == (0, "attn_read"):
            piece = random.choice(list(pieces))
            edges.append(PageEdge(source=piece, target=node.id, weight=random.gauss(0, 1), kind="embedding"))
        if node.site == "final_read":
            for token in ("out.0", "out.1"):
                edges.append(PageEdge(source=node.id, target=token, weight=random.gauss(0, 1), kind="unembedding"))
    return CircuitPage(
        title="Which quote closes this string?",
        subtitle="The nodes that stdlib-small needs to tell a single from a double quote.",
        model="stdlib-small",
        task="single_double_quote",
        n_layers=n_layers,
        nodes=nodes,
        edges=edges,
        tokens=tokens,
        summary={
            "nodes": str(len(nodes)),
            "edges": str(sum(e.kind == "weight" for e in edges)),
            "KL, nats": "0.012",
            "accuracy": "99.1 %",
            "loss, circuit / model": "0.101 / 0.182",
        },
        prompts=[
            PagePrompt(
                pieces=["x", " =", " print", "(", '"', "hello"],
                answer='")',
                foil="')",
                twin=["x", " =", " print", "(", "'", "hello"],
            )
        ],
        audit=some_audit(),
        model_sha256="d6",
        whole=PageKnockOut(kl=0.2, lead=3.9, accuracy=1, loss=0.03, leads=[(4.0, 3.8)]),
        model_alone=PageKnockOut(kl=0, lead=6.7, accuracy=1, loss=0.002, leads=[(6, 7)]),
        heads=[some_head(random, *place) for place in sorted({(n.layer, n.head) for n in nodes if n.head is not None})],
        halves=[PageHalf(layer=layer, kind=kind, n_nodes=9, knock_out=some_outcome(random))
                for layer in range(n_layers) for kind in ("attention", "MLP")],
        channels=[PageChannel(channel=c, n_tokens=3, embedding=[PageWrite(token=" name", effect=0.5)],
                              unembedding=[PageWrite(token='"', effect=-0.5)], positions=[0, 0.1, -0.2],
                              histogram=PageHistogram(low=-0.5, high=0.5, counts=[1, 2, 0])) for c in rails],
        tables=[PageTable(title="Settings", columns=["what", "value"], rows=[["seed", 3], ["rule", "kl"]])],
        curves=[PageCurve(title="loss in the search", x="step", y="loss", points=[(1, 2.5), (2, 1.5), (3, 0.5)])],
    )  # fmt: skip


def some_head(random: Random, layer: int, head: int) -> PageHead:
    table = PageTable(title="QK: what makes its scores", columns=["k", "share of score"], rows=[["L0.k.3", 0.7]])
    paid = [([random.random() for _ in range(6)], [random.random() for _ in range(6)])]
    return PageHead(layer=layer, head=head, d_head=16, sentence="Looks at quotes.", tables=[table], attention=paid,
                    in_circuit=paid, knock_out=some_outcome(random))  # fmt: skip


def small_page() -> CircuitPage:
    """About forty nodes in two layers."""
    per_site = dict(zip(SITES, (3, 2, 2, 3, 3, 3, 3, 2, 3), strict=True))
    return circuit_page(2, per_site, n_rails=9, share=0.45)


def large_page() -> CircuitPage:
    """About 250 nodes in four layers."""
    per_site = dict(zip(SITES, (8, 5, 5, 8, 7, 9, 14, 7, 10), strict=True))
    return circuit_page(4, per_site, n_rails=34, share=0.16)


# ---------------------------------------------------------------- the page in a tab


@pytest.fixture
def show(browser: Any, tmp_path: Path):
    """Writes a payload's page to a file and opens it in a tab of its own."""

    def open_page(page: CircuitPage, **options: Any) -> Any:
        path = tmp_path / "circuit.html"
        path.write_text(render_page(page), encoding="utf-8")
        tab = browser.tab(**options)
        tab.open_circuit(path)
        return tab

    yield open_page
    browser.close_tabs()


def drawn_weights(tab: Any) -> int:
    return tab.js("document.querySelectorAll('#stage .edges .edge:is(.positive, .negative)').length")


# ---------------------------------------------------------------- the text alone


def test_equal_payloads_give_equal_bytes():
    assert render_page(small_page()) == render_page(small_page())


def test_a_page_of_a_hundred_nodes_with_contexts_is_small():
    page = small_page()
    nodes = [replace(node, id=f"{node.id}.{copy}") for copy in range(3) for node in page.nodes][:100]
    text = render_page(replace(page, nodes=nodes, edges=(), tokens=()))
    assert len(text.encode("utf-8")) < 600_000


def test_embedded_json_holds_no_markup_and_comes_back_as_it_was():
    data = {"pieces": STRANGE, "number": 0.5}
    text = embed_json(data)
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == data


def test_a_number_that_json_cannot_say_becomes_null():
    node = PageNode(id="a", layer=0, site="neuron", channel=0, importance=math.nan, baseline=-math.inf)
    shown = page_module.page_data(CircuitPage(nodes=[node]))["nodes"][0]
    assert shown["importance"] is None and shown["baseline"] is None


def test_the_vendored_files_are_the_ones_that_their_list_names():
    folder = Path(page_module.__file__).parent / "vendor"
    rows = re.findall(r"^\| (d3-\w+) \|.*`([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(page_module.VENDORED)
    assert sorted(f"{name}.min.js" for name, _ in rows) == sorted(file.name for file in folder.glob("*.js"))
    for name, digest in rows:
        assert hashlib.sha256((folder / f"{name}.min.js").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": [PageNode(id="a", layer=0, site="q", channel=0)] * 2}, "used twice: 'a'"),
        (
            {"nodes": [PageNode(id="a", layer=0, site="z", channel=0)]},
            "site of node 'a' is 'z'; a page knows 'attn_read'",
        ),
        ({"edges": [PageEdge(source="a", target="b")]}, "ends at 'b', which is no node or token"),
        ({"edges": [PageEdge(source="a", target="a", kind="wire")]}, "kind of edge 'a' -> 'a' is 'wire'"),
        ({"tokens": [PageToken(id="t", piece="t", side="left")]}, "side of token 't' is 'left'"),
    ],
)
def test_a_payload_that_could_only_be_drawn_wrongly_is_refused(change: dict[str, Any], words: str):
    page = CircuitPage(nodes=[PageNode(id="a", layer=0, site="q", channel=0)])
    with pytest.raises(CircuitError, match=re.escape(words)):
        render_page(replace(page, **change))


def test_a_context_needs_a_value_for_every_piece():
    context = PageContext(pieces=["a", "b"], values=[1.0], at=0)
    page = CircuitPage(nodes=[PageNode(id="a", layer=0, site="q", channel=0, top_contexts=[context])])
    with pytest.raises(CircuitError, match="2 pieces, 1 values"):
        render_page(page)


# ---------------------------------------------------------------- in the browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make_page", [small_page, large_page])
def test_a_page_opens_without_complaint_and_asks_the_network_for_nothing(show, make_page, scheme):
    page = make_page()
    tab = show(page, scheme=scheme)
    assert tab.js("document.querySelectorAll('.graph .vertex').length") == len(page.nodes) + len(page.tokens)
    tab.click(".graph .vertex.neuron")
    for name in ("audit", "channels", "origin", "circuit"):
        tab.click(f"#tab-{name}")
    assert tab.complaints() == [] and tab.requests() == []


def test_every_edge_is_drawn_and_of_identities_along_a_rail_the_one_that_goes_furthest(show):
    page = small_page()
    site = {node.id: (node.layer, SITES.index(node.site)) for node in page.nodes}
    furthest: dict[str, PageEdge] = {}
    for edge in page.edges:
        if edge.kind == "residual":
            furthest[edge.source] = max(furthest.get(edge.source, edge), edge, key=lambda e: site[e.target])
    expected = [(e.source, e.target) for e in page.edges if e.kind != "residual"]
    expected += [(e.source, e.target) for e in furthest.values()]
    ends = "[...document.querySelectorAll('#stage .edges .edge')].map(({__data__: e}) => [e.source, e.target])"
    assert sorted(map(tuple, show(page).js(ends))) == sorted(expected)


def test_a_page_of_nodes_alone_opens_too(show):
    tab = show(CircuitPage(nodes=[PageNode(id="a", layer=0, site="neuron", channel=3)]))
    tab.click(".graph .vertex")
    assert tab.js("document.querySelector('#detail h2').textContent") == "Neuron 3"
    assert tab.complaints() == []


def hostile_page() -> CircuitPage:
    """Every field that takes text holds the worst that a token can be."""
    strange = [PageContext(pieces=STRANGE, values=[1.0] * len(STRANGE), at=0, part=HOSTILE)]
    on_prompts = [([1.0] * len(STRANGE), [-1.0] * len(STRANGE))]
    out = PageKnockOut(kl=1, lead=1, accuracy=1, loss=1, leads=[(1, -1)])
    worst = [PageWrite(token=text, effect=1.0) for text in STRANGE]
    table = PageTable(title=HOSTILE, columns=[HOSTILE, "n"], rows=[[HOSTILE, 1.0]], note=HOSTILE)
    curve = PageCurve(title=HOSTILE, x=HOSTILE, y=HOSTILE, points=[(1, 2), (2, 3)])
    node = PageNode(
        id=HOSTILE,
        layer=0,
        site="v",
        channel=0,
        head=0,
        importance=1.0,
        sentence=HOSTILE,
        top_contexts=strange,
        on_prompts=on_prompts,
        knock_out=out,
        writes=worst,
        stats={HOSTILE: HOSTILE},
    )
    tokens = [PageToken(id=f"t{i}", piece=text, side="embedding", role="answer") for i, text in enumerate(STRANGE)]
    edges = [PageEdge(source=token.id, target=HOSTILE, kind="embedding") for token in tokens]
    row = PageAuditRow(measure=HOSTILE, condition=HOSTILE, value=1.0, split=HOSTILE, note=HOSTILE, passed=True,
                       about=HOSTILE)  # fmt: skip
    page = CircuitPage(
        nodes=[node],
        tokens=tokens,
        edges=edges,
        title=HOSTILE + "\ud800",
        subtitle=HOSTILE,
        model=HOSTILE,
        task=HOSTILE,
        edge_value=HOSTILE,
        summary={HOSTILE: HOSTILE},
        prompts=[PagePrompt(pieces=STRANGE, answer=HOSTILE, foil=HOSTILE, twin=STRANGE)],
        audit=PageAudit(
            verdict=HOSTILE,
            passed=True,
            rows=[row],
            headline=HOSTILE,
            questions=[PageQuestion(about=HOSTILE, passed=True, why=HOSTILE)],
            curves=[curve],
        ),
        whole=out,
        heads=[PageHead(layer=0, head=0, d_head=4, sentence=HOSTILE, tables=[table], attention=on_prompts,
                        in_circuit=on_prompts, knock_out=out)],
        halves=[PageHalf(layer=0, kind="attention", n_nodes=1, knock_out=out)],
        channels=[PageChannel(channel=0, n_tokens=9, embedding=worst, unembedding=worst)],
        tables=[table],
        curves=[curve],
    )  # fmt: skip
    return replace(page, other=page)


def test_hostile_text_stays_text_wherever_it_stands(show):
    tab = show(hostile_page())
    tab.js("document.querySelector('#search').focus()")
    tab.call("Input.insertText", text="img")
    seen = tab.js("document.body.innerText")
    tab.press("Escape")
    tab.js("document.querySelector('.vertex.node').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    seen += tab.js("document.querySelector('#detail').innerText")
    tab.js(
        "[...document.querySelectorAll('#detail button')].find((b) => b.textContent === 'QK and OV reading').click()"
    )
    seen += tab.js("document.querySelector('#detail').innerText")
    tab.click("#detail .knock")
    for name in ("audit", "compare", "channels", "origin"):
        tab.click(f"#tab-{name}")
        seen += tab.js(f"document.querySelector('#view-{name}').innerText")
    assert seen.count("onerror=window.wasHacked=1") >= 50
    assert "\\u202eevil" in seen, "a mark that reverses the text after it must be shown, not obeyed"
    assert tab.js("window.wasHacked === undefined && document.querySelectorAll('img').length === 0")
    assert tab.complaints() == [] and tab.requests() == []


def test_a_click_on_a_node_shows_its_contexts_writes_and_wires(show):
    page = small_page()
    targets = {edge.target for edge in page.edges}
    node = next(node for node in page.nodes if node.site == "neuron" and node.id in targets)
    tab = show(page)
    tab.click(f'.vertex[data-id="{node.id}"]')
    assert tab.js("document.querySelector('#detail h2').textContent") == f"Neuron {node.channel}"
    assert tab.js("document.querySelectorAll('#detail .contexts li').length") == len(node.top_contexts)
    assert tab.js("document.querySelector('#detail .contexts .piece.at').title") == "+3.2"
    assert tab.js("document.querySelectorAll('#detail .writes li').length") == len(node.writes)

    tab.click("#detail .wires button")
    other = tab.js("document.querySelector('.vertex.pinned').dataset.id")
    assert (other, node.id) in {(edge.source, edge.target) for edge in page.edges}


def test_every_activation_can_be_read_as_a_number(show):
    tab = show(small_page())
    tab.click(".vertex.neuron")
    figures = "[...document.querySelectorAll('#detail .figure')].filter((figure) => figure.checkVisibility()).length"
    assert tab.js(figures) == 0
    tab.js("document.querySelectorAll('#detail .numbers-toggle').forEach((toggle) => toggle.click())")
    assert tab.js(figures) == tab.js("document.querySelectorAll('#detail .piece:is(.positive, .negative)').length") > 0


def test_the_keyboard_reaches_every_node_and_pins_it(show):
    page = small_page()
    tab = show(page)
    tab.js("document.querySelector('#least').focus()")
    tab.press("Tab")
    focused = "document.activeElement.dataset.id"
    assert tab.js(focused) is not None, "Tab after the toolbar enters the graph"

    reached: set[str] = set()
    tab.press("Home")
    while True:
        column = walk(tab, "ArrowUp") | walk(tab, "ArrowDown")
        if column <= reached:
            break
        reached |= column
        tab.press("ArrowRight")
    assert reached == {vertex.id for vertex in (*page.nodes, *page.tokens)}

    here = tab.js(focused)
    tab.press("Enter")
    assert tab.js("document.querySelector('.vertex.pinned').dataset.id") == here
    assert tab.js("document.activeElement.getAttribute('aria-pressed')") == "true"
    tab.press("Escape")
    assert tab.js("document.querySelector('.vertex.pinned')") is None and tab.js(focused) == here
    tab.press(" ")
    assert tab.js("document.querySelector('.vertex.pinned').dataset.id") == here


def walk(tab: Any, key: str) -> set[str]:
    """Ids that the focus passes while `key` still moves it."""
    passed: list[str] = []
    while (here := tab.js("document.activeElement.dataset.id")) not in passed:
        passed.append(here)
        tab.press(key)
    return set(passed)


def test_the_threshold_hides_weak_edges_and_announces_how_many_are_left(show):
    page = small_page()
    weights = [edge for edge in page.edges if edge.kind not in ("residual", "attention")]
    tab = show(page)
    assert drawn_weights(tab) == len(weights)
    tab.js("document.querySelector('#threshold').focus()")
    for _ in range(10):
        tab.press("ArrowRight")
    strongest = sorted(weights, key=lambda edge: abs(edge.weight))[10:]
    assert drawn_weights(tab) == len(strongest)

    # Edges are the weights within blocks; entries of the embedding and unembedding are counted apart.
    kept, total = (sum(edge.kind == "weight" for edge in some) for some in (strongest, weights))
    words = f"{kept} of {total} edges"
    assert words in tab.js("document.querySelector('#threshold-output[role=status]').textContent")
    spoken = f"{words}, {len(strongest) - kept} of {len(weights) - total} token weights shown"
    assert spoken in tab.js("document.querySelector('#threshold').getAttribute('aria-valuetext')")
    tab.press("End")
    assert drawn_weights(tab) == 1


def test_numbers_that_are_no_weights_are_not_called_so(show):
    tab = show(replace(small_page(), edge_value="pair value"))
    legend = tab.js("document.querySelector('#legend').textContent")
    assert "positive pair value" in legend and "weight" not in legend
    tab.js("document.querySelector('#threshold').focus()")
    tab.press("ArrowRight")
    assert tab.js("document.querySelector('#threshold-output').textContent").startswith("|pair value| ≥ ")


def test_rails_and_attention_wires_can_be_switched_off(show):
    tab = show(small_page())
    for kind in ("residual", "attention"):
        shown = f"document.querySelectorAll('#stage .edges .edge.{kind}').length"
        assert tab.js(shown) > 0
        tab.click(f"#show-{kind}")
        assert tab.js(shown) == 0


def test_search_finds_a_node_by_name_and_pins_it(show):
    page = small_page()
    node = next(node for node in page.nodes if node.site == "neuron")
    tab = show(page)
    tab.js("document.querySelector('#search').focus()")
    tab.call("Input.insertText", text=f"L{node.layer} neuron {node.channel}")
    assert tab.js("document.querySelectorAll('.vertex.match').length") == 1
    tab.press("Enter")
    assert tab.js("document.querySelector('.vertex.pinned').dataset.id") == node.id


@cache
def tall_page() -> CircuitPage:
    """About 600 nodes in two layers, four times as many in a column as a window is high, and nothing else."""
    per_site = dict(zip(SITES, (62, 28, 28, 38, 33, 28, 26, 16, 79), strict=True))
    page = circuit_page(2, per_site, n_rails=150, share=0.02)
    return replace(page, nodes=[replace(n, top_contexts=(), on_prompts=(), writes=()) for n in page.nodes], heads=())


@pytest.mark.parametrize("make_page", [small_page, large_page, tall_page])
def test_a_channel_keeps_its_rail_and_no_two_vertices_touch(show, make_page):
    seen = "({x: v.x, y: v.y, r: v.radius ?? 11 * v.scale, site: v.site ?? '', channel: v.channel ?? 0})"
    drawn = show(make_page()).js(f"[...document.querySelectorAll('.graph .vertex')].map(({{__data__: v}}) => {seen})")
    heights: dict[int, set[float]] = {}
    for vertex in drawn:
        if vertex["site"].endswith(("read", "write")):
            heights.setdefault(vertex["channel"], set()).add(round(vertex["y"], 3))
    assert all(len(seen) == 1 for seen in heights.values())
    for i, a in enumerate(drawn):
        assert all(math.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["r"] + b["r"] for b in drawn[:i])


@pytest.mark.parametrize("make_page", [large_page, tall_page])
def test_a_drawing_takes_the_shape_of_the_window_whatever_the_shape_of_the_circuit(show, make_page):
    tab = show(make_page())
    box = (
        "(({x, y, right, bottom}) => [x, y, right, bottom])(document.querySelector('#stage{}').getBoundingClientRect())"
    )
    for width, height in [(1440, 900), (1024, 768)]:
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        tab.settle()
        tab.settle()
        (left, top, right, bottom), (x, y, x_end, y_end) = (tab.js(box.replace("{}", of)) for of in ("", " .world"))
        assert left - 1 <= x < x_end <= right + 1 and top - 1 <= y < y_end <= bottom + 1, "all of it is in view"
        assert (x_end - x) * (y_end - y) > 0.7 * (right - left) * (bottom - top)


SIZES = [(1440, 900), (700, 1500), (1920, 1080), (420, 800)]


@pytest.mark.parametrize("n_layers", [2, 12])
@pytest.mark.parametrize("name", ["block-name", "column-name"])
def test_no_two_headings_touch_in_any_window(show, n_layers, name):
    per_site = dict(zip(SITES, (3, 2, 2, 3, 3, 3, 3, 2, 3), strict=True))
    tab = show(circuit_page(n_layers, per_site, n_rails=9, share=0.45))
    boxes = f"""[...document.querySelectorAll('#stage .heading .{name}')].filter((t) => t.textContent)
      .map((t) => t.getBoundingClientRect()).map((b) => [b.left, b.right, b.top])"""
    for width, height in SIZES:
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        tab.settle()
        tab.settle()
        seen = sorted(tab.js(boxes))
        assert seen or width < 700, (width, height)  # on a telephone twelve layers have no room for names
        for top in {box[2] for box in seen}:
            row = [box for box in seen if box[2] == top]
            assert all(left > right for (_, right, _), (left, _, _) in pairwise(row)), (width, height)


@pytest.mark.parametrize("n_layers", [2, 12])
def test_no_two_layer_names_touch(show, n_layers):
    per_site = {site: int(site in ("attn_read", "attn_write", "mlp_read")) for site in SITES}
    boxes = show(circuit_page(n_layers, per_site, n_rails=9, share=0.45)).js(
        "[...document.querySelectorAll('.graph .block-name')].map((t) => t.getBoundingClientRect())"
        ".map((b) => [b.left, b.right])"
    )
    assert len(boxes) >= n_layers
    assert all(left > right for (_, right), (left, _) in pairwise(boxes))


def test_a_missing_audit_is_announced_before_anything_else(show):
    tab = show(replace(small_page(), audit=None))
    strip = tab.js("(({top, height}) => [top, height])(document.querySelector('#verdict').getBoundingClientRect())")
    assert strip[0] < 200 and strip[1] > 20
    assert "Audit missing" in tab.js("document.querySelector('#verdict').innerText")
    assert tab.js("document.querySelector('#tab-audit').innerText").split() == ["Audit", "missing"]


def test_the_audit_says_its_verdict_and_every_result_in_words(show):
    tab = show(small_page())
    assert "Audit failed" in tab.js("document.querySelector('#verdict').innerText")
    assert "1 check failed" in tab.js("document.querySelector('#verdict').innerText")
    tab.click("#verdict button")
    results = tab.js("[...document.querySelectorAll('.audit .outcome')].map((cell) => cell.innerText.slice(2))")
    assert results == ["pass", "not judged", "pass", "pass", "fail", "not run"]


def test_light_and_dark_follow_the_reader_and_can_be_chosen(show):
    shade = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        tab = show(small_page(), scheme=scheme)
        for _ in range(3):
            seen[scheme, tab.js("document.querySelector('#theme').textContent")] = tab.js(shade)
            tab.click("#theme")
    assert seen["light", "Theme: automatic"] != seen["dark", "Theme: automatic"]
    for chosen in ("light", "dark"):
        name = f"Theme: {chosen}"
        assert seen["light", name] == seen["dark", name] == seen[chosen, "Theme: automatic"]


# Contrast of every visible text with what is behind it, colours read back through a canvas.
CONTRAST = """(() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = (layers) => {
    context.clearRect(0, 0, 1, 1);
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('svg, script, style') || !element.checkVisibility() || element.disabled) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const behind = [];
    for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const back = paint(behind), text = paint([...behind, getComputedStyle(element).color]);
    const [low, high] = [light(back), light(text)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), `<${element.className}> ${element.textContent.slice(0, 30)}`]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3).concat([[found.length, 'texts']]);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("audited", [True, False])
def test_every_text_stands_out_from_its_background(show, scheme, audited):
    page = small_page() if audited else replace(small_page(), audit=None)
    tab = show(page, scheme=scheme)
    for step in (None, ".vertex.neuron", "#detail .knock", "#tab-audit", "#tab-channels", "#tab-origin"):
        if step:
            tab.click(step)
        *lowest, (n_texts, _) = tab.js(CONTRAST)
        assert n_texts > 10
        assert lowest[0][0] >= 4.5, f"WCAG AA asks for 4.5 : 1; the faintest texts are {lowest}"


VS_CODE_POLICY = (
    "default-src 'none'; script-src 'self' https://*.vscode-cdn.net 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' https://*.vscode-cdn.net 'unsafe-inline'; font-src 'self' https://*.vscode-cdn.net https:; "
    "img-src 'self' https://*.vscode-cdn.net https: http: data:; connect-src https:; child-src https: data:;"
)
"""What VS Code puts on a notebook's outputs where its experimental setting asks for a policy; frames inherit it."""


@pytest.mark.parametrize("policy", ["", VS_CODE_POLICY])
def test_a_notebook_frame_shows_the_page_and_touches_nothing_outside(browser, tmp_path, policy):
    page = small_page()
    host = tmp_path / "notebook.html"
    cell = inline_html(render_page(page), height=640)
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
    head = f'<!doctype html>{meta}<link rel="icon" href="data:,"><title>host</title>'
    host.write_text(f"{head}<body>{cell}</body>", encoding="utf-8")
    tab = browser.tab(width=900, height=700)
    tab.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    tab.open(host)
    frame = browser.attach(
        next(e["params"]["sessionId"] for e in tab.events if e["method"] == "Target.attachedToTarget")
    )
    frame.call("Runtime.enable")
    frame.call("Log.enable")
    while not frame.js("document.documentElement.dataset.ready === 'yes'"):
        frame.settle()
    assert frame.js("document.querySelectorAll('.graph .vertex').length") == len(page.nodes) + len(page.tokens)
    assert tab.js("document.querySelector('iframe').getBoundingClientRect().height") == 642  # with its border
    assert frame.complaints() == [] and tab.complaints() == [] and tab.requests() == []
    browser.close_tabs()


class WithoutFrames(HTMLParser):
    """The words that are left where frames are taken away, as a notebook that is not trusted does."""

    words = ""

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_notebook_that_is_not_trusted_says_how_the_page_is_shown():
    reader = WithoutFrames()
    reader.feed(inline_html(render_page(small_page()), title="a < b"))
    assert reader.words == "a < b: shown once this notebook is trusted, or its cell has run again."


def text_of(tab: Any, selector: str) -> str:
    return tab.js(f"document.querySelector({json.dumps(selector)}).innerText")


def test_a_knock_out_shows_what_was_measured_and_takes_the_wires_away(show):
    page = small_page()
    node = next(n for n in page.nodes if n.site == "neuron" and any(e.source == n.id for e in page.edges))
    tab = show(page)
    tab.click(f'#stage .vertex[data-id="{node.id}"]')
    before = drawn_weights(tab)
    tab.click("#detail .knock")
    strip = text_of(tab, "#out")
    assert f"neuron {node.channel}" in strip and "KL from the model 0.2 →" in strip and "accuracy 1 → 0.75" in strip
    touching = sum(node.id in (e.source, e.target) for e in page.edges if e.kind == "weight")
    assert drawn_weights(tab) == before - touching
    assert tab.js("document.querySelectorAll('#stage .vertex.out .cross').length") == 1
    tab.click("#out button")
    assert drawn_weights(tab) == before and tab.js("document.querySelector('#out').hidden")
    assert tab.js("document.querySelector('#stage .cross')") is None


def test_prompts_stand_above_their_twins_with_the_answer_marked(show):
    page = small_page()
    node = next(n for n in page.nodes if n.site == "q")
    tab = show(page)
    tab.click(f'#stage .vertex[data-id="{node.id}"]')
    pair = "document.querySelectorAll('#detail .pair .aligned:not(.answers)')"
    number = "(p) => Number((p.title || '0').replace('−', '-'))"
    shown = tab.js(f"[...{pair}].map((cell) => [...cell.querySelectorAll('.piece')].map({number}))")
    ours, theirs = node.on_prompts[0]
    assert [pair[0] for pair in shown] == pytest.approx(ours, rel=1e-2)
    assert [pair[1] for pair in shown] == pytest.approx(theirs, rel=1e-2)
    assert tab.js(f"[...{pair}].map((cell) => cell.classList.contains('differs'))") == [False] * 4 + [True, False]
    answers = "[...document.querySelectorAll('#detail .answers .next')].map((next) => next.innerText)"
    assert tab.js(answers) == ['")', "')"]
    tab.js("[...document.querySelectorAll('#detail .choice button')].find((b) => b.innerText.includes('twin')).click()")
    first = tab.js(f"Number({pair}[0].querySelector('.piece').title.replace('−', '-'))")
    assert first == pytest.approx(ours[0] - theirs[0], rel=2e-2)


def test_a_head_is_read_beside_its_nodes(show):
    page = small_page()
    node = next(n for n in page.nodes if n.site == "v")
    tab = show(page)
    tab.click(f'#stage .vertex[data-id="{node.id}"]')
    assert "Looks at quotes." in text_of(tab, "#detail")
    tab.js(
        "[...document.querySelectorAll('#detail button')].find((b) => b.textContent === 'QK and OV reading').click()"
    )
    said = text_of(tab, "#detail")
    assert f"Head {node.head}" in said and "QK: what makes its scores" in said and "Without it" in said
    assert tab.js("document.querySelectorAll('#detail .choice button').length") == 3
    tab.press("Escape")
    assert "Choose a node" in text_of(tab, "#detail")


def test_the_importance_threshold_hides_nodes_and_their_wires_and_keys_pass_over_them(show):
    page = small_page()
    tab = show(page)
    tab.js("document.querySelector('#least').focus()")
    for _ in range(20):
        tab.press("ArrowRight")
    kept = {n.id for n in sorted(page.nodes, key=lambda n: n.importance)[20:]}
    seen = "[...document.querySelectorAll('#stage .vertex.node')].filter((v) => getComputedStyle(v).display !== 'none')"
    assert set(tab.js(f"{seen}.map((v) => v.dataset.id)")) == kept
    ends = tab.js(
        "[...document.querySelectorAll('#stage .edges .edge.weight')].flatMap(({__data__: e}) => [e.source, e.target])"
    )
    assert set(ends) <= kept
    assert f"{len(kept)} of {len(page.nodes)} nodes" in text_of(tab, "#least-output")
    tab.js("document.querySelector('#stage .vertex[tabindex=\"0\"]').focus()")
    assert walk(tab, "ArrowDown") | walk(tab, "ArrowUp") <= kept | {token.id for token in page.tokens}


@pytest.mark.parametrize("same", [True, False])
def test_two_circuits_stand_side_by_side_and_only_those_of_one_model_share_nodes(show, same):
    page = small_page()
    ids = {n.id for n in page.nodes[::2]}
    sha256 = "d6" if same else "a1"
    other = replace(page, nodes=page.nodes[::2], tokens=(), heads=(), model_sha256=sha256, title="Nonsense",
                    edges=[e for e in page.edges if {e.source, e.target} <= ids])  # fmt: skip
    tab = show(replace(page, other=other))
    places = "[...document.querySelectorAll('#stage .vertex')].map(({__data__: v}) => [v.x, v.y])"
    before = tab.js(places)
    tab.click("#tab-compare")
    assert tab.js(places) == before, "what is drawn beside another circuit leaves its own graph alone"
    counts = [tab.js(f"document.querySelectorAll('.side')[{i}].querySelectorAll('.vertex').length") for i in (0, 1)]
    assert counts == [len(page.nodes) + len(page.tokens), len(ids)]
    rings = tab.js("document.querySelectorAll('.side:first-child .vertex.shared').length")
    assert rings == (len(ids) if same else 0)
    row = tab.js(
        "[...document.querySelector('#view-compare .small-table tbody tr').cells].map((cell) => cell.innerText)"
    )
    jaccard = f"{len(ids) / len(page.nodes):.3g}"
    assert row == ["nodes", str(len(page.nodes)), str(len(ids)), *([str(len(ids)), jaccard] if same else [])]
    tab.click(".side:first-child .vertex.node .shape")
    assert tab.js("document.querySelector('#view-circuit').hidden") is False
    assert tab.js("document.querySelector('#stage .vertex.pinned') !== null")
    assert tab.complaints() == []


def saved(tab: Any, form: str) -> tuple[str, str]:
    """Name and text of the file that an export hands to the browser."""
    tab.js("""window.given = []; URL.createObjectURL = (blob) => { window.given.push(blob); return '#'; };
      HTMLAnchorElement.prototype.click = function () { window.name_ = this.download; }; 0""")
    tab.js(f"document.querySelector('#export [data-form={form}]').click()")
    tab.js(
        "new Promise((done) => { const wait = () => window.given.length ? done(1) : setTimeout(wait, 20); wait(); })"
    )
    return tab.js("window.name_"), tab.js("window.given[0].text()")


def test_tables_and_pictures_can_be_taken_away(show):
    page = small_page()
    tab = show(page)
    name, nodes = saved(tab, "nodes")
    assert name == "single_double_quote-stdlib-small.nodes.csv"
    assert [line.split(",")[0] for line in nodes.splitlines()[1:]] == [node.id for node in page.nodes]
    tab.js("document.querySelector('#threshold').focus()")
    tab.press("End")
    _, edges = saved(tab, "edges")
    assert sum(",weight," in line for line in edges.splitlines()) == sum(
        e.kind == "weight" for e in sorted((e for e in page.edges if e.kind not in ("residual", "attention")),
                                           key=lambda e: abs(e.weight))[-1:])  # fmt: skip
    _, everything = saved(tab, "json")
    assert json.loads(everything)["title"] == page.title
    _, drawing = saved(tab, "svg")
    assert drawing.startswith("<svg") and drawing.count('class="shape"') == len(page.nodes) + len(page.tokens)
    assert "var(--" not in drawing and "light-dark" not in drawing, "a drawing carries its own colours"
    tab.js("window.given = []; document.querySelector('#export [data-form=png]').click()")
    tab.js(
        "new Promise((done) => { const wait = () => window.given.length ? done(1) : setTimeout(wait, 20); wait(); })"
    )
    assert tab.js("window.given[0].type + ' ' + (window.given[0].size > 10000)") == "image/png true"
    assert tab.complaints() == [] and tab.requests() == []


def test_a_cell_that_a_spreadsheet_would_run_is_quoted(show):
    node = PageNode(id='=cmd|"/c calc"!A1', layer=0, site="neuron", channel=0)
    _, text = saved(show(CircuitPage(nodes=[node])), "nodes")
    assert text.splitlines()[1].startswith('"\'=cmd|""/c calc""!A1"')


def test_the_whole_page_can_be_used_without_a_mouse(show):
    tab = show(replace(small_page(), other=small_page()))
    visited: list[str] = []
    for _ in range(25):
        tab.press("Tab")
        visited.append(tab.js("document.activeElement.id || document.activeElement.dataset.id || 'no name'"))
    assert {"theme", "tab-circuit", "search", "threshold", "least", "show-residual", "detail"} <= set(visited)
    tab.js("document.querySelector('#tab-circuit').focus()")
    for name in ("audit", "compare", "channels", "origin", "circuit"):
        tab.press("ArrowRight")
        assert tab.js("document.activeElement.id") == f"tab-{name}"
        assert tab.js(f"document.querySelector('#view-{name}').checkVisibility()")
    tab.js("document.querySelector('#stage .vertex.q').focus()")
    tab.press("Enter")
    tab.js("document.querySelector('#detail .knock').focus()")
    tab.press("Enter")
    assert "Without" in text_of(tab, "#out")
    tab.press("Enter")
    assert tab.js("document.querySelector('#out').hidden")
    tab.js("document.querySelector('#export summary').focus()")
    tab.press("Enter")
    assert tab.js("document.querySelector('#export').open")
    assert tab.complaints() == []


AXE = "axe_playwright_python"
"""A Python package that ships axe-core as one file, which `make venv` installs alone: nothing else of it is used."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(show, scheme):
    found = importlib.util.find_spec(AXE)
    if found is None:
        pytest.skip("axe-core is not here; `make venv` brings it (pip install --no-deps axe-playwright-python)")
    script = Path(found.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")
    tab = show(replace(small_page(), other=small_page()), scheme=scheme)
    tab.js(f"{script}; 0")
    for step in ("#tab-circuit", "#stage .vertex.q", "#detail .knock", "#tab-audit", "#tab-compare", "#tab-channels",
                 "#tab-origin"):  # fmt: skip
        tab.click(step)
        run = "axe.run(document).then((r) => r.violations.map((v) => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]))"
        violations = tab.js(run)
        assert [v for v in violations if v[0] in ("serious", "critical")] == [], step


@pytest.mark.parametrize(
    ("passed", "words"), [(True, "Audit passed"), (False, "Audit failed"), (None, "without a verdict")]
)
def test_the_audit_says_what_its_verdict_rests_on(show, passed, words):
    questions = [
        PageQuestion(about="sufficiency", passed=True),
        PageQuestion(about="necessity", passed=passed, why="a reason"),
    ]
    row = PageAuditRow(measure="loss", condition="circuit", value=1.25, low=0.75, high=1.5, n=64, split="test",
                       about="sufficiency", decides=True, passed=passed, note="bound: at most 2")  # fmt: skip
    other = replace(row, about="necessity", decides=False, value=None, passed=None, note="")
    audit = PageAudit(verdict="fails: one thing; another", passed=passed, headline="the gap", questions=questions,
                      rows=[row, other])  # fmt: skip
    tab = show(replace(small_page(), audit=audit))
    assert words in text_of(tab, "#verdict")
    tab.click("#tab-audit")
    said = text_of(tab, "#view-audit")
    assert "Sufficiency" in said and "a reason" in said and "The gap." in said
    marks = tab.js("[...document.querySelectorAll('.question .outcome')].map((mark) => mark.innerText.slice(2))")
    assert marks == ["kept", {True: "kept", False: "missed", None: "not run"}[passed]]
    card = " ".join(text_of(tab, ".question").split())
    assert "loss, circuit" in card and "1.25 95 % interval 0.75 to 1.5 · n = 64 · test" in card and "at most 2" in card
    tab.js("[...document.querySelectorAll('.filters button')].find((b) => b.innerText === 'Not run').click()")
    assert tab.js("document.querySelectorAll('.audit .outcome').length") == 1


@pytest.mark.parametrize(
    ("level", "outcome", "means"),
    [("quick", "Quick audit failed", "controls that need a search were not run"),
     ("full", "Full audit failed", "controls were searched for as the circuit was"),
     ("", "Audit failed", None)],
)  # fmt: skip
def test_the_level_of_the_audit_stands_beside_its_verdict(show, level, outcome, means):
    audit = replace(some_audit(), level=level)
    tab = show(replace(small_page(), audit=audit, other=replace(small_page(), audit=replace(audit, passed=True))))
    assert text_of(tab, "#verdict strong") == outcome
    tab.click("#tab-audit")
    head = text_of(tab, "#view-audit").split("\n\n")[:2]
    assert head[0] == "What this circuit is worth"
    assert means in head[1] if means else "audit" not in head[1].lower()
    tab.click("#tab-compare")
    sides = tab.js("[...document.querySelectorAll('.side .badge')].map((badge) => badge.innerText)")
    assert sides == [f"✕ {outcome.lower()}", f"✓ {outcome.lower().replace('failed', 'passed')}"]
    assert outcome.lower() in text_of(tab, "#view-compare .paper")
