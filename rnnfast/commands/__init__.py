"""The commands of the program `rnnfast` and what they share: `rnnfast tune`, `rnnfast.tune` and `rnnfast doctor`."""
