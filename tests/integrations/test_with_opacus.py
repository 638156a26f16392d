"""Opacus: per-sample gradients of rnnfast's layers, and training with differential privacy, against a loop over samples."""

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("opacus")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

import opacus
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnfast.integrations.opacus import grad_samples

T, B, I, H = 3, 4, 2, 3
BACKENDS = ["triton", "torch"]  # the default here, interpreted, and the default without TRITON_INTERPRET=1


class Model(torch.nn.Module):
    """Reads the output of every step and the last states. `given` goes to the layer."""

    def __init__(self, name="LSTM", **options):
        super().__init__()
        self.rnn = getattr(rnnfast, name)(I, H, **options)
        self.out = torch.nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 2)

    def forward(self, x, hx=None, pack=None, **given):
        turn = (lambda t: t) if self.rnn.batch_first else (lambda t: t.transpose(0, 1))
        x = turn(x)
        if pack is not None:
            x = pack_padded_sequence(x, pack, self.rnn.batch_first, enforce_sorted=False)
        output, last = self.rnn(x, hx, **given)
        if pack is not None:
            output, _ = pad_packed_sequence(output, self.rnn.batch_first, total_length=T)
        states = last if isinstance(last, tuple) else (last,)
        return self.out(turn(output)).square().sum(1) + sum(state.square().sum((0, 2))[:, None] for state in states)


def target():
    return torch.tensor([0, 1, 1, 0])


def loss(scores, target):
    return torch.nn.functional.cross_entropy(scores, target)


def one(value, row, axis):
    return value.narrow(axis, row, 1) if isinstance(value, torch.Tensor) else tuple(v.narrow(axis, row, 1) for v in value)


def loop(model, x, hx=None, **given):
    """The gradients of each row by itself, on PyTorch's equations, {name: (B, *shape)}."""
    found = []
    for row in range(len(x)):
        model.zero_grad()
        own = {
            name: one(value, row, 1 if name == "resets" and not model.rnn.batch_first else 0) for name, value in given.items()
        }
        with rnnfast.use_backend("reference"):
            loss(model(x[row : row + 1], None if hx is None else one(hx, row, 1), **own), target()[row : row + 1]).backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    model.zero_grad()
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def check(model, x, *given, mode="hooks", **options):
    expected = loop(model, x, *given, **options)
    fixed = ModuleValidator.fix(model)
    ModuleValidator.validate(fixed, strict=True)
    wrapped = opacus.grad_sample.wrap_model(fixed, grad_sample_mode=mode)
    loss(wrapped(x, *given, **options), target()).backward()
    found = {name: weight.grad_sample for name, weight in fixed.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_per_sample_gradients(name, backend, saved):
    """Through the output and the last states, in one backward of all rows on the kernels."""
    with rnnfast.use_backend(backend):
        check(Model(name), torch.randn(B, T, I))
    assert len(saved) == (2 if backend == "triton" else 0)  # the model's forward, and the sampler's


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": H - 1}], ids=["stack", "projected"]
)
def test_of_every_option(options, backend):
    model = Model(**options)
    if model.rnn.proj_size:
        model.out = torch.nn.Linear(model.rnn.proj_size, 2)
    with rnnfast.use_backend(backend):
        check(model, torch.randn(B, T, I))


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_every_input(backend):
    """Initial states, lengths, resets, packed rows: what Opacus' own hooks would not see."""
    x, hx = torch.randn(B, T, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    with rnnfast.use_backend(backend):
        check(Model(batch_first=True), x, hx, lengths=torch.tensor([3, 1, 0, 2]), resets=torch.rand(B, T) < 0.3)
        check(Model("GRU"), x, hx[0], resets=torch.rand(T, B) < 0.3)
        check(Model(), x, hx, pack=torch.tensor([3, 1, 3, 2]))


@pytest.mark.parametrize("mode", ["ew", "hooks"])
def test_a_weight_that_is_frozen_and_a_batch_that_is_empty(mode):
    fixed = ModuleValidator.fix(Model())
    fixed.rnn.weight_hh_l0.requires_grad_(False)
    if mode == "hooks":
        found = grad_samples(fixed.rnn, [torch.empty(0, T, I)], torch.empty(0, T * H + 2 * H))
        assert {tuple(grads.shape) for grads in found.values()} == {(0, 4 * H, I), (0, 4 * H)}
    wrapped = opacus.grad_sample.wrap_model(fixed, grad_sample_mode=mode)
    with rnnfast.use_backend("torch"):
        loss(wrapped(torch.randn(B, T, I)), target()).backward()
    assert fixed.rnn.weight_ih_l0.grad_sample.shape == (B, 4 * H, I) and fixed.rnn.weight_hh_l0.grad is None


def private(model, mode, noise):
    """Three steps of DP-SGD."""
    data = torch.utils.data.TensorDataset(torch.randn(8, T, I, generator=torch.Generator().manual_seed(1)), target().repeat(2))
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=torch.utils.data.DataLoader(data, batch_size=B),
        noise_multiplier=noise,
        max_grad_norm=0.1,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(2),
        grad_sample_mode=mode,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return {name: weight.detach().clone() for name, weight in model._module.named_parameters()}


def by_hand(model, noise):
    """The same steps, with a loop over samples."""
    data = torch.randn(8, T, I, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for half in (data[:B], data[B:]) * 2:
        grads = loop(model, half)
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads.values()]).norm(dim=0)
        factors = (0.1 / (norms + 1e-6)).clamp(max=1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                clipped = torch.einsum("b,b...->...", factors, grads[name])
                weight -= 0.5 * (clipped + torch.normal(0, noise * 0.1, weight.shape, generator=generator)) / B
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_training(backend):
    """With the same noise: the layers here, expanded weights without them, and a loop over samples."""
    model = Model()
    start, weights = {name: weight.clone() for name, weight in model.state_dict().items()}, []
    with rnnfast.use_backend(backend):
        weights.append(private(ModuleValidator.fix(model), "hooks", noise=1.0))
    with rnnfast.use_backend("reference"):
        weights.append(private(ModuleValidator.fix(model), "ew", noise=1.0))
    weights.append(by_hand(model, noise=1.0))
    assert all((weights[0][name] - start[name]).abs().max() > 1e-3 for name in start)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=1e-5)


