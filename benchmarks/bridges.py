"""What the bundled bridge is worth: on text, on every node of the circuits that it should carry over, and in steering.

    python benchmarks/bridges.py [--bridge stdlib-small] [--part text causal steering] [--task single_double_quote ...]
                                 [--found out/discovery] [--work out/bridges] [--out benchmarks/results]

    text       per site NMSE and variance explained, both ways; hybrid passes, every one that crosses once and eight
               mixed ones: KL(dense || pass) and loss, nats per token; which channels the dense stream lacks
    causal     each node of the circuits of the tasks that both models solve is ablated, and the change carried over:
               how alike the two models' logit differences change, on held-out prompts (`si.evaluate_bridge`)
    steering   the dense model pushed along a feature of the sparse one, at the last position of held-out prompts: how
               the probability of a target changes, beside pushes of equal norm, and what they cost on text. Which one
               is chosen on training prompts, from which the difference of means is, too: of the eight channels that
               move the sparse model's answer most, that along which the dense model moves most at less than 1 % of text

Every part stands beside its controls: least squares alone (`ridge map`), an `untrained sparse model`, maps of the
`wrong site`, and for changes that are carried a `random direction` and the `difference of means` at equal norm.
Circuits are taken from --found and searched for if they are not there. A part is measured once, in pieces (one per
task), which wait in --work for the others; what there is goes to bridges.csv, bridges_steering.csv and bridges.json.

bridges.csv has a row per measurement: `part`, `where` (pair of sites SPARSE-DENSE, path, task, channel), `bridge` (the
bridge or a control), `measure`, `value`, and 95 % intervals: `low`, `high` over blocks of text or templates of prompts,
`low_nodes`, `high_nodes` over nodes. `bridge less CONTROL` is the difference of their agreements, drawn together.
bridges_steering.csv: `example`, `from`, `to` (what the prompts continue with, and the target), and the columns of
`SteeringTable`. Seconds are of processor time.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from discovery import found, solved_tasks
from torch import Tensor
from tqdm import tqdm

import sparse_interp as si
from sparse_interp.bridges.curves import SteeringTable
from sparse_interp.bridges.evaluation import (
    BRIDGE,
    MEASURES,
    CausalEffects,
    causal_effects,
    compared,
    together,
)
from sparse_interp.faithfulness.scores import of_means
from sparse_interp.model.sites import Place
from sparse_interp.results import write_whole

SPARSE, DENSE = "stdlib-small", "stdlib-small-dense"
PARTS = ("text", "causal", "steering")
N_BLOCKS, N_PATHS, N_PAIRS, N_FIT, N_STEERED, N_SOUGHT, N_RANDOM = 48, 8, 12, 32, 32, 256, 100
N_TRIED, N_TEXT, MOST_LOST = 8, 12, 0.01
"""Features to choose from on training prompts, blocks of other text beside them, and what a push may cost there."""
VALUES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pushes, in units of the difference that the feature makes between the two sides of the task in the sparse model."""


class Example(NamedTuple):
    """A behaviour to be steered."""

    name: str
    task: str
    before: str
    """What the prompts continue with."""
    target: str
    """What they are to continue with."""


