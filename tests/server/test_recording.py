"""Recorded prompts: off unless asked for, nothing but messages and tools, bounded, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import ValidationError
from dfastllm.metrics import Metrics
from dfastllm.server import serve
from dfastllm.server.recording import Recording, line_of
from dfastllm.server.schemas import Message, Tool
from dfastllm.server.serving import Serving
from dfastllm.settings import Settings
from tests.kit.live import Live, serving
from tests.kit.served import parrot_engine

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wetter in Köln? 🌧"}]


def messages(text: str = "hello") -> list[Message]:
    return [Message(role="user", content=text)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_off_by_default(live: Live, tmp_path: Path) -> None:
    assert live.serving.settings.record_prompts is None
    assert live.serving.recording is None
    live.post("/v1/chat/completions", {"model": "causal", "messages": SAID, "max_tokens": 1}).raise_for_status()
    assert list(tmp_path.iterdir()) == []


def test_only_messages_and_tools_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.jsonl"
    with (
        caplog.at_level(logging.WARNING, "dfastllm.server"),
        serving({"parrot": parrot_engine()}, record_prompts=str(path), api_key="s3cret-key") as live,
    ):
        headers = {"Authorization": "Bearer s3cret-key", "X-Request-ID": "who-asks"}
        body = {"model": "parrot", "messages": SAID, "max_tokens": 2, "seed": 417}
        live.post("/v1/chat/completions", {**body, "tools": [TOOL]}, headers=headers).raise_for_status()
        live.post("/v1/chat/completions", {**body, "stream": True}, headers=headers).raise_for_status()
        live.post("/v1/completions", {"model": "parrot", "prompt": "plain"}, headers=headers).raise_for_status()
        assert live.post("/v1/chat/completions", {**body, "messages": []}, headers=headers).status_code == 400
        assert live.post("/v1/chat/completions", body).status_code == 401
        assert live.serving.recording is not None
        live.serving.recording.flush()
        # As the wire says it, what was left out is left out; the second request showed its template no tools.
        assert rows(path) == [{"prompt": SAID, "tools": [TOOL]}, {"prompt": SAID}]
    text = path.read_text(encoding="utf-8")
    assert "Köln" in text
    assert not any(secret in text for secret in ("s3cret", "who-asks", "Bearer", "417", "parrot", "plain"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "messages and tools of every chat request" in caplog.text
    assert str(path) in caplog.text


def test_the_bound_holds(tmp_path: Path) -> None:
    path, older = tmp_path / "p.jsonl", tmp_path / "p.jsonl.1"
    most = 2000
    recording = Recording(path, most)
    sizes = []
    for i in range(200):
        recording.see(messages(f"{i} " + "x" * (i % 90)), None)
        recording.flush()
        sizes.append((path.stat().st_size, older.stat().st_size if older.exists() else 0))
    recording.close()
    assert max(size for size, _ in sizes) <= most
    assert max(size for _, size in sizes) <= most
    assert max(size for size, _ in sizes) > most - 150, "rotated long before it was full"
    kept = [int(row["prompt"][0]["content"].split()[0]) for file in (older, path) for row in rows(file)]
    assert kept == list(range(kept[0], 200)), "rows were lost or doubled at the change of files"
    assert (recording.written, recording.left_out) == (200, 0)
    assert stat.S_IMODE(older.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_row_longer_than_the_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording = Recording(tmp_path / "p.jsonl", 1024)
    recording.see(messages("y" * 2000), None)
    recording.see(messages("short"), None)
    recording.close()
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "p.jsonl")] == ["short"]
    assert recording.left_out == 1
    assert "left out" in caplog.text


def test_a_file_goes_on_and_a_broken_row_stays_one_row(tmp_path: Path) -> None:
    """After a kill in the middle of a row, what is there stays, and the next row is whole."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(line_of(messages("before"), None) + b'{"prompt": [{"role": "us')
    path.chmod(0o644)
    recording = Recording(path, 10_000)
    recording.see(messages("after"), None)
    recording.close()
    lines = path.read_bytes().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [
        {"prompt": [{"role": "user", "content": text}]} for text in ("before", "after")
    ]
    assert len(lines) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lone_surrogate_stays_its_escape() -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "description": "a\ud800b"}})
    line = line_of(messages("x"), [tool])
    assert json.loads(line.decode("utf-8"))["tools"][0]["function"]["description"] == "a\ud800b"


def test_a_full_disk_costs_rows_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recording = Recording(tmp_path / "p.jsonl", 10_000)
    real = os.write

    def full(file: int, data: Any) -> int:
        if file == recording._file:
            real(file, bytes(data)[:7])
            raise OSError(28, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        recording.see(messages("lost"), None)
        recording.flush()
    recording.see(messages("kept"), None)
    recording.close()
    lines = (tmp_path / "p.jsonl").read_bytes().splitlines()
    assert lines[0] == b'{"promp'
    assert json.loads(lines[1])["prompt"][0]["content"] == "kept"
    assert (recording.written, recording.left_out) == (1, 1)
    assert "No space left" in caplog.text


@pytest.mark.parametrize("kind", ["directory", "missing", "link", "pipe"])
def test_what_cannot_be_written_is_told_at_the_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "p.jsonl"
    if kind == "directory":
        path.mkdir()
    elif kind == "missing":
        path = tmp_path / "nowhere" / "p.jsonl"
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(ValidationError, match="cannot be recorded") as raised:
        Recording(path, 10_000)
    assert raised.value.param == "record_prompts"
    assert raised.value.hint
    assert str(path) in raised.value.message
    assert not (tmp_path / "elsewhere").exists()


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    first = Recording(tmp_path / "p.jsonl", 10_000)
    with pytest.raises(ValidationError, match="another server"):
        Recording(tmp_path / "p.jsonl", 10_000)
    first.close()
    Recording(tmp_path / "p.jsonl", 10_000).close()


def test_the_server_ends_at_once_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is looked for: there is none of this name."""
    monkeypatch.setattr("dfastllm.server.run._log_to_stderr", lambda level: None)  # it is for a process of its own
    with pytest.raises(ValidationError, match="cannot be recorded"):
        serve(Settings(port=0, model=("nowhere",), record_prompts=str(tmp_path / "nowhere" / "p.jsonl")))


def test_serving_closes_it(tmp_path: Path) -> None:
    held = Serving(Settings(record_prompts=str(tmp_path / "p.jsonl")), Metrics())
    assert held.recording is not None
    held.recording.see(messages("last"), None)
    held.close()
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "p.jsonl")] == ["last"]
