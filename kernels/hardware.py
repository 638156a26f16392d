"""Clocks, latencies and rates of NVIDIA GPUs, each with its source. This project has measured none of them.

One table serves the plans' model of a time step, the predictions of `benchmarks.static` and the floors of
`benchmarks.roofline`, so that they can be compared.

Latencies are in SM clocks, rates in bytes an SM clock, as their sources say them or converted at the clock of the source.
`GHZ` turns a sum of clocks into time, for predictions and floors alike. It is the highest clock that the data sheet allows,
for two reasons: a floor must lie below every program, and a recurrence waits more than it computes, so that it draws too
little power for the GPU to lower its clock.
"""

GHZ = {  # highest SM clock; NVIDIA's data sheets and `nvidia-smi -q -d CLOCK`
    "A100": 1.41,
    "H100": 1.98,
    "H200": 1.98,
    "RTX 3090": 1.695,
    "RTX 4090": 2.52,
    "B200": 1.965,
}
SLOWEST_GHZ = min(GHZ.values())
MEMORY_GB = {  # GB/s of its memory; data sheets of A100 (80 GB SXM), H100 (SXM5), H200, an eighth of DGX B200; whitepapers
    "A100": 2039,
    "H100": 3350,
    "H200": 4800,
    "RTX 3090": 936,
    "RTX 4090": 1008,
    "B200": 8000,
}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64}  # an SM holds at most, by compute capability (CUDA programming guide)
REGISTER_BYTES = 256 << 10  # an SM's register file, all GPUs above (CUDA programming guide)

# Latencies in clocks
L2_TRIP = 300  # a load that hits L2. H100 SXM: 295 from the near half, 470 from the far one (arXiv 2607.19922); H800: 258, 414
MEMORY_TRIP = 600  # a load that misses L2. H100: about 480 on an idle GPU (arXiv 2402.13499); on a busy one an estimate
HOP = 1100  # a word from SM to SM through L2, store and load. H800: 1110, which is 632 ns at 1.755 GHz (arXiv 2501.12084 v2)
CLUSTER_HOP = 180  # the same through distributed shared memory, the fastest way known. H100: 180 (arXiv 2402.13499)
BARRIER = 35  # of 4 to 8 warps that arrive together. B300: 37 for 8 warps (notes of others); an estimate
LAUNCH = 1800  # from the end of one kernel to the begin of the next in a stream; an estimate
LAUNCH_HOST_US = 5.0  # microseconds, not clocks: a launch costs the host in eager mode; an estimate
PROLOGUE = 1800  # a kernel of many steps, from its begin to its first step, besides its weights; an estimate
CLEAR = 2700  # a kernel that fills the exchange of a chunk, some MB, besides its start; an estimate
PRODUCT = 5400  # a matrix product of a chunk, besides its start and its arithmetic: 3 us on an H100; an estimate
PRODUCT_HOST_US = 10.0  # microseconds of the host for a view and a product through PyTorch; an estimate

# Rates in bytes a clock
PORT_BYTES = 64  # L2 into one SM at most (CUDA programming guides)
L2_BYTES = 24  # L2 into one SM while all SMs read. H100: 5.5 TB/s over 132 SMs at 1.755 GHz; an estimate
MEMORY_BYTES = 14  # memory, a share of one SM. H100: 3.35 TB/s over 132 SMs at 1.755 GHz (data sheet)
SHARED_BYTES = 128  # shared memory of an SM (CUDA programming guide)

# Arithmetic in clocks
ISSUE = 2  # an instruction of one warp among few: its result takes 4 to 6 clocks, half of which nothing waits for; an estimate
WGMMA = 18  # an HGMMA: 64 rows of 128 bytes from shared memory over 4 tensor cores are 16 clocks, and 2 between two
HMMA_LATENCY = 33  # HMMA.16816 that waits for the one before. A100, as published (arXiv 2206.02874)
HMMA_ISSUE = 8  # HMMA.16816 that waits for its turn. A100: 8; H100: 6 or 7 (arXiv 2402.13499)
FMAS = 128  # multiply-adds of float32 an SM and clock (data sheets)


def gigahertz(name: str) -> float:
    """The highest SM clock of the GPU that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; of one that `GHZ` does not
    have, the slowest of these."""
    return next((clock for known, clock in GHZ.items() if known in name), SLOWEST_GHZ)


def memory_clocks(bytes: float, name: str) -> float:
    """Clocks that memory takes for so many bytes, by the data sheet, on the GPU that a driver calls `name`; on one that
    `MEMORY_GB` does not have, by the least of these."""
    rate = next((rate for known, rate in MEMORY_GB.items() if known in name), min(MEMORY_GB.values()))
    return bytes / rate * gigahertz(name)
