"""What a circuit loses with each of its nodes, heads and half blocks: held at their baseline, as all else outside is.

    lead         logit of the right token less that of the other one, which is 0 for a circuit that knows nothing
    KL           KL(model || circuit) over the vocabulary at the answer position, nats
    accuracy     share of prompts with a lead above 0
    loss         cross-entropy of answer against foil, nats

All of it on both prompts of every pair, while the model runs as the circuit less what is knocked out; one thing at a
time, so numbers of several do not add up to what they do together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError
from sparse_interp.interventions.ablation import less
from sparse_interp.interventions.selection import Selection
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import Node, heads_of
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.task import TaskBatch, answer_loss, kl_divergence, logit_difference

MODEL, CIRCUIT, NODE, HEAD, HALF = "model", "circuit", "node", "head", "half"
"""What a row is about: the whole model, the circuit with nothing knocked out, or what is."""

ATTENTION_SITES, MLP_SITES = ("attn_read", "q", "k", "v", "attn_write"), ("mlp_read", "neuron", "mlp_write")


@dataclass(frozen=True, eq=False)
class KnockOutTable(Table):
    """One row per thing knocked out, and first one for the model and one for the circuit: `kind`, `what` it is called,
    the `n_nodes` that it has in the circuit; then `kl_nats`, `lead`, `accuracy` and `loss_nats` without it, and the
    `leads` of every prompt: the prompts of the batch, then their twins.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "kind", "what", "n_nodes", "kl_nats", "lead", "accuracy", "loss_nats", "leads")  # fmt: skip

    def of(self, kind: str) -> pd.DataFrame:
        """The rows of one kind, by `what`."""
        return self.frame[self.frame.kind == kind].set_index("what", drop=False)

    def plot(self, ax: Axes | None = None) -> Axes:
        """What is left of the lead without each head and half block."""
        rows = self.frame[~self.frame.kind.isin([MODEL, NODE])].assign(low=float("nan"), high=float("nan"))
        return bars_with_intervals(rows, label="what", value="lead", low="low", high="high", ax=ax)


class _Part(NamedTuple):
    """Nodes that are knocked out together."""

    kind: str
    what: str
    layer: int
    nodes: tuple[Node, ...]


def knock_outs(circuit: Circuit, model: AnyModel, batch: TaskBatch, *, progress: bool = False) -> KnockOutTable:
    """Knock out every node, head and half block of `circuit`, one after the other, on both prompts of every pair.

    Raises:
        CircuitError: if the circuit belongs to another model, or has no nodes.
    """
    model = hooked(model)
    circuit.check_model(model)
    if not circuit.n_nodes:
        raise CircuitError("this circuit has no nodes, so there is nothing to knock out; find one first.")
    selection = Selection(model, batch, circuit.baseline, per_position=circuit.n_pos is not None)
    parts = sorted(_parts(circuit), key=lambda part: part.layer)
    without: dict[int, list] = {}
    for part in parts:
        without.setdefault(part.layer, []).append(less(circuit.kept, part.nodes))
    back = selection.measured(1).argsort()
    own = _outcome(selection.reference, selection.reference, selection.batch)
    rows = [_row(MODEL, circuit.model_name, sum(len(v) for v in circuit.baseline.values.values()), own)]
    with circuit.cutting(model):
        found = (values[back] for values in selection.outcomes(_outcome, circuit.kept, without))
        rows.append(_row(CIRCUIT, CIRCUIT, circuit.n_nodes, next(found)))
        bar = tqdm(found, total=len(parts), disable=not progress, desc="knock-outs", unit="run")
        rows += [_row(part.kind, part.what, len(part.nodes), values) for part, values in zip(parts, bar, strict=True)]
    return KnockOutTable(pd.DataFrame(rows, columns=list(KnockOutTable.columns)))


def _parts(circuit: Circuit) -> Iterator[_Part]:
    """Nodes in an order in which those of one place follow each other, then heads, then half blocks."""
    columns = circuit.nodes[["layer", "site", "channel"]].itertuples(index=False)
    nodes = [Node(int(layer), str(site), int(channel)) for layer, site, channel in columns]
    yield from (_Part(NODE, str(node), node.layer, (node,)) for node in nodes)
    heads: dict[tuple[int, int], list[Node]] = {}
    halves: dict[tuple[int, str], list[Node]] = {}
    for node in nodes:
        if node.site in ("q", "k", "v"):
            for head in heads_of(circuit.cfg, node):
                heads.setdefault((node.layer, head), []).append(node)
        half = "attention" if node.site in ATTENTION_SITES else "MLP" if node.site in MLP_SITES else None
        if half is not None:
            halves.setdefault((node.layer, half), []).append(node)
    for (layer, head), members in sorted(heads.items()):
        yield _Part(HEAD, f"head {layer}.{head}", layer, tuple(members))
    for (layer, half), members in sorted(halves.items()):
        yield _Part(HALF, f"layer {layer} {half}", layer, tuple(members))


def _outcome(
    reference: Float[Tensor, "prompt d_vocab"], logits: Float[Tensor, "prompt d_vocab"], batch: TaskBatch
) -> Float[Tensor, "prompt 3"]:
    """KL, lead and loss of each prompt."""
    per_prompt: Sequence[Tensor] = (
        kl_divergence(reference, logits, batch), logit_difference(logits, batch), answer_loss(logits, batch)
    )  # fmt: skip
    return torch.stack([values.float() for values in per_prompt], 1).cpu()


def _row(kind: str, what: str, n_nodes: int, values: Float[Tensor, "prompt 3"]) -> tuple:
    kl, lead, loss = values.double().mean(0).tolist()
    leads = values[:, 1]
    return kind, what, n_nodes, kl, lead, float((leads > 0).double().mean()), loss, leads.tolist()
