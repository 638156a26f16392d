"""The cases through pytest-benchmark, for its tables, its JSON and its compare:

    pytest benchmarks/ --set quick --benchmark-save=before
    pytest benchmarks/ --set quick --benchmark-compare=0001

Only what can run here is collected. A provider that is wrong fails, and has no time. Times are those of the clock, on a GPU
with the GPU idle before and after; `python -m benchmarks` measures more, and more carefully.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from benchmarks.problem import tf32
from benchmarks.providers import Unavailable
from benchmarks.run import problem_of

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
