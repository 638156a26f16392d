"""The numerics contract: how far results may lie from the same computation in float64.

Three figures of each tensor are judged; e is its difference to float64:

    rms      sqrt(mean(e^2))               at most twice torch.nn's, or twice the model's where torch.nn was lucky
    element  max(|e_i| / s_i)              s_i is the error that the model expects of element i
    bias     |sum(r_i)| / sqrt(sum(r_i^2)) with r_i = e_i sign(exact_i) / s_i; in float16 and bfloat16 alone

The model is Monte Carlo arithmetic (Parker, 1997): the float64 computation runs again, and every operation rounds its result at
random to the precision of the dtype. The spread of these runs is the error of an honest computation on this very input, which
one run of torch.nn on a few numbers cannot tell. A right result passes a limit by chance less than once in ten million;
docs/numerics.md says why, and how often it was counted.

    >>> import torch
    >>> from rnnfast import numerics
    >>> x = torch.randn(8, 8)
    >>> def product(x):
    ...     return {"product": x @ x}
    >>> numerics.fault(product(x), product(x), lambda: product(x.double()), torch.float32)
    ''
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnfast.torch_private import TorchDispatchMode, tree_map_only

__all__ = ["Contract", "Verdict", "fault", "named", "rms", "samples_for", "tail", "words", "worst"]

Results = Mapping[str, Tensor]

CHANCE = 1e-7  # of one figure of a right result to be beyond its limit
FACTOR = 2.0  # our error over torch.nn's
SYSTEMATIC = 0.1  # mean over root mean square of an error: what may lean to one side without being a fault
TF32 = 3 * 2.0**-10  # spread of the error of a factor in TF32, which may be cut off and lean to one side: docs/numerics.md
SIGNS = 64  # doubtful signs of relu: up to so many are judged both ways, one by one

# how operations round; all others are exact
KINDS = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), "product")
KINDS |= {"sum": "sum", "mean": "sum", "add": "add", "relu": "relu", "relu_": "relu"}
KINDS |= dict.fromkeys(("add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "addcmul", "pow", "exp"), "other")
KINDS |= dict.fromkeys(("sigmoid_backward", "tanh_backward", "sqrt", "rsqrt", "reciprocal", "hardsigmoid"), "other")
KINDS |= dict.fromkeys(("hardsigmoid_backward", "log_sigmoid_backward", "softplus_backward"), "other")
KINDS |= dict.fromkeys(("log", "log1p", "expm1", "softplus", "sin", "cos", "erf"), "function")
KINDS["log_sigmoid_forward"] = "whole"  # it returns a buffer besides
KINDS |= dict.fromkeys(("sigmoid", "sigmoid_", "tanh", "tanh_"), "function")
KINDS |= dict.fromkeys(("_cudnn_rnn", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"), "whole")
KINDS |= dict.fromkeys(("_cudnn_rnn_backward", "_thnn_fused_lstm_cell_backward_impl", "_thnn_fused_gru_cell_backward"), "whole")


@functools.cache
def _uniform(device: torch.device) -> Tensor:
    """A supply of random numbers between -1/2 and 1/2: an error of rounding to nearest, in units of the last place."""
    return torch.rand(2**20, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float64) - 0.5


class _Arithmetic(TorchDispatchMode):
    """Rounds results to `dtype` at random, in the order of `seed`; not at all if that is None.

    Keeps what enters each relu in `entered`. `signs`: for each relu in order, which elements count as positive; None: those
    that are.
    """

    def __init__(self, dtype: torch.dtype, tf32: bool, seed: int | None, signs: list[Tensor] | None) -> None:
        super().__init__()
        self.eps, self.tf32, self.seed, self.signs = torch.finfo(dtype).eps, tf32, seed, signs
        self.smallest = torch.finfo(dtype).smallest_normal * self.eps if dtype == torch.float16 else 0.0
        self.sums = dtype in (torch.float32, torch.float64)  # whether the sum of a product is rounded after each term
        self.used = 0 if seed is None else seed * 104_729
        self.entered: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(func.overloadpacket.__name__)
        exactly = kind is None or (self.seed is None and kind != "relu")
        if exactly or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        if kind == "relu":
            return self._relu(func, *args)
        if kind == "product":
            return self._product(func, list(args), kwargs or {})
        result = func(*args, **(kwargs or {}))
        if kind == "whole":  # of what happens inside nothing is known: the results are rounded
            return tree_map_only(Tensor, lambda part: self._round_(part, part) if part.is_floating_point() else part, result)
        if kind == "function" and self.sums:  # an exponential, a sum and a quotient: three roundings
            return self._round_(result, result * math.sqrt(3))
        if kind == "sum":
            return self._sum(func, args, kwargs or {}, result)
        if kind != "add" or not isinstance(args[1], Tensor):
            return self._round_(result, result)
        inexact = (result != args[0]) & (result != args[1])  # x + 0 is exact: autograd adds gradients that are mostly zeros
        return self._round_(result, result * inexact)

    def _round_(self, result: Tensor, size: Tensor, eps: float | None = None) -> Tensor:
        """Adds to `result` the errors of rounding numbers as large as `size`."""
        count, supply = result.numel(), _uniform(result.device)
        if count > supply.numel() // 4:
            places = torch.arange(self.used, self.used + count, device=result.device)
            errors = supply[places * 7_919 % supply.numel()]
            self.used += count
        else:
            begin = self.used % (supply.numel() - count)
            errors = supply[begin : begin + count]
            self.used += count
        if self.smallest:  # below the normal numbers of float16 the steps are no longer relative
            size = torch.where(size == 0, 0, size.abs().clamp_min(self.smallest / (eps or self.eps)))
        return result.addcmul_(errors.view(result.shape), size, value=eps or self.eps)

    def _product(self, func, args: list, kwargs: dict) -> Tensor:
        first = len(args) - 2  # addmm and its kind take a summand before the factors
        if self.tf32:
            args[first:] = (self._round_(arg.clone(), arg, TF32) for arg in args[first:])
        result = func(*args, **kwargs)
        return self._terms(result, args[first].shape[-1], lambda: func(*(arg.square() for arg in args), **kwargs))

    def _sum(self, func, args: tuple, kwargs: dict, result: Tensor) -> Tensor:
        terms = args[0].numel() // max(1, result.numel())
        part = 1 / terms if func.overloadpacket.__name__ == "mean" else 1.0
        return self._terms(result, terms, lambda: func(args[0].square(), *args[1:], **kwargs).mul_(part))

    def _terms(self, result: Tensor, terms: int, squares: Callable[[], Tensor]) -> Tensor:
        """Rounds sums of so many terms, one after another. Of random signs, partial sums grow as a random walk does."""
        self._round_(result, result)
        return self._round_(result, squares().mul_(terms / 2).sqrt_()) if self.sums and terms > 1 else result

    def _relu(self, func, z: Tensor) -> Tensor:
        self.entered.append(z.detach().clone())
        if self.signs is None:
            return func(z)
        result = z.clamp_min(torch.finfo(z.dtype).tiny).mul_(self.signs[len(self.entered) - 1])
        return z.copy_(result) if func.overloadpacket.__name__ == "relu_" else result


def samples_for(steps: int) -> int:
    """How often the model is to run, for time steps of all layers and directions. A long run has numbers enough."""
    return 8 if steps <= 256 else 3


def rms(tensor: Tensor) -> float:
    """Root mean square, in float64; 0 for no elements."""
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


@functools.lru_cache(4096)
def tail(freedom: float, samples: float, chance: float) -> float:
    """How many times as large as in `samples` runs a root mean square may be in one more run, but for a `chance`.

    `freedom` is how many independent normal numbers the mean is over. Chernoff's bound on the ratio of the mean squares, an F
    distribution: P(ratio > t) <= (((samples + t) / (samples + 1))^(samples + 1) / t)^(-freedom / 2). Returns the root of t.
    """
    goal, low, high = -2 * math.log(chance) / freedom, 0.0, 600.0  # low and high bracket the logarithm of t
    for _ in range(50):
        middle = (low + high) / 2
        found = (samples + 1) * math.log((samples + math.exp(middle)) / (samples + 1)) - middle
        low, high = (middle, high) if found < goal else (low, middle)
    return math.exp(high / 2)


@dataclass(frozen=True)
class Verdict:
    """One figure of one tensor: ours, torch.nn's, and the limit. `figure`: "rms", "element", "bias"; "shape" or "places of NaN
    and Inf" where those are wrong."""

    tensor: str
    figure: str
    ours: float
    theirs: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed

    @property
    def share(self) -> float:
        """ours / allowed; infinite for a NaN, and for an error where none is allowed."""
        if self.ours <= self.allowed:
            return self.ours / self.allowed if self.allowed else 0.0
        return self.ours / self.allowed if self.allowed and not math.isnan(self.ours) else math.inf


