"""Counts what one compiled kernel does in a time step, compares it with what its plan needs, and predicts the time.

A row is a flat dict. docs/static.md says what each key means. `rnnfast.kernels.hardware` has the constants of the predictions.
"""

import math
import re

from triton.compiler import CompiledKernel

from benchmarks.static import machine_code
from benchmarks.static.machine_code import loaded, tally
from rnnfast.kernels import hardware
from rnnfast.kernels.cells import Cell
from rnnfast.kernels.one_program import cost
from rnnfast.kernels.one_program.plan import OneProgramPlan
from rnnfast.kernels.persistent import cost_model
from rnnfast.kernels.persistent.plan import GpuLimits, PersistentPlan
from rnnfast.kernels.scan.plan import ScanPlan, cell_bytes
from rnnfast.kernels.step.plan import StepPlan

UNITS = ("HMMA", "HGMMA", "UTCHMMA")


def code_of(built: CompiledKernel) -> dict:
    """The figures that follow from the machine code. Bytes are those that one program with a full tile loads or stores."""
    registers, stack, text = machine_code.disassemble(built.asm["cubin"])
    code = machine_code.Code(text)
    loop, polls = code.loops()
    threads = 32 * built.metadata.num_warps
    assert not tally(code.instructions, "UBLKCP", "UTMALDG"), "a bulk copy, whose bytes are not in the machine code"
    products = [at for at, each in enumerate(loop) if each.is_a(*UNITS)]
    names = [name for name in built.src.fn.arg_names if built.src.signature[name] != "constexpr"]
    in_ptx, weights = machine_code.Ptx(built.asm["ptx"]).loaded(names.index("w_ptr") if "w_ptr" in names else -1)
    in_code = loaded(loop, False)
    product = code.products(loop, built.metadata.num_warps)
    polled = sorted((loaded(poll, True) * threads for poll in polls), reverse=True)
    exchange = {
        f"{access} {width}"
        for access, pattern in (
            ("ld.volatile", r"ld\.volatile"),
            ("ld.relaxed.gpu", r"ld\.relaxed\.gpu"),
            ("st.cg", r"st\.global\.cg"),
            ("st.relaxed.gpu", r"st\.relaxed\.gpu"),
        )
        for width in re.findall(rf"{pattern}[\w.]*\.([bsuf]\d+)", built.asm["ptx"])
    }
    first = sum(map(len, polls)) if "ld.relaxed" in built.asm["ptx"] else 0  # a try that is not before the loop of tries too
    published = [each.opcode for each in loop if each.is_a("STG") and each.strong]
    if first:
        for word in ("STG.E.STRONG.GPU", "STG.E.STRONG.SYS") * len(polls):  # of a program that gives up
            published.remove(word)
    opcodes = {
        "poll": sorted({each.opcode for poll in polls for each in poll if each.is_a("LDG") and each.strong}),
        "publish": sorted(set(published)),
    }
    return {
        "compiled": built.hash[:12], "registers": registers, "stack_bytes": stack,
        "spills": tally(code.instructions, "LDL", "STL"),
        "shared_bytes": built.metadata.shared, "warps": built.metadata.num_warps, "instructions": len(loop) + first,
        "instructions_beside_product": products[-1] - products[0] + 1 if products else 0,
        "barriers": tally(loop, "BAR"), "retry_instructions": sum(map(len, polls)),
        "retry_barriers": sum(tally(poll, "BAR") for poll in polls),
        "unit": loop[products[0]].opcode.split(".")[0] if products else "FFMA",
        "tensor_core_loop": product.instructions, "tensor_core_deep": product.deep, "multiplies_loop": product.multiplies,
        "polled_bytes": sum(polled), "largest_poll_bytes": max(polled, default=0), "loaded_bytes": in_code * threads,
        "weight_loaded_bytes": (weights + max(0, in_code - in_ptx)) * threads,  # and what the assembler added, if it did
        "shared_read_bytes": product.read_bytes + threads * sum(each.bytes for each in loop if each.is_a("LDS", "LDSM")),
        "polls": len(polls), **{name: ",".join(found) for name, found in opcodes.items()},
        "shared_written_bytes": threads * sum(each.bytes for each in loop if each.is_a("STS", "STSM")),
        "special_functions": tally(loop, "MUFU"), "exchange": ", ".join(sorted(exchange)),
        "async_copies": tally(code.instructions, "LDGSTS") + built.asm["ttgir"].count("async_copy"),
        "cooperative": bool(built.metadata.launch_cooperative_grid),
    }  # fmt: skip


