"""A PackedSequence in and out, on the kernels."""

import pytest
import torch
from support import loops
from support.layers import CELLS, H, I, close, outcome, pair, states
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnfast
from rnnfast import numerics
from rnnfast.kernels import step

pytestmark = pytest.mark.numerical

T = 3


def by_packed(layer, lengths, sort):
    """A call for `loops.everything`: the packed data that comes out, and the last states."""

    def call(tensors):
        x, hx, _, weights = loops._arguments(layer, tensors)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=not sort)
        output, last = torch.func.functional_call(layer, weights, (packed, hx))
        assert isinstance(output, PackedSequence)
        for found, given in zip(output[1:], packed[1:], strict=True):
            assert found is given or torch.equal(found, given)
        return [output.data, *(last if layer.mode == "LSTM" else [last])]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, nonlinearity", CELLS)
def test_equals_torch_nn(name, nonlinearity, dtype, device):
    """Unsorted rows with hx in the caller's order: outputs, all gradients and the indices are torch.nn's."""
    options = {"nonlinearity": nonlinearity} if name == "RNN" else {}
    ours = getattr(rnnfast, name)(I, 15, bidirectional=True, **options, device=device, dtype=dtype, backend="triton")
    theirs = getattr(torch.nn, name)(I, 15, bidirectional=True, **options, device=device, dtype=dtype)
    tensors, lengths = loops.arguments(ours, T, 5), [2, 3, 1, 3, 1]
    found, common = (loops.everything(by_packed(layer, lengths, True), tensors, dtype) for layer in (ours, theirs))
    exact = by_packed(theirs.double(), lengths, True)
    assert not numerics.fault(found, common, lambda: loops.everything(exact, tensors, torch.float64), dtype)


@pytest.mark.parametrize("lengths", [[3, 2, 2], [3, 3, 3], [1], [1, 1]], ids=str)
@pytest.mark.parametrize("name, options", [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})])
def test_sorted(name, options, lengths, device):
    """Sorted rows, rows of one length, a single row, two layers, with and without hx; batch_first means nothing here."""
    ours, theirs = pair(name, device, num_layers=2, batch_first=True, **options)
    for hx in (True, False):
        tensors = loops.arguments(ours, max(lengths), len(lengths), hx=hx)
        found, expected = (
            loops.everything(by_packed(layer, lengths, False), tensors, torch.float32) for layer in (ours, theirs)
        )
        close(found.values(), expected.values())


@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_details(name, backend, device):
    """All states and gates come packed as the output is, on every backend."""
    ours, _ = pair(name, device, backend, num_layers=2, bidirectional=True)
    rows = [torch.randn(length, I, device=device) for length in (1, 3, 2)]
    hx = states(name, 4, 3, H, device=device)
    output, last, all_states, gates = ours(
        pack_sequence(rows, enforce_sorted=False), hx, return_all_states=True, return_gates=True
    )
    x = torch.nn.utils.rnn.pad_sequence(rows)
    exact = loops.module(ours, x, hx if name == "LSTM" else (hx,), [1, 3, 2])
    assert all(part.sorted_indices is output.sorted_indices for part in (*all_states[0], *gates))
    unpacked = [pad_packed_sequence(part)[0] for part in (output, *(s for each in all_states for s in each), *gates)]
    close(unpacked, [exact[0], *(s for each in exact[2] for s in each), *exact[3]])
    close(last if name == "LSTM" else [last], exact[1])


def test_rows_of_one_length_need_no_marks(device, monkeypatch):
    """They run as a plain batch does; others are padded inside, with marks. explain says which."""
    if device == "cuda":
        pytest.skip("looks into the launches of the interpreter")
    found, forward = [], step.forward
    monkeypatch.setattr(
        step, "forward", lambda *args, **options: found.append(options.get("marks")) or forward(*args, **options)
    )
    ours, _ = pair("GRU", device)
    x = torch.randn(T, 2, I, device=device)
    for lengths, marked in (([3, 3], False), ([3, 1], True)):
        packed = pack_padded_sequence(x, lengths)
        ours(packed)
        assert (found.pop() is not None) == marked
        assert ("padded inside" in rnnfast.explain(ours, packed).details) == marked


def test_dropout(device):
    """Between the layers, at the same rate, never after the last, and gone in eval."""
    ours, _ = pair("GRU", device, num_layers=2, dropout=0.999)
    packed = pack_padded_sequence(torch.randn(T, 2, I, device=device), [3, 1])
    assert not torch.equal(ours(packed)[0].data, ours.eval()(packed)[0].data)
    assert torch.equal(ours(packed)[0].data, ours(packed)[0].data)


SIZES = {
    "fewer rows": [3, 2],
    "more rows": [3, 2, 2],
    "growing": [2, 3, 1],
    "zero": [3, 3, 0],
    "negative": [-1, 7],
    "none": [],
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_inconsistent_sizes(name, kind, device, no_launch):
    """Batch sizes that are not those of the rows never reach a kernel: torch.nn serves or refuses them."""
    ours, theirs = pair(name, device)
    packed = PackedSequence(torch.randn(6, I, device=device), torch.tensor(SIZES[kind], dtype=torch.int64))
    found, expected = outcome(ours, packed), outcome(theirs, packed)
    if isinstance(expected[0], type):
        assert found == expected
    else:
        assert torch.equal(found[0].data, expected[0].data)


@pytest.mark.parametrize(
    "options", [{"lengths": [3, 1]}, {"resets": torch.zeros(3, 2, dtype=torch.bool)}], ids=["lengths", "resets"]
)
@pytest.mark.parametrize("backend", rnnfast.BACKENDS)
def test_options_that_do_not_go_with_it(options, backend, device, no_launch):
    """A PackedSequence has its lengths, and no (T, B) for a mask."""
    ours, _ = pair("LSTM", device, backend)
    with pytest.raises(ValueError, match="a PackedSequence has its own lengths"):
        ours(pack_padded_sequence(torch.randn(T, 2, I, device=device), [3, 1]), **options)
