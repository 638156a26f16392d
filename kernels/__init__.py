"""Triton kernels of rnnfast: the package ``rnnfast.kernels``, a link to this folder. It imports Triton alone."""

if "." not in __name__:
    # a second copy of every kernel would be compiled, and its plans would not be equal to the first's
    raise ImportError(f"import rnnfast.kernels: this folder is that package, not one named {__name__!r}")

from rnnfast.kernels import cells, dropout, persistent, recompute, step

__all__ = ["cells", "dropout", "persistent", "recompute", "step"]
