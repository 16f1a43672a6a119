"""Models whose weights were written by hand, with the circuit that anybody who looks for it has to find.

    key  =  the nodes that vary over the task's prompts and that the answer depends on
    every node outside the key held at its mean, all together   ->  the model's own distribution at the answer
    any one node of the key held at its mean                    ->  another distribution

A key is a claim that needs no trust: `effects` measures both sentences by holding nodes at their means one by one and
all together, and the tests do so for every model here. Each model also has what makes a search hard: neurons and heads
that are active on every prompt and write to the stream (one follows the answer itself, one raises all logits alike,
which no softmax can see), dead neurons that point at the answer, and constant nodes that the answer passes through,
which no mean ablation can notice and which are in no key.

A model is a wiring diagram, one weight per line: `layer  source -> target  weight`, where a source or target is
`site.channel`, a channel of the stream goes by its name, q, k and v channels count over all heads, and a source `1` is
the bias. Compiled models with known algorithms: Lindner et al. 2023 (arXiv:2301.05062); ours are smaller and keep
distractors, after Gao et al. 2025 (arXiv:2511.13653), whose quote circuit `quote` follows.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparse_interp.axes import Tokens
from sparse_interp.errors import TaskError
from sparse_interp.interventions.ablation import ablate, evaluating, mean_activations
from sparse_interp.model.config import AnyShape, ModelConfig
from sparse_interp.model.sites import FINAL_READ, SITES, WIRES, Node, NodeValues, V, places, width
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task, TaskBatch, kl_divergence
from sparse_interp.tasks.templates import Template, TemplateFile

BOS = "<|endoftext|>"

Edge = tuple[Node, Node]
"""A non-zero weight within a block, by its source and its target."""


@dataclass(frozen=True)
class GroundTruth:
    """A model, a task that it does, and the circuit by which it does it."""

    name: str
    """What `ground_truth` calls it."""

    model: HookedSparseTransformer
    """Weights written by hand; in eval mode."""

    task: Task
    """Prompts that the model answers, with splits train, test and shifted."""

    nodes: frozenset[Node]
    """The key: nodes that vary over the prompts and that the answer depends on."""

    edges: frozenset[Edge]
    """All non-zero weights between two nodes of the key."""

    why: str
    """How the model arrives at its answer, in words."""

    channels: tuple[str, ...]
    """What the channels of the stream carry, and behind them those of concatenated positions."""

    def blocks(self, n: int = 128, *, generator: torch.Generator) -> Tokens:
        """Both prompts of `n` training pairs: the text over which means of this model are taken."""
        batch = self.task.batch(n, split="train", generator=generator)
        return torch.cat([batch.clean, batch.corrupt])


# -- what a search found, against the key ---------------------------------------------------------------------------


class Recovery(NamedTuple):
    """How much of a key was found, and how much else."""

    precision: float
    """Share of what was found that is in the key."""

    recall: float
    """Share of the key that was found."""

    f1: float
    """Harmonic mean of the two."""

    exact: bool
    """Whether the two sets are equal."""


def recovery(found: Collection[Hashable], key: Collection[Hashable]) -> Recovery:
    """Compare nodes with `GroundTruth.nodes`, or edges with `GroundTruth.edges`; of two empty sets all is 1."""
    found, key = set(found), set(key)
    hits = len(found & key)
    precision = hits / len(found) if found else float(not key)
    recall = hits / len(key) if key else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return Recovery(precision, recall, f1, found == key)


class Effects(NamedTuple):
    """KL(model || model with nodes held at their means) at the answer position, mean over prompts, nats."""

    alone: dict[Node, float]
    """Each node of the model held on its own."""

    outside: float
    """Every node outside the key held at once, and the key free."""


def effects(truth: GroundTruth, batch: TaskBatch, means: NodeValues) -> Effects:
    """Measure what a key claims, on the prompts `batch`, by holding nodes at `means`: no gradients, no search."""
    reference = logits_of(truth.model, batch)

    def kl(nodes: Collection[Node]) -> float:
        with ablate(truth.model, nodes, means):
            return kl_divergence(reference, logits_of(truth.model, batch), batch).mean().item()

    return Effects({node: kl([node]) for node in all_nodes(truth.model.cfg)}, kl(outside(truth)))


def spread(truth: GroundTruth, n: int = 128, *, generator: torch.Generator) -> NodeValues:
    """Standard deviation of every node over positions and prompts; 0 where a node is constant or dead."""
    blocks = truth.blocks(n, generator=generator)
    means = mean_activations(truth.model, blocks)
    found = {}
    with torch.no_grad(), evaluating(truth.model):
        _, cache = truth.model.run_with_cache(blocks, return_type=None)
    for place in places(truth.model.cfg):
        values = cache[place.hook].flatten(2)
        found[place] = (values - means[place]).pow(2).mean((0, 1)).sqrt()
    return NodeValues(found, f"standard deviation over {blocks.numel()} tokens")


def all_nodes(cfg: AnyShape) -> list[Node]:
    """Every node of a model, in the order of its forward pass."""
    return [Node(place.layer, place.site, c) for place in places(cfg) for c in range(width(cfg, place.site))]


def outside(truth: GroundTruth) -> list[Node]:
    """Every node that is not in the key."""
    return [node for node in all_nodes(truth.model.cfg) if node not in truth.nodes]


@torch.no_grad()
def logits_of(model: HookedSparseTransformer, batch: TaskBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position of the clean prompts; padding is masked, so that attention both ways is safe."""
    with evaluating(model):
        return model(batch.clean, attention_mask=batch.attention_mask)


