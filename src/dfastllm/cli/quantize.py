"""`dfastllm quantize`: a float checkpoint into a smaller one, with a report of what it costs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.output import console
from dfastllm.errors import ValidationError
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.convert import Report

__all__ = ["quantize"]

# A test compares this with the formats there are.
FORMATS = "w8, w8r, w8g, w8gr, w6, w4m, w4, w4r, gguf-q8_0 or gguf-q4_0"


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A shipped model's name, a Hugging Face directory or a GGUF file.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write (gguf-...: the file).")],
    format: Annotated[
        str,
        typer.Option(
            help=f"{FORMATS}. 8bit: w8r, or w8g for a model that w8r cannot hold. r: the model in another basis. "
            "w4m: 4 bits with a minimum."
        ),
    ] = "8bit",
    head: Annotated[
        str,
        typer.Option(
            help="Format of embedding and head; float keeps them. \\[default: w8g; with 8 bits the format itself]"
        ),
    ] = "",
    calibrate: Annotated[
        str, typer.Option(help="none; aware: scales weighted by the activations seen; gptq.")
    ] = "none",
    calibration_file: Annotated[
        Path | None, typer.Option(help="Text or .jsonl to calibrate on; default: the task mix.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 128,
    act_order: Annotated[bool, typer.Option(help="gptq: inputs with large activations first.")] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Also measure loss and accuracy on the task mix, before and after.")
    ] = False,
    report_samples: Annotated[int, typer.Option(help="Samples of every task for --report.", min=1)] = 25,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Quantise a model: fewer bits a weight, a tensor at a time."""
    settings = Settings.load({"threads": threads})

    import torch
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    columns = (TextColumn("quantising"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with _ending_in_order(), Progress(*columns, TextColumn("{task.fields[name]}"), console=console(stderr=True)) as bar:
        task = bar.add_task("", total=None, name="")

        def progress(done: int, total: int, name: str = "") -> None:
            bar.update(task, completed=done, total=total, name=name)

        if format.startswith("gguf-"):
            if calibrate != "none" or calibration_file is not None or head or report:
                raise ValidationError(
                    "gguf files are written without calibration, --head and --report.", param="format"
                )
            from dfastllm.convert import quantise_gguf

            typer.echo(quantise_gguf(source, out, format, force=force, progress=progress))
            return
        from dfastllm.convert import Options, measure, quantise_model

        options = Options(
            format,
            head=head,
            calibration=calibrate,  # type: ignore[arg-type]  # Options refuses other words
            text=calibration_file,
            samples=samples,
            act_order=act_order,
        )
        made = quantise_model(source, out, options, force=force, progress=progress)
    if report:
        with console(stderr=True).status("measuring loss and accuracy"):
            made = measure(source, out, made, per_task=report_samples)
    _print(made)
    typer.echo(out)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an error does, so that no part of a file is left."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(report: Report) -> None:
    from rich.table import Table

    screen = console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    saved = f"{report.bytes_before / 2**20:,.2f} -> {report.bytes_after / 2**20:,.2f} MiB"
    facts.add_row("size", f"{saved}, {report.bits_per_weight:.2f} bits a weight with scales")
    facts.add_row("format", f"{report.format}, embedding and head {report.head}, calibration {report.calibration}")
    facts.add_row("time", f"{report.seconds:.1f} s")
    screen.print(facts)
    errors = Table("matrices", "format", "count", "mean error", "worst", title="relative error of the weights")
    for kind, format, count, mean, worst in report.by_kind():
        errors.add_row(kind, format, str(count), f"{mean:.4f}", f"{worst:.4f}")
    screen.print(errors)
    quality = report.quality
    if quality is None:
        return
    changes = Table("held-out task mix", "before", "after", title=f"{quality.samples} samples of every task")
    changes.add_row("loss, nats a token", f"{quality.loss_before:.5f}", f"{quality.loss_after:.5f}")
    changes.add_row("perplexity", f"{quality.perplexity_before:.5f}", f"{quality.perplexity_after:.5f}")
    changes.add_row("KL from before, nats a token", "", f"{quality.divergence:.6f}")
    changes.add_row("same best token", "", f"{quality.agreement:.2%}")
    rows: list[Any] = [
        (task, quality.accuracy_before[task], quality.accuracy_after[task]) for task in quality.accuracy_before
    ]
    for task, before, after in [*rows, ("all", quality.total_before, quality.total_after)]:
        changes.add_row(task, f"{before:.1%}", f"{after:.1%}")
    screen.print(changes)
