"""Lightning: the callback exchanges the layers of a model in training, and checkpoints load with it and without it."""

import importlib
import logging

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("lightning")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

from importlib.util import find_spec

from rnnfast.integrations.lightning import Accelerate

T, B, I, H = 4, 4, 3, 5
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
each_package = pytest.mark.parametrize("package", [name for name in PACKAGES if find_spec(name.partition(".")[0])])
each_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes where it is run
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def loader():
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(2 * B, T, I, generator=generator), torch.arange(2 * B) % 2)
    return torch.utils.data.DataLoader(data, batch_size=B)


def made(package, late=False):
    pl = importlib.import_module(package)

    class Model(pl.LightningModule):
        """`late`: its layer is built by Lightning's hook."""

        def __init__(self):
            super().__init__()
            self.lstm = None if late else torch.nn.LSTM(I, H, batch_first=True)
            self.out = torch.nn.Linear(H, 2)

        def configure_model(self):
            self.lstm = self.lstm or torch.nn.LSTM(I, H, batch_first=True)

        def forward(self, x):
            return self.out(self.lstm(x)[0][:, -1])

        def training_step(self, batch, _):
            if getattr(self, "fails", False):
                raise ArithmeticError("this step fails")
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        validation_step = test_step = lambda self, batch, _: self.log("loss", self.training_step(batch, 0))

        def predict_step(self, batch, _):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)

    torch.manual_seed(0)
    return Model()


def trainer(package, *callbacks, epochs=2):
    pl = importlib.import_module(package)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)


def same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


@each_backend
@each_package
def test_training(package, backend, saved):
    """The weights after training with the callback are those without it."""
    ours, theirs, reports = made(package), made(package), []
    trainer(package).fit(theirs, loader(), loader())
    with rnnfast.use_backend(backend):
        trainer(package, Accelerate(report=reports.append)).fit(ours, loader(), loader())
    same(ours, theirs)
    assert type(ours.lstm) is rnnfast.LSTM and type(theirs.lstm) is torch.nn.LSTM
    assert bool(saved) == (backend == "triton")
    assert len(reports) == 1 and reports[0].changed == (("lstm", "LSTM(3, 5, batch_first=True)"),)


@each_package
def test_checkpoints(package, tmp_path):
    """A run that is resumed with the callback, from a checkpoint without it, ends where an unbroken one ends; and back."""
    whole, ours, theirs = made(package), made(package), made(package)
    trainer(package, epochs=4).fit(whole, loader())
    with rnnfast.use_backend("torch"):
        first = trainer(package, epochs=1)
        first.fit(theirs, loader())
        first.save_checkpoint(tmp_path / "theirs.ckpt")
        second = trainer(package, Accelerate(report=None), epochs=3)
        second.fit(ours, loader(), ckpt_path=tmp_path / "theirs.ckpt")
        second.save_checkpoint(tmp_path / "ours.ckpt")
    assert second.current_epoch == 3 and type(ours.lstm) is rnnfast.LSTM
    theirs = made(package)
    trainer(package, epochs=4).fit(theirs, loader(), ckpt_path=tmp_path / "ours.ckpt")
    same(theirs, whole)
    assert type(theirs.lstm) is torch.nn.LSTM


@each_package
def test_every_stage(package, capsys):
    """One report for all stages of a model; one more if a stage exchanges a layer again."""
    model, callback = made(package), Accelerate()
    theirs = made(package)
    with rnnfast.use_backend("torch"):
        runner = trainer(package, callback)
        found = torch.cat(runner.predict(model, loader()))
        runner.validate(model, loader(), verbose=False)
        runner.test(model, loader(), verbose=False)
        runner.fit(model, loader())
    torch.testing.assert_close(found, torch.cat(trainer(package).predict(theirs, loader())))
    assert capsys.readouterr().out == "1 layer exchanged for rnnfast's\n  lstm: LSTM(3, 5, batch_first=True)\n"
    runner.fit_loop.max_epochs, callback.restore = 3, True
    runner.fit(model, loader())
    assert type(model.lstm) is torch.nn.LSTM
    runner.predict(model, loader())
    assert capsys.readouterr().out.startswith("1 layer exchanged")


@each_package
def test_layers_that_lightning_has_built_and_a_step_that_fails(package):
    model, reports = made(package, late=True), []
    model.fails = True
    callback = Accelerate(restore=True, report=lambda report: reports.append((report, type(model.lstm))))
    with pytest.raises(ArithmeticError, match="this step fails"):
        trainer(package, callback).fit(model, loader())
    assert reports[0][0].changed and reports[0][1] is rnnfast.LSTM and type(model.lstm) is torch.nn.LSTM


class Derived(torch.nn.LSTM):
    pass


@each_package
def test_subclasses(package):
    model = made(package)
    model.lstm = Derived(I, H, batch_first=True)
    with rnnfast.use_backend("torch"):
        trainer(package, Accelerate(report=None)).predict(model, loader())
        assert not isinstance(model.lstm, rnnfast.LSTM)
        trainer(package, Accelerate(subclasses=True, report=None)).predict(model, loader())
    assert isinstance(model.lstm, rnnfast.LSTM) and isinstance(model.lstm, Derived)


@each_package
def test_only_rank_0_reports(package, capsys, monkeypatch):
    runner = trainer(package, Accelerate())
    monkeypatch.setattr(type(runner), "is_global_zero", False)
    with rnnfast.use_backend("torch"):
        runner.predict(made(package), loader())
    assert "exchanged" not in capsys.readouterr().out


def test_the_page():
    with rnnfast.use_backend("torch"):
        model = run_page("lightning")["model"]
    assert type(model.lstm) is rnnfast.LSTM
