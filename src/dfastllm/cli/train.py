"""`dfastllm train`: train a recipe; a run that was stopped goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfastllm.settings import Settings

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(help="A demo model's name, or a JSON file with the fields of a recipe.")],
    out: Annotated[Path | None, typer.Option(help="Export a Hugging Face directory here at the end.")] = None,
    runs: Annotated[Path, typer.Option(help="Directory of checkpoints and logs.")] = Path("runs"),
    steps: Annotated[int | None, typer.Option(help="Stop early at this step.", min=1)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on with an earlier run.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; another number gives other last bits.", min=1)] = 1,
) -> None:
    """Train a demo model, or a model of your own recipe, on the generated task mix."""
    settings = Settings(device=device, threads=threads)  # the same checks and words as everywhere

    from dfastllm.train import run

    done = run(recipe, out=out, runs=runs, steps=steps, resume=not fresh, device=settings.device, threads=threads)
    typer.echo(done)
    if out is not None:
        typer.echo(out)
