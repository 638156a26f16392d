"""NeuralForecast: accelerated models train to the same weights and forecast the same."""

import logging
from functools import partial

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from support.twins import same_results

import rnnfast

needs("neuralforecast")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("User", "Deprecation", "Future", "Runtime"))),
]

SMALL = {"encoder_hidden_size": 3, "decoder_hidden_size": 3}
MODELS = {
    "LSTM": ("LSTM", SMALL),
    "LSTM, recurrent": ("LSTM", {**SMALL, "recurrent": True}),
    "GRU": ("GRU", SMALL),
    "RNN": ("RNN", SMALL),
    "DeepAR": ("DeepAR", {"lstm_hidden_size": 3, "lstm_dropout": 0.0, "trajectory_samples": 2}),
    "DilatedRNN": ("DilatedRNN", {"encoder_hidden_size": 3, "dilations": [[1, 2]]}),
    "TFT": ("TFT", {"hidden_size": 4}),
}


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is run
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def trained(name, ours):
    """The model's forecast and its weights after two steps."""
    import neuralforecast.models
    import numpy as np
    import pandas as pd

    data = pd.DataFrame({"unique_id": "a", "ds": np.arange(14), "y": np.sin(np.arange(14))})
    cls, options = MODELS[name]
    model = getattr(neuralforecast.models, cls)(
        h=2,
        input_size=3,
        max_steps=2,
        batch_size=2,
        windows_batch_size=4,
        random_seed=1,
        learning_rate=0.1,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={},
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    if ours:
        reports = []
        rnnfast.accelerate(model, report=reports.append)
        assert reports[0].changed and not reports[0].left
    forecaster = neuralforecast.NeuralForecast(models=[model], freq=1)
    forecaster.fit(data)
    forecast = forecaster.predict()
    found = [module for module in forecaster.models[0].modules() if isinstance(module, torch.nn.RNNBase)]
    assert found and all(isinstance(module, rnnfast.nn.sequence.Sequence) == ours for module in found)
    return [torch.tensor(forecast[cls].to_numpy()), *forecaster.models[0].parameters()]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_trained(name, backend, monkeypatch):
    """Two steps of training give the same forecast and weights, on torch.nn's code and on the kernels."""
    monkeypatch.setenv("RNNFAST_STRICT", "1")  # no call of rnnfast's layers may fall back
    same_results(partial(trained, name), backend)


def test_page(capsys):
    with rnnfast.use_backend("torch"):
        run_page("neuralforecast")
    assert "hist_encoder: LSTM(1, 8, num_layers=2" in capsys.readouterr().out
