"""Options of ``pytest benchmarks/``; see test_layers.py."""

from benchmarks.timing.cases import SETS, Unknown, chosen
from benchmarks.timing.providers import all_providers, named_provider


def pytest_addoption(parser):
    group = parser.getgroup("rnnfast benchmarks")
    group.addoption("--set", nargs="+", default=["quick"], help=f"sets of cases, of {', '.join(SETS)}")
    group.addoption("--only-case", nargs="+", help="patterns: of these sets, what matches")
    group.addoption("--provider", nargs="+", help=f"of {', '.join(all_providers())}; all if not given")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def pytest_generate_tests(metafunc):
    import pytest
    import torch

    option = metafunc.config.getoption
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        cases = [case for _, case in chosen(option("--set"), device, option("--only-case"))]
        providers = [named_provider(name) for name in option("--provider") or all_providers()]
    except Unknown as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize(
        "case, provider, device",
        [
            pytest.param(case, provider, device, id=f"{case.id}-{provider.name}")
            for case in cases
            for provider in providers
            if provider.obstacle(case, device) is None
        ],
    )
