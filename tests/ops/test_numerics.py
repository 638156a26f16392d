"""The numerics contract: right results pass, however lucky torch.nn was, and planted faults do not."""

import math

import pytest
import torch

from rnnfast import numerics
from rnnfast.numerics import Contract, fault, named, rms, tail
from tests import power as study

pytestmark = pytest.mark.same_everywhere

KINDS = [number for number in range(96) if study.Draw.case_of(number).H == 15 and study.Draw.case_of(number).T == 3]


DRAWS = [(number, False) for number in KINDS]
DRAWS += [(number, True) for number in KINDS if study.Draw.case_of(number).dtype == torch.float32]


@pytest.mark.parametrize("number, tf32", DRAWS, ids=[f"{study.Draw.case_of(n)}{' TF32' * tf32}" for n, tf32 in DRAWS])
def test_right_and_wrong(number, tf32):
    """Every cell and dtype, and TF32: no false alarm on right programs and the kernels, and every planted fault is found."""
    draw = study.Draw(number, tf32)
    for program, found in draw.right(0):
        worst = numerics.worst([numerics.worst(draw.alone.figures(name, tensor)) for name, tensor in found.items()])
        assert worst.ok, (program, worst)
    planted = 0
    for name, found in draw.wrong():
        assert not numerics.worst(draw.contract.judge(found)).ok or "fewer than" in name, name
        planted += 1
    assert planted >= 3


def product(x, w):
    return {"product": x @ w}


def numbers(dtype=torch.float32):
    return torch.randn(6, 40).to(dtype), torch.randn(40, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lucky_torch_nn(dtype):
    """A torch.nn without any error of its own takes nothing from what is allowed: chance gave it, and chance may not."""
    x, w = numbers(dtype)
    exact = lambda: product(x.double(), w.double())  # noqa: E731
    lucky = {name: tensor.to(dtype) if dtype != torch.float32 else tensor for name, tensor in exact().items()}
    assert not fault(product(x, w), lucky, exact, dtype)
    assert Contract(exact, lucky, dtype).judge(product(x, w)) == Contract(exact, None, dtype).judge(product(x, w)) or (
        dtype != torch.float32
    )


def test_twice_torch_nn():
    """A torch.nn with a large error allows twice that, and no more."""
    x, w = numbers()
    exact = lambda: product(x.double(), w.double())  # noqa: E731
    noise = 1e-3 * torch.randn(6, 7)
    theirs = {"product": x @ w + noise}
    assert not fault({"product": x @ w - 1.5 * noise}, theirs, exact, torch.float32)
    figure, *_ = Contract(exact, theirs, torch.float32).figures("product", x @ w - 9 * noise)
    assert figure.figure == "rms" and not figure.ok and 1.99 < figure.allowed / rms(noise) < 2.2


def test_tf32():
    """TF32 is wrong for float32, and right where it is allowed, rounded or truncated. Factors cut to bfloat16 are wrong."""
    x, w = torch.randn(30, 40), torch.randn(40, 30)
    exact, theirs = lambda: product(x.double(), w.double()), product(x, w)
    for kind in (study.ROUNDED, study.TRUNCATED):
        ours = product(kind(x), kind(w))
        assert fault(ours, theirs, exact, torch.float32) and not fault(ours, theirs, exact, torch.float32, tf32=True)
    cut = study._cut(16)
    assert fault(product(cut(x), cut(w)), theirs, exact, torch.float32, tf32=True)


def test_nothing_zero_and_not_finite():
    """Empty tensors, tensors of zeros, NaN and Inf: what is exact must be equal, and NaN and Inf where they belong."""
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e5])
    exact = lambda: {  # noqa: E731
        "empty": torch.zeros(0, 3, dtype=torch.float64) * 2, "zeros": torch.zeros(3).double() * 2,
        "values": values.double() * 1.0,
    }  # fmt: skip
    contract = Contract(exact, None, torch.float16)  # 1e5 is infinite in it
    right = {name: tensor.half() for name, tensor in exact().items()}
    assert all(verdict.ok for verdict in contract.judge(right))
    assert contract.judge(right | {"zeros": torch.tensor([0, 0, 1e-7])})[1].share == math.inf
    for place in range(5):
        changed = right["values"].clone()
        changed[place] = 3.0 if place else math.nan
        worst = numerics.worst(contract.judge(right | {"values": changed}))
        assert numerics.words(worst) == "values: the places of NaN and Inf are wrong"
    assert numerics.words(numerics.worst(contract.judge(right | {"zeros": torch.zeros(2)}))) == "zeros: the shape is wrong"
    with pytest.raises(ValueError, match="the results differ in empty"):
        contract.judge({name: right[name] for name in ("zeros", "values")})
    assert rms(torch.zeros(0)) == 0 and rms(torch.tensor([3, 4])) == math.sqrt(12.5)


