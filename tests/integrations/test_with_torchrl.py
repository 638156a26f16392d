"""LSTMModule and GRUModule of TorchRL: a batch of trajectories in one call of rnnfast's layer."""

import pytest
import torch
from support.packages import needs
from support.pages import run_page

needs("torchrl")
needs("gymnasium")

from support.short_episodes import ShortEpisodes
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl import modules
from torchrl.envs import GymWrapper, InitTracker, TransformedEnv
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import rnnfast
from rnnfast.integrations import torchrl as integration

T, I, H = 6, 4, 5
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore"),  # TorchRL's and gymnasium's own, of many kinds
]


def made(library, kind, **options):
    torch.manual_seed(0)
    keys = ["h", "c"] if kind == "LSTM" else ["h"]
    keys = {"in_keys": ["x", *keys], "out_keys": ["y", *(("next", key) for key in keys)]}
    return getattr(library, f"{kind}Module")(I, H, default_recurrent_mode=True, **keys, **options)


def batch(kind, layers, batch=(3,), stored=0.0, widths=(H, H)):
    """Rows with trajectories that begin inside, or not; the states stored where they begin are `stored`."""
    torch.manual_seed(1)
    begins = torch.rand(*batch, T, 1) < 0.3
    found = {"x": torch.randn(*batch, T, I), "is_init": begins}
    for key, width in zip("hc" if kind == "LSTM" else "h", widths, strict=False):
        state = torch.randn(*batch, T, layers, width)
        first = state[..., 0, :, :].clone()
        found[key] = state.masked_fill(begins[..., None], stored)
        found[key][..., 0, :, :] = first  # a row begins from it in any case
    return TensorDict(found, [*batch, T])


def results(module, data):
    """Output, states, and the gradients of input, first states and weights."""
    data = data.clone()
    leaves = [data[key].requires_grad_() for key in ["x"]]
    module(data)
    outputs = [data["y"], *(data["next", key] for key in ("h", "c") if ("next", key) in data.keys(True))]
    loss = sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def options_seen(monkeypatch):
    """The options of each call of an rnnfast layer."""
    found, forward = [], rnnfast.nn.sequence.Sequence.forward

    def watched(self, *args, **options):
        found.append(sorted(options))
        return forward(self, *args, **options)

    monkeypatch.setattr(rnnfast.nn.sequence.Sequence, "forward", watched)
    return found


ONE_CALL = [["resets", "return_all_states"]]


@pytest.mark.parametrize("kind, layers", [("LSTM", 1), ("LSTM", 2), ("GRU", 1), ("GRU", 2)])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_backends_agree(kind, layers, backend, options_seen):
    """TorchRL's "pad", and one call on the kernels and the equations. torch.nn's code gets packed rows, as in "pad"."""
    data = batch(kind, layers)
    assert data["is_init"][:, 1:].any()
    padded = results(made(modules, kind, num_layers=layers), data)
    with rnnfast.use_backend(backend):
        close(results(made(integration, kind, num_layers=layers), data), padded)
    assert options_seen == ([[]] if backend == "torch" else ONE_CALL)


def test_scan(options_seen):
    """The kernels against TorchRL's other backend, which runs the batches that cannot run in one call."""
    data = batch("LSTM", 2)
    options = {"num_layers": 2, "recurrent_backend": "scan"}
    expected = results(made(modules, "LSTM", **options), data)
    module = made(integration, "LSTM", **options)
    with rnnfast.use_backend("triton"):
        close(results(module, data), expected)
    assert options_seen == ONE_CALL
    with rnnfast.use_backend("torch"):
        close(results(module, data), expected)
    assert options_seen == ONE_CALL  # "scan" reads the weights and does not call the layer


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_stored_states(kind, options_seen):
    """Trajectories that begin from other states than zero, or with none stored, and rows without a beginning inside."""
    for data, expected in (
        (batch(kind, 1, stored=0.5), [[]]),
        (batch(kind, 1).exclude("h", "c"), ONE_CALL),
        (batch(kind, 1).set("is_init", torch.zeros(3, T, 1, dtype=torch.bool)), [[]]),
        (batch(kind, 1, batch=(2, 2)), ONE_CALL),
        (batch(kind, 1, batch=()).set("is_init", torch.arange(T)[:, None] == 2).set("h", torch.zeros(T, 1, H)), None),
    ):
        options_seen.clear()
        if kind == "LSTM" and expected is None:
            data["c"] = torch.zeros(T, 1, H)
        close(results(made(integration, kind), data), results(made(modules, kind), data))
        assert options_seen == (expected or ONE_CALL)


