"""A pipeline that was understood: its templates compiled, its modules too, and what each step waits for.

All that can be wrong with one is found here, before it is kept: names of steps that there are not, steps that wait for
each other, options that no request may have, modules that are none.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.errors import ValidationError
from dfastllm.sandbox import Module
from dfastllm.server.options import sampling_params
from dfastllm.server.pipelines.schema import PipelineBody, PipelineCard, StepBody
from dfastllm.server.pipelines.templates import INPUT, Condition, Template
from dfastllm.server.reading import validated
from dfastllm.server.schemas import ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["Pipeline", "Step", "understood"]

OURS = ("prompt", "messages", "model", "stream", "stream_options", "n", "lora")  # what a step or a run decides itself


@dataclass(frozen=True)
class Step:
    """One step. inputs: the templates of its input, or of its messages in order; needs: the steps whose texts it reads,
    by their outputs' names; output: the name of its own."""

    body: StepBody
    inputs: tuple[Template, ...]
    when: Condition | None
    module: Module | None
    needs: frozenset[str]
    output: str

    @property
    def id(self) -> str:
        return self.body.id

    def request(self, values: Mapping[str, Any]) -> GenerationRequest:
        """The body of its request, with these values in its templates. Raises ValidationError."""
        return _request(self.body, [template.render(values) for template in self.inputs])


@dataclass(frozen=True)
class Pipeline:
    """steps: each after those that it needs. output: a template, None: the text of the last step that ran."""

    body: PipelineBody
    steps: tuple[Step, ...]
    output: Template | None

    @property
    def name(self) -> str:
        return self.body.name

    def card(self) -> PipelineCard:
        """What lists show."""
        models = dict.fromkeys(step.body.model for step in self.steps if step.body.model is not None)
        return PipelineCard(
            name=self.name,
            description=self.body.description or "",
            steps=[step.id for step in self.steps],
            models=list(models),
            modules=list(self.body.modules or ()),
        )


def understood(body: PipelineBody) -> Pipeline:
    """Compiles all of it; may take a while (modules). Raises ValidationError naming the step and the field."""
    modules = {name: _module(name, one.wat, one.wasm) for name, one in (body.modules or {}).items()}
    outputs = _outputs(body.steps)
    steps = [_step(step, modules, outputs) for step in body.steps]
    output = None if body.output is None else Template(body.output, "output")
    if output is not None:
        _known(output, outputs)
    return Pipeline(body, tuple(_ordered(steps)), output)


def _module(name: str, wat: str | None, wasm: str | None) -> Module:
    where = f"modules.{name}"
    if (wat is None) == (wasm is None):
        raise ValidationError(f"{where} needs wat or wasm, one of them.", param=where)
    if wat is not None:
        return Module(wat, name=name)
    try:
        binary = base64.b64decode(wasm or "", validate=True)
    except binascii.Error as error:
        raise ValidationError(f"{where}.wasm is not base64: {error}.", param=where) from error
    return Module(binary, name=name)


def _outputs(steps: Sequence[StepBody]) -> dict[str, str]:
    """step id by the name of its output. Raises ValidationError for a name that is there twice."""
    ids: set[str] = set()
    outputs: dict[str, str] = {}
    for step in steps:
        name = step.output or step.id
        if step.id in ids:
            raise ValidationError(f"two steps have the id {step.id!r}.", param="steps")
        if name in outputs or name == INPUT:
            who = "the input of the run" if name == INPUT else f"step {outputs[name]!r}"
            raise ValidationError(f"{name!r} of step {step.id!r} is {who} already.", param=f"steps.{step.id}.output")
        ids.add(step.id)
        outputs[name] = step.id
    return outputs


def _step(body: StepBody, modules: Mapping[str, Module], outputs: Mapping[str, str]) -> Step:
    where = f"steps.{body.id}"
    module = None
    if body.module is not None:
        for other in ("model", "adapter", "messages", "options"):
            if getattr(body, other) is not None:
                raise ValidationError(f"{where}: module and {other} do not go together.", param=where)
        if body.module not in modules:
            raise _unknown(f"{where}.module", body.module, modules)
        module = modules[body.module]
    if (body.input is None) == (body.messages is None):
        raise ValidationError(f"{where} needs input or messages, one of them.", param=where)
    if body.input is not None:
        texts = {f"{where}.input": body.input}
    else:
        texts = {f"{where}.messages[{i}]": one.content for i, one in enumerate(body.messages or ())}
    inputs = tuple(Template(text, place) for place, text in texts.items())
    when = None if body.when is None else Condition(body.when, f"{where}.when")
    for template in (*inputs, *([] if when is None else [when])):
        _known(template, outputs)
    if module is None:
        _request(body, ["x"] * len(inputs), check=True)
    read = frozenset().union(*(one.names for one in inputs), when.names if when is not None else ())
    return Step(body, inputs, when, module, read - {INPUT}, body.output or body.id)


def _known(template: Template, outputs: Mapping[str, str]) -> None:
    for name in sorted(template.names):
        if name != INPUT and name not in outputs:
            raise _unknown(template.where, name, {INPUT: "", **outputs})


def _unknown(where: str, name: str, known: Mapping[str, Any]) -> ValidationError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known) or 'none'}."
    return ValidationError(f"{where} names {name!r}, which there is not.", param=where, hint=hint)


def _request(body: StepBody, texts: Sequence[str], check: bool = False) -> GenerationRequest:
    """The request of a step. check: try the values of its options too, which a call does anyway. Raises ValidationError
    for an option that is none, or that the step may not choose."""
    options = dict(body.options or {})
    for name in OURS:
        if name in options:
            raise ValidationError(
                f"steps.{body.id}.options: {name} is not chosen there.", param=f"steps.{body.id}.options.{name}"
            )
    if body.model is not None:
        options["model"] = body.model
    if body.adapter is not None:
        options["lora"] = body.adapter
    try:
        request: GenerationRequest
        if body.messages is None:
            request = validated(CompletionRequest, {"prompt": texts[0], **options})
        else:
            messages = [{"role": one.role, "content": text} for one, text in zip(body.messages, texts, strict=True)]
            request = validated(ChatRequest, {"messages": messages, **options})
        if check:
            sampling_params(request)
        return request
    except ValidationError as error:
        where = f"steps.{body.id}.options"
        raise ValidationError(f"{where}: {error.message}", param=f"{where}.{error.param}") from None


def _ordered(steps: Sequence[Step]) -> list[Step]:
    """Each step after those that it needs, as written where that leaves a choice. Raises ValidationError for steps that
    wait for each other."""
    left = list(steps)
    done: set[str] = set()
    order: list[Step] = []
    while left:
        free = next((step for step in left if step.needs <= done), None)
        if free is None:
            raise _circle(left)
        left.remove(free)
        done.add(free.output)
        order.append(free)
    return order


def _circle(steps: Sequence[Step]) -> ValidationError:
    by_output = {step.output: step for step in steps}
    path = [steps[0]]
    while True:
        after = next(by_output[name] for name in sorted(path[-1].needs) if name in by_output)
        if after in path:
            names = [step.id for step in path[path.index(after) :]] + [after.id]
            return ValidationError(
                f"steps wait for each other: {' needs '.join(names)}.",
                param=f"steps.{after.id}",
                hint="A step may read only what steps that do not read its own text have made.",
            )
        path.append(after)
