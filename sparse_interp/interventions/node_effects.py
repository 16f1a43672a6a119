"""What patching a node does: the question that exact sweeps and estimates answer, and the table of their answers.

    denoising    the corrupt prompts run, and one node is as on the clean prompts
    noising      the clean prompts run, and one node is as on the corrupt prompts

    effect          =  metric with the node patched - metric of the run            means over prompts
    recovered_frac  =  effect / (metric of the run that nodes come from - metric of the run)

(Meng et al. 2022, arXiv 2202.05262; Heimersheim & Nanda 2024, arXiv 2404.15255, on the two directions.) The metric is
always asked about the answer and the foil of the clean prompt. Padding is neither patched nor asked.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_interp.axes import PerPrompt, Resid, Tokens
from sparse_interp.errors import CircuitError, ConfigError, TaskError
from sparse_interp.interventions.answers import AnswerLogits
from sparse_interp.model.dense import AnyModel, HookedModel, hooked
from sparse_interp.model.sites import NODE_SITES, SITES, Node, Place, check_nodes, places, width
from sparse_interp.results import Axes, Table, bars_with_intervals, heatmap
from sparse_interp.tasks.task import Metric, TaskBatch

DIRECTIONS = ("denoising", "noising")

Positions = str | Sequence[int] | None
"""None patches a node at every position at once; `each` at one after the other; a list at each of those alone."""


@dataclass(frozen=True, eq=False)
class RankTable(Table):
    """How well one table orders nodes as another does: one row per site, and one for all of them.

    `site`, `n_nodes`, `spearman` (of their effects, ties sharing their mean rank); and since on a sparse model most
    nodes do nothing by either table, which alone is agreement: `n_moved`, the nodes with an effect in either table,
    and `spearman_moved`, the same among them. Not a number where one of the two tables has no order.
    """

    columns: ClassVar[tuple[str, ...]] = ("site", "n_nodes", "spearman", "n_moved", "spearman_moved")

    @property
    def overall(self) -> float:
        """The rank correlation over all nodes."""
        return float(self.frame.spearman.iloc[-1])

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar for each site."""
        frame = self.frame.assign(low=float("nan"))
        return bars_with_intervals(frame, label="site", value="spearman", low="low", high="low", ax=ax)


@dataclass(frozen=True, eq=False)
class PatchingTable(Table):
    """One row per patched node, or node and position; means over prompts.

    `layer`, `site`, `channel`, with positions `pos` (negative ones count from each prompt's end), `metric` (with the
    node patched), `effect` (its change) and `recovered_frac` (that as a share of the difference between the two runs).
    """

    columns: ClassVar[tuple[str, ...]] = ("layer", "site", "channel", "metric", "effect", "recovered_frac")

    def rank_correlation(self, other: "PatchingTable") -> RankTable:
        """Spearman's rank correlation of the effects of this table with those of `other`, by site and over all.

        Raises:
            CircuitError: unless both tables are of the same nodes and positions.
        """
        keys = [name for name in ("layer", "site", "channel", "pos") if name in self.frame]
        if "pos" in other.frame and "pos" not in keys:
            raise CircuitError("one table has positions and the other has not: sweep both with the same positions.")
        both = self.frame[[*keys, "effect"]].merge(other.frame[[*keys, "effect"]], on=keys, validate="one_to_one")
        if not len(both) == len(self) == len(other):
            raise CircuitError(
                f"the tables share {len(both)} rows of {len(self)} and {len(other)}; expected the same nodes and "
                "positions in both."
            )
        parts = [(site, both[both.site == site]) for site in dict.fromkeys(both.site)] + [("all", both)]
        rows = []
        for site, part in parts:
            moved = part[(part.effect_x != 0) | (part.effect_y != 0)]
            rows.append((site, len(part), _spearman(part), len(moved), _spearman(moved)))
        return RankTable(pd.DataFrame(rows, columns=list(RankTable.columns)))

    def plot(self, ax: Axes | None = None, *, n: int = 30) -> Axes:
        """The `n` nodes with the largest effects: bars coloured by site, or with positions a heat map."""
        nodes = "L" + self.frame.layer.astype(str) + "." + self.frame.site + "." + self.frame.channel.astype(str)
        frame = self.frame.assign(node=nodes)
        strongest = frame.groupby("node").effect.agg(lambda effects: effects.abs().max()).nlargest(n).index
        frame = frame[frame.node.isin(strongest)]
        if "pos" in frame:
            return heatmap(frame, x="pos", y="node", value="effect", ax=ax)
        frame = frame.sort_values("effect", key=abs, ascending=False).assign(low=float("nan"))
        return bars_with_intervals(
            frame, label="node", value="effect", low="low", high="low", by="site", reference=0.0, ax=ax
        )


