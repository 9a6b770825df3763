"""DiffusionGenerator: one prompt in, one answer out or a stream of its denoising, over the one engine.

It chooses decoder options from a mode and reads the engine's events; it runs no forward pass and has no decoding loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfastllm.compat.config import (
    DiffusionConfig,
    GenerationMode,
    GenerationResult,
    StreamChunk,
    one_config,
    overridden,
)
from dfastllm.core import CanvasUpdate, Request, SamplingParams, StepEvent
from dfastllm.decode.policy import Policy
from dfastllm.decode.registry import policy_for
from dfastllm.engine import Engine, EngineConfig, Stream
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, Prompt, collect, load_engine
from dfastllm.options import kind_defaults
from dfastllm.text import Tokenizer, chat_prompt

__all__ = ["DiffusionGenerator", "build_engine", "create_generator", "encode_prompt", "open_llm"]

_UNDECIDED = "\u2591"


def open_llm(model: Any, tokenizer: Tokenizer | None = None) -> tuple[LLM, bool]:
    """An LLM over `model`, and whether the caller must close it: an LLM is used as it is, anything else as in
    `build_engine`, an Engine itself being run."""
    if isinstance(model, LLM | Engine):
        _refuse_second(tokenizer, "an LLM or Engine")
        return (model, False) if isinstance(model, LLM) else (LLM(engine=model), True)
    return LLM(engine=build_engine(model, tokenizer)), True


def build_engine(
    model: Any,
    tokenizer: Tokenizer | None = None,
    config: EngineConfig | None = None,
    choose: Callable[..., Policy] | None = None,
) -> Engine:
    """A new engine with `config`, its policies chosen by `choose` (None: as the model's own engine does).

    model: a shipped model's name, a directory, a model built by dfastllm.models together with its tokenizer, or an LLM
    or Engine, whose weights it shares. Raises ValidationError for anything else and what loading raises:
    ModelNotFoundError, ModelLoadError, TokenizerError."""
    if isinstance(model, str | Path):
        _refuse_second(tokenizer, "a model's name or directory")
        loaded = load_engine(model, config=config)
        if choose is None:
            return loaded
        model = loaded
    if isinstance(model, LLM | Engine):
        _refuse_second(tokenizer, "an LLM or Engine")
        engine = model.engine if isinstance(model, LLM) else model
        kept = choose or engine.choose
        return Engine(engine.model, engine.tokenizer, config, device=engine.device, choose=kept)
    if getattr(model, "info", None) is None or not callable(getattr(model, "head", None)):
        raise ValidationError(
            f"model must be an LLM, an Engine, a name, a directory or a model of dfastllm.models, got "
            f"{type(model).__name__}.",
            param="model",
            hint="For a checkpoint of another library, save it and give its directory.",
        )
    if tokenizer is not None:
        tokenizer.check_fits(model.info.vocab_size, model.info.mask_id)
    return Engine(model, tokenizer, config, device=getattr(model, "device", "cpu"), choose=choose or policy_for)


def encode_prompt(tokenizer: Tokenizer, text: str, *, raw: bool = False) -> tuple[int, ...]:
    """Token ids of a text prompt: of a user's message in the model's chat template, where it has one; with `raw`, and
    where it has none, of the text itself with the tokenizer's own special tokens."""
    if raw or tokenizer.templates.source() is None:
        return tuple(tokenizer.encode(text, add_special=True))
    return tuple(tokenizer.encode(chat_prompt(tokenizer, [{"role": "user", "content": text}])))


def _refuse_second(tokenizer: Tokenizer | None, what: str) -> None:
    if tokenizer is not None:
        raise ValidationError(f"{what} brings its own tokenizer; got a second one.", param="tokenizer")


class DiffusionGenerator:
    """Generates with a masked-diffusion or block-diffusion model. Use as a context manager, or call `close`.

    model, tokenizer: see `open_llm`. config: a DiffusionConfig, or its fields as keywords, as in
    DiffusionGenerator(mode=GenerationMode.TURBO); neither: STANDARD. A text prompt is a user's message in the model's
    chat template, where it has one; with raw=True, and as token ids, the model is given just that. Every call may
    raise ValidationError, UnsupportedError or ContextLengthError for what cannot be honoured, TimeoutError or
    GenerationError for what went wrong underway.
    """

    default_config = DiffusionConfig()

    def __init__(
        self,
        model: Any = "demo-diffusion",
        tokenizer: Tokenizer | None = None,
        config: DiffusionConfig | None = None,
        **fields: Any,
    ) -> None:
        default = self.default_config
        if config is None and not fields:
            config = default
        # the mode of an old name stays where only other fields are given
        kept = {} if config is not None else {"mode": default.mode}
        self.config = one_config(config, type(default), {**kept, **fields})
        self.llm, self._owned = open_llm(model, tokenizer)
        try:
            self._check()
        except Exception:
            self.close()
            raise

    def _check(self) -> None:
        """Refuse now what no request could be served with: a model of the wrong kind, options it does not have."""
        sampling = SamplingParams(max_tokens=self.config.min_steps)
        decode = self.config.decode_params(self.config.min_steps, self.llm.info)
        self.llm.engine.admit(Request("check", (self._word(),), sampling, decode))

    def _word(self) -> int:
        """An ordinary token of the model."""
        info = self.llm.info
        return next(i for i in range(info.vocab_size) if i != info.mask_id and i not in info.eos_ids)

    def close(self) -> None:
        """End the engine thread, if this generator started it."""
        if self._owned:
            self.llm.close()

    def __enter__(self) -> DiffusionGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        raw: bool = False,
    ) -> GenerationResult:
        """The whole answer. prompt: a user's message, or token ids taken as they are. raw: the text is the prompt
        itself, without the chat template. max_tokens and temperature win over those of `sampling`, which carries seed,
        stop, top_p and the rest; what none of them says is the config's, else the model's or the default of
        docs/options.md. timeout: seconds."""
        began = time.perf_counter()
        stream = self._open(prompt, self._sampling(max_tokens, temperature, sampling), timeout, raw)
        events = list(_events(stream))
        answer = collect(events)
        return GenerationResult(
            text=answer.text,
            tokens=answer.token_ids,
            num_generated=answer.usage.completion_tokens,
            steps_taken=sum(_is_step(event.canvas) for event in events),
            generation_time_ms=(time.perf_counter() - began) * 1000,
            forwards=answer.usage.forwards,
            prompt_tokens=answer.usage.prompt_tokens,
            finish_reason=answer.finish_reason,
            exactness=answer.usage.exactness,
        )

    def generate_stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        temperature: float | None = None,
        *,
        sampling: SamplingParams | None = None,
        timeout: float | None = None,
        raw: bool = False,
    ) -> Iterator[StreamChunk]:
        """The answer as it forms: a chunk every `stream_interval` denoise steps, and one at the end.
        Arguments as in `generate`. Closing the iterator cancels the request."""
        stream = self._open(prompt, self._sampling(max_tokens, temperature, sampling), timeout, raw)
        interval = self.config.stream_interval or 1
        view = _Canvas(self.llm.engine.tokenizer, stream.request.sampling)
        told, steps = "", 0
        for event in _events(stream):
            view.add(event)
            steps += _is_step(event.canvas)
            if event.finish is not None or (_is_step(event.canvas) and steps % interval == 0):
                yield view.chunk(told, event)
                told = view.text

    def warmup(self, max_tokens: int = 32) -> float:
        """Run one short answer, so that the first real one does not pay for lazy initialisation. Returns seconds."""
        began = time.perf_counter()
        self.generate([self._word()], max(max_tokens, self.config.min_steps))
        return time.perf_counter() - began

    def _sampling(
        self, max_tokens: int | None, temperature: float | None, sampling: SamplingParams | None
    ) -> SamplingParams:
        if temperature is None and sampling is None:
            temperature = self.config.temperature
        return overridden(sampling, max_tokens=max_tokens, temperature=temperature)

    def _open(self, prompt: Prompt, sampling: SamplingParams, timeout: float | None, raw: bool) -> Stream:
        info = self.llm.info
        if isinstance(prompt, str):
            prompt = encode_prompt(self.llm.tokenizer, prompt, raw=raw)
        tokens = sampling.max_tokens or info.defaults.get("max_tokens") or kind_defaults(info.kind).get("max_tokens", 1)
        return self.llm.submit(prompt, sampling, self.config.decode_params(tokens, info), timeout=timeout)


