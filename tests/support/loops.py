"""What lengths and resets mean, as a person would write it: one batch row after another, one time step after another."""

import copy

import torch
from torch.nn.functional import linear

from rnnfast.reference import CELLS


def step(cell, x, states, w_ih, w_hh, b_ih=None, b_hh=None):
    """The states after one step of a layer, and the gate activations."""
    states, gates = CELLS[cell].step(linear(x, w_ih, b_ih), linear(states[0], w_hh, b_hh), states, ())
    return states, gates[: CELLS[cell].gates] or states[:1]


def row(cell, x, start, reset_to, weights, w_hr, reverse, length, resets):
    """One batch row of one layer and direction: x (T, 1, I), the states (1, H).

    Returns what it gives at each of the first `length` steps, (h, c, gates) or (h, gates), and its last states.
    """
    state, outputs = start, {}
    for t in reversed(range(length)) if reverse else range(length):
        if reverse and t + 1 < length and resets[t + 1]:
            state = reset_to
        if not reverse and resets[t]:
            state = reset_to
        state, gates = step(cell, x[t], state, *weights)
        if w_hr is not None:
            state = (state[0] @ w_hr.t(), *state[1:])
        outputs[t] = (*state, torch.cat(gates, 1))
    return [outputs[t] for t in range(length)], state


def layer(cell, x, states, weights, w_hr, reverse, lengths, resets, reset_to):
    """One layer and direction. Returns y (T, B, H), the last states, each (B, H), (c,) of all steps or (), and the gates."""
    T, B, _ = x.shape
    rows = []
    for b in range(B):
        cut = lambda given: tuple(state[b : b + 1] for state in given)  # noqa: B023, E731
        steps, last = row(cell, x[:, b : b + 1], cut(states), cut(reset_to), weights, w_hr, reverse, lengths[b], resets[:, b])
        rows.append(([torch.stack([*part, *[part[0] * 0] * (T - len(part))])[:, 0] for part in zip(*steps, strict=True)], last))
    H, G = weights[1].shape[0] // _gates(cell), _gates(cell)
    widths = [*(state.shape[1] for state in states), G * H]
    full = [parts or [x.new_zeros(T, width) for width in widths] for parts, _ in rows]
    y, *cells, gates = (torch.stack(parts, 1) for parts in zip(*full, strict=True))
    last = tuple(torch.cat(parts) for parts in zip(*(last for _, last in rows), strict=True))
    return y, last, tuple(cells), gates.view(T, B, G, H)


def _gates(cell):
    return {"lstm": 4, "gru": 3}.get(cell, 1)


def module(module, x, hx, lengths=None, resets=None, reset_to=None):
    """A whole module, eval mode, time first: output, the last states as a tuple, per layer (h, c) or (h,), per layer the gates
    (T, B, D, G, H). `hx`, `reset_to`: tuples of states, or None for zeros."""
    T, B, _ = x.shape
    lengths = [T] * B if lengths is None else [int(length) for length in lengths]
    resets = torch.zeros(T, B, dtype=torch.bool) if resets is None else resets
    D, cell = 2 if module.bidirectional else 1, module.mode.lower()
    widths = [module.proj_size or module.hidden_size, *([module.hidden_size] if cell == "lstm" else [])]
    zeros = tuple(x.new_zeros(module.num_layers * D, B, width) for width in widths)
    last, states, gates = [], [], []
    for index in range(module.num_layers):
        found = []
        for direction in range(D):
            n = index * D + direction
            weights = [getattr(module, name) for name in module._all_weights[n]]
            w_hr = weights.pop() if module.proj_size else None
            weights = weights if module.bias else [*weights, None, None]
            start, anew = (tuple(state[n] for state in given or zeros) for given in (hx, reset_to))
            found.append(layer(cell, x, start, weights, w_hr, direction == 1, lengths, resets, anew))
        x = torch.cat([y for y, *_ in found], -1)
        last += [each for _, each, _, _ in found]
        states.append((x, *(torch.cat(c, -1) for c in zip(*(c for *_, c, _ in found), strict=True))))
        gates.append(torch.stack([g.detach() for *_, g in found], 2))
    return x, tuple(torch.stack(state) for state in zip(*last, strict=True)), states, gates


