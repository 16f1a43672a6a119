"""The CPU versions of our selections: compiled with numba at first use, run by one thread per core.

A float's bits, read as an integer with the sign cleared, order like its magnitude. So the k-th largest
magnitude of a row is the largest integer t with  #{ j : bits_j >= t } >= k,  found by halving an interval of
integers; each probe is one pass of compares over a row that is already in cache, which compiles to vector
instructions. Rows of one tensor look alike, so the search starts at the answer of the row before.

Imported by `kernels.py` alone, and only where numba is installed. `no_type_check` keeps compiled functions as they are
when annotations are checked: numba cannot compile a checking wrapper.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import no_type_check

import numpy as np
import torch
from numba import njit
from torch import Tensor

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
_ROWS_WORTH_A_THREAD = 1 << 14
"""Entries below which handing work to another thread costs more than it saves."""


@njit(nogil=True, cache=True, inline="always")
@no_type_check
def _count_at_least(keys: np.ndarray, threshold: int) -> int:
    count = np.int32(0)
    for j in range(keys.shape[0]):
        count += np.int32(keys[j] >= threshold)
    return count


@njit(nogil=True, cache=True)
@no_type_check
def kth_largest(keys: np.ndarray, k: int, guess: int) -> tuple[int, int]:
    """The largest t with at least `k` keys >= t, and how many keys are >= t. Keys are >= 0, 1 <= k <= len(keys).

    Stops early at any t that exactly `k` keys reach: it selects the same entries.
    """
    low, high = np.int64(0), np.int64(0)  # invariant: count(low) >= k > count(high)
    probe, step = np.int64(guess), np.int64(max(guess >> 9, 1))
    count = _count_at_least(keys, keys.dtype.type(probe))
    count_low = np.int64(keys.shape[0])
    if count == k:
        return probe, count
    if count > k:
        low, count_low = probe, np.int64(count)
        top = np.int64(keys.max())
        while True:
            probe = min(low + step, top + 1)
            if probe == top + 1:
                high = probe
                break
            count = _count_at_least(keys, keys.dtype.type(probe))
            if count == k:
                return probe, count
            if count < k:
                high = probe
                break
            low, count_low = probe, np.int64(count)
            step *= 4
    else:
        high = probe
        while True:
            probe = max(high - step, np.int64(0))
            if probe == 0:
                low = np.int64(0)
                break
            count = _count_at_least(keys, keys.dtype.type(probe))
            if count == k:
                return probe, count
            if count > k:
                low, count_low = probe, np.int64(count)
                break
            high = probe
            step *= 4
    while high - low > 1:
        probe = low + (high - low) // 2
        count = _count_at_least(keys, keys.dtype.type(probe))
        if count == k:
            return probe, count
        if count > k:
            low, count_low = probe, np.int64(count)
        else:
            high = probe
    return low, count_low


@njit(nogil=True, cache=True)
@no_type_check
def _abs_topk_rows(bits: np.ndarray, out: np.ndarray, k: int, magnitude: int) -> None:
    n_rows, width = bits.shape
    keys = np.empty(width, bits.dtype)
    guess = 0
    for i in range(n_rows):
        for j in range(width):
            keys[j] = bits[i, j] & magnitude
        if guess == 0:
            guess = np.int64(keys.max())
        threshold, count = kth_largest(keys, k, guess)
        guess = threshold
        cut = keys.dtype.type(threshold)
        for j in range(width):
            out[i, j] = bits[i, j] if keys[j] >= cut else 0
        surplus = count - k  # entries that tie with the k-th: the last ones go
        j = width - 1
        while surplus > 0:
            if keys[j] == cut:
                out[i, j] = 0
                surplus -= 1
            j -= 1


@njit(nogil=True, cache=True)
@no_type_check
def _zero_where_zero_rows(grad: np.ndarray, kept: np.ndarray, out: np.ndarray, magnitude: int) -> None:
    for i in range(grad.shape[0]):
        for j in range(grad.shape[1]):
            out[i, j] = grad[i, j] if (kept[i, j] & magnitude) != 0 else 0


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="sparse_interp")


def _by_rows(kernel, tensors: list[np.ndarray], *rest) -> None:
    """Run `kernel` on slices of rows, one slice per thread that torch may use."""
    n_rows, width = tensors[0].shape
    n = min(torch.get_num_threads(), max(1, n_rows * width // _ROWS_WORTH_A_THREAD), n_rows)
    cuts = [n_rows * i // n for i in range(n + 1)]
    if n == 1:
        kernel(*tensors, *rest)
        return
    futures: list[Future] = [
        _threads(n - 1).submit(kernel, *[t[a:b] for t in tensors], *rest) for a, b in pairwise(cuts[1:])
    ]
    kernel(*[t[: cuts[1]] for t in tensors], *rest)
    for future in futures:
        future.result()


def _as_bits(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(_BITS[x.dtype]).reshape(-1, x.shape[-1]).numpy()


def handles(x: Tensor) -> bool:
    """Whether these kernels take `x`: a non-empty float tensor in main memory."""
    return x.device.type == "cpu" and x.dtype in _BITS and x.numel() > 0


def abs_topk_forward(x: Tensor, k: int) -> Tensor:
    """`x` with all but the `k` entries of largest magnitude zeroed along the last axis, 1 <= k < width."""
    out = torch.empty(x.shape, dtype=x.dtype)
    bits = _as_bits(x)
    _by_rows(_abs_topk_rows, [bits, _as_bits(out)], k, bits.dtype.type(np.iinfo(bits.dtype).max))
    return out


def abs_topk_backward(grad: Tensor, kept: Tensor) -> Tensor:
    """`grad` where `kept` is not zero, else 0."""
    out = torch.empty(grad.shape, dtype=grad.dtype)
    bits = _as_bits(kept)
    tensors = [_as_bits(grad), bits, _as_bits(out)]
    _by_rows(_zero_where_zero_rows, tensors, bits.dtype.type(np.iinfo(bits.dtype).max))
    return out


@njit(nogil=True, cache=True)
@no_type_check
def _sum_rows(x: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[index[i], j] += x[i, j]


def sum_rows(x: Tensor, index: Tensor, n_rows: int) -> Tensor:
    """[n_rows width]: at every row the sum of those rows of `x` whose `index` it is."""
    out = torch.zeros(n_rows, x.shape[1], dtype=x.dtype)
    _sum_rows(x.detach().contiguous().numpy(), index.numpy(), out.numpy())
    return out


@njit(nogil=True, cache=True)
@no_type_check
def _protect(keys: np.ndarray, chosen: np.ndarray, floor: int) -> None:
    """Mark in `chosen` the `floor` largest keys of every row and of every column."""
    n_rows, n_columns = keys.shape
    best = np.empty((n_columns, floor), keys.dtype)
    where = np.empty((n_columns, floor), np.int64)
    best[:] = -1
    top, at = np.empty(floor, keys.dtype), np.empty(floor, np.int64)
    for i in range(n_rows):
        top[:] = -1
        for j in range(n_columns):
            key = keys[i, j]
            if key > top[floor - 1]:
                slot = floor - 1
                while slot > 0 and key > top[slot - 1]:
                    top[slot], at[slot] = top[slot - 1], at[slot - 1]
                    slot -= 1
                top[slot], at[slot] = key, j
            if key > best[j, floor - 1]:
                slot = floor - 1
                while slot > 0 and key > best[j, slot - 1]:
                    best[j, slot], where[j, slot] = best[j, slot - 1], where[j, slot - 1]
                    slot -= 1
                best[j, slot], where[j, slot] = key, i
        for slot in range(min(floor, n_columns)):
            chosen[i, at[slot]] = True
    for j in range(n_columns):
        for slot in range(min(floor, n_rows)):
            chosen[where[j, slot], j] = True


@njit(nogil=True, cache=True)
@no_type_check
def _choose_largest(bits: np.ndarray, chosen: np.ndarray, k: int, floor: int, magnitude: int) -> None:
    n_rows, n_columns = bits.shape
    keys = np.empty(bits.shape, bits.dtype)
    for i in range(n_rows):
        for j in range(n_columns):
            keys[i, j] = bits[i, j] & magnitude
    if floor > 0:
        _protect(keys, chosen, floor)
        for i in range(n_rows):
            for j in range(n_columns):
                if chosen[i, j]:
                    keys[i, j] = magnitude
    flat = keys.reshape(-1)
    threshold, count = kth_largest(flat, k, np.int64(flat.max()))
    cut = keys.dtype.type(threshold)
    for i in range(n_rows):
        for j in range(n_columns):
            chosen[i, j] = keys[i, j] >= cut
    surplus = count - k
    i = flat.shape[0] - 1
    while surplus > 0:  # entries that tie with the k-th: the last ones go
        if flat[i] == cut:
            chosen[i // n_columns, i % n_columns] = False
            surplus -= 1
        i -= 1


def keep_largest_mask(weight: Tensor, k: int, floor: int) -> Tensor:
    """True at the `k` largest magnitudes, those of `floor` per row and column among them."""
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    bits = _as_bits(weight).reshape(weight.shape)
    _choose_largest(bits, chosen.numpy(), k, floor, bits.dtype.type(np.iinfo(bits.dtype).max))
    return chosen
