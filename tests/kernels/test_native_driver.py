"""The kernels without Python: the program of native_driver on every instruction set that this machine has, against the
golden rows (the same bits everywhere), against the law on random shapes, and the thread pool in many tiny regions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.native_driver import golden

ROOT = Path(__file__).parents[2]
ISAS = ("avx512", "avx2", "scalar")
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


def another_order(isa: str) -> None:
    if isa != "avx512":
        pytest.xfail("group formats are multiplied in another order here")


def test_golden_rows(isa: str) -> None:
    done = drive("rows", isa=isa)
    wrong = golden.compare(golden.read_rows(done.stdout), json.loads(golden.PATH.read_text()), isa)
    if wrong:
        another_order(isa)
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
    if done.returncode:
        another_order(isa)
    assert (done.returncode, done.stdout) == (0, "fuzz: 0 of 120 cases are wrong\n")


def test_many_tiny_regions() -> None:
    done = drive("regions", "20000")
    assert (done.returncode, done.stdout) == (0, "regions: 0 of 20000 are wrong\n")


def test_an_instruction_set_of_another_machine_is_named() -> None:
    done = drive("isa", isa="sve9")
    assert (done.returncode, done.stdout) == (ABSENT, "")
    assert "DFASTLLM_ISA must be" in done.stderr
    assert "'sve9'" in done.stderr


def test_a_wrong_call_is_told() -> None:
    done = drive("fuzz", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: driver")
