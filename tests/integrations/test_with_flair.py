"""Flair's tagger, classifier and language model, accelerated: the same losses, and the same weights after training."""

import logging
import warnings

import pytest
import torch
from support.packages import needs
from support.pages import run_page
from support.twins import same_training

import rnnfast

needs("flair")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    flair = pytest.importorskip("flair")
    data = pytest.importorskip("flair.data")
    embeddings = pytest.importorskip("flair.embeddings")
    models = pytest.importorskip("flair.models")

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
BACKENDS = ["torch", "triton"]  # what runs by default on a CPU, and the interpreted kernels
SPOKEN = {"the dog saw a cat": "DNVDN", "dogs run": "NV", "a cat": "DN"}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flair").setLevel(logging.WARNING)
    flair.device = torch.device("cpu")


def sentences():
    """New ones for each call: Flair keeps the embeddings of a sentence in it."""
    found = []
    for text, tags in SPOKEN.items():
        found.append(data.Sentence(text))
        found[-1].add_label("first", tags[0])
        for token, tag in zip(found[-1], tags, strict=True):
            token.add_label("pos", tag)
    return found


def labels(name, values):
    found = data.Dictionary(add_unk=False)
    for value in values:
        found.add_item(value)
    return found


def embedded():
    return embeddings.OneHotEmbeddings(labels("words", ["<unk>", *" ".join(SPOKEN).split()]), embedding_length=6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tagger(backend):
    """Packed rows of several lengths, with a CRF."""

    def build():
        none = {"dropout": 0.0, "word_dropout": 0.0, "locked_dropout": 0.0}
        return models.SequenceTagger(embedded(), labels("pos", "DNV"), "pos", hidden_size=5, **none)

    same_training(build, lambda each: each.forward_loss(sentences())[0], backend, ["rnn"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_classifier(backend):
    def build():
        document = embeddings.DocumentRNNEmbeddings([embedded()], hidden_size=5, rnn_layers=2, dropout=0.0, fine_tune=True)
        return models.TextClassifier(document, label_type="first", label_dictionary=labels("first", "DN"))

    same_training(build, lambda each: each.forward_loss(sentences())[0], backend, ["embeddings.rnn"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_language_model(backend):
    text = torch.randint(0, 7, (6, 2))

    def loss(each):
        scores = each(text[:-1], each.init_hidden(2))[0]
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())

    def build():
        return models.LanguageModel(labels("characters", "abcdefg"), True, 5, nlayers=1, embedding_size=4, dropout=0.0)

    same_training(build, loss, backend, ["rnn"])


def test_built_inside_a_block():
    with rnnfast.as_default():
        model = models.SequenceTagger(embedded(), labels("pos", "DNV"), "pos", hidden_size=5, rnn_type="GRU")
    assert type(model.rnn) is rnnfast.GRU


def test_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tagger = run_page("flair")["tagger"]
    assert type(tagger.rnn) is rnnfast.LSTM
    loaded = models.SequenceTagger.load("tagger/best-model.pt")
    assert type(loaded.rnn) is torch.nn.LSTM
    with rnnfast.as_default():
        assert type(models.SequenceTagger.load("tagger/best-model.pt").rnn) is rnnfast.LSTM
    torch.testing.assert_close(loaded.rnn.weight_hh_l0, tagger.rnn.weight_hh_l0, rtol=0, atol=0)
