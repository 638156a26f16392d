"""Darts: its recurrent models, built in as_default, train to the same weights and forecast the same."""

import logging

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("darts")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("User", "Deprecation", "Future", "Runtime"))),
]
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is run
    for name in ("pytorch_lightning", "darts"):
        logging.getLogger(name).setLevel(logging.ERROR)


def built(kind, name):
    import darts.models

    length = {"training_length": 5} if kind == "RNNModel" else {"output_chunk_length": 2}
    return getattr(darts.models, kind)(
        model=name,
        hidden_dim=3,
        n_rnn_layers=2,
        input_chunk_length=3,
        n_epochs=1,
        batch_size=8,
        random_state=0,
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        pl_trainer_kwargs=QUIET,
        **length,
    )


def trained(kind, name):
    import numpy as np
    from darts import TimeSeries

    model = built(kind, name)
    model.fit(TimeSeries.from_values(np.sin(np.arange(14)).astype(np.float32)))
    return model


def forecast(model):
    return torch.tensor(model.predict(2).values())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("kind", ["RNNModel", "BlockRNNModel"])
def test_trained(kind, name, backend, monkeypatch):
    """Training gives the same forecast and weights, on torch.nn's code and on the kernels."""
    theirs = trained(kind, name)
    expected = [forecast(theirs), *theirs.model.parameters()]
    monkeypatch.setenv("RNNFAST_STRICT", "1")  # no call may fall back
    with rnnfast.use_backend(backend), rnnfast.as_default():
        ours = trained(kind, name)
        found = [forecast(ours), *ours.model.parameters()]
    assert type(ours.model.rnn) is getattr(rnnfast, name) and type(theirs.model.rnn) is getattr(torch.nn, name)
    if backend == "torch":
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(found, expected)


def test_saved_and_loaded():
    """A saved model loads with torch.nn's layers, or with rnnfast's in the block; it can be accelerated afterwards."""
    import darts.models

    with rnnfast.use_backend("torch"):
        with rnnfast.as_default():
            model = trained("BlockRNNModel", "GRU")
        model.save("model.pt")
        plain = darts.models.BlockRNNModel.load("model.pt")
        with rnnfast.as_default():
            ours = darts.models.BlockRNNModel.load("model.pt")
        assert type(plain.model.rnn) is torch.nn.GRU and type(ours.model.rnn) is rnnfast.GRU
        assert torch.equal(forecast(plain), forecast(model)) and torch.equal(forecast(ours), forecast(model))
        rnnfast.accelerate(plain.model, report=None)
        assert type(plain.model.rnn) is rnnfast.GRU and torch.equal(forecast(plain), forecast(model))


def test_page():
    with rnnfast.use_backend("torch"):
        run_page("darts")
