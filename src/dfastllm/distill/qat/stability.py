"""Is training on rounded numbers still sound: a check of the model, and what follows from its findings.

`check_qat_stability` compares a model with itself, rounding switched off; `Recovery` decides from such reports when to
switch off, go back, and try again. Neither loads, saves nor steps: that is the training loop's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.distill.qat.linear import QatEmbedding, QatHead, QatLinear, Switch
from dfastllm.distill.qat.schedule import QatConfig
from dfastllm.errors import CheckpointError
from dfastllm.models.decoder import Decoder
from dfastllm.models.parts import dense_attention

__all__ = ["Decision", "Forward", "Recovery", "Status", "check_qat_stability"]

Forward = Callable[[nn.Module, Mapping[str, Any]], Tensor]  # (model, batch) -> logits [..., vocabulary]
Decision = Literal["go_on", "go_back", "give_up"]
Status = Literal["waiting", "active", "postponed", "qat_failed"]
STATUSES: tuple[Status, ...] = ("waiting", "active", "postponed", "qat_failed")
MOST_ROWS = 256  # rows whose logits are compared


@torch.no_grad()
def check_qat_stability(
    model: nn.Module, batch: Mapping[str, Any], *, forward: Forward | None = None
) -> dict[str, float | str]:
    """Compare a model's logits with those of the same weights unrounded, in evaluation mode.

    model: a Decoder that `prepare_qat` made ready (its switch is on for one pass, off for the other, and then what it
    was), or any module that takes input_ids and attention_mask and gives logits; without rounding modules it is alike
    itself. batch: input_ids [B, T] int64, padded on the right; attention_mask and labels [B, T] choose the rows, where
    they are there. forward: how to run another kind of model.

    Returns has_nan (1.0 where a logit is NaN or infinite, else 0.0) and cosine_sim (mean over the rows of the cosine
    between both; 0.0 where has_nan). Every module's training mode is as before. Never raises for what the model does: a
    forward pass that fails gives has_nan 1.0, cosine_sim 0.0 and its message under "error".
    """
    run = forward or _logits
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _switched(model, True) as rounds:
            found = run(model, batch)
        reference = found
        if rounds:
            with _switched(model, False):
                reference = run(model, batch)
        finite = bool(found.isfinite().all()) and bool(reference.isfinite().all())
        if not finite:
            return {"has_nan": 1.0, "cosine_sim": 0.0}
        size = found.shape[-1]
        alike = F.cosine_similarity(found.reshape(-1, size).float(), reference.reshape(-1, size).float(), dim=-1)
        return {"has_nan": 0.0, "cosine_sim": float(alike.double().mean())}
    except Exception as error:  # whatever a model raises is a finding here: the run must go on and recover
        return {"has_nan": 1.0, "cosine_sim": 0.0, "error": f"{type(error).__name__}: {error}"}
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _switched(model: nn.Module, on: bool) -> Iterator[bool]:
    """All rounding of the model on or off within; whether it has any."""
    switches: dict[int, Switch] = {
        id(module.switch): module.switch
        for module in model.modules()
        if isinstance(module, QatLinear | QatEmbedding | QatHead)
    }
    before = {key: switch.on for key, switch in switches.items()}
    for switch in switches.values():
        switch.on = on
    try:
        yield bool(switches)
    finally:
        for key, switch in switches.items():
            switch.on = before[key]


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """[rows, vocabulary] of a Decoder, at most MOST_ROWS of them; of another module [B, T, vocabulary]."""
    if not isinstance(model, Decoder):
        out = model(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})
        logits = getattr(out, "logits", out)
        assert isinstance(logits, Tensor)
        return logits
    ids = batch["input_ids"].to(model.device)
    count, length = ids.shape
    positions = torch.arange(length, device=model.device).repeat(count)
    hidden = model(ids.flatten(), positions, dense_attention(count, length, "causal"))
    return model.head(hidden[_rows(batch, ids)])


def _rows(batch: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Which of the flat rows are compared: those of the response, else all real ones, evenly thinned."""
    chosen = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        chosen = batch["attention_mask"].to(ids.device) != 0
    if "labels" in batch and bool((batch["labels"] != -100).any()):
        chosen = batch["labels"].to(ids.device) != -100
    rows = chosen.flatten().nonzero()[:, 0]
    return rows[:: max(1, math.ceil(len(rows) / MOST_ROWS))]


