"""The request itself: one sequence to generate, and under which options (`dfastllm.options`)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dfastllm.core.check import require
from dfastllm.options import Cache, DecodeParams, RequestOptions, SamplingParams, SpeculativeParams

__all__ = ["Cache", "DecodeParams", "Request", "SamplingParams"]


@dataclass(frozen=True)
class Request(RequestOptions):
    """One sequence to generate. `suffix` asks for infilling: prompt and suffix are fixed, the canvas lies between.

    arrival      seconds on time.monotonic(); timeout counts from it.
    decode       None: nothing is asked of the canvas, if there is one.
    speculative  None: the engine's default.
    shown        special tokens that stay in the text although skip_special_tokens leaves out the others.
    priority, timeout, cache_salt: see `RequestOptions`.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decode: DecodeParams | None = None
    suffix: tuple[int, ...] = ()
    arrival: float = field(default_factory=time.monotonic)
    speculative: SpeculativeParams | None = None
    shown: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt must hold at least one token, got none.", "prompt")
        super().__post_init__()
