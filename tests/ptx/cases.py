"""The layers that run: a few in the default tests, many in the sweep."""

from __future__ import annotations

from itertools import product

from tests.ptx.group import GroupOfLayers
from tests.ptx.layer import Layer

FAMILIES = ("step", "persistent", "one_program")
CELLS = ("lstm", "gru", "rnn_tanh")

QUICK = (
    *(Layer(*choice, "float16", inference=choice[1] == "lstm") for choice in product(FAMILIES, CELLS)),
    Layer("persistent", "rnn_tanh", "float16", B=9, marked=True, inference=False),
    *(Layer("one_program", "lstm", "float16", B=9, rows=rows, marked=rows == 4, inference=False) for rows in (4, 8)),
    Layer("one_program", "gru", "float32", H=29, marked=True, inference=False),
    *(GroupOfLayers("one_program", kind) for kind in ("directions", "layers")),
    GroupOfLayers("persistent", "directions", H=32),  # which exchange in one tensor, side by side
    GroupOfLayers("persistent", "layers"),
)
SWEEP = (
    *(Layer(*choice) for choice in product(FAMILIES, (*CELLS, "rnn_relu"), ("bfloat16", "tf32", "float32"))),
    # two tiles of batch rows; in the persistent kernels, of the second no row runs
    *(Layer(*choice, B=9, marked=True) for choice in product(FAMILIES, CELLS, ("float16", "bfloat16", "tf32"))),
    *(Layer(*choice, "float16", B=9, T=5, marked=True, reverse=True) for choice in product(FAMILIES, CELLS)),
    *(Layer("one_program", cell, dtype, B=9, rows=rows) for cell in CELLS for dtype in ("bfloat16", "tf32") for rows in (4, 8)),
    *(Layer("one_program", cell, "float16", H=29, B=9, rows=8, marked=True) for cell in CELLS),
    # one row; odd sizes, which are padded and whose rows are not aligned; sizes whose sum the warps share
    *(Layer(*choice, "float16", B=1, T=1) for choice in product(FAMILIES, CELLS)),
    *(Layer(*choice, "float16", H=29, B=5, reverse=True) for choice in product(FAMILIES, CELLS)),
    *(Layer(*choice, "float16", H=128, B=17) for choice in product(FAMILIES, CELLS)),
)
LAYERS = {"quick": QUICK, "sweep": SWEEP, "none": ()}
