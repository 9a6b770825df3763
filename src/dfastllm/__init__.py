"""dfastllm: masked-diffusion and autoregressive language models in one packed batch.

Every name is loaded on first use: importing the package costs milliseconds and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfastllm.core import DecodeParams, SamplingParams
    from dfastllm.errors import (
        DFastLLMError,
        GenerationError,
        ModelLoadError,
        ModelNotFoundError,
        QueueFullError,
        TimeoutError,
        ValidationError,
    )

__version__ = "0.1.0"

_ROOMS = {
    "dfastllm.core": ("DecodeParams", "SamplingParams"),
    "dfastllm.errors": (
        "DFastLLMError",
        "GenerationError",
        "ModelLoadError",
        "ModelNotFoundError",
        "QueueFullError",
        "TimeoutError",
        "ValidationError",
    ),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "DFastLLMError",
    "DecodeParams",
    "GenerationError",
    "ModelLoadError",
    "ModelNotFoundError",
    "QueueFullError",
    "SamplingParams",
    "TimeoutError",
    "ValidationError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    room = _HOME.get(name)
    if room is None:
        raise AttributeError(f"module 'dfastllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
