"""Deprecated: use dfastllm.DiffusionGenerator with DiffusionConfig(mode='fast')."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import DiffusionConfig, DiffusionGenerator, GenerationMode
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["FastDiffusionConfig", "FastDiffusionGenerator"]

deprecated_module(__name__, "dfastllm.DiffusionGenerator with DiffusionConfig(mode='fast')")


@deprecated("DiffusionConfig(mode='fast')")
@dataclass(frozen=True)
class FastDiffusionConfig(DiffusionConfig):
    mode: GenerationMode | str = GenerationMode.FAST


@deprecated("DiffusionGenerator with DiffusionConfig(mode='fast')")
class FastDiffusionGenerator(DiffusionGenerator):
    default_config = DiffusionConfig(mode=GenerationMode.FAST)
