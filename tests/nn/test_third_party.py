"""`accelerate` on somebody else's trained model, as it comes out of its package."""

import pytest
import torch

import rnnfast

pytestmark = pytest.mark.same_everywhere

g2p_fa = pytest.importorskip("g2p_fa", reason="a GPU machine may lack it")


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_pretrained_third_party_model(kernels, device):
    """g2p_fa from PyPI, a trained sequence-to-sequence model of two torch.nn.LSTMs, unchanged: the same phonemes and scores."""
    g2p = g2p_fa.G2P_Fa()
    model = g2p.model.eval().to(device)
    words = [] if kernels else ["سلام", "کتاب", "ایران"]  # interpreted, a word takes minutes
    said = [g2p(word) for word in words]
    source, target = (
        g2p_fa.utils.word2tensor("سلام", 6).to(device)[:, None],
        g2p_fa.utils.IPA2tensor("b", 3).to(device)[:, None],
    )
    with torch.no_grad():
        scores = model(source, target, 0)
        reports = []
        rnnfast.accelerate(model, report=reports.append)
        assert [name for name, _ in reports[0].changed] == ["encoder.rnn", "decoder.rnn"]
        with rnnfast.use_backend("triton" if kernels else "torch"):
            torch.testing.assert_close(model(source, target, 0), scores, rtol=1e-4, atol=1e-4)
            assert [g2p(word) for word in words] == said
    rnnfast.restore(model, report=None)
    assert type(model.encoder.rnn) is torch.nn.LSTM