# -- writing a model by hand ----------------------------------------------------------------------------------------


class Draft:
    """A model of zeros, to be written weight by weight; what is written as key makes the answer key."""

    def __init__(self, task: Task, stream: Sequence[str], positions: Sequence[str] = (), **shape: object):
        self.task, self.channels = task, [*stream, *positions]
        vocab: dict[str, int] = task.tokenizer.get_vocab()  # in no particular order
        self.ids = dict(sorted(vocab.items(), key=lambda item: item[1]))
        sizes = {"d_model": len(stream), "d_vocab": len(self.ids), "seed": 0, "n_ctx": 32, "bigram": False}
        kind = {"positions": "concat", "d_pos_emb": len(positions)} if positions else {"positions": "none"}
        cfg = ModelConfig.from_dict({**sizes, **kind, **shape})
        self.model = HookedSparseTransformer(cfg, task.tokenizer).eval()
        self.nodes: set[Node] = set()
        self.edges: set[Edge] = set()
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
        for source, target in self.wires(diagram):
            self.nodes |= {source, target}
            self.edges.add((source, target))

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

    def words(self) -> list[str]:
        """The fillers of all splits, each a token."""
        source = self.task.source
        assert isinstance(source, TemplateFile)
        return sorted({w for kinds in source.fillers.values() for filled in kinds.values() for w in filled})

    def finished(self, why: str) -> GroundTruth:
        """The model with its answer key."""
        nodes, edges = frozenset(self.nodes), frozenset(self.edges)
        return GroundTruth(self.task.name, self.model, self.task, nodes, edges, why, tuple(self.channels))


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
    sides: tuple[Mapping[str, str], Mapping[str, str]],
    marks: Mapping[str, Sequence[str]],
) -> Task:
    """A task over words of one token each: `forms` of (prompt, answer) for train and test, `longer` for shifted."""
    templates = [Template(text, (f" {answer}",), "", ("train", "test")) for text, answer in forms]
    templates += [Template(text, (f" {answer}",), "", ("shifted",)) for text, answer in longer]
    source = TemplateFile(
        description=f"hand-built: {name}",
        templates=tuple(templates),
        sides=sides,
        fillers={split: {"word": words} for split, words in WORDS.items()},
        marks=marks,
        max_changed=1,
        sha256=hashlib.sha256(repr((templates, sides, WORDS, marks)).encode()).hexdigest(),
    )
    source.check(name)
    texts = [form.text for form in templates] + [" ".join(side.values()) for side in sides]
    texts += [" ".join(options) for options in (*marks.values(), *WORDS.values())]
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


