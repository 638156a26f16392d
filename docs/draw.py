"""Draws the pictures of pages whose content is predicted or explained: python docs/draw.py writes them into docs/pictures.

    speedups.png    how many times faster than cuDNN our kernels are predicted to be, on an H100 (docs/results.md)
    pipeline.svg    which layer of a stack computes which chunk when (docs/overview.md)
    kernels.svg     the four families of kernels, as programs over time (docs/overview.md)

The programs in examples/ draw the others. Every picture has a light background of its own, for
dark pages.
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image

from benchmarks import where
from rnnfast.choice import pipeline
from rnnfast.choice.tuning_file import Shape
from rnnfast.kernels.persistent.limits import GPUS

PICTURES = Path(__file__).parent / "pictures"
UNITS, ROWS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048), (1, 2, 4, 8, 16, 32, 64, 128, 256)
CLIP = 8.0  # the strongest colour


def speedups(path: Path) -> None:
    """A panel for each cell and dtype, a column an H, a row a B."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), sharex=True, sharey=True, layout="constrained")
    for axis, (cell, dtype) in zip(
        axes.flat, [(cell, dtype) for cell in ("lstm", "gru") for dtype in where.FASTER_DTYPES], strict=True
    ):
        precision = where.FASTER_DTYPES[dtype]
        shapes = [[Shape(cell, dtype, precision, where.FASTER_STEPS, B, H, H, 1, 1, True) for H in UNITS] for B in ROWS]
        found = [[where.ratio(shape, "H100")[0] for shape in row] for row in shapes]
        drawn = axis.imshow(found, cmap="RdBu", norm=LogNorm(1 / CLIP, CLIP), aspect="auto", origin="lower")
        for y, row in enumerate(found):
            for x, times in enumerate(row):
                strong = not 1 / 4 < times < 4
                axis.text(
                    x, y, f"{times:.1f}" if times < where.MOST_FASTER else ">10", ha="center", va="center", fontsize=8,
                    color="white" if strong else "black",
                )  # fmt: skip
        axis.set_title(f"{where.FASTER_CELLS[cell]} {dtype}{' (TF32)' if precision == 'tf32' else ''}", fontsize=11)
        axis.set_xticks(range(len(UNITS)), [str(H) for H in UNITS], fontsize=8)
        axis.set_yticks(range(len(ROWS)), [str(B) for B in ROWS], fontsize=8)
    figure.supxlabel("hidden units H", fontsize=10)
    figure.supylabel("batch rows B", fontsize=10)
    figure.suptitle(
        f"PREDICTED time of cuDNN over that of rnnfast's kernels: H100, training, one layer, T = {where.FASTER_STEPS}",
        fontsize=12,
    )
    bar = figure.colorbar(drawn, ax=axes, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], shrink=0.7)
    bar.ax.set_yticklabels(["8 times slower", "4", "2", "equal", "2", "4", "8 times faster"], fontsize=8)
    bar.ax.minorticks_off()
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:  # a quarter of the bytes
        image.convert("RGB").quantize(64).save(path, optimize=True)


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = "#222", anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#c0392b", width: float = 1.2) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """The picture on a light background."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif"><title>{title}</title>'
    )
    return "\n".join([head, box(0, 0, width, height, "#fcfcfa", "#ddd"), *parts, "</svg>"]) + "\n"


