"""Every private name of PyTorch that rnnfast uses, and one of Python. Comments say why each is used and what it saves.

PyTorch 2.9 to 2.14 have them all. tests/choice/test_torch_private.py and test_matmul_precision.py check that each still means
what this file says, on the PyTorch that is installed. One such name is used elsewhere too, because users set it: the switch
``torch._dynamo.config.allow_rnn``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, _guards
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "CALLED",
    "EXPANDED",
    "TorchDispatchMode",
    "add_batch_dim",
    "batch_dim_level",
    "constant",
    "cudnn_benchmark",
    "current_weights",
    "dispatch_modes",
    "dynamo_refuses_layers",
    "environment",
    "forward_level",
    "function_modes",
    "has_operator",
    "in_backward",
    "innermost_transform",
    "inside",
    "is_expanded",
    "is_fake",
    "is_forward_mode",
    "is_legacy_batched",
    "is_wrapped",
    "matmul_precision",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "pack",
    "pad",
    "profiles",
    "registers",
    "remove_batch_dim",
    "replaced",
    "replaced_in_class",
    "rnn_precision",
    "run_operator",
    "saved_tensor",
    "skipped_by_dynamo",
    "thread",
    "tracing",
    "tree_leaves",
    "tree_map_only",
    "uncompiled",
    "unpacks_one_by_one",
]

_F = TypeVar("_F", bound=Callable)
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]

EXPANDED = "torch.nn.utils._expanded_weights.expanded_weights_impl"
FAKE = "torch._subclasses.fake_tensor"

# os.environ encodes each name that is looked up and raises where there is none: 0.55 us. The dict behind it takes 0.02 us.
environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]

# Keeps what is being traced. TracingContext.try_get raises and catches an exception where nothing is traced: 0.5 us. The
# thread-local behind it takes 0.05 us.
thread = _guards._TLS

# The level of forward-mode differentiation, -1 where it is off. There is no public way to ask.
forward_level = partial(getattr, forward_ad, "_current_level")

# How many modes of dispatch, and of torch functions, see each operator; and whether a profiler does. There is no public way to
# ask for modes.
dispatch_modes = torch._C._len_torch_dispatch_stack  # type: ignore[attr-defined]
function_modes = torch._C._len_torch_function_stack  # type: ignore[attr-defined]
profiles = torch.autograd._profiler_enabled  # type: ignore[attr-defined]

# The transform of torch.func that is innermost, or None. There is no public way to ask.
innermost_transform = _functorch.peek_interpreter_stack


# torch.backends.cudnn.benchmark, whose property takes 1 us. This takes 0.05 us.
cudnn_benchmark: Callable[[], bool] = torch._C._get_cudnn_benchmark  # type: ignore[attr-defined]


# The precision of PyTorch's products of float32 on a GPU. The public getters take 2 us and more, these 0.2 us.

_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter  # type: ignore[attr-defined]
_set: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter  # type: ignore[attr-defined]
_get_legacy: Callable[[], str] = torch._C._get_float32_matmul_precision  # type: ignore[attr-defined]
_set_legacy: Callable[[str], None] = torch._C._set_float32_matmul_precision  # type: ignore[attr-defined]
_set_allowed: Callable[[bool], None] = torch._C._set_cublas_allow_tf32  # type: ignore[attr-defined]

# torch.backends.cudnn.rnn.fp32_precision
rnn_precision: Callable[[], str] = partial(_get, "cuda", "rnn")

_turn = threading.RLock()
_ANYWAY = nullcontext()


def matmul_precision(precision: str, factor: Tensor) -> AbstractContextManager:
    """A context in which mm, bmm, addmm and ``@`` of float32 on a GPU compute in `precision`, "tf32" or "ieee".

    torch.nn computes all products of a layer by ``torch.backends.cudnn.rnn.fp32_precision``, and matmuls by
    ``torch.backends.cuda.matmul.fp32_precision``. No argument of a matmul says its precision. So this sets the second, and puts
    back all that it changed when the block ends, after an error too. cuBLAS gets the precision when a matmul is called, not
    when it runs. Nothing is set where `factor` is not float32 on a GPU, or where the setting is right.

    PyTorch 2.9 to 2.14 keep two records of the setting. ``fp32_precision`` writes the new record alone. The legacy functions
    ``allow_tf32`` and ``set_float32_matmul_precision`` write both. cuBLAS reads the new one. The legacy getters, TunableOp and
    Inductor raise an error, "mix of the legacy and new APIs", where the two disagree. What this does with a wrong setting:

        they agree       both are set, so that they agree inside too. To "ieee" from what ``set_float32_matmul_precision`` set,
                         that of matmuls on a CPU is set too, as PyTorch's function does
        they disagree    the new one alone is set. Then they agree inside
        "none"           inherits from ``torch.backends.cudnn.fp32_precision``, that from ``torch.backends.fp32_precision``.
                         "none" is put back, not what it inherited. Where the getter cannot tell the two apart, what is
                         inherited is changed for 1 us, to see

    Threads: the setting is that of the process, and PyTorch has none for a thread. Calls of this take turns, so none ends the
    block of another or keeps what another set. A matmul that another thread calls meanwhile has this precision, and what
    another thread sets meanwhile is lost. So a block should hold one product, 10 us of the host's time, and no launch of a
    kernel. PyTorch 2.9.0 warns, once, that the legacy functions will go; 2.9.1 took that back.

    >>> x = torch.ones(2, 3)
    >>> with matmul_precision("tf32", x):
    ...     y = x @ x.t()
    """
    return _MatmulPrecision(precision == "tf32") if factor.is_cuda and factor.dtype == torch.float32 else _ANYWAY


class _MatmulPrecision(AbstractContextManager):
    """`matmul_precision` of float32 on a GPU. A class, because entering a generator takes twice as long."""

    def __init__(self, tf32: bool) -> None:
        self.tf32, self.undo = tf32, _nothing

    def __enter__(self) -> None:
        _turn.acquire()
        if (_get("cuda", "matmul") == "tf32") != self.tf32:
            self.undo = _allow_tf32() if self.tf32 else _forbid_tf32()

    def __exit__(self, *_: object) -> None:
        try:
            self.undo()
        finally:
            _turn.release()


def _nothing() -> None:
    pass


def _allow_tf32() -> Callable[[], None]:
    """Set matmuls of float32 on a GPU to TF32. Returns what sets them back."""
    own = _own_precision("cuda", "matmul")
    if _legacy_record() != "highest":
        _set("cuda", "matmul", "tf32")
        return partial(_set, "cuda", "matmul", own)
    _set_allowed(True)

    def undo() -> None:
        _set_allowed(False)
        _set("cuda", "matmul", own)

    return undo


def _forbid_tf32() -> Callable[[], None]:
    """Set matmuls of float32 on a GPU to IEEE's float32. Returns what sets them back."""
    own = _own_precision("cuda", "matmul")
    _set("cuda", "matmul", "ieee")
    legacy = _legacy_record()
    if legacy == "highest":
        return partial(_set, "cuda", "matmul", own)
    own_of_cpu = _own_precision("mkldnn", "matmul")
    _set_legacy("highest")

    def undo() -> None:
        _set_legacy(legacy)
        _set("cuda", "matmul", own)
        _set("mkldnn", "matmul", own_of_cpu)

    return undo


