"""find_circuit: learn gates, choose the size, drop what is not needed, and say what came out beside the model.

    1  learn_gates ranks the nodes                                          on training pairs
    2  the smallest prefix of the ranking that meets the stopping rule      on selection pairs
    3  knock out each node that is left; drop the least needed as long as the rule holds; repeat

Step 3 is what gates cannot do: a gate is trained among all the others, most of which are gone in the end. A node that
is constant on the prompts (the q of a shared pair, say) changes nothing when it is held, and leaves last, unless the
rule needs it together with others of its kind.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import pandas as pd
import torch
from tqdm import tqdm

from sparse_interp.circuit.calibration import fit_scale
from sparse_interp.circuit.graph import SCORE_COLUMNS, Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, less
from sparse_interp.interventions.answers import Teacher
from sparse_interp.interventions.baselines import Baseline
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import GateSearch, learn_gates
from sparse_interp.interventions.selection import Fit, Selection, needed_among, smallest_prefix, split_pairs
from sparse_interp.model.config import AnyShape
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, NodeAt, NodeValues, key_of, masks, masks_at, queries_of
from sparse_interp.model.zoo import means_of
from sparse_interp.tasks.task import Task, answer_loss, kl_divergence
from sparse_interp.tokenizer import tokenizer_hash

N = TypeVar("N", Node, NodeAt)
"""A node, or a node at a position: whatever the search had gates for."""

MAX_PASSES = 2
"""Rounds of knocking out and dropping at most."""

NO_EFFECT_NATS = 1e-6
"""A knock-out that changes the divergence by less changes nothing: the node is constant, its baseline is its value."""

KNOCK_OUT_EVERY = 9
"""One in so many selection prompts measures a knock-out; odd, so that both sides of pairs are among them."""


def find_circuit(
    model: AnyModel,
    task: Task,
    config: PruneConfig | None = None,
    *,
    baseline: NodeValues | None = None,
    search_baseline: Baseline | None = None,
    teacher: Teacher | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Circuit:
    """The smallest circuit that the search finds to agree with `model` on `task`. The test split is never looked at.

    Args:
        model: the model, in any mode: ours, or a dense one of TransformerLens.
        task: prompts in the model's own tokens.
        config: how to search; None takes the defaults, which ask for agreement with the model.
        baseline: what nodes outside the circuit are held at; None takes the means over text that are kept beside a
            bundled model, and for any other model `mean_activations(model, blocks)` makes them.
        search_baseline: what they are held at while gates are trained and the size is chosen, constants or values of
            prompts; None takes `baseline`. The scores say how each number was measured.
        teacher: answers that the circuit is to agree with, in place of the model's own in objective, bounds and scores:
            how the controls of faithfulness/controls.py are searched for. None takes the model's own.
        generator: draws prompts and starting gates.
        progress: whether to show progress bars.

    Raises:
        CircuitError: if no circuit meets the stopping rule, or the baseline is another model's.
        CheckpointError: if no baseline is given and none is kept for these weights.
        TaskError: if the task has too few pairs, or prompts longer than the model's context.
    """
    config, model = config or PruneConfig(), hooked(model)
    task.check_fits(model.cfg.n_ctx)
    baseline = means_of(model) if baseline is None else baseline
    seed = generator.initial_seed()
    train, select = split_pairs(task, config, generator)
    held = baseline if search_baseline is None else search_baseline
    search = learn_gates(model, train, config, held, teacher=teacher, generator=generator, progress=progress)
    how = {"frozen_norms": config.frozen_norms, "per_position": config.per_position, "teacher": teacher}
    selection = Selection(model, select, held, **how)
    return sized(model, task, search, selection, baseline, config, seed=seed, progress=progress)


def sized(
    model: HookedModel,
    task: Task,
    search: GateSearch,
    selection: Selection,
    baseline: NodeValues,
    config: PruneConfig,
    *,
    seed: int,
    progress: bool = False,
) -> Circuit:
    """Steps 2 and 3: the smallest circuit in what `search` learned, with its scores on the selection pairs.

    Raises:
        CircuitError: if no circuit meets the stopping rule.
    """

    def good(n: int) -> bool:
        return selection.fit(kept_by(search.order[:n], model, config, selection.n_pos)).enough(config)

    prefix = search.order[: smallest_prefix(len(search.order), good, search.n_open)]
    nodes, importance = _without_idle(model, prefix, selection, config, progress)
    return Circuit.of_nodes(
        model,
        nodes,
        baseline,
        tau=search.tau,
        importance=importance,
        n_pos=selection.n_pos,
        task_name=task.name,
        task_sha256=task.templates_sha256,
        tokenizer_sha256=tokenizer_hash(task.tokenizer),
        prune=config,
        seed=seed,
        scores=_scores(model, nodes, search, selection, baseline, config),
        history=search.history.frame,
    )


def kept_by(nodes: Iterable[Node | NodeAt], model: HookedModel, config: PruneConfig, n_pos: int | None = None) -> Masks:
    """What a circuit of `nodes` keeps: those, and every node of a site without gates; of nodes at positions, those of
    prompts of `n_pos` tokens."""
    found = masks(nodes, model.cfg) if n_pos is None else masks_at(nodes, model.cfg, n_pos)
    return {place: m if place.site in config.sites else torch.ones_like(m) for place, m in found.items()}


def _units(nodes: Sequence[N], config: PruneConfig, cfg: AnyShape) -> list[tuple[N, ...]]:
    """What is dropped in one piece: a node, or the k of a channel and the q that meet it where they share a gate."""
    if not config.share_qk:
        return [(node,) for node in nodes]
    kept = set(nodes)
    units: dict[N, tuple[N, ...]] = {}
    for node in nodes:
        key = node._replace(site="k", channel=key_of(cfg, node.channel)) if node.site == "q" else node
        if key.site == "k" and key in kept:
            queries = [key._replace(site="q", channel=channel) for channel in queries_of(cfg, key.channel)]
            units[key] = (*(query for query in queries if query in kept), key)
        else:
            units[node] = (node,)
    return list(units.values())


def _without_idle(
    model: HookedModel,
    nodes: Sequence[N],
    selection: Selection,
    config: PruneConfig,
    progress: bool,
) -> tuple[list[N], dict[N, float]]:
    """Drop what the stopping rule can do without; each node that stays comes with what its knock-out costs."""
    units = _units(nodes, config, model.cfg)
    for n_pass in range(MAX_PASSES):
        cost = _knock_outs(model, units, selection, config, progress, f"knock-outs {n_pass + 1}")
        order = sorted(range(len(units)), key=lambda i: -cost[i])

        def good(n: int, order: list[int] = order, units: list[tuple[N, ...]] = units) -> bool:
            kept = [node for i in order[:n] for node in units[i]]
            return selection.fit(kept_by(kept, model, config, selection.n_pos)).enough(config)

        n_needed = smallest_prefix(len(units), good, len(units))
        if n_needed == len(units):
            break
        units = [units[i] for i in sorted(order[:n_needed])]
    return _felt([node for unit in units for node in unit], model, selection, config, progress)


def _felt(
    nodes: Sequence[N], model: HookedModel, selection: Selection, config: PruneConfig, progress: bool
) -> tuple[list[N], dict[N, float]]:
    """Nodes less those that change nothing, and what each costs; some such may matter together, and they stay then."""
    cost = _knock_outs(model, [(node,) for node in nodes], selection, config, progress, "importance")
    felt = [i for i in range(len(nodes)) if abs(cost[i]) > NO_EFFECT_NATS]
    idle = [i for i in range(len(nodes)) if abs(cost[i]) <= NO_EFFECT_NATS]

    def good(some: Sequence[int]) -> bool:
        kept = [nodes[i] for i in (*felt, *some)]
        return selection.fit(kept_by(kept, model, config, selection.n_pos)).enough(config)

    needed = needed_among(idle, good)
    importance = {nodes[i]: cost[i] for i in sorted([*felt, *(idle if needed is None else needed)])}
    return list(importance), importance


def _knock_outs(
    model: HookedModel,
    units: Sequence[tuple[N, ...]],
    selection: Selection,
    config: PruneConfig,
    progress: bool,
    title: str,
) -> list[float]:
    """By how much the mean KL(model || circuit) grows when a unit is held at its baseline too, nats."""
    kept = kept_by([node for unit in units for node in unit], model, config, selection.n_pos)
    by_layer: dict[int, list[int]] = {}
    for i, unit in sorted(enumerate(units), key=lambda numbered: numbered[1][0].site):  # those of a place run together
        by_layer.setdefault(unit[0].layer, []).append(i)
    without = {layer: [less(kept, units[i]) for i in members] for layer, members in by_layer.items()}
    costs = selection.knock_outs(kept, without, KNOCK_OUT_EVERY)
    bar = tqdm(costs, total=len(units), disable=not progress, desc=title, unit="node")
    order = [i for layer in sorted(by_layer) for i in by_layer[layer]]
    found = dict(zip(order, bar, strict=True))
    return [found[i] for i in range(len(units))]


def _scores(
    model: HookedModel,
    nodes: Sequence[N],
    search: GateSearch,
    selection: Selection,
    baseline: NodeValues,
    config: PruneConfig,
) -> pd.DataFrame:
    """Both losses side by side, the divergence, and the size that the paper's own stopping rule would have chosen."""
    fit = selection.fit(kept_by(nodes, model, config, selection.n_pos))

    def reaches_target(n: int) -> bool:
        return selection.fit(kept_by(search.order[:n], model, config, selection.n_pos)).loss <= config.target_task_loss

    try:
        at_target = float(smallest_prefix(len(search.order), reaches_target, search.n_open))
    except CircuitError:
        at_target = float("nan")  # the model itself does not get there
    rows = [
        *fit_rows(fit),
        (f"nodes at task loss {config.target_task_loss}", at_target, "nodes", "prefix of the ranking"),
    ]
    if config.rule == "logit_difference":
        rows.append(("error of logit difference", fit.ld_error, "share", "mean square, of that of the model's own"))
    if config.calibrate:
        rows += _calibrated_rows(model, nodes, selection, config)
    measured = [(*row, selection.ablation) for row in rows]
    running = selection.under(baseline)
    if running.ablation != selection.ablation:  # what was searched with is not what the circuit runs with
        as_run = fit_rows(running.fit(kept_by(nodes, model, config, selection.n_pos)))
        measured += [(f"{name}, as it runs", *rest, running.ablation) for name, *rest in as_run]
    split = ("selection", len(selection.batch))
    table = [(name, value, unit, ablation, metric, *split) for name, value, unit, metric, ablation in measured]
    return pd.DataFrame(table, columns=list(SCORE_COLUMNS))


