"""Prompts packed: positions behind equal tokens run once, padding never, and the last block at the ends alone.

    row       what runs together and is asked for together: the prompts of one mask, or of one candidate
    n         the distinct beginnings of a row's prompts, one position each; of bidirectional models, all positions of
              the distinct prompts
    prompt    every prompt of the row, its end at the last `pos`

In a causal model without hooks that tell prompts apart, what a position holds depends on the tokens up to it alone, so
prompts made from templates share much; where attention is bidirectional, equal prompts share all. Only attention has to
know the prompts: what heads mix is laid out prompt by prompt, and gathered again. And where only the logits behind the
last token are asked for, keys and values are all that the last block needs of other positions.

A stream may have more rows than its packing: then the same prompts run in each of them, and rows that do not differ
yet need not be told apart until they do.

What comes out is what the prompts give one by one, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_interp.model.kernels import take_rows

KeyMask = Bool[Tensor, "batch key"]
ByPrompt = Float[Tensor, "batch _pos head d_head"]
Packed = Float[Tensor, "_row _n head d_head"]


@dataclass(frozen=True)
class Packing:
    """How prompts are packed. Rows with fewer beginnings or prompts than others are filled up with what nobody asks."""

    tokens: Int[Tensor, "row n"]
    """The last token of each beginning."""

    positions: Int[Tensor, "row n"]
    """Where it stands in its prompts."""

    spots: Int[Tensor, "row prompt pos"]
    """Which beginning each token of each prompt ends."""

    seen: Bool[Tensor, "row prompt pos"]
    """False before a prompt begins."""

    met: Int[Tensor, "row n"]
    """Where among prompts and positions, counted flat, each beginning is met."""

    counts: tuple[int, ...]
    """How many prompts each row really has."""

    ends_alone: bool = False
    """Whether queries are those of the prompts' ends: so it is in the last block."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[list[int]]], device: torch.device, *, causal: bool = True) -> "Packing":
        """Rows of prompts, each a list of token ids, for a model that sees earlier tokens alone or (`causal` False)
        later ones too."""
        longest = max(len(prompt) for prompts in rows for prompt in prompts)
        most = max(map(len, rows))
        packed = [_packed(prompts, longest, most, causal) for prompts in rows]
        n = max(len(tokens) for tokens, *_ in packed)
        found = [
            [*(values + [0] * (n - len(values)) for values in lists), spots, seen] for *lists, spots, seen in packed
        ]
        tokens, positions, met, spots, seen = (torch.tensor(part, device=device) for part in zip(*found, strict=True))
        return cls(tokens, positions, spots, seen, met, tuple(map(len, rows)))

    @property
    def of_last_block(self) -> "Packing":
        """The same prompts with queries at their ends alone."""
        return replace(self, ends_alone=True)

    @property
    def last_tokens(self) -> Int[Tensor, "row prompt"]:
        """The last token of every prompt."""
        return self.tokens.gather(1, self.spots[..., -1])

    def at_ends(self, x: Float[Tensor, "row n *channels"]) -> Float[Tensor, "row prompt *channels"]:
        """What there is at the ends of prompts."""
        return self._taken(x, self.spots[..., -1])

    def by_prompt(self, q: Packed, k: Packed, v: Packed) -> tuple[ByPrompt, ByPrompt, ByPrompt, KeyMask]:
        """What attends, is attended to and is taken in, laid out as the tokens of prompts, and which keys there are.

        With `ends_alone` nothing but ends attends. One row stands for all where others have more.
        """
        rows = max(len(q), len(k), len(v))
        laid = [self._laid(x) for x in ((k, v) if self.ends_alone else (q, k, v))]
        laid = [q.flatten(0, 1).unsqueeze(1), *laid] if self.ends_alone else laid
        n = rows * self.spots.shape[1]
        queries, keys, values = (x.repeat(n // len(x), 1, 1, 1) if len(x) < n else x for x in laid)
        mask = self.seen.flatten(0, 1)
        return queries, keys, values, mask.repeat(n // len(mask), 1)

    def gathered(self, x: ByPrompt) -> Packed:
        """What heads have mixed, one position for each beginning, or with `ends_alone` for each end."""
        by_row = x.unflatten(0, (-1, self.spots.shape[1]))
        return by_row.squeeze(2) if self.ends_alone else self._taken(by_row.flatten(1, 2), self.met)

    def _laid(self, x: Packed) -> ByPrompt:
        return self._taken(x, self.spots.flatten(1)).unflatten(1, self.spots.shape[1:]).flatten(0, 1)

    def _taken(self, x: Float[Tensor, "row from *channels"], index: Int[Tensor, "#row to"]) -> Tensor:
        first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        found = take_rows(x.flatten(0, 1).flatten(1), (first + index).flatten())
        return found.view(len(x), index.shape[1], *x.shape[2:])


def _packed(prompts: Sequence[list[int]], longest: int, most: int, causal: bool) -> tuple[list, list, list, list, list]:
    """Tokens, positions, where each is met, and the spots and seen of one row's prompts, filled up to `most`."""
    ids: dict[tuple[int, int], int] = {}
    starts: dict[tuple[int, ...], int] = {}
    positions, met, spots, seen = [], [], [], []
    for i, prompt in enumerate(prompts):
        start = () if causal else tuple(prompt)  # what has one start shares its beginnings
        begins, spot, path = longest - len(prompt), -1 - starts.setdefault(start, len(starts)), []
        for pos, token in enumerate(prompt):
            spot = ids.setdefault((spot, token), len(ids))
            path.append(spot)
            if spot == len(positions):
                positions.append(pos)
                met.append(i * longest + begins + pos)
        spots.append([0] * begins + path)
        seen.append([False] * begins + [True] * len(prompt))
    n_more = most - len(prompts)
    return (
        [token for _, token in ids],
        positions,
        met,
        spots + [[0] * longest] * n_more,
        seen + [[True] * longest] * n_more,
    )
