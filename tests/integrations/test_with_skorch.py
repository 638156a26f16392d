"""skorch: a net with rnnfast's layer trains, clones, pickles and is searched as one with torch.nn's."""

import pickle

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("skorch")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV


@pytest.fixture(scope="module")
def page():
    with rnnfast.use_backend("torch"):
        return run_page("skorch")


def fitted(page, layer, seed=0):
    net = clone(page["net"]).set_params(module__layer=layer)
    torch.manual_seed(seed)
    return net.fit(page["X"], page["y"])


def same(net, other):
    torch.testing.assert_close(net.module_.state_dict(), other.module_.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_training(backend, page, saved):
    theirs = fitted(page, torch.nn.LSTM)
    with rnnfast.use_backend(backend):
        ours = fitted(page, rnnfast.LSTM)
    assert bool(saved) == (backend == "triton") and type(ours.module_.lstm) is rnnfast.LSTM
    same(ours, theirs)


def test_pickle_and_parameters(page, tmp_path):
    with rnnfast.use_backend("torch"):
        net = fitted(page, rnnfast.LSTM)
        loaded = pickle.loads(pickle.dumps(net))
        expected = torch.from_numpy(net.predict_proba(page["X"]))
        torch.testing.assert_close(torch.from_numpy(loaded.predict_proba(page["X"])), expected)
        net.save_params(f_params=tmp_path / "parameters.pt")
        theirs = clone(net).set_params(module__layer=torch.nn.LSTM).initialize()
        theirs.load_params(f_params=tmp_path / "parameters.pt")
        torch.testing.assert_close(torch.from_numpy(theirs.predict_proba(page["X"])), expected)


def test_search(page):
    found = []
    for layer in (rnnfast.LSTM, torch.nn.LSTM):
        torch.manual_seed(0)
        net = clone(page["net"]).set_params(module__layer=layer)
        with rnnfast.use_backend("torch"):
            search = GridSearchCV(net, {"module__hidden": [3, 6]}, cv=2, scoring="neg_log_loss").fit(page["X"], page["y"])
        found.append(torch.from_numpy(search.cv_results_["mean_test_score"]))
        assert type(search.best_estimator_.module_.lstm) is layer
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_module_as_it_is(page):
    net = clone(page["net"]).set_params(module__layer=torch.nn.LSTM, max_epochs=1)
    with rnnfast.as_default(), rnnfast.use_backend("torch"):
        net.fit(page["X"], page["y"])
    assert type(net.module_.lstm) is rnnfast.LSTM
