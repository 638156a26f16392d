"""Providers of other libraries, used where the library is installed.

The adapters of flashrnn and haste_pytorch follow the sources of these libraries. They were tried on a CPU against their own
PyTorch code ("vanilla"; the script path of haste_pytorch_cpu), which fixes layouts and gate orders. No adapter has run the
GPU kernels yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.cases import Case
from benchmarks.timing.problem import Problem, Ready
from benchmarks.timing.providers import Provider, installed

__all__ = ["FlashRNN", "Haste", "OnnxRuntime"]


def blocks(tensor: Tensor, order: str, new: str) -> Tensor:
    """The gates of `tensor`, which are blocks of its rows, in another order. An order has one letter a gate."""
    parts = dict(zip(order, tensor.chunk(len(order)), strict=True))
    return torch.cat([parts[gate] for gate in new])


def single_layer(case: Case, cells: tuple[str, ...]) -> str | None:
    if case.cell not in cells:
        return f"it has no {case.cell}"
    if case.packed or case.layers > 1 or case.directions > 1:
        return "it has one layer, one direction, and no packed input"
    return None


class FlashRNN(Provider):
    """FlashRNN (Pöppel, Beck and Hochreiter 2024). Its layout: Wx (T, B, G, heads, H), R (G, heads, H, H), b (G, heads, H), one
    head. Gates i, f, z, o for the LSTM; for the GRU g, r, z in R, r, z, n in Wx and g, r, z, n in b, n = tanh(n + r g)."""

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
        parameters = [w_ih, R.view(-1, 1, H, H), b.view(-1, 1, H)]
        parameters = [tensor.clone().requires_grad_() for tensor in parameters]
        dtype = {name: case.dtype for name in ("dtype", "dtype_w", "dtype_r", "dtype_b")}
        sizes: dict[str, Any] = {"head_dim": H, "num_heads": 1, "batch_size": case.B}
        function = case.cell.lower()
        shapes = {"input_shape": "TBGHD", "output_shape": "STBHD"}
        config = FlashRNNConfig(backend=self.backend, function=function, **shapes, **sizes, **dtype)
        note = f"flashrnn {installed('flashrnn')}, {config.backend}"

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            w_x, R, b = parameters
            inputs = torch.nn.functional.linear(x, w_x).view(case.T, case.B, -1, 1, H)
            states, last = flashrnn(inputs, R, b, config=config)
            return states[0].view(case.T, case.B, H), tuple(last.reshape(-1, 1, case.B, H))

        def gradients(found: list[Tensor]) -> dict[str, Tensor]:
            of_w_ih, of_R, of_b = found[0], found[1].reshape(-1, H), found[2].reshape(-1)
            if case.cell == "LSTM":
                sides = (of_R, of_b, of_b)
            else:
                g, r_z, n = of_b[:H], of_b[H : 3 * H], of_b[3 * H :]
                sides = (blocks(of_R, "nrz", "rzn"), torch.cat([r_z, n]), torch.cat([r_z, g]))
            return dict(zip(problem.weights, (of_w_ih, *sides), strict=True))

        return Ready(forward, parameters, gradients, note)


class Haste(Provider):
    """Haste (LMNT 2020). Kernels transposed; gates i, g, f, o for the LSTM, which has one bias, and z, r, n for the GRU."""

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

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, last = layer(x)
            return y, last if isinstance(last, tuple) else (last,)

        def gradients(found: list[Tensor]) -> dict[str, Tensor]:
            of_w_ih, of_w_hh, *of_biases = found
            tensors = [of_w_ih.t(), of_w_hh.t(), *(of_biases * 2 if case.cell == "LSTM" else of_biases)]
            return dict(zip(problem.weights, (blocks(tensor, theirs, ours) for tensor in tensors), strict=True))

        parameters = [getattr(layer, name) for name in values]
        return Ready(forward, parameters, gradients, f"haste_pytorch {installed('haste_pytorch')}")


class OnnxRuntime(Provider):
    """ONNX Runtime's recurrent operators, in inference on a CPU. Gates i, o, f, g for the LSTM, z, r, n for the GRU."""

    counts_memory = False

    def obstacle(self, case: Case, device: str) -> str | None:
        if missing := [name for name in ("onnxruntime", "onnx") if installed(name) is None]:
            return f"{' and '.join(missing)} not installed"
        if device != "cpu":
            return "compared on a CPU only"
        if case.mode != "inference":
            return "it has inference only"
        if case.dtype != "float32" or case.packed:
            return "compared in float32 only, without packed input"
        return None

    def ready(self, problem: Problem) -> Ready:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        model = onnx_model(problem).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, *last = (torch.from_numpy(array) for array in session.run(None, {"x": x.numpy()}))
            return y, tuple(last)

        return Ready(forward, note=f"onnxruntime {installed('onnxruntime')}")


def onnx_model(problem: Problem):
    """The stack of `problem` as an ONNX model from x to y, h_n and, for an LSTM, c_n."""
    from onnx import TensorProto, helper, numpy_helper

    case, D = problem.case, problem.case.directions
    ours, theirs = {"LSTM": ("ifgo", "iofg"), "GRU": ("rzn", "zrn"), "RNN": ("n", "n")}[case.cell]
    last = ("h_n", "c_n") if case.cell == "LSTM" else ("h_n",)
    nodes, constants = [], [numpy_helper.from_array(torch.tensor([case.T, case.B, D * case.H]).numpy(), "joined")]
    values = [blocks(weight, ours, theirs) for weight in problem.weights.values()]
    for layer in range(case.layers):
        of_layer = [values[4 * (D * layer + direction) :][:4] for direction in range(D)]
        packed = {
            "W": torch.stack([w_ih for w_ih, *_ in of_layer]),
            "R": torch.stack([w_hh for _, w_hh, *_ in of_layer]),
            "B": torch.stack([torch.cat(biases) for _, _, *biases in of_layer]),
        }
        constants += [numpy_helper.from_array(value.numpy(), f"{name}{layer}") for name, value in packed.items()]
        inputs = [f"y{layer - 1}" if layer else "x", *(f"{name}{layer}" for name in packed)]
        outputs = [f"apart{layer}", *(f"{name}{layer}" for name in last)]
        more = {"linear_before_reset": 1} if case.cell == "GRU" else {}
        direction = "bidirectional" if D == 2 else "forward"
        nodes.append(helper.make_node(case.cell, inputs, outputs, hidden_size=case.H, direction=direction, **more))
        nodes.append(helper.make_node("Transpose", [f"apart{layer}"], [f"beside{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"beside{layer}", "joined"], [f"y{layer}"]))
    for name in last:
        nodes.append(helper.make_node("Concat", [f"{name}{layer}" for layer in range(case.layers)], [name], axis=0))
    nodes.append(helper.make_node("Identity", [f"y{case.layers - 1}"], ["y"]))
    shapes = {"x": [case.T, case.B, case.I], "y": [case.T, case.B, D * case.H]}
    shapes |= {name: [case.layers * D, case.B, case.H] for name in last}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "stack", [infos["x"]], [infos[name] for name in ("y", *last)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
