"""What is trained, as the loop sees it: batches, losses, validation. The loop (`train.loop`) knows nothing else of it.

A recipe is a Work (`train.run`), distillation is another (`distill.work`). A class that names `Work` as its parent
gets every method but `batches` and `losses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Losses", "Value", "Work"]

Value = float | int | str | bool


@dataclass(frozen=True)
class Losses:
    """What one micro-batch gives.

    terms        weighted float32 scalars; their sum is what is trained on. A term that is not finite stops the run by
                 its name.
    diagnostics  plain numbers for the log: the mean over the steps since the last line is written.
    tokens       tokens of the micro-batch, for the log's counter.
    samples      samples of the micro-batch, for the log's counter.
    """

    terms: Mapping[str, Tensor]
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    samples: int = 0


class Work(Protocol):
    """Something the loop can train.

    model  its parameters that want a gradient are trained and kept in checkpoints by their names.
    start  the position in the data where a fresh run begins (JSON).
    """

    model: nn.Module
    start: Any

    def batches(self, position: Any) -> Iterator[tuple[Any, Any]]:
        """Endless (micro-batch, position after it) from `position` on: a pure function of the position, which is what
        a checkpoint keeps (JSON)."""
        ...

    def losses(self, batch: Any, step: int) -> Losses:
        """The losses of one micro-batch at this step (0-based), with gradient. Autocast is the work's own business.
        May raise TrainingError with the `names` of losses that are not finite, in place of returning them."""
        ...

    def counts(self, batch: Any) -> Mapping[str, float]:
        """Of how many things each term is the mean in this micro-batch. With accumulation, a term's share of the step
        is its count over the count of all micro-batches, so that the step is the mean over the whole window. A term
        that is not named counts 1 in each."""
        return {}

    def validate(self, step: int) -> Mapping[str, Value]:
        """Figures for the log after `step` steps; "validation_loss" goes to the progress bar too. Words go into
        log.jsonl as they are."""
        return {}

    def before_step(self, step: int) -> None:
        """Called before step `step` (0-based) reads its batches: the place to switch something on."""
        return

    def rate_factor(self, step: int) -> float:
        """A factor on the learning rates of this step, beside the schedule's."""
        return 1.0

    def after_step(self, step: int) -> bool:
        """Called when `step` steps are done. True: this went wrong and the work has changed itself, so the loop shall
        go back to the newest good checkpoint."""
        return False

    def broken(self, step: int, names: tuple[str, ...]) -> bool:
        """These losses or gradients of step `step` (0-based) are not finite; the weights are still those before it.
        True: the work has changed itself, and the loop shall go back to the newest good checkpoint. False: the run
        stops with an error."""
        return False

    def good(self, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this extra state is one to go back to."""
        return True

    def milestones(self) -> tuple[int, ...]:
        """Steps whose checkpoints are wanted, beside the plan's."""
        return ()

    def events(self) -> list[Mapping[str, Value]]:
        """What happened since this was last asked, one line of log.jsonl each ({"event": name, ...})."""
        return []

    def extra_state(self) -> dict[str, Any]:
        """JSON that a checkpoint keeps beside weights, optimizer and position."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse; called once, when a run resumes (not when the loop goes back)."""
        return
