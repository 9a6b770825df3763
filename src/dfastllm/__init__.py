"""dfastllm: masked-diffusion and autoregressive language models in one packed batch.

Every name is loaded on first use: importing the package costs milliseconds and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfastllm.compat import (
        APDConfig,
        APDDecoder,
        AsyncScheduler,
        DiffusionConfig,
        DiffusionGenerator,
        GenerationMode,
        GenerationResult,
        ModelRegistry,
        Request,
        RequestState,
        Scheduler,
        SchedulerConfig,
        SchedulerStats,
        StreamChunk,
        create_generator,
        create_scheduler,
    )
    from dfastllm.core import DecodeParams, FinishReason, SamplingParams, StepEvent, Usage
    from dfastllm.engine import Engine, EngineConfig
    from dfastllm.errors import (
        AuthenticationError,
        CancelledError,
        CheckpointError,
        ContextLengthError,
        DFastLLMError,
        GenerationError,
        ModelLoadError,
        ModelNotFoundError,
        NotReadyError,
        PayloadTooLargeError,
        QueueFullError,
        RateLimitError,
        RequestNotFoundError,
        TimeoutError,
        TokenizerError,
        UnsupportedError,
        ValidationError,
    )
    from dfastllm.llm import LLM, Completion, RequestOutput
    from dfastllm.text import Tokenizer

__version__ = "0.1.0"

_ROOMS = {
    "core": "DecodeParams FinishReason SamplingParams StepEvent Usage",
    "engine": "Engine EngineConfig",
    "errors": "AuthenticationError CancelledError CheckpointError ContextLengthError DFastLLMError GenerationError "
    "ModelLoadError ModelNotFoundError NotReadyError PayloadTooLargeError QueueFullError RateLimitError "
    "RequestNotFoundError TimeoutError TokenizerError UnsupportedError ValidationError",
    "compat": "APDConfig APDDecoder AsyncScheduler DiffusionConfig DiffusionGenerator GenerationMode "
    "GenerationResult ModelRegistry Request RequestState Scheduler SchedulerConfig SchedulerStats StreamChunk "
    "create_generator create_scheduler",
    "llm": "LLM Completion RequestOutput",
    "text": "Tokenizer",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [
    "LLM",
    "APDConfig",
    "APDDecoder",
    "AsyncScheduler",
    "AuthenticationError",
    "CancelledError",
    "CheckpointError",
    "Completion",
    "ContextLengthError",
    "DFastLLMError",
    "DecodeParams",
    "DiffusionConfig",
    "DiffusionGenerator",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "GenerationError",
    "GenerationMode",
    "GenerationResult",
    "ModelLoadError",
    "ModelNotFoundError",
    "ModelRegistry",
    "NotReadyError",
    "PayloadTooLargeError",
    "QueueFullError",
    "RateLimitError",
    "Request",
    "RequestNotFoundError",
    "RequestOutput",
    "RequestState",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StepEvent",
    "StreamChunk",
    "TimeoutError",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedError",
    "Usage",
    "ValidationError",
    "__version__",
    "create_generator",
    "create_scheduler",
]


def __getattr__(name: str) -> Any:
    room = _HOME.get(name)
    if room is None:
        raise AttributeError(f"module 'dfastllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dfastllm.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
