"""Who can run a case: a `Provider` for each implementation. Each is given the same weights and input, and includes the input
side W_ih x. Those of other libraries are in `benchmarks.peers`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import rnnfast
from benchmarks.cases import Case, Unknown
from benchmarks.problem import Problem, Ready, of_module
from rnnfast import reference
from rnnfast.choice.decide import tensor_obstacles

__all__ = ["BASE", "Provider", "Unavailable", "all_providers", "installed", "named_provider"]

BASE = "torch.nn"  # what every other is compared with
UNROLLED_STEPS = 8  # Inductor takes minutes for 32 steps of a small LSTM in training


class Unavailable(Exception):
    """The provider cannot run this case, as it turned out in making it ready; the message says why."""


class Provider:
    """An implementation.

    Attributes:
        compiles: whether the first call of a case compiles something, whose time is told apart.
        counts_memory: whether what it allocates goes through PyTorch's allocator.
    """

    compiles = False
    counts_memory = True

    def __init__(self, name: str) -> None:
        self.name = name

    def obstacle(self, case: Case, device: str) -> str | None:
        """Why it cannot run `case`, or None."""
        return None

    def settings(self) -> contextlib.AbstractContextManager:
        """What is to be set around all of its calls."""
        return contextlib.nullcontext()

    def ready(self, problem: Problem) -> Ready:
        """Raises `Unavailable` if it cannot after all."""
        raise NotImplementedError


class TorchNN(Provider):
    """torch.nn's layer: cuDNN with its flat weights on a GPU, ATen and oneDNN on a CPU."""

    def ready(self, problem: Problem) -> Ready:
        return of_module(problem.module(getattr(torch.nn, problem.case.cell)))


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RnnFast(Provider):
    """rnnfast's layer on `backend`, None for its own choice; on the Triton backend with the kernels of `family`."""

    def __init__(self, name: str, backend: str | None, family: str | None = None) -> None:
        super().__init__(name)
        self.backend, self.family = backend, family
        self.compiles = backend == "triton"

    def settings(self) -> contextlib.AbstractContextManager:
        # strict: a launch that the driver refuses is an error, and not timed as something else
        return environment(RNNFAST_KERNELS=self.family, RNNFAST_STRICT="1") if self.family else contextlib.nullcontext()

    def obstacle(self, case: Case, device: str) -> str | None:
        if self.backend != "triton":
            return None
        return "; ".join(tensor_obstacles(torch.empty(0, device=device, dtype=case.torch_dtype))) or None

    def ready(self, problem: Problem) -> Ready:
        layer = problem.module(getattr(rnnfast, problem.case.cell), backend=self.backend)
        ready, told = of_module(layer), rnnfast.explain(layer, problem.x)
        if self.backend is None:
            ready.note = f"chose {told.backend}: {told.details.partition(';')[0].partition(',')[0]}"
        elif self.backend == "triton":
            if told.backend != "triton":
                raise Unavailable("; ".join(told.obstacles))
            which = told.details
            if problem.case.mode in ("inference", "forward"):
                which = which.partition("backward: ")[0]
            others = [name for name in ("step", "persistent") if name != self.family and f"{name} kernels" in which]
            if others or f"{self.family} kernels" not in which:
                raise Unavailable(which.partition("not persistent: ")[2].partition(";")[0].strip() or which)
            if problem.device == "cpu":
                ready.note = "in Triton's interpreter: no time of it means anything"
        return ready


def cell_of(case: Case) -> str:
    """The name that `rnnfast.reference` has for the cell."""
    return {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[case.cell]


class Loop(Provider):
    """A loop over time steps in plain PyTorch, as people write it: `rnnfast.reference`'s steps in the dtype of the case.

    With `compiled`, the step went through torch.compile. (The whole loop, unrolled, would compile for minutes.)
    """

    def __init__(self, name: str, compiled: bool) -> None:
        super().__init__(name)
        self.compiles = compiled

    def obstacle(self, case: Case, device: str) -> str | None:
        if case.packed:
            return "this loop takes no packed input"
        if case.T * case.layers * case.directions > 20000:
            return "more than 20000 time steps one by one"
        return None

    def ready(self, problem: Problem) -> Ready:
        case, step = problem.case, reference.STEPS[cell_of(problem.case)]
        names, parameters = list(problem.weights), [w.clone().requires_grad_() for w in problem.weights.values()]
        if self.compiles:
            torch.compiler.reset()
            step = torch.compile(step)

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            last_states = []
            for layer in range(case.layers):
                outputs = []
                for direction in range(case.directions):
                    first = 4 * (layer * case.directions + direction)
                    states = (x.new_zeros(case.B, case.H),) * (2 if case.cell == "LSTM" else 1)
                    ys = []
                    for x_t in reversed(x.unbind(0)) if direction else x.unbind(0):
                        states, _ = step(x_t, states, *parameters[first : first + 4])
                        ys.append(states[0])
                    outputs.append(torch.stack(ys[::-1] if direction else ys))
                    last_states.append(states)
                x = outputs[0] if case.directions == 1 else torch.cat(outputs, dim=-1)
            return x, tuple(torch.stack(states) for states in zip(*last_states, strict=True))

        return Ready(forward, parameters, lambda gradients: dict(zip(names, gradients, strict=True)))


class CompiledNN(Provider):
    """torch.compile of torch.nn's layer, which Inductor decomposes and unrolls over time."""

    compiles = True

    def obstacle(self, case: Case, device: str) -> str | None:
        if case.packed:
            return "Dynamo does not take packed input"
        steps = case.T * case.layers * case.directions
        if steps > UNROLLED_STEPS:
            return f"it would unroll {steps} time steps, and more than {UNROLLED_STEPS} compile for minutes"
        return None

    @contextmanager
    def settings(self) -> Iterator[None]:
        import torch._dynamo

        with torch._dynamo.config.patch(allow_rnn=True):
            yield

    def ready(self, problem: Problem) -> Ready:
        torch.compiler.reset()
        module = problem.module(getattr(torch.nn, problem.case.cell))
        ready, compiled = of_module(module), torch.compile(module)

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, last = compiled(x)
            return y, last if isinstance(last, tuple) else (last,)

        ready.forward = forward
        return ready


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def all_providers() -> dict[str, Provider]:
    from benchmarks import peers

    providers: list[Provider] = [
        TorchNN(BASE),
        RnnFast("rnnfast", None),
        RnnFast("rnnfast-persistent", "triton", "persistent"),
        RnnFast("rnnfast-step", "triton", "step"),
        RnnFast("rnnfast-torch", "torch"),
        CompiledNN("torch.compile-nn"),
        Loop("torch.compile-loop", compiled=True),
        Loop("loop", compiled=False),
        peers.FlashRNN("flashrnn"),
        peers.Haste("haste"),
        peers.OnnxRuntime("onnxruntime"),
    ]
    return {provider.name: provider for provider in providers}


def named_provider(name: str) -> Provider:
    """Raises `benchmarks.cases.Unknown`."""
    providers = all_providers()
    if name not in providers:
        raise Unknown("provider", name, providers)
    return providers[name]
