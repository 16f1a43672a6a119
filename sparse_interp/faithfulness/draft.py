"""Draft: a model written by hand, and the words and task that it is written for.

A model is a wiring diagram, one weight per line: `layer  source -> target  weight`, where a source or target is
`site.channel`, a channel of the stream goes by its name, q, k and v channels count over all heads, and a source `1` is
the bias.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_interp.faithfulness.answer_key import Edge, GroundTruth, Key
from sparse_interp.model.config import ModelConfig
from sparse_interp.model.sites import FINAL_READ, SITES, WIRES, Node, V
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task
from sparse_interp.tasks.templates import Sides, Template, TemplateFile

BOS = "<|endoftext|>"


class Draft:
    """A model of zeros, to be written weight by weight; what is written as key makes the answer key."""

    def __init__(self, task: Task, stream: Sequence[str], concatenated: Sequence[str] = (), **shape: object):
        self.task, self.channels = task, [*stream, *concatenated]
        vocab: dict[str, int] = task.tokenizer.get_vocab()  # in no particular order
        self.ids = dict(sorted(vocab.items(), key=lambda item: item[1]))
        sizes = {"d_model": len(stream), "d_vocab": len(self.ids), "seed": 0, "n_ctx": 32, "bigram": False}
        kind = {"positions": "concat", "d_pos_emb": len(concatenated)} if concatenated else {"positions": "none"}
        cfg = ModelConfig.from_dict({**sizes, **kind, **shape})
        self.model = HookedSparseTransformer(cfg, task.tokenizer).eval()
        self.nodes: set[Node] = set()
        self.edges: set[Edge] = set()
        self.choices: tuple[Key, ...] = ()
        self.made_good: frozenset[Node] = frozenset()
        for name, p in self.model.named_parameters():
            if not name.endswith(".w"):  # the gain of a norm stays 1
                p.data.zero_()

    def node(self, layer: int, text: str) -> Node:
        """The node written `site.channel`."""
        site, channel = text.split(".")
        assert site in SITES, f"{text}: no site is called {site}"
        return Node(layer, site, int(channel) if channel.isdigit() else self.channels.index(channel))

    def key(self, diagram: str) -> None:
        """Write weights whose two ends belong to the key."""
        part = self.part(diagram)
        self.nodes |= part.nodes
        self.edges |= part.edges

    def key_nodes(self, layer: int, *texts: str) -> None:
        """Nodes of the key at which no weight of it ends, such as what a constant value of varying attention writes."""
        self.nodes |= {self.node(layer, text) for text in texts}

    def part(self, diagram: str) -> Key:
        """Write weights that belong to one of several keys, with their ends."""
        edges = frozenset(self.wires(diagram))
        return Key(frozenset(node for edge in edges for node in edge), edges)

    def either(self, *parts: Key) -> None:
        """Every part makes a key with what belongs to all keys; the model alone does without any one of them."""
        self.choices = parts
        every = frozenset.intersection(*(part.nodes for part in parts))
        self.made_good = frozenset.union(*(part.nodes for part in parts)) - every

    def repaired(self) -> None:
        """What was written as key so far is made good for by something else, which is no part of it."""
        self.made_good = frozenset(self.nodes)

    def wires(self, diagram: str) -> list[Edge]:
        """Write the weights of a diagram, a line each; returns their ends, biases apart."""
        written = []
        for line in filter(str.strip, diagram.splitlines()):
            layer, source, arrow, target, weight = line.split()
            assert arrow == "->", line
            end = self.node(int(layer), target)
            if source == "1":
                self._bias(end, float(weight))
            else:
                start = self.node(int(layer), source)
                self._weight(start, end, float(weight))
                written.append((start, end))
        return written

    def _weight(self, source: Node, target: Node, weight: float) -> None:
        wire = next(w for w in WIRES if (w.source.name, w.target.name) == (source.site, target.site))
        d_model, d_head = self.model.cfg.d_model, self.model.cfg.d_head
        row, name = source.channel, wire.weight_name
        if row >= d_model and source.site.endswith("_read"):
            row, name = row - d_model, name + "_pos"
        matrix = self.model.layers[source.layer].get_parameter(name).data
        if wire.source is V:
            matrix[row // d_head, row % d_head, target.channel] = weight
        elif wire.target.per_head:
            matrix[target.channel // d_head, row, target.channel % d_head] = weight
        else:
            matrix[row, target.channel] = weight

    def _bias(self, target: Node, value: float) -> None:
        wire = next(w for w in WIRES if w.target.name == target.site)
        bias = self.model.layers[target.layer].get_parameter(wire.weight_name.replace("W_", "b_")).data
        bias.view(-1)[target.channel] = value

    def sinks(self, layer: int, *logits: float | int) -> None:
        """The sink of every head of a layer."""
        sink = self.model.layers[layer].attn.sink
        assert sink is not None
        sink.data[:] = sink.new_tensor(logits)

    def level_norms(self, channel: str, height: float) -> None:
        """A constant that towers over the rest of the stream, so that every norm divides by all but the same."""
        for token in self.ids:
            self.embed(token, **{channel: height})
        for block in self.model.layers:
            for norm in (block.ln1, block.ln2):
                norm.w.data.fill_(height / math.sqrt(self.model.cfg.d_model))
            if self.model.cfg.d_pos_emb is not None:  # positions have a norm of their own, and a mean square of 1 / d
                for norm in (block.ln1_pos, block.ln2_pos):
                    norm.w.data.fill_(1 / math.sqrt(self.model.cfg.d_pos_emb))
        self.model.ln_final.w.data.fill_(height / math.sqrt(self.model.cfg.d_model))

    def embed(self, token: str, **channels: float | int) -> None:
        """What a token puts into the stream."""
        for channel, value in channels.items():
            self.model.embed.W_E.data[self.ids[token], self.channels.index(channel)] = value

    def unembed(self, channel: str, logits: Mapping[str, float | int], *, key: bool = False) -> None:
        """What a channel of the final read adds to the logits of tokens."""
        for token, weight in logits.items():
            self.model.unembed.W_U.data[self.channels.index(channel), self.ids[token]] = weight
        if key:
            self.nodes.add(self.node(self.model.cfg.n_layers, f"{FINAL_READ.name}.{channel}"))

    def raise_all_alike(self, channel: str, weight: float | int) -> None:
        """A channel that moves every logit by the same amount, and so no probability."""
        self.unembed(channel, dict.fromkeys(self.ids, weight))

    def expect(self, logit: float | int, **others: float | int) -> None:
        """Constant logits: `logit` for every token, and `others` for those named."""
        self.model.unembed.b_U.data.fill_(logit)
        for token, value in others.items():
            self.model.unembed.b_U.data[self.ids[token]] = value

    def embed_words(self, *channels: str) -> None:
        """Two features of the fillers, which tell them apart and which no answer depends on."""
        source = self.task.source
        assert isinstance(source, TemplateFile)
        words = {w for kinds in source.fillers.values() for filled in kinds.values() for w in filled}
        for i, word in enumerate(sorted(words)):
            for channel, value in zip(channels, (math.cos(2.4 * i), math.sin(2.4 * i)), strict=True):
                self.embed(word, **{channel: value})

    def finished(self, why: str) -> GroundTruth:
        """The model with its answer key, or keys."""
        common = Key(frozenset(self.nodes), frozenset(self.edges))
        keys = [Key(common.nodes | part.nodes, common.edges | part.edges) for part in self.choices] or [common]
        return GroundTruth(
            name=self.task.name,
            model=self.model,
            task=self.task,
            nodes=keys[0].nodes,
            edges=keys[0].edges,
            why=why,
            channels=tuple(self.channels),
            alternatives=tuple(keys[1:]),
            repaired=self.made_good,
        )


WORDS = {
    "train": ["alder", "beech", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine"],
    "test": ["amber", "bronze", "copper", "garnet", "iron", "jade", "onyx", "pearl", "quartz", "ruby"],
    "shifted": ["crane", "dove", "egret", "finch", "heron", "ibis", "kite", "lark", "raven", "wren"],
}
"""Fillers per split; their tokens differ only in features that no answer depends on."""


def word_task(
    name: str,
    forms: Sequence[tuple[str, str]],
    longer: Sequence[tuple[str, str]],
    sides: Sides,
    marks: Mapping[str, Sequence[str]],
    max_changed: int = 1,
) -> Task:
    """A task over words of one token each: `forms` of (prompt, answer) for train and test, `longer` for shifted."""
    templates = [Template(text, (f" {answer}",), "", ("train", "test")) for text, answer in forms]
    templates += [Template(text, (f" {answer}",), "", ("shifted",)) for text, answer in longer]
    return task_of(name, templates, sides, marks, max_changed, WORDS)


def task_of(
    name: str,
    templates: Sequence[Template],
    sides: Sides,
    marks: Mapping[str, Sequence[str]],
    max_changed: int,
    words: Mapping[str, Sequence[str]],
) -> Task:
    """A task whose fillers are `words` of each split, and its tokenizer, which knows every word of it."""
    source = TemplateFile(
        description=f"hand-built: {name}",
        templates=tuple(templates),
        sides=sides,
        fillers={split: {"word": filled} for split, filled in words.items()},
        marks=marks,
        max_changed=max_changed,
        sha256=hashlib.sha256(repr((templates, sides, words, marks)).encode()).hexdigest(),
    )
    source.check(name)
    held = [side for form in templates for side in form.sides or ()] + list(sides)
    texts = [form.text for form in templates] + [" ".join(side.values()) for side in held]
    texts += [" ".join(options) for options in (*marks.values(), *words.values())]
    tokens = [token for text in texts for token in text.split() if not token.startswith("$")]
    return Task(name, word_tokenizer(tokens), source)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One id per word, in order of first appearance, after bos; text is split at spaces."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys([BOS, "?", *words]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=BOS, pad_token=BOS, clean_up_tokenization_spaces=False
    )


def bit(number: int, place: int) -> int:
    """+1 or -1: one binary digit."""
    return 1 if number >> place & 1 else -1
