"""Quantisation-aware training in the training loop: applied to a model, begun late, resumed, recovered, exported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm import LLM
from dfastllm.core import SamplingParams
from dfastllm.distill.qat import QatConfig, QatRun
from dfastllm.distill.qat.linear import QatLinear
from dfastllm.errors import CheckpointError
from dfastllm.models import Decoder, Ids, tiny
from dfastllm.train.loop import fit
from dfastllm.train.plan import Plan
from dfastllm.train.work import Losses, Value, Work
from tests.kit.cli_models import write_tokenizer
from tests.kit.convert_models import SIZES
from tests.kit.qat_students import logits, texts

STEPS = 20


class Counting(Work):
    """Next tokens of noise, rounded as `config` says. spoil: steps whose loss is not finite, once each; alike: what the
    stability check is made to see."""

    start = 0

    def __init__(self, config: QatConfig, *, spoil: tuple[int, ...] = (), ids: Ids | None = None) -> None:
        self.model: Decoder = tiny("llama", ids=ids, **SIZES).requires_grad_(True)
        self.qat = QatRun(self.model, config, STEPS)
        self.spoil = list(spoil)
        self.rounded: list[int] = []
        self.batch: Mapping[str, Tensor] = {}

    def batches(self, position: int) -> Iterator[tuple[Tensor, int]]:
        while True:
            position += 1
            yield texts(position), position

    def losses(self, batch: Tensor, step: int) -> Losses:
        self.batch = {"input_ids": batch}
        if self.qat.qat is not None and self.qat.qat.enabled:
            self.rounded.append(step)
        found = F.cross_entropy(logits(self.model, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        if step in self.spoil:
            self.spoil.remove(step)
            found = found * torch.nan
        return Losses({"ce": found})

    def before_step(self, step: int) -> None:
        self.qat.before_step(step)

    def rate_factor(self, step: int) -> float:
        return self.qat.rate_factor(step)

    def after_step(self, step: int) -> bool:
        return self.qat.after_step(step, self.batch)

    def broken(self, step: int, names: tuple[str, ...]) -> bool:
        return self.qat.broken(step, names)

    def good(self, state: Mapping[str, Any]) -> bool:
        return self.qat.good(state)

    def milestones(self) -> tuple[int, ...]:
        return self.qat.milestones()

    def events(self) -> list[Mapping[str, Value]]:
        return self.qat.events()

    def extra_state(self) -> dict[str, Any]:
        return self.qat.extra_state()

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.qat.load_extra_state(state)


def plan() -> Plan:
    return Plan("qat", STEPS, lr=1e-3, matrix_lr=1e-3, warmup=1, save_every=5, validate_every=50, log_every=5)


def config(**changes: Any) -> QatConfig:
    return QatConfig(**{"enabled": True, "start_fraction": 0.5, "format": "w4", "min_cosine": 0.5, **changes})


def lines(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]


def events(home: Path) -> list[tuple[str, int]]:
    """(event, steps done with the one that it belongs to) of what this room reports."""
    found = [line for line in lines(home) if str(line.get("event", "")).startswith("qat.")]
    return [(line["event"], line["step"]) for line in found]


def test_qat_application_to_model(tmp_path: Path) -> None:
    """Every linear layer is replaced before the optimizer is made. Not enabled, none is, and training is to the bit
    what it is with QAT that has not begun."""
    work = Counting(config(start_fraction=0.9))
    kinds = {type(module) for name, module in work.model.named_modules() if name.endswith("_proj")}
    assert kinds == {QatLinear}
    without = Counting(QatConfig())
    assert QatLinear not in {type(module) for module in without.model.modules()}
    for one, name in ((work, "with"), (without, "without")):
        fit(one, plan(), tmp_path / name, stop=6)
    wanted = without.model.state_dict()
    assert list(work.model.state_dict()) == list(wanted)
    assert all(value.equal(wanted[name]) for name, value in work.model.state_dict().items())
    assert without.extra_state() == {}
    assert (without.qat.status, work.qat.status) == ("off", "waiting")


def test_qat_with_training_loop(tmp_path: Path) -> None:
    """It begins at its step, at its rate, and is in the checkpoint: a run that was ended and resumed, before or within
    it, is the uninterrupted one to the bit. What comes out is served."""
    ids = write_tokenizer(tmp_path / "tokenizer")
    whole = Counting(config(check_every=5), ids=ids)
    fit(whole, plan(), tmp_path / "whole")
    assert whole.rounded == list(range(10, 20))
    assert whole.qat.status == "active"
    for stop in (7, 13):
        fit(Counting(config(check_every=5), ids=ids), plan(), tmp_path / f"cut-{stop}", stop=stop)
        resumed = Counting(config(check_every=5), ids=ids)
        fit(resumed, plan(), tmp_path / f"cut-{stop}")
        for name, value in whole.model.state_dict().items():
            assert resumed.model.state_dict()[name].equal(value), name
        assert resumed.extra_state() == whole.extra_state()
    assert events(tmp_path / "whole") == [("qat.on", 11), ("qat.check", 11), ("qat.check", 15), ("qat.check", 20)]
    assert whole.qat.qat is not None
    out = whole.qat.qat.export(tmp_path / "out", sorted((tmp_path / "tokenizer").iterdir()))
    prompt = texts(99, count=1)[0].tolist()
    with LLM(out, kv_cache_dtype="float32") as llm:
        found = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    text = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            text.append(int(logits(whole.model, torch.tensor([text]))[0, -1].argmax()))
    assert list(found[0].outputs[0].token_ids) == text[len(prompt) :]


def test_qat_error_recovery(tmp_path: Path) -> None:
    """A loss that is not finite while rounding: back to the last good weights, in float, half the rate, a later start;
    a second time, and the run ends in float and says so."""
    once = Counting(config(), spoil=(12,))
    fit(once, plan(), tmp_path / "once")
    assert once.qat.status == "active"
    assert once.rounded == [10, 11, 12, 16, 17, 18, 19]  # 12 broke; half-way from there to 20
    assert once.qat.rate_factor(19) == pytest.approx(0.05)
    assert ("qat.failed", 13) in events(tmp_path / "once")
    assert once.qat.recovery.reason == "not finite at step 12: ce"
    twice = Counting(config(), spoil=(12, 17))
    fit(twice, plan(), tmp_path / "twice")
    assert twice.qat.status == "qat_failed"
    assert twice.rounded == [10, 11, 12, 16, 17]
    assert twice.qat.qat is not None
    assert not twice.qat.qat.enabled
    assert all(bool(p.isfinite().all()) for p in twice.model.parameters())
    last = lines(tmp_path / "twice")[-1]
    assert last["step"] == STEPS
    assert torch.isfinite(torch.tensor(last["loss"]))


def test_qat_recovery_from_low_cosine(tmp_path: Path) -> None:
    """Three checks in a row below the bound; a checkpoint that was written between them is not gone back to."""
    work = Counting(config(min_cosine=1.0, check_every=1))
    fit(work, plan(), tmp_path / "run")
    assert work.qat.status == "qat_failed"
    assert work.rounded[:3] == [10, 11, 12]
    assert "3 times in a row" in work.qat.recovery.reason
    went = [line for line in lines(tmp_path / "run") if line.get("event") == "went_back"]
    assert next(line["step"] for line in went) == 10


def test_checkpoints_with_and_without_qat_do_not_mix(tmp_path: Path) -> None:
    fit(Counting(config()), plan(), tmp_path / "run", stop=5)
    with pytest.raises(CheckpointError, match="without quantisation-aware training, its checkpoint is not"):
        fit(Counting(QatConfig()), plan(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="trained with format 'w4', now it is 'w8'"):
        fit(Counting(config(format="w8")), plan(), tmp_path / "run")
