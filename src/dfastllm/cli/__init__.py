"""The `dfastllm` command. One file per command; a command imports what it needs when it runs, so `--help` is quick and
loads neither torch nor the web stack. Does no work of its own: parses options, calls a room below, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from dfastllm.bench.command import bench
from dfastllm.bench.gate_command import app as gate
from dfastllm.cli.chat import chat
from dfastllm.cli.check import check
from dfastllm.cli.distill import distill
from dfastllm.cli.doctor import doctor
from dfastllm.cli.eval import evaluate
from dfastllm.cli.generate import generate
from dfastllm.cli.keys import app as keys
from dfastllm.cli.lora import app as lora
from dfastllm.cli.models import listing, pull, remove
from dfastllm.cli.output import Group
from dfastllm.cli.quantize import quantize
from dfastllm.cli.serve import serve
from dfastllm.cli.tenants import app as tenants
from dfastllm.cli.top import top
from dfastllm.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="dfastllm",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, chat, serve, top, bench, train, distill, quantize, check, doctor):
    app.command()(_command)
for _named, _command in (("eval", evaluate), ("pull", pull), ("list", listing), ("rm", remove)):
    app.command(_named)(_command)
for _group in (gate, lora, tenants, keys):
    app.add_typer(_group)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dfastllm {version('dfastllm')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fast language-model inference, masked diffusion and autoregression in one engine."""


def main() -> None:
    app()
