"""`dfastllm eval`: how often a checkpoint is right, and how fast, under several settings."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.options import from_settings, takes
from dfastllm.errors import ValidationError
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.eval import Question
    from dfastllm.llm import LLM
    from dfastllm.sandbox import ProgramLimits

__all__ = ["evaluate"]

QUICK_QUESTIONS, QUICK_TOKENS = 10, 128
MIX_QUESTIONS, MIX_TOKENS, TOKENS = 100, 64, 256


@takes(settings=from_settings(alone=True))
def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="JSON Lines, as GSM8K, MATH, HumanEval, MBPP; else the task mix."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A shipped model's name, a Hugging Face directory or a GGUF file.")
    ] = "demo-diffusion",
    task: Annotated[
        str | None, typer.Option(help="Kind of the file: gsm8k, math, humaneval, mbpp.  \\[default: by its fields]")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="OURS=THEIRS, a field's name in the file; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions at most.  \\[default: all; of the mix 100]")] = None,
    quick_test: Annotated[
        bool, typer.Option("--quick-test", help=f"{QUICK_QUESTIONS} questions, {QUICK_TOKENS} tokens at most.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Every step computes the whole canvas.")] = False,
    use_cache: Annotated[bool, typer.Option("--use-cache", help="K,V of what is before the block are kept.")] = False,
    use_dual_cache: Annotated[
        bool, typer.Option("--use-dual-cache", help="Those of what follows it too. The three may be given together.")
    ] = False,
    threshold: Annotated[str, typer.Option(help="Thresholds with commas between.", show_default=False)] = "",
    factor: Annotated[str, typer.Option(help="Factors with commas between.", show_default=False)] = "",
    steps: Annotated[str, typer.Option(help="Numbers of steps with commas between.", show_default=False)] = "",
    block_length: Annotated[int | None, typer.Option(help="Canvas tokens of a block.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most; a canvas.  \\[default: 256, or half the context; mix: 64]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the best token always.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of draws, and of the mix's questions.")] = 0,
    batch: Annotated[int, typer.Option(help="Questions in flight at once.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="For base models: continue a text, no chat template.")] = False,
    code_seconds: Annotated[float, typer.Option(help="Seconds a program may run.")] = 10.0,
    code_memory: Annotated[int, typer.Option(help="MiB a program may have.")] = 1024,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the answers.  \\[default: eval-results/MODEL-FILE]")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the answers that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Judge a checkpoint: accuracy, forwards and speed under every setting that is given, in one run.

    Without a file the questions are the task mix. Settings multiply: two caches and three thresholds are six. Answers
    are kept as they come: the same command goes on where one that was killed ended. Programs that models write run
    confined; the last line says how. Writes answers.jsonl and results.json.
    """
    loaded = Settings.load(settings)
    caches = [name for name, wanted in (("none", no_cache), ("prefix", use_cache), ("dual", use_dual_cache)) if wanted]
    axes: dict[str, Any] = {
        "caches": caches,
        "thresholds": _numbers(threshold, float, "threshold"),
        "factors": _numbers(factor, float, "factor"),
        "steps": _numbers(steps, int, "steps"),
        "block_length": block_length,
    }
    for name, number in (("limit", limit), ("max_tokens", max_tokens), ("batch", batch), ("code_memory", code_memory)):
        if number is not None and number < 1:
            raise ValidationError(f"{name} must be at least 1, got {number}.", param=name)
    if data is None and (task or field):
        raise ValidationError("--task and --field are of a file, and none is given.", param="task")

    from dfastllm.cli.session import open_model
    from dfastllm.core import SamplingParams
    from dfastllm.eval import Plan, grid
    from dfastllm.eval import evaluate as asked
    from dfastllm.eval.run import fingerprint
    from dfastllm.hub import title
    from dfastllm.llm import model_kind, resolve
    from dfastllm.sandbox import ProgramLimits

    chosen = grid(model_kind(model), **axes)
    limits = ProgramLimits(seconds=code_seconds, memory=code_memory << 20)
    count = limit or (QUICK_QUESTIONS if quick_test else None)
    questions = _questions(data, task, field, count, seed, limits)
    called = (title(model) or resolve(model).stem).replace("/", "--").replace(":", "-")
    where = out or Path("eval-results") / f"{called}-{data.stem if data is not None else 'mix'}"
    with open_model(model, loaded) as llm:
        tokens = max_tokens or _tokens(llm, quick_test, data is None)
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed)
        about = {
            "checkpoint": fingerprint(resolve(model)),
            "data": str(data) if data is not None else "mix",
            "seed": seed,
        }
        plan = Plan(questions, chosen, sampling, batch, raw, about)
        answers = _with_progress(lambda progress: asked(llm, plan, where, restart=restart, progress=progress), where)
        name = llm.info.name
    _report(chosen, answers, {"model": name, "max_tokens": tokens, **about}, where, limits, as_json=as_json)


def _questions(
    data: Path | None, task: str | None, field: list[str] | None, count: int | None, seed: int, limits: ProgramLimits
) -> list[Question]:
    from dfastllm.eval import mix_questions, read_questions

    if data is None:
        return mix_questions(count or MIX_QUESTIONS, seed)
    named: dict[str, str] = {}
    for text in field or ():
        own, equals, theirs = text.partition("=")
        if not equals or not own or not theirs:
            raise ValidationError(f"--field is OURS=THEIRS, got {text!r}.", param="field")
        named[own] = theirs
    return read_questions(data, kind=task, fields=named, limit=count, limits=limits)


def _tokens(llm: LLM, quick: bool, mix: bool) -> int:
    """How long answers may be where nothing is said: half the context at most."""
    wanted = MIX_TOKENS if mix else QUICK_TOKENS if quick else TOKENS
    return min(wanted, llm.info.max_len // 2)


def _with_progress(work: Any, where: Path) -> Any:
    """Run it under a bar on stderr. Ctrl-C says where the answers are."""
    from rich.progress import Progress

    from dfastllm.cli.output import console

    with Progress(console=console(stderr=True), transient=True) as bar:
        shown = bar.add_task("asking", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(shown, completed=done, total=total, description=name)

        try:
            return work(progress)
        except KeyboardInterrupt:
            typer.echo(f"answers so far are in {where}; the same command goes on.", err=True)
            raise


def _report(
    settings: Any, answers: Any, about: dict[str, Any], where: Path, limits: ProgramLimits, *, as_json: bool
) -> None:
    from dfastllm.eval import results_of, table_of
    from dfastllm.quant.partial import place
    from dfastllm.sandbox import guarantees

    if any(answer.task in ("humaneval", "mbpp") for answer in answers):
        about["programs"] = guarantees().words(limits)
    results = results_of(settings, answers, about)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    place(where / "results.json", text.encode())
    if as_json:
        typer.echo(text, nl=False)
        return
    typer.echo(
        f"{about['model']}: {results['settings'][0]['n']} questions of {about['data']}, {about['max_tokens']} tokens"
    )
    typer.echo(table_of(results))
    typer.echo("accuracy: 95 % interval; speed: tokens a second over the first, batch by batch")
    if cut := sum(row["cut"] for row in results["settings"]):
        typer.echo(f"{cut} answers ended at their token limit (--max-tokens).")
    if "programs" in about:
        typer.echo(textwrap.fill(f"programs ran with: {about['programs']}", 80))
    typer.echo(f"{where / 'answers.jsonl'}, {where / 'results.json'}", err=True)


def _numbers(text: str, kind: Any, name: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ValidationError(f"{name} is a list of numbers with commas between, got {text!r}.", param=name) from None
