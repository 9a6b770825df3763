"""Deprecated: use dfastllm.Scheduler with SchedulerConfig(enable_speculative=True)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfastllm.compat import Scheduler, SchedulerConfig
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["EnhancedSpeculativeConfig", "EnhancedSpeculativeDecoder"]

deprecated_module(__name__, "dfastllm.Scheduler with SchedulerConfig(enable_speculative=True)")


@deprecated("SchedulerConfig(enable_speculative=True)")
@dataclass(frozen=True)
class EnhancedSpeculativeConfig(SchedulerConfig):
    enable_speculative: bool = True


@deprecated("Scheduler with SchedulerConfig(enable_speculative=True)")
class EnhancedSpeculativeDecoder(Scheduler):
    def __init__(self, config: SchedulerConfig | None = None, *args: Any, **options: Any) -> None:
        super().__init__(config or SchedulerConfig(enable_speculative=True), *args, **options)
