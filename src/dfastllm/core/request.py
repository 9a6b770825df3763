"""The request itself: one sequence to generate, and under which options (`dfastllm.options`)."""

from __future__ import annotations

import math
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
    tenant       whose request it is: tenants share the engine fairly, by `share`, their weight (`engine.fairness`).
    tenant_salt  parts its shared K,V from other tenants', beside `cache_salt`; a model that shares none takes it too.
    priority, timeout, cache_salt, lora: see `RequestOptions`.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decode: DecodeParams | None = None
    suffix: tuple[int, ...] = ()
    arrival: float = field(default_factory=time.monotonic)
    speculative: SpeculativeParams | None = None
    shown: tuple[int, ...] = ()
    tenant: str = ""
    share: float = 1.0
    tenant_salt: str = ""

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt must hold at least one token, got none.", "prompt")
        require(0 < self.share < math.inf, f"share must be a number above 0, got {self.share}.", "share")
        super().__post_init__()

    @property
    def salt(self) -> str:
        """What parts its shared K,V from those of other tenants and salts: two pairs of salts never make one text."""
        return repr((self.tenant_salt, self.cache_salt)) if self.tenant_salt else self.cache_salt
