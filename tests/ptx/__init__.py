"""Runs the kernels on a CPU as they were compiled for a GPU: their PTX, instruction by instruction.

Triton's interpreter runs what the kernels say. It never sees what the compiler makes of that: barriers and copies that it adds,
layouts, registers of tensor core products, loads that it moves. Here that is run.

What happens, in order:

1. `gpu.simulated_gpu` stands in for Triton's GPU driver. A layer is called as a user calls it, on CPU tensors. The host code
   chooses a plan, Triton compiles, and each launch comes here with its grid and arguments.
2. `parse` reads the PTX, `decode` makes a Python function of every instruction. What the functions compute is in `table`.
3. `machine` runs the grid on the tensors' own memory: all CTAs at once, one warp at a time, in an order drawn from a seed.
   Stores of one CTA are seen by the others late, and word by word in any order.
4. `memory` looks at each access: is it in bounds and aligned, has anybody written what is read, and is it ordered with those of
   other threads? `machine` notices when nobody goes on.
5. `layer` compares every output and gradient with the reference in float64, under the numerics contract.

`cases` lists the layers. `mistakes` lists changes of the PTX that must be noticed, and by what. ``python -m tests.ptx`` prints
both as tables; docs/compiled-tests.md says what the checks can see and what not.

An opcode that no kernel used so far raises `NotImplementedError` with its name: most are a line in `table`. A kernel with new
arguments needs nothing: they come from the launch.
"""
