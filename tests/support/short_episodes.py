"""An environment of reinforcement learning that ends after three steps. It needs gymnasium."""

from typing import Any

import gymnasium
import numpy as np


class ShortEpisodes(gymnasium.Env):
    """Observations are normal. The reward is 1 for the action that the sign of the last observation's first number names."""

    observation_space = gymnasium.spaces.Box(-10, 10, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(int(action) == int(self.seen[0] > 0))
        self.left -= 1
        return self._observe(), reward, self.left == 0, False, {}

    def _observe(self) -> np.ndarray:
        self.seen = self.np_random.standard_normal(3).astype(np.float32)
        return self.seen
