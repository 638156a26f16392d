"""torch.func, forward mode, batched gradients and expanded weights: the derivatives that plain autograd and loops give, on the
kernels where those have a rule."""

import pytest
import torch
import torch._dynamo
from support.layers import NAMES, H, I, close, equal, flat, packed, pair, states
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rnnfast
from rnnfast import functional, ops, reference
from rnnfast.nn.options import state_shapes

T, B, N = 2, 2, 3
BACKENDS = ["triton", "torch"]
pytestmark = pytest.mark.numerical


class Layer:
    """A module as a function of its weights and its input, and the same in float64 by the equations, for plain autograd."""

    def __init__(self, name, backend, device, **options):
        self.module = getattr(rnnfast, name)(I, H, **options, device=device, backend=backend)
        self.weights = {key: weight.detach() for key, weight in self.module.named_parameters()}
        self.x = torch.randn(T, B, I, device=device)
        self.exact_module = getattr(rnnfast, name)(I, H, **options, dtype=torch.float64, device=device, backend="reference")
        self.exact_weights = {key: weight.double() for key, weight in self.weights.items()}

    def __call__(self, weights, x):
        exact = x.dtype == torch.float64
        return functional_call(self.exact_module if exact else self.module, weights, (x,))[0]

    def loss(self, weights, x):
        return self(weights, x).square().sum()

    def exact_grads(self, x):
        """Of the loss, by plain autograd in float64: by each weight, and by x."""
        weights = {key: weight.clone().requires_grad_() for key, weight in self.exact_weights.items()}
        x = x.double().requires_grad_()
        found = torch.autograd.grad(self.loss(weights, x), [*weights.values(), x], create_graph=True)
        return dict(zip(weights, found[:-1], strict=True)), found[-1], weights, x


@pytest.fixture
def layer(request, device):
    def make(name, backend, **options):
        return Layer(name, backend, device, **options)

    return make


def check(found, exact):
    close([tensor.double() for tensor in found], [tensor.detach() for tensor in exact])


each = pytest.mark.parametrize("backend", BACKENDS)
names = pytest.mark.parametrize("name", NAMES)


@each
@names
def test_grad_and_vjp(name, backend, layer, saved):
    """torch.func.grad over weights, vjp over the input; on the kernels."""
    f = layer(name, backend)
    weights, x, *_ = f.exact_grads(f.x)
    check(grad(f.loss)(f.weights, f.x).values(), weights.values())
    value, pull = vjp(lambda x: f.loss(f.weights, x), f.x)
    check(pull(torch.ones_like(value)), [x])
    assert len(saved) == (2 if backend == "triton" else 0)


@each
@names
def test_vmap(name, backend, layer, saved):
    """Over inputs, one launch a step for all; over weights, an ensemble; over both; and over lengths and resets."""
    f = layer(name, backend)
    xs = torch.stack([f.x, -f.x, 2 * f.x])
    many = {key: torch.stack([weight, 2 * weight, -weight]) for key, weight in f.weights.items()}
    with torch.no_grad():
        expected = torch.stack([f(f.weights, x) for x in xs])
        saved.clear()
        close(
            [vmap(f, (None, 0))(f.weights, xs), vmap(f, (None, 2), 2)(f.weights, xs.movedim(0, 2))],
            [expected, expected.movedim(0, 2)],
        )
        assert len(saved) == (2 if backend == "triton" else 0)
        one = [{key: weight[n] for key, weight in many.items()} for n in range(N)]
        close(vmap(f, (0, None))(many, f.x), [f(weights, f.x) for weights in one])
        close(vmap(f)(many, xs), [f(weights, x) for weights, x in zip(one, xs, strict=True)])
        lengths, resets = torch.tensor([[0, 2], [1, 1], [2, 1]]), torch.rand(N, T, B) < 0.5
        run = lambda x, lengths, resets: flat(f.module(x, lengths=lengths, resets=resets))  # noqa: E731
        found = vmap(run)(xs, lengths.to(xs.device), resets.to(xs.device))
        close(found, [torch.stack(each) for each in zip(*map(run, xs, lengths, resets.to(xs.device)), strict=True)])


