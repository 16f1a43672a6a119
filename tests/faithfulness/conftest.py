"""What the tests of faithfulness share: a composed model with two keys, which takes seconds to build."""

import pytest
import torch


@pytest.fixture(scope="session")
def joint():
    """An answer that needs both the number of the first noun and what either of two copies brings."""
    from sparse_interp.faithfulness.composed import joined  # after the hook that checks annotations
    from sparse_interp.faithfulness.ground_truth import ground_truth

    generator = torch.Generator().manual_seed(0)
    return joined(ground_truth("distractor"), ground_truth("two_copies"), generator=generator)
