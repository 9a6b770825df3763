"""Giving freed memory back to the system. Nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["return_freed"]


def _find() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc, or no libc to open
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim  # type: ignore[no-any-return]


_TRIM = _find()


def return_freed() -> None:
    """Ask the allocator to give free pages back, where it can be asked (glibc).

    Loading frees as much as it keeps, chunk by chunk in between, and glibc holds on to what is freed below the top of
    its heap: without this, a loaded model is resident almost twice.
    """
    if _TRIM is not None:
        _TRIM(0)
