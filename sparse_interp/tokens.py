"""Views of tokens, drawn by CircuitsVis without a network: attention, activations, and the tokens that drive a node.

    view  =  page( bundle, component, JSON( properties ) )

CircuitsVis (MIT, https://github.com/TransformerLensOrg/CircuitsVis) is a set of React components, which its Python
package brings along as one script. Its own `_repr_html_` asks a search engine whether there is a network, and if there
is hands out a page that loads the script from a CDN. Here the script is always inside the page, compressed, in a frame
that may load nothing.

What CircuitsVis 1.43 would draw wrongly is put right on the way to it:

    attention        has one more key than tokens, the sink: it stands last, so that positions keep their numbers, and
                     as a query, which it never is, its row is empty
    token texts      are pasted into the page as markup, where `<sink>` or `<b>` would vanish: they are written so that
                     no browser reads them as markup
    activations      are coloured from the smallest to the largest, on which zero has no colour if it is one of them: a
                     row that shows the scale makes it symmetric
    top tokens       are coloured from 0 to 1, in numbered columns: here the colour is the share of the node's largest
                     activation, the activation is beside its token, and columns have names
"""

import base64
import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from torch import Tensor

from sparse_interp.circuit.describe import activations, token_text
from sparse_interp.circuit.pictures import shown
from sparse_interp.errors import ConfigError
from sparse_interp.model.dense import AnyModel, DenseModel, HookedModel, hooked
from sparse_interp.model.sites import PATTERN_HOOK, Node, check_nodes
from sparse_interp.model.text import evaluating
from sparse_interp.results import write_whole
from sparse_interp.viewer.page import content_policy, embed_json, inline_html, shortened

Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"]
Prompts = Sequence[str] | Int[Tensor, "batch pos"]

SINK = "<sink>"
"""The label of the key that takes attention and gives nothing."""

_JOINER = "\u2060"
"""A character without width, with which neither a tag nor an entity begins."""


@dataclass(frozen=True, repr=False)
class TokenView:
    """A view that draws itself in a notebook, and that can be saved as a page."""

    title: str
    """What is shown."""

    page: str
    """The HTML document, with everything that it needs inside."""

    height: int
    """Pixels that it takes in a notebook; what is higher scrolls."""

    def save(self, path: Path | str) -> Path:
        """Write the page to `path`, whole or not at all; any browser opens it, with or without a network."""
        write_whole(Path(path), self.page)
        return Path(path)

    def __repr__(self) -> str:
        return f"TokenView: {self.title}; .save(path) writes its page of {len(self.page) / 1e6:.1f} MB"

    def _repr_html_(self) -> str:
        return inline_html(self.page, self.height, self.title)


# -- what can be viewed -----------------------------------------------------------------------------------------------


def attention_view(model: AnyModel, prompt: Prompt, layer: int, heads: Sequence[int] | None = None) -> TokenView:
    """Which token attends to which in one layer, head by head; the sink is the last key, `<sink>`.

    Args:
        model: the model to run; a dense TransformerLens model will do.
        prompt: a text, or its tokens [pos] or [1 pos].
        layer: the layer; negative counts from the end.
        heads: heads to show; None shows all.

    Raises:
        ConfigError: for a layer or head that the model does not have, or if circuitsvis is not installed.
    """
    model = hooked(model)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    heads = range(n_heads) if heads is None else heads
    if not -n_layers <= layer < n_layers or not heads or not all(0 <= head < n_heads for head in heads):
        raise ConfigError(
            f"layer={layer}, heads={list(heads)}: the model has layers 0 to {n_layers - 1}, heads 0 to {n_heads - 1}."
        )
    layer, tokens = layer % n_layers, _tokens(model, prompt)
    pattern = _pattern(model, tokens, layer)[list(heads)]
    unseen = (1 - pattern.sum(-1, keepdim=True)).clamp(min=0)  # what the sink takes
    sink = getattr(model.cfg, "sink", bool((unseen > 1e-3).any()))
    pattern, causal = torch.cat([pattern, unseen], -1), model.cfg.attention_dir == "causal"
    labels = [shown(token_text(model)(t)) for t in tokens[0].tolist()] + [SINK] * sink
    props = {
        "tokens": labels,
        "attention": [_square(head, sink=sink, causal=causal) for head in pattern.tolist()],
        "attentionHeadNames": [f"L{layer}H{head}" for head in heads],
        "maskUpperTri": False,
    }
    caption = "Queries are rows, keys are columns; the more colour, the more attention, and full colour is all of it."
    caption += " The sink is a key that writes nothing; it is no position, so its row is empty." * sink
    height = 220 + 110 * math.ceil(len(heads) / 12) + min(56 * len(labels), 1000)
    return _view("AttentionHeads", props, f"Attention in layer {layer}", caption, height)


