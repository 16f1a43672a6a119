"""Released circuits that run: what was published about a circuit -> a `Circuit` -> its stored losses, once more.

    task loss            mean over prompts, both sides of every pair, of -ln p(answer | answer or foil)
                         = stored loss / 2: the payload adds the two sides of a pair. `SIDES` is the only 2 there is
    importance of node   task loss of the circuit without it, less that of the circuit
    held                 every node that was not retained, at its mean over pretraining text, after AbsTopK

A released circuit is held at eight sites of ours and one of its own. Nodes of `final_resid` are channels of the last
stream, held *before* the last norm, so that what is held changes what all others are divided by. Nodes of `final_read`
come after it, and no values there do the same: such a circuit has the site `final_resid`, holds the stream there, and
leaves `final_read` alone.

Facts: openai/circuit_sparsity, commit 8a029a3, and Gao et al. 2025 (arXiv:2511.13653).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from sparse_interp.axes import PerPrompt
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.payload import Means, Payload, TaskSamples
from sparse_interp.circuit.pictures import PAIR_VALUE
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, holding_hooks, less
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits, answer_logits, stream_at
from sparse_interp.model.released import HOOKS
from sparse_interp.model.sites import FINAL_RESID, SITES, Node, NodeValues, Place, check_nodes, flat, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.results import Table
from sparse_interp.tasks.task import TaskBatch, answer_loss

SIDES = 2
"""Prompts of a pair, whose losses the payload adds; here a loss is a mean over prompts."""

_SITES_OF_HOOKS = {site.hook: site.name for site in SITES.values()}

LOCS = {_SITES_OF_HOOKS[hook]: loc for loc, hook in HOOKS.items() if hook in _SITES_OF_HOOKS}
"""Our sites within a layer, and the released hooks that the payload calls them by."""

RELEASED_SITES = (*LOCS, FINAL_RESID.name)
"""Where a released circuit holds what it does not keep."""

FORMS = ("two_way", "vocabulary")
"""How a task's loss was defined: over the two answers alone, or over the vocabulary and the first answer."""

STORED_LOSS = "stored_loss"
"""Column of a released circuit's nodes: its loss without the node as it is stored, the two sides of a pair added."""

ROWS_AT_ONCE = 16
"""Prompts that run together."""

_SITE_OF = {loc: site for site, loc in LOCS.items()}


def loc_of(place: Place) -> str:
    """What the payload calls a place."""
    return place.site if place.site == FINAL_RESID.name else f"{place.layer}.{LOCS[place.site]}"


def place_of(loc: str, n_layers: int) -> Place:
    """The place of a model with `n_layers` that a payload calls `loc`."""
    if loc == FINAL_RESID.name:
        return Place(n_layers - 1, loc)
    layer, _, rest = loc.partition(".")
    if rest not in _SITE_OF:
        raise CircuitError(f"{loc!r} is no loc; they are final_resid and, for every layer, {', '.join(LOCS.values())}.")
    return Place(int(layer), _SITE_OF[rest])


def released_circuit(
    model: HookedSparseTransformer, payload: Payload, means: Means | NodeValues, *, task_name: str | None = None
) -> Circuit:
    """The circuit of a payload in its model, edges read off the weights, importances as they are stored.

    Column `stored_loss` of its nodes and column `pair_value` of its edges are the payload's own numbers.

    Args:
        model: the model that the payload was made from.
        payload: what was published.
        means: what everything else is held at: the published means, or means of your own text from
            `mean_activations(model, blocks, sites=RELEASED_SITES)`.
        task_name: what the circuit was found for.

    Raises:
        CircuitError: if the payload or the means belong to a model of another shape.
    """
    _check_shape(model, payload)
    stored = dict(_stored_losses(payload, model.cfg.n_layers))
    own = payload.interv_loss
    importance = (
        {} if own is None else {node: (loss - own) / SIDES for node, loss in stored.items() if loss is not None}
    )
    circuit = Circuit.of_nodes(
        model,
        stored,
        means if isinstance(means, NodeValues) else baseline_of(model, means),
        sites=RELEASED_SITES,
        importance=importance,
        task_name=task_name,
        history=pd.DataFrame(payload.history, columns=["step", "stored_loss"]),
    )
    values = {
        tuple(str(Node(*place_of(loc, model.cfg.n_layers), channel)) for loc, channel in (pair.source, pair.target)):
        pair.value for pair in payload.pairs
    }  # fmt: skip
    ends = zip(circuit.edges.source, circuit.edges.target, circuit.edges.kind, strict=True)
    found = [values.get((source, target), float("nan")) if kind == "weight" else float("nan")
             for source, target, kind in ends]  # fmt: skip
    rows = circuit.nodes[["layer", "site", "channel"]].itertuples(index=False)
    losses = pd.Series([stored[Node(*row)] for row in rows], dtype=float)
    return replace(
        circuit,
        nodes=circuit.nodes.assign(**{STORED_LOSS: losses}),
        edges=circuit.edges.assign(**{PAIR_VALUE: pd.Series(found, dtype=float)}),
    )


