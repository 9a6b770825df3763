"""What a call may ask for: the options that most calls use, by name, and any other option of the server beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import InvalidRequestError
from .record import Record

__all__ = ["GenerationOptions", "generation_options", "http_body"]


@dataclass(frozen=True)
class GenerationOptions(Record):
    """None leaves a choice to the server. The server's docs/options.md lists every option with its range.

    prompt: text to complete; or else messages.
    messages: a chat, [{"role": "user", "content": ...}, ...].
    model: a model the server lists, or an adapter of it; None: the client's, then the server's own.
    lora: the name of a LoRA adapter.
    canvas_events: a stream of a diffusion model shows its denoising too (`TokenData.canvas`).
    timeout: seconds that the call may take on the server.
    more: any other option of the server, such as {"threshold": 0.9, "block_length": 32}.
    """

    prompt: str | None = None
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
    options: GenerationOptions | Mapping[str, Any] | str | None, given: Mapping[str, Any], model: str | None
) -> GenerationOptions:
    """One set of all that a call was given: a prompt, mapping or options, keywords beside it (which win), and
    the client's model where none is named. Raises InvalidRequestError for neither or both of prompt and messages, and
    for n, which these calls have no place for."""
    if isinstance(options, GenerationOptions):
        start = options
    else:
        start = _of_mapping({"prompt": options} if isinstance(options, str) else dict(options or {}))
    extra = _of_mapping(given)
    changed = {name: value for name in _NAMES - {"more"} if (value := extra[name]) is not None}
    chosen = replace(start, **changed, more={**start.more, **extra.more})
    if (chosen.prompt is None) == (chosen.messages is None):
        raise InvalidRequestError("Give either prompt or messages, and not both.", param="prompt")
    if chosen.more.get("n") not in (None, 1):
        raise InvalidRequestError(
            f"These calls give one answer, got n={chosen.more['n']!r}. Several choices: request('POST',"
            " '/v1/completions', {...}) of the HTTP client.",
            param="n",
        )
    return chosen if chosen.model is not None or model is None else replace(chosen, model=model)


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
