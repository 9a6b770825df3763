"""A result with every part, made by hand: what the report's tests read. `improved` and friends make variants."""

from __future__ import annotations

from typing import Any, Literal

from dfastllm.bench.suite.schema import (
    Accuracy,
    AccuracyVsParallelism,
    Client,
    Comparison,
    ConfigurationResult,
    Environment,
    Equality,
    Figures,
    Forwards,
    Latency,
    LoadPoint,
    Output,
    ParallelismPoint,
    PromptTypeResult,
    Results,
    Round,
    Run,
    ServerStatus,
    Skipped,
    Speculation,
    Speed,
    SystemPromptResult,
    Target,
)

TYPES = {"code": "Code generation", "arithmetic": "Arithmetic", "creative": "Creative problem solving"}


def latency(p50: float) -> Latency:
    return Latency(mean=1.1 * p50, median=p50, std=0.2 * p50, p50=p50, p90=1.5 * p50, p95=1.7 * p50, p99=2 * p50, n=60)


def speed(tps: float, *, errors: int = 0, requests: int = 60) -> Speed:
    tokens = 40 * requests
    return Speed(
        requests=requests,
        errors=errors,
        error_kinds={"timeout": errors} if errors else {},
        duration=tokens / tps,
        prompt_tokens=20 * requests,
        output_tokens=tokens,
        tokens_source="usage",
        request_throughput=requests * tps / tokens,
        output_throughput=tps,
        total_token_throughput=1.5 * tps,
        user_tps=1.1 * tps,
        ttft=latency(900 / tps),
        tpot=latency(1000 / tps),
        itl=latency(990 / tps),
        icl=latency(1200 / tps),
        e2el=latency(40000 / tps),
        cdf={
            name: tuple(scale / tps * (0.5 + i / 20) for i in range(21))
            for name, scale in (("ttft", 900), ("e2el", 40000))
        },
    )


def graded(correct: int, n: int = 30) -> Accuracy:
    """With the Wilson interval, written out (Wilson 1927)."""
    z, p = 1.959964, correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return Accuracy(n=n, correct=correct, value=p, low=max(middle - half, 0), high=min(middle + half, 1))


def against(
    ratio: float, spread: float = 0.05, verdict: Literal["faster", "slower", "same", "no verdict"] | None = None
) -> Comparison:
    low, high = ratio - spread, ratio + spread
    margin = 0.03
    if verdict is None:
        verdict = "faster" if low > 1 else "slower" if high < 1 else "same" if spread < margin else "no verdict"
    return Comparison(ratio=ratio, low=low, high=high, rounds=(low, ratio, high), margin=margin, verdict=verdict)


def figures(
    tps: float,
    *,
    correct: int | None = 28,
    gain: Comparison | None = None,
    equal: int | None = None,
    errors: int = 0,
    **more: Any,
) -> Figures:
    return Figures(
        speed=speed(tps, errors=errors),
        output=Output(
            mean_tokens=40, mean_characters=130, empty=0, repetition=0.02, finish_reasons={"stop": 55, "length": 5}
        ),
        accuracy=None if correct is None else graded(correct),
        equality=None if equal is None else Equality(compared=60, equal=equal, by="tokens"),
        versus_baseline=gain,
        **more,
    )


def configuration(
    name: str,
    label: str,
    ratio: float | None = None,
    *,
    spread: float = 0.05,
    correct: int | None = 28,
    equal: int | None = 60,
    types: dict[str, float] | None = None,
    **more: Any,
) -> ConfigurationResult:
    """Baseline: 100 tok/s and no ratio. types: prompt type to ratio; default: all the configuration's."""
    base = ratio is None
    of_types = {
        kind: figures(
            100 * (1.0 if base else r),
            correct=correct,
            gain=None if base else against(r, spread),
            equal=None if base else equal,
        )
        for kind, r in (types or dict.fromkeys(TYPES, ratio or 1.0)).items()
    }
    tps = 100 * (ratio or 1.0)
    return ConfigurationResult(
        name=name,
        label=label,
        axis="baseline" if base else more.pop("axis", "speculation"),
        baseline=base,
        options={} if base else {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}},
        status="measured",
        figures=figures(
            tps,
            correct=correct,
            gain=None if base else against(ratio or 1.0, spread),
            equal=None if base else equal,
            speculation=None if base else drafts(5),
            forwards=Forwards(nfe=20.5, tokens_per_forward=1.95),
            exactness={"exact-fast": 60},
            errors=more.pop("errors", 0),
        ),
        rounds=tuple(Round(output_throughput=tps * f, duration=8.0, errors=0) for f in (0.98, 1.0, 1.02)),
        prompt_types=of_types,
        **more,
    )