def baseline_of(model: HookedSparseTransformer, means: Means) -> NodeValues:
    """Means by loc as values for the nodes of `model`.

    Raises:
        CircuitError: if a place has none, or another number of channels.
    """
    found = {}
    for place in places(model.cfg, RELEASED_SITES):
        loc = loc_of(place)
        if loc not in means.values:
            raise CircuitError(f"the file of means has none for {loc}, and the model has nodes there.")
        found[place] = means.values[loc].to(model.cfg.dtype)
    values = NodeValues(found, "mean over pretraining text, as released")
    values.check(model.cfg, RELEASED_SITES)
    return values


def _stored_losses(payload: Payload, n_layers: int) -> Iterator[tuple[Node, float | None]]:
    """Every retained node with the loss that is stored for the circuit without it, if one is."""
    for loc, channels in payload.retained.items():
        losses = payload.ch_interv_losses.get(loc, (None,) * len(channels))
        for channel, loss in zip(channels, losses, strict=True):
            yield Node(*place_of(loc, n_layers), channel), loss


def _check_shape(model: HookedSparseTransformer, payload: Payload) -> None:
    cfg = model.cfg
    ours = {"n_layer": cfg.n_layers, "n_head": cfg.n_heads, "d_head": cfg.d_head, "d_model": cfg.d_model,
            "d_mlp": cfg.d_mlp, "d_pos_emb": cfg.d_pos_emb, "vocab_size": cfg.d_vocab}  # fmt: skip
    for name, value in ours.items():
        stated = payload.model_config.get(name, value)
        if stated is not None and stated != value:
            raise CircuitError(
                f"the payload is of a model with {name}={stated}, and {cfg.model_name!r} has {value}; load the model "
                "that it was made from."
            )
    total = sum(width(cfg, place.site) for place in places(cfg, RELEASED_SITES))
    if payload.n_total not in (None, total):
        raise CircuitError(f"the payload counts {payload.n_total} nodes in its model, and this model has {total}.")


# -- prompts and losses -----------------------------------------------------------------------------------------------


def released_prompts(samples: TaskSamples, answers: Int[Tensor, " row"]) -> TaskBatch:
    """The prompts of a payload, padding known by their lengths; each row's twin has the answer that it must not give.

    Both sides of every pair are rows already, so there is no need to ask for `swapped()`; twins may differ in length.
    """
    tokens, n = samples.tokens, samples.n_pairs
    return TaskBatch(
        clean=tokens,
        corrupt=tokens.roll(n, 0),
        answer=answers,
        foil=answers.roll(n),
        lengths=samples.lengths,
        template=torch.arange(n).repeat(2),
    )


def likely_answers(model: HookedSparseTransformer, samples: TaskSamples) -> Int[Tensor, " row"]:
    """The token that the model finds most likely after the prompts of each class, for every prompt of that class.

    The payload does not say which tokens its losses compare. Whether this guess is theirs shows in the loss of the
    whole model, which the payload does state.

    Raises:
        CircuitError: if it is the same token for both classes.
    """
    batch = released_prompts(samples, torch.zeros(len(samples.tokens), dtype=torch.long))
    with evaluating(model):
        probabilities = log_softmax(_logits(model, batch).double(), -1).exp().cpu()
    first, second = (int(part.mean(0).argmax()) for part in probabilities.split(samples.n_pairs))
    if first == second:
        raise CircuitError(
            f"the model expects token {first} after the prompts of both classes, so its answers cannot be told from "
            "its logits; name the two tokens that the task compares."
        )
    return answers_of_classes(samples, first, second)


def answers_of_classes(samples: TaskSamples, first: int, second: int) -> Int[Tensor, " row"]:
    """One answer for all prompts of the first class, and another for all of the second."""
    return torch.tensor([first, second]).repeat_interleave(samples.n_pairs)


def released_loss(logits: AnswerLogits, batch: TaskBatch, form: str = "two_way") -> PerPrompt:
    """The loss of each prompt whose mean is the task loss, and whose mean times `SIDES` the payload stores.

    `two_way`: -ln p(answer | answer or foil). `vocabulary`, for tasks with one answer that is right after the first
    class and wrong after the second: -ln p(answer) and -ln(1 - p(answer)).
    """
    if form not in FORMS:
        raise CircuitError(f"form={form!r}; choose {' or '.join(FORMS)}.")
    if form == "two_way":
        return answer_loss(logits, batch)
    n = len(batch) // 2
    token = torch.cat([batch.answer[:n], batch.foil[n:]]).to(logits.device)[:, None]
    others = logits.scatter(1, token, -torch.inf).logsumexp(-1)
    total = logits.logsumexp(-1)
    return torch.cat([(total - logits.gather(1, token)[:, 0])[:n], (total - others)[n:]])


