"""What the tests of the modules share: pairs of layers, theirs and ours, and how to run and compare them."""

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

CELLS = [("LSTM", "tanh"), ("GRU", "tanh"), ("RNN", "tanh"), ("RNN", "relu")]
NAMES = ["LSTM", "GRU", "RNN"]
T, B, I, H = 2, 3, 5, 4


def pair(name, device, backend="triton", I=I, H=H, **options):
    """Ours and torch.nn's, with the same weights."""
    theirs = getattr(torch.nn, name)(I, H, **options, device=device)
    ours = getattr(rnnfast, name)(I, H, **options, device=device, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(name, *shape, device, **options):
    """hx of random numbers."""
    made = tuple(torch.randn(*shape, device=device, **options) for _ in range(2 if name == "LSTM" else 1))
    return made if name == "LSTM" else made[0]


def flat(result):
    """output, h_n and, of an LSTM, c_n."""
    output, last = result
    return (output, *last) if isinstance(last, tuple) else (output, last)


def run(module, x, hx=None, upstream=None):
    """Outputs and the gradients of input, states and parameters, as one list. `upstream`: gradients of the outputs."""
    x = x.detach().clone().requires_grad_()
    each = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
    each = tuple(state.detach().clone().requires_grad_() for state in each)
    outputs = flat(module(x, None if hx is None else each if isinstance(hx, tuple) else each[0]))
    upstream = upstream or [torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *each, *module.parameters()], upstream)]


def equal(ours, theirs):
    """The same number of tensors, the same types, shapes and bits."""
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def close(ours, theirs):
    """Equal to rounding; on a GPU, where a float32 product may be TF32, to that. The contract is `compare`'s business."""
    for a, b in zip(ours, theirs, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if a.is_cuda else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(a, b, **tolerance)


def packed(x, lengths):
    return pack_padded_sequence(x, lengths, enforce_sorted=lengths == sorted(lengths, reverse=True))


def outcome(call, *args, **kwargs):
    """What a call did: the type and text of its error, or what it returned."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
