"""Which form of calls a chat template teaches, the refusals of those that teach none, and ids that templates take."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dfastllm import llm
from dfastllm.errors import UnsupportedError
from dfastllm.text import ChatTemplates, Tokenizer, call_reading, taught
from dfastllm.text.tools import FORMS, Taught
from tests.kit.served import SPECIAL, byte_tokenizer

HEAD = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
TAIL = "{{ m.content or '' }}<end>{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}"
HERMES = (
    HEAD + CALLS + '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}" + TAIL
)
LLAMA = (
    HEAD + CALLS + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
    "{% if (m.tool_calls or []) | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}" + TAIL
)
NINE = "{% if not c.id is defined or c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
NINE_BACK = (
    "{% if m.role == 'tool' and (m.tool_call_id or '') | length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
)
MISTRAL = (
    HEAD + NINE_BACK + "{% if m.tool_calls %}[TOOL_CALLS][" + CALLS + NINE + "{{ (c.function | tojson)[:-1] }}"
    ', "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}' + TAIL
)
MISTRAL_NAMES = (
    HEAD + CALLS + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}" + TAIL
)
QWEN_CODER = (
    HEAD + CALLS + "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>{% endfor %}</function>\n</tool_call>{% endfor %}" + TAIL
)
OWN = HEAD + CALLS + "call {{ c.function.name }} with {{ c.function.arguments | tojson }}{% endfor %}" + TAIL
NO_TOOLS = "{% for m in messages %}<{{ m.role }}>" + TAIL
DESCRIBED = "{% if tools %}Call as <tool_call>JSON</tool_call>.{% endif %}" + HEAD + TAIL
BARE_JSON_IN_TAGS = HEAD + CALLS + "<|tool_call|>[{{ c.function | tojson }}]{% endfor %}" + TAIL


def of(template: str, **more: str) -> Taught:
    return taught(ChatTemplates({"default": template, **more}))


@pytest.mark.parametrize(
    ("template", "forms", "short"),
    [
        (HERMES, ["Hermes"], False),
        (LLAMA, ["Llama 3"], False),
        (MISTRAL, ["Mistral"], True),
        (MISTRAL_NAMES, ["Mistral"], False),
        (DESCRIBED, ["Hermes"], False),
        (
            HEAD.replace("{{ t | tojson }}", "{{ t | tojson(indent=4) }}") + TAIL,
            ["Hermes", "Mistral", "Llama 3"],
            False,
        ),
        ("{{ messages[-1].content }}", ["Hermes", "Mistral", "Llama 3"], False),
    ],
    ids=["hermes", "llama", "mistral", "mistral names", "described", "says nothing", "the message alone"],
)
def test_the_form_is_what_the_template_writes(template: str, forms: list[str], short: bool) -> None:
    found = of(template)
    assert ([form.name for form in found.forms], found.short_ids) == (forms, short)
    found.require()
    assert found.strict == (len(forms) > 1 or template == DESCRIBED)


def test_a_template_for_tools_is_the_one_that_counts() -> None:
    assert [form.name for form in of(NO_TOOLS, tool_use=MISTRAL).forms] == ["Mistral"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN_CODER, "Qwen3-Coder"),
        (QWEN_CODER.replace("<function=", "<f="), "a form of its own"),
        (BARE_JSON_IN_TAGS, "Granite"),
        (OWN, "a form of its own"),
        (OWN.replace("call ", "[[TOOL_CALLS]"), "a form of its own"),
        (NO_TOOLS, "does not read tools"),
        ("{{ tools.0.nothing.here }}", "does not read tools"),
        ("{% broken", "does not read tools"),
    ],
)
def test_another_form_is_refused_by_name(template: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(said)) as caught:
        of(template).reading({"f"})
    assert caught.value.param == "tools"
    assert "tool_choice none" in caught.value.message
    assert "--chat-template" in caught.value.message
    assert all(form.example in caught.value.message for form in FORMS)


def test_no_template_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        taught(ChatTemplates({})).reading({"f"})


@pytest.mark.parametrize("name", llm.shipped_models())
def test_the_demo_models_teach_hermes(name: str) -> None:
    found = taught(Tokenizer.load(llm.SHIPPED / name).templates)
    assert [form.name for form in found.forms] == ["Hermes"]
    assert not found.strict


def test_a_template_that_says_nothing_leaves_it_to_the_vocabulary() -> None:
    silent = HEAD + TAIL
    assert call_reading(byte_tokenizer(silent), {"f"}).taught.forms == FORMS
    with pytest.raises(UnsupportedError, match="LFM2"):
        call_reading(byte_tokenizer(silent, special=("<|tool_call_start|>",)), {"f"})
    assert call_reading(byte_tokenizer(HERMES, special=("<|tool_call_start|>",)), {"f"}).taught.forms == FORMS[:1]


def talk(*ids: str) -> list[dict[str, Any]]:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": {"k": 1}}} for id in ids]
    results = [{"role": "tool", "tool_call_id": id, "content": "ok"} for id in ids]
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def test_ids_of_another_model_are_made_to_fit() -> None:
    templates = ChatTemplates({"default": MISTRAL})
    ids = ["call_0123456789abcdef01234567", "abcDEF123", "call_0123456789abcdef01234568", "toolu_9", "", "é" * 9]
    messages = talk(*ids)
    fitted = taught(templates).fitted(messages)
    made = [call["id"] for call in fitted[1]["tool_calls"]]
    assert made == [message["tool_call_id"] for message in fitted[2:]], "a result stays with its call"
    assert made == [call["id"] for call in taught(templates).fitted(talk(*ids))[1]["tool_calls"]]
    assert len(set(made)) == len(ids)
    assert made[1] == ids[1]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in made)
    assert messages == talk(*ids), "the caller's messages are left alone"
    assert made[0] in templates.render(fitted)
    hermes = of(HERMES)
    assert hermes.fitted(messages) is messages


@pytest.mark.parametrize(("template", "pattern"), [(MISTRAL, "[a-zA-Z0-9]{9}"), (HERMES, "call_[0-9a-f]{24}")])
def test_new_ids_fit_the_template(template: str, pattern: str) -> None:
    found = of(template)
    ids = {found.new_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(re.fullmatch(pattern, id) for id in ids)


def test_markup_that_is_special_stays_in_the_text() -> None:
    tokenizer = byte_tokenizer(MISTRAL, special=("[TOOL_CALLS]", "[ARGS]", "[INST]"))
    shown = taught(tokenizer.templates).shown_ids(tokenizer)
    assert [tokenizer.id_to_token(id) for id in shown] == ["[TOOL_CALLS]", "[ARGS]"]
    assert taught(byte_tokenizer(MISTRAL).templates).shown_ids(byte_tokenizer(MISTRAL)) == ()
    assert set(SPECIAL.values()).isdisjoint(map(tokenizer.id_to_token, shown))
