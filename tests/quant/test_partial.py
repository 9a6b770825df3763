"""Files that are written whole or not at all: what a killed process left, a full disk, a signal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfastllm.convert import Options, quantise_model
from dfastllm.errors import StorageError
from dfastllm.quant import SafetensorsWriter
from dfastllm.quant.gguf import Planned as PlannedGguf
from dfastllm.quant.gguf import write_file
from dfastllm.quant.partial import clear_left, part_of, require_space, storing
from dfastllm.quant.stream import Planned
from tests.kit.convert_models import write_tiny

PLAN = {"a": Planned(torch.float32, (1 << 16,))}
FULL = Path("/dev/full")  # of which every write fails as on a full disk
# The command, stopped for a signal once some of its output is there.
HELD = """
import sys, time
import dfastllm.quant.stream as stream
write = stream.SafetensorsWriter.write
def held(self, name, tensor):
    write(self, name, tensor)
    print("writing", flush=True)
    time.sleep(60)
stream.SafetensorsWriter.write = held
from dfastllm.cli import main
sys.argv = ["dfastllm", "quantize", *sys.argv[1:]]
main()
"""


def dead() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".model.safetensors.{dead()}.part"
    kept = [tmp_path / f".model.safetensors.{os.getppid()}.part", part_of(tmp_path / "x"), tmp_path / ".notes.part"]
    kept.append(tmp_path / "model.safetensors")
    for path in (left, *kept):
        path.write_bytes(b"x")
    clear_left(tmp_path)
    assert not left.exists()
    assert all(path.exists() for path in kept)


def test_both_writers_remove_it_at_their_start(tmp_path: Path) -> None:
    for path in (tmp_path / f".model-00001-of-00002.safetensors.{dead()}.part", tmp_path / f".old.gguf.{dead()}.part"):
        path.write_bytes(b"x")
        if "gguf" in path.name:
            write_file(tmp_path / "m.gguf", {}, [])
        else:
            with SafetensorsWriter(tmp_path, PLAN) as writer:
                writer.write("a", torch.zeros(1 << 16))
        assert not path.exists()


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        pytest.raises(StorageError, match=r"it needs 262,144 bytes, 1,000 are free"),
        SafetensorsWriter(tmp_path, PLAN),
    ):
        pass
    with pytest.raises(StorageError, match=r"it needs 1,200 bytes, 1,000 are free") as refused:
        write_file(tmp_path / "m.gguf", {}, [PlannedGguf("a", (300,), "F32", lambda: torch.zeros(300))])
    assert refused.value.hint == "Make room, or write to another disk."
    assert list(tmp_path.iterdir()) == []
    require_space(tmp_path / "not" / "there", 1000)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    for name in ("model.safetensors", "m.gguf"):
        part_of(tmp_path / name).symlink_to(FULL)
    with (
        pytest.raises(
            StorageError, match=r"model\.safetensors cannot be written: it needs 262,144 bytes, [\d,]+ are free"
        ),
        SafetensorsWriter(tmp_path, PLAN) as writer,
    ):
        writer.write("a", torch.zeros(1 << 16))
    with pytest.raises(StorageError, match=r"m\.gguf cannot be written: it needs 1,200 bytes"):
        write_file(tmp_path / "m.gguf", {}, [PlannedGguf("a", (300,), "F32", lambda: torch.zeros(300))])
    assert list(tmp_path.iterdir()) == []


def test_other_failures_keep_their_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="x cannot be written: No such file"),
        storing(tmp_path / "x", 1),
    ):
        (tmp_path / "absent" / "x").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"), SafetensorsWriter(tmp_path / "file" / "x", PLAN):
        pass


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_the_small_files_too(tmp_path: Path) -> None:
    source, out = write_tiny(tmp_path / "source", "llama"), tmp_path / "out"
    out.mkdir()
    part_of(out / "config.json").symlink_to(FULL)
    with pytest.raises(StorageError, match=r"config\.json cannot be written: it needs"):
        quantise_model(source, out, Options("w8"), force=True)
    assert not (out / "config.json").exists()
    assert list(out.glob(".*.part")) == []


def test_a_signal_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    source, out = write_tiny(tmp_path / "source", "llama"), tmp_path / "out"
    words = [sys.executable, "-c", HELD, str(source), "--format", "w8", "--out", str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert list(out.glob(".*.part"))
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert list(out.iterdir()) == []
