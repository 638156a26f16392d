"""The tuning file: what is read and what is refused, what it says of a call, and that the automatic choice follows it."""

import contextlib
import json
import warnings
from dataclasses import replace

import pytest
import torch

import rnnfast
from rnnfast import functional, torch_private
from rnnfast.choice import gpu, kernel_plan, tuned, tuning_file
from rnnfast.choice.tuned import TuningWarning
from rnnfast.choice.tuning_file import Entry, Shape, Unusable
from rnnfast.kernels import persistent, step
from rnnfast.kernels.persistent.plan import GPUS, persistent_plans
from rnnfast.kernels.step.plan import step_plan

H100 = GPUS["H100"]
SHAPE = Shape("lstm", "float16", "half", 256, 16, 768, 768, 1, 1, training=False)
TRAINING = replace(SHAPE, training=True)


def forget():
    """As in a process that has read no tuning file yet."""
    tuned._tables.clear()
    gpu.known.clear()


def plans(shape, backward=False, B=None):
    """The planner's, for an H100."""
    G = {"lstm": 4, "gru": 3}[shape.cell]
    itemsize = 4 if shape.dtype == "float32" else 2
    return persistent_plans(G, B or shape.B, shape.H, itemsize, shape.precision, backward, H100)


def entry(shape=SHAPE, winner="triton", number=1):
    """With the planner's second plan, so that it differs from what RNNFAST_KERNELS=persistent takes."""
    forward = plans(shape)[number]
    backward = plans(shape, backward=True)[number] if shape.training else None
    return Entry(shape, winner, forward, backward, {"torch.nn": 2.5, "persistent": 1.5})


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where this user's tuning file is, or would be."""
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "cache" / "tuning.json"))
    return tmp_path / "cache" / "tuning.json"


def found(path, entries=None):
    """A file with these entries, changed as JSON by the caller."""
    tuning_file.store(entries or [entry()], path, H100)
    return json.loads(path.read_text())


# The file


