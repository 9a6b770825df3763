"""What the engine tells its callers after a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dfastllm.core.span import FinishReason, TokenLogprob
from dfastllm.core.tier import Tier
from dfastllm.core.value import value
from dfastllm.errors import DFastLLMError

__all__ = ["CanvasUpdate", "Finish", "StepEvent", "StepStats", "Usage"]


@value(frozen=True, slots=True)
class CanvasUpdate:
    """One denoise step as seen by a live display. Positions are relative to the canvas start (0 = first new token).

    commit: newly fixed; provisional: best guess of positions still masked; revise: fixed before, now another token or
    (token None) masked again; length: canvas tokens in all; masked: how many are still masked.
    """

    commit: Mapping[int, int]
    provisional: Mapping[int, int]
    revise: Mapping[int, int | None]
    block_done: bool
    length: int
    masked: int

    def apply(self, fixed: dict[int, int]) -> None:
        """Bring a viewer's canvas (position -> decided token) up to date with this step."""
        fixed.update(self.commit)
        for position, token in self.revise.items():
            if token is None:
                fixed.pop(position, None)
            else:
                fixed[position] = token


@dataclass(frozen=True, slots=True)
class Usage:
    """completion_tokens counts every token of the output: not the token that ended it, not the padding of a canvas, but
    an end-of-text token that `ignore_eos` kept."""

    prompt_tokens: int
    completion_tokens: int
    forwards: int  # nfe
    exactness: Tier
    queue_s: float = 0.0
    first_token_s: float | None = None  # from arrival
    total_s: float = 0.0
    cached_tokens: int = 0  # of the prompt, whose K,V were there already
    drafts: int = 0  # forwards that verified a draft
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()  # [i]: drafts of which at least i + 1 tokens stood

    @property
    def acceptance_length(self) -> float | None:
        """Tokens a verifying forward gave, its own one included: 1 + accepted / drafts. None without drafts."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def tokens_per_forward(self) -> float:
        return self.completion_tokens / self.forwards if self.forwards else 0.0


@dataclass(frozen=True, slots=True)
class Finish:
    """lora: the name of the adapter that it ran with, "" for none."""

    reason: FinishReason
    usage: Usage
    stop: str | int | None = None  # the stop string or token id that ended it
    error: DFastLLMError | None = None
    lora: str = ""


@value(frozen=True, slots=True)
class StepEvent:
    """Newly stable output, in order.

    Text that might still become a stop string, or an incomplete character, is held back, so the concatenated texts are
    exactly the result. An end token (EOS, stop token) is not part of `token_ids`. Every request ends with exactly one
    event that has `finish`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token_ids when asked for
    canvas: CanvasUpdate | None = None
    finish: Finish | None = None


@value(frozen=True, slots=True)
class StepStats:
    """Counters of one engine step, for subscribers (metrics, bench). Times in seconds."""

    model: str
    sequences: int
    rows: int
    wanted: int
    committed: int
    waiting: int
    running: int
    pages_used: int
    pages_total: int
    preempted: int
    seconds: float
    run_seconds: float
    draft_seconds: float = 0.0
    drafts: tuple[tuple[int, int], ...] = ()  # (drafted, accepted) of each draft verified in this step
    suppressed: int = 0  # sequences that could have had a draft and got none because it would not have paid
    uncaptured: bool = False  # it ran on a GPU op by op, for want of a graph that holds it
    prefix_queries: int = 0  # tokens of requests that got their first place, looked up in the shared K,V
    prefix_hits: int = 0  # those found there
    finished: tuple[Finish, ...] = field(default_factory=tuple)
    running_loras: tuple[str, ...] = ()  # names of the adapters of running requests, each once
    waiting_loras: tuple[str, ...] = ()  # and of those that wait
    max_loras: int = 0  # adapters that may be in memory
