"""The documents' Python API over the one engine: DiffusionGenerator, Scheduler, APDDecoder, ModelRegistry.

Everything here turns its options into core.SamplingParams and core.DecodeParams and lets an engine run them. No forward
passes, no decoding loop, no rules of its own.
"""

from dfastllm.compat.apd import APDConfig, APDDecoder
from dfastllm.compat.config import DiffusionConfig, GenerationMode, GenerationResult, StreamChunk
from dfastllm.compat.generator import DiffusionGenerator, create_generator
from dfastllm.compat.queueing import Request, RequestState, SchedulerConfig, SchedulerStats
from dfastllm.compat.registry import ModelRegistry
from dfastllm.compat.scheduler import AsyncScheduler, Scheduler, create_scheduler

__all__ = [
    "APDConfig",
    "APDDecoder",
    "AsyncScheduler",
    "DiffusionConfig",
    "DiffusionGenerator",
    "GenerationMode",
    "GenerationResult",
    "ModelRegistry",
    "Request",
    "RequestState",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StreamChunk",
    "create_generator",
    "create_scheduler",
]
