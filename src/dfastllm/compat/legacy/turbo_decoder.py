"""Deprecated: use dfastllm.DiffusionGenerator with DiffusionConfig(mode='turbo')."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import DiffusionConfig, DiffusionGenerator, GenerationMode
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["TurboConfig", "TurboDecoder"]

deprecated_module(__name__, "dfastllm.DiffusionGenerator with DiffusionConfig(mode='turbo')")


@deprecated("DiffusionConfig(mode='turbo')")
@dataclass(frozen=True)
class TurboConfig(DiffusionConfig):
    mode: GenerationMode | str = GenerationMode.TURBO


@deprecated("DiffusionGenerator with DiffusionConfig(mode='turbo')")
class TurboDecoder(DiffusionGenerator):
    default_config = DiffusionConfig(mode=GenerationMode.TURBO)