def _legacy_record() -> str:
    """What the legacy functions set: "highest", "high" or "medium". Only where the new record is not "tf32"."""
    try:
        return _get_legacy()
    except (RuntimeError, UserWarning):  # the setting for CPUs disagrees; or 2.9.0's warning, where warnings are errors
        own = _own_precision("mkldnn", "matmul")
        _set("mkldnn", "matmul", "ieee")
        try:
            return _get_legacy()
        finally:
            _set("mkldnn", "matmul", own)


def _own_precision(backend: str, op: str) -> str:
    """What was set for this place itself: "none" if nothing was, where the getter says what it inherits."""
    found = _get(backend, op)
    above = ("generic" if op == "all" else backend, "all")
    if found == "none" or backend == "generic" or _get(*above) != found:
        return found
    before = _own_precision(*above)
    _set(*above, "tf32" if found == "ieee" else "ieee")
    try:
        return found if _get(backend, op) == found else "none"
    finally:
        _set(*above, before)


def in_backward() -> bool:
    """Whether autograd is running backward in this thread. There is no public way to ask.

    A backward that another thread started, and that this thread waited for, would wait for this thread.
    """
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def constant(function: _F) -> _F:
    """``torch.compiler.assume_constant_result``, which would import Dynamo, and with it Triton, along with rnnfast."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def skipped_by_dynamo(function: _F) -> _F:
    """Have Dynamo leave calls of `function` that are not part of a trace alone, and all that they call.

    Dynamo refuses an RNN layer unless it was told otherwise, and calls it as it is; but then it would compile what the layer
    calls, piece by piece, which fails where a piece depends on data. torch.nn's own files are on a list that Dynamo skips. The
    public ``torch.compiler.disable`` would also end a trace that takes the layer whole.
    """
    frames: Any = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
    action = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action, action))
    return function


@constant
def tracing() -> bool:
    """Whether Dynamo, AOTAutograd or torch.export is tracing. ``torch.compiler.is_compiling`` is false in AOTAutograd."""
    return thread.__dict__.get("tracing_context") is not None


def dynamo_refuses_layers() -> bool:
    """Whether Dynamo is tracing and refuses RNN layers, for ``torch._dynamo.config.allow_rnn`` is off."""
    return tracing() and not torch._dynamo.config.allow_rnn


def uncompiled() -> AbstractContextManager:
    """A context in which compiled code runs as it was written. Does not import Dynamo: before that nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. An operator without a rule for it would have a derivative of zero."""
    return forward_level() >= 0


@constant
def inside() -> tuple[str, ...]:
    """The transforms that the call is inside of, the outermost first.

    "forward" if forward-mode differentiation is on, torch.func's or torch.autograd's; then those of torch.func: "vmap", "grad",
    "jvp", "functionalize". Autograd has no public way to ask which transforms will reach an operator.
    """
    stack = _functorch.get_interpreter_stack() or ()
    forward = ("forward",) if forward_level() >= 0 else ()
    return (*forward, *(interpreter.key().name.lower() for interpreter in stack))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func wraps `tensor`, so that its numbers cannot be read."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


@constant
def _has_expanded() -> bool:
    return EXPANDED in sys.modules


def is_expanded(module: torch.nn.Module) -> bool:
    """Whether the module's own weights are those of call_for_per_sample_grads, which know PyTorch's operators only."""
    return _has_expanded() and any(type(tensor).__name__ == "ExpandedWeight" for tensor in module._parameters.values())


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has a shape and no numbers: a FakeTensor, or one on the meta device."""
    return tensor.is_meta or (FAKE in sys.modules and isinstance(tensor, sys.modules[FAKE].FakeTensor))


