"""From a served model to a trained student of half its layers, and a report; small. The real model's parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dfastllm import assemble
from dfastllm.bench.cpu.environment import default_cache
from dfastllm.bench.fidelity import real_model
from dfastllm.core import SamplingParams
from dfastllm.distill.students.acceptance import Measuring
from dfastllm.distill.students.layers import make_student, tokenizer_of
from dfastllm.distill.students.smaller import collect_answers, main, report, served, train_student
from dfastllm.errors import DataError, ModelNotFoundError, NotReadyError
from dfastllm.llm import LLM
from dfastllm.models import Decoder, load

MODEL = "demo-draft"


def test_from_a_served_model_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    with pytest.raises(DataError, match="step collect"):
        train_student(MODEL, home)
    ask = {"minutes": 1.0, "count": 40, "max_tokens": 64, "port": 9287}
    found = collect_answers(MODEL, home, **ask)  # type: ignore[arg-type]
    lines = {name: (home / f"answers-{name}.jsonl").read_text().splitlines() for name in found}
    assert all(len(lines[name]) == found[name] + 1 for name in found), "a header, and a row for each answer"
    assert found["0.0"] > 12
    assert found["0.7"] > 12
    assert main(["student", MODEL, str(home), "--layers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == [0]
    figures = train_student(MODEL, home, steps=12, lr=2e-3, tokens=1024)
    assert figures["steps"] == 12
    assert figures["tokens_per_second"] > 0
    told = report(MODEL, home, prompts=2, how=Measuring(length=2, max_tokens=16, repeats=1))
    assert told == json.loads((home / "report.json").read_text())
    before, after = told["students"]["before"], told["students"]["after"]
    assert told["model"]["validation_loss"] == pytest.approx(0, abs=1e-6)
    assert told["model"]["agreement"] == 1.0
    assert after["validation_loss"] < before["validation_loss"]
    assert after["perplexity"] < before["perplexity"]
    assert after["perplexity"] > told["model"]["perplexity"] >= 1
    assert after["parameters"] < told["model"]["parameters"]
    assert {row["draft"] for row in told["drafts"]} == {"before", "after"}


def test_a_server_that_does_not_come_up_says_why() -> None:
    with pytest.raises(NotReadyError, match="no model 'nowhere'"), served("nowhere", 9288, 1):
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
    whole = assemble.dequantised(smollm2, torch.bfloat16).model
    assert isinstance(whole, Decoder)
    assert torch.equal(student.embed.weight, whole.embed.weight)
    assert torch.equal(student.layers[1].attn.q_proj.weight, whole.layers[29].attn.q_proj.weight)
    ours, theirs = tokenizer_of(made.path), tokenizer_of(smollm2)
    said = [{"role": "user", "content": "Who are you, and what is 12 x 12?"}]
    assert ours.encode(ours.apply_chat_template(said)) == theirs.encode(theirs.apply_chat_template(said))
    assert ours.eos_ids == theirs.eos_ids
    with LLM(made.path) as llm:
        assert llm.chat(said, SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].usage.completion_tokens <= 3
