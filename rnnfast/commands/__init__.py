"""The commands of the program `rnnfast`. There is one: `rnnfast tune`."""