@pytest.mark.parametrize(
    "options", [{"proj_size": 3}, {"bias": False}, {"bidirectional": True}, {"recurrent_recompute": "full"}]
)
def test_options_of_the_layer(options, options_seen):
    """Both directions run on TorchRL's code, whose states stand elsewhere."""
    both = "bidirectional" in options
    data = batch("LSTM", 1 + both, widths=(options.get("proj_size", H), H))
    recompute = {"recurrent_backend": "scan"} if "recurrent_recompute" in options else {}
    expected = results(made(modules, "LSTM", **options, **recompute), data)
    module = made(integration, "LSTM", **options, **recompute)
    close(results(module, data), expected)
    assert options_seen == ([[]] if both else ONE_CALL) and module.lstm.recompute == bool(recompute)


def test_dropout(options_seen):
    """In training the layer drops outputs between its layers. In eval mode the results are TorchRL's."""
    data = batch("LSTM", 2)
    theirs, ours = (made(library, "LSTM", num_layers=2, dropout=0.5) for library in (modules, integration))
    assert not torch.equal(*(ours(data.clone())["y"] for _ in range(2)))
    close(results(ours.eval(), data), results(theirs.eval(), data))
    assert options_seen == 3 * ONE_CALL


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_single_steps(kind):
    """Not in recurrent mode each element of the batch is a step, and its states are zero where a trajectory begins."""
    data = batch(kind, 2, stored=0.5)
    with set_recurrent_mode(False):
        close(results(made(integration, kind, num_layers=2), data), results(made(modules, kind, num_layers=2), data))


def trained(accelerated, frames, updates, backend):
    """The parameters after training by PPO, the last loss, and how many trajectories the last batch has."""
    from torchrl.collectors import Collector  # warns, which is an error while pytest collects tests

    torch.manual_seed(0)
    lstm = modules.LSTMModule(3, H, in_key="observation", out_key="features")
    environment = TransformedEnv(GymWrapper(ShortEpisodes()), InitTracker())
    environment.append_transform(lstm.make_tensordict_primer())
    environment.set_seed(0)
    head = TensorDictModule(MLP(H, 2, num_cells=[4]), ["features"], ["logits"])
    options = {"distribution_class": OneHotCategorical, "return_log_prob": True, "spec": environment.action_spec}
    actor = ProbabilisticActor(TensorDictSequential(lstm, head), in_keys=["logits"], **options)
    critic = TensorDictSequential(lstm, ValueOperator(MLP(H, 1, num_cells=[4]), in_keys=["features"]))
    if accelerated:
        assert integration.accelerate(actor, report=None) is actor and type(lstm) is integration.LSTMModule
    advantage = GAE(gamma=0.9, lmbda=0.9, value_network=critic, deactivate_vmap=True, shifted=True)
    loss = ClipPPOLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    collector = Collector(environment, actor, frames_per_batch=frames, total_frames=frames * updates)
    for data in collector:
        data = data.unsqueeze(0)
        with rnnfast.use_backend(backend):
            with torch.no_grad(), set_recurrent_mode(True):
                advantage(data)
            terms = loss(data)
            total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    collector.shutdown()
    return [parameter.detach() for parameter in loss.parameters()], total.detach(), int(data["is_init"].sum())


@pytest.mark.parametrize("backend, frames, updates", [("torch", 16, 3), ("triton", 8, 2)])
def test_training(backend, frames, updates, options_seen, monkeypatch):
    """The weights are those of the same program without rnnfast."""
    monkeypatch.setenv("RNNFAST_BACKEND", "torch")  # for the single steps of the collector
    expected, loss, trajectories = trained(False, frames, updates, backend)
    assert trajectories > 1 and not options_seen
    found, found_loss, _ = trained(True, frames, updates, backend)
    close(found, expected)
    close(found_loss, loss)
    # 3 calls an update. One goes to TorchRL's code: `shifted` adds a step to the batch and marks it as a beginning, though the
    # state stored there is that of the trajectory before
    assert options_seen.count(*ONE_CALL) == (0 if backend == "torch" else 5)


def test_what_is_exchanged():
    """Layers written in Python stay as they are; `accelerate` names them."""
    reports = []
    policy = torch.nn.Sequential(made(modules, "GRU"), made(modules, "LSTM", python_based=True))
    integration.accelerate(policy, report=reports.append)
    assert type(policy[0]) is integration.GRUModule and type(policy[0].gru) is rnnfast.GRU
    assert [name for name, _ in reports[0].changed] == ["0.gru"] and [name for name, _ in reports[0].left] == ["1.lstm"]
    data = batch("LSTM", 1)
    close(results(policy[1], data), results(made(modules, "LSTM", python_based=True), data))
    with pytest.raises(TypeError, match="should be a torch"):
        integration.accelerate(None)


def test_page():
    with rnnfast.use_backend("torch"):
        found = run_page("torchrl")
    assert type(found["gru"]) is integration.GRUModule and found["batch"]["is_init"][1:].any()