def token_view(model: AnyModel, prompt: Prompt, values: Node | Float[Tensor, " value"]) -> TokenView:
    """The tokens of a prompt, each coloured by the activation of a node there, or by a number of your own.

    Args:
        model: the model to run, and whose tokenizer says what the tokens are; a dense TransformerLens model will do.
        prompt: a text, or its tokens [pos] or [1 pos].
        values: a node, or one number per token of the prompt, bos token included (its loss, say).

    Raises:
        CircuitError: for a node that the model does not have.
        ConfigError: if there are more or fewer numbers than tokens, or circuitsvis is not installed.
    """
    model = hooked(model)
    tokens = _tokens(model, prompt)
    if isinstance(values, Tensor):
        title, numbers = "Tokens and their values", values.detach().float().cpu()
    else:
        check_nodes([values], model.cfg)
        title, numbers = f"Activation of {values}", next(activations(model, [values], tokens))[0, :, 0]
    if len(numbers) != tokens.shape[1]:
        raise ConfigError(f"{len(numbers)} values for {tokens.shape[1]} tokens; a view needs one for each.")
    largest = _largest(numbers)
    props = {
        "tokens": _chips(model, tokens[0]),
        "values": numbers.tolist(),
        "minValue": -largest,
        "maxValue": largest,
    }
    caption = f"Blue is positive, red negative; full colour is {largest:.3g} in size. Hover for values."
    return _view("ColoredTokens", props, title, caption, 130 + _text_height([tokens[0]]))


def activation_view(model: AnyModel, prompts: Prompts, nodes: Sequence[Node]) -> TokenView:
    """Several prompts, coloured by the activation of whichever of `nodes` is chosen in the view.

    Args:
        model: the model to run; a dense TransformerLens model will do.
        prompts: texts, or tokens [batch pos].
        nodes: nodes to choose from, of any layers and sites.

    Raises:
        CircuitError: for a node that the model does not have.
        ConfigError: if there is no node or no prompt, or circuitsvis is not installed.
    """
    model = hooked(model)
    tokens, values = _measured(model, prompts, nodes)
    largest = _largest(torch.cat(values))
    scale = torch.tensor([-largest, 0, largest])[:, None].expand(-1, len(nodes))
    props = {
        "tokens": [[f"{value:.3g}" for value in scale[:, 0].tolist()], *(_chips(model, row) for row in tokens)],
        "activations": [shown_values.unsqueeze(-1).tolist() for shown_values in (scale, *values)],
        "firstDimensionName": "Node",
        "firstDimensionLabels": [str(node) for node in nodes],
        "secondDimensionName": "Value",
    }
    caption = "Sample 0 is the scale, for all nodes and prompts: blue is positive, red negative. Hover for values."
    return _view("TextNeuronActivations", props, "Activations on text", caption, 310 + _text_height(tokens[:4], box=45))


def top_token_view(model: AnyModel, prompts: Prompts, nodes: Sequence[Node], *, k: int = 10) -> TokenView:
    """The tokens at which each node is highest and lowest, over all prompts and in each of them.

    Args:
        model: the model to run; a dense TransformerLens model will do.
        prompts: texts, or tokens [batch pos].
        nodes: one column each.
        k: tokens listed at either end.

    Raises:
        CircuitError: for a node that the model does not have.
        ConfigError: if there is no node or no prompt, k < 1, or circuitsvis is not installed.
    """
    if k < 1:
        raise ConfigError(f"k={k}; a list of top tokens has at least one.")
    model = hooked(model)
    tokens, values = _measured(model, prompts, nodes)
    largest = torch.cat(values).abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    samples = [(torch.cat(tokens), torch.cat(values)), *zip(tokens, values, strict=True)]
    columns = [_ends(model, ids, numbers, largest, k) for ids, numbers in samples]
    props = {name: [column[name] for column in columns] for name in columns[0]} | {
        "firstDimensionLabels": ["all"],
        "thirdDimensionName": "Node",
        "sampleLabels": ["all prompts", *(f"prompt {i}" for i in range(len(tokens)))],
    }
    title = "Tokens at which nodes are highest and lowest"
    caption = "Highest above, lowest below, each with its activation; full colour is the node's largest in size."
    return _view("TopkTokens", props, title, caption, 300 + 52 * k, columns=[str(node) for node in nodes])


# -- what CircuitsVis is given ----------------------------------------------------------------------------------------


def _square(rows: list[list[float]], *, sink: bool, causal: bool) -> list[list[float | None]]:
    """`rows` of queries over keys and sink, as many as there are columns; a cell that cannot be attended is None."""
    n = len(rows)
    reached = [
        [value if key == n or not causal or key <= query else None for key, value in enumerate(row[: n + sink])]
        for query, row in enumerate(rows)
    ]
    return [*reached, *[[None] * (n + 1)] * sink]


