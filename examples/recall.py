"""Recurrent reinforcement learning with resets: remember the first symbol of an episode, and take the right door.

The environment is a corridor. At every step the agent sees one of four symbols. The first symbol of an episode names the right
door, and all later symbols are random. The action "walk on" leads to the doors in 3 to 8 steps. The right door pays 1. Any door
ends the episode. Walking on at the doors, or choosing a door elsewhere, costs 0.1. At any step the light may go out, and a new
episode begins. The observations do not show this, but the mask of resets does.

Many corridors run side by side without end. An actor-critic (Mnih et al., 2016) acts one step a call and carries its state on.
Then it learns from the last 16 steps in one call with `resets=`. This is truncated back-propagation through time, which starts
from the detached carried state. Three agents learn: one with resets, one without, and one that is reset before every step. The
last one has no memory, so its best possible result is a guess: one right door in four.

    python examples/recall.py                    # about a minute on one CPU core

It writes OUT/recall.png: how often each agent took the right door during training.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that spin are slow on a busy CPU

import torch
import torch.nn.functional as F
from char_lm_support import example_parser, positive, prepare_folder, pyplot_for, run_main, write_atomically
from torch import Tensor, nn

import rnnfast

DOORS = 4  # also the number of symbols
WALK = DOORS  # the action "walk on"; the smaller numbers are the doors
DARK = 0.03  # probability that the light goes out at a step
CHUNK = 16  # steps between two updates, through which gradients go back
DISCOUNT = 0.95
MEMORIES = {
    "resets": "state that is reset at each new episode",
    "no resets": "state that is never reset",
    "no memory": "state that is reset before every step",
}


class Corridors:
    """`count` corridors side by side. When an episode is over, the next one begins at once.

    Attributes:
        seen: (count, DOORS + 1), the current observation: the symbol, one-hot, and whether the doors are here.
        begins: (count,), whether this is the first observation of an episode.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.cue = torch.zeros(count, dtype=torch.long, device=device)
        self.left = torch.zeros_like(self.cue)  # steps left to the doors
        self.begins = torch.ones(count, dtype=torch.bool, device=device)
        self._look()

    def _look(self) -> None:
        symbol = torch.randint_like(self.cue, DOORS)
        self.cue = torch.where(self.begins, symbol, self.cue)
        self.left = torch.where(self.begins, torch.randint_like(self.left, 3, 9), self.left)
        self.seen = torch.cat([F.one_hot(symbol, DOORS), (self.left == 0)[:, None]], 1).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step. Returns the reward and whether a door was taken, both (count,)."""
        door, here = action != WALK, self.left == 0
        taken = door & here
        reward = torch.where(taken, (action == self.cue).float(), -0.1 * (door != here).float())
        self.left = self.left - (~door & ~here).long()
        self.begins = taken | (torch.rand_like(reward) < DARK)
        self._look()
        return reward, taken


class Agent(nn.Module):
    """At every step, the logits of the actions and the expected discounted reward from there on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = rnnfast.LSTM(DOORS + 1, size)
        self.actor, self.critic = nn.Linear(size, DOORS + 1), nn.Linear(size, 1)

    def forward(self, seen: Tensor, state: tuple[Tensor, Tensor], resets: Tensor | None = None):
        output, state = self.layer(seen, state, resets=resets)
        return self.actor(output), self.critic(output).squeeze(-1), state


