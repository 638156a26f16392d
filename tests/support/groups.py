"""Groups for the tests: directions or heads of a layer, or a stack, by `ops.group` and by the equations; and how they run."""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from rnnfast import ops, reference
from rnnfast.choice import kernel_plan
from rnnfast.reference import Weights

KINDS = ("w_ih", "w_hh", "b_ih", "b_hh")


@contextlib.contextmanager
def running(chunk=1, members=None):
    """Groups run so: layers in chunks of so many steps, and so many members at once; all if not given."""
    pick = kernel_plan.pick

    def so(*args):
        *_, count, layers = args
        return replace(pick(*args), members=min(count, members or count), chunk=chunk if layers else 0)

    with mock.patch.object(kernel_plan, "pick", so):
        yield


@dataclass
class Stack:
    """A group of a cell: `layers` in one direction, or one layer in several `directions`, every second one reversed."""

    cell: str
    layers: int = 1
    directions: int = 1
    T: int = 5
    B: int = 2
    I: int = 3
    H: int = 4
    states: bool = True
    bias: bool = True
    marked: bool = False
    dropout: float = 0.0
    recompute: bool = False
    seed: int = 3
    options: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.members = self.layers * self.directions
        self.flips = sum(2**m for m in range(1, self.directions, 2))
        self.spec = reference.CELLS[self.cell]
        self.options = {}
        if self.marked:
            lengths = [self.T, 0, *range(1, self.B)][: self.B]
            resets = torch.arange(self.T * self.B).view(self.T, self.B) % 5 == 3
            self.options = {"lengths": torch.tensor(lengths), "resets": resets}

    def tensors(self, device="cpu", dtype=torch.float32):
        """All that the group is differentiated by, by name: a member's weights have its number in the name."""
        spec, state = self.spec, (self.members, self.B, self.H)
        rows = spec.gates * self.H
        shapes = {"x": (self.T, self.B, self.I)}
        for name in ("start", "reset"):
            given = self.states if name == "start" else self.marked
            shapes |= {f"{name}{n}": state for n in range(spec.states)} if given else {}
        for m in range(self.members):
            width = self.I if m < self.directions else self.H
            sizes = (rows, width), (rows * spec.recurrent, self.H), (rows,), (rows * spec.recurrent,)
            shapes |= {f"{kind}{m}": size for kind, size in zip(KINDS[: 4 if self.bias else 2], sizes, strict=False) if size[0]}
            shapes |= {f"held{m}": (self.B, spec.held * self.H)} if spec.held else {}
        scale = {"w": self.H**-0.5, "b": 0.5, "h": 0.5}
        made = {name: torch.randn(*shape) * scale.get(name[0], 1) for name, shape in shapes.items()}
        return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in made.items()}

    def _parts(self, tensors):
        starts, resets = (
            tuple(tensors[f"{name}{n}"] for n in range(self.spec.states) if f"{name}{n}" in tensors) or None
            for name in ("start", "reset")
        )
        if not self.spec.recurrent:
            tensors = tensors | {f"w_hh{m}": tensors["x"].new_zeros(0, self.H) for m in range(self.members)}
        weights = [
            Weights(*(tensors.get(f"{kind}{m}") for kind in KINDS), held=tensors.get(f"held{m}")) for m in range(self.members)
        ]
        marks = {name: value.to(tensors["x"].device) for name, value in self.options.items()}
        if self.spec.noise:
            marks["noise"] = torch.arange(self.members, device=tensors["x"].device) * 2**40 - 7
        return tensors["x"], starts, weights, marks | ({"reset_to": resets} if self.marked else {})

    def on_kernels(self, tensors):
        """y and the last states, by `ops.group`."""
        x, starts, weights, options = self._parts(tensors)
        torch.manual_seed(self.seed)
        options |= {"recompute": self.recompute, "dropout": self.dropout}
        found = ops.group(
            self.cell, x, starts, weights, flips=self.flips, stacked=self.directions == 1 and self.members > 1, **options
        )
        return [found.y, *found.last]

    def masks(self, like):
        """What dropout between the layers multiplies by, (layers - 1, T, B, H), or None without dropout."""
        if not self.dropout:
            return None
        torch.manual_seed(self.seed)
        seeds = ops.dropout.seeds(like, self.dropout, self.layers - 1)
        ones = torch.ones(self.T, self.B, self.H, device=like.device)
        return torch.stack([ops.dropout.mask(ones, seed, self.dropout) for seed in seeds.split(1)])

    def by_equations(self, tensors, masks=None):
        """The same, layer after layer, by the equations."""
        x, starts, weights, options = self._parts(tensors)
        lasts, D, masks = [], self.directions, self.masks(x) if masks is None else masks
        for n in range(self.layers):
            own = slice(n * D, (n + 1) * D)
            given = dict(options)
            if self.marked:
                given["reset_to"] = tuple(state[own] for state in options["reset_to"])
            if self.spec.noise:
                given["noise"] = options["noise"][own]
            if n and masks is not None:
                x = x * masks[n - 1].to(x.dtype)
            start = None if starts is None else tuple(state[own] for state in starts)
            found = reference.group(self.cell, x, start, weights[own], flips=self.flips, **given)
            x = found.y
            lasts.append(found.last)
        return [x, *(torch.cat(state) for state in zip(*lasts, strict=True))]
