"""Several models in one: an answer that needs both of two circuits, or that any of some copies is enough for.

    joined(a, b)   prompt of a, prompt of b   ->   agreed if both would give their first answer, else refused
                   a neuron of a last layer:   relu(2 (u_a + u_b)),   u the answer channel of each, as +1 or -1
    copied(a, n)   prompt of a                ->   its answer
                   two heads of a last layer:  1 where u_1 + ... + u_n > 1/2, -1 where it is < -1/2, by their sinks

Joined, the key is that of `a`, that of `b`, and the neuron. Copied, there is a key through each copy: one is above the
threshold as all are. Every composed model is measured before it is handed out, and refused if its keys are not what
they claim to be.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count

import torch

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.answer_key import Edge, GroundTruth, Key
from sparse_interp.faithfulness.draft import WORDS, task_of
from sparse_interp.faithfulness.ground_truth import HARMFUL, HARMLESS, check_keys, effects_alone, logits_of
from sparse_interp.faithfulness.placing import Places, empty, moved, put
from sparse_interp.interventions.baselines import mean_activations
from sparse_interp.model.sites import FINAL_READ, Node, width
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import Task, is_correct
from sparse_interp.tasks.templates import Sides, Template, TemplateFile

YES, NO = "agreed", "refused"

MORE_WORDS = {
    "train": ["acre", "bay", "creek", "dune", "field", "glen", "hollow", "islet", "knoll", "ledge"],
    "test": ["barley", "clover", "fern", "grape", "hops", "linen", "millet", "oats", "rye", "thyme"],
    "shifted": ["anvil", "bellows", "chisel", "drill", "file", "gimlet", "hammer", "jig", "lathe", "mallet"],
}
"""Fillers that prompts of two parts need besides; to the parts they are words without features."""

N_CHECKED = 24
"""Pairs on which a composed model has to be right, and on which answer channels are measured."""


def joined(first: GroundTruth, second: GroundTruth, *, generator: torch.Generator) -> GroundTruth:
    """A model that reads a prompt of `first` and one of `second`, and agrees if both have their first answer.

    Raises:
        TaskError: if the two cannot stand in one model, or one of them fails where prompts are longer than its own.
    """
    name = f"{first.name} and {second.name}"
    task = _joint_task(name, first.task, second.task)
    model, parts, channels = _side_by_side((first, second), task)
    top, gate = model.cfg.n_layers - 1, model.cfg.d_model - 1
    block, centre = model.layers[top], _centres(model, parts, task, YES, generator)
    for (channel, _), (middle, half) in zip(parts, centre, strict=True):
        block.mlp.W_in.data[channel, 0] = 2 / half
        block.mlp.b_in.data[0] -= 2 * middle / half
    block.mlp.W_out.data[0, gate] = 0.25
    _answer(model, gate, task, {YES: 8.0, NO: -8.0}, {YES: -4.0, NO: 4.0})
    read, neuron = [Node(top, "mlp_read", channel) for channel, _ in parts], Node(top, "neuron", 0)
    ends = [neuron, Node(top, "mlp_write", gate), Node(top + 1, FINAL_READ.name, gate)]
    wires: list[Edge] = [*((node, neuron) for node in read), (neuron, ends[1])]
    keys = [
        Key(frozenset([*a.nodes, *b.nodes, *read, *ends]), frozenset([*a.edges, *b.edges, *wires]))
        for a in _inner(parts[0][1])
        for b in _inner(parts[1][1])
    ]
    why = f"{first.why} {second.why} A neuron of the last layer fires only where both say their first answer."
    return _proved(name, model, task, keys, why, channels, generator)


def copied(truth: GroundTruth, n: int = 2, *, generator: torch.Generator) -> GroundTruth:
    """A model with `n` copies of that of `truth`, and two heads that are content with any.

    Raises:
        TaskError: if `truth` does not tell its answers apart by one channel, if its model has norms or AbsTopK, or if
            there are fewer than two copies.
    """
    if n < 2:
        raise TaskError(f"n={n} copies of {truth.name}; expected 2 or more, of which each is enough.")
    name = f"{truth.name} x {n}"
    task = replace(truth.task, name=name)  # the same prompts
    model, parts, channels = _side_by_side((truth,) * n, task)
    top, gate, d_head = model.cfg.n_layers - 1, model.cfg.d_model - 1, model.cfg.d_head
    yes, no = (_answer_of(truth.task, side) for side in (0, 1))
    attn, (middle, half) = model.layers[top].attn, _centres(model, parts, task, yes, generator)[0]
    sharpness = SCORE_OF_ONE / KEY * math.sqrt(d_head)
    for head, sign in enumerate((1, -1)):
        for channel, _ in parts:
            attn.W_Q.data[head, channel, 0] = sign * sharpness / half
        attn.b_Q.data[head, 0] = -sharpness * (sign * n * middle / half + 0.5)
        attn.b_K.data[head, 0], attn.b_V.data[head, 0], attn.W_O.data[head, 0, gate] = KEY, 1, sign
        assert attn.sink is not None
        attn.sink.data[head] = 2.5  # about as much as all keys of a score of 0
    _answer(model, gate, task, {yes: 6.0, no: -6.0}, {yes: 0.0, no: 0.0})
    queries = [Node(top, "q", head * d_head) for head in (0, 1)]
    ends = [*queries, Node(top, "attn_write", gate), Node(top + 1, FINAL_READ.name, gate)]
    keys = [
        Key(key.nodes | {read, *ends}, key.edges | {(read, query) for query in queries})
        for read, part in ((Node(top, "attn_read", channel), part) for channel, part in parts)
        for key in _inner(part)
    ]
    why = f"{truth.why} All this is there {n} times, and two heads of the last layer are content with any."
    return _proved(name, model, task, keys, why, channels, generator)


SCORE_OF_ONE = 30.0
"""What a copy adds to a score, nats."""

KEY = 4.0
"""The constant key that its query meets."""


def _joint_task(name: str, first: Task, second: Task) -> Task:
    """Prompts of both in one; in each pair one of the two changes, and the other has its first answer."""
    forms, shifted = _forms_of(first, second, "train"), _forms_of(first, second, "shifted")
    templates = [Template(text, (" $joint",), "", ("train", "test"), sides) for text, sides in forms]
    templates += [Template(text, (" $joint",), "", ("shifted",), sides) for text, sides in shifted]
    sources = [_source(task) for task in (first, second)]
    changed = [source.max_changed for source in sources]
    assert None not in changed
    sides, marks = _with_joint(sources[0].sides), {**sources[0].marks, **sources[1].marks}
    words = {split: [*filled, *MORE_WORDS[split]] for split, filled in WORDS.items()}
    return task_of(name, templates, sides, marks, max(c for c in changed if c), words)


def _forms_of(first: Task, second: Task, split: str) -> list[tuple[str, Sides]]:
    a, b = _source(first), _source(second)
    forms = [[form.text for form in source.templates if split in form.splits] for source in (a, b)]
    b_sides: Sides = tuple({f"{slot}9": _renamed(held) for slot, held in side.items()} for side in b.sides)
    found = []
    for i, text in enumerate(forms[0]):
        other = _renamed(forms[1][i % len(forms[1])])
        found.append((f"{text} {string.Template(other).safe_substitute(b_sides[0])}", _with_joint(a.sides)))
        found.append((f"{string.Template(text).safe_substitute(a.sides[0])} {other}", _with_joint(b_sides)))
    return found


def _renamed(text: str) -> str:
    """Every slot with a 9 behind it: of the same kind, and no slot of the other prompt."""
    return re.sub(r"\$(\w+)", lambda slot: f"${slot[1]}9", text)


def _with_joint(sides: Sides) -> Sides:
    return {**sides[0], "joint": YES}, {**sides[1], "joint": NO}


def _source(task: Task) -> TemplateFile:
    assert isinstance(task.source, TemplateFile)
    return task.source


def _answer_of(task: Task, side: int) -> str:
    """What a prompt of one side is answered with."""
    source = _source(task)
    return string.Template(source.templates[0].answers[0]).substitute(source.sides[side]).strip()


Part = tuple[int, GroundTruth]
"""The channel that tells the answers of a part apart, and the part in its place."""


def _side_by_side(
    truths: Sequence[GroundTruth], task: Task
) -> tuple[HookedSparseTransformer, list[Part], tuple[str, ...]]:
    """Models in one, each with channels, heads and neurons of its own; above them an empty layer and channel."""
    cfgs = [truth.model.cfg for truth in truths]
    for truth, cfg in zip(truths, cfgs, strict=True):
        _check_fits(truth, cfg, cfgs[0])
    positions = "add" if any(cfg.positions == "add" for cfg in cfgs) else "none"
    sizes = {
        "n_layers": 1 + max(cfg.n_layers for cfg in cfgs),
        "d_model": 1 + sum(cfg.d_model for cfg in cfgs),
        "n_heads": sum(cfg.n_heads for cfg in cfgs),
        "d_mlp": sum(width(cfg, "neuron") for cfg in cfgs),
        "d_vocab": len(task.tokenizer),
    }
    model = empty(cfgs[0], task.tokenizer, **sizes, positions=positions)
    vocab, parts, channels = task.tokenizer.get_vocab(), [], []
    stream = heads = neurons = 0
    for truth, cfg in zip(truths, cfgs, strict=True):
        own = sorted(truth.task.tokenizer.get_vocab().items(), key=lambda item: item[1])
        layers, d_mlp = list(range(cfg.n_layers)), width(cfg, "neuron")
        where = Places(
            layers=layers,
            stream=stream + torch.arange(cfg.d_model),
            heads=[heads + torch.arange(cfg.n_heads)] * cfg.n_layers,
            neurons=[neurons + torch.arange(d_mlp)] * cfg.n_layers,
            tokens=torch.tensor([vocab[token] for token, _ in own]),
        )
        put(truth.model, model, where)
        answer = stream + _answer_channels(truth)[0]
        parts.append((answer, moved(truth, model, where)))
        channels += [_unused(name, channels) for name in truth.channels]
        stream, heads, neurons = stream + cfg.d_model, heads + cfg.n_heads, neurons + d_mlp
    _silence(model, parts)
    return model, parts, (*channels, "joint")


def _unused(name: str, names: Sequence[str]) -> str:
    """A name for another channel called so: with a number behind it."""
    return next(new for new in chain([name], (f"{name}_{i}" for i in count(2))) if new not in names)


def _silence(model: HookedSparseTransformer, parts: Sequence[Part]) -> None:
    """The parts have no logits of their own any more; channels that raise all alike go on doing so, for all tokens."""
    model.unembed.b_U.data.zero_()
    largest = model.unembed.W_U.data.amax(1, keepdim=True) + model.unembed.W_U.data.amin(1, keepdim=True)
    model.unembed.W_U.data[:] = largest
    for channel, _ in parts:
        model.unembed.W_U.data[channel] = 0


def _answer_channels(truth: GroundTruth) -> list[int]:
    """Channels of the stream from which tokens get different logits."""
    rows = truth.model.unembed.W_U.detach()
    return (rows != rows[:, :1]).any(1).nonzero()[:, 0].tolist()


def _check_fits(truth: GroundTruth, cfg, other) -> None:
    same = ("act_fn", "d_head", "attention_dir", "sink", "n_ctx")
    different = [name for name in same if getattr(cfg, name) != getattr(other, name)]
    if different or cfg.norm != "none" or cfg.afrac is not None or cfg.positions == "concat" or not cfg.sink:
        raise TaskError(
            f"{truth.name} cannot stand beside another model: expected sinks, no norm, no AbsTopK, no concatenated "
            f"positions, and the same {', '.join(same)}{'; different: ' + ', '.join(different) if different else ''}."
        )
    answers = _answer_channels(truth)
    if len(answers) != 1:
        raise TaskError(
            f"{truth.name} tells its answers apart by {len(answers)} channels of its stream, and a composed model "
            "reads one; take another."
        )


def _answers_seen(model: HookedSparseTransformer, channels: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """The answer channels as the last layer finds them, `[batch pos part]`."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, return_type=None)
    return cache["resid_pre", model.cfg.n_layers - 1][:, :, list(channels)]


