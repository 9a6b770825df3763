"""`python -m dfastllm.bench NAME`: make one record under benchmarks/. Names: overhead, batching, speculation, decoders,
formats, fidelity, kernels, prefix, tenants, lora, lossless, servers, cpu (a group of its own), and all."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dfastllm.bench.cpu.commands import app as cpu
from dfastllm.bench.cpu.environment import default_cache
from dfastllm.bench.cpu.weights import EIGHT
from dfastllm.bench.faithful import Faithfulness
from dfastllm.metrics.records import write_record

if TYPE_CHECKING:
    from dfastllm.bench.every import Record as EveryRecord

app = typer.Typer(add_completion=False, help=__doc__)
app.add_typer(cpu, name="cpu")
console = Console(stderr=True)
CACHE = default_cache()
WIDTH = 80  # columns of a table where no terminal says how many there are
Out = Annotated[Path, typer.Option(help="Directory of the records.")]


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows under their names; where that is wider than the terminal, or than 80 columns if there is none, a line for
    each name and as many rows side by side as fit. No heading is cut."""
    wide = Console().width if sys.stdout.isatty() else WIDTH
    names = list(rows[0])
    columns = [[name, *(_cell(row[name]) for row in rows)] for name in names]
    left = [isinstance(rows[0][name], str) for name in names]
    tables: list[tuple[Sequence[Sequence[str]], list[bool]]] = [(columns, left)]
    if _width(columns) > wide:
        cells = list(zip(*columns, strict=True))
        tables = [([cells[0], *some], [True] + [False] * len(some)) for some in _parts(cells, wide)]
    for number, (shown, lefts) in enumerate(tables):
        table = Table(title=title if number == 0 else None)
        for column, is_left in zip(shown, lefts, strict=True):
            table.add_column(column[0], justify="left" if is_left else "right", no_wrap=True)
        for line in list(zip(*shown, strict=True))[1:]:
            table.add_row(*line)
        Console(width=max(wide, _width(shown))).print(table)


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Characters of a table of these columns."""
    return 1 + sum(3 + max(map(len, column)) for column in columns)


def _parts(cells: Sequence[Sequence[str]], wide: int) -> Iterator[list[Sequence[str]]]:
    """The columns behind the first in groups that fit beside it, at least one in each."""
    some: list[Sequence[str]] = []
    for column in cells[1:]:
        if some and _width([cells[0], *some, column]) > wide:
            yield some
            some = []
        some.append(column)
    yield some


def _beside(out: Path, rows: Sequence[dict[str, Any]], form: str, *, of: str | None = None) -> list[dict[str, Any]]:
    """Rows of models of ours with how faithful their weights are. of: the one among the rows' models whose format is
    `form`, the others are demo models as they are stored; None: all."""

    def format(row: Mapping[str, Any]) -> str:
        return form if of in (None, row["model"]) else "bf16"

    return Faithfulness.read(out).beside(rows, format)


def _cell(value: Any) -> str:
    if hasattr(value, "median"):
        return f"{value.median:,.4g} ({value.low:,.4g}–{value.high:,.4g})"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


@app.command()
def overhead(out: Out = Path("benchmarks"), steps: int = 60) -> None:
    """The loop's own cost per step with a null model at 1, 8 and 64 sequences, and what a request costs before it."""
    from dfastllm.bench.admission import MODELS, admission
    from dfastllm.bench.overhead import step_overhead

    cases = [(kind, n) for kind in ("ar", "diffusion", "block") for n in (1, 8, 64)]
    rows = [step_overhead(kind, n, steps) for kind, n in track(cases, "loop overhead", console=console)]
    admitted = [{"model": name, "first_span_us": admission(name)} for name in MODELS]
    write_record(out / "overhead.json", "overhead", rows, steps=steps, admission=admitted)
    _table("engine step with a null model, µs: median (low–high)", rows)
    _table("from a parsed body to the first planned span, µs: median (low–high)", admitted)


