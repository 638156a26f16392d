"""The static table: what it holds of every kernel, compiled for GPUs that are not here, and that it would see what it forbids.

The interpreter forgives what a GPU refuses: tile minimums, types, layouts. So kernels are compiled in a process of its own,
since this one interprets.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import __main__ as command
from benchmarks.static import machine_code
from benchmarks.static import table as tables
from benchmarks.static import text as texts
from benchmarks.timing.cases import DTYPES
from rnnfast.reference import GATES

pytestmark = pytest.mark.same_everywhere

ROOT = Path(__file__).parents[2]
BUILD = """
import json, sys
from benchmarks.static.table import build, jobs_of

print(json.dumps(build(jobs_of(*map(json.loads, sys.argv[1:])), 1)))
"""

# What makes a product's redundancy more than 1: of which rows, how many times, and why.
REDUNDANT = (
    (
        {"cell": "gru", "family": "persistent", "direction": "forward", "split": 1},
        4 / 3,
        "three gates take the place of four where the warps share the rows",
    ),
    ({"hidden": 1}, 2, "16 of the summed axis at least, where TF32 could take 8"),
    ({"hidden": 29}, 128 / 116, "whole chunks of the summed axis"),
    ({"hidden": 50}, 256 / 208, "padded, so that the warps share the summed axis in whole chunks"),
    ({"hidden": 200}, 256 / 200, "padded likewise"),
    ({"hidden": 384, "direction": "forward"}, 512 / 384, "padded likewise"),
    ({"hidden": 384, "cell": "rnn_tanh", "direction": "backward"}, 512 / 384, "padded likewise"),
)


def run(*command: str, **environment: str) -> str:
    """What the Python program `command` prints where kernels compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IDENTITY = ("arch", "cell", "dtype", "hidden", "batch", "family", "direction", "training", "marked")  # of a row


