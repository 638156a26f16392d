"""A model of another library on torch.nn and on rnnfast, trained alike and compared."""

from collections.abc import Callable
from typing import Any

import torch

import rnnfast


def same_training(build: Callable[[], Any], loss_of: Callable[[Any], Any], backend: str | None, names: list[str]) -> None:
    """Train a model on torch.nn and its copy on rnnfast for two steps, and compare each loss and all weights at the end.

    Args:
        build: makes a model of torch.nn's layers, without dropout.
        loss_of: called with a model; the loss of a step.
        backend: what rnnfast's layers run on.
        names: the names of the layers that `accelerate` should exchange.
    """
    model, ours, reports = build(), build(), []
    ours.load_state_dict(model.state_dict())
    rnnfast.accelerate(ours, report=reports.append)
    assert [name for name, _ in reports[0].changed] == names, reports[0]
    found = []
    for each in (model, ours):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        values = []
        for _ in range(2):
            with rnnfast.use_backend(backend if each is ours else "torch"):
                loss = loss_of(each)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            values.append(loss.detach())
        found.append([torch.stack(values), *each.state_dict().values()])
    for left, right in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def same_results(run: Callable[..., list[torch.Tensor]], backend: str) -> None:
    """Compare the tensors of ``run(ours=False)``, on torch.nn, with those of ``run(ours=True)``, on rnnfast's `backend`.

    On "torch" they have the same bits, because torch.nn's code runs.
    """
    expected = run(ours=False)
    with rnnfast.use_backend(backend):
        found = run(ours=True)
    if backend == "torch":
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(found, expected)
