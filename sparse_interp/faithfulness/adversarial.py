"""Adversarial inputs: prompts on which a model fails if it does what its circuit is read to do.

A reading (`circuit/readings.py`) says what a head looks at. Each rule turns one such statement into an edit of prompts
that leaves the right answer as it was, and circuit and model are asked again, beside a control of the same length:

    rule        what the reading says                  edit                             control
    distractor  heads find the changed token at the    the pair's other prompt, with    as many free tokens before
                answer position                        its answer, before the prompt    the prompt
    dilution    heads pay every further token, and     free tokens between the          the same prompts, the heads
                what they looked at gets less          changed token and the end        made to look as before
    lure        a head pays a free token far more      that token between the           the free tokens that it
                than others                            changed token and the end        pays least

A token is *free* where the task itself says so: it is a word or a part of one, its number varies among prompts of one
template, and no answer and no change has it. Between the changed token and the end only those are put that vary in
number there. What the circuit does on the edited prompts is the prediction; what the model does is the test. `fails`
means that accuracy falls, both from before and against the control, by more than its 95 % interval over templates;
`weaker`, that the logit difference does. An edit for which the circuit holds is listed too: the algorithm withstands
it. Where no head fits a rule, nothing is suggested.

Context dilution of a head that averages: Gao et al. 2025 (arXiv:2511.13653), bracket counting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sparse_interp.circuit.drives import N_SAID, N_SEEN, Text, token_text
from sparse_interp.circuit.graph import Circuit
from sparse_interp.circuit.looking import record
from sparse_interp.circuit.pictures import shown
from sparse_interp.circuit.readings import HeadReadings, read_heads
from sparse_interp.errors import TaskError
from sparse_interp.faithfulness.scores import groups_of, mean_of
from sparse_interp.interventions.ablation import FwdHooks
from sparse_interp.interventions.answers import answer_logits
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import PATTERN_HOOK
from sparse_interp.model.text import evaluating
from sparse_interp.results import Axes, Table, bars_with_intervals
from sparse_interp.tasks.pairs import special_ids, token_ids
from sparse_interp.tasks.task import Task, TaskBatch, is_correct, logit_difference

NEEDED = 0.1
"""Share of the circuit's mean logit difference that a head has to be worth, at the answer position, to be attacked; and
share of its attention that it has to pay a token to be said to look for it."""

FINDS = 3.0
"""And how many times that of an average over tokens."""

DILUTED = 0.75
"""Share of its attention that a head has to be left with, at most, for dilution to be suggested."""

N_LURES, N_NAMED = 4, 3
"""Copies of a lure, and heads whose numbers a sentence says."""

LONGEST = 3
"""Prompts are grown by dilution to at most so many times their mean length, bos included."""

FEWEST = 8
"""Prompts that have to fit into the context for a rule to be tried."""

Head = tuple[int, int]
"""Layer and number of a head."""


@dataclass(frozen=True, eq=False)
class AdversarialTable(Table):
    """Two rows per edit, of the circuit (the prediction) and the model (the test): accuracy and mean logit difference
    before, after and with the control; by how much both fall below the control, with intervals; and the `outcome`:
    `fails`, `weaker` or `holds`. No rows: the reading suggests no such edit, and `note` says why."""

    note: str = ""
    """Which rules found nothing to suggest, and why."""

    reading: HeadReadings | None = None
    """What the edits were derived from."""

    columns: ClassVar[tuple[str, ...]] = (
        "rule", "heads", "why", "edit", "control", "n_tokens", "n_prompts", "on",
        "accuracy_before", "accuracy", "accuracy_control", "accuracy_fall", "accuracy_low", "accuracy_high",
        "logits_before", "logits", "logits_control", "logits_fall", "logits_low", "logits_high",
        "outcome", "example")  # fmt: skip

    @property
    def weaknesses(self) -> list[str]:
        """Rules by which the circuit is predicted to fail and the model does fail."""
        fails = self.frame[self.frame.outcome == "fails"]
        by_rule = fails.groupby(["rule", "heads"], sort=False).on.nunique()
        return list(dict.fromkeys(rule for (rule, _), n in by_rule.items() if n == 2))

    @property
    def summary(self) -> str:
        """What was suggested and what came of it, in sentences."""
        said = []
        for _, rows in self.frame.groupby(["rule", "heads"], sort=False):
            circuit, model = (rows[rows.on == on].iloc[0] for on in ("circuit", "model"))
            said.append(
                f"{circuit.rule.capitalize()} ({circuit.why}): {circuit.edit}, {circuit.n_tokens} tokens. The circuit "
                f"{circuit.outcome}, the model {model.outcome}: right on {model.accuracy_before:.0%} before, "
                f"{model.accuracy:.0%} after, {model.accuracy_control:.0%} with {model.control}; logit difference "
                f"{model.logits_before:.2f}, {model.logits:.2f}, {model.logits_control:.2f}."
            )
        return " ".join([*said, self.note]) or "None suggested."

    def plot(self, ax: Axes | None = None) -> Axes:
        """By how much accuracy falls below the control."""
        rows = self.frame.assign(name=self.frame.rule + ", heads " + self.frame.heads + ": " + self.frame.on)
        return bars_with_intervals(
            rows, label="name", value="accuracy_fall", low="accuracy_low", high="accuracy_high", by="on", reference=0.0,
            ax=ax,
        )  # fmt: skip


class Edit(NamedTuple):
    """One way to change prompts, with what it is compared with."""

    rule: str
    heads: Sequence[Head]
    why: str
    """What the reading says, with its numbers."""
    edit: str
    """What is done, in words."""
    control: str
    """What is done instead, in words."""
    before: TaskBatch
    """Prompts as they were, both sides of every pair."""
    after: TaskBatch
    """The same, edited."""
    neutral: TaskBatch | None
    """The same, with the control's edit; None where the control is to have the heads look as before."""
    at: Int[Tensor, " batch"]
    """Where tokens were inserted."""

    @property
    def n_tokens(self) -> int:
        """Tokens inserted, at most."""
        return int((self.after.lengths - self.before.lengths).max())


