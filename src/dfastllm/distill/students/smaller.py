"""A smaller model of a model, from beginning to end: generated prompts, the model's own answers over HTTP, a student by
layer dropping, its training on the model's distributions, and what came of it.

`python -m dfastllm.distill.students.smaller STEP MODEL HOME` with the steps `collect`, `student`, `train`, `report`, in
this order. Each goes on where it stopped, so `collect` may be given an hour now and another one later. HOME holds
prompts, answers, checkpoints, the student and report.json. MODEL is a directory or a GGUF file; SmolLM2-135M-Instruct
is what this was written for.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch

from dfastllm import assemble
from dfastllm.core import Request, SamplingParams
from dfastllm.distill.data.rows import write_rows
from dfastllm.distill.students.acceptance import Measuring, measure_drafts, table
from dfastllm.distill.students.align import Alignment
from dfastllm.distill.students.answers import Answer, given_answers
from dfastllm.distill.students.chats import chats
from dfastllm.distill.students.draft import default_plan
from dfastllm.distill.students.layers import make_student, tokenizer_of
from dfastllm.distill.students.lessons import export, trainable
from dfastllm.distill.students.prompts import read_prompts
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.judge import KEEPABLE
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import DataError, DFastLLMError, NotReadyError, ValidationError
from dfastllm.kernels import set_threads
from dfastllm.llm import resolve
from dfastllm.metrics.speculation import answer
from dfastllm.train.checkpoint import content, require_same
from dfastllm.train.loop import fit
from dfastllm.train.plan import OptimizerName, training

__all__ = ["collect_answers", "report", "served", "train_student"]

TEMPERATURES = (0.0, 0.7)
HELD_OUT = 0.04
HELD_MOST = 128  # answers that are measured on
PATIENCE = 600.0  # s for a server to load its model, on a machine that does much else


@contextmanager
def served(model: str | Path, port: int, threads: int) -> Iterator[str]:
    """`dfastllm serve` of this model in a process of its own until the block ends; gives the root of its API. Raises
    ValidationError where something listens on the port, NotReadyError with what the server said where it does not come
    up."""
    with socket.socket() as probe:  # another server would answer in place of ours
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ValidationError(f"port {port} is in use.", param="port", hint="Name another with --port.")
    command = [str(Path(sys.executable).with_name("dfastllm")), "serve", str(model), "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, "--threads", str(threads)], stdout=said, stderr=said)
        try:
            root = f"http://127.0.0.1:{port}"
            until = time.monotonic() + PATIENCE
            while not _ready(root):
                if process.poll() is not None or time.monotonic() > until:
                    said.seek(0)
                    words = said.read().decode(errors="replace").strip()[-500:]
                    raise NotReadyError(f"the server of {model} did not come up: {words}", param="port")
                time.sleep(0.1)
            yield f"{root}/v1"
        finally:
            process.terminate()
            process.wait()


def _ready(root: str) -> bool:
    try:
        return bool(httpx.get(f"{root}/health/ready", timeout=5).status_code == 200)
    except httpx.HTTPError:
        return False


def collect_answers(
    model: str | Path,
    home: Path,
    *,
    minutes: float = 60.0,
    count: int = 40_000,
    max_tokens: int = 256,
    port: int = 8123,
    threads: int = 1,
    together: int = 8,
    top: int = 0,
    temperatures: Sequence[float] = TEMPERATURES,
) -> dict[str, int]:
    """Ask the served model for answers, greedy ones for half of the time and drawn ones at temperature 0.7 for the
    other, each to prompts of their own. Answers that were cut or go round in circles are kept: a student of the model
    learns what it would say next, wherever it is.

    top: likeliest tokens whose log-probabilities are asked for, 0 to 20. temperatures: of the answers, the time is
    divided among them. Returns how many of each kind there are now. Raises what collecting does."""
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(model)
    found: dict[str, int] = {}
    with served(model, port, threads) as root:
        for temperature in temperatures:
            seed = round(10 * temperature)  # the prompts of one temperature are no other's
            prompts = home / f"prompts-{temperature}.jsonl"
            if not prompts.exists():
                write_rows(prompts, chats(seed, count))
            settings = TeacherSettings.of(
                {
                    "base_url": root,
                    "max_tokens": max_tokens,
                    "temperature": temperature,
                    "top_logprobs": top,
                    "concurrency": together,
                    # A slow answer is no failed one here: the server is ours, and asking again would only cost more.
                    "timeout": 3600.0,
                    "row_deadline": 7200.0,
                    "deadline": max(1.0, minutes * 60 / len(temperatures)),
                }
            )
            out = home / f"answers-{temperature}.jsonl"
            summary = collect(prompts, out, settings, tokenizer, cache=home / "cache", keep=KEEPABLE, show=False)
            found[str(temperature)] = summary.had + summary.accepted
    return found


def _collected(model: str | Path, home: Path, most: int = HELD_MOST) -> tuple[list[Answer], list[Answer]]:
    """The answers that were collected: those to train on, and those held out, at most so many."""
    files = sorted(home.glob("answers-*.jsonl"))
    files = [file for file in files if ".rejected" not in file.name]
    if not files:
        raise DataError(f"{home} holds no answers yet.", param="home", hint="Run the step collect first.")
    prompts = read_prompts(files, HELD_OUT)
    tokenizer = tokenizer_of(model)
    return given_answers(tokenizer, prompts.train)[0], given_answers(tokenizer, prompts.held[:most])[0]


def train_student(
    model: str | Path,
    home: Path,
    *,
    steps: int = 1000,
    lr: float = 6e-4,
    tokens: int = 2048,
    longest: int = 512,
    bf16: bool = False,
    told: bool = False,
    frozen: bool = False,
    optimizer: OptimizerName = "adamw",
    held_out: int = HELD_MOST,
    validate_every: int = 100,
    stop: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train HOME/student on the model's distributions, write HOME/trained, and return what the last validation says
    with the tokens a second. stop: end at this step.

    told: learn from the log-probabilities that came with the answers, and from those that have them alone, in place of
    a forward of the model beside each of the student's. frozen: the embedding, and a head that is tied to it, stay as
    they are. held_out: answers at most that validations measure on. Raises what the training loop does."""
    train, held = _collected(model, home, held_out)
    student, _ = trainable(home / "student")
    target = None if told else trainable(model)[0].requires_grad_(False)
    if told:
        train, held = ([a for a in some if a.top is not None] for some in (train, held))
    work = Alignment(student, target, train, held, tokens=tokens, longest=longest, bf16=bf16, seed=seed, frozen=frozen)
    plan = default_plan(
        name="smaller",
        steps=steps,
        lr=lr,
        matrix_lr=lr,
        optimizer=optimizer,
        warmup=min(100, max(1, steps // 10)),
        validate_every=validate_every,
        save_every=validate_every,
        seed=seed,
    )
    what = {"model": str(model), "tokens": tokens, "longest": longest, "bf16": bf16, "told": told, "frozen": frozen}
    texts = [content(file) for file in sorted(home.glob("answers-*.jsonl"))]
    require_same(home / "run", "run.json", {**what, "answers": texts, "held_out": held_out, "plan": training(plan)})
    began = time.monotonic()
    done = fit(work, plan, home / "run", stop=stop)
    state = json.loads((done / "state.json").read_text())
    export(student, home / "student", home / "trained")
    return {
        "steps": state["step"],
        "tokens": state["tokens"],
        "tokens_per_second": state["tokens"] / max(state["seconds"], 1e-9),
        "seconds": time.monotonic() - began,
        "answers": len(work.answers),
        **work.validate(state["step"]),
    }


def report(
    model: str | Path,
    home: Path,
    *,
    prompts: int = 24,
    longest: int = 512,
    held_out: int = HELD_MOST,
    how: Measuring | None = None,
) -> dict[str, Any]:
    """What the students are worth, before and after training: divergence from the model and perplexity on its held-out
    answers (at most `held_out` of them), tokens a second alone, and as drafts for it. Writes HOME/report.json."""
    how = how or Measuring(max_tokens=96)
    _, held = _collected(model, home, held_out)
    places = {"before": home / "student", "after": home / "trained"}
    target, _ = trainable(model)
    target.requires_grad_(False)
    found: dict[str, Any] = {"answers": len(held), "model": {}, "students": {}}
    for label, place in {"model": None, **places}.items():
        student = target if place is None else trainable(place)[0]
        figures = dict(Alignment(student, target, held, held, longest=longest).validate(0))
        figures["perplexity"] = math.exp(float(figures["cross_entropy"]))
        figures["parameters"] = sum(p.numel() for p in student.parameters())
        requests = [
            Request(f"p{i}", a.prompt, SamplingParams(temperature=0, max_tokens=how.max_tokens))
            for i, a in enumerate(held[:prompts])
        ]
        figures["tokens_per_second"] = _rate(model if place is None else place, requests, how, place is not None)
        found["model" if place is None else "students"] |= figures if place is None else {label: figures}
    rows = measure_drafts(model, places, [(a.task, a.prompt) for a in held[:prompts]], how)
    print(table(rows))
    found |= {"drafts": [row.to_json() for row in rows], "measuring": asdict(how)}
    (home / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _rate(model: str | Path, requests: Sequence[Request], how: Measuring, student: bool) -> float:
    """Tokens a second of plain decoding, one request at a time as often as `how` says; the best run."""
    loaded = assemble.load(resolve(model), quantization=how.quantization if student else None)
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_sequences=how.together, prefix_caching=False))
    return max(answer(engine, requests).rate for _ in range(how.repeats))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.smaller", description="A smaller model of a model."
    )
    add = found.add_argument
    add("step", choices=("collect", "student", "train", "report"))
    add("model", help="the teacher: a directory, a GGUF file or a shipped model's name")
    add("home", type=Path, help="directory for everything that is made")
    add("--minutes", type=float, default=60.0, help="collect: time for answers")
    add("--count", type=int, default=40_000, help="collect: prompts of each temperature")
    add("--max-tokens", type=int, default=256, help="collect: of an answer; longer ones are cut")
    add("--top", type=int, default=0, help="collect: likeliest tokens whose log-probabilities are kept, at most 20")
    add("--temperatures", type=float, nargs="+", default=TEMPERATURES, help="collect: of the answers")
    add("--together", type=int, default=8, help="collect: questions at once")
    add("--port", type=int, default=8123, help="collect: of the server")
    add("--layers", type=int, help="student: how many layers; default: half of the parameters")
    add("--steps", type=int, default=1000, help="train")
    add("--stop", type=int, help="train: end at this step of them")
    add("--lr", type=float, default=6e-4, help="train")
    add("--tokens", type=int, default=2048, help="train: of a batch")
    add("--longest", type=int, default=512, help="train, report: tokens of a prompt and its answer")
    add("--bf16", action="store_true", help="train: matrix products in bfloat16")
    add("--told", action="store_true", help="train: on the log-probabilities that came with the answers, see --top")
    add("--frozen", action="store_true", help="train: leave the embedding, and a head tied to it, as they are")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="train")
    add("--held-out", type=int, default=HELD_MOST, help="train, report: answers at most that are measured on")
    add("--validate-every", type=int, default=100, help="train: steps between validations and between checkpoints")
    add("--prompts", type=int, default=24, help="report: that speed is measured on")
    add("--length", type=int, default=3, help="report: draft tokens")
    add("--repeats", type=int, default=3, help="report: of timed runs")
    add("--quantization", help="report: of the students")
    add("--threads", type=int, default=1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    set_threads(args.threads)
    torch.set_num_threads(args.threads)
    try:
        print(json.dumps(_step(args), indent=1))
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _step(args: argparse.Namespace) -> dict[str, Any]:
    if args.step == "collect":
        return collect_answers(
            args.model,
            args.home,
            minutes=args.minutes,
            count=args.count,
            max_tokens=args.max_tokens,
            port=args.port,
            threads=args.threads,
            together=args.together,
            top=args.top,
            temperatures=args.temperatures,
        )
    if args.step == "student":
        made = make_student(args.model, args.home / "student", layers=args.layers)
        return {"kept": list(made.kept), "parameters": made.parameters, "share": made.share}
    if args.step == "train":
        return train_student(
            args.model,
            args.home,
            steps=args.steps,
            lr=args.lr,
            tokens=args.tokens,
            longest=args.longest,
            bf16=args.bf16,
            told=args.told,
            frozen=args.frozen,
            optimizer=args.optimizer,
            held_out=args.held_out,
            validate_every=args.validate_every,
            stop=args.stop,
        )
    how = replace(Measuring(max_tokens=96), length=args.length, repeats=args.repeats, quantization=args.quantization)
    return report(args.model, args.home, prompts=args.prompts, longest=args.longest, held_out=args.held_out, how=how)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a run that is told to end ends its server
    raise SystemExit(main())
