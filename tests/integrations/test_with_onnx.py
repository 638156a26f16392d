"""ONNX: the program of the page, and what the page says of its files. tests/nn/test_onnx.py has the layers."""

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("onnx")
needs("onnxscript")
needs("onnxruntime")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

import onnx
import onnxruntime

T, B, I, H = 3, 2, 2, 3


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.fixture(autouse=True)
def _folder_and_precision(tmp_path, monkeypatch):
    if torch.__version__.startswith("2.9."):
        pytest.skip("PyTorch 2.9 refuses the strict export of its own layers, which this exporter asks for")
    monkeypatch.chdir(tmp_path)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other


def test_the_page():
    run_page("onnx")
    assert "LSTM" in operators("tagger.onnx")


class Marked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(I, H)

    def forward(self, x, lengths):
        return self.lstm(x, lengths=lengths)[0]


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.Layer(rnnfast.cells.lstm, I, H)

    def forward(self, x, lengths):
        return self.lstm(x, lengths=lengths)[0]


@pytest.mark.sweep
@pytest.mark.parametrize("make", [Marked, Own])
def test_what_onnx_has_no_node_for(make):
    """It exports as its equations, one step after another."""
    model, inputs = make().eval(), (torch.randn(T, B, I), torch.tensor([3, 1]))
    torch.onnx.export(model, inputs, dynamo=True, verbose=False).save("marked.onnx")
    session = onnxruntime.InferenceSession("marked.onnx")
    feed = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, model(*inputs).detach(), rtol=1e-4, atol=1e-5)
    assert "LSTM" not in operators("marked.onnx") and "Sigmoid" in operators("marked.onnx")
