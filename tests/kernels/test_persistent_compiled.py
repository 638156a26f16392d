"""What the persistent kernels rest on, for correctness and for speed, read in PTX and machine code for absent GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


SWEEP = [
    pytest.param(arch, ("lstm", "gru", "rnn_tanh"), ("29", "200", "768"), marks=pytest.mark.sweep) for arch in (80, 90, 100)
]


@pytest.mark.parametrize(("arch", "cells", "sizes"), [(90, ("lstm",), ("768",)), (90, ("gru",), ("29",)), *SWEEP])
def test_machine_code(arch, cells, sizes, tmp_path):
    """The main shape, and sizes that are padded; in a process of its own, because this one may be the interpreter's."""
    out = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.offline", "--family", "persistent", "--arch", str(arch)]
    command += ["--cells", *cells, "--dtypes", "float16", "--hidden", *sizes, "--json", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    report = json.loads(out.read_text())
    # forward in training and in inference, and backward; cleared before each, for two T, which made no variants
    assert len(report["built"]) == len(cells) * len(sizes) * 3
    assert report["launches"] == len(cells) * len(sizes) * 2 * 3 * 2
    for row in report["built"]:
        name = f"{row['kernel']} {row['cell']} {row['hidden']} {row['plan']}"
        loop = row["loop"]
        assert loop, name
        assert row["stack_bytes"] == 0 and loop["spills"] == 0, name
        # words of one width, stored and loaded strongly; nothing loaded ahead of its poll; resident or refused
        assert loop["exchange"] == "ld.volatile b32, st.cg b32", name
        # the instruction that PTX's st.relaxed.gpu becomes
        assert all(store.endswith(".STRONG.GPU") for store in loop["publish"].split(",")), name
        assert loop["async_copies"] == 0, name
        assert loop["cooperative"], name
        # per step a program loads the inputs of its units, narrow where padded, and no weights
        assert loop["reread"] <= 16, name
        if row["hidden"] == 768:
            assert loop["poll"] == "LDG.E.128.STRONG.SYS", name
            # three gates are four blocks of rows in forward
            assert loop["redundancy"] <= (
                1.34 if (row["cell"], row["kernel"]) == ("gru", "persistent_forward_kernel") else 1.05
            ), name
