"""The settings: the environment, a ``with`` block, and unknown values."""

import pytest

from rnnfast.settings import BACKEND, KERNELS, STRICT, TUNING_FILE, Setting, strict

pytestmark = pytest.mark.same_everywhere


@pytest.mark.parametrize("setting", [BACKEND, STRICT, KERNELS], ids=lambda setting: setting.variable)
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
