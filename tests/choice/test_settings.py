"""The settings: the environment, a ``with`` block, and unknown values."""

import pytest
import torch

import rnnfast
from rnnfast.choice import obstacles
from rnnfast.settings import SETTINGS, TUNING_FILE, Setting, strict

pytestmark = pytest.mark.same_everywhere


CHOICES = [setting for setting in SETTINGS if setting.choices]


@pytest.mark.parametrize("setting", CHOICES, ids=lambda setting: setting.variable)
def test_choices(setting, monkeypatch):
    """Each choice is taken; unset and empty are None; another value names the variable and the choices."""
    monkeypatch.delenv(setting.variable, raising=False)
    assert setting.get() is None
    for value in ("", *setting.choices):
        monkeypatch.setenv(setting.variable, value)
        assert setting.get() == (value or None)
    monkeypatch.setenv(setting.variable, "other")
    with pytest.raises(ValueError, match=f"{setting.variable} should be one of '{setting.choices[0]}'.* got 'other'"):
        setting.get()


def test_block(monkeypatch):
    """A block wins over the environment, nests and ends."""
    setting = Setting("RNNFAST_TEST")
    monkeypatch.setenv("RNNFAST_TEST", "environment")
    with setting.within("outer"):
        with pytest.raises(KeyError), setting.within("inner"):
            assert setting.get() == "inner"
            raise KeyError
        assert setting.get() == "outer"
    assert setting.get() == "environment"


def test_any_text(monkeypatch):
    monkeypatch.setenv("RNNFAST_TUNING_FILE", "/some/where")
    assert TUNING_FILE.get() == "/some/where"


@pytest.mark.parametrize("value, expected", [(None, False), ("", False), ("0", False), ("1", True)])
def test_strict(value, expected, monkeypatch):
    if value is not None:
        monkeypatch.setenv("RNNFAST_STRICT", value)
    assert strict() is expected


CALLS = {
    "layer": lambda x: rnnfast.GRU(3, 4)(x),
    "layer on torch": lambda x: rnnfast.GRU(3, 4, backend="torch")(x),
    "layer in a block": rnnfast.use_backend("reference")(lambda x: rnnfast.GRU(3, 4)(x)),
    "cell": lambda x: rnnfast.GRUCell(3, 4)(x[0]),
    "own cell": lambda x: rnnfast.Layer(rnnfast.cells.gru, 3, 4)(x),
    "function": lambda x: rnnfast.functional.rnn(x, None, torch.zeros(4, 3), torch.zeros(4, 4)),
    "explain": lambda x: rnnfast.explain(rnnfast.GRU(3, 4), x),
}


@pytest.mark.parametrize("setting", CHOICES, ids=lambda setting: setting.variable)
@pytest.mark.parametrize("short_cut", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_wrong_values_on_a_cpu(call, short_cut, setting, monkeypatch):
    """Every call refuses a wrong value of every variable, also where it would not read it; a right one is taken."""
    if short_cut:
        monkeypatch.setattr(obstacles, "known", {"triton": None, "cpu:None": "no interpreter"})
    x = torch.zeros(2, 1, 3)
    CALLS[call](x)
    for value in ("fast", "false", "True"):
        monkeypatch.setenv(setting.variable, value)
        with pytest.raises(ValueError, match=f"{setting.variable} should be one of .* got '{value}'"):
            CALLS[call](x)
    monkeypatch.setenv(
        setting.variable, "0" if setting.variable == "RNNFAST_STRICT" else "trust" if "trust" in setting.choices else "auto"
    )
    CALLS[call](x)
