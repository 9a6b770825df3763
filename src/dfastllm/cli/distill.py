"""`dfastllm distill`: train a student as a configuration says; a run that was stopped goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfastllm.settings import Settings

__all__ = ["distill"]


def distill(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run. \\[default: runs/NAME of the file]", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try everything on a few samples, call no teacher, train nothing.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Stop early at this step.", min=1)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on with an earlier run.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; another number gives other last bits. Default: all cores.", min=1)
    ] = None,
) -> None:
    """Distil a student that answers in fewer tokens and calls its tools earlier. See docs/distillation.md.

    Exit codes: 0 done, or all checks passed; 1 a check failed or the run did; 2 the configuration is wrong.
    """
    settings = Settings.load({"device": device, "threads": threads})

    if check:
        from dfastllm.distill.check import check_config, show_checks

        checks = check_config(config, device=settings.device, threads=settings.threads)
        show_checks(checks)
        raise typer.Exit(0 if all(one.passed for one in checks) else 1)

    from dfastllm.distill.finish import show
    from dfastllm.distill.run import run_distillation

    home = Path("runs") / config.stem if out is None else out
    report = run_distillation(
        config, home, resume=not fresh, steps=steps, device=settings.device, threads=settings.threads
    )
    if report is not None:
        show(report)
