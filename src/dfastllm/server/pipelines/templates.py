"""Templates of pipelines: the sandbox of chat templates, in which every step is charged, with names that must exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from dfastllm.errors import ValidationError
from dfastllm.text.templates.budget import TooDeep, TooMuch
from dfastllm.text.templates.sandbox import Refused, Sandbox

__all__ = ["INPUT", "Condition", "Template"]

INPUT = "input"  # the name of what a run is given
_LONGEST = 1 << 16  # characters of a template


def _sandbox() -> Sandbox:
    sandbox = Sandbox()
    sandbox.undefined = jinja2.StrictUndefined
    return sandbox


_SANDBOX = _sandbox()  # one may be used by many threads


class Template:
    """A text with `{{ name }}` in it. May be used by many threads.

    names: what it reads, `input` included. where: of errors, `steps.draft.input`.

    Raises ValidationError for a text that is no template, or one that is too large or nests too deep."""

    def __init__(self, source: str, where: str) -> None:
        self.where = where
        if len(source) > _LONGEST:
            raise ValidationError(f"{where} has {len(source)} characters; a template may have {_LONGEST}.", param=where)
        try:
            self._compiled, _ = _SANDBOX.compiled(source)
            self.names = _SANDBOX.names(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValidationError(
                f"{where} is no template: {error.message} at line {error.lineno}.", param=where
            ) from error
        except TooMuch as error:
            raise ValidationError(f"{where} is refused: {error}.", param=where) from error
        except Exception as error:  # of Python's compiler, for code that Jinja lets pass: break outside a loop
            what = error.msg if isinstance(error, SyntaxError) else "it nests too deeply"
            raise ValidationError(f"{where} is no template: {what}.", param=where) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """Its text. Raises ValidationError for a value that is not there, and for a template that asks for more work or
        memory than it may have or reaches for what it may not."""
        try:
            return _SANDBOX.rendered(self._compiled, values)
        except Refused as error:
            raise ValidationError(f"{self.where}: the template says: {error}", param=self.where) from error
        except (TooDeep, TooMuch) as error:
            raise ValidationError(f"{self.where} was stopped: {error}.", param=self.where) from error
        except (SecurityError, jinja2.TemplateNotFound) as error:
            raise ValidationError(
                f"{self.where} tried something that templates may not: {error}.", param=self.where
            ) from error
        except Exception as error:  # a template may raise what it likes: StrictUndefined, TypeError, RecursionError ...
            said = str(error) or type(error).__name__
            raise ValidationError(f"{self.where} cannot be rendered: {said.rstrip('.')}.", param=self.where) from error


class Condition(Template):
    """An expression that is true or false: `'?' in question and draft | length > 40`. Raises as `Template`."""

    def __init__(self, source: str, where: str) -> None:
        if "%}" in source or "{%" in source:
            raise ValidationError(f"{where} must be an expression, not statements of a template.", param=where)
        super().__init__("{% if (" + source + "\n) %}1{% endif %}", where)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Raises as `render`."""
        return self.render(values) == "1"
