"""Every format and calibration on the task mix, simulated in torch: what each costs in loss and accuracy.

Answers, among others, whether one int8 scale per row of activations is accurate enough on trained weights (w8) or every
32 activations need their own (w8g).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfastllm.convert.quantise import Calibration, Options, quantised
from dfastllm.convert.report import divergence, log_probabilities, mean_loss
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

__all__ = ["CASES", "Case", "Outcome", "as_record", "as_row", "as_served", "compare_format"]


@dataclass(frozen=True, slots=True)
class Case:
    """format "float": the weights as they are. activations None: as the kernels of the format round them. answers:
    accuracy is measured too, which takes most of the time."""

    format: str
    calibration: Calibration = "none"
    activations: Activations | None = None
    head: str = ""
    search: bool = True
    act_order: bool = True
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line. loss, divergence and agreement: see `convert.report`; total: share of right answers, None where it was
    not asked for."""

    model: str
    case: Case
    activations: str
    head: str
    bits_per_weight: float
    loss: float
    divergence: float
    agreement: float
    accuracy: dict[str, float] | None
    total: float | None
    seconds: float


CASES = (
    Case("float", answers=True),
    Case("float", activations="row"),
    Case("float", activations="group"),
    Case("w8", answers=True),
    Case("w8", activations="none"),
    Case("w8", activations="group"),
    Case("w8", "aware"),
    Case("w8g", answers=True),
    Case("w8g", activations="none"),
    Case("w8g", activations="row"),
    Case("w6"),
    Case("w6", activations="none"),
    Case("w4m", search=False),
    Case("w4m", answers=True),
    Case("w4m", "aware"),
    Case("w4m", "gptq", act_order=False),
    Case("w4m", "gptq"),
    Case("w4", search=False),
    Case("w4", answers=True),
    Case("w4", activations="none"),
    Case("w4", activations="row"),
    Case("w4", head="float"),
    Case("w4", head="w4"),
    Case("w4", "aware"),
    Case("w4", "gptq", act_order=False, answers=True),
    Case("w4", "gptq"),
    Case("w4", "gptq", act_order=False, head="w4"),
)


def compare_format(model: str | Path, case: Case, *, per_task: int = 100, losses: int = 600, seed: int = 1) -> Outcome:
    """per_task samples of every task for the accuracy (0: leave it out), `losses` of the mix for the loss, all from the
    test split."""
    begun = time.monotonic()
    source = Source(model)
    tokenizer = Tokenizer.load(source.directory)
    examples = task_examples(tokenizer, "test", losses, seed)
    decoder = load(source.directory, dtype=torch.float32)
    reference = log_probabilities(decoder, examples)
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
    distance, agreement = divergence(reference, log_probabilities(rounded, examples))
    result = None
    if per_task and case.answers:
        with LLM(engine=Engine(rounded, tokenizer)) as llm:
            result = evaluate(llm, per_task=per_task, seed=seed)
    return Outcome(
        model=source.info.name,
        case=case,
        activations=how,
        head=head,
        bits_per_weight=8 * nbytes / source.parameters,
        loss=mean_loss(rounded, examples),
        divergence=distance,
        agreement=agreement,
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
        "KL": found.divergence,
        "same best": found.agreement,
        "right": "" if found.total is None else found.total,
    }


def as_served(row: Mapping[str, Any]) -> str:
    """The format of a line of `as_row` where it is the one that is served as the kernels compute it; "": it is not."""
    form = row["format"]
    plain = form in FORMATS and row["calibration"] == "none" and row["activations"] == ACTIVATIONS[FORMATS[form].kind]
    return form if plain and row["head"] == (FORMATS[form].head or form) else ""


def as_record(found: Outcome) -> dict[str, Any]:
    """The line with its details, for the record."""
    return {**as_row(found), "accuracy": found.accuracy, "seconds": found.seconds, "case": asdict(found.case)}
