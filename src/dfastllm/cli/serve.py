"""`dfastllm serve`: settings in, server up."""

from __future__ import annotations

from typing import Any

from dfastllm.cli.options import from_settings, takes
from dfastllm.cli.output import warn
from dfastllm.settings import Settings, unknown_variables

__all__ = ["serve"]


@takes(settings=from_settings())
def serve(settings: dict[str, Any]) -> None:
    """Serve models over HTTP with the OpenAI API."""
    for name in unknown_variables():
        warn(f"{name} is set but is no setting of dfastllm (see docs/settings.md)")
    loaded = Settings.load(settings)

    from dfastllm.server import serve as run

    run(loaded)
