"""captum: attributions through rnnfast's layers are those through torch.nn's, in evaluation mode."""

import pytest
import torch
from support.packages import needs
from support.pages import run_page

import rnnfast

needs("captum")
pytestmark = [
    pytest.mark.numerical,
    pytest.mark.same_everywhere,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

from captum import attr


@pytest.fixture(scope="module")
def page():
    with rnnfast.use_backend("torch"):
        return run_page("captum")


@pytest.fixture(params=["triton", "torch"])
def pair(request, page, saved):
    """The page's model with rnnfast's layer on a backend, and with torch.nn's."""
    ours, theirs = page["Classifier"]().eval(), page["Classifier"](torch.nn.LSTM).eval()
    theirs.load_state_dict(ours.state_dict())
    with rnnfast.use_backend(request.param):
        yield ours, theirs
    assert bool(saved) == (request.param == "triton")


def from_embedded(model):
    return lambda x: model.out(model.lstm(x)[0][:, -1])


METHODS = {
    "IntegratedGradients": lambda model, x: attr.IntegratedGradients(from_embedded(model)).attribute(x, target=1, n_steps=8),
    "Saliency": lambda model, x: attr.Saliency(from_embedded(model)).attribute(x, target=1),
    "Occlusion": lambda model, x: attr.Occlusion(from_embedded(model)).attribute(x, (1, 4), target=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_of_an_input(method, pair):
    x = torch.randn(2, 3, 4)
    found, expected = (METHODS[method](model, x.clone()) for model in pair)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [attr.LayerIntegratedGradients, attr.LayerDeepLift])
def test_of_a_layer(method, pair):
    """DeepLift has no rule for the gates of a recurrent layer, neither for ours nor for torch.nn's."""
    tokens, padding = torch.tensor([[3, 7, 1], [5, 2, 9]]), torch.zeros(2, 3, dtype=torch.long)
    options = {"n_steps": 8} if method is attr.LayerIntegratedGradients else {}
    found = [
        method(model, model.embed).attribute(tokens, padding, target=1, return_convergence_delta=True, **options)
        for model in pair
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    if options:
        assert found[0][1].abs().max() < 1e-3


def test_the_layer_itself(page):
    """Refused, as torch.nn's is: captum wants a module that returns tensors."""
    for layer in (rnnfast.LSTM, torch.nn.LSTM):
        model = page["Classifier"](layer).eval()
        with pytest.raises(AttributeError, match="'tuple' object has no attribute"), rnnfast.use_backend("torch"):
            attr.LayerIntegratedGradients(model, model.lstm).attribute(page["tokens"], page["padding"], target=1)


def test_the_page(page):
    assert page["per_token"].shape == (3, 6) and page["error"].abs().max() < 1e-3
