"""Every format and calibration on the task mix, simulated in torch: what each costs in loss and accuracy.

`python -m dfastllm.convert.compare demo-ar demo-diffusion [--per-task 100] [--json FILE]`

Answers, among others, whether one int8 scale per row of activations is accurate enough on trained weights (w8) or every
32 activations need their own (w8g). Nothing is written but the record.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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

__all__ = ["CASES", "Case", "Outcome", "compare"]


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


def compare(model: str | Path, case: Case, *, per_task: int = 100, losses: int = 600, seed: int = 1) -> Outcome:
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfastllm.convert.compare", description="Formats, simulated.")
    parser.add_argument("models", nargs="+", help="shipped models' names or directories")
    parser.add_argument("--per-task", type=int, default=100, help="samples of every task for the accuracy; 0: none")
    parser.add_argument("--losses", type=int, default=600, help="samples of the mix for the loss")
    parser.add_argument("--json", type=Path, help="also write the outcomes here, after every line")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    print(f"{'model':16} {'format':6} {'head':6} {'calibration':16} {'acts':6} {'bits':>6} {'loss':>9} {'right':>7}")
    for model in args.models:
        for case in CASES:
            outcomes.append(compare(model, case, per_task=args.per_task, losses=args.losses))
            print(_line(outcomes[-1]), flush=True)
            if args.json:
                text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
                args.json.write_text(text + "\n", encoding="utf-8")


def _line(found: Outcome) -> str:
    case = found.case
    how = "to nearest" if not case.search else case.calibration
    how += ", in order" if case.calibration == "gptq" and not case.act_order else ""
    right = "" if found.total is None else f"{found.total:7.2%}"
    return (
        f"{found.model:16} {case.format:6} {found.head:6} {how:16} {found.activations:6} "
        f"{found.bits_per_weight:6.2f} {found.loss:9.5f} {right}"
    )


if __name__ == "__main__":
    main()
