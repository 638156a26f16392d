"""Keras' recurrent layers on rnnfast give what they give on Keras' own code, and train to the same weights."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast

needs("keras")
os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")
GRU, LSTM, SimpleRNN, Bidirectional = (getattr(keras.layers, name) for name in ("GRU", "LSTM", "SimpleRNN", "Bidirectional"))

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

T, B, I, H = 4, 4, 3, 5
BACKENDS = ["torch", "triton"]  # what runs by default on a CPU, and the interpreted kernels
MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]],
    "left": [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]],
    "holes and an empty row": [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]],
}


@pytest.fixture(autouse=True)
def _keras_alone_again():
    yield
    rnnfast.keras.disable()


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def results(layer, x, states, mask=None, training=False):
    """Outputs and states of a call, and the gradients of its weights and of its input."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    found = layer(x, initial_state=states, mask=mask, training=training)
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    torch.stack([(each * torch.linspace(1, 2, each.shape[-1])).sum() for each in found]).sum().backward()
    return [*found, x.grad, *(weight.value.grad for weight in layer.trainable_weights)]


def compare(build, count, backend, mask=None, given=True, taken=True):
    """Hold a layer in float32 on rnnfast to a copy in float64 on Keras' own code. `count`: its states."""
    keras.utils.set_random_seed(0)
    ours, own = build("float32"), build("float64")
    x, states = torch.randn(B, T, I), [torch.randn(B, H) for _ in range(count)]
    doubles = [state.double() for state in states]
    mask = None if mask is None else torch.tensor(MASKS[mask], dtype=torch.bool)
    own(x.double())
    ours(x)
    ours.set_weights([torch.randn(weight.shape).numpy() / 2 for weight in ours.weights])
    own.set_weights(ours.get_weights())
    expected = results(own, x.double(), doubles if given else None, mask)
    with rnnfast.keras.enable():
        explanation = rnnfast.keras.explain(ours)
        assert bool(explanation.own) is not taken, explanation
        with rnnfast.use_backend(backend):
            found = results(ours, x, states if given else None, mask)
    assert len(found) == len(expected)
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), right, rtol=1e-4, atol=1e-5)


