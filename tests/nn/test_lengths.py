"""lengths=: rows of several lengths in one batch, without packing."""

import pytest
import torch
from support import loops
from support.layers import CELLS, H, I, close, flat, pair, states
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import functional, numerics, reference
from rnnfast.kernels import marks

pytestmark = pytest.mark.numerical

T = 3
STACKED = {"num_layers": 2, "bidirectional": True}


def layers(name, nonlinearity, dtype, device, H=H, **options):
    options |= {"nonlinearity": nonlinearity} if name == "RNN" else {}
    ours = getattr(rnnfast, name)(I, H, **options, device=device, dtype=dtype, backend="triton")
    theirs = getattr(torch.nn, name)(I, H, **options, device=device, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def by_packing(layer, lengths):
    """A call for `loops.everything`, on PyTorch's layer with the rows packed."""

    def call(tensors):
        x, hx, _, weights = loops._arguments(layer, tensors)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, last = torch.func.functional_call(layer, weights, (packed, hx))
        return [pad_packed_sequence(output, total_length=x.shape[0])[0], *(last if layer.mode == "LSTM" else [last])]

    return call


def test_marks_known_without_triton():
    """The codes of the definition are those of the kernels."""
    for name in ("CONTINUES", "STARTS", "RESETS", "PADDED"):
        assert getattr(reference, name) == getattr(marks, name).value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_equals_packing(name, nonlinearity, dtype, device):
    """Two layers, both directions, with hx: outputs and all gradients within the contract of torch.nn's on packed rows.
    (One layer for a relu in half precision: where the next one's input is rounded, units near 0 switch.)"""
    options = STACKED if nonlinearity == "tanh" or dtype == torch.float32 else {"bidirectional": True}
    ours, theirs = layers(name, nonlinearity, dtype, device, H=15, **options)
    lengths = torch.tensor([2, 3, 1, 3, 2])
    tensors = loops.arguments(ours, T, 5)
    found = loops.everything(loops.by_module(ours, {"lengths": lengths}), tensors, dtype)
    common = loops.everything(by_packing(theirs, lengths), tensors, dtype)
    exact = by_packing(theirs.double(), lengths)
    assert not numerics.fault(found, common, lambda: loops.everything(exact, tensors, torch.float64), dtype)
    for b, length in enumerate(lengths):
        assert not found["output 0"][length:, b].any() and not found["x"][length:, b].any()


@pytest.mark.parametrize("lengths", [[0, 3, 0, 1], [0, 0, 0], [3, 3], [2], [0]], ids=str)
@pytest.mark.parametrize("name, options", [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})])
def test_any_lengths(name, options, lengths, device):
    """Empty rows, all of them, none of them, a single row: as row after row. The state of an empty row is the one given."""
    ours, _ = layers(name, "tanh", torch.float32, device, bidirectional=True, **options)
    tensors = loops.arguments(ours, T, len(lengths))
    found = loops.everything(loops.by_module(ours, {"lengths": lengths}), tensors, torch.float32)
    exact = loops.everything(loops.by_loop(ours, {"lengths": lengths}), tensors, torch.float64)
    close(found.values(), [tensor.float() for tensor in exact.values()])
    for b, length in enumerate(lengths):
        assert length or torch.equal(found["output 1"][:, b], tensors["hx0"][:, b])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_one_step(name, device):
    """T = 1, without hx."""
    ours, _ = layers(name, "tanh", torch.float32, device, bidirectional=True)
    tensors = loops.arguments(ours, 1, 3, hx=False)
    found = loops.everything(loops.by_module(ours, {"lengths": [1, 0, 1]}), tensors, torch.float32)
    exact = loops.everything(loops.by_loop(ours, {"lengths": [1, 0, 1]}), tensors, torch.float64)
    close(found.values(), [tensor.float() for tensor in exact.values()])


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_padding_is_never_read(name, backend, device):
    """NaN in padding, upstream gradients there too, leave outputs and gradients bitwise as they are."""
    ours, _ = pair(name, device, backend, bidirectional=True)
    lengths, found = torch.tensor([2, 0, 3]), []
    padded = torch.arange(T)[:, None] >= lengths
    x, upstream = torch.randn(T, 3, I, device=device), torch.randn(T, 3, 2 * H, device=device)
    for bad in (0.0, float("nan")):
        x, upstream = (tensor.masked_fill(padded[..., None].to(device), bad) for tensor in (x, upstream))
        copied = x.clone().requires_grad_()
        output, last = ours(copied, lengths=lengths)
        last = last if isinstance(last, tuple) else (last,)
        grads = torch.autograd.grad([output, *last], [copied, *ours.parameters()], [upstream, *map(torch.ones_like, last)])
        found.append([output, *last, *grads])
        assert not grads[0].transpose(0, 1)[padded.t()].any()
    for other in found[1:]:
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_of_several_tiles(reverse, device):
    """More rows than a program takes, in no order: each row is what it is alone, in the caller's order."""
    B = 40
    x, h0, w_ih, w_hh = (torch.randn(*shape, device=device) for shape in ((T, B, I), (B, H), (3 * H, I), (3 * H, H)))
    lengths = torch.arange(B) % (T + 1)
    given = {"reverse": reverse, "lengths": lengths}
    found = [functional.gru(x, h0, w_ih, w_hh, backend=backend, **given) for backend in ("triton", "reference")]
    close(*found)