# -- the models -----------------------------------------------------------------------------------------------------


def quote() -> GroundTruth:
    """Two layers, no norm: a string is closed with the quote that opened it."""
    forms = [
        ("print ( $q $word $word1 $word2", "$q"),
        ("open ( $word = $q $word1 $word2", "$q"),
        ("$word = [ $q $word1 $word2", "$q"),
        ("$word , $word1 = $q $word2", "$q"),
    ]
    longer = [
        ("print ( $word , $word1 = [ $q $word2 $word3 $word4 $word5", "$q"),
        ("$word = open ( $q $word1 $word2 $word3 $word4", "$q"),
    ]
    task = word_task("quote", forms, longer, ({"q": '"'}, {"q": "'"}), {})
    stream = "one single double word_a word_b bracket is_quote type close topic echo decoy every hum idle spare"
    draft = Draft(task, stream.split(), n_layers=2, n_heads=2, d_head=2, d_mlp=10, norm="none", act_fn="relu")
    for token in draft.ids:
        draft.embed(token, one=1)
    draft.embed("'", single=1)
    draft.embed('"', double=1)
    for token, value in {"(": 1.0, "[": -1.0, "=": 0.5}.items():
        draft.embed(token, bracket=value)
    for i, word in enumerate(draft.words()):
        draft.embed(word, word_a=math.cos(2.4 * i), word_b=math.sin(2.4 * i))
    draft.key(
        """
        0  mlp_read.single    -> neuron.0             1
        0  mlp_read.double    -> neuron.0             1
        0  mlp_read.double    -> neuron.1             1
        0  mlp_read.single    -> neuron.2             1
        0  neuron.0           -> mlp_write.is_quote   1
        0  neuron.1           -> mlp_write.type       1
        0  neuron.2           -> mlp_write.type      -1
        1  attn_read.is_quote -> k.0                  6
        1  attn_read.type     -> v.0                  1
        1  v.0                -> attn_write.close     1
        """
    )
    draft.unembed("close", {'"': 4, "'": -4}, key=True)
    draft.wires(QUOTE_BESIDE)
    draft.raise_all_alike("every", 1.5)
    draft.expect(-3, **{'"': 0, "'": 0})
    return draft.finished(
        "Layer 0 turns the two quote tokens into a mark (a quote stands here) and a type (+1 double, -1 single). In "
        "layer 1 every position attends to marked positions (its query is a constant) and reads the type there into "
        "`close`, which raises one quote and lowers the other."
    )


QUOTE_BESIDE = """
    0  1                  -> neuron.3             1
    0  neuron.3           -> mlp_write.hum        1
    1  attn_read.hum      -> q.0                  2

    0  1                  -> neuron.4            -9
    0  mlp_read.word_a    -> neuron.4             2
    0  neuron.4           -> mlp_write.type       3
    1  1                  -> neuron.2            -9
    1  mlp_read.echo      -> neuron.2             2
    1  neuron.2           -> mlp_write.close      3

    0  mlp_read.double    -> neuron.5             2
    0  neuron.5           -> mlp_write.decoy      1
    0  attn_read.one      -> q.0                  2
    0  attn_read.word_a   -> k.0                  3
    0  attn_read.word_b   -> v.0                  2
    0  v.0                -> attn_write.echo      1
    0  attn_read.word_b   -> q.2                  2
    0  attn_read.bracket  -> k.2                  3
    0  attn_read.word_a   -> v.2                  1
    0  attn_read.bracket  -> v.2                  1
    0  v.2                -> attn_write.topic     1
    0  mlp_read.word_a    -> neuron.6             2
    0  mlp_read.word_b    -> neuron.6             1
    0  neuron.6           -> mlp_write.topic      1
    0  mlp_read.echo      -> neuron.7             1
    0  neuron.7           -> mlp_write.every      1
    1  attn_read.topic    -> q.2                  2
    1  attn_read.echo     -> k.2                  2
    1  attn_read.decoy    -> v.2                  1
    1  v.2                -> attn_write.every     1
    1  mlp_read.close     -> neuron.0             1
    1  neuron.0           -> mlp_write.every      1
    1  mlp_read.topic     -> neuron.1             1
    1  neuron.1           -> mlp_write.decoy      1
"""
"""What else goes on in `quote`: a constant neuron that makes the query, two dead neurons that point at the answer, and
heads and neurons that carry words, brackets and even the quote to channels that no probability depends on."""


