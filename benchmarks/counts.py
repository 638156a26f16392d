"""What one compiled kernel does in a time step: counted in its machine code, set against what its plan needs, and predicted.

Rows are flat dicts; docs/static.md says what each key means.
"""

from __future__ import annotations

import math
import re

from triton.compiler import CompiledKernel

from benchmarks import machine_code
from benchmarks.machine_code import loaded, tally
from rnnfast.kernels.cells import Cell
from rnnfast.kernels.persistent import model
from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan
from rnnfast.kernels.plan import StepPlan

UNITS = ("HMMA", "HGMMA", "UTCHMMA")
GIGAHERTZ = {80: 1.41, 86: 1.695, 89: 2.52, 90: 1.755, 100: 1.85}  # of an SM, at most, by data sheets
WARPS_OF_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}

# The step kernels' model: microseconds that a launch costs the host in eager mode; clocks from one kernel's end to the next
# one's begin; clocks of one way to L2 and back.
HOST, START, TRIP = 5.0, 1800, 300


def code_of(built: CompiledKernel) -> dict:
    """What the machine code alone says; bytes are those that one program asks for with a full tile."""
    usage, text = machine_code.disassemble(built.asm["cubin"])
    registers, stack = machine_code.resources(usage)
    code = machine_code.Code(text)
    loop, polls = code.loops()
    threads = 32 * built.metadata.num_warps
    assert not tally(code.instructions, "UBLKCP", "UTMALDG"), "a bulk copy, whose bytes are not in the machine code"
    products = [at for at, each in enumerate(loop) if each.is_a(*UNITS)]
    tensor_core, multiplies, operands = code.products(loop, built.metadata.num_warps)
    first_try, retries = loaded(loop, True), sum(loaded(poll, True) for poll in polls)
    exchange = {
        f"{access} {width}"
        for access, pattern in (("ld.volatile", r"ld\.volatile"), ("st.cg", r"st\.global\.cg"))
        for width in re.findall(rf"{pattern}[\w.]*\.([bsuf]\d+)", built.asm["ptx"])
    }
    return {
        "compiled": built.hash[:12],
        "registers": registers,
        "stack_bytes": stack,
        "spills": tally(code.instructions, "LDL", "STL"),
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
        "instructions": len(loop),
        "instructions_beside_product": products[-1] - products[0] + 1 if products else 0,
        "barriers": tally(loop, "BAR"),
        "retry_instructions": sum(map(len, polls)),
        "retry_barriers": sum(tally(poll, "BAR") for poll in polls),
        "unit": loop[products[0]].opcode.split(".")[0] if products else "FFMA",
        "tensor_core_loop": tensor_core,
        "multiplies_loop": multiplies,
        "polled_bytes": (first_try or retries) * threads,  # a poll may have no first try of its own
        "loaded_bytes": loaded(loop, False) * threads,
        "shared_read_bytes": operands + threads * sum(each.bytes for each in loop if each.is_a("LDS", "LDSM")),
        "polls": len(polls),
        "poll": ",".join(sorted({each.opcode for poll in polls for each in poll if each.is_a("LDG") and each.strong})),
        "publish": ",".join(sorted({each.opcode for each in loop if each.is_a("STG") and each.strong})),
        "exchange": ", ".join(sorted(exchange)),
        "async_copies": tally(code.instructions, "LDGSTS") + built.asm["ttgir"].count("async_copy"),
        "cooperative": bool(built.metadata.launch_cooperative_grid),
    }


