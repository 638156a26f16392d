"""Modules of several layers and directions on the kernels, which run grouped: every form of input, beside the equations."""

import pytest
import torch
from support.groups import running
from support.layers import H, I, close, equal, flat, packed, run, states
from support.loops import arguments, by_module, everything
from torch.nn.utils.rnn import pad_packed_sequence

import rnnfast
from rnnfast import numerics

pytestmark = pytest.mark.numerical

T, B = 5, 3


def both(name, device, **options):
    """A module on the kernels, and the same by the equations."""
    made = [getattr(rnnfast, name)(I, H, **options, device=device, backend=backend) for backend in ("triton", "reference")]
    made[1].load_state_dict(made[0].state_dict())
    return made


STACKS = [("LSTM", {"num_layers": 3}), ("GRU", {"num_layers": 2, "bias": False}), ("RNN", {"num_layers": 6})]
STACKS += [("LSTM", {"num_layers": 2, "bidirectional": True}), ("GRU", {"bidirectional": True, "recompute": True})]
kinds = pytest.mark.parametrize("name, options", STACKS, ids=str)


@pytest.mark.parametrize("members", [None, 2, 1])
@kinds
def test_lengths_resets_and_states(name, options, members, device):
    """With lengths, an empty row among them, resets, initial and reset states: outputs and all gradients by the contract."""
    ours, theirs = both(name, device, **options)
    given = {"lengths": [T, 0, 2], "resets": torch.arange(T * B, device=device).view(T, B) % 4 == 2}
    tensors = arguments(ours, T, B, reset_to=True)
    with running(2, members):
        found = everything(by_module(ours, given), tensors, torch.float32)
    common = everything(by_module(theirs, given), tensors, torch.float32)
    exact = by_module(theirs.double(), given)
    assert not numerics.fault(found, common, lambda: everything(exact, tensors, torch.float64), torch.float32)


@kinds
def test_forms_of_input(name, options, device):
    """Time first, batch first, unbatched and packed, with states and without: the same numbers in each form."""
    layer, _ = both(name, device, **options)
    first, _ = both(name, device, **options, batch_first=True)
    first.load_state_dict(layer.state_dict())
    x, D = torch.randn(T, B, I, device=device), 2 if layer.bidirectional else 1
    hx = states(name, layer.num_layers * D, B, H, device=device)
    with running(2):
        for start in (None, hx):
            upstream = [torch.randn(T, B, D * H, device=device)]
            upstream += [torch.randn(layer.num_layers * D, B, H, device=device) for _ in range(1 + (name == "LSTM"))]
            found = run(layer, x, start, upstream)
            turned = run(first, x.transpose(0, 1), start, [upstream[0].transpose(0, 1), *upstream[1:]])
            at = len(upstream)
            turned[0], turned[at] = turned[0].transpose(0, 1), turned[at].transpose(0, 1)
            close(turned, found)
        whole, single = layer(x[:, :1]), layer(x[:, 0])
        assert equal([single[0]], [whole[0].squeeze(1)])
        lengths = [2, T, 1]
        rows, last = layer(packed(x, lengths), hx)
        padded, expected = layer(x, hx, lengths=lengths)
        close(flat((pad_packed_sequence(rows, total_length=T)[0], last)), flat((padded, expected)))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dropout_of_a_stack(name, device):
    """The masks are those of the seed, whichever members run at once; without training there are none."""
    layer, _ = both(name, device, num_layers=3, dropout=0.5)
    x, found = torch.randn(T, B, I, device=device), []
    for chunk, members in ((1, None), (2, 2), (T, 1)):
        with running(chunk, members):
            torch.manual_seed(4)
            found.append(run(layer, x))
    close(found[1], found[0])
    close(found[2], found[0])
    assert not torch.equal(run(layer, x)[0], found[0][0])
    layer.eval()
    assert equal(run(layer, x), run(layer, x))
