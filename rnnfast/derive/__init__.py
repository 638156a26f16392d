"""From a cell in plain PyTorch to the two Triton functions of it that the kernels call (docs/deriving.md).

`definition` has what a user writes a cell with. `registry` derives a cell and gives it a name that the operators know. Between
them: `recording` runs the cell and its derivative and has an expression for each tensor, with `operators` and `expressions`;
`saving` decides what forward saves; `printing` writes the source; `verify` compares it with autograd; `cache` keeps it.
"""
