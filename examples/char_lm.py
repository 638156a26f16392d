"""Train a character-level language model with rnnfast and check the result against plain PyTorch.

The model is an embedding, a stack of `rnnfast.LSTM` (or GRU) layers and a linear softmax layer at every step. It learns from
the English text that ships inside Python (`pydoc_data.topics`), or from any UTF-8 file:

    python examples/char_lm.py                          # one to three minutes on two CPU cores
    python examples/char_lm.py --text book.txt --cell gru --hidden 512 --steps 5000
    python examples/char_lm.py --resume                 # continue after Ctrl-C
    torchrun --nproc-per-node 2 examples/char_lm.py     # two processes, each with half of every batch

It writes OUT/checkpoint.pt and OUT/loss.png, and shows that the weights give the same held-out loss in torch.nn.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin are slow on a busy CPU

import torch
import torch.nn.functional as F
from char_lm_support import (
    BITS,
    Corpus,
    Parser,
    Progress,
    UserError,
    Workers,
    catch_interrupt,
    positive,
    prepare_folder,
    pyplot_for,
    read_corpus,
    run_main,
    streams,
    usable_device,
    write_atomically,
)
from torch import Tensor, nn

import rnnfast

CELLS = {"lstm": (rnnfast.LSTM, nn.LSTM), "gru": (rnnfast.GRU, nn.GRU)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAME_LOSS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}  # allowed difference to torch.nn, in nats per character
FORMAT = "rnnfast-char-lm-1"


@dataclass
class Config:
    """The options that determine a training run. The checkpoint contains them."""

    cell: str = "lstm"
    hidden: int = 128
    layers: int = 2
    steps: int = 700
    batch: int = 32
    length: int = 64
    lr: float = 8e-3
    dtype: str = "float32"
    seed: int = 0
    text: str | None = None  # a file; None is Python's own documentation


State = Tensor | tuple[Tensor, Tensor] | None  # of a GRU; of an LSTM; None is all zeros


class CharLM(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, recurrent.input_size)
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, vocabulary)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """tokens (time, batch) -> float32 logits (time, batch, vocabulary), state"""
        output, state = self.recurrent(self.embedding(tokens), state)
        return self.head(output).float(), state


def detach(state: State) -> State:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def heldout_loss(model: CharLM, heldout: Tensor, length: int = 256) -> float:
    """Mean loss in nats per character over the whole held-out text, read as at most 16 streams."""
    data = streams(heldout, min(16, len(heldout) - 1))
    total, state = 0.0, None
    for start in range(0, len(data) - 1, length):
        chunk = data[start : start + length + 1]
        logits, state = model(chunk[:-1], state)
        total += F.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten(), reduction="sum").item()
    return total / data[1:].numel()


@torch.no_grad()
def sample(model: CharLM, vocabulary: str, generator: torch.Generator, count: int, temperature: float = 0.7) -> str:
    prompt = "The " if set("The ") <= set(vocabulary) else vocabulary[0]
    device = model.head.weight.device
    text, state = prompt, None
    tokens = torch.tensor([[vocabulary.index(character)] for character in prompt], device=device)
    for _ in range(count):
        logits, state = model(tokens, state)
        choice = torch.multinomial((logits[-1, 0].cpu() / temperature).softmax(0), 1, generator=generator)
        text += vocabulary[choice.item()]
        tokens = choice.view(1, 1).to(device)
    return text


@dataclass
class Run:
    """The state of a training run.

    In float16 and bfloat16 the model computes in that dtype, and the optimizer works on a float32 copy of the weights
    (`weights`), because 11 or 8 bits of precision would lose small updates. float16 would also lose small gradients, so the
    loss is multiplied by `scale`. If a gradient overflows, the step is skipped and the scale is halved.
    """

    config: Config
    corpus: Corpus
    device: torch.device
    workers: Workers
    step: int = 0
    state: State = None
    losses: list[float] = field(default_factory=list)  # one a step
    heldout: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)

    def __post_init__(self) -> None:
        config = self.config
        self.generator = torch.Generator().manual_seed(config.seed)  # for the sampled text; training draws no random numbers
        torch.manual_seed(config.seed)
        try:
            self.model = self.new_model(CELLS[config.cell][0])
        except (RuntimeError, MemoryError):
            raise UserError(f"no memory for --hidden {config.hidden} --layers {config.layers} on {self.device}") from None
        self.weights = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.lr, weight_decay=0.01)
        self.model.to(DTYPES[config.dtype])
        self.parallel = self.workers.parallel(self.model)
        self.scale = 1024.0 if config.dtype == "float16" else 1.0

    def new_model(self, recurrent_class: type[nn.RNNBase]) -> CharLM:
        config = self.config
        recurrent = recurrent_class(config.hidden, config.hidden, config.layers)
        return CharLM(recurrent, len(self.corpus.vocabulary)).to(self.device)

    def learning_rate(self) -> float:
        """Linear warm-up for 1/20 of the steps, then a half cosine down to 1/50 of the highest rate."""
        warmup = max(1, self.config.steps // 20)
        progress = max(0, self.step - warmup) / max(1, self.config.steps - warmup)
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        return self.config.lr * min((self.step + 1) / warmup, 1) * cosine

    def train_step(self, chunk: Tensor) -> None:
        """One step on (length + 1, batch) characters, from the layers' state after the previous chunk."""
        logits, state = self.parallel(chunk[:-1], self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), chunk[1:].flatten())
        self.model.zero_grad()
        (loss * self.scale).backward()
        for name, parameter in self.model.named_parameters():
            self.weights[name].grad = parameter.grad.float() / self.scale
        norm = nn.utils.clip_grad_norm_(self.weights.values(), max_norm=1.0)
        if norm.isfinite():
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
            self.copy_weights()
        elif self.scale <= 1:
            raise UserError(f"training diverged at step {self.step + 1}: start again with a smaller --lr")
        else:
            self.scale /= 2
        self.state = detach(state)
        self.losses.append(self.workers.join(loss.detach()[None], 0).mean().item())
        self.step += 1

    @torch.no_grad()
    def copy_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.weights[name])

    def save(self, path: Path) -> None:
        parts = [self.workers.join(part, 1) for part in (self.state if isinstance(self.state, tuple) else (self.state,))]
        content = {
            "format": FORMAT,
            "config": asdict(self.config),
            "vocabulary": self.corpus.vocabulary,
            "digest": self.corpus.digest,
            "model": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in ("step", "losses", "heldout", "scale")},
            "state": tuple(parts) if isinstance(self.state, tuple) else parts[0],
        }
        if self.workers.rank == 0:
            write_atomically(path, lambda file: torch.save(content, file))
        self.workers.wait()

    def load(self, content: dict, path: Path) -> None:
        if content["digest"] != self.corpus.digest:
            theirs, ours = len(content["vocabulary"]), len(self.corpus.vocabulary)
            raise UserError(f"{path} was trained on another text (it has {theirs} different characters, this one {ours})")
        try:
            for name, weight in self.weights.items():
                weight.copy_(content["model"][name])
            self.copy_weights()
            self.optimizer.load_state_dict(content["optimizer"])
            self.generator.set_state(content["generator"])
            for name in ("step", "losses", "heldout", "scale"):
                setattr(self, name, content[name])
            state = content["state"]
            parts = [self.workers.share(part.to(self.device), 1) for part in (state if isinstance(state, tuple) else (state,))]
            self.state = tuple(parts) if isinstance(state, tuple) else parts[0]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"the checkpoint {path} is damaged") from None


