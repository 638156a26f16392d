"""pytorch-forecasting: its subclasses of torch.nn's layers are taken, and its networks train to the same weights."""

import logging
from functools import partial

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from support.twins import same_results

import rnnfast

needs("pytorch-forecasting")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("User", "Deprecation", "Future", "Runtime"))),
]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is run
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


NETWORKS = {
    "DeepAR, LSTM": ("DeepAR", {"cell_type": "LSTM", "rnn_layers": 2}, 1),
    "DeepAR, GRU": ("DeepAR", {"cell_type": "GRU", "rnn_layers": 1}, 1),
    "RecurrentNetwork": ("RecurrentNetwork", {"cell_type": "LSTM", "rnn_layers": 1}, 1),
    "TFT": ("TemporalFusionTransformer", {"lstm_layers": 1}, 2),
}


def loader(shortest):
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    y = np.random.default_rng(0).normal(size=14)
    data = pd.DataFrame({"series": np.repeat(["a", "b"], 7), "time": np.tile(np.arange(7), 2), "y": y})
    dataset = TimeSeriesDataSet(
        data,
        time_idx="time",
        target="y",
        group_ids=["series"],
        min_encoder_length=shortest,
        max_encoder_length=3,
        max_prediction_length=2,
        time_varying_unknown_reals=["y"],
        add_relative_time_idx=True,
    )
    return dataset, dataset.to_dataloader(train=False, batch_size=6, num_workers=0)


def trained(name, ours):
    """The network after two steps: its output and its weights."""
    import lightning.pytorch as pl
    import pytorch_forecasting

    cls, options, layers = NETWORKS[name]
    dataset, batches = loader(0 if name == "TFT" else 1)
    torch.manual_seed(0)
    options = {"hidden_size": 4, "dropout": 0.0, "learning_rate": 0.01, "log_interval": -1, "optimizer": "sgd", **options}
    network = getattr(pytorch_forecasting, cls).from_dataset(dataset, **options)
    reports, original = [], type(network.rnn if layers == 1 else network.lstm_encoder)
    if ours:
        rnnfast.accelerate(network, subclasses=True, report=reports.append)
        (report,) = reports
        assert len(report.changed) == layers and not report.left
        assert all("a subclass: pytorch_forecasting.models.nn.rnn." in text for _, text in report.changed)
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, batches)
    network.eval()
    torch.manual_seed(1)  # DeepAR draws samples
    with torch.no_grad():
        output = network(next(iter(batches))[0])[0]
    if ours:
        rnnfast.restore(network, report=None)
        assert type(network.rnn if layers == 1 else network.lstm_encoder) is original
    return [output, *network.parameters()]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", NETWORKS)
def test_trained(name, backend, monkeypatch):
    """Two steps of training give the same outputs and weights, on torch.nn's code and on the kernels."""
    monkeypatch.setenv("RNNFAST_STRICT", "1")  # no call of rnnfast's layers may fall back
    same_results(partial(trained, name), backend)


def test_page(capsys):
    run_page("pytorch-forecasting")
    assert "a subclass: pytorch_forecasting.models.nn.rnn.LSTM" in capsys.readouterr().out