@each
@names
def test_per_sample_gradients(name, backend, layer, saved):
    """vmap of grad, row by row of the batch; what torch.nn.GRU and RNN cannot. One backward for all rows on the kernels."""
    f = layer(name, backend)
    rows = f.x.movedim(1, 0)[:, :, None]
    found = vmap(grad(f.loss), (None, 0))(f.weights, rows)
    assert len(saved) == (1 if backend == "triton" else 0)
    exact = [f.exact_grads(row)[0] for row in rows]
    check(found.values(), [torch.stack([each[key] for each in exact]) for key in found])


@each
@pytest.mark.parametrize("options", [{"recompute": True}, {"proj_size": 2}, {"bidirectional": True}], ids=str)
def test_per_sample_gradients_of_everything(options, backend, layer):
    """With lengths, resets, and every c_t in the loss; with projections and stacks."""
    f = layer("LSTM", backend, **options)
    resets, lengths = torch.tensor([[False, True], [True, False]], device=f.x.device), torch.tensor([2, 1], device=f.x.device)
    anew = tuple(torch.randn(*shape, device=f.x.device) for shape in state_shapes(f.module, "lstm", f.x[:, :1]))

    def loss(weights, x, lengths, resets, anew):
        given = {"lengths": lengths[None], "resets": resets[:, None], "reset_to": anew, "return_all_states": True}
        output, last, states = functional_call(f.module, weights, (x[:, None],), given)
        return sum(out.square().sum() for out in (output, *last, *(c for _, c in states)))

    gradient = grad(loss, (0, 1, 4))
    found = vmap(gradient, (None, 1, 0, 1, None))(f.weights, f.x, lengths, resets, anew)
    for n in range(B):
        one = gradient(f.weights, f.x[:, n], lengths[n], resets[:, n], anew)
        plain = [part.clone().requires_grad_() for part in (*f.weights.values(), f.x[:, n], *anew)]
        value = loss(dict(zip(f.weights, plain, strict=False)), plain[-3], lengths[n], resets[:, n], tuple(plain[-2:]))
        exact = torch.autograd.grad(value, plain)
        close([part[n] for part in (*found[0].values(), found[1], *found[2])], exact)
        close([*one[0].values(), one[1], *one[2]], exact)


@each
@names
def test_meta_learning(name, backend, layer):
    """A MAML step: the gradient, through an inner step for each task by vmap, of the loss after it."""
    f = layer(name, backend)
    tasks = torch.stack([f.x, 1 - f.x])

    def after(weights, x):
        grads = grad(f.loss)(weights, x)
        return f.loss({key: weight - 0.1 * grads[key] for key, weight in weights.items()}, 2 * x)

    found = grad(lambda weights: vmap(after, (None, 0))(weights, tasks).sum())(f.weights)
    expected = {key: torch.zeros_like(weight) for key, weight in f.exact_weights.items()}
    for x in tasks.double():
        grads, _, weights, _ = f.exact_grads(x)
        loss = f.loss({key: weight - 0.1 * grads[key] for key, weight in weights.items()}, 2 * x)
        for key, value in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            expected[key] += value
    check(found.values(), expected.values())


@pytest.mark.filterwarnings("ignore:.*forward-mode differentiation is on:rnnfast.FallbackWarning")
@each
@names
def test_jacobians(name, backend, layer):
    """jacrev, jacfwd and hessian over the input, and a Hessian-vector product over the weights both ways."""
    f = layer(name, backend)
    run, loss = (lambda x: f(f.weights, x)), (lambda x: f.loss(f.weights, x))
    x = f.x.double().requires_grad_()
    y = f(f.exact_weights, x)
    jacobian = torch.stack([torch.autograd.grad(out, x, retain_graph=True)[0] for out in y.flatten()]).view(*y.shape, *x.shape)
    check([jacrev(run)(f.x), jacfwd(run)(f.x)], [jacobian] * 2)
    _, dx, weights, x = f.exact_grads(f.x)
    curvature = torch.stack([torch.autograd.grad(out, x, retain_graph=True)[0] for out in dx.flatten()])
    check([hessian(loss)(f.x), jacrev(jacrev(loss))(f.x)], [curvature.view(*x.shape, *x.shape)] * 2)
    grads, *_, weights, x = f.exact_grads(f.x)
    vector = {key: torch.randn_like(weight) for key, weight in f.weights.items()}
    dot = sum((grads[key] * vector[key]).sum() for key in grads)
    product = torch.autograd.grad(dot, list(weights.values()))
    gradient = lambda weights: grad(f.loss)(weights, f.x)  # noqa: E731
    check(jvp(gradient, (f.weights,), (vector,))[1].values(), product)
    check(vjp(gradient, f.weights)[1](vector)[0].values(), product)


