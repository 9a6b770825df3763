"""The golden rows of the native kernels: recorded on x86, compared with what the driver prints on any machine.

A row is a result of the driver (rows.cpp): a hash of its bits and, of floats, five values. Three laws:

    bits     integer formats, packing, quantisation: the same bits on every instruction set
    fused    float arithmetic: the same bits on every instruction set that has fused multiply-adds; elsewhere within
             rounding
    pairs    bfloat16 products (of int8 K,V too), which AVX-512 makes in pairs with a rounding of their own: `avx512` is
             its hash

    python -m tests.kernels.native_driver.golden record DRIVER      writes golden.json (needs AVX-512)
    python -m tests.kernels.native_driver.golden check COMMAND...   runs COMMAND rows, tells what differs
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["PATH", "Row", "compare", "law", "read_rows", "run_rows"]

PATH = Path(__file__).with_name("golden.json")
ROUNDING = 2e-5  # of the largest number of a row, where the law is not of bits
UNFUSED = ("scalar",)  # may multiply and add with two roundings

Row = dict[str, Any]


def law(name: str) -> str:
    """Of a row, by its name."""
    kernel, _, what = name.partition(" ")
    if kernel in ("pack", "weight_rows", "prepare") or (kernel == "linear" and what.removeprefix("onto ")[0] == "w"):
        return "bits"
    paired = "bf16" in what or (kernel == "attention" and what.startswith("i8"))
    return "pairs" if paired and kernel in ("linear", "head", "attention") else "fused"


def read_rows(text: str) -> list[Row]:
    """The lines of a run. Raises AssertionError for what the driver itself found wrong."""
    rows = [json.loads(line) for line in text.splitlines()]
    wrong = [row["wrong"] for row in rows if "wrong" in row]
    assert not wrong, f"rows that depend on others, or on threads: {wrong}"
    return rows


def run_rows(command: Sequence[str], isa: str) -> list[Row]:
    done = subprocess.run([*command, "rows"], env={**os.environ, "DFASTLLM_ISA": isa}, capture_output=True, text=True)
    assert done.returncode in (0, 1), f"{' '.join(command)} rows ended with {done.returncode}: {done.stderr}"
    return read_rows(done.stdout)


def _near(row: Row, golden: Row) -> bool:
    pairs = zip([*row["values"], row["most"]], [*golden["values"], golden["most"]], strict=True)
    return all((a is None) == (b is None) and (a is None or abs(a - b) <= ROUNDING * golden["most"]) for a, b in pairs)


def compare(rows: Sequence[Row], golden: Sequence[Row], isa: str) -> list[str]:
    """What differs: nothing, if all is well."""
    names = [row["name"] for row in rows]
    if names != [row["name"] for row in golden]:
        return [f"the driver has other rows than {PATH.name}; record them anew"]
    wrong = []
    for row, wanted in zip(rows, golden, strict=True):
        exact = law(row["name"]) == "bits" or isa not in UNFUSED
        if exact and row["hash"] != wanted.get(isa, wanted["hash"]):
            wrong.append(f"{row['name']}: other bits")
        elif "values" in row and isa not in wanted and not _near(row, wanted):
            wrong.append(f"{row['name']}: {row['values']} where {wanted['values']} is right")
    return wrong


def _record(driver: str) -> None:
    golden = run_rows([driver], "avx512")
    fused = {row["name"]: row for row in run_rows([driver], "avx2")}
    for i, row in enumerate(golden):
        if law(row["name"]) == "pairs" and row["hash"] != fused[row["name"]]["hash"]:
            golden[i] = fused[row["name"]] | {"avx512": row["hash"]}
    PATH.write_text("[\n" + ",\n".join(json.dumps(row) for row in golden) + "\n]\n")
    print(f"{len(golden)} rows")


def _check(command: Sequence[str]) -> int:
    isa = os.environ["DFASTLLM_ISA"]
    wrong = compare(run_rows(command, isa), json.loads(PATH.read_text()), isa)
    print("\n".join(wrong) or f"{isa}: every golden row")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("record", "check"):
        sys.exit(__doc__)
    sys.exit(_record(sys.argv[2]) if sys.argv[1] == "record" else _check(sys.argv[2:]))
