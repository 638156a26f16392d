"""The tuning table that comes with the package: when it is used, beside the user's own file, and when not."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from rnnfast.choice import gpu, tuned, tuning_file
from rnnfast.choice.tuned import TuningWarning
from rnnfast.choice.tuning_file import Entry, Shape
from rnnfast.kernels.persistent.plan import GPUS, persistent_plans

pytestmark = pytest.mark.same_everywhere

H100 = GPUS["H100"]
SHAPE = Shape("lstm", "float16", "half", 256, 16, 768, 768, 1, 1, training=False)


def entry(shape=SHAPE, winner="triton"):
    return Entry(shape, winner, persistent_plans(4, shape.B, shape.H, 2, "half", False, H100)[1], None, {"torch.nn": 2.5})


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where this user's tuning file would be, in a process that has read none."""
    monkeypatch.setenv("RNNFAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(tuned, "_tables", {})
    gpu.known.clear()
    yield tmp_path / "tuning.json"
    gpu.known.clear()


@pytest.fixture
def shipped(path, monkeypatch):
    """Where the table for an H100 would be; and no file of the user's yet."""
    table = path.with_name("shipped.json")
    monkeypatch.setattr(tuned, "shipped", lambda gpu: table)
    return table


def test_where_tables_are_shipped():
    folder = Path(tuned.__file__).parents[1] / "tuned"
    assert tuned.shipped(replace(H100, name="NVIDIA H100 80GB HBM3")) == folder / "nvidia-h100-80gb-hbm3.json"
    for table in folder.glob("*.json"):  # each is one that would be used, on its own GPU
        gpu = json.loads(table.read_text())["gpu"]
        assert tuned.shipped(replace(H100, name=gpu["name"])) == table


def test_a_shipped_table(path, shipped):
    """Used without a file of the user's; what the user measured comes first, whatever T it was at."""
    other = replace(SHAPE, B=64)
    tuning_file.store([entry(winner="torch"), entry(other, "torch")], shipped, H100)
    assert tuned.table(H100).path == shipped and not tuned.table(H100).unused
    assert [tuned.winner(H100, shape) for shape in (SHAPE, other, replace(SHAPE, H=64))] == ["torch", "torch", None]
    tuned._tables.clear()
    tuning_file.store([entry(replace(SHAPE, T=2 * SHAPE.T))], path, H100)
    assert [tuned.winner(H100, shape) for shape in (SHAPE, other)] == ["triton", "torch"]
    assert tuned.table(H100).path == f"{path} and {shipped}"


@pytest.mark.parametrize("part, name, value, used", [
    ("versions", "torch", "1.0", True), ("versions", "cudnn", 1, True), ("versions", "driver", 1, True),
    ("versions", "triton", triton.__version__.rpartition(".")[0] + ".99", True), ("versions", "triton", "2.0.0", False),
    ("versions", "rnnfast", "0.1.99", True), ("versions", "rnnfast", "0.0.1", False), ("versions", "rnnfast", None, False),
    ("gpu", "name", "A100", False), ("gpu", "sms", 114, False), ("gpu", "capability", 80, False),
])  # fmt: skip
def test_a_shipped_table_of_another_machine(part, name, value, used, path, shipped):
    """What its plans and its kernels depend on has to agree; else it is not used, said once, and the user's own still is."""
    tuning_file.store([entry()], shipped, H100)
    data = json.loads(shipped.read_text())
    data[part][name] = value
    shipped.write_text(json.dumps(data))
    tuning_file.store([entry(replace(SHAPE, B=64))], path, H100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tables = [tuned.table(H100) for _ in range(2)]
    assert len(tables[0].entries) == 1 + used and tables[0] is tables[1]
    assert [type(one.message) for one in caught] == [TuningWarning] * (not used)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "rnnfast tuning", "schema": 1, "gpu": 3}', "tiles"])
def test_a_damaged_shipped_table(damage, path, shipped):
    """Never an error. Nor does a damaged file of the user's keep a good table from being used."""
    tuning_file.store([entry()], shipped, H100)
    data = json.loads(shipped.read_text())
    good = json.dumps(data)
    if damage == "tiles":
        data["entries"][0]["forward"]["BLOCK_B"] = 3  # which the planner would not make
        damage = json.dumps(data)
    shipped.write_text(damage)
    with pytest.warns(TuningWarning, match="shipped.json .*; it is not used"):
        assert tuned.table(H100).unused == f"there is no {path}"
    tuned._tables.clear()
    shipped.write_text(good)
    path.write_text(damage)
    with pytest.warns(TuningWarning, match="tuning.json .*; it is not used"):
        assert tuned.table(H100).path == shipped and not tuned.table(H100).unused
