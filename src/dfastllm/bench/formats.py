"""Every format and calibration on the task mix, simulated in torch: what each costs in loss and accuracy.

Answers, among others, whether one int8 scale per row of activations is accurate enough on trained weights (w8) or every
32 activations need their own (w8g).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfastllm.convert.quantise import Calibration, Options, quantised
from dfastllm.convert.report import mean_loss
from dfastllm.convert.samples import task_examples
from dfastllm.convert.simulate import ACTIVATIONS, Activations, simulate
from dfastllm.convert.source import Source
from dfastllm.engine import Engine
from dfastllm.kernels.packed import QTensor
from dfastllm.llm import LLM
from dfastllm.models.checkpoint import load
from dfastllm.quant.formats import FORMATS
from dfastllm.text import Tokenizer
from dfastllm.train.evaluate import evaluate

__all__ = ["CASES", "Case", "Outcome", "as_record", "as_row", "compare_format"]


@dataclass(frozen=True, slots=True)
class Case:
    """format "float": the weights as they are. activations None: as the kernels of the format round them."""

    format: str
    calibration: Calibration = "none"
    activations: Activations | None = None
    head: str = ""
    search: bool = True
    act_order: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line. loss: see `report.mean_loss`; total: share of right answers, None where it was not asked for."""

    model: str
    case: Case
    activations: str
    head: str
    bits_per_weight: float
    loss: float
    accuracy: dict[str, float] | None
    total: float | None
    seconds: float


CASES = (
    Case("float"),
    Case("float", activations="row"),
    Case("float", activations="group"),
    Case("w8"),
    Case("w8", activations="none"),
    Case("w8", activations="group"),
    Case("w8", "aware"),
    Case("w8g"),
    Case("w8g", activations="row"),
    Case("w6"),
    Case("w4m", search=False),
    Case("w4m"),
    Case("w4m", "aware"),
    Case("w4m", "gptq", act_order=False),
    Case("w4m", "gptq"),
    Case("w4", search=False),
    Case("w4"),
    Case("w4", activations="row"),
    Case("w4", head="w4"),
    Case("w4", "aware"),
    Case("w4", "aware", head="w4"),
    Case("w4", "gptq", act_order=False),
    Case("w4", "gptq"),
)


def compare_format(model: str | Path, case: Case, *, per_task: int = 100, losses: int = 600, seed: int = 1) -> Outcome:
    """per_task samples of every task for the accuracy (0: leave it out), `losses` of the mix for the loss, all from the
    test split."""
    begun = time.monotonic()
    source = Source(model)
    tokenizer = Tokenizer.load(source.directory)
    decoder = load(source.directory, dtype=torch.float32)
    if case.format == "float":
        head, nbytes = "float", source.nbytes
        how = case.activations or "none"
        weights = [(name, QTensor("f32", source.tensor(name).float())) for name in source.matrices]
    else:
        options = Options(
            case.format, head=case.head, calibration=case.calibration, search=case.search, act_order=case.act_order
        )
        head, nbytes = options.head_format, 0
        how = case.activations or ACTIVATIONS[FORMATS[case.format].kind]
        weights = []
        for name, weight, report in quantised(source, options):
            nbytes += report.nbytes
            if isinstance(weight, QTensor):
                weights.append((name, weight))
    rounded = simulate(decoder, weights, activations=case.activations)
    value = mean_loss(rounded, task_examples(tokenizer, "test", losses, seed))
    result = None
    if per_task:
        with LLM(engine=Engine(rounded, tokenizer)) as llm:
            result = evaluate(llm, per_task=per_task, seed=seed)
    return Outcome(
        model=source.info.name,
        case=case,
        activations=how,
        head=head,
        bits_per_weight=8 * nbytes / source.parameters,
        loss=value,
        accuracy=None if result is None else result.accuracy,
        total=None if result is None else result.total,
        seconds=round(time.monotonic() - begun, 1),
    )


def as_row(found: Outcome) -> dict[str, Any]:
    """One line of the table."""
    case = found.case
    how: str = case.calibration if case.search else "to nearest"
    how += ", in order" if case.calibration == "gptq" and not case.act_order else ""
    return {
        "model": found.model,
        "format": case.format,
        "head": found.head,
        "calibration": how,
        "activations": found.activations,
        "bits per weight": found.bits_per_weight,
        "loss": found.loss,
        "right": "" if found.total is None else found.total,
    }


def as_record(found: Outcome) -> dict[str, Any]:
    """The line with its details, for the record."""
    return {**as_row(found), "accuracy": found.accuracy, "seconds": found.seconds, "case": asdict(found.case)}
