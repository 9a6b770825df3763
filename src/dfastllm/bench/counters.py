"""Exact counters: what the shipped models do on fixed requests, in numbers that no noise touches.

Greedy requests of the task mix, all in flight at once on an engine that this thread steps, so that a run is the same
every time. Counted are forward passes (nfe), rows computed, output tokens, drafts and what was accepted of them; and a
hash of the answers. A change of any number is a change of behaviour, wanted or not: it fails until the baseline is
written anew. Times are not looked at.

Kernels of another kind may differ in the last bits and tip a decision the other way, so a baseline is kept per kind
(`counters_key`); a kind without one is skipped, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.core import Cache, DecodeParams, Request, SamplingParams, StepStats
from dfastllm.errors import GenerationError, ValidationError
from dfastllm.llm import load_engine
from dfastllm.metrics.gates import read_json
from dfastllm.metrics.workload import gradable
from dfastllm.text import Tokenizer

__all__ = [
    "CASES",
    "Case",
    "Change",
    "cases_of",
    "count",
    "count_everywhere",
    "counters_key",
    "differences",
    "load_counters",
    "save_counters",
]

SCHEMA_VERSION = 1
REQUESTS = 7
MAX_TOKENS = 48
Counters = dict[str, int | str]
# Environments that choose the kernels; those this machine has not are left out.
KINDS: Sequence[Mapping[str, str]] = (
    {"DFASTLLM_ISA": "avx512"},
    {"DFASTLLM_ISA": "avx2"},
    {"DFASTLLM_ISA": "scalar"},
    {"DFASTLLM_NATIVE": "0"},
)


@dataclass(frozen=True)
class Case:
    """One configuration. speculative: as `--speculative-config` takes it."""

    name: str
    model: str
    decode: DecodeParams | None = None
    speculative: str | None = None


CACHES: Sequence[Cache] = ("none", "prefix", "dual")


def _cases() -> Iterator[Case]:
    yield Case("ar", "demo-ar")
    for method, k, model in (
        ("ngram", 5, None),
        ("suffix", 8, None),
        ("draft_model", 4, "demo-draft"),
        ("diffusion", 8, "demo-diffusion"),
    ):
        form = {"method": method, "num_speculative_tokens": k, "adaptive": False} | ({"model": model} if model else {})
        yield Case(f"ar {method} {k}", "demo-ar", speculative=json.dumps(form))
    rules: Sequence[Mapping[str, Any]] = ({"steps": MAX_TOKENS // 2}, {"threshold": 0.9}, {"factor": 1.0})
    for rule in rules:
        said = " ".join(f"{name} {value}" for name, value in rule.items())
        for cache in CACHES:
            yield Case(
                f"diffusion {said} {cache}", "demo-diffusion", DecodeParams(cache=cache, block_length=16, **rule)
            )
        yield Case(f"block {said}", "demo-block", DecodeParams(**rule))


CASES = tuple(_cases())


def counters_key() -> str:
    """What the counters depend on beside the code: the instruction set of the native kernels, or torch and what it
    finds in the CPU."""
    from dfastllm.kernels.extension import describe, native

    if native() is not None:
        isa = describe().partition(":")[0]
        return "avx2" if isa in ("avxvnni", "avx512vl") else isa  # its attention, and linears of the same bits
    import torch

    return f"torch-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '-')}"


def cases_of(names: Sequence[str] | None) -> list[Case]:
    """Cases by the beginnings of their names; None: all. Raises ValidationError for a name that fits none."""
    for name in names or ():
        if not any(case.name.startswith(name) for case in CASES):
            raise ValidationError(
                f"no case begins with {name!r}; there are: {', '.join(c.name for c in CASES)}.", param="case"
            )
    return [case for case in CASES if names is None or any(case.name.startswith(name) for name in names)]


def count(case: Case, *, requests: int = REQUESTS, max_tokens: int = MAX_TOKENS) -> Counters:
    """Run one case. Raises GenerationError when a request fails."""
    engine = load_engine(case.model, speculative=case.speculative)
    assert engine.tokenizer is not None  # the shipped models have one
    steps: list[StepStats] = []
    engine.subscribe(steps.append)
    for i, prompt in enumerate(_prompts(engine.tokenizer, requests)):
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        engine.add(Request(f"r{i}", prompt, sampling, case.decode))
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            answers.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish is not None and event.finish.error is not None:
                raise GenerationError(f"{case.name}: {event.request_id} failed: {event.finish.error}")
    used = [finish.usage for step in steps for finish in step.finished]
    found: Counters = {
        "nfe": sum(u.forwards for u in used),
        "steps": len(steps),
        "rows": sum(step.rows for step in steps),
        "wanted_rows": sum(step.wanted for step in steps),
        "prompt_tokens": sum(u.prompt_tokens for u in used),
        "completion_tokens": sum(u.completion_tokens for u in used),
        "answers": hashlib.sha256(json.dumps(sorted(answers.items())).encode()).hexdigest()[:12],
    }
    if case.speculative:
        found |= {
            "drafts": sum(u.drafts for u in used),
            "draft_tokens": sum(u.draft_tokens for u in used),
            "accepted_tokens": sum(u.accepted_tokens for u in used),
        }
    return found


def _prompts(tokenizer: Tokenizer, requests: int) -> Iterator[tuple[int, ...]]:
    for sample in gradable(requests):
        text = tokenizer.apply_chat_template(sample.messages, sample.tools or None)
        yield tuple(tokenizer.encode(text, add_special=False))


@dataclass(frozen=True, slots=True)
class Change:
    """One counter that differs; None: not there."""

    case: str
    counter: str
    baseline: int | str | None
    current: int | str | None


def differences(current: Mapping[str, Counters], baseline: Mapping[str, Counters]) -> list[Change]:
    """Every counter that differs. Cases that were not run are not looked at; a case that the baseline lacks is one."""
    found = []
    for case, counters in current.items():
        before = baseline.get(case, {})
        for name in dict.fromkeys((*before, *counters)):
            if before.get(name) != counters.get(name):
                found.append(Change(case, name, before.get(name), counters.get(name)))
    return found


def load_counters(path: Path, key: str) -> dict[str, Counters] | None:
    """The baseline of a kind of kernels; None: there is none for it. Raises ValidationError for a file that is missing,
    cut short or of another version."""
    data = read_json(path)
    if data.get("schema_version") != SCHEMA_VERSION or not isinstance(data.get("kinds"), dict):
        raise ValidationError(
            f"{path} is no counters' baseline of schema version {SCHEMA_VERSION}.",
            param="baseline",
            hint="Write it anew: dfastllm gate counters --update.",
        )
    found: dict[str, Counters] | None = data["kinds"].get(key)
    return found


def save_counters(path: Path, kinds: Mapping[str, Mapping[str, Counters]]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {"schema_version": SCHEMA_VERSION, "requests": REQUESTS, "max_tokens": MAX_TOKENS, "kinds": kinds}
    part = path.with_name(path.name + ".part")
    part.write_text(_dump(form) + "\n", encoding="utf-8")
    part.replace(path)


def _dump(form: Mapping[str, Any]) -> str:
    """JSON with a case to a line, so that a change reads well in a diff."""
    kinds = {
        key: "{\n" + ",\n".join(f"   {json.dumps(name)}: {json.dumps(each)}" for name, each in cases.items()) + "\n  }"
        for key, cases in form["kinds"].items()
    }
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in form.items() if name != "kinds")
    body = ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in kinds.items())
    return f'{{\n{head},\n "kinds": {{\n{body}\n }}\n}}'


def count_everywhere() -> Iterator[tuple[str, dict[str, Counters]]]:
    """(kind of kernels, counters of every case) for each kind this machine can run, each in a process of its own: the
    kernels are chosen once per process. Raises GenerationError with the end of what a failing one said."""
    program = "from dfastllm.bench.counters import _tell; _tell()"
    seen: set[str] = set()
    for kind in KINDS:
        own = {name: value for name, value in os.environ.items() if name not in ("DFASTLLM_ISA", "DFASTLLM_NATIVE")}
        done = subprocess.run(
            [sys.executable, "-c", program], env={**own, **kind}, capture_output=True, text=True, encoding="utf-8"
        )
        if done.returncode:
            if "DFASTLLM_ISA" in done.stderr:
                continue  # these kernels the machine has not
            said = done.stderr.strip()[-1000:]
            raise GenerationError(f"counting with {kind} failed: {said}")
        told = json.loads(done.stdout.splitlines()[-1])
        if told["key"] not in seen:
            seen.add(told["key"])
            yield told["key"], told["cases"]


def _tell() -> None:
    print(json.dumps({"key": counters_key(), "cases": {case.name: count(case) for case in CASES}}))
