from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class ScanPlan:
    BLOCK_B: int
    BLOCK_H: int
    AHEAD: int
    num_warps: int
    steps: int = 0

    def grid(self, B, H, members=1):
        return -(-B // self.BLOCK_B), -(-H // self.BLOCK_H), members