def _logits(model: HookedSparseTransformer, batch: TaskBatch) -> AnswerLogits:
    return all_answer_logits(model, batch, ROWS_AT_ONCE)


# -- the stored numbers, once more ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReplayTable(Table):
    """One row per stored number: what the payload states, what running the circuit gives, and the difference.

    `measure` is the payload's name for it and `where` the node, half block or loc. Losses are in nats per prompt, the
    payload's halved. Of the activations at a loc only the pair that differs most is listed.
    """

    columns: ClassVar[tuple[str, ...]] = ("measure", "where", "unit", "stored", "recomputed", "difference")

    def largest(self, unit: str) -> float:
        """Largest difference in size among the rows in `unit`, `nats` or `activation`; nan if there are none."""
        return float(self.frame.difference[self.frame.unit == unit].abs().max())

    def summary(self) -> Table:
        """For each measure, how many numbers are compared and how far the worst is off."""
        rows = [
            (measure, part.unit.iloc[0], len(part), part.difference.abs().max(), part.difference.abs().median())
            for measure, part in self.frame.groupby("measure", sort=False)
        ]
        names = ["measure", "unit", "n", "largest_difference", "median_difference"]
        return Table(pd.DataFrame(rows, columns=names))


def replay(
    model: HookedSparseTransformer,
    circuit: Circuit,
    payload: Payload,
    *,
    answers: Int[Tensor, " row"] | None = None,
    form: str = "two_way",
    progress: bool = True,
) -> ReplayTable:
    """Every number of `payload` that can be measured on the prompts it carries, beside what it states.

    Args:
        model: the model of the payload.
        circuit: what `released_circuit` made of it.
        payload: what was published.
        answers: the right token for each prompt; None takes `likely_answers`.
        form: `two_way` or `vocabulary`, see `released_loss`.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the payload carries no prompts, or the circuit is another model's.
    """
    samples = payload.samples
    if samples is None:
        raise CircuitError("the payload carries no task_samples, so there are no prompts to measure its losses on.")
    circuit.check_model(model)
    _check_samples(model, samples)
    answers = likely_answers(model, samples) if answers is None else answers
    batch = released_prompts(samples, answers)
    rows = list(_loss_rows(model, circuit, payload, batch, form, progress))
    kept = {"task_samples": None, "task_samples_circuit": circuit.kept}
    for (name, masks), stored in zip(kept.items(), (samples.activations, samples.in_circuit), strict=True):
        hooks = [] if masks is None else holding_hooks(masks, circuit.baseline)
        with evaluating(model), model.hooks(fwd_hooks=hooks):
            rows += _activation_rows(model, samples, stored, name)
    frame = pd.DataFrame(rows, columns=list(ReplayTable.columns)[:-1])
    return ReplayTable(frame.assign(difference=frame.recomputed - frame.stored))


def _check_samples(model: HookedSparseTransformer, samples: TaskSamples) -> None:
    for stored in (samples.activations, samples.in_circuit):
        listed = [(place_of(loc, model.cfg.n_layers), channels) for loc, channels in stored.items()]
        check_nodes([Node(*place, channel) for place, channels in listed for channel in channels], model.cfg)
    longest, largest = int(samples.lengths.max()), int(samples.tokens.max())
    if longest > model.cfg.n_ctx or largest >= model.cfg.d_vocab:
        raise CircuitError(
            f"the payload's prompts have {longest} positions and token ids up to {largest}; the model takes "
            f"{model.cfg.n_ctx} positions and ids below {model.cfg.d_vocab}. Load the model that it was made from."
        )


def _loss_rows(
    model: HookedSparseTransformer, circuit: Circuit, payload: Payload, batch: TaskBatch, form: str, progress: bool
) -> Iterator[tuple]:
    """Rows for every stored loss, in the order of the payload."""

    def loss(logits: AnswerLogits) -> float:
        return released_loss(logits.double(), batch, form).mean().item()

    kept = circuit.kept
    with evaluating(model):
        whole = loss(_logits(model, batch))
        with model.hooks(fwd_hooks=holding_hooks(kept, circuit.baseline)):
            alone = loss(_logits(model, batch))
    wanted = [(measure, where, stored, tuple(nodes)) for measure, where, stored, nodes in _ablations(payload, model)]
    groups = [nodes for *_, nodes in wanted]
    found = losses_without(model, kept, circuit.baseline, groups, batch, loss, progress=progress)
    stored = [("loss", "", payload.loss, whole), ("interv_loss", "", payload.interv_loss, alone)]
    stored += [(*row[:3], value) for row, value in zip(wanted, found, strict=True)]
    for measure, where, value, recomputed in stored:
        if value is not None:
            yield measure, where, "nats", value / SIDES, recomputed