def _centres(
    model: HookedSparseTransformer, parts: Sequence[Part], task: Task, yes: str, generator: torch.Generator
) -> list[tuple[float, float]]:
    """For each part (x + y) / 2 and (x - y) / 2, where its answer channel holds x for `yes`, and y otherwise."""
    batch = task.batch(N_CHECKED, generator=generator).both_sides()
    seen = _answers_seen(model, [channel for channel, _ in parts], batch.clean)
    last = seen[torch.arange(len(batch)), batch.last]
    said = batch.answer == task.tokenizer.get_vocab()[yes]
    found = []
    for values in last.T:
        on = values[said].mean()
        off = values[(values - on).abs().argmax()]
        found.append((((on + off) / 2).item(), ((on - off) / 2).item()))
    return found


def _answer(
    model: HookedSparseTransformer, gate: int, task: Task, slopes: Mapping[str, float], bases: Mapping[str, float]
) -> None:
    """Logits of two answers, which the gate moves by `slopes` from `bases`, and -3 for all other tokens."""
    ids = task.tokenizer.get_vocab()
    model.unembed.b_U.data.fill_(-3)
    for token, slope in slopes.items():
        model.unembed.W_U.data[gate, ids[token]] = slope
        model.unembed.b_U.data[ids[token]] = bases[token]


