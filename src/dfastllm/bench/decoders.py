"""Every unmasking rule x cache on a masked-diffusion model: accuracy, nfe, tokens per forward, tok/s, and their
plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfastllm.bench.workload import run
from dfastllm.core import Cache, DecodeParams, SamplingParams
from dfastllm.errors import UnsupportedError
from dfastllm.llm import LLM
from dfastllm.metrics.workload import gradable

__all__ = ["Point", "decoder_grid", "measure_decoders", "parallelism_sweep", "plot_points"]


@dataclass(frozen=True)
class Point:
    """One configuration's result; tok/s with `samples` requests in flight."""

    rule: str
    cache: str
    setting: str
    samples: int
    accuracy: float
    nfe: float
    tokens: float
    tokens_per_forward: float
    tokens_per_s: float


Config = tuple[str, str, DecodeParams]  # rule, setting, params


def decoder_grid(rules: Sequence[str], caches: Sequence[str], block: int, canvas: int) -> Iterator[Config]:
    """Each rule at its defaults with each cache."""
    for rule in rules:
        for cache in caches:
            params: dict[str, Any] = {"rule": rule, "cache": cache, "block_length": block}
            if rule in ("schedule", "free_dave", "dream"):
                params["steps"] = canvas
            yield rule, "default", DecodeParams(**params)


def parallelism_sweep(cache: Cache, block: int, canvas: int) -> Iterator[Config]:
    """The rules with a dial, from careful to bold: what accuracy costs per token committed in parallel."""
    for share in (1, 2, 4, 8):
        yield (
            "schedule",
            f"steps {canvas // share}",
            DecodeParams(rule="schedule", cache=cache, block_length=block, steps=canvas // share),
        )
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        yield (
            "threshold",
            f"τ {threshold}",
            DecodeParams(rule="threshold", cache=cache, block_length=block, threshold=threshold),
        )
    for factor in (0.25, 0.5, 1.0, 2.0):
        yield (
            "factor",
            f"f {factor}",
            DecodeParams(rule="factor", cache=cache, block_length=block, factor=factor),
        )
    for gamma in (0.01, 0.1, 0.5, 1.0):
        yield (
            "entropy_bound",
            f"γ {gamma}",
            DecodeParams(rule="entropy_bound", cache=cache, block_length=block, options={"gamma": gamma}),
        )


def measure_decoders(llm: LLM, configs: Iterator[Config], samples: int, canvas: int) -> Iterator[Point | str]:
    """A Point per configuration, or the reason why this model refuses it."""
    work = gradable(samples)
    sampling = SamplingParams(temperature=0, max_tokens=canvas)
    for rule, setting, params in configs:
        try:
            outcome, _ = run(llm, work, sampling, params)
        except UnsupportedError as error:
            yield f"{rule} x {params.cache}: {error}"
            continue
        yield Point(
            rule,
            params.cache or "none",
            setting,
            samples,
            outcome.accuracy,
            outcome.forwards / samples,
            outcome.tokens / samples,
            outcome.tokens_per_forward,
            outcome.tokens_per_second,
        )


def plot_points(points: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy against tokens per forward; one line per rule, one marker per cache. Needs matplotlib (extra
    `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    markers = {"none": "o", "prefix": "s", "dual": "^", "windowed": "D", "delayed": "v"}
    figure, axes = plt.subplots(figsize=(9.5, 5.5))
    rules = list(dict.fromkeys(p.rule for p in points))
    colours = {rule: f"C{i}" for i, rule in enumerate(rules)}
    for rule in rules:
        for cache, marker in markers.items():
            group = sorted(
                (p for p in points if (p.rule, p.cache) == (rule, cache)), key=lambda p: p.tokens_per_forward
            )
            if group:
                axes.plot(
                    [p.tokens_per_forward for p in group],
                    [100 * p.accuracy for p in group],
                    marker=marker,
                    color=colours[rule],
                    label=f"{rule}, {cache}",
                    linewidth=1,
                    markersize=6,
                    alpha=0.85,
                )
    axes.set_xlabel("committed tokens per forward (EOS not counted)")
    axes.set_ylabel("exact match on held-out tasks, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def as_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(p) for p in points]
