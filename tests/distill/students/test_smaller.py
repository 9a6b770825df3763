"""From a served model to a trained student of half its layers, and a report; small. The real model's parts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfastllm.bench.cpu.environment import default_cache
from dfastllm.bench.fidelity import real_model
from dfastllm.core import SamplingParams
from dfastllm.distill.students.acceptance import Measuring
from dfastllm.distill.students.layers import make_student, tokenizer_of
from dfastllm.distill.students.smaller import collect_answers, main, report, served, train_student
from dfastllm.errors import CheckpointError, DataError, ModelNotFoundError, NotReadyError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.llm import LLM
from dfastllm.models import load
from dfastllm.models.gguf import open_gguf

MODEL = "demo-draft"


def test_from_a_served_model_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    with pytest.raises(DataError, match="step collect"):
        train_student(MODEL, home)
    ask = {"minutes": 1.0, "count": 24, "max_tokens": 24, "port": 9287, "top": 3}
    found = collect_answers(MODEL, home, **ask)  # type: ignore[arg-type]
    lines = {name: (home / f"answers-{name}.jsonl").read_text().splitlines() for name in found}
    assert all(len(lines[name]) == found[name] + 1 for name in found), "a header, and a row for each answer"
    assert found["0.0"] > 6
    assert found["0.7"] > 6
    rows = [json.loads(line) for name in found for line in lines[name][1:]]
    cut = [row for row in rows if row["metadata"]["teacher"]["finish_reason"] == "length"]
    assert 0 < len(cut) < len(rows), "cut answers are kept, and whole ones are there too"
    assert {len(row["teacher_topk"]) for row in cut if "teacher_topk" in row} == {24}
    assert main(["student", MODEL, str(home), "--layers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == [0]
    figures = train_student(MODEL, home, steps=8, lr=2e-3, tokens=512, told=True, frozen=True)
    assert "overlap" not in figures, "the model itself was there"
    assert figures["answers"] < len(rows), "rows without log-probabilities, and those held out"
    assert figures["steps"] == 8
    assert figures["tokens_per_second"] > 0
    with pytest.raises(CheckpointError, match="frozen, plan differ"):
        train_student(MODEL, home, steps=8, lr=1e-3, tokens=512, told=True)
    told = report(MODEL, home, prompts=2, how=Measuring(length=2, max_tokens=8, repeats=1))
    assert told == json.loads((home / "report.json").read_text())
    before, after = told["students"]["before"], told["students"]["after"]
    assert told["model"]["validation_loss"] == pytest.approx(0, abs=1e-6)
    assert told["model"]["agreement"] == 1.0
    assert after["validation_loss"] < before["validation_loss"]
    assert after["perplexity"] < before["perplexity"]
    assert after["perplexity"] > told["model"]["perplexity"] >= 1
    assert after["parameters"] < told["model"]["parameters"]
    assert {row["draft"] for row in told["drafts"]} == {"before", "after"}


def test_a_server_that_does_not_come_up_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    words = [sys.executable, "-c", "raise SystemExit('error: no model')"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real(words, **options))
    with pytest.raises(NotReadyError, match="of nowhere did not come up: error: no model"), served("nowhere", 9288, 1):
        pass


def test_another_server_is_not_taken_for_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValidationError, match=f"port {port} is in use"), served(MODEL, port, 1):
            pass


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return real_model(default_cache())
    except ModelNotFoundError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had here: {error}")


def test_the_real_model_gets_students(smollm2: Path, tmp_path: Path) -> None:
    """Two layers of thirty, to be quick: its own embedding, tokenizer and chat template, and it runs."""
    made = make_student(smollm2, tmp_path / "student", layers=2, dtype="bfloat16")
    assert made.source == 134_515_008
    assert made.share < 0.5
    student = load(made.path)
    with open_gguf(smollm2) as gguf:
        pairs = {"embed.weight": "embed.weight", "layers.1.attn.q_proj.weight": "layers.29.attn.q_proj.weight"}
        for own, theirs in pairs.items():
            value, _ = gguf.read(gguf.sources[theirs])
            assert isinstance(value, QTensor)
            assert torch.equal(student.get_parameter(own), value.dequantise().to(torch.bfloat16))
    ours, its = tokenizer_of(made.path), tokenizer_of(smollm2)
    said = [{"role": "user", "content": "Who are you, and what is 12 x 12?"}]
    assert ours.encode(ours.apply_chat_template(said)) == its.encode(its.apply_chat_template(said))
    assert ours.eos_ids == its.eos_ids
    with LLM(made.path) as llm:
        assert llm.chat(said, SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].usage.completion_tokens <= 3