EXAMPLES = (
    Example("quote", "single_double_quote", "')\n", '")\n'),
    Example("quote, back", "single_double_quote", '")\n', "')\n"),
    Example("while to return True", "while_return_true", ":\n", "\n"),
    Example("return to while True", "while_return_true", "\n", ":\n"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default=SPARSE)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--found", type=Path, default=Path("out/discovery"))
    parser.add_argument("--work", type=Path, default=Path("out/bridges"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sparse, dense = si.load(SPARSE), si.load(DENSE)
    bridge = si.Bridge.load(args.bridge, sparse, dense)
    both = [set(solved_tasks(name, 0, args.found)) for name in (SPARSE, DENSE)]
    solved = sorted(both[0] & both[1])
    work = args.work / maps_sha256(bridge)[:12]
    work.mkdir(parents=True, exist_ok=True)
    circuits = {task: args.found / SPARSE / task / "nodes" / "circuit.json" for task in solved}
    if "text" in args.part:
        kept(work / "text.json", lambda: text_rows(bridge, sparse, dense))
    if "causal" in args.part:
        for task in [task for task in solved if task in (args.task or solved)]:
            kept(work / f"causal-{task}.json", lambda task=task: causal(bridge, sparse, dense, task, circuits[task]))
    if "steering" in args.part:
        for i, example in enumerate(EXAMPLES):
            piece = work / f"steering-{i}.json"
            kept(piece, lambda e=example: steering(bridge, sparse, dense, e, circuits[e.task]))
    collect(bridge, work, solved, args.out)


def maps_sha256(bridge: si.Bridge) -> str:
    """Which bridge it is."""
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(bridge.state_dict().items()))
    return hashlib.sha256(content).hexdigest()


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in `path`; measured and put there if it is not."""
    if not path.exists():
        began = time.process_time()
        found = measure()
        write_whole(path, json.dumps(found | {"seconds": round(time.process_time() - began, 1)}))
    return json.loads(path.read_text())


def some_text(which: int) -> Tensor:
    """Held-out blocks of which none is among those by which the shipped bridge was chosen (those are 0, 6, 12 ...)."""
    return si.validation_blocks(SPARSE)[which::6]


def text_rows(bridge: si.Bridge, sparse: Any, dense: Any) -> dict[str, Any]:
    """Reconstruction, hybrid passes, and what is missing, for the bridge and the controls that are maps."""
    table = si.evaluate_bridge(
        bridge,
        sparse,
        dense,
        some_text(1)[:N_BLOCKS],
        fit_blocks=torch.cat([some_text(2), some_text(3)]),
        n_paths=N_PATHS,
        generator=torch.Generator().manual_seed(0),
    )
    return {"rows": json.loads(table.frame.to_json(orient="values", double_precision=15))}


def circuit_of(sparse: Any, task: si.Task, path: Path) -> si.Circuit:
    """The circuit in `path`, searched for if it is not there."""
    return found(path, lambda: si.find_circuit(sparse, task, generator=torch.Generator().manual_seed(0)))


def nodes_of(circuit: si.Circuit) -> list[si.Node]:
    """The nodes of a circuit, in order."""
    rows = circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None)
    return sorted(si.Node(*row) for row in rows)


def causal(bridge: si.Bridge, sparse: Any, dense: Any, name: str, path: Path) -> dict[str, Any]:
    """What ablating each node of a circuit does to both models."""
    task, generator = si.task(name, sparse.tokenizer), torch.Generator().manual_seed(0)
    pairs, fit = task.batch(N_PAIRS, "test", generator=generator), task.batch(N_FIT, "train", generator=generator)
    nodes = nodes_of(circuit_of(sparse, task, path))
    case = si.CausalCase(name, tuple(nodes), si.baseline_means(SPARSE), pairs, fit)
    variants = compared(bridge, sparse, dense, torch.cat([some_text(2), some_text(3)]), generator)
    with tqdm(total=len(nodes), desc=name, unit="node") as bar:
        effects = causal_effects(variants, dense, case, generator=generator, done=bar.update)
    sums = {"by_prompt": effects.by_prompt, "by_node": effects.by_node}
    said = {way: {kind: sum_of.tolist() for kind, sum_of in found.items()} for way, found in sums.items()}
    return {"where": name, "groups": effects.groups, "nodes": [str(node) for node in nodes], **said}


def effects_in(piece: dict[str, Any]) -> CausalEffects:
    """What `causal` has measured."""
    ways = [
        {kind: torch.tensor(rows, dtype=torch.float64) for kind, rows in piece[way].items()}
        for way in ("by_prompt", "by_node")
    ]
    return CausalEffects(piece["where"], tuple(piece["groups"]), *ways)


def causal_rows(effects: CausalEffects) -> Iterator[tuple[Any, ...]]:
    """Every measure with intervals over templates and over nodes, and agreement less that of each control."""
    generator, n_nodes = torch.Generator().manual_seed(0), len(effects.by_node[BRIDGE])

    def bounds(columns: dict[str, Tensor], by_node: dict[str, Tensor], how: Callable[[Tensor], Tensor]) -> list[float]:
        over_templates, over_nodes = (torch.cat(list(found.values()), 1) for found in (columns, by_node))
        first = of_means(over_templates, how, list(effects.groups), generator)
        second = of_means(over_nodes, how, list(range(n_nodes)), generator)
        return [*first, *second[1:]]

    for name in effects.by_prompt:
        both = [{name: sums[name]} for sums in (effects.by_prompt, effects.by_node)]
        for measure, how in MEASURES.items():
            yield "causal", effects.where, name, measure, *bounds(*both, how)
        if name != BRIDGE:
            both = [{BRIDGE: sums[BRIDGE], name: sums[name]} for sums in (effects.by_prompt, effects.by_node)]
            yield "causal", effects.where, f"bridge less {name}", "agreement", *bounds(*both, less)


def less(sums: Tensor) -> Tensor:
    """The agreement that the first half of the columns says, less that of the second."""
    return MEASURES["agreement"](sums[:, :8]) - MEASURES["agreement"](sums[:, 8:])


def steering(bridge: si.Bridge, sparse: Any, dense: Any, example: Example, path: Path) -> dict[str, Any]:
    """The curve of one behaviour, along a feature that is chosen on training prompts."""
    task, generator = si.task(example.task, sparse.tokenizer), torch.Generator().manual_seed(0)
    before, target = (sparse.tokenizer.encode(text, add_special_tokens=False) for text in example[2:])
    train, held_out = (
        pairs_between(task.batch(N_SOUGHT, split, generator=generator), before[0], target[0])
        for split in ("train", "test")
    )
    candidates = [node for node in nodes_of(circuit_of(sparse, task, path)) if node.site.endswith("_write")]
    fit = task.batch(N_SOUGHT, "train", generator=generator)
    fit = fit.rows(((fit.answer == target[0]) | (fit.foil == target[0])).nonzero()[:, 0])
    strong = strongest(sparse, train, candidates)
    curve = partial(si.steering_curve, bridge, sparse, dense, target=target[0], fit=fit)
    node, unit = chosen(curve, sparse, train, list(strong))
    held_out, values = held_out.rows(slice(N_STEERED)), [unit * value for value in VALUES]
    blocks = some_text(1)[:N_BLOCKS]
    table = curve(node, values, held_out, blocks=blocks, n_random=N_RANDOM, generator=generator)
    about = {"example": example.name, "from": example.before, "to": example.target, "n_prompts": len(held_out)}
    about |= {"effect_in_sparse_logits": strong[node], "unit": unit}
    rows = json.loads(table.frame.to_json(orient="records", double_precision=15))
    return {"rows": [about | row for row in rows]}


def pairs_between(batch: si.TaskBatch, before: int, target: int) -> si.TaskBatch:
    """Pairs of which one side continues with `before`, made the clean one, and the other with `target`."""
    turned = batch.swapped()
    forward = ((batch.answer == before) & (batch.foil == target)).nonzero()[:, 0]
    back = ((turned.answer == before) & (turned.foil == target)).nonzero()[:, 0]
    parts = batch.rows(forward), turned.rows(back)
    return si.TaskBatch(*(torch.cat(held) for held in zip(*(vars(part).values() for part in parts), strict=True)))


def strongest(sparse: Any, train: si.TaskBatch, nodes: list[si.Node]) -> dict[si.Node, float]:
    """The nodes that, holding at the last position what they hold in the other prompt, move the answer most to it."""
    table = si.patch_nodes(sparse, train, nodes=nodes, positions=[-1], direction="noising", progress=False)
    rows = table.frame.nsmallest(N_TRIED, "effect").itertuples()
    return {si.Node(int(row.layer), row.site, int(row.channel)): float(row.effect) for row in rows}


def chosen(
    curve: Callable[..., SteeringTable], sparse: Any, train: si.TaskBatch, nodes: list[si.Node]
) -> tuple[si.Node, float]:
    """Along which node the dense model moves most on training prompts, at little loss on text, and one unit of it."""
    generator, found = torch.Generator().manual_seed(0), []
    pairs, blocks = train.rows(slice(N_STEERED)), some_text(2)[:N_TEXT]
    for node in nodes:
        unit = difference(sparse, train, node)
        values = [unit * value for value in VALUES]
        table = curve(node, values, pairs, blocks=blocks, n_random=1, generator=generator, progress=False)
        frame = table.frame[table.frame.direction == "feature"]
        allowed = frame[frame.loss_change_frac < MOST_LOST]
        found.append((float(allowed.change.max()) if len(allowed) else -1.0, node, unit))
    _, node, unit = max(found)
    return node, unit


@torch.no_grad()
def difference(sparse: Any, train: si.TaskBatch, node: si.Node) -> float:
    """By how much a node holds more at the end of prompts that continue with the target than of the others."""
    hook, rows, ends = Place(node.layer, node.site).hook, torch.arange(len(train)), []
    for side in (train.corrupt, train.clean):
        _, cache = sparse.run_with_cache(side, names_filter=hook)
        ends.append(cache[hook][rows, train.last, node.channel].mean())
    return float(ends[0] - ends[1])


def collect(bridge: si.Bridge, work: Path, solved: list[str], out: Path) -> None:
    """Write what has been measured so far."""
    seconds, rows = {}, []
    pieces = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    for name, piece in pieces.items():
        seconds[name] = piece["seconds"]
    rows += [(*row, nan, nan) for row in pieces.get("text", {"rows": []})["rows"]]
    effects = [effects_in(pieces[f"causal-{task}"]) for task in solved if f"causal-{task}" in pieces]
    whole = together(effects) if len(effects) == len(solved) else []
    rows += [row for each in [*effects, *whole] for row in causal_rows(each)]
    columns = ["part", "where", "bridge", "measure", "value", "low", "high", "low_nodes", "high_nodes"]
    frame = pd.DataFrame(rows, columns=columns)
    steered = pd.DataFrame([row for name in pieces if name.startswith("steering") for row in pieces[name]["rows"]])
    write_whole(out / "bridges.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_whole(out / "bridges_steering.csv", steered.to_csv(index=False, float_format="%.6g"))
    about = {"command": "python benchmarks/bridges.py", "measured": datetime.now(UTC).date().isoformat()}
    about |= {"bridge": maps_sha256(bridge), "sparse": vars(bridge.sparse), "dense": vars(bridge.dense)}
    nodes = {each.where: len(each.by_node[BRIDGE]) for each in effects}
    about |= {"blocks": N_BLOCKS, "pairs_per_task": N_PAIRS, "nodes": nodes, "random_directions": N_RANDOM, "seed": 0}
    about |= {"torch": torch.__version__, "python": platform.python_version(), "seconds": seconds}
    write_whole(out / "bridges.json", json.dumps(about, indent=1) + "\n")
    shown = frame[(frame.part == "causal") & (frame["measure"] == "agreement")]
    print(shown.to_string(index=False))
    print(steered.to_string(index=False))


if __name__ == "__main__":
    main()
