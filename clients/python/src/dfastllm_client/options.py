"""What a call may ask for: the options that most calls use, by name, and any other option of the server beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import InvalidRequestError
from .record import Record

__all__ = ["GenerationOptions", "generation_options", "http_body", "packed", "seconds"]


@dataclass(frozen=True)
class GenerationOptions(Record):
    """None leaves a choice to the server. The server's docs/options.md lists every option with its range.

    prompt: text to complete, or its token ids; or else messages.
    messages: a chat, [{"role": "user", "content": ...}, ...].
    model: a model the server lists, or an adapter of it; None: the client's, then the server's own.
    lora: the name of a LoRA adapter.
    canvas_events: a stream of a diffusion model shows its denoising too (`TokenData.canvas`).
    timeout: seconds that the call may take on the server.
    more: any other option of the server, such as {"threshold": 0.9, "block_length": 32}.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    lora: str | None = None
    canvas_events: bool | None = None
    timeout: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def params(self) -> dict[str, Any]:
        """The options that were given, as one flat mapping."""
        given = {name: value for name in self.keys() if name != "more" and (value := self[name]) is not None}
        return {**given, **self.more}


_NAMES = frozenset(one.name for one in fields(GenerationOptions))


def generation_options(
    options: GenerationOptions | Mapping[str, Any] | str | Sequence[int] | None,
    given: Mapping[str, Any],
    model: str | None,
) -> GenerationOptions:
    """One set of all that a call was given: a prompt, mapping or options, keywords beside it (which win), and
    the client's model where none is named. Raises InvalidRequestError for neither or both of prompt and messages, for
    what is none of these, and for n or several prompts, which these calls have no place for."""
    if isinstance(options, GenerationOptions):
        start = options
    elif options is None or isinstance(options, Mapping):
        start = _of_mapping(options or {})
    elif isinstance(options, str | list | tuple):
        start = GenerationOptions(prompt=options)
    else:
        raise InvalidRequestError(
            f"A call takes a prompt, a mapping of options or GenerationOptions, got {type(options).__name__}.",
            param="prompt",
        )
    extra = _of_mapping(given)
    changed = {name: value for name in _NAMES - {"more"} if (value := extra[name]) is not None}
    chosen = replace(start, **changed, more={**start.more, **extra.more})
    if (chosen.prompt is None) == (chosen.messages is None):
        raise InvalidRequestError("Give either prompt or messages, and not both.", param="prompt")
    several = None if chosen.more.get("n") in (None, 1) else ("n", f"n={chosen.more['n']!r}")
    if isinstance(chosen.prompt, list | tuple) and len(chosen.prompt) > 1 and not isinstance(chosen.prompt[0], int):
        several = ("prompt", f"{len(chosen.prompt)} prompts")
    if several is not None:
        raise InvalidRequestError(
            f"These calls give one answer, got {several[1]}. Several: request('POST', '/v1/completions', {{...}})"
            " of the HTTP client.",
            param=several[0],
        )
    if chosen.timeout is not None:
        seconds(chosen.timeout)
    return chosen if chosen.model is not None or model is None else replace(chosen, model=model)


def seconds(timeout: Any, name: str = "timeout") -> float:
    """A time limit. Raises InvalidRequestError for what is no finite number; the server judges the number itself."""
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not math.isfinite(timeout):
        raise InvalidRequestError(f"{name} must be a number of seconds, got {timeout!r:.80}.", param=name)
    return float(timeout)


def packed(body: Mapping[str, Any]) -> str:
    """A call as JSON. Raises InvalidRequestError, before anything is sent, for what JSON cannot hold: NaN, infinity,
    half of a character, an object of another type; naming the field."""
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        inner = body.get("params")
        for name, value in (inner if isinstance(inner, Mapping) else body).items():
            try:
                json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            except (TypeError, ValueError, RecursionError) as why:
                message = f"{name} cannot be sent as JSON: {why}. Nothing was sent."
                raise InvalidRequestError(message, param=name) from error
        raise InvalidRequestError(f"The call cannot be sent as JSON: {error}. Nothing was sent.") from error
    return text


def _of_mapping(given: Mapping[str, Any]) -> GenerationOptions:
    known = {name: value for name, value in given.items() if name in _NAMES}
    unknown = {name: value for name, value in given.items() if name not in _NAMES and value is not None}
    return GenerationOptions(**{**known, "more": {**known.get("more", {}), **unknown}})


def http_body(options: GenerationOptions, stream: bool) -> tuple[str, dict[str, Any]]:
    """The route of an HTTP call and its body. A stream asks for its usage and token ids, which the results are made
    of."""
    params = options.params()
    params.pop("stream", None)
    canvas = params.pop("canvas_events", None)
    path = "/v1/completions" if options.messages is None else "/v1/chat/completions"
    if stream:
        wanted = {"include_usage": True, **({} if canvas is None else {"canvas_events": canvas})}
        asked = params.get("stream_options") or {}
        params |= {"stream": True, "stream_options": {**asked, **wanted}, "return_token_ids": True}
    return path, params
