"""A circuit of ours in the form in which OpenAI published theirs: `viz_data.pt` and the means beside it.

    stored loss  =  2 * task loss          (the payload adds the two sides of a pair)
    classes      :  the twin whose answer has the smaller id comes first, so that two answers make two classes

Pairs hold weights, where the released files hold a number that is none; snippets of pretraining text are left out. The
file is an archive of tensors and plain values, which is theirs to define; circuits that are kept are JSON beside
safetensors (`circuit.save`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.payload import TaskSamples
from sparse_interp.circuit.released import (
    LOCS,
    RELEASED_SITES,
    SIDES,
    loc_of,
    losses_without,
    released_loss,
    released_prompts,
    task_activations,
)
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import Masks, holding_hooks
from sparse_interp.interventions.answers import AnswerLogits, all_answer_logits
from sparse_interp.model.publishing import archive_bytes, published_config, write_files
from sparse_interp.model.sites import FINAL_READ, WIRES, Node, NodeValues, Place, places, width
from sparse_interp.model.text import evaluating
from sparse_interp.model.transformer import HookedSparseTransformer
from sparse_interp.tasks.task import TaskBatch

PAYLOAD, MEANS = "viz_data.pt", "mean_baseline_pretrain.pt"
"""What the two files are called."""


def publish_circuit(
    circuit: Circuit,
    model: HookedSparseTransformer,
    pairs: TaskBatch,
    folder: Path | str,
    *,
    means: NodeValues | None = None,
    progress: bool = True,
) -> Path:
    """Write `viz_data.pt` and `mean_baseline_pretrain.pt` to `folder`; `publish_model` writes the model.

    Args:
        circuit: a circuit that leaves `final_read` alone; the released form holds channels before the last norm.
        model: the model that it belongs to.
        pairs: prompts of its task that the losses are measured on.
        folder: where to; what an earlier circuit left there is replaced.
        means: values for places where the circuit has none: it holds nothing there, and the form wants a mean.
        progress: whether to show a progress bar.

    Raises:
        CircuitError: if the circuit holds part of `final_read`, a mean is missing, or a prompt ends in token 0, which
            is what the form pads with.
        ConfigError: if the released form cannot say what the model is.
    """
    circuit.check_model(model)
    circuit.check_all_positions("the released form")
    config, kept = published_config(model), _released_kept(circuit, model)
    values = _values(circuit, model, means)
    batch = _classes(pairs)
    retained = {loc_of(place): mask.nonzero().flatten() for place, mask in kept.items()}
    losses = _losses(model, kept, values, batch, progress)
    payload = {
        "circuit_data": retained,
        "samples": {},
        "importances": {
            "beeg_model_config": config,
            **losses,
            "pair_data": _pairs(model, retained),
            **_task_samples(circuit, model, batch, retained),
        },
        "all_loss": [],
        "num_total_nodes": sum(width(model.cfg, place.site) for place in kept),
        "prune_config": {} if circuit.prune is None else _plain(asdict(circuit.prune)),
        "is_kiter_bug_fixed": True,
    }
    means_by_loc = {loc_of(place): tensor for place, tensor in values.values.items()}
    write_files(Path(folder), {PAYLOAD: archive_bytes(payload), MEANS: archive_bytes(means_by_loc)})
    return Path(folder)


def _released_kept(circuit: Circuit, model: HookedSparseTransformer) -> Masks:
    """Which channels are kept at the places of the released form; places where the circuit holds nothing keep all."""
    kept = circuit.kept
    n_held = int((~kept[Place(model.cfg.n_layers, FINAL_READ.name)]).sum())
    if n_held:
        raise CircuitError(
            f"the circuit holds {n_held} channels of {FINAL_READ.name}, after the last norm, and the released form "
            f"holds channels before it; search with PruneConfig(sites=...) that leaves {FINAL_READ.name} out."
        )
    return {
        place: kept.get(place, torch.ones(width(model.cfg, place.site), dtype=torch.bool))
        for place in places(model.cfg, RELEASED_SITES)
    }


def _values(circuit: Circuit, model: HookedSparseTransformer, means: NodeValues | None) -> NodeValues:
    """A value for every node of the released form: the circuit's, and `means` where it has none."""
    known = {**({} if means is None else means.values), **circuit.baseline.values}
    wanted = places(model.cfg, RELEASED_SITES)
    lacking = [loc_of(place) for place in wanted if place not in known]
    if lacking:
        raise CircuitError(
            f"there are no means for {', '.join(lacking)}; pass means=mean_activations(model, blocks, sites="
            f"{sorted({place.site for place in wanted if place not in known})})."
        )
    values = {place: known[place].detach().cpu().float().clone() for place in wanted}
    return NodeValues(values, circuit.baseline.kind)


