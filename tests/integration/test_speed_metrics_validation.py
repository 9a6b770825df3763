"""Speed metrics in the validations of a run: they are measured in our engine and logged, they change nothing of what is
trained, and a measurement that fails is logged while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dfastllm.distill import run as runs
from dfastllm.distill.config import parse_config
from dfastllm.distill.run import run_distillation
from dfastllm.errors import GenerationError
from dfastllm.llm import resolve
from dfastllm.train.checkpoint import latest
from dfastllm.train.log import FILE, read_log

Line = dict[str, Any]


def run(home: Path, **sections: Any) -> list[Line]:
    """Four steps of demo-ar on a few samples of the task mix, a validation every other one; the lines of its log."""
    config = parse_config(
        {
            "model": {"student": "demo-ar"},
            "data": {"generate": {"samples": 24, "validation": 6}, "max_seq_length": 256},
            "train": {"steps": 4, "micro_batch_size": 4, "val_every": 2, "save_every": 4, "tensorboard": False},
            "kd": {"kl_weight": 0.0},
            "speed": {"measure": 2},
            "eval": {"samples": 0, "validation": 4, "max_tokens": 32},
            **sections,
        }
    )
    run_distillation(config, home, say=lambda line: None)
    return [line for line in read_log(home / FILE) if "validation_loss" in line]


def weights(home: Path) -> bytes:
    newest = latest(home)
    assert newest is not None
    return (newest / "weights.safetensors").read_bytes()


def test_metrics_are_logged_at_each_validation(tmp_path: Path) -> None:
    lines = run(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["speed.n"] == 2
        assert 0 < line["speed.ttft_ms.p50"] <= line["speed.ttft_ms.p95"]
        assert line["speed.tps.p05"] > 0
        assert 0 <= line["task.exact_match"] <= 1
        assert line["task.median_tokens"] > 0
        assert "speed.measure_failed" not in line


def test_what_fails_is_logged_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, failing and without a look at all: the same weights to the bit in the end."""
    measured = tmp_path / "measured"
    run(measured)
    unmeasured = tmp_path / "unmeasured"
    (line, _) = run(unmeasured, speed={"measure": 0}, eval={"samples": 0, "validation": 0})
    assert not [name for name in line if name.startswith(("speed.", "task."))]

    def broken(*_: Any, **__: Any) -> dict[str, float]:
        raise GenerationError("the engine is out of order.")

    monkeypatch.setattr(runs, "probe", broken)
    failing = tmp_path / "failing"
    lines = run(failing, speed={"measure": 0})
    assert [line["speed.measure_failed"] for line in lines] == ["GenerationError: the engine is out of order."] * 2
    assert all(line["validation_loss"] > 0 for line in lines)  # the rest of the validation is there
    assert weights(measured) == weights(unmeasured) == weights(failing)


def test_a_student_that_never_calls_is_measured_too(tmp_path: Path) -> None:
    """A model that answers with noise: infinite figures are words in the log, not an error."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16}
    model = {"shape": shape, "tokenizer": str(resolve("demo-ar")), "max_len": 512}
    lines = run(tmp_path, model=model)
    assert {line["speed.ttfa_hit_rate"] for line in lines} == {0.0}
    assert {line["speed.ttfa_tokens.p50"] for line in lines} == {"Infinity"}
    assert {line["task.exact_match"] for line in lines} == {0.0}
    assert all("speed.measure_failed" not in line for line in lines)
