"""How the old names say that they are old."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["deprecated", "deprecated_module"]

Class = TypeVar("Class", bound=type)


def deprecated_module(name: str, replacement: str) -> None:
    """Warn whoever imports the module `name`."""
    warnings.warn(
        f"{name} is deprecated and will be removed in dfastllm 2.0; use {replacement}.",
        DeprecationWarning,
        stacklevel=3,
    )


def deprecated(replacement: str) -> Callable[[Class], Class]:
    """Class decorator: every construction warns and names `replacement`."""

    def mark(cls: Class) -> Class:
        target: Any = cls
        init = target.__init__

        @functools.wraps(init)
        def warn_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
            warnings.warn(
                f"{cls.__name__} is deprecated and will be removed in dfastllm 2.0; use {replacement}.",
                DeprecationWarning,
                stacklevel=2,
            )
            init(self, *args, **kwargs)

        target.__init__ = warn_and_init
        return cls

    return mark
