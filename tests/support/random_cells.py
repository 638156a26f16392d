"""Random cells: programs of operators of PyTorch, each line on what is there already."""

from __future__ import annotations

import linecache
import random

import torch

from rnnfast.derive import definition
from rnnfast.derive.definition import Cell

ONE = (
    "torch.sigmoid(a)", "torch.tanh(a)", "torch.relu(a)", "F.softplus(a)", "F.softsign(a)", "F.silu(a)", "F.gelu(a)",
    "F.elu(a)", "F.hardtanh(a)", "F.leaky_relu(a)", "F.logsigmoid(a)", "F.mish(a)", "F.relu6(a)", "-a", "a.abs()",
    "torch.exp(-a.abs())", "torch.log1p(a.abs())", "torch.sqrt(a * a + 1)", "torch.rsqrt(a * a + 0.5)", "torch.square(a)",
    "torch.expm1(a.clamp(max=2))", "a**2", "a.clamp(-1, 0.7)", "torch.sin(a)", "torch.erf(a)", "1 / (1 + a * a)", "1 - a",
    "0.3 * a + 2", "a.detach() * a", "a.sign() * a",
)  # fmt: skip
TWO = (
    "a + b", "a - b", "a * b", "a / (1 + b.abs())", "torch.maximum(a, b)", "torch.minimum(a, b)",
    "torch.where(a > b, a, b * b)", "torch.where((a > 0) & (b <= 0.5), a * b, a - b)", "torch.lerp(a, b, 0.3)", "torch.addcmul(a, a, b, value=0.5)",
    "a.clone().mul_(b)", "torch.logaddexp(a, b)",
)  # fmt: skip
ROWS = ("row_mean(a)", "a - row_mean(a * b)", "row_norm(a)", "row_norm(a, b)[1]")


def random_cell(seed: int) -> Cell:
    """A cell of 1 to 4 gates and states, 4 to 16 lines; some have learned vectors, noise, whole rows, or no W_hh."""
    picks = random.Random(seed)
    gates, states = (tuple(f"{letter}{n}" for n in range(picks.randint(1, 4))) for letter in "gs")
    learned, noise = (tuple(f"{letter}{n}" for n in range(picks.randint(0, most))) for letter, most in (("w", 2), ("u", 1)))
    recurrent, rows = picks.random() < 0.8, picks.random() < 0.3
    lines, values = [], []
    for gate in gates:
        both = f"x.{gate} + h.{gate}" if recurrent and picks.random() < 0.7 else None
        values += [f"({both})"] if both else [f"x.{gate}", *([f"h.{gate}"] if recurrent else [])]
    values += [f"s.{state}" for state in states] + [*learned, *noise]
    for n in range(picks.randint(4, 16)):
        kinds = ROWS if rows and picks.random() < 0.15 else picks.choice((ONE, TWO))
        names = {"a": picks.choice(values), "b": picks.choice(values)}
        lines.append(f"v{n} = " + "".join(names.get(part, part) for part in _parts(picks.choice(kinds))))
        values.append(f"v{n}")
        if picks.random() < 0.05:
            lines.append(f"keep(v{n} + x.g0{', torch.float32' if picks.random() < 0.5 else ''})")
    new = [f"torch.tanh(v{picks.randrange(n + 1)})" for _ in states]
    arguments = ["x", *(["h"] if recurrent else []), "s"]
    arguments += ["*"] * bool(learned or noise) + [*learned, *(f"{name}: Noise" for name in noise)]
    text = f"def random_{seed}({', '.join(arguments)}):\n    " + "\n    ".join(lines) + f"\n    return {', '.join(new)}\n"
    place = f"<random cell {seed}>"
    linecache.cache[place] = len(text), None, text.splitlines(keepends=True), place
    scope = {name: getattr(definition, name) for name in definition.__all__} | {"torch": torch, "F": torch.nn.functional}
    exec(compile(text, place, "exec"), scope)
    return definition.cell(gates=gates, states=states, recurrent=recurrent)(scope[f"random_{seed}"])


def _parts(text: str) -> list[str]:
    """The text cut before and after each name a or b that stands alone."""
    found = [""]
    for n, letter in enumerate(text):
        around = text[n - 1 : n] + text[n + 1 : n + 2]
        if letter in "ab" and not any(other.isalnum() or (other in "._" and other == text[n - 1 : n]) for other in around):
            found += [letter, ""]
        else:
            found[-1] += letter
    return found
