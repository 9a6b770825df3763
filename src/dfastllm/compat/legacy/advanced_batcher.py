"""Deprecated: use dfastllm.Scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import Scheduler, SchedulerConfig
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["AdvancedBatcher", "AdvancedBatcherConfig"]

deprecated_module(__name__, "dfastllm.Scheduler")


@deprecated("SchedulerConfig")
@dataclass(frozen=True)
class AdvancedBatcherConfig(SchedulerConfig):
    pass


@deprecated("Scheduler")
class AdvancedBatcher(Scheduler):
    pass
