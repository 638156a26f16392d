"""Scan kernels: cells without W_hh, whose units know nothing of one another. One launch runs many steps; nobody waits."""

from rnnfast.kernels.scan.launch import backward, forward

__all__ = ["backward", "forward"]
