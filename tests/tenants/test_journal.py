"""The journal: whatever moment a process dies at, what was told to be kept is read again, once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dfastllm.errors import StorageError, ValidationError
from dfastllm.tenants.journal import Journal, Row


def row(name: str, version: int) -> Row:
    return {"id": name, "version": version, "completion_tokens": 10 * version, "model": "é\u2028\n"}


def crash(journal: Journal) -> None:
    """What the end of the process does: the lock is gone, the file stays."""
    os.close(journal._descriptor)


def test_the_newest_of_each_row_is_left(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "mark", "w1")
    assert (journal.left, journal.dead) == ({}, [])
    journal.append([row("a", 1), row("b", 1)])
    journal.append([row("a", 3)])
    journal.append([row("a", 2)])
    crash(journal)
    second = Journal(path, "mark", "w2")
    assert second.left == {"a": row("a", 3), "b": row("b", 1)}
    assert second.dead == ["w1"]
    second.append([row("b", 2)])
    crash(second)
    third = Journal(path, "mark", "w3")
    assert third.left == {"a": row("a", 3), "b": row("b", 2)}
    assert set(third.dead) == {"w1", "w2"}, "w1's requests were not looked after yet"
    third.dead = []
    third.rewrite(())
    third.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_cut_anywhere(tmp_path: Path) -> None:
    """A process killed in a write leaves any beginning of it: whole lines are read, the rest is nobody's."""
    path = tmp_path / "j"
    journal = Journal(path, "mark", "w1")
    sizes = [journal.size]
    for version in range(1, 5):
        journal.append([row("a", version)])
        sizes.append(journal.size)
    crash(journal)
    whole = path.read_bytes()
    borders = {size + step for size in (0, *sizes) for step in (-1, 0, 1)}
    for cut in sorted(borders.intersection(range(len(whole) + 1)) | set(range(0, len(whole), 13))):
        path.write_bytes(whole[:cut])
        opened = Journal(path, "mark", "w2")
        kept = sum(size <= cut for size in sizes) - 1
        assert opened.left == ({"a": row("a", kept)} if kept > 0 else {})
        opened.append([row("b", 1)])
        crash(opened)
        again = Journal(path, "mark", "w3")
        assert again.left == opened.left | {"b": row("b", 1)}
        crash(again)


def test_a_damaged_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "mark", "w1")
    journal.append([row("a", 1), row("b", 1), row("c", 1)])
    crash(journal)
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"version":1', b'"version":9')
    path.write_bytes(b"\n".join(lines))
    assert Journal(path, "mark", "w2").left == {"a": row("a", 1), "c": row("c", 1)}
    assert "holds a damaged line" in caplog.text


def test_servers_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "j"
    one, two, three = (Journal(path, "mark", f"w{i}") for i in (1, 2, 3))
    assert [j.path.name for j in (one, two, three)] == ["j", "j.1", "j.2"]
    for number, journal in enumerate((one, two, three)):
        journal.append([row(f"r{number}", 1)])
    crash(two)
    crash(three)
    heir = Journal(path, "mark", "w4")
    assert heir.path.name == "j.1"
    assert heir.left == {"r1": row("r1", 1), "r2": row("r2", 1)}
    assert set(heir.dead) == {"w2", "w3"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["j", "j.1"]
    crash(heir)
    again = Journal(path, "mark", "w5")
    assert again.left == heir.left
    assert one.size > 0
    one.close(keep=True)
    again.close(keep=True)


def test_what_cannot_be_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    crash(Journal(path, "mark", "w1"))
    with pytest.raises(ValidationError, match="belongs to another database"):
        Journal(path, "other", "w2")
    with pytest.raises(ValidationError, match="No such file") as refused:
        Journal(tmp_path / "no" / "j", "mark", "w2")
    assert refused.value.param == "usage_journal"
    with pytest.raises(ValidationError, match="Is a directory"):
        Journal(tmp_path, "mark", "w2")
    Journal(path, "mark", "w2").close(keep=True)  # what was refused holds no lock


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    journal = Journal(path, "mark", "w1")
    journal.append([row("a", 1)])
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left"):
            journal.append([row("b", 1)])
    journal.append([row("c", 1)])
    crash(journal)
    assert Journal(path, "mark", "w2").left == {"a": row("a", 1), "c": row("c", 1)}
