"""Which backend runs, by whom it was chosen, and that nobody is ever left guessing."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import functional, ops, reference, torch_private
from rnnfast.choice import decide, launchable, obstacles
from rnnfast.kernels import runtime, step
from rnnfast.nn import sequence, stack

T, B, I, H = 3, 2, 3, 4
FLOAT64 = "the dtype is torch.float64: the kernels take float16, bfloat16 and float32"

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # PyTorch's own


@contextlib.contextmanager
def spies(run=True):
    """Record which executors forward calls, in a list. The kernels are stood in for by the reference, for speed; with
    `run` false, any executor that is called fails the test."""
    ran = []

    def spy(name, inner):
        def call(*args, **kwargs):
            assert run, f"{name} ran"
            ran.append(name)
            return inner(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        named = {"kernels": "triton", "equations": "reference"}
        patch.setattr(stack, "GROUPS", {runner: spy(name, reference.group) for runner, name in named.items()})
        patch.setattr(ops, "group", spy("triton", reference.group))
        for cls in (torch.nn.LSTM, torch.nn.GRU):
            patch.setattr(cls, "forward", spy("torch", cls.forward))
            patch.setitem(torch_private._FORWARDS, cls, cls.forward)  # else it would count as replaced, and run for that
        yield ran


@pytest.fixture
def ran():
    with spies() as found:
        yield found


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is known yet of Triton and the devices."""
    monkeypatch.setattr(obstacles, "known", {})


def weights(cell, device, **options):
    G = reference.GATES[cell]
    return [torch.randn(*shape, device=device, **options) for shape in ((G * H, I), (G * H, H))]


# Who chooses


@pytest.mark.parametrize("surrounding", [None, "auto", "torch", "reference", "triton"])
@pytest.mark.parametrize("own", [None, "torch", "reference", "triton"])
@pytest.mark.parametrize("environment", [None, "", "auto", "torch", "reference", "triton"])
def test_precedence(surrounding, own, environment, device, monkeypatch, ran):
    """use_backend, then backend=, then RNNFAST_BACKEND, then the choice per call; explain says who it was."""
    if environment is not None:
        monkeypatch.setenv("RNNFAST_BACKEND", environment)
    module, x = rnnfast.GRU(I, H, device=device, backend=own), torch.zeros(1, 1, I, device=device)
    named = {"rnnfast.use_backend": surrounding, "backend=": own, "RNNFAST_BACKEND": environment or None}
    source, name = next(((by, name) for by, name in named.items() if name), ("", "auto"))
    expected = "triton" if name == "auto" else name
    with rnnfast.use_backend(surrounding) if surrounding else contextlib.nullcontext():
        module(x)
        explained = rnnfast.explain(module, x)
    assert ran == [expected] and explained.backend == expected
    assert explained.asked == ("chosen for this call" if name == "auto" else f"asked for by {source}")


@pytest.mark.parametrize("setting", [None, "use_backend", "backend=", "RNNFAST_BACKEND", "RNNFAST_STRICT"])
def test_short_cut_on_the_cpu(setting, monkeypatch, ran):
    """A CPU tensor goes to PyTorch's own layer with no more ado where it is known that nothing else can run it, unless
    anything is set, at whatever time it is."""
    monkeypatch.setattr(obstacles, "known", {"triton": None, "cpu:None": "no interpreter"})
    assert (
        torch_private.EXPANDED in sys.modules
    )  # Dynamo imports it, and optimizers Dynamo: that alone may not end the short cut
    module, x = rnnfast.GRU(I, H), torch.zeros(1, 1, I)
    looked, inner = [], sequence.decide
    monkeypatch.setattr(sequence, "decide", lambda *facts, **more: (looked.append(facts), inner(*facts, **more))[1])
    for _ in range(2):
        module(x)
    assert ran == ["torch", "torch"] and not looked
    surrounding = contextlib.nullcontext()
    if setting == "RNNFAST_STRICT":
        surrounding = pytest.raises(RuntimeError, match="RNNFAST_STRICT is set")
    elif setting == "use_backend":
        surrounding = rnnfast.use_backend("reference")
    elif setting == "backend=":
        module.backend = "reference"
    if setting and setting.isupper():
        monkeypatch.setenv(setting, {"RNNFAST_BACKEND": "reference", "RNNFAST_STRICT": "1"}[setting])
    with surrounding:
        module(x)
    assert bool(looked) == (setting is not None)
    assert ran[2:] == {None: ["torch"], "RNNFAST_STRICT": []}.get(setting, ["reference"])
    if setting and setting.isupper():
        monkeypatch.delenv(setting)
    for module.backend in (None, "torch"):
        module(x)
        assert ran[-1] == "torch" and len(looked) == (setting is not None)