def test_fixed_layers_are_rnnfasts_and_torchs():
    """The model given stays as it was. Values, names of weights and checkpoints are those of torch.nn."""
    model, theirs = Model(), torch.nn.LSTM(I, H)
    fixed = ModuleValidator.fix(model)
    assert type(model.rnn) is rnnfast.LSTM and isinstance(fixed.rnn, rnnfast.LSTM)
    theirs.load_state_dict(fixed.rnn.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(fixed.rnn(x), theirs(x))
    torch.testing.assert_close(fixed.eval()(x.transpose(0, 1)), model(x.transpose(0, 1)))


def test_refusals():
    """What would give wrong gradients is refused: where the model is checked, or else in the first call or backward."""
    with pytest.raises(UnsupportedModuleError, match=r"ModuleValidator.fix\(model\) replaces it by rnnfast.integrations"):
        ModuleValidator.validate(Model(), strict=True)
    stack = ModuleValidator.fix(Model(num_layers=2, dropout=0.5))
    with pytest.raises(UnsupportedModuleError, match="would draw the dropout between its layers anew"):
        ModuleValidator.validate(stack, strict=True)
    assert ModuleValidator.is_valid(ModuleValidator.fix(Model(num_layers=1)))
    layer = ModuleValidator.fix(Model()).rnn
    with pytest.raises(ValueError, match="of 3 dimensions, got 2"):
        layer(torch.randn(T, I))
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([3, 2, 1, 1]))
    with pytest.raises(ValueError, match="not with a PackedSequence"):
        layer(packed, lengths=[3, 2, 1, 1])
    with pytest.raises(TypeError, match="return_gates"):
        layer(torch.randn(T, B, I), return_gates=True)
    wrapped = opacus.grad_sample.wrap_model(layer, grad_sample_mode="hooks", batch_first=False)
    with pytest.raises(ValueError, match="needs batch_first=True for Opacus"), rnnfast.use_backend("torch"):
        wrapped(torch.randn(T, B, I))[0].sum().backward()


def test_the_page():
    """As a reader runs it, on a CPU without the interpreter."""
    with rnnfast.use_backend("torch"):
        assert run_page("opacus")["epsilon"] > 0
