"""Values of the Scheduler: its configuration, a request and its life, and counters. No threads, no torch."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dfastllm import core
from dfastllm.compat.config import overridden
from dfastllm.core import DecodeParams, Kind, SamplingParams, SpeculativeParams
from dfastllm.errors import ValidationError
from dfastllm.options import changed

__all__ = ["Request", "RequestState", "SchedulerConfig", "SchedulerStats"]

DEPTH = 5


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes and rules of a Scheduler. Raises ValidationError naming the field.

    max_batch_size        sequences decoded together.
    max_tokens_per_batch  rows through the model in one step.
    max_kv_tokens         K,V positions of all sequences together. Batches are sized by it: a request waits until the
                          pages of its whole length are free beside what the running ones still need.
    max_queue_size        pending requests before submit raises QueueFullError.
    max_wait_time_ms      a request is handed to the engine after this time at the latest, or as soon as max_batch_size
                          are pending; 0: at once (the engine lets requests join between any two steps).
    scheduling_policy     priority: the lower value first, and waiting raises a request, so that none starves;
                          fcfs: in the order of submission.
    enable_speculative    lossless drafts: an autoregressive model verifies what a suffix tree proposes, a canvas model
                          runs guessed next steps of its schedule beside each step (option draft_steps; a request whose
                          decode options rule that out is refused). The tokens are those without.
    speculative_depth     most tokens, or steps, drafted at once; None: 5. Only with enable_speculative.
    """

    max_batch_size: int = 32
    max_tokens_per_batch: int = 2048
    max_wait_time_ms: float = 0.0
    scheduling_policy: str = "priority"
    enable_speculative: bool = False
    speculative_depth: int | None = None
    max_kv_tokens: int = 65536
    max_queue_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_tokens_per_batch", "max_kv_tokens", "max_queue_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValidationError(f"{name} must be a whole number of at least 1, got {value!r}.", param=name)
        if not (math.isfinite(self.max_wait_time_ms) and self.max_wait_time_ms >= 0):
            raise ValidationError(
                f"max_wait_time_ms must be >= 0, got {self.max_wait_time_ms!r}.", param="max_wait_time_ms"
            )
        if self.scheduling_policy not in ("priority", "fcfs"):
            raise ValidationError(
                f"scheduling_policy must be priority or fcfs, got {self.scheduling_policy!r}.",
                param="scheduling_policy",
            )
        if self.speculative_depth is not None and not self.enable_speculative:
            raise ValidationError("speculative_depth needs enable_speculative.", param="speculative_depth")
        depth = self.speculative_depth
        if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= 64):
            raise ValidationError(
                f"speculative_depth must be a whole number in [1, 64], got {depth!r}.", param="speculative_depth"
            )

    def speculative(self, kind: Kind) -> SpeculativeParams | None:
        """How requests on an autoregressive model draft; None: not at all."""
        if not self.enable_speculative or kind != "ar":
            return None
        return SpeculativeParams("suffix", num_speculative_tokens=self.speculative_depth or DEPTH)

    def drafting(self, decode: DecodeParams | None, kind: Kind) -> DecodeParams | None:
        """A canvas model's decoder options with drafts, where they are wanted and not asked for already."""
        if not self.enable_speculative or kind == "ar":
            return decode
        decode = decode or DecodeParams()
        options = {"draft_steps": self.speculative_depth or DEPTH, **decode.options}
        return changed(decode, options=options)


class RequestState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"  # its first result or denoise step has come
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass
class Request:
    """One request of a Scheduler, which alone moves `state`. Validated on construction.

    prompt_tokens  ids, or text, which is encoded on submission: a user's message in the model's chat template, where
                   it has one; with `raw` the text itself. priority: lower runs first;
    arrival_time   seconds on time.monotonic(). sampling: further options (seed, stop, top_p, ...); max_tokens and
    temperature above win over its own; None: the model's or the default of docs/options.md, resolved on submission.
    decode: how a canvas is denoised; None: the scheduler's. timeout: seconds from arrival.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    prompt_tokens: Sequence[int] | str = ()
    max_tokens: int | None = None
    temperature: float | None = None
    priority: int = 0
    arrival_time: float = field(default_factory=time.monotonic)
    state: RequestState = RequestState.PENDING
    sampling: SamplingParams | None = None
    decode: DecodeParams | None = None
    timeout: float | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        self.state = RequestState(self.state)
        if len(self.prompt_tokens) == 0:
            raise ValidationError("prompt_tokens must hold at least one token, got none.", param="prompt_tokens")
        self.params()

    @property
    def total_tokens(self) -> int:
        """Positions it may take: prompt and max_tokens. Submission encodes text and resolves an open max_tokens."""
        if isinstance(self.prompt_tokens, str):
            raise ValidationError(
                "the prompt is still text: its tokens are counted on submission.", param="prompt_tokens"
            )
        if self.max_tokens is None:
            raise ValidationError("max_tokens is open: it is resolved on submission.", param="max_tokens")
        return len(self.prompt_tokens) + self.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.state in (RequestState.COMPLETED, RequestState.CANCELLED, RequestState.FAILED)

    def params(self) -> SamplingParams:
        """The sampling options in full. Raises ValidationError."""
        return overridden(self.sampling, max_tokens=self.max_tokens, temperature=self.temperature)

    def for_engine(
        self, priority: int, decode: DecodeParams | None, speculative: SpeculativeParams | None
    ) -> core.Request:
        """The engine's form of it, decoded by `decode`. Raises ValidationError for what no engine takes."""
        ids = self.prompt_tokens
        if isinstance(ids, str):
            raise ValidationError("the prompt is still text.", param="prompt_tokens", hint="Encode it first.")
        return core.Request(
            self.request_id,
            tuple(ids),
            self.params(),
            decode,
            priority=priority,
            arrival=self.arrival_time,
            timeout=self.timeout,
            speculative=speculative,
        )


@dataclass
class SchedulerStats:
    """Counters since the start. A batch is one step of the engine; its tokens are those committed in it."""

    total_requests: int = 0
    completed_requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    total_batches: int = 0
    total_tokens: int = 0
    total_sequences: int = 0
    largest_batch: int = 0
    total_time_ms: float = 0.0
    preemptions: int = 0

    def record_batch(self, batch_size: int, tokens: int, time_ms: float) -> None:
        """Count one batch of `batch_size` sequences that committed `tokens` in `time_ms`. Raises ValidationError for
        an empty batch or negative numbers."""
        if batch_size < 1 or tokens < 0 or time_ms < 0:
            raise ValidationError(
                f"a batch has a sequence or more, and no negative numbers; got {batch_size}, {tokens}, {time_ms}.",
                param="batch_size",
            )
        self.total_batches += 1
        self.total_tokens += tokens
        self.total_sequences += batch_size
        self.largest_batch = max(self.largest_batch, batch_size)
        self.total_time_ms += time_ms

    @property
    def average_batch_size(self) -> float:
        return self.total_sequences / self.total_batches if self.total_batches else 0.0

    @property
    def average_batch_time_ms(self) -> float:
        return self.total_time_ms / self.total_batches if self.total_batches else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of stepping."""
        return self.total_tokens / self.total_time_ms * 1000 if self.total_time_ms else 0.0
