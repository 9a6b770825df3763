"""Old module names, kept until dfastllm 2.0. Each warns, names its replacement, and delegates to it.

No behaviour of its own: configurations are DiffusionConfig or SchedulerConfig with another default, generators and
batchers are DiffusionGenerator and Scheduler.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "advanced_batcher",
    "batcher",
    "enhanced_speculative",
    "fast_diffusion",
    "speculative",
    "streaming_diffusion",
    "turbo_decoder",
    "ultra_fast_streaming",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'dfastllm.compat.legacy' has no attribute {name!r}")
    return importlib.import_module(f"dfastllm.compat.legacy.{name}")
