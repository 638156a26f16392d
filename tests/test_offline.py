"""Every kernel, compiled for GPUs that are not here, through the function that launches it.

The interpreter forgives what a GPU refuses: tile minimums, types, layouts. A process of its own, since this one interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.offline import SHAPES

ROOT = Path(__file__).parents[1]


def build(folder, *args):
    """The JSON that `python -m benchmarks.offline` writes."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline", *args, "--json", str(folder / "built.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "built.json").read_text())


def check(report, configurations, forward=2):
    """Nothing spills, tensor cores are used, T and B made no variants, one launch a step.

    `forward`: variants of the forward kernel, one that saves for backward and one that does not (an RNN saves nothing).
    """
    built = report["built"]
    for row in built:
        assert row["stack_bytes"] == 0 and not {"LDL", "STL"} & set(row["instructions"]), row
        tensor_cores = {"HMMA", "HGMMA", "UTCHMMA"} & set(row["instructions"])
        assert bool(tensor_cores) == (row["dtype"] != "float32"), row  # IEEE float32 has no tensor core
    for name, variants in (("forward_step_kernel", forward), ("backward_step_kernel", 1)):
        assert sum(row["kernel"] == name for row in built) == variants * configurations
    assert report["launches"] == 3 * sum(T for T, _ in SHAPES) * configurations


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles(arch, tmp_path):
    """LSTM and GRU in float16 and TF32, an odd size, the other dtypes, the other cells."""
    some = ["--arch", arch]
    check(build(tmp_path, *some, "--cells", "lstm", "gru", "--dtypes", "float16", "tf32", "--hidden", "512"), 4)
    check(build(tmp_path, *some, "--cells", "lstm", "gru", "--dtypes", "float16", "--hidden", "50"), 2)
    check(build(tmp_path, *some, "--cells", "lstm", "--dtypes", "bfloat16", "float32", "--hidden", "512"), 2)
    check(build(tmp_path, *some, "--cells", "rnn_tanh", "rnn_relu", "--dtypes", "float16", "--hidden", "512"), 2, forward=1)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiles_with_marks(arch, tmp_path):
    """With lengths and resets: no spill, and the states are loaded as wide, and so as asynchronously, as without."""
    some = ["--arch", arch, "--cells", "lstm", "gru", "--dtypes", "float16", "--hidden", "512"]
    plain, marked = ({}, {})
    for found, options in ((plain, []), (marked, ["--marked"])):
        for row in build(tmp_path, *some, *options)["built"]:
            found[row["kernel"], row["cell"]] = row
    assert plain.keys() == marked.keys()
    for key, row in marked.items():
        assert row["stack_bytes"] == 0 and not {"LDL", "STL"} & set(row["instructions"]), row
        for name in ("HMMA", "HGMMA", "LDGSTS"):
            assert row["instructions"].get(name) == plain[key]["instructions"].get(name), (row, plain[key])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_all(arch, dtype, tmp_path):
    """Every cell at sizes from 1 to 1024."""
    some = ["--arch", arch, "--dtypes", dtype, "--hidden", "1", "16", "29", "50", "200", "512", "1024"]
    check(build(tmp_path, *some, "--cells", "lstm", "gru"), 14)
    check(build(tmp_path, *some, "--cells", "rnn_tanh", "rnn_relu"), 14, forward=1)
