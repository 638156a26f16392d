"""`rnnfast.explain` of a model: what it says of each recurrent layer, and that this is what ran."""

import pytest
import torch
from support import own_cells
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import functional
from rnnfast.choice import kernel_plan, trust, tuned
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.kernels.persistent.plan import GPUS
from rnnfast.nn import sequence

pytestmark = [
    pytest.mark.same_everywhere,
    pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter"),
]

H100 = GPUS["H100"]
T, B, H = 3, 2, 32


class Twice(rnnfast.GRU):
    """A layer with a forward of the user's, which calls rnnfast's with something else."""

    def forward(self, sequence, scale):
        y, _ = super().forward(sequence * scale)
        return super().forward(y, lengths=[2, 3])[0]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = rnnfast.LSTM(H, H, num_layers=2)
        self.reference = rnnfast.GRU(H, H, backend="reference")
        self.cell = rnnfast.GRUCell(H, H)
        self.twice = Twice(H, H)
        self.own = rnnfast.Layer(own_cells.gru, H, H)
        self.theirs = torch.nn.GRU(H, H)
        self.idle = torch.nn.ModuleList([rnnfast.RNN(H, H), torch.nn.LSTMCell(H, H)])
        self.w = torch.nn.Parameter(torch.randn(H, H) / 8)
        self.runs = 0

    def forward(self, x, most=2):
        self.runs += 1
        y, _ = self.encoder(x)
        for t in range(1, most + 1):
            self.encoder(x[:t])
        self.encoder(pack_padded_sequence(x, [3, 2]))
        y, _ = self.reference(y)
        y = self.twice(y, scale=0.5)
        y, _ = self.own(y)
        y, _ = self.theirs(y)
        y, _ = functional.rnn(y, None, self.w, self.w)
        y, _ = self.encoder.forward(y)
        for _ in range(4):
            h = self.cell(y[0])
        return h


def x():
    return torch.randn(T, B, H)


@pytest.fixture
def launched(monkeypatch):
    """The families of kernels that were launched, with the direction of each."""
    found, run = [], kernel_plan.run

    def spy(direction, choice, *args, **options):
        found.append((direction, choice.family))
        return run(direction, choice, *args, **options)

    monkeypatch.setattr(kernel_plan, "run", spy)
    return found


def test_layers_of_a_model():
    """Each layer with its name, its calls and their inputs; what is not rnnfast's with what to do; the model as it was."""
    model = Model().eval()
    explained = rnnfast.explain(model, x(), most=1)
    found = {one.name: one for one in explained.layers}
    calls = {one.name: one.calls for one in explained.layers if one.ran != "the kernels"}
    assert calls == {"encoder": 3, "reference": 1, "cell": 4, "twice": 2, "own": 1, "theirs": 1, "idle.0": 0, "idle.1": 0}
    assert found["rnnfast.functional"].layer == "rnn_tanh" and found["rnnfast.functional"].backend == "triton"
    direct = [one for one in explained.layers if one.name == "encoder" and one.ran == "the kernels"]
    assert len(direct) == 1 and direct[0].inputs == (f"({T}, {B}, {H}) torch.float32 on cpu",)
    assert found["reference"].backend == "reference" and "backend=" in found["reference"].why
    assert found["own"].families == found["cell"].families == ("step", "step")
    assert found["twice"].calls == 2 and found["twice"].ours and found["twice"].families == ("step", "step")
    assert found["theirs"].ran == "not ours: rnnfast.accelerate(model) exchanges it" and not found["theirs"].backend
    assert found["idle.1"].ran.startswith("not ours: ") and "cell" in found["idle.1"].ran
    text = str(explained)
    assert text.startswith("8 recurrent layers, 6 of rnnfast's\n  encoder: LSTM(32, 32, num_layers=2), 3 calls with (3, 2, 32)")
    assert "and 2 other inputs" in text and "packed (5, 32) torch.float32 on cpu" in explained.layers[0].inputs
    assert "  idle.0: RNN(32, 32), not called\n" in text
    assert model.runs == 0 and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kernels", ["auto", "step", "one_program"])
