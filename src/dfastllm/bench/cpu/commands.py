"""`python -m dfastllm.bench cpu NAME`: CPU records against peers, each with the environment it needs. See
benchmarks/cpu/README.md."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dfastllm.bench.cpu.environment import PEERS, default_cache

if TYPE_CHECKING:
    from dfastllm.bench.cpu.ceilings import Ceilings
    from dfastllm.bench.cpu.compare import Row
    from dfastllm.bench.cpu.records import Plan

__all__ = ["app"]

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
console = Console(stderr=True)
CACHE = default_cache()
# What llama.cpp is compiled for -> the instruction sets of ours that run on such a processor, none: any.
BUILDS = {"native": (), "avx2": ("avx2",), "avx-vnni": ("avxvnni", "avx512vl")}

Out = Annotated[Path, typer.Option(help="Directory of the records.")]
Cache = Annotated[Path, typer.Option(help="Environments of the peers and model files.", envvar="BENCH_CACHE")]
Threads = Annotated[int, typer.Option(help="Of both sides; 0: the physical cores this process may use.", min=0)]
Formats = Annotated[list[str] | None, typer.Option("--format", help="Repeatable; default: all.")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="Beginning of a case's name; repeatable.")]
Rounds = Annotated[int, typer.Option(help="Turns per case.", min=1)]
Seconds = Annotated[float, typer.Option(help="Of one side's burst in a turn.")]
Resume = Annotated[bool, typer.Option(help="Keep the cases an earlier run of this record finished.")]


def _chosen(formats: list[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The formats asked for, or all. Raises BadParameter for one that is not known."""
    unknown = set(formats or ()) - set(known)
    if unknown:
        raise typer.BadParameter(f"unknown format {min(unknown)!r}; known: {', '.join(known)}.", param_hint="--format")
    return formats or known


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _threads(asked: int) -> int:
    from dfastllm.kernels.extension import set_threads, threads

    set_threads(asked or None)
    return threads()


def _record(
    peer: str,
    rows_of: Callable[[Plan], Iterator[Row | dict[str, Any]]],
    shape: str,
    formats: Sequence[str],
    cases: list[str] | None,
    threads: int,
    rounds: int,
    seconds: float,
    resume: bool,
    out: Path,
    cache: Path,
) -> None:
    """Run one record against a peer, written anew after each case so that nothing measured is lost."""
    from dfastllm.bench.cpu.cases import CASES
    from dfastllm.bench.cpu.ceilings import measure_ceilings
    from dfastllm.bench.cpu.compare import Pace, finished
    from dfastllm.bench.cpu.records import PAIRS, Plan, named_cases
    from dfastllm.bench.cpu.report import table
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.faithful import Faithfulness
    from dfastllm.kernels.extension import describe
    from dfastllm.metrics.records import write_record

    path = out / f"{peer}-{shape}.json"
    chosen = named_cases(cases)
    if not chosen:
        raise typer.BadParameter(f"no case begins with {cases}; cases: {', '.join(CASES)}.", param_hint="--case")
    found: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}
    if resume and path.exists():
        before = json.loads(path.read_text())
        found, versions = before["results"], before["versions"]
    count = _threads(threads)
    ceilings = measure_ceilings(count)
    pace = Pace(rounds, rounds, seconds)
    plan = Plan(find_shape(shape), formats, chosen, count, cache, pace, finished(found))
    left = sum(len(plan.left(peer, form, own)) for form in formats for own in PAIRS.get((peer, form), (form,)))
    with _progress() as progress:
        task = progress.add_task(f"{peer}, {shape}", total=left)
        for item in rows_of(plan):
            if isinstance(item, dict):
                versions |= item
                continue
            found.append(asdict(item))
            ceilings = ceilings.best(measure_ceilings(count))  # between cases: over the whole run, not one moment of it
            write_record(
                path,
                f"cpu {peer}",
                found,
                shape=shape,
                threads=count,
                kernels=describe(),
                versions=versions,
                ceilings=asdict(ceilings),
            )
            progress.advance(task)
    Console(width=None if sys.stdout.isatty() else 200).print(
        table(found, ceilings, f"{peer}, {shape}, {count} threads", Faithfulness.read(out.parent))
    )


