"""Data of a distillation: lines of JSON, checked one by one, as samples and batches; and a generator of such sets.

`rows` reads and writes lines, `encode` makes tokens of them, `dataset` and `collate` hand them to a loop, `generate`
makes a set of the task mix. Asks no teacher and knows no loss. Names are loaded on first use, so that who only reads
lines needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "BadRow",
    "KDDataset",
    "Row",
    "RowEncoder",
    "RowFile",
    "collate_kd_batch",
    "to_rows",
    "write_rows",
]

_HOME = {
    "BadRow": "rows",
    "KDDataset": "dataset",
    "Row": "rows",
    "RowEncoder": "encode",
    "RowFile": "rows",
    "collate_kd_batch": "collate",
    "to_rows": "collate",
    "write_rows": "rows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dfastllm.distill.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dfastllm.distill.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
