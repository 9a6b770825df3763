"""`dfastllm lora`: LoRA adapters trained, looked at, and merged into their model. See docs/lora.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dfastllm.cli.output import console, printable
from dfastllm.settings import Settings

__all__ = ["app", "show_adapter"]

app = typer.Typer(
    name="lora", no_args_is_help=True, help="LoRA adapters: train one, look at one, merge one. See docs/lora.md."
)
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT directory or a shipped adapter's name.")]
STYLES = ("plain", "capitals", "formal")  # a test compares this with the styles there are


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A shipped model's name, a Hugging Face directory or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, as PEFT does.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of what it shall answer: messages that end with the assistant's, or prompt and response,"
            " which are taken as they stand, without the chat template; or a text file. Default: the task mix."
        ),
    ] = None,
    style: Annotated[str, typer.Option(help=f"How the task mix's answers are written: {', '.join(STYLES)}.")] = "plain",
    rank: Annotated[int, typer.Option(help="Rank of the changes.", min=1)] = 8,
    alpha: Annotated[float | None, typer.Option(help="They are scaled by alpha / rank. \\[default: 2 * rank]")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Layers that change (q_proj); repeatable. \\[default: all linear ones]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 200,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=16)] = 2048,
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Of the start, the order and the noise.")] = 0,
    runs: Annotated[Path, typer.Option(help="Directory of checkpoints and logs.")] = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on with an earlier run.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; another number gives other last bits.", min=1)] = 1,
) -> None:
    """Train an adapter; a run that was stopped goes on where it was."""
    settings = Settings(device=device, threads=threads)

    from dfastllm.llm import resolve
    from dfastllm.train.lora import Recipe, train_adapter

    recipe = Recipe(
        model,
        rank,
        2.0 * rank if alpha is None else alpha,
        tuple(target or ()),
        style,
        data,
        None,
        steps,
        batch_tokens,
        lr,
        seed,
    )
    home = runs / f"lora-{out.resolve().name}"
    how: dict[str, Any] = {"resume": not fresh, "device": settings.device, "threads": threads}
    typer.echo(train_adapter(recipe, resolve(model), out, home, **how))


@app.command()
def show(
    adapter: Adapter,
    model: Annotated[str | None, typer.Option(help="Also say whether it fits this model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """What an adapter is: its rank, its layers, its size. With --model, exit code 1 when it does not fit."""
    show_adapter(adapter, model, as_json=as_json)


def show_adapter(adapter: str, model: str | None = None, *, as_json: bool = False) -> None:
    from dfastllm.llm import resolve, resolve_adapter
    from dfastllm.lora.outline import outline

    path = resolve_adapter(adapter)
    about = outline(path)
    facts: dict[str, Any] = {"directory": str(path), **about}
    if model is not None:
        from dfastllm.lora import read_adapter
        from dfastllm.models import adapter_base, load

        found = read_adapter(path, adapter_base(load(resolve(model))))
        facts |= {"fits": model, "hash": found.hash.hex(), "notes": list(found.notes)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if words:
            table.add_row(name.replace("_", " "), printable(words))
    console().print(table)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="A shipped model's name or a Hugging Face directory.")],
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Directory to write: a model without LoRA.")],
    dtype: Annotated[
        str | None, typer.Option(help="Number format of the weights: float32, bfloat16 or float16. Default: as stored.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
) -> None:
    """Merge an adapter into its model. Serving it unmerged needs no second copy of the model; other programs may."""
    from dfastllm.convert.merge import merge as write
    from dfastllm.llm import resolve, resolve_adapter

    typer.echo(write(resolve(model), resolve_adapter(adapter), out, dtype=dtype, force=force))
