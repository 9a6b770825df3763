"""One chat template, compiled: values in, text out, and whatever goes wrong by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text.templates.budget import TooDeep, TooMuch
from dfastllm.text.templates.sandbox import Refused, Sandbox

__all__ = ["Template"]

_OWN = "Do not trust this checkpoint's template; put your own in chat_template.jinja."


class Template:
    """May be used by many threads. name: by which a person knows it. file: where a person put it in place of the
    checkpoint's, None where it is the checkpoint's. literals: the texts that its code has, not those that it writes as
    they stand. Raises TokenizerError for a text that is no template, or one that is too large or too deep to be
    compiled."""

    def __init__(self, name: str, source: str, file: Path | None = None) -> None:
        self.name = name
        self.source = source
        self._sandbox = Sandbox()
        what, mend = f"{name!r}", "Mend it in tokenizer_config.json, or put a good one in chat_template.jinja."
        if file is not None:
            what, mend = f"of {file}", "Mend that file, or name none: the checkpoint has its own."
        try:
            self._compiled, self.literals = self._sandbox.compiled(source)
        except jinja2.TemplateSyntaxError as error:
            why = f"does not parse: {error.message} at line {error.lineno}."
            raise TokenizerError(f"The chat template {what} {why}", hint=mend) from error
        except TooMuch as error:
            raise TokenizerError(f"The chat template {what} is refused: {error}.", hint=mend) from error
        except RecursionError as error:
            raise TokenizerError(f"The chat template {what} does not parse: it nests too deeply.", hint=mend) from error
        except Exception as error:  # of Python's compiler, for code that Jinja lets pass: break outside a loop
            why = f"does not compile: {error.msg if isinstance(error, SyntaxError) else error}."
            raise TokenizerError(f"The chat template {what} {why}", hint=mend) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that the template makes of `values`.

        Raises ValidationError when the template refuses the messages or cannot read them, TokenizerError when the
        template itself is broken, reaches for what it may not, or asks for more work or memory than it may have.
        """
        try:
            return self._sandbox.rendered(self._compiled, values)
        except Refused as error:
            raise ValidationError(f"The chat template refuses these messages: {error}", param="messages") from error
        except TooDeep as error:
            raise ValidationError(f"The chat template {self.name!r} was stopped: {error}.", param="messages") from error
        except TooMuch as error:
            raise TokenizerError(f"The chat template {self.name!r} was stopped: {error}.", hint=_OWN) from error
        except (SecurityError, jinja2.TemplateNotFound) as error:  # it reached for other objects, or for files
            raise TokenizerError(
                f"The chat template {self.name!r} tried something its sandbox forbids: {error}.", hint=_OWN
            ) from error
        except (jinja2.UndefinedError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValidationError(
                f"The chat template {self.name!r} cannot render these messages: {type(error).__name__}: {error}.",
                param="messages",
                hint="Each message needs the fields that the template reads, usually role and content.",
            ) from error
        except Exception as error:  # RecursionError, MemoryError, OverflowError: a template may raise what it likes
            raise TokenizerError(
                f"The chat template {self.name!r} failed: {type(error).__name__}: {error}.", hint=_OWN
            ) from error
