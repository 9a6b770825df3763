"""Diffusion end to end on a LLaDA-shaped model: the plain loop (torch bfloat16, no cache) against the dual cache on
native kernels, and the mixed forms, so that the gain can be told apart. All run through the facade, in turns.

torch computes in bfloat16, so what is as faithful is the native bfloat16. w8r is what `--quantization 8bit` makes, and
w8 is shown for what faithfulness costs: it rounds a row's activations with one scale in the model's own basis, and is
far from float on a real model (`bench fidelity`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfastllm.bench.cpu.compare import verdict
from dfastllm.bench.cpu.load import Foreign
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.weights import packed
from dfastllm.core import Cache, DecodeParams, SamplingParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.kernels.extension import set_threads
from dfastllm.llm import LLM
from dfastllm.metrics.stats import paired_ratio, summarise
from dfastllm.models import build

__all__ = ["AIM", "FORMATS", "Job", "Run", "end_to_end", "summary"]

AIM = 10.0
PLAIN = "torch bf16, none"
FORMATS = ("bf16", "w8r", "w8")


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `prompt` random ids, a canvas of `canvas` tokens in blocks of `block`, the fixed schedule with
    `per_step` tokens a step; EOS does not end it, so that both sides commit the same number of tokens."""

    prompt: int = 256
    canvas: int = 128
    block: int = 32
    per_step: int = 2

    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.canvas, ignore_eos=True)

    def decode(self, cache: Cache) -> DecodeParams:
        return DecodeParams(
            rule="schedule",
            cache=cache,
            block_length=self.block,
            steps=self.canvas // self.per_step,
            early_stop=False,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: tokens committed (`usage.completion_tokens`), forwards of the model, and wall time."""

    turn: int
    side: str
    tokens: int
    forwards: int
    seconds: float
    foreign: float | None


def end_to_end(
    shape: Shape, threads: int, formats: Sequence[str], job: Job, rounds: int, sides: Sequence[str]
) -> Iterator[Run]:
    """Runs in turns, after one short warm-up of each side. formats: of the native weights. sides: names of
    `side_names`."""
    set_threads(threads)
    config, info = shape.own()
    plain = build(config, info, dtype=torch.bfloat16)
    models = {"torch bf16": plain, **{f"native {form}": packed(plain, form) for form in formats}}
    limits = EngineConfig(max_sequences=1, kv_tokens=2 * (job.prompt + job.canvas))
    prompt = tuple(np.random.default_rng(0).integers(0, shape.vocab - 2, job.prompt).tolist())
    facades = {name: LLM(engine=Engine(model, config=limits)) for name, model in models.items()}  # type: ignore[arg-type]
    short = Job(job.prompt, job.block, job.block, job.block // 2)
    try:
        for side in sides:
            _generate(facades, side, prompt, short)
        for turn in range(rounds):
            for side in sides if turn % 2 == 0 else list(sides)[::-1]:
                yield _timed(facades, side, prompt, job, turn)
    finally:
        for facade in facades.values():
            facade.close()


def side_names(formats: Sequence[str] = FORMATS) -> list[str]:
    """Kernels with their weights x caches, the plain loop first."""
    kernels = ("torch bf16", *(f"native {form}" for form in formats))
    return [f"{one}, {cache}" for one in kernels for cache in ("none", "dual")]


def _generate(facades: Mapping[str, LLM], side: str, prompt: tuple[int, ...], job: Job) -> tuple[int, int]:
    kernels, _, cache = side.partition(", ")
    decode = job.decode("dual" if cache == "dual" else "none")
    usage = facades[kernels].generate([prompt], job.sampling(), decode)[0].outputs[0].usage
    return usage.completion_tokens, usage.forwards


def _timed(facades: Mapping[str, LLM], side: str, prompt: tuple[int, ...], job: Job, turn: int) -> Run:
    with Foreign([os.getpid()]) as others:
        began = time.perf_counter()
        tokens, forwards = _generate(facades, side, prompt, job)
        seconds = time.perf_counter() - began
    return Run(turn, side, tokens, forwards, seconds, others.share)


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per side: tok/s, forwards, and how many times the plain loop's tok/s, turn by turn; the aim beside the
    dual cache on native kernels. Only whole turns count."""
    sides = list(dict.fromkeys(run.side for run in runs))
    turns = {run.turn for run in runs if all(any(o.turn == run.turn and o.side == s for o in runs) for s in sides)}
    speed = {
        side: [
            run.tokens / run.seconds
            for run in sorted(runs, key=lambda r: r.turn)
            if run.side == side and run.turn in turns
        ]
        for side in sides
    }
    rows = []
    for side in sides:
        last = next(run for run in reversed(runs) if run.side == side)
        ratio = paired_ratio(speed[side], speed[PLAIN]) if PLAIN in speed else None
        aim = AIM if side.startswith("native") and side.endswith("dual") else None
        rows.append(
            {
                "side": side,
                "tokens": last.tokens,
                "forwards": last.forwards,
                "tokens_per_s": summarise(speed[side]),
                "times_plain": ratio,
                "aim": aim,
                "verdict": verdict(ratio, aim) if ratio else "",
            }
        )
    return rows
