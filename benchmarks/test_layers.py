"""Times the cases with pytest-benchmark, which has tables, JSON and comparisons. -k chooses cases and providers.

    BENCHMARK_SET=quick pytest benchmarks/ -k "LSTM and (torch.nn or loop)" --benchmark-save=before

A provider that cannot run a case here is left out. A wrong result fails and is not timed. `python -m benchmarks` measures more.
"""

import os

import pytest
import torch

from benchmarks.timing.cases import chosen
from benchmarks.timing.problem import tf32
from benchmarks.timing.providers import Unavailable, all_providers
from benchmarks.timing.run import problem_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for _, case in chosen(os.environ.get("BENCHMARK_SET", "quick").split(), DEVICE)]
ABLE = [(case, one) for case in CASES for one in all_providers().values() if one.obstacle(case, DEVICE) is None]


@pytest.mark.filterwarnings("default")  # other libraries warn
@pytest.mark.parametrize("case, provider", ABLE, ids=[f"{case.id}-{provider.name}" for case, provider in ABLE])
def test_layer(benchmark, case, provider):
    with tf32(case.tf32), provider.settings():
        problem, _ = problem_of(case, DEVICE)
        try:
            ready = provider.ready(problem)
        except Unavailable as reason:
            pytest.skip(str(reason))
        error = problem.check(ready)
        assert error["worst"] <= 1, f"{error['tensor']} has {error['worst']:.3g} times the error allowed; not timed"
        call, wait = problem.call(ready), torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

        def before():
            given = call.before()
            wait()
            return (given,), {}

        benchmark.group = case.id
        benchmark.extra_info.update(case=case.as_dict(), provider=provider.name, error=error, note=ready.note)
        benchmark.pedantic(lambda given: (call.run(given), wait()), setup=before, rounds=30, warmup_rounds=3)