LAYERS = {
    "lstm": (lambda dtype: LSTM(H, dtype=dtype), 2),
    "lstm, all": (lambda dtype: LSTM(H, return_sequences=True, return_state=True, dtype=dtype), 2),
    "lstm, backwards": (lambda dtype: LSTM(H, go_backwards=True, return_sequences=True, return_state=True, dtype=dtype), 2),
    "lstm, unrolled, no bias": (lambda dtype: LSTM(H, unroll=True, use_bias=False, return_state=True, dtype=dtype), 2),
    "gru, all": (lambda dtype: GRU(H, return_sequences=True, return_state=True, dtype=dtype), 1),
    "gru, no bias": (lambda dtype: GRU(H, use_bias=False, activation=torch.tanh, dtype=dtype), 1),
    "rnn, all": (lambda dtype: SimpleRNN(H, return_sequences=True, return_state=True, dtype=dtype), 1),
    "rnn, relu, backwards": (lambda dtype: SimpleRNN(H, activation="relu", go_backwards=True, dtype=dtype), 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, backend):
    compare(*LAYERS[name], backend)


MASKED = {
    "lstm": (lambda dtype: LSTM(H, return_state=True, dtype=dtype), 2),
    "lstm, all": (lambda dtype: LSTM(H, return_sequences=True, return_state=True, dtype=dtype), 2),
    "lstm, zeros": (lambda dtype: LSTM(H, return_sequences=True, zero_output_for_mask=True, dtype=dtype), 2),
    "gru, backwards": (lambda dtype: GRU(H, return_sequences=True, return_state=True, go_backwards=True, dtype=dtype), 1),
    "rnn, zeros": (lambda dtype: SimpleRNN(H, return_state=True, zero_output_for_mask=True, dtype=dtype), 1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_mask(name, mask):
    compare(*MASKED[name], "torch", mask)


@pytest.mark.parametrize("name", ["lstm, all", "gru, backwards"])
def test_mask_on_kernels(name):
    compare(*MASKED[name], "triton", "holes and an empty row")


def both(layer, **options):
    return lambda dtype: Bidirectional(layer(H, dtype=dtype, **options.get("of", {})), dtype=dtype, **options.get("how", {}))


ALL = {"return_sequences": True, "return_state": True}
BOTH = {
    "lstm": (both(LSTM), 4),
    "lstm, all": (both(LSTM, of=ALL), 4),
    "gru, sum": (both(GRU, of=ALL, how={"merge_mode": "sum"}), 2),
    "gru, apart": (both(GRU, of={"return_state": True}, how={"merge_mode": None}), 2),
    "rnn, product": (both(SimpleRNN, of={"return_sequences": True}, how={"merge_mode": "mul"}), 2),
    "rnn, mean": (both(SimpleRNN, how={"merge_mode": "ave"}), 2),
}


@pytest.mark.parametrize("mask", [None, "right", "holes and an empty row"])
@pytest.mark.parametrize("name", BOTH)
def test_bidirectional(name, mask):
    compare(*BOTH[name], "torch", mask, given=mask != "right")


def test_bidirectional_on_kernels():
    compare(*BOTH["lstm, all"], "triton", "left")


def test_bidirectional_of_backward_first():
    """The layer called forward runs backwards, and the other way round."""

    def build(dtype):
        first = LSTM(H, go_backwards=True, return_sequences=True, dtype=dtype)
        return Bidirectional(first, backward_layer=LSTM(H, return_sequences=True, dtype=dtype), dtype=dtype)

    compare(build, 4, "torch")


LEFT = {
    "softsign": lambda dtype: LSTM(H, activation="softsign", dtype=dtype),
    "hard_sigmoid": lambda dtype: GRU(H, recurrent_activation="hard_sigmoid", dtype=dtype),
    "reset_after": lambda dtype: GRU(H, reset_after=False, dtype=dtype),
    "use_cudnn": lambda dtype: LSTM(H, use_cudnn=False, dtype=dtype),
    "gelu": lambda dtype: SimpleRNN(H, activation="gelu", dtype=dtype),
    "StackedRNNCells": lambda dtype: keras.layers.RNN([keras.layers.GRUCell(H), keras.layers.GRUCell(H)], dtype=dtype),
}


@pytest.mark.parametrize("reason", LEFT)
def test_left_to_keras(reason, monkeypatch):
    """With the reason, which strict mode makes an error."""
    layer = LEFT[reason]("float32")
    x = torch.randn(B, T, I)
    expected = layer(x)
    with rnnfast.keras.enable():
        assert reason in rnnfast.keras.explain(layer).own[0][1]
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
        if reason != "StackedRNNCells":  # whose class rnnfast does not touch
            with rnnfast.use_backend("triton"), pytest.warns(rnnfast.FallbackWarning, match=reason):
                layer(x)
            monkeypatch.setenv("RNNFAST_STRICT", "1")
            with pytest.raises(RuntimeError, match=reason):
                layer(x)


def test_dropout():
    """Masks of Keras on the input, the same for all steps; hidden units are dropped by Keras alone."""
    x = torch.randn(B, T, I)
    for layer in (LSTM(H, dropout=0.5, seed=1), GRU(H, dropout=0.5, seed=1), SimpleRNN(H, dropout=0.5, seed=1)):
        layer.build(x.shape)
        found = []
        for context in (nullcontext, rnnfast.keras.enable):
            layer.cell.seed_generator.state.assign([1, 0])
            with context():
                found.append(layer(x, training=True))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    rnnfast.keras.enable()
    recurrent = LSTM(H, recurrent_dropout=0.5)
    assert not rnnfast.keras.explain(recurrent).own
    assert "recurrent_dropout" in rnnfast.keras.explain(recurrent, training=True).own[0][1]
    assert "implementation=1" in str(rnnfast.keras.explain(LSTM(H, dropout=0.5, implementation=1), training=True))


def test_stateful():
    layer = LSTM(H, stateful=True, return_sequences=True)
    x = torch.randn(B, 2 * T, I)
    found = []
    for context in (nullcontext, rnnfast.keras.enable):
        with context():
            layer.build(x.shape)
            layer.reset_state()
            found.append(torch.cat([layer(part) for part in x.chunk(2, 1)], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def tagger(policy):
    keras.utils.set_random_seed(1)
    policy = keras.dtype_policies.DTypePolicy(policy)
    return keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            keras.layers.Embedding(9, I, mask_zero=True, dtype=policy),
            Bidirectional(LSTM(H, return_sequences=True, dtype=policy), dtype=policy),
            GRU(H, return_sequences=True, dropout=0.2, seed=2, dtype=policy),
            SimpleRNN(H, dtype=policy),
            keras.layers.Dense(2, dtype=policy),
        ]
    )


@pytest.mark.parametrize(
    "policy, backend, far",
    [
        ("float32", "torch", 1e-4),
        ("float32", "triton", 1e-4),
        ("mixed_float16", "torch", 0.02),
        ("mixed_bfloat16", "torch", 0.1),
    ],
)
def test_trained_and_asked(policy, backend, far):
    """``fit`` and ``predict`` of a model with a mask, both directions and dropout."""
    words = torch.randint(0, 9, (8, T), generator=torch.Generator().manual_seed(0)).numpy()
    labels = (words.sum(1) % 2)[:, None].repeat(2, 1).astype("float32")
    found = []
    for ours in (False, True):
        model = tagger(policy)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        with rnnfast.keras.enable() if ours else nullcontext(), rnnfast.use_backend(backend if ours else None):
            if ours:
                assert len(rnnfast.keras.explain(model, training=True).ours) == 4
            history = model.fit(words, labels, batch_size=4, epochs=2, shuffle=False, verbose=0)
            loss = torch.tensor(history.history["loss"])
            scores = torch.tensor(model.predict(words, verbose=0).astype("float32"))
            found.append([loss, scores, *map(torch.tensor, model.get_weights())])
    for each, right in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(each, right, rtol=far, atol=far)


def test_one_call_in_place_of_a_loop():
    layer = LSTM(H)
    x, counts = torch.randn(B, 50, I), []
    layer.build(x.shape)
    for context in (nullcontext, rnnfast.keras.enable):
        with context(), rnnfast.use_backend("torch"), Operators() as calls, torch.no_grad():
            layer(x)
        counts.append(calls.count)
    assert counts[0] > 50 * 10 and counts[1] < 40, counts


def test_enabled_and_disabled():
    before = {cls: cls.inner_loop for cls in (LSTM, GRU, SimpleRNN)} | {Bidirectional: Bidirectional.call}
    assert "was not called" in rnnfast.keras.explain(LSTM(H)).own[0][1]
    rnnfast.keras.enable()
    with rnnfast.keras.enable():
        pass
    assert "1 layer on rnnfast" in str(rnnfast.keras.explain(LSTM(H)))  # the block was not the first
    rnnfast.keras.disable()
    rnnfast.keras.disable()
    with pytest.raises(KeyError), rnnfast.keras.enable():
        raise KeyError
    assert before == {cls: cls.inner_loop for cls in (LSTM, GRU, SimpleRNN)} | {Bidirectional: Bidirectional.call}
    assert "inner_loop" not in vars(SimpleRNN)


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match="Keras model or layer"):
        rnnfast.keras.explain(torch.nn.LSTM(2, 3))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="KERAS_BACKEND=torch"):
        patch.setattr(keras.config, "backend", lambda: "jax")
        rnnfast.keras.enable()
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"has no GRU.inner_loop: rnnfast"):
        patch.delattr(keras.layers, "GRU")
        rnnfast.keras.enable()
    assert LSTM.inner_loop.__module__.startswith("keras")  # nothing is half replaced


def test_import_alone():
    """Importing rnnfast does not import Keras."""
    program = "import sys, rnnfast; from rnnfast import keras; assert keras is rnnfast.keras; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.filterwarnings("ignore")
def test_compiled_exported_and_shapes_alone(monkeypatch):
    """What compiles, exports or infers shapes sees Keras' own code."""
    monkeypatch.setattr("rnnfast.integrations.keras._run", None)  # an error, were it called
    cudnn = torch.backends.cudnn  # torch.export reads the older flag, which needs one precision for both
    monkeypatch.setattr(cudnn.rnn, "fp32_precision", cudnn.conv.fp32_precision)
    layer, x = LSTM(H), torch.randn(B, T, I)
    expected = layer(x)
    with rnnfast.keras.enable():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), expected)
        exported = torch.export.export(keras.Sequential([keras.Input((T, I)), layer]), (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), expected)
        assert keras.ops.shape(LSTM(H)(keras.Input((T, I)))) == (None, H)

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = LSTM(H)

            def call(self, x):
                return self.layer(x)

        model = Model()
        assert model.compute_output_spec(keras.KerasTensor((B, T, I))).shape == (B, H)


@pytest.mark.filterwarnings("ignore")
def test_page():
    assert run_page("keras")["loss"] < 1
