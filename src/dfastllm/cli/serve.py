"""`dfastllm serve`: settings in, server up."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dfastllm.cli.options import from_settings, takes
from dfastllm.cli.output import warn
from dfastllm.errors import ValidationError
from dfastllm.settings import Settings, unknown_variables

__all__ = ["serve"]


@takes(settings=from_settings())
def serve(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="The same as --model.")] = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Serve models over HTTP with the OpenAI API."""
    if models and "model" in settings:
        raise ValidationError("models were given both as arguments and with --model; give them once.", param="model")
    if models:
        settings["model"] = models
    for name in unknown_variables():
        warn(f"{name} is set but is no setting of dfastllm (see docs/settings.md)")
    loaded = Settings.load(settings)

    from dfastllm.server import serve as run

    run(loaded)
