"""Export to ONNX, without a word about backends: onnxruntime computes torch.nn's values."""

import io

import pytest
import torch
from support.layers import B, H, I, T, close, flat, pair

import rnnfast

pytestmark = pytest.mark.same_everywhere

onnxruntime = pytest.importorskip("onnxruntime", reason="a GPU machine may lack it")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", ["torch.export", pytest.param("TorchScript", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_onnxruntime(name, exporter):
    if exporter == "torch.export" and torch.__version__.startswith("2.9."):
        pytest.skip("PyTorch 2.9 refuses the strict export of its own layers, which this exporter asks for")
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    ours, theirs = pair(name, "cpu", backend=None, bidirectional=True)
    x, file, model = torch.randn(T, B, I), io.BytesIO(), ours.eval()
    if exporter == "TorchScript":  # it passes the defaults of a model's keywords by position: a layer needs one around it
        model = torch.nn.Sequential(ours)
    program = torch.onnx.export(model, (x,), file, dynamo=exporter == "torch.export", verbose=False)
    if program is not None:
        file = io.BytesIO()
        program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close([torch.from_numpy(array) for array in found], flat(theirs(x)))
    assert found[0].shape == (T, B, 2 * H)
    assert rnnfast.explain(ours, x).backend == "triton"
