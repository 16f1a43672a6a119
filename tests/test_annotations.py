"""Annotations are assertions while tests run: what a function of the package is given and gives is checked."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from sparse_interp.model.sites import Node, flat, masks

REFUSED = (BeartypeCallHintViolation, jaxtyping.TypeCheckError)


@jaxtyping.jaxtyped(typechecker=beartype)
def joined(a: Float[Tensor, "row n"], b: Float[Tensor, "row m"]) -> Float[Tensor, "row n+m"]:
    return torch.cat([a, b], 1)


@jaxtyping.jaxtyped(typechecker=beartype)
def rows(n: int, x: Float[Tensor, "row width"] | None = None) -> list[Float[Tensor, " width"]]:
    return [torch.zeros(n + i) for i in range(2)] if x is None else list(x)


@jaxtyping.jaxtyped(typechecker=beartype)
def twice(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    joined(torch.zeros(2, 3), torch.zeros(2, 4))  # whose n is another
    return torch.cat([x, x])


@jaxtyping.jaxtyped(typechecker=beartype)
def each(x: Float[Tensor, " n"]):
    yield from x


@jaxtyping.jaxtyped(typechecker=beartype)
def plain(n: int) -> str:
    return "" if n else n


def test_names_of_axes_stand_for_one_size_in_a_call_and_are_free_in_the_next():
    for n_rows in (2, 5):
        assert joined(torch.zeros(n_rows, 3), torch.zeros(n_rows, 4)).shape == (n_rows, 7)
    for wrong in (torch.zeros(3, 4), torch.zeros(2, 4, 1), torch.zeros(2, 4).int()):
        with pytest.raises(REFUSED):
            joined(torch.zeros(2, 3), wrong)


def test_what_a_function_gives_is_held_against_what_it_was_given():
    with pytest.raises(REFUSED):
        twice(torch.zeros(3))
    assert twice(torch.zeros(0)).shape == (0,)
    assert plain(1) == "" and len(rows(2, torch.zeros(4, 3))) == 4
    for call in (lambda: plain(0), lambda: plain("1"), lambda: rows(2.5), lambda: next(each(torch.zeros(3, 3)))):
        with pytest.raises(REFUSED):
            call()


def test_functions_of_the_package_are_checked(plain_model):
    with pytest.raises(REFUSED):
        plain_model.blocks[0].ln1(torch.zeros(3, 4).int())
    with pytest.raises(REFUSED):
        flat([1.0])
    with pytest.raises(REFUSED):
        masks([Node(0, "q", 1)], "no configuration")
