"""How the size of a circuit is chosen."""

import pytest

from sparse_interp.errors import CircuitError
from sparse_interp.interventions.selection import smallest_prefix


def test_the_smallest_good_prefix_is_found_above_and_below_the_start():
    assert smallest_prefix(100, lambda n: n >= 37, start=50) == 37
    assert smallest_prefix(100, lambda n: n >= 63, start=50) == 63
    with pytest.raises(CircuitError, match="not even all nodes"):
        smallest_prefix(100, lambda n: False, start=50)
