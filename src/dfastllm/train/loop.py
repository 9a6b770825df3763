"""The training loop: one for every work (recipes, distillation, drafts). It knows steps, rates, gradients, checkpoints
and the log; what a batch is and what its loss means is the work's business (`train.work`).

Resumes exactly: a resumed run equals the uninterrupted one bit for bit on the same machine, thread count and library
versions.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import TrainingError, ValidationError
from dfastllm.train.checkpoint import (
    drop_after,
    latest,
    newest_good,
    prune,
    read_checkpoint,
    sweep,
    write_checkpoint,
)
from dfastllm.train.log import RunLog, Show, progress
from dfastllm.train.plan import Plan, make_optimizers, rate
from dfastllm.train.work import Losses, Value, Work

__all__ = ["Loop", "fit", "refuse_earlier"]


def fit(work: Work, plan: Plan, home: Path, *, resume: bool = True, stop: int | None = None) -> Path:
    """Train `work` as `plan` says and return the directory of the last checkpoint.

    home: where checkpoints and log.jsonl go. resume: go on from the newest checkpoint there; else a home with an
    earlier run is refused. stop: end at this step; the schedule stays the plan's. The global random generators are
    seeded, kept in checkpoints and given back at the end. Raises ValidationError, CheckpointError (one that does not
    fit), TrainingError (a loss or gradient that is not finite)."""
    if not resume:
        refuse_earlier(home)
    home.mkdir(parents=True, exist_ok=True)
    sweep(home)
    device = next(work.model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        loop = Loop(work, plan, home)
        if done := loop.state["step"]:
            print(f"{plan.name}: goes on at step {done} of {plan.steps}, in {home}", file=sys.stderr, flush=True)
        loop.go(plan.steps if stop is None else min(stop, plan.steps))
    done = latest(home)
    assert done is not None  # go() saves at its end
    return done


def refuse_earlier(home: Path) -> None:
    """Raises ValidationError where an earlier run lies."""
    if latest(home) is not None:
        raise ValidationError(f"{home} holds an earlier run; remove it or resume it.", param="resume")


class Loop:
    """One run in progress.

    state  what a checkpoint keeps beside tensors: step (done), position in the data, counters, and the work's own.
    """

    def __init__(self, work: Work, plan: Plan, home: Path) -> None:
        self.work, self.plan, self.home = work, plan, home
        self.optimizers = make_optimizers(work.model, plan)
        self.state: dict[str, Any] = {"step": 0, "position": work.start, "tokens": 0, "samples": 0, "seconds": 0.0}
        newest = latest(home)
        if newest is not None:
            self.state = read_checkpoint(newest, work.model, self.optimizers)
            work.load_extra_state(self.state.pop("work", {}))
        self.sums: dict[str, float] = defaultdict(float)  # of losses since the last line
        self.notes: dict[str, list[float]] = defaultdict(list)  # diagnostics since then; not every batch has each
        self.lines = 0  # steps since then

    def go(self, stop: int) -> None:
        """Run up to step `stop`; log.jsonl gets a line every `log_every` steps and at every validation."""
        log = RunLog(self.home, self.state["step"], tensorboard=self.plan.tensorboard)
        try:
            with progress(self.plan.name, self.plan.steps) as show:
                batches = self.work.batches(self.state["position"])
                begun, before = time.monotonic(), self.state["seconds"]
                while self.state["step"] < stop:
                    step = self.state["step"]
                    self.work.before_step(step)
                    good = self._step(batches, step)
                    if good:
                        self.state["step"] = step + 1
                        good = not self.work.after_step(step + 1)
                    self.state["seconds"] = round(before + time.monotonic() - begun, 1)
                    for event in self.work.events():
                        log.event(step + 1, event)
                    if not good:
                        self._go_back(log, step)
                        batches = self.work.batches(self.state["position"])
                        continue
                    self._report(log, show, stop)
                    self._save(stop)
        finally:
            log.close()

    def one_step(self) -> dict[str, float]:
        """One optimizer step at the run's position, without log and checkpoint; its losses, grad_norm among them."""
        if not self._step(self.work.batches(self.state["position"]), self.state["step"]):
            raise TrainingError("the step was not taken: a loss or gradient is not finite.")
        self.state["step"] += 1
        found = dict(self.sums)
        self._forget()
        return found

    def _step(self, batches: Iterator[tuple[Any, Any]], step: int) -> bool:
        """One optimizer step. False: something was not finite, nothing was changed, and the work wants to go back."""
        window = []
        for _ in range(self.plan.accumulate):
            batch, position = next(batches)
            window.append(batch)
        factor = rate(self.plan, step) * self.work.rate_factor(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        sums: dict[str, float] = defaultdict(float)
        notes: list[Mapping[str, float]] = []
        tokens = samples = 0
        for batch, shares in zip(window, _shares([self.work.counts(batch) for batch in window]), strict=True):
            try:
                found = self.work.losses(batch, step)
            except TrainingError as error:
                if not error.names:
                    raise
                return self._broken(step, error.names)
            values = _values(found, shares)
            if not math.isfinite(values["loss"]):
                return self._broken(step, _broken_terms(found))
            _total(found.terms, shares).backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                sums[name] += value
            notes.append(found.diagnostics)
            tokens, samples = tokens + found.tokens, samples + found.samples
        parameters = list(self.work.model.parameters())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total.item()
        if not math.isfinite(norm):  # before clipping, which would spread it to all of them
            return self._broken(step, self._broken_gradients())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.plan.clip, total)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, value in {**sums, "grad_norm": norm}.items():
            self.sums[name] += value
        for name, value in (pair for note in notes for pair in note.items()):
            self.notes[name].append(value)
        self.lines += 1
        self.state["position"] = position
        self.state["tokens"] += tokens
        self.state["samples"] += samples
        return True

    def _broken_gradients(self) -> tuple[str, ...]:
        """Names of the first parameters whose gradient is not finite."""
        wrong = [
            name
            for name, p in self.work.model.named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        return tuple(f"the gradient of {name}" for name in wrong[:3])

    def _broken(self, step: int, names: tuple[str, ...]) -> bool:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.work.broken(step, names):
            return False
        kept = newest_good(self.home, self.work.good)
        where = "There is no checkpoint yet" if kept is None else f"The last good checkpoint is {kept}"
        raise TrainingError(
            f"step {step + 1}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite. {where}.",
            names=names,
            hint="Lower the learning rate, clip harder, or look at the batch; the run goes on from its checkpoint.",
        )

    def _go_back(self, log: RunLog, step: int) -> None:
        """Weights, optimizer and position of the newest good checkpoint; the work keeps what it has learnt of what went
        wrong, and that is written down at once, so that a run that is killed now does not try it again."""
        target = newest_good(self.home, self.work.good)
        if target is None:
            raise TrainingError(
                f"step {step + 1} went wrong, and there is no good checkpoint to go back to.",
                hint="Save more often (save_every).",
            )
        seconds = self.state["seconds"]
        self.state = read_checkpoint(target, self.work.model, self.optimizers)
        self.state.pop("work", None)
        self.state["seconds"] = seconds
        self._forget()
        drop_after(self.home, self.state["step"])
        self._write()
        log.event(self.state["step"], {"event": "went_back", "from": step + 1})

    def _report(self, log: RunLog, show: Show, stop: int) -> None:
        step = self.state["step"]
        validated = step % self.plan.validate_every == 0 or step == stop
        if step % self.plan.log_every != 0 and not validated:
            return
        means: dict[str, Value] = {name: value / self.lines for name, value in self.sums.items()}
        norm = means.pop("grad_norm")
        line: dict[str, Value] = {"loss": means.pop("loss"), "lr": rate(self.plan, step - 1)}
        factor = self.work.rate_factor(step - 1)
        means |= {name: sum(values) / len(values) for name, values in self.notes.items()}
        line |= {"grad_norm": norm, **means} | ({"lr_factor": factor} if factor != 1 else {})
        if validated:
            line |= self.work.validate(step)
        log.line(self.state, line)
        for event in self.work.events():
            log.event(step, event)
        show(step, line)
        self._forget()

    def _forget(self) -> None:
        self.sums.clear()
        self.notes.clear()
        self.lines = 0

    def _save(self, stop: int) -> None:
        step = self.state["step"]
        kept = {*self.plan.milestones, *self.work.milestones()}
        if step % self.plan.save_every == 0 or step == stop or step in kept:
            self._write()
            prune(self.home, self.plan.keep, sorted(kept))

    def _write(self) -> None:
        extra = self.work.extra_state()
        state = {**self.state, "work": extra} if extra else self.state
        write_checkpoint(self.home, self.state["step"], self.work.model, self.optimizers, state)


def _shares(counts: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """For every micro-batch, the share of the step that each of its terms has; a term that is missing has 1 / n."""
    if len(counts) == 1:
        return [{}]
    totals: dict[str, float] = defaultdict(float)
    for count in counts:
        for name, value in count.items():
            totals[name] += value
    even = {"": 1 / len(counts)}
    return [even | {name: value / max(totals[name], 1.0) for name, value in count.items()} for count in counts]


def _share(shares: Mapping[str, float], name: str) -> float:
    return shares.get(name, shares.get("", 1.0))


def _total(terms: Mapping[str, Tensor], shares: Mapping[str, float]) -> Tensor:
    """The sum of the terms, each times its share."""
    scaled = [term if (share := _share(shares, name)) == 1.0 else term * share for name, term in terms.items()]
    total = scaled[0]
    for term in scaled[1:]:
        total = total + term
    return total


def _broken_terms(found: Losses) -> tuple[str, ...]:
    wrong = tuple(name for name, term in found.terms.items() if not bool(term.isfinite().all()))
    return wrong or ("the sum of the losses",)  # of finite terms that overflow together


def _values(found: Losses, shares: Mapping[str, float]) -> dict[str, float]:
    """Numbers for the log: "loss", and each term as "loss.NAME" where there is more than one."""
    names = list(found.terms)
    numbers = torch.stack([term.detach().float() for term in found.terms.values()]).tolist()
    shared = [number * _share(shares, name) for name, number in zip(names, numbers, strict=True)]
    parts = {f"loss.{name}": number for name, number in zip(names, shared, strict=True)} if len(names) > 1 else {}
    return {"loss": sum(shared), **parts}
