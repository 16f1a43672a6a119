"""Views of tokens: what they are given is what the model did, and a browser without a network draws it."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_interp import tokens as tokens_module
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.model.sites import Node
from sparse_interp.tokens import TokenView, activation_view, attention_view, token_view, top_token_view

PIECES = [
    "<b>",
    "</script>",
    "&amp;",
    "<svg/onload=window.wasHacked=1>",
    "<!--",
    " ",
    "\n",
    "\u2060",
    "x y",
    "z",
]
"""What the ten tokens of `speaking` say."""

JOINER = "\u2060"


@pytest.fixture
def speaking(make_model) -> Any:
    """A model of ten tokens, whose texts are markup, or white space, or both."""
    model = make_model(d_vocab=len(PIECES))
    model.tokenizer = SimpleNamespace(decode=lambda ids, **_: PIECES[ids[0]])
    return model


@pytest.fixture
def ten() -> torch.Tensor:
    """Each token of `speaking` once."""
    return torch.arange(len(PIECES))


def properties(view: TokenView) -> dict[str, Any]:
    """What CircuitsVis is given."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', view.page, flags=re.DOTALL)
    assert found
    return json.loads(found[1])["props"]


@pytest.fixture
def draw(browser, tmp_path: Path):
    """Saves a view and opens it in a browser without a network, once it is drawn."""

    def open_view(view: TokenView) -> Any:
        tab = browser.tab(width=1100, height=900)
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        tab.call("Network.emulateNetworkConditions", **offline)
        tab.open(view.save(tmp_path / "view.html"))
        wait_for(tab, "document.querySelector('#view').childElementCount")
        return tab

    yield open_view
    browser.close_tabs()


def wait_for(tab: Any, condition: str) -> None:
    deadline = time.monotonic() + 20
    while not tab.js(condition):
        assert time.monotonic() < deadline, f"waited for {condition}; the page says {tab.js('document.body.innerText')}"
        time.sleep(0.02)
    tab.settle()


def complaints(tab: Any) -> list:
    """All but the graphics driver's, of which a machine without a graphics card has some."""
    return [e for e in tab.complaints() if e["params"].get("entry", {}).get("source") != "rendering"]


def chips(tab: Any) -> list[list[str]]:
    """Text and colour of every coloured token."""
    return tab.js(
        "[...document.querySelectorAll('.colored-tokens > span > span')]"
        ".map((chip) => [chip.textContent, chip.style.backgroundColor])"
    )


# -- what is shown is what the model did -------------------------------------------------------------------------------


def test_attention_rows_sum_to_one_with_the_sink_as_the_last_key(plain_model, tokens):
    props = properties(attention_view(plain_model, tokens[0], 1))
    assert props["tokens"][-1] == "<sink>" and len(props["tokens"]) == tokens.shape[1] + 1
    assert props["attentionHeadNames"] == ["L1H0", "L1H1", "L1H2"]
    _, cache = plain_model.run_with_cache(tokens[:1])
    for head, rows in enumerate(props["attention"]):
        assert len(rows) == len(props["tokens"]) and {len(row) for row in rows} == {len(rows)}
        for query, row in enumerate(rows[:-1]):
            seen = [value for value in row if value is not None]
            assert sum(seen) == pytest.approx(1, abs=1e-3)
            assert seen[:-1] == pytest.approx(cache["pattern", 1][0, head, query, : query + 1].tolist(), rel=1e-3)


def test_cells_that_no_attention_reaches_are_empty_and_not_zero(plain_model, tokens):
    (rows,) = properties(attention_view(plain_model, tokens[:1], -1, heads=[2]))["attention"]
    n = tokens.shape[1]
    empty = {(query, key) for query, row in enumerate(rows) for key, value in enumerate(row) if value is None}
    assert empty == {(q, k) for q in range(n) for k in range(q + 1, n)} | {(n, k) for k in range(n + 1)}


def test_a_model_without_a_sink_shows_none_and_one_that_looks_both_ways_hides_nothing(make_model, tokens):
    props = properties(attention_view(make_model(sink=False), tokens[0], 0))
    assert "<sink>" not in props["tokens"] and len(props["attention"][0]) == tokens.shape[1]
    rows = properties(attention_view(make_model(attention_dir="bidirectional"), tokens[0], 0))["attention"][0]
    assert all(value is not None for row in rows[:-1] for value in row)


def test_a_dense_transformer_lens_model_is_shown_too(tokens):
    model = dense_model()
    _, cache = model.run_with_cache(tokens[:1])
    (rows,) = properties(attention_view(model, tokens[0], 1, heads=[1]))["attention"]
    assert len(rows) == tokens.shape[1], "it has no sink"
    for query, row in enumerate(rows):
        assert row[: query + 1] == pytest.approx(cache["pattern", 1][0, 1, query, : query + 1].tolist(), abs=1e-4)
    props = properties(token_view(model, tokens[0], Node(0, "neuron", 3)))
    assert props["values"] == pytest.approx(cache["post", 0][0, :, 3].tolist(), abs=1e-4)


