"""POST /v1/completions: prompts in any form, infilling by `suffix`, streaming or not."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import StepEvent
from dfastllm.errors import UnsupportedError
from dfastllm.llm import Completion as Answer
from dfastllm.server.access import identity_of
from dfastllm.server.calls import Call, Chunk
from dfastllm.server.jobs import Job, collect, engine_requests, while_connected
from dfastllm.server.prompts import completion_prompts, encode
from dfastllm.server.replies import Completion, CompletionChoice, CompletionChunk
from dfastllm.server.schemas import CompletionRequest
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.tokens import completion_logprobs
from dfastllm.tenants import Identity
from dfastllm.text import TextOffsets

__all__ = ["completion_call", "completions"]


async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
    """Complete a prompt, or several."""
    serving: Serving = request.app.state.serving
    understood = completion_call(serving, identity_of(request), body, request.state.request_id)
    return await (await while_connected(request, understood)).answer(request)


async def completion_call(
    serving: Serving, identity: Identity, body: CompletionRequest, request_id: str
) -> Call[CompletionRequest]:
    """The call that a body asks for, over any transport. Raises what is wrong with it, in the body's words."""
    model = serving.model(identity, body.model)
    if body.suffix and not model.diffuses:
        raise UnsupportedError(f"suffix (infilling) needs a diffusion model; {model.name!r} is not.", param="suffix")
    prompts, suffix = await _read(serving, body, model)
    id = f"cmpl-{uuid.uuid4().hex}"
    requests = engine_requests(serving, identity, model, id, body, [ids for ids, _ in prompts], suffix)
    job = Job(serving, identity, model.name, requests, id=id, request_id=request_id, choices=body.n or 1)
    return _Call(body, model, job, [text for _, text in prompts])


async def _read(
    serving: Serving, body: CompletionRequest, model: ServedModel
) -> tuple[list[tuple[tuple[int, ...], str]], tuple[int, ...]]:
    """The prompts as `completion_prompts` gives them, and the ids of the suffix."""
    prompts = await completion_prompts(body, model, serving.settings.max_prompts)
    parse_special = body.parse_special is not False
    return prompts, await encode(model, body.suffix, param="suffix", parse_special=parse_special) if body.suffix else ()


class _Call(Call[CompletionRequest]):
    """prompts: their texts, for an echo."""

    chunk_type = CompletionChunk

    def __init__(self, body: CompletionRequest, model: ServedModel, job: Job, prompts: Sequence[str]) -> None:
        super().__init__(body, model, job, choices=body.n or 1)
        self.prompts = prompts
        self.tokens = [0] * len(job.requests)
        self.offsets = [
            TextOffsets(
                model.tokenizer,
                skip_special=request.sampling.skip_special_tokens,
                start=len(self.echoed(index)),
            )
            for index, request in enumerate(job.requests)
        ]

    def choice(self, index: int, text: str, result: Answer | StepEvent, **rest: Any) -> CompletionChoice:
        """Choice `index` with the tokens of `result`."""
        logprobs = None
        if self.body.logprobs is not None:
            offsets = self.offsets[index].push(result.token_ids)
            as_ids = bool(self.body.return_tokens_as_token_ids)
            logprobs = completion_logprobs(self.model.tokenizer, result.logprobs, offsets, as_ids=as_ids)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, **rest, **self.token_ids(result.token_ids))

    def echoed(self, index: int) -> str:
        return self.prompts[index // self.choices] if self.body.echo else ""

    async def whole(self) -> Completion:
        ended = await collect(self.job)
        choices = []
        for index, result in enumerate(ended):
            rest: dict[str, Any] = {"finish_reason": result.finish_reason.value, "stop_reason": result.stop}
            if self.body.return_token_ids:
                rest["prompt_token_ids"] = list(self.job.requests[index].prompt)
            choices.append(self.choice(index, self.echoed(index) + result.text, result, **rest))
        return Completion(**self.named, choices=choices, **self.took([result.usage for result in ended]))

    def opening(self, index: int) -> Iterator[Chunk]:
        if echo := self.echoed(index):
            choice = CompletionChoice(index=index, text=echo, logprobs=None, finish_reason=None)
            yield self.chunk(choice, self.tokens[index])

    def deltas(self, index: int, event: StepEvent) -> Iterator[Chunk]:
        begins = not self.tokens[index] and not self.echoed(index)  # nothing tells yet of a first token
        self.tokens[index] += len(event.token_ids)
        with_tokens = self.body.logprobs is not None or self.body.return_token_ids or begins
        if not event.text and event.finish is None and not (with_tokens and event.token_ids):
            return  # its text is held back: it may become a stop string, or is half a character
        rest: dict[str, Any] = {"finish_reason": None}
        if event.finish is not None:
            rest = {"finish_reason": event.finish.reason.value, "stop_reason": event.finish.stop}
        yield self.chunk(self.choice(index, event.text, event, **rest), self.tokens[index])