@pytest.mark.parametrize("z, ok", [(3e-4, True), (-3e-4, True), (0.3, False), (-0.3, False)])
def test_doubtful_signs_of_relu(z, ok):
    """A gradient that jumps at zero is right on either side of it, if rounding may have changed the sign, and only then."""
    x = torch.full((2, 8), 0.5)
    x[0, 0] += z - 0.5
    x, one = x.bfloat16(), torch.ones(2, 8)

    def gradient(x, sign=1):
        x = x.detach().requires_grad_()
        return named(torch.autograd.grad(torch.relu(x * 1.0 + one.to(x) - one.to(x)), x, one.to(x)))

    theirs = gradient(x)
    ours = {name: tensor.clone() for name, tensor in theirs.items()}
    ours["result 0"][0, 0] = 1 - (x[0, 0] > 0).to(x.dtype)
    exact = lambda: gradient(x.double())  # noqa: E731
    assert bool(fault(ours, theirs, exact, torch.bfloat16)) == (not ok)
    ours["result 0"][1, 1] = 0  # far from zero
    assert fault(ours, theirs, exact, torch.bfloat16)


@pytest.mark.parametrize("freedom, samples", [(1, 8), (5, 8), (40, 3)])
def test_tail_is_a_bound(freedom, samples):
    """Chernoff's bound, against chance: not more often than it says, and within a factor of 40."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda n: torch.randn(100_000, n, generator=generator).square().mean(1)  # noqa: E731
    ratio = (normal(freedom) / normal(samples * freedom)).sqrt()
    above = (ratio > tail(freedom, samples, 1e-2)).double().mean().item()
    assert 1e-2 / 40 < above <= 1e-2
    assert tail(freedom, samples, 1e-7) > tail(freedom, samples, 1e-2) > tail(2 * freedom, samples, 1e-2) > 1


def test_every_draw_is_the_same():
    """The model draws from a fixed supply: two contracts of one computation have the same limits."""
    x, w = numbers()
    one, two = (Contract(lambda: product(x.double(), w.double()), product(x, w), torch.float32) for _ in range(2))
    assert one.judge(product(x, w)) == two.judge(product(x, w))


def test_large_results():
    """More numbers than the supply of random ones has."""
    x = torch.rand(600, 600)
    twice = lambda x: {"y": x * 1.1}  # noqa: E731
    exact = lambda: {"y": x.double() * torch.tensor(1.1, dtype=torch.float32).double()}  # noqa: E731
    contract = Contract(exact, twice(x), torch.float32)
    assert all(verdict.ok for verdict in contract.judge(twice(x)))
    wrong = twice(x)
    wrong["y"][7, 9] += 0.1
    assert numerics.words(numerics.worst(contract.judge(wrong))).startswith("y: error ")


def test_study(capsys):
    """The command's tables, of a few draws; it fails for a false alarm and for a fault that it missed."""
    rows = study.study(range(0, 3, 2))
    assert study.report({"AVX2": [rows]}) == 0
    text = capsys.readouterr().out
    assert "| AVX2 | Triton kernels | 14 | 0 |" in text and "| TF32 for float32 | 2 | 2 | 1.0000 |" in text
    assert study.report({"AVX2": [rows | {"alarms": {"torch.nn": 1}}]}) == 1
    assert study.report({"AVX2": [rows | {"caught": rows["caught"] | {"TF32 for float32": 1}}]}) == 1


def test_extrapolated_tail():
    """An exponential is continued as it is."""
    shares = [0.03 * -math.log((n + 0.5) / 100_000) for n in range(100_000)]
    assert math.exp(-1 / 0.03) / 3 < study.tail(shares, 0.001) < 3 * math.exp(-1 / 0.03)
    assert math.isnan(study.tail(shares[:100], 0.001))
