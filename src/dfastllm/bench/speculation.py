"""Speculative decoding against plain decoding of the same requests: what is accepted, what it gains, where it loses.

Three parts. `acceptance`: exact counts by task on the demo models. `speed`: tokens per second by draft length and batch
size, each run interleaved with a plain one, every answer compared. `oracle`: a real shape with random weights, on which
no drafter means anything; there a drafter that knows the answer and errs at a given rate shows what verifying costs and
what acceptance it takes to pay.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dfastllm import assemble
from dfastllm.core import Draft, ModelInfo, Request, SamplingParams, SequenceState, SpeculativeParams
from dfastllm.decode.draft import Drafter
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate import model_drafter
from dfastllm.llm import resolve
from dfastllm.metrics.records import Spread, spread
from dfastllm.metrics.speculation import answer, counts
from dfastllm.options import SpeculativeMethod
from dfastllm.tasks import MIXED, draw

__all__ = ["DRAFTERS", "LENGTHS", "Oracle", "acceptance", "engine_of", "oracle", "plot", "speed", "verify_costs"]

TARGET = "demo-ar"
DRAFTERS: Mapping[str, tuple[SpeculativeMethod, str | None]] = {  # label -> method, drafting model
    "ngram": ("ngram", None),
    "suffix": ("suffix", None),
    "demo-draft": ("draft_model", "demo-draft"),
    "demo-diffusion": ("diffusion", "demo-diffusion"),
    "demo-block": ("diffusion", "demo-block"),
}
LENGTHS: tuple[int | None, ...] = (1, 3, 5, 7, None)  # None: adaptive, at most 7
ADAPTIVE_MOST = 7


def engine_of(label: str, places: int = 64) -> Engine:
    """demo-ar with the drafter of that label, `places` requests at once, nothing shared between requests."""
    config = EngineConfig(kv_tokens=32768, max_sequences=places, prefix_caching=False)
    # packed, with kernels or twins: bfloat16 on the torch backend rounds by the batch's shape
    loaded = assemble.load(resolve(TARGET), backend="native")
    method, name = DRAFTERS[label]
    drafters: dict[str, Drafter] = {}
    if name is not None:
        draft = assemble.load(resolve(name), backend="native", drafting=True)
        drafters[method] = model_drafter(method, draft.model, config, bigram=draft.bigram)
    return Engine(loaded.model, loaded.tokenizer, config, drafters=drafters)


def prompts(engine: Engine, task: str, count: int) -> list[tuple[int, ...]]:
    """Held-out samples of a task in the model's chat template."""
    assert engine.tokenizer is not None
    out = []
    for i in range(count):
        sample = draw("test", 1, i, task)
        text = engine.tokenizer.apply_chat_template(sample.messages, sample.tools or None)
        out.append(tuple(engine.tokenizer.encode(text, add_special=False)))
    return out


def asking(label: str, k: int | None, **options: Any) -> SpeculativeParams:
    method = DRAFTERS[label][0]
    return SpeculativeParams(method, k or ADAPTIVE_MOST, adaptive=k is None, prompt_lookup_min=2, **options)


def requests_of(texts: Sequence[tuple[int, ...]], temperature: float, tokens: int) -> list[Request]:
    return [
        Request(f"r{i}", text, SamplingParams(temperature=temperature, max_tokens=tokens, seed=i))
        for i, text in enumerate(texts)
    ]


def acceptance(samples: int = 20, k: int = 5, tokens: int = 64) -> list[dict[str, Any]]:
    """Exact counts per task, drafter, temperature and acceptance rule. Raises AssertionError where answers that must be
    plain decoding's are not."""
    rows = []
    for label in DRAFTERS:
        engine = engine_of(label)
        for task in MIXED:
            for temperature, rule in ((0.0, "coupled"), (1.0, "coupled"), (1.0, "rejection")):
                requests = requests_of(prompts(engine, task, samples), temperature, tokens)
                plain = answer(engine, requests)
                asked = replace(asking(label, k), acceptance=rule)  # type: ignore[arg-type]
                run = answer(engine, [replace(r, speculative=asked) for r in requests])
                if rule == "coupled":
                    assert run.tokens == plain.tokens, f"{label} changed an answer of {task}"
                rows.append({"drafter": label, "task": task, "temperature": temperature, "rule": rule} | counts(run))
    return rows