def fit_rows(fit: Fit) -> list[tuple[str, float, str, str]]:
    """What a circuit does on the selection pairs: measure, value, unit, metric."""
    return [
        ("task loss of circuit", fit.loss, "nats", "cross-entropy of answer against foil"),
        ("task loss of model", fit.model_loss, "nats", "cross-entropy of answer against foil"),
        ("KL(model || circuit)", fit.kl, "nats", "vocabulary at the answer position"),
    ]


def _calibrated_rows(
    model: HookedModel, nodes: Sequence[N], selection: Selection, config: PruneConfig
) -> list[tuple[str, float, str, str]]:
    """The same losses with the circuit's logits scaled, and the scale; on the pairs that it is fitted to."""
    logits = selection.logits(kept_by(nodes, model, config, selection.n_pos))
    fitted = fit_scale(logits, selection.reference, selection.batch, config.objective)
    scaled = fitted.apply(logits)
    loss = answer_loss(scaled, selection.batch).mean().item()
    kl = kl_divergence(selection.reference, scaled, selection.batch).mean().item()
    return [
        ("task loss of calibrated circuit", loss, "nats", "cross-entropy of answer against foil"),
        ("KL(model || calibrated circuit)", kl, "nats", "vocabulary at the answer position"),
        ("scale of calibrated logits", fitted.scale, "factor", f"fitted to the objective {config.objective}"),
    ]