@dataclass(frozen=True)
class _Expected:
    """What the model says of one tensor.

    Attributes:
        exact: the float64 result.
        finite: where it is finite in the dtype.
        rms: root mean square of the error.
        elements: s_i, the error of each element; never much less than `rms`.
        freedom: how many independent numbers the error amounts to; 1 if all elements err together.
        lean: the mean square of the bias; 1 if the elements err independently.
        flips: what each doubtful sign of a relu changes.
    """

    exact: Tensor
    finite: Tensor
    rms: float
    elements: Tensor
    freedom: float
    lean: float
    flips: list[Tensor]


class Contract:
    """What the results of one computation on one input may be. Judges any number of results.

    Args:
        exact: computes the results in float64, each under its name. It is called some ten times, mostly with its operations
            rounded at random, so it consists of PyTorch's operations and is the same computation each time.
        theirs: torch.nn's results in `dtype`, from the same numbers; None for the limits of the model alone.
        dtype: of the results.
        tf32: whether products of float32 may use TF32.
        samples: how often the model runs.
    """

    def __init__(
        self, exact: Callable[[], Results], theirs: Results | None, dtype: torch.dtype, tf32: bool = False, samples: int = 8
    ) -> None:
        self.dtype, self.tf32, self.samples, self._exact = dtype, tf32, samples, exact
        self._theirs = {name: tensor.detach() for name, tensor in (theirs or {}).items()}
        right, entered = self._run(None, None)
        positive = [z > 0 for z in entered]
        errors: dict[str, list[Tensor]] = {name: [] for name in right}
        moved = [torch.zeros_like(z) for z in entered]
        for seed in range(samples):
            found, noisy = self._run(seed, positive)
            for name, tensor in found.items():
                errors[name].append(tensor.sub_(right[name]))
            for total, z, exactly in zip(moved, noisy, entered, strict=True):
                total += (z - exactly).square() / samples
        flips: list[dict[str, Tensor]] = []
        # A sign is doubtful where rounding may change it. The gradient jumps there, and both values are right.
        doubtful = [z.abs() <= 6 * (square + square.mean()).sqrt() for z, square in zip(entered, moved, strict=True)]
        places = [(n, tuple(place)) for n, each in enumerate(doubtful) for place in each.nonzero().tolist()]
        if len(places) <= SIGNS:
            for n, place in places:
                signs = [*positive[:n], positive[n].clone(), *positive[n + 1 :]]
                signs[n][place] = ~signs[n][place]
                flips.append({name: tensor.sub_(right[name]) for name, tensor in self._run(None, signs)[0].items()})
        else:  # so many change in every run that the runs show what they do
            errors = {name: [] for name in right}
            for seed in range(samples):
                for name, tensor in self._run(seed, None)[0].items():
                    errors[name].append(tensor.sub_(right[name]))
        self.expected = {name: self._expect(right[name], errors[name], [flip[name] for flip in flips]) for name in right}

    def _run(self, seed: int | None, signs: list[Tensor] | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        with _Arithmetic(self.dtype, self.tf32, seed, signs) as mode:
            return {name: tensor.detach().clone() for name, tensor in self._exact().items()}, mode.entered

    def _expect(self, exact: Tensor, errors: list[Tensor], flips: list[Tensor]) -> _Expected:
        finite = exact.to(self.dtype).isfinite()
        stack = torch.stack(errors).flatten(1)
        if not bool(finite.all()):
            stack = torch.where(finite.flatten() & stack.isfinite(), stack, 0)
        squares = stack.square().mean(0)
        size = squares.mean().sqrt().item() if squares.numel() else 0.0
        if not size:
            return _Expected(exact, finite, 0.0, torch.zeros_like(exact), 1.0, 1.0, [])
        elements = (squares + size**2).sqrt()
        alike = (stack @ stack.t() / stack.shape[1]).square()  # of runs i and j; its mean is that of n numbers' over n
        pairs = (alike.sum() - alike.diagonal().sum()).item() / (len(errors) * (len(errors) - 1))
        freedom = min(max(1.0, size**4 / pairs), stack.shape[1]) if pairs else stack.shape[1]
        lean = sum(_bias(error, exact, elements) ** 2 for error in stack) / len(errors)
        elements = elements.view(exact.shape)
        flips = [flip for flip in flips if bool((flip.abs() > 12 * elements).any())]  # the others are within the rounding
        return _Expected(exact, finite, size, elements, freedom, lean, flips)

    def exact(self, name: str) -> Tensor:
        return self.expected[name].exact

    def judge(self, ours: Results) -> list[Verdict]:
        """The figure of each tensor that is nearest to its limit, or furthest beyond it."""
        if odd := self.expected.keys() ^ ours.keys():
            raise ValueError(f"the results differ in {', '.join(sorted(odd))}")
        return [worst(self.figures(name, ours[name])) for name in self.expected]

    def figures(self, name: str, ours: Tensor) -> list[Verdict]:
        """All figures of one tensor."""
        expected, ours = self.expected[name], ours.detach()
        exact, finite = expected.exact, expected.finite
        theirs = self._theirs.get(name, exact)
        if ours.shape != exact.shape:
            return [Verdict(name, "shape", math.inf, 0.0, 0.0)]
        if not bool(finite.all()):
            stored = exact.to(self.dtype)
            same = torch.where(finite, ours.isfinite(), (ours == stored) | (ours.isnan() & stored.isnan()))
            if not bool(same.all()):
                return [Verdict(name, "places of NaN and Inf", math.inf, 0.0, 0.0)]
        mine, their = (torch.where(finite, tensor.double() - exact, 0) for tensor in (ours, theirs))
        their_rms = rms(their)
        # where torch.nn's error may be that of another sign, the model alone counts
        size = max(expected.rms, their_rms) if math.isfinite(their_rms) and not expected.flips else expected.rms
        both_ways = FACTOR * sum(rms(flip) for flip in expected.flips)
        limit = max(FACTOR, tail(expected.freedom, self.samples, CHANCE)) * size + both_ways
        found = [Verdict(name, "rms", rms(mine), their_rms, limit)]
        if not expected.rms or not exact.numel():
            return found
        limit = tail(1, 2 * self.samples, CHANCE / exact.numel())
        scale = expected.elements * (size / expected.rms)
        for flip in expected.flips:
            scale = scale + flip.abs() * (FACTOR / limit)
        largest, theirs_largest = ((error.abs() / scale).max().item() for error in (mine, their))
        found.append(Verdict(name, "element", largest, theirs_largest, limit))
        if self.dtype.itemsize == 2 and not expected.flips:
            alike = math.sqrt(exact.numel() / expected.freedom)  # as if known from 16 more runs; the gradient of a weight leans
            lean = (self.samples * expected.lean + 16 * max(1.5, alike)) / (self.samples + 16)
            limit = SYSTEMATIC * math.sqrt(exact.count_nonzero().item()) + math.sqrt(max(1.0, lean) * 2 * math.log(2 / CHANCE))
            ours_leans, theirs_leans = (abs(_bias(error, exact, expected.elements)) for error in (mine, their))
            found.append(Verdict(name, "bias", ours_leans, theirs_leans, limit))
        return found


def _bias(error: Tensor, exact: Tensor, elements: Tensor) -> float:
    """How far the errors of all elements lean towards larger or smaller numbers. By chance it is normal, of variance 1."""
    relative = error.flatten() * exact.flatten().sign() / elements.flatten()
    size = relative.square().sum().sqrt().item()
    return relative.sum().item() / size if size else 0.0


def worst(verdicts: list[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: verdict.share)


def words(verdict: Verdict) -> str:
    """What is wrong, empty if nothing is."""
    if verdict.ok:
        return ""
    if verdict.figure in ("rms", "element", "bias"):
        what = {"rms": "error", "element": "error of an element", "bias": "bias"}[verdict.figure]
        return f"{verdict.tensor}: {what} {verdict.ours:.1e}, allowed {verdict.allowed:.1e}"
    return f"{verdict.tensor}: the {verdict.figure} {'is' if verdict.figure == 'shape' else 'are'} wrong"


def fault(ours: Results, theirs: Results, exact: Callable[[], Results], dtype: torch.dtype, tf32: bool = False) -> str:
    """What is wrong with `ours`, in words; empty if nothing is. The other arguments are those of `Contract`."""
    return words(worst(Contract(exact, theirs, dtype, tf32).judge(ours)))


def named(tensors) -> dict[str, Tensor]:
    """Results in a row, named by their place."""
    return {f"result {n}": tensor for n, tensor in enumerate(tensors)}
