"""Counts what a kernel compiled for an AMD GPU has, from its assembly. No model of these GPUs is known, so nothing is predicted.

The instructions are those of the whole text, each once, after the compiler has unrolled its loops.
"""

import re

from triton.compiler import CompiledKernel

STANDARD = (  # as in `benchmarks.static.table`
    ("step", ("lstm", "gru"), ("float16", "bfloat16", "float32"), (128, 256, 768, 1024), (16,)),
    ("one_program", ("lstm", "gru"), ("float16", "bfloat16", "float32"), (64,), (16,)),
)
COUNTS = {  # what is counted, by the names of instructions: a key of the row, and how they begin
    "matrix": ("v_mfma", "v_wmma"),
    "multiply_adds": ("v_fma", "v_pk_fma", "v_dot2"),
    "special_functions": ("v_exp", "v_rcp", "v_log", "v_div_f"),
    "loads": ("global_load", "buffer_load", "flat_load"),
    "stores": ("global_store", "buffer_store", "flat_store"),
    "shared_accesses": ("ds_read", "ds_write", "ds_load", "ds_store"),
    "branches": ("s_branch", "s_cbranch"),
    "barriers": ("s_barrier",),
}


def code_of(built: CompiledKernel) -> dict:
    """The figures of a kernel."""
    own = {"compiled": built.hash[:12], "warps": built.metadata.num_warps, "shared_bytes": built.metadata.shared}
    return own | counted(built.asm["amdgcn"])


def counted(assembly: str) -> dict:
    """The figures that `assembly` has, in the form that LLVM prints for an AMD GPU.

    registers: vector registers of a thread, with accumulators. spills: those of them that go to memory. stack_bytes: scratch of
    a thread. threads: of a warp.
    """
    opcodes = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)

    def stated(name: str) -> int:
        return int(re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE)[-1])

    return {
        "registers": stated("vgpr_count"),
        "scalar_registers": stated("sgpr_count"),
        "spills": stated("vgpr_spill_count"),
        "stack_bytes": stated("private_segment_fixed_size"),
        "threads": stated("wavefront_size"),
        "instructions": len(opcodes),
        **{name: sum(each.startswith(starts) for each in opcodes) for name, starts in COUNTS.items()},
    }
