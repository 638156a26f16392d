"""RecurrentPPO of sb3-contrib: one call of rnnfast's LSTM in place of its loop over time steps."""

import pytest
import torch
from support.packages import needs
from support.pages import run_page

needs("sb3-contrib")
needs("gymnasium")

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from support.short_episodes import ShortEpisodes
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast.integrations import sb3

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU"),
]


def made(steps=8, **policy):
    """A model whose seed also is that of PyTorch and NumPy."""
    policy = {"lstm_hidden_size": 5, "net_arch": [4]} | policy
    options = {"n_steps": steps, "batch_size": steps, "n_epochs": 1, "learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    return RecurrentPPO("MlpLstmPolicy", ShortEpisodes(), policy_kwargs=policy, **options)


def trained(accelerated, steps, updates):
    """The parameters after training, and the losses of the last update."""
    model = made(steps)
    if accelerated:
        assert sb3.accelerate(model, report=None) is model and type(model.policy.lstm_critic) is rnnfast.LSTM
    model.learn(steps * updates)
    last = [model.logger.name_to_value[f"train/{name}"] for name in ("loss", "value_loss", "approx_kl")]
    return list(model.policy.parameters()), torch.tensor(last)


@pytest.mark.parametrize("backend, steps, updates", [("torch", 32, 3), ("triton", 6, 1)])
def test_training(backend, steps, updates):
    """The weights and the losses are those of the loop, on torch.nn's code and on the kernels."""
    (expected, losses), (start, _) = trained(False, steps, updates), trained(False, steps, 0)
    with rnnfast.use_backend(backend):
        found, found_losses = trained(True, steps, updates)
    assert all(not torch.equal(before, after) for before, after in zip(start, expected, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_losses, losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sequences(backend, layers):
    """Episodes that begin at a first step, inside a row, or nowhere; gradients of features and weights, and the last states."""
    theirs, ours = torch.nn.LSTM(3, 5, layers), rnnfast.LSTM(3, 5, layers, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    states = tuple(torch.randn(layers, 2, 5) for _ in range(2))
    upstream = torch.randn(8, 5)
    for starts in ([0, 0, 0, 0] * 2, [1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1, 0, 1]):
        results = []
        for process, lstm in ((RecurrentActorCriticPolicy._process_sequence, theirs), (sb3.process_sequence, ours)):
            features = torch.linspace(-1, 1, 24).view(8, 3).requires_grad_()
            output, last = process(features, states, torch.tensor(starts, dtype=torch.float32), lstm)
            loss = (output * upstream).sum() + last[0].sum() + 2 * last[1].sum()
            results.append([output, *last, *torch.autograd.grad(loss, [features, *lstm.parameters()])])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, backward included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operators():
    """A sequence of T steps takes as many operators as one of another length. The loop takes more a step."""
    counts = {}
    with rnnfast.use_backend("torch"):
        for accelerated in (False, True):
            model = made()
            if accelerated:
                sb3.accelerate(model, report=None)
            for steps in (8, 8, 16):  # the first call does more
                rows = torch.randn(2 * steps, 3), torch.zeros(2 * steps)
                starts = torch.zeros(2, steps)
                starts[0, 0] = 1
                states = (torch.zeros(1, 2, 5),) * 2
                with Operators() as counted:
                    both = type(model._last_lstm_states)(states, states)
                    values, log_prob, _ = model.policy.evaluate_actions(*rows, both, starts.flatten())
                    (values.sum() + log_prob.sum()).backward()
                counts[accelerated, steps] = counted.count
    assert counts[True, 8] == counts[True, 16] < counts[False, 8] < counts[False, 16], counts


def test_files(tmp_path):
    """A saved model loads without rnnfast, and takes the call again."""
    model = sb3.accelerate(made(), report=None)
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", env=ShortEpisodes(), device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    assert all(torch.equal(a, b) for a, b in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True))
    assert type(sb3.accelerate(loaded, report=None).policy.lstm_critic) is rnnfast.LSTM


def test_what_is_exchanged():
    """One LSTM for actor and critic, or none for the critic; a policy alone; what is refused."""
    for options in ({"shared_lstm": True, "enable_critic_lstm": False}, {"enable_critic_lstm": False}):
        model = made(**options)
        sb3.accelerate(model.policy, report=None)
        with rnnfast.use_backend("torch"):
            assert model.learn(8).predict(model.observation_space.sample(), deterministic=True)[1][0].shape == (1, 1, 5)
    assert type(rnnfast.restore(model.policy, report=None).lstm_actor) is torch.nn.LSTM

    class Own(RecurrentActorCriticPolicy):
        _process_sequence = staticmethod(sb3.process_sequence)

    with pytest.raises(TypeError, match="Own has a _process_sequence of its own"):
        sb3.accelerate(RecurrentPPO(Own, ShortEpisodes(), n_steps=8, batch_size=8))
    with pytest.raises(TypeError, match="should be a RecurrentPPO or its policy, got Linear"):
        sb3.accelerate(torch.nn.Linear(1, 1))


def test_page():
    with rnnfast.use_backend("torch"):
        model = run_page("sb3-contrib")["model"]
    assert type(model.policy.lstm_actor) is rnnfast.LSTM
