"""The kernels of a GPU, in Triton, and their twins in plain torch.

    laid        a step in one buffer, for kernels whose grids are fixed
    kv          K, V on a device
    weight      weights on a device
    plain       what every op computes, in plain torch
    ops         which implementation each op uses, and why

Importing this room imports no triton: a machine without it has the twins.
"""

from __future__ import annotations

__all__: list[str] = []
