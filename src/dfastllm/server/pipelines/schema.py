"""What a pipeline is written as, in JSON or YAML, and what a run of one is told by. Checks forms, not meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dfastllm.server.body import Body
from dfastllm.server.bounds import AtMost
from dfastllm.server.replies import Out, UsageOut

__all__ = [
    "EVENTS",
    "ModuleBody",
    "PipelineBody",
    "PipelineCard",
    "PipelineDeleted",
    "PipelineDetail",
    "PipelineEvent",
    "PipelineList",
    "PipelineParams",
    "PipelineResult",
    "RunBody",
    "StepBody",
    "StepDone",
    "StepMessage",
    "StepResult",
    "StepSkipped",
    "StepStarted",
    "StepText",
]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"


class ModuleBody(Body):
    """A WebAssembly module; one of the two."""

    wat: str | None = Field(None, description="WebAssembly's text form.")
    wasm: str | None = Field(None, description="Its binary form, as base64.")


class StepMessage(Body):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(description="A template.")]


class StepBody(Body):
    """One step: a model or a module, what it is given, and when it is run."""

    id: Annotated[str, Field(pattern=VARIABLE)]
    model: str | None = Field(None, description="Of /v1/models; left out, the only one that is served.")
    module: str | None = Field(None, description="In place of a model: one of the pipeline's modules.")
    adapter: str | None = Field(None, description="A LoRA adapter of the model.")
    input: str | None = Field(None, description="A template: the prompt of a model, the text for a module.")
    messages: Annotated[list[StepMessage] | None, AtMost("messages")] = Field(
        None, description="In place of input: a conversation, each content a template."
    )
    options: Annotated[dict[str, Any] | None, AtMost("options")] = Field(
        None, description="Fields of /v1/completions or /v1/chat/completions: max_tokens, temperature, stop, ..."
    )
    output: str | None = Field(None, pattern=VARIABLE, description="The name of its text for later steps; its id.")
    when: str | None = Field(None, description="An expression; where it is false the step is left out, its text ''.")


class PipelineBody(Body):
    """Steps that are run in the order in which they need each other; those that need nothing of each other at once."""

    yaml: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "name": "polish",
            "steps": [
                {"id": "draft", "model": "demo-ar", "input": "{{ input }}", "options": {"max_tokens": 32}},
                {"id": "final", "model": "demo-ar", "input": "{{ draft }}", "when": "draft | length > 3"},
            ],
            "output": "{{ final or draft }}",
        },
    )

    name: Annotated[str, Field(pattern=NAME)]
    description: Annotated[str, Field(max_length=2000)] | None = None
    modules: Annotated[dict[str, ModuleBody] | None, AtMost("modules")] = None
    steps: Annotated[list[StepBody], AtMost("steps"), Field(min_length=1)]
    output: str | None = Field(None, description="A template; left out, the text of the last step that ran.")


class RunBody(Body):
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"input": "What is 12 + 30?", "stream": False},)

    input: str | dict[str, Any] = Field(description="What templates call `input`: a text, or an object of values.")
    stream: bool | None = Field(None, description="Events as they come, server-sent.")


class PipelineParams(RunBody):
    """What /ws takes: a run and the pipeline's name."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"name": "polish", "input": "What is 12 + 30?"},)

    name: Annotated[str, Field(min_length=1, max_length=64)]


class PipelineCard(Out):
    name: str
    object: Literal["pipeline"] = "pipeline"
    description: str
    steps: list[str] = Field(description="Their ids, in an order in which they may be run.")
    models: list[str] = Field(description="That its steps name.")
    modules: list[str]


class PipelineDetail(PipelineCard):
    document: dict[str, Any] = Field(description="The pipeline as it was sent.")


class PipelineList(Out):
    object: Literal["list"] = "list"
    data: list[PipelineCard]


class PipelineDeleted(Out):
    name: str
    deleted: Literal[True]


class StepResult(Out):
    """One step of a run. usage: of a step with a model."""

    id: str
    status: Literal["done", "skipped"]
    text: str
    model: str | None = None
    finish_reason: str | None = None
    usage: UsageOut | None = None
    time_ms: float


class PipelineResult(Out):
    """The end of a run."""

    type: Literal["done"] = "done"
    id: str
    pipeline: str
    output: str
    steps: list[StepResult]
    usage: UsageOut
    time_ms: float


class StepStarted(Out):
    type: Literal["step_started"] = "step_started"
    step: str


class StepText(Out):
    """New text of a step with a model."""

    type: Literal["step_text"] = "step_text"
    step: str
    text: str


class StepDone(Out):
    type: Literal["step_done"] = "step_done"
    step: str
    result: StepResult


class StepSkipped(Out):
    type: Literal["step_skipped"] = "step_skipped"
    step: str


PipelineEvent = StepStarted | StepText | StepDone | StepSkipped | PipelineResult
EVENTS: tuple[type[Out], ...] = (StepStarted, StepText, StepDone, StepSkipped, PipelineResult)