def _classes(pairs: TaskBatch) -> TaskBatch:
    """Every prompt once: first the twins whose answer has the smaller id, then the others; padding is 0."""
    swap, other = (pairs.answer > pairs.foil), pairs.swapped()
    sides = []
    for chosen in (swap, ~swap):
        tokens = torch.where(chosen[:, None], other.clean, pairs.clean) * pairs.attention_mask
        sides.append((tokens, torch.where(chosen, other.answer, pairs.answer)))
    tokens, answers = (torch.cat(parts) for parts in zip(*sides, strict=True))
    lengths = pairs.lengths.repeat(2)
    ends = tokens.gather(1, lengths[:, None] - 1)
    if bool((ends == 0).any()):
        raise CircuitError("a prompt ends in token 0, which the released form cannot tell from padding; leave it out.")
    return released_prompts(TaskSamples(tokens[:, : int(lengths.max())], lengths, {}, {}), answers)


def _losses(
    model: HookedSparseTransformer, kept: Masks, values: NodeValues, batch: TaskBatch, progress: bool
) -> dict[str, Any]:
    """Every loss that a payload states, both sides of a pair added."""

    def stored(logits: AnswerLogits) -> float:
        return SIDES * released_loss(logits.double(), batch).mean().item()

    with evaluating(model):
        whole = stored(all_answer_logits(model, batch))
        with model.hooks(fwd_hooks=holding_hooks(kept, values)):
            alone = stored(all_answer_logits(model, batch))
    at = {loc_of(place): [Node(*place, c) for c in mask.nonzero().flatten().tolist()] for place, mask in kept.items()}
    halves = {f"{layer}.{half}": [node for loc, nodes in at.items() if loc.startswith(f"{layer}.{half}.")
                                  for node in nodes]
              for layer in range(model.cfg.n_layers) for half in ("attn", "mlp")}  # fmt: skip
    alone_groups = [[node] for nodes in at.values() for node in nodes]
    groups = [*alone_groups, *halves.values(), *at.values()]
    found = iter(losses_without(model, kept, values, groups, batch, stored, progress=progress))
    return {
        "loss": whole,
        "interv_loss": alone,
        "ch_interv_losses": {loc: [next(found) for _ in nodes] for loc, nodes in at.items()},
        "layer_interv_losses": {half: next(found) for half in halves},
        "loc_interv_losses": {loc: next(found) for loc in at},
    }


def _pairs(model: HookedSparseTransformer, retained: Mapping[str, Tensor]) -> list[list]:
    """The weights between retained nodes, a matrix for every two sites that a weight joins."""
    found = []
    for layer, block in enumerate(model.layers):
        for wire in WIRES:
            locs = tuple(f"{layer}.{LOCS[site.name]}" for site in (wire.source, wire.target))
            sources, targets = (retained[loc] for loc in locs)
            if len(sources) or len(targets):
                part = wire.weight(block).detach()[sources][:, targets].float().cpu().clone()
                found.append([part, sources.tolist(), targets.tolist(), locs])
    return found


def _task_samples(
    circuit: Circuit, model: HookedSparseTransformer, batch: TaskBatch, retained: Mapping[str, Tensor]
) -> dict[str, tuple]:
    """The prompts, and what the retained nodes hold there in the model and in the circuit."""
    channels = {loc: found.tolist() for loc, found in retained.items()}
    samples = {}
    for name, hooks in {"task_samples": [], "task_samples_circuit": circuit.hooks(model)}.items():
        with evaluating(model), model.hooks(fwd_hooks=hooks):
            held = task_activations(model, batch.clean, channels)
        by_loc = {loc: {c: held[loc][i].clone() for i, c in enumerate(found)} for loc, found in channels.items()}
        samples[name] = (batch.clean, by_loc)
    return samples


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
