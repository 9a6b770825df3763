"""Chat templates: rendered as transformers renders them, and every way they can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text import ChatTemplates, Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>sunny</b> & 'warm' — é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b>é & 'x'</b>\n"}],
    [
        {"role": "user", "content": "Weather in Köln?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
        },
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Thanks"},
    ],
]

# Written for this test in the manner of the templates met in the field: loops with namespaces and loop controls,
# macros, whitespace control, tojson with its options, the generation tag, special tokens, extra variables.
TEMPLATES = {
    "tools": """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' + (tool.function.parameters | tojson(indent=2)) }}
        {{- tool | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] | trim ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "namespace": """{{ bos_token }}{% set ns = namespace(last=-1) %}
    {% for message in messages %}
        {% if message.role == 'tool' %}{% continue %}{% endif %}
        {% set ns.last = loop.index0 %}
[{{ loop.index }}/{{ loop.length }}] {{ message.role | upper }}: {{ message.content }}{{ eos_token }}
    {% endfor %}
last={{ ns.last }} first={{ messages[0]['content'][:2] }} thinking={{ enable_thinking | default(false) }} {{ missing }}
""",
    "macro": """{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}
{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ turn('a', message.content) }}
{% endgeneration %}{% else %}{{ turn('u', message.content) }}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}""",
}


@pytest.fixture(scope="module")
def reference(byte_backend: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_same_text_as_transformers(
    reference: Any, name: str, chat: list[dict[str, Any]], tools: list[Any] | None, prompt: bool
) -> None:
    options: dict[str, Any] = {"enable_thinking": True} if prompt else {}
    want = reference.apply_chat_template(
        chat, tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, **options
    )
    variables = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **options}
    got = ChatTemplates({"default": TEMPLATES[name]}).render(
        chat, tools, add_generation_prompt=prompt, variables=variables
    )
    assert got == want


def test_the_tokenizer_renders_its_own_template(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.has_chat_template
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode(text)[0] == tokenizer.token_to_id("<|im_start|>")


def test_where_templates_come_from(directory: Path) -> None:
    def render(**options: Any) -> str:
        return Tokenizer.load(directory).apply_chat_template([{"role": "user", "content": "Hi"}], **options)

    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tooled {{ eos_token }}"},
    ]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert render() == "plain"
    assert render(tools=TOOLS) == "tooled <|im_end|>"
    assert render(tools=TOOLS, template="default") == "plain"
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert render() == "from json"
    (directory / "chat_template.jinja").write_text("from jinja")
    assert render() == "from jinja"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("rag {{ documents }}")
    assert render(template="rag", documents=3) == "rag 3"
    assert Tokenizer.load(directory).templates.names == ("default", "rag", "tool_use")
    with pytest.raises(ValidationError, match="No chat template is called 'x'; this model has default, rag"):
        render(template="x")


@pytest.mark.parametrize("value", [3, [], [{"name": "default"}], ["default"], {"default": "x"}])
def test_an_unusable_chat_template_is_named(value: Any, directory: Path) -> None:
    with pytest.raises(TokenizerError, match=r"chat_template in tokenizer_config\.json .* must be a string or a list"):
        ChatTemplates.load(directory, {"chat_template": value})


USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for m in messages %}", TokenizerError, "'default' does not parse: .* at line 1"),
        ("{{ raise_exception('roles must alternate') }}", ValidationError, "refuses these messages: roles must alt"),
        ("{{ messages[0].nothing.more }}", ValidationError, "'default' cannot render these messages: UndefinedError"),
        ("{{ messages[0]['content'] + 1 }}", ValidationError, "cannot render these messages: TypeError"),
        ("{{ ''.__class__.__mro__ }}", TokenizerError, "sandbox forbids"),
        ("{{ messages.append(1) }}", TokenizerError, "sandbox forbids"),
        ("{{ range(999999999) | list }}", TokenizerError, "failed: OverflowError"),
        ("{% include '/etc/passwd' %}", TokenizerError, "sandbox forbids"),
    ],
)
def test_template_problems_are_named(template: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ChatTemplates({"default": template}).render(USER)


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "x"}], ["x"], [{"role": 3}], None, {"role": "user"}])
def test_messages_that_are_none(messages: Any) -> None:
    with pytest.raises(ValidationError, match="message"):
        ChatTemplates({"default": "x"}).render(messages)


def test_no_template_at_all() -> None:
    with pytest.raises(ValidationError, match="has no chat template"):
        ChatTemplates({}).render(USER)


def test_strftime_now_is_today() -> None:
    import datetime

    before = datetime.datetime.now().strftime("%Y-%m-%d")
    rendered = ChatTemplates({"default": "{{ strftime_now('%Y-%m-%d') }}"}).render(USER)
    assert before <= rendered <= datetime.datetime.now().strftime("%Y-%m-%d")


def test_the_callers_messages_stay_as_they_were() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    ChatTemplates({"default": "{% set m = messages[0] %}{{ m.content }}"}).render(chat)
    assert chat == USER


def test_importing_text_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, dfastllm.text; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("tools", [None, [], ()])
def test_no_tools_are_none_to_a_template(tools: Any) -> None:
    """Templates ask `tools is not none` as often as `tools`."""
    templates = ChatTemplates({"default": "{% if tools is not none %}tools{% else %}plain{% endif %}"})
    assert templates.render([{"role": "user", "content": "hi"}], tools) == "plain"
    assert templates.render([{"role": "user", "content": "hi"}], [{"type": "function"}]) == "tools"