def _inner(part: GroundTruth) -> list[Key]:
    """The keys of a part whose answer is no longer unembedded."""
    return [Key(frozenset(n for n in key.nodes if n.site != FINAL_READ.name), key.edges) for key in part.keys]


def _proved(
    name: str,
    model: HookedSparseTransformer,
    task: Task,
    keys: Sequence[Key],
    why: str,
    channels: tuple[str, ...],
    generator: torch.Generator,
) -> GroundTruth:
    """The composed model with its keys, if it is always right and they are what keys have to be."""
    for split in task.splits:
        batch = task.batch(N_CHECKED, split, generator=generator).both_sides()
        right = is_correct(logits_of(model, batch), batch)
        if right.min() < 1:
            raise TaskError(
                f"{name} is right on {right.mean():.0%} of {split}: a part does not do its own in prompts that hold "
                "another's words too. Take parts that look at marks and not at the whole prompt."
            )
    truth = GroundTruth(name, model, task, keys[0].nodes, keys[0].edges, why, channels, tuple(keys[1:]))
    means = mean_activations(model, truth.blocks(N_CHECKED, generator=generator))
    batch = task.batch(N_CHECKED, "test", generator=generator).both_sides()
    check_keys(truth, batch, means)
    alone = effects_alone(truth, batch, means, frozenset.union(*(key.nodes for key in keys)))
    between = {node: nats for node, nats in alone.items() if HARMLESS < nats < HARMFUL}
    if between:
        node, nats = min(between.items(), key=lambda item: item[1])
        raise TaskError(
            f"{name}: {node} alone changes the answer by {nats:.1e} nats, which is neither nothing (below {HARMLESS}) "
            f"nor something (above {HARMFUL}), so that nobody could say whether it is made good for. Take other parts."
        )
    return replace(truth, repaired=frozenset(node for node, nats in alone.items() if nats < HARMFUL))
