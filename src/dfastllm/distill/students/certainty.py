"""Certainty forcing: a canvas student learns the tokens of a trajectory, and to be sure of those it has right.

Decoders with a threshold commit what the model is sure of. A model trained by cross entropy alone becomes sure from the
shown tokens outward, one neighbourhood a step; dParallel (Chen et al. 2025, arXiv 2509.26488) adds the entropy of every
masked row whose likeliest token is right, at a temperature below 1, so that certainty comes everywhere at once. States
and windows are those of dParallel or of d3LLM (`trajectory`, `settings`), for masked diffusion and block diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfastllm.core import ModelInfo
from dfastllm.distill.losses.fused import CHUNK, Hidden, Student, vocabulary_of
from dfastllm.distill.students.settings import TrajectorySettings
from dfastllm.distill.students.trajectory import UNKNOWN, Trajectory, masked_state, window_size
from dfastllm.errors import UnsupportedError
from dfastllm.train.objectives import Line, Rows, block_rows, block_span, canvas_rows, canvas_size

__all__ = ["Asked", "Forced", "States", "certainty_forcing", "states_of"]

SURE = 0.9  # the published threshold of Fast-dLLM's parallel decoding, and our default


@dataclass(frozen=True)
class Forced:
    """What certainty forcing gives.

    trajectory   float32 scalar with gradient: mean cross entropy, summed over the groups.
    certainty    float32 scalar with gradient: mean entropy of the rows that are right, summed over the groups.
    right        weighted share of rows whose likeliest token is the target.
    sure         weighted share of rows that are right with a probability of at least SURE.
    """

    trajectory: Tensor
    certainty: Tensor
    right: float
    sure: float


def certainty_forcing(
    student: Student,
    targets: Tensor,
    weights: Tensor,
    groups: Tensor,
    *,
    temperature: float = 0.5,
    chunk: int | None = None,
) -> Forced:
    """dParallel's objective: of each group the mean cross entropy of its rows, and the mean entropy at `temperature` of
    those of them whose likeliest token is the target; both summed over the groups, of which a complementary mask makes
    two. Weights of 1 give the published means.

    student: logits [R, V], or hidden rows with their head; targets [R] int64; weights [R] float32; groups [R] int64.
    chunk: rows at a time; nothing of size [R, V] is kept but what came in. A group with no row that is right adds no
    entropy."""
    size = chunk or max(1, CHUNK // vocabulary_of(student))
    rows = student.rows if isinstance(student, Hidden) else student
    head = student.head if isinstance(student, Hidden) else None
    parts = [
        checkpoint(_of_rows, part, wanted, head, temperature, use_reentrant=False)
        for part, wanted in zip(torch.split(rows, size), torch.split(targets, size), strict=True)
    ]
    nll, entropy, right, best = (torch.cat(column) for column in zip(*parts, strict=True))
    trajectory, certainty = nll.sum() * 0, entropy.sum() * 0
    for group in torch.unique(groups).tolist():
        here = weights * (groups == group)
        if not here.any():  # only padding was asked, and it weighs nothing
            continue
        trajectory = trajectory + (here * nll).sum() / here.sum()
        kept = here * right
        if kept.any():
            certainty = certainty + (kept * entropy).sum() / kept.sum()
    total = max(weights.sum().item(), 1e-9)
    hit = weights * right
    return Forced(trajectory, certainty, hit.sum().item() / total, (hit * (best >= SURE)).sum().item() / total)


def _of_rows(
    rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor] | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cross entropy, entropy at the temperature, likeliest is the target, probability of the likeliest), each [n]."""
    logits = rows if head is None else head(rows)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = logits.log_softmax(-1)
    cold = (logits / temperature).log_softmax(-1)
    best, token = logp.detach().max(-1)
    nll = -logp.gather(1, targets[:, None])[:, 0]
    return nll, -(cold.exp() * cold).sum(-1), token == targets, best.exp()


@dataclass(frozen=True)
class Asked:
    """A forward pass, and the group of each wanted row: 0 of the states, 1 of their complements."""

    rows: Rows
    groups: Tensor

    def to(self, device: str) -> Asked:
        return Asked(self.rows.to(device), self.groups.to(device))