@app.command()
def kernels(
    out: Out = Path("benchmarks"),
    threads: int = 0,
    seconds: float = 0.25,
    long: Annotated[bool, typer.Option("--long", help="Only attention over long contexts; writes no record.")] = False,
) -> None:
    """Each kernel alone on `threads` (0: all cores) against the ceilings and torch. Wants an idle machine."""
    from dfastllm.bench.attention import measure_attention, measure_long
    from dfastllm.bench.cpu.ceilings import measure_ceilings
    from dfastllm.bench.kernels import measure, shown, works
    from dfastllm.kernels.extension import describe, set_threads

    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    ceilings = measure_ceilings(threads)
    contexts = measure_long(ceilings, seconds)
    at_best = f"{ceilings.stream:.1f} GB/s, bf16 {ceilings.bf16:.0f} GFLOP/s"
    _table(f"attention of one layer over long contexts, where {at_best} can be had", contexts)
    if long:
        return
    rows = [measure(work, ceilings, seconds) for work in track(works(), "kernels", console=console)]
    spans = measure_attention(seconds)
    about = {"kernels": describe(), "threads": threads, "ceilings": asdict(ceilings)}
    about |= {"attention": spans, "attention_long": contexts}
    write_record(out / "kernels.json", "kernels", rows, **about)
    _table("kernels, µs: median (low–high)", shown(rows, Faithfulness.read(out)))
    _table("attention of one layer, against torch: seconds", spans)


@app.command()
def batching(out: Out = Path("benchmarks"), requests: int = 32, repeats: int = 3) -> None:
    """Continuous batching against one request at a time on the demo models."""
    from dfastllm.bench.batching import batching_gain
    from dfastllm.llm import shipped_models

    models = track(shipped_models(), "batching", console=console)
    rows = [batching_gain(model, requests, repeats) for model in models]
    write_record(out / "batching.json", "batching", rows)
    _table("throughput, tok/s: median (low–high)", rows)


@app.command()
def tenants(
    out: Out = Path("benchmarks"),
    threads: int = 0,
    rounds: int = 5,
    shape: Annotated[str, typer.Option(help="Random 8-bit weights of this shape beside demo-ar.")] = "qwen2.5-0.5b",
) -> None:
    """One tenant's flood and another's time to first token; 1 to 16 tenants on one engine. Wants an idle machine."""
    from dfastllm.bench.tenants import Flood, measure_flood, measure_tenants
    from dfastllm.kernels.extension import describe, set_threads

    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    small, large = _demo_and_random("demo-ar", shape)
    floods, many = [], []
    cases: tuple[tuple[Any, Flood, dict[str, Any] | None], ...] = (
        (small, Flood(prompt=64, prompt_b=64, asks=40, pause=0.05, rounds=rounds), {"requests": 64, "repeats": rounds}),
        (large, Flood(rounds=rounds), {"requests": 32, "answer": 24, "repeats": rounds}),
        (large, Flood(prompt_b=512, asks=5, rounds=rounds), None),
    )
    for model, work, sizes in cases:
        console.print(f"{model.info.name}: a flood of {work.flood}, prompts of {work.prompt_b}")
        floods.append(measure_flood(model, work))
        if sizes is not None:
            many += measure_tenants(model, **sizes)
    write_record(out / "tenants.json", "tenants", floods, tenants=many, threads=threads, kernels=describe())
    _table("first token beside a flood, ms", _beside(out, floods, EIGHT, of=shape))
    _table("tenants on one engine: median (low–high)", _beside(out, many, EIGHT, of=shape))


def _demo_and_random(demo: str, shape: str) -> tuple[Any, Any]:
    """A demo model as it is served, and random 8-bit weights of a shape."""
    import torch

    from dfastllm import assemble
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.cpu.weights import packed
    from dfastllm.llm import resolve
    from dfastllm.models import build

    random = packed(build(*find_shape(shape).own(), dtype=torch.bfloat16), EIGHT)
    return assemble.load(resolve(demo)).model, random