def test_auto_is_a_choice_too(device, monkeypatch, ran):
    """backend="auto", on module or function, is a choice by hand: it wins over RNNFAST_BACKEND as any other name does."""
    monkeypatch.setenv("RNNFAST_BACKEND", "reference")
    x = torch.zeros(1, 1, I, device=device)
    rnnfast.GRU(I, H, device=device, backend="auto")(x)
    assert ran == ["triton"]


@pytest.mark.parametrize("name", ["cudnn", "Triton", "", 3])
def test_unknown_names(name, device, monkeypatch):
    """A name that is none, given in any way, is refused at once with the choices and the way it was given."""
    choices = r"should be one of 'triton', 'torch', 'reference' or 'auto', got "
    x = torch.zeros(1, 1, I, device=device)
    for make in (
        lambda: rnnfast.LSTM(I, H, backend=name),
        lambda: rnnfast.use_backend(name).__enter__(),
        lambda: functional.gru(x, None, *weights("gru", device), backend=name),
    ):
        with pytest.raises(ValueError, match=f"backend {choices}{name!r}"):
            make()
    assert decide.asked(None) == (None, "nobody")
    if isinstance(name, str) and name:
        monkeypatch.setenv("RNNFAST_BACKEND", name)
        module = rnnfast.LSTM(I, H, device=device)
        for call in (lambda: module(x), lambda: rnnfast.explain(module, x)):
            with pytest.raises(ValueError, match=f"RNNFAST_BACKEND {choices}{name!r}"):
                call()


def test_use_backend_nests_and_ends():
    """Blocks nest, end with their block, after an exception too, and serve as a decorator."""
    with rnnfast.use_backend("torch"):
        with rnnfast.use_backend("reference"):
            assert decide.asked("triton") == ("reference", "rnnfast.use_backend")
        assert decide.asked("triton") == ("torch", "rnnfast.use_backend")
        with pytest.raises(KeyError), rnnfast.use_backend(None):
            assert decide.asked("triton")[0] is None
            raise KeyError
        assert decide.asked("triton")[0] == "torch"
    assert decide.asked("triton") == ("triton", "backend=")
    assert rnnfast.use_backend("torch")(decide.asked)(None)[0] == "torch"


