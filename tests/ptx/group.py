"""Groups whose kernels run as compiled: each member against the reference, under the numerics contract.

The host functions of a family are called with raw buffers, so that the launches are those of a group whatever the operators
choose.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch

from rnnfast import reference
from rnnfast.kernels import one_program, persistent
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent.plan import PersistentPlan
from rnnfast.numerics import Contract, Verdict
from tests.support.recurrence import Layer as Recurrence
from tests.support.recurrence import Members

PLANS: dict[str, tuple[ModuleType, Any]] = {
    "one_program": (one_program, OneProgramPlan(2, 32, 2, 100)),
    "persistent": (persistent, PersistentPlan(8, 8, 16, 2, 32, 2, 100, 132)),  # four programs a member
}


class GroupOfLayers(NamedTuple):
    """Members of one family in chunks of N steps. `kind`: "directions", two of them, or "layers", three as a pipeline. Without
    `backward` only forward runs."""

    family: str  # of `PLANS`
    kind: str
    T: int = 3
    N: int = 2
    B: int = 3
    H: int = 29

    def __str__(self) -> str:
        return f"{self.family} {self.kind} lstm float16 H={self.H} B={self.B} T={self.T} N={self.N}"

    def run(self, backward: bool = True) -> list[Verdict]:
        """Each member's tensors against the reference in float64."""
        flips = (False, True) if self.kind == "directions" else (False,) * 3
        layers = [
            Recurrence("lstm", torch.float16, self.T, self.B, self.H, reverse=flip, seed=seed)
            for seed, flip in enumerate(flips)
        ]
        members, (family, plan) = Members(layers, self.N), PLANS[self.family]
        forwards = members.forward(family, plan)
        found: dict[str, torch.Tensor] = {}
        for m, (h, c, _) in enumerate(forwards):
            found |= {f"y of member {m}": h, f"c of member {m}": c[0 if layers[m].reverse else -1]}
        if backward:
            for m, (d_gates, _, d_c) in enumerate(members.backward(family, plan, forwards)):
                found |= {f"gradient of x of member {m}": d_gates, f"gradient of c0 of member {m}": d_c}

        def exact() -> dict[str, torch.Tensor]:
            results = [_by_reference(layer, backward) for layer in layers]
            return {f"{name} of member {m}": tensor for m, named in enumerate(results) for name, tensor in named.items()}

        return Contract(exact, None, torch.float16).judge(found)


def _by_reference(layer: Recurrence, backward: bool) -> dict[str, torch.Tensor]:
    """The same of one member in float64: the input side enters by a product with the identity."""
    doubles = [tensor.double() for tensor in (layer.x, layer.h0, layer.c0, layer.w, layer.bias_x, layer.bias_h)]
    x, h0, c0, w, bias_x, bias_h = doubles
    x.requires_grad_(), c0.requires_grad_()
    eye = torch.eye(len(w), dtype=torch.float64)
    y, last = reference.layer("lstm", x, (h0, c0), eye, w, bias_x, bias_h, reverse=layer.reverse)
    found = {"y": y, "c": last[1]}
    if backward:
        upstream = [tensor.double() for tensor in (layer.dy, layer.d_h, layer.d_c)]
        grads = torch.autograd.grad([y, *last], [x, c0], upstream)
        found |= {"gradient of x": grads[0], "gradient of c0": grads[1]}
    return found
