"""What DiffusionGenerator is asked for and what it answers: modes, their presets, results. Values only, no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from enum import StrEnum
from typing import Any, TypeVar

from dfastllm.core import Cache, DecodeParams, FinishReason, ModelInfo, SamplingParams, Tier
from dfastllm.decode.presets import PRESETS
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.options import changed

__all__ = [
    "DiffusionConfig",
    "GenerationMode",
    "GenerationResult",
    "StreamChunk",
    "configure",
    "one_config",
    "overridden",
]

Config = TypeVar("Config")


class GenerationMode(StrEnum):
    """Presets over one decoder; see DiffusionConfig for what each sets."""

    STANDARD = "standard"  # fixed schedule, no cache: the model's plain algorithm
    FAST = "fast"  # dual cache, every confident token at once
    STREAMING = "streaming"  # small blocks, so the first text comes early; guesses are shown
    TURBO = "turbo"  # widest parallelism


# of a StreamChunk: how many denoise steps lie between two of them
_INTERVAL = {GenerationMode.STREAMING: 2}
_OTHER_INTERVAL = 4


def _fields_of(mode: GenerationMode) -> dict[str, Any]:
    """What a mode sets, by the names of DiffusionConfig; cache and block length follow when the model is known."""
    preset = PRESETS[mode]
    options = preset.get("options", {})
    return {
        "confidence_threshold": preset.get("threshold"),
        "factor": preset.get("factor"),
        "early_stop_confidence": options.get("early_stop_confidence", 0.0),
        "max_parallel_tokens": options.get("max_parallel_tokens", 0),
        "stream_interval": _INTERVAL.get(mode, _OTHER_INTERVAL),
        "provisional": preset.get("provisional", False),
    }


@dataclass(frozen=True)
class DiffusionConfig:
    """How a canvas is denoised. A field left None takes the mode's value; what you set wins over the mode.

    field                  meaning                                        STANDARD  FAST   STREAMING  TURBO
    confidence_threshold   commit every token at least this confident     -         0.9    0.9        -
    factor                 the same with a bar that follows crowding      -         -      -          1.0
    early_stop_confidence  end a block once all left of it is this sure   0 (off)   0      0          0.9
    max_parallel_tokens    at most so many tokens a step, 0: no limit     0         0      0          64
    block_length           tokens of a block                              32        32     8          64
    cache                  none, prefix, dual or windowed                 none      dual   dual       dual
    stream_interval        denoise steps from one StreamChunk to the next 4         4      2          4
    provisional            guesses of undecided tokens in StreamChunks    no        no     yes        no

    Without threshold and factor the rule is the fixed schedule; a threshold replaces the mode's factor and the other
    way round. `max_steps` bounds the denoise steps of an answer (its blocks share them evenly; None: the mode's, which
    for STANDARD is one per token, else the default of docs/options.md), `min_steps` is how many a full answer takes at
    least (it lowers max_parallel_tokens; a text that ends early takes fewer). temperature None: the model's or the
    default of docs/options.md. Block-diffusion models have their own block length and exact K,V, so there the mode's
    block_length and cache do not apply, and setting `cache` is refused. All modes stop as soon as the text has ended,
    which changes nothing in it. `early_stop_threshold` is another name to give early_stop_confidence by; read it
    under that one. Raises ValidationError naming the field.
    """

    mode: GenerationMode | str = GenerationMode.STANDARD
    min_steps: int = 1
    max_steps: int | None = None
    confidence_threshold: float | None = None
    factor: float | None = None
    early_stop_confidence: float | None = None
    max_parallel_tokens: int | None = None
    stream_interval: int | None = None
    block_length: int | None = None
    cache: Cache | None = None
    provisional: bool | None = None
    temperature: float | None = None
    early_stop_threshold: InitVar[float | None] = None

    def __post_init__(self, early_stop_threshold: float | None) -> None:
        if early_stop_threshold is not None:
            if self.early_stop_confidence is not None:
                raise ValidationError(
                    "early_stop_threshold and early_stop_confidence are one thing; got both.",
                    param="early_stop_threshold",
                    hint="Give early_stop_confidence alone.",
                )
            object.__setattr__(self, "early_stop_confidence", early_stop_threshold)
        try:
            object.__setattr__(self, "mode", GenerationMode(self.mode))
        except ValueError:
            raise ValidationError(
                f"mode must be {', '.join(GenerationMode)}, got {self.mode!r}.", param="mode"
            ) from None
        if self.confidence_threshold is not None and self.factor is not None:
            raise ValidationError(
                "confidence_threshold and factor are two rules; got both.", param="factor", hint="Set one of them."
            )
        chosen = self.confidence_threshold is not None or self.factor is not None
        for name, value in _fields_of(GenerationMode(self.mode)).items():
            rule = name in ("confidence_threshold", "factor")
            if getattr(self, name) is None and not (rule and chosen):
                object.__setattr__(self, name, value)
        _check(self)

    def decode_params(self, max_tokens: int, model: ModelInfo) -> DecodeParams:
        """The decoder's options for an answer of `max_tokens` on `model`. Raises ValidationError when min_steps cannot
        be kept, UnsupportedError when the model does not denoise."""
        if model.kind == "ar":
            raise UnsupportedError(
                f"{model.name} is autoregressive: it has no canvas to denoise.",
                param="model",
                hint="Use dfastllm.LLM, or a masked-diffusion model.",
            )
        preset = PRESETS[GenerationMode(self.mode)]
        native = {"cache": None, "block_length": None} if model.kind == "block" else preset
        options: dict[str, Any] = {}
        if most := self._most_per_step(max_tokens):
            options["max_parallel_tokens"] = most
        if self.early_stop_confidence:
            options["early_stop_confidence"] = self.early_stop_confidence
        return DecodeParams(
            rule=None if self.confidence_threshold is not None or self.factor is not None else "schedule",
            cache=native["cache"] if self.cache is None else self.cache,
            steps=preset.get("steps") if self.max_steps is None else self.max_steps,
            block_length=native["block_length"] if self.block_length is None else self.block_length,
            threshold=self.confidence_threshold,
            factor=self.factor,
            options=options,
            provisional=bool(self.provisional),
        )

    def _most_per_step(self, max_tokens: int) -> int:
        """Commits a step at most, 0 for no limit: n a step fill max_tokens in ceil(max_tokens / n) steps or more."""
        most = self.max_parallel_tokens or 0
        if self.min_steps == 1:
            return most
        if self.min_steps > max_tokens:
            raise ValidationError(
                f"min_steps is {self.min_steps}, but an answer of {max_tokens} tokens takes at most that many steps.",
                param="min_steps",
            )
        slow = (max_tokens - 1) // (self.min_steps - 1)
        return min(most, slow) if most else slow


def _check(c: DiffusionConfig) -> None:
    for name, least in (("min_steps", 1), ("stream_interval", 1), ("max_parallel_tokens", 0)):
        value = getattr(c, name)
        if not isinstance(value, int) or value < least:
            raise ValidationError(f"{name} must be a whole number of at least {least}, got {value!r}.", param=name)
    if c.max_steps is not None and c.max_steps < c.min_steps:
        raise ValidationError(
            f"max_steps must be at least min_steps={c.min_steps}, got {c.max_steps}.", param="max_steps"
        )
    if c.confidence_threshold is not None and not 0 < c.confidence_threshold <= 1:
        raise ValidationError(
            f"confidence_threshold must be in (0, 1], got {c.confidence_threshold}.", param="confidence_threshold"
        )
    if c.early_stop_confidence is None or not 0 <= c.early_stop_confidence <= 1:
        raise ValidationError(
            f"early_stop_confidence must be in [0, 1], got {c.early_stop_confidence}.", param="early_stop_confidence"
        )
    if c.temperature is not None:
        SamplingParams(temperature=c.temperature)  # the table's own checks of these
    DecodeParams(cache=c.cache, block_length=c.block_length, factor=c.factor)


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """An answer. tokens: its ids, without the end token; num_generated counts them. steps_taken: denoise steps, which
    changed the canvas; forwards: forward passes of the model, prompt and cache passes included. exactness: see
    `core.Tier`."""

    text: str
    tokens: tuple[int, ...]
    num_generated: int
    steps_taken: int
    generation_time_ms: float
    forwards: int
    prompt_tokens: int
    finish_reason: FinishReason
    exactness: Tier


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """The answer after some denoise steps. text: what is settled so far and never changes again; new_text: what of it
    is new since the last chunk, so that all new_text joined is the result; tokens: the ids of `text`.

    unmasked_count of total_tokens canvas positions are decided (in any order, so they may be far ahead of `text`).
    progress: their share, 1.0 when finished. preview: the canvas as it now reads behind `text` too, decided tokens and,
    with `provisional`, guesses; undecided positions are U+2591. Equal to `text` when finished.
    """

    text: str
    new_text: str
    tokens: tuple[int, ...]
    unmasked_count: int
    total_tokens: int
    progress: float
    finished: bool
    preview: str
    finish_reason: FinishReason | None = None


def overridden(sampling: SamplingParams | None, **wins: Any) -> SamplingParams:
    """Sampling options with the values that are not None in place of its own. Raises ValidationError."""
    return changed(sampling or SamplingParams(), **{name: value for name, value in wins.items() if value is not None})


def configure(kind: Callable[..., Config], given: Mapping[str, Any]) -> Config:
    """`kind(**given)`, a dataclass. Raises ValidationError for a field it does not have."""
    known = list(inspect.signature(kind).parameters)
    for name in given:
        if name not in known:
            raise ValidationError(f"unknown option {name!r}; there are {', '.join(known)}.", param=name)
    return kind(**given)


def one_config(config: Config | None, kind: Callable[..., Config], given: Mapping[str, Any]) -> Config:
    """The configuration of something that takes it whole or by its fields: `config`, else `kind(**given)`. Raises
    ValidationError for both at once and for a field that it does not have."""
    if config is None:
        return configure(kind, given)
    if given:
        name = next(iter(given))
        raise ValidationError(
            f"a configuration and {name} beside it: got both.",
            param=name,
            hint=f"Set {name} in the configuration, or give all of its fields as keywords.",
        )
    return config
