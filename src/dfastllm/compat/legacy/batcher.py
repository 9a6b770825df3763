"""Deprecated: use dfastllm.Scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.compat import Scheduler, SchedulerStats
from dfastllm.compat.legacy._deprecated import deprecated, deprecated_module

__all__ = ["BatchStats", "ContinuousBatcher"]

deprecated_module(__name__, "dfastllm.Scheduler")


@deprecated("SchedulerStats")
@dataclass
class BatchStats(SchedulerStats):
    pass


@deprecated("Scheduler")
class ContinuousBatcher(Scheduler):
    pass
