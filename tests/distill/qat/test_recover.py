"""The measurement of what rounding costs and training wins back: its loss, its figures, its command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dfastllm.convert import Options, measure, quantise_model
from dfastllm.convert.report import divergence, log_probabilities
from dfastllm.distill.qat import QatConfig, prepare_qat
from dfastllm.distill.qat.recover import Figures, LikeFloat, Recovered, _cost, main
from dfastllm.llm import resolve
from dfastllm.models import load
from dfastllm.text import Tokenizer


@pytest.mark.parametrize("name", ["demo-draft", "demo-diffusion"])
def test_the_loss_is_the_divergence(name: str) -> None:
    """Nothing between equal models; of a causal one what the report calls divergence; of both kinds with gradients."""
    directory = resolve(name)
    tokenizer = Tokenizer.load(directory)
    model, student = (load(directory, dtype=torch.float32) for _ in range(2))
    student.requires_grad_(True)
    qat = prepare_qat(student, QatConfig(enabled=True, format="w4"))
    work = LikeFloat(student, model, tokenizer, tokens=512, seed=3)
    batch, _ = next(work.batches(work.start))
    same = work.losses(batch, 0)
    assert same.samples == len(batch.examples)
    assert same.terms["divergence"].item() == pytest.approx(0.0, abs=1e-6)
    qat.enable()
    found = work.losses(batch, 0).terms["divergence"]
    assert found.item() > 1e-5
    if model.info.kind == "ar":
        examples = list(batch.examples)[:16]  # as many as the report runs at once
        parts = (log_probabilities(m, examples) for m in (model, student))
        part = type(batch)(tuple(examples), batch.number)
        wanted, _ = divergence(*parts)
        assert work.losses(part, 0).terms["divergence"].item() == pytest.approx(wanted, rel=1e-4)
    found.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


def test_share() -> None:
    best, worst = Figures(0.0, 0.0, 1.0, 0.9), Figures(0.5, 0.1, 0.9, 0.7)
    found = Recovered("m", "w4", "w8g", 1, 10, best, worst, worst, Figures(0.1, 0.1, 1.0, 0.85))
    assert found.share("divergence") == pytest.approx(0.8)
    assert found.share("accuracy") == pytest.approx(0.75)
    assert Recovered("m", "w4", "w8g", 1, 10, best, best, best, worst).share("accuracy") is None


def test_cost() -> None:
    """Of two rows, by hand: KL 0 and ln 2, so a mean of half that and an error of a standard deviation over root 2."""
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).clamp(min=1e-30).log()
    torn = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).clamp(min=1e-30).log()
    mean, error, same = _cost([sure[:1], sure[1:]], [torn[:1], torn[1:]])
    assert mean == pytest.approx(math.log(2) / 2)
    assert error == pytest.approx(math.log(2) / 2 / math.sqrt(2))
    assert same == 1.0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps: the figures of plain rounding are those that `quantize --report` measures, and what is written is the
    trained model."""
    arguments = ["demo-draft", "--steps", "2", "--tokens", "512", "--samples", "12", "--per-task", "2"]
    main([*arguments, "--threads", "1", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "demo-draft, w4, embedding and head w8g; accuracy of 12 answers" in printed
    assert f"{figures['trained']['divergence']:.5f}" in printed
    assert "of the cost recovered" in printed
    for name, search in (("plain", False), ("searched", True)):
        report = quantise_model("demo-draft", tmp_path / name, Options("w4", search=search))
        quality = measure("demo-draft", tmp_path / name, report, per_task=2).quality
        assert quality is not None
        assert figures[name]["accuracy"] == pytest.approx(quality.total_after)
        assert figures[name]["divergence"] == pytest.approx(
            quality.divergence, rel=0.2
        )  # its activations are simulated
    assert figures["settings"]["tokens"] == 512
    assert figures["float_"]["accuracy"] == pytest.approx(quality.total_before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "w4"
