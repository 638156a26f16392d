"""What runs a call: `decide` makes the decision, `obstacles` knows what keeps the kernels from running here."""