def test_use_backend_is_per_thread(device, ran):
    """A block in one thread does not choose for another that runs at the same time."""
    module, x = rnnfast.GRU(I, H, device=device), torch.zeros(1, 1, I, device=device)
    barrier, found = threading.Barrier(3, timeout=20), {}

    def work(name):
        with rnnfast.use_backend(name) if name else contextlib.nullcontext():
            barrier.wait()
            found[name] = rnnfast.explain(module, x).backend
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "reference")]
    with rnnfast.use_backend("triton"):
        plain = threading.Thread(target=work, args=(None,))
        for thread in (*threads, plain):
            thread.start()
        for thread in (*threads, plain):
            thread.join()
        module(x)
    assert found == {"torch": "torch", "reference": "reference", None: "triton"} and ran == ["triton"]
    with rnnfast.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.update(new=decide.asked(None)))
        thread.start()
        thread.join()
    assert found["new"] == (None, "nobody")


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torch_by_environment(name, device, monkeypatch):
    """RNNFAST_BACKEND=torch gives bitwise what torch.nn gives, and launches nothing."""
    monkeypatch.setenv("RNNFAST_BACKEND", "torch")
    monkeypatch.setattr(step, "forward", lambda *args, **kwargs: pytest.fail("a kernel was launched"))
    ours, theirs = (getattr(namespace, name)(I, H, device=device) for namespace in (rnnfast, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, device=device)
    assert torch.equal(ours(x)[0], theirs(x)[0])


# What gives way, and how that is said


def test_strict(device, monkeypatch, ran):
    """RNNFAST_STRICT=1: a call the kernels do not take raises with the reason, unless torch was asked for by name."""
    x = torch.zeros(T, B, I, device=device)
    double = rnnfast.LSTM(I, H, device=device, dtype=torch.float64)
    packed = pack_padded_sequence(x.double(), [3, 2])
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    for module, argument, reason in (
        (double, x.double(), FLOAT64),
        (double, packed, FLOAT64),
    ):
        for backend in (None, "triton"):
            module.backend = backend
            with pytest.raises(RuntimeError, match=f"RNNFAST_STRICT is set and the 'triton' backend cannot run.*{reason}"):
                module(argument)
        module.backend = "torch"
        module(argument)
        with pytest.raises(RuntimeError, match=reason), rnnfast.use_backend("triton"):
            module(argument)
    assert set(ran) == {"torch"}
    ran.clear()
    with pytest.raises(RuntimeError, match=FLOAT64):
        functional.gru(x.double(), None, *weights("gru", device, dtype=torch.float64))
    double.backend = "reference"
    double(x.double())
    assert ran == ["reference"]
    plain = rnnfast.LSTM(I, H, device=device)
    plain(x)
    monkeypatch.setenv("RNNFAST_STRICT", "0")
    double.backend = None
    double(x.double())
    assert ran[1:] == ["triton", "torch"]


def test_fallback_warning_points_at_the_user(device):
    """A backend asked for by name that cannot run gives way with one warning a call, at the line of the user's call."""
    x = torch.zeros(T, B, I, device=device, dtype=torch.float64)
    module = rnnfast.GRU(I, H, device=device, dtype=torch.float64, backend="triton")
    nested = torch.nn.Sequential(torch.nn.Identity(), module)
    args = weights("gru", device, dtype=torch.float64)
    for call in (
        lambda: module(x),
        lambda: nested(x),
        lambda: functional.gru(x, None, *args, backend="triton"),
        lambda: module(pack_padded_sequence(x, [3, 3])),
    ):
        with pytest.warns(rnnfast.FallbackWarning) as caught:
            call()
        assert len(caught) == 1
        assert str(caught[0].message).startswith("'triton' was asked for by backend=, but PyTorch's own layer runs: the dtype")
        assert (caught[0].filename, caught[0].lineno) == (__file__, call.__code__.co_firstlineno)
    assert issubclass(rnnfast.FallbackWarning, UserWarning)
    module.backend = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)  # nobody asked for another
        with rnnfast.use_backend("torch"):
            module(x)


def test_reference_does_not_give_way(device):
    """Asked for by name, the reference takes float64, on any device."""
    x = torch.randn(T, B, I, device=device, dtype=torch.float64)
    ours = rnnfast.LSTM(I, H, device=device, dtype=torch.float64, backend="reference")
    with spies() as ran:
        ours(x)
    assert ran == ["reference"]


# Why not Triton


def test_no_triton(unknown, monkeypatch, tmp_path):
    """Triton absent, broken, too old or too new: each is said, and the supported versions are taken."""
    triton = sys.modules["triton"]
    for version in ("3.5.1", "3.10.0", "4.0.0", "2.3.0+git1234"):
        monkeypatch.setattr(triton, "__version__", version)
        assert obstacles._find_triton_obstacle() == f"Triton {version} is not supported: rnnfast knows 3.6 to 3.9"
    for version in ("3.6.0", "3.7.1", "3.9.0+gitabcd", "3.9.0rc1"):
        monkeypatch.setattr(triton, "__version__", version)
        assert obstacles._find_triton_obstacle() is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert obstacles._find_triton_obstacle() == "Triton is not installed (pip install triton)"
    monkeypatch.delitem(sys.modules, "triton")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert obstacles._find_triton_obstacle() == "Triton does not import: libcuda.so.1 is missing"


def test_without_triton_torch_runs(unknown, device, monkeypatch, ran):
    """Without Triton a layer runs on PyTorch's own, says why, and does not ask Triton's other reasons."""
    monkeypatch.setattr(obstacles, "_find_triton_obstacle", lambda: "Triton is not installed (pip install triton)")
    module, x = rnnfast.GRU(I, H, device=device), torch.zeros(T, B, I, device=device)
    module(x)
    explained = rnnfast.explain(module, x)
    assert ran == ["torch"] and explained.backend == "torch"
    assert explained.obstacles[0] == "Triton is not installed (pip install triton)"
    assert not any("INTERPRET" in obstacle for obstacle in explained.obstacles)