@dataclass
class Recovery:
    """When weights are rounded, and what happens when that goes wrong. One per run; JSON in its checkpoints.

    A try begins at `start`. It ends badly by a report with has_nan, or by `config.strikes` reports in a row whose
    cosine_sim is below `config.min_cosine`. Rounding is then off, the run goes back to its last good checkpoint, the
    learning rate of the next try is half as large, and the next try begins half-way through what is left. After
    `config.tries` bad ends, or where no step is left, the run finishes in float with the status qat_failed.

    status  waiting: before the first try. active: rounding. postponed: between tries. qat_failed: no more.
    start   the step (0-based) at which the present or next try begins.
    failed  tries that ended badly.
    bad     reports in a row below `min_cosine`.
    reason  what ended the last try, in words; "" if none did.
    """

    config: QatConfig
    total_steps: int
    status: Status = "waiting"
    start: int = -1
    failed: int = 0
    bad: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if self.start < 0:
            self.start = int(self.total_steps * self.config.start_fraction)

    def wants(self, step: int) -> bool:
        """Whether this step (0-based) is trained on rounded weights."""
        return self.config.enabled and self.status != "qat_failed" and step >= self.start

    def begin(self, step: int) -> bool:
        """`wants`, and takes note of it: call before each step."""
        wanted = self.wants(step)
        if wanted:
            self.status = "active"
        elif self.status == "active":  # the run went back to before this try
            self.status = "postponed" if self.failed else "waiting"
        return wanted

    def rate_factor(self, step: int) -> float:
        """On the learning rate of this step: 1 in float, else lr_multiplier halved for each try that failed."""
        return self.config.lr_multiplier * 0.5**self.failed if self.wants(step) else 1.0

    def due(self, done: int) -> bool:
        """Whether to check when `done` steps are done: after the first of a try, every `check_every`, after the last of
        the run."""
        rounded = done - self.start
        if self.status != "active" or rounded < 1:
            return False
        return rounded == 1 or rounded % self.config.check_every == 0 or done == self.total_steps

    def observe(self, done: int, report: Mapping[str, float | str]) -> Decision:
        """What to do after this report of `check_qat_stability`, `done` steps being done. go_back and give_up: switch
        off and go back to the last good checkpoint."""
        if report["has_nan"]:
            return self._fail(done, str(report.get("error") or "logits that are not finite"))
        cosine = float(report["cosine_sim"])
        self.bad = self.bad + 1 if cosine < self.config.min_cosine else 0
        if self.bad < self.config.strikes:
            return "go_on"
        return self._fail(done, f"cosine {cosine:.4f} below {self.config.min_cosine}, {self.bad} times in a row")

    def _fail(self, done: int, reason: str) -> Decision:
        self.failed, self.bad, self.reason = self.failed + 1, 0, reason
        self.start = done + max(1, (self.total_steps - done) // 2)
        if self.failed >= self.config.tries or self.start >= self.total_steps:
            self.status = "qat_failed"
            return "give_up"
        self.status = "postponed"
        return "go_back"

    def state(self) -> dict[str, Any]:
        """JSON."""
        names = ("status", "start", "failed", "bad", "reason")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for what `state` does not write."""
        mine = self.state()
        fits = state.keys() == mine.keys() and all(type(state[name]) is type(mine[name]) for name in mine)
        if not fits or state["status"] not in STATUSES or min(state["start"], state["failed"], state["bad"]) < 0:
            raise CheckpointError(f"the checkpoint's record of stability checks is unreadable: {state!r:.99}.")
        for name in mine:
            setattr(self, name, state[name])

    @staticmethod
    def good(state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `state` is one to go back to: no strike was counted when it was written."""
        return not state.get("bad")
