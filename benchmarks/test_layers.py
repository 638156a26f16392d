"""The cases through pytest-benchmark, for its tables, its JSON and its compare:

    pytest benchmarks/ --set quick --benchmark-save=before
    pytest benchmarks/ --set quick --benchmark-compare=0001

It collects what can run here. A wrong provider fails and gets no time. A clock takes the times; a GPU is idle before and after
them. `python -m benchmarks` measures more, and more carefully.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from benchmarks.timing.problem import tf32
from benchmarks.timing.providers import Unavailable
from benchmarks.timing.run import problem_of

pytestmark = pytest.mark.filterwarnings("default")  # other libraries warn


def test_layer(benchmark, case, provider, device):
    with tf32(case.tf32), provider.settings():
        problem, _ = problem_of(case, device)
        try:
            ready = provider.ready(problem)
        except Unavailable as reason:
            pytest.skip(str(reason))
        error = problem.check(ready)
        assert error["worst"] <= 1, f"{error['tensor']} has {error['worst']:.3g} times the error allowed; not timed"
        call = problem.call(ready)

        def before():
            given = call.before()
            if device == "cuda":
                torch.cuda.synchronize()
            return (given,), {}

        def run(given):
            call.run(given)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.id
        benchmark.extra_info.update(case=case.as_dict(), provider=provider.name, error=error, note=ready.note)
        benchmark.pedantic(run, setup=before, rounds=50, warmup_rounds=3)
