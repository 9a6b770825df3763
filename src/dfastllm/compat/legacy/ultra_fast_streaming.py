"""Deprecated: use dfastllm.DiffusionGenerator.generate_stream with DiffusionConfig(mode='streaming')."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import DiffusionConfig, DiffusionGenerator, GenerationMode
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["UltraFastConfig", "UltraFastStreamer"]

deprecated_module(__name__, "dfastllm.DiffusionGenerator.generate_stream with DiffusionConfig(mode='streaming')")


@deprecated("DiffusionConfig(mode='streaming')")
@dataclass(frozen=True)
class UltraFastConfig(DiffusionConfig):
    mode: GenerationMode | str = GenerationMode.STREAMING


@deprecated("DiffusionGenerator.generate_stream with DiffusionConfig(mode='streaming')")
class UltraFastStreamer(DiffusionGenerator):
    default_config = DiffusionConfig(mode=GenerationMode.STREAMING)
