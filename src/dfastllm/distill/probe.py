"""A look at a model in training, through the engine that will serve it: accuracy, answers' lengths and speed.

The model serves as it stands in memory: its weights are packed anew on a CPU (or quantised and packed, as they will be
served), or run by the plain torch runner elsewhere. Nothing is written but by `end_gates`, which ends a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfastllm import assemble
from dfastllm.core import DecodeParams
from dfastllm.distill.evaluate import evaluate_student
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.extension import native
from dfastllm.llm import LLM
from dfastllm.metrics.gates import TTFA_LIMIT, SpeedReport, check, load_report, save_report, strict_json
from dfastllm.metrics.model_speed import speed_report
from dfastllm.models import Decoder, PackedDecoder
from dfastllm.quant import find_format
from dfastllm.tasks import Sample
from dfastllm.text import Tokenizer

__all__ = ["end_gates", "in_engine", "probe", "speed_figures"]

GATES, SPEED = "gates.json", "speed.json"


@contextmanager
def in_engine(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    quantization: str | None = None,
    config: EngineConfig | None = None,
) -> Iterator[LLM]:
    """A model in memory behind an engine of its own; its training mode is given back at the end. quantization: serve it
    quantised so (w8, w8g, w4, ...), which needs a CPU. config: None: K,V for 16,384 positions. Raises ValidationError
    for an unknown format, UnsupportedError for what the kernels lack then."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        served = _served(model, device.type, quantization)
        engine = Engine(served, tokenizer, config or EngineConfig(kv_tokens=16384), device=device)
        with LLM(engine=engine) as llm:
            yield llm
    finally:
        model.train(training)


def _served(model: Decoder, device: str, quantization: str | None) -> Decoder | PackedDecoder:
    if quantization is not None:
        find_format(quantization, "quantization")
    if device != "cpu":
        if quantization is not None:
            raise UnsupportedError(
                f"quantised weights are served on a CPU, the model is on {device}.", param="quantization"
            )
        return model
    try:
        return assemble.pack(model, quantization) if quantization is not None or native() is not None else model
    except UnsupportedError:  # ops that the kernels lack
        if quantization is not None:
            raise
        return model


def probe(
    model: Decoder,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    *,
    ids: Sequence[str] | None = None,
    max_tokens: int = 64,
    speed_requests: int = 8,
    decode: DecodeParams | None = None,
    quantization: str | None = None,
) -> dict[str, float]:
    """Figures of a model in training for its log: "task.NAME" of `Evaluation.summary` on the samples (none: left out),
    and "speed.NAME.PERCENTILE" of `speed_requests` requests one after the other (0: left out). What no sample asks for
    is left out; a tool call that never came is infinite. Raises what packing and serving raise: the caller decides
    whether training goes on."""
    found: dict[str, float] = {}
    with in_engine(model, tokenizer, quantization=quantization) as llm:
        if samples:
            summary = evaluate_student(llm, samples, max_tokens=max_tokens, decode=decode, ids=ids).summary()
            found |= {f"task.{name}": value for name, value in summary.items() if value is not None}
        if speed_requests:
            report = speed_report(llm, speed_requests, max_tokens=max_tokens, decode=decode)
            found |= speed_figures(report)
    return found


def speed_figures(report: SpeedReport) -> dict[str, float]:
    """A report's numbers under flat names, "speed.ttft_ms.p50" and the like."""
    found = {}
    for name, value in report.speed_metrics.items():
        for key, number in value.items() if isinstance(value, Mapping) else (("", value),):
            if isinstance(number, int | float):
                found[f"speed.{name}.{key}".rstrip(".")] = float(number)
    return found


def end_gates(
    home: Path,
    current: SpeedReport,
    baseline: SpeedReport | Path | None,
    *,
    regression_threshold: float = 0.05,
    ttfa_limit: float = TTFA_LIMIT,
) -> dict[str, Any]:
    """The gates at the end of a run: `home`/speed.json keeps the student's report, `home`/gates.json the verdict of
    `metrics.gates.check` against a baseline of the same hardware, which may be of another model. Without a baseline,
    with a file that is not there, or with one of another machine they are skipped, and the reason is in the verdict.
    Raises ValidationError for a baseline that is none, or of another workload."""
    save_report(current, home / SPEED)
    if isinstance(baseline, Path):
        baseline = load_report(baseline) if baseline.exists() else None
    found = check(current, baseline, regression_threshold=regression_threshold, ttfa_limit=ttfa_limit, other_model=True)
    part = home / f"{GATES}.part"
    part.write_text(json.dumps(strict_json(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(home / GATES)
    return found
