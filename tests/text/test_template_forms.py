"""The form in which a template reads messages, found by trying it: every family's shape shows what was said."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.text import ChatTemplates
from dfastllm.text.templates.form import ABSENT, Form

# Written for this test in the manner of the families' templates: what they read, not their words.
TEMPLATES = {
    "llama 3": "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<h>assistant</h>"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<eot>' }}{% else %}"
    "<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>{% endif %}{% endfor %}",
    "qwen 2.5": "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}{{- '<s>assistant' }}"
    "{%- if m.content %}{{- '\n' + m.content }}{%- endif %}{%- for call in m.tool_calls %}"
    "{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{- (call.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<e>\n' }}{%- else %}{{- '<s>' + m.role + '\n' + m.content + '<e>\n' }}{%- endif %}{%- endfor %}",
    "mistral": "{%- if messages[0].role == 'system' %}{%- set told = messages[0].content %}"
    "{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{%- for m in rest %}{%- if m.role == 'user' %}[I]"
    "{%- if loop.last and told is defined %}{{- told + '\n\n' }}{%- endif %}{{- m.content }}[/I]"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}[C]{%- for call in m.tool_calls %}"
    "{%- if call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}"
    "{{- call.function | tojson }}{%- endfor %}{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '</s>' }}"
    "{%- elif m.role == 'tool' %}[R]{{- m.content }}[/R]{%- endif %}{%- endfor %}",
    "deepseek": "{%- for m in messages %}{%- if m.role == 'assistant' and m.content is none %}<A>"
    "{%- for call in m.tool_calls %}{{- call.type + '<sep>' + call.function.name + '\n' + call.function.arguments }}"
    "{%- endfor %}{%- elif m.role == 'assistant' %}<A>{{- m.content }}{%- else %}<{{ m.role }}>{{- m.content }}"
    "{%- endif %}{%- endfor %}",
    "smolvlm": "{% for m in messages %}<{{ m.role }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for line in m.content %}{% if line.type == 'text' %}{{ line.text }}{% endif %}{% endfor %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<end>\n{% endfor %}",
    "first part": "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}",
    "llama 3.2 vision": "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content | trim }}]{% else %}"
    "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endif %}{% endfor %}",
    "parts but for the system": "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content | trim }}]{% else %}"
    "<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
    "no content beside calls": "{% for m in messages %}{% if 'content' in m %}<{{ m.role }}>{{ m.content }}{% else %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}={{ v }}"
    "{% endfor %}){% endfor %}{% endif %}{% endfor %}",
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}",
    "without a system": "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
    "capitals": "{% for m in messages %}{{ m.role | upper }}: {{ m.content | upper }}\n{% endfor %}",
    "bare": "{{ messages[-1].content }}",
    "a constant": "x",
}
ALL = frozenset({"user", "assistant", "tool", "system"})
NOTHING = [{"type": "text", "text": ""}]
FORMS = {
    "llama 3": Form(),
    "qwen 2.5": Form(),
    "mistral": Form(),
    "deepseek": Form(empty=None, arguments="text"),
    "smolvlm": Form(parts=ALL, empty=NOTHING),
    "first part": Form(parts=ALL, empty=NOTHING),
    "llama 3.2 vision": Form(),
    "parts but for the system": Form(parts=ALL - {"system"}, empty=NOTHING),
    "no content beside calls": Form(empty=ABSENT),
    "gemma": Form(system=False),
    "without a system": Form(system=False),
    "capitals": Form(),
    "bare": Form(bare=True),
    "a constant": Form(),
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "dry"},
    {"role": "assistant", "content": "No rain."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_of_a_template(name: str) -> None:
    templates = ChatTemplates({"default": TEMPLATES[name]})
    assert templates.form("default") == FORMS[name]
    assert templates.form("default") is templates.form("default")  # tried once


@pytest.mark.parametrize("content", ["Rain?", [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "a constant"])
def test_what_a_user_says_is_shown(name: str, content: Any) -> None:
    text = ChatTemplates({"default": TEMPLATES[name]}).render([{"role": "user", "content": content}])
    assert ("RAIN?" if name == "capitals" else "Rain?") in text
    assert "type" not in text


@pytest.mark.parametrize("empty", ["", None, ABSENT, []])
@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize("name", ["llama 3", "qwen 2.5", "mistral", "deepseek", "smolvlm", "no content beside calls"])
def test_calls_are_shown_whatever_form_they_come_in(name: str, arguments: Any, empty: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": empty, "tool_calls": [call]}
    if empty is ABSENT:
        del turn["content"]
    text = ChatTemplates({"default": TEMPLATES[name]}).render([TALK[0], turn, *TALK[2:]])
    wanted = "weather(city=Köln)" if name == "no content beside calls" else '{"city": "Köln"}'
    assert wanted in text
    assert "weather" in text
    assert "None" not in text
    assert text == ChatTemplates({"default": TEMPLATES[name]}).render(TALK)


@pytest.mark.parametrize("name", ["llama 3", "qwen 2.5", "mistral"])
def test_an_empty_list_of_calls_is_none(name: str) -> None:
    templates = ChatTemplates({"default": TEMPLATES[name]})
    plain = [TALK[0], TALK[3], TALK[4]]
    assert templates.render([TALK[0], {**TALK[3], "tool_calls": []}, TALK[4]]) == templates.render(plain)
    assert templates.render([TALK[0], {**TALK[3], "tool_calls": None}, TALK[4]]) == templates.render(plain)


@pytest.mark.parametrize("name", ["gemma", "without a system"])
def test_a_system_without_a_turn_begins_the_first_users(name: str) -> None:
    templates = ChatTemplates({"default": TEMPLATES[name]})
    talk = [{"role": "system", "content": "Be brief."}, TALK[0], TALK[3], TALK[4]]
    folded = [{"role": "user", "content": "Be brief.\n\nRain?"}, TALK[3], TALK[4]]
    assert templates.render(talk) == templates.render(folded)
    assert "Be brief.\n\nRain?" in templates.render(talk)
    assert "Be brief." in templates.render(talk[:1])


def test_the_callers_messages_stay_as_they_are() -> None:
    talk = [dict(message) for message in TALK]
    ChatTemplates({"default": TEMPLATES["deepseek"]}).render(talk)
    assert talk == TALK


def test_a_broken_template_is_asked_no_further_and_says_so_when_it_is_used() -> None:
    assert ChatTemplates({"default": "{{ 'a' * 10000000000 }}"}).form("default") == Form()


def test_each_named_template_has_a_form_of_its_own() -> None:
    templates = ChatTemplates({"default": TEMPLATES["deepseek"], "tool_use": TEMPLATES["smolvlm"]})
    assert templates.form("default") == FORMS["deepseek"]
    assert templates.form("tool_use") == FORMS["smolvlm"]