@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "Layer"])
def test_what_is_said_is_what_ran(name, backend, kernels, launched, monkeypatch):
    """The families that it names are those that are launched, forward during the run and backward after it."""
    monkeypatch.setenv("RNNFAST_KERNELS", kernels)
    layer = rnnfast.Layer(own_cells.gru, H, H) if name == "Layer" else getattr(rnnfast, name)(H, H)
    model, given = torch.nn.Sequential(layer), x()[0] if name == "GRUCell" else x()
    with rnnfast.use_backend(backend):
        (one,) = rnnfast.explain(model, given).layers
        assert list(one.families[:1]) == [family for _, family in launched]
        launched.clear()
        output = model(given)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    assert [family for _, family in launched] == list(one.families)
    expected = {"torch": "reference" if name == "Layer" else "torch", None: "triton"}.get(backend, backend)
    assert one.backend == expected and bool(one.families) == (expected == "triton")


def test_times_on_a_gpu(monkeypatch):
    """Of what runs the predicted time, or the measured one, beside that of the other; nothing for a family by name."""
    ran = []
    monkeypatch.setattr(kernel_plan, "run", lambda direction, choice, *args, **options: ran.append(choice.family) or choice)
    monkeypatch.setattr(sequence, "_by_torch", lambda layer, input, hx: ran.append("torch") or (input, None))
    model, long, few = torch.nn.Sequential(rnnfast.GRU(768, 768).half()), torch.zeros(64, 16, 768), torch.zeros(2, 3, 768)

    def said(x):
        (one,) = rnnfast.explain(model, x.half()).layers
        assert set(ran) == set(one.families or ["torch"])
        ran.clear()
        return one

    with kernel_plan.pretend_gpu(H100), torch.no_grad():
        shape = Shape("gru", "float16", "half", 64, 16, 768, 768, 1, 1, False)
        one, predicted = said(long), kernel_plan.predict(shape, torch.device("cpu"), H100, trust.families())
        assert one.families == predicted.families == ("persistent",)
        assert one.time == f"predicted {predicted.kernels:.2f} us a time step, of cuDNN's layer {predicted.torch:.2f}"
        two = said(few)
        assert two.backend == "torch" and two.time.startswith("predicted ") and ", of the kernels " in two.time
        for winner, times in (("triton", {"torch.nn": 9.0, "step kernels": 3.0}), ("torch", {"torch.nn": 3.0, "step": 9.0})):
            with tuned.override_tuning(H100, [Entry(shape, winner, times=times)]):
                one = said(long)
            assert one.backend == winner and one.time.startswith("measured 3.00 us a time step, of ")
            assert one.time.endswith(" 9.00")
        monkeypatch.setenv("RNNFAST_KERNELS", "step")
        assert said(few).families == ("step",) and not said(few).time


def test_one_layer_and_none():
    """A layer of torch.nn's alone, subclasses, and models without any."""
    (one,) = rnnfast.explain(torch.nn.LSTM(H, H), x()).layers
    assert one.name == "the model itself" and one.calls == 1 and "accelerate" in one.ran

    class Mine(torch.nn.GRU):
        pass

    (mine,) = rnnfast.explain(Mine(H, H), x()).layers
    assert mine.ran.startswith("not ours: ") and "Mine" in mine.ran
    assert str(rnnfast.explain(torch.nn.Linear(H, H), x())).startswith("no recurrent layers")
    assert isinstance(rnnfast.explain(rnnfast.LSTM(H, H), x()), rnnfast.Explanation)


def test_not_on_the_kernels():
    """One reason that holds for all layers is said once."""
    model = torch.nn.ModuleDict({"one": rnnfast.GRU(H, H).double(), "two": rnnfast.GRU(H, H).double()})
    model.forward = lambda x: model["two"](model["one"](x)[0])
    text = str(rnnfast.explain(model, x().double()))
    assert text.count("the dtype is torch.float64") == 1 and "  not triton, of all 2: " in text


def test_a_forward_on_the_instance():
    """It takes what it likes, and what it calls of rnnfast is told."""
    layer = rnnfast.GRU(H, H)
    layer.forward = lambda scale, x: rnnfast.GRU.forward(layer, x * scale)
    model = torch.nn.ModuleList([layer])
    model.forward = lambda x: layer(2.0, x)
    (one,) = rnnfast.explain(model, x()).layers
    assert one.calls == 1 and one.families == ("step", "step")


def test_errors():
    """The error of the model, after which no hook is left; and models that cannot be left as they were."""
    model = torch.nn.Sequential(torch.nn.GRU(H, H))
    with pytest.raises(RuntimeError, match="input"):
        rnnfast.explain(model, torch.zeros(T, B, H + 1))
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match=r"call it once before rnnfast\.explain"):
        rnnfast.explain(torch.nn.Sequential(torch.nn.LazyLinear(3)), x())