def read_checkpoint(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == FORMAT and content["digest"] and content["vocabulary"] and Config(**content["config"]):
            return content
    except Exception:  # torch.load raises many kinds of exceptions on a foreign file
        pass
    raise UserError(f"{path} is damaged or not a checkpoint of this program")


def train(run: Run, checkpoint: Path) -> bool:
    """Train to the last step and save. Returns False if Ctrl-C ended it early; the steps done are saved then, too."""
    config, corpus = run.config, run.corpus
    data = run.workers.share(streams(corpus.train.to(run.device), config.batch), 1)
    heldout = corpus.heldout.to(run.device)
    chunks = (len(data) - 1) // config.length
    progress = Progress(run)
    with catch_interrupt() as asked:
        while run.step < config.steps and not asked.is_set():
            start = run.step % chunks * config.length
            if start == 0:
                run.state = None  # the chunk is at the start of each stream
            run.train_step(data[start : start + config.length + 1])
            progress.update()
            if run.step % max(1, config.steps // 5) == 0 or run.step == config.steps:
                loss = heldout_loss(run.model, heldout)
                run.heldout.append((run.step, loss))
                text = " ".join(sample(run.model, corpus.vocabulary, run.generator, 100).split())
                progress.message(f"held-out loss {loss:.4f}, {loss * BITS:.3f} bits per character; sample: {text}")
                run.save(checkpoint)
        run.save(checkpoint)
    return run.step >= config.steps


def plot_losses(run: Run, path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot(range(1, len(run.losses) + 1), [loss * BITS for loss in run.losses], lw=0.6, alpha=0.7, label="training")
    axes.plot([step for step, _ in run.heldout], [loss * BITS for _, loss in run.heldout], "o-", label="held out")
    axes.set(xlabel="step", ylabel="bits per character", title=f"{run.config.layers} x {run.config.cell}({run.config.hidden})")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def compare_with_torch(run: Run, checkpoint: Path) -> bool:
    """Load the checkpoint into a model with torch.nn's layers and compare its held-out loss with the trained model's."""
    torch_class = CELLS[run.config.cell][1]
    torch_model = run.new_model(torch_class)
    torch_model.load_state_dict(torch.load(checkpoint, map_location=run.device, weights_only=True)["model"])
    torch_model.to(DTYPES[run.config.dtype])
    heldout = run.corpus.heldout.to(run.device)
    ours, theirs = heldout_loss(run.model, heldout), heldout_loss(torch_model, heldout)
    same = abs(ours - theirs) <= SAME_LOSS[run.config.dtype]
    print(f"held-out loss with rnnfast.{torch_class.__name__}: {ours:.6f} ({ours * BITS:.3f} bits per character)")
    verdict = "the same" if same else f"NOT the same: more than {SAME_LOSS[run.config.dtype]} apart"
    print(f"held-out loss with torch.nn.{torch_class.__name__} from the checkpoint: {theirs:.6f}, {verdict}")
    return same


def check_kernels(device: torch.device) -> bool:
    print("\nkernel check:", flush=True)
    kind = "cuda" if device.type == "cuda" else "cpu"
    return subprocess.run([sys.executable, "-m", "rnnfast.check", "--device", kind]).returncode != 1  # 2: no kernels here


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Options of `Config` that were not given are None, so that a resumed run takes them from its checkpoint."""
    default = Config()
    parser = Parser(description=__doc__.split("\n")[0], prog="char_lm.py")
    add = parser.add_argument
    add("--text", metavar="FILE", help="UTF-8 file to learn from (default: the documentation inside Python)")
    add("--cell", choices=CELLS, help=f"(default: {default.cell})")
    add("--dtype", choices=DTYPES, help=f"dtype of the model (default: {default.dtype})")
    for name in ("hidden", "layers", "steps", "batch", "length"):
        add(f"--{name}", type=positive(int), metavar="N", help=f"(default: {getattr(default, name)})")
    add("--lr", type=positive(float), metavar="RATE", help=f"highest learning rate (default: {default.lr})")
    add("--seed", type=int, metavar="N", help=f"(default: {default.seed})")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=cuda, help=f"(default here: {cuda})")
    add("--out", type=Path, metavar="FOLDER", help="(default: out/char_lm, or the folder of --resume CHECKPOINT)")
    add("--resume", nargs="?", type=Path, const=Path(), metavar="CHECKPOINT", help="continue (default: from OUT's)")
    add("--no-check", action="store_true", help="skip the kernel check at the end")
    args = parser.parse_args(argv)
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: {args.seed} is not in the range 0 to 2**63 - 1")
    if args.text is not None:
        args.text = os.path.abspath(args.text)
    if args.resume == Path():
        args.resume = (args.out or Path("out/char_lm")) / "checkpoint.pt"
    if args.out is None:
        args.out = args.resume.parent if args.resume else Path("out/char_lm")
    return args


def make_run(args: argparse.Namespace, workers: Workers) -> Run:
    given = {option.name: getattr(args, option.name) for option in fields(Config) if getattr(args, option.name) is not None}
    content = read_checkpoint(args.resume) if args.resume else None
    if content:
        for name, value in given.items():
            trained = content["config"][name]
            if name not in ("steps", "text") and value != trained:
                raise UserError(f"{args.resume} was trained with --{name} {trained}, not {value}")
        given = content["config"] | given
    config = Config(**given)
    if config.batch % workers.count:
        raise UserError(f"--batch {config.batch} cannot be divided equally among {workers.count} processes")
    run = Run(config, read_corpus(config), args.device, workers)
    if content:
        run.load(content, args.resume)
    return run


def run_program(argv: list[str] | None, workers: Workers) -> int:
    args = parse_arguments(argv)
    run = make_run(args, workers)
    prepare_folder(args.out)
    config, corpus, checkpoint = run.config, run.corpus, args.out / "checkpoint.pt"

    sizes = f"{len(corpus.train):,} characters for training, {len(corpus.heldout):,} held out"
    print(f"text: {sizes}, {len(corpus.vocabulary)} different ones")
    print(f"model: {sum(weight.numel() for weight in run.weights.values()):,} weights in {config.dtype} on {run.device}")
    example = torch.zeros(config.length, config.batch, dtype=torch.long, device=run.device)
    print(rnnfast.explain(run.model.recurrent, run.model.embedding(example)), flush=True)

    if args.resume:
        print(f"resuming {args.resume} after step {run.step}")
    start, first = time.perf_counter(), run.step
    if not train(run, checkpoint):
        command = [sys.executable, sys.argv[0], "--resume", str(checkpoint), "--device", str(run.device)]
        command += ["--no-check"] * args.no_check
        print(f"\ninterrupted: step {run.step} of {config.steps} is saved; to continue, run\n  {shlex.join(command)}")
        return 130
    print(f"\ntrained {run.step - first} steps in {time.perf_counter() - start:.0f} s; a sample:\n")
    print(sample(run.model, corpus.vocabulary, run.generator, 600) + "\n")
    if workers.rank == 0:
        plot_losses(run, args.out / "loss.png")
    print(f"wrote {checkpoint} and {args.out / 'loss.png'}")
    same = compare_with_torch(run, checkpoint)
    checked = args.no_check or workers.rank > 0 or check_kernels(run.device)
    return 0 if same and checked else 1


def main(argv: list[str] | None = None) -> int:
    workers = Workers()
    with open(os.devnull, "w") if workers.rank else contextlib.nullcontext(sys.stdout) as out, contextlib.redirect_stdout(out):
        try:
            return run_main("char_lm.py", lambda: run_program(argv, workers))
        finally:
            workers.close()


if __name__ == "__main__":
    sys.exit(main())
