"""A new cell against the LSTM: hear a tone for a while, then keep time in silence.

The input is a sine with noise for 24 steps, with a period of 8 to 24 steps, and then nothing for 48 steps. The output is to go
on as the sine would have. A mean over the silence of the squared error of 0.5 is that of an output of zero.

The cell `ringing` is written here, in nine lines. Each of its units is an oscillator: two states, c and d, that turn by a
learned angle at each step and slowly fade. docs/new-cell.md builds it step by step.

    python examples/new_cell.py                  # half a minute on one CPU core
    python -m rnnfast.check --cell examples/new_cell.py:ringing

It writes OUT/new_cell.png: the errors during training, and what both say of two tones.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin are slow on a busy CPU

import torch
from char_lm_support import example_parser, positive, prepare_folder, pyplot_for, run_main, write_atomically
from torch import Tensor, nn, sigmoid, tanh

import rnnfast

HEARD, SILENT = 24, 48  # steps
PERIODS = 8.0, 24.0  # steps of a period of the tone
NOISE = 0.1
BATCH = 64
NAMES = {"ringing": "the new cell", "lstm": "LSTM"}


@rnnfast.cell(gates="i z o", states="h c d")
def ringing(x, h, s, *, turn, fading=rnnfast.Learned(4.0)):
    """Units that ring: c and d turn by twice the angle whose tangent is `turn`, and fade by sigmoid(`fading`), which begins at
    0.98."""
    i, o, z = sigmoid(x.i + h.i), sigmoid(x.o + h.o), tanh(x.z + h.z)
    left = sigmoid(fading) / (1 + turn * turn)
    cos, sin = left * (1 - turn * turn), left * 2 * turn
    c = cos * s.c - sin * s.d + i * z
    d = sin * s.c + cos * s.d
    return o * tanh(c), c, d


class Model(nn.Module):
    """A layer of one of the two cells, and a linear layer that makes a number of its output."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        if name == "lstm":
            self.layer: nn.Module = rnnfast.LSTM(1, size)
        else:
            self.layer = rnnfast.Layer(ringing, 1, size)
            least, most = (math.tan(math.pi / period) for period in reversed(PERIODS))
            nn.init.uniform_(self.layer.get_parameter("turn_l0"), least, most)
        self.out = nn.Linear(size, 1)

    def forward(self, heard: Tensor) -> Tensor:
        output, _ = self.layer(heard)
        return self.out(output)


def tones(count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is heard and what it goes on as, both (HEARD + SILENT, count, 1)."""
    shortest, longest = PERIODS
    period = shortest + (longest - shortest) * torch.rand(count, generator=generator)
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    tone = torch.sin(2 * math.pi * torch.arange(HEARD + SILENT)[:, None] / period + phase)
    heard = tone + NOISE * torch.randn(tone.shape, generator=generator)
    heard[HEARD:] = 0
    return heard[..., None].to(device), tone[..., None].to(device)


def error(model: Model, heard: Tensor, tone: Tensor) -> Tensor:
    """The mean squared error over the silence."""
    return (model(heard) - tone)[HEARD:].square().mean()


def train(model: Model, steps: int, seed: int, device: torch.device) -> list[float]:
    """Returns the error of each step."""
    generator, curve, begun = torch.Generator().manual_seed(seed), [], time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = error(model, *tones(BATCH, generator, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slower.step()
        curve.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"  step {step}/{steps}, {time.perf_counter() - begun:.0f} s: error {curve[-1]:.3f}", flush=True)
    return curve


def draw(curves: dict[str, list[float]], said: dict[str, Tensor], tone: Tensor, path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, (left, *right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, label=NAMES[name])
    left.axhline(0.5, color="0.6", linestyle="--", label="an output of zero")
    left.set(xlabel="training step", ylabel="squared error in the silence", yscale="log")
    left.legend()
    for n, axes in enumerate(right):
        axes.plot(tone[:, n, 0], color="0.7", linewidth=3, label="the tone")
        for name, each in said.items():
            axes.plot(each[:, n, 0], label=NAMES[name])
        axes.axvline(HEARD, color="0.6", linestyle="--")
        axes.set(xlabel="time step, silence from the line on", ylim=(-1.6, 1.6))
    right[0].legend(loc="upper left", fontsize="small")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))
    pyplot.close(figure)


def run_program(argv: list[str] | None) -> None:
    parser = example_parser(__doc__ or "", "new_cell.py", steps=300, out="out/new_cell")
    parser.add_argument("--size", type=positive(int), default=32, metavar="N", help="units (default: %(default)s)")
    args = parser.parse_args(argv)
    prepare_folder(args.out)
    heard, tone = tones(512, torch.Generator().manual_seed(args.seed + 1), args.device)
    curves, said = {}, {}
    for name, title in NAMES.items():
        torch.manual_seed(args.seed)
        model = Model(name, args.size).to(args.device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{title}, {parameters} parameters:\n{rnnfast.explain(model.layer, heard)}", flush=True)
        curves[name] = train(model, args.steps, args.seed, args.device)
        with torch.no_grad():
            said[name] = model(heard).cpu()
            print(f"  error of tones that it was not trained on: {error(model, heard, tone).item():.3f}\n")
    draw(curves, said, tone.cpu(), args.out / "new_cell.png")
    print(f"wrote {args.out / 'new_cell.png'}")


def main(argv: list[str] | None = None) -> int:
    return run_main("new_cell.py", lambda: run_program(argv))


if __name__ == "__main__":
    sys.exit(main())
