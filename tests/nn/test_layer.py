"""rnnfast.Layer: a layer of any cell, by the equations and on the kernels."""

import warnings

import pytest
import torch
from support import own_cells
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast import FallbackWarning, Layer, numerics
from rnnfast.functional import run

pytestmark = pytest.mark.numerical

I, H, T, B = 3, 4, 3, 3
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "w")
THEIRS = [("LSTM", own_cells.lstm), ("GRU", own_cells.gru), ("RNN", own_cells.rnn_tanh)]


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr("rnnfast.choice.decide._told", set())


def flat(results):
    """All tensors of a call's results, in order."""
    return [results] if isinstance(results, torch.Tensor) else [tensor for part in results for tensor in flat(part)]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}], ids=str)
@pytest.mark.parametrize("name, cell", THEIRS)
def test_is_torchs(name, cell, options, device):
    """The same weights under one seed, which load both ways, and the same results: batched, not, and packed."""
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(I, H, **options, device=device)
    torch.manual_seed(1)
    ours = Layer(cell, I, H, **options, device=device, backend="reference")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.flatten_parameters()
    x = torch.randn(B, T, I, device=device)
    packed = pack_padded_sequence(x, [1, 3, 2], batch_first=True, enforce_sorted=False)
    for given in (x, x[0], packed):
        (y, *states), (right, *others) = ours(given), theirs(given)
        if isinstance(given, PackedSequence):
            assert torch.equal(y.batch_sizes, right.batch_sizes)
            y, right = y.data, right.data
        for a, b in zip(flat((y, states)), flat((right, others)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def by_hand(weights, x, mask, hx, lengths, resets, reset_to):
    """`own_cells.everything` in two layers and directions, with 2 heads: one row after another, one step after another.

    Returns the output and the last states. weights: of the parameters by name.
    """
    cell, last, ys = own_cells.everything, [torch.zeros_like(state) for state in hx], []
    for place in range(4):
        suffix = f"_l{place // 2}{'_reverse' * (place % 2)}"
        w_ih, w_hh, b_ih, b_hh, w = (weights[f"{name}{suffix}"] for name in KINDS)
        outputs = [[x.new_zeros(H)] * B for _ in range(T)]
        for b in range(B):
            state, n = [part[place, b] for part in hx], lengths[b]
            for t in reversed(range(n)) if place % 2 else range(n):
                boundary = t + place % 2  # in reverse it is the one after the step
                if boundary < n and resets[boundary, b]:
                    state = [part[place, b] for part in reset_to]
                x_sides = linear(x[t, b], w_ih, b_ih)
                heads = [linear(h, own).view(2, -1) for h, own in zip(state[0].chunk(2), w_hh, strict=True)]
                h_sides = torch.cat(heads, 1).flatten() + b_hh
                rows = tuple(each[None] for each in state)
                new, _ = cell.step(x_sides[None], h_sides[None], rows, (w[None], mask[b : b + 1]), {"leak": 0.5})
                state = [each[0] for each in new]
                outputs[t][b] = state[2]
            for part, found in zip(last, state, strict=True):
                part[place, b] = found
        ys.append(torch.stack([torch.stack(row) for row in outputs]))
        if place % 2:
            x = torch.cat(ys[-2:], -1)
    return [x, *last]


def tensors_of(layer, **rows):
    """Random arguments of a call, with the parameters of the layer, by name."""
    places, count = layer.places, len(layer.cell.states)
    made = {"x": torch.randn(T, B, I), **{name: torch.randn(shape) for name, shape in rows.items()}}
    made |= {f"{kind}{n}": torch.randn(places, B, H) for kind in ("hx", "reset_to") for n in range(count)}
    return made | {name: parameter.detach().cpu() for name, parameter in layer.named_parameters()}


def called(layer, tensors, rows=(), **options):
    """The layer with these tensors: all results in order."""
    count = len(layer.cell.states)
    hx, reset_to = (
        tuple(tensors[f"{kind}{n}"] for n in range(count)) if count > 1 else tensors[f"{kind}0"] for kind in ("hx", "reset_to")
    )
    options = options | {name: tensors[name] for name in rows}
    weights = {name: tensors[name] for name, _ in layer.named_parameters()}
    options |= {"reset_to": reset_to} if "resets" in options else {}
    return flat(torch.func.functional_call(layer, weights, (tensors["x"], hx), options))


def results(call, tensors, dtype, device):
    """What `call` gives, and the gradients of all tensors, by name."""
    copies = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}
    outputs = call(copies)
    generator = torch.Generator().manual_seed(5)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    grads = torch.autograd.grad(loss, [*copies.values()], allow_unused=True, materialize_grads=True)
    return {f"output {n}": out for n, out in enumerate(outputs)} | dict(zip(copies, grads, strict=True))


MARKS = {"lengths": [3, 0, 2], "resets": torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equals_a_loop(backend, device):
    """All that a cell may have, in two layers, directions and heads, with lengths and resets: outputs and all gradients."""
    layer = Layer(own_cells.everything, I, H, 2, bidirectional=True, heads=2, leak=0.5, device=device, backend=backend)
    tensors = tensors_of(layer, mask=(B, H))
    options = {"lengths": MARKS["lengths"], "resets": MARKS["resets"].to(device)}

    def loop(given):
        hx, reset_to = ([given[f"{kind}{n}"] for n in range(3)] for kind in ("hx", "reset_to"))
        return by_hand(given, given["x"], given["mask"], hx, MARKS["lengths"], MARKS["resets"], reset_to)

    common = results(loop, tensors, torch.float32, "cpu")
    found = results(lambda given: called(layer, given, ["mask"], **options), tensors, torch.float32, device)
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert not numerics.fault(found, common, lambda: results(loop, tensors, torch.float64, "cpu"), torch.float32)


CASES = {
    "pipeline": (own_cells.peephole, {"num_layers": 2}, {}, {}),
    "noise": (own_cells.zoneout, {"bidirectional": True, "heads": 2}, {}, {}),
    "marks": (own_cells.gru, {"heads": 2}, {}, MARKS),
    "recompute": (own_cells.peephole, {"num_layers": 2, "recompute": True}, {}, {"lengths": [3, 0, 2]}),
    "states": (own_cells.everything, {"num_layers": 2}, {"mask": (B, H)}, {"return_all_states": True}),
    "diagonal": (own_cells.indrnn, {"num_layers": 2}, {}, {"resets": MARKS["resets"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_and_equations(case, dtype, device):
    """Within the contract of the equations, whose errors are those of plain PyTorch: outputs, states and all gradients."""
    cell, options, rows, given = CASES[case]
    layer = Layer(cell, I, H, **options, device=device)
    tensors = tensors_of(layer, **rows)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}

    def by(backend, dtype):
        def call(copies):
            torch.manual_seed(2)
            with rnnfast.use_backend(backend):
                return called(layer, copies, rows, **given)

        return results(call, tensors, dtype, device)

    found, common = by("triton", dtype), by("reference", dtype)
    assert not numerics.fault(found, common, lambda: by("reference", torch.float64), dtype)


def test_forms_of_a_call(device):
    """Rows for all places or for each, without a batch, packed; and the states of every step, with the output among them."""
    layer = Layer(own_cells.everything, I, H, 2, bidirectional=True, batch_first=True, device=device, backend="reference")
    x, mask = torch.randn(B, T, I, device=device), torch.rand(B, H, device=device)
    y, states, all_states = layer(x, mask=mask, return_all_states=True)
    assert y.shape == (B, T, 2 * H) and all(state.shape == (4, B, H) for state in states)
    assert [len(each) for each in all_states] == [3, 3] and torch.equal(all_states[-1][2], y)
    assert all(torch.equal(a[:, -1, :H], b[2]) for a, b in zip(all_states[-1], states, strict=True))
    assert torch.equal(layer(x, mask=mask.expand(4, B, H))[0], y)
    one = mask[:1].expand(B, H)
    assert torch.equal(layer(x, mask=mask[0])[0], layer(x, mask=one)[0])
    alone = layer(x[1], mask=mask[1])
    for a, b in zip(flat(alone), flat((y[1], [state[:, 1] for state in states])), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(layer(x[1], mask=mask[1].expand(4, H))[0], alone[0])
    packed = pack_padded_sequence(x, [1, 3, 2], batch_first=True, enforce_sorted=False)
    found, marked = layer(packed, mask=mask), layer(x, mask=mask, lengths=[1, 3, 2])
    again = pack_padded_sequence(marked[0], [1, 3, 2], batch_first=True, enforce_sorted=False)
    for a, b in zip(flat((found[0].data, found[1])), flat((again.data, marked[1])), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_functions(backend, device):
    """`functional.run` with the weights of a layer is the layer: heads, both directions, rows, learned vectors and numbers."""
    layer = Layer(own_cells.everything, I, H, bidirectional=True, heads=2, leak=0.5, device=device, backend=backend)
    x, mask = torch.randn(T, B, I, device=device), torch.rand(B, H, device=device)
    y, states, (all_states,) = layer(x, mask=mask, return_all_states=True)
    for place, suffix in enumerate(("_l0", "_l0_reverse")):
        weights = [getattr(layer, f"{name}{suffix}") for name in KINDS]
        found = run(
            own_cells.everything, x, None, *weights[:4], reverse=place == 1, backend=backend, return_all_states=True,
            mask=mask, w=weights[4], leak=0.5,
        )  # fmt: skip
        part = slice(place * H, place * H + H)
        expected = (y[..., part], [state[place] for state in states], [state[..., part] for state in all_states])
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b)


def test_noise(device):
    """Repeatable by the seed and new at each call; in evaluation there is none."""
    layer = Layer(own_cells.zoneout, I, H, 2, z=0.5, device=device, backend="reference")
    x = torch.randn(T, B, I, device=device)
    torch.manual_seed(3)
    first, other = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first) and not torch.equal(first, other)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_dropout(device):
    """Between layers, in training."""
    layer = Layer(own_cells.gru, I, H, 2, dropout=1.0, device=device, backend="reference")
    x = torch.randn(T, B, I, device=device)
    assert torch.equal(layer(x)[0], layer(torch.randn_like(x))[0])
    layer.eval()
    assert not torch.equal(layer(x)[0], layer(torch.randn_like(x))[0])


def test_a_cell_without_kernels(device, monkeypatch):
    """It runs by the equations, with one warning; strict mode raises. `explain` has the reason with its line."""
    layer, x = Layer(own_cells.cumulated, I, H, device=device), torch.randn(T, B, I, device=device)
    with pytest.warns(FallbackWarning, match=r"`cumulated` \(.*own_cells.py:\d+\)") as told:
        first = layer(x)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x)[0], first[0])
        assert torch.equal(Layer(own_cells.cumulated, I, H, device=device, backend="reference")(x)[0], first[0]) is False
    said = str(rnnfast.explain(layer, x))
    assert "backend: reference" in said and "own_cells.py" in said and "torch.cumsum" in said
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="cumulated"):
        layer(x)
    layer.backend = "torch"  # the same as "reference": PyTorch has no such layer
    assert torch.equal(layer(x)[0], first[0])


def test_explain(device):
    layer = Layer(own_cells.everything, I, H, 2, heads=2, device=device, backend="triton", recompute=True)
    x, mask = torch.randn(T, B, I, device=device), torch.rand(B, H, device=device)
    said = str(rnnfast.explain(layer, x, mask=mask, lengths=[1, 2, 3]))
    assert "Layer(everything, 3, 4, num_layers=2, heads=2" in said and "backend: triton" in said and "2 heads" in said
    assert "gates are kept" in said  # the output is a carried state, so those of all steps are wanted
    with pytest.raises(TypeError, match="mask"):
        rnnfast.explain(layer, x)


CELL, OWN, SQUARE = own_cells.everything, {"mask": torch.ones(B, H)}, torch.ones(H, H)
X, ZEROS = torch.randn(T, B, I), tuple(torch.zeros(1, B, H) for _ in range(3))


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ValueError, "everything: Expected input to be 2D or 3D, got 4D", lambda layer: layer(X[None], **OWN)),
        (ValueError, "RNN input dtype", lambda layer: layer(X.double(), **OWN)),
        (RuntimeError, "input.size.-1. must be equal to input_size. Expected 3, got 2", lambda layer: layer(X[..., :2], **OWN)),
        (RuntimeError, "Expected sequence length to be larger than 0", lambda layer: layer(X[:0], **OWN)),
        (TypeError, "input must be a tensor", lambda layer: layer([1.0], **OWN)),
        (TypeError, "hx must be a tuple of 3 tensors", lambda layer: layer(X, ZEROS[0], **OWN)),
        (RuntimeError, "hx must hold 3 states", lambda layer: layer(X, ZEROS[:2], **OWN)),
        (RuntimeError, "Expected hidden.1. size", lambda layer: layer(X, (ZEROS[0], ZEROS[1][:, :1], ZEROS[2]), **OWN)),
        (RuntimeError, "For batched 3-D input", lambda layer: layer(X, tuple(z[0] for z in ZEROS), **OWN)),
        (RuntimeError, "For unbatched 2-D input", lambda layer: layer(X[:, 0], ZEROS, mask=torch.ones(H))),
        (RuntimeError, "not the same dtype", lambda layer: layer(X, tuple(z.double() for z in ZEROS), **OWN)),
        (RuntimeError, "not at the same device", lambda layer: layer(X, tuple(z.to("meta") for z in ZEROS), **OWN)),
        (RuntimeError, "parameter tensors are not at the same device", lambda layer: layer(X.to("meta"), **OWN)),
        (TypeError, "needs the row 'mask'", lambda layer: layer(X)),
        (TypeError, "takes no row 'musk'", lambda layer: layer(X, musk=X, **OWN)),
        (RuntimeError, "Expected mask of size", lambda layer: layer(X, mask=torch.ones(2, H))),
        (ValueError, "mask has torch.bool", lambda layer: layer(X, mask=torch.ones(B, H, dtype=torch.bool))),
        (RuntimeError, "Expected lengths of size", lambda layer: layer(X, lengths=[1], **OWN)),
        (RuntimeError, "lengths must be from 0 to the 3 steps", lambda layer: layer(X, lengths=[1, 2, 4], **OWN)),
        (ValueError, "give resets too", lambda layer: layer(X, reset_to=ZEROS, **OWN)),
        (TypeError, "has no number 'leek': its numbers are leak", lambda _: Layer(CELL, I, H, leek=1.0)),
        (TypeError, "leak should be of type int or float", lambda _: Layer(CELL, I, H, leak="1")),
        (TypeError, "cell should be what rnnfast.cell makes", lambda _: Layer(lambda x, h, s: x, I, H)),
        (TypeError, "hidden_size should be of type int", lambda _: Layer(CELL, I, 4.0)),
        (ValueError, "num_layers must be greater than zero", lambda _: Layer(CELL, I, H, 0)),
        (TypeError, "bias should be of type bool", lambda _: Layer(CELL, I, H, bias=1)),
        (ValueError, "dropout should be a number in range", lambda _: Layer(CELL, I, H, 2, dropout=2)),
        (ValueError, "backend should be one of", lambda _: Layer(CELL, I, H, backend="cuda")),
        (ValueError, "divisible by heads", lambda _: Layer(CELL, I, H, heads=3)),
        (ValueError, "has no W_hh", lambda _: Layer(own_cells.indrnn, I, H, heads=2)),
        (RuntimeError, "w_hh must be", lambda _: run(CELL, X, None, torch.ones(8, I), SQUARE, w=SQUARE[0], **OWN)),
        (TypeError, "learned vector 'w'", lambda _: run(CELL, X, None, torch.ones(8, I), torch.ones(8, 4), **OWN)),
        (RuntimeError, "must be None", lambda _: run(own_cells.indrnn, X, None, torch.ones(4, I), SQUARE, u=SQUARE[0])),
    ],
)  # fmt: skip
def test_bad_input(error, text, call):
    with pytest.raises(error, match=text):
        call(Layer(CELL, I, H, backend="reference"))


def test_names_that_mean_something_else():
    @rnnfast.cell(gates="a", states="h")
    def dropping(x, h, s, *, dropout: float = 0.5):
        return torch.tanh(x.a + h.a) * dropout

    with pytest.raises(ValueError, match=r"`dropping` names an argument 'dropout'.*rename it"):
        Layer(dropping, I, H)


def test_replaced_parameters_are_checked():
    """A kernel would read past the end."""
    layer = Layer(own_cells.gru, I, H)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(H, H))
    with pytest.raises(RuntimeError, match="Expected weight_hh_l0 of size"):
        layer(X)


def test_a_batch_without_rows():
    """As torch.nn on a CPU."""
    y, h_n = Layer(own_cells.gru, I, H)(X[:, :0])
    assert y.shape == (T, 0, H) and h_n.shape == (1, 0, H)