def timeline(path: Path) -> None:
    """A stack's pipeline, forward, as the model plans it for KernelBench's problem 35 on an H100."""
    shape = where.STACKS[35]
    sizes = pipeline.Sizes(4, shape.B, shape.H, 4, shape.precision, False)
    run = pipeline.best("persistent", sizes, shape.T, shape.layers, True, GPUS["H100"])
    assert run is not None and run.parts == 1
    chunks = -(-shape.T // run.chunk)
    rounds, side, left, top = chunks + shape.layers - 1, 29, 74, 58
    parts = [
        text(
            14,
            24,
            f"{shape.layers} layers, {shape.T} time steps in {chunks} chunks of at most {run.chunk} steps",
            15,
            bold=True,
        ),
        text(
            14,
            44,
            "A column is a round: one launch. The number is the chunk that the layer computes. Predicted plan.",
            12,
            "#555",
        ),
    ]
    for layer in range(shape.layers):
        y = top + (shape.layers - 1 - layer) * side
        parts.append(text(left - 8, y + 19, f"layer {layer + 1}", 12, anchor="end"))
        for at in range(rounds):
            chunk = at - layer
            runs = 0 <= chunk < chunks
            shade = f"hsl({205 + 3 * chunk}, 62%, {82 - 2 * chunk}%)" if runs else "#eee"
            parts.append(box(left + at * side, y, side - 2, side - 2, shade))
            if runs:
                dark = chunk >= 7
                parts.append(text(left + at * side + 13.5, y + 18, str(chunk + 1), 11, "#fff" if dark else "#222", "middle"))
    bottom = top + shape.layers * side
    width = left + rounds * side
    parts += [
        line(left, bottom + 8, width - 12, bottom + 8, "#555"),
        text(width - 10, bottom + 24, f"{rounds} rounds; one layer after another: {shape.layers * chunks}", 12, "#555", "end"),
    ]
    path.write_text(svg(width + 14, bottom + 36, "A pipeline of layers", parts), encoding="utf-8")


def families(path: Path) -> None:
    """The four families: a lane is a program, a frame is a launch, a red line is what a program gives to another."""
    left, steps, side, lane = 250, 8, 58, 22
    weights, work = "#f4c95d", "#9cc5e8"
    parts = [
        text(14, 26, "Four families of kernels: programs (lanes) over time steps", 15, bold=True),
        box(14, 40, 16, 12, work), text(36, 51, "a step's product and cell", 12),
        box(196, 40, 16, 12, weights), text(218, 51, "W_hh is read from memory", 12),
        line(392, 46, 412, 46), text(418, 51, "h goes to other programs", 12),
        box(574, 40, 16, 12, "none", "#333"), text(596, 51, "one launch", 12),
    ]  # fmt: skip

    def row(top: float, name: str, words: tuple[str, str], lanes: int) -> None:
        parts.extend([text(14, top + 16, name, 14, bold=True), text(14, top + 33, words[0], 11, "#555")])
        parts.append(text(14, top + 48, words[1], 11, "#555"))
        for number in range(lanes):
            parts.append(text(left - 8, top + number * lane + 15, f"program {number + 1}", 9, "#888", "end"))

    top = 74
    row(top, "step", ("a launch for each step", "any size"), 3)
    for at in range(steps):
        x = left + at * side
        parts.append(box(x, top - 4, side - 8, 3 * lane + 6, "none", "#333"))
        for number in range(3):
            parts += [
                box(x + 4, top + number * lane, 14, lane - 4, weights),
                box(x + 20, top + number * lane, 26, lane - 4, work),
            ]
        if at < steps - 1:
            parts += [line(x + 46, top + a * lane + 9, x + side + 4, top + b * lane + 9) for a in range(3) for b in range(3)]
    top = 170
    row(top, "persistent", ("one launch, W_hh on chip,", "programs wait for each other"), 3)
    parts.append(box(left, top - 4, steps * side - 8, 3 * lane + 6, "none", "#333"))
    for number in range(3):
        parts.append(box(left + 4, top + number * lane, 14, lane - 4, weights))
        parts += [box(left + 26 + at * 50, top + number * lane, 32, lane - 4, work) for at in range(steps)]
    for at in range(steps - 1):
        x = left + 26 + at * 50
        parts += [line(x + 32, top + a * lane + 9, x + 50, top + b * lane + 9) for a in range(3) for b in range(3)]
    top = 266
    row(top, "one-program", ("one launch, all of W_hh in", "each program; small layers"), 3)
    parts.append(box(left, top - 4, 26 + steps * 36 + 2, 3 * lane + 6, "none", "#333"))
    for number in range(3):
        parts.append(box(left + 4, top + number * lane, 14, lane - 4, weights))
        parts += [box(left + 22 + at * 36, top + number * lane, 34, lane - 4, work) for at in range(steps)]
    parts.append(text(left + 330, top + 20, "each program: a few rows,", 11, "#555"))
    parts.append(text(left + 330, top + 36, "all units", 11, "#555"))
    top = 362
    row(top, "scan", ("one launch, no W_hh:", "units wait for nothing"), 3)
    parts.append(box(left, top - 4, 4 + steps * 22 + 4, 3 * lane + 6, "none", "#333"))
    for number in range(3):
        parts += [box(left + 4 + at * 22, top + number * lane, 20, lane - 4, work) for at in range(steps)]
    parts.append(text(left + 200, top + 20, "each program: a few units", 11, "#555"))
    parts.append(text(left + 200, top + 36, "of a few rows", 11, "#555"))
    parts.append(line(left, 444, left + steps * side - 8, 444, "#555"))
    parts.append(text(left + steps * side - 8, 462, "time, not to scale", 11, "#555", "end"))
    path.write_text(svg(left + steps * side + 14, 474, "The four families of kernels", parts), encoding="utf-8")


if __name__ == "__main__":
    matplotlib.use("Agg")
    speedups(PICTURES / "speedups.png")
    timeline(PICTURES / "pipeline.svg")
    families(PICTURES / "kernels.svg")