def test_devices(monkeypatch):
    """Each device that cannot run the kernels is refused for its own reason; Ampere and newer are taken."""
    monkeypatch.setattr(runtime, "mode", lambda: "compiled")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launchable, "obstacle", lambda index: None)
    for capability, taken in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        reason = f"the GPU is sm_{capability[0]}{capability[1]}: the kernels need sm_80 (Ampere) or newer"
        assert obstacles._find_device_obstacle("cuda", 0) == (None if taken else reason)
    assert "TRITON_INTERPRET=1" in obstacles._find_device_obstacle("cpu", None)
    for kind in ("meta", "xpu", "mps"):
        assert obstacles._find_device_obstacle(kind, None).startswith(f"the tensors are on a {kind!r} device")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(obstacles.gpu, "limits", lambda device: None)
    assert obstacles._find_device_obstacle("cuda", 0).startswith("the kernels were compiled for the AMD GPUs gfx942")
    monkeypatch.setattr(runtime, "mode", lambda: "mixed")
    for kind in ("cpu", "cuda"):
        assert "TRITON_INTERPRET was changed after Triton had been imported" in obstacles._find_device_obstacle(kind, 0)
    monkeypatch.setattr(runtime, "mode", lambda: "interpreted")
    assert obstacles._find_device_obstacle("cpu", None) is None


def test_devices_are_told_apart(unknown, monkeypatch):
    """What was found of one GPU does not stand for another."""
    monkeypatch.setattr(obstacles, "_find_device_obstacle", lambda kind, index: f"{kind} {index}")
    assert [obstacles.device_obstacle("cuda", index) for index in (0, 1, 0)] == ["cuda 0", "cuda 1", "cuda 0"]


def python(code, **environment):
    """Run code in a Python of its own, with no setting but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "RNNFAST"))}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fresh_process_on_the_cpu():
    """In a fresh Python: importing rnnfast brings neither Triton nor Dynamo; with no Triton to import, and then with Triton
    but no interpreter, CPU tensors run on PyTorch's own layer, and explain says why."""
    out = python("""
        import sys
        sys.modules["triton"] = None
        import torch, rnnfast
        assert not [name for name in sys.modules if name.startswith(("triton.", "torch._dynamo", "torch._inductor"))]
        layer, x = rnnfast.LSTM(3, 4), torch.randn(5, 2, 3)
        expected = torch.nn.LSTM.forward(layer, x)[0]
        assert torch.equal(layer(x)[0], expected)
        print(rnnfast.explain(layer, x))
        print("----")
        del sys.modules["triton"]
        from rnnfast.choice import obstacles
        obstacles.known.clear()
        assert torch.equal(layer(x)[0], expected)
        print(rnnfast.explain(layer, x))
        import os, warnings
        os.environ["RNNFAST_STRICT"] = "1"
        try:
            layer(x)
        except RuntimeError as error:
            print("strict:", error)
        os.environ["RNNFAST_STRICT"] = ""
        with rnnfast.use_backend("triton"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(layer(x)[0], expected)
        print("warned:", caught[0].message)
        import torch._dynamo
        assert not torch._dynamo.config.allow_rnn
        """)
    without, interpreter = out.split("----")
    wanted = "the tensors are on the CPU, where the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
    assert "backend: torch (chosen for this call)" in without and "how: PyTorch's own layer, on ATen" in without
    assert "not triton: Triton is not installed (pip install triton)" in without
    assert f"not triton: {wanted}" in interpreter
    assert f"strict: RNNFAST_STRICT is set and the 'triton' backend cannot run this call: {wanted}" in interpreter
    assert f"warned: 'triton' was asked for by rnnfast.use_backend, but PyTorch's own layer runs: {wanted}" in interpreter


