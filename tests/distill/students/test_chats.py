"""Generated prompts: the same for the same seed, all different, of every kind, and with no blank left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.students.chats import KINDS, chat, chats, main
from dfastllm.errors import ValidationError


def test_prompts_are_a_function_of_seed_and_place() -> None:
    assert chat(3, 5) == chat(3, 5)
    assert chat(3, 5)["prompt"] != chat(4, 5)["prompt"]
    assert list(chats(1, 50)) == list(chats(1, 80))[:50]


def test_prompts_differ_and_are_of_every_kind() -> None:
    rows = list(chats(0, 3000))
    texts = [row["prompt"][-1]["content"] for row in rows]
    assert len({json.dumps(row["prompt"]) for row in rows}) == 3000
    assert {row["task"] for row in rows} == set(KINDS)
    assert not any(mark in text for text in texts for mark in "{}|")
    assert all(text[0] == text[0].upper() for text in texts)
    # No few openings make up the set: the most frequent first three words are under a tenth of it.
    openings = [" ".join(text.split()[:3]) for text in texts]
    assert max(map(openings.count, set(openings))) < 300


def test_more_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfastllm.distill.students import chats as module

    monkeypatch.setattr(module, "chat", lambda seed, index: {"prompt": [{"content": str(index % 7)}]})
    with pytest.raises(ValidationError, match="7 were found"):
        list(chats(0, 8))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.jsonl"
    assert main([str(out), "--count", "30", "--seed", "2"]) == 0
    file = RowFile(out, needs_text=False)
    rows = list(file)
    assert len(rows) == 30
    assert file.header["seed"] == 2
    assert not file.skips.counts
    assert main([str(out), "--count", "30"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([str(out), "--count", "5", "--force"]) == 0
    assert len(list(RowFile(out, needs_text=False))) == 5