def drafts(k: int) -> Speculation:
    accepted = tuple(400 // (i + 1) for i in range(k))
    return Speculation(
        num_drafts=500,
        num_draft_tokens=500 * k,
        num_accepted_tokens=sum(accepted),
        accepted_per_position=accepted,
        acceptance_rate=sum(accepted) / (500 * k),
        acceptance_length=1 + sum(accepted) / 500,
        source="response",
    )


def load_point(n: int, tps: float, *, rate: float | None = None, **more: Any) -> LoadPoint:
    goodput = {"request_goodput": tps / 50}
    return LoadPoint(
        name=f"{n} in flight" if rate is None else f"{rate:g} requests/s, Poisson",
        kind="closed" if rate is None else "poisson",
        configuration="baseline",
        concurrency=n if rate is None else None,
        request_rate=rate,
        slo={"ttft": 50.0, "e2el": 1000.0},
        achieved_rate=tps / 40,
        max_in_flight=n,
        figures=figures(tps).model_copy(update={"speed": speed(tps).model_copy(update=goodput)}),
        **more,
    )


def results(*configurations: ConfigurationResult, **changes: Any) -> Results:
    """Everything measured; `configurations` instead of the usual ones, `changes` of any field."""
    found = configurations or (
        configuration("baseline", "No speculation"),
        configuration("ngram-k3", "n-gram, 3 tokens", 1.30, num_speculative_tokens=3, method="ngram"),
        configuration(
            "ngram-k5",
            "n-gram, 5 tokens",
            1.62,
            num_speculative_tokens=5,
            method="ngram",
            types={"code": 1.9, "arithmetic": 1.62, "creative": 0.88},
        ),
        configuration("ngram-k7", "n-gram, 7 tokens", 1.48, num_speculative_tokens=7, method="ngram"),
        ConfigurationResult(
            name="suffix-k5", label="suffix, 5 tokens", axis="speculation", status="refused", message="no suffix tree"
        ),
    )
    gains = {
        kind: max(
            (
                (c.prompt_types[kind].versus_baseline, c.name)
                for c in found
                if kind in c.prompt_types and c.prompt_types[kind].versus_baseline is not None
            ),
            key=lambda pair: pair[0].ratio if pair[0] else 0,
            default=(None, None),
        )
        for kind in TYPES
    }
    fields: dict[str, Any] = {
        "started": "2026-11-20T10:00:00Z",
        "finished": "2026-11-20T10:04:00Z",
        "seconds": 240.0,
        "environment": Environment(
            hardware={"cpu": "Some Processor", "cores": 2, "memory_gib": 16},
            profile_key="cpu-2c-abcd",
            server_is_local=True,
            versions={"dfastllm": "0.1.0", "python": "3.11.2"},
            commit="abc1234",
        ),
        "run": Run(
            parts=("status", "configurations", "types", "system", "load"),
            prompt_types=tuple(TYPES),
            requests=10,
            rounds=3,
            concurrency=2,
            max_tokens=64,
            temperature=0.0,
            seed=0,
            quick=False,
        ),
        "servers": (
            ServerStatus(
                name="dfastllm or vLLM",
                url="http://127.0.0.1:8000/v1",
                status="running",
                message="",
                models=("demo-ar",),
                latency_ms=1.9,
                software="dfastllm 0.1.0",
            ),
            ServerStatus(
                name="LM Studio", url="http://127.0.0.1:1234/v1", status="refused", message="connection refused"
            ),
        ),
        "target": Target(
            url="http://127.0.0.1:8000/v1",
            model="demo-ar",
            kind="ar",
            software="dfastllm 0.1.0",
            fields={"speculative_config": "yes", "ignore_eos": "no"},
        ),
        "configurations": found,
        "prompt_types": tuple(
            PromptTypeResult(
                name=kind,
                label=TYPES[kind],
                prompts=10,
                gradable=10,
                best_configuration=gains[kind][1] if (g := gains[kind][0]) and g.verdict == "faster" else None,
                gain=gains[kind][0] if (g := gains[kind][0]) and g.verdict == "faster" else None,
            )
            for kind in TYPES
        ),
        "system_prompts": (
            SystemPromptResult(name="empty", text="", configuration="baseline", figures=figures(100)),
            SystemPromptResult(name="concise", text="Answer briefly.", configuration="baseline", figures=figures(104)),
        ),
        "load": (
            load_point(1, 100),
            load_point(2, 180),
            load_point(4, 290),
            load_point(8, 300),
            load_point(3, 150, rate=4.0, partial=True, partial_reason="the server went away"),
        ),
        "accuracy_vs_parallelism": AccuracyVsParallelism(
            points=(
                ParallelismPoint(configuration="baseline", tokens_per_forward=1.0, accuracy=0.95, n=30),
                ParallelismPoint(configuration="ngram-k5", tokens_per_forward=2.4, accuracy=0.93, n=30),
            ),
            area=1.31,
            mean_accuracy=0.94,
        ),
        "client": Client(
            chunks=4200,
            cpu_us_per_chunk=61.0,
            cpu_share=0.08,
            loop_lag_p50_ms=0.2,
            loop_lag_p99_ms=2.1,
            loop_lag_max_ms=6.0,
            bounded=True,
        ),
        "skipped": (Skipped(part="ramp", reason="--quick"),),
        "notes": ("warm-up: 8 requests not counted",),
    }
    return Results(**(fields | changes))
