"""The answer keys of the Tracr programs, measured: data/groundtruth/tracr_keys.json.

    python benchmarks/tracr_keys.py

Each key is what is left when everything is held or cut that can be (`measured_key`), on pairs of the train split. It is
written if it stands on the test split too, within 2 TOLERANCE of the model. A program whose key does not has parts that
matter on prompts that train hardly has; it is named, and has no key, as one has none whose answer at the last place no
letter changes. Programs that the file has are passed over, so
that the command may be stopped and started again.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.answer_key import GroundTruth
from sparse_interp.faithfulness.ground_truth import key_kl, measured_key
from sparse_interp.faithfulness.tracr import (
    DEFAULT,
    TOLERANCE,
    tracr_model,
    tracr_program,
    tracr_programs,
    tracr_task,
)
from sparse_interp.interventions.baselines import mean_activations

PATH = Path("data/groundtruth/tracr_keys.json")
N_PAIRS = 96


def measured(name: str) -> dict:
    """The key of a program, and how far it is from its model on the test split, nats."""
    program, model, generator = tracr_program(name), tracr_model(name), torch.Generator().manual_seed(0)
    task = tracr_task(program)
    empty = frozenset()
    truth = GroundTruth(name, model, task, empty, empty, program.means, program.channels)
    means = mean_activations(model, truth.blocks(task.n_pairs("train"), generator=generator))
    train, test = (
        task.batch(min(N_PAIRS, task.n_pairs(split)), split, generator=generator).both_sides()
        for split in ("train", "test")
    )
    key = measured_key(model, train, means, TOLERANCE)
    record = {"kl": key_kl(truth, key, test, means), "clear": False}
    if record["kl"] > 2 * TOLERANCE:
        tqdm.write(f"{name}: on the test split the key is {record['kl']:.1e} nats from its model")
        return record
    nodes = sorted(key.nodes)
    edges = [[nodes.index(source), nodes.index(target)] for source, target in sorted(key.edges)]
    return {**record, "clear": True, "nodes": nodes, "edges": edges}


def main() -> None:
    torch.set_num_threads(1)
    found = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    size = {name: len(tracr_program(name).channels) * tracr_program(name).n_layers for name in tracr_programs()}
    waiting = sorted(set(size) - set(found), key=lambda name: (name not in DEFAULT, size[name], name))
    for name in tqdm(waiting):
        try:
            found[name] = measured(name)
        except TaskError as error:  # a program without a task
            tqdm.write(str(error))
            found[name] = {"kl": None, "clear": False}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found[name])}" for name in size if name in found)
        unfinished = PATH.with_suffix(".partial")
        unfinished.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        unfinished.replace(PATH)
    print(f"{sum(record['clear'] for record in found.values())} of {len(found)} programs have a clear key")


if __name__ == "__main__":
    main()
