"""Who runs a call, and how: what hinders a backend, what a GPU can do, what was measured, which kernels run."""
