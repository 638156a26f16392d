"""Show what a recurrent layer does: the layer unfolded in time, and its gates and states while it reads a sentence.

A small character model (embedding, one `rnnfast.LSTM`, a softmax at every step) learns the English text that ships inside
Python. Then it reads a sentence twice: in one call of the layer, and with T feed-forward layers, one for each character. Each
of these has a copy of the layer's weights. The outputs are equal, and each gradient of the layer is the sum of the T layers'
gradients.

Last, the program draws the cells that correlate best with a property of the text (an open quotation, an open bracket, the
length of a word), and their gates.

    python examples/unfolded.py                  # about a minute on one CPU core
    python examples/unfolded.py --sentence 'Say "hello" twice, then "good night".' --text book.txt --steps 3000

It writes OUT/gates.png.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin are slow on a busy CPU

import torch
import torch.nn.functional as F
from char_lm_support import (
    BITS,
    UserError,
    example_parser,
    positive,
    prepare_folder,
    pyplot_for,
    read_corpus,
    run_main,
    streams,
    write_atomically,
)
from torch import Tensor, nn

import rnnfast

SENTENCE = (
    '\n   Return "True" if the mapping (a "dict", say) has the key, else "False";'
    '\n   a missing key (see above) raises a "KeyError".'
)
BATCH, LENGTH = 32, 64  # streams of text; characters of each in a chunk, through which gradients go back
HELD_OUT = 20000  # held-out characters over which `find_cells` computes correlations


class CharModel(nn.Module):
    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, (size + 1) // 2)
        self.layer = rnnfast.LSTM((size + 1) // 2, size)
        self.head = nn.Linear(size, vocabulary)


class FeedForward(nn.Module):
    """One time step of the layer: a feed-forward layer from (x_t, h_{t-1}, c_{t-1}) to (h_t, c_t)."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        for name, weight in layer.named_parameters():
            self.register_parameter(name, copy.deepcopy(weight))

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0) + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def train(model: CharModel, tokens: Tensor, steps: int) -> None:
    """Truncated back-propagation: read streams of text in chunks, and carry the detached state from chunk to chunk."""
    data = streams(tokens, BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    losses, begun, state = [], time.perf_counter(), None
    for step in range(1, steps + 1):
        start = (step - 1) % ((len(data) - 1) // LENGTH) * LENGTH
        chunk = data[start : start + LENGTH + 1]
        state = None if start == 0 else tuple(part.detach() for part in state)
        output, state = model.layer(model.embedding(chunk[:-1]), state)
        loss = F.cross_entropy(model.head(output).flatten(0, 1), chunk[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, steps // 6) == 0 or step == steps:
            bits, seconds = torch.stack(losses[-50:]).mean().item() * BITS, time.perf_counter() - begun
            print(f"step {step}/{steps}, {seconds:.0f} s: {bits:.2f} bits per character", flush=True)


def unfold(model: CharModel, tokens: Tensor) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """Read (T + 1, 1) characters with the layer and with T feed-forward layers.

    Returns:
        For the outputs, the last state and each weight's gradient: the largest difference and the largest absolute value.
        For each of the T layers: the norm of the gradient of the last character's loss with respect to its biases b_hh.
    """
    layer, T = model.layer, len(tokens) - 1
    x = model.embedding(tokens[:-1]).detach()

    def losses(output: Tensor) -> Tensor:
        return F.cross_entropy(model.head(output).flatten(0, 1), tokens[1:].flatten(), reduction="none")

    output, (_, last) = layer(x)
    sums = torch.autograd.grad(losses(output).sum(), list(layer.parameters()))

    layers = [FeedForward(layer) for _ in range(T)]
    h = c = x.new_zeros(1, layer.hidden_size)
    outputs = []
    for t in range(T):
        h, c = layers[t](x[t], h, c)
        outputs.append(h)
    found = losses(torch.stack(outputs))
    names = [name for name, _ in layer.named_parameters()]
    parts = torch.autograd.grad(found.sum(), [w for step in layers for w in step.parameters()], retain_graph=True)
    pairs = {"output h_t": (output, torch.stack(outputs)), "last state c_T": (last[0], c)}
    for n, name in enumerate(names):
        pairs[f"gradient of {name}"] = (sums[n], torch.stack(parts[n :: len(names)]).sum(0))
    compared = {name: ((a - b).abs().max().item(), a.abs().max().item()) for name, (a, b) in pairs.items()}
    reach = torch.autograd.grad(found[-1], [step.bias_hh_l0 for step in layers])
    return compared, [part.norm().item() for part in reach]


def visible(text: str) -> dict[str, list[float]]:
    """Properties of a text at each character. A blank line closes open quotations and brackets."""
    quoted, bracketed, letters = [], [], []
    inside, depth, since = False, 0, 0
    for n, character in enumerate(text):
        blank = text.startswith("\n\n", n)
        inside = not blank and inside != (character == '"')
        depth = 0 if blank else max(0, depth + (character == "(") - (character == ")"))
        since = since + 1 if character.isalpha() else 0
        quoted.append(float(inside))
        bracketed.append(float(depth > 0))
        letters.append(min(since, 10) / 10)
    return {"a quotation is open": quoted, "a bracket is open": bracketed, "letters since the word began": letters}


@torch.no_grad()
def find_cells(model: CharModel, tokens: Tensor, text: str) -> dict[str, tuple[int, float]]:
    """For each property of `visible`: the cell whose tanh(c_t) correlates best with it, and the correlation.

    The text is read as 8 streams.
    """
    _, _, states = model.layer(model.embedding(streams(tokens, 8)), return_all_states=True)
    shown = states[0][1].tanh().double().flatten(0, 1)
    found = {}
    for name, values in visible(text).items():
        wanted = streams(torch.tensor(values, dtype=torch.float64, device=shown.device), 8).reshape(-1, 1)
        correlations = torch.corrcoef(torch.cat([shown, wanted], 1).T)[-1, :-1].nan_to_num()
        cell = correlations.abs().argmax().item()
        found[name] = (cell, correlations[cell].item())
    return found


def draw(text: str, cells: dict[str, tuple[int, float]], states, gates: Tensor, reach: list[float], path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    sizes = [2, 1] * len(cells) + [1.4]
    figure, axes = pyplot.subplots(len(sizes), 1, figsize=(15, 10), height_ratios=sizes, layout="constrained")
    h, shown = states[0][:, 0].cpu().numpy(), states[1][:, 0].tanh().cpu().numpy()
    gates = gates[:, 0, 0].cpu().numpy()
    for n, (name, (cell, correlation)) in enumerate(cells.items()):
        line, strip = axes[2 * n], axes[2 * n + 1]
        seen = visible(text)[name]
        line.fill_between(range(len(text)), seen, step="mid", color="0.88", label=name)
        line.plot(shown[:, cell], color="C3", label="tanh(c)")
        line.plot(h[:, cell], color="C0", label="h = o tanh(c)")
        line.set_title(
            f"cell {cell}: {name} (correlation {correlation:+.2f} with tanh(c) over held-out text)", loc="left", size=10
        )
        line.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, fontsize=8, frameon=False)
        image = strip.imshow(gates[:, :, cell].T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        strip.set_yticks(range(4), ["input i", "forget f", "new g", "output o"], size=8)
    figure.colorbar(image, ax=axes[:-1], shrink=0.3, pad=0.01)
    axes[-1].semilogy(reach, color="C2", marker=".")
    title = (
        "gradient that the loss of the last character leaves in each of the T feed-forward layers (norm, biases of the gates)"
    )
    axes[-1].set_title(title, loc="left", size=10)
    for axis in axes:
        axis.set_xlim(-0.5, len(text) - 0.5)
        axis.set_xticks([])
    for axis in axes[1::2]:
        axis.set_xticks(range(len(text)), text.replace("\n", "\u21b5").replace(" ", "\u00b7"), family="monospace", size=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=72))
    pyplot.close(figure)


def run_program(argv: list[str] | None) -> None:
    parser = example_parser(__doc__, "unfolded.py", steps=2000, out="out/unfolded")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 file to learn from (default: the documentation inside Python)")
    parser.add_argument("--sentence", default=SENTENCE, metavar="TEXT", help="sentence to read and draw at the end")
    parser.add_argument("--size", type=positive(int), default=128, metavar="N", help="units (default: %(default)s)")
    parser.set_defaults(batch=BATCH, length=LENGTH)
    args = parser.parse_args(argv)
    corpus = read_corpus(args)
    if strange := re.sub(f"[{re.escape(corpus.vocabulary)}]", "", args.sentence):
        raise UserError(f"the training text has no {strange[0]!r}: use a sentence without it")
    if len(args.sentence) < 2:
        raise UserError("the sentence needs at least two characters")
    prepare_folder(args.out)
    torch.manual_seed(args.seed)

    model = CharModel(len(corpus.vocabulary), args.size).to(args.device)
    example = torch.zeros(LENGTH, BATCH, model.layer.input_size, device=args.device)
    print(rnnfast.explain(model.layer, example), flush=True)
    train(model, corpus.train.to(args.device), args.steps)

    tokens = torch.tensor([corpus.vocabulary.index(character) for character in args.sentence], device=args.device)[:, None]
    print(f"\nthe layer in one call compared with {len(tokens) - 1} feed-forward layers with its weights:")
    compared, reach = unfold(model, tokens)
    for name, (difference, size) in compared.items():
        print(f"  {name:<26} largest difference {difference:.1e}, largest value {size:.1e}")

    heldout = corpus.heldout[:HELD_OUT]
    cells = find_cells(model, heldout.to(args.device), "".join(corpus.vocabulary[n] for n in heldout.tolist()))
    print()
    for name, (cell, correlation) in cells.items():
        print(f"cell {cell} goes with: {name} (correlation {correlation:+.2f} over {len(heldout):,} held-out characters)")
    with torch.no_grad():
        _, _, states, gates = model.layer(model.embedding(tokens), return_all_states=True, return_gates=True)
    draw(args.sentence, cells, states[0], gates[0], [*reach, float("nan")], args.out / "gates.png")
    print(f"wrote {args.out / 'gates.png'}")


def main(argv: list[str] | None = None) -> int:
    return run_main("unfolded.py", lambda: run_program(argv))


if __name__ == "__main__":
    sys.exit(main())