def dense_model() -> Any:
    """The smallest model that the installed TransformerLens builds without a network."""
    import transformer_lens as tl
    from transformer_lens.config import TransformerBridgeConfig

    shape = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_head": 4, "d_mlp": 20, "d_vocab": 50, "n_ctx": 16}
    return tl.TransformerBridge.boot_native(TransformerBridgeConfig(**shape, act_fn="gelu", seed=0)).eval()


def test_a_token_is_coloured_by_what_the_node_is_there(plain_model, tokens):
    node = Node(1, "neuron", 7)
    props = properties(token_view(plain_model, tokens[0], node))
    _, cache = plain_model.run_with_cache(tokens[:1])
    assert props["values"] == pytest.approx(cache["post", 1][0, :, 7].tolist(), rel=1e-3)
    assert props["maxValue"] == -props["minValue"] == pytest.approx(max(map(abs, props["values"])))


def test_top_tokens_are_those_of_a_sort(plain_model, tokens):
    _, cache = plain_model.run_with_cache(tokens)
    write, neuron = (int(cache[name].abs().amax((0, 1)).argmax()) for name in (("attn_out", 0), ("post", 1)))
    nodes = [Node(0, "attn_write", write), Node(1, "neuron", neuron)]
    props = properties(top_token_view(plain_model, tokens, nodes, k=4))
    for column, values in enumerate((cache["attn_out", 0][..., write], cache["post", 1][..., neuron])):
        for sample, chosen in enumerate((values.flatten(), *values)):
            ids = (tokens.flatten(), *tokens)[sample]
            highest = chosen.argsort(descending=True, stable=True)
            for name, order in (("topk", highest[:4]), ("bottomk", highest[-4:])):
                cells = [props["tokens"][sample][row[column]] for row in props[f"{name}Idxs"][sample][0]]
                assert cells == [f"#{ids[i]} {chosen[i]:+.3g}" if chosen[i] else "0" for i in order]
                shares = [row[column] for row in props[f"{name}Vals"][sample][0]]
                assert shares == pytest.approx([float(chosen[i].abs() / values.abs().max()) for i in order], abs=1e-3)


def test_texts_of_different_lengths_show_their_own_tokens_alone():
    import sparse_interp as si

    model = si.load("stdlib-small")
    props = properties(activation_view(model, ["x = 1", "def f(x):\n    return x"], [Node(0, "neuron", 0)]))
    scale, short, long = ["".join(row) for row in props["tokens"]]
    assert short.replace(JOINER, "") == "<|endoftext|>x␣=␣1" and len(scale) > 1
    assert long.replace(JOINER, "") == "<|endoftext|>def␣f(x):\\n\n␣␣␣␣return␣x"
    assert [len(row) for row in props["activations"]] == [len(row) for row in props["tokens"]]


def test_equal_views_are_equal_bytes(plain_model, tokens):
    first, second = (attention_view(plain_model, tokens[0], 0) for _ in range(2))
    assert first.page == second.page
    assert "0.5 MB" in repr(first) and len(first.page) < 600_000


# -- in a browser without a network ------------------------------------------------------------------------------------


def test_attention_is_drawn_one_canvas_per_head_and_one_for_the_chosen_head(draw, plain_model, tokens):
    tab = draw(attention_view(plain_model, tokens[0], 0))
    wait_for(tab, "document.querySelectorAll('canvas').length === 4")
    assert min(blue_share(tab, 0.0)) > 0.02
    assert min(blue_share(tab, 1 - 1 / (tokens.shape[1] + 1))[:3]) > 0.5, "the sink's column, in the three small ones"
    assert complaints(tab) == [] and tab.requests() == []


def blue_share(tab: Any, left: float) -> list[float]:
    """The share of bluish pixels in every canvas, from `left` of its width to its right edge."""
    return tab.js(f"""[...document.querySelectorAll('canvas')].map((canvas) => {{
      const x = Math.ceil(canvas.width * {left});
      const pixels = canvas.getContext('2d').getImageData(x, 0, canvas.width - x, canvas.height).data;
      let blue = 0;
      for (let i = 0; i < pixels.length; i += 4) blue += pixels[i + 2] > pixels[i] + 10 && pixels[i + 3] > 0;
      return blue / (pixels.length / 4);
    }})""")


def test_tokens_that_are_markup_are_shown_as_text(draw, speaking, ten):
    tab = draw(token_view(speaking, ten, torch.linspace(-1, 0.8, 10)))
    shown = [text.replace(JOINER, "").replace("\xa0", "") for text, _ in chips(tab)]
    assert shown == [*PIECES[:5], "␣", "\\n", "\\u2060", "x␣y", "z"]
    assert tab.js("document.querySelectorAll('#view svg, #view b').length") == 0
    assert tab.js("window.wasHacked === undefined")
    assert tab.js("document.querySelectorAll('.colored-tokens br').length") == 1
    assert complaints(tab) == [] and tab.requests() == []


def test_colours_are_white_at_zero_and_full_at_the_largest_value(draw, speaking, ten):
    values = torch.tensor([0.0, 2.0, -2.0, *[0.0] * 7])
    colours = [colour for _, colour in chips(draw(token_view(speaking, ten, values)))]
    assert colours[:3] == ["rgb(255, 255, 255)", "rgb(0, 0, 255)", "rgb(255, 0, 0)"]


