"""Chooses what runs a call: the backend, the family of kernels and its plan."""
