"""The project's own gate: exact counters of the shipped models against the baseline in git, and their comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dfastllm.bench import counters
from dfastllm.bench.counters import (
    CASES,
    Change,
    cases_of,
    count,
    count_everywhere,
    counters_key,
    differences,
    load_counters,
    save_counters,
)
from dfastllm.core import SamplingParams
from dfastllm.errors import GenerationError, ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.workload import gradable
from tests.kit.source import ROOT

BASELINE = ROOT / "benchmarks" / "gates" / "counters.json"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_counters_are_those_of_the_baseline(case: counters.Case) -> None:
    baseline = load_counters(BASELINE, counters_key())
    if baseline is None:
        pytest.skip(f"{BASELINE.name} has no counters for {counters_key()}")
    found = differences({case.name: count(case)}, baseline)
    assert found == [], "wanted? then: dfastllm gate counters --update"


def test_the_baseline_holds_every_case_of_every_kind() -> None:
    kinds = json.loads(BASELINE.read_text())["kinds"]
    assert {"avx512", "avx2", "scalar"} <= set(kinds)
    assert any(key.startswith("torch-") for key in kinds)
    for cases in kinds.values():
        assert list(cases) == [case.name for case in CASES]


def test_speculation_changes_no_answer_and_saves_forwards() -> None:
    """What the baseline itself promises: lossless drafts, and forwards saved."""
    for cases in json.loads(BASELINE.read_text())["kinds"].values():
        plain = cases["ar"]
        for name, found in cases.items():
            if "drafts" not in found:
                continue
            assert found["answers"] == plain["answers"], name
            assert found["nfe"] < plain["nfe"], name
            assert 0 < found["accepted_tokens"] <= found["draft_tokens"], name


def test_counters_agree_with_the_usage_of_the_same_requests() -> None:
    """Independently counted: the facade's own usage, one request at a time."""
    [case] = cases_of(["diffusion threshold 0.9 dual"])
    found = count(case, requests=3)
    with LLM(case.model) as llm:
        prompts = [llm.render(sample.messages, sample.tools or None) for sample in gradable(3)]
        sampling = SamplingParams(temperature=0, max_tokens=counters.MAX_TOKENS)
        used = [llm.generate([p], sampling, case.decode)[0].outputs[0].usage for p in prompts]
    assert found["nfe"] == sum(u.forwards for u in used)
    assert found["completion_tokens"] == sum(u.completion_tokens for u in used)
    assert found["prompt_tokens"] == sum(map(len, prompts))
    assert found["steps"] == max(u.forwards for u in used)  # all in flight at once


def test_fewer_tokens_give_other_counters() -> None:
    [case] = cases_of(["ar ngram"])
    assert differences({"x": count(case, requests=2, max_tokens=4)}, {"x": count(case, requests=2, max_tokens=5)})


def test_differences() -> None:
    before = {"a": {"nfe": 3, "answers": "x"}, "b": {"nfe": 1}}
    assert differences(before, before) == []
    assert differences({"a": {"nfe": 4, "answers": "x"}}, before) == [Change("a", "nfe", 3, 4)]
    assert differences({"a": {"nfe": 3}}, before) == [Change("a", "answers", "x", None)]
    assert differences({"c": {"nfe": 3}}, before) == [Change("c", "nfe", None, 3)]


def test_the_file_keeps_kinds_apart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "counters.json"
    save_counters(path, {"avx2": {"a": {"nfe": 1}}, "torch-x": {"a": {"nfe": 2}}})
    assert load_counters(path, "avx2") == {"a": {"nfe": 1}}
    assert load_counters(path, "torch-x") == {"a": {"nfe": 2}}
    assert load_counters(path, "neon") is None
    assert len(path.read_text().splitlines()) == 4 + 3 * 2 + 3  # head, three lines a kind, tail


@pytest.mark.parametrize("text", ['{"schema_version": 1, "kin', '{"schema_version": 2, "kinds": {}}', "{}", "[]"])
def test_broken_baselines_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counters.json"
    path.write_text(text)
    with pytest.raises(ValidationError, match=r"counters\.json"):
        load_counters(path, "avx2")


def test_unknown_case_names_are_refused() -> None:
    assert [case.name for case in cases_of(["ar n"])] == ["ar ngram 5"]
    assert len(cases_of(None)) == len(CASES)
    with pytest.raises(ValidationError, match="no case begins with 'oar'"):
        cases_of(["ar", "oar"])


def test_kinds_are_counted_once_each_and_missing_ones_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        if env.get("DFASTLLM_ISA") == "avx512":
            return subprocess.CompletedProcess(command, 1, "", "UnsupportedError: DFASTLLM_ISA asks for avx512")
        key = "torch-x" if env.get("DFASTLLM_NATIVE") == "0" else "scalar"
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps({'key': key, 'cases': {}})}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert list(count_everywhere()) == [("scalar", {}), ("torch-x", {})]

    def broken(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback: no model")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(GenerationError, match="no model"):
        list(count_everywhere())
