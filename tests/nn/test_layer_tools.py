"""What PyTorch's tools make of an rnnfast.Layer: saving, compiling, exporting, transforming, distributing."""

import copy
import importlib
import pickle
from functools import partial

import pytest
import torch
import torch._dynamo
from support import own_cells
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, stack_module_state
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint

import rnnfast
from rnnfast import Layer, reference

I, H, T, B = 3, 4, 3, 2
BACKENDS = ["reference", "triton"]


def made(cell, device, *args, **options):
    torch.manual_seed(1)
    return Layer(cell, I, H, *args, device=device, **options)


def gradients(call, layer, x, seed=2):
    """The output of `call` and all gradients."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = call(x)[0]
    loss = (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_copied_and_shown(device, tmp_path):
    layer = made(own_cells.zoneout, device, 2, z=1, bidirectional=True, heads=2, dropout=0.5).eval()
    assert repr(layer) == "Layer(zoneout, 3, 4, num_layers=2, dropout=0.5, bidirectional=True, heads=2, z=1.0)"
    assert [name for name in layer.state_dict() if name.endswith("_l0_reverse")] == [
        f"{kind}_l0_reverse" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    assert layer.weight_hh_l0.shape == (2, 4 * H // 2, H // 2)
    x = torch.randn(T, B, I, device=device)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer) and not other.training
        same(other(x)[1], layer(x)[1])


def test_learned_vectors():
    """They follow the biases, begin as the cell says, and a cell without W_hh has none of its parameters."""
    layer = Layer(own_cells.peephole, I, H, bias=False)
    assert list(layer.state_dict()) == ["weight_ih_l0", "weight_hh_l0", "w_i_l0", "w_f_l0", "w_o_l0"]
    assert layer.w_f_l0.tolist() == [1.0] * H and layer.w_i_l0.abs().max() <= H**-0.5 and layer.w_i_l0.std() > 0
    assert list(Layer(own_cells.indrnn, I, H).state_dict()) == ["weight_ih_l0", "bias_ih_l0", "u_l0"]


@pytest.mark.parametrize("backend, compiler", [("reference", "eager"), ("triton", "aot_eager")])
def test_compiled_in_one_graph(backend, compiler, device):
    """With noise, whose seeds a compiled program draws anew at each call."""
    torch._dynamo.reset()
    layer = made(own_cells.zoneout, device, backend=backend)
    compiled, x = torch.compile(layer, fullgraph=True, backend=compiler), torch.randn(T, B, I, device=device)
    if backend == "reference":
        same(gradients(compiled, layer, x), gradients(layer, layer, x))
    else:  # AOTAutograd draws from a generator of its own
        assert not torch.equal(compiled(x)[0], compiled(x)[0])
        layer.eval()
        same(gradients(compiled, layer, x), gradients(layer, layer, x))


def test_a_function_is_compiled_in_one_graph(device):
    torch._dynamo.reset()
    layer, x = made(own_cells.peephole, device), torch.randn(T, B, I, device=device)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

    def call(x):
        learned = {name: getattr(layer, f"{name}_l0") for name in own_cells.peephole.learned}
        weights = [getattr(layer, name) for name in names]
        return rnnfast.functional.run(own_cells.peephole, x, None, *weights, **learned, backend="reference")

    same(gradients(torch.compile(call, fullgraph=True, backend="eager"), layer, x), gradients(call, layer, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported(backend, device, monkeypatch):
    """The operators are in the program by their names. Where nobody has made a layer of the cell, they say so."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # the default: export refuses any other
    layer, x = made(own_cells.peephole, device, backend=backend).eval(), torch.randn(T, B, I, device=device)
    program = torch.export.export(layer, (x,))
    same(program.module()(x)[1], layer(x)[1])
    if backend == "triton":
        assert any("rnnfast.forward" in str(node.target) for node in program.graph.nodes)
        for known in (reference.CELLS, importlib.import_module("rnnfast.kernels.cells").CELLS):
            for name in [name for name in known if name.startswith("peephole_")]:
                monkeypatch.delitem(known, name)
        with pytest.raises(RuntimeError, match=r"does not know the cell 'peephole_.*make an rnnfast\.Layer of it"):
            program.module()(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformed(backend, device):
    """Ensembles by vmap, gradients and tangents by torch.func, second derivatives: those of the equations."""
    backend = None if backend == "triton" else backend  # tangents then come from the equations, without a warning
    layers = [Layer(own_cells.everything, I, H, device=device, backend=backend) for _ in range(2)]
    parameters, buffers = stack_module_state(layers)
    x, mask = torch.randn(T, B, I, device=device), torch.rand(B, H, device=device)
    found = torch.func.vmap(lambda p, b: functional_call(layers[0], (p, b), (x,), {"mask": mask})[0])(parameters, buffers)
    same(found, [layer(x, mask=mask)[0] for layer in layers])
    layer = layers[0]

    def loss(x, mask):
        return layer(x, mask=mask)[0].square().sum()

    wanted = torch.autograd.grad(loss(x.requires_grad_(), mask.requires_grad_()), [x, mask], create_graph=True)
    same(torch.func.grad(loss, (0, 1))(x.detach(), mask.detach()), wanted)
    tangents = torch.func.jvp(loss, (x.detach(), mask.detach()), (torch.ones_like(x), torch.ones_like(mask)))[1]
    same([tangents], [sum(grad.sum() for grad in wanted)])
    second = partial(torch.autograd.grad, sum(grad.square().sum() for grad in wanted), [x, mask, *layer.parameters()])
    with rnnfast.use_backend("reference"):
        again = torch.autograd.grad(loss(x, mask), [x, mask], create_graph=True)
        expected = torch.autograd.grad(sum(grad.square().sum() for grad in again), [x, mask, *layer.parameters()])
    same(second(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed(backend, device):
    """By PyTorch's checkpoint and by ``recompute``: the same noise, the same gradients."""
    layer, x = made(own_cells.zoneout, device, 2, backend=backend), torch.randn(T, B, I, device=device)
    expected = gradients(layer, layer, x)
    same(gradients(partial(checkpoint, layer, use_reentrant=False), layer, x), expected)
    layer.recompute = True
    same(gradients(layer, layer, x), expected)


def test_per_sample_gradients(device):
    layer, x = made(own_cells.gru, device, batch_first=True, backend="reference"), torch.randn(B, T, I, device=device)
    call_for_per_sample_grads(layer, batch_size=B)(x)[0].sum().backward()
    samples = layer.weight_ih_l0.grad_sample
    layer(x[:1])[0].sum().backward()
    torch.testing.assert_close(samples[0], layer.weight_ih_l0.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_numbers(backend):
    """On the meta device and in FakeTensorMode: made and run."""
    layer = Layer(own_cells.everything, I, H, 2, device="meta", backend=backend if backend == "reference" else None)
    y, states = layer(torch.empty(T, B, I, device="meta"), mask=torch.empty(B, H, device="meta"))
    assert y.is_meta and y.shape == (T, B, H) and len(states) == 3
    with FakeTensorMode():
        layer = Layer(own_cells.everything, I, H, leak=0.125, backend=backend)  # derived in the mode
        y, _ = layer(torch.empty(T, B, I), mask=torch.empty(B, H))
        assert y.shape == (T, B, H)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, device):
    layer = made(own_cells.everything, device, backend=backend).to(torch.bfloat16)
    x, mask = torch.randn(T, B, I, device=device, dtype=torch.bfloat16), torch.ones(B, H, device=device, dtype=torch.bfloat16)
    y, states = layer(x, mask=mask)
    assert {y.dtype, *(state.dtype for state in states)} == {torch.bfloat16}
    layer.float()
    layer.backend = "reference"
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y, _ = layer(x.float(), mask=mask.float())
    torch.testing.assert_close(y.float(), layer(x.float(), mask=mask.float())[0], rtol=0.1, atol=0.1)


def test_traced(device):
    """torch.fx keeps a layer whole; torch.jit.trace sees its equations."""
    layer, x = made(own_cells.peephole, device, backend="reference"), torch.randn(T, B, I, device=device)
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    same(graph(x)[1], layer(x)[1])
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    same(traced(x)[1], layer(x)[1])


def test_parametrized(device):
    layer = made(own_cells.gru, device, backend="reference")
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    layer(torch.randn(T, B, I, device=device))[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad is not None