class _Reading(NamedTuple):
    """What the rules draw on."""

    model: HookedModel
    circuit: Circuit
    task: Task
    heads: HeadReadings
    needed: list[Head]
    """Heads that the circuit needs at the answer position."""
    free: list[int]
    """Tokens that are free between the changed token and the end."""
    free_anywhere: list[int]
    """Tokens that are free somewhere in the prompt."""
    pairs: TaskBatch
    """Test prompts, both sides of every pair."""
    whole: Bool[Tensor, " batch"]
    """Prompts of pairs whose answers are spelt by one token."""
    generator: torch.Generator

    def paid(self, head: Head) -> pd.DataFrame:
        """Free tokens with the attention that a head pays each, the most first."""
        keys = self.heads.keys.frame
        return keys[(keys.layer == head[0]) & (keys["head"] == head[1]) & keys.token_id.isin(self.free)]

    def drawn(self, n_rows: int, n: int, among: Sequence[int]) -> list[list[int]]:
        """`n` of the tokens `among` for each of the first `n_rows` prompts, the same for both sides of a pair."""
        half = n_rows // 2
        drawn = torch.randint(len(among), (half, n), generator=self.generator, device=self.generator.device).tolist()
        return 2 * [[among[i] for i in row] for row in drawn]


def adversarial_inputs(
    model: AnyModel,
    circuit: Circuit,
    task: Task,
    *,
    n_pairs: int = 64,
    split: str = "test",
    generator: torch.Generator,
) -> AdversarialTable:
    """Edits of prompts on which `model` fails if it does what `circuit` is read to do, tried on both.

    Args:
        model: the model that the circuit belongs to.
        circuit: what is read, on `n_pairs` pairs of the split `train`.
        task: where prompts come from; it has to be the circuit's.
        n_pairs: pairs that are read, and pairs that are edited.
        split: split of the prompts that are edited.
        generator: draws prompts, tokens and intervals.

    Raises:
        CircuitError: if the circuit belongs to another model.
        TaskError: if the task lacks one of the splits.
    """
    model = hooked(model)
    if split not in task.splits or "train" not in task.splits:
        raise TaskError(
            f"adversarial inputs are read off the split 'train' and tried on {split!r}; task {task.name!r} has "
            f"{', '.join(task.splits)}."
        )
    seen = task.batch(n_pairs, "train", generator=generator)
    heads = read_heads(circuit, model, seen)
    encoded = task.encoded(n_pairs, split, generator=generator)
    whole = torch.tensor([row.is_whole for row in encoded]).repeat(2)
    pairs = task.collated(encoded).both_sides()
    needed = _needed_heads(model, circuit, heads, seen.both_sides(), generator)
    free = [free_tokens(seen, token_text(model), anywhere=anywhere) for anywhere in (False, True)]
    reading = _Reading(model, circuit, task, heads, needed, *free, pairs, whole, generator)
    edits, notes = [], []
    for rule in (_distractor, _dilution, _lure) if needed else ():
        found = rule(reading)
        edits += [found] if isinstance(found, Edit) else []
        notes += [found] if isinstance(found, str) else []
    rows = [row for edit in edits for row in _tried(reading, edit)]
    note = f"None suggested by the other rules: {'; '.join(notes)}." if edits and notes else ""
    notes = notes or ["the circuit needs no single head at the answer position, or is right no more often than chance"]
    note = note if edits else f"None suggested: {'; '.join(notes)}."
    return AdversarialTable(pd.DataFrame(rows, columns=list(AdversarialTable.columns)), note, heads)


