"""The stability check against its definition, and the recovery's decisions one by one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfastllm.distill.qat import QatConfig, Recovery, check_qat_stability, should_enable_qat
from dfastllm.distill.qat.stability import MOST_ROWS
from dfastllm.errors import CheckpointError
from tests.kit.qat_students import logits, texts, trained

OK: dict[str, float | str] = {"has_nan": 0.0, "cosine_sim": 0.999}
LOW: dict[str, float | str] = {"has_nan": 0.0, "cosine_sim": 0.9}
NAN: dict[str, float | str] = {"has_nan": 1.0, "cosine_sim": 0.0}


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = (t.detach().reshape(-1, t.shape[-1]).double().numpy() for t in (a, b))
    return float(np.mean((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))))


@pytest.mark.parametrize("on", [True, False])
def test_cosine_is_to_the_same_weights_unrounded(on: bool) -> None:
    qat = trained("w4", tied=True)
    ids = texts(3)
    with torch.no_grad():
        rounded = logits(qat.model, ids)
        qat.disable()
        plain = logits(qat.model, ids)
    qat.switch.on = on
    found = check_qat_stability(qat.model, {"input_ids": ids})
    assert found == {"has_nan": 0.0, "cosine_sim": pytest.approx(cosine(rounded, plain), abs=1e-6)}
    assert 0.5 < float(found["cosine_sim"]) < 1 - 1e-6
    assert qat.enabled is on


def test_only_the_chosen_rows_count() -> None:
    qat = trained("w4")
    ids = texts(3)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    labels = torch.full_like(ids, -100)
    labels[:, 5:9] = ids[:, 5:9]
    with torch.no_grad():
        rounded = logits(qat.model, ids)
        qat.disable()
        plain = logits(qat.model, ids)
    masked = check_qat_stability(qat.model, {"input_ids": ids, "attention_mask": mask})
    assert masked["cosine_sim"] == pytest.approx(cosine(rounded[:, :20], plain[:, :20]), abs=1e-6)
    both = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert check_qat_stability(qat.model, both)["cosine_sim"] == pytest.approx(
        cosine(rounded[:, 5:9], plain[:, 5:9]), abs=1e-6
    )
    long = texts(4, count=8, length=100)
    thinned = check_qat_stability(qat.model, {"input_ids": long})
    assert thinned["has_nan"] == 0.0
    assert long.numel() > MOST_ROWS


def test_modes_are_restored_one_by_one() -> None:
    qat = trained("w8", steps=0)
    qat.model.train()
    qat.model.layers[0].eval()
    modes = {name: module.training for name, module in qat.model.named_modules()}
    assert len(set(modes.values())) == 2
    check_qat_stability(qat.model, {"input_ids": texts(0)})
    check_qat_stability(qat.model, {"input_ids": None})
    assert {name: module.training for name, module in qat.model.named_modules()} == modes


def test_not_finite() -> None:
    qat = trained("w4", steps=0)
    with torch.no_grad():
        qat.model.layers[1].mlp.down_proj.weight[3, 3] = torch.inf
    assert check_qat_stability(qat.model, {"input_ids": texts(0)}) == NAN
    with torch.no_grad():
        qat.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    assert check_qat_stability(qat.model, {"input_ids": texts(0)}) == NAN


def test_a_failure_is_a_finding() -> None:
    qat = trained("w4", steps=0)
    found = check_qat_stability(qat.model, {})
    assert found == {**NAN, "error": "KeyError: 'input_ids'"}
    assert qat.enabled

    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("out of memory")

    assert check_qat_stability(qat.model, {}, forward=fails)["error"] == "RuntimeError: out of memory"


def test_another_forward() -> None:
    """Of a model that is not causal, or none of ours; without rounding it is alike itself."""
    qat = trained("w4")
    ids = texts(3)
    chosen = check_qat_stability(qat.model, {"x": ids}, forward=lambda m, b: logits(m, b["x"])[:, :3])  # type: ignore[arg-type]
    assert 0.5 < float(chosen["cosine_sim"]) < 1
    module = nn.Embedding(200, 7)
    assert check_qat_stability(module, {"input": ids}, forward=lambda m, b: m(b["input"])) == {
        "has_nan": 0.0,
        "cosine_sim": pytest.approx(1.0),
    }


def recovery(total: int = 1000, **changes: Any) -> Recovery:
    return Recovery(QatConfig(enabled=True, **changes), total)


def test_delayed_start_and_rate() -> None:
    found = recovery()
    assert [found.begin(step) for step in (0, 799, 800, 999)] == [False, False, True, True]
    assert found.status == "active"
    assert [found.rate_factor(step) for step in (799, 800)] == [1.0, 0.1]
    off = Recovery(QatConfig(start_fraction=0.0), 10)
    assert not off.begin(9)
    assert off.rate_factor(9) == 1.0


@pytest.mark.parametrize("fraction", [0.0, 0.29, 0.8])
def test_the_first_try_begins_where_it_should(fraction: float) -> None:
    config = QatConfig(enabled=True, start_fraction=fraction)
    found = Recovery(config, 100)
    assert [found.begin(step) for step in range(100)] == [should_enable_qat(step, 100, config) for step in range(100)]


def test_checks_are_due() -> None:
    found = recovery(check_every=50)
    assert not any(found.due(done) for done in range(1001))
    found.begin(800)
    assert [done for done in range(1001) if found.due(done)] == [801, 850, 900, 950, 1000]


def test_a_nan_ends_a_try_at_once() -> None:
    """Postponed half-way through what is left, at half the rate; the second time it is over."""
    found = recovery()
    found.begin(800)
    assert found.observe(801, OK) == "go_on"
    assert found.observe(900, {**NAN, "error": "boom"}) == "go_back"
    assert (found.status, found.start, found.failed, found.reason) == ("postponed", 950, 1, "boom")
    assert not found.begin(850)  # gone back
    assert found.status == "postponed"
    assert found.begin(950)
    assert found.rate_factor(950) == pytest.approx(0.05)
    assert found.observe(951, NAN) == "give_up"
    assert found.status == "qat_failed"
    assert not found.begin(999)
    assert found.rate_factor(999) == 1.0
    assert not found.due(1000)


def test_low_cosine_three_times_in_a_row() -> None:
    found = recovery()
    found.begin(800)
    assert [found.observe(801 + i, report) for i, report in enumerate([LOW, LOW, OK, LOW, LOW])] == ["go_on"] * 5
    assert found.observe(810, LOW) == "go_back"
    assert found.bad == 0
    assert "cosine 0.9000 below 0.98, 3 times in a row" in found.reason
    edge = recovery(strikes=1)
    edge.begin(800)
    assert edge.observe(801, {"has_nan": 0.0, "cosine_sim": 0.98}) == "go_on"
    assert edge.observe(802, {"has_nan": 0.0, "cosine_sim": 0.9799}) == "go_back"


def test_no_step_left_is_the_end() -> None:
    found = recovery(total=10)
    found.begin(9)
    assert found.observe(10, NAN) == "give_up"
    assert found.status == "qat_failed"
    assert recovery(total=10, tries=1).observe(8, NAN) == "give_up"


def test_going_back_before_the_first_try() -> None:
    """For a reason that is not the rounding's: the run waits again."""
    found = recovery()
    found.begin(800)
    found.begin(700)
    assert found.status == "waiting"


def test_state_is_json_and_whole() -> None:
    found = recovery()
    found.begin(800)
    found.observe(801, LOW)
    found.observe(900, NAN)
    found.begin(950)
    found.observe(951, LOW)
    state = json.loads(json.dumps(found.state()))
    other = recovery()
    other.load_state(state)
    assert other == found
    assert not Recovery.good(state)
    other.observe(952, OK)
    assert Recovery.good(other.state())
    assert Recovery.good({})


@pytest.mark.parametrize(
    "change", [{"status": "fine"}, {"start": "5"}, {"failed": -1}, {"bad": 1.5}, {"more": 1}, {"reason": None}]
)
def test_unreadable_state(change: dict[str, Any]) -> None:
    found = recovery()
    with pytest.raises(CheckpointError, match="unreadable"):
        found.load_state({**found.state(), **change})
    assert found == recovery()
