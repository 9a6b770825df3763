"""What every command does with people: one line per error, results on stdout, progress and remarks on stderr.

Convention: a progress bar or a spinner is rich's and goes to stderr, so that stdout holds the result and nothing else.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

import typer

from dfastllm.errors import (
    CancelledError,
    DFastLLMError,
    ModelNotFoundError,
    TenantNotFoundError,
    ValidationError,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Group", "console", "exit_code", "printable", "warn"]

# C0 and C1 controls but tab and newline -> their visible signs: a model's text must not steer the terminal.
CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    **dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}"),
}


def console(*, stderr: bool = False) -> Console:
    """Takes text as it stands: a name or a path may hold what rich would read as markup, `[/b]`."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def printable(text: str) -> str:
    """Text that is safe to show on a terminal."""
    return text.translate(CONTROLS)


def warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def exit_code(error: BaseException) -> int:
    """2: the input was wrong and another call may succeed; 1: it failed."""
    return 2 if isinstance(error, (ValidationError, ModelNotFoundError, TenantNotFoundError)) else 1


class Group(typer.core.TyperGroup):
    """The command group: errors become one line on stderr and an exit code. `--debug` shows the traceback as well."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):  # typer's own: usage errors have exit code 2
            raise
        except (CancelledError, KeyboardInterrupt):  # only ctrl-C cancels what a command runs
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except DFastLLMError as error:
            self._report(ctx, error, f"error: {error}")
            raise typer.Exit(exit_code(error)) from None
        except BrokenPipeError:  # the reader of our pipe went away: nobody is left to tell
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            hint = "" if ctx.params.get("debug") else " (dfastllm --debug COMMAND shows where)"
            self._report(ctx, error, f"error: {type(error).__name__}: {error}{hint}")
            raise typer.Exit(1) from None

    def _report(self, ctx: Any, error: BaseException, line: str) -> None:
        if ctx.params.get("debug"):
            traceback.print_exception(error)
        typer.echo(printable(" ".join(line.split())), err=True)
