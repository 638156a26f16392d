"""DDP, FSDP2 and the example under torchrun: two processes on gloo give what one process gives on the whole batch.

torchrun starts this file as a program, once for all ways to train and once for the example. Both start at the same time,
because importing torch takes seconds. One start cannot serve both: a second process group in the same processes would find
the addresses of the first one in torchrun's store, and may then wait for ever.
"""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from support import quick_interpreter

    quick_interpreter.install()

import pytest
from support import own_cells, programs

import rnnfast

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).resolve().parents[2]
T, B, H, WORDS, STEPS = 2, 4, 4, 5, 2
PARTS = ("ways", "example")
WAYS = ("DDP", "DDP static_graph", "DDP no_sync", "FSDP2")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, H)
        self.own = rnnfast.Layer(own_cells.peephole, H, H, heads=2)
        self.lstm = rnnfast.LSTM(H, H, backend="triton")
        self.gru = nn.GRU(H, H, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * H, WORDS)
        rnnfast.accelerate(self, report=None)

    def forward(self, tokens):
        with rnnfast.use_backend("triton"):
            return self.head(self.gru(self.lstm(self.own(self.embedding(tokens))[0])[0])[0])


def data():
    return torch.randint(WORDS, (STEPS, T + 1, B), generator=torch.Generator().manual_seed(1))


def train(model, chunks, accumulate=None):
    """Plain gradient descent; `accumulate`: each batch in two halves, the first in this context."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for chunk in chunks:
        optimizer.zero_grad()
        parts = [chunk] if accumulate is None else chunk.chunk(2, dim=1)
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else accumulate():
                (F.cross_entropy(model(part[:-1]).flatten(0, 1), part[1:].flatten()) / len(parts)).backward()
        optimizer.step()


def train_every_way(folder):
    """Process 0 keeps the trained weights of every way."""
    dist.init_process_group("gloo")
    chunks, found = data().chunk(2, dim=2)[dist.get_rank()], {}
    for way in WAYS:
        model = Model()
        if way == "FSDP2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for part in (model.own, model.lstm, model.gru, model):
                fully_shard(part, mesh=mesh)
            assert isinstance(model.lstm, rnnfast.LSTM) and isinstance(model.gru, rnnfast.GRU)
            train(model, chunks)
            found[way] = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
            rnnfast.restore(model, report=None)
            assert type(model.gru).__bases__[1] is nn.GRU and type(model.lstm).__bases__[1] is rnnfast.LSTM
        else:
            parallel = DistributedDataParallel(model, static_graph=way == "DDP static_graph")
            train(parallel, chunks, parallel.no_sync if way == "DDP no_sync" else None)
            found[way] = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()


def run_example(folder):
    """examples/char_lm.py, unchanged, on PyTorch's own layers: the interpreter would take too long."""
    sizes = ["--steps", "3", "--batch", "4", "--length", "8", "--hidden", "8", "--no-check"]
    with programs.load("char_lm") as program, rnnfast.use_backend("torch"):
        return program.main([*sizes, "--text", str(ROOT / "README.md"), "--out", str(folder)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left, and what they said."""
    folder = tmp_path_factory.mktemp("distributed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}

    def start(part):
        return subprocess.run([*launcher, __file__, part, str(folder)], env=env, capture_output=True, text=True, timeout=900)

    with ThreadPoolExecutor() as pool:
        for part, done in zip(PARTS, pool.map(start, PARTS), strict=True):
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / f"{part} said").write_text(done.stdout)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_equal_to_one_process(way, folder):
    """Trained for two steps, every weight is the one that one process comes to."""
    found = torch.load(folder / "found")[way]
    model = Model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, data())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, before[name])


def test_example_under_torchrun(folder, tmp_path, capsys):
    """examples/char_lm.py: two processes learn what one learns, and one of them speaks and writes."""
    assert run_example(tmp_path) == 0
    said = capsys.readouterr().out, (folder / "example said").read_text()
    one, two = (torch.load(path / "checkpoint.pt") for path in (tmp_path, folder))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two["state"], one["state"], rtol=1e-3, atol=1e-4)
    assert [text.count("held-out loss with rnnfast") for text in said] == [1, 1]


if __name__ == "__main__":
    part, folder = sys.argv[1], Path(sys.argv[2])
    sys.exit(train_every_way(folder) if part == "ways" else run_example(folder))
