"""How a run trains, as frozen data: steps, rates, their schedule, and the optimizers made of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from dfastllm.errors import ValidationError

__all__ = ["OptimizerName", "Plan", "Schedule", "ScheduleName", "make_optimizers", "rate", "training"]

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["wsd", "cosine", "linear"]
# Of a plan, what changes no step: names, and how often something is written down.
WRITING = frozenset({"name", "validate_every", "save_every", "log_every", "keep", "milestones", "tensorboard"})
FLOOR = 0.02  # where the cosine ends, as a share of the peak


class Schedule(Protocol):
    """What the learning rate follows from (see `rate`); a Plan and a Recipe both have it."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def decay(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """How a run trains. Raises ValidationError for impossible values.

    name            shown on the progress bar.
    steps           optimizer steps of the whole run; the schedule ends there.
    lr              peak rate of AdamW: embedding, head and norms.
    matrix_lr       peak rate on the matrices of layers: of Muon, or of AdamW there too.
    optimizer       muon or adamw.
    betas           of AdamW.
    weight_decay    decoupled, on everything.
    warmup          steps in which the rate rises linearly to its peak.
    schedule        "wsd" holds the rate and falls linearly to 0 over the last `decay` share of the steps; "cosine"
                    falls to 2 % from the start on, "linear" to 0 from the end of the warm-up on.
    clip            largest norm of the gradient over all parameters.
    accumulate      micro-batches of one optimizer step.
    seed            of the global random generators, for works that draw from them.
    validate_every  steps between validations; the last step is always validated.
    save_every      steps between checkpoints; the last step is always saved.
    log_every       steps between lines of log.jsonl.
    keep            newest checkpoints that are kept.
    milestones      steps whose checkpoints are kept for good.
    tensorboard     also write TensorBoard files.
    """

    name: str
    steps: int
    lr: float = 2e-3
    matrix_lr: float = 2e-3
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 100
    schedule: str = "wsd"
    decay: float = 0.25
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    validate_every: int = 250
    save_every: int = 250
    log_every: int = 25
    keep: int = 2
    milestones: tuple[int, ...] = ()
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "validate_every", "save_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValidationError(f"{name} must be at least 1, got {getattr(self, name)}.", param=name)
        for name in ("lr", "matrix_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValidationError(f"{name} must be above 0 and finite, got {getattr(self, name)}.", param=name)
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValidationError(f"{name} must be at least 0 and finite, got {getattr(self, name)}.", param=name)
        for name, allowed in (("optimizer", get_args(OptimizerName)), ("schedule", get_args(ScheduleName))):
            if getattr(self, name) not in allowed:
                raise ValidationError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.", param=name)
        if not 0 <= self.decay <= 1:
            raise ValidationError(f"decay must be in [0, 1], got {self.decay}.", param="decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValidationError(f"betas must be in [0, 1), got {self.betas}.", param="betas")


def training(plan: Plan) -> dict[str, Any]:
    """Of a plan, what decides how the weights change: two runs that differ in it are two runs."""
    return {name: found for name, found in asdict(plan).items() if name not in WRITING}


def rate(schedule: Schedule, step: int) -> float:
    """Factor on the learning rates at this step (0-based), in (0, 1]."""
    steps, warmup = schedule.steps, schedule.warmup
    warm = min(1.0, (step + 1) / max(warmup, 1))
    if schedule.schedule == "cosine":
        return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    falling = steps - warmup if schedule.schedule == "linear" else steps * schedule.decay
    return warm * min(1.0, (steps - step) / max(falling, 1))


def make_optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW on the embedding, head and norms; on matrices of layers Muon (Jordan et al. 2024), scaled to AdamW's update
    size (Liu et al. 2025, arXiv 2502.16982), or AdamW too. Only parameters that want a gradient are trained. A group
    keeps its highest rate under "peak". Raises ValidationError for a model with nothing to train."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and name.startswith("layers.")]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in chosen]
    if not trained:
        raise ValidationError("the model has no parameter that wants a gradient.", param="model")
    adamw = {"betas": plan.betas, "weight_decay": plan.weight_decay, "fused": True}
    found: list[torch.optim.Optimizer] = []
    if plan.optimizer == "adamw":
        groups = [{"params": rest, "lr": plan.lr}, {"params": matrices, "lr": plan.matrix_lr}]
        kept = [group for group in groups if group["params"]]
        found = [torch.optim.AdamW(kept, **adamw)]  # type: ignore[arg-type]
    else:
        if rest:
            found = [torch.optim.AdamW(rest, lr=plan.lr, **adamw)]  # type: ignore[arg-type]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=plan.matrix_lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            found.append(muon)
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found