def _spearman(part: pd.DataFrame) -> float:
    """Pearson's correlation of the ranks."""
    x, y = (part[name].rank() for name in ("effect_x", "effect_y"))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm else float("nan")


class Question:
    """Which nodes to patch, at which positions, in which direction, and what to read off.

    Args:
        model: ours, or a dense one of TransformerLens.
        batch: clean and corrupt prompts.
        metric: logits and batch -> one number per prompt.
        sites: sites whose nodes are meant, unless `nodes` names them.
        nodes: nodes that are meant, in any order.
        positions: see `Positions`; negative numbers count from each prompt's end.
        direction: `denoising` or `noising`.

    Raises:
        ConfigError: for an unknown site, direction or position.
        CircuitError: for a node that the model does not have.
    """

    def __init__(
        self,
        model: AnyModel,
        batch: TaskBatch,
        metric: Metric,
        *,
        sites: Collection[str] = NODE_SITES,
        nodes: Iterable[Node] | None = None,
        positions: Positions = None,
        direction: str = "denoising",
    ):
        if direction not in DIRECTIONS:
            raise ConfigError(f"direction={direction!r}; choose {' or '.join(map(repr, DIRECTIONS))}.")
        self.model: HookedModel = hooked(model)
        self.device = self.model.embed.W_E.device
        self.batch, self.metric = batch.to(self.device), metric
        self.n_pos = int(batch.lengths.max())
        """Positions of the longest prompt; what is behind them is padding."""
        self.mask = self.batch.attention_mask[:, : self.n_pos].bool()
        self.channels = self._channels(sites, nodes)
        self.labels = self._labels(positions)
        sides = (self.batch.corrupt, self.batch.clean)
        self.base, self.source = (t[:, : self.n_pos] for t in (sides if direction == "denoising" else sides[::-1]))

    def __len__(self) -> int:
        return len(self.batch)

    def _channels(self, sites: Collection[str], nodes: Iterable[Node] | None) -> dict[Place, Int[Tensor, " channel"]]:
        """The channels to patch at every place that has any, in the order of the forward pass."""
        cfg = self.model.cfg
        if nodes is None:
            unknown = [site for site in sites if site not in SITES]
            if unknown or not sites:
                raise ConfigError(f"sites={tuple(sites)}: expected some of {', '.join(SITES)}.")
            return {place: torch.arange(width(cfg, place.site)) for place in places(cfg, sites)}
        nodes = sorted(set(nodes))
        if not nodes:
            raise CircuitError("there are no nodes to patch; nodes=None is all of them.")
        check_nodes(nodes, cfg)
        named: dict[Place, list[int]] = {place: [] for place in places(cfg, SITES)}
        for node in nodes:
            named[Place(node.layer, node.site)].append(node.channel)
        return {place: torch.tensor(channels) for place, channels in named.items() if channels}

    def _labels(self, positions: Positions) -> list[int] | None:
        if positions is None:
            return None
        if isinstance(positions, str):
            if positions != "each":
                raise ConfigError(f"positions={positions!r}; expected None, 'each', or a list of positions.")
            return list(range(self.n_pos))
        outside = [pos for pos in positions if not -self.n_pos <= pos < self.n_pos]
        if outside or not len(positions):
            raise ConfigError(
                f"positions={list(positions)}: expected numbers from {-self.n_pos} to {self.n_pos - 1}, since the "
                f"longest prompt has {self.n_pos} tokens."
            )
        return list(dict.fromkeys(positions))

    @cached_property
    def at(self) -> Int[Tensor, "batch label"] | None:
        """Where in each prompt the positions asked for are; -1 where it has no such position. None: everywhere."""
        if self.labels is None:
            return None
        labels, lengths = torch.tensor(self.labels, device=self.device), self.batch.lengths[:, None]
        at = torch.where(labels >= 0, labels, lengths + labels)
        return torch.where((at >= 0) & (at < lengths), at, -1)

    # -- reading it off -----------------------------------------------------------------------------------------------

    @cached_property
    def seen(self) -> Int[Tensor, "batch pos"] | None:
        """The attention mask that runs need: none in a causal model, where padding on the right is behind all."""
        return None if self.model.cfg.attention_dir == "causal" else self.mask.long()

    def unembedded(self, tokens: Tokens, stream: Resid, last: Int[Tensor, " batch"]) -> AnswerLogits:
        """Logits at position `last` of each row of a stream that left the last block."""
        rows = torch.arange(len(stream), device=stream.device)
        here = {"tokens": tokens[rows, last][:, None], "start_at_layer": self.model.cfg.n_layers}
        return self.model(stream[rows, last][:, None], **here)[:, 0]

    def spread(self, at_answers: Float[Tensor, "batch 1 width"]) -> Float[Tensor, "batch pos width"]:
        """Values known at answer positions alone, with zeros elsewhere."""
        n, _, size = at_answers.shape
        everywhere = at_answers.new_zeros(n, self.n_pos, size)
        everywhere[torch.arange(n, device=at_answers.device), self.batch.last] = at_answers[:, 0]
        return everywhere

    def everywhere(self, tokens: Tokens, rows: Int[Tensor, " row"]) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of some prompts at every position, as wide as the batch."""
        seen = None if self.seen is None else self.seen[rows]
        return self.widened(self.model(tokens[rows], attention_mask=seen))

    def widened(self, logits: Float[Tensor, "row run d_vocab"]) -> Float[Tensor, "row pos d_vocab"]:
        """Logits at the positions that the longest prompt has, with zeros at those that are padding in all."""
        missing = self.batch.clean.shape[1] - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, 0, 0, missing)) if missing else logits

    def reading(self, tokens: Tokens, answers: AnswerLogits) -> "Reading":
        """What the metric looks at, by trying it on logits of one run."""
        everyone = torch.arange(len(self), device=self.device)
        numbers, alone = self._number(answers, self.batch), False
        if numbers is not None:
            others = torch.cat([everyone.flip(0), everyone[:1]])
            again = self._number(answers[others], self.batch.rows(others))
            alone = again is not None and _same(again, numbers[others])
            few = everyone[:2] if alone else everyone
            beside = self._number(self.everywhere(tokens, few), self.batch.rows(few))
            if beside is None or _same(beside, numbers[few]):
                return Reading(True, alone)
        whole = self.everywhere(tokens, everyone)
        if self._number(whole, self.batch) is None:
            found = self.metric(whole, self.batch)  # raises what is wrong with it, if it raises
            shape = tuple(found.shape) if isinstance(found, Tensor) else found
            raise TaskError(f"a metric gives one number per prompt, here {len(self)}; this one gave {shape}.")
        return Reading(False, False)

    def _number(self, logits: Tensor, batch: TaskBatch) -> PerPrompt | None:
        try:
            numbers = self.metric(logits, batch)
        except Exception:  # it looks at something else: which is what is being asked
            return None
        return numbers if isinstance(numbers, Tensor) and numbers.shape == (len(batch),) else None

    def table(
        self, effects: Mapping[Place, Float[Tensor, "channel label"]], base: float, source: float
    ) -> PatchingTable:
        """The table of mean effects; `base` and `source` are the mean metrics of the two runs."""
        frames = []
        for place, channels in self.channels.items():
            n_labels = 1 if self.labels is None else len(self.labels)
            columns = {"layer": place.layer, "site": place.site, "channel": np.repeat(channels.numpy(), n_labels)}
            if self.labels is not None:
                columns["pos"] = np.tile(np.asarray(self.labels), len(channels))
            frames.append(pd.DataFrame(columns | {"effect": effects[place].flatten().cpu().numpy()}))
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(frame.columns.get_loc("effect"), "metric", base + frame.effect)
        gap = source - base
        return PatchingTable(frame.assign(recovered_frac=frame.effect / gap if gap else float("nan")))


@dataclass(frozen=True)
class Reading:
    """What a metric looks at."""

    answers_alone: bool
    """Whether the logits at the answer positions are enough."""

    prompts_alone: bool
    """Whether, given those, a prompt's number is the same whatever other prompts are in the batch."""


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
