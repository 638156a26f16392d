"""What forward saves for backward: a minimum cut between the inputs of a step and its gradients.

Costs nothing: the states before and after the step, because the kernels keep them; what no step changes; noise, which backward
makes again; what the author said to keep. To compute again in backward costs little, so forward saves i, f, g and o of an LSTM,
and backward computes tanh(c) again.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from rnnfast.derive.expressions import Expr, inputs_of, may_overflow

__all__ = ["of_gradients", "saved"]

# In thousandths of a tile saved in the dtype of the input. Whole numbers, so that each version of Python finds the same cut.
SAVE = 1000  # a side of a gate, or a value that the author gave a name
UNNAMED = 20  # more for another value of the cell
DERIVATIVE = 150  # more for a value of the derivative, such as 1 - e e, which in float16 loses more than e does
WIDE = 2  # times as much in float32
AGAIN = {"row_mean": 500, **dict.fromkeys(("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "sin", "cos", "erf"), 100)}
CHEAP = 10  # to compute again by additions, products and comparisons
INFINITE = 10**12


def of_gradients(everything: list[Expr], free: set[Expr]) -> set[Expr]:
    """The expressions that depend on a gradient of the new states. `everything`: each after what it needs."""
    found: set[Expr] = set()
    for expr in everything:
        if expr in free:
            continue
        if (expr.op == "leaf" and expr.args[0] == "d") or any(child in found for child in expr.children):
            found.add(expr)
    return found


def saved(backward: list, free: set[Expr]) -> list[Expr]:
    """The tiles to save, so that all expressions in `backward` can be computed from them, from `free` and from the gradients.

    Each expression that depends on no gradient is two nodes. The edge between them is cut if it is saved; an edge from the
    source is cut if it is computed again; what stays on the side of the source is not needed.
    """
    everything = inputs_of(backward, free)
    late = of_gradients(everything, free)
    network = _Network()
    for expr in everything:
        into, out = 2 * expr.number, 2 * expr.number + 1
        if expr in late:
            for child in expr.children:
                if child not in late:
                    network.edge(2 * child.number + 1, SINK, INFINITE)
        elif expr not in free:
            network.edge(into, out, INFINITE if expr.is_bool else _to_save(expr))
            network.edge(SOURCE, into, INFINITE if expr.op == "leaf" else AGAIN.get(expr.op, CHEAP))
            for child in expr.children:
                if child not in free:
                    network.edge(2 * child.number + 1, into, INFINITE)
    for root in backward:  # one that depends on no gradient
        if isinstance(root, Expr) and root not in late and root not in free:
            network.edge(2 * root.number + 1, SINK, INFINITE)
    needed = network.needed()
    return [
        expr for expr in everything
        if expr not in late and expr not in free and 2 * expr.number not in needed and 2 * expr.number + 1 in needed
    ]  # fmt: skip


def _to_save(expr: Expr) -> int:
    cost = SAVE
    if expr.op != "leaf" and not expr.primal:
        cost += DERIVATIVE
    elif expr.op != "leaf" and expr.name is None:
        cost += UNNAMED
    return cost * (WIDE if may_overflow(expr) else 1)


SOURCE, SINK = -1, -2


class _Network:
    """A network of whole capacities, and its minimum cut by the method of Dinic (1970)."""

    def __init__(self):
        self.left: dict[int, dict[int, int]] = {SOURCE: {}, SINK: {}}  # capacities that are left

    def edge(self, a: int, b: int, capacity: int) -> None:
        self.left.setdefault(a, {}).setdefault(b, 0)
        self.left.setdefault(b, {}).setdefault(a, 0)
        self.left[a][b] = min(INFINITE, self.left[a][b] + capacity)

    def needed(self) -> set[int]:
        """The nodes on the sink's side of the minimum cut that is nearest to it. No order of edges changes which they are."""
        while SINK in (levels := self._levels()):
            self._fill(levels)
        found, queue = {SINK}, [SINK]
        while queue:
            node = queue.pop()
            before = [other for other in self.left[node] if self.left[other][node] and other not in found]
            found.update(before)
            queue.extend(before)
        return found

    def _levels(self) -> dict[int, int]:
        levels, queue = {SOURCE: 0}, deque([SOURCE])
        while queue:
            node = queue.popleft()
            for other, left in self.left[node].items():
                if left and other not in levels:
                    levels[other] = levels[node] + 1
                    queue.append(other)
        return levels

    def _fill(self, levels: dict[int, int]) -> None:
        """Push along paths on which the level rises by 1 at each edge, until there is none."""
        edges = {node: list(self.left[node]) for node in levels}
        path = [SOURCE]
        while path:
            node = path[-1]
            if node == SINK:
                pairs = list(pairwise(path))
                pushed = min(self.left[a][b] for a, b in pairs)
                for a, b in pairs:
                    self.left[a][b] -= pushed
                    self.left[b][a] += pushed
                path = [SOURCE]
                continue
            while edges[node] and not (self.left[node][edges[node][-1]] and levels.get(edges[node][-1]) == levels[node] + 1):
                edges[node].pop()
            if edges[node]:
                path.append(edges[node][-1])
            else:
                path.pop()
                if path:
                    edges[path[-1]].pop()
