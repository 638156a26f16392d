"""The commands that `rnnfast` knows besides its library: `rnnfast tune`."""