def _events(stream: Stream) -> Iterator[StepEvent]:
    """Closing it cancels the request."""
    try:
        yield from stream
    finally:
        if not stream.done:
            stream.cancel()


def _is_step(canvas: CanvasUpdate | None) -> bool:
    """Whether an event is of a denoise step, and not of a prompt or cache pass."""
    return canvas is not None and bool(canvas.commit or canvas.revise)


class _Canvas:
    """The canvas as its events tell it."""

    def __init__(self, tokenizer: Tokenizer | None, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = sampling.skip_special_tokens
        self._visible = sampling.max_tokens or 0  # the canvas has whole blocks; what is beyond is never output
        self._decided: dict[int, int] = {}
        self._guessed: dict[int, int] = {}
        self._length = 0
        self._masked = 0
        self.tokens: list[int] = []
        self.text = ""

    def add(self, event: StepEvent) -> None:
        self.tokens += event.token_ids
        self.text += event.text
        canvas = event.canvas
        if canvas is None:
            return
        self._length, self._masked = canvas.length, canvas.masked
        self._guessed = dict(canvas.provisional)
        canvas.apply(self._decided)

    def chunk(self, told: str, event: StepEvent) -> StreamChunk:
        finished = event.finish is not None
        unmasked = self._length - self._masked
        return StreamChunk(
            text=self.text,
            new_text=self.text[len(told) :],
            tokens=tuple(self.tokens),
            unmasked_count=unmasked,
            total_tokens=self._length,
            progress=1.0 if finished else unmasked / self._length if self._length else 0.0,
            finished=finished,
            preview=self.text if finished else self._preview(),
            finish_reason=event.finish.reason if event.finish is not None else None,
        )

    def _preview(self) -> str:
        if self._tokenizer is None:
            return self.text
        parts: list[str] = []
        run: list[int] = []
        length = min(self._length, self._visible)
        for position in range(length):
            token = self._decided.get(position, self._guessed.get(position))
            if token is not None:
                run.append(token)
            if token is None or position == length - 1:
                parts.append(self._tokenizer.decode(run, skip_special=self._skip_special) if run else "")
                run = []
            if token is None:
                parts.append(_UNDECIDED)
        return "".join(parts)


def create_generator(
    model: Any = "demo-diffusion",
    tokenizer: Tokenizer | None = None,
    mode: GenerationMode | str = GenerationMode.STANDARD,
    **fields: Any,
) -> DiffusionGenerator:
    """A DiffusionGenerator with DiffusionConfig(mode, **fields). Raises ValidationError for an unknown field."""
    return DiffusionGenerator(model, tokenizer, mode=mode, **fields)
