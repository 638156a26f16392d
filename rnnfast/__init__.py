"""Fused recurrent layers for PyTorch on GPUs: drop-in replacements for torch.nn.LSTM, GRU and RNN, written in Triton."""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

from rnnfast import functional
from rnnfast.accelerate import Report, accelerate, as_default, restore
from rnnfast.choice.decide import use_backend
from rnnfast.choice.obstacles import FallbackWarning
from rnnfast.explain import Explanation, explain
from rnnfast.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnfast.ops import FLOP_FORMULAS
from rnnfast.settings import BACKENDS
from rnnfast.tuning import TuningWarning
from rnnfast.version import __version__ as __version__

__all__ = [
    "BACKENDS",
    "FLOP_FORMULAS",
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "FallbackWarning",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Report",
    "TuningWarning",
    "accelerate",
    "as_default",
    "enable_compile",
    "explain",
    "functional",
    "restore",
    "use_backend",
]


def enable_compile() -> None:
    """Let ``torch.compile`` trace rnnfast layers. Call it once, before compiling.

    Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, and so of the subclasses here, unless its own switch
    ``torch._dynamo.config.allow_rnn`` is on. This turns it on, for the whole process. torch.nn's own layers in the same model
    are then traced too, unrolled step by step, which takes long for a long sequence. Exchange those as well, or wrap them
    in ``torch.compiler.disable``.
    """
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True


class _Checkout:
    """Finds ``rnnfast.kernels`` in a checkout, where they lie beside this package: Python takes the package in the current
    directory before an installed one."""

    kernels = Path(__file__).parents[1] / "kernels"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "rnnfast.kernels":
            return spec_from_file_location(name, cls.kernels / "__init__.py", submodule_search_locations=[str(cls.kernels)])
        return None


if not (Path(__file__).parent / "kernels").exists() and (_Checkout.kernels / "__init__.py").exists():
    sys.meta_path.insert(0, _Checkout)
