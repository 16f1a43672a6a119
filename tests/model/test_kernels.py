"""Fast kernels against their plain references: the same values, the same gradients, the same refusals."""

import sys
import warnings

import numpy as np
import pytest
import torch

import sparse_interp.model
from sparse_interp.errors import ConfigError
from sparse_interp.model import kernels
from sparse_interp.model.kernels import (
    abs_topk,
    abs_topk_reference,
    causal_mask,
    keep_largest_mask,
    keep_largest_mask_reference,
    next_token_loss,
    next_token_loss_reference,
    sink_attention,
    sink_attention_reference,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def distinct(shape, dtype, generator) -> torch.Tensor:
    """Signed values whose magnitudes are distinct within a row, even in 16 bits."""
    rows, width = int(np.prod(shape[:-1])), shape[-1]
    levels = torch.arange(1, 201, dtype=torch.float64)  # integers up to 200 are exact in every float type
    picked = torch.stack([levels[torch.randperm(200, generator=generator)[:width]] for _ in range(rows)])
    signs = torch.randint(0, 2, picked.shape, generator=generator) * 2 - 1
    return (picked * signs).view(shape).to(dtype)


# -- AbsTopK ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [2, 7, 64, 130])
def test_the_kept_set_is_that_of_torch_topk(dtype, width, generator):
    x = distinct((4, 5, width), dtype, generator)
    for k in {1, width // 2, width - 1}:
        kept = abs_topk(x, k)
        assert torch.equal(kept, abs_topk_reference(x, k))
        assert ((kept != 0).sum(-1) == k).all() and kept.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradient_passes_where_an_entry_was_kept(dtype, generator):
    x = distinct((6, 40), dtype, generator)
    grad = torch.randn(6, 40, generator=generator).to(dtype)
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    abs_topk(ours, 9).backward(grad)
    abs_topk_reference(reference, 9).backward(grad)
    assert torch.equal(ours.grad, reference.grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_where_magnitudes_tie_exactly_k_of_lowest_channel_are_kept(dtype):
    x = torch.tensor([[1, -1, 1, 2, -1, 1], [3, 3, 3, 3, 3, 3], [0, 0, 5, 0, 0, 0]], dtype=dtype)
    kept = abs_topk(x, 3)
    assert kept.tolist() == [[1, -1, 0, 2, 0, 0], [3, 3, 3, 0, 0, 0], [0, 0, 5, 0, 0, 0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinity_is_larger_than_numbers_and_nan_larger_still(dtype):
    x = torch.tensor([[1.0, float("inf"), -3.0, float("nan"), -float("inf"), 2.0]], dtype=dtype)
    kept = abs_topk(x, 3)
    torch.testing.assert_close(kept, abs_topk_reference(x, 3), equal_nan=True)
    assert kept[0].isnan().tolist() == [False, False, False, True, False, False]


def test_the_smallest_numbers_are_ranked_like_all_others(generator):
    """Subnormal and huge entries in one row."""
    x = torch.tensor([[1e-45, -1e-40, 1e-38, -3e38, 1.0, -0.0]])
    for k in (1, 2, 3, 4):
        assert torch.equal(abs_topk(x, k), abs_topk_reference(x, k))


def test_rows_need_not_be_contiguous(generator):
    base = torch.randn(30, 24, generator=generator)
    for x in (base.T, base[::2], base[:, ::3], base.unflatten(1, (4, 6)).transpose(0, 1), base[0]):
        ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
        strided = torch.empty_strided(x.shape, x.stride()).copy_(ours)
        assert torch.equal(abs_topk(x, 3), abs_topk_reference(x, 3))
        (abs_topk(ours, 3) * strided.detach()).sum().backward()
        (abs_topk_reference(reference, 3) * strided.detach()).sum().backward()
        assert torch.equal(ours.grad, reference.grad)


def test_a_gradient_that_is_expanded_is_read_right(generator):
    x = distinct((5, 12), torch.float32, generator).requires_grad_()
    abs_topk(x, 4).sum().backward()
    assert (x.grad.sum(-1) == 4).all()


def test_a_large_input_is_shared_among_threads_without_a_change(generator):
    x = torch.randn(300, 256, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = abs_topk(x, 64)
        torch.set_num_threads(3)
        assert torch.equal(abs_topk(x, 64), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, abs_topk_reference(x, 64))


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_of_every_kind_agree_with_the_reference(seed):
    """Values on a coarse grid tie often: then magnitudes must agree, and only the choice among ties may differ."""
    draw = torch.Generator().manual_seed(seed)
    width = int(torch.randint(1, 70, (), generator=draw))
    k = int(torch.randint(0, width + 1, (), generator=draw))
    x = torch.randn(9, width, generator=draw) * 10 ** float(torch.randint(-3, 4, (), generator=draw))
    x = (x * 2).round() / 2 if seed % 2 else x
    ours, reference = abs_topk(x, k), abs_topk_reference(x, k)
    assert torch.equal(ours.abs().sort(-1).values, reference.abs().sort(-1).values)
    assert ((ours == x) | (ours == 0)).all()
    if seed % 2 == 0:
        assert torch.equal(ours, reference)


def test_keeping_none_gives_zeros_and_keeping_all_the_input(generator):
    x = torch.randn(3, 5, generator=generator, requires_grad=True)
    assert torch.equal(abs_topk(x, 0), torch.zeros(3, 5))
    whole = abs_topk(x, 5)
    assert torch.equal(whole, x) and whole.data_ptr() != x.data_ptr()
    abs_topk(x, 0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_an_empty_input_stays_empty(shape):
    assert abs_topk(torch.zeros(shape), 2).shape == shape


def test_a_count_outside_the_row_is_refused():
    for k in (-1, 6):
        with pytest.raises(ConfigError, match=f"keeps between 0 and 5 of 5 entries; got k={k}"):
            abs_topk(torch.zeros(2, 5), k)


def test_first_and_second_derivatives_are_those_of_finite_differences(generator):
    x = distinct((3, 8), torch.float64, generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: abs_topk(t, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda t: abs_topk(t, 3) ** 2, (x,))


# -- attention with a sink --------------------------------------------------------------------------------------------


def heads(generator, n=9, d_head=5, dtype=torch.float64):
    return [torch.randn(2, 3, n, d_head, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("n", [1, 9, 70])
@pytest.mark.parametrize("level", [-30.0, 0.0, 2.0, 30.0])
def test_sink_attention_has_the_values_and_gradients_of_its_reference(n, level, generator):
    q, k, v = heads(generator, n)
    sink = (level + torch.randn(3, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64)
    ours, reference = sink_attention(q, k, v, sink), sink_attention_reference(q, k, v, sink)
    torch.testing.assert_close(ours, reference)
    inputs = (q, k, v, sink)
    got = torch.autograd.grad((ours * weight).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((reference * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_without_a_sink_it_is_plain_causal_attention(generator):
    q, k, v = heads(generator)
    torch.testing.assert_close(sink_attention(q, k, v, None), sink_attention_reference(q, k, v, None))


@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
def test_which_keys_a_query_sees_can_be_said(sink, generator):
    q, k, v = (t.detach() for t in heads(generator))
    at = torch.randn(3, generator=generator, dtype=torch.float64) if sink else None
    n = q.shape[2]
    causal = causal_mask(n, n, q.device)[None, None]
    torch.testing.assert_close(sink_attention(q, k, v, at, causal), sink_attention(q, k, v, at))
    seen = (torch.rand(2, 1, n, n, generator=generator) < 0.5) | torch.eye(n, dtype=torch.bool)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    expected = scores @ v / (scores.sum(-1, keepdim=True) + (0 if at is None else at.exp()[:, None, None]))
    torch.testing.assert_close(sink_attention(q, k, v, at, seen), expected)
    torch.testing.assert_close(sink_attention_reference(q, k, v, at, seen), expected)


def test_a_sink_at_minus_infinity_takes_nothing_and_one_at_zero_takes_a_share(generator):
    q, k, v = heads(generator)
    none = torch.full((3,), -1e4, dtype=torch.float64)
    torch.testing.assert_close(sink_attention(q, k, v, none), sink_attention_reference(q, k, v, None))
    first = sink_attention(q * 0, k, v, torch.zeros(3, dtype=torch.float64))[:, :, 0]
    torch.testing.assert_close(first, v[:, :, 0] / 2)


def test_the_last_query_stands_at_the_last_key():
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]


# -- which weights a projection keeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (16, 16), (40, 7)])
@pytest.mark.parametrize("floor", [0, 1, 2])
def test_the_kept_weights_are_those_of_the_reference(shape, floor, generator):
    size = shape[0] * shape[1]
    weight = distinct((1, min(size, 200)), torch.float32, generator)
    weight = torch.randn(shape, generator=generator) if size > 200 else weight.view(shape)
    smallest = max(1, floor * sum(shape))
    for k in {smallest, (smallest + size) // 2, size}:
        if smallest > size:
            continue
        keep = keep_largest_mask(weight, k, floor)
        assert int(keep.sum()) == k
        assert torch.equal(keep, keep_largest_mask_reference(weight, k, floor))
        assert (keep.sum(1) >= min(floor, shape[1])).all() and (keep.sum(0) >= min(floor, shape[0])).all()


def test_exactly_k_weights_are_kept_where_all_are_equal():
    keep = keep_largest_mask(torch.ones(6, 8), 20, 1)
    assert int(keep.sum()) == 20 and keep.any(0).all() and keep.any(1).all()


def test_a_budget_too_small_for_its_floors_is_refused():
    with pytest.raises(ConfigError, match="floor=2 for each of 4 rows and 6 columns can need 20 entries, and k=19"):
        keep_largest_mask(torch.ones(4, 6), 19, 2)
    with pytest.raises(ConfigError, match="a 4 x 6 matrix keeps between 1 and 24 entries; got k=25"):
        keep_largest_mask(torch.ones(4, 6), 25, 0)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_has_the_value_and_gradients_of_its_reference(with_table, dtype, generator):
    logits = torch.randn(2, 6, 11, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(11, generator=generator).requires_grad_()
    table = torch.randn(11, 11, generator=generator) if with_table else None
    tokens = torch.randint(11, (2, 6), generator=generator)
    before = logits.detach().clone()
    got = next_token_loss(logits, bias, table, tokens)
    expected = next_token_loss_reference(logits, bias, table, tokens)
    torch.testing.assert_close(got, expected)
    gradients = zip(
        torch.autograd.grad(got * 3, (logits, bias)), torch.autograd.grad(expected * 3, (logits, bias)), strict=True
    )
    for a, b in gradients:
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-4)
    assert torch.equal(logits.detach(), before)


def test_a_table_that_learns_gets_its_gradient(generator):
    logits, table = torch.zeros(1, 3, 4), torch.zeros(4, 4, requires_grad=True)
    next_token_loss(logits, torch.zeros(4), table, torch.tensor([[0, 2, 1]])).backward()
    assert table.grad[0].nonzero().numel() == 4 and not table.grad[3].any()


# -- without numba ----------------------------------------------------------------------------------------------------


def test_without_numba_the_references_run_and_a_warning_says_so_once(monkeypatch, generator):
    monkeypatch.setitem(sys.modules, "sparse_interp.model.cpu_kernels", None)
    monkeypatch.delattr(sparse_interp.model, "cpu_kernels", raising=False)
    x, weight = torch.randn(4, 9, generator=generator), torch.randn(6, 5, generator=generator)
    kernels._cpu_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"numba is not installed.*pip install sparse_interp\[fast\]"):
            slow = abs_topk(x, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(abs_topk(x, 3), slow)
            mask = keep_largest_mask(weight, 12, 1)
    finally:
        monkeypatch.undo()
        kernels._cpu_kernels.cache_clear()
    fast = abs_topk(x, 3)
    assert torch.equal(fast, slow)
    assert torch.equal(keep_largest_mask(weight, 12, 1), mask)
