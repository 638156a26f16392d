"""Without the library that an integration is for: one line that names the version tested."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch

import rnnfast
from rnnfast import integrations

pytestmark = pytest.mark.same_everywhere


def test_keras_not_installed(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(integrations, "version", version)
    for call in (rnnfast.keras.enable, lambda: rnnfast.keras.explain(torch.nn.LSTM(2, 3))):
        with pytest.raises(ImportError, match=r"^keras is not installed; rnnfast was tested with keras [\d.]+$"):
            call()
    rnnfast.keras.disable()


def test_other_version(monkeypatch):
    monkeypatch.setattr(integrations, "version", lambda package: "2.0.0")
    monkeypatch.setattr(integrations.importlib, "import_module", lambda module: torch)
    with pytest.warns(UserWarning, match="keras 2.0.0 is installed; rnnfast was tested with keras 3"):
        assert integrations.load("keras", "keras") is torch


def test_modules_are_imported_when_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(integrations.importlib, "import_module", lambda name: asked.append(name) or torch)
    monkeypatch.delitem(vars(integrations), "sb3", raising=False)
    assert integrations.sb3 is torch and asked == ["rnnfast.integrations.sb3"]
    with pytest.raises(AttributeError, match="no attribute 'tensorflow'"):
        _ = integrations.tensorflow