@app.command()
def lora(
    out: Out = Path("benchmarks"),
    threads: int = 0,
    shape: str = "qwen2.5-0.5b",
    weights: Annotated[str, typer.Option(help="Format of the base.")] = "w8",
    rank: int = 16,
    turns: int = 9,
) -> None:
    """LoRA adapters in a batch of 16 sequences: 1, 8, 64 of them against none. Wants an idle machine."""
    import torch

    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.cpu.weights import packed
    from dfastllm.bench.lora import measure
    from dfastllm.kernels.extension import describe, set_threads
    from dfastllm.models import build

    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    model = packed(build(*find_shape(shape).own(), dtype=torch.bfloat16), weights)
    rows = [vars(row) for row in track(measure(model, rank=rank, turns=turns), "adapters", total=6, console=console)]
    about = {"shape": shape, "weights": weights, "rank": rank, "adapters_as": "bfloat16", "turns": turns}
    write_record(out / "lora.json", "lora", rows, threads=threads, kernels=describe(), **about)
    _table("LoRA, 16 sequences, one token a step: median (low–high)", _beside(out, rows, weights))


@app.command()
def prefix(
    out: Out = Path("benchmarks"),
    repeats: int = 3,
    threads: int = 0,
    shape: Annotated[str, typer.Option(help="Random 8-bit weights of this shape beside the demo models.")] = (
        "qwen2.5-0.5b"
    ),
) -> None:
    """Prefix sharing on and off: time to first token and rows computed. Wants an idle machine."""
    import torch

    from dfastllm import assemble
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.cpu.weights import packed
    from dfastllm.bench.prefix import measure_prefix, workloads
    from dfastllm.kernels.extension import describe, set_threads
    from dfastllm.llm import resolve
    from dfastllm.models import build

    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    models = [assemble.load(resolve(name)).model for name in ("demo-ar", "demo-block")]
    models.append(packed(build(*find_shape(shape).own(), dtype=torch.bfloat16), EIGHT))
    rows = []
    for model in models:
        for work, limits in track(workloads(model.info.max_len), model.info.name, console=console):
            rows.append(measure_prefix(model, work, repeats, **limits))
    write_record(out / "prefix.json", "prefix", rows, threads=threads, kernels=describe(), repeats=repeats)
    for name, sizes in (("rows", ("prompt_tokens", "cached_tokens", "rows_off", "rows_on", "same_tokens")),
                        ("first token, ms", ("first_token_ms_off", "first_token_ms_on", "first_token_ratio")),
                        ("whole run", ("seconds_ratio", "one_run_off", "one_run_on"))):  # fmt: skip
        shown = [{key: row[key] for key in ("model", "workload", *sizes)} for row in rows]
        _table(f"prefix sharing, {name}: median (low–high); ratios off / on", _beside(out, shown, EIGHT, of=shape))


@app.command()
def decoders(
    out: Out = Path("benchmarks"),
    model: str = "demo-diffusion",
    draft: str = "demo-draft",
    samples: int = 60,
    canvas: int = 64,
    block: int = 32,
) -> None:
    """Every rule x cache on a masked-diffusion model, and the parallelism sweep with its plot."""
    from dfastllm.bench.decoders import Point, as_rows, decoder_grid, measure_decoders, parallelism_sweep, plot_points
    from dfastllm.decode.canvas.choice import caches_of
    from dfastllm.decode.registry import RULES
    from dfastllm.llm import LLM

    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("the plot needs matplotlib: ./run setup dev, or pip install 'dfastllm[plots]'.")
    grid = list(decoder_grid(list(RULES), caches_of("diffusion"), block, canvas))
    sweep = [c for cache in ("none", "dual") for c in parallelism_sweep(cache, block, canvas)]
    with LLM(model, draft=draft) as llm:
        results = [
            list(track(measure_decoders(llm, iter(configs), samples, canvas), what, len(configs), console=console))
            for what, configs in (("rule x cache", grid), ("parallelism", sweep))
        ]
    points = [[p for p in part if isinstance(p, Point)] for part in results]
    refused = sorted({p for part in results for p in part if isinstance(p, str)})
    record = {"grid": as_rows(points[0]), "sweep": as_rows(points[1]), "refused": refused}
    write_record(
        out / "decoders.json", "decoders", record, model=model, draft=draft, samples=samples, canvas=canvas, block=block
    )
    plot_points(points[1], out / "accuracy_vs_parallelism.png", f"{model}: accuracy against parallelism")
    _table(f"{model}, {samples} held-out samples", as_rows(points[0] + points[1]))
    for line in refused:
        console.print(f"refused: {line}")