class Learner:
    """An agent with its own corridors. `memory` is a key of MEMORIES."""

    def __init__(self, memory: str, size: int, count: int, device: torch.device) -> None:
        self.memory, self.corridors, self.agent = memory, Corridors(count, device), Agent(size).to(device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=3e-3)
        self.state = tuple(torch.zeros(1, count, size, device=device) for _ in range(2))

    def resets(self) -> Tensor:
        """(count,): whether the state has to be reset before the next step."""
        begins = self.corridors.begins
        return {"resets": begins, "no resets": torch.zeros_like(begins), "no memory": torch.ones_like(begins)}[self.memory]

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Run one step from the carried state, set to zero where it has to be reset. Returns logits, value, next state."""
        state = tuple(part.masked_fill(self.resets()[:, None], 0) for part in self.state)
        logits, value, state = self.agent(self.corridors.seen[None], state)
        return logits[0], value[0], state

    def collect(self) -> dict[str, Tensor]:
        """Act for CHUNK steps, one a call. Returns what happened at each step, as tensors (CHUNK, count, ...)."""
        steps = []
        for _ in range(CHUNK):
            seen, resets = self.corridors.seen, self.resets()
            logits, _, self.state = self.look()
            action = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
            reward, taken = self.corridors.step(action)
            over = self.corridors.begins
            steps.append(dict(seen=seen, resets=resets, logits=logits, action=action, reward=reward, taken=taken, over=over))
        return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}

    def gains(self, data: dict[str, Tensor]) -> Tensor:
        """The discounted reward from each step to the end of its episode. The critic estimates what follows the chunk."""
        _, following, _ = self.look()
        gains = []
        for t in reversed(range(CHUNK)):
            following = data["reward"][t] + DISCOUNT * following * ~data["over"][t]
            gains.append(following)
        return torch.stack(gains[::-1])

    def update(self) -> tuple[int, int, float]:
        """Collect a chunk and learn from it.

        Returns:
            The number of doors taken, the number of right ones among them, and the largest difference between the logits of
            the loop (one step a call) and those of the whole chunk in one call.
        """
        before = self.state  # computed without gradients, so back-propagation ends here
        data = self.collect()
        logits, values, _ = self.agent(data["seen"], before, None if self.memory == "no resets" else data["resets"])
        difference = (logits - data["logits"]).abs().max().item()
        gains = self.gains(data)
        policy = torch.distributions.Categorical(logits=logits)
        acting = -((gains - values.detach()) * policy.log_prob(data["action"])).mean()
        loss = acting + 0.5 * (gains - values).square().mean() - 0.01 * policy.entropy().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.agent.parameters(), 0.5)
        self.optimizer.step()
        return int(data["taken"].sum()), int((data["reward"] == 1).sum()), difference


def train(learner: Learner, updates: int, every: int) -> tuple[list[float], float]:
    """Train. Returns the share of right doors among those taken, for each `every` updates, and the largest difference."""
    begun, furthest, curve, taken, right = time.perf_counter(), 0.0, [], 0, 0
    for update in range(1, updates + 1):
        more_taken, more_right, difference = learner.update()
        taken, right, furthest = taken + more_taken, right + more_right, max(furthest, difference)
        if update % every == 0:
            curve.append(right / max(taken, 1))
            if update % (5 * every) == 0:
                seconds = time.perf_counter() - begun
                print(
                    f"  update {update}/{updates}, {seconds:.0f} s: {taken} doors, the right one in {curve[-1]:.1%}", flush=True
                )
            taken = right = 0
    return curve, furthest


def draw(curves: dict[str, list[float]], every: int, path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for memory, curve in curves.items():
        axes.plot([every * (n + 1) for n in range(len(curve))], curve, label=MEMORIES[memory])
    axes.axhline(1 / DOORS, color="0.6", linestyle="--", label="a guess")
    axes.set(xlabel=f"updates ({CHUNK} steps in every corridor each)", ylabel="right doors among those taken", ylim=(0, 1.02))
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))
    pyplot.close(figure)


def run_program(argv: list[str] | None) -> None:
    parser = example_parser(__doc__, "recall.py", steps=600, out="out/recall")
    parser.add_argument("--size", type=positive(int), default=64, metavar="N", help="units (default: %(default)s)")
    parser.add_argument("--corridors", type=positive(int), default=64, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    prepare_folder(args.out)
    curves, every = {}, max(1, args.steps // 20)
    for memory, title in MEMORIES.items():
        torch.manual_seed(args.seed)
        learner = Learner(memory, args.size, args.corridors, args.device)
        if memory == "resets":
            chunk, resets = learner.corridors.seen.expand(CHUNK, -1, -1), learner.resets().expand(CHUNK, -1)
            print(rnnfast.explain(learner.agent.layer, chunk, learner.state, resets=resets))
        print(f"\n{title}:", flush=True)
        curves[memory], difference = train(learner, args.steps, every)
        print(f"  largest difference of logits, single steps compared with chunks in one call: {difference:.1e}")
    print("\nright doors among those taken, in the last twentieth of training:")
    for memory, curve in curves.items():
        print(f"  {MEMORIES[memory]:<44} {curve[-1]:6.1%}")
    print(f"  {'a guess, the best result without memory':<44} {1 / DOORS:6.1%}")
    draw(curves, every, args.out / "recall.png")
    print(f"wrote {args.out / 'recall.png'}")


def main(argv: list[str] | None = None) -> int:
    return run_main("recall.py", lambda: run_program(argv))


if __name__ == "__main__":
    sys.exit(main())
