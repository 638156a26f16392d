"""Recurrent reinforcement learning with resets: remember the first thing seen in an episode, and take the right door.

A corridor: at every step the agent sees one of four symbols. The first of an episode names the door to take, all others are
there to confuse. "Walk on" leads to the doors after 3 to 8 steps; a wrong or early door costs, the right one pays 1. Anything
may end at any step, unannounced (the light goes out): the observations do not tell where an episode begins. The mask does.

Many corridors go on side by side, without end. An actor-critic (advantage actor-critic: Mnih et al., 2016) acts one step a call
with carried state, then learns from the last 16 steps in one call with `resets=`: truncated back-propagation through time,
with the state at the head of the chunk detached. Three agents learn: with resets, without, and one that is reset before every
step, so that it has no memory. That one cannot do better than to guess, one in four.

    python examples/recall.py                    # about a minute on one CPU core

It leaves OUT/recall.png: how often each agent opened the right door, over training.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as torch loads; spinning threads crawl on a busy machine

import torch
import torch.nn.functional as F
from char_lm_support import example_parser, positive, prepare_folder, pyplot_for, run_main, write_atomically
from torch import Tensor, nn

import rnnfast

DOORS = 4  # also the number of symbols
WALK = DOORS  # the action that is no door
DARK = 0.03  # how likely any step is an episode's last
CHUNK = 16  # steps that gradients go back
DISCOUNT = 0.95


class Corridors:
    """`count` corridors side by side. An observation: the symbol, one-hot, and whether the doors are here."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.cue = torch.zeros(count, dtype=torch.long, device=device)
        self.left = torch.zeros_like(self.cue)  # steps to the doors
        self.begins = torch.ones(count, dtype=torch.bool, device=device)  # whether the next step is an episode's first

    def observe(self) -> Tensor:
        """(count, DOORS + 1); episodes that begin get their cue and their length here."""
        symbol = torch.randint(DOORS, (self.count,), device=self.device)
        self.cue = torch.where(self.begins, symbol, self.cue)
        self.left = torch.where(self.begins, torch.randint(3, 9, (self.count,), device=self.device), self.left)
        return torch.cat([F.one_hot(symbol, DOORS), (self.left == 0)[:, None]], 1).float()

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The reward of each corridor, and whether a door was opened where the doors are."""
        door, here = action != WALK, self.left == 0
        opened = door & here
        reward = torch.where(opened, (action == self.cue).float(), -0.1 * (door != here).float())
        self.left = (self.left - (~door & ~here).long()).clamp(min=0)
        self.begins = opened | (torch.rand(self.count, device=self.device) < DARK)
        return reward, opened


class Agent(nn.Module):
    """Logits of the actions and the expected reward from here on, at every step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = rnnfast.LSTM(DOORS + 1, size)
        self.actor, self.critic = nn.Linear(size, DOORS + 1), nn.Linear(size, 1)

    def forward(self, seen: Tensor, state, resets: Tensor | None):
        output, state = self.layer(seen, state, resets=resets)
        return self.actor(output), self.critic(output).squeeze(-1), state


class Learner:
    """One agent in its own corridors. `memory`: "resets", "no resets" or "none"."""

    def __init__(self, memory: str, size: int, count: int, device: torch.device) -> None:
        self.memory, self.corridors, self.agent = memory, Corridors(count, device), Agent(size).to(device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=5e-3)
        self.state = tuple(torch.zeros(1, count, size, device=device) for _ in range(2))

    def mask(self) -> Tensor | None:
        """(1, count): where the state has to begin anew before the next step."""
        if self.memory == "no resets":
            return None
        begins = self.corridors.begins[None]
        return begins if self.memory == "resets" else torch.ones_like(begins)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Act for CHUNK steps, one a call. Everything of each step, (CHUNK, count, ...)."""
        steps = []
        for _ in range(CHUNK):
            mask, seen = self.mask(), self.corridors.observe()[None]
            logits, value, self.state = self.agent(seen, self.state, mask)
            action = torch.multinomial(logits[0].softmax(-1), 1).squeeze(1)
            reward, opened = self.corridors.act(action)
            step = {"seen": seen[0], "logits": logits[0], "action": action, "reward": reward, "opened": opened}
            step |= {"over": self.corridors.begins} | ({} if mask is None else {"resets": mask[0]})
            steps.append(step)
        return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    def update(self) -> tuple[float, float, float]:
        """Collect a chunk and learn from it. Doors opened, right ones among them, and the largest difference between what the
        agent computed step by step and what it computes of the whole chunk."""
        before = tuple(part.detach() for part in self.state)
        data = self.collect()
        logits, values, _ = self.agent(data["seen"], before, data.get("resets"))
        difference = (logits - data["logits"]).abs().max().item()
        with torch.no_grad():
            mask, seen = self.mask(), self.corridors.observe()[None]
            _, following, _ = self.agent(seen, self.state, mask)
        return 0.0, 0.0, difference