def free_tokens(batch: TaskBatch, text: Text, *, anywhere: bool = False) -> list[int]:
    """Words, whole or in part, whose number varies among prompts of one template of `batch`, and that are in no answer
    and no change; counted between the changed tokens and the end, or `anywhere` in the prompt.

    The answer does not hang on them: where the template is the same, and the same is changed, so is the answer.
    """
    changed = batch.clean != batch.corrupt
    pos = torch.arange(batch.clean.shape[1])
    start = torch.zeros(len(batch)) if anywhere else torch.where(changed, pos, -1).amax(1)
    counted = (pos > start[:, None]) & (pos < batch.lengths[:, None])
    told = {*batch.clean[changed].tolist(), *batch.corrupt[changed].tolist()}
    told |= {*batch.answer.tolist(), *batch.foil.tolist()}
    free: set[int] = set()
    for template in batch.template.unique().tolist():
        rows = [batch.clean[row][counted[row]].tolist() for row in (batch.template == template).nonzero()[:, 0]]
        tokens = {token for row in rows for token in row} - told - free
        free |= {token for token in tokens if len({row.count(token) for row in rows}) > 1}
    return sorted(token for token in free if text(token).removeprefix(" ").replace("_", "").isalnum())


def _needed_heads(
    model: HookedModel, circuit: Circuit, heads: HeadReadings, batch: TaskBatch, generator: torch.Generator
) -> list[Head]:
    """Heads that the circuit needs at the answer position; none where it is right no more often than chance."""
    with evaluating(model), circuit.running(model):
        answers = _answers(model, batch)
    if not mean_of(answers.correct, groups_of(batch), generator).low > 0.5:
        return []
    frame, total = heads.heads.frame, answers.logits.mean().item()
    worth = frame[(frame.knockout_at_answer >= NEEDED * total) & (frame.knockout_at_answer >= frame.knockout / 2)]
    return list(zip(worth.layer.tolist(), worth["head"].tolist(), strict=True))


# -- the rules --------------------------------------------------------------------------------------------------------


def _distractor(reading: _Reading) -> Edit | str:
    """Heads that find the changed token: its twin stands before the prompt."""
    roles = reading.heads.roles.frame
    rows = roles[
        (roles["query"] == "answer")
        & (roles.role == "changed")
        & (roles.mass >= (FINDS * roles.even_mass).clip(lower=NEEDED))
    ]
    found = {(row.layer, row.head): row for row in rows.itertuples() if (row.layer, row.head) in reading.needed}
    if not found:
        return "no head that is needed finds the changed token"
    if not reading.free_anywhere:
        return "the task has no free tokens for the control of a distractor"
    tokenizer, pairs = reading.task.tokenizer, reading.pairs
    gap = token_ids("\n", tokenizer)
    gap = gap if len(gap) == 1 else []
    fits = reading.whole & (2 * pairs.lengths + len(gap) <= reading.model.cfg.n_ctx)
    if int(fits.sum()) < FEWEST:
        return f"a distractor does not fit into {reading.model.cfg.n_ctx} tokens, or its answer is not one token"
    pairs = pairs.rows(fits.nonzero()[:, 0])
    fronts = [
        [*pairs.corrupt[row, 1:n].tolist(), int(pairs.foil[row]), *gap] for row, n in enumerate(pairs.lengths.tolist())
    ]
    free = reading.drawn(len(pairs), max(map(len, fronts)), reading.free_anywhere)
    neutral = [tokens[: len(front) - len(gap)] + gap for tokens, front in zip(free, fronts, strict=True)]
    at, pad = torch.ones(len(pairs), dtype=torch.long), special_ids(tokenizer)[1]
    paid = ", ".join(f"{_name(head)} with {row.mass:.0%} of its attention" for head, row in found.items())
    return Edit(
        "distractor", list(found), f"the changed token is looked at from the answer position by head {paid}",
        "the pair's other prompt, answered, before the prompt", "free tokens before it",
        pairs, inserted(pairs, at, fronts, pad), inserted(pairs, at, neutral, pad), at,
    )  # fmt: skip


