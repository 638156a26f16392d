"""The settings of rnnfast. They are environment variables. Some can also be set for a ``with`` block.

They are read at each use, so they may change at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rnnfast.torch_private import environment

__all__ = [
    "BACKEND", "BACKENDS", "CANARY", "CELL_CACHE", "KERNELS", "KEYS", "SETTINGS", "STRICT", "TUNING_FILE", "Setting",
    "accepted", "check_environment", "strict",
]  # fmt: skip


class Setting:
    """One setting. ``get`` gives the value of the innermost ``with`` block of this thread, else the variable's, else None.

    Args:
        variable: the environment variable; an empty value counts as unset.
        choices: the values allowed; empty for any text.
    """

    def __init__(self, variable: str, choices: tuple[str, ...] = ()) -> None:
        self.variable, self.choices = variable, choices
        self.key = os.environ.encodekey(variable)  # type: ignore[attr-defined]
        self.block: ContextVar[str | None] = ContextVar(variable, default=None)

    def check(self, value: str, source: str) -> str:
        """Return `value`. Raise a `ValueError` that lists the choices and names the `source` if it is not one of them."""
        if self.choices and value not in self.choices:
            names = [repr(choice) for choice in self.choices]
            raise ValueError(f"{source} should be one of {', '.join(names[:-1])} or {names[-1]}, got {value!r}")
        return value

    def in_environment(self) -> str | None:
        value = os.environ.get(self.variable) if self.key in environment else None
        return self.check(value, self.variable) if value else None

    def get(self) -> str | None:
        found = self.block.get()
        return self.in_environment() if found is None and self.key in environment else found

    @contextmanager
    def within(self, value: str) -> Iterator[None]:
        """Set the setting to `value`, within the ``with`` block and in this thread. The caller has checked the value."""
        token = self.block.set(value)
        try:
            yield
        finally:
            self.block.reset(token)


BACKENDS = ("triton", "torch", "reference")

BACKEND = Setting("RNNFAST_BACKEND", (*BACKENDS, "auto"))
STRICT = Setting("RNNFAST_STRICT", ("0", "1"))
CANARY = Setting("RNNFAST_CANARY", ("auto", "off", "trust"))
KERNELS = Setting("RNNFAST_KERNELS", ("auto", "step", "persistent", "one_program", "scan"))
TUNING_FILE = Setting("RNNFAST_TUNING_FILE")
CELL_CACHE = Setting("RNNFAST_CELL_CACHE")
SETTINGS = (BACKEND, STRICT, CANARY, KERNELS, TUNING_FILE, CELL_CACHE)


KEYS = tuple(setting.key for setting in SETTINGS if setting.choices)
accepted: set[tuple] = {(None,) * len(KEYS)}  # the values in the environment that `check_environment` found right, by KEYS


def check_environment() -> None:
    """Raise a `ValueError` if a variable in the environment has a value that its setting does not know.

    A call asks for it if the variables have values that are not `accepted` yet, also if the call itself does not need them.
    Whoever writes RNNFAST_KERNELS=fast thus learns so on a CPU, and not later on the GPU.
    """
    for setting in SETTINGS:
        setting.in_environment()
    accepted.add(tuple(map(environment.get, KEYS)))


def strict() -> bool:
    """Whether a call raises an error if the backend that was asked for cannot run it."""
    return STRICT.get() == "1"
