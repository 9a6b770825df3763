"""Recorded steps with adapters replay: the same bits on the native runner, the same logits on torch; and by the
command, which reads the adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.kit.adapters import model_of, pack, step_of, with_peft

from dfastllm.engine.runners.__main__ import main
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.record import Recorder, Recording, difference, replay
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.kernels import native
from dfastllm.lora import read_adapter
from dfastllm.models import adapter_base

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.skipif(native() is None, reason="the plain twin records other bits than it replays at other heights")
def test_recorded_steps_replay_with_their_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("qwen2")
    table: list[Any] = [None]
    for i in (1, 2):
        with_peft(model, tmp_path / str(i), seed=i, use_dora=i == 2, r=3 * i)
        table.append(read_adapter(tmp_path / str(i), adapter_base(model)))
    file = tmp_path / "run.steps"
    recorder = Recorder(NativeRunner(pack(model), 64, torch.float32, 16), file, slots=64, kv="float32", seed=None)
    recorder.adapters(table)
    for numbers in ([1, 0], [2, 1], [0, 2]):
        recorder.run(step_of(([5, 9, 11], [4, 4, 7, 2]), numbers))

    def worst(runner: Any) -> float:
        return max(difference(expected, got) for _, expected, got in replay(Recording(file), runner))

    again, torch_runner = (
        NativeRunner(pack(model), 64, torch.float32, 16),
        TorchRunner(model, 64, torch.float32, "cpu", 16, 16),
    )
    for runner in (again, torch_runner):
        runner.adapters(table)
    assert worst(again) == 0
    assert worst(torch_runner) <= 1e-4
    torch_runner.adapters([None, table[2], table[1]])
    assert worst(torch_runner) > 1e-2  # the adapters of other numbers

    monkeypatch.setattr("dfastllm.assemble.load", lambda path, **asked: SimpleNamespace(model=pack(model)))
    loras = [f"--lora={i}={tmp_path / str(i)}" for i in (1, 2)]
    monkeypatch.setattr(sys, "argv", ["replay", str(file), "--model", "this one", *loras])
    code = main()
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert "the same bits" in said.out
