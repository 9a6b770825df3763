"""Deprecated: use dfastllm.DiffusionGenerator with DiffusionConfig(mode='streaming')."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import DiffusionConfig, DiffusionGenerator, GenerationMode
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["StreamingDiffusionConfig", "StreamingDiffusionGenerator"]

deprecated_module(__name__, "dfastllm.DiffusionGenerator with DiffusionConfig(mode='streaming')")


@deprecated("DiffusionConfig(mode='streaming')")
@dataclass(frozen=True)
class StreamingDiffusionConfig(DiffusionConfig):
    mode: GenerationMode | str = GenerationMode.STREAMING


@deprecated("DiffusionGenerator with DiffusionConfig(mode='streaming')")
class StreamingDiffusionGenerator(DiffusionGenerator):
    default_config = DiffusionConfig(mode=GenerationMode.STREAMING)