def _print(record: str, rows: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """The rows of the record of this name, beside what is known of their formats. out: the directory of records."""
    from dfastllm.bench.cpu.report import faithful_rows, plain_table
    from dfastllm.bench.faithful import Faithfulness

    shown = faithful_rows(record, rows, Faithfulness.read(out.parent))
    Console(width=None if sys.stdout.isatty() else 200).print(plain_table(shown, title))


@app.command()
def setup(cache: Cache = CACHE) -> None:
    """Make the peers' environments (llama.cpp is compiled: about ten minutes). Records do it themselves when needed."""
    for peer in PEERS.values():
        console.print(f"{peer.name}: {peer.ensure(cache)}")


@app.command("llama.cpp")
def llamacpp(
    shape: str = "qwen2.5-0.5b",
    formats: Formats = None,
    cases: Cases = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.6,
    resume: Resume = False,
    out: Out = Path("benchmarks/cpu"),
    cache: Cache = CACHE,
    build: Annotated[str, typer.Option(help="What the peer is compiled for: native, avx2 or avx-vnni.")] = "native",
    avx2: Annotated[bool, typer.Option("--avx2", help="The same as --build avx2.")] = False,
) -> None:
    """Against llama-cpp-python built from source, on the same GGUF files: Q8_0, Q4_0, Q4_K_M. --build avx2 and
    avx-vnni: both sides as on a processor without AVX-512; DFASTLLM_ISA must be avx2, or avxvnni (avx512vl stands for
    it)."""
    from dfastllm.bench.cpu.records import against_llamacpp
    from dfastllm.kernels.extension import describe

    chosen = _chosen(formats, ("Q8_0", "Q4_0", "Q4_K_M"))
    build = "avx2" if avx2 else build
    if build not in BUILDS:
        raise typer.BadParameter(f"unknown build {build!r}; known: {', '.join(BUILDS)}.", param_hint="--build")
    own = describe().partition(":")[0]
    if BUILDS[build] and own not in BUILDS[build]:
        raise typer.BadParameter(
            f"ours runs {own}, the peer {build}: set DFASTLLM_ISA to {' or '.join(BUILDS[build])}.",
            param_hint="--build",
        )
    peer = "llama.cpp" if build == "native" else f"llama.cpp-{build}"
    rows_of = partial(against_llamacpp, peer=peer)
    _record(peer, rows_of, shape, chosen, cases, threads, rounds, seconds, resume, out, cache)


@app.command()
def openvino(
    shape: str = "qwen2.5-0.5b",
    formats: Formats = None,
    cases: Cases = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.6,
    resume: Resume = False,
    out: Out = Path("benchmarks/cpu"),
    cache: Cache = CACHE,
) -> None:
    """Against openvino-genai and its continuous batching: int8 (with our w8r, w8g and w8), int4 (w4r, w4)."""
    from dfastllm.bench.cpu.records import against_openvino

    chosen = _chosen(formats, ("int8", "int4"))
    _record("openvino-genai", against_openvino, shape, chosen, cases, threads, rounds, seconds, resume, out, cache)


@app.command()
def pytorch(
    shape: str = "qwen2.5-0.5b",
    formats: Annotated[list[str] | None, typer.Option("--format", help="Of ours; default: bf16, w8r, w8, w4.")] = None,
    cases: Cases = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.6,
    resume: Resume = False,
    out: Out = Path("benchmarks/cpu"),
    cache: Cache = CACHE,
) -> None:
    """Against the plain torch decoder in bfloat16 under the same engine."""
    from dfastllm.bench.cpu.records import against_torch
    from dfastllm.quant import FORMATS

    chosen = _chosen(formats, ("bf16", *FORMATS)) if formats else ("bf16", "w8r", "w8", "w4")
    _record("pytorch", against_torch, shape, chosen, cases, threads, rounds, seconds, resume, out, cache)


@app.command()
def serving(
    shape: str = "qwen2.5-0.5b",
    formats: Annotated[list[str] | None, typer.Option("--format", help="Of ours; default: bf16, w8r, w8g, w8.")] = None,
    in_flight: Annotated[list[int] | None, typer.Option(help="Requests at once; repeatable; default: 1, 16.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 64,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 4.0,
    out: Out = Path("benchmarks/cpu"),
    cache: Cache = CACHE,
) -> None:
    """Over HTTP against vLLM's CPU server on the same bfloat16 checkpoint: tok/s, TTFT, TPOT, how much of the floor."""
    from dfastllm.bench.cpu.ceilings import measure_ceilings
    from dfastllm.bench.cpu.report import as_json
    from dfastllm.bench.cpu.serving import Served, Traffic, against_vllm
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.kernels.extension import describe
    from dfastllm.metrics.records import write_record
    from dfastllm.quant import FORMATS

    found, count = find_shape(shape, "qwen2"), _threads(threads)
    chosen = _chosen(formats, ("bf16", *FORMATS)) if formats else ("bf16", "w8r", "w8g", "w8")
    traffics = [Traffic(prompt, tokens, width, rounds, seconds) for width in in_flight or (1, 16)]
    rows: list[Served] = []
    best = measure_ceilings(count)

    def ceilings() -> Ceilings:
        nonlocal best
        best = best.best(measure_ceilings(count))
        return best

    with _progress() as progress:
        task = progress.add_task(f"serving, {shape}", total=len(chosen) * len(traffics))

        def done(row: Served) -> None:
            rows.append(row)
            write_record(  # anew after each line, so that nothing measured is lost
                out / f"vllm-{shape}.json",
                "cpu vllm",
                [as_json(asdict(row)) for row in rows],
                shape=shape,
                threads=count,
                kernels=describe(),
                traffic={"prompt": prompt, "tokens": tokens},
                measured_ceilings=asdict(best),
            )
            progress.advance(task)

        against_vllm(found, chosen, traffics, count, cache, ceilings, done)
    served = [as_json(asdict(row)) for row in rows]
    _print("cpu vllm", served, f"serving against vLLM, {shape}, {count} threads", out)


@app.command()
def report(out: Out = Path("benchmarks/cpu")) -> None:
    """Write RESULTS.md from the records that are there, and the table in the README two directories up."""
    from dfastllm.bench.cpu.summary import refresh

    for path in refresh(out):
        console.print(f"written: {path}")


@app.command()
def diffusion(
    shape: str = "llada-0.5b",
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Of the native weights; repeatable; default: bf16, w8r, w8."),
    ] = None,
    side: Annotated[list[str] | None, typer.Option(help='Repeatable, as "native w8g, dual"; default: all.')] = None,
    prompt: int = 256,
    canvas: int = 128,
    block: int = 32,
    per_step: Annotated[int, typer.Option(help="Tokens committed a step.", min=1)] = 2,
    threads: Threads = 0,
    rounds: Rounds = 5,
    out: Out = Path("benchmarks/cpu"),
) -> None:
    """Diffusion end to end: the dual cache on native kernels against the plain torch loop without cache."""
    from dfastllm.bench.cpu.diffusion import FORMATS, Job, end_to_end, side_names, summary
    from dfastllm.bench.cpu.report import as_json
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.kernels.extension import describe
    from dfastllm.metrics.records import write_record

    found, job, count = find_shape(shape, "llada"), Job(prompt, canvas, block, per_step), _threads(threads)
    weights = formats or list(FORMATS)
    sides = side or side_names(weights)
    unknown = set(sides) - set(side_names(weights))
    if unknown:
        raise typer.BadParameter(f"unknown side {min(unknown)!r}; known: {', '.join(side_names(weights))}.")
    runs = []
    with _progress() as progress:
        task = progress.add_task(f"diffusion, {shape}", total=rounds * len(sides))
        for one in end_to_end(found, count, weights, job, rounds, sides):
            runs.append(one)
            progress.advance(task)
    rows = summary(runs)
    write_record(
        out / f"diffusion-{shape}.json",
        "cpu diffusion",
        [as_json(row) for row in rows],
        shape=shape,
        threads=count,
        kernels=describe(),
        formats=weights,
        job=asdict(job),
        runs=[asdict(one) for one in runs],
    )
    _print("cpu diffusion", rows, f"diffusion end to end, {shape}, {count} threads", out)


@app.command()
def neutral(
    samples: Annotated[int, typer.Option(help="Held-out samples for the accuracy.", min=9)] = 1200,
    alone: Annotated[int, typer.Option(help="Samples answered one by one in a turn.", min=1)] = 18,
    together: Annotated[int, typer.Option(help="Samples in flight at once in a turn.", min=1)] = 36,
    canvas: int = 64,
    diffusion: Annotated[
        str | None, typer.Option(help="A model directory in place of demo-diffusion.", show_default=False)
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Contenders whose name holds this text are left out; repeatable.")
    ] = None,
    quantization: Annotated[str | None, typer.Option("--format", help="Default: as stored, bfloat16.")] = None,
    threads: Threads = 0,
    rounds: Rounds = 5,
    out: Out = Path("benchmarks/cpu"),
) -> None:
    """Diffusion against autoregression at equal size on the task mix: accuracy, committed tok/s, the plot."""
    from dfastllm.bench.cpu.neutral import AR, contenders, measure_accuracy, measure_speed, open_models, plot, winners
    from dfastllm.bench.cpu.report import as_json
    from dfastllm.kernels.extension import describe
    from dfastllm.metrics.records import write_record

    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the plot needs matplotlib: ./run setup dev, or pip install 'dfastllm[plots]'.")
    count, accuracy, passes = _threads(threads), [], []
    unwanted = leave_out or []
    field = [one for one in contenders(canvas) if one.family == AR or not any(text in one.name for text in unwanted)]
    models = open_models(list(dict.fromkeys(one.family for one in field)), together, quantization, diffusion)
    try:
        with _progress() as progress:
            task = progress.add_task("accuracy", total=len(field))
            for right in measure_accuracy(models, field, samples, canvas):
                accuracy.append(right)
                progress.advance(task)
            task = progress.add_task("speed", total=2 * len(field) * rounds)
            for one in measure_speed(models, field, alone, together, canvas, rounds):
                passes.append(one)
                progress.advance(task)
    finally:
        for model in models.values():
            model.close()
    rows = winners(field, accuracy, passes)
    write_record(
        out / "neutral.json",
        "cpu neutral",
        [as_json(row) for row in rows],
        threads=count,
        kernels=describe(),
        format=quantization,
        diffusion=diffusion,
        left_out=unwanted,
        canvas=canvas,
        alone=alone,
        together=together,
        accuracy=[{name: v for name, v in asdict(a).items() if name != "marks"} for a in accuracy],
        passes=[asdict(one) for one in passes],
    )
    plot(field, accuracy, passes, out / "neutral.png", f"Shipped models of equal size, CPU, threads: {count}")
    _print("cpu neutral", rows, f"fastest setting as accurate as autoregression, {count} threads", out)