def everything(call, tensors, dtype):
    """The outputs of `call`, which takes named tensors in `dtype` and gives a list of outputs, and the gradients of all those
    tensors, each under its name. Upstream gradients are the same whatever the call and the dtype."""
    copies = {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(copies)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    loss = sum((out * grad).sum() for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad)
    grads = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
    grads = [torch.zeros_like(copies[name]) if grad is None else grad for name, grad in zip(copies, grads, strict=True)]
    return {f"output {n}": out for n, out in enumerate(outputs)} | dict(zip(copies, grads, strict=True))


def second(call, tensors, dtype):
    """The gradients of all tensors, as of `everything` but of a loss that is no sum of outputs, and those of a sum of them."""
    copies = {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(6)

    def mixed(values):
        return sum((value * torch.randn(value.shape, generator=generator).to(value)).sum() for value in values)

    loss = mixed([out.square() for out in call(copies) if out.requires_grad])
    first = torch.autograd.grad(loss, list(copies.values()), create_graph=True)
    found = torch.autograd.grad(mixed(first), list(copies.values()), allow_unused=True)
    return {f"first {name}": grad.detach() for name, grad in zip(copies, first, strict=True)} | {
        name: torch.zeros_like(copies[name]) if grad is None else grad for name, grad in zip(copies, found, strict=True)
    }


def by_module(layer, options):
    """A call for `everything`: the module `layer` on the tensors x, hx0, hx1, reset_to0, reset_to1, the rest its parameters."""

    def call(tensors):
        x, hx, reset_to, weights = _arguments(layer, tensors)
        given = options if reset_to is None else options | {"reset_to": reset_to}
        output, last, *details = torch.func.functional_call(layer, weights, (x, hx), given)
        return [output, *(last if layer.mode == "LSTM" else [last]), *_flat(details)]

    return call


def by_loop(layer, options):
    """The same by the loop, time first."""

    def call(tensors):
        x, hx, reset_to, weights = _arguments(layer, tensors)
        hx, reset_to = (state if state is None or layer.mode == "LSTM" else (state,) for state in (hx, reset_to))
        loop = copy.copy(layer)
        loop._parameters = weights
        output, last, states, gates = module(loop, x, hx, options.get("lengths"), options.get("resets"), reset_to)
        details = [
            *([states] if options.get("return_all_states") else []),
            *([gates] if options.get("return_gates") else []),
        ]
        return [output, *last, *_flat(details)]

    return call


def _arguments(layer, tensors):
    weights = dict(tensors)
    x = weights.pop("x")
    hx, reset_to = (
        tuple(weights.pop(f"{name}{n}") for n in range(2) if f"{name}{n}" in weights) for name in ("hx", "reset_to")
    )
    form = lambda states: None if not states else states if layer.mode == "LSTM" else states[0]  # noqa: E731
    return x, form(hx), form(reset_to), weights


def _flat(nested):
    for part in nested:
        if isinstance(part, torch.Tensor):
            yield part
        else:
            yield from _flat(part)


def arguments(layer, T, B, hx=True, reset_to=False):
    """Random tensors for `everything`: input, states and the parameters of `layer`, in its dtype."""
    tensors = {"x": torch.randn(T, B, layer.input_size)}
    D = 2 if layer.bidirectional else 1
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    for name, given in (("hx", hx), ("reset_to", reset_to)):
        for n, width in enumerate(widths if given else ()):
            tensors[f"{name}{n}"] = torch.randn(layer.num_layers * D, B, width)
    weight = layer.weight_ih_l0
    return {name: tensor.to(weight) for name, tensor in tensors.items()} | dict(layer.named_parameters())
