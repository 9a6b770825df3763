"""This project's own server as the teacher, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfastllm.core import SamplingParams
from dfastllm.distill.data.encode import RowEncoder
from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.engine import EngineConfig
from dfastllm.errors import AuthenticationError, ModelNotFoundError
from dfastllm.llm import LLM, load_engine, resolve
from dfastllm.tasks import draw
from dfastllm.text import Tokenizer
from tests.kit.live import Live, serving

COUNT = 24


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    engine = load_engine("demo-ar", config=EngineConfig(kv_tokens=16384))
    with serving({"demo-ar": engine}, api_key="sk-of-the-server") as running:
        yield running


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEACHER_KEY", "sk-of-the-server")
    return "TEACHER_KEY"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    samples = [draw("validation", 5, index, mix={"tools": 4.0}) for index in range(COUNT)]
    rows = [{"prompt": list(s.messages), **({"tools": list(s.tools)} if s.tools else {})} for s in samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(served: Live, key: str | None, **fields: Any) -> TeacherSettings:
    return TeacherSettings.of(
        {"base_url": served.url, "api_key_env": key, "max_tokens": 64, "top_logprobs": 6, "backoff": 0.01, **fields}
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()[1:]]


def test_answers_and_log_probabilities_are_the_engines_own(
    served: Live, key: str, prompts: Path, tmp_path: Path
) -> None:
    """Text, calls in the student's own form, and every log-probability by its id, as the engine gives them directly."""
    out = tmp_path / "a.jsonl"
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    summary = collect(prompts, out, settings(served, key), tokenizer, show=False)
    found = {tuple(map(str, row["prompt"])): row for row in rows_of(out)}
    assert summary.accepted + sum(summary.rejected.values()) == COUNT, summary.lines()
    assert summary.accepted == summary.with_logprobs >= COUNT - 3
    called = 0
    with LLM("demo-ar") as llm:
        sampling = SamplingParams(max_tokens=64, temperature=0.0, logprobs=6)
        for row in found.values():
            wanted = llm.chat(row["prompt"], sampling, tools=row.get("tools"))[0].outputs[0]
            assert row["teacher_text"] == wanted.text
            called += "<tool_call>" in wanted.text
            told = [dict(token) for token in row["teacher_topk"]]
            exact = [dict(record.top) | {record.token: record.logprob} for record in wanted.logprobs]
            assert told == [{id: pytest.approx(p, abs=1e-6) for id, p in token.items()} for token in exact]
    assert called >= 3
    encoder = RowEncoder(tokenizer)
    examples = [encoder(row) for row in RowFile(out)]  # and a student's data set takes all of it
    assert len(examples) == summary.accepted
    assert not encoder.dropped
    assert all(example.topk is not None for example in examples)
    kept = [path.read_text() for path in [out, *tmp_path.rglob("*.json")]]
    assert len(kept) == COUNT + 1
    assert not any("sk-of-the-server" in text for text in kept)


def test_by_bytes_it_is_the_same(served: Live, key: str, prompts: Path, tmp_path: Path) -> None:
    """A server that tells no ids. Only alternatives that are half a character, or share their bytes, may be missing."""
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    for name, by_ids in (("ids", True), ("bytes", False)):
        chosen = settings(served, key, token_ids=by_ids)
        collect(prompts, tmp_path / name / "a.jsonl", chosen, tokenizer, limit=12, show=False)
    for one, other in zip(rows_of(tmp_path / "ids" / "a.jsonl"), rows_of(tmp_path / "bytes" / "a.jsonl"), strict=True):
        assert one["teacher_text"] == other["teacher_text"]
        for exact, mapped in zip(one["teacher_topk"], other["teacher_topk"], strict=True):
            assert exact[0] == mapped[0]
            assert {tuple(pair) for pair in mapped} <= {tuple(pair) for pair in exact}
            assert len(exact) - len(mapped) <= 1


def test_another_tokenizer_gets_texts_without_log_probabilities(
    served: Live, key: str, prompts: Path, tmp_path: Path, bytes_tokenizer: Tokenizer
) -> None:
    out = tmp_path / "a.jsonl"
    summary = collect(prompts, out, settings(served, key), bytes_tokenizer, limit=12, show=False)
    assert summary.accepted >= 9
    assert summary.without_logprobs == {"tokens_differ": summary.accepted}
    assert not any("teacher_topk" in row for row in rows_of(out))


def test_wrong_keys_and_names_are_told(served: Live, key: str, prompts: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    with pytest.raises(AuthenticationError):
        collect(prompts, tmp_path / "a.jsonl", settings(served, None, model="demo-ar"), tokenizer, show=False)
    with pytest.raises(ModelNotFoundError, match="gpt"):
        collect(prompts, tmp_path / "b.jsonl", settings(served, key, model="gpt"), tokenizer, show=False)
    path = settings(served, key, model="demo-ar", base_url=f"{served.url}/v2")
    with pytest.raises(ModelNotFoundError):
        collect(prompts, tmp_path / "c.jsonl", path, tokenizer, show=False)