def test_where(monkeypatch, tmp_path):
    """The file that is named, else the user's cache; a file for each GPU."""
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "x.json"))
    assert tuning_file.where(H100) == tmp_path / "x.json"
    monkeypatch.delenv("RNNFAST_TUNING_FILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = replace(H100, name="NVIDIA H100 80GB HBM3 (MIG/../x)")
    assert tuning_file.where(name) == tmp_path / "rnnfast" / "nvidia-h100-80gb-hbm3-mig-x.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_file.where(GPUS["A100"]) == tmp_path / ".cache" / "rnnfast" / "a100.json"


def test_round_trip_and_merge(path):
    """What is stored is read again; new entries stand beside others and in place of those of their own shape."""
    first = [entry(), entry(TRAINING, "torch"), entry(replace(SHAPE, dtype="float32", precision="tf32", H=512))]
    tuning_file.store(first, path, H100)
    assert tuning_file.read(path, H100) == first
    again = replace(entry(number=0), winner="torch", times={"torch.nn": 1.0})
    other = Entry(replace(SHAPE, cell="rnn_relu", layers=2, directions=2), "triton", None, None, {"step kernels": 3.0})
    tuning_file.store([again, other], path, H100)
    assert tuning_file.read(path, H100) == [again, *first[1:], other]
    assert [name.name for name in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["json.dump", "os.fsync", "os.replace"])
def test_interrupted_writing(path, moment, error, monkeypatch):
    """The file stays as it was, and nothing is left beside it."""
    tuning_file.store([entry()], path, H100)
    before = path.read_bytes()

    def interrupt(*args, **kwargs):
        raise error

    monkeypatch.setattr(moment, interrupt)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        tuning_file.store([entry(TRAINING)], path, H100)
    assert path.read_bytes() == before and [name.name for name in path.parent.iterdir()] == [path.name]


PLAN = "forward is .* no plan"
DAMAGE = {
    "cell": ("cubic", "cell is 'cubic'"),
    "dtype": (["float16"], "dtype is"),
    "precision": ("ieee", "precision is 'ieee'"),
    "T": (0, "T is 0"),
    "B": (True, "B is True"),
    "I": (2.5, "I is 2.5"),
    "H": (2**31, "H is 2147483648"),
    "layers": ("1", "layers is '1'"),
    "directions": (None, "directions is None"),
    "training": (1, "training is 1"),
    "winner": ("cudnn", "winner is 'cudnn'"),
    "us_per_step": ({"torch.nn": float("nan")}, "us_per_step is"),
    "forward": ("step", PLAN),
    "backward": ({"BLOCK_B": 16}, "backward is .* no plan"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_wrong_fields(path, name):
    """A field of the wrong type or out of its range, or missing: damaged, and said which."""
    data = found(path)
    data["entries"][0][name], message = DAMAGE[name]
    path.write_text(json.dumps(data))
    with pytest.raises(Unusable, match=message) as caught:
        tuning_file.read(path, H100)
    assert caught.value.kind == "damaged"
    if name not in ("forward", "backward"):  # None stands for the step kernels
        del data["entries"][0][name]
        path.write_text(json.dumps(data))
        with pytest.raises(Unusable, match=f"{name} is None"):
            tuning_file.read(path, H100)


@pytest.mark.parametrize("field", ["BLOCK_B", "BLOCK_H", "SPLIT", "num_warps", "programs"])
@pytest.mark.parametrize("value", [0, -16, 24, 1 << 20, "16", None, [16]])
def test_plans_are_the_planners_own(path, field, value):
    """Tiles that this GPU's planner would not take launch nothing."""
    data = found(path)
    data["entries"][0]["forward"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(Unusable, match=PLAN):
        tuning_file.read(path, H100)


DAMAGED = {
    "empty": b"",
    "truncated": b"{",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "foreign": b'{"format": "something else"}',
    "deep": b"[" * 100_000,
    "no GPU": b'{"format": "rnnfast tuning", "schema": 2}',
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(path, text):
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(Unusable) as caught:
        tuning_file.read(path, H100)
    assert caught.value.kind == "damaged" and str(path) in str(caught.value)


def test_every_truncation_is_refused(path):
    found(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(Unusable):
            tuning_file.read(path, H100)


def test_a_folder_in_its_place(path):
    path.mkdir(parents=True)
    with pytest.raises(Unusable, match="cannot be read"):
        tuning_file.read(path, H100)


@pytest.mark.parametrize(
    "part, name, value, kind",
    [
        ("gpu", "name", "NVIDIA A100", "other GPU"),
        ("gpu", "capability", 80, "other GPU"),
        ("gpu", "sms", 114, "other GPU"),
        ("versions", "torch", "2.9.0", "other versions"),
        ("versions", "triton", "3.5.0", "other versions"),
        ("versions", "cudnn", 8, "other versions"),
        ("versions", "driver", 12000, "other versions"),
        ("versions", "rnnfast", "0.0.1", "other versions"),
    ],
)
def test_other_gpus_and_versions(path, part, name, value, kind):
    """Not used, and said what differs; storing replaces a file of other versions, and leaves another GPU's alone."""
    data = found(path)
    data[part][name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(Unusable, match=f"{name} {value!r}, here ") as caught:
        tuning_file.read(path, H100)
    assert caught.value.kind == kind
    if kind == "other versions":
        tuning_file.store([entry(TRAINING)], path, H100)
        assert tuning_file.read(path, H100) == [entry(TRAINING)]
    else:
        with pytest.raises(Unusable):
            tuning_file.store([entry(TRAINING)], path, H100)
        assert json.loads(path.read_text()) == data


def test_future_schema(path):
    data = found(path)
    path.write_text(json.dumps(data | {"schema": 3, "entries": "of another kind"}))
    with pytest.raises(Unusable, match="has schema 3, and this rnnfast reads 2"):
        tuning_file.read(path, H100)


def test_unusable_file_warns_once(path):
    """One warning, of a class that can be filtered; after that, and with no file at all, silence."""
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(TuningWarning, match="cannot be read: .*; it is not used") as caught:
        tables = [tuned.table(H100) for _ in range(3)]
    assert len(caught) == 1 and not tables[0].entries and "cannot be read" in tables[0].unused


def test_no_file_is_no_matter(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.table(H100).unused == f"there is no {path}"
        assert tuned.kernels(H100, "lstm", 256, 16, 768, "float16", "half", False) is None


# What it says of a call


def kernels(T=256, B=16, **changes):
    shape = replace(SHAPE, **changes)
    return tuned.kernels(H100, shape.cell, T, B, shape.H, shape.dtype, shape.precision, shape.training)


def test_which_entry_counts_for_kernels(monkeypatch):
    """Half to twice the rows, the nearest; a sequence not far shorter; all else exactly, but for the size of the input."""
    far, near = entry(replace(SHAPE, B=64)), entry(replace(SHAPE, I=32))
    with tuned.override_tuning(H100, [far, near]):
        assert kernels() == near and kernels(B=64) == far
        assert kernels(B=8).shape == near.shape and kernels(B=31).shape == near.shape and kernels(B=33).shape == far.shape
        assert kernels(B=7) is None and kernels(B=129) is None
        assert kernels(T=64) == near and kernels(T=63) is None and kernels(T=10**6) == near
        for changes in ({"cell": "gru"}, {"H": 512}, {"dtype": "bfloat16"}, {"training": True}):
            assert kernels(**changes) is None
    tf32 = entry(replace(SHAPE, dtype="float32", precision="tf32"))
    with tuned.override_tuning(H100, [tf32]):
        assert kernels(dtype="float32", precision="tf32") == tf32
        assert kernels(dtype="float32", precision="ieee") is None


@pytest.mark.parametrize("B", range(8, 33))
def test_plans_are_made_for_the_batch(B):
    """The tiles that were measured, in the planner's own plan for as many rows as there are; or none."""
    with tuned.override_tuning(H100, [entry(TRAINING)]):
        found = kernels(B=B, training=True)
    for plan, backward in ((found.forward, False), (found.backward, True)):
        assert plan is None or plan in persistent_plans(4, B, 768, 2, "half", backward, H100, most=1000)
    assert found.forward is not None and found.forward.BLOCK_B == entry(TRAINING).forward.BLOCK_B


def test_torch_wins_for_the_very_shape():
    """PyTorch's own layer is taken only where it was measured: cuDNN's fast paths come and go with every size."""
    with tuned.override_tuning(H100, [entry(winner="torch"), entry(replace(SHAPE, T=32))]):
        assert tuned.winner(H100, SHAPE) == tuned.winner(H100, replace(SHAPE, T=200)) == "torch"
        assert tuned.winner(H100, replace(SHAPE, T=32)) == "triton" and tuned.winner(H100, replace(SHAPE, T=7)) is None
        for changes in ({"B": 15}, {"I": 512}, {"layers": 2}, {"directions": 2}, {"training": True}, {"dtype": "bfloat16"}):
            assert tuned.winner(H100, replace(SHAPE, **changes)) is None


# The automatic choice


SMALL = Shape("lstm", "float16", "half", 4, 16, 32, 32, 1, 1, training=False)


@pytest.fixture
def ran(monkeypatch):
    """CPU tensors pass for an H100's. What was to run, "torch", "step" or the persistent plan, call by call; for the last the
    step kernels stand in."""
    calls = []
    forward, backward = step.forward, step.backward

    def watch(inner, family):
        def run(*args, **options):
            calls.append("step" if family is step else options["plan"])
            inner(*args, **options | {"plan": step_plan(SMALL.H, 2, "half")})

        return run

    for family in (step, persistent):
        monkeypatch.setattr(family, "forward", watch(forward, family))
        monkeypatch.setattr(family, "backward", watch(backward, family))
    torchs = torch.nn.LSTM.forward

    def own(self, *args):
        calls.append("torch")
        return torchs(self, *args)

    monkeypatch.setattr(torch.nn.LSTM, "forward", own)
    monkeypatch.setitem(torch_private._FORWARDS, torch.nn.LSTM, own)  # else it would count as replaced, and run for that
    with kernel_plan.pretend_gpu(H100):
        yield calls


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, in the interpreter")


def layer_and_input():
    return rnnfast.LSTM(32, 32, dtype=torch.float16), torch.randn(4, 16, 32, dtype=torch.float16)


def weights():
    return [torch.randn(128, 32, dtype=torch.float16) for _ in range(2)]


@on_cpu
def test_modules_follow(ran, path):
    """Nothing measured: PyTorch's own layer, as predicted for so few steps. Then the plans that were measured, of inference and
    of training each their own; or PyTorch's own layer. The file is read once."""
    layer, x = layer_and_input()
    with torch.no_grad():
        layer(x)
    assert ran == ["torch"]
    ran.clear()
    trained = replace(entry(replace(SMALL, training=True)), forward=plans(SMALL)[0])
    tuning_file.store([entry(SMALL), trained], path, H100)
    forget()
    with torch.no_grad():
        layer(x)
    path.unlink()
    layer(x)[0].sum().backward()
    assert ran == [entry(SMALL).forward, trained.forward, trained.backward]
    ran.clear()
    with tuned.override_tuning(H100, [replace(entry(SMALL), winner="torch"), trained]), torch.no_grad():
        layer(x)
    assert ran == ["torch"]


@on_cpu
def test_functions_follow(ran, monkeypatch):
    """As the modules. What was not measured goes by the prediction."""
    x, (w_ih, w_hh) = layer_and_input()[1], weights()
    monkeypatch.setattr(functional, "_torch_layer", lambda *args, **options: ran.append("torch") or (x, (x, x), (), None))
    functional.lstm(x, None, w_ih, w_hh)
    with tuned.override_tuning(H100, [entry(SMALL)]):
        functional.lstm(x, None, w_ih, w_hh)
    with tuned.override_tuning(H100, [entry(SMALL, winner="torch")]):
        functional.lstm(x, None, w_ih, w_hh)
        functional.lstm(x, None, w_ih.requires_grad_(), w_hh)  # training, which was not measured
    assert ran == ["torch", entry(SMALL).forward, "torch", "torch"]


@on_cpu
@pytest.mark.parametrize("how", ["backend=", "use_backend", "RNNFAST_BACKEND"])
def test_a_backend_by_name_wins(ran, how, monkeypatch):
    """Then PyTorch's own layer is no choice, and the fastest of the kernels run."""
    layer, x = layer_and_input()
    if how == "backend=":
        layer.backend = "triton"
    if how == "RNNFAST_BACKEND":
        monkeypatch.setenv(how, "triton")
    block = rnnfast.use_backend("triton") if how == "use_backend" else contextlib.nullcontext()
    with tuned.override_tuning(H100, [entry(SMALL, winner="torch")]), torch.no_grad(), block:
        layer(x)
    assert ran == [entry(SMALL).forward]


@on_cpu
@pytest.mark.parametrize("family", ["step", "persistent", "auto"])
def test_a_family_by_name_wins(ran, family, monkeypatch):
    """RNNFAST_KERNELS=step or persistent leaves the file unread."""
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    layer, x = layer_and_input()
    with tuned.override_tuning(H100, [entry(SMALL, winner="torch")]), torch.no_grad():
        if family != "auto":
            monkeypatch.setattr(tuned, "table", None)
        layer(x)
    assert ran == [{"step": "step", "persistent": plans(SMALL)[0], "auto": "torch"}[family]]


@on_cpu
def test_strict_mode(ran, monkeypatch):
    """A layer of PyTorch's that was measured as the fastest is a choice, not a fallback: nothing is raised."""
    monkeypatch.setenv("RNNFAST_STRICT", "1")
    layer, x = layer_and_input()
    with tuned.override_tuning(H100, [entry(SMALL, winner="torch")]), torch.no_grad():
        layer(x)
    assert ran == ["torch"]


@on_cpu
def test_compiled_code(ran):
    """PyTorch's own layer is never taken in compiled code, where it would be unrolled; the operator follows the file."""
    torch._dynamo.reset()
    before = torch._dynamo.config.allow_rnn
    rnnfast.enable_compile()
    try:
        layer, x = layer_and_input()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        with tuned.override_tuning(H100, [entry(SMALL, winner="torch")]), torch.no_grad():
            compiled(x)
            assert ran == [entry(SMALL).forward]
            ran.clear()
            layer(x)
            assert ran == ["torch"]
    finally:
        torch._dynamo.config.allow_rnn = before
        torch._dynamo.reset()


@on_cpu
def test_explain(ran, path):
    """Which file says so, or how to have one."""
    layer, x = layer_and_input()
    with torch.no_grad():
        text = str(rnnfast.explain(layer, x))
        command = "rnnfast tune --cell lstm --hidden 32 --input 32 --batch 16 --steps 4 --dtype float16 --layers 1"
        assert f"tuning: not measured here (there is no {path}); to measure it: {command}" in text
        tuning_file.store([entry(SMALL, winner="torch")], path, H100)
        forget()
        explained = rnnfast.explain(layer, x)
        assert explained.backend == "torch" and explained.asked == "measured as the fastest for this call"
        assert explained.tuning == f"by {path}, measured at lstm float16 T=4 B=16 I=32 H=32, inference"
        with rnnfast.use_backend("triton"):
            explained = rnnfast.explain(layer, x)
        assert explained.backend == "triton" and entry(SMALL).forward.words(16) in explained.details
    assert f"{path} has nothing near this call" in str(rnnfast.explain(layer, x))  # in training
    path.write_text("{")
    forget()
    with pytest.warns(TuningWarning):
        assert "cannot be read" in rnnfast.explain(layer, x).tuning
    assert not ran


@on_cpu
@pytest.mark.parametrize("family", ["step", "persistent"])
def test_explain_of_a_family_by_name(ran, family, monkeypatch):
    monkeypatch.setenv("RNNFAST_KERNELS", family)
    assert rnnfast.explain(*layer_and_input()).tuning == ""


def test_on_a_cpu_nothing_is_looked_up(monkeypatch, device):
    """Nor read: CPU tensors have no tuning."""
    if device == "cuda":
        pytest.skip("CPU tensors do not run the kernels here")
    monkeypatch.setattr(tuned, "table", None)
    layer, x = layer_and_input()
    layer(x)
    assert rnnfast.explain(layer, x).tuning == ""


@pytest.mark.parametrize("home", ["/dev/null", "/no/such/folder", ""])
def test_users_without_a_home(home, monkeypatch):
    """Have no file, and no trouble."""
    for name in ("RNNFAST_TUNING_FILE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    assert tuned.table(H100).unused.startswith("there is no ")


def test_others_can_read_it(path):
    """A file in a shared place."""
    tuning_file.store([], path, H100)
    assert path.stat().st_mode & 0o777 == 0o644
