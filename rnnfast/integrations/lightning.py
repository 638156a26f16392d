"""`Accelerate`, a callback for Lightning: it exchanges the recurrent layers of the model that a Trainer runs.

It works with a Trainer of ``lightning`` and with one of ``pytorch_lightning``, which are the same code under two names.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from rnnfast.accelerate import Report, accelerate, restore
from rnnfast.integrations import load

__all__ = ["Accelerate"]

_MODULES = {"lightning": "lightning.pytorch", "pytorch-lightning": "pytorch_lightning"}


def _callbacks() -> list[Any]:
    """The class Callback of each of the two packages that is installed.

    Raises:
        ImportError: if none is.
    """
    installed = [package for package, module in _MODULES.items() if find_spec(module.partition(".")[0])]
    return [load(_MODULES[package], package).Callback for package in installed or ["lightning"]]


class Accelerate(*_callbacks()):
    """Exchanges the layers of the LightningModule by `rnnfast.accelerate` when fitting, validating, testing or predicting
    starts.

    At that time the model has all its layers, those of ``setup`` and ``configure_model`` too. The layers keep their parameters,
    so the optimizers, strategies and checkpoints of the Trainer see no difference: a checkpoint loads into the model with and
    without the callback.

    Args:
        subclasses: as for `rnnfast.accelerate`.
        restore: whether torch.nn's classes come back when the Trainer is done, also after an exception. Then a model that is
            pickled later needs no rnnfast to load. This restores every layer that `rnnfast.accelerate` exchanged.
        report: a function that is called with the `rnnfast.Report`, in the process of rank 0, for the first run and for each
            later run that exchanges a layer. None for no report.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[Accelerate()])  # doctest: +SKIP
    """

    def __init__(
        self, *, subclasses: bool = False, restore: bool = False, report: Callable[[Report], Any] | None = print
    ) -> None:
        super().__init__()
        self.subclasses, self.restore, self.report = subclasses, restore, report
        self._running = self._told = False

    def _start(self, trainer: Any, pl_module: Any) -> None:
        if self._running:  # validation inside of fit
            return
        self._running = True
        found: list[Report] = []
        accelerate(pl_module, subclasses=self.subclasses, report=found.append)
        if self.report is not None and trainer.is_global_zero and (found[0].changed or not self._told):
            self._told = True
            self.report(found[0])

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _start

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._running = False
        if self.restore:
            restore(pl_module, report=None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "")
