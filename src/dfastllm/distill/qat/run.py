"""Quantisation-aware training as a training loop drives it: the methods have the names and meanings of
`dfastllm.train.work.Work`, which passes them on.

Where it is not enabled, nothing is changed in the model and every method answers as a Work without it would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfastllm.distill.qat.model import Qat, prepare_qat
from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.distill.qat.stability import Forward, Recovery, check_qat_stability
from dfastllm.errors import CheckpointError
from dfastllm.models.decoder import Decoder

__all__ = ["QatRun"]

Event = Mapping[str, float | int | str | bool]


class QatRun:
    """Rounding of a model over one run of `total_steps`.

    forward: how the stability check runs the model on a batch (see `check_qat_stability`). Raises as `prepare_qat`.
    """

    def __init__(self, model: Decoder, config: QatConfig, total_steps: int, *, forward: Forward | None = None) -> None:
        self.model, self.config, self.forward = model, config, forward
        self.qat: Qat | None = prepare_qat(model, config) if config.enabled else None
        self.recovery = Recovery(config, total_steps)
        self._events: list[Event] = []

    @property
    def status(self) -> str:
        """off, or the status of the recovery."""
        return self.recovery.status if self.config.enabled else "off"

    def before_step(self, step: int) -> None:
        if self.qat is None:
            return
        wanted = self.recovery.begin(step)
        if wanted == self.qat.enabled:
            return
        if wanted:
            self.qat.enable()
        else:
            self.qat.disable()
        self._events.append({"event": "qat.on" if wanted else "qat.off", "status": self.status})

    def rate_factor(self, step: int) -> float:
        return self.recovery.rate_factor(step)

    def after_step(self, done: int, batch: Mapping[str, Any]) -> bool:
        """batch: what the stability check runs on. True: the loop shall go back to the newest good checkpoint."""
        if self.qat is None or not self.recovery.due(done):
            return False
        report = check_qat_stability(self.model, batch, forward=self.forward)
        self._events.append({"event": "qat.check", **report})
        return self._act(done, report)

    def broken(self, step: int, names: tuple[str, ...]) -> bool:
        """Losses or gradients of this step (0-based) are not finite. False: it was not for the rounding."""
        if self.qat is None or not self.qat.enabled:
            return False
        error = f"not finite at step {step}: {', '.join(names)}"
        return self._act(step, {"has_nan": 1.0, "cosine_sim": 0.0, "error": error})

    def _act(self, done: int, report: Mapping[str, float | str]) -> bool:
        assert self.qat is not None
        if self.recovery.observe(done, report) == "go_on":
            return False
        self.qat.disable()
        recovery = self.recovery
        self._events.append(
            {
                "event": "qat.failed",
                "status": recovery.status,
                "failed": recovery.failed,
                "next_start": recovery.start if recovery.status == "postponed" else -1,
                "reason": recovery.reason,
            }
        )
        return True

    def good(self, state: Mapping[str, Any]) -> bool:
        """state: what `extra_state` gave for a checkpoint."""
        return self.qat is None or Recovery.good(state.get("recovery", {}))

    def milestones(self) -> tuple[int, ...]:
        """The last float weights before the first try: what a try that ends badly goes back to."""
        start = int(self.recovery.total_steps * self.config.start_fraction)
        return (start,) if self.qat is not None and start > 0 else ()

    def events(self) -> list[Event]:
        """Since the last call: qat.on and qat.off with the status, qat.check with the report, qat.failed with the
        reason. The log says of which step."""
        found, self._events = self._events, []
        return found

    def extra_state(self) -> dict[str, Any]:
        """JSON; empty without QAT."""
        return {} if self.qat is None else {"qat": self.qat.state(), "recovery": self.recovery.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the checkpoint was made with QAT and this run is without, or the other way
        round, and as `Qat.load_state` and `Recovery.load_state` do."""
        if state.keys() != self.extra_state().keys():
            now = "without" if self.qat is None else "with"
            raise CheckpointError(
                f"this run is {now} quantisation-aware training, its checkpoint is not.",
                hint="Resume with the same quant section, or start this run afresh.",
            )
        if self.qat is not None:
            self.qat.load_state(state["qat"])
            self.recovery.load_state(state["recovery"])
