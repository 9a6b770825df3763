"""Published wirings, one file each: how config.json and tensor names are read, the token ids, and the program of ops.

A file registers its families when it is imported, and every file of this folder is imported here: a new wiring is one
new file.
"""

from __future__ import annotations

import importlib
import pkgutil

__all__: list[str] = []

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
