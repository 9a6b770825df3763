"""What a run refuses before its first step, and the students it can begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm import models
from dfastllm.distill.config import parse_config
from dfastllm.distill.prepare import start_directory
from dfastllm.distill.run import load_student, load_teacher, run_distillation
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.models import Ids
from dfastllm.text.saving import save_tokenizer
from tests.kit import distilled
from tests.kit.served import VOCAB, byte_tokenizer


def refused(raw: dict[str, Any], home: Path) -> str:
    with pytest.raises(ValidationError) as caught:
        run_distillation(parse_config(raw), home, threads=1, say=lambda line: None)
    assert not list(home.glob("step-*"))
    return str(caught.value)


def test_data_without_a_usable_row(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    raw = distilled.settings(data={"generate": None, "train": [str(file)]})
    assert "no row" in refused(raw, tmp_path / "run")
    file.write_text('{"prompt": "hello"}\nnot JSON\n')
    said = refused(raw, tmp_path / "run2")
    assert "teacher_text" in said


def test_a_teacher_of_another_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    other = models.tiny("llama", ids=Ids(eos=tokenizer.eos_ids), vocab_size=VOCAB, max_len=64)
    models.save(other, tmp_path / "other")
    save_tokenizer(tokenizer, tmp_path / "other")
    student, tokenizer = load_student(resolve("demo-draft"))
    config = parse_config(distilled.settings(kd={"local_teacher": str(tmp_path / "other")}))
    with pytest.raises(UnsupportedError, match="vocabulary of 260, the student's of 1280"):
        load_teacher(config, student, tokenizer, "cpu")
    without = parse_config(distilled.settings(kd={"local_teacher": str(tmp_path / "other"), "kl_weight": 0}))
    assert load_teacher(without, student, tokenizer, "cpu") is not None  # its answers alone are wanted


def test_a_student_that_is_not_causal(tmp_path: Path) -> None:
    said = refused(distilled.settings(model={"student": "demo-diffusion"}), tmp_path / "run")
    assert "demo-diffusion is a diffusion model" in said
    assert "kd.trajectory" in said


def test_a_student_of_some_layers_and_one_with_random_weights(tmp_path: Path) -> None:
    few = parse_config(distilled.settings(model={"student": "demo-ar", "layers": [0, 1, 5]}))
    start = start_directory(few, tmp_path / "few")
    assert json.loads((start / "config.json").read_text())["num_hidden_layers"] == 3
    source, student = (models.load(path, dtype=torch.float32) for path in (resolve("demo-ar"), start))
    assert torch.equal(student.layers[2].attn.q_proj.weight, source.layers[5].attn.q_proj.weight)
    assert start_directory(few, tmp_path / "few") == start  # made once
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16}
    model = {"student": None, "shape": shape, "tokenizer": str(resolve("demo-ar")), "max_len": 128}
    made = start_directory(parse_config(distilled.settings(model=model)), tmp_path / "random")
    with LLM(made) as llm:
        assert llm.info.max_len == 128
        assert llm.generate("hello")[0].outputs
    for wrong, said in (({**shape, "depth": 3}, "unknown key depth"), ({"layers": 1}, "missing")):
        config = parse_config(distilled.settings(model={**model, "shape": wrong}))
        with pytest.raises(ValidationError, match=said):
            start_directory(config, tmp_path / "wrong")


def test_a_run_of_the_generator_alone(tmp_path: Path) -> None:
    """No teacher: the answers of the set. Ends early where it is told to, and says nothing was exported."""
    raw = distilled.settings(quant={"enabled": False}, speed={"use_length_aware_kd": False, "measure": 0})
    said: list[str] = []
    assert run_distillation(parse_config(raw), tmp_path, steps=2, threads=1, say=said.append) is None
    assert said[:2] == ["training: 24 samples", "validation: 8 samples"]
    assert "stopped at step 2 of 15" in said[-1]
    with pytest.raises(DataError):
        run_distillation(
            parse_config(distilled.changed(raw, data={"max_seq_length": 4}, train={"seq_lengths": [3, 4]})),
            tmp_path / "b",
            say=said.append,
        )


def test_a_teacher_that_answers_nothing_is_named(tmp_path: Path) -> None:
    """And not the file of its answers, which is empty for that reason."""
    (tmp_path / "ask.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "x", "attempts": 1}
    raw = {
        "model": {"student": "demo-draft"},
        "data": {"train": [str(tmp_path / "ask.jsonl")]},
        "train": {"steps": 1},
        "kd": {"teacher": teacher},
    }
    with pytest.raises(DataError, match=r"to any of the 2 prompts of .*ask\.jsonl: 2 connect") as said:
        run_distillation(parse_config(raw), tmp_path / "out", say=lambda _: None)
    assert said.value.param == "kd.teacher"