def _dilution(reading: _Reading) -> Edit | str:
    """Heads that pay every free token: more of them leave less for the rest."""
    if not reading.free:
        return "the task has no free tokens to dilute with"
    cfg, pairs = reading.model.cfg, reading.pairs
    n = min(cfg.n_ctx - int(pairs.lengths.max()), int((LONGEST - 1) * pairs.lengths.double().mean()))
    if n < 1:
        return f"there is no room for further tokens in {cfg.n_ctx}"
    left = {}
    for head in reading.needed:
        rows = reading.paid(head)
        each = float((rows.attention * rows.seen).sum() / max(1, rows.seen.sum()))
        if (share := 1 / (1 + n * each)) <= DILUTED:
            left[head] = (each, share)
    if not left:
        return f"{n} free tokens would leave every needed head more than {DILUTED:.0%} of its attention"
    said = "; ".join(
        f"head {_name(head)} pays each free token {each:.1%}, and {n} more leave {share:.0%} for the others"
        for head, (each, share) in list(left.items())[:N_NAMED]
    )
    said += f"; {len(left) - N_NAMED} more heads do likewise" * (len(left) > N_NAMED)
    at, pad = pairs.last.clone(), special_ids(reading.task.tokenizer)[1]
    after = inserted(pairs, at, reading.drawn(len(pairs), n, reading.free), pad)
    return Edit(
        "dilution", list(left), f"at the answer position {said}", "free tokens before the last one",
        "these heads made to look as before", pairs, after, None, at,
    )  # fmt: skip


def _lure(reading: _Reading) -> Edit | str:
    """A head that pays one free token far more than the others: that token, again and again."""
    best = None
    for head in reading.needed:
        rows = reading.paid(head)
        rows = rows[rows.seen >= N_SEEN]
        if len(rows) < 2:
            continue
        each = float((rows.attention * rows.seen).sum() / rows.seen.sum())
        top = rows.iloc[0]
        if top.attention >= max(FINDS * each, NEEDED) and (best is None or top.attention > best[1].attention):
            best = (head, top, each, rows)
    if best is None:
        return "no needed head pays a free token far more than the others"
    head, top, each, rows = best
    pairs = reading.pairs
    n = min(N_LURES, reading.model.cfg.n_ctx - int(pairs.lengths.max()))
    if n < 1:
        return f"there is no room for further tokens in {reading.model.cfg.n_ctx}"
    least = rows.sort_values("attention", kind="stable").token_id.tolist()[:N_SAID]
    at, pad = pairs.last.clone(), special_ids(reading.task.tokenizer)[1]
    text = token_text(reading.model)
    why = (
        f"at the answer position head {_name(head)} pays {shown(top.token)} {top.attention:.0%}, free tokens {each:.1%}"
    )
    return Edit(
        "lure", [head], why, f"{shown(top.token)} before the last token",
        " and ".join(shown(text(token)) for token in least) + " there", pairs,
        inserted(pairs, at, [n * [int(top.token_id)]] * len(pairs), pad),
        inserted(pairs, at, reading.drawn(len(pairs), n, least), pad), at,
    )  # fmt: skip


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def inserted(batch: TaskBatch, at: Int[Tensor, " batch"], what: Sequence[Sequence[int]], pad: int) -> TaskBatch:
    """`batch` with the tokens `what[row]` put in before position `at[row]` of both prompts of every pair."""

    def longer(prompts: Tensor) -> Tensor:
        rows = []
        for row, (start, tokens) in enumerate(zip(at.tolist(), what, strict=True)):
            ids = prompts[row, : int(batch.lengths[row])].tolist()
            rows.append([*ids[:start], *tokens, *ids[start:]])
        width = max(map(len, rows))
        return torch.tensor([row + [pad] * (width - len(row)) for row in rows])

    lengths = batch.lengths + torch.tensor([len(tokens) for tokens in what])
    return replace(batch, clean=longer(batch.clean), corrupt=longer(batch.corrupt), lengths=lengths)