def mlp_gate() -> GroundTruth:
    """One layer with AbsTopK at one half: `yes` only after both `on` and `up`, by one neuron."""
    forms = [
        ("set $s $word go up $word1 $word2 :", "$a"),
        ("go up $word $word1 set $s $word2 :", "$a"),
        ("set on $word go $d $word1 $word2 :", "$a"),
        ("$word go $d set on $word1 $word2 :", "$a"),
    ]
    longer = [
        ("$word $word1 set on $word2 $word3 go $d $word4 $word5 :", "$a"),
        ("go up $word $word1 $word2 set $s $word3 $word4 :", "$a"),
    ]
    sides = ({"s": "on", "d": "up", "a": "yes"}, {"s": "off", "d": "down", "a": "no"})
    task = word_task("mlp_gate", forms, longer, sides, {})
    noise = [f"noise{i}" for i in range(8)]
    stream = ["is_switch", "switch", "is_way", "way", "at_switch", "at_way", "both", "idle", *noise]
    shape = {"n_layers": 1, "n_heads": 3, "d_head": 2, "d_mlp": 8}
    draft = Draft(task, stream, **shape, norm="none", act_fn="gelu", afrac=0.5)
    draws = torch.rand(len(draft.ids), len(noise), generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    for token, row in zip(draft.ids, draws.tolist(), strict=True):
        draft.embed(token, **dict(zip(noise, row, strict=True)))
    for token, value in {"on": 1, "off": -1}.items():
        draft.embed(token, is_switch=1, switch=value)
    for token, value in {"up": 1, "down": -1}.items():
        draft.embed(token, is_way=1, way=value)
    draft.key(
        """
        0  attn_read.is_switch -> k.0                   3
        0  attn_read.is_way    -> k.2                   3
        0  attn_read.switch    -> v.0                   2
        0  attn_read.way       -> v.2                   2
        0  v.0                 -> attn_write.at_switch  1
        0  v.2                 -> attn_write.at_way     1
        0  mlp_read.at_switch  -> neuron.0              2
        0  mlp_read.at_way     -> neuron.0              2
        0  neuron.0            -> mlp_write.both        1
        """
    )
    draft.unembed("both", {"yes": 2, "no": -2}, key=True)
    draft.wires("0 1 -> q.0 4 \n 0 1 -> q.2 4 \n 0 1 -> neuron.0 -4")
    draft.wires(MLP_GATE_BESIDE)
    draft.raise_all_alike("noise0", 1)
    draft.expect(-2, yes=-4, no=4)
    return draft.finished(
        "Two heads with constant queries fetch the state of the switch and the way (+2 or -2) from wherever they stand "
        "in the prompt. One neuron adds them up and fires only if both are positive; `yes` needs it."
    )


MLP_GATE_BESIDE = """
    0  attn_read.noise0    -> q.4                 2
    0  attn_read.noise1    -> q.5                 2
    0  attn_read.noise4    -> k.1                 1.5
    0  attn_read.noise5    -> k.3                 1.5
    0  attn_read.noise2    -> k.4                 2
    0  attn_read.noise3    -> k.5                 2
    0  attn_read.noise0    -> v.1                 1
    0  attn_read.noise6    -> v.4                 1
    0  attn_read.noise7    -> v.5                 1
    0  v.1                 -> attn_write.noise1   1
    0  v.4                 -> attn_write.noise2   1
    0  v.4                 -> attn_write.noise4  -0.7
    0  v.4                 -> attn_write.noise5   0.5
    0  v.5                 -> attn_write.noise3   1
    0  v.5                 -> attn_write.noise6  -0.8
    0  v.5                 -> attn_write.noise7   0.6
    0  mlp_read.noise1     -> neuron.1            1.2
    0  mlp_read.noise2     -> neuron.2            1.2
    0  mlp_read.noise3     -> neuron.3            1.2
    0  mlp_read.noise4     -> neuron.4            1.2
    0  mlp_read.noise5     -> neuron.5            1.2
    0  mlp_read.at_way     -> neuron.6            0.8
    0  1                   -> neuron.7           -9
    0  mlp_read.noise7     -> neuron.7            1
    0  neuron.1            -> mlp_write.noise0    1
    0  neuron.2            -> mlp_write.noise1    1
    0  neuron.2            -> mlp_write.noise2   -1
    0  neuron.3            -> mlp_write.noise3    1
    0  neuron.4            -> mlp_write.noise4    1
    0  neuron.4            -> mlp_write.noise0    0.5
    0  neuron.5            -> mlp_write.noise5    1
    0  neuron.5            -> mlp_write.noise6   -1
    0  neuron.6            -> mlp_write.noise7    1
    0  neuron.7            -> mlp_write.both      5
"""
"""What else goes on in `mlp_gate`: every token has eight noisy features, which compete for the places that AbsTopK
leaves at every site and always lose to the key; a neuron that follows one half of the answer; a dead one."""


def attention_copy() -> GroundTruth:
    """One layer, RMSNorm, attention both ways and no sink: the name in a sentence is said again."""
    forms = [
        ("$who went to $place with $word and $word1 :", "$who"),
        ("to $place with $word went $who and $word1 :", "$who"),
        ("$word and $word1 with $who went to $place :", "$who"),
    ]
    longer = [
        ("$word and $word1 with $word2 and $word3 went to $place with $who :", "$who"),
        ("to $place with $word and $who and $word1 went $word2 and $word3 :", "$who"),
    ]
    names, towns = ["ada", "bob", "cleo", "dan"], ["lima", "oslo", "rome", "york"]
    sides = ({"who": "$name"}, {"who": "$name1"})
    task = word_task("attention_copy", forms, longer, sides, {"name": names, "place": towns})
    stream = "anchor is_name bit_a bit_b copy_a copy_b is_place place_a here_a word_a word_b every mood idle spare"
    shape = {"n_layers": 1, "n_heads": 2, "d_head": 2, "d_mlp": 8, "act_fn": "relu"}
    draft = Draft(task, stream.split(), **shape, norm="rms", attention_dir="bidirectional", sink=False)
    for token in draft.ids:  # one channel towers over the rest, so that the norm is all but a constant
        draft.embed(token, anchor=ANCHOR)
    for norm in (draft.model.layers[0].ln1, draft.model.layers[0].ln2, draft.model.ln_final):
        norm.w.data.fill_(ANCHOR / math.sqrt(draft.model.cfg.d_model))
    for i, name in enumerate(names):
        draft.embed(name, is_name=1, bit_a=bit(i, 0), bit_b=bit(i, 1))
    for i, town in enumerate(towns):
        draft.embed(town, is_place=1, place_a=bit(i, 0))
    for i, word in enumerate(draft.words()):
        draft.embed(word, word_a=math.cos(2.4 * i), word_b=math.sin(2.4 * i))
    draft.key(
        """
        0  attn_read.is_name -> k.0                6
        0  attn_read.bit_a   -> v.0                1
        0  attn_read.bit_b   -> v.1                1
        0  v.0               -> attn_write.copy_a  1
        0  v.1               -> attn_write.copy_b  1
        """
    )
    for channel, place in (("copy_a", 0), ("copy_b", 1)):
        draft.unembed(channel, {name: 4 * bit(i, place) for i, name in enumerate(names)}, key=True)
    draft.wires(ATTENTION_COPY_BESIDE)
    draft.raise_all_alike("every", 1)
    return draft.finished(
        "Every position attends to the name (its query is a constant) and copies the two bits that tell four names "
        "apart; each name's logit is its agreement with both bits."
    )


ANCHOR = 256.0
"""The constant channel of `attention_copy`: what the others add to the norm is below one part in a thousand."""

ATTENTION_COPY_BESIDE = """
    0  1                  -> q.0                 2
    0  1                  -> q.2                 2
    0  attn_read.word_a   -> q.3                 1
    0  attn_read.is_place -> k.2                 3
    0  attn_read.word_b   -> k.3                 1
    0  attn_read.place_a  -> v.2                 1
    0  attn_read.bit_a    -> v.3                 1
    0  attn_read.place_a  -> v.3                -0.7
    0  attn_read.word_a   -> v.3                 1
    0  v.2                -> attn_write.here_a   1
    0  v.3                -> attn_write.mood     1
    0  mlp_read.here_a    -> neuron.0            1
    0  mlp_read.copy_b    -> neuron.1            1
    0  mlp_read.word_a    -> neuron.2            1
    0  mlp_read.mood      -> neuron.3            1
    0  1                  -> neuron.4           -9
    0  mlp_read.bit_a     -> neuron.4            1
    0  1                  -> neuron.5            1
    0  neuron.0           -> mlp_write.every     1
    0  neuron.1           -> mlp_write.every    -1
    0  neuron.2           -> mlp_write.mood      1
    0  neuron.3           -> mlp_write.every     1
    0  neuron.4           -> mlp_write.copy_a    4
    0  neuron.5           -> mlp_write.idle      1
"""
"""What else goes on in `attention_copy`: a head that copies the place as this one copies the name, neurons that follow
place, words and even a bit of the answer into a channel that raises all logits alike, a dead one, a constant one."""


def bit(number: int, place: int) -> int:
    """+1 or -1: one binary digit."""
    return 1 if number >> place & 1 else -1


def induction() -> GroundTruth:
    """Two layers that need each other: after a key that was seen before comes what came after it then."""
    forms = [
        ("$word $key $val $word1 $word2 $key1 $val1 $word3 $ask", "$says"),
        ("$key $val $word $key1 $val1 $word1 $word2 $word3 $ask", "$says"),
        ("$word $word1 $word2 $key1 $val1 $key $val $word3 $ask", "$says"),
    ]
    longer = [
        ("$word $word1 $key $val $word2 $word3 $word4 $key1 $val1 $word5 $ask", "$says"),
        ("$word $key1 $val1 $word1 $word2 $key $val $word3 $word4 $word5 $word6 $ask", "$says"),
    ]
    keys, values = ["red", "blue", "green", "pink"], ["one", "two", "three", "four"]
    sides = ({"ask": "$key", "says": "$val"}, {"ask": "$key1", "says": "$val1"})
    task = word_task("induction", forms, longer, sides, {"key": keys, "val": values})
    stream = "key_a key_b val_a val_b prev_a prev_b copy_a copy_b word_a word_b topic every echo hum idle spare"
    shape = {"n_layers": 2, "n_heads": 2, "d_head": 2, "d_mlp": 8, "act_fn": "relu", "norm": "none"}
    draft = Draft(task, stream.split(), positions=("pos", "pos_squared"), **shape)
    steps = torch.arange(draft.model.cfg.n_ctx)
    assert draft.model.pos_embed is not None
    draft.model.pos_embed.W_pos.data[:] = torch.stack([steps / 8, steps**2 / 64], 1)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        draft.embed(key, key_a=bit(i, 0), key_b=bit(i, 1))
        draft.embed(value, val_a=bit(i, 0), val_b=bit(i, 1))
    for i, word in enumerate(draft.words()):
        draft.embed(word, word_a=math.cos(2.4 * i), word_b=math.sin(2.4 * i))
    draft.key(INDUCTION)
    for channel, place in (("copy_a", 0), ("copy_b", 1)):
        draft.unembed(channel, {value: 4 * bit(i, place) for i, value in enumerate(values)}, key=True)
    draft.wires(INDUCTION_BESIDE)
    draft.raise_all_alike("every", 1)
    return draft.finished(
        "A head of layer 0 attends one position back (its score 10 (2 (p - 1) j - j^2) is largest at j = p - 1) and "
        "notes which key stood there. A head of layer 1 looks for the position whose note is the present key, and "
        "copies the two bits of the value that stands there."
    )


INDUCTION = """
    0  attn_read.pos         -> q.0                160
    0  attn_read.pos         -> k.0                11.3
    0  attn_read.pos_squared -> k.1                90.5
    0  attn_read.key_a       -> v.0                1
    0  attn_read.key_b       -> v.1                1
    0  v.0                   -> attn_write.prev_a  1
    0  v.1                   -> attn_write.prev_b  1
    1  attn_read.key_a       -> q.0                3
    1  attn_read.key_b       -> q.1                3
    1  attn_read.prev_a      -> k.0                3
    1  attn_read.prev_b      -> k.1                3
    1  attn_read.val_a       -> v.0                1
    1  attn_read.val_b       -> v.1                1
    1  v.0                   -> attn_write.copy_a  1
    1  v.1                   -> attn_write.copy_b  1
"""
"""With `pos` p / 8 and `pos_squared` p^2 / 64, and the biases below: q = 20 (p - 1), -10; k = sqrt(2) (j, j^2)."""

INDUCTION_BESIDE = """
    0  1                     -> q.0               -20
    0  1                     -> q.1               -10
    0  1                     -> q.2                2
    0  attn_read.word_a      -> k.2                3
    0  attn_read.word_b      -> v.2                1
    0  attn_read.key_a       -> v.2                1
    0  v.2                   -> attn_write.topic   1
    0  mlp_read.word_a       -> neuron.0           1
    0  mlp_read.topic        -> neuron.1           1
    0  mlp_read.val_a        -> neuron.2           1
    0  1                     -> neuron.3          -9
    0  mlp_read.word_b       -> neuron.3           1
    0  mlp_read.pos          -> neuron.4           1
    0  neuron.0              -> mlp_write.echo     1
    0  neuron.1              -> mlp_write.every    1
    0  neuron.2              -> mlp_write.echo     1
    0  neuron.3              -> mlp_write.prev_a   4
    0  neuron.4              -> mlp_write.every    1
    1  attn_read.topic       -> q.2                2
    1  attn_read.echo        -> k.2                1
    1  attn_read.val_b       -> v.2                1
    1  attn_read.topic       -> v.3                1
    1  v.2                   -> attn_write.every   1
    1  v.3                   -> attn_write.topic   1
    1  mlp_read.copy_a       -> neuron.0           1
    1  mlp_read.topic        -> neuron.1           1
    1  1                     -> neuron.2          -9
    1  mlp_read.echo         -> neuron.2           1
    1  neuron.0              -> mlp_write.every    1
    1  neuron.1              -> mlp_write.echo     1
    1  neuron.2              -> mlp_write.copy_b   4
"""
"""What else goes on in `induction`: heads and neurons that carry words, values, positions and a bit of the answer to
channels that no probability depends on, and two dead neurons that point at the key."""


# -- by name --------------------------------------------------------------------------------------------------------


def ground_truths() -> dict[str, Callable[[], GroundTruth]]:
    """The hand-built models: name -> a function that builds it anew."""
    return {build.__name__: build for build in (quote, mlp_gate, attention_copy, induction)}


def ground_truth(name: str) -> GroundTruth:
    """The hand-built model called `name`.

    Raises:
        TaskError: for an unknown name.
    """
    known = ground_truths()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TaskError(f"No hand-built model is called {name!r}; {hint}Known: {', '.join(known)}.")
    return known[name]()
