"""Providers of other libraries, used where the library is installed.

The adapters of flashrnn and haste_pytorch follow the sources of these libraries. They were tried on a CPU against their own
PyTorch code ("vanilla"; the script path of haste_pytorch_cpu), which fixes layouts and gate orders. No adapter has run the
GPU kernels yet. The Triton kernels of TorchRL ran in Triton's interpreter.
"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.cases import Case
from benchmarks.timing.problem import Problem, Ready
from benchmarks.timing.providers import Provider, installed


def blocks(tensor: Tensor, order: str, new: str) -> Tensor:
    """`tensor` with its gates, which are blocks of rows, in the order `new` instead of `order`. Each letter names a gate."""
    parts = dict(zip(order, tensor.chunk(len(order)), strict=True))
    return torch.cat([parts[gate] for gate in new])


def single_layer(case: Case, cells: tuple[str, ...]) -> str | None:
    if case.cell not in cells:
        return f"it has no {case.cell}"
    if case.packed or case.model or case.layers > 1 or case.directions > 1:
        return "compared with one layer in one direction alone, without packed input"
    return None


class FlashRNN(Provider):
    """FlashRNN (Pöppel, Beck and Hochreiter 2024), with one head.

    Layout: Wx (T, B, G, heads, H), R (G, heads, H, H), b (G, heads, H). The gates of the LSTM are i, f, z, o. Those of the GRU
    are g, r, z in R; r, z, n in Wx; and g, r, z, n in b. Its new gate is tanh(n + r g).
    """

    compiles = True  # with nvcc, once for a batch size, hidden size and dtype

    def __init__(self, name: str, backend: str = "cuda_fused") -> None:
        super().__init__(name)
        self.backend = backend

    def obstacle(self, case: Case, device: str) -> str | None:
        if installed("flashrnn") is None:
            return "flashrnn is not installed"
        if device != "cuda" and self.backend != "vanilla":
            return "its kernels need a GPU"
        if case.tf32:
            return "it does not say what its float32 products are computed in"
        return single_layer(case, ("LSTM", "GRU"))

    def ready(self, problem: Problem) -> Ready:
        from flashrnn import FlashRNNConfig, flashrnn

        case, H = problem.case, problem.case.H
        w_ih, w_hh, b_ih, b_hh = (weight.clone() for weight in problem.weights.values())
        if case.cell == "LSTM":
            R, b = w_hh, b_ih + b_hh
        else:
            R = blocks(w_hh, "rzn", "nrz")
            r_z = (b_ih + b_hh)[: 2 * H]
            b = torch.cat([b_hh[2 * H :], r_z, b_ih[2 * H :]])
        tensors = (w_ih, R.view(-1, 1, H, H), b.view(-1, 1, H))
        parameters = [tensor.clone().requires_grad_() for tensor in tensors]
        options: dict[str, Any] = dict.fromkeys(("dtype", "dtype_w", "dtype_r", "dtype_b"), case.dtype)
        options |= {"head_dim": H, "num_heads": 1, "batch_size": case.B, "input_shape": "TBGHD", "output_shape": "STBHD"}
        config = FlashRNNConfig(backend=self.backend, function=case.cell.lower(), **options)
        note = f"flashrnn {installed('flashrnn')}, {config.backend}"

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            w_x, R, b = parameters
            inputs = torch.nn.functional.linear(x, w_x).view(case.T, case.B, -1, 1, H)
            states, last = flashrnn(inputs, R, b, config=config)
            return states[0].view(case.T, case.B, H), tuple(last.reshape(-1, 1, case.B, H))

        def gradients(found: list[Tensor]) -> list[Tensor]:
            of_w_ih, of_R, of_b = found[0], found[1].reshape(-1, H), found[2].reshape(-1)
            if case.cell == "LSTM":
                return [of_w_ih, of_R, of_b, of_b]
            g, r_z, n = of_b[:H], of_b[H : 3 * H], of_b[3 * H :]
            return [of_w_ih, blocks(of_R, "nrz", "rzn"), torch.cat([r_z, n]), torch.cat([r_z, g])]

        return Ready(forward, parameters, gradients, note)


class Haste(Provider):
    """Haste (LMNT 2020). Its weight matrices are transposed.

    The gates of the LSTM are i, g, f, o, with one bias. Those of the GRU are z, r, n, with two biases.
    """

    def obstacle(self, case: Case, device: str) -> str | None:
        if installed("haste_pytorch") is None:
            return "haste_pytorch is not installed"
        if device != "cuda":
            return "its kernels need a GPU"
        if case.dtype != "float32" or case.tf32:
            return "it computes in IEEE float32 only"
        return single_layer(case, ("LSTM", "GRU"))

    def ready(self, problem: Problem) -> Ready:
        import haste_pytorch

        case = problem.case
        layer = getattr(haste_pytorch, case.cell)(case.I, case.H).to(problem.device)
        layer.train(case.mode != "inference")
        ours, theirs = ("ifgo", "igfo") if case.cell == "LSTM" else ("rzn", "zrn")
        w_ih, w_hh, b_ih, b_hh = (blocks(weight, ours, theirs) for weight in problem.weights.values())
        values = {"kernel": w_ih.t(), "recurrent_kernel": w_hh.t(), "bias": b_ih, "recurrent_bias": b_hh}
        if case.cell == "LSTM":
            values |= {"bias": b_ih + values.pop("recurrent_bias")}
        with torch.no_grad():
            for name, value in values.items():
                getattr(layer, name).copy_(value)

        def gradients(found: list[Tensor]) -> list[Tensor]:
            of_w_ih, of_w_hh, *of_biases = found
            tensors = [of_w_ih.t(), of_w_hh.t(), *(of_biases * 2 if case.cell == "LSTM" else of_biases)]
            return [blocks(tensor, theirs, ours) for tensor in tensors]

        parameters = [getattr(layer, name) for name in values]
        return Ready(layer, parameters, gradients, f"haste_pytorch {installed('haste_pytorch')}")


class TorchRL(Provider):
    """The Triton kernels that TorchRL's modules run with ``recurrent_backend="triton"``, without the modules.

    Weights, biases and gates are laid out as torch.nn's. Input and output are batch first. The states of all steps, at which
    resets would begin, and the mask of resets are arguments: they are zero here, and made once.
    """

    compiles = True

    def obstacle(self, case: Case, device: str) -> str | None:
        if installed("torchrl") is None:
            return "torchrl is not installed"
        if device != "cuda":
            return "its kernels need a GPU"
        if case.torch_dtype != torch.float32:
            return "its kernels take float32 only"
        return single_layer(case, ("LSTM", "GRU"))

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        # TorchRL reads allow_tf32, which is an error while only the newer fp32_precision is set. allow_tf32 sets both
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32 = matmul.fp32_precision == "tf32"
        try:
            yield
        finally:
            matmul.allow_tf32 = False

    def ready(self, problem: Problem) -> Ready:
        kernels = importlib.import_module("torchrl.modules.tensordict_module._rnn_triton")
        case = problem.case
        run = getattr(kernels, f"{case.cell_name}_triton")
        count = 2 if case.cell == "LSTM" else 1
        states = (torch.zeros(case.B, case.T, case.H, device=problem.device),) * count
        resets = torch.zeros(case.B, case.T, device=problem.device, dtype=torch.bool)
        parameters = [weight.clone().requires_grad_() for weight in problem.weights.values()]
        precision = "tf32" if case.tf32 else "ieee"

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            results = run(x.transpose(0, 1), *states, *parameters, resets, input_precision=precision)
            return results[0].transpose(0, 1), tuple(last[None] for last in results[count:])

        return Ready(forward, parameters, note=f"torchrl {installed('torchrl')}, {precision} products")


class OnnxRuntime(Provider):
    """ONNX Runtime's recurrent operators, in inference on a CPU."""

    counts_memory = False

    def obstacle(self, case: Case, device: str) -> str | None:
        if missing := [name for name in ("onnxruntime", "onnx") if installed(name) is None]:
            return f"{' and '.join(missing)} not installed"
        if device != "cpu":
            return "compared on a CPU only"
        if case.mode != "inference":
            return "it has inference only"
        if case.dtype != "float32" or case.packed or case.model:
            return "compared in float32 only, as a layer alone, without packed input"
        return None

    def ready(self, problem: Problem) -> Ready:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        module, model = problem.module(getattr(torch.nn, problem.case.cell)).eval(), io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends dynamo=True, which unrolls an RNN over time
            torch.onnx.export(module, (problem.x,), model, input_names=["x"], dynamo=False)
        session = onnxruntime.InferenceSession(model.getvalue(), options, providers=["CPUExecutionProvider"])

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, *last = (torch.from_numpy(array) for array in session.run(None, {"x": x.numpy()}))
            return y, tuple(last)

        return Ready(forward, note=f"onnxruntime {installed('onnxruntime')}")
