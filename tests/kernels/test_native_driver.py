"""The kernels without Python: the program of native_driver on every instruction set that this machine has, against the
golden rows (the same bits everywhere), against the law on random shapes, and the thread pool in many tiny regions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.native_driver import golden
from tests.kit.isas import CHAINS

ROOT = Path(__file__).parents[2]
ISAS = tuple(dict.fromkeys(isa for chain in CHAINS for isa in chain))
ABSENT = 3  # the driver's exit status where DFASTLLM_ISA cannot be had


def drive(*words: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DFASTLLM_ISA"}
    return subprocess.run(
        [DRIVER, *words], env=environment | ({"DFASTLLM_ISA": isa} if isa else {}), capture_output=True, text=True
    )


def _built() -> str | None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(ROOT.glob(f"build/{tag}-{tag}-*/driver"))
    return str(found[0]) if found else None


DRIVER = _built() or ""
pytestmark = pytest.mark.skipif(not DRIVER, reason="no driver: a development install (pip install -e) builds it")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    done = drive("isa", isa=request.param)
    if done.returncode == ABSENT:
        assert request.param in done.stderr
        pytest.skip(done.stderr.strip())
    return str(request.param)


def test_golden_rows(isa: str) -> None:
    done = drive("rows", isa=isa)
    wrong = golden.compare(golden.read_rows(done.stdout), json.loads(golden.PATH.read_text()), isa)
    assert not wrong
    assert done.returncode == 0


def test_golden_rows_notice_another_bit_and_another_number() -> None:
    rows = golden.read_rows(drive("rows").stdout)
    isa = drive("isa").stdout.split(":")[0]
    wanted = json.loads(golden.PATH.read_text())
    linear = next(i for i, row in enumerate(rows) if row["name"] == "linear w8g")
    rows[linear] = rows[linear] | {"hash": "0"}
    assert "linear w8g: other bits" in golden.compare(rows, wanted, isa)
    gated = next(i for i, row in enumerate(rows) if row["name"] == "gated w8 silu to 0")
    values = [rows[gated]["values"][0] + 1e-3 * rows[gated]["most"], *rows[gated]["values"][1:]]
    rows[gated] = rows[gated] | {"values": values}
    assert any(line.startswith("gated w8 silu to 0: ") for line in golden.compare(rows, wanted, "scalar"))


def test_random_shapes_follow_the_law(isa: str) -> None:
    done = drive("fuzz", "1", "120", isa=isa)
    assert (done.returncode, done.stdout) == (0, "fuzz: 0 of 120 cases are wrong\n")


def test_many_tiny_regions() -> None:
    done = drive("regions", "20000")
    assert (done.returncode, done.stdout) == (0, "regions: 0 of 20000 are wrong\n")


def _emulated() -> list[str]:
    """The command that runs what scripts/neon-check has built, or a reason why not."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("no qemu-aarch64 (Debian: apt-get install qemu-user)")
    program = ROOT / "build/neon/driver"
    sources = [*(ROOT / "src/dfastllm/kernels/native").iterdir(), *golden.PATH.parent.glob("*.[ch]*")]
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("no driver for ARM of these sources: scripts/neon-check builds it")
    return [emulator, "-cpu", "max", str(program)]


@pytest.mark.parametrize("isa", ["neon", "dotprod", "i8mm"])
def test_golden_rows_on_an_emulated_arm(isa: str) -> None:
    assert not golden.compare(golden.run_rows(_emulated(), isa), json.loads(golden.PATH.read_text()), isa)


def test_an_instruction_set_of_another_machine_is_named() -> None:
    done = drive("isa", isa="sve9")
    assert (done.returncode, done.stdout) == (ABSENT, "")
    assert "DFASTLLM_ISA must be" in done.stderr
    assert "'sve9'" in done.stderr


def test_a_wrong_call_is_told() -> None:
    done = drive("fuzz", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: driver")