def _ablations(payload: Payload, model: HookedSparseTransformer) -> Iterator[tuple[str, str, float, Iterable[Node]]]:
    """What the payload states a loss for: its name, where, the loss, and the nodes that are held besides."""
    n_layers = model.cfg.n_layers
    at = {loc: [Node(*place_of(loc, n_layers), c) for c in channels] for loc, channels in payload.retained.items()}
    for loc, losses in payload.ch_interv_losses.items():
        for node, loss in zip(at.get(loc, ()), losses, strict=True):
            yield "ch_interv_losses", str(node), loss, [node]
    for half, loss in payload.layer_interv_losses.items():
        inside = [node for loc, nodes in at.items() if loc.startswith(f"{half}.") for node in nodes]
        yield "layer_interv_losses", half, loss, inside
    for loc, loss in payload.loc_interv_losses.items():
        yield "loc_interv_losses", loc, loss, at.get(loc, [])


@torch.no_grad()
def losses_without(
    model: HookedSparseTransformer,
    kept: Masks,
    baseline: NodeValues,
    groups: Sequence[Iterable[Node]],
    batch: TaskBatch,
    loss: Callable[[AnswerLogits], float],
    *,
    progress: bool = False,
) -> list[float]:
    """The loss of what keeps `kept` with each group of nodes held as well; layers before it are run once for all."""
    n_layers = model.cfg.n_layers
    groups = [tuple(group) for group in groups]
    first = [min((node.layer for node in group), default=n_layers) for group in groups]
    chunks = [batch.rows(part) for part in torch.arange(len(batch)).split(ROWS_AT_ONCE)]
    found = [0.0] * len(groups)
    bar = tqdm(total=len(groups), disable=not progress, desc="losses", unit="loss")
    with evaluating(model), bar:
        for layer in sorted(set(first)):
            with model.hooks(fwd_hooks=holding_hooks(kept, baseline)):
                streams = [stream_at(model, chunk, layer) if layer else None for chunk in chunks]
            for i in (i for i, start in enumerate(first) if start == layer):
                with model.hooks(fwd_hooks=holding_hooks(less(kept, groups[i]), baseline)):
                    parts = [answer_logits(model, c, s, layer) for c, s in zip(chunks, streams, strict=True)]
                found[i] = loss(torch.cat(parts))
                bar.update()
    return found


def _activation_rows(
    model: HookedSparseTransformer, samples: TaskSamples, stored: Mapping, name: str
) -> Iterator[tuple[str, str, str, float, float]]:
    """For every loc, the activation at a token of a prompt that differs most from the stored one."""
    longest = int(samples.lengths.max())
    real = torch.arange(longest) < samples.lengths[:, None]
    wanted = {loc: list(channels) for loc, channels in stored.items()}
    ours = task_activations(model, samples.tokens[:, :longest], wanted)
    for loc, by_channel in stored.items():
        if by_channel:
            theirs = torch.stack(list(by_channel.values()))[..., :longest].double() * real
            here = ours[loc].double() * real
            worst = (here - theirs).abs().argmax()
            yield name, loc, "activation", theirs.flatten()[worst].item(), here.flatten()[worst].item()


@torch.no_grad()
def task_activations(
    model: HookedSparseTransformer, tokens: Int[Tensor, "row pos"], channels: Mapping[str, Sequence[int]]
) -> dict[str, Float[Tensor, "channel row pos"]]:
    """What some channels of some locs hold at every token, under whatever hooks the model has."""
    found: dict[str, list[Tensor]] = {loc: [] for loc in channels}

    def note(loc: str) -> Callable:
        def hook(activation: Tensor, hook: HookPoint) -> None:
            found[loc].append(flat(activation)[..., list(channels[loc])].float().cpu())

        return hook

    hooks = [(place_of(loc, model.cfg.n_layers).hook, note(loc)) for loc, wanted in channels.items() if wanted]
    with model.hooks(fwd_hooks=hooks):
        for part in tokens.split(ROWS_AT_ONCE):
            model(part.to(model.embed.W_E.device), return_type=None)
    return {loc: torch.cat(parts).permute(2, 0, 1) for loc, parts in found.items() if parts}