def test_interpreter_asked_for_too_late():
    """TRITON_INTERPRET set once Triton is imported would give kernels that run neither way: refused, with what to do."""
    out = python("""
        import os, torch, triton
        import rnnfast
        os.environ["TRITON_INTERPRET"] = "1"
        layer, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
        assert torch.equal(layer(x)[0], torch.nn.GRU.forward(layer, x)[0])
        print(rnnfast.explain(layer, x))
        """)
    assert "TRITON_INTERPRET was changed after Triton had been imported: set it before Python starts" in out


# explain


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_explain_triton(name, device):
    """explain names the layer, the input, the backend, how it was chosen, and the launches to come."""
    module = getattr(rnnfast, name)(I, H, num_layers=2, bidirectional=True, batch_first=True, device=device)
    text = str(rnnfast.explain(module, torch.zeros(B, 7, I, device=device)))
    assert text.startswith(f"{module}, input (2, 7, 3) torch.float32 on {device}")
    assert "\n  backend: triton (chosen for this call)\n" in text
    assert "one launch a time step: 2 layers x 2 directions x 7 steps" in text
    assert ("interpreted" in text) == (device == "cpu") and "not triton" not in text
    assert "products in " in text and "products in" not in str(
        rnnfast.explain(module.half(), torch.zeros(B, 7, I, device=device, dtype=torch.float16))
    )
    assert "x 5 steps" in str(rnnfast.explain(module.float(), torch.zeros(5, I, device=device)))


def test_explain_the_rest(device):
    """Every obstacle is listed, with who asked for what; a call that torch.nn would refuse is said to be torch.nn's."""
    x = torch.zeros(T, B, I, device=device, dtype=torch.float64)
    module = rnnfast.LSTM(I, H, proj_size=2, device=device, dtype=torch.float64, backend="triton")
    explained = rnnfast.explain(module, pack_padded_sequence(x, [3, 2]))
    assert explained.backend == "torch" and explained.asked == "'triton' was asked for by backend=, but cannot run this call"
    assert "input packed (5, 3) torch.float64" in explained.call
    assert [reason for reason in explained.obstacles if "INTERPRET" not in reason] == [FLOAT64]
    plain = rnnfast.LSTM(I, H, device=device)
    for wrong, hx in ((x.float()[0, 0], None), (x.float()[..., :2], None), (x.float(), torch.zeros(1, B, H)), (x, None)):
        explained = rnnfast.explain(plain, wrong, hx)
        assert explained.backend == "torch" and "torch.nn itself serves or refuses a call of this form" in explained.obstacles
    explained = rnnfast.explain(rnnfast.RNN(I, H, device=device, dtype=torch.float64, backend="reference"), x)
    assert explained.backend == "reference" and explained.details.startswith("the equations")
    assert explained.obstacles == (FLOAT64,)  # what keeps the kernels from it is said all the same


@pytest.mark.parametrize("foreign", [rnnfast.LSTM, None, lambda x: x])
def test_explain_foreign(foreign):
    """explain answers for modules only."""
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module, got "):
        rnnfast.explain(foreign, torch.zeros(T, B, I))


def _inputs(device, dtype):
    x = torch.zeros(T, B, I, device=device, dtype=dtype)
    return {
        "batch": x,
        "one": x[0],
        "packed": pack_padded_sequence(x, [3, 2]),
        "1-D": x[0, 0],
        "features": x[..., :-1],
        "no batch": x[:, :0],
        "no steps": x[:0],
        "dtype": x.to(torch.float16 if dtype == torch.float32 else torch.float32),
        "meta": x.to("meta"),
    }