def test_a_chosen_node_colours_the_prompts_and_a_silent_one_leaves_them_readable(draw, speaking, ten):
    with torch.no_grad():
        speaking.blocks[0].mlp.W_out[:, 0] = speaking.blocks[0].mlp.b_out[0] = 0  # a write that is never anything
    nodes = [Node(0, "mlp_write", 0), Node(0, "attn_read", 1)]
    view = activation_view(speaking, ten[None], nodes)
    tab = draw(view)
    wait_for(tab, "document.querySelectorAll('.colored-tokens').length === 2")
    scale, prompt = chips(tab)[:3], chips(tab)[3:]
    assert [colour for _, colour in scale] == ["rgb(255, 0, 0)", "rgb(255, 255, 255)", "rgb(0, 0, 255)"]
    assert {colour for _, colour in prompt} == {"rgb(255, 255, 255)"}
    choose(tab, "layer-selector", "1")
    wait_for(
        tab, "[...document.querySelectorAll('.colored-tokens')][1].innerHTML.split('rgb(255, 255, 255)').length < 11"
    )
    assert complaints(tab) == [] and tab.requests() == []


def choose(tab: Any, select: str, value: str) -> None:
    """What a user's choice in a `<select>` does."""
    tab.js(
        f"{{ const box = document.getElementById('{select}'); box.value = '{value}';"
        " box.dispatchEvent(new Event('change', { bubbles: true })); }"
    )
    tab.settle()


@pytest.mark.parametrize("n_nodes", [1, 3, 7])
def test_the_table_of_top_tokens_names_its_columns(draw, speaking, ten, n_nodes):
    nodes = [Node(1, "neuron", channel) for channel in range(n_nodes)]
    view = top_token_view(speaking, ten[None], nodes, k=3)
    tab = draw(view)
    wait_for(tab, "document.querySelectorAll('tbody td span').length > 0")
    heads = "[...document.querySelectorAll('thead tr:nth-child(2) th')].map((th) => th.textContent).filter(Boolean)"
    wait_for(tab, f"{heads}.length === {min(n_nodes, 5)}")
    assert tab.js(heads) == [str(node) for node in nodes[:5]]
    assert tab.js("document.getElementById('visible-cols-selector').value") == str(min(n_nodes, 5))
    first = tab.js("document.querySelector('tbody td span').textContent")
    assert first == properties(view)["tokens"][0][0].replace(" ", "\xa0")
    if n_nodes > 5:
        choose(tab, "neuron-selector", "5-6")
        wait_for(tab, f"{heads}.length === 2")
        assert tab.js(heads) == [str(node) for node in nodes[5:]]
    assert complaints(tab) == [] and tab.requests() == []


def test_a_view_draws_itself_in_the_cell_of_a_notebook(browser, plain_model, tokens, tmp_path):
    cell = attention_view(plain_model, tokens[0], 1)._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8>{cell}", encoding="utf-8")
    tab = browser.tab(width=1000, height=800)
    tab.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
    tab.open(tmp_path / "notebook.html")
    frame = browser.attach(
        next(e["params"]["sessionId"] for e in tab.events if e["method"] == "Target.attachedToTarget")
    )
    wait_for(frame, "document.querySelectorAll('canvas').length === 4")
    assert tab.js("document.querySelector('iframe').title") == "Attention in layer 1"
    assert tab.requests() == []
    browser.close_tabs()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda model, ids: attention_view(model, ids[0], 2), ConfigError, "layer=2, heads=[0, 1, 2]: the model has"),
        (lambda model, ids: attention_view(model, ids[0], 0, heads=[3]), ConfigError, "heads=[3]: the model has"),
        (lambda model, ids: token_view(model, ids[:1], torch.zeros(3)), ConfigError, "3 values for 7 tokens"),
        (lambda model, ids: token_view(model, ids[0], Node(0, "neuron", 20)), CircuitError, "channels 0 to 19, not 20"),
        (lambda model, ids: activation_view(model, ids, []), ConfigError, "at least one prompt and one node; got 3"),
        (lambda model, ids: activation_view(model, [], [Node(0, "q", 0)]), ConfigError, "got 0 and 1"),
        (lambda model, ids: top_token_view(model, ids, [Node(9, "q", 0)]), CircuitError, "layers 0 to 1, not in 9"),
        (lambda model, ids: top_token_view(model, ids, [Node(0, "q", 0)], k=0), ConfigError, "k=0"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(plain_model, tokens, ask, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ask(plain_model, tokens)


def test_without_circuitsvis_the_message_says_what_to_install(monkeypatch, plain_model, tokens):
    def missing(name: str) -> None:
        raise tokens_module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokens_module.metadata, "distribution", missing)
    tokens_module._circuitsvis.cache_clear()
    with pytest.raises(ConfigError, match="pip install 'sparse_interp.viz.'"):
        attention_view(plain_model, tokens[0], 0)
    tokens_module._circuitsvis.cache_clear()
