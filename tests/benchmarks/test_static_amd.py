"""The kernels compiled for AMD GPUs that are not here: all compile, none spills, and what the table says of them."""

import json

import pytest
from test_static import BUILD, run

from benchmarks.static import amd
from benchmarks.static import text as texts
from rnnfast.kernels.persistent.limits import AMD_GPUS

pytestmark = pytest.mark.same_everywhere

ASSEMBLY = """
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\tglobal_load_dwordx4 v[0:3], v[4:5], off
.LBB0_1:
\tv_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
\tds_read_b128 v[8:11], v12
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dword v[4:5], v0, off
\ts_endpgm
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_count:     72
    .vgpr_count:     116
    .vgpr_spill_count: 3
    .wavefront_size: 64
"""


def check(table, arch):
    """Compile `table` and hold what matters of each row; returns the rows."""
    rows = json.loads(run("-c", BUILD, json.dumps(table), json.dumps([arch])))
    for row in rows:
        name = " ".join(str(row[key]) for key in ("arch", "cell", "dtype", "hidden", "batch", "family", "direction"))
        assert row["spills"] == row["stack_bytes"] == 0, name
        assert row["shared_bytes"] <= AMD_GPUS[arch].shared_bytes and row["variants"] == 1, name
        assert row["family"] == "step" or row["launches"] == 1, name
        if row["family"] == "step" and "16" in row["dtype"]:
            assert row["matrix"] > 0, name
        assert not any(key.startswith(("predicted", "term_")) for key in row), name
    return rows


@pytest.mark.parametrize(("arch", "cell"), [("gfx942", "lstm"), ("gfx1100", "rnn_tanh")])
def test_small_table(arch, cell):
    """The step kernels at a size with whole chunks, and one-program kernels."""
    rows = check([("step", [cell], ["float16"], [128], [16]), ("one_program", ["rnn_tanh"], ["float16"], [16], [16])], arch)
    assert {row["family"] for row in rows} == {"step", "one_program"} and len(rows) == 6
    assert {row["threads"] for row in rows} == {64 if arch == "gfx942" else 32}
    shown = "\n".join(texts.show(rows))
    assert f"== {arch} ({AMD_GPUS[arch].name}, " in shown and "variants: 0 rows" in shown
    head, _, *lines = texts.amd_summary(rows, "command")
    assert head == "`command`: 6 rows, 6 kernels, rows with spills: 0." and len(lines) == 2 + 4


@pytest.mark.sweep
@pytest.mark.parametrize("arch", list(AMD_GPUS))
def test_standard_table(arch):
    """All of it, and more cells, sizes and batches."""
    cells, dtypes = ["lstm", "gru", "rnn_tanh"], ["float16", "bfloat16", "float32"]
    more = [("step", cells, dtypes, [1, 29, 50], [3]), ("one_program", cells, dtypes, [1, 16, 29, 32, 50, 64], [1, 16, 1000])]
    check([*amd.STANDARD, *more], arch)


def test_counts():
    assert amd.counted(ASSEMBLY) == {
        "registers": 116, "scalar_registers": 72, "spills": 3, "stack_bytes": 12, "threads": 64, "instructions": 8,
        "matrix": 1, "multiply_adds": 0, "special_functions": 0, "loads": 1, "stores": 1, "shared_accesses": 1,
        "branches": 1, "barriers": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--arch", "gfx942", "90"], "GPUs of AMD or of NVIDIA"),
        (["--arch", "gfx942", "--dtypes", "tf32"], "on AMD GPUs the kernels do not use TF32"),
        (["--arch", "gfx942", "--show-terms", "LSTM", "768", "16"], "nothing is predicted for AMD GPUs"),
        (["--arch", "gfx906"], "invalid choice: 'gfx906'"),
    ],
)
def test_bad_arguments(arguments, reason, monkeypatch, capsys):
    from benchmarks.static import __main__ as command

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert reason in capsys.readouterr().err
