"""Groups: several recurrences in one launch, a member for each place on the grid's third axis.

The members of a group have the same sizes. Each has weights, states and buffers of its own, and knows nothing of the others
while a launch runs. There are two kinds:

    side by side  the two directions of a layer, the heads of a block-diagonal W_hh, or the heads of both directions. All read
                  one input, and their outputs lie side by side in one tensor
    layers        a stack as a pipeline over chunks of N steps: while layer l runs a chunk, layer l - 1 runs the next one

A member is at a position in the order of processing: 0, ..., T - 1. A launch runs N positions of each member: begin + m * lag,
begin + m * lag + 1, ... of member m, as far as they are positions. A member that has none returns at once. Members side by side
have a lag of 0. In a pipeline each layer is N positions behind the one below, so that forward has a lag of -N. Backward goes
through the layers from the last one down, with a lag of N.

Position p of forward is step p, or step T - 1 - p of a member that is flipped. Backward goes through the steps against
forward: its position p is forward's T - 1 - p.
"""

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["ALONE", "Group", "place"]


class Group(NamedTuple):
    """What a call of a family's `forward` or `backward` runs.

    Attributes:
        members: how many.
        directions: how many members have their outputs side by side: all of them, or 1.
        flips: a bit for each member: 1 for one that runs from the last step to the first.
        lag: of a pipeline: N, the steps of a chunk. Else 0.
    """

    members: int = 1
    directions: int = 1
    flips: int = 0
    lag: int = 0

    @property
    def layers(self) -> bool:
        """Whether it is a pipeline of several layers."""
        return self.members > self.directions

    def begins(self, T: int, N: int, backward: bool) -> Iterator[int]:
        """`begin` of each launch of N positions, as the module says, for sequences of T steps."""
        assert not self.lag or self.lag == N, "the chunk of a pipeline is its lag"
        ahead = self.lag * (self.members - 1)  # positions by which the first member to begin is before the last
        yield from range(-ahead if backward else 0, T if backward else T + ahead, N)

    def steps(self, begin: int, N: int, T: int, backward: bool) -> int:
        """The most positions that any member runs in a launch of N."""
        if not self.lag:
            return min(N, T - begin)
        lag = self.lag if backward else -self.lag
        return max(min(N, T - first) for first in range(begin, begin + lag * self.members, lag) if first >= 0)


ALONE = Group()


@triton.jit
def place(begin, lag, N, T, flips, member, BACKWARD: tl.constexpr):
    """Where a member is in a launch: its first position, the step there, dt from that step to the next one processed, how many
    steps it runs (0 or less if none), and the index of its first step in a buffer of the chunk's N steps, in time."""
    p = begin + member * lag
    flipped = (flips >> tl.minimum(member, 31)) & 1  # a stack, which may have more layers, has no flips
    if BACKWARD:
        flipped = 1 - flipped
    t = tl.where(flipped > 0, T - 1 - p, p)
    steps = tl.where(p < 0, 0, tl.minimum(N, T - p))
    return p, t, 1 - 2 * flipped, steps, tl.where(flipped > 0, N - 1, 0)
