"""A model in training looked at through the engine: the answers it gives when it is loaded, nothing left changed, and
the gates at the end of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dfastllm import models
from dfastllm.core import SamplingParams
from dfastllm.distill.evaluate import held_out
from dfastllm.distill.probe import end_gates, in_engine, probe, speed_figures
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.metrics.gates import SpeedReport, load_report, make_report, save_report
from dfastllm.metrics.timelines import aggregate
from dfastllm.models import Decoder
from dfastllm.text import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("demo-ar"))


def demo() -> Decoder:
    return models.load(resolve("demo-ar"), dtype=torch.float32).requires_grad_(True)


def test_a_model_in_memory_answers_as_the_loaded_one(tokenizer: Tokenizer) -> None:
    samples = held_out(6)
    with LLM("demo-ar", dtype="float32") as llm:
        prompts = [llm.render(sample.messages, sample.tools or None) for sample in samples]
        wanted = [one.outputs[0].token_ids for one in llm.generate(prompts, GREEDY)]
    model = demo().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with in_engine(model, tokenizer) as llm:
        assert not model.training
        assert [one.outputs[0].token_ids for one in llm.generate(prompts, GREEDY)] == wanted
    assert model.training
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_serves_the_weights_of_this_moment(tokenizer: Tokenizer) -> None:
    """A step of training between two looks changes what is answered; the first look's engine kept nothing."""
    model = demo()
    prompt = "<|bos|><|user|>What is 12 + 30?<|end|><|assistant|>"
    with in_engine(model, tokenizer) as llm:
        before = llm.generate([prompt], GREEDY)[0].text
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    with in_engine(model, tokenizer) as llm:
        assert llm.generate([prompt], GREEDY)[0].text != before


def test_training_mode_is_given_back_when_it_fails(tokenizer: Tokenizer) -> None:
    model = demo().train()
    with pytest.raises(ValidationError):
        probe(model, tokenizer, held_out(1), ids=["a", "b"], speed_requests=0)
    assert model.training
    with pytest.raises(ValidationError), in_engine(model, tokenizer, quantization="w99"):
        pass
    assert model.training
    with in_engine(model.eval(), tokenizer):
        pass
    assert not model.training


def test_a_probe_tells_accuracy_and_speed(tokenizer: Tokenizer) -> None:
    found = probe(demo(), tokenizer, held_out(12), speed_requests=2, max_tokens=48)
    assert found["task.exact_match"] >= 0.7
    assert {"task.median_tokens", "task.forwards", "task.tokens_per_forward", "task.length_ratio"} <= found.keys()
    assert {
        "speed.ttft_ms.p50",
        "speed.tps.p05",
        "speed.ttfa_tokens.p50",
        "speed.ttfa_hit_rate",
        "speed.n",
    } <= found.keys()
    assert found["speed.n"] == 2
    assert 0 < found["speed.ttft_ms.p50"] < math.inf
    only = probe(demo(), tokenizer, [], speed_requests=1, quantization="w8")
    assert only
    assert all(name.startswith("speed.") for name in only)


def report(key: str = "here", ttft: float = 200.0, model: str = "student") -> SpeedReport:
    row = {"ttft_ms": ttft, "tps": 30.0, "ttfa_tokens": 12.0, "ttfa_excess_tokens": 1.0, "ttfa_ms": 400.0}
    prints = {"workload": {"name": "task mix", "model": model}}
    metrics = aggregate([row])
    return SpeedReport(speed_metrics=metrics, hardware={}, hardware_profile_key=key, fingerprints=prints, n=1)


def test_speed_figures_are_flat() -> None:
    assert speed_figures(report())["speed.ttfa_excess_tokens.p95"] == 1.0
    assert speed_figures(report())["speed.n"] == 1.0
    assert "speed.ttfa_hit_rate" not in speed_figures(make_report(aggregate([{"ttft_ms": 1.0, "tps": 1.0}])))


def test_gates_at_the_end_of_a_run(tmp_path: Path) -> None:
    """The student's report and the verdict are kept; a baseline of another model on the same hardware is held."""
    found = end_gates(tmp_path, report(ttft=190.0), report(model="teacher"))
    assert (found["gates_passed"], found["skipped"]) == (True, False)
    assert load_report(tmp_path / "speed.json") == report(ttft=190.0)
    assert json.loads((tmp_path / "gates.json").read_text()) == found
    slower = end_gates(tmp_path, report(ttft=250.0), report(model="teacher"))
    assert not slower["gates_passed"]
    assert end_gates(tmp_path, report(ttft=250.0), report(), regression_threshold=0.5)["gates_passed"]
    assert not end_gates(tmp_path, report(), report(), ttfa_limit=0.5)["gates_passed"]
    assert json.loads((tmp_path / "gates.json").read_text())["ttfa_gate"]["threshold"] == 0.5


def test_gates_without_a_baseline_are_skipped_with_a_reason(tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    assert end_gates(tmp_path, report(), None)["reason"] == "no_baseline"
    assert end_gates(tmp_path, report(), base)["reason"] == "no_baseline"
    save_report(report("there"), base)
    found = end_gates(tmp_path, report(), base)
    assert (found["gates_passed"], found["skipped"], found["reason"]) == (True, True, "hardware_mismatch")
    assert json.loads((tmp_path / "gates.json").read_text())["reason"] == "hardware_mismatch"
    base.write_text("{")
    with pytest.raises(ValidationError, match="cut short"):
        end_gates(tmp_path, report(), base)
    assert load_report(tmp_path / "speed.json") == report()  # what was measured is kept all the same