# The old vmap of torch.autograd.grad(is_grads_batched=True), which takes no rules: see `rnnfast.ops.vmap`


def is_legacy_batched(tensor: Tensor) -> bool:
    return _functorch.is_legacy_batchedtensor(tensor)


def batch_dim_level() -> int:
    """The level of the innermost old vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def remove_batch_dim(tensor: Tensor, level: int) -> Tensor:
    """`tensor` with what the old vmap of `level` maps over as its first dimension."""
    return torch._remove_batch_dim(tensor, level, 0, 0)  # of size 0 if it had none, but it has


def add_batch_dim(tensor: Tensor, level: int) -> Tensor:
    return torch._add_batch_dim(tensor, 0, level)


# Whether `saved_tensor` can work. Seen in torch 2.13 and 2.14, and not in 2.9 and 2.11.
unpacks_one_by_one = hasattr(torch._C._autograd.SavedTensor, "unpack")  # type: ignore[attr-defined]


def saved_tensor(ctx: Any, index: int) -> Tensor | None:
    """``ctx.saved_tensors[index]`` without the others: PyTorch then checks whether this one alone was edited in place.

    Raises:
        RuntimeError: it was edited in place after it was saved.
    """
    return ctx._raw_saved_tensors[index].unpack()


# The operators behind torch.nn's layers. Public are only the modules, which own their weights.


def has_operator(name: str) -> bool:
    return hasattr(torch._VF, name)


def run_operator(name: str, *args: Any) -> Any:
    """torch._VF.lstm, gru, rnn_tanh or rnn_relu."""
    return getattr(torch._VF, name)(*args)


def pad(data: Tensor, sizes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rows of a PackedSequence in its own order, (T, B, I), and their lengths. The public function also sorts the rows."""
    return torch._VF._pad_packed_sequence(data, sizes, False, 0.0, steps)  # type: ignore[attr-defined]


