"""Controls: what a circuit has to be better than before its scores mean anything.

    random circuit   as many nodes per layer and site as the circuit, drawn from all nodes of that place
    empty circuit    none of them

A score without its control says little: enough nodes do most tasks, whichever they are. Random circuits are held at the
same baseline as the circuit, leave the same sites alone, and join q and k as it does: where the circuit has the q and
the k of a channel, a random one has both of another channel, since neither does anything alone (with grouped queries,
the k and the q of the same heads of its group). They are drawn without regard to the circuit and share nodes with it by
chance (`overlap`); to forbid that would make the control of a large circuit worse than chance.
"""

from collections.abc import Iterable, Iterator

import torch

from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import ConfigError
from sparse_interp.model.config import Shape
from sparse_interp.model.dense import AnyModel, hooked
from sparse_interp.model.sites import SITES, Node, Place, places, queries_of, width


def random_circuits(model: AnyModel, circuit: Circuit, n: int, *, generator: torch.Generator) -> list[Circuit]:
    """`n` random circuits with as many nodes as `circuit` in every layer and site.

    Raises:
        CircuitError: if the circuit has another shape than the model.
        ConfigError: if `n` is negative.
    """
    if n < 0:
        raise ConfigError(f"n={n} random circuits were asked for; expected 0 or more.")
    circuit.baseline.check(hooked(model).cfg, circuit.sites)
    return [_alike(model, circuit, _drawn(circuit, generator)) for _ in range(n)]


def empty_circuit(model: AnyModel, circuit: Circuit) -> Circuit:
    """The circuit of no nodes, over the same baseline; sites that the search left alone are left alone here too."""
    return _alike(model, circuit, ())


def has_room(circuit: Circuit) -> bool:
    """Whether another circuit has its size: some place is kept in part, and neither whole nor not at all."""
    return any(0 < len(kept) < width(circuit.cfg, place.site) for place, kept in _channels(circuit).items())


def overlap(control: Circuit, circuit: Circuit) -> float:
    """Share of the circuit's nodes that a control has as well."""
    return len(control.node_set & circuit.node_set) / max(1, circuit.n_nodes)


def _alike(model: AnyModel, circuit: Circuit, nodes: Iterable[Node]) -> Circuit:
    """`nodes` as a circuit with the baseline, the task and the gated sites of `circuit`."""
    origin = {name: getattr(circuit, name) for name in ("sites", "task_name", "task_sha256", "prune")}
    return Circuit.of_nodes(model, nodes, circuit.baseline, **origin)


def _channels(circuit: Circuit) -> dict[Place, set[int]]:
    """The circuit's channels in every place, in the order of the forward pass."""
    found: dict[Place, set[int]] = {place: set() for place in places(circuit.cfg, SITES)}
    for node in circuit.node_set:
        found[Place(node.layer, node.site)].add(node.channel)
    return found


def _drawn(circuit: Circuit, generator: torch.Generator) -> Iterator[Node]:
    """Random nodes, as many in every place as the circuit has there."""
    kept = _channels(circuit)
    for place, channels in kept.items():
        if place.site == "k":
            continue  # drawn with q
        order = _shuffled(width(circuit.cfg, "k" if place.site == "q" else place.site), generator)
        if place.site == "q":
            yield from _drawn_heads(circuit.cfg, place.layer, channels, kept[Place(place.layer, "k")], order)
        else:
            yield from (Node(*place, channel) for channel in order[: len(channels)])


def _drawn_heads(cfg: Shape, layer: int, queries: set[int], keys: set[int], order: list[int]) -> Iterator[Node]:
    """What the circuit has of the q and k that meet in a channel, moved together to the channel that `order` says."""
    for channel, drawn in enumerate(order):
        meeting = zip(queries_of(cfg, channel), queries_of(cfg, drawn), strict=True)
        yield from (Node(layer, "q", there) for here, there in meeting if here in queries)
        if channel in keys:
            yield Node(layer, "k", drawn)


def _shuffled(n: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=generator, device=generator.device).tolist()
