"""SpeechBrain's wrappers of torch.nn's layers, accelerated: the same losses, and the same weights after training."""

import sys
import warnings
from types import ModuleType

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from support.twins import same_training

import rnnfast

needs("speechbrain")
if torch.version.cuda is None:  # the compiled part of torchaudio, as PyPI has it, needs CUDA's libraries
    extension = ModuleType("torchaudio._extension")
    vars(extension).update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=lambda function: function)
    sys.modules[extension.__name__] = extension
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    recurrent = pytest.importorskip("speechbrain.nnet.RNN")
    lobes = pytest.importorskip("speechbrain.lobes.models.RNNLM")

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
BACKENDS = ["torch", "triton"]  # what runs by default on a CPU, and the interpreted kernels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_wrappers(name, backend):
    """With relative lengths, both directions and two layers."""
    cls = getattr(recurrent, name)
    x, lengths = torch.randn(3, 6, 4), torch.tensor([1.0, 0.5, 2 / 3])

    def build():
        return cls(hidden_size=5, input_size=4, num_layers=2, bidirectional=True)

    same_training(build, lambda each: each(x, lengths=lengths)[0].square().mean(), backend, ["rnn"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_language_model(backend):
    words = torch.randint(0, 7, (3, 6))

    def loss(each):
        scores = each(words[:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())

    def build():
        return lobes.RNNLM(output_neurons=7, embedding_dim=4, rnn_neurons=5, dnn_neurons=4, dropout=0.0)

    same_training(build, loss, backend, ["rnn.rnn"])


def test_own_recurrences_stay():
    reports = []
    rnnfast.accelerate(recurrent.LiGRU(hidden_size=4, input_shape=(2, 3, 5)), report=reports.append)
    rnnfast.accelerate(recurrent.AttentionalRNNDecoder("gru", "content", 4, 4, 1, 4, 4), report=reports.append)
    assert not reports[0].changed and not reports[1].changed
    assert [reason.startswith("a cell runs one step a call") for _, reason in reports[1].left] == [True]


def test_page():
    brain = run_page("speechbrain")["brain"]
    assert type(brain.modules.encoder.rnn) is rnnfast.LSTM and brain.optimizer_step == 6
