"""search_circuits: the size of a circuit depends on how it was searched for, so settings are searched too.

    trial 0        the settings as given
    trial n        settings that Optuna's TPE proposes from the trials before            (Bergstra et al. 2011)
    every trial    find_circuit's three steps, on the same prompts from the same seed, under the same stopping rule
    size at budget the smallest circuit of the first n trials, as a curve over n

Gao et al. 2025 (arXiv:2511.13653) search 256 settings per task and model; a size without its budget says little. What a
trial costs (steps, batch, pairs) and what a circuit has to reach (the bounds) are not searched.

Trials are kept in a folder as they finish: `trials.log`, a journal of Optuna's that its dashboard reads too, and the
smallest circuit so far. A search that was stopped, by whatever means, goes on where it stopped and ends as it would
have: trials that were asked for and never finished are run again with the same settings, and every proposal is drawn
from a seed of its own. Trials of one round are asked for together, before any of them is run.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from sparse_interp.circuit.find import sized
from sparse_interp.circuit.graph import Circuit
from sparse_interp.errors import CircuitError, ConfigError
from sparse_interp.interventions.prune_config import PruneConfig
from sparse_interp.interventions.pruning import learn_many
from sparse_interp.interventions.selection import Selection, split_pairs
from sparse_interp.model.checkpoint import weights_sha256
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import NodeValues
from sparse_interp.model.zoo import means_of
from sparse_interp.results import Axes, Table, lines
from sparse_interp.tasks.task import Task
from sparse_interp.tokenizer import tokenizer_hash

LOG = "trials.log"


class Range(NamedTuple):
    """Where a setting is looked for."""

    low: float
    """Smallest value; lower if the given settings are."""

    high: float
    """Largest value; higher if the given settings are."""

    log: bool = False
    """Whether values are drawn evenly on a logarithmic scale."""


RANGES = {
    "k_coef": Range(1e-8, 1e-1, log=True),
    "price_rate": Range(0.0, 0.05),
    "lr": Range(1e-3, 1e-1, log=True),
    "temperature": Range(0.1, 10.0, log=True),
    "noise": Range(0.0, 2.0),
    "noise_until_frac": Range(0.1, 0.9),
}
"""Fields of PruneConfig that are searched. Those of the paper have its ranges, but for a learning rate below 1e-3, at
which AdamW cannot carry a gate from `tau_init` to 0 in the usual number of steps."""


@dataclass(frozen=True, eq=False)
class CircuitSearch(Table):
    """One row per finished trial: its settings, and the circuit that came of them.

    `trial` counts from 0, the settings as given. `n_nodes`, `n_edges`, `kl_nats` and `loss_gap_nats` (task loss of
    circuit - task loss of model) are of the circuit on the selection pairs; where no circuit meets the stopping rule
    they are missing and `note` says why.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "trial",
        "n_nodes",
        "n_edges",
        "kl_nats",
        "loss_gap_nats",
        "seconds",
        *RANGES,
        "note",
    )

    circuit: Circuit
    """The smallest circuit: fewest nodes, of those the fewest edges, of those the first. `circuit.prune` has its
    settings; with them and the search's seed `find_circuit` finds it again where rounds are of one trial, and one like
    it where masks were learned together."""

    n_trials: int | None
    """The budget in trials; None if only seconds were counted."""

    seconds: float | None
    """The budget in seconds of trials; None if only trials were counted."""

    @property
    def size_at_budget(self) -> Table:
        """The best of the first n trials: `n_trials`, the `seconds` they took, `n_nodes`, `n_edges`, `best_trial`.

        Sizes are infinite until a trial finds a circuit.
        """
        rows, best = [], (math.inf, math.inf, math.nan)
        for row, spent in zip(self.frame.itertuples(), self.frame.seconds.cumsum(), strict=True):
            if not math.isnan(row.n_nodes):
                best = min(best, (row.n_nodes, row.n_edges, row.trial))
            rows.append((row.trial + 1, spent, *best))
        return Table(pd.DataFrame(rows, columns=["n_trials", "seconds", "n_nodes", "n_edges", "best_trial"]))

    @property
    def summary(self) -> str:
        """The size with the budget that it was found at, in a sentence."""
        limits = [f"{n:g} {unit}" for n, unit in ((self.n_trials, "trials"), (self.seconds, "s")) if n is not None]
        first = self.frame.iloc[0]
        began = (
            "no circuit" if math.isnan(first.n_nodes) else f"{first.n_nodes:.0f} nodes and {first.n_edges:.0f} edges"
        )
        assert self.circuit.prune is not None
        return (
            f"{self.circuit.n_nodes} nodes and {self.circuit.n_edges} edges after {len(self)} trials of "
            f"{self.circuit.prune.n_steps} steps, {self.frame.seconds.sum():.0f} s (budget: {' or '.join(limits)}; "
            f"the settings as given: {began})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Nodes of the smallest circuit over the number of trials."""
        return lines(self.size_at_budget.frame.dropna(subset="best_trial"), x="n_trials", y="n_nodes", ax=ax)


def search_circuits(
    model: AnyModel,
    task: Task,
    base: PruneConfig | None = None,
    *,
    n_trials: int | None = None,
    seconds: float | None = None,
    at_once: int = 4,
    folder: Path | str | None = None,
    baseline: NodeValues | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> CircuitSearch:
    """Search settings for the smallest circuit that `find_circuit` finds with them, within a stated budget.

    Args:
        model: ours, or a dense one of TransformerLens.
        task: prompts in the model's own tokens.
        base: the settings to begin with; what is not in `RANGES` stays as it is here. None takes the defaults.
        n_trials: stop after so many finished trials, those of earlier calls in the same folder included.
        seconds: stop once finished trials have taken so long, earlier calls included; a round is never cut short.
        at_once: trials of a round, which are asked for and learned together; memory grows with it.
        folder: where trials are kept; None keeps them in memory, and an interruption loses them.
        baseline: what nodes outside a circuit are held at, as for `find_circuit`.
        generator: its initial seed is that of every trial; it is neither advanced nor does its state matter.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: without a budget, with one below 1, or without Optuna.
        CircuitError: if the folder holds another search or another process is searching in it, if the baseline is
            another model's, or if no trial found a circuit.
        CheckpointError: if no baseline is given and none is kept for these weights.
        TaskError: if the task has too few pairs, or prompts longer than the model's context.
    """
    base, model = base or PruneConfig(), hooked(model)
    _check_budget(n_trials, seconds, at_once)
    task.check_fits(model.cfg.n_ctx)
    baseline = means_of(model) if baseline is None else baseline
    baseline.check(model.cfg)
    seed = generator.initial_seed()
    drawn = torch.Generator().manual_seed(seed)
    train, select = split_pairs(task, base, drawn)
    selection = Selection(model, select, baseline, frozen_norms=base.frozen_norms, per_position=base.per_position)
    told = _origin(model, task, base, baseline) | {"seed": seed, "at_once": at_once}
    with _journal(None if folder is None else Path(folder), _space(base), told) as trials:
        with tqdm(total=n_trials, initial=len(trials.finished), disable=not progress, desc="trials") as bar:
            while not trials.spent(n_trials, seconds):
                numbers, configs = zip(*trials.next_round(base, seed, at_once, n_trials), strict=True)
                began, generators = time.monotonic(), [drawn.clone_state() for _ in configs]
                learned = learn_many(model, train, configs, baseline, generators=generators)
                share = (time.monotonic() - began) / len(configs)
                for number, config, search in zip(numbers, configs, learned, strict=True):
                    began, circuit, note = time.monotonic(), None, ""
                    try:
                        circuit = sized(model, task, search, selection, baseline, config, seed=seed)
                    except CircuitError as error:
                        note = str(error)
                    trials.record(number, circuit, share + time.monotonic() - began, note)
                    bar.update()
                    bar.set_postfix_str(f"smallest {trials.size_of_best()}")
        return CircuitSearch(trials.frame(), trials.best(model, task), n_trials, seconds)


def _check_budget(n_trials: int | None, seconds: float | None, at_once: int) -> None:
    if n_trials is None and seconds is None:
        raise ConfigError("a search needs a budget: pass n_trials, seconds, or both (the first to be spent ends it).")
    for name, value in {"n_trials": n_trials, "at_once": at_once}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}, and a search needs at least 1.")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds={seconds}; it must be above 0.")


