"""Adapters under random traffic on the native runner: `scripts/adapters` runs as many interleavings as it is told to.

An interleaving is 25 random acts (requests, loads, replacements, unloads, cancels, steps; see `tests.kit.chaos`) on an
engine that has what earlier ones left in its pages. Every answer is held against the same request alone on a model with
the adapter merged into its weights, in float32, so that the two agree but for the last bits.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfastllm import assemble
from dfastllm.core import DecodeParams, Request, SamplingParams, SpeculativeParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.models import Decoder, tiny
from tests.kit.adapters import ATTENTION, with_peft
from tests.kit.chaos import Chaos
from tests.kit.merged import Answers, write_strong

__all__ = ["FAMILIES", "Count", "interleave", "main", "small_model"]

FAMILIES = {"ar": "llama", "block": "sdar", "diffusion": "llada"}
SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4}
ACTS = 25
# Limits of the engine, each for a twelfth of the interleavings in turn.
CONFIGS: Sequence[dict[str, Any]] = (
    {"kv_tokens": 1024, "max_loras": 3},
    {"kv_tokens": 160, "max_loras": 4},
    {"kv_tokens": 1024, "max_loras": 1},
    {"kv_tokens": 512, "max_loras": 8, "max_batch_rows": 24, "prefill_chunk": 16},
)
ADAPTERS: Sequence[dict[str, Any]] = (
    {"rank": 4},
    {"rank": 3},
    {"rank": 17, "targets": ("q_proj", "v_proj")},
    {"rank": 8, "targets": ("down_proj",)},
    {"rank": 1},
)
# By PEFT itself: what is not a plain change of a linear.
VARIANTS: Sequence[dict[str, Any]] = (
    {"use_dora": True},
    {"target_modules": rf"{ATTENTION}|embed|lm_head", "r": 6},
    {"target_modules": r"embed|lm_head|.*\.o_proj", "use_dora": True},
    {"target_modules": ATTENTION, "modules_to_save": ["embed", "lm_head"], "r": 3},
)


@dataclass
class Count:
    """What was seen. wrong: answers that are not what they should be."""

    interleavings: int = 0
    answers: int = 0
    tokens: int = 0
    different: int = 0
    ties: int = 0
    busy: int = 0
    evictions: int = 0
    preempted: int = 0
    shared: int = 0
    wrong: list[Request] = field(default_factory=list)


def small_model(kind: str) -> Decoder:
    return tiny(FAMILIES[kind], 3, block=4 if kind == "block" else None, max_len=128, **SHAPE)


def build(model: Decoder, config: EngineConfig) -> Engine:
    """An engine of the native runner over float32 weights and K,V."""
    return Engine(assemble.pack(model), config=config, dtype=torch.float32)


PROMPT = tuple(int(i) for i in torch.randint(1, 90, (48,), generator=torch.Generator().manual_seed(2)))


def make(kind: str, rng: random.Random, name: str, lora: str) -> Request:
    """One of few different requests, so that most of what they should say is known already."""
    decode = speculative = None
    if kind != "ar":
        decode = rng.choice((DecodeParams(), DecodeParams(rule="threshold", threshold=0.3, block_length=4)))
    elif rng.random() < 0.3:
        speculative = SpeculativeParams("ngram", prompt_lookup_min=1, adaptive=False)
    sampling = SamplingParams(max_tokens=rng.choice((4, 8)), temperature=rng.choice((0.0, 0.7)), seed=1)
    prompt = PROMPT[: rng.choice((9, 33, 48))]
    return Request(name, prompt, sampling, decode, speculative=speculative, priority=rng.randrange(2), lora=lora)


def interleave(kind: str, count: int, folder: Path, seed: int = 0, *, progress: bool = False) -> Count:
    """So many interleavings on models of a kind."""
    model, total = small_model(kind), Count()
    contents = {f"{n}": write_strong(folder / f"{kind}{n}", model, n, **how) for n, how in enumerate(ADAPTERS, 1)}
    for n, config in enumerate(VARIANTS, len(contents) + 1):
        contents[f"{n}"] = folder / f"{kind}{n}"
        with_peft(model, contents[f"{n}"], seed=n, spread=0.4, **config)
    answers = Answers(model, build, contents)

    def alone(request: Request, content: str) -> tuple[int, ...]:
        return answers(replace(request, speculative=None), content)

    chaos: Chaos | None = None
    began, turn = time.monotonic(), max(1, count // 12)
    for number in range(count):
        if chaos is None or number % turn == 0:
            _end(chaos, total)
            limits = CONFIGS[number // turn % len(CONFIGS)]
            engine = build(model, EngineConfig(page_size=16, max_sequences=5, **limits))
            chaos = Chaos(engine, contents, partial(make, kind), random.Random(f"{kind}/{seed}/{number}"))
        for _ in range(ACTS):
            chaos.act()
        total.tokens += sum(map(len, chaos.got.values()))
        done, wrong = chaos.check(alone)
        total.interleavings += 1
        total.answers += done
        total.wrong += wrong
        if progress and number % 200 == 199:
            rate = (number + 1) / (time.monotonic() - began)
            print(f"{kind}: {number + 1} of {count}, {total.answers} answers, {len(total.wrong)} wrong, {rate:.1f}/s")
    _end(chaos, total)
    total.different, total.ties = len(answers), answers.ties
    return total


def _end(chaos: Chaos | None, total: Count) -> None:
    if chaos is not None:
        total.busy += chaos.busy
        total.evictions += chaos.engine.adapters.evictions
        total.preempted += chaos.engine.scheduler.preempted
        total.shared += 0 if chaos.engine.prefix is None else chaos.engine.prefix.hits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/adapters", description="Random interleavings of adapters' requests.")
    parser.add_argument("--interleavings", type=int, default=10_002, help="in all, over the three kinds of model")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in FAMILIES:
            began = time.monotonic()
            found = interleave(kind, -(-given.interleavings // 3), Path(folder), given.seed, progress=True)
            seconds = time.monotonic() - began
            wrong += len(found.wrong)
            print(
                f"{kind}: {found.interleavings} interleavings, {found.answers} answers ({found.different} different "
                f"requests, {found.tokens} tokens), {len(found.wrong)} wrong, {found.ties} ties; refused for want of a "
                f"place {found.busy}, evictions {found.evictions}, preemptions {found.preempted}, prompt tokens shared "
                f"{found.shared}; {seconds:.0f} s"
            )
            for request in found.wrong[:5]:
                print("  wrong:", request)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
