"""The implementations that can run a case. Each is a `Provider`. All get the same weights and input, and all compute W_ih x.

`benchmarks.timing.providers.peers` has the providers of other libraries.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

import rnnfast
from benchmarks.timing.cases import Case, Unknown
from benchmarks.timing.problem import ModelAround, Problem, Ready, of_module
from rnnfast import reference
from rnnfast.choice.decide import tensor_obstacles
from rnnfast.settings import KERNELS

BASE = "torch.nn"  # every other provider is compared with it
OWN_LAYER = "PyTorch's own layer"  # begins what `explain` says of a call of ours on torch.nn's code
UNROLLED_STEPS = 8  # Inductor takes minutes for 32 steps of a small LSTM in training


class Unavailable(Exception):
    """The provider turns out to be unable to run this case. The message says why."""


class Provider:
    """An implementation.

    Attributes:
        compiles: whether the first call of a case compiles something. That time gets a field of its own.
        counts_memory: whether it allocates through PyTorch's allocator.
    """

    compiles = False
    counts_memory = True

    def __init__(self, name: str) -> None:
        self.name = name

    def obstacle(self, case: Case, device: str) -> str | None:
        """Why it cannot run `case`, or None."""
        return None

    def settings(self) -> contextlib.AbstractContextManager:
        """A context manager around all of its calls."""
        return contextlib.nullcontext()

    def ready(self, problem: Problem) -> Ready:
        """Make the problem ready to run. Raises `Unavailable` if the provider cannot run it after all."""
        raise NotImplementedError


class TorchNN(Provider):
    """torch.nn's layer: cuDNN with its flat weights on a GPU, ATen and oneDNN on a CPU."""

    def ready(self, problem: Problem) -> Ready:
        return of_module(problem.module(getattr(torch.nn, problem.case.cell)))


class RnnFast(Provider):
    """rnnfast's layer on `backend`, or on its own choice if that is None. On "triton", `family` names the kernels."""

    def __init__(self, name: str, backend: str | None, family: str | None = None) -> None:
        super().__init__(name)
        self.backend, self.family = backend, family
        self.compiles = backend == "triton"

    def settings(self) -> contextlib.AbstractContextManager:
        # strict: a launch that the driver refuses is an error. Otherwise another backend would be timed
        chosen = {"RNNFAST_KERNELS": self.family, "RNNFAST_STRICT": "1"} if self.family else {}
        return mock.patch.dict(os.environ, chosen)

    def obstacle(self, case: Case, device: str) -> str | None:
        if self.backend != "triton":
            return None
        return "; ".join(tensor_obstacles(torch.empty(0, device=device, dtype=case.torch_dtype))) or None

    def ready(self, problem: Problem) -> Ready:
        module = problem.module(getattr(rnnfast, problem.case.cell), backend=self.backend)
        layer, args, options = module, (problem.x,), {}
        if isinstance(module, ModelAround):
            layer, (args, options) = module.layer, module.arguments(problem.x)
        ready, told = of_module(module), rnnfast.explain(layer, *args, **options)
        if self.backend != "triton":
            chose = f"chose {told.backend}: " if self.backend is None else ""
            ready.note = chose + told.details.partition(";")[0].partition(",")[0]
        else:
            if told.backend != "triton":
                raise Unavailable("; ".join(told.obstacles))
            which = told.details
            if problem.case.mode in ("inference", "forward"):
                which = which.partition("backward: ")[0]
            others = [name for name in KERNELS.choices if name != self.family and f"{name} kernels" in which]
            if others or f"{self.family} kernels" not in which:
                raise Unavailable(which.partition(f"not {self.family}: ")[2].partition(";")[0].strip() or which)
            if problem.device == "cpu":
                ready.note = "in Triton's interpreter: no time of it means anything"
        return ready


class Loop(Provider):
    """A loop over time steps in Python. It calls the steps of `rnnfast.reference` in the dtype of the case.

    With `compiled`, torch.compile compiles the step. It does not compile the loop, because it would unroll it for minutes.
    """

    def __init__(self, name: str, compiled: bool) -> None:
        super().__init__(name)
        self.compiles = compiled

    def obstacle(self, case: Case, device: str) -> str | None:
        if case.packed or case.model:
            return "this loop takes no packed input, and runs no model"
        if case.T * case.layers * case.directions > 20000:
            return "more than 20000 time steps one by one"
        return None

    def ready(self, problem: Problem) -> Ready:
        case, equations = problem.case, reference.CELLS[problem.case.cell_name].step
        parameters = [weight.clone().requires_grad_() for weight in problem.weights.values()]

        def step(x: Tensor, states: tuple[Tensor, ...], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
            return equations(linear(x, w_ih, b_ih), linear(states[0], w_hh, b_hh), states, ())

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

        return Ready(forward, parameters)


class CompiledNN(Provider):
    """torch.nn's layer under torch.compile. Inductor decomposes it and unrolls it over time."""

    compiles = True

    def obstacle(self, case: Case, device: str) -> str | None:
        if case.packed or case.model:
            return "compiled as a layer alone, without packed input, which Dynamo does not take"
        steps = case.T * case.layers * case.directions
        if steps > UNROLLED_STEPS:
            return f"it would unroll {steps} time steps, and more than {UNROLLED_STEPS} compile for minutes"
        return None

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        import torch._dynamo

        with torch._dynamo.config.patch(allow_rnn=True):
            yield

    def ready(self, problem: Problem) -> Ready:
        torch.compiler.reset()
        module = problem.module(getattr(torch.nn, problem.case.cell))
        return Ready(torch.compile(module), list(module.parameters()))


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def provider_of(family: str) -> str:
    """The name of the provider that runs a family of rnnfast's kernels."""
    return f"rnnfast-{family.replace('_', '-')}"


def all_providers() -> dict[str, Provider]:
    from benchmarks.timing.providers import peers

    families = [name for name in KERNELS.choices if name not in ("auto", "scan")]  # which is for cells without W_hh
    ours = [RnnFast("rnnfast", None), *[RnnFast(provider_of(name), "triton", name) for name in families]]
    ours.append(RnnFast("rnnfast-torch", "torch"))
    loops = [CompiledNN("torch.compile-nn"), Loop("torch.compile-loop", compiled=True), Loop("loop", compiled=False)]
    others = [peers.FlashRNN("flashrnn"), peers.Haste("haste"), peers.TorchRL("torchrl"), peers.OnnxRuntime("onnxruntime")]
    providers: list[Provider] = [TorchNN(BASE), *ours, *loops, *others]
    return {provider.name: provider for provider in providers}


def named_provider(name: str) -> Provider:
    """Raises `benchmarks.timing.cases.Unknown`."""
    providers = all_providers()
    if name not in providers:
        raise Unknown("provider", name, providers)
    return providers[name]
