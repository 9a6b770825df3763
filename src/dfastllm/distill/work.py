"""Distillation as a Work of the training loop: its batches, its losses, what a validation measures, and when its
weights are rounded. Does not load, evaluate or export: `distill.run` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from dfastllm.distill.objective import Objective
from dfastllm.distill.qat.run import QatRun
from dfastllm.distill.sampler import Batch, Position, Sampler
from dfastllm.distill.sections import Config
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer
from dfastllm.train.work import Losses, Value, Work

__all__ = ["DistillWork", "Probe"]

VALIDATION_BATCHES = 8

# (student, step, format it is rounded to now or None) -> figures for the log
Probe = Callable[[Decoder, int, str | None], Mapping[str, Value]]


class DistillWork(Work):
    """A student, its data and its teacher.

    teacher     a model in this process; None: what the data's rows know of their teacher.
    validation  held-out samples; None: the real validation loss is not measured.
    probe       measures the student in our engine at each validation; what it raises is logged as
                speed.measure_failed, and training goes on.
    """

    start: Position = (0, 0, 0)

    def __init__(
        self,
        config: Config,
        student: Decoder,
        tokenizer: Tokenizer,
        sampler: Sampler,
        validation: Sampler | None = None,
        *,
        teacher: LocalTeacher | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.config, self.student, self.sampler, self.probe = config, student, sampler, probe
        self._validation = validation
        self.qat = QatRun(student, config.quant, config.train.steps)
        self.objective = Objective(
            config,
            student,
            tokenizer,
            teacher=teacher,
            steps_per_epoch=sampler.per_epoch / config.train.grad_accum,
        )
        projections = self.objective.projections
        self.model: nn.Module = student if projections is None else _Both(student, projections)
        self._checked: Batch = {}  # the batch that a stability check looks at

    def batches(self, position: Any) -> Iterator[tuple[Batch, Position]]:
        return self.sampler.at(position)

    def counts(self, batch: Batch) -> Mapping[str, float]:
        return self.objective.counts(batch) if self.sampler.accumulate > 1 else {}

    def losses(self, batch: Batch, step: int) -> Losses:
        batch = _moved(batch, self.student.device)
        self._checked = batch
        terms, diagnostics = self.objective(batch, step)
        tokens = int(batch["attention_mask"].sum())
        return Losses(terms, diagnostics, tokens=tokens, samples=len(batch["input_ids"]))

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Value]:
        """validation_loss: the losses from the teacher, over held-out samples; validation_ce: nats a token of their
        answers; and what the probe measures."""
        sums, tokens = [0.0, 0.0], 0.0
        for batch in self.held_out:
            loss, ce, count = self.objective.held_out(_moved(batch, self.student.device))
            sums, tokens = [sums[0] + loss * count, sums[1] + ce * count], tokens + count
        line: dict[str, Value] = {}
        if tokens:
            line = {"validation_loss": sums[0] / tokens, "validation_ce": sums[1] / tokens}
        if self.probe is not None:
            try:
                line |= self.probe(self.student, step, self.objective.quantization)
            except Exception as error:  # whatever a measurement raises, the training it measures goes on
                line["speed.measure_failed"] = f"{type(error).__name__}: {error}"
        return line

    @cached_property
    def held_out(self) -> list[Batch]:
        if self._validation is None:
            return []
        enough = min(VALIDATION_BATCHES, self._validation.per_epoch)
        return [batch for batch, _ in islice(self._validation.at((0, 0, 0)), enough)]

    # -- rounding; what these methods mean stands in `Work` and `QatRun`

    def before_step(self, step: int) -> None:
        self.qat.before_step(step)
        rounds = self.qat.qat is not None and self.qat.qat.enabled
        self.objective.quantization = self.config.quant.format if rounds else None

    def rate_factor(self, step: int) -> float:
        return self.qat.rate_factor(step)

    def after_step(self, step: int) -> bool:
        return self.qat.after_step(step, self._checked)

    def broken(self, step: int, names: tuple[str, ...]) -> bool:
        return self.qat.broken(step, names)

    def good(self, state: Mapping[str, Any]) -> bool:
        return self.qat.good(state)

    def milestones(self) -> tuple[int, ...]:
        """The last step in float: where a try that goes wrong goes back to."""
        return (self.qat.recovery.start,) if self.config.quant.enabled else ()

    def events(self) -> list[Mapping[str, Value]]:
        return [dict(event) for event in self.qat.events()]

    def extra_state(self) -> dict[str, Any]:
        return self.qat.extra_state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.qat.load_extra_state(state)


class _Both(nn.Module):
    """A student under its own parameter names, and beside it what is trained and thrown away."""

    def __init__(self, student: Decoder, projections: nn.ModuleDict) -> None:
        super().__init__()
        self.student, self.projections = student, projections

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.student.named_parameters(prefix, recurse, remove_duplicate)
        for name, parameter in self.projections.named_parameters():
            yield f"{prefix}projections.{name}", parameter


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
