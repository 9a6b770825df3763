"""Cycles of the integer tiles' inner loops, by llvm-mca: what its models say of CPUs that are not here.

    python -m scripts.cycles.record [--mca llvm-mca-19] [--write]

Needs ziglang (the compiler for ARM), g++ (for x86) and llvm-mca of LLVM 17 or newer, whose models know Neoverse V1. The
models see a loop alone: all data in the nearest cache, no branch, no other core. So the figures compare instruction
sequences; they are no measured speed, and none is claimed from them. apple-m1 has no model of its own in LLVM: it gets
that of an older Apple core.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["read_cycles", "read_marks"]

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "src/dfastllm/kernels/native"
WRITTEN = ROOT / "benchmarks/cycles.json"
ROUNDS = 200

COMMON = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0", "-S")
X86, ARM = "x86_64-linux-gnu", "aarch64-linux-musl"
COMPILERS = {X86: ("g++",), ARM: (sys.executable, "-m", "ziglang", "c++", "-target", ARM)}
SETS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # target, flags as in CMakeLists.txt, CPUs
    "avx2": (X86, ("-mavx2", "-mfma", "-mf16c"), ("znver3", "znver4", "alderlake")),
    "neon": (ARM, ("-mcpu=generic",), ("cortex-a72",)),
    "dotprod": (ARM, ("-mcpu=generic+dotprod",), ("neoverse-n1", "apple-m1")),
    "i8mm": (ARM, ("-mcpu=generic+dotprod+i8mm",), ("neoverse-v1", "neoverse-n2")),
}
JUMP = re.compile(r"^\s+(j[a-z]+|b|b\.[a-z]+|cbn?z|tbn?z|call|bl|ret[a-z]*)\s")


def read_marks(assembly: str) -> list[str]:
    """The names behind LLVM-MCA-BEGIN, in order. Raises ValueError where a jump lies behind one: llvm-mca would count a
    loop's body once."""
    names, inside = [], ""
    for line in assembly.splitlines():
        if mark := re.search(r"LLVM-MCA-(BEGIN|END) (\S+)", line):
            inside = mark[2] if mark[1] == "BEGIN" else ""
            names += [inside] if inside else []
        elif inside and JUMP.match(line):
            raise ValueError(f"{inside} holds a jump: {line.strip()}")
    return names


def read_cycles(report: str) -> list[float]:
    """Cycles of one round, region after region."""
    return [int(total) / ROUNDS for total in re.findall(r"^Total Cycles:\s+(\d+)", report, re.MULTILINE)]


def _compile(target: str, flags: tuple[str, ...], out: Path) -> str:
    words = [*COMPILERS[target], *COMMON, *flags, "-I", str(NATIVE)]
    source = str(Path(__file__).with_name("loops.cpp"))
    subprocess.run([*words, source, "-o", str(out)], check=True, stderr=subprocess.DEVNULL)
    # Clang writes ARM's comments with two slashes, in which llvm-mca looks for no mark.
    text = re.sub(r"// (LLVM-MCA-\w+ \S+)", r"/* \1 */", out.read_text())
    out.write_text(text)
    return text


def _rows(mca: str) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for isa, (target, flags, cpus) in SETS.items():
            path = Path(folder) / f"{isa}.s"
            names = read_marks(_compile(target, flags, path))
            triple = ["-mtriple=" + target, *(["-mattr=+dotprod,+i8mm"] if target == ARM else [])]
            for cpu in cpus:
                command = [mca, *triple, "-mcpu=" + cpu, f"-iterations={ROUNDS}", str(path)]
                report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                for name, cycles in zip(names, read_cycles(report), strict=True):
                    loop, count, products = re.fullmatch(r"(\w+)_(\d+)_(\d+)", name).groups()  # type: ignore[union-attr]
                    rows.append({
                        "isa": isa, "cpu": cpu, "format": loop, "rows": int(count),
                        "products": int(products), "cycles": round(cycles, 1),
                        "products_per_cycle": round(int(products) / cycles, 1),
                    })  # fmt: skip
    return rows


def _version(*words: str) -> str:
    text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", text)
    return found[0] if found else text.strip()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mca", default="llvm-mca")
    options.add_argument("--write", action="store_true", help=f"write {WRITTEN.relative_to(ROOT)}")
    given = options.parse_args()
    rows = _rows(given.mca)
    for row in rows:
        print(
            "{isa:8} {cpu:12} {format:9} {rows} rows {cycles:7} cycles {products_per_cycle:6} products/cycle".format(
                **row
            )
        )
    if given.write:
        tools = {
            "llvm_mca": _version(given.mca, "--version"),
            "ziglang": _version(sys.executable, "-m", "ziglang", "version"),
        }
        head = json.dumps({"what": "llvm-mca's models, not a measurement", **tools})
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        WRITTEN.write_text(f'{head[:-1]}, "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
