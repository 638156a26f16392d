"""Stanza's models, accelerated: the same losses, and the same weights after training."""

import warnings

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from support.twins import same_training

import rnnfast

needs("stanza")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tokenization = pytest.importorskip("stanza.models.tokenization.model")
    pos = pytest.importorskip("stanza.models.pos.model")
    characters = pytest.importorskip("stanza.models.common.char_model")

pytestmark = [pytest.mark.numerical, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
BACKENDS = ["torch", "triton"]  # what runs by default on a CPU, and the interpreted kernels


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokenizer(backend):
    options = {"feat_dim": 2, "rnn_layers": 2, "conv_res": "1,3", "use_mwt": True, "hierarchical": True}
    options |= {"hier_invtemp": 1, "tok_noise": 0.0}
    units, features = torch.randint(1, 11, (2, 6)), torch.randn(2, 6, 2)

    def build():
        return tokenization.Tokenizer(options, nchars=11, emb_dim=4, hidden_dim=5, dropout=0.0, feat_dropout=0.0)

    same_training(build, lambda each: each(units, features, [6, 4])[0].square().mean(), backend, ["rnn", "rnn2"])


def tagger(rec_dropout=0.0):
    vocabulary = {name: list(range(size)) for name, size in (("word", 9), ("char", 7), ("upos", 4), ("xpos", 5), ("feats", 3))}
    options = {"word_emb_dim": 4, "tag_emb_dim": 3, "char": True, "char_emb_dim": 3, "char_hidden_dim": 4, "char_num_layers": 1}
    options |= {"char_rec_dropout": rec_dropout, "transformed_dim": 4, "pretrain": False, "hidden_dim": 5, "num_layers": 2}
    options |= {"dropout": 0.0, "rec_dropout": rec_dropout, "deep_biaff_hidden_dim": 4, "word_dropout": 0.0}
    return pos.Tagger(options | {"composite_deep_biaff_hidden_dim": 4}, vocabulary)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tagger(backend):
    """A character model and a HighwayLSTM of two layers, each layer a PackedLSTM of both directions."""
    word, spelled = torch.randint(1, 9, (2, 4)), torch.randint(1, 7, (6, 3))
    tags = [torch.randint(0, size, (2, 4)) for size in (4, 5, 3)]

    def loss(each):
        return each(word, None, spelled, None, tags, None, [0, 1, 2, 3, 4, 5], [4, 2], [3, 3, 2, 2, 1, 1], None)[0]

    names = ["charmodel.charlstm.lstm", "taggerlstm.lstm.0.lstm", "taggerlstm.lstm.1.lstm"]
    same_training(tagger, loss, backend, names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_character_language_model(backend):
    options = {"char_emb_dim": 4, "char_hidden_dim": 5, "char_num_layers": 1, "char_dropout": 0.0, "char_unit_dropout": 0.0}
    options |= {"char_rec_dropout": 0.0}
    text = torch.randint(0, 7, (2, 6))

    def loss(each):
        return torch.nn.functional.cross_entropy(each(text[:, :-1], [5, 5])[2].flatten(0, 1), text[:, 1:].flatten())

    def build():
        return characters.CharacterLanguageModel(options, {"char": list(range(7))}, pad=True)

    same_training(build, loss, backend, ["charlstm.lstm"])


def test_cells_of_recurrent_dropout_stay():
    reports = []
    rnnfast.accelerate(tagger(rec_dropout=0.5), report=reports.append)
    assert not reports[0].changed and len(reports[0].left) == 5
    assert all(reason.startswith("a cell runs one step a call") for _, reason in reports[0].left)


def test_page():
    assert run_page("stanza")["scores"].shape == (2, 6, 3)
