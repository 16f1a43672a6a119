"""How many bytes of tensors a piece of work makes, counted as torch makes them.

    with Meter() as meter:
        ...
    meter.peak      the most bytes that tensors made inside held at once

A tensor counts from the operation that made it until its memory is given back; views share what they are views of. So
the count is the same on every device and needs no allocator's help. What a kernel takes for itself while it runs is not
seen, which is what `MARGIN` is for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import finalize

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARGIN = 1.25
"""What a measured peak is multiplied by to bound runs of another size: kernels have scratch memory that is not seen."""


class Meter(TorchDispatchMode):
    """Inside the block every tensor that is made is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        """Bytes that tensors made inside hold now."""

        self.peak = 0
        """The most that they have held."""

        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        given = {self._memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and self._memory(x) not in given | self._counted:
                self._count(x)
        return result

    def _memory(self, x: Tensor) -> int:
        return x.untyped_storage()._cdata

    def _count(self, x: Tensor) -> None:
        memory, size = self._memory(x), x.untyped_storage().nbytes()
        self._counted.add(memory)
        self.held += size
        self.peak = max(self.peak, self.held)
        finalize(x.untyped_storage(), self._forget, memory, size)

    def _forget(self, memory: int, size: int) -> None:
        self._counted.discard(memory)
        self.held -= size