@app.command()
def lossless(
    out: Out = Path("benchmarks"),
    samples: int = 30,
    canvas: int = 64,
    repeats: int = 3,
    threads: int = 0,
    shape: Annotated[str, typer.Option(help="Random 8-bit weights of this shape: what a branch costs.")] = (
        "qwen2.5-0.5b"
    ),
) -> None:
    """free_dave against the plain schedule: forwards, time, the cost of a branch. Wants an idle machine."""
    import torch

    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.cpu.weights import packed
    from dfastllm.bench.lossless import fit, measure_branches, measure_drafts
    from dfastllm.kernels.extension import describe, set_threads
    from dfastllm.llm import LLM
    from dfastllm.models import build

    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    rows: list[Any] = []
    for name in ("demo-block", "demo-diffusion"):
        with LLM(name) as llm:
            found = measure_drafts(llm, name, samples if name == "demo-block" else samples // 3, canvas, repeats)
            rows += track(found, name, 14, console=console)
    model = packed(build(*find_shape(shape).own(), dtype=torch.bfloat16), EIGHT)
    costs = [measure_branches(model, shape, b, 256, 4, 9) for b in (4, 8, 32)]
    free, error = fit(costs)
    gains = [{f"gain at {r:.0%}": c.gain(r, free) for r in (0.5, 0.6, 0.7, 0.8, 0.9)} for c in costs]
    record = {
        "drafts": [asdict(r) for r in rows],
        "branches": [asdict(c) | gain for c, gain in zip(costs, gains, strict=True)],
        "forward_rows": free,
        "largest_error_of_the_fit": error,
    }
    write_record(out / "lossless.json", "lossless", record, threads=threads, kernels=describe(), repeats=repeats)
    _table("free_dave, token for token the schedule's answers; seconds: median (low–high)", [vars(r) for r in rows])
    lines = [
        {"block": c.block, **{f"{k} branches, ms": 1e3 * t.median for k, t in enumerate(c.seconds)}, **gain}
        for c, gain in zip(costs, gains, strict=True)
    ]
    title = f"a step behind 256 tokens, {shape}, {EIGHT}; forward_rows {free:.1f}, within {error:.0%}"
    _table(title, _beside(out, lines, EIGHT))


@app.command()
def speculation(
    out: Out = Path("benchmarks"),
    part: Annotated[list[str] | None, typer.Option(help="acceptance, speed, oracle; repeatable, default: all.")] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="Of part speed; repeatable, default: all.")] = None,
    samples: Annotated[int, typer.Option(help="Of every task, for part acceptance.")] = 20,
    repeats: int = 5,
    threads: int = 0,
    shape: Annotated[str, typer.Option(help="Random 8-bit weights of this shape, for part oracle.")] = "qwen2.5-0.5b",
) -> None:
    """Speculative decoding against plain: acceptance by task, speedup by draft length and batch, what verifying costs.
    Parts that are not asked for stay as they are in the record. Wants an idle machine."""
    import json

    import torch

    from dfastllm.bench import speculation as bench
    from dfastllm.bench.cpu.shapes import find_shape
    from dfastllm.bench.cpu.weights import packed
    from dfastllm.kernels.extension import describe, set_threads
    from dfastllm.models import build

    known = ("acceptance", "speed", "oracle")
    if set(part or known) - set(known) or set(drafter or ()) - set(bench.DRAFTERS):
        raise typer.BadParameter(f"parts are {', '.join(known)}; drafters are {', '.join(bench.DRAFTERS)}.")
    threads = threads or os.cpu_count() or 1
    set_threads(threads)
    path = out / "speculation.json"
    record: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    if "acceptance" in (part or known):
        record["acceptance"] = bench.acceptance(samples)
        _table("accepted draft tokens by task, k = 5", record["acceptance"])
    if "speed" in (part or known):
        names = drafter or list(bench.DRAFTERS)
        kept = [row for row in record.get("speed", []) if row["drafter"] not in names]
        made = [row for n in track(names, "speed", console=console) for row in bench.speed(n, repeats=repeats)]
        record["speed"] = kept + made
        _table("tokens per second over plain decoding: median (low-high)", made)
    if "oracle" in (part or known):
        model = packed(build(*find_shape(shape).own(), dtype=torch.bfloat16), EIGHT)
        record["oracle_model"] = shape
        record["verify"] = bench.verify_costs(model)
        record["oracle"] = list(track(bench.oracle(model), "oracle", 40, console=console))
        _table(f"a step with draft tokens, {shape}, {EIGHT}", _beside(out, record["verify"], EIGHT))
        _table("a free drafter that is right at a given rate", _beside(out, record["oracle"], EIGHT))
    write_record(path, "speculation", record, threads=threads, kernels=describe(), samples=samples, repeats=repeats)
    if importlib.util.find_spec("matplotlib") is not None:
        bench.plot(json.loads(path.read_text())["results"], out / "speculation.png")


