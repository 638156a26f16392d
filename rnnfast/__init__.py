"""Fused recurrent layers for PyTorch on GPUs: drop-in replacements for torch.nn.LSTM, GRU and RNN, written in Triton."""

from pathlib import Path

if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        "rnnfast/kernels should be a link to the folder kernels/, and this copy of the sources has no links (from a zip, or on "
        "Windows). Delete the file rnnfast/kernels and copy the folder kernels into rnnfast, or clone with "
        "`git clone -c core.symlinks=true`."
    )

from rnnfast import functional
from rnnfast.accelerate import Report, accelerate, as_default, restore
from rnnfast.choice.decide import use_backend
from rnnfast.choice.obstacles import FallbackWarning
from rnnfast.choice.tuned import TuningWarning
from rnnfast.explain import Explanation, explain
from rnnfast.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnfast.ops import FLOP_FORMULAS
from rnnfast.settings import BACKENDS
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

    Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, and therefore their subclasses in rnnfast, unless its own
    switch ``torch._dynamo.config.allow_rnn`` is on. This function turns the switch on for the whole process.

    torch.nn's own layers in the same model are then traced, too. Dynamo unrolls them over time, which takes long for a long
    sequence. Exchange these layers as well, or wrap them in ``torch.compiler.disable``.
    """
    import torch._dynamo

    torch._dynamo.config.allow_rnn = True
