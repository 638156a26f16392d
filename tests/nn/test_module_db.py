"""PyTorch's own module checks (test_modules.py in its sources) for LSTM, GRU, RNN and their cells, with our classes in their
place. Sample inputs, reference functions and expected errors are those of `common_modules.module_db`, in the wheel."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import rnnfast

pytestmark = [pytest.mark.numerical, pytest.mark.same_everywhere]

INFOS = {info.name.rpartition(".")[2]: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"}
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
# interpreting takes time: one sample in five
every = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.sweep)])


def samples(name, device, dtype=torch.float32, training=True, backend=None):
    """(ours, torch.nn's with the same weights, args, the sample), for each of PyTorch's sample inputs."""
    info, found = INFOS[name], []
    for sample in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training):
        made, options = sample.constructor_input, {"device": device, "dtype": dtype}
        theirs = info.module_cls(*made.args, **made.kwargs, **options).train(training)
        ours = getattr(rnnfast, name)(*made.args, **made.kwargs, **options, backend=backend).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert not sample.forward_input.kwargs
        found.append((ours, theirs, sample.forward_input.args, sample))
    assert len(found) >= 8 or name.endswith("Cell")
    return found


def results(module, args):
    """Outputs and the gradients of inputs and parameters."""
    args = tree_map(lambda tensor: tensor.detach().requires_grad_(), args)
    outputs = tree_leaves(module(*args))
    inputs = [*tree_leaves(args), *module.parameters()]
    return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)]


def test_all_are_there():
    assert set(INFOS) == set(NAMES) and all(info.module_cls is getattr(torch.nn, name) for name, info in INFOS.items())


@every
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, every, device):
    """test_forward: on the kernels each sample gives what its reference function gives, and torch.nn's class."""
    for ours, theirs, args, sample in samples(name, device, training=every > 1)[::every]:
        with torch.no_grad():
            found = ours(*args)
            torch.testing.assert_close(found, theirs(*args))
            if sample.reference_fn is not None:
                torch.testing.assert_close(found, sample.reference_fn(ours, *args))


@pytest.mark.parametrize("name", NAMES)
def test_errors(name, device, no_launch):
    """test_errors: each sample that must be refused is, with PyTorch's type and text."""
    info = INFOS[name]
    found = info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    assert found
    for sample in found:
        made, given = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module = getattr(rnnfast, name)(*made.args, **made.kwargs)
            assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
            module(*given.args, **given.kwargs)


@every
@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous(name, every, device):
    """test_non_contiguous_tensors: outputs and gradients on the kernels do not depend on the strides of the inputs."""
    for ours, _, args, _ in samples(name, device)[::every]:
        torch.testing.assert_close(results(ours, tree_map(noncontiguous_like, args)), results(ours, args))


@pytest.mark.parametrize("name", NAMES)
def test_grad(name, device):
    """test_grad and test_gradgrad: in float64, first and second derivatives are those of finite differences."""
    for number, (ours, _, args, _) in enumerate(samples(name, device, torch.float64)[::3]):
        leaves, tree = tree_flatten(args)
        weights = dict(ours.named_parameters())

        def run(*values, ours=ours, names=tuple(weights), tree=tree):
            inputs, values = tree_unflatten(values[len(names) :], tree), values[: len(names)]
            return tuple(tree_leaves(torch.func.functional_call(ours, dict(zip(names, values, strict=True)), inputs)))

        given = (*weights.values(), *(leaf.requires_grad_() for leaf in leaves))
        assert gradcheck(run, given, fast_mode=True)
        if number < 2:
            assert gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_repr_pickle_and_copies(name, device):
    """test_repr, test_pickle and test_save_load: torch.nn's repr; copies that compute the same; strict loading both ways."""
    for ours, theirs, args, _ in samples(name, device)[::7]:
        assert repr(ours) == repr(theirs)
        with torch.no_grad(), rnnfast.use_backend("torch"):
            expected = ours(*args)
            for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
                assert type(copied) is type(ours)
                torch.testing.assert_close(copied(*args), expected, rtol=0, atol=0)
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_to(name, swap, device):
    """test_to, test_to_empty and test_factory_kwargs: to a dtype and back, from meta, with and without swapping tensors."""
    found, before = samples(name, device)[::7], torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for ours, theirs, args, _ in found:
            with torch.no_grad(), rnnfast.use_backend("torch"):
                expected = ours(*args)
                ids = [id(parameter) for parameter in ours.parameters()]
                assert all(p.dtype == torch.float64 for p in ours.double().parameters())
                torch.testing.assert_close(tree_leaves(ours.float()(*args)), tree_leaves(expected), rtol=0, atol=0)
                assert [id(parameter) for parameter in ours.parameters()] == ids
                state = copy.deepcopy(ours.state_dict())
                assert all(p.is_meta for p in ours.to("meta").parameters())
                empty = ours.to_empty(device=device)
                for name, weight in empty.named_parameters():  # loading by swapping is what torch.nn's own cannot do
                    weight.copy_(state[name])
                torch.testing.assert_close(empty(*args), expected, rtol=0, atol=0)
                assert [p.shape for p in empty.parameters()] == [p.shape for p in theirs.parameters()]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