@app.command()
def formats(
    out: Out = Path("benchmarks"),
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all shipped.")] = None,
    per_task: Annotated[int, typer.Option(help="Samples of every task for the accuracy; 0: none.")] = 100,
    losses: Annotated[int, typer.Option(help="Samples of the mix for the loss.")] = 1500,
) -> None:
    """Quantised formats and calibrations, simulated in torch: loss and accuracy on the task mix."""
    from dfastllm.bench.formats import CASES, as_record, as_row, as_served, compare_format
    from dfastllm.llm import shipped_models

    names = model or shipped_models()
    jobs = [(name, case) for name in names for case in CASES]
    found = []
    for name, case in track(jobs, "formats", console=console):
        found.append(compare_format(name, case, per_task=per_task, losses=losses))
        write_record(out / "formats.json", "formats", [as_record(o) for o in found], per_task=per_task, losses=losses)
    _table("formats, simulated in torch", Faithfulness.read(out).beside(map(as_row, found), as_served))


@app.command()
def fidelity(
    out: Out = Path("benchmarks"),
    only: Annotated[list[str] | None, typer.Option("--format", help="Repeatable; default: all.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Measure formats of this peer: pytorch, openvino-genai, llama.cpp.")
    ] = None,
    threads: int = 0,
    cache: Annotated[Path, typer.Option(help="Where models and peers are kept.", envvar="BENCH_CACHE")] = CACHE,
) -> None:
    """What each format costs on a real model: KL from float32 in nats a token, how often the best token is the same.
    What is not measured keeps its figures; --peer alone measures none of ours."""
    import json

    from dfastllm.bench.cpu.summary import refresh
    from dfastllm.bench.fidelity import AS_STORED, FORMATS, MADE, PACKAGE, faithfulness, real_model, reference_of
    from dfastllm.bench.peer_fidelity import FORMATS as PEER_FORMATS
    from dfastllm.bench.peer_fidelity import made_file, peer_faithfulness
    from dfastllm.kernels.extension import describe, set_threads
    from dfastllm.kernels.extension import threads as used

    chosen = only or ([] if peer else list(FORMATS))
    unknown = set(chosen) - {*FORMATS, *MADE}
    if unknown:
        raise typer.BadParameter(f"unknown format {min(unknown)!r}; known: {', '.join((*FORMATS, *MADE))}.")
    peers = [pair for pair in PEER_FORMATS if pair[0] in (peer or ())]
    known = {name for name, _ in PEER_FORMATS}
    if set(peer or ()) - known:
        raise typer.BadParameter(f"unknown peer {min(set(peer or ()) - known)!r}; known: {', '.join(sorted(known))}.")
    set_threads(threads or None)
    files = sorted((out / "fidelity").glob("*.txt"))
    if not files:
        raise typer.BadParameter(f"there are no texts (*.txt) in {out / 'fidelity'}.", param_hint="--out")
    texts = [file.read_text(encoding="utf-8") for file in files]
    reference = reference_of(real_model(cache), texts, used())
    stored = {form: made_file(form.partition(",")[0], cache, used()) for form in (AS_STORED, *MADE) if form in chosen}
    found = faithfulness(stored, reference, chosen, used())
    rows = [asdict(row) for row in track(found, "fidelity", total=len(chosen), console=console)]
    rivals = peer_faithfulness(reference, peers, cache, used())
    others = [asdict(row) for row in track(rivals, "peers", total=len(peers), console=console)]
    path = out / "fidelity.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    write_record(
        path,
        "fidelity",
        _kept(before.get("results", []), rows, lambda row: row["format"]),
        peers=_kept(before.get("peers", []), others, lambda row: (row["peer"], row["format"])),
        model=PACKAGE,
        texts=[file.name for file in files],
        kernels=describe(),
    )
    shown = [{**row, "kl": 1e3 * row["kl"], "agreement": f"{row['agreement']:.1%}"} for row in rows or others]
    _table("SmolLM2-135M against its float32 weights: KL in 1e-3 nats a token", shown)
    if (out / "cpu").is_dir():  # whose tables show these figures
        for path in refresh(out / "cpu"):
            console.print(f"written: {path}")