def _origin(model: HookedModel, task: Task, base: PruneConfig, baseline: NodeValues) -> dict[str, Any]:
    """Everything that decides what a trial finds, as JSON says it."""
    held = hashlib.sha256(baseline.kind.encode())
    for place in sorted(baseline.values):
        held.update(f"{place}".encode() + baseline[place].detach().cpu().double().numpy().tobytes())
    return {
        "model": f"{model.cfg.model_name} {weights_sha256(model)}",
        "task": f"{task.name} {task.templates_sha256}",
        "tokenizer": tokenizer_hash(task.tokenizer),
        "baseline": f"{baseline.kind} {held.hexdigest()}",
        **{f"setting {name}": list(v) if isinstance(v, tuple) else v for name, v in asdict(base).items()},
        **{f"range of {name}": list(where) for name, where in _space(base).items()},
    }


def _space(base: PruneConfig) -> dict[str, Range]:
    """The ranges, each wide enough for the setting as given; a 0 that no logarithm has is not searched."""
    space = {}
    for name, (low, high, log) in RANGES.items():
        given = getattr(base, name)
        if given > 0 or not log:
            space[name] = Range(min(low, given), max(high, given), log)
    return space


# -- where trials are kept ------------------------------------------------------------------------------------------


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "a search over settings needs Optuna, which is not installed here: pip install 'sparse_interp[search]'."
        ) from error
    return optuna