def speed(
    label: str, batches: Sequence[int] = (1, 4, 16, 32), lengths: Sequence[int | None] = LENGTHS, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """Ratio of tokens per second to plain decoding, the same requests one right after the other, greedy. The mix has
    every task equally often. Raises AssertionError where an answer differs."""
    for batch in batches:
        engine = engine_of(label, batch)
        texts = [p for task in MIXED for p in prompts(engine, task, max(2, -(-batch // len(MIXED))))]
        requests = requests_of(texts, 0.0, 64)
        answer(engine, requests)
        for k in lengths:
            asked = [replace(r, speculative=asking(label, k)) for r in requests]
            answer(engine, asked)  # adaptive: what it learns here it may keep, as a server would
            ratios, plain_rates, last = [], [], None
            for _ in range(repeats):
                plain, last = answer(engine, requests), answer(engine, asked)
                assert last.tokens == plain.tokens, f"{label} with k={k} changed an answer"
                ratios.append(last.rate / plain.rate)
                plain_rates.append(plain.rate)
            assert last is not None
            yield {
                "drafter": label,
                "batch": batch,
                "k": k or "adaptive",
                "plain_tokens_per_s": spread(plain_rates),
                "speedup": spread(ratios),
                "suppressed": last.suppressed,
            } | counts(last)


class Oracle:
    """A drafter that knows the answer and errs: a token is right with probability `rate`, by a hash of its place."""

    def __init__(self, answers: Mapping[str, Sequence[int]], rate: float, vocab: int) -> None:
        self.answers = answers
        self.rate = rate
        self.vocab = vocab

    def check(self, request: Request, model: ModelInfo) -> None:
        return None

    def passes(self, most: int) -> int:
        return 0

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        return [Draft(tuple(self._next(seq, most)), len(seq.tokens)) for seq, most in wanted]

    def _next(self, seq: SequenceState, most: int) -> Iterator[int]:
        made = len(seq.tokens) - seq.canvas_start
        known = self.answers[seq.request.request_id]
        for at in range(made, min(made + most, len(known))):
            word = hashlib.blake2b(f"{seq.request.request_id} {at}".encode(), digest_size=8).digest()
            right = int.from_bytes(word) < self.rate * 2**64
            yield known[at] if right else (known[at] + 1) % self.vocab

    def release(self, seq: SequenceState) -> None:
        return None


def oracle(
    model: Any,
    batches: Sequence[int] = (1, 4),
    rates: Sequence[float] = (0.3, 0.6, 0.8, 0.9),
    lengths: Sequence[int | None] = LENGTHS,
    *,
    tokens: int = 32,
    repeats: int = 2,
) -> Iterator[dict[str, Any]]:
    """Speedup of a free drafter by how often its tokens are right. Random prompts of 64 tokens, greedy, no end."""
    for batch in batches:
        config = EngineConfig(kv_tokens=4096, max_sequences=batch, prefix_caching=False)
        rng = np.random.default_rng(0)
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        prompt = [tuple(rng.integers(0, model.info.vocab_size - 2, 64).tolist()) for _ in range(batch)]
        requests = [Request(f"r{i}", p, sampling) for i, p in enumerate(prompt)]
        engine = Engine(model, config=config)
        known = answer(engine, requests).tokens
        for rate in rates:
            engine.drafting.drafters["draft_model"] = Oracle(known, rate, model.info.vocab_size)
            for k in lengths:
                asked = SpeculativeParams("draft_model", k or ADAPTIVE_MOST, adaptive=k is None)
                ratios = []
                answer(engine, [replace(r, speculative=asked) for r in requests])  # what is learned here may be kept
                for _ in range(repeats):
                    plain = answer(engine, requests)
                    run = answer(engine, [replace(r, speculative=asked) for r in requests])
                    assert run.tokens == plain.tokens == known, "an oracle changed an answer"
                    ratios.append(run.rate / plain.rate)
                yield {
                    "batch": batch,
                    "rate": rate,
                    "k": k or "adaptive",
                    "plain_tokens_per_s": plain.rate,
                    "speedup": spread(ratios),
                } | counts(run)


def verify_costs(
    model: Any, batches: Sequence[int] = (1, 4, 16), lengths: Sequence[int] = (0, 1, 3, 5, 7), *, steps: int = 12
) -> list[dict[str, Any]]:
    """Seconds of a deciding forward with drafts of k tokens, all wrong, against one without, and the acceptance (the
    same at every position) from which drafts that cost nothing pay."""
    rows = []
    for batch in batches:
        config = EngineConfig(kv_tokens=8192, max_sequences=batch, prefix_caching=False)
        sampling = SamplingParams(temperature=0, max_tokens=steps + max(lengths) + 3, ignore_eos=True)
        requests = [Request(f"r{i}", tuple(range(10 + i, 74 + i)), sampling) for i in range(batch)]
        engine = Engine(model, config=config)
        known = answer(engine, requests).tokens
        engine.drafting.drafters["draft_model"] = Oracle(known, 0.0, model.info.vocab_size)
        medians: dict[int, Spread] = {}
        for k in lengths:
            asked = SpeculativeParams("draft_model", k, adaptive=False) if k else None
            for r in requests:
                engine.add(replace(r, speculative=asked))
            taken = []
            while engine.has_work:
                began = time.perf_counter()
                engine.step()
                taken.append(time.perf_counter() - began)
            medians[k] = spread(taken[2 : 2 + steps])  # after the prompt, before drafts are cut by the end
        for k, taken_k in medians.items():
            ratio = taken_k.median / medians[0].median
            rows.append({"batch": batch, "k": k, "step_s": taken_k, "ratio": ratio, "break_even": break_even(k, ratio)})
    return rows


def break_even(k: int, ratio: float) -> float | None:
    """Chance of a draft token from which a step of k draft tokens gives as many tokens a second as one without, the
    step taking `ratio` times as long. None: no chance is enough; 0 for no drafts."""
    if k == 0 or ratio <= 1:
        return 0.0
    if ratio > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(k + 1)) < ratio else (low, middle)
    return high


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Speedup by draft length on the demo models, one panel per batch size; below, the oracle's. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, bets = record.get("speed", []), record.get("oracle", [])
    batches = sorted({r["batch"] for r in rows})
    oracles = sorted({r["batch"] for r in bets})
    across = max(1, len(batches), len(oracles))
    figure, panels = plt.subplots(2, across, figsize=(3.3 * across, 7.2), squeeze=False)
    ks = [str(k or "adaptive") for k in LENGTHS]

    def line(axes: Any, some: Sequence[Mapping[str, Any]], label: str) -> None:
        found = {str(r["k"]): r["speedup"] for r in some}
        at = [i for i, k in enumerate(ks) if k in found]
        middle = [found[ks[i]]["median"] for i in at]
        spans = [
            [m - found[ks[i]]["low"] for i, m in zip(at, middle, strict=True)],
            [found[ks[i]]["high"] - m for i, m in zip(at, middle, strict=True)],
        ]
        axes.errorbar(at, middle, spans, marker="o", markersize=4, linewidth=1.2, capsize=2, label=label)

    for n, batch in enumerate(batches):
        axes = panels[0][n]
        for label in DRAFTERS:
            line(axes, [r for r in rows if (r["batch"], r["drafter"]) == (batch, label)], label)
        axes.set_title(f"demo-ar, batch {batch}", fontsize=10)
    for n, batch in enumerate(oracles):
        axes = panels[1][n]
        for rate in sorted({r["rate"] for r in bets}):
            line(axes, [r for r in bets if (r["batch"], r["rate"]) == (batch, rate)], f"{rate:.0%} right")
        axes.set_title(f"{record.get('oracle_model', 'oracle')}, batch {batch}", fontsize=10)
    for axes in panels.flat:
        if not axes.lines:
            axes.axis("off")
            continue
        axes.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(ks)), ks, fontsize=8)
        axes.set_xlabel("draft tokens", fontsize=9)
        axes.grid(alpha=0.3)
    for across_row in panels:
        across_row[0].set_ylabel("tokens per second, plain = 1")
        if across_row[0].lines:
            across_row[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