def pack(tensor: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `pad`."""
    return torch._VF._pack_padded_sequence(tensor, lengths, False)[0]  # type: ignore[attr-defined]


# torch.nn.Module and torch.nn.RNNBase. What a module itself holds, without its children. ``parameters(recurse=False)`` takes
# longer and gives a tied parameter once.


def own_parameters(module: torch.nn.Module) -> dict[str, Any]:
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, Any]:
    return module._buffers


def own_modules(module: torch.nn.Module) -> dict[str, Any]:
    return module._modules


def registers(module: torch.nn.Module) -> list[dict[str, Any]]:
    """What torch.nn's ``__getattr__`` looks into; less of them while a module is being made."""
    return [vars(module)[name] for name in ("_modules", "_parameters", "_buffers") if name in vars(module)]


def current_weights(layer: torch.nn.RNNBase, expanded: bool) -> list[Any]:
    """The weights that torch.nn's ``forward`` would use: ``layer._flat_weights``, brought up to date as it does.

    These are the attributes of the layer's weight names if any of those was replaced since the last call, and else the list as
    it stands, which other networks may have set. Where torch.func or a compiler traces, the layer is left unchanged.
    `expanded`: whether its weights are those of call_for_per_sample_grads.
    """
    if not (torch.compiler.is_compiling() or innermost_transform() is not None or expanded):
        layer._update_flat_weights()
        return layer._flat_weights
    named = [getattr(layer, name, None) for name in layer._flat_weights_names]
    flat = layer._flat_weights
    if len(flat) == len(named) and all(a is b for a, b in zip(flat, named, strict=True)):
        return named
    replaced = (
        weight is not None and ref is not None and ref() is not weight
        for weight, ref in zip(named, layer._flat_weight_refs, strict=True)
    )
    return named if any(replaced) else flat


# What torch.nn's forward of a layer calls, by name, as it was when rnnfast was imported
CALLED = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
)

_THEIRS = (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN, torch.nn.LSTMCell, torch.nn.GRUCell, torch.nn.RNNCell)
_FORWARDS = {cls: cls.forward for cls in _THEIRS}
_CALLED = {cls: {name: getattr(cls, name, None) for name in CALLED} for cls in _THEIRS}


@constant
def replaced_in_class(cls: type, mixin: type) -> str:
    (base,) = [each for each in cls.__mro__ if each in _FORWARDS][:1]
    for name, original in _CALLED[base].items():
        if getattr(cls, name, None) is not original:
            return f"{cls.__name__}.{name} is not torch.nn's, whose forward calls it"
    after = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    found = next(each for each in after if "forward" in vars(each))
    if vars(found)["forward"] is not _FORWARDS[base]:
        return f"{found.__module__}.{found.__qualname__}.forward was replaced"
    return ""


def replaced(layer: torch.nn.Module, mixin: type) -> str:
    """What was overridden or replaced of what torch.nn's ``forward`` is and calls, in words; empty if nothing was.

    Only torch.nn's own ``forward`` can do justice to it. `mixin`: the class whose ``forward`` stands before torch.nn's.
    """
    for name in CALLED:
        if name in layer.__dict__:
            return f"{name}, which torch.nn's forward calls, was replaced on the instance"
    return replaced_in_class(type(layer), mixin)
