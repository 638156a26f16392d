"""What lengths and resets mean, as a person would write it: one batch row after another, one time step after another."""

import torch

from rnnfast.reference import STEPS


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
        state, gates = STEPS[cell](x[t], state, *weights)
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