@each
@pytest.mark.parametrize(
    "name, options", [("LSTM", {"proj_size": 2}), ("LSTM", {"num_layers": 2, "bidirectional": True}), ("GRU", {})]
)
def test_forward_mode(name, options, backend, layer):
    """Tangents of every output, by torch.func and by dual numbers, are those of central differences."""
    f = layer(name, backend, **options)
    moved = {key: torch.randn_like(weight) for key, weight in f.weights.items()}, torch.randn_like(f.x)

    def run(weights, x):
        module = f.exact_module if x.dtype == torch.float64 else f.module
        return flat(functional_call(module, weights, (x,)))

    def shifted(step):
        weights = {key: weight + step * moved[0][key].double() for key, weight in f.exact_weights.items()}
        return run(weights, f.x.double() + step * moved[1].double())

    expected = [(a - b) / 2e-5 for a, b in zip(shifted(1e-5), shifted(-1e-5), strict=True)]
    with warned(backend):
        check(jvp(run, (f.weights, f.x), moved)[1], expected)
    with forward_ad.dual_level(), warned(backend):
        weights = {key: forward_ad.make_dual(weight, moved[0][key]) for key, weight in f.weights.items()}
        outputs = run(weights, forward_ad.make_dual(f.x, moved[1]))
        check([forward_ad.unpack_dual(out).tangent for out in outputs], expected)


def warned(backend):
    """The kernels, asked for by name, say that they do not do this."""
    if backend == "triton":
        return pytest.warns(rnnfast.FallbackWarning, match="forward-mode differentiation is on")
    return torch.no_grad()


@names
def test_tangents_of_gradients(name, layer):
    """Forward mode over a backward through the kernels that was recorded before."""
    f = layer(name, "triton")
    x = f.x.clone().requires_grad_()
    y = f(f.weights, x)
    upstream = torch.randn_like(y)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), upstream), retain_graph=True)
        primal, tangent = forward_ad.unpack_dual(dx)
    close([primal, tangent], torch.autograd.grad(y.sum(), x, retain_graph=True) + torch.autograd.grad(y, x, upstream))


@pytest.mark.parametrize("name, given", [("LSTM", False), ("GRU", True), ("RNN", True)])
def test_batched_gradients(name, given, device, saved):
    """is_grads_batched=True on the kernels: as one gradient after another, with create_graph too. Some outputs are left out."""
    ours, _ = pair(name, device)
    x, hx = torch.randn(T, B, I, device=device, requires_grad=True), states(name, 1, B, H, device=device, requires_grad=True)
    outputs = flat(ours(x, hx))[: None if given else 1]
    inputs = [x, *ours.parameters()]
    upstream = [torch.randn(N, *out.shape, device=device) for out in outputs]
    each = [torch.autograd.grad(outputs, inputs, [grad[n] for grad in upstream], create_graph=True) for n in range(N)]
    for create_graph in (False, True):
        found = torch.autograd.grad(
            outputs, inputs, upstream, is_grads_batched=True, create_graph=create_graph, retain_graph=True
        )
        close(found, [torch.stack(grads).detach() for grads in zip(*each, strict=True)])
    second = [
        torch.autograd.grad(sum(part.square().sum() for part in grads), inputs)
        for grads in ([g for e in each for g in e], found)
    ]
    close(*second)
    assert len(saved) == 1


def test_dropout(device):
    """Dropout of the kernels below batched gradients, with create_graph, and below tangents of gradients; inside vmap it is
    PyTorch's, with its rules for random numbers."""
    ours, _ = pair("RNN", device, H=2, num_layers=2, dropout=0.5, bidirectional=True)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    y = ours(x)[0]
    upstream = torch.randn(N, *y.shape, device=device)
    each = [torch.autograd.grad(y, x, grad, create_graph=True)[0] for grad in upstream]
    found = torch.autograd.grad(y, x, upstream, is_grads_batched=True, create_graph=True)[0]
    close([found], [torch.stack(each)])
    each = [grad.detach() for grad in each]
    pull = lambda v: torch.autograd.grad(y, x, v, create_graph=True)[0]  # noqa: E731
    (jacobian,) = torch.autograd.functional.jacobian(pull, (upstream[0],), vectorize=True)
    close([(jacobian * grad).flatten(3).sum(-1) for grad in upstream[:2]], each[:2])
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(upstream[0], upstream[1]), retain_graph=True)
        close(forward_ad.unpack_dual(dx), each[:2])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: ours(x)[0])(x.detach()[None])
    same = vmap(lambda x: ours(x)[0], randomness="same")(torch.stack([x.detach()] * 2))
    assert torch.equal(*same) and not torch.equal(
        *vmap(lambda x: ours(x)[0], randomness="different")(torch.stack([x.detach()] * 2))
    )