@dataclass(frozen=True)
class States:
    """States of trajectories as forward passes.

    Masked diffusion: one window of the canvas is asked about, uniformly one of those that hold answer tokens; before it
    all is shown, behind it all is masked (the published code pads every answer to one length and draws among the
    windows of the padding too). Block diffusion: every block is asked about at once, each with a state of its own, and
    sees the blocks before it clean.

    block: of the model, 0 for masked diffusion.
    """

    mask: int
    eos: int
    pad: int
    block: int
    settings: TrajectorySettings

    def size(self, one: Trajectory, turn: int) -> int:
        """Canvas positions of a trajectory at this turn."""
        if self.block:
            return block_span(len(one.prompt), len(one.answer), self.block)[2] - len(one.prompt)
        return canvas_size(len(one.answer), self.settings.canvases[turn % len(self.settings.canvases)])

    def cost(self, one: Trajectory, turn: int) -> int:
        """Rows of one state of it."""
        size = self.size(one, turn)
        if not self.block:
            return len(one.prompt) + size
        clean, first, stop = block_span(len(one.prompt), size, self.block)
        return clean + stop - first

    def ask(self, ones: Sequence[Trajectory], turns: Sequence[int], progress: float, draw: torch.Generator) -> Asked:
        """The forward pass of these trajectories when `progress` of the run is done: a line for the state of each, then
        one for its complement; a line that would ask nothing is left out (if all would, one stays)."""
        states, complements = [], []
        for one, turn in zip(ones, turns, strict=True):
            size = self.size(one, turn)
            masked, asked, behind = self._state(one, size, progress, draw)
            weights = torch.ones(size)
            weights[len(one.answer) :] = self.settings.tail
            clean = torch.tensor([*one.answer, *[self.eos] * (size - len(one.answer))])
            states.append(Line(one.prompt, clean, masked | behind, masked, weights))
            if self.settings.complement:
                other = asked & ~masked
                complements.append(Line(one.prompt, clean, other | behind, other, weights))
        kept = [[line for line in lines if line.asked.any()] for lines in (states, complements)]
        counts = [sum(int(line.asked.sum()) for line in lines) for lines in kept]
        groups = torch.arange(2).repeat_interleave(torch.tensor(counts))
        return Asked(self._rows([*kept[0], *kept[1]] or states[:1]), groups)

    def _rows(self, lines: Sequence[Line]) -> Rows:
        if self.block:
            return block_rows(lines, self.block, self.mask, self.pad)
        return canvas_rows(lines, self.mask, self.pad)

    def _state(
        self, one: Trajectory, size: int, progress: float, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(masked, inside of what is asked about, masked because it lies behind that), each bool [size]."""
        masked, asked, behind = (torch.zeros(size, dtype=torch.bool) for _ in range(3))
        steps = one.steps[:size] or (0,) * len(one.answer)
        steps = (*steps, *[UNKNOWN] * (size - len(steps)))
        for begin, end in self._windows(one, size, progress, draw):
            masked[begin:end] = masked_state(steps[begin:end], self._share(progress, draw), self.settings.order, draw)
            asked[begin:end] = True
            behind[end:] = not self.block
        return masked, asked, behind

    def _share(self, progress: float, draw: torch.Generator) -> float:
        """The share of a window that is masked."""
        begin, end, high = self.settings.masked
        whole, spot = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        low = begin + progress * (end - begin)
        return 1.0 if whole < self.settings.whole else low + spot * (high - low)

    def _windows(self, one: Trajectory, size: int, progress: float, draw: torch.Generator) -> Sequence[tuple[int, int]]:
        """[begin, end) of what is asked about."""
        if self.block:
            lead = len(one.prompt) % self.block  # prompt tokens of the first block
            return [(max(0, at), at + self.block) for at in range(-lead, size, self.block)]
        window = window_size(self.settings.windows or (32,), progress)
        count = -(-len(one.answer) // window)
        begin = int(torch.randint(count, (), generator=draw)) * window
        return [(begin, min(begin + window, size))]


def states_of(info: ModelInfo, settings: TrajectorySettings) -> States:
    """The states for a model. Raises UnsupportedError for one that is no canvas model, or whose row predicts the next
    position, which the objectives here do not train."""
    if info.kind == "ar" or info.mask_id is None:
        raise UnsupportedError(
            f"{info.name} is autoregressive; kd.trajectory trains canvas models.",
            param="model.student",
            hint="Choose a masked-diffusion or block-diffusion student, or leave kd.trajectory out.",
        )
    if info.shift or info.ar_first:
        raise UnsupportedError(
            f"{info.name} predicts a position from the row before it; kd.trajectory trains models whose row predicts "
            "its own position.",
            param="model.student",
        )
    if info.block and settings.windows not in ((), (info.block,)):
        raise UnsupportedError(
            f"the window of {info.name} is its block, {info.block}; windows {list(settings.windows)} do not apply.",
            param="kd.trajectory.windows",
            hint="Leave the key out.",
        )
    eos = info.eos_ids[0]
    return States(info.mask_id, eos, eos if info.pad_id is None else info.pad_id, info.block, settings)
