"""`dfastllm check`: would this checkpoint load, and if not, why not. Reads headers and tokenizer files, no weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.output import console
from dfastllm.errors import TokenizerError

if TYPE_CHECKING:
    from dfastllm.models.check import CheckReport

__all__ = ["check"]


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_DIR", help="A directory, a GGUF file, a name of `list`, or ORG/NAME.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Number format to count memory at: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Say whether a checkpoint would load, and why not. Exit code 1 when it would not."""
    from dfastllm.cli.lora import show_adapter
    from dfastllm.llm import resolve
    from dfastllm.lora.config import CONFIG_FILE
    from dfastllm.models.check import check as inspect

    path = resolve(model)
    if (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file():
        show_adapter(model, as_json=as_json)  # what it is; whether it fits, `lora show --model` says
        return
    report = inspect(path, dtype=None if dtype == "auto" else dtype)
    problems = [(problem.code, problem.message) for problem in report.problems]
    of_tokenizer, notes = _tokenizer(path, report)
    problems += of_tokenizer
    report = dataclasses.replace(report, notes=tuple(dict.fromkeys((*report.notes, *notes))))
    if as_json:
        typer.echo(json.dumps(_as_json(report, problems), indent=2))
    else:
        _print(report, problems)
    if problems:
        raise typer.Exit(1)


def _tokenizer(path: Path, report: CheckReport) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Problems and notes of the tokenizer's own loading, unless the model's check has found a fault in it already."""
    from dfastllm.quant.gguf import GgufFile
    from dfastllm.text import Tokenizer
    from dfastllm.text.gguf import read_tokenizer

    if any(problem.code == TokenizerError.code for problem in report.problems):
        return [], ()
    try:
        if path.is_dir():
            tokenizer = Tokenizer.load(path)
        elif report.info is None:
            return [], ()
        else:
            with GgufFile.open(path) as file:
                tokenizer = read_tokenizer(file.metadata)
        info = report.info
        fits = () if info is None else tokenizer.check_fits(info.vocab_size, info.mask_id)
    except TokenizerError as error:
        return [(error.code, str(error))], ()
    return [], (*tokenizer.notes, *fits)


def _as_json(report: CheckReport, problems: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "path": str(report.path),
        "problems": [{"code": code, "message": message} for code, message in problems],
        "loads": not problems,
    }


def _print(report: CheckReport, problems: list[tuple[str, str]]) -> None:
    from rich.table import Table

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("directory" if report.path.is_dir() else "file", str(report.path))
    if report.info is not None:
        info = report.info
        facts.add_row("family", f"{info.family} ({info.kind})")
        facts.add_row("shape", f"{info.layers} layers, vocabulary {info.vocab_size:,}, context {info.max_len:,} tokens")
    if report.parameters is not None and report.weight_bytes is not None:
        how = f"quantised {report.quantised}" if report.quantised else f"at {report.dtype}"
        size = f"{report.weight_bytes / 2**20:,.1f} MiB {how}"
        facts.add_row("parameters", f"{report.parameters:,} ({size})")
    if report.kv_bytes_per_token is not None:
        facts.add_row("K,V", f"{report.kv_bytes_per_token / 1024:,.2f} KiB per token")
    if report.tensors is not None:
        kind = "safetensors" if report.path.is_dir() else "GGUF"
        facts.add_row("files", f"{report.tensors} tensors in {report.files} {kind} file(s)")
    screen = console()
    screen.print(facts)
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)
    if problems:
        found = Table("problem", "what", title="It would not load:", title_justify="left", show_lines=True)
        for code, message in problems:
            found.add_row(code, message)
        screen.print(found)
    else:
        screen.print("It would load.")