def resident(code: dict, limits: GpuLimits) -> int:
    """Programs that one SM can hold at once. Each takes 1 KiB of shared memory more than it asked for."""
    registers = -(-code["registers"] // 8) * 8 * 32 * code["warps"]
    of_shared = (limits.shared_bytes + 1024) // (code["shared_bytes"] + 1024)
    return min(of_shared, limits.registers // registers, hardware.WARPS[limits.capability] // code["warps"])


def _product(code: dict, rows: int, batch_rows: int, columns: int, itemsize: int, repeats: int) -> dict:
    """The product of a step: (rows, columns) weights by (columns, batch_rows), `repeats` loops of the machine code.

    The least possible are whole instructions of the smallest kind: 16 rows of weights, 8 batch rows and 32 bytes of the
    summed axis.
    """
    whole = (16, 8, 32 // itemsize) if code["tensor_core_loop"] else (1, 1, 1)
    least = math.prod(-(-size // unit) * unit for size, unit in zip((rows, batch_rows, columns), whole, strict=True))
    done, instructions = code["multiplies_loop"] * repeats, code["tensor_core_loop"] * repeats
    found = {"tensor_core": instructions, "tensor_core_least": math.ceil(instructions * least / done)}
    return found | {"redundancy": round(done / least, 3)}


def _terms(terms: dict[str, float], gpu: str) -> dict:
    clocks = sum(terms.values())
    predicted = {"predicted_clocks": round(clocks), "predicted_us": round(clocks / hardware.GHZ[gpu] / 1000, 3)}
    return predicted | {f"term_{name}": round(amount) for name, amount in terms.items()}


def _arithmetic(code: dict) -> float:
    """Clocks of the product in the loop, by the model of the persistent kernels."""
    if not code["tensor_core_loop"]:
        return cost_model.plain_clocks(code["multiplies_loop"])
    if code["unit"] == "HMMA":
        deep = code["tensor_core_deep"]
        return cost_model.hmma_clocks(deep, code["tensor_core_loop"] / deep, code["warps"])
    return cost_model.wgmma_clocks(code["tensor_core_loop"])


def persistent_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool,
    plan: PersistentPlan, programs: list[int], limits: GpuLimits, B: int,
) -> dict:  # fmt: skip
    """A row of a persistent kernel, of launches of `programs` one after another for `B` batch rows of all members."""
    gate_rows = 1 << (cell.gates - 1).bit_length()
    rows = plan.BLOCK_H * (plan.PARTS if backward else gate_rows)
    needed_rows = plan.BLOCK_H * (plan.PARTS if backward else cell.gates)
    needed_columns = -(-H * (cell.gates if backward else 1) // plan.PARTS)
    blocks = 1 if not backward else cell.grads if plan.H_PAD == H else cell.gates  # blocks of units in a row of the exchange
    sum_bytes = 4 * plan.PARTS * plan.H_PAD if plan.PARTS > 1 else 0
    second_bytes = code["polled_bytes"] - code["largest_poll_bytes"]
    partial_bytes = 0 if plan.SPLIT == 1 else 2 * plan.SPLIT * rows * plan.BLOCK_B * 4  # half written, half read
    operand_bytes = max(0, code["shared_read_bytes"] - partial_bytes / 2)
    arithmetic = _arithmetic(code)
    clear = B * (blocks * plan.H_PAD * itemsize + sum_bytes)  # all of it before the first launch
    counted = {
        "gathered_bytes": code["largest_poll_bytes"], "weight_bytes": operand_bytes, "arithmetic": arithmetic,
        "partial_bytes": partial_bytes, "barriers": code["barriers"], "second_bytes": second_bytes,
        "instructions": code["instructions"] - code["instructions_beside_product"],
    }  # fmt: skip
    times = [
        cost_model.step_time(sms=limits.sms, programs=count, **counted, cleared_bytes=0 if number else clear)
        for number, count in enumerate(programs)
    ]
    time = sum(times[1:], times[0])
    row = {
        "programs": max(programs), "weights_reread_bytes": code["weight_loaded_bytes"] * sum(programs),
        "gathered_bytes": code["polled_bytes"] * sum(programs), "gathered_sum_bytes": second_bytes * sum(programs),
        "round_trips": code["polls"],
        "gather_bound": "l2" if max(programs) * hardware.PORT_BYTES > limits.sms * hardware.L2_BYTES else "port",
        "product_bound": "shared memory" if operand_bytes / hardware.SHARED_BYTES > arithmetic else "arithmetic",
    }  # fmt: skip
    product = _product(code, needed_rows, plan.BLOCK_B, needed_columns, itemsize, 1)
    return product | row | _terms({name: share * time.total for name, share in time.share().items()}, limits.name)


def one_program_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool,
    plan: OneProgramPlan, programs: int, limits: GpuLimits, B: int, training: bool,
) -> dict:  # fmt: skip
    """A row of a one-program kernel, of `programs` for `B` batch rows of all members."""
    rows, columns = (H, cell.gates * H) if backward else (cell.gates * H, H)
    time = cost.program_time(
        sms=limits.sms,
        programs=programs,
        warps=code["warps"],
        product=_arithmetic(code),
        instructions=code["instructions"] - code["tensor_core_loop"],
        special_functions=code["special_functions"],
        exchanged_bytes=code["shared_read_bytes"] + code["shared_written_bytes"],
        barriers=code["barriers"],
        bytes=cost.step_bytes(cell.gates, cell.saved, H, B, itemsize, backward, training, cell.carried),
    )
    row = {
        "programs": programs, "weights_reread_bytes": code["weight_loaded_bytes"] * programs, "gathered_bytes": 0,
        "gathered_sum_bytes": 0, "round_trips": 0, "gather_bound": "", "product_bound": "arithmetic",
    }  # fmt: skip
    product = _product(code, rows, plan.BLOCK_B, columns, itemsize, 1)
    return product | row | _terms({name: share * time.total for name, share in time.share().items()}, limits.name)


def scan_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool, plan: ScanPlan, limits: GpuLimits, rows: int, training: bool
) -> dict:
    """A row of a scan kernel for `rows` batch rows of all members. Its loop is over AHEAD steps. The model is that of
    `rnnfast.kernels.scan.plan`: the slowest of bytes, instructions and the trip to memory."""
    warps = rows * H / 32 / limits.sms / 4  # that share a scheduler, if all were resident
    moved = cell_bytes(cell.gates, cell.saved, cell.carried, itemsize, backward, training)
    bound = {
        "memory": hardware.memory_clocks(rows * H * moved, limits.name),
        "issue": max(hardware.ISSUE, warps) * code["instructions"] / plan.AHEAD,
        "trip": hardware.MEMORY_TRIP / plan.AHEAD,
    }
    slowest = max(bound, key=lambda name: bound[name])
    row = {
        "programs": math.prod(plan.grid(rows, H)), "weights_reread_bytes": 0, "gathered_bytes": 0, "gathered_sum_bytes": 0,
        "round_trips": 0, "gather_bound": "", "product_bound": "", "tensor_core": 0, "tensor_core_least": 0, "redundancy": 1.0,
    }  # fmt: skip
    return row | _terms({slowest: bound[slowest]}, limits.name)


def step_row(
    code: dict, cell: Cell, H: int, itemsize: int, backward: bool, plan: StepPlan, B: int, limits: GpuLimits, members: int,
    launches: float,
) -> dict:  # fmt: skip
    """A row of a step kernel for a batch of `B` rows of each of `members`.

    Its loop is over chunks of the summed axis. A step takes its launches, the trips to L2, and the slowest of bytes, product
    and instructions. Bytes and product are as in the model of the persistent kernels. In eager mode it takes at least the time
    that the launches cost the host. A cell that needs means over rows has a second launch, of which no more than that is
    counted.
    """
    rows = plan.BLOCK_H * (1 if backward else cell.gates)
    columns = H * (cell.gates if backward else 1)
    chunks = -(-columns // plan.BLOCK_K)
    programs = math.prod(plan.grid(B, H, members))
    gathered = plan.BLOCK_B * plan.BLOCK_K * itemsize * chunks
    loads = code["loaded_bytes"] * chunks
    trips = -(-chunks // (plan.num_stages - 1)) + 1
    sharing = -(-programs // limits.sms)  # programs that one SM runs, at once or in turn
    bound = {
        "loads": max(programs * loads / (hardware.L2_BYTES * limits.sms), sharing * loads / hardware.PORT_BYTES),
        "product": sharing * _arithmetic(code) * chunks,
        "issue": sharing * hardware.ISSUE * code["instructions"] * chunks,
    }
    slowest = max(bound, key=lambda name: bound[name])
    device = {"start": hardware.LAUNCH * launches, "trips": float(hardware.L2_TRIP * trips), slowest: bound[slowest]}
    host = hardware.LAUNCH_HOST_US * launches * hardware.GHZ[limits.name] * 1000 - sum(device.values())
    row = {
        "programs": programs, "weights_reread_bytes": code["weight_loaded_bytes"] * chunks * programs,
        "gathered_bytes": gathered * programs, "gathered_sum_bytes": 0, "round_trips": trips,
        "gather_bound": "", "product_bound": "",
    }  # fmt: skip
    terms = device | ({"host": host} if host > 0 else {})
    return _product(code, rows, plan.BLOCK_B, columns, itemsize, chunks) | row | _terms(terms, limits.name)