@given(data=st.data())
def test_explain_agrees_with_forward(device, data):
    """Whatever the situation: explain runs nothing and names the backend that then runs; forward warns exactly when a
    backend asked for by name gave way, and in strict mode raises exactly when it would have had to."""
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    name, dtype = draw("LSTM", "GRU"), draw(torch.float32, torch.float64, torch.bfloat16)
    options = {"proj_size": 2} if name == "LSTM" and draw(False, False, True) else {}
    module = getattr(rnnfast, name)(I, H, device=device, dtype=dtype, backend=draw(None, *rnnfast.BACKENDS), **options)
    kind = draw("batch", "batch", "one", "packed", "1-D", "features", "no batch", "no steps", "dtype", "meta")
    x = _inputs(device, dtype)[kind]
    width = 2 if options else H
    zeros = [torch.zeros(*((1,) if kind == "one" else (1, B)), n, device=device, dtype=dtype) for n in (width, H)]
    hx = draw(None, None, tuple(zeros) if name == "LSTM" else zeros[1], torch.zeros(1, device=device), 0)
    if kind == "packed":
        hx = None  # torch.nn.LSTM itself does not check these, and crashes
    surrounding, strict = draw(None, None, "auto", *rnnfast.BACKENDS), draw(False, False, True)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (("RNNFAST_BACKEND", draw("", "", *rnnfast.BACKENDS)), ("RNNFAST_STRICT", str(int(strict)))):
            patch.setenv(variable, value)
        with rnnfast.use_backend(surrounding) if surrounding else contextlib.nullcontext():
            asked = decide.asked(module.backend)[0]
            with spies(run=False):
                explained = rnnfast.explain(module, x, hx)
            assert str(explained).count("not triton") == len(explained.obstacles)
            assert explained.backend != "triton" or not explained.obstacles
            reasons = [obstacle for obstacle in explained.obstacles if "serves or refuses" not in obstacle]
            if asked == "reference":  # which takes any tensor
                reasons = []
            gives_way = asked != "torch" and bool(reasons)
            assert explained.backend == "torch" or not gives_way
            with spies() as ran, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    module(x, hx)
                    error = None
                except Exception as found:
                    error = str(found)
            raised = bool(error and "RNNFAST_STRICT" in error)
            assert raised == (gives_way and strict), error
            if not raised:
                assert ran == [explained.backend]
            warned = [w for w in caught if w.category is rnnfast.FallbackWarning]
            assert len(warned) == (gives_way and not strict and asked is not None)


# What PyTorch can do to a function


def test_transforms(device, ran):
    """torch.func's reverse mode and vmap run on the kernels; forward mode and functionalize do not, and the warning says so.
    (Their values: test_func.py.)"""
    module, x = rnnfast.GRU(I, H, device=device, backend="triton"), torch.randn(T, B, I, device=device)
    torch.func.vmap(torch.func.grad(lambda x: module(x)[0].sum()))(x[None])
    assert ran == ["triton"]
    with pytest.warns(rnnfast.FallbackWarning, match="forward-mode differentiation is on"), forward_ad.dual_level():
        module(x)
    with pytest.warns(rnnfast.FallbackWarning, match="inside torch.func.functionalize"):
        torch.func.functionalize(lambda x: module(x)[0])(x)
    assert rnnfast.explain(module, x).backend == "triton"


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's layer has no rule for most of this")
def test_reverse_mode_is_torchs(name, ran):
    """On CPU tensors without the kernels, torch.func's reverse mode runs on PyTorch's own layer: bitwise its values."""
    ours, theirs = (getattr(namespace, name)(I, H) for namespace in (rnnfast, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    ours.backend = "torch"
    x, found = torch.randn(T, B, I), []
    for module in (ours, theirs):
        weights = lambda w, m=module: torch.func.functional_call(m, w, (x,))[0].square().sum()  # noqa: E731
        by_weights = torch.func.grad(weights)(dict(module.named_parameters()))
        by_input = torch.func.jacrev(lambda x, m=module: m(x)[0].sum(0))(x)
        found.append([by_input, *by_weights.values()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True)) and set(ran) == {"torch"}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_trace(name, device):
    """A trace holds PyTorch's own operators, none of rnnfast's, and gives the layer's values on another length."""
    module = getattr(rnnfast, name)(I, H, device=device)
    traced = torch.jit.trace(module, (torch.randn(T, B, I, device=device),))
    assert f"aten::{name.lower()}" in str(traced.inlined_graph) and "rnnfast::" not in str(traced.inlined_graph)
    x = torch.randn(T + 2, B, I, device=device)
    with rnnfast.use_backend("torch"):
        torch.testing.assert_close(traced(x), module(x))


def test_autocast_on_the_cpu():
    """On the CPU, autocast is PyTorch's own layer's business, and explain says so."""
    module, x = rnnfast.GRU(I, H), torch.zeros(T, B, I)
    with torch.autocast("cpu"):
        explained = rnnfast.explain(module, x)
    assert explained.backend == "torch" and any("autocast is on" in obstacle for obstacle in explained.obstacles)
