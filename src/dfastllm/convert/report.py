"""What quantising cost: bytes, error of every weight, loss and accuracy on held-out samples of the task mix."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfastllm.convert.samples import rows_of
from dfastllm.kernels.packed import QTensor
from dfastllm.models.decoder import Decoder
from dfastllm.quant.partial import storing
from dfastllm.train.data import Example
from dfastllm.train.objectives import loss, short_attention

__all__ = [
    "Quality",
    "Report",
    "WeightReport",
    "divergence",
    "log_probabilities",
    "mean_loss",
    "weight_report",
]

REPORT_FILE = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """One tensor. error: |W - Q| / |W| (Frobenius), 0 for one that is kept. rows: calibration rows that reached it."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    error: float
    rows: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Before and after. loss: mean nats per answer token, held-out (autoregressive: exp of it is the perplexity;
    canvas models: the likelihood bound per canvas token). divergence: mean KL of the quantised model's distribution
    from the float model's, nats a token; agreement: share of rows where both like the same token best. accuracy: share
    of right answers per task, through the engine."""

    samples: int
    divergence: float
    agreement: float
    loss_before: float
    loss_after: float
    accuracy_before: dict[str, float]
    accuracy_after: dict[str, float]
    total_before: float
    total_after: float

    @property
    def perplexity_before(self) -> float:
        """exp of the loss; for canvas models an upper bound."""
        return math.exp(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        return math.exp(self.loss_after)


@dataclass(frozen=True)
class Report:
    """source, out: names of the directories. bits_per_weight: of all parameters, scales counted."""

    source: str
    out: str
    format: str
    head: str
    calibration: str
    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    weights: tuple[WeightReport, ...]
    quality: Quality | None = None

    def by_kind(self) -> list[tuple[str, str, int, float, float]]:
        """(kind of matrix, format, how many, mean error, worst error), layers and experts together."""
        kinds: dict[tuple[str, str], list[float]] = {}
        for weight in self.weights:
            if weight.format != "float":
                kind = weight.name.removesuffix(".weight").rpartition(".")[2]
                kinds.setdefault((kind, weight.format), []).append(weight.error)
        return [
            (kind, format, len(errors), sum(errors) / len(errors), max(errors))
            for (kind, format), errors in sorted(kinds.items())
        ]

    def write(self, directory: Path) -> Path:
        path = directory / REPORT_FILE
        text = json.dumps(asdict(self), indent=1) + "\n"
        with storing(path, len(text)):
            path.write_text(text, encoding="utf-8")
        return path


def weight_report(
    name: str, original: Tensor, written: QTensor | Tensor, format: str, nbytes: int, rows: int
) -> WeightReport:
    error = _relative_error(original, written) if isinstance(written, QTensor) else 0.0
    return WeightReport(name, format, tuple(original.shape), nbytes, error, rows)


def _relative_error(original: Tensor, written: QTensor, rows: int = 256) -> float:
    """|W - Q| / |W|, in float64, some rows at a time."""
    wrong = square = 0.0
    for at in range(0, len(original), rows):
        wide = original[at : at + rows].double()
        wrong += float((written.rows(slice(at, at + rows)).dequantise().double() - wide).square().sum())
        square += float(wide.square().sum())
    return math.sqrt(wrong / square) if square else 0.0


@torch.inference_mode()
def mean_loss(model: Decoder, examples: Sequence[Example], *, seed: int = 0) -> float:
    """Nats per answer token (canvas models: the bound per canvas token), the same masks for the same seed."""
    batches = rows_of(model, examples, seed=seed)
    sizes = [rows.batch for rows in batches]
    losses = [float(loss(model, rows)) for rows in batches]
    found = sum(value * size for value, size in zip(losses, sizes, strict=True)) / sum(sizes)
    return found if math.isfinite(found) else math.inf


@torch.inference_mode()
def log_probabilities(
    model: Decoder, examples: Sequence[Example], *, seed: int = 0, most_bytes: int = 1 << 28
) -> list[Tensor]:
    """log p [rows, vocab] float32 of the answer rows of the first batches, as many as `most_bytes` hold (at least one);
    the same rows for the same seed."""
    found: list[Tensor] = []
    size = 0
    for rows in rows_of(model, examples, seed=seed):
        if found and size + 4 * len(rows.wanted) * model.info.vocab_size > most_bytes:
            break
        hidden = model(rows.ids, rows.positions, short_attention(rows))
        found.append(model.head(hidden[rows.wanted]).float().log_softmax(-1))
        size += found[-1].nbytes
    return found


def divergence(reference: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """Mean KL(reference || found) in nats, and the share of rows with the same best token."""
    kl = agreeing = rows = 0.0
    for p, q in zip(reference, found, strict=True):
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        agreeing += float((p.argmax(-1) == q.argmax(-1)).sum())
        rows += len(p)
    return kl / rows, agreeing / rows
