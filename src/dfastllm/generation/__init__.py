"""The documents' Python API over the one engine: DiffusionGenerator, Scheduler, APDDecoder, ModelRegistry.

Everything here turns its options into core.SamplingParams and core.DecodeParams and lets an engine run them. No forward
passes, no decoding loop, no rules of its own.
"""

from dfastllm.generation.apd import APDConfig, APDDecoder
from dfastllm.generation.config import DiffusionConfig, GenerationMode, GenerationResult, StreamChunk
from dfastllm.generation.generator import DiffusionGenerator, create_generator
from dfastllm.generation.queueing import Request, RequestState, SchedulerConfig, SchedulerStats
from dfastllm.generation.registry import ModelRegistry
from dfastllm.generation.scheduler import AsyncScheduler, Scheduler, create_scheduler

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
