"""Tools in Python: `LLM.chat` shows them, keeps the markup of calls in the text, and `parse_calls` reads it."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm import LLM
from dfastllm.errors import UnsupportedError
from dfastllm.text import ParsedMessage, ToolCall
from tests.kit.served import Parrot, parrot_engine
from tests.text import test_taught as templates

U: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tools", [TOOLS, [TOOLS[0]["function"]]])
def test_calls_of_an_answer(tools: list[dict[str, Any]]) -> None:
    written = '[INST]So. [TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]'
    with LLM(engine=parrot_engine(templates.MISTRAL, ("[TOOL_CALLS]", "[INST]"))) as llm:
        assert isinstance(llm.engine.model, Parrot)
        llm.engine.model.teach(len(llm.render(U, tools)), written)
        [answer] = llm.chat(U, tools=tools)
        assert answer.text == written.removeprefix("[INST]")
        assert llm.parse_calls(answer.text, tools) == ParsedMessage("So.", (ToolCall("f", '{"k": 1}'),))


def test_tools_of_a_template_that_cannot_call_are_refused() -> None:
    with LLM(engine=parrot_engine(templates.NO_TOOLS)) as llm:
        for ask in (lambda: llm.chat(U, tools=TOOLS), lambda: llm.parse_calls("hi", TOOLS)):
            with pytest.raises(UnsupportedError, match="does not read tools"):
                ask()
        assert llm.chat(U)[0].text == ""
