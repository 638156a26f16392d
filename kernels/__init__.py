"""Triton kernels of rnnfast. Installed as ``rnnfast.kernels``; imports Triton and the standard library only."""

if __name__ != "rnnfast.kernels":
    raise ImportError(
        f"these kernels install as rnnfast.kernels, not as {__name__!r}: run `pip install .` and import rnnfast.kernels"
    )

from rnnfast.kernels import cells, dropout, gates, persistent, plan, step

__all__ = ["cells", "dropout", "gates", "persistent", "plan", "step"]