def _kept(
    before: list[dict[str, Any]], made: list[dict[str, Any]], key: Callable[[dict[str, Any]], object]
) -> list[Any]:
    """Rows of a record: those made now in the places of those before them, further ones at the end."""
    new = {key(row): row for row in made}
    return [new.pop(key(row), row) for row in before] + list(new.values())


@app.command(name="all")
def every(
    only: Annotated[list[str] | None, typer.Option(help="Beginning of a record's name; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="The same, of those left out; repeatable.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Only say what would run.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Those too that are done of this source.")] = False,
    journal: Annotated[Path, typer.Option(help="What is done; logs are beside it.")] = Path(
        "bench-results/records/journal.json"
    ),
) -> None:
    """All records, one after another; what is done of this source is passed over. Wants an idle machine for hours."""
    from dfastllm.bench.cpu.load import Foreign
    from dfastllm.bench.every import Journal, chosen, run_all, source_hash

    try:
        records = chosen(only or (), skip or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    source, kept = source_hash(Path.cwd()), Journal(journal)
    if again:
        kept.rows.clear()
    left = [record for record in records if not kept.done(record, source)]
    if show:
        shown = [
            {"record": r.name, "minutes": r.minutes, "done": "" if r in left else "done", "command": _command(r)}
            for r in records
        ]
        _table(f"{len(left)} of {len(records)} records left, about {sum(r.minutes for r in left)} min", shown)
        return
    with Foreign([os.getpid()]) as others:
        time.sleep(2)
    if others.share is not None and others.share > 0.1:
        console.print(f"others use {others.share:.0%} of this machine: times will be too long, ratios less so.")
    failed = list(run_all(records, kept, source, lambda line: console.print(f"{time.strftime('%H:%M:%S')} {line}")))
    console.print(f"{len(records) - len(failed)} of {len(records)} done, {journal}")
    raise typer.Exit(int(bool(failed)))


def _command(record: EveryRecord) -> str:
    isa = "".join(f"{name}={value} " for name, value in record.environment.items())
    return isa + shlex.join(("python", "-m", "dfastllm.bench", *record.arguments))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def servers(
    context: typer.Context,
    only: Annotated[list[str] | None, typer.Option(help="dfastllm, llama-cpp-python or transformers.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("bench-results"),
    cache: Annotated[Path, typer.Option(help="Environments and model files.", envvar="BENCH_CACHE")] = CACHE,
    threads: Annotated[int, typer.Option(help="Of each server; 0: as many as cores.", min=0)] = 0,
) -> None:
    """`dfastllm bench` against ours and other servers, each started with demo-ar. Other options go to it: --quick."""
    from dfastllm.bench.suite.others import MODEL, SERVERS, across_servers, running_server
    from dfastllm.bench.suite.schema import Results, load_results
    from dfastllm.bench.suite.terminal import print_tables

    found: dict[str, Results] = {}
    failed = False
    for name in only or SERVERS:
        console.print(f"[bold]{name}[/bold]")
        results = out / name / "test_results.json"
        with running_server(name, cache, out / name / "server.log", threads or os.cpu_count() or 1) as url:
            run = [sys.executable, "-c", "from dfastllm.cli import main; main()", "bench", url, "--model", MODEL]
            failed |= subprocess.run([*run, "--out", str(out / name), *context.args]).returncode != 0
        if results.exists():
            found[name] = load_results(results)
    print_tables([across_servers(found)])
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    app()
