"""A run of a pipeline: its steps in turn, those that need nothing of each other at once, and what happens told as it
happens."""

from __future__ import annotations

import asyncio
import builtins
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from copy import copy
from typing import Any

from dfastllm.errors import DFastLLMError, GenerationError, TimeoutError, ValidationError
from dfastllm.server.calls import Call
from dfastllm.server.pipelines.pipeline import Pipeline, Step
from dfastllm.server.pipelines.schema import (
    PipelineEvent,
    PipelineResult,
    StepDone,
    StepResult,
    StepSkipped,
    StepStarted,
    StepText,
)
from dfastllm.server.pipelines.templates import INPUT
from dfastllm.server.replies import ChatChunkChoice, UsageOut, usage_out
from dfastllm.server.schemas import GenerationRequest, StreamOptions

__all__ = ["Ask", "run_pipeline"]

Ask = Callable[[GenerationRequest], Awaitable[Call[Any]]]  # a request to the call that it is, for who runs the pipeline
LONGEST = 1 << 20  # characters of a step's text
_MODULES = ThreadPoolExecutor(2, "dfastllm-module")  # each run keeps a core busy, and ends by itself within its limits


async def run_pipeline(
    pipeline: Pipeline, given: str | Mapping[str, Any], ask: Ask, *, timeout: float
) -> AsyncGenerator[PipelineEvent]:
    """What happens, the PipelineResult last. given: the run's input. timeout: seconds for all of it.

    Raises what the first step to fail raised, naming the step; the others are ended then, and when the generator is
    closed."""
    run = _Run(pipeline, given, ask)
    tasks: set[asyncio.Task[None]] = set()
    deadline = run.began + timeout
    try:
        run.start_free(tasks)
        while tasks or not run.events.empty():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the pipeline {pipeline.name} ran past its time limit of {timeout:g} s.")
            try:
                event = await asyncio.wait_for(run.events.get(), left)
            except builtins.TimeoutError:
                continue
            if isinstance(event, _Ended):
                tasks.discard(event.task)
                event.task.result()  # raises what the step raised
                run.start_free(tasks)
            else:
                yield event
        yield run.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Ended:
    """Tells the loop of a step's task that is done."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task


class _Run:
    def __init__(self, pipeline: Pipeline, given: str | Mapping[str, Any], ask: Ask) -> None:
        self.pipeline = pipeline
        self.ask = ask
        self.began = time.monotonic()
        self.values: dict[str, Any] = {INPUT: given}
        self.results: dict[str, StepResult] = {}
        self.last = ""  # text of the step that ended last
        self.events: asyncio.Queue[PipelineEvent | _Ended] = asyncio.Queue()
        self.waiting = list(pipeline.steps)

    def start_free(self, tasks: set[asyncio.Task[None]]) -> None:
        """Start every step whose texts are there."""
        for step in [step for step in self.waiting if step.needs <= self.values.keys()]:
            self.waiting.remove(step)
            task = asyncio.create_task(self._named(step))
            tasks.add(task)
            task.add_done_callback(lambda done: self.events.put_nowait(_Ended(done)))

    async def _named(self, step: Step) -> None:
        """A step; what it raises names it."""
        try:
            await self._step(step)
        except DFastLLMError as error:
            told = copy(error)
            if not error.message.startswith(f"steps.{step.id}"):
                told.message = f"Step {step.id}: {error.message}"
                told.args = (told.message,)
                told.param = f"steps.{step.id}" + (f".{error.param}" if error.param else "")
            raise told from None

    async def _step(self, step: Step) -> None:
        began = time.monotonic()
        if step.when is not None and not await asyncio.to_thread(step.when.holds, self.values):
            self.events.put_nowait(StepSkipped(step=step.id))
            self._keep(step, StepResult(id=step.id, status="skipped", text="", time_ms=_since(began)))
            return
        self.events.put_nowait(StepStarted(step=step.id))
        if step.module is not None:
            text = await asyncio.to_thread(step.inputs[0].render, self.values)
            text = await asyncio.get_running_loop().run_in_executor(_MODULES, step.module.run, text)
            result = StepResult(id=step.id, status="done", text=text, time_ms=_since(began))
        else:
            result = await self._generated(step, began)
        self.last = result.text
        self._keep(step, result)
        self.events.put_nowait(StepDone(step=step.id, result=result))

    async def _generated(self, step: Step, began: float) -> StepResult:
        body = await asyncio.to_thread(step.request, self.values)
        body.stream, body.stream_options = True, StreamOptions.model_validate({"include_usage": True})
        call = await self.ask(body)
        texts: list[str] = []
        reason: str | None = None
        usage: UsageOut | None = None
        async with aclosing(call.chunks(call.job.timed_events())) as chunks:
            async for chunk in chunks:
                if not chunk.choices:
                    usage = chunk.usage or usage
                    continue
                choice = chunk.choices[0]
                text = (choice.delta.content or "") if isinstance(choice, ChatChunkChoice) else choice.text
                reason = choice.finish_reason or reason
                if text:
                    texts.append(text)
                    self.events.put_nowait(StepText(step=step.id, text=text))
        if usage is None:
            raise GenerationError("the step's answer ended without its usage.")
        text = "".join(texts)
        if len(text) > LONGEST:
            raise ValidationError(f"its text has {len(text)} characters; a step's may have {LONGEST}.")
        return StepResult(
            id=step.id,
            status="done",
            text=text,
            model=call.model.name,
            finish_reason=reason,
            usage=usage,
            time_ms=_since(began),
        )

    def _keep(self, step: Step, result: StepResult) -> None:
        self.values[step.output] = result.text
        self.results[step.id] = result

    def result(self) -> PipelineResult:
        """All of it. Raises ValidationError where the output's template cannot be rendered."""
        output = self.pipeline.output
        used = [result.usage for result in self.results.values() if result.usage is not None]
        return PipelineResult(
            id=f"pipe-{uuid.uuid4().hex}",
            pipeline=self.pipeline.name,
            output=self.last if output is None else output.render(self.values),
            steps=[self.results[step.id] for step in self.pipeline.steps],
            usage=usage_out(sum(one.prompt_tokens for one in used), sum(one.completion_tokens for one in used)),
            time_ms=_since(self.began),
        )


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)
