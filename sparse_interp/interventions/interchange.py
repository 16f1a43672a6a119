"""Interchange: in one run nodes hold what they hold in another, and a table says what that does.

    base         a prompt
    source       another prompt, its twin unless told otherwise; or the same one, in another version of the model
    exchanged    the base run, in which the nodes hold what they hold in the source run at the same position

    effect          =  metric(exchanged) - metric(base)
    recovered_frac  =  effect / (metric(source) - metric(base))
    follows_frac    =  share of prompts that choose between answer and foil as their source does, among those where base
                       and source choose differently (interchange intervention accuracy: Geiger et al. 2021,
                       arXiv:2106.02997, section 3)

The same as a `with` block, for runs of your own, is `ablate(model, nodes, Counterfactual(), batch=batch)`. For
subspaces, learned ones too, TransformerLens has `SubspaceInterchange` and `fit_das`, which are right on our models.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_interp.axes import PerPrompt
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, Running, holding_hooks
from sparse_interp.interventions.answers import answer_logits, at_answers
from sparse_interp.interventions.baselines import values_on
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import Node, masks
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import Metric, TaskBatch, logit_difference

ANSWERS_AT_ONCE = 128
"""Prompts per forward pass."""


@dataclass(frozen=True, eq=False)
class InterchangeTable(Table):
    """One row per set of nodes, means over prompts.

    `nodes` (what the set is called) and `n_nodes`; the metric in the `base`, the `source` and the `exchanged` run;
    `effect`, `recovered_frac` and `follows_frac` as in the module's docstring, not a number where there is nothing to
    recover or no choice to follow; `n_prompts`.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "nodes",
        "n_nodes",
        "base",
        "source",
        "exchanged",
        "effect",
        "recovered_frac",
        "follows_frac",
        "n_prompts",
    )

    def plot(self, ax: Axes | None = None) -> Axes:
        """What each set of nodes recovers; the dashed line is all of it."""
        bars = self.frame.assign(low=float("nan"), high=float("nan"))
        return bars_with_intervals(
            bars, label="nodes", value="recovered_frac", low="low", high="high", reference=1.0, ax=ax
        )


@torch.no_grad()
def interchange(
    model: AnyModel,
    batch: TaskBatch,
    nodes: Iterable[Node] | Mapping[str, Iterable[Node]],
    metric: Metric = logit_difference,
    *,
    source: TaskBatch | None = None,
    running: Running = nullcontext,
    source_running: Running = nullcontext,
    progress: bool = False,
) -> InterchangeTable:
    """Give `nodes` the values that they have in another run, and measure what becomes of the answers.

        interchange(model, batch, circuit.node_set)                                    from the twins
        interchange(model, batch, nodes, source=batch, running=circuit.running)        from the model into its circuit
        interchange(model, batch, nodes, source=batch, source_running=circuit.running) from the circuit into its model

    Args:
        model: the model, ours or a dense one of TransformerLens; it runs in eval mode.
        batch: the prompts of the base runs: the clean ones.
        nodes: one set of nodes, or several with a name each, which are exchanged one set after the other.
        metric: answer logits and `batch` -> one number per prompt; of the source run too, at its own answer position.
        source: prompts of the source runs, clean ones, row by row; None takes the twins of `batch`. Where a source ends
            before its base, the value at its last token stands for the rest.
        running: what the model runs as in base and exchanged runs; outside values do not undo the exchange.
        source_running: what it runs as in source runs.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: for nodes that the model does not have, or as many sources as there are not prompts.
    """
    model = hooked(model)
    groups = nodes if isinstance(nodes, Mapping) else {"": nodes}
    groups = {name: tuple(of_group) for name, of_group in groups.items()}
    taking = {name: {p: ~mask for p, mask in masks(of, model.cfg).items()} for name, of in groups.items()}
    source = batch.swapped() if source is None else source
    if len(source) != len(batch):
        raise CircuitError(f"{len(batch)} prompts take values from {len(source)} sources; each needs one of its own.")
    batch, source = (side.to(model.embed.W_E.device) for side in (batch, source))
    found: list[dict[str, PerPrompt]] = []
    order = batch.lengths.argsort(stable=True).split(ANSWERS_AT_ONCE)
    for rows in tqdm(order, disable=not progress, desc="interchange", unit="batch"):
        here, there = batch.rows(rows), source.rows(rows)
        with evaluating(model):
            found.append(_exchanged(model, here, there, taking, metric, running, source_running))
    return _table({name: torch.cat([part[name] for part in found]) for name in found[0]}, groups)


def _exchanged(
    model: HookedModel,
    here: TaskBatch,
    there: TaskBatch,
    taking: Mapping[str, Masks],
    metric: Metric,
    running: Running,
    source_running: Running,
) -> dict[str, PerPrompt]:
    """The metric per prompt, and the choice between the answers, in the base, source and exchanged runs."""
    found = {}

    def note(run: str, logits: Tensor) -> None:
        found[f"metric of {run}"] = metric(logits, here).cpu().double()
        found[f"choice of {run}"] = (logit_difference(logits, here) > 0).cpu().double()

    with source_running(model):
        values = at_answers(values_on(model, there, here.clean.shape[1]), here)
        note("source", answer_logits(model, there))
    with running(model):
        note("base", answer_logits(model, here))
        for name, kept in taking.items():
            with model.hooks(fwd_hooks=holding_hooks(kept, values)):
                note(f"set {name}", answer_logits(model, here))
    return found


def _table(found: Mapping[str, PerPrompt], groups: Mapping[str, tuple[Node, ...]]) -> InterchangeTable:
    base, source = (float(found[f"metric of {run}"].mean()) for run in ("base", "source"))
    differ = found["choice of base"] != found["choice of source"]
    rows = []
    for name, nodes in groups.items():
        exchanged = float(found[f"metric of set {name}"].mean())
        follows = found[f"choice of set {name}"] == found["choice of source"]
        called = name or (str(nodes[0]) if len(nodes) == 1 else f"{len(nodes)} nodes")
        recovered = (exchanged - base) / (source - base) if source != base else float("nan")
        followed = float(follows[differ].double().mean()) if bool(differ.any()) else float("nan")
        rows.append((called, len(nodes), base, source, exchanged, exchanged - base, recovered, followed, len(follows)))
    return InterchangeTable(pd.DataFrame(rows, columns=list(InterchangeTable.columns)))
