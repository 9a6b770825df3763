"""What a caller asks for: sampling options, decoder options, and the request itself. Validated on construction."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dfastllm.core.check import require
from dfastllm.core.speculative import SpeculativeParams

__all__ = ["Cache", "DecodeParams", "Request", "SamplingParams"]

Cache = Literal["none", "prefix", "dual", "windowed"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. vLLM's field names and defaults. One order everywhere: penalties -> logit_bias (and
    allowed_token_ids, min_tokens) -> temperature -> top_k -> top_p -> min_p -> draw.

    temperature 0 is greedy. top_k 0 or -1, top_p 1, min_p 0 are off. `max_tokens` bounds the new tokens; a diffusion
    canvas is it rounded up to the block, and what lies beyond it is not part of the output.
    `logprobs` n: record the chosen token and the n best at each position. Raises ValidationError naming the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float):
                require(math.isfinite(value), f"{f.name} must be finite, got {value}.", f.name)
        require(self.n >= 1, f"n must be at least 1, got {self.n}.", "n")
        for name in ("presence_penalty", "frequency_penalty"):
            v = getattr(self, name)
            require(-2.0 <= v <= 2.0, f"{name} must be in [-2, 2], got {v}.", name)
        require(
            self.repetition_penalty > 0,
            f"repetition_penalty must be > 0, got {self.repetition_penalty}.",
            "repetition_penalty",
        )
        require(self.temperature >= 0, f"temperature must be >= 0, got {self.temperature}.", "temperature")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}.", "top_p")
        require(self.top_k >= -1, f"top_k must be >= -1 (0 or -1: off), got {self.top_k}.", "top_k")
        require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}.", "min_p")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens")
        require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be in [0, max_tokens={self.max_tokens}], got {self.min_tokens}.",
            "min_tokens",
        )
        require(
            self.logprobs is None or 0 <= self.logprobs <= 20,
            f"logprobs must be in [0, 20], got {self.logprobs}.",
            "logprobs",
        )
        require(all(self.stop), "stop strings must not be empty.", "stop")
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids must not be empty.",
            "allowed_token_ids",
        )
        for token, bias in self.logit_bias.items():
            require(
                -100 <= bias <= 100, f"logit_bias of token {token} must be in [-100, 100], got {bias}.", "logit_bias"
            )


@dataclass(frozen=True)
class DecodeParams:
    """How positions of a canvas are unmasked: rule x cache x block. Ignored by no one: an autoregressive model refuses
    a request that sets it.

    rule          a name from the decode registry; None: chosen from `threshold` / `factor`, else "schedule".
    cache         none | prefix | dual | windowed (masked diffusion); a block-diffusion model
                  keeps exact K,V and takes None only.
    steps         minimum rate: each block commits at least ceil-fair shares over steps * block / canvas denoise steps.
    block_length  canvas tokens per block; None: the model's own block (block diffusion) or 32.
    remasking     order of the fixed schedule: low_confidence | random | entropy | margin.
    threshold     confidence of the threshold rule (and of the rules that have one).
    factor        of the factor rule; overrides threshold.
    options       further options of the chosen rule by its own documented names (gamma, alg_temp, window, ...);
                  an unknown name is refused at admission.
    early_stop    end as soon as a stable EOS has no mask before it (lossless; a revising rule ends with its block).
    provisional   report best guesses of still-masked positions each step (costs head rows nothing, display only).
    """

    rule: str | None = None
    cache: Cache | None = None
    steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    early_stop: bool = True
    provisional: bool = False

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}.", "steps")
        require(
            self.block_length is None or self.block_length >= 1,
            f"block_length must be at least 1, got {self.block_length}.",
            "block_length",
        )
        require(
            self.threshold is None or 0 < self.threshold <= 1,
            f"threshold must be in (0, 1], got {self.threshold}.",
            "threshold",
        )
        require(
            self.factor is None or (math.isfinite(self.factor) and self.factor > 0),
            f"factor must be > 0, got {self.factor}.",
            "factor",
        )
        require(
            self.cache in (None, "none", "prefix", "dual", "windowed"),
            f"cache must be none, prefix, dual or windowed, got {self.cache!r}.",
            "cache",
        )
        require(
            self.remasking in ("low_confidence", "random", "entropy", "margin"),
            f"remasking must be low_confidence, random, entropy or margin, got {self.remasking!r}.",
            "remasking",
        )


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `suffix` asks for infilling: prompt and suffix are fixed, the canvas lies between.

    priority: lower runs first. arrival: seconds on time.monotonic(). timeout: seconds from arrival, None for none.
    decode None on a diffusion model means its defaults. speculative None means the engine's default.
    cache_salt: requests share the K,V of a common beginning only with those of the same salt (a tenant's secret).
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decode: DecodeParams | None = None
    suffix: tuple[int, ...] = ()
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)
    timeout: float | None = None
    speculative: SpeculativeParams | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt must hold at least one token, got none.", "prompt")
        require(self.timeout is None or self.timeout > 0, f"timeout must be > 0 s, got {self.timeout}.", "timeout")