def resident(code: dict, limits: GpuLimits) -> int:
    """Programs that one SM can hold at once; each takes 1 KiB of shared memory more than it asked for."""
    registers = -(-code["registers"] // 8) * 8 * 32 * code["warps"]
    of_shared = (limits.shared_bytes + 1024) // (code["shared_bytes"] + 1024)
    return min(of_shared, limits.registers // registers, WARPS_OF_SM[limits.capability] // code["warps"])


def _tile_bytes(elements: int, itemsize: int, code: dict) -> int:
    """That a program asks for to load a tile: Triton lets the threads that are too many load what others load, too."""
    return max(elements, 32 * code["warps"]) * itemsize


def _product(code: dict, rows: int, batch_rows: int, columns: int, itemsize: int, repeats: int) -> dict:
    """The product of a step: (rows, columns) weights by (columns, batch_rows), `repeats` loops of the machine code.

    The least possible are whole instructions of the smallest kind: 16 rows of weights, 8 batch rows and 32 bytes of the
    summed axis.
    """
    whole = (16, 8, 32 // itemsize) if code["tensor_core_loop"] else (1, 1, 1)
    least = math.prod(-(-size // unit) * unit for size, unit in zip((rows, batch_rows, columns), whole, strict=True))
    done = code["multiplies_loop"] * repeats
    instructions = code["tensor_core_loop"] * repeats
    return {
        "tensor_core": instructions,
        "tensor_core_least": math.ceil(instructions * least / done),
        "redundancy": round(done / least, 3),
    }


def _terms(terms: dict[str, float], arch: int) -> dict:
    clocks = sum(terms.values())
    predicted = {"predicted_clocks": round(clocks), "predicted_us": round(clocks / GIGAHERTZ[arch] / 1000, 3)}
    return predicted | {f"term_{name}": round(amount) for name, amount in terms.items()}


def persistent_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool, plan: PersistentPlan, programs: list[int], limits: GpuLimits
) -> dict:
    """A row of a persistent kernel, of launches of `programs` one after another."""
    gate_rows = 1 << (cell.gates - 1).bit_length()
    weights = plan.BLOCK_H * (1 if backward else gate_rows)
    columns = plan.H_PAD * (cell.gates if backward else 1)
    tile = plan.BLOCK_B * plan.BLOCK_H
    # the most: a cell need not use all of it
    if backward:
        inputs = (2 + cell.saved) * _tile_bytes(tile, itemsize, code) + cell.carries_c * _tile_bytes(tile, 4, code)
    else:
        inputs = cell.gates * _tile_bytes(tile, 4, code)
    partial_bytes = 0 if plan.SPLIT == 1 else 2 * plan.SPLIT * weights * plan.BLOCK_B * 4  # half written, half read
    operand_bytes = max(0, code["shared_read_bytes"] - partial_bytes / 2)
    needed = plan.BLOCK_H * (1 if backward else cell.gates), H * (cell.gates if backward else 1)
    deep = columns / plan.SPLIT / (32 / itemsize)
    if not code["tensor_core_loop"]:
        arithmetic = model.plain_clocks(code["multiplies_loop"])
    elif code["unit"] == "HMMA":
        arithmetic = model.hmma_clocks(deep, code["tensor_core_loop"] / deep, code["warps"])
    else:
        arithmetic = model.wgmma_clocks(code["tensor_core_loop"])
    times = [
        model.step_time(
            sms=limits.sms,
            programs=count,
            gathered_bytes=code["polled_bytes"],
            weight_bytes=operand_bytes,
            arithmetic=arithmetic,
            partial_bytes=partial_bytes,
            barriers=code["barriers"],
            instructions=code["instructions"] - code["instructions_beside_product"],
        )
        for count in programs
    ]
    time = sum(times[1:], times[0])
    return (
        _product(code, needed[0], plan.BLOCK_B, needed[1], itemsize, 1)
        | {
            "programs": max(programs),
            "weights_reread_bytes": max(0, code["loaded_bytes"] - inputs) * sum(programs),
            "gathered_bytes": code["polled_bytes"] * sum(programs),
            "round_trips": code["polls"],
            "gather_bound": "l2" if max(programs) * model.PORT_BYTES > limits.sms * model.L2_BYTES else "port",
            "product_bound": "shared memory" if operand_bytes / model.SHARED_BYTES > arithmetic else "arithmetic",
        }
        | _terms({name: share * time.total for name, share in time.share().items()}, limits.capability)
    )


def step_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool, plan: StepPlan, programs: int, limits: GpuLimits
) -> dict:
    """A row of a step kernel. Its loop is over chunks of the summed axis; its model is that of `HOST`, `START` and `TRIP`,
    with the bytes and the product as in the persistent kernels' model, of which the slowest counts."""
    rows = plan.BLOCK_H * (1 if backward else cell.gates)
    columns = H * (cell.gates if backward else 1)
    chunks = -(-columns // plan.BLOCK_K)
    gathered = plan.BLOCK_B * plan.BLOCK_K * itemsize * chunks
    loads = code["loaded_bytes"] * chunks
    trips = -(-chunks // (plan.num_stages - 1)) + 1
    sharing = -(-programs // limits.sms)  # programs that one SM runs, at once or in turn
    if not code["tensor_core_loop"]:
        arithmetic = model.plain_clocks(code["multiplies_loop"])
    elif code["unit"] == "HMMA":
        arithmetic = model.hmma_clocks(1, code["tensor_core_loop"], code["warps"])
    else:
        arithmetic = model.wgmma_clocks(code["tensor_core_loop"])
    bound = {
        "loads": max(programs * loads / (model.L2_BYTES * limits.sms), sharing * loads / model.PORT_BYTES),
        "product": sharing * arithmetic * chunks,
        "issue": sharing * model.ISSUE * code["instructions"] * chunks,
    }
    slowest = max(bound, key=lambda name: bound[name])
    device = {"start": float(START), "trips": float(TRIP * trips), slowest: bound[slowest]}
    host = HOST * GIGAHERTZ[limits.capability] * 1000 - sum(device.values())
    terms = device | ({"host": host} if host > 0 else {})
    return (
        _product(code, rows, plan.BLOCK_B, columns, itemsize, chunks)
        | {
            "programs": programs,
            "weights_reread_bytes": max(0, loads - gathered) * programs,
            "gathered_bytes": gathered * programs,
            "round_trips": trips,
            "gather_bound": "",
            "product_bound": "",
        }
        | _terms(terms, limits.capability)
    )