@each
@names
def test_functional_jacobian(name, backend, layer):
    """torch.autograd.functional's jacobian and hessian, vectorized and not."""
    f = layer(name, backend)
    run, loss = (lambda x: f(f.weights, x)), (lambda x: f.loss(f.weights, x))
    for function, of in ((torch.autograd.functional.jacobian, run), (torch.autograd.functional.hessian, loss)):
        close([function(of, f.x, vectorize=True)], [function(of, f.x)])


@each
@names
def test_expanded_weights(name, backend, device):
    """call_for_per_sample_grads gives each sample's gradients, of an LSTM too; torch.nn's own LSTM refuses."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    module = getattr(rnnfast, name)(I, H, num_layers=2, device=device, backend=backend)
    x = torch.randn(T, B, I, device=device)
    with expecting(backend):
        output = call_for_per_sample_grads(module, batch_size=B, batch_first=False)(x)[0]
    output.square().sum().backward()
    for row in range(B):
        exact = torch.autograd.grad(module(x[:, row : row + 1])[0].square().sum(), list(module.parameters()))
        close([weight.grad_sample[row] for weight in module.parameters()], exact)


def expecting(backend):
    if backend == "triton":
        return pytest.warns(rnnfast.FallbackWarning, match="call_for_per_sample_grads")
    return torch.enable_grad()


@each
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_packed(name, backend, device):
    """functional_call with one of the weights on rows that were packed outside, and grad, vmap of grad and jvp of that."""
    module = getattr(rnnfast, name)(I, H, bidirectional=True, device=device, backend=backend)
    rows, weight = packed(torch.randn(T, 3, I, device=device), [1, 2, 1]), torch.full_like(module.weight_hh_l0.detach(), 0.1)

    def loss(weight, data):
        output, last = functional_call(module, {"weight_hh_l0": weight}, (rows._replace(data=data),))
        return output.data.square().sum() + flat((output.data, last))[1].sum()

    plain = weight.clone().requires_grad_(), rows.data.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*plain), plain)
    close(grad(loss, (0, 1))(weight, rows.data), expected)
    close([part[1] for part in vmap(grad(loss, (0, 1)), (None, 0))(weight, torch.stack([-rows.data, rows.data]))], expected)
    with warned(backend):
        tangent = jvp(loss, (weight, rows.data), (weight, rows.data))[1]
    close([tangent], [sum((grad * value).sum() for grad, value in zip(expected, (weight, rows.data), strict=True))])


@each
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell, backend, device):
    """vmap, per-sample gradients and jvp of the cells."""
    module, x = getattr(rnnfast, cell)(I, H, device=device, backend=backend), torch.randn(N, B, I, device=device)
    weights = {key: weight.detach() for key, weight in module.named_parameters()}

    def loss(weights, x):
        new = functional_call(module, weights, (x,))
        return (new[0] if isinstance(new, tuple) else new).square().sum()

    each = [grad(loss)(weights, part) for part in x]
    found = vmap(grad(loss), (None, 0))(weights, x)
    close(found.values(), [torch.stack([grads[key] for grads in each]) for key in found])
    with warned(backend):
        tangent = jvp(lambda x: loss(weights, x), (x[0],), (x[1],))[1]
    close([tangent], [(grad(loss, 1)(weights, x[0]) * x[1]).sum()])


@each
def test_functions(backend, device):
    """`rnnfast.functional` as the modules."""
    x, w_ih, w_hh = (torch.randn(*shape, device=device) for shape in ((N, T, B, I), (3 * H, I), (3 * H, H)))
    loss = lambda x, w_hh: functional.gru(x, None, w_ih, w_hh, backend=backend)[0].square().sum()  # noqa: E731
    each = [grad(loss, 1)(part, w_hh) for part in x]
    close(vmap(grad(loss, 1), (0, None))(x, w_hh), each)
    with warned(backend):
        tangent = jvp(loss, (x[0], w_hh), (x[1], w_hh))[1]
    close([tangent], [(grad(loss)(x[0], w_hh) * x[1]).sum() + (each[0] * w_hh).sum()])


def test_half_precision(device):
    """Per-sample and second derivatives in bfloat16, to its rounding."""
    x, w_ih, w_hh = (torch.randn(*shape, device=device).bfloat16() for shape in ((N, T, B, I), (4 * H, I), (4 * H, H)))

    def loss(x, w_hh):
        layer = reference.layer if x.dtype == torch.float64 else ops.layer
        return layer("lstm", x, None, w_ih.to(x.dtype), w_hh)[0].square().sum()

    run = vmap(grad(lambda x, w_hh: grad(loss, 1)(x, w_hh).square().sum(), 1), (0, None))
    found, exact = run(x, w_hh), run(x.double(), w_hh.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_no_gradient_keeps_nothing(device, saved):
    """vmap under no_grad keeps nothing for backward."""
    ours, _ = pair("LSTM", device)
    with torch.no_grad():
        vmap(lambda x: ours(x)[0])(torch.randn(N, T, B, I, device=device))
    assert saved == [None]


def test_autocast(device):
    """Inside autocast, torch.func's gradients are plain autograd's."""
    weights = [torch.randn(*shape, device=device) for shape in ((T, B, I), (3 * H, I), (3 * H, H))]

    def loss(x, w_ih, w_hh):
        with torch.autocast(device, dtype=torch.bfloat16):
            return ops.layer("gru", x, None, w_ih, w_hh)[0].float().square().sum()

    plain = [tensor.clone().requires_grad_() for tensor in weights]
    assert equal(grad(loss, (0, 1, 2))(*weights), torch.autograd.grad(loss(*plain), plain))


@pytest.fixture
def compiling():
    """Dynamo's switch and code are left as they were."""
    before = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    rnnfast.enable_compile()
    yield
    torch._dynamo.config.allow_rnn = before
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*a torch.func transform is being compiled:rnnfast.FallbackWarning")
@each
def test_compiled_transforms(backend, layer, compiling):
    """Transforms inside compiled code, whole graph: on the equations."""
    f = layer("LSTM", backend)
    gradient = lambda x: grad(f.loss)(f.weights, x)["weight_hh_l0"]  # noqa: E731
    for run, x in ((gradient, f.x), (vmap(gradient), f.x[None])):
        close([torch.compile(run, fullgraph=True, backend="eager")(x)], [run(x)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_layer(backend, layer, compiling):
    """A layer compiled before, outside: its second derivatives are right; its forward mode too, or refused."""
    f = layer("GRU", backend)
    compiled, found, x = torch.compile(f.module, fullgraph=True, backend="eager"), [], f.x.clone().requires_grad_()
    for module in (f.module, compiled):
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x))
    close(*found)
    compiled(f.x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(f.x, f.x)  # no reason to Dynamo to compile anew
        if backend == "triton":
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                compiled(dual)
        else:
            close(*([forward_ad.unpack_dual(module(dual)[0]).tangent] for module in (f.module, compiled)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operator_itself(requires_grad, device):
    """What PyTorch would take for zero, forward mode through the bare operator, is refused; and reverse mode by torch.func."""
    tensors = [torch.randn(*shape, device=device, requires_grad=requires_grad) for shape in ((T, B, I), (3 * H, I), (3 * H, H))]
    weights = [tensor[None] for tensor in tensors[1:]]
    run = lambda x: ops.forward("gru", x, None, None, *weights, None, None, None, 0, True)[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(run, (tensors[0].detach(),), (tensors[0].detach(),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        run(forward_ad.make_dual(tensors[0], tensors[1].new_ones(T, B, I)))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda x: run(x).sum())(tensors[0])


@pytest.mark.parametrize("strict", [False, True])
def test_strict(strict, device, monkeypatch, saved):
    """In strict mode forward mode raises instead of running on the equations; reverse mode and vmap are the kernels' anyway."""
    ours, _ = pair("GRU", device, None)
    x = torch.randn(T, B, I, device=device)
    if strict:
        monkeypatch.setenv("RNNFAST_STRICT", "1")
        with pytest.raises(RuntimeError, match="forward-mode differentiation is on"):
            jvp(lambda x: ours(x)[0], (x,), (x,))
    else:
        assert jvp(lambda x: ours(x)[0], (x,), (x,))[1].any()
    vmap(grad(lambda x: ours(x)[0].sum()))(x[None])
    assert len(saved) == 1