# -- trying them ------------------------------------------------------------------------------------------------------


class _Answers(NamedTuple):
    correct: Float[Tensor, " batch"]
    logits: Float[Tensor, " batch"]


@torch.no_grad()
def _answers(model: HookedModel, batch: TaskBatch, hooks_of: Callable[[slice], FwdHooks] | None = None) -> _Answers:
    """Whether each prompt is answered rightly, and its logit difference; `hooks_of` a range of rows acts on them."""
    correct, logits = [], []
    for start in range(0, len(batch), CHUNK):
        rows = slice(start, start + CHUNK)
        part = batch.rows(rows)
        with model.hooks(fwd_hooks=[] if hooks_of is None else hooks_of(rows)):
            answers = answer_logits(model, part)
        correct.append(is_correct(answers, part).cpu())
        logits.append(logit_difference(answers, part).cpu())
    return _Answers(torch.cat(correct), torch.cat(logits))


CHUNK = 64
"""Prompts that are run together."""


def _tried(reading: _Reading, edit: Edit) -> list[tuple]:
    """The two rows of an edit."""
    model, rows = reading.model, []
    heads = ", ".join(map(_name, edit.heads))
    length = int(edit.after.lengths[0])
    example = reading.task.tokenizer.decode(edit.after.clean[0, 1:length].tolist())
    start = (edit.rule, heads, edit.why, edit.edit, edit.control, edit.n_tokens, len(edit.before))
    with evaluating(model):
        with reading.circuit.running(model):
            circuit = _measured(reading, edit)
        for on, measured in (("circuit", circuit), ("model", _measured(reading, edit))):
            rows.append((*start, on, *measured, example))
    return rows


def _measured(reading: _Reading, edit: Edit) -> tuple:
    """Accuracy and logit difference before, after and with the control, the falls, and the outcome."""
    model, generator = reading.model, reading.generator
    before, after = _answers(model, edit.before), _answers(model, edit.after)
    if edit.neutral is not None:
        control = _answers(model, edit.neutral)
    else:
        control = _answers(model, edit.after, _looking_as_before(model, edit))
    groups = groups_of(edit.before)
    cells: list[float] = []
    lows = {}
    for name in ("correct", "logits"):
        was, now, beside = (getattr(run, name) for run in (before, after, control))
        fall = mean_of(beside - now, groups, generator)
        lows[name] = min(fall.low, mean_of(was - now, groups, generator).low)
        cells += [was.mean().item(), now.mean().item(), beside.mean().item(), *fall]
    outcome = "fails" if lows["correct"] > 0 else "weaker" if lows["logits"] > 0 else "holds"
    return (*cells, outcome)


def _looking_as_before(model: HookedModel, edit: Edit) -> Callable[[slice], FwdHooks]:
    """Hooks under which heads attend, from the answer position, to what they attended to before tokens went in."""
    layers = {layer for layer, _ in edit.heads}
    patterns = record(model, edit.before, layers).patterns
    grown = edit.after.lengths - edit.before.lengths
    old = torch.arange(edit.before.clean.shape[1])
    new = old + grown[:, None] * (old >= edit.at[:, None])  # where each position of the old prompt stands now

    def hooks_of(rows: slice) -> FwdHooks:
        part, was = edit.after.rows(rows), edit.before.rows(rows)

        def look(layer: int) -> Callable:
            def hook(pattern: Tensor, hook: HookPoint) -> Tensor:
                changed = pattern.clone()
                for row, (last, n) in enumerate(zip(part.last.tolist(), was.lengths.tolist(), strict=True)):
                    for _, head in (h for h in edit.heads if h[0] == layer):
                        attention = torch.zeros_like(pattern[row, head, last])
                        there = patterns[layer][rows][row, head, n - 1, :n]
                        attention[new[rows][row, :n].to(pattern.device)] = there.to(pattern)
                        changed[row, head, last] = attention
                return changed

            return hook

        return [(PATTERN_HOOK.format(layer=layer), look(layer)) for layer in sorted(layers)]

    return hooks_of