def check(table, arch, marked=False):
    """Compile `table` and hold what matters of each row; returns the rows."""
    rows = json.loads(run("-c", BUILD, json.dumps(table), f"[{arch}]", json.dumps(marked)))
    plans: dict[tuple, set[str]] = {}
    for row in rows:
        name = " ".join(str(row[key]) for key in IDENTITY) + f": {row['plan']}"
        assert row["stack_bytes"] == 0 and row["spills"] == 0, name
        assert (row["unit"] == "FFMA") == (row["dtype"] == "float32"), name  # IEEE float32 has no tensor core
        if row["unit"] != "FFMA":  # the cell's own multiplies are not told from those of a plain product
            known = [times for rows, times, _ in REDUNDANT if rows.items() <= row.items()]
            assert row["redundancy"] <= 1.05 * math.prod(known), name
        # compiled once: not for a number of steps, nor for a batch size that another shares its plan with
        assert row["variants"] == 1, name
        tile = [
            row[key]
            for key in (*IDENTITY, "block_b", "block_h", "block_k", "split", "parts", "in_registers", "warps")
            if key != "batch"
        ]
        plans.setdefault(tuple(tile), set()).add(row["compiled"])
        if row["family"] == "step":
            assert row["launches"] == 1, name  # a step
            continue
        assert row["weights_reread_bytes"] == 0, name
        if row["family"] == "one_program":  # nothing between programs
            assert row["launches"] == 1 and row["polls"] == 0 and not row["exchange"] and not row["cooperative"], name
            assert row["programs"] == -(-row["batch"] // row["block_b"]) and row["resident_programs"] >= 1, name
            continue
        assert row["round_trips"] == (2 if row["parts"] > 1 else 1), name  # the sums of several programs are a second
        # words of one width, stored and loaded strongly; nothing loaded ahead of its poll; resident or refused
        # of the stores, those of results may be .cg, which become the same instruction, and the word of a program that gives up
        assert row["exchange"] in (
            "ld.relaxed.gpu b32, st.relaxed.gpu b32",
            "ld.relaxed.gpu b32, st.cg b32, st.relaxed.gpu b32",
        )
        assert all(store.endswith(".STRONG.GPU") for store in row["publish"].split(",")), name
        assert row["async_copies"] == 0 and row["cooperative"], name
        assert row["resident_programs"] >= 1 and row["programs"] <= row["sms"], name
        if row["hidden"] % 128 == 0:
            # the widest that fills a thread; the sums of several programs are few
            chunk = row["split"] * row["block_b"] * row["block_k"] * (4 if "32" in row["dtype"] else 2)
            width = min(128, chunk // (4 * row["warps"]))
            assert f"LDG.E.{width}.STRONG.GPU" in row["poll"].split(","), name
            assert row["parts"] > 1 or "," not in row["poll"], name
    assert all(len(compiled) == 1 for compiled in plans.values()), plans
    return rows


# Both GPUs together have every dtype, an odd size, a batch that fills a part of a tile, one that takes two, LSTM, GRU and
# another cell. The sweep has all of it on each GPU.
STEP = {
    80: [
        ("step", ["gru"], ["float16"], [50], [3]),
        ("step", ["lstm"], ["float32"], [512], [100]),
    ],
    90: [
        ("step", ["lstm"], ["bfloat16"], [512], [3]),
        ("step", ["lstm"], ["tf32"], [512], [100]),
        ("step", ["rnn_relu"], ["float16"], [512], [1]),
    ],
}
ALL_STEP = [
    ("step", ["lstm", "gru"], ["float16"], [50], [3]),
    ("step", ["lstm"], ["bfloat16", "tf32", "float32"], [512], [3, 100]),
    ("step", ["rnn_relu"], ["float16"], [512], [1]),
]


def check_step(table, arch):
    """Like `check`, and the weights are read as often as the tiles of the batch say."""
    rows = check(table, arch)
    assert len(rows) == 3 * sum(len(job.batches) for job in tables.jobs_of(table, [arch]))
    for row in rows:
        # all weights, once for each tile of the batch; what is read beyond is padding, of K and of units
        weights = (
            GATES[row["cell"]] * row["hidden"] ** 2 * (4 if "32" in row["dtype"] else 2) * -(-row["batch"] // row["block_b"])
        )
        assert weights <= row["weights_reread_bytes"] <= 1.7 * weights


@pytest.mark.parametrize("arch", STEP)
def test_step_kernels(arch):
    check_step(STEP[arch], arch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_step_kernels(arch):
    check_step(ALL_STEP, arch)


def test_persistent_kernels():
    """The main shapes, a batch that fills a part of a tile, a size that is padded, programs that share their sums; and one that
    does not fit, where the table shows the step kernels and says why."""
    table = [
        ("persistent", ["lstm"], ["float16"], [768], [1, 16]),
        ("persistent", ["lstm"], ["float16"], [1024], [16]),
        ("persistent", ["gru"], ["float16"], [29], [3]),
        ("persistent", ["lstm"], ["float32"], [1024], [16]),
    ]
    rows = check(table, 90)
    assert [(row["family"], row["hidden"]) for row in rows if row["dtype"] == "float32"] == [("step", 1024)] * 3
    assert all((row["family"] == "persistent") == (not row["why_step"]) for row in rows)
    persistent = [row for row in rows if row["family"] == "persistent"]
    assert len(persistent) == 12
    shared = [row for row in persistent if row["parts"] > 1]
    assert [(row["hidden"], row["direction"]) for row in shared] == [(1024, "backward")]
    for row in persistent:
        if row["hidden"] % 128:
            continue  # gathers padding too
        columns = row["hidden"] * (4 if row["direction"] == "backward" else 1)
        of_state = row["programs"] * row["block_b"] * columns // row["parts"] * 2
        assert row["gathered_bytes"] - row["gathered_sum_bytes"] == of_state
        # of each part one float32 a unit and batch row of the program; warps that have too little to load load it twice
        sums = row["programs"] * row["parts"] * row["block_b"] * row["block_h"] * 4
        assert row["gathered_sum_bytes"] in ((sums, 2 * sums) if row in shared else (0,))
        assert ("term_second_hop" in row) == (row in shared)
    text = "\n".join(texts.show(rows))
    assert "[1] no tiles fit: " in text
    assert "Spills, weights re-read, redundancy over 1.05, variants: " in text


ONE_PROGRAM = [
    ("one_program", ["lstm"], ["float16"], [128], [8]),
    ("one_program", ["gru"], ["tf32"], [29], [300]),
    ("one_program", ["rnn_tanh"], ["float32"], [128], [1]),
]


def test_one_program_kernels():
    """The largest LSTM, which has the fewest registers to spare; a padded size, 4 rows a program; no tensor cores."""
    rows = check(ONE_PROGRAM, 90)
    assert {row["family"] for row in rows} == {"one_program"} and len(rows) == 9
    for row in rows:
        if row["cell"] == "lstm":
            assert row["predicted_us"] <= (0.60 if row["direction"] == "forward" else 0.78)
    assert next(row["block_b"] for row in rows if row["cell"] == "gru") == 4


@pytest.mark.sweep
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_one_program_table(arch, marked):
    """The largest of each kind, odd sizes and whole tiles, with each number of rows a program; none may spill."""
    cells = ["lstm", "gru", "rnn_tanh"]
    batches = [1, 400, 1000]
    table = [
        ("one_program", cells, ["float16", "bfloat16"], [16, 64, 127, 128], batches),
        ("one_program", cells, ["tf32", "float32"], [16, 29, 63, 64], batches),
        ("one_program", ["rnn_tanh"], ["float16"], [255, 256], batches),
        ("one_program", ["rnn_tanh"], ["tf32", "float32"], [128], batches),
    ]
    assert {row["family"] for row in check(table, arch, marked)} == {"one_program"}


def test_marked_kernels():
    """Those for lengths and resets, of either family."""
    rows = check([("step", ["lstm"], ["float16"], [50], [3]), ("persistent", ["gru"], ["float16"], [256], [3])], 90, True)
    assert [row["family"] for row in rows] == ["step"] * 3 + ["persistent"] * 3 and all(row["marked"] for row in rows)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_marked_table(arch):
    """The main sizes, where the persistent kernels are close to the limit of registers, and one that is padded."""
    cells, dtypes = ["lstm", "gru", "rnn_tanh"], ["float16", "bfloat16", "tf32"]
    check(
        [("persistent", cells, dtypes, [29, 256, 512, 768, 1024], [16, 64]), ("step", cells, dtypes, [29, 512], [16])],
        arch,
        True,
    )


@pytest.mark.sweep
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_standard_table(arch):
    """All of it, and the step kernels at more sizes; where there is no plan the row says why."""
    for row in check([entry for entry in tables.STANDARD if entry[0] == "persistent"], arch):
        assert row["family"] == "persistent" or "no tiles fit: " in row["why_step"]
    more = ("step", tables.CELLS, list(DTYPES), [1, 16, 50, 200], [3])
    check([entry for entry in tables.STANDARD if entry[0] == "step"] + [more], arch)


CACHED = """
import collections, json, sys
from triton.backends.nvidia.compiler import CUDABackend
from benchmarks.static.table import Job, build

calls, add_stages = collections.Counter(), CUDABackend.add_stages
def counted(self, stages, *args):
    add_stages(self, stages, *args)
    for name, make in list(stages.items()):
        stages[name] = lambda *args, name=name, make=make: calls.update([name]) or make(*args)
CUDABackend.add_stages = counted
seconds = [row["compile_seconds"] for row in build([Job("persistent", 90, "rnn_tanh", "float16", 16, [1])], 1)]
print(json.dumps([calls, seconds]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, list]:
    """A folder for Triton's cache, and what a first process that compiles one small shape into it says."""
    folder = str(tmp_path_factory.mktemp("cache"))
    return folder, json.loads(run("-c", CACHED, TRITON_CACHE_DIR=folder))


def test_a_second_process_compiles_nothing(built):
    """Of what Triton's cache on disk has; and the table says so, instead of a time."""
    folder, (first, took) = built
    second, cached = json.loads(run("-c", CACHED, TRITON_CACHE_DIR=folder))
    assert set(first) == {"ttir", "ttgir", "llir", "ptx", "cubin"} and all(took)
    assert min(first.values()) >= 3  # clear_kernel, forward and backward
    assert second == {} and cached == [None] * 3


def test_command(tmp_path, built):
    """The terms of one shape; its rows as JSON; and in short in a page, below the heading of this Triton, where nothing else
    changes."""
    page = tmp_path / "static.md"
    heading = f"### Triton {command.triton.__version__}"
    page.write_text(f"# Title\n\n{heading}\n\nold\n\n### Triton 0.1\n\nkept\n")
    arguments = ["--arch", "90", "--dtypes", "float16", "--jobs", "1", "--json", str(tmp_path / "rows.json")]
    arguments += ["--summary", str(page), "--show-terms", "RNN_TANH", "16", "1"]
    printed = run("-m", "benchmarks.static", *arguments, TRITON_CACHE_DIR=built[0])
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["schema"] == tables.SCHEMA and len(report["rows"]) == 3
    forward, _, backward = report["rows"]
    for row in (forward, backward):
        terms = texts.terms_of(row)
        assert sum(terms.values()) == pytest.approx(row["predicted_clocks"], abs=len(terms))
        assert f"What would halve the largest term, {next(iter(terms))}: " in printed
    assert printed.count("H=16, B=1") == 2
    before, found, after = page.read_text().partition(f"{heading}\n\n`python -m benchmarks.static --arch 90 ")
    assert before == "# Title\n\n" and found and after.endswith("|\n\n### Triton 0.1\n\nkept\n") and "old" not in after
    assert "| H100 | rnn_tanh float16 | 16 (B=1) | 16 (B=1) | " in after


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show-terms", "TRANSFORMER", "768", "16"], "no cell 'TRANSFORMER': choose from lstm, gru, rnn_tanh, rnn_relu"),
        (["--show-terms", "LSTM", "768", "0"], "expected a number from 1 on, got '0'"),
        (["--hidden", "-1"], "expected a number from 1 on, got '-1'"),
        (["--json", "no/such/folder/rows.json"], "No such file or directory"),
        (["--summary", "no/such/page.md"], "No such file or directory"),
        (["--summary", "README.md"], "README.md: there is no line '### Triton "),
    ],
)
def test_bad_arguments(arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


LOOP = """
        /*0000*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/              @!P1 LDG.E.64 R12, desc[UR6][R4.64] ;
        /*0030*/                   HMMA.16816.F32 R20, R8, R16, R20 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/               @P2 BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/                   STG.E.STRONG.GPU desc[UR6][R6.64], R20 ;
        /*0070*/                   LDG.E.128.STRONG.SYS R16, desc[UR6][R6.64] ;
        /*0080*/               @P3 BRA `(.L_x_4) ;
.L_x_5:
        /*0090*/               @P4 BRA `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   LDG.E.U16 R9, desc[UR6][R2.64+0x10] ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   LDG.E.128.STRONG.SYS R16, desc[UR6][R6.64] ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/               @P5 BRA `(.L_x_4) ;
        /*0100*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0110*/                   BRA `(.L_x_6);
"""


def test_loop_in_machine_code():
    """Parts of the loop that the assembler put behind its end belong to it; what comes before does not; the poll is apart."""
    code = machine_code.Code(LOOP)
    loop, polls = code.loops()
    assert len(code.instructions) == 18
    assert [each.opcode for each in loop if each.is_a("LDG")] == ["LDG.E.64", "LDG.E.128.STRONG.SYS", "LDG.E.U16"]
    assert machine_code.loaded(loop, strong=False) == 8 + 2
    assert machine_code.loaded(loop, strong=True) == 16
    assert machine_code.tally(loop, "BAR") == 1
    assert [[each.opcode.split(".")[0] for each in poll] for poll in polls] == [["LDG", "BAR", "BRA"]]
    assert code.products(loop, 4) == (1, 16 * 8 * 16 * 4, 0, 1)


def test_what_a_parted_warp_would_do_is_not_counted():
    """Behind BRA.DIV and before the label of BRA.CONV; the poll, which comes after both, is still one."""
    text = """
 /*f*/ MOV R0, RZ ;
.L_x_7:
 /*0*/ STG.E.STRONG.GPU [R6.64], R20 ;
.L_x_5:
 /*1*/ LDG.E.64.STRONG.SYS R48, [R52.64] ;
 /*2*/ BRA.CONV ~URZ, `(.L_x_0) ;
 /*3*/ SHFL.IDX PT, R49, R89, R3, 0x1f ;
 /*4*/ BRA `(.L_x_1) ;
.L_x_0:
 /*5*/ REDUX.MAX UR4, R55 ;
.L_x_1:
 /*6*/ @P4 BRA `(.L_x_5) ;
 /*7*/ BRA.DIV ~URZ, `(.L_x_6) ;
 /*8*/ HMMA.16816.F32 R52, R44, R48, RZ ;
.L_x_8:
 /*9*/ @P5 EXIT ;
 /*a*/ BRA `(.L_x_7) ;
.L_x_6:
 /*b*/ HMMA.16816.F32 R52, R44, R48, RZ ;
 /*c*/ BRA `(.L_x_8) ;
"""
    loop, polls = machine_code.Code(text).loops()
    assert [each.opcode.split(".")[0] for each in loop] == ["STG", "BRA", "HMMA", "EXIT", "BRA"]
    assert [[each.opcode.split(".")[0] for each in poll] for poll in polls] == [["LDG", "BRA", "REDUX", "BRA"]]


PTX = """
\tld.param.b64 \t%rd1, [kernel_param_0];
\tld.param.b64 \t%rd2, [kernel_param_1];
\tshl.b64 \t%rd3, %rd9, 1;
\tadd.s64 \t%rd4, %rd2, %rd3;
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
$L__BB0_1:
\tmov.b64 \t%rd6, %rd5;
\tadd.s64 \t%rd7, %rd1, %rd6;
\t@%p1 ld.global.v2.b32 { %r5, %r6 }, [ %rd7 + 0 ];
\t@%p1 ld.global.b16 { %rs1 }, [ %rd6 + 64 ];
\tcp.async.cg.shared.global [ %r9 + 0 ], [ %rd8 + 0 ], 0x10, %r10;
\tadd.s64 \t%rd8, %rd4, 128;
\t@!%p2 bra \t$L__BB0_3;
\tmov.b64 \t%rd5, %rd8;
\tbra.uni \t$L__BB0_1;
$L__BB0_3:
\tret;
"""


def test_weights_loaded_again_are_told_from_inputs():
    """In the loop 8 + 2 + 16 bytes: the first from both arguments, the others from the second alone, round the loop."""
    assert machine_code.Ptx(PTX).loaded(1) == (26, 26)
    assert machine_code.Ptx(PTX).loaded(0) == (26, 8)
    assert machine_code.Ptx(PTX.replace("%rd4, %rd2", "%rd4, %rd3")).loaded(1) == (26, 0)


def test_size_of_a_tensor_core_instruction_in_a_register():
    """64 x 16, K of 16, as Triton asks for with 0x4040010."""
    text = "\n /*0*/ UMOV UR4, 0x4040010 ;\n /*1*/ UTCHMMA gdesc[UR8], gdesc[UR6], tmem[UR5], tmem[UR7], idesc[UR4], UPT ;"
    code = machine_code.Code(text)
    assert code.products(code.instructions, 4) == (1, 64 * 16 * 16, (64 + 16) * 32, 0)


@pytest.mark.parametrize("rotated", [False, True])
def test_loop_over_steps(rotated):
    """Of a `for`, which the compiler turns so that it tests at its end, and of a `while`, which tests at its begin."""
    begin = " /*0*/ MOV R0, RZ ;\n"
    test = " /*1*/ @P0 BRA `(.L_x_9) ;\n"
    body = " /*2*/ HMMA.16816.F32 R0, R4, R8, R0 ;\n.L_x_2:\n /*3*/ LDG.E.STRONG.SYS R4, desc[UR6][R6.64] ;\n"
    body += " /*4*/ @P1 BRA `(.L_x_2) ;\n"
    if rotated:
        text = f"{begin}{test}.L_x_1:\n{body} /*5*/ @!P0 BRA `(.L_x_1) ;\n.L_x_9:\n /*6*/ EXIT ;\n"
    else:
        text = f"{begin}.L_x_1:\n{test}{body} /*5*/ BRA `(.L_x_1) ;\n.L_x_9:\n /*6*/ EXIT ;\n"
    loop, polls = machine_code.Code(text).loops()
    assert [each.opcode.split(".")[0] for each in loop] == ["HMMA", "BRA"] if rotated else ["BRA", "HMMA", "BRA"]
    assert [[each.opcode for each in poll] for poll in polls] == [["LDG.E.STRONG.SYS", "BRA"]]


def test_what_should_not_be_is_listed():
    row = {"arch": 90, "cell": "lstm", "dtype": "float16", "hidden": 8, "batch": 1, "direction": "forward", "training": True}
    row |= {"family": "persistent", "spills": 0, "stack_bytes": 0, "weights_reread_bytes": 0, "redundancy": 1.0, "variants": 1}
    assert texts.violations([row]) == []
    planted = {"spills": 2, "stack_bytes": 8, "weights_reread_bytes": 64, "redundancy": 2.0, "variants": 3}
    for name, amount in planted.items():
        (line,) = texts.violations([row | {name: amount}])
        assert line.startswith("sm_90 lstm float16 H=8 B=1 persistent training: ") and str(amount) in line
    assert texts.violations([row | {"family": "step", "weights_reread_bytes": 64}]) == []


@pytest.mark.parametrize(
    "folder, fresh, own", [("new/cache", False, True), ("new/cache", True, False), ("a file", False, False)]
)
def test_where_the_kernels_are_kept(folder, fresh, own, tmp_path, monkeypatch, capsys):
    """In Triton's cache. A home that cannot be written is told, and a temporary folder takes its place."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder / "triton"))
    with tables._cache(fresh):
        now = Path(os.environ["TRITON_CACHE_DIR"])
        assert now.is_dir() and (tmp_path in now.parents and now.parent.name == "cache") == own
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / folder / "triton")
    assert ("cannot be written (Not a directory)" in capsys.readouterr().err) == (folder == "a file")
