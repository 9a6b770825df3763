"""`dfastllm pull`, `list` and `rm`: models by name, fetched, shown and taken away."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated

import typer

from dfastllm.cli.output import console

__all__ = ["listing", "pull", "remove"]

_NAME = "ORG/NAME, ORG/NAME@REVISION or ORG/NAME:VARIANT of a hub, or a name that `dfastllm list` shows."


def pull(model: Annotated[str, typer.Argument(metavar="NAME", help=_NAME)]) -> None:
    """Fetch a model into the cache and print where it lies."""
    from dfastllm.hub import find

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dfastllm.hub")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        typer.echo(find.pull(model))
    finally:
        logger.removeHandler(handler)
    typer.echo(f"try it: dfastllm chat --model {model}", err=True)


def listing(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """List the models that can be named: shipped ones, those of packages, those of a hub that are in the cache."""
    from dfastllm.hub.catalogue import catalogue

    found = catalogue()
    if as_json:
        rows = [
            {"name": m.name, "source": m.source, "bytes": m.size, "ready": m.ready, "path": str(m.path)} for m in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table("name", "from", "size", "here", "", box=None, padding=(0, 2, 0, 0))
    for model in found:
        here = "yes" if model.ready else "no"
        table.add_row(model.name, model.source, f"{model.size / 1e6:,.1f} MB", here, model.about)
    console().print(table)


def remove(model: Annotated[str, typer.Argument(metavar="NAME", help=_NAME)]) -> None:
    """Take a fetched model away. Of a hub's id all its revisions, unless one is named."""
    from dfastllm.hub import catalogue

    place, freed = catalogue.remove(model)
    typer.echo(f"removed {place}, {freed / 1e6:,.1f} MB")