def test_a_finished_tile_multiplies_nothing(device, monkeypatch):
    """The tiles of the longest rows go on alone: products are counted."""
    if device == "cuda":
        pytest.skip("counts what the interpreter does")
    from triton.runtime.interpreter import InterpreterBuilder

    products, create = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: products.append(1) or create(*args))
    B, T = 64, 4  # two tiles of 32 rows, each a single tile of units and of the sum
    x, h0, w_ih, w_hh = (torch.randn(*shape) for shape in ((T, B, I), (B, H), (H, I), (H, H)))
    weight = w_hh.requires_grad_()
    lengths = torch.ones(B, dtype=torch.int64)
    lengths[torch.tensor([1, 62])] = T  # both go into the first tile
    y, _ = functional.rnn(x, h0, w_ih, weight, lengths=lengths, backend="triton")
    assert len(products) == 2 + (T - 1)
    products.clear()
    y.sum().backward()
    assert len(products) == T - 1


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_on_every_backend(name, backend, batch_first, device):
    """A list, and integers of any width: the loop's results on every backend and by the functions."""
    ours, _ = pair(name, device, backend, batch_first=batch_first)
    x, hx, lengths = torch.randn(T, 4, I, device=device), states(name, 1, 4, H, device=device), [1, 3, 0, 2]
    exact, last, *_ = loops.module(ours, x, hx if name == "LSTM" else (hx,), lengths)
    start = tuple(h[0] for h in hx) if name == "LSTM" else hx[0]
    for given in (lengths, torch.tensor(lengths, dtype=torch.int32), torch.tensor(lengths, dtype=torch.uint8, device=device)):
        found = flat(ours(x.transpose(0, 1) if batch_first else x, hx, lengths=given))
        close(found, [exact.transpose(0, 1) if batch_first else exact, *last])
        by_function = getattr(functional, name.lower())(x, start, *ours.parameters(), lengths=given, backend=backend)
        close(flat(by_function), [exact, *(state[0] for state in last)])


def test_compiled(device):
    """fullgraph, forward and backward: no recompile for other lengths, T or B beyond the second."""
    before = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    rnnfast.enable_compile()
    counter = CompileCounterWithBackend("aot_eager")
    ours, _ = pair("GRU", device, bidirectional=True)
    call = lambda x, lengths: ours(x, lengths=lengths)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    try:
        for number, (steps, rows) in enumerate(((2, 2), (3, 3), (4, 4)), 1):
            x, lengths = torch.randn(steps, rows, I, device=device), torch.randint(0, steps + 1, (rows,), device=device)
            found = []
            for run in (compiled, call):
                outputs = flat(run(x, lengths))
                found.append([*outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), list(ours.parameters()))])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            assert counter.frame_count <= min(number, 2)
    finally:
        torch._dynamo.config.allow_rnn = before
        torch._dynamo.reset()


WRONG = {
    "negative": ([1, -1, 2], RuntimeError, "from 0 to the 3 steps"),
    "too long": (torch.tensor([1, 4, 2]), RuntimeError, "from 0 to the 3 steps"),
    "few": ([1, 2], RuntimeError, r"Expected lengths of size \(3,\)"),
    "many": ([1, 2, 3, 3], RuntimeError, r"Expected lengths of size \(3,\)"),
    "2-D": (torch.ones(3, 1, dtype=torch.int64), RuntimeError, r"Expected lengths of size \(3,\)"),
    "0-D": (torch.tensor(3), RuntimeError, r"Expected lengths of size \(3,\)"),
    "floats": (torch.ones(3), ValueError, "lengths must be integers, got torch.float32"),
    "bools": (torch.ones(3, dtype=torch.bool), ValueError, "lengths must be integers, got torch.bool"),
    "list of floats": ([1.0, 2.0, 3.0], TypeError, "a tensor or a list of integers"),
    "number": (3, TypeError, "a tensor or a list of integers"),
    "text": ("123", TypeError, "a tensor or a list of integers"),
    "device": (torch.ones(3, dtype=torch.int64, device="meta"), RuntimeError, "must be on one device"),
}
REFUSED_BY_PACKING = ("negative", "many", "0-D")  # the others it cuts to size, or refuses as an index


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_wrong_lengths(name, kind, backend, device, no_launch):
    """A clear error on every backend, by module and function; where packing raises one, of the same type."""
    ours, _ = pair(name, device, backend)
    lengths, error, text = WRONG[kind]
    x = torch.randn(T, 3, I, device=device)
    with pytest.raises(error, match=text):
        ours(x, lengths=lengths)
    with pytest.raises(error, match=text):
        getattr(functional, name.lower())(x, None, *ours.parameters(), lengths=lengths, backend=backend)
    if kind in REFUSED_BY_PACKING:
        with pytest.raises(error):
            pack_padded_sequence(x, lengths, enforce_sorted=False)


def test_no_batch(device, no_launch):
    """lengths without a batch are refused; an input that torch.nn refuses gets its error, with lengths as without."""
    ours, theirs = pair("GRU", device)
    with pytest.raises(ValueError, match="no batch dimension"):
        ours(torch.randn(T, I, device=device), lengths=[T])
    wrong = torch.randn(T, 2, I + 1, device=device)
    with pytest.raises(RuntimeError) as expected:
        theirs(wrong)
    with pytest.raises(RuntimeError) as found:
        ours(wrong, lengths=[1, 2])
    assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="that is not empty"):
        ours(torch.randn(T, 0, I), lengths=[])
