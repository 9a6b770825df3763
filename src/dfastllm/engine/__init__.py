"""The engine: sequences, paged K,V, packing, the scheduler, the one loop, and the thread that turns it.

Knows spans and policies, never a decoder's rules, a model's name, HTTP or metrics (those subscribe to its step
stats)."""

from dfastllm.engine.config import EngineConfig
from dfastllm.engine.loop import Engine
from dfastllm.engine.worker import Stream, Worker

__all__ = ["Engine", "EngineConfig", "Stream", "Worker"]
