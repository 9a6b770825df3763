"""The packed forward on its plain torch twins, in a process that has the native kernels."""

from __future__ import annotations

import pytest

__all__ = ["without_native"]

# Modules of a forward that ask for the native kernels.
MODULES = ("models.packed", "models.adapted", "kernels.linear", "kernels.attention", "engine.runners.native")


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone no module of a forward finds the native kernels."""
    for module in MODULES:
        monkeypatch.setattr(f"dfastllm.{module}.native", lambda: None)