def _ends(
    model: HookedModel,
    ids: Int[Tensor, " pos"],
    numbers: Float[Tensor, "pos node"],
    largest: Float[Tensor, " node"],
    k: int,
) -> dict[str, list]:
    """One sample of the table: the texts of its cells, and at either end [layer k node] shares and cell numbers."""
    order = numbers.argsort(dim=0, descending=True, stable=True)
    cells, sample = [], {}
    for name, at in (("topk", order[:k]), ("bottomk", order[-k:])):
        found = numbers.gather(0, at)
        sample[f"{name}Vals"] = [(found.abs() / largest).tolist()]
        sample[f"{name}Idxs"] = [(len(cells) + torch.arange(at.numel()).view_as(at)).tolist()]
        for token, value in zip(ids[at].flatten().tolist(), found.flatten().tolist(), strict=True):
            cells.append(_harmless(f"{shown(token_text(model)(token))} {value:+.3g}") if value else "0")
    return {"tokens": cells} | sample


def _tokens(model: HookedModel, prompt: Prompt) -> Int[Tensor, "1 pos"]:
    if isinstance(model, DenseModel):
        tokens = model.tl.to_tokens(prompt) if isinstance(prompt, str) else torch.atleast_2d(prompt)
    else:
        tokens, _ = model.input_to_tokens(prompt)
    if len(tokens) != 1:
        raise ConfigError(f"one prompt is a text, or tokens [pos] or [1 pos]; got tokens {list(tokens.shape)}.")
    return tokens


def _pattern(model: HookedModel, tokens: Int[Tensor, "1 pos"], layer: int) -> Float[Tensor, "head query key"]:
    seen: list[Tensor] = []
    note = (PATTERN_HOOK.format(layer=layer), lambda pattern, hook: seen.append(pattern))
    with torch.no_grad(), evaluating(model), model.hooks(fwd_hooks=[note]):
        model(tokens, return_type=None)
    return seen[0][0].float().cpu()


def _measured(
    model: HookedModel, prompts: Prompts, nodes: Sequence[Node]
) -> tuple[list[Int[Tensor, " pos"]], list[Float[Tensor, "pos node"]]]:
    """The tokens of each prompt, and what `nodes` are there. Prompts differ in length, so each is a run of its own."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not nodes or len(prompts) == 0:
        raise ConfigError(f"a view needs at least one prompt and one node; got {len(prompts)} and {len(nodes)}.")
    check_nodes(nodes, model.cfg)
    rows = [_tokens(model, prompt) for prompt in prompts]
    return [row[0].cpu() for row in rows], [next(activations(model, nodes, row))[0] for row in rows]


def _chips(model: HookedModel, tokens: Int[Tensor, " pos"]) -> list[str]:
    """Texts of tokens with nothing invisible in them; a line that ends is broken too, so code keeps its shape."""
    pieces = [token_text(model)(token) for token in tokens.tolist()]
    return [_harmless(shown(piece)) + "\n" * ("\n" in piece) for piece in pieces]


def _harmless(text: str) -> str:
    """`text` so that as markup it is still that text, and looks the same."""
    return text.replace("<", "<" + _JOINER).replace("&", "&" + _JOINER)


def _largest(numbers: Tensor) -> float:
    return float(numbers.abs().max()) or 1.0


def _text_height(rows: Sequence[Tensor], box: int = 0) -> int:
    """Pixels that coloured tokens take, at about twelve to a line."""
    return sum(box + 25 * math.ceil(len(row) / 12) for row in rows)


# -- the page ---------------------------------------------------------------------------------------------------------


def _view(
    component: str, props: Mapping[str, Any], title: str, caption: str, height: int, columns: list[str] | None = None
) -> TokenView:
    import jinja2  # only those who draw a page pay for it

    bundle = _circuitsvis()
    script, style, template = (_resource(f"tokens.{ending}") for ending in ("js", "css", "html.j2"))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    html = page.render(
        title=title,
        caption=caption,
        policy=content_policy(scripts=(bundle.script, script), styles=(style,)),
        style=Markup(style),
        script=Markup(script),
        bundle=bundle,
        data=Markup(embed_json(shortened({"component": component, "props": props, "columns": columns}))),
    )
    return TokenView(title, html, height)


@dataclass(frozen=True)
class _Bundle:
    """CircuitsVis as a page carries it."""

    script: str
    packed: str
    version: str
    licence: str


@cache
def _circuitsvis() -> _Bundle:
    """What the installed package brings along."""
    try:
        package = metadata.distribution("circuitsvis")
        script = Path(str(package.locate_file("circuitsvis/dist/cdn/iife.js"))).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise ConfigError("views of tokens need circuitsvis 1.43: pip install 'sparse_interp[viz]'.") from error
    script = script.split("\n//# sourceMappingURL=")[0]
    packed = base64.b64encode(gzip.compress(script.encode("utf-8"), 9, mtime=0)).decode("ascii")
    licence = next(file.read_text() for file in package.files or () if file.name.startswith("LICENSE"))
    return _Bundle(script, packed, package.version, licence)


def _resource(name: str) -> str:
    return files("sparse_interp.viewer").joinpath(name).read_text(encoding="utf-8")