@contextmanager
def _journal(folder: Path | None, space: dict[str, Range], origin: Mapping[str, Any]) -> Iterator["_Trials"]:
    """The trials in `folder`, which nobody else uses inside the block, or none yet."""
    optuna = _optuna()
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if folder is None:
            yield _Trials(optuna, optuna.create_study(), folder, space, origin)
            return
        with _alone(folder):
            _mend(folder / LOG)
            backend = optuna.storages.journal.JournalFileBackend(str(folder / LOG))
            try:
                storage = optuna.storages.JournalStorage(backend)
                study = optuna.create_study(study_name="circuits", storage=storage, load_if_exists=True)
                trials = _Trials(optuna, study, folder, space, origin)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, CircuitError):
                    raise
                raise CircuitError(f"{folder / LOG} is damaged ({error}); search in another folder.") from error
            yield trials
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside the block no other process searches in `folder`; the lock ends with the process that holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".searching")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CircuitError(f"another process is searching in {folder}; wait for it, or use another folder.") from error
    except OSError as error:
        raise CircuitError(f"cannot write to {folder} ({error.strerror}); choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _mend(log: Path) -> None:
    """Take away what a process that was killed while writing left: half a line, and its lock."""
    log.with_name(log.name + ".lock").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        written = log.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            partial = log.with_name(log.name + ".partial")
            partial.write_bytes(written[:whole])
            partial.replace(log)


class _Trials:
    """The trials of one search: asked for, run, recorded."""

    def __init__(self, optuna: Any, study: Any, folder: Path | None, space: dict[str, Range], origin: Any):
        self.optuna, self.study, self.folder = optuna, study, folder
        self.state = optuna.trial.TrialState
        self.circuits: dict[int, Circuit] = {}
        if "search" not in study.user_attrs:
            study.set_user_attr("search", dict(origin))
        self._check(study.user_attrs["search"], origin)
        self.space = space
        for trial in self._in(self.state.RUNNING):
            if trial.params.keys() != self.space.keys():  # interrupted while it was asked for
                study.tell(trial.number, state=self.state.FAIL)

    def _check(self, stored: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        for name in [*origin, *stored]:
            if stored.get(name) != origin.get(name):
                raise CircuitError(
                    f"{self.folder} holds another search: its {name} is {stored.get(name)}, and here it is "
                    f"{origin.get(name)}. Search in another folder, or with what that search was begun with."
                )

    def _in(self, *states: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=states)

    @property
    def finished(self) -> list[Any]:
        """Trials that are done, with or without a circuit, in the order in which they were asked for."""
        return self._in(self.state.COMPLETE, self.state.PRUNED)

    def spent(self, n_trials: int | None, seconds: float | None) -> bool:
        """Whether either budget is used up."""
        done = self.finished
        took = sum(trial.user_attrs["found"]["seconds"] for trial in done)
        return (n_trials is not None and len(done) >= n_trials) or (seconds is not None and took >= seconds)

    def next_round(
        self, base: PruneConfig, seed: int, at_once: int, n_trials: int | None
    ) -> list[tuple[int, PruneConfig]]:
        """Numbers and settings of the trials to run: those that never finished, and new ones up to the round's end."""
        n_done, n_waiting = len(self.finished), len(self._in(self.state.RUNNING))
        end = (n_done // at_once + 1) * at_once
        for n in range(n_done + n_waiting, end if n_trials is None else min(end, n_trials)):
            if n == 0:
                given = {name: getattr(base, name) for name in self.space}
                self.study.enqueue_trial(given, skip_if_exists=True)
            drawn = int(hashlib.sha256(f"{seed} {n}".encode()).hexdigest()[:8], 16)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=drawn)
            trial = self.study.ask()
            for name, (low, high, log) in self.space.items():
                trial.suggest_float(name, low, high, log=log)
        return [(trial.number, replace(base, **trial.params)) for trial in self._in(self.state.RUNNING)]

    def record(self, number: int, circuit: Circuit | None, seconds: float, note: str) -> None:
        """Write down what came of a trial; its circuit is kept first, if it is the smallest so far."""
        found: dict[str, Any] = {"seconds": seconds, "note": note}
        if circuit is not None:
            scores = circuit.scores.set_index("measure").value
            found |= {
                "n_nodes": circuit.n_nodes,
                "n_edges": circuit.n_edges,
                "kl_nats": scores["KL(model || circuit)"],
                "loss_gap_nats": scores["task loss of circuit"] - scores["task loss of model"],
            }
            best = self._best()
            if best is None or (circuit.n_nodes, circuit.n_edges, number) < _size(best):
                self._keep(number, circuit)
        (trial,) = [trial for trial in self._in(self.state.RUNNING) if trial.number == number]
        self.optuna.trial.Trial(self.study, trial._trial_id).set_user_attr("found", found)
        if circuit is None:
            self.study.tell(number, state=self.state.PRUNED)
        else:
            self.study.tell(number, circuit.n_nodes)
        self._forget_others()

    def _best(self) -> Any:
        return min(self._in(self.state.COMPLETE), key=_size, default=None)

    def size_of_best(self) -> str:
        """How many nodes the smallest circuit has, in words."""
        best = self._best()
        return "none" if best is None else f"{best.user_attrs['found']['n_nodes']} nodes"

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"trial-{number}.json"

    def _keep(self, number: int, circuit: Circuit) -> None:
        self.circuits[number] = circuit
        if self.folder is not None:
            circuit.save(self._path(number))

    def _forget_others(self) -> None:
        best = self._best()
        if best is None or self.folder is None:
            return
        for path in self.folder.glob("trial-*.*"):
            if path.stem != self._path(best.number).stem:
                path.unlink(missing_ok=True)

    def best(self, model: HookedModel, task: Task) -> Circuit:
        """The smallest circuit."""
        best = self._best()
        if best is None:
            notes = [trial.user_attrs["found"]["note"] for trial in self.finished]
            raise CircuitError(f"none of {len(notes)} trials found a circuit; the first says: {notes[0]}")
        if best.number in self.circuits:
            return self.circuits[best.number]
        return Circuit.load(self._path(best.number), model, task)

    def frame(self) -> pd.DataFrame:
        """One row per finished trial."""
        rows = [{"trial": i} | trial.user_attrs["found"] | trial.params for i, trial in enumerate(self.finished)]
        return pd.DataFrame(rows, columns=list(CircuitSearch.columns))


def _size(trial: Any) -> tuple[int, int, int]:
    found = trial.user_attrs["found"]
    return found["n_nodes"], found["n_edges"], trial.number
