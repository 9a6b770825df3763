"""Chat templates of a checkpoint: where they come from, which one a conversation takes, and its text.

A template is rendered in a sandbox with limits (`templates.sandbox`), as Hugging Face renders it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text.files import read_json, read_text
from dfastllm.text.templates.form import Form, adapted, probed
from dfastllm.text.templates.quoting import Marks, Quoting
from dfastllm.text.templates.template import Template

__all__ = ["ChatTemplates", "Rendering"]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A text and what of it people wrote.

    text    as it is meant.
    marked  the same, with stand-ins for the letters of people's texts that may begin or end a special token; None where
            people wrote the markup themselves.
    """

    text: str
    marked: str | None


class ChatTemplates:
    """The named templates of one checkpoint. `render` picks "tool_use" when tools are given and it exists, else
    "default". Compiled on first use, so that a broken template only fails who needs it.

    variables: names that templates see unless a call of `render` gives them another value.
    file: where a person put the template in place of the checkpoint's, None where it is the checkpoint's.
    """

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, Any] | None = None, file: Path | None = None
    ) -> None:
        self._file = file
        self._sources = dict(templates)
        self._variables = dict(variables or {})
        _check_variables(self._variables)
        self._compiled: dict[str, Template] = {}
        self._forms: dict[str, Form] = {}
        self._marks: dict[str, Marks] = {}

    @classmethod
    def load(cls, directory: Path, config: Mapping[str, Any]) -> ChatTemplates:
        """Templates of a checkpoint directory. Files win over `config` (the content of tokenizer_config.json), as in
        Hugging Face: chat_template.jinja, additional_chat_templates/*.jinja, chat_template.json, then the config's
        `chat_template`: one string, or a list of {"name", "template"}. Raises TokenizerError when none of these forms
        fits."""
        templates = _from_value(config.get("chat_template"), "tokenizer_config.json", directory)
        legacy = directory / "chat_template.json"
        if legacy.is_file():
            templates |= _from_value(read_json(legacy).get("chat_template"), legacy.name, directory)
        single = directory / "chat_template.jinja"
        if single.is_file():
            templates["default"] = read_text(single)
        for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = read_text(file)
        return cls(templates)

    def chosen(
        self, template: str | None, variables: Mapping[str, Any] | None = None, file: Path | None = None
    ) -> ChatTemplates:
        """These templates with further variables or, where a template's text is given, that one for every conversation;
        `file` is where it was read. Raises TokenizerError when it does not parse, ValidationError for variables that a
        conversation sets."""
        sources = self._sources if template is None else {"default": template}
        file = self._file if template is None else file
        templates = ChatTemplates(sources, {**self._variables, **(variables or {})}, file)
        if template is not None:
            templates._compile("default")
        return templates

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._sources))

    def __bool__(self) -> bool:
        return bool(self._sources)

    def source(self, name: str = "default") -> str | None:
        """The template's text, None when there is none of that name."""
        return self._sources.get(name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, its messages brought into the form that the template reads.

        variables: further names the template sees (bos_token, enable_thinking, ...).
        Raises ValidationError when there is no template, the messages are no messages, the template refuses them or a
        variable is one that the conversation sets; TokenizerError when the template itself is broken.
        """
        _check_messages(messages)
        _check_variables(variables or {})
        name = self._pick(template, tools)
        turns = adapted(messages, self.form(name))
        return self._rendered(name, turns, tools, variables, add_generation_prompt)

    def quoted(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        spellings: Iterable[str],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """As `render`, with what people wrote told apart: messages, tools, and the variables of this call but those
        that are named as tokens are. spellings: of the special tokens, always the same. A template that adds nothing to
        a message leaves its markup to people, so nothing is told apart there."""
        _check_messages(messages)
        _check_variables(variables or {})
        name = self._pick(None, tools)
        form = self.form(name)
        turns = adapted(messages, form)
        if not form.bare:
            if name not in self._marks:
                self._marks[name] = Marks(spellings, self._compile(name).literals)
            given = {key: value for key, value in (variables or {}).items() if not key.endswith("_token")}
            quoting = Quoting(self._marks[name], (turns, tools, given), self._sources[name])
            if quoting.needed:
                told = {**(variables or {}), **quoting.quoted(given)}
                listed = quoting.quoted(tools) if tools else None
                marked = self._rendered(name, quoting.quoted(turns), listed, told, add_generation_prompt)
                return Rendering(quoting.restored(marked), marked)
        text = self._rendered(name, turns, tools, variables, add_generation_prompt)
        return Rendering(text, None if form.bare else text)

    def form(self, name: str) -> Form:
        """In what form the template of this name reads messages, tried out the first time it is asked."""
        if name not in self._forms:
            self._forms[name] = probed(lambda messages, tools: self._rendered(name, messages, tools, None, True))
        return self._forms[name]

    def _rendered(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        return self._compile(name).render(
            {
                **self._variables,
                **(variables or {}),
                "messages": list(messages),
                "tools": list(tools) if tools else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _pick(self, template: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if not self._sources:
            raise ValidationError(
                "This model has no chat template, so it cannot take messages.",
                param="messages",
                hint="Send a plain prompt, or load the model with a template: --chat-template FILE, chat_template= in "
                "Python.",
            )
        if template is None:
            template = "tool_use" if tools and "tool_use" in self._sources else "default"
        if template not in self._sources:
            raise ValidationError(
                f"No chat template is called {template!r}; this model has {', '.join(self.names)}.", param="template"
            )
        return template

    def _compile(self, name: str) -> Template:
        if name not in self._compiled:
            self._compiled[name] = Template(name, self._sources[name], self._file)
        return self._compiled[name]


def _from_value(value: Any, file: str, directory: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    rows = value if isinstance(value, list) else []
    ok = bool(rows) and all(
        isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("template"), str)
        for row in rows
    )
    if not ok:
        raise TokenizerError(
            f"chat_template in {file} of {directory} must be a string or a list of "
            f'{{"name": ..., "template": ...}} objects, got {type(value).__name__}.'
        )
    return {row["name"]: row["template"] for row in rows}


def _check_variables(variables: Mapping[str, Any]) -> None:
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in variables:
            raise ValidationError(
                f"{name} is no variable of the chat template to set: the conversation itself sets it.",
                param="chat_template_kwargs",
                hint=f"Leave it out, or send {name} as a field of its own.",
            )


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValidationError(
            f"messages must be a non-empty list of {{role, content}} objects, got {messages!r}.", param="messages"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValidationError(
                f"messages[{index}] must be an object with a role, got {message!r}.", param=f"messages[{index}]"
            )
